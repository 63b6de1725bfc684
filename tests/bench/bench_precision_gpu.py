"""What the tiers are worth on a GPU: fp8 against bf16 on wide blocks, compiled; auto against the best single tier.

`python -m tests.bench.bench_precision_gpu PART [--quick] [--out FILE]` with PART one of `all`, `blocks`, `auto` (every
model) and `auto-SIZE`; without a GPU `--quick` tries every line on a CPU. Every part has a limit in seconds, so that
the whole ends within about five minutes.
"""

from __future__ import annotations

import statistics
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from orchestrator.jobs.transformer import Block
from orchestrator.policies.learn.tier_fit import best_usable
from orchestrator.policies.tier import Tier, real_tiers
from orchestrator.train.precision.tiers import coverage, facts_of, install, lowered, set_tier
from orchestrator.train.precision.watch import StepNews
from orchestrator.train.stepper import Stepper
from tests.bench.gpu_job import profiled
from tests.bench.guarded_trial import MIN_GAIN, Recipe, begin
from tests.bench.results_file import Figure, Report, chosen_part, median_figure, options, say

MODELS: dict[str, tuple[dict[str, Any], int]] = {
    "7 M": ({"width": 256, "layers": 8, "heads": 4, "context": 128}, 16),
    "34 M": ({"width": 512, "layers": 10, "heads": 8, "context": 256}, 16),
    "168 M": ({"width": 1024, "layers": 13, "heads": 16, "context": 512}, 16),
}

SETTLE_S = {"7 M": 20.0, "34 M": 20.0, "168 M": 70.0}
"""Seconds for auto to come down its ladder: probes take a part of the time, and a large model's steps are long."""


def one(name: str, value: float, unit: str, target: str | None = None, is_met: bool | None = None) -> Figure:
    return Figure(
        name=name,
        value=value,
        statistic="single",
        unit=unit,
        low=value,
        high=value,
        spread="one measurement",
        values=[value],
        target=target,
        is_met=is_met,
    )


