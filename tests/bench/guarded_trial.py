"""One trial without Ray, for the precision benchmarks: stepper, watch and the rule for tiers, nothing else.

The rule that a policy uses (`policies.learn.tier_fit.best_usable`) is asked every few steps, as a policy would be;
moves of the guard are obeyed as the training loop obeys them. Knows no statistics; used by `bench_precision`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from orchestrator.control.orders import TrialOrder
from orchestrator.jobs import build_job
from orchestrator.policies.learn.tier_fit import best_usable
from orchestrator.policies.plan import Settings, TrialId
from orchestrator.policies.snapshot import DialLimits
from orchestrator.policies.tier import Tier
from orchestrator.train.groups import Ranks
from orchestrator.train.precision.calibrate import TierCost
from orchestrator.train.precision.guard import Move
from orchestrator.train.precision.tiers import set_tier
from orchestrator.train.precision.watch import PrecisionWatch, StepNews, WatchPlan
from orchestrator.train.stepper import Stepper

ASK_EVERY = 5
MIN_GAIN = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What is trained and how.

    Attributes:
        job, params: as in a run file.
        num_steps: optimizer steps.
        micro_batch: samples per step and rank.
        ladder: allowed tiers, dearest first; one tier is a run without choice.
        seed: of model and samples.
        budget: of the guard; 0 is a run without probes.
        costs: declared instead of measured.
        greedy: take the cheapest tier at once, whatever it does.
        before_step: called with the stepper and the step's number; for planted faults.
        nudge: relative size of a random change of the first weights, for twins that differ in nothing else.
        device: cpu or cuda.
    """

    job: str
    params: Mapping[str, Any]
    num_steps: int
    micro_batch: int
    ladder: tuple[Tier, ...]
    seed: int
    budget: float = 0.025
    costs: Mapping[Tier, float] | None = None
    greedy: bool = False
    before_step: Callable[[Stepper, int], None] | None = None
    nudge: float = 0.0
    device: str = "cpu"


@dataclass(slots=True)
class Course:
    """How it went."""

    train_loss: float = float("nan")
    val_loss: float = float("nan")
    wall_s: float = 0.0
    step_s: float = 0.0
    spent_s: float = 0.0
    tiers: list[str] = field(default_factory=list)
    moves: list[dict[str, Any]] = field(default_factory=list)
    num_probes: int = 0
    num_skips: int = 0
    probe_steps: list[int] = field(default_factory=list)
    spent_at: list[tuple[float, float]] = field(default_factory=list)

    def probes_before(self, step: int) -> int:
        """How many probes had been taken when `step` began."""
        return sum(1 for at in self.probe_steps if at < step)

    def share_of(self) -> dict[str, float]:
        """Part of the steps in each tier."""
        return {tier: self.tiers.count(tier) / len(self.tiers) for tier in sorted(set(self.tiers))}


def run(recipe: Recipe, ranks: Ranks | None = None) -> Course:
    """Train to the end and measure the losses in fp32; on one rank, or as one of `ranks`."""
    stepper, watch = begin(recipe, ranks)
    course = Course()
    began_s = time.monotonic()
    watch.begin()
    number = 0
    while stepper.step_index < recipe.num_steps:
        if number % ASK_EVERY == 0:
            _choose(recipe, stepper, watch, course)
        num_probes = watch.guard.num_probes
        moved = watch.before_step()
        course.probe_steps += [stepper.step_index] * (watch.guard.num_probes - num_probes)
        _obey(moved, stepper, watch, course)
        if recipe.before_step is not None:
            recipe.before_step(stepper, number)
        stepped_s = time.monotonic()
        result = stepper.step()
        course.step_s += time.monotonic() - stepped_s
        course.tiers.append(stepper.settings.tier.value)
        course.num_skips += result.is_skipped
        news = StepNews(
            is_skipped=result.is_skipped,
            is_loss_finite=result.is_loss_finite,
            loss=result.loss,
            loss_scale=stepper.loss_scale.scale,
            busy_s=time.monotonic() - stepped_s,
            grad_norm=result.grad_norm,
        )
        move = watch.after_step(news)
        if recipe.budget > 0:
            _obey(move, stepper, watch, course)
        number += 1
        course.spent_at.append((time.monotonic() - began_s, watch.spent_s))
        if number > 3 * recipe.num_steps:
            break
    watch.close()
    course.wall_s = time.monotonic() - began_s
    course.spent_s, course.num_probes = watch.spent_s, watch.guard.num_probes
    course.train_loss, course.val_loss = _losses(recipe, stepper)
    return course


