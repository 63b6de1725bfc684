"""How much memory this rank takes: its peak under the settings in force, and whether it may take more.

On a GPU the peak is the caching allocator's, on Linux the high-water mark of the process, both counted anew whenever
dials turn. The line through the peaks (`policies.learn.memory`) answers before a larger micro-batch or another tier
whether it will fit, and where memory is scarce a trial allocation of what it would add (the ballast) checks that on the
device itself. Reading costs some microseconds and is done in few steps. Knows no plan; called by the loop and by
`orchestrator.train.batch.guard`.
"""

from __future__ import annotations

import contextlib
import re
import resource
from pathlib import Path
from typing import Protocol

import psutil
import torch

from orchestrator.policies.learn.memory import MemoryLine, MemoryPoint, remember, solve_line
from orchestrator.policies.plan import Settings

_SETTLED_STEPS = 2
"""Steps after a change until its peak is there: in the first one optimizer state and workspaces are still to come."""
_PERIOD_STEPS = 64
_PLENTY = 0.5
"""Part of what nobody uses on a GPU that may be counted on without trying: other processes may take of it meanwhile."""


class Gauge(Protocol):
    """Where memory is read."""

    def reset(self) -> None:
        """Count the peak anew."""
        ...

    def peak_bytes(self) -> int:
        """The peak since the last reset."""
        ...

    def fixed_bytes(self) -> int:
        """What is held between two steps; 0 where that cannot be told from what is free."""
        ...

    def can_hold(self, needed_bytes: int) -> bool:
        """Whether the process could grow to that many bytes right now."""
        ...


class CudaGauge:
    """The caching allocator of one GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def reset(self) -> None:
        """Count the peak anew."""
        torch.cuda.reset_peak_memory_stats(self._device)

    def peak_bytes(self) -> int:
        """The most that was allocated at any instant."""
        return torch.cuda.max_memory_allocated(self._device)

    def fixed_bytes(self) -> int:
        """What is allocated now."""
        return torch.cuda.memory_allocated(self._device)

    def can_hold(self, needed_bytes: int) -> bool:
        """Whether the GPU has so much more to give by far; else allocate the difference and give it back.

        What the allocator caches is given back only where it is scarce: the steps behind that must ask the driver for
        all of it again, which takes longer than the change of settings that is being prepared.
        """
        missing = needed_bytes - torch.cuda.memory_allocated(self._device)
        if missing <= _PLENTY * torch.cuda.mem_get_info(self._device)[0]:
            return True
        torch.cuda.empty_cache()
        try:
            ballast = torch.empty(missing, dtype=torch.uint8, device=self._device)
        except torch.OutOfMemoryError:
            return False
        del ballast
        torch.cuda.empty_cache()
        return True


class ProcessGauge:
    """The resident memory of this process, as Linux counts it."""

    def __init__(self, directory: Path = Path("/proc/self")) -> None:
        self._directory = directory

    def reset(self) -> None:
        """Count the high-water mark anew, where the system lets us."""
        with contextlib.suppress(OSError):
            (self._directory / "clear_refs").write_text("5")

    def peak_bytes(self) -> int:
        """The high-water mark of resident memory."""
        with contextlib.suppress(OSError):
            found = re.search(r"^VmHWM:\s+(\d+) kB", (self._directory / "status").read_text(), re.MULTILINE)
            if found:
                return int(found.group(1)) * 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def fixed_bytes(self) -> int:
        """Not known: freed memory may stay resident."""
        return 0

    def can_hold(self, needed_bytes: int) -> bool:
        """Whether the machine has that much available beyond what the process holds."""
        missing = needed_bytes - int(psutil.Process().memory_info().rss)
        return missing <= 0 or missing <= int(psutil.virtual_memory().available)


class MemoryMeter:
    """Measures one rank, remembers the peaks of a trial, and predicts with them."""

    def __init__(self, device: torch.device, limit_bytes: int = 0, gauge: Gauge | None = None) -> None:
        """`limit_bytes` is what the rank was granted; 0 where nobody said."""
        default: Gauge = CudaGauge(device) if device.type == "cuda" else ProcessGauge()
        self._gauge, self._limit_bytes = gauge or default, limit_bytes
        self._points: tuple[MemoryPoint, ...] = ()
        self._settings: Settings | None = None
        self._num_steps = 0
        self._peak_bytes = self._fixed_bytes = 0

    def observe(self, settings: Settings) -> int:
        """The peak under `settings`, asked after every step; 0 until it is known."""
        if settings != self._settings:
            self._settings, self._num_steps, self._peak_bytes = settings, 0, 0
            self._gauge.reset()  # this step ran before the reset and does not count
            return 0
        self._num_steps += 1
        if self._num_steps == _SETTLED_STEPS or self._num_steps % _PERIOD_STEPS == 0:
            self._peak_bytes, self._fixed_bytes = self._gauge.peak_bytes(), self._gauge.fixed_bytes()
            point = MemoryPoint(
                tier=settings.tier,
                num_workers=settings.num_workers,
                micro_batch=settings.micro_batch,
                peak_bytes=self._peak_bytes,
            )
            self._points = remember(self._points, point)
        return self._peak_bytes

    def line(self, settings: Settings) -> MemoryLine | None:
        """What a rank takes in the tier of `settings`; None before anything was measured."""
        return solve_line(self._points, settings.tier, settings.num_workers, self._fixed_bytes)

    def has_room(self, settings: Settings) -> bool:
        """Whether this rank can go on under `settings`: within its grant, and on the device as it is now."""
        line = self.line(settings)
        if line is None:
            return True
        needed_bytes = line.needed_bytes(settings.micro_batch)
        if self._limit_bytes > 0 and needed_bytes > self._limit_bytes:
            return False
        return self._gauge.can_hold(int(needed_bytes))
