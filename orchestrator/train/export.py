"""A trained model as files that plain PyTorch loads, from a commit of a trial.

Of a declared training the model is built from its parameters and loaded; a Hugging Face model is written in that
library's layout. Of a function the files that it reported are copied unchanged; where no weights are among them, those
of the model that it watches are written. Called by `orchestrator export` and by `Run.best`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file, save_model
from torch import Tensor, nn

from orchestrator.errors import CheckpointError, ConfigError
from orchestrator.jobs import JobKey, build_job
from orchestrator.jobs.training import Training
from orchestrator.train import checkpoint, manifest
from orchestrator.train.function.watched import FILE as WATCHED
from orchestrator.train.optimizers import as_one

WEIGHTS, PARAMS = "model.safetensors", "params.json"
_WEIGHTS = {".safetensors", ".pt", ".pth", ".bin", ".ckpt"}
"""Ends of the names of files with weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """What is exported.

    Attributes:
        trial_id: the trial.
        job: what is trained, as one text (`JobKey`).
        params: its parameters.
        commit: directory of the commit.
        metric: name of the value that trials are compared by.
        value: that of the commit, None where it is not known.
    """

    trial_id: str
    job: str
    params: Mapping[str, Any]
    commit: Path
    metric: str
    value: float | None


def export(source: Source, target: Path) -> str:
    """Write the model and `params.json` into a new directory; returns the line of Python that loads the model.

    Raises:
        ConfigError: the directory is there and not empty.
        DamagedError: the commit and all others of the trial are damaged.
    """
    if target.exists() and any(target.iterdir()):
        raise ConfigError(f"{target} is there and not empty; allowed: a new directory", "--output")
    source, record = _whole(source)
    target.mkdir(parents=True, exist_ok=True)
    line = _write_function(source, target) if _is_function(record) else _write_model(source, target)
    key = JobKey.of(source.job)
    facts = {
        "trial_id": source.trial_id,
        "job": key.path,
        **({"data": key.data} if key.data else {}),
        **({"args": dict(key.args)} if key.args else {}),
        "params": dict(source.params),
        "metric": source.metric,
        "value": source.value,
        "step": record.step,
    }
    (target / PARAMS).write_text(json.dumps(facts, indent=2, default=str) + "\n")
    return line


def state_dict(source: Source) -> dict[str, Tensor]:
    """The weights of a commit by name, on the CPU.

    Raises:
        CheckpointError: all commits are damaged, or a function's files do not say which of them holds weights.
    """
    source, record = _whole(source)
    if not _is_function(record):
        return dict(built(source).state_dict())
    files = [path for path in sorted(source.commit.rglob("*")) if path.is_file() and path.name != WATCHED]
    tensors = [path for path in files if path.suffix in _WEIGHTS]
    if not tensors and (source.commit / WATCHED).exists():
        return _watched(source.commit)
    if len(tensors) != 1:
        names = ", ".join(path.name for path in files if path.name != manifest.MANIFEST_NAME)
        raise CheckpointError(
            f"{source.commit} holds {names}, and it is not clear which are the weights; load them yourself"
        )
    if tensors[0].suffix == ".safetensors":
        return dict(load_file(tensors[0]))
    loaded: Any = torch.load(tensors[0], weights_only=True, map_location="cpu")
    return dict(loaded.get("state_dict", loaded) if isinstance(loaded, dict) else loaded)


def built(source: Source) -> nn.Module:
    """The model of a declared training with the weights of a commit, on the CPU.

    Raises:
        CheckpointError: the commit is damaged or does not fit the model.
    """
    training = Training.of(build_job(source.job, source.params))
    training.prepare()
    model = training.build_model()
    members, _ = training.build_optimizers(model, 1)  # its schedule is not used
    checkpoint.load(source.commit, model=model, optimizer=as_one(members), rank=0, world_size=1, group=None)
    return model.eval()


def _watched(commit: Path) -> dict[str, Tensor]:
    """The weights of the model that a function watches; each a tensor of its own, tied ones as well."""
    # Its files were compared with their SHA-256 before; the state of an optimizer may hold any object.
    state = torch.load(commit / WATCHED, map_location="cpu", weights_only=False)["model"]
    return {name: value.clone().contiguous() for name, value in state.items() if isinstance(value, Tensor)}


def _whole(source: Source) -> tuple[Source, manifest.Manifest]:
    """The same with the newest whole commit where its own is damaged; its value is not known then."""
    commit, record = checkpoint.newest_whole(source.commit, also_later=True)
    return (source if commit == source.commit else replace(source, commit=commit, value=None)), record


def _is_function(record: manifest.Manifest) -> bool:
    return record.extra.get("kind") == "function"


def _write_function(source: Source, target: Path) -> str:
    """Copy what a function reported; the line says where it is."""
    ignored = shutil.ignore_patterns(manifest.MANIFEST_NAME, WATCHED)
    shutil.copytree(source.commit, target, ignore=ignored, dirs_exist_ok=True)
    if (source.commit / WATCHED).exists() and not any(path.suffix in _WEIGHTS for path in target.rglob("*")):
        save_file(_watched(source.commit), target / WEIGHTS)
    names = sorted(path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file())
    weights = next((name for name in names if name.endswith(".safetensors")), None)
    if weights is not None:
        return f"from safetensors.torch import load_file; state = load_file({str(target / weights)!r})"
    weights = next((name for name in names if name.endswith((".pt", ".pth", ".bin", ".ckpt"))), None)
    if weights is not None:
        return f"import torch; state = torch.load({str(target / weights)!r}, weights_only=True)"
    return f"from pathlib import Path; files = sorted(Path({str(target)!r}).rglob('*'))  # as the function wrote them"


def _write_model(source: Source, target: Path) -> str:
    model = built(source)
    save = getattr(model, "save_pretrained", None)
    if callable(save):
        save(target)
        name = type(model).__name__
        return f"from transformers import {name}; model = {name}.from_pretrained({str(target)!r})"
    save_model(model, str(target / WEIGHTS))  # tied weights once
    return (
        f"from safetensors.torch import load_model; load_model(model, {str(target / WEIGHTS)!r})"
        "  # into a model of the same class"
    )