def begin(recipe: Recipe, ranks: Ranks | None = None) -> tuple[Stepper, PrecisionWatch]:
    """Stepper and watch before the first step."""
    device = torch.device(recipe.device)
    ranks = ranks or Ranks(rank=0, world_size=1, device=device)
    world_size, tier = ranks.world_size, recipe.ladder[0]
    start = Settings(share=1.0, micro_batch=recipe.micro_batch, grad_accum=1, tier=tier, num_workers=world_size)
    limits = DialLimits(
        min_share=1.0,
        max_share=1.0,
        min_global_batch=start.global_batch,
        max_global_batch=start.global_batch,
        max_micro_batch=recipe.micro_batch,
        tiers=recipe.ladder,
    )
    order = TrialOrder(
        trial_id=TrialId("bench"),
        attempt=0,
        seed=recipe.seed,
        job=recipe.job,
        params=dict(recipe.params),
        start=start,
        limits=limits,
        samples_per_report=recipe.num_steps * start.global_batch,
        max_reports=1,
        directory="unused",
        resume_from=None,
        num_reports_done=0,
    )
    torch.manual_seed(recipe.seed)
    job = build_job(recipe.job, recipe.params)
    job.prepare()
    stepper = Stepper(order, job, ranks)
    if recipe.nudge:
        generator = torch.Generator().manual_seed(recipe.seed + 77)
        with torch.no_grad():
            for param in stepper.model.parameters():
                noise = torch.randn(param.shape, generator=generator).to(param.device)
                param.mul_(1 + recipe.nudge * noise)
    costs = recipe.costs
    plan = WatchPlan(
        ladder=recipe.ladder,
        budget=recipe.budget,
        target_samples=recipe.num_steps * start.global_batch,
        costs=None if costs is None else {t: TierCost(step_s=s, memory_bytes=s) for t, s in costs.items()},
    )
    return stepper, PrecisionWatch(plan, stepper, device, ranks.group)


def _choose(recipe: Recipe, stepper: Stepper, watch: PrecisionWatch, course: Course) -> None:
    now = stepper.settings.tier
    if recipe.greedy:
        chosen = recipe.ladder[-1]
    elif len(recipe.ladder) == 1 or not watch.is_probing:
        return
    else:
        known = watch.known()
        chosen = best_usable(recipe.ladder, known, (), now, MIN_GAIN)
    if chosen is not now:
        _turn(stepper, watch, chosen)
        course.moves.append({"step": stepper.step_index, "to": chosen.value, "why": "cheaper and safe"})


def _obey(move: Move | None, stepper: Stepper, watch: PrecisionWatch, course: Course) -> None:
    if move is None:
        return
    if move.is_rollback:
        watch.go_back()
    move_said = {"to": move.tier.value, "why": move.reason, "probe": watch.guard.num_probes}
    course.moves.append({"step": stepper.step_index, **move_said})
    _turn(stepper, watch, move.tier)


def _turn(stepper: Stepper, watch: PrecisionWatch, tier: Tier) -> None:
    stepper.turn(replace(stepper.settings, tier=tier))
    watch.turned()


def _losses(recipe: Recipe, stepper: Stepper) -> tuple[float, float]:
    """Training and validation loss in fp32, the former over samples that every run of the recipe has seen."""
    set_tier(stepper.model, Tier.FP32)
    stepper.settings = replace(stepper.settings, tier=Tier.FP32)
    val_loss = stepper.evaluate()["val_loss"]
    stepper.model.eval()
    total, elements = 0.0, 0
    device = torch.device(recipe.device)
    with torch.no_grad():
        for indices in _chunks(range(min(512, stepper.job.num_train_samples)), 64):
            terms = stepper.job.loss(stepper.model, stepper.job.batch(list(indices), device))
            total += float(terms.loss_sum)
            elements += terms.num_elements
    return total / elements, val_loss


def _chunks(values: range, size: int) -> list[Sequence[int]]:
    return [values[start : start + size] for start in range(0, len(values), size)]
