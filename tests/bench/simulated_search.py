"""A simulated 64-trial ASHA search on one device: the `search` objective against static fractions, and what bounds it.

Nothing is measured here: everything follows from the sharing measured on one H200 (`policies/simulator/measured`) and
loss curves drawn by seed. Run by `python -m tests.bench.bench_simulator search`.
"""

from __future__ import annotations

import dataclasses
import statistics
from pathlib import Path
from typing import Any

from orchestrator.policies import Allocation, Plan, build_policy, effect_of, simulator
from orchestrator.policies.plan import Generation
from orchestrator.policies.simulator import Application, NoiseCurve, Parametric, Rules, Summary, parse_cluster, simulate
from orchestrator.policies.simulator.search import AshaSearch, SearchSpec
from orchestrator.policies.simulator.tables import read_sharing
from tests.bench.results_file import Report, ratio_figure, say

MEASURED = Path(simulator.__file__).parent / "measured"
OURS = "goodput_joint"
PARTS_OF_A_DEVICE = (2, 4, 8)
PARAMS = {"objective": "search", "cooldown_s": 10.0}
NUM_TRIALS = 64
RUNG_REPORTS = 160
"""Reports of 64 trials if exactly one in four went on from each rung: 64 + 16 * 3 + 4 * 12."""


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
        application="gpt-34m",
        num_trials=NUM_TRIALS,
        max_concurrent=max_concurrent,
        seed=seed,
        batch_size=16,
        pause_s=1.0,
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


def best_speed() -> float:
    """The most that any number of trials at equal shares make of a device, over what one makes of it alone."""
    response = search_application().response
    assert isinstance(response, Parametric)
    return max(n * response.sharing.speed(1 / n, 1 - 1 / n) for n in range(1, max(PARTS_OF_A_DEVICE) + 1))


def floor_s(reports: int) -> float:
    """Seconds below which no search with so many reports can end: each of them at the best sharing of the device."""
    application = search_application()
    assert isinstance(application.response, Parametric)
    alone_s = application.num_samples / application.base_batch * application.response.alpha_c
    return reports / SearchSpec(application="").max_reports * alone_s / best_speed()


def _row(summary: Summary, found: AshaSearch) -> dict[str, Any]:
    """What came of a search; `reports` is the work that was done."""
    reports = sum(found.stopped_at.values()) + found.spec.max_reports * len(found.done)
    return {
        "wall_s": summary.makespan_s,
        "best": found.best,
        "done": len(found.done),
        "reports": reports,
        "floor_s": floor_s(reports),
    }


def searches(report: Report) -> None:
    """Wall time of the search objective against static fractions, whether both choose the same trial, and floors."""
    rows: list[dict[str, Any]] = []
    for seed in range(report.options.repeats):
        row: dict[str, Any] = {"seed": seed}
        for parts in PARTS_OF_A_DEVICE:
            row[f"static 1/{parts}"] = _row(*search(seed, StaticFraction(1 / parts), parts, 1 / parts))
        row["ours"] = _row(*search(seed, build_policy(OURS, PARAMS), max(PARTS_OF_A_DEVICE), None))
        rows.append(row)
        say(
            f"  search seed {seed}: "
            + ", ".join(f"{k} {v['wall_s']:.0f} s {v['best']}" for k, v in row.items() if k != "seed")
        )
    for parts in PARTS_OF_A_DEVICE:
        target = "<= 0.6" if parts == max(PARTS_OF_A_DEVICE) else None
        _add_ratio(report, f"64-trial ASHA, objective search / static 1/{parts}", rows, f"static 1/{parts}", target)
    same = [float(row["ours"]["best"] == row["static 1/8"]["best"]) for row in rows]
    report.add(ratio_figure("same final choice as static 1/8", statistics.mean(same), same, "1", (1.0, 1.0)))
    _add_floors(report, rows)
    report.raw["searches"] = rows
    report.notes += [
        "simulated: 64 trials of the 34 M model on one H200, at most 8 at a time",
        "rungs at 1 and 4 of 16 reports, one in four goes on",
        "sharing as measured on one H200; one second for each report and start; loss curves drawn by seed",
        "static 1/8: every trial keeps an eighth of the device, whatever the others do",
        f"floors: all reports at the best sharing of the device, {best_speed():.2f} times one trial alone",
    ]


def _add_ratio(report: Report, name: str, rows: list[dict[str, Any]], rival: str, target: str | None) -> None:
    ratios = [row["ours"]["wall_s"] / row[rival]["wall_s"] for row in rows]
    report.add(ratio_figure(name, statistics.mean(ratios), ratios, target, (0.0, 0.6)))


def _add_floors(report: Report, rows: list[dict[str, Any]]) -> None:
    """How far any policy could get: with the same trials stopped, with those that ours stops, and as a rule halves."""
    rivals = [row["static 1/8"] for row in rows]
    floors = {
        "floor with the reports of static 1/8": [rival["floor_s"] for rival in rivals],
        "floor with the reports of objective search": [row["ours"]["floor_s"] for row in rows],
        f"floor if one in four went on from each rung, {RUNG_REPORTS} reports": [floor_s(RUNG_REPORTS)] * len(rows),
    }
    for name, seconds in floors.items():
        ratios = [mine / rival["wall_s"] for mine, rival in zip(seconds, rivals, strict=True)]
        report.add(ratio_figure(f"{name} / static 1/8", statistics.mean(ratios), ratios, None, (0.0, 0.0)))