def sync(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def wide_blocks(report: Report, device: torch.device) -> None:
    """One pre-norm block with fp32 masters and fused AdamW; forward, backward and update."""
    quick = report.options.is_quick or device.type != "cuda"
    width, batch, context = (64, 2, 32) if quick else (4096, 8, 2048)
    times: dict[str, list[float]] = {}
    for name in ("plain bf16 autocast", "bf16", "fp8"):
        tier = Tier.FP8 if name == "fp8" else Tier.BF16
        torch.manual_seed(0)
        torch._dynamo.reset()
        with device:
            block = Block(width, max(1, width // 128), 0.0, is_causal=True)
            x = torch.randn(batch, context, width)
        if not name.startswith("plain"):
            install(block)
            set_tier(block, tier)
            say(f"  {name}: {coverage(block)}")
        optimizer = torch.optim.AdamW(block.parameters(), lr=1e-4, fused=True)
        if not name.startswith("plain"):
            report.raw[f"saved bytes {name}"] = saved_bytes(block, x, tier, device)
        began_s = time.monotonic()
        if not (quick and device.type == "cpu"):
            block.compile()
        step = _step(block, optimizer, x, tier, device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        for _ in range(3):
            step()
        sync(device)
        report.raw[f"compile and warm-up {name}, s"] = time.monotonic() - began_s
        times[name] = []
        for _ in range(3 if quick else 20):
            began_s = time.perf_counter()
            step()
            sync(device)
            times[name].append(time.perf_counter() - began_s)
        if device.type == "cuda":
            report.raw[f"peak bytes {name}"] = torch.cuda.max_memory_allocated()
            if name != "plain bf16 autocast":
                report.raw[f"profile {name}"] = profile(step)
        del block, optimizer, x, step
    report.raw["step seconds"] = times
    ratio = [statistics.median(times["bf16"]) / value for value in times["fp8"]]
    plain = [statistics.median(times["plain bf16 autocast"]) / value for value in times["fp8"]]
    figure = median_figure("4096-wide block, 16,384 tokens, compiled: fp8 over bf16", ratio, "x", target=">= 1.25")
    report.add(replace(figure, is_met=figure.value >= 1.25))
    report.add(median_figure("the same over plain nn.Linear under bf16 autocast, compiled", plain, "x"))
    share = report.raw["saved bytes fp8"] / report.raw["saved bytes bf16"]
    report.add(
        one("bytes saved for backward by the linear layers: fp8 over bf16", share, "x", "<= 0.55", share <= 0.55)
    )


def _step(
    block: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, tier: Tier, device: torch.device
) -> Callable[[], None]:
    def step() -> None:
        with lowered(tier, device):
            loss = block(x).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def saved_bytes(block: nn.Module, x: Tensor, tier: Tier, device: torch.device) -> float:
    """Bytes that the linear layers alone keep for the backward pass, parameters (which exist anyway) left out."""
    own = {param.untyped_storage().data_ptr() for param in block.parameters()}
    total = 0
    for layer in block.modules():
        if not isinstance(layer, nn.Linear):
            continue
        kept: dict[int, int] = {}

        def keep(tensor: Tensor, kept: dict[int, int] = kept) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        inner = torch.randn(*x.shape[:-1], layer.in_features, device=device, requires_grad=True)
        inner_ptr = inner.untyped_storage().data_ptr()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), lowered(tier, device):
            layer(inner)
        kept.pop(inner_ptr, None)
        total += sum(kept.values())
    return float(total)


def profile(step: Callable[[], None]) -> list[list[Any]]:
    """The kernels that take longest in one step, in microseconds."""
    nanoseconds, count = profiled(step)
    return [[name[:90], each / 1e3, count[name]] for name, each in nanoseconds.most_common(14)]


def hindsight(report: Report, device: torch.device, models: Sequence[str] = tuple(MODELS)) -> None:
    """Tokens per second of auto once it has settled, against the best single tier, in the step mode used."""
    quick = report.options.is_quick or device.type != "cuda"
    tiers = real_tiers(facts_of(device))
    tiny: tuple[dict[str, Any], int] = ({"width": 32, "layers": 1, "heads": 2, "context": 16}, 4)
    for name in models:
        params, micro_batch = tiny if quick else MODELS[name]
        base = Recipe(
            job="language",
            params={**params, "lr": 3e-4, "eval_windows": 8},
            num_steps=100_000,
            micro_batch=micro_batch,
            ladder=(Tier.FP32,),
            seed=0,
            device=device.type,
        )
        tokens = micro_batch * int(params["context"])
        single = {}
        for tier in tiers:
            stepper, _ = begin(replace(base, ladder=(tier,)))
            single[tier] = tokens * steps_per_s(stepper, 0.2 if quick else 3.0, device)
            del stepper
        limit_s = 1.0 if quick else SETTLE_S[name]
        auto, story = settled(replace(base, ladder=tiers, budget=0.5), limit_s, 0.2 if quick else 3.0, device)
        best = max(single, key=lambda tier: single[tier])
        ratio = tokens * auto / single[best]
        report.raw[name] = {"single": {t.value: v for t, v in single.items()}, "auto": tokens * auto, "story": story}
        shown = ", ".join(f"{tier} {speed / 1e3:.0f}" for tier, speed in single.items())
        say(f"  {name}: {shown} k tokens/s; auto {tokens * auto / 1e3:.0f}; {story[1:]}")
        report.add(one(f"{name}: auto over the best tier ({best})", ratio, "x", ">= 0.95", ratio >= 0.95))
        report.write()


def steps_per_s(stepper: Stepper, seconds: float, device: torch.device) -> float:
    """Speed in the settled step mode: the last part of a short run."""
    began_s = time.monotonic()
    while time.monotonic() - began_s < seconds / 2:
        stepper.advance()
    stepper.settle()
    sync(device)
    began_s, count = time.monotonic(), 0
    while time.monotonic() - began_s < seconds / 2:
        stepper.advance()
        count += 1
    stepper.settle()
    sync(device)
    return count / (time.monotonic() - began_s)


def settled(recipe: Recipe, limit_s: float, seconds: float, device: torch.device) -> tuple[float, list[Any]]:
    """Let the guard and the ladder rule work for `limit_s`, then measure where they came to."""
    stepper, watch = begin(recipe)
    watch.begin()
    story: list[Any] = [{tier.value: cost.step_s for tier, cost in watch.costs.items()}]
    began_s = time.monotonic()
    while time.monotonic() - began_s < limit_s:
        chosen = best_usable(recipe.ladder, watch.known(), (), stepper.settings.tier, MIN_GAIN)
        if watch.is_due or chosen is not stepper.settings.tier:
            stepper.settle()
        move = watch.before_step()
        target = chosen if move is None else move.tier
        if target is not stepper.settings.tier:
            stepper.settle()
            stepper.turn(replace(stepper.settings, tier=target))
            watch.turned()
            why = "cheaper and safe" if move is None else move.reason
            story.append([stepper.step_index, round(time.monotonic() - began_s, 2), target.value, why])
        stepped_s = time.monotonic()
        for result in stepper.advance():
            busy_s = time.monotonic() - stepped_s
            news = StepNews(
                is_skipped=result.is_skipped,
                is_loss_finite=result.is_loss_finite,
                loss=result.loss,
                loss_scale=stepper.loss_scale.scale,
                busy_s=busy_s,
            )
            watch.after_step(news)
    story.append({fit.tier.value: [fit.is_safe, fit.noise_ratio] for fit in watch.known()})
    stepper.settle()
    return steps_per_s(stepper, seconds, device), story


Part = Callable[[Report, torch.device], None]
AUTO: dict[str, Part] = {f"auto-{name.replace(' ', '')}": partial(hindsight, models=(name,)) for name in MODELS}
PARTS: dict[str, dict[str, Part]] = {
    "all": {"blocks": wide_blocks} | AUTO,
    "blocks": {"blocks": wide_blocks},
    "auto": AUTO,
    **{name: {name: part} for name, part in AUTO.items()},
}


def main() -> None:
    """Run what the command line names and write the file whatever the later ones say."""
    chosen = chosen_part(PARTS)
    theme = "precision_gpu" if chosen == "all" else f"precision_gpu_{chosen.replace('-', '_')}"
    report = Report(options(theme, repeats=1))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for name, part in PARTS[chosen].items():
        try:
            part(report, device)
        except Exception as error:  # what one part has to say must not be lost to the other
            report.notes.append(f"{name} failed: {type(error).__name__}: {error}"[:500])
            traceback.print_exc()
        report.write()


if __name__ == "__main__":
    main()
