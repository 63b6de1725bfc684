"""A fault for real worker processes: one rank of two runs out of memory once, in a backward pass of the mlp job.

Python imports a module of this name by itself where its folder is on PYTHONPATH; nothing of the orchestrator knows of
it. The file named by OVERFLOW_MARKER says that it has fired, and keeps it from firing again.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

MARKER = "OVERFLOW_MARKER"
RANK = 1
FITS = 4
"""Micro-batches of at most so many samples have room."""
AT_FORWARD = 70
"""Forward passes of the rank before it runs out."""


class _Finder(MetaPathFinder):
    """Changes `jobs.mlp` when it is imported."""

    def find_spec(self, fullname: str, path: object, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != "orchestrator.jobs.mlp":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        assert spec is not None
        loader: Any = spec.loader
        execute = loader.exec_module

        def execute_and_arm(module: Any) -> None:
            execute(module)
            _arm(module.MlpJob)

        loader.exec_module = execute_and_arm
        return spec


def _arm(job_class: Any) -> None:
    plain = job_class.loss
    num_forwards = 0

    def loss(self: Any, model: Any, batch: Any) -> Any:
        nonlocal num_forwards
        num_forwards += 1
        terms = plain(self, model, batch)
        if num_forwards >= AT_FORWARD and len(batch[1]) > FITS and terms.loss_sum.requires_grad and _is_first():
            terms.loss_sum.register_hook(_overflow)
        return terms

    job_class.loss = loss


def _is_first() -> bool:
    """Whether this is the rank, and it has not fired yet; says that it has."""
    import torch.distributed as dist

    if not dist.is_initialized() or dist.get_rank() != RANK:
        return False
    try:
        os.close(os.open(os.environ[MARKER], os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def _overflow(_: Any) -> None:
    import torch

    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB (injected)")


if MARKER in os.environ:
    sys.meta_path.insert(0, _Finder())
