"""Ray Train's set-up of torch for worker groups whose ranks compute on GPUs, each on one of its own.

Ray Train runs it in the controller of each worker group, before any rank has touched CUDA. Only for groups of several
ranks: a single one computes where Ray has put it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import ray
from ray.train.backend import Backend
from ray.train.torch import TorchConfig

from orchestrator.devices.cards import Seat, visible

VISIBLE = "CUDA_VISIBLE_DEVICES"
NCCL_ENVIRONMENT = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1"}
"""Multicast over NVLink stays off unless somebody has set it: it belongs to whole cards, and ours are shared."""


class WorkerGroup(Protocol):
    """What Ray lets a backend do with a worker group."""

    def execute(self, function: Callable[[], Seat], /) -> Sequence[Seat]:
        """What it returns on every rank."""
        ...

    def execute_single_async(self, rank: int, function: Callable[[str], None], cards: str, /) -> object:
        """Begin it on one rank; a reference to what it returns."""
        ...


class OwnCards(TorchConfig):  # type: ignore[misc]  # Ray has no types
    """As `TorchConfig`, with a GPU of its own for each rank, which is cuda:0 there."""

    @property
    def backend_cls(self) -> type[Backend]:
        """What sets the ranks up."""
        return OwnCardsBackend

    @property
    def train_func_context(self) -> Callable[[], contextlib.AbstractContextManager[None]]:
        """Nothing around the training: Ray would make the assigned GPU the current one."""
        return contextlib.nullcontext


class OwnCardsBackend(Backend):  # type: ignore[misc]
    """Says which GPU each rank sees, and leaves the rest to Ray."""

    share_cuda_visible_devices = True

    def __init__(self) -> None:
        self._torch = TorchConfig().backend_cls()

    def on_start(self, worker_group: WorkerGroup, backend_config: TorchConfig) -> None:
        """Before the process group: CUDA reads what it may see when it is first used."""
        seats = worker_group.execute(seat)
        calls = [
            worker_group.execute_single_async(rank, set_environment, each) for rank, each in enumerate(visible(seats))
        ]
        ray.get(calls)
        self._torch.on_start(worker_group, backend_config)

    def on_training_start(self, worker_group: WorkerGroup, backend_config: TorchConfig) -> None:
        """Left to Ray."""
        self._torch.on_training_start(worker_group, backend_config)

    def on_shutdown(self, worker_group: WorkerGroup, backend_config: TorchConfig) -> None:
        """Left to Ray."""
        self._torch.on_shutdown(worker_group, backend_config)


def seat() -> Seat:
    """Where Ray has put the rank of this process."""
    node_id = ray.get_runtime_context().get_node_id()
    assigned = str(ray.get_gpu_ids()[0])
    return Seat(node_id=node_id, assigned=assigned, cards=_cards_of(node_id))


def set_environment(cards: str) -> None:
    """Let this process see these GPUs only."""
    os.environ[VISIBLE] = cards
    for name, value in NCCL_ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def _cards_of(node_id: str) -> tuple[str, ...]:
    """All GPUs of a node as CUDA_VISIBLE_DEVICES names them there: what Ray was started with, else by number."""
    named: Any = None
    with contextlib.suppress(AttributeError):  # not public in Ray
        named = ray._private.worker.global_worker.original_visible_accelerator_ids.get("GPU")
    if named:
        return tuple(str(each) for each in named)
    counts = [node["Resources"].get("GPU", 0) for node in ray.nodes() if node["NodeID"] == node_id]
    return tuple(str(number) for number in range(int(sum(counts))))
