"""What bf16 is worth on this CPU to language models of three sizes, and what `tiers: auto` makes of it in a whole run.

`python -m tests.bench.bench_precision_speed MODEL [--quick] [--repeats N] [--out FILE]` with MODEL one of `large`
(6.6 M parameters, 72 s in fp32), `wide` (3.3 M, 33 s) and `tiny` (0.1 M, 12 s). For each the step in fp32, in our
bf16 and under plain `torch.autocast`, in turn; then whole runs in fp32 and with guarded auto, which calibrates and
probes within the run and reads no calibration file. One thread.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from orchestrator.jobs.job import LossTerms
from orchestrator.policies.tier import Tier
from orchestrator.train.stepper import Stepper
from tests.bench.bench_precision import AUTO, LANGUAGE, WIDE, told
from tests.bench.guarded_trial import Recipe, begin, run
from tests.bench.results_file import Report, chosen_part, median_figure, options, say

GAIN, LOSS = 1.5, 0.97
"""Least speed of auto over fp32: of a model that is large enough, where the processor has bf16; and anywhere."""


@dataclass(frozen=True, slots=True)
class Model:
    """A size of the language job: its parameters, steps of a whole run, the least speed, and rounds of single steps."""

    words: str
    params: dict[str, Any]
    micro_batch: int
    num_steps: int
    needed: float
    num_rounds: int


MODELS = {
    "large": Model(
        "6.6 M parameters",
        {"width": 512, "layers": 2, "heads": 8, "context": 128, "eval_windows": 8},
        4,
        300,
        GAIN if Tier.BF16 in AUTO else LOSS,
        10,
    ),
    "wide": Model("3.3 M parameters", WIDE, 8, 120, LOSS, 10),
    "tiny": Model("0.1 M parameters", LANGUAGE, 16, 1500, LOSS, 50),
}


def measure(report: Report, model: Model) -> None:
    """Single steps, then whole runs."""
    base = Recipe(
        job="language",
        params=model.params,
        num_steps=30 if report.options.is_quick else model.num_steps,
        micro_batch=model.micro_batch,
        ladder=(Tier.FP32,),
        seed=0,
    )
    if Tier.BF16 in AUTO:
        _steps(report, model, base)
    ratios, spent, shares = [], [], []
    for seed in range(report.options.repeats):
        alone = run(replace(base, seed=seed))
        auto = run(replace(base, seed=seed, ladder=AUTO))
        ratios.append(alone.wall_s / auto.wall_s)
        spent.append(100 * auto.spent_s / auto.wall_s)
        shares.append(auto.share_of().get("bf16", 0.0))
        report.raw[f"seed {seed}"] = {"fp32": told(alone), "auto": told(auto)}
        say(f"  seed {seed}: x{ratios[-1]:.3f}, {spent[-1]:.1f} % spent, {auto.share_of()}")
    name = f"language, {model.words}: whole-run speed of auto over fp32"
    figure = median_figure(name, ratios, "x", target=f">= {model.needed:g}")
    report.add(replace(figure, is_met=figure.value >= model.needed))
    report.add(median_figure("guard and calibration in these short runs", spent, "% of time"))
    report.add(median_figure("part of the steps in bf16", shares, "of 1"))


def _steps(report: Report, model: Model, recipe: Recipe) -> None:
    """Whole steps, optimizer included, of one trial that turns between them."""
    stepper, _ = begin(replace(recipe, ladder=AUTO))
    ours = stepper.loss
    times: dict[str, list[float]] = {"fp32": [], "bf16": [], "plain autocast": []}
    for number in range(model.num_rounds + 1):
        for name, seconds in times.items():
            stepper.turn(replace(stepper.settings, tier=Tier.BF16 if name == "bf16" else Tier.FP32))
            stepper.loss = partial(_plain, stepper) if name == "plain autocast" else ours  # type: ignore[method-assign]
            began_s = time.perf_counter()
            stepper.step()
            if number:  # the first of each warms up
                seconds.append(time.perf_counter() - began_s)
    report.raw["seconds of steps"] = times
    for name, text in (("plain autocast", "plain torch.autocast of the same model"), ("bf16", "our bf16")):
        ratios = [a / b for a, b in zip(times["fp32"], times[name], strict=True)]
        report.add(median_figure(f"language, {model.words}: step in fp32 over {text}", ratios, "x"))


def _plain(stepper: Stepper, model: nn.Module, batch: tuple[Tensor, ...], _: Tier) -> LossTerms:
    """The loss as anybody would write it; linear layers in fp32 are plain ones, which autocast lowers."""
    with torch.autocast("cpu", torch.bfloat16):
        return stepper.job.loss(model, batch)


def main() -> None:
    """Measure the model that the command line names."""
    name = chosen_part(MODELS)
    torch.set_num_threads(1)
    report = Report(options(f"precision_speed_{name}", repeats=2 if name == "large" else 3))
    measure(report, MODELS[name])
    report.write()


if __name__ == "__main__":
    main()
