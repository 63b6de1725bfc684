"""How long `goodput_joint.decide` takes, and how much memory, from 160 trials on 64 devices to 10,000 on 10,000.

The worlds are `sample_fleets.search_world`: measured trials of six shapes, two thirds of them running on one to four
whole devices, eight devices a node; each is decided anew (the cool-down is over), so that everything is weighed. One
process per size, numpy on one thread. Memory is the peak of that process, Python and numpy included. No plan is carried
out, and no speed of any trial is measured here.
"""

from __future__ import annotations

import concurrent.futures
import gc
import multiprocessing
import os
import resource
import statistics
import time
from typing import Any

from tests.bench.results_file import Report, median_figure, options, say

SIZES = ((160, 64, 0.05), (200, 64, 0.05), (2_000, 2_000, 1.0), (10_000, 10_000, 10.0))
"""Trials, devices, seconds allowed."""
MAX_GIB = 4.0
MANY = 5_000
OBJECTIVES = ("throughput", "fair", "search", "deadline")
ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def decide(num_trials: int, num_devices: int, repeats: int) -> dict[str, Any]:
    """Seconds of every decision by objective, on one seed a repeat, and the peak memory of this process in GiB."""
    from orchestrator.policies.decide.goodput_joint import GoodputJoint
    from orchestrator.policies.invariants import check
    from orchestrator.policies.sample_fleets import search_world

    seconds: dict[str, list[float]] = {objective: [] for objective in OBJECTIVES}
    num_running, num_changed = [], []
    for seed in range(repeats):
        world = search_world(num_trials, num_devices, seed)
        for objective in OBJECTIVES:
            policy = GoodputJoint(objective=objective, cooldown_s=0.0)
            gc.collect()
            began_s = time.perf_counter()
            plan = policy.decide(world)
            seconds[objective].append(time.perf_counter() - began_s)
            if objective == "throughput":
                num_running.append(sum(bool(row.placement) for row in plan.allocations))
                num_changed.append(sum(row.effect != "none" for row in plan.allocations))
    peak_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB
    violations = check(world, plan)
    if violations:
        raise RuntimeError(f"an illegal plan: {violations[0].text}")
    return {"seconds": seconds, "peak_gib": peak_gib, "running": num_running, "changed": num_changed}


def measure(report: Report, size: tuple[int, int, float], repeats: int) -> dict[str, Any]:
    """One size in a process of its own."""
    num_trials, num_devices, allowed_s = size
    if num_trials > MANY:
        repeats = max(1, repeats // 4)
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        found = pool.submit(decide, num_trials, num_devices, repeats).result()
    where = f"{num_trials} trials, {num_devices} devices"
    for objective, values in found["seconds"].items():
        report.add(
            median_figure(
                f"decide, {where}, {objective}",
                values,
                "s",
                target=f"<= {allowed_s:g} s",
                is_met=lambda value, _low, _high: value <= allowed_s,
            )
        )
    report.add(
        median_figure(
            f"peak memory, {where}",
            [found["peak_gib"]],
            "GiB",
            target=f"<= {MAX_GIB:g} GiB",
            is_met=lambda value, _low, _high: value <= MAX_GIB,
        )
    )
    say(f"  {where}: {statistics.median(found['running']):.0f} run, {statistics.median(found['changed']):.0f} change")
    return {"num_trials": num_trials, "num_devices": num_devices, **found}


def main() -> None:
    """All sizes, with one results file; a quick try leaves out the largest."""
    settings = options("policies", repeats=10)
    os.environ.update(dict.fromkeys(ONE_THREAD, "1"))  # read by the processes that decide
    report = Report(settings)
    sizes = ((160, 64, 0.05), (400, 400, 1.0)) if settings.is_quick else SIZES
    report.raw["sizes"] = [measure(report, size, settings.repeats) for size in sizes]
    report.notes += [
        "worlds: policies.sample_fleets.search_world, one seed a repeat; every trial may move and has whole devices",
        "the first objective of each seed finds caches cold; memory is that of a process that decided for all of them",
        f"sizes above {MANY} trials: a quarter of the repeats",
    ]
    report.write()


if __name__ == "__main__":
    main()
