"""Policies against each other in simulation, the ablation of dials, a search, and the speed of the simulator itself.

`python -m tests.bench.bench_simulator PART ...` with PART one of `rivals` (mean JCT on a Philly-like workload),
`lengths` (the same where no policy is told how long a job is), `ablation` (fractions and precision), `search` (ASHA),
`speed` (160 jobs) and `large` (10,000 jobs); each has its own results file. Nothing is measured here but the last two:
the rest follows from what the simulator takes as true, and every figure says so. The long parts keep every simulation
in `build/bench/simulations`, under a name made of the policies package as it is, stop after `MAX_S` and go on from
there when they are run again.

Multi-GPU speeds are the parametric models of `policies.simulator.published` (rounded fits of tables published with
Pollux, four T4 GPUs a node); shares and tiers are ratios measured by this project on one H200 (the CSVs in
`policies/simulator/measured`). One core; `--repeats` is the number of seeds.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from orchestrator import policies
from orchestrator.policies import build_policy
from orchestrator.policies.simulator import (
    POLLUX_APPLICATIONS,
    Applications,
    Parametric,
    Rules,
    Workload,
    parse_cluster,
    philly_like,
    simulate,
)
from orchestrator.policies.simulator.tables import read_sharing, read_tiers
from orchestrator.policies.tier import Tier
from tests.bench.results_file import ROOT, Options, Report, chosen_part, median_figure, options, ratio_figure, say
from tests.bench.simulated_search import MEASURED, searches

OURS = "goodput_joint"
RIVALS = ("pollux", "tiresias", "optimus")
PUBLISHED = {"tiresias": 0.68, "optimus": 0.48}
"""Mean JCT of Pollux over theirs, as published with its simulator (8 workloads, 160 jobs, 64 GPUs)."""
TARGETS = {"pollux": 0.95, "tiresias": 0.65, "optimus": 0.5}
LIKE = {
    "ncf": "gpt-7m",
    "cifar10": "gpt-34m",
    "deepspeech2": "gpt-168m",
    "bert": "gpt-168m",
    "yolov3": "gpt-168m",
    "imagenet": "gpt-168m",
}
"""Which measured model each application is taken to share a device and to gain by tiers like: by size."""
MIN_SHARE = 1 / 8
SHORT_S = 120.0
LONGEST_WAIT_S = 300.0
MAX_S = 480.0
LARGE_MAX_S = 840.0
KEPT = ROOT / "build" / "bench" / "simulations"
ASSUMED = (
    "simulated: multi-GPU speeds are rounded fits of tables published with Pollux (T4, 4 a node), not ours",
    "160 jobs over 8 h on 16 nodes of 4, decided every 60 s, a restart takes 30 s",
    "wall_s is no speed: the machine was shared",
)
SHARED = (
    f"shares and tiers: ratios measured on one H200, eager; applications are taken to be like {LIKE}",
    "precision compares tf32 with bf16 compute of a step; synchronisation and convergence are unchanged by a tier",
    "shares were measured with the rest of the card busy, so crowding is part of them",
)
_BEGAN_S = time.monotonic()


class OutOfTimeError(Exception):
    """The part has used its time; what it simulated is kept."""


def version() -> str:
    """A name of the policies package as it is: no simulation of another one is taken for one of this."""
    package = Path(policies.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(path.relative_to(package).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def kept(key: str, simulation: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The figures of a simulation: those of an earlier run where there are any.

    Raises:
        OutOfTimeError: it is not there, and the time is over.
    """
    path = KEPT / version() / f"{key}.json"
    if path.is_file():
        found: dict[str, Any] = json.loads(path.read_text())
        return found
    if time.monotonic() - _BEGAN_S > MAX_S:
        raise OutOfTimeError
    found = simulation()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, default=float))
    return found


def run(
    name: str,
    workload: Workload,
    seed: int,
    applications: Applications = POLLUX_APPLICATIONS,
    *,
    knows_lengths: bool = True,
) -> dict[str, Any]:
    """One simulation of 64 devices; its figures, the longest wait of a short job, and how long it took."""
    began_s = time.perf_counter()
    rules = Rules(seed=seed, keeps_timeline=False, knows_lengths=knows_lengths)
    summary = simulate(
        build_policy(name), workload, parse_cluster("16x4"), name=name, applications=applications, rules=rules
    )
    seconds = time.perf_counter() - began_s
    say(
        f"  {name:<14} seed {seed}: mean JCT {summary.jct_mean_s:7.0f} s, "
        f"makespan {summary.makespan_s:7.0f} s, in {seconds:.1f} s"
    )
    short = {each for each, application in applications.items() if application.alone_s(1, 4) < SHORT_S}
    longest_s = max((job.waited_s for job in summary.jobs if job.application in short), default=None)
    return {**summary.figures(), "longest_wait_of_short_s": longest_s, "wall_s": seconds}


