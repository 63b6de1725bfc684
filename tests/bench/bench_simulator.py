"""Policies against each other in simulation, the ablation of dials, a search, and the speed of the simulator itself.

Nothing is measured here but the last: the rest follows from what the simulator takes as true, and every figure says so.
Multi-GPU speeds are the parametric models of `policies.simulator.published` (rounded fits of tables published with
Pollux, four T4 GPUs a node); shares and tiers are ratios measured by this project on one H200 (the CSVs in
`policies/simulator/measured`). One core; `--repeats` is the number of seeds.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import policies.simulator
from policies import POLICIES, build_policy
from policies.simulator import (
    POLLUX_APPLICATIONS,
    Application,
    Applications,
    NoiseCurve,
    Parametric,
    PolicyFaultError,
    Rules,
    Summary,
    Workload,
    parse_cluster,
    philly_like,
    simulate,
)
from policies.simulator.search import AshaSearch, SearchSpec
from policies.simulator.tables import read_sharing, read_tiers
from policies.tier import Tier
from tests.bench.results_file import Figure, Options, Report, options, say

OURS = "goodput_joint"
RIVALS = ("pollux", "tiresias", "optimus", "sia", "fluid", "fifo")
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
MEASURED = Path(policies.simulator.__file__).parent / "measured"
MIN_SHARE = 1 / 8
LARGE_BUDGET_S = 600.0


def run(name: str, workload: Workload, seed: int, applications: Applications = POLLUX_APPLICATIONS) -> dict[str, Any]:
    """One simulation of 64 devices; its figures and how long it took."""
    began_s = time.perf_counter()
    rules = Rules(seed=seed, keeps_timeline=False)
    try:
        summary = simulate(
            build_policy(name), workload, parse_cluster("16x4"), name=name, applications=applications, rules=rules
        )
    except PolicyFaultError as error:
        say(f"  {name} seed {seed}: {error}")
        return {"error": str(error)}
    seconds = time.perf_counter() - began_s
    say(
        f"  {name:<14} seed {seed}: mean JCT {summary.jct_mean_s:7.0f} s, "
        f"makespan {summary.makespan_s:7.0f} s, in {seconds:.1f} s"
    )
    return {**summary.figures(), "wall_s": seconds}


# Completion times.


def completion_times(report: Report, seeds: Sequence[int], num_jobs: int) -> dict[str, list[dict[str, Any]]]:
    """Every policy on every workload; precision and fractions off."""
    names = [name for name in (*RIVALS, OURS) if name in POLICIES]
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for seed in seeds:
        workload = philly_like(POLLUX_APPLICATIONS, seed=seed, num_jobs=num_jobs)
        for name in names:
            found[name].append(run(name, workload, seed))
    for rival, published in PUBLISHED.items():
        low, high = published - 0.1, published + 0.1
        target = f"{published} +- 0.1 (published)"
        add_ratio(report, "pollux", rival, found, target=target, allowed=(low, high))
    for rival in RIVALS:
        most = TARGETS.get(rival)
        asked = None if most is None else f"<= {most}"
        add_ratio(report, OURS, rival, found, target=asked, allowed=(0.0, most or float("inf")))
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
    """Mean completion time over all seeds of one policy over that of another."""
    both = [
        (mine["jct_mean_s"], other["jct_mean_s"])
        for mine, other in zip(found.get(ours, []), found.get(theirs, []), strict=False)
        if mine.get("jct_mean_s") and other.get("jct_mean_s")
    ]
    if not both:
        return
    value = sum(mine for mine, _ in both) / sum(other for _, other in both)
    report.add(ratio_figure(f"mean JCT, {ours} / {theirs}", value, [m / o for m, o in both], target, allowed))


def ratio_figure(
    name: str, value: float, values: list[float], target: str | None, allowed: tuple[float, float]
) -> Figure:
    return Figure(
        name=name,
        value=value,
        statistic="ratio of means",
        unit="x",
        low=min(values),
        high=max(values),
        spread="min to max over seeds",
        values=values,
        target=target,
        is_met=None if target is None else allowed[0] <= value <= allowed[1],
    )


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


def ablation(
    report: Report, seeds: Sequence[int], num_jobs: int, plain: dict[str, list[dict[str, Any]]]
) -> dict[str, list[dict[str, Any]]]:
    """The joint decision with fractions, with precision and with both, against itself without."""
    found: dict[str, list[dict[str, Any]]] = {}
    if OURS not in POLICIES:
        return found
    kinds = {"fractions": (True, False), "precision": (False, True), "both": (True, True)}
    for kind, (has_fractions, has_precision) in kinds.items():
        applications = variant(has_fractions=has_fractions, has_precision=has_precision)
        found[kind] = []
        for seed in seeds:
            workload = philly_like(POLLUX_APPLICATIONS, seed=seed, num_jobs=num_jobs)
            found[kind].append(run(OURS, workload, seed, applications))
        names = {f"{OURS} with {kind}": found[kind], OURS: plain[OURS]}
        add_ratio(report, f"{OURS} with {kind}", OURS, names, target=None, allowed=(0.0, 0.0))
    return found


# A search.


def search_application() -> Application:
    """The 34 M model on one H200: 413 k tokens/s alone at 16 x 256, sharing as measured, its batch fixed."""
    sharing = read_sharing((MEASURED / "h200_sharing.csv").read_text().splitlines(), "h200_sharing.csv")["gpt-34m"]
    step_s = 16 * 256 / 413_000
    return Application(
        name="gpt-34m",
        base_batch=16,
        max_batch=16,
        min_micro_batch=16,
        max_micro_batch=16,
        max_workers=1,
        num_samples=16 * 60_000.0,
        noise=NoiseCurve(ends=(1.0,), scales=(256.0,)),
        response=Parametric(alpha_c=step_s, beta_c=0.0, sharing=sharing),
        requests=((1, 16),),
        min_share=1 / 15,
    )


def search(seed: int, policy: Any, max_concurrent: int, share: float | None) -> tuple[Summary, AshaSearch]:
    """One 64-trial ASHA search on one device; with `share`, every trial is held to exactly that."""
    application = search_application()
    if share is not None:
        application = dataclasses.replace(application, min_share=share)
    spec = SearchSpec(
        application="gpt-34m", num_trials=64, max_concurrent=max_concurrent, seed=seed, batch_size=16, pause_s=1.0
    )
    overseer = AshaSearch(spec)
    summary = simulate(
        policy,
        overseer.first_submissions(),
        parse_cluster("1x1"),
        applications={"gpt-34m": application},
        rules=Rules(interval_s=10.0, restart_s=1.0, seed=seed, units=15, decides_on_events=True, keeps_timeline=False),
        overseer=overseer,
    )
    return summary, overseer


class StaticFraction:
    """ASHA on static fractions: every trial gets the same part of the device and keeps it."""

    def __init__(self, share: float) -> None:
        self._share = share

    def decide(self, snapshot: Any) -> Any:
        from policies import Allocation, Plan, effect_of
        from policies.plan import Generation

        device = snapshot.devices[0].device_id
        room = round(1 / self._share)
        running = sorted(t.trial_id for t in snapshot.trials if t.placement)
        waiting = sorted(t.trial_id for t in snapshot.trials if not t.placement)
        chosen = {*running, *waiting[: max(0, room - len(running))]}
        rows = []
        for trial in snapshot.trials:
            has = trial.trial_id in chosen
            settings = dataclasses.replace(trial.start, share=self._share if has else 0.0)
            placement = (device,) if has else ()
            effect = effect_of(snapshot.settings_in_force(trial), settings, moves=placement != trial.placement)
            rows.append(
                Allocation(
                    trial_id=trial.trial_id,
                    settings=settings,
                    placement=placement,
                    effect=effect,
                    reason=f"share {settings.share:.3f}, static",
                )
            )
        generation = Generation(snapshot.plan.generation + 1)
        return Plan(generation=generation, allocations=tuple(rows), reason="static fractions")


def searches(report: Report, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Wall time of the search objective against the best static fractions, and whether both choose the same trial."""
    rows: list[dict[str, Any]] = []
    for seed in seeds:
        row: dict[str, Any] = {"seed": seed}
        for parts in (2, 4, 8):
            summary, found = search(seed, StaticFraction(1 / parts), parts, 1 / parts)
            row[f"static 1/{parts}"] = {"wall_s": summary.makespan_s, "best": found.best, "done": len(found.done)}
        if OURS in POLICIES:
            try:
                policy = build_policy(OURS, {"objective": "search"})
                summary, found = search(seed, policy, 8, None)
                row["ours"] = {"wall_s": summary.makespan_s, "best": found.best, "done": len(found.done)}
            except (PolicyFaultError, ValueError) as error:
                say(f"  search seed {seed}: {error}")
        rows.append(row)
        say(
            f"  search seed {seed}: "
            + ", ".join(f"{k} {v['wall_s']:.0f} s {v['best']}" for k, v in row.items() if k != "seed")
        )
    ours = [row for row in rows if "ours" in row]
    for parts in (2, 4, 8):
        if ours:
            ratios = [row["ours"]["wall_s"] / row[f"static 1/{parts}"]["wall_s"] for row in ours]
            target = "<= 0.6" if parts == 8 else None
            name = f"64-trial ASHA, objective search / static 1/{parts}"
            report.add(ratio_figure(name, statistics.mean(ratios), ratios, target, (0.0, 0.6)))
    if ours:
        same = [float(row["ours"]["best"] == row["static 1/8"]["best"]) for row in ours]
        report.add(ratio_figure("  same final choice as static 1/8", statistics.mean(same), same, None, (0.0, 1.0)))
    return rows


