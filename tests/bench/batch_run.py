"""A trial in a closed loop without Ray: its own steps, the real fit and the real policy, on whatever device there is.

Used by the benchmarks of batches: the time that counts is that of training, evaluations are left out of it.
"""

from __future__ import annotations

import random
import statistics
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from orchestrator.policies.decide.goodput import Goodput
from orchestrator.policies.learn.fit import NOTHING_FITTED, Observation, TrialFit, noise_scale, update
from orchestrator.policies.plan import EMPTY_PLAN, DeviceId, Plan, Settings, TrialId
from orchestrator.policies.snapshot import DeviceKind, DeviceView, DialLimits, Snapshot, TrialView
from orchestrator.policies.tier import Tier

if TYPE_CHECKING:
    import torch

    from orchestrator.control.orders import TrialOrder
    from orchestrator.train.stepper import Stepper

DEVICE = DeviceId("device")
WINDOW_S = 0.5
FAR = 10**12


@dataclass(frozen=True, slots=True, kw_only=True)
class Course:
    """What a trial did: validation losses over seconds of training, and its decisions."""

    curve: list[tuple[float, int, float, int]] = field(default_factory=list)
    decisions: list[dict[str, Any]] = field(default_factory=list)
    noise: list[tuple[int, float | None]] = field(default_factory=list)

    def seconds_to(self, loss: float) -> float | None:
        """Seconds of training until the validation loss was at most `loss`, between two evaluations by proportion."""
        before: tuple[float, float] | None = None
        for seconds, _, value, _ in self.curve:
            if value <= loss:
                if before is None or before[1] <= loss:
                    return seconds
                return before[0] + (seconds - before[0]) * (before[1] - loss) / (before[1] - value)
            before = (seconds, value)
        return None


def order_of(job: str, params: dict[str, Any], batch: int, limits: DialLimits, seed: int) -> TrialOrder:
    """A trial that begins with that batch, on one rank, with the whole device."""
    from orchestrator.control.orders import TrialOrder

    start = Settings(share=1.0, micro_batch=batch, grad_accum=1, tier=limits.tiers[0], num_workers=1)
    return TrialOrder(
        trial_id=TrialId("t"),
        attempt=0,
        seed=seed,
        job=job,
        params=params,
        start=start,
        limits=limits,
        samples_per_report=FAR,
        max_reports=1,
        directory="",
        resume_from=None,
        num_reports_done=0,
    )


def limits_of(low: int, high: int, tiers: tuple[Tier, ...] = (Tier.FP32,)) -> DialLimits:
    """Only the batch may turn."""
    return DialLimits(
        min_share=1.0,
        max_share=1.0,
        min_global_batch=low,
        max_global_batch=high,
        max_micro_batch=high,
        tiers=tiers,
    )


def stepper_of(order: TrialOrder, device: torch.device, step_mode: str = "eager") -> Stepper:
    """The trial's stepper, its model drawn from the trial's seed."""
    import torch

    from orchestrator.jobs import build_job
    from orchestrator.train.groups import Ranks
    from orchestrator.train.step_mode.choice import StepMode
    from orchestrator.train.stepper import Stepper

    job = build_job(order.job, order.params)
    job.prepare()
    torch.manual_seed(order.seed)
    return Stepper(order, job, Ranks(rank=0, world_size=1, device=device, step_mode=StepMode(step_mode)))


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredClock:
    """Time as it was measured, for trials that share their machine: a window takes what one of that batch took.

    Attributes:
        windows: seconds per step of windows of each micro-batch.
        decision_s: seconds that one decision of the policy takes.
    """

    windows: dict[int, list[float]]
    decision_s: float

    def of(self, seed: int) -> WindowClock:
        """The clock of one trial."""
        return WindowClock(self, random.Random(seed))


@dataclass(slots=True)
class WindowClock:
    """Hands out measured windows at random, the same ones for the same seed."""

    measured: MeasuredClock
    rng: random.Random

    def step_s(self, settings: Settings) -> float:
        """Seconds per step of the next window."""
        return settings.grad_accum * self.rng.choice(self.measured.windows[settings.micro_batch])


def train(
    order: TrialOrder,
    device: torch.device,
    *,
    adapts: bool,
    seconds: float,
    eval_samples: int,
    until: float | None = None,
    step_mode: str = "eager",
    clock: WindowClock | None = None,
) -> Course:
    """Train for that long, or until the validation loss is reached; adaptive under the goodput policy, or fixed.

    The seconds are those of the wall, or of a `clock`.
    """
    stepper = stepper_of(order, device, step_mode)
    kind = DeviceKind.CUDA if device.type == "cuda" else DeviceKind.CPU
    steering = _Steering(order, stepper.settings, kind) if adapts else None
    course = Course()
    spent_s, next_eval, noise = 0.0, eval_samples, []
    while spent_s < seconds:
        window = _window(stepper, next_eval, clock)
        spent_s += window.seconds
        if steering is not None and window.num_steps:
            decide_s = time.perf_counter()
            new = steering.decide(stepper.settings, window.step_s, window.num_steps, window.draws, spent_s)
            if new != stepper.settings:
                course.decisions.append({"seconds": spent_s, "batch": new.global_batch, "reason": steering.reason})
                stepper.turn(new)
            spent_s += time.perf_counter() - decide_s if clock is None else clock.measured.decision_s
        if stepper.cursor.position >= next_eval:
            next_eval += eval_samples
            loss = float(stepper.evaluate()["val_loss"])
            course.curve.append((spent_s, stepper.cursor.position, loss, stepper.settings.global_batch))
            noise.append((stepper.cursor.position, None if steering is None else noise_scale(steering.fit)))
            if until is not None and loss <= until:
                break
    course.noise.extend(noise)
    return course