# Completion times.


def rivals(report: Report) -> None:
    """Every policy on every workload; precision and fractions off."""
    found = plain((OURS, *RIVALS), report.options)
    for rival, published in PUBLISHED.items():
        low, high = published - 0.1, published + 0.1
        target = f"{published} +- 0.1 (published)"
        add_ratio(report, "pollux", rival, found, target=target, allowed=(low, high))
    for rival in RIVALS:
        target, most = f"<= {TARGETS[rival]}", TARGETS[rival]
        add_ratio(report, OURS, rival, found, target=target, allowed=(0.0, most))
    report.raw["completion_times"] = found
    report.notes += ASSUMED
    report.notes.append(
        "published means over 8 workloads of that simulator: Pollux 2751 s, Tiresias 4038 s, Optimus 5682 s"
    )


def lengths(report: Report) -> None:
    """Where no length is known: against Pollux, which never asks for one, and how long short jobs wait."""
    settings = report.options
    num_jobs, name = 20 if settings.is_quick else 160, f"{OURS} without lengths"
    found = plain(("pollux",), settings)
    found[name] = []
    for seed in range(settings.repeats):
        workload = philly_like(POLLUX_APPLICATIONS, seed=seed, num_jobs=num_jobs)
        simulation = partial(run, OURS, workload, seed, knows_lengths=False)
        found[name].append(kept(f"{OURS}-unknown-{num_jobs}-{seed}", simulation))
    add_ratio(report, name, "pollux", found, target="<= 0.95", allowed=(0.0, 0.95))
    report.add(
        median_figure(
            f"longest wait of a job shorter than {SHORT_S:.0f} s, {name}",
            [row["longest_wait_of_short_s"] for row in found[name]],
            "s",
            target=f"<= {LONGEST_WAIT_S:.0f} s in every workload",
            is_met=lambda _value, _low, high: high <= LONGEST_WAIT_S,
        )
    )
    report.raw["completion_times"] = found
    report.notes += ASSUMED
    report.notes.append("a job is short by its time alone on one device; waiting is time without any device")


def plain(names: Sequence[str], settings: Options) -> dict[str, list[dict[str, Any]]]:
    """The figures of each policy for each seed; where the time is over, for the first seeds only.

    Raises:
        OutOfTimeError: a policy has none.
    """
    num_jobs = 20 if settings.is_quick else 160
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for name in names:
        for seed in range(settings.repeats):
            workload = philly_like(POLLUX_APPLICATIONS, seed=seed, num_jobs=num_jobs)
            try:
                found[name].append(kept(f"{name}-{num_jobs}-{seed}", partial(run, name, workload, seed)))
            except OutOfTimeError:
                say(f"  {name}: {len(found[name])} of {settings.repeats} seeds before the time was over")
                if not found[name]:
                    raise
                break
    return found


def add_ratio(
    report: Report,
    ours: str,
    theirs: str,
    found: dict[str, list[dict[str, Any]]],
    *,
    target: str | None,
    allowed: tuple[float, float],
) -> None:
    """Mean completion time of one policy over that of another, over the seeds of both."""
    both = [
        (mine["jct_mean_s"], other["jct_mean_s"])
        for mine, other in zip(found.get(ours, []), found.get(theirs, []), strict=False)
        if mine.get("jct_mean_s") and other.get("jct_mean_s")
    ]
    if not both:
        return
    value = sum(mine for mine, _ in both) / sum(other for _, other in both)
    report.add(ratio_figure(f"mean JCT, {ours} / {theirs}", value, [m / o for m, o in both], target, allowed))


# Ablation.


def variant(*, has_fractions: bool, has_precision: bool) -> Applications:
    """The applications with shares and tiers as measured on an H200 for the model that each is like."""
    sharing = read_sharing((MEASURED / "h200_sharing.csv").read_text().splitlines(), "h200_sharing.csv")
    speeds = read_tiers((MEASURED / "h200_tiers.csv").read_text().splitlines(), "h200_tiers.csv")
    found = {}
    for name, application in POLLUX_APPLICATIONS.items():
        response = application.response
        assert isinstance(response, Parametric)
        changes: dict[str, Any] = {}
        if has_fractions:
            response = dataclasses.replace(response, sharing=sharing[LIKE[name]])
            changes["min_share"] = MIN_SHARE
        if has_precision:
            mine = speeds[LIKE[name]]
            response = dataclasses.replace(response, tiers={Tier.BF16: mine[Tier.BF16] / mine[Tier.TF32]})
            changes["tiers"] = (Tier.TF32, Tier.BF16)
        found[name] = dataclasses.replace(application, response=response, **changes)
    return found


