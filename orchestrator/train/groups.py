"""The process groups of one rank: how they are opened, broken from one side, and made again in the same processes.

A rank that leaves a trial in the middle of a step (it ran out of memory) has left the others inside a collective that
will not end by itself. `break_off` ends it on every rank at once: it shuts down the connections of the gloo groups,
which wakes whoever waits on them, and on GPUs a watcher on each rank sees that and aborts the NCCL communicator.
`regroup` then makes new groups in milliseconds, where a restart of the worker group would take Ray tens of seconds.
Knows no trial, no orders and no Ray. Opened by the slot before its first trial.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from orchestrator.train.pulse import Pulse
from orchestrator.train.stall import Stall
from orchestrator.train.step_mode.choice import StepMode
from orchestrator.train.step_mode.recorder import Recorder

logger = logging.getLogger(__name__)

TIMEOUT = timedelta(minutes=30)
"""Ranks wait for each other as long as a trial is paused or evaluates; a dead rank is noticed by its connection."""
_WATCH_MS = 200

Address = tuple[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """Where a process stands in its worker group. `group` is the side group for small agreements.

    `step_mode` is how its steps are executed, where that can be chosen; `recorder` makes what records them, None for
    CUDA graphs. `trials_ahead` is how many trials of its kind the process is expected to serve, this one included.
    `stall` times its steps, `pulse` is its heartbeat.
    """

    rank: int
    world_size: int
    device: torch.device
    group: dist.ProcessGroup | None = None
    mesh: DeviceMesh | None = None
    step_mode: StepMode = StepMode.AUTO
    recorder: Callable[[nn.Module, torch.optim.Optimizer], Recorder] | None = None
    trials_ahead: float = 1.0
    stall: Stall = field(default_factory=Stall, compare=False)
    pulse: Pulse = field(default_factory=Pulse, compare=False)


class Groups:
    """A side group for agreements and a mesh to shard over, beside the default group, which is only met in."""

    def __init__(
        self,
        rank: int,
        world_size: int,
        device: torch.device,
        step_mode: StepMode = StepMode.AUTO,
        trials_ahead: float = 1.0,
    ) -> None:
        self._rank, self._world_size, self._device = rank, world_size, device
        self._step_mode, self._trials_ahead = step_mode, trials_ahead
        self._train: dist.ProcessGroup | None = None
        self._connections: dict[int, tuple[Address, Address]] = {}
        self._is_aborted = False
        self._num_opened = 0
        self.ranks = self._open()
        if world_size > 1 and device.type == "cuda":
            threading.Thread(target=self._watch_for_ever, daemon=True, name="group watcher").start()

    def break_off(self) -> None:
        """Wake every rank that waits for this one in a collective; nothing can be sent over these groups any more."""
        for number, addresses in self._connections.items():
            if _addresses_of(number) == addresses:
                with contextlib.suppress(OSError), socket.socket(fileno=os.dup(number)) as connection:
                    connection.shutdown(socket.SHUT_RDWR)
        self.abort()

    def regroup(self) -> Ranks:
        """New groups for the same ranks, called by all of them; what was made with the old ones is of no use.

        Raises:
            RuntimeError: not all ranks came.
        """
        old = [group for group in (self.ranks.group, self._train) if group is not None]
        self._connections = {}
        for group in old:
            dist.destroy_process_group(group)
        self.ranks = self._open()
        return self.ranks

    def abort(self) -> None:
        """End what runs on the GPU over the training group; gloo has no such call and needs none."""
        if self._train is not None and self._device.type == "cuda" and not self._is_aborted:
            self._is_aborted = True
            self._train.abort()

    def is_broken(self, timeout_ms: int) -> bool:
        """Whether another rank has shut down a connection or is gone; returns after the timeout if none is."""
        if any(_addresses_of(number) != addresses for number, addresses in tuple(self._connections.items())):
            return True  # gloo has noticed first, and closed its own end
        waiter = select.poll()
        for number in tuple(self._connections):
            waiter.register(number, select.POLLRDHUP)
        return any(event & (select.POLLRDHUP | select.POLLHUP | select.POLLERR) for _, event in waiter.poll(timeout_ms))

    def _open(self) -> Ranks:
        if self._world_size == 1:
            return Ranks(
                rank=self._rank,
                world_size=1,
                device=self._device,
                step_mode=self._step_mode,
                trials_ahead=self._trials_ahead,
            )
        before = _open_sockets()
        group = dist.new_group(backend="gloo", timeout=TIMEOUT)
        self._train, self._is_aborted = dist.new_group(timeout=TIMEOUT), False
        mine = {number: pair for number, pair in _open_sockets().items() if before.get(number) != pair}
        addresses: list[set[Address]] = [set()] * self._world_size
        dist.all_gather_object(addresses, {own for own, _ in mine.values()}, group=group)
        others = {address for rank, known in enumerate(addresses) if rank != self._rank for address in known}
        # Only what ends at another rank: meanwhile other threads of the process may have opened connections.
        self._connections = {number: pair for number, pair in mine.items() if pair[1] in others}
        # A name of its own: DTensor caches by mesh, and takes meshes over the same ranks for one and the same.
        self._num_opened += 1
        names = (f"ranks_{self._num_opened}",)
        mesh = DeviceMesh.from_group(self._train, self._device.type, mesh_dim_names=names)
        return Ranks(
            rank=self._rank,
            world_size=self._world_size,
            device=self._device,
            group=group,
            mesh=mesh,
            step_mode=self._step_mode,
        )

    def _watch_for_ever(self) -> None:
        """On a GPU nothing else would end a collective whose other ranks have gone, or that stalls."""
        broken: Ranks | None = None
        while True:
            if broken is self.ranks:
                time.sleep(_WATCH_MS / 1e3)
            else:
                broken = self._watch()

    def _watch(self) -> Ranks | None:
        """Look once, for a fifth of a second; the ranks whose groups had to be ended."""
        ranks = self.ranks
        if ranks.stall.is_over():
            logger.warning(
                "a step has taken more than %.0f s: the groups are broken off, and the trial goes on from its last "
                "commit; trials of several ranks that share GPUs can hold each other up. It stands at:\n%s",
                ranks.stall.limit_s,
                ranks.stall.where(),
            )
            self.break_off()
            return ranks
        if self.is_broken(_WATCH_MS):
            logger.warning("another rank broke off; the training group is aborted")
            self.abort()
            return ranks
        return None


def _open_sockets() -> dict[int, tuple[Address, Address]]:
    """File descriptor to (own address, other end) of every connected TCP socket of this process."""
    found = {}
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError, ValueError):
            if not entry.readlink().name.startswith("socket:"):
                continue
            addresses = _addresses_of(int(entry.name))
            if addresses is not None:
                found[int(entry.name)] = addresses
    return found


def _addresses_of(number: int) -> tuple[Address, Address] | None:
    """(own address, other end) of a connected TCP socket by its file descriptor; None where it is none."""
    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(number)) as connection:
        if connection.family in {socket.AF_INET, socket.AF_INET6}:
            return connection.getsockname()[:2], connection.getpeername()[:2]
    return None