@dataclass(frozen=True, slots=True)
class _Window:
    """All its seconds, and how long its steps took that ran in the settled step mode; the fit takes no others."""

    seconds: float
    step_s: float
    num_steps: int
    draws: list[Any]


def _window(stepper: Stepper, next_eval: int, clock: WindowClock | None) -> _Window:
    """Steps of half a second, or up to the next evaluation."""
    began_s, results = time.perf_counter(), []
    step_s = 0.0 if clock is None else clock.step_s(stepper.settings)
    passed_s, settled_s, num_before = 0.0, 0.0, 0
    while passed_s < WINDOW_S and stepper.cursor.position < next_eval:
        stepped = stepper.advance()
        results += stepped
        passed_s = time.perf_counter() - began_s if clock is None else step_s * len(results)
        if not all(stepper.is_settled_on(result.mode) for result in stepped):
            settled_s, num_before = passed_s, len(results)
    results += stepper.settle()
    passed_s = time.perf_counter() - began_s if clock is None else passed_s
    draws = [result.noise for result in results if result.noise is not None]
    num_steps = len(results) - num_before
    return _Window(passed_s, (passed_s - settled_s) / max(1, num_steps), num_steps, draws)


def decision_times(count: int = 40) -> list[float]:
    """Seconds of decisions as `train` takes them, once a trial has been measured."""
    order = order_of("language", {}, 16, limits_of(8, 128), 0)
    steering, times = _Steering(order, order.start, DeviceKind.CPU), []
    for number in range(count):
        draws = [_Draw(100.0, 1.0)] * 3
        began_s = time.perf_counter()
        steering.decide(order.start, 0.01, 50, draws, 0.5 * number)
        times.append(time.perf_counter() - began_s)
    return times[count // 2 :]


@dataclass(frozen=True, slots=True)
class _Draw:
    noise_trace: float
    grad_sq: float


class _Steering:
    """What the controller does for one trial: fold, fit, decide."""

    def __init__(self, order: TrialOrder, settings: Settings, kind: DeviceKind) -> None:
        self._order, self._plan, self._changed_at_s, self._kind = order, EMPTY_PLAN, 0.0, kind
        self.fit: TrialFit = NOTHING_FITTED
        self.reason = ""
        self._policy = Goodput(cooldown_s=2.0, explores=False)
        self._plan = self._next(settings, 0.0)

    def decide(self, settings: Settings, step_s: float, num_steps: int, draws: list[Any], now_s: float) -> Settings:
        """Take in a window and answer with the settings to go on with."""
        seen = Observation(
            cores=1.0,
            tier=settings.tier,
            micro_batch=settings.micro_batch,
            grad_accum=settings.grad_accum,
            num_workers=1,
            num_steps=num_steps,
            step_s=step_s,
            noise_trace=statistics.fmean(d.noise_trace for d in draws) if draws else None,
            grad_sq=statistics.fmean(d.grad_sq for d in draws) if draws else None,
            num_noise=len(draws),
        )
        self.fit = update(self.fit, [seen])
        plan = self._next(settings, now_s)
        new = plan.allocations[0].settings
        if new != settings:
            self._changed_at_s, self.reason = now_s, plan.allocations[0].reason
        self._plan = plan
        return new

    def _next(self, settings: Settings, now_s: float) -> Plan:
        order = self._order
        trial = TrialView(
            trial_id=order.trial_id,
            shape="one",
            start=order.start,
            limits=order.limits,
            placement=(DEVICE,),
            weight=1.0,
            step=0,
            num_samples=0,
            target_samples=FAR,
            throughput_per_s=None,
            loss=None,
            is_stale=False,
            fit=self.fit,
            override=None,
            changed_at_s=self._changed_at_s,
            began_at_s=0.0,
        )
        device = DeviceView(device_id=DEVICE, node_id="node", kind=self._kind, units=1)
        return self._policy.decide(Snapshot(now_s=now_s, seed=0, plan=self._plan, devices=(device,), trials=(trial,)))


def fixed_at(order: TrialOrder, batch: int) -> TrialOrder:
    """The same trial fixed at a batch, with the learning rate that the rule gives it from that of the start batch."""
    from orchestrator.jobs import job_info
    from orchestrator.train.batch.learning_rate import scaled

    rule = job_info(order.job).learning_rate_rule
    rate = scaled(float(order.params.get("lr", 1e-3)), rule, order.start.global_batch, batch)
    return replace(
        order,
        limits=limits_of(batch, batch, order.limits.tiers),
        start=replace(order.start, micro_batch=batch),
        params={**order.params, "lr": rate},
    )