def ablation(report: Report) -> None:
    """The joint decision with fractions, with precision and with both, against itself without."""
    settings = report.options
    num_jobs = 20 if settings.is_quick else 160
    found = plain((OURS,), settings)
    kinds = {"fractions": (True, False), "precision": (False, True), "both": (True, True)}
    for kind, (has_fractions, has_precision) in kinds.items():
        applications, name = variant(has_fractions=has_fractions, has_precision=has_precision), f"{OURS} with {kind}"
        found[name] = []
        for seed in range(settings.repeats):
            workload = philly_like(POLLUX_APPLICATIONS, seed=seed, num_jobs=num_jobs)
            simulation = partial(run, OURS, workload, seed, applications)
            found[name].append(kept(f"{OURS}-{kind}-{num_jobs}-{seed}", simulation))
        add_ratio(report, name, OURS, found, target=None, allowed=(0.0, 0.0))
    report.raw["completion_times"] = found
    report.notes += (*ASSUMED, *SHARED)


# The simulator's own speed.


def speed(report: Report) -> None:
    """Seconds for 160 jobs over 8 hours of arrivals, until the last one has ended."""
    num_jobs = 20 if report.options.is_quick else 160
    walls = []
    for seed in range(report.options.repeats):
        walls.append(run(OURS, philly_like(POLLUX_APPLICATIONS, seed=seed, num_jobs=num_jobs), seed)["wall_s"])
    name = f"simulating {num_jobs} jobs, 8 h of arrivals at 60 s, {OURS}"
    report.add(median_figure(name, walls, "s", target="<= 30 s", is_met=lambda value, _low, _high: value <= 30))
    report.notes.append("16 nodes of 4, until the last job ended; one core, one seed a repeat")


def large(report: Report) -> None:
    """As much of a day of 10,000 jobs on 10,000 GPUs as `LARGE_MAX_S` allow, hour by hour from its beginning."""
    num, nodes, hours = (200, 50, (0.5, 1.0)) if report.options.is_quick else (10_000, 2500, (1.0, 2.0, 4.0, 8.0, 24.0))
    workload = philly_like(POLLUX_APPLICATIONS, seed=0, num_jobs=num, hours=24.0)
    rows: list[dict[str, Any]] = []
    for until_h in hours:
        began_s = time.perf_counter()
        rules = Rules(interval_s=300.0, horizon_s=until_h * 3600, keeps_timeline=False)
        summary = simulate(build_policy(OURS), workload, parse_cluster(f"{nodes}x4"), name=OURS, rules=rules)
        seconds = time.perf_counter() - began_s
        rows.append({"hours": until_h, "wall_s": seconds, **summary.figures()})
        say(f"  {num} jobs on {4 * nodes} GPUs: {until_h:g} h simulated in {seconds:.0f} s")
        report.add(
            median_figure(f"simulating the first {until_h:g} h of a day, {num} jobs, {4 * nodes} GPUs", [seconds], "s")
        )
        # Hours cost more as jobs pile up: the next horizon is begun only if it fits even at four times this pace.
        longer = [each for each in hours if each > until_h]
        if not longer or 4 * seconds * longer[0] / until_h > LARGE_MAX_S - (time.monotonic() - _BEGAN_S):
            break
    report.raw["horizons"] = rows
    report.notes.append(
        "a day of Philly-like arrivals, decided every 300 s; each horizon is simulated from the beginning"
    )


PARTS: dict[str, tuple[Callable[[Report], None], int]] = {
    "rivals": (rivals, 8),
    "lengths": (lengths, 8),
    "ablation": (ablation, 8),
    "search": (searches, 8),
    "speed": (speed, 3),
    "large": (large, 1),
}


def main() -> None:
    """Run the part that the command line names."""
    part = chosen_part(PARTS)
    measure, repeats = PARTS[part]
    report = Report(options(f"simulator_{part}", repeats=repeats))
    try:
        measure(report)
    except OutOfTimeError:
        sys.exit(f"{MAX_S:.0f} s are over: run it again, and it goes on from here")
    report.write()


if __name__ == "__main__":
    main()