# The simulator's own speed.


def speed(report: Report, settings: Options, plain: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Seconds for 160 jobs, and for as much of the large cluster's day as the budget allows."""
    name = OURS if OURS in POLICIES else "pollux"
    if name not in POLICIES:
        return {}
    walls = [row["wall_s"] for row in plain.get(name, []) if "wall_s" in row]
    if walls:
        value = statistics.median(walls)
        report.add(
            Figure(
                name=f"simulating 160 jobs, 8 h of arrivals at 60 s, {name}",
                value=value,
                statistic="median",
                unit="s",
                low=min(walls),
                high=max(walls),
                spread="min to max over seeds",
                values=walls,
                target="<= 30 s",
                is_met=value <= 30,
            )
        )
    num, nodes, hours = (200, 50, 0.5) if settings.is_quick else (10_000, 2500, 1.0)
    workload = philly_like(POLLUX_APPLICATIONS, seed=0, num_jobs=num, hours=24.0)
    began_s = time.perf_counter()
    rules = Rules(interval_s=300.0, horizon_s=hours * 3600, keeps_timeline=False)
    summary = simulate(build_policy(name), workload, parse_cluster(f"{nodes}x4"), name=name, rules=rules)
    seconds = time.perf_counter() - began_s
    large = {"hours": hours, "wall_s": seconds, **summary.figures()}
    say(f"  {num} jobs on {4 * nodes} GPUs: {hours} h simulated in {seconds:.0f} s")
    return {"policy": name, "large": large}


def main() -> None:
    """Everything, with one results file."""
    settings = options("simulator", repeats=8)
    report = Report(settings)
    seeds = range(settings.repeats)
    num_jobs = 20 if settings.is_quick else 160
    plain = completion_times(report, seeds, num_jobs)
    report.raw["completion_times"] = plain
    report.raw["ablation"] = ablation(report, seeds, num_jobs, plain)
    report.raw["searches"] = searches(report, seeds)
    report.raw["speed"] = speed(report, settings, plain)
    report.notes += [
        "simulated: multi-GPU speeds are rounded fits of tables published with Pollux (T4, 4 a node), not ours",
        f"shares and tiers: ratios measured on one H200, eager; applications are taken to be like {LIKE}",
        "precision compares tf32 with bf16 compute of a step; synchronisation and convergence are unchanged by a tier",
        "shares were measured with the rest of the card busy, so crowding is part of them",
        "search: the 34 M model on one H200, one second for each report and start; loss curves drawn by seed",
    ]
    report.write()


if __name__ == "__main__":
    main()
