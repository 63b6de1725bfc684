"""What guarded precision costs, gains and protects, on one rank of a CPU.

`python -m tests.bench.bench_precision_twins` and so on do not exist: one module, one part at a time, because each has
its own results file: `python -m tests.bench.bench_precision PART [--quick] [--repeats N] [--out FILE]` with PART one of
`twins-JOB` (fp32 against guarded auto, paired seeds), `ladder` (guard on and off above a harmful end), `faults`
(planted), `speed` (auto against fp32, language), `switch` (extra time of the step after a switch) and `overhead`.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from jobs.job import LossTerms
from orchestrator.hardware import cpu_facts
from orchestrator.train.precision import products
from orchestrator.train.precision.linear import PrecisionLinear
from orchestrator.train.stepper import Stepper
from policies.tier import Tier, real_tiers
from tests.bench.guarded_trial import Course, Recipe, run
from tests.bench.results_file import Figure, Report, bootstrap_interval, median_figure, options, p95_figure, say

AUTO = real_tiers(cpu_facts())
LANGUAGE = {"width": 64, "layers": 2, "heads": 4, "context": 32, "lr": 2e-3, "eval_windows": 512}
IMAGE = {"width": 32, "layers": 2}
MLP = {"width": 128, "depth": 3, "lr": 0.05}
RECIPES: dict[str, tuple[dict[str, Any], int, int]] = {
    "language": (LANGUAGE, 300, 16),
    "mlp": (MLP, 2000, 64),
    "image": (IMAGE, 200, 32),
}
HARMFUL = tuple(Tier(word) for word in ("fp32", "bf16", "int8", "fixed(4,8,floor)", "fixed(2,6)"))
CHEAPER = {tier: 0.6**number for number, tier in enumerate(AUTO)}
DECLARED = dict(zip(HARMFUL, (1.0, 0.6, 0.4, 0.25, 0.15), strict=True))


def recipe_of(job: str, seed: int, *, is_quick: bool, ladder: Sequence[Tier] = AUTO, **changes: Any) -> Recipe:
    params, num_steps, micro_batch = RECIPES[job]
    steps = 40 if is_quick else num_steps
    base = Recipe(job=job, params=params, num_steps=steps, micro_batch=micro_batch, ladder=tuple(ladder), seed=seed)
    return replace(base, **changes)


def told(course: Course) -> dict[str, Any]:
    """A course as plain numbers for the file."""
    return {
        "train_loss": course.train_loss,
        "val_loss": course.val_loss,
        "wall_s": course.wall_s,
        "spent_s": course.spent_s,
        "num_probes": course.num_probes,
        "num_skips": course.num_skips,
        "tiers": course.share_of(),
        "moves": course.moves,
    }


def gap(value: float, base: float) -> float:
    """Relative difference in per cent."""
    return 100.0 * (value / base - 1.0) if math.isfinite(value) else 1e6


def mean_figure(
    name: str, values: Sequence[float], target: str | None, is_met: Callable[[float], bool] | None
) -> Figure:
    """The mean in per cent with its 95 % bootstrap interval."""
    value = statistics.fmean(values)
    low, high = bootstrap_interval(list(values), statistics.fmean)
    return Figure(
        name=name,
        value=value,
        statistic="mean",
        unit="%",
        low=low,
        high=high,
        spread="95 % bootstrap",
        values=list(values),
        target=target,
        is_met=None if is_met is None else is_met(value),
    )


def twins(report: Report, job: str) -> None:
    """fp32, fp32 with weights nudged by 1e-6, and guarded auto, for each seed.

    Costs are declared and the budget of probes is a fifth of these short runs, so that cheaper tiers are entered even
    where this machine would not gain by them or a run of seconds is over before they have proved themselves.
    """
    gaps: dict[str, list[float]] = {"train": [], "val": [], "train twins": [], "val twins": []}
    for seed in range(report.options.repeats):
        quick = report.options.is_quick
        base = run(recipe_of(job, seed, is_quick=quick, ladder=(Tier.FP32,)))
        twin = run(recipe_of(job, seed, is_quick=quick, ladder=(Tier.FP32,), nudge=1e-6))
        auto = run(recipe_of(job, seed, is_quick=quick, costs=CHEAPER, budget=0.2))
        report.raw[f"seed {seed}"] = {"fp32": told(base), "fp32 nudged": told(twin), "auto": told(auto)}
        gaps["train"].append(gap(auto.train_loss, base.train_loss))
        gaps["val"].append(gap(auto.val_loss, base.val_loss))
        gaps["train twins"].append(gap(twin.train_loss, base.train_loss))
        gaps["val twins"].append(gap(twin.val_loss, base.val_loss))
        say(f"  seed {seed}: train {gaps['train'][-1]:+.2f} % val {gaps['val'][-1]:+.2f} % in {auto.share_of()}")
    for part in ("train", "val"):
        name = f"{job}: final {part} loss, guarded auto over fp32"
        report.add(mean_figure(name, gaps[part], "mean within +-1 %", lambda value: abs(value) <= 1.0))
        spread = max(abs(value) for value in gaps[f"{part} twins"])
        limit, worst = max(3.0, spread), max(gaps[part])
        report.add(
            Figure(
                name=f"{job}: worst seed's {part} loss over fp32",
                value=worst,
                statistic="maximum",
                unit="%",
                low=min(gaps[part]),
                high=worst,
                spread="min to max",
                values=gaps[part],
                target=f"<= {limit:.2f} %, the larger of 3 % and fp32 against fp32 ({spread:.2f} %)",
                is_met=worst <= limit,
            )
        )


def ladder(report: Report) -> None:
    """The guard on and off above a ladder whose cheap end does harm, with declared costs."""
    on, off = [], []
    for seed in range(report.options.repeats):
        quick = report.options.is_quick
        for job in ("mlp", "language"):
            base = run(recipe_of(job, seed, is_quick=quick, ladder=(Tier.FP32,)))
            guarded = run(recipe_of(job, seed, is_quick=quick, ladder=HARMFUL, costs=DECLARED, budget=0.1))
            greedy = run(recipe_of(job, seed, is_quick=quick, ladder=HARMFUL, greedy=True, budget=0.0))
            report.raw[f"{job} {seed}"] = {"fp32": told(base), "on": told(guarded), "off": told(greedy)}
            on.append(gap(guarded.train_loss, base.train_loss))
            off.append(gap(greedy.train_loss, base.train_loss))
            say(f"  {job} seed {seed}: on {on[-1]:+.2f} % {guarded.share_of()}, off {off[-1]:+.1f} %")
    report.add(mean_figure("guard on: final train loss over fp32", on, "within 2 %", lambda value: abs(value) <= 2.0))
    report.add(
        mean_figure("guard off: the same", off, ">= 50 % worse, or the test proves nothing", lambda v: v >= 50.0)
    )


class _Sick:
    """Makes the loss of chosen steps NaN, or far too large, while the trial is in a cheap tier."""

    def __init__(self, stepper: Stepper, factor: float, is_on: Callable[[Tier], bool]) -> None:
        self.left, self._stepper = 0, stepper
        inner = stepper.job.loss

        def loss(model: nn.Module, batch: tuple[Tensor, ...]) -> LossTerms:
            terms = inner(model, batch)
            if self.left > 0 and is_on(stepper.settings.tier):
                return LossTerms(loss_sum=terms.loss_sum * factor, num_elements=terms.num_elements)
            return terms

        stepper.job.loss = loss  # type: ignore[method-assign]


def _nan_fault(at: int) -> Callable[[Stepper, int], None]:
    sick: list[_Sick] = []

    def before(stepper: Stepper, number: int) -> None:
        if not sick:
            sick.append(_Sick(stepper, float("nan"), lambda tier: tier is not Tier.FP32))
        sick[0].left = 1 if number == at else 0

    return before


def _noise_fault(at: int, times: float) -> Callable[[Stepper, int], None]:
    """From step `at` on bf16 is that many times as noisy."""

    def before(stepper: Stepper, number: int) -> None:
        if number != at:
            return

        def noisy(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            scale = times * 2.0**-9
            rough = weight * (1 + scale * torch.randn_like(weight))
            return products.fp32_linear(x * (1 + scale * torch.randn_like(x)), rough, bias)

        products.function_of.cache_clear()
        products.TIER_FUNCTIONS[Tier.BF16] = noisy
        for layer in stepper.model.modules():
            if isinstance(layer, PrecisionLinear):
                layer.turn(stepper.settings.tier)

    return before


def _overflow_fault(at: int) -> Callable[[Stepper, int], None]:
    """From step `at` on gradients overflow in fp16 however small the scale gets, for fifty steps."""

    def before(stepper: Stepper, number: int) -> None:
        if at <= number < at + 50 and stepper.settings.tier is Tier.FP16:
            stepper.loss_scale.scale = 2.0**40

    return before


def faults(report: Report) -> None:
    """Planted faults: how long until a good tier, and what the end is worth."""
    normal = dict(products.TIER_FUNCTIONS)
    bf16 = {"ladder": (Tier.FP32, Tier.BF16), "costs": {Tier.FP32: 1.0, Tier.BF16: 0.5}, "budget": 0.1}
    fp16 = {
        "ladder": (Tier.FP32, Tier.BF16, Tier.FP16),
        "costs": {Tier.FP32: 1.0, Tier.BF16: 0.6, Tier.FP16: 0.4},
        "budget": 0.1,
    }
    cases: dict[str, tuple[dict[str, Any], Callable[[Stepper, int], None], str]] = {
        "a NaN in one step of bf16": (bf16, _nan_fault(300), "step"),
        "bf16 made 300 times noisier": (bf16, _noise_fault(300, 300.0), "probe"),
        "overflow storm in fp16": (fp16, _overflow_fault(300), "step"),
    }
    for name, (setup, fault, unit) in cases.items():
        gaps, delays = [], []
        for seed in range(report.options.repeats):
            quick = report.options.is_quick
            calm = run(recipe_of("mlp", seed, is_quick=quick, **setup))
            struck = run(recipe_of("mlp", seed, is_quick=quick, before_step=fault, **setup))
            products.TIER_FUNCTIONS.update(normal)
            products.function_of.cache_clear()
            left = [move["step"] for move in struck.moves if move["why"] != "cheaper and safe"]
            delays.append(float(min(left) - 300) if left else 1e6)
            gaps.append(gap(struck.train_loss, calm.train_loss))
            report.raw[f"{name}, seed {seed}"] = {"calm": told(calm), "struck": told(struck)}
        report.add(
            mean_figure(f"{name}: final train loss over undisturbed", gaps, "within 1 %", lambda v: abs(v) <= 1.0)
        )
        report.add(median_figure(f"{name}: steps until a dearer tier", delays, f"steps ({unit})"))


def speed(report: Report) -> None:
    """Samples per second of the language job, guarded auto against fp32, all costs of auto included."""
    wide = {"width": 256, "layers": 4, "heads": 4, "context": 128, "eval_windows": 8}
    ratios, overheads = [], []
    for seed in range(report.options.repeats):
        steps = 20 if report.options.is_quick else 120
        base = Recipe(job="language", params=wide, num_steps=steps, micro_batch=8, ladder=(Tier.FP32,), seed=seed)
        alone = run(base)
        auto = run(replace(base, ladder=AUTO))
        ratios.append(alone.wall_s / auto.wall_s)
        overheads.append(100 * auto.spent_s / auto.wall_s)
        report.raw[f"seed {seed}"] = {"fp32": told(alone), "auto": told(auto)}
    target = ">= 1.5 where the processor has bf16 instructions, never below 0.97"
    needed = 1.5 if Tier.BF16 in AUTO else 0.97
    figure = median_figure("language, 3.3 M parameters: whole-run speed of auto over fp32", ratios, "x", target=target)
    report.add(replace(figure, is_met=figure.value >= needed))
    report.add(median_figure("guard and calibration in these short runs", overheads, "% of time"))


def small(report: Report) -> None:
    """The same for a model too small to gain: auto must not lose."""
    ratios = []
    for seed in range(report.options.repeats):
        base = recipe_of("mlp", seed, is_quick=report.options.is_quick, ladder=(Tier.FP32,), num_steps=3000)
        alone = run(base)
        auto = run(replace(base, ladder=AUTO))
        ratios.append(alone.wall_s / auto.wall_s)
        report.raw[f"seed {seed}"] = {"fp32": told(alone), "auto": told(auto)}
    figure = median_figure("mlp: whole-run speed of auto over fp32", ratios, "x", target=">= 0.97")
    report.add(replace(figure, is_met=figure.value >= 0.97))


def overhead(report: Report) -> None:
    """Part of the time that guard and calibration take in one long run."""
    parts = []
    for seed in range(report.options.repeats):
        steps = 60 if report.options.is_quick else 9000
        course = run(recipe_of("language", seed, is_quick=False, num_steps=steps))
        parts.append(100 * course.spent_s / course.wall_s)
        report.raw[f"seed {seed}"] = told(course)
        report.notes.append(f"the run of seed {seed} took {course.wall_s:.0f} s")
    figure = median_figure("guard and calibration", parts, "% of time", target="<= 3 %, runs of 10 minutes and more")
    report.add(replace(figure, is_met=figure.value <= 3.0))


def switch(report: Report) -> None:
    """Extra time of the step in which the tier turns, over the usual time of that tier's step."""
    from tests.bench.guarded_trial import begin

    extra: list[float] = []
    stepper, _ = begin(recipe_of("language", 0, is_quick=False, ladder=AUTO))
    usual: dict[Tier, float] = {}
    for tier in AUTO:
        stepper.turn(replace(stepper.settings, tier=tier))
        times = []
        for _ in range(12):
            times.append(_timed(stepper))
        usual[tier] = statistics.median(times[2:])
    rounds = 5 if report.options.is_quick else 40 * report.options.repeats
    for number in range(rounds):
        tier = AUTO[number % len(AUTO)]
        began_s = time.perf_counter()
        stepper.turn(replace(stepper.settings, tier=tier))
        stepper.step()
        extra.append(1e3 * (time.perf_counter() - began_s - usual[tier]))
        _timed(stepper)
    report.raw["usual step, ms"] = {tier.value: 1e3 * seconds for tier, seconds in usual.items()}
    report.add(p95_figure("extra time of the step that switches, uncompiled", extra, "ms", limit=20.0))


def _timed(stepper: Stepper) -> float:
    began_s = time.perf_counter()
    stepper.step()
    return time.perf_counter() - began_s


PARTS: dict[str, tuple[Callable[[Report], None], int]] = {
    **{f"twins-{job}": (partial(twins, job=job), 5) for job in RECIPES},
    "ladder": (ladder, 3),
    "faults": (faults, 3),
    "speed": (speed, 3),
    "small": (small, 3),
    "overhead": (overhead, 1),
    "switch": (switch, 2),
}


def main() -> None:
    """Run the part that the command line names."""
    if len(sys.argv) < 2 or sys.argv[1] not in PARTS:
        sys.exit(f"usage: python -m tests.bench.bench_precision PART ...; PART one of {', '.join(PARTS)}")
    part = sys.argv.pop(1)
    measure, repeats = PARTS[part]
    torch.set_num_threads(1)
    report = Report(options(f"precision_{part.replace('-', '_')}", repeats=repeats))
    measure(report)
    report.write()


if __name__ == "__main__":
    main()
