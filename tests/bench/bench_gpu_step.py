"""A trial of one worker on a GPU against the best loop by hand, and what a live change of SM groups costs a step.

One process, no Ray, no MPS: the loop of a slot with a scripted outside. A step is measured from start to start over the
second half of a trial, so boundary, telemetry, noise scale and copies are in it.
`python -m tests.bench.bench_gpu_step PART` with PART one of `all`, `steps`, `changes`, `tiers`.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from tests.bench.gpu_job import SIZES, BestLoop, first_order, profiled, run_ours, seconds_per_step, tf32
from tests.bench.orchestrated import scratch
from tests.bench.results_file import Options, Report, chosen_part, median_figure, options, p95_figure

STEP_TARGET = 1.03
SWITCH_LIMIT_MS, TIER_LIMIT_MS = 10.0, 20.0
PERIOD = 20
"""Steps between two changes."""
PROFILED = 40
"""Steps of which the kernels are told."""
SHARES = (tuple(range(8)), tuple(range(12)), tuple(range(4)), tuple(range(4, 15)), tuple(range(8, 15)))


def step_times(size: str, tier_name: str, settings: Options, directory: Path, *, is_compiled: bool) -> dict[str, Any]:
    """Seconds per step by hand and ours, alternating, so many times each; with kernels of torch.compile or without."""
    from orchestrator.policies.tier import Tier
    from orchestrator.telemetry.record import FLAG_COMPILED, FLAG_GRAPH

    num_steps = 60 if settings.is_quick else {"7M": 800, "34M": 300, "98M": 160}[size]
    tier = Tier(tier_name)
    hand, ours, words = [], [], ""
    for number in range(settings.repeats):
        loop = BestLoop(size, tier_name, is_compiled=is_compiled)
        loop.run(num_steps // 4)
        hand.append(loop.run(num_steps // 2))
        del loop
        first = first_order(directory / f"{size}-{tier_name}-{is_compiled}-{number}", size, tier, num_steps)
        outside = run_ours(first, mode="compiled" if is_compiled else "auto")
        ours.append(seconds_per_step(outside.records, num_steps // 2))
        flags = int(outside.records["flags"][-1])
        words = "compiled" if flags & FLAG_COMPILED else "graph" if flags & FLAG_GRAPH else "eager"
    return {"size": size, "tier": tier_name, "hand_s": hand, "ours_s": ours, "mode": words}


def kernels(size: str, tier_name: str, directory: Path) -> dict[str, Any]:
    """What the GPU does in a step by hand and in one of ours: milliseconds and number of kernels, and the dearest.

    Ours is the difference of a long and a short trial, so beginning and end are not in it.
    """
    from orchestrator.policies.tier import Tier

    def trial(num_steps: int) -> Any:
        where = directory / f"{size}-{tier_name}-kernels-{num_steps}"
        return profiled(lambda: run_ours(first_order(where, size, Tier(tier_name), num_steps)))

    loop = BestLoop(size, tier_name)
    loop.run(PROFILED)
    hand_ns, hand_count = profiled(partial(loop.run, PROFILED))
    del loop
    (long_ns, long_count), (short_ns, short_count) = trial(3 * PROFILED), trial(2 * PROFILED)
    # Not Counter's own difference, which drops what is not positive: a kernel of the beginning may vary a little.
    ours_ns = {name: long_ns[name] - short_ns[name] for name in long_ns}
    ours_count = {name: long_count[name] - short_count[name] for name in long_count}
    return {
        name: {
            "busy_ms": sum(ns.values()) / PROFILED / 1e6,
            "kernels": sum(count.values()) / PROFILED,
            "dearest_us": [
                [each[:90], ns[each] / PROFILED / 1e3, count[each] / PROFILED]
                for each in sorted(ns, key=lambda each: -ns[each])[:24]
            ],
        }
        for name, ns, count in (("hand", hand_ns, hand_count), ("ours", ours_ns, ours_count))
    }


def switches(size: str, mode: str, settings: Options, directory: Path) -> dict[str, Any]:
    """A trial whose groups change every 20 steps; milliseconds that each change adds, and its losses against none."""
    from orchestrator.policies.tier import Tier
    from orchestrator.share import SmGroups
    from orchestrator.train.step_mode.captured import MAX_FLYING
    from tests.unit.orchestrator.train.links import grant

    period = PERIOD
    count = 10 if settings.is_quick else 30 if size == "98M" else 40
    micro_batch, num_steps = SIZES[size][1], period * (count + 2)
    share = SmGroups()

    def change(outside: Any) -> None:
        for number in range(count):
            units = SHARES[number % len(SHARES)]
            units = tuple(unit for unit in units if unit < share.num_units)
            given = grant(number + 2, micro_batch=micro_batch, tier=Tier.BF16)
            given = replace(given, units=(units,), amount=float(len(units)))
            outside.at(period * (number + 1), lambda now, given=given: replace(now, grant=given))

    def start(name: str, num_units: int = share.num_units) -> Any:
        first = first_order(directory / f"{size}-{mode}-{name}", size, Tier.BF16, num_steps)
        assert first.grant is not None
        units = tuple(range(num_units))
        return replace(first, grant=replace(first.grant, units=(units,), amount=float(len(units))))

    with timed_captures() as capture_ms:
        changed = run_ours(start("changed"), mode=mode, share=share, script=change).records
    still = run_ours(start("still"), mode=mode, share=share).records
    again = run_ours(start("again"), mode=mode, share=share).records
    # Kernels may split their sums by the number of SMs: what that alone does to the losses, without any change.
    fewer = run_ours(start("fewer", 4), mode=mode, share=share).records
    switch_ms = 1e3 * changed["switch_s"][changed["switch_s"] > 0][1:]
    return {
        "size": size,
        "mode": mode,
        "switch_ms": switch_ms.tolist(),
        "new_ms": switch_ms[: len(SHARES)].tolist(),
        "known_ms": switch_ms[len(SHARES) :].tolist(),
        "capture_ms": capture_ms,
        "extra_ms": extra_ms(changed, period, MAX_FLYING if mode == "graph" else 0).tolist(),
        "extra_ms_of_none": extra_ms(still, period, MAX_FLYING if mode == "graph" else 0, changed).tolist(),
        "loss_difference": float(np.abs(changed["loss"] - still["loss"]).max()),
        "loss_difference_of_two_still": float(np.abs(again["loss"] - still["loss"]).max()),
        "loss_difference_on_4_groups": float(np.abs(fewer["loss"] - still["loss"]).max()),
        "losses": {
            name: records["loss"].tolist()
            for name, records in (("changed", changed), ("still", still), ("again", again), ("on 4 groups", fewer))
        },
        "num_groups": share.num_units,
    }


@contextlib.contextmanager
def timed_captures() -> Iterator[list[float]]:
    """Milliseconds of every recording of a step in here, the one of the start first."""
    from orchestrator.train.step_mode.captured import CapturedStep

    record, found = CapturedStep._record, []

    def timed(self: Any, batch: Any, compiling: Any) -> Any:
        began_s = time.perf_counter()
        try:
            return record(self, batch, compiling)
        finally:
            found.append(1e3 * (time.perf_counter() - began_s))

    with mock.patch.object(CapturedStep, "_record", timed):
        yield found


def extra_ms(records: Any, period: int, num_ahead: int, like: Any = None) -> Any:
    """Milliseconds that a change added: the steps around it against as many typical ones of before and of after.

    The host is `num_ahead` steps before the device in graph mode, and waits for these at the change: so many steps of
    before fall behind it, and as many of after fall out of what is summed. Steps whose halves are compared for the
    noise scale, which an eager trial does now and then whether or not anything changes, count as typical ones. With
    `like`, the records of a run with changes, the same is done at its steps: the estimate where nothing changed.
    """
    spans = 1e3 * np.diff(records["start_s"])
    if num_ahead == 0:
        for index in np.flatnonzero(np.isfinite(records["noise_trace"][:-1])):
            spans[index] = np.median(spans[index + 1 : index + 5])
    reach, found = period // 2 - 2, []
    for index in np.flatnonzero((records if like is None else like)["switch_s"][:-1] > 0):
        if index < period or index + period >= len(spans):
            continue
        before, after = np.median(spans[index - reach : index]), np.median(spans[index + 4 : index + period - 1])
        total = spans[index - reach : index + reach].sum()
        found.append(total - reach * (before + after) - num_ahead * (before - after))
    return np.array(found)


def against_hand(report: Report, directory: Path) -> None:
    """Seconds per step of every size and tier against the best loop by hand; behind that, both compiled."""
    import torch

    found: dict[tuple[str, str, bool], dict[str, Any]] = {}
    for is_compiled in (False, True):
        for size in SIZES:
            for tier_name in ("tf32", "bf16"):
                with tf32() if tier_name == "tf32" else contextlib.nullcontext():
                    row = step_times(size, tier_name, report.options, directory, is_compiled=is_compiled)
                    if not is_compiled:
                        row["kernels"] = kernels(size, tier_name, directory)
                found[size, tier_name, is_compiled] = row
                name = f"step of {size} {tier_name} ({row['mode']}), ours / best by hand"
                plain = found[size, tier_name, False]
                if is_compiled:
                    report.add(median_figure(f"{name}, both compiled", _ratios(row, row), "x"))
                    report.add(median_figure("  ours compiled / best by hand not", _ratios(row, plain), "x"))
                else:
                    met = f"<= {STEP_TARGET}"
                    ratios = _ratios(row, row)
                    report.add(median_figure(name, ratios, "x", target=met, is_met=lambda v, _l, _h: v <= STEP_TARGET))
                report.add(median_figure("  ours", [1e3 * s for s in row["ours_s"]], "ms"))
                for mine, told in row.get("kernels", {}).items():
                    report.add(median_figure(f"  the GPU works, {mine}", [told["busy_ms"]], "ms"))
                report.raw |= {
                    "sizes": {name: list(size) for name, size in SIZES.items()},
                    "steps": [{"is_compiled": key[-1], **each} for key, each in found.items()],
                }
                report.write()  # one that takes too long must not take the others with it
                torch.cuda.empty_cache()


def _ratios(ours: dict[str, Any], hand: dict[str, Any]) -> list[float]:
    return [mine / other for mine, other in zip(ours["ours_s"], hand["hand_s"], strict=True)]


def changes(report: Report, directory: Path) -> None:
    """What a change of SM groups costs, and the losses with and without."""
    rows = []
    for size, mode in (("7M", "eager"), ("7M", "graph"), ("98M", "graph")):
        found = switches(size, mode, report.options, directory)
        rows.append(found)
        report.add(p95_figure(f"live change of SM groups, {size} {mode}, known", found["known_ms"], "ms", limit=10.0))
        report.add(p95_figure("  groups that are new", found["new_ms"], "ms"))
        extra = found["extra_ms"]
        report.add(p95_figure("  extra time of that step, known", extra[len(SHARES) :], "ms", limit=SWITCH_LIMIT_MS))
        report.add(p95_figure("  extra time of that step, new (captured)", extra[: len(SHARES)], "ms"))
        if found["capture_ms"]:
            report.add(median_figure("  recording a step", found["capture_ms"][1:], "ms"))
        none = found["extra_ms_of_none"]
        report.add(p95_figure("  the same of steps at which nothing changed", none[len(SHARES) :], "ms"))
        report.add(median_figure("  largest difference of losses", [found["loss_difference"]], "nats"))
        report.add(median_figure("  the same of two runs without", [found["loss_difference_of_two_still"]], "nats"))
        report.add(median_figure("  of one on 4 groups throughout", [found["loss_difference_on_4_groups"]], "nats"))
        report.raw |= {"changes": rows}
        report.write()  # a size that fails must not take the others with it


def tier_turns(size: str, mode: str, settings: Options, directory: Path) -> dict[str, Any]:
    """A trial whose tier turns between fp32 and bf16 every 20 steps; milliseconds that each turn adds."""
    from orchestrator.policies.tier import Tier
    from orchestrator.train.step_mode.captured import MAX_FLYING
    from tests.unit.orchestrator.train.links import grant

    count, micro_batch = 10 if settings.is_quick else 60, SIZES[size][1]

    def turn(outside: Any) -> None:
        for number in range(count):
            tier = Tier.BF16 if number % 2 == 0 else Tier.FP32
            given = grant(number + 2, micro_batch=micro_batch, tier=tier)
            outside.at(PERIOD * (number + 1), lambda now, given=given: replace(now, grant=given))

    first = first_order(directory / f"{size}-{mode}-tiers", size, Tier.FP32, PERIOD * (count + 2))
    records = run_ours(first, mode=mode, script=turn).records
    elsewhere = first_order(directory / f"{size}-{mode}-still", size, Tier.FP32, PERIOD * (count + 2))
    still = run_ours(elsewhere, mode=mode).records
    num_ahead = MAX_FLYING if mode == "graph" else 0
    extra = extra_ms(records, PERIOD, num_ahead)
    return {
        "size": size,
        "mode": mode,
        "num_turned": int(np.count_nonzero(np.diff(records["tier"]))),
        "switch_ms": (1e3 * records["switch_s"][records["switch_s"] > 0]).tolist(),
        "extra_ms": extra.tolist(),
        "extra_ms_of_none": extra_ms(still, PERIOD, num_ahead, records).tolist(),
        "span_ms": (1e3 * np.diff(records["start_s"])).tolist(),
    }


def tiers(report: Report, directory: Path) -> None:
    """What a turn of the precision tier costs, to a tier that was used before."""
    rows = []
    for size, mode in (("7M", "eager"), ("34M", "eager"), ("7M", "graph"), ("34M", "graph")):
        found = tier_turns(size, mode, report.options, directory)
        rows.append(found)
        name = f"live turn of the tier, {size} {mode}: extra time of that step, known tier"
        report.add(p95_figure(name, found["extra_ms"][2:], "ms", limit=TIER_LIMIT_MS))
        none = found["extra_ms_of_none"][2:]
        report.add(p95_figure("  the same of steps at which nothing turned", none, "ms"))
        report.raw |= {"tiers": rows}
        report.write()


PARTS = {
    "all": (against_hand, changes, tiers),
    "steps": (against_hand,),
    "changes": (changes,),
    "tiers": (tiers,),
}


def main() -> None:
    """Measure the part that the command line names."""
    name = chosen_part(PARTS)
    report = Report(options("gpu_step" if name == "all" else f"gpu_step_{name}", repeats=3))
    with scratch() as directory:
        for part in PARTS[name]:
            part(report, directory)
    report.write()


if __name__ == "__main__":
    main()
