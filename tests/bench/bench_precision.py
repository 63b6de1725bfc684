"""What guarded precision costs, gains and protects, on one rank of a CPU.

`python -m tests.bench.bench_precision_twins` and so on do not exist: one module, one part at a time, because each has
its own results file: `python -m tests.bench.bench_precision PART [--quick] [--repeats N] [--out FILE]` with PART one of
`twins-JOB` (fp32 against guarded auto, paired seeds), `ladder` (guard on and off above a harmful end), `faults-TIER`
(planted), `small` (auto against fp32, a model too small to gain), `switch` (extra time of the step after a switch) and
`overhead`.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from orchestrator.hardware import cpu_facts
from orchestrator.jobs.job import LossTerms
from orchestrator.policies.tier import Tier, auto_tiers
from orchestrator.train.precision import products
from orchestrator.train.precision.linear import PrecisionLinear
from orchestrator.train.stepper import Stepper
from tests.bench.guarded_ranks import run_ranks
from tests.bench.guarded_trial import Course, Recipe, run
from tests.bench.results_file import (
    Figure,
    Report,
    bootstrap_interval,
    chosen_part,
    median_figure,
    options,
    p95_figure,
    say,
)

AUTO = auto_tiers(cpu_facts())
LANGUAGE = {"width": 64, "layers": 2, "heads": 4, "context": 32, "lr": 2e-3, "eval_windows": 512}
WIDE = {"width": 256, "layers": 4, "heads": 4, "context": 128, "eval_windows": 8}
IMAGE = {"width": 32, "layers": 2}
MLP = {"width": 128, "depth": 3, "lr": 0.05}
SPEECH = {"width": 64, "layers": 2, "max_seconds": 1.0}
RECIPES: dict[str, tuple[str, dict[str, Any], int, int]] = {
    "language": ("language", LANGUAGE, 300, 16),
    "mlp": ("mlp", {**MLP, "num_samples": 65536}, 1200, 64),
    # 31 times over the same samples until they are known by heart: the end is chaotic, in fp32 as well.
    "heart": ("mlp", MLP, 2000, 64),
    "image": ("image", IMAGE, 200, 32),
    # Few enough that no sample is known by heart, which makes the end chaotic in fp32 as well.
    "speech": ("speech", SPEECH, 80, 16),
}
TWINS = ("language", "image", "mlp", "heart")
TUNED_ON, VALIDATED_ON = ("mlp", "language"), ("image", "speech")
LADDER_STEPS = {"language": 600}
"""Where the steps of the twins are too few for a harmful tier to do its harm."""
NUDGE = 2.0**-9
LONG_S = 600.0
HARMFUL = tuple(Tier(word) for word in ("fp32", "bf16", "int8", "fixed(4,8,floor)", "fixed(2,6)"))
CHEAPER = {tier: 0.6**number for number, tier in enumerate(AUTO)}
DECLARED = dict(zip(HARMFUL, (1.0, 0.6, 0.4, 0.25, 0.15), strict=True))


def recipe_of(job: str, seed: int, *, is_quick: bool, ladder: Sequence[Tier] = AUTO, **changes: Any) -> Recipe:
    job_name, params, num_steps, micro_batch = RECIPES[job]
    steps = 40 if is_quick else num_steps
    base = Recipe(
        job=job_name, params=params, num_steps=steps, micro_batch=micro_batch, ladder=tuple(ladder), seed=seed
    )
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
    """fp32, fp32 with weights nudged once by as much as bf16 rounds them, and guarded auto, for each seed.

    Costs are declared and the budget of probes is a fifth of these short runs, so that cheaper tiers are entered even
    where this machine would not gain by them or a run of seconds is over before they have proved themselves.
    """
    gaps: dict[str, list[float]] = {"train": [], "val": [], "train twins": [], "val twins": []}
    for seed in range(report.options.repeats):
        quick = report.options.is_quick
        base = run(recipe_of(job, seed, is_quick=quick, ladder=(Tier.FP32,)))
        twin = run(recipe_of(job, seed, is_quick=quick, ladder=(Tier.FP32,), nudge=NUDGE))
        auto = run(recipe_of(job, seed, is_quick=quick, costs=CHEAPER, budget=0.2))
        report.raw[f"seed {seed}"] = {"fp32": told(base), "fp32 nudged": told(twin), "auto": told(auto)}
        gaps["train"].append(gap(auto.train_loss, base.train_loss))
        gaps["val"].append(gap(auto.val_loss, base.val_loss))
        gaps["train twins"].append(gap(twin.train_loss, base.train_loss))
        gaps["val twins"].append(gap(twin.val_loss, base.val_loss))
        say(f"  seed {seed}: train {gaps['train'][-1]:+.2f} % val {gaps['val'][-1]:+.2f} % in {auto.share_of()}")
    for part in ("train", "val"):
        beside = gaps[f"{part} twins"]
        report.add(mean_figure(f"{job}: final {part} loss, nudged fp32 over fp32", beside, None, None))
        name = f"{job}: final {part} loss, guarded auto over fp32"
        report.add(mean_figure(name, gaps[part], "mean within +-1 %", lambda value: abs(value) <= 1.0))
        spread = max(abs(value) for value in beside)
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
    """The guard on and off above a ladder whose cheap end does harm, costs declared; beside it fp32 nudged once.

    Of jobs whose layers are linear ones: of `genome` only the head is, so that no tier can do it harm.
    """
    on: dict[str, list[float]] = {}
    off: list[float] = []
    for job in (*TUNED_ON, *VALIDATED_ON):
        for seed in range(report.options.repeats):
            make = partial(recipe_of, job, seed, is_quick=report.options.is_quick)
            if job in LADDER_STEPS and not report.options.is_quick:
                make = partial(make, num_steps=LADDER_STEPS[job])
            base = run(make(ladder=(Tier.FP32,)))
            twin = run(make(ladder=(Tier.FP32,), nudge=NUDGE))
            guarded = run(make(ladder=HARMFUL, costs=DECLARED, budget=0.1))
            greedy = run(make(ladder=HARMFUL, greedy=True, budget=0.0))
            named = {"fp32": base, "fp32 nudged": twin, "on": guarded, "off": greedy}
            report.raw[f"{job} {seed}"] = {name: told(course) for name, course in named.items()}
            found = [gap(course.train_loss, base.train_loss) for course in (twin, guarded, greedy)]
            on.setdefault(job, []).append(found[1])
            off.append(found[2])
            texts = [f"{name} {value:+.2f} %" for name, value in zip(("nudged", "on", "off"), found, strict=True)]
            say(f"  {job} {seed}: {', '.join(texts)}, guarded in {guarded.share_of()}")
    for job, gaps in on.items():
        seen = "thresholds seen on it" if job in TUNED_ON else "not tuned on"
        name = f"guard on, {job} ({seen}): final train loss over fp32"
        report.add(mean_figure(name, gaps, "within 2 %", lambda value: abs(value) <= 2.0))
    every = [value for gaps in on.values() for value in gaps]
    report.add(mean_figure("guard on, all jobs: the same", every, "within 2 %", lambda value: abs(value) <= 2.0))
    report.add(
        mean_figure("guard off: the same", off, ">= 50 % worse, or the test proves nothing", lambda v: v >= 50.0)
    )


def _nan_fault(at: int) -> Callable[[Stepper, int], None]:
    """The loss of one step is NaN, once, if the trial is in a tier cheaper than fp32."""
    struck: list[int] = []

    def before(stepper: Stepper, number: int) -> None:
        if number < at or struck or stepper.settings.tier is Tier.FP32:
            return
        struck.append(number)
        inner = stepper.job.loss

        def loss(model: nn.Module, batch: tuple[Tensor, ...]) -> LossTerms:
            stepper.job.loss = inner  # type: ignore[method-assign]
            terms = inner(model, batch)
            return LossTerms(loss_sum=terms.loss_sum * float("nan"), num_elements=terms.num_elements)

        stepper.job.loss = loss  # type: ignore[method-assign]

    return before


def _noise_fault(at: int, tier: Tier, times: float) -> Callable[[Stepper, int], None]:
    """From step `at` on every product in `tier` is off by that many times what it was, forward and backward."""

    def before(stepper: Stepper, number: int) -> None:
        if number != at:
            return
        stepper.turn(replace(stepper.settings, tier=tier))  # wherever the ladder rule has it by now
        usual = products.function_of(tier)

        def noisy(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            exact = products.fp32_linear(x, weight, bias)
            return exact + times * (usual(x, weight, bias) - exact)

        products.function_of.cache_clear()
        products.TIER_FUNCTIONS[tier] = noisy
        for layer in stepper.model.modules():
            if isinstance(layer, PrecisionLinear):
                layer.turn(stepper.settings.tier)

    return before


def _overflow_fault(at: int) -> Callable[[Stepper, int], None]:
    """For fifty steps gradients overflow in fp16 however small the scale gets."""

    def before(stepper: Stepper, number: int) -> None:
        if number == at:
            stepper.turn(replace(stepper.settings, tier=Tier.FP16))
        if at <= number < at + 50 and stepper.settings.tier is Tier.FP16:
            stepper.loss_scale.scale = 2.0**40

    return before


FAULT_STEPS, FAULT_AT = 600, 300
FAULT_LADDERS = {
    "bf16": dict(zip((Tier.FP32, Tier.BF16), (1.0, 0.5), strict=True)),
    "fp16": dict(zip((Tier.FP32, Tier.BF16, Tier.FP16), (1.0, 0.6, 0.4), strict=True)),
    "int8": dict(zip((Tier.FP32, Tier.BF16, Tier.INT8), (1.0, 0.6, 0.4), strict=True)),
}
FAULTS: dict[str, tuple[str, Callable[[], Callable[[Stepper, int], None]], str]] = {
    "a NaN in one of two ranks": ("bf16", partial(_nan_fault, FAULT_AT), "<= 1 step"),
    "int8 ten times noisier": ("int8", partial(_noise_fault, FAULT_AT, Tier.INT8, 10.0), "<= 2 probes"),
    "overflow storm in fp16": ("fp16", partial(_overflow_fault, FAULT_AT), "<= 3 steps, what a loss scale may need"),
}


def _strike(recipe: Recipe, name: str, *, is_struck: bool) -> Course:
    """One run of a fault's recipe, with the fault or without it; a fault of one rank needs two."""
    fault = FAULTS[name][1] if is_struck else None
    if "rank" in name:
        return run_ranks(replace(recipe, micro_batch=recipe.micro_batch // 2), fault)
    normal = dict(products.TIER_FUNCTIONS)
    try:
        return run(replace(recipe, before_step=None if fault is None else fault()))
    finally:
        products.TIER_FUNCTIONS.update(normal)
        products.function_of.cache_clear()


def faults(report: Report, name: str) -> None:
    """A planted fault: how long until a good tier, and what the end is worth."""
    ladder_name, _, limit = FAULTS[name]
    costs = FAULT_LADDERS[ladder_name]
    unit = "probe" if "probe" in limit else "step"
    gaps, delays = [], []
    for seed in range(report.options.repeats):
        recipe = recipe_of("mlp", seed, is_quick=report.options.is_quick, ladder=tuple(costs), costs=costs)
        recipe = replace(recipe, budget=0.3, num_steps=FAULT_STEPS)
        calm, struck = (_strike(recipe, name, is_struck=is_struck) for is_struck in (False, True))
        report.raw[f"seed {seed}"] = {"calm": told(calm), "struck": told(struck)}
        gaps.append(gap(struck.train_loss, calm.train_loss))
        left = [move for move in struck.moves if move["why"] != "cheaper and safe" and move["step"] >= FAULT_AT]
        began = struck.probes_before(FAULT_AT) if unit == "probe" else FAULT_AT
        delays.append(float(left[0][unit] - began) if left else 1e6)
        say(f"  seed {seed}: {gaps[-1]:+.2f} %, {delays[-1]:g} {unit}s, {left[:1]}")
    report.add(mean_figure(f"{name}: final train loss over undisturbed", gaps, "within 1 %", lambda v: abs(v) <= 1.0))
    figure = median_figure(f"{name}: until a dearer tier, worst", delays, f"{unit}s", target=limit)
    is_met = max(delays) <= float(limit.split()[1])
    report.add(replace(figure, statistic="maximum", value=max(delays), is_met=is_met))


def small(report: Report) -> None:
    """Whole-run speed of guarded auto over fp32 for a model too small to gain: auto must not lose."""
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
    """Part of the time that guard and calibration take: of a run of minutes, and of one of ten minutes at that rate."""
    whole, projected = [], []
    for seed in range(report.options.repeats):
        steps = 60 if report.options.is_quick else 1000
        base = Recipe(job="language", params=WIDE, num_steps=steps, micro_batch=8, ladder=AUTO, seed=seed)
        course = run(base)
        whole.append(100 * course.spent_s / course.wall_s)
        middle_s, spent_s = course.spent_at[len(course.spent_at) // 2]
        rate = (course.spent_s - spent_s) / (course.wall_s - middle_s)
        projected.append(100 * (course.spent_s + rate * max(0.0, LONG_S - course.wall_s)) / max(LONG_S, course.wall_s))
        report.raw[f"seed {seed}"] = {**told(course), "spent_at": course.spent_at}
        report.notes.append(f"the run of seed {seed} took {course.wall_s:.0f} s; rate of its second half {rate:.2%}")
    report.add(median_figure("guard and calibration, of this run", whole, "% of time"))
    target = "<= 3 %, runs of 10 minutes and more"
    figure = median_figure("the same of ten minutes, at the rate of the second half", projected, "%", target=target)
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
    **{f"twins-{job}": (partial(twins, job=job), 5) for job in TWINS},
    "ladder": (ladder, 3),
    **{f"faults-{FAULTS[name][0]}": (partial(faults, name=name), 3) for name in FAULTS},
    "small": (small, 3),
    "overhead": (overhead, 1),
    "switch": (switch, 2),
}


def main() -> None:
    """Run the part that the command line names."""
    part = chosen_part(PARTS)
    measure, repeats = PARTS[part]
    torch.set_num_threads(1)
    report = Report(options(f"precision_{part.replace('-', '_')}", repeats=repeats))
    measure(report)
    report.write()


if __name__ == "__main__":
    main()
