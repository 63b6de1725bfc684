"""One job of a simulated world: where it stands, and how far it gets in so many seconds.

Pure arithmetic on its application's truth; the engine says on what it runs and when. Progress is the part of its length
that is done. Called by the engine only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from orchestrator.policies.learn.fit import NOTHING_FITTED, Observation, TrialFit
from orchestrator.policies.plan import DeviceId, Settings, TrialId
from orchestrator.policies.simulator.application import Application
from orchestrator.policies.simulator.response import Load
from orchestrator.policies.simulator.workload import Submission
from orchestrator.policies.snapshot import DialLimits

_ALMOST = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """Seconds that a job ran under one load."""

    load: Load
    cores: float
    step_s: float
    seconds: float


@dataclass(slots=True, kw_only=True)
class Job:
    """One submitted job.

    Attributes:
        submission, application: what it is.
        trial_id, start, requested, limits: as policies see it.
        settings, placement: in force; `settings` is None before its first plan, `placement` empty while it waits.
        load, step_s: what it runs under now, and its true seconds per step; 0 while it does not run.
        ready_s: when its start, restart or switch is over.
        updated_s: up to when its progress is counted.
        progress: ratio of its length that is done.
        mark: progress at which it next reports or ends.
        version: counts changes of its speed, so that an event foreseen under another speed is known to be void.
        steps, samples: optimizer steps and samples so far, those done again after a failure included.
        attained_s, cost: device-seconds held, and what they cost.
        num_starts, num_changes, num_failures: how often it began on devices, had dials turned, was thrown back.
        waited_s: seconds without any device.
        windows: what ran since the last decision.
        fit: what was learned about it.
        changed_at_s: when its settings or placement last changed.
        began_s, ended_s: first time on a device, and its end.
    """

    submission: Submission
    application: Application
    trial_id: TrialId
    start: Settings
    requested: Settings
    limits: DialLimits
    settings: Settings | None = None
    placement: tuple[DeviceId, ...] = ()
    load: Load | None = None
    step_s: float = 0.0
    ready_s: float = 0.0
    updated_s: float = 0.0
    progress: float = 0.0
    mark: float = 1.0
    version: int = 0
    steps: float = 0.0
    samples: float = 0.0
    attained_s: float = 0.0
    cost: float = 0.0
    num_starts: int = 0
    num_changes: int = 0
    num_failures: int = 0
    waited_s: float = 0.0
    windows: list[Window] = field(default_factory=list)
    fit: TrialFit = NOTHING_FITTED
    changed_at_s: float = 0.0
    began_s: float | None = None
    ended_s: float | None = None
    ends_early: bool = False

    @property
    def length(self) -> float:
        """Samples at the base batch from beginning to end."""
        return self.application.num_samples * self.submission.length

    @property
    def held(self) -> float:
        """Devices it holds: ranks times share."""
        return 0.0 if self.settings is None else len(self.placement) * self.settings.share

    @property
    def is_running(self) -> bool:
        """Whether steps are made, now or when it is ready."""
        return self.step_s > 0 and self.ended_s is None

    def rate(self, index: int) -> float:
        """Progress per second on a stretch of the noise curve."""
        assert self.settings is not None
        batch = self.settings.global_batch
        return batch / self.step_s * self.application.efficiency(index, batch) / self.length

    def seconds_to(self, mark: float) -> float:
        """Seconds of running until progress reaches `mark`."""
        curve = self.application.noise
        total, progress = 0.0, self.progress
        index = curve.index(progress)
        while progress < mark - _ALMOST:
            end = min(mark, curve.ends[index])
            total += max(0.0, end - progress) / self.rate(index)
            progress, index = end, min(index + 1, len(curve.ends) - 1)
        return total

    def advance(self, now_s: float, price_per_s: float, cores: float) -> None:
        """Count what happened since the last time, under one load; it must not have ended in between."""
        passed_s = now_s - self.updated_s
        if passed_s <= 0:
            return
        begin_s, self.updated_s = self.updated_s, now_s
        self.attained_s += passed_s * self.held
        self.cost += passed_s * price_per_s
        if not self.placement:
            self.waited_s += passed_s
        seconds = now_s - max(begin_s, self.ready_s)
        if not self.is_running or seconds <= 0:
            return
        assert self.load is not None
        assert self.settings is not None
        self.windows.append(Window(load=self.load, cores=cores, step_s=self.step_s, seconds=seconds))
        self.steps += seconds / self.step_s
        self.samples += seconds / self.step_s * self.settings.global_batch
        self._progress_for(seconds)

    def _progress_for(self, seconds: float) -> None:
        curve = self.application.noise
        index = curve.index(self.progress)
        while seconds > 0 and self.progress < self.mark:
            rate = self.rate(index)
            end = min(self.mark, curve.ends[index])
            needed_s = max(0.0, end - self.progress) / rate
            if needed_s > seconds:
                self.progress += rate * seconds
                return
            seconds -= needed_s
            self.progress = end
            if index + 1 < len(curve.ends):
                index += 1

    def fall_back(self, seconds: float) -> None:
        """Lose the progress of the last so many seconds of running."""
        if self.is_running and seconds > 0:
            rate = self.rate(self.application.noise.index(self.progress))
            self.progress = max(0.0, self.progress - rate * seconds)

    def observations(self, window_s: float, spread: float, draws: list[float]) -> list[Observation]:
        """What telemetry says of the windows since the last decision, which are forgotten.

        Args:
            window_s: longest window.
            spread: relative standard deviation of a window's mean step time.
            draws: standard normal numbers, at least one; used in turn.
        """
        found: list[Observation] = []
        scale = self.application.noise.scales[self.application.noise.index(self.progress)]
        for window in self.windows:
            count = max(1, min(4, int(window.seconds / window_s)))
            num_steps = int(window.seconds / window.step_s / count)
            if num_steps < 1:
                count, num_steps = 1, int(window.seconds / window.step_s)
            for _ in range(count if num_steps else 0):
                draw = draws[len(found) % len(draws)]
                found.append(_observation(window, num_steps, math.exp(spread * draw), scale))
        self.windows.clear()
        return found


def _observation(window: Window, num_steps: int, factor: float, scale: float) -> Observation:
    load = window.load
    return Observation(
        cores=window.cores,
        tier=load.tier,
        micro_batch=load.micro_batch,
        grad_accum=load.grad_accum,
        num_workers=load.num_workers,
        num_steps=num_steps,
        step_s=window.step_s * factor,
        noise_trace=scale,
        grad_sq=1.0,
        num_noise=min(10, num_steps),
        num_nodes=load.num_nodes,
        device_type=load.device_type,
        crowd_share=load.crowd_share,
    )
