"""Watches the precision of one trial: calibrates its tiers once, probes them now and then, keeps a state to go back to.

Between the stepper, which computes, and the guard, which judges. Every rank has one and all do the same before the same
step: whether a probe is due follows from numbers that all ranks have in common. Called by the loop at each boundary;
a move it returns is the loop's to make. Knows no plans and no Ray.

Probes take about `budget` of the trial's time (`spending`). On a CPU, where a pass may take a good part of a second, so
does calibration with them: tier after tier between steps, as that allows. On a GPU it is done at the start.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist

from orchestrator.policies.learn.tier_fit import TierFit
from orchestrator.policies.tier import Tier
from orchestrator.train.precision import memory_state
from orchestrator.train.precision.calibrate import TierCost
from orchestrator.train.precision.guard import Cause, Guard, Move, StepSigns
from orchestrator.train.precision.probe import ProbeSetup, probe
from orchestrator.train.precision.range_signs import RangeMeter, has_range
from orchestrator.train.precision.spending import Spending
from orchestrator.train.precision.tiers import coverage, is_real
from orchestrator.train.precision.trial_costs import Timed, TrialCosts

logger = logging.getLogger(__name__)

MIN_PERIOD_STEPS = 5
_WARM_STEPS = 3
_UNKNOWN_SAVING = 0.1
"""Part of the time that a tier may save of which nothing is known yet."""
_COUNT_EVERY = 25
_AUDIT_EVERY = 4
_TRUSTED_NOISE_RATIO = 2e-3
_TRUSTED_PROBES = 5
_ALWAYS = frozenset({Cause.NON_FINITE, Cause.OVERFLOWS})


@dataclass(frozen=True, slots=True, kw_only=True)
class StepNews:
    """What a step of this rank showed. `busy_s` is its time without waiting."""

    is_skipped: bool
    is_loss_finite: bool
    loss: float
    loss_scale: float
    busy_s: float
    grad_norm: float = float("nan")


class Trained(Timed, Protocol):
    """What is watched: the stepper, as far as it matters here."""

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """Its optimizer."""
        ...

    @property
    def step_index(self) -> int:
        """Optimizer steps done."""
        ...

    @property
    def progress(self) -> float:
        """Part of the trial that is done."""
        ...

    def probe_halves(self) -> tuple[tuple[Any, Any], int]:
        """Two batches of the next samples, which are not used up, and the samples of each on a rank."""
        ...

    def position(self) -> dict[str, Any]:
        """What beside model and optimizer a step changes."""
        ...

    def go_back(self, position: dict[str, Any]) -> None:
        """The inverse of `position`."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchPlan:
    """How a trial is watched.

    Attributes:
        ladder: its allowed tiers, dearest first.
        budget: part of its time for probes and calibration; 0 for none, so that no cheaper tier is ever found safe.
        target_samples: samples of the whole trial.
        key: what fixes the cost of its tiers, for the calibration file.
        cache: directory of calibration files, None to measure always.
        costs: declared instead of measured, for tests.
    """

    ladder: Sequence[Tier]
    budget: float
    target_samples: int
    key: str = ""
    cache: Path | None = None
    costs: dict[Tier, TierCost] | None = None


