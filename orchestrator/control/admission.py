"""Whether one more trial may start on the GPUs of a run: the knee, memory, and trials that are better left alone.

On cores every idle slot takes a trial, as ever. On GPUs as many run as the measured sum of their speeds is worth
(`knee`) and as memory allows; a trial under which a GPU failed runs alone, since under MPS others would fail with it.
Called by the controller when it assigns trials, and once a second.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

from orchestrator.control.knee import Knee, affordable
from orchestrator.control.world import Run, Trial, World
from orchestrator.names import write_atomically
from orchestrator.policies.snapshot import DeviceKind, DeviceView
from orchestrator.policies.tier import Tier

logger = logging.getLogger(__name__)

FILE_NAME = "knees.json"
"""Numbers found, by device type and shape; beside the run directories, for the runs to come."""

_SPARE_RATIO = 0.08
_SAFETY = 2
"""Warming up is done with one choice of the search space, in eager steps: another may be larger, and graphs are."""
_CONTEXT_BYTES = 1 << 30
"""What a process holds of a GPU beside its allocator: context, libraries, kernels."""


class Admission:
    """Says who may start, for one run."""

    def __init__(self, world: World, run: Run) -> None:
        self._world, self._run = world, run
        self._path = Path(run.spec.run_dir).parent / FILE_NAME
        self._knee = Knee(_read(self._path))
        self._peaks: dict[str, int] = {}

    def may_start(self, trial: Trial) -> bool:
        """Whether a queued trial may take an idle slot now."""
        gpus = self._gpus()
        if not gpus:
            return True
        running = self._run.running()
        if any(other.is_suspect for other in running) or (trial.is_suspect and running):
            return False
        shape, num_ranks = self._run.spec.shape(trial.params), self._num_ranks(running)
        limit = self._affordable(gpus, shape, num_ranks)
        if all(self._run.spec.shape(other.params) == shape for other in running):  # only alike ones have a knee
            limit = min(limit, self._knee.limit(_key(gpus[0], shape)) * len(gpus))
        size = trial.num_workers or self._run.spec.start.num_workers
        return num_ranks < limit and (not running or num_ranks + size <= limit)

    def observe(self, now_s: float) -> bool:
        """Look at the trials that run; whether more may start now than before."""
        gpus, spec = self._gpus(), self._run.spec
        running = [trial for trial in self._run.running() if trial.window is not None]
        if not gpus or not running:
            return False
        views = [trial.window.view(now_s) for trial in running if trial.window is not None]
        is_news = False
        shapes = {spec.shape(trial.params) for trial in running}
        for trial, view in zip(running, views, strict=True):
            shape = spec.shape(trial.params)
            is_news = is_news or (view.memory_bytes is not None and shape not in self._peaks)
            self._peaks[shape] = max(self._peaks.get(shape, 0), view.memory_bytes or 0)
        if len(shapes) > 1:
            return is_news
        # The speed of one that waits for others is that of before, while these have its part of the card.
        waits = [self._run.rungs.is_waiting(trial) for trial in running]
        rates = [
            None if view.is_stale or is_waiting else view.throughput_per_s
            for view, is_waiting in zip(views, waits, strict=True)
        ]
        # A sum says something of so many trials a GPU only where all GPUs have as many.
        per_gpu, rest = divmod(self._num_ranks(running), len(gpus))
        dials = {self._dials(trial) for trial in running}
        alike = dials.pop() if len(dials) == 1 else None
        said = self._knee.observe(now_s, _key(gpus[0], shapes.pop()), rates, None if rest else per_gpu, alike)
        if said is None:
            return is_news
        logger.info("knee: %s", said)
        self._remember()
        return True

    def _dials(self, trial: Trial) -> tuple[int, int, Tier] | None:
        """What a speed depends on beside the neighbours; the share follows from their number."""
        settings = None if trial.account is None else trial.account.settings
        return None if settings is None else (settings.micro_batch, settings.grad_accum, settings.tier)

    def _gpus(self) -> list[DeviceView]:
        return [device for device in self._world.devices.values() if device.kind is DeviceKind.CUDA]

    def _num_ranks(self, trials: list[Trial]) -> int:
        """Ranks of trials that run: each takes its part of a GPU."""
        slots = (self._world.slot_of(trial) for trial in trials)
        return sum(1 if slot is None or slot.hello is None else len(slot.hello.placement) for slot in slots)

    def _affordable(self, gpus: list[DeviceView], shape: str, num_running: int) -> int:
        """Ranks that memory allows, all alike; as many as wanted where a device does not tell its memory."""
        total_bytes = sum(gpu.memory_bytes for gpu in gpus)
        if total_bytes == 0:
            return len(self._world.slots) or 1
        peak = self._peaks.get(shape) or max(self._peaks.values(), default=0) or self._foreseen_bytes()
        others = num_running * (peak or 0) + len(self._world.slots) * _CONTEXT_BYTES
        return affordable(int(total_bytes * (1 - _SPARE_RATIO)) - others, peak, num_running)

    def _foreseen_bytes(self) -> int | None:
        """What a trial may take before any has run: that of the steps with which slots warm up, twice for safety."""
        hellos = (slot.hello for slot in self._world.slots.values())
        warm_bytes = max((hello.warm_peak_bytes or 0 for hello in hellos if hello is not None), default=0)
        return _SAFETY * warm_bytes or None

    def _remember(self) -> None:
        found = self._knee.found
        if found:
            try:
                write_atomically(self._path, json.dumps(found, sort_keys=True) + "\n")
            except OSError as error:
                logger.warning("the knee cannot be remembered: %s", error)


def _key(gpu: DeviceView, shape: str) -> str:
    return f"{gpu.device_type}/{gpu.units}: {shape}"


def _read(path: Path) -> dict[str, int]:
    """What earlier runs found; nothing where the file is missing or is none of ours."""
    try:
        known = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    if not isinstance(known, dict):
        return {}
    return {str(key): value for key, value in known.items() if type(value) is int and 1 <= value <= 1024}
