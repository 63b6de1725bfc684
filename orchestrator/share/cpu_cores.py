"""A share of a CPU node: affinity of every thread, the number of torch threads, and a duty cycle at the boundary.

Affinity says which cores, the duty cycle says how much of them: whatever the threads do (background threads are charged
too), CPU seconds of the process stay at `amount` times wall time. Every rank of a trial sleeps at the same boundary and
waits for the others inside the step without computing, so the ranks share a common duty without talking about it.
Deliberately not covered: memory, memory bandwidth, and CPU time of child processes (they do inherit the affinity).
Used through `orchestrator.share.SHARES`, in the process of one rank.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import ClassVar, Protocol

from orchestrator.errors import ShareError
from orchestrator.share.duty_cycle import DutyCycle, num_threads
from orchestrator.share.mechanism import Enforcement

WORKER_ENVIRONMENT = {"GOMP_SPINCOUNT": "10000"}
"""What a rank's environment should hold before torch is first imported.

Threads of one matrix product wait for each other by spinning. Where their cores are shared with another trial, the one
waited for may be off its core, and spinning for libgomp's default of milliseconds made steps up to ten times slower
(measured: 1.5 and 0.5 cores side by side on 2). This many turns cost nothing on an idle machine and bound the waste.
"""

_MAX_SCANS = 8
"""A thread started during a scan inherits the affinity of its parent, old or new; it is seen by the next scan."""

_AMOUNT_SLACK = 1e-3

_BURST_ELEMENTS, _BURST_NS, _SEARCH_S = 1 << 18, 200_000, 0.02
"""Work that torch divides among its threads, how long each must have run to be known by it, and how long to try."""

_FULL = "every thread is bound to the granted cores; below their sum a duty cycle sleeps between steps"
_DUTY_ONLY = "duty cycle only: a sleep between steps keeps CPU time to the share, but binding to cores was refused"


class Threads(Protocol):
    """What the machine lets a process do with its own threads."""

    def ids(self) -> Iterable[int]:
        """Ids of all threads of the process."""
        ...

    def cores(self, thread_id: int) -> set[int]:
        """Cores the thread may run on; 0 is the calling thread."""
        ...

    def bind(self, thread_id: int, cores: Iterable[int]) -> None:
        """Let the thread run on `cores` only."""
        ...

    def count(self) -> int:
        """Threads torch computes with."""
        ...

    def set_count(self, count: int) -> None:
        """Let torch compute with so many threads."""
        ...

    def compute_ids(self) -> Sequence[int]:
        """Ids of the threads torch computes with for the calling thread, which comes first; they exist afterwards."""
        ...


class ProcessThreads:
    """The threads of this process, through the Linux scheduler and torch."""

    def __init__(self) -> None:
        self._team: list[int] = []

    def ids(self) -> Iterable[int]:
        """Ids of all threads of the process."""
        return [int(name) for name in os.listdir("/proc/self/task")]  # noqa: PTH208 - a boundary has no time for Path

    def cores(self, thread_id: int) -> set[int]:
        """Cores the thread may run on; 0 is the calling thread."""
        return os.sched_getaffinity(thread_id)

    def bind(self, thread_id: int, cores: Iterable[int]) -> None:
        """Let the thread run on `cores` only."""
        os.sched_setaffinity(thread_id, cores)

    def count(self) -> int:
        """Threads torch computes with."""
        import torch

        return torch.get_num_threads()

    def set_count(self, count: int) -> None:
        """Let torch compute with so many threads."""
        import torch

        torch.set_num_threads(count)

    def compute_ids(self) -> Sequence[int]:
        """Found by what they do: nothing names them, so all are given the same work, and those that ran are meant."""
        import torch

        own, num_others = threading.get_native_id(), torch.get_num_threads() - 1
        if len(self._team) < num_others or not set(self._team) <= set(self.ids()):
            self._team = self._find_team(own, num_others)
        return [own, *self._team[:num_others]]

    def _find_team(self, own: int, num_others: int) -> list[int]:
        """Empty where it cannot be told."""
        import torch

        before, deadline_s = self._run_ns(), time.monotonic() + _SEARCH_S
        work = torch.ones(_BURST_ELEMENTS)
        while time.monotonic() < deadline_s:
            work.add_(1.0)
            ran = {id_: now - before.get(id_, 0) for id_, now in self._run_ns().items() if id_ != own}
            team = sorted(ran, key=lambda id_: -ran[id_])[:num_others]
            if len(team) == num_others and all(ran[id_] >= _BURST_NS for id_ in team):
                return team
        return []

    def _run_ns(self) -> dict[int, int]:
        """How long each thread has run, in ns; what the kernel does not tell is left out."""
        found = {}
        for id_ in self.ids():
            with contextlib.suppress(OSError, ValueError, IndexError):
                found[id_] = int(Path(f"/proc/self/task/{id_}/schedstat").read_text().split()[0])
        return found


class CpuCores:
    """Holds this process to some cores' worth of CPU time. Build it before anything narrows the process's affinity.

    Args:
        threads: the threads to bind.
        now_s: monotonic wall time.
        used_s: CPU seconds of the process so far.
        wait: sleeps so many seconds, less when woken; None for a sleep that `wake` ends.
    """

    name: ClassVar[str] = "cpu_cores"

    def __init__(
        self,
        threads: Threads | None = None,
        *,
        now_s: Callable[[], float] = time.monotonic,
        used_s: Callable[[], float] = time.process_time,
        wait: Callable[[float], object] | None = None,
    ) -> None:
        self._threads: Threads = ProcessThreads() if threads is None else threads
        self._node_cores = tuple(sorted(self._threads.cores(0)))
        self._woken = threading.Event()
        self._duty = DutyCycle(now_s, used_s, self._woken.wait if wait is None else wait)
        self._count_before: int | None = None
        self._pinned_before: dict[int, set[int]] = {}
        self._can_bind = True

    @property
    def node_cores(self) -> tuple[int, ...]:
        """Cores that unit ids index into, ascending."""
        return self._node_cores

    @property
    def debt_s(self) -> float:
        """CPU seconds overdrawn at the last boundary."""
        return self._duty.debt_s

    @property
    def enforcement(self) -> Enforcement:
        """Compute is enforced; the note says whether by cores and duty cycle, or by the duty cycle alone."""
        return Enforcement(compute=True, memory=False, live=True, note=_FULL if self._can_bind else _DUTY_ONLY)

    def apply(self, units: tuple[int, ...], amount: float) -> None:
        """Grant `amount` cores' worth of CPU time on the node's cores `units`; nothing changes when it raises.

        Raises:
            ShareError: a unit that the node does not have, or an amount that does not fit the units.
        """
        self._check(units, amount)
        if self._count_before is None:
            self._count_before = self._threads.count()
            self._pinned_before = self._find_pinned()
        amount = min(amount, float(len(units)))
        self._bind_all({self._node_cores[unit] for unit in units})
        count = num_threads(amount)
        self._threads.set_count(count)
        if count > 1 and count == len(units) and self._can_bind:
            self._spread(units)
        self._duty.set_amount(amount)

    def hold_back(self) -> float:
        """Sleep until the CPU time used so far is paid for, or until `wake`. Returns seconds slept."""
        slept_s = self._duty.hold_back()
        self._woken.clear()
        return slept_s

    def wake(self) -> None:
        """End the sleep of `hold_back` now, or skip the next one; the debt is slept off later."""
        self._woken.set()

    def charged_s(self) -> float:
        """CPU seconds of the process charged since the first `apply`, up to the last boundary."""
        return self._duty.charged_s

    def release(self) -> None:
        """Give every thread the cores, and torch the threads, that they had before the first `apply`."""
        if self._count_before is None:
            return
        self._duty.stop()
        self._bind_all(set(self._node_cores), self._pinned_before)
        self._threads.set_count(self._count_before)
        self._count_before, self._pinned_before = None, {}
        self._woken.clear()

    def _check(self, units: tuple[int, ...], amount: float) -> None:
        num_cores = len(self._node_cores)
        outside = [unit for unit in units if not 0 <= unit < num_cores]
        if outside or not units:
            raise ShareError(
                f"units={units} cannot be granted on a node with {num_cores} cores; allowed: at least one of 0 to "
                f"{num_cores - 1}; check that the node's cores were counted from the process's affinity"
            )
        if len(set(units)) != len(units):
            raise ShareError(f"units={units} names a core twice; allowed: each core once")
        if not 0 < amount <= len(units) + _AMOUNT_SLACK:
            raise ShareError(
                f"amount={amount} does not fit {len(units)} cores {units}; allowed: above 0 and at most {len(units)}; "
                "a pause is kept at the boundary, not by a mechanism"
            )

    def _find_pinned(self) -> dict[int, set[int]]:
        """Threads that something else bound to less than the node's cores, with what they are bound to."""
        node = set(self._node_cores)
        pinned = {}
        for thread_id in self._threads.ids():
            try:
                cores = self._threads.cores(thread_id)
            except OSError:  # the thread has ended
                continue
            if cores != node:
                pinned[thread_id] = cores
        return pinned

    def _spread(self, units: tuple[int, ...]) -> None:
        """Give each compute thread a core of its own.

        Left to the scheduler, a thread that is new, or was not needed for a while, starts on the core of the thread
        that woke it, and stays there for a step or more: both wait for each other on one core, and the step after a
        share grew takes longer than before. Seen in processes of low priority, as Ray's workers are.
        """
        for thread_id, unit in zip(self._threads.compute_ids(), units, strict=False):
            with contextlib.suppress(OSError):  # it has ended
                self._threads.bind(thread_id, {self._node_cores[unit]})

    def _bind_all(self, cores: set[int], exceptions: dict[int, set[int]] | None = None) -> None:
        done: set[int] = set()
        for _ in range(_MAX_SCANS):
            fresh = [thread_id for thread_id in self._threads.ids() if thread_id not in done]
            if not fresh:
                return
            for thread_id in fresh:
                done.add(thread_id)
                try:
                    self._threads.bind(thread_id, (exceptions or {}).get(thread_id, cores))
                    self._can_bind = True
                except ProcessLookupError:  # the thread has ended
                    continue
                except OSError:  # a container may forbid the call or the core
                    self._can_bind = False
                    return