class PrecisionWatch:
    """The watch of one attempt of a trial on one rank."""

    def __init__(
        self, plan: WatchPlan, trained: Trained, device: torch.device, group: dist.ProcessGroup | None
    ) -> None:
        self._plan, self._trained, self._device, self._group = plan, trained, device, group
        self.guard = Guard(plan.ladder)
        self.costs: dict[Tier, TierCost] = {}
        self._spending = Spending(budget=plan.budget)
        self._finder: TrialCosts | None = None
        self._next_piece, self._piece_s = _WARM_STEPS, math.nan
        self._begun_s = 0.0
        self._is_real = {tier: is_real(tier, device) for tier in plan.ladder} if device.type in {"cpu", "cuda"} else {}
        self._state: memory_state.MemoryState | None = None
        self._num_steps = 0
        self._next_probe = MIN_PERIOD_STEPS
        self._busy: list[float] = []
        self._num_trusted: dict[Tier, int] = {}
        self._posted: tuple[dist.Work, torch.Tensor] | None = None
        self._has_news = False
        self._ranges, self._next_count = RangeMeter(), 0
        self._turned_from = trained.settings

    @property
    def is_probing(self) -> bool:
        """Whether cheaper tiers are probed, so that what the guard says of them is the last word."""
        return self._plan.budget > 0 and len(self._plan.ladder) > 1

    @property
    def spent_s(self) -> float:
        """Seconds spent on probes and calibration so far."""
        return self._spending.spent_s + self._begun_s

    @property
    def is_due(self) -> bool:
        """Whether a probe is to be made before the next step, or a tier to be calibrated."""
        return self._is_probe_due or self._is_piece_due

    @property
    def _is_probe_due(self) -> bool:
        return self.is_probing and (self._num_steps >= self._next_probe or bool(self.guard.alarm))

    @property
    def _is_piece_due(self) -> bool:
        is_open = self._finder is not None and self._finder.next_tier is not None
        return self.is_probing and is_open and self._num_steps >= self._next_piece

    def begin(self) -> None:
        """Learn what each tier costs here as far as that is known, or quickly found; on every rank, before any step."""
        if not self.is_probing:
            return
        began_s = time.monotonic()
        self.costs = dict(self._plan.costs or {})
        if not self.costs:
            tiers = [tier for tier in self._plan.ladder if self._is_real[tier]]
            key, cache = self._plan.key, self._plan.cache
            self._finder = TrialCosts(self._trained, self._device, self._group, key=key, cache=cache, tiers=tiers)
            if self._device.type != "cpu":
                self._finder.measure_all()
            self.costs = self._finder.known
        current = self._trained.settings.tier
        base = self.costs.get(current) or next(iter(self.costs.values()), None)
        self._spending.step_s = 1.0 if base is None else base.step_s * self._trained.settings.grad_accum
        if current is not self._plan.ladder[0]:
            self._remember()  # it begins in a cheaper tier, so there is something to go back to from its first step on
        # Not charged to this trial's probes: the first trials of a shape pay it for all, and a short one would owe it
        # for so long that its tiers were found safe only at its end.
        self._begun_s = self._agreed([time.monotonic() - began_s])[0]
        self._has_news = True

    def before_step(self) -> Move | None:
        """At a boundary: probe if it is time to, or calibrate; the move that follows."""
        move = None
        if self.is_due:
            self._ranges.end()  # where steps are told of late, one may still be counted: not its layers in other tiers
        if self._is_probe_due:
            move = self._probe()
        elif self._is_piece_due:
            self._calibrate()
        if move is None:
            self._count_ranges()
        return move

    def after_step(self, news: StepNews) -> Move | None:
        """After a step: the move that follows from what it showed."""
        self._num_steps += 1
        self._busy.append(news.busy_s)
        is_loss_finite = news.is_loss_finite
        if news.is_skipped and self._group is not None:
            told = torch.tensor([float(is_loss_finite)])
            dist.all_reduce(told, dist.ReduceOp.MIN, group=self._group)
            is_loss_finite = bool(told.item())
        loss, saturated, vanished = self._means(float("nan") if news.is_skipped else news.loss)
        signs = StepSigns(
            step=self._trained.step_index,
            is_skipped=news.is_skipped,
            is_loss_finite=is_loss_finite,
            loss=loss,
            loss_scale=news.loss_scale,
            progress=self._trained.progress,
            grad_norm=news.grad_norm,
            saturated=saturated,
            vanished=vanished,
        )
        move = self.guard.take_step(self._trained.settings.tier, signs)
        if move is not None and not self.is_probing and move.cause not in _ALWAYS:
            return None  # without a guard a trial protects itself from what is not finite, and from nothing else
        self._has_news |= move is not None
        return move

    def turned(self) -> None:
        """The settings changed: losses are compared anew, and a batch of another size takes another time."""
        before, self._turned_from = self._turned_from, self._trained.settings
        self.guard.forget_losses(is_same_batch=before.global_batch == self._turned_from.global_batch)
        self._busy.clear()
        if before.tier is not self._turned_from.tier:
            self._ranges.end()  # layers that were to be counted in the next step are in another tier by then
            self._next_count = self._num_steps  # the first step in a new tier is counted; that costs, so no other is
        self.close()  # what is still on its way was seen in the tier before

    def go_back(self) -> bool:
        """Restore the last good state; False where there is none."""
        if self._state is None:
            return False
        position = memory_state.restore(self._state, self._trained.model, self._trained.optimizer)
        self._trained.go_back(position)
        return True

    def committed(self) -> None:
        """A report was made of the present state: nothing goes back behind it."""
        if self._state is not None:
            self._remember()

    def news(self) -> tuple[TierFit, ...] | None:
        """What is known of each tier, if anything changed since the last call."""
        if not self._has_news or not self.is_probing:
            return None
        self._has_news = False
        return self.known()

    def known(self) -> tuple[TierFit, ...]:
        """What is known of each tier, dearest first."""
        return tuple(self._fit_of(tier) for tier in self._plan.ladder)

    def _fit_of(self, tier: Tier) -> TierFit:
        cost = self.costs.get(tier)
        covered = coverage(self._trained.model, tier)
        return TierFit(
            tier=tier,
            is_real=tier in self.costs or (self._plan.costs is None and self._is_real[tier]),
            is_safe=tier is self._plan.ladder[0] or self.guard.is_safe(tier),
            step_s=None if cost is None else cost.step_s,
            memory_bytes=None if cost is None else cost.memory_bytes,
            noise_ratio=self.guard.noise_ratio(tier),
            num_layers=covered.num_layers,
            num_in_tier=covered.num_in_tier,
        )

    def _agreed(self, numbers: list[float]) -> list[float]:
        """Their means over the ranks."""
        if self._group is None:
            return numbers
        told = torch.tensor(numbers, dtype=torch.float64) / dist.get_world_size(self._group)
        dist.all_reduce(told, group=self._group)
        found: list[float] = told.tolist()
        return found

    def _calibrate(self) -> None:
        """One round of passes in the next tier, if it is worth its time now; else later, or never."""
        finder, spending, settings = self._finder, self._spending, self._trained.settings
        assert finder is not None
        spending.step_s = self._agreed([self._usual_busy_s()])[0]
        is_first = math.isnan(self._piece_s)
        price_s = 2 * spending.step_s / settings.grad_accum if is_first else self._piece_s
        saving = max(_UNKNOWN_SAVING, 1 - finder.ratio)
        wait = spending.steps_until(price_s, self._num_steps, self._total_steps, saving)
        if wait > 0 or not spending.is_within(price_s, self._num_steps, self._total_steps, saving):
            self._next_piece = self._num_steps + max(wait, MIN_PERIOD_STEPS)
            return
        began_s = time.monotonic()
        finder.take_piece()
        self._piece_s = self._agreed([time.monotonic() - began_s])[0]
        spending.spent_s += self._piece_s
        if finder.known is not self.costs:
            self.costs, self._has_news = finder.known, True
            self._next_probe = self._num_steps + max(1, self._steps_until_probe(self._piece_s))

    def _usual_busy_s(self) -> float:
        return sorted(self._busy)[len(self._busy) // 2] if self._busy else self._spending.step_s

    @property
    def _total_steps(self) -> float:
        return self._plan.target_samples / self._trained.settings.global_batch

    @property
    def _candidate(self) -> Tier | None:
        seconds = {tier: cost.step_s for tier, cost in self.costs.items()}
        return self.guard.candidate(self._trained.settings.tier, seconds)

    def _steps_until_probe(self, cost_s: float) -> int:
        """Until the budget allows one of that cost; earlier while a faster tier is on the way to be found safe."""
        candidate, saving = self._candidate, 0.0
        if candidate is not None and self.guard.is_promising(candidate):
            saving = 1 - self.costs[candidate].step_s / self.costs[self._trained.settings.tier].step_s
        return self._spending.steps_until(cost_s, self._num_steps, self._total_steps, saving)

    def _probe(self) -> Move | None:
        """Compare the present tier and the next candidate with the reference, if there is anything to compare."""
        began_s = time.monotonic()
        current = self._trained.settings.tier
        candidate, reference = self._candidate, self._reference(current)
        tiers = [tier for tier in (current, candidate) if tier is not None and tier is not reference]
        if not tiers:
            self.guard.take_probe(current, {})  # bans and freezes are counted in probes that were due
            self._next_probe = self._num_steps + self._period(0.0)
            return None
        parts, half = self._trained.probe_halves()
        setup = ProbeSetup(
            model=self._trained.model,
            half_samples=half * self._trained.settings.num_workers,
            batch_samples=self._trained.settings.global_batch,
            group=self._group,
            device=self._device,
            seed=self._trained.step_index * 2,
        )
        busy_s = [self._usual_busy_s()]
        found, times = probe(
            setup, lambda tier, number: self._trained.mean_gradient(parts[number], tier), reference, tiers, busy_s
        )
        self._spending.step_s = times[0]
        self._busy.clear()
        move = self.guard.take_probe(current, found)
        self._count_trust(found)
        is_entered = candidate is not None and self.guard.is_safe(candidate)
        if move is None and (is_entered or current is not self._plan.ladder[0]):
            self._remember()
        cost_s = self._agreed([time.monotonic() - began_s])[0]
        self._spending.spent_s += cost_s
        self._next_probe = self._num_steps + self._period(cost_s)
        self._has_news = True
        logger.debug("probe %d in %s: %s, %.3f s", self.guard.num_probes, current, found, cost_s)
        return move

    def _period(self, cost_s: float) -> int:
        """Steps until another probe of that cost."""
        # While a candidate is on trial every probe counts, as far as the credit goes; later a few hundred are enough.
        is_on_trial = self.guard.num_probes <= 4 * len(self._plan.ladder)
        least = MIN_PERIOD_STEPS if is_on_trial else max(MIN_PERIOD_STEPS, math.ceil(self._total_steps / 400))
        return max(least, self._steps_until_probe(cost_s))

    def _reference(self, current: Tier) -> Tier:
        """The dearest tier, or a cheaper one that measured as good as it; now and then that is checked against it."""
        dearest = self._plan.ladder[0]
        for tier in (Tier.BF16, Tier.TF32):
            if tier not in self.costs or self._num_trusted.get(tier, 0) < _TRUSTED_PROBES:
                continue
            is_dearer = self.costs[tier].step_s >= self.costs[dearest].step_s
            is_audit = current is tier and self.guard.num_probes % _AUDIT_EVERY == 0
            return dearest if is_dearer or is_audit else tier
        return dearest

    def _count_trust(self, found: dict[Tier, Any]) -> None:
        for tier, seen in found.items():
            is_good = seen.noise_ratio <= _TRUSTED_NOISE_RATIO
            self._num_trusted[tier] = self._num_trusted.get(tier, 0) + 1 if is_good else 0

    def _remember(self) -> None:
        self._state = memory_state.capture(self._trained.model, self._trained.optimizer, self._trained.position())

    def _count_ranges(self) -> None:
        """Let the next step count what falls out of the tier's range, in the first step in a tier and now and then."""
        is_eager = self._device.type == "cpu" or not self._trained.may_replay
        if not (self.is_probing and is_eager and self._num_steps >= self._next_count):
            return
        self._next_count = self._num_steps + _COUNT_EVERY
        if has_range(self._trained.settings.tier):
            self._ranges.begin(self._trained.model)

    def _means(self, loss: float) -> list[float]:
        """Of loss and of what fell out of range over all ranks; with several those of the step before."""
        found = self._ranges.end()
        told = torch.zeros(3, dtype=torch.float64)
        told[0] = loss
        if found is not None:
            told[1], told[2] = found.saturated, found.vanished
        if self._group is None:
            return told.tolist()
        before = [float("nan"), 0.0, 0.0]
        if self._posted is not None:
            self._posted[0].wait()
            before = (self._posted[1] / dist.get_world_size(self._group)).tolist()
        work = dist.all_reduce(told, group=self._group, async_op=True)
        assert work is not None
        self._posted = (work, told)
        return before

    def close(self) -> None:
        """Finish what is posted; called by every rank before the group is used for something else."""
        if self._posted is not None:
            self._posted[0].wait()
            self._posted = None


__all__ = ["Cause", "PrecisionWatch", "WatchPlan"]
