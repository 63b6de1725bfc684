"""What it costs and gains that trials which reach a rung of ASHA together are judged together: simulated searches.

The reports, their order and how long they wait are those of `orchestrator.control.rungs`; ASHA judges as Ray Tune's
does. Trials have a loss curve each, drawn by seed, a quarter of them diverging or none, and take a little longer or
less than each other for every report. They share a GPU that makes 1.45 times as much with four of them as with one, as
an H200 does with 7 M language models, so that one that waits leaves its part to the others; or each has its own. Every
search is done twice, with `rung_patience` and without, on the same curves. Also with the curves of the searches in
`gpu_search_nvidia-h200_2026-11-29_rungs.jsonl`, which then differ only in who comes first.
`python -m tests.bench.bench_rungs`
"""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import numpy as np

from orchestrator.control.orders import Report as TrialReport
from orchestrator.control.orders import StopMode
from orchestrator.control.ranking import Ranking
from orchestrator.control.rungs import Rungs
from orchestrator.control.spec import StopRule
from orchestrator.control.world import Trial, TrialState
from orchestrator.policies.learn.survival import rungs
from orchestrator.policies.plan import TrialId
from orchestrator.policies.simulator.search import stops
from tests.bench.results_file import RESULTS, Figure, Report, bootstrap_interval, options

RECORDED = RESULTS / "gpu_search_nvidia-h200_2026-11-29_rungs.jsonl"
WORTH = (0.0, 1.0, 1.29, 1.4, 1.45)
"""What so many trials on one GPU make together, of what one makes alone; more of them make no more."""
JITTER = 0.06
"""Spread of the time that a report takes, as a part of it: first reports of a search came within 6 to 14 %."""
LOOK_S = 0.005
NOISE = 0.01
"""Spread of a trial's loss from report to report."""

Curves = Any


@dataclass(frozen=True, slots=True)
class Setting:
    """A kind of search."""

    num_trials: int
    num_slots: int
    factor: int
    max_reports: int
    is_shared: bool = True
    diverging: float = 0.25


SETTINGS = (
    Setting(12, 4, 2, 4),
    Setting(12, 4, 2, 4, diverging=0.0),
    Setting(12, 4, 2, 4, is_shared=False),
    Setting(12, 8, 2, 4),
    Setting(32, 8, 3, 9),
    Setting(64, 8, 4, 16),
)


@dataclass
class Search:
    """One simulated search; a report takes about 1 s of a GPU of its own."""

    setting: Setting
    curves: Curves
    patience: float
    seed: int
    now_s: float = 0.0
    num_reports: int = 0
    trials: dict[TrialId, Trial] = field(default_factory=dict)
    left_s: dict[TrialId, float] = field(default_factory=dict)
    judged: defaultdict[int, list[float]] = field(default_factory=lambda: defaultdict(list))

    def __post_init__(self) -> None:
        self.draw = np.random.default_rng(self.seed)
        setting = self.setting
        rule = StopRule(name="asha", reduction_factor=setting.factor, rung_patience=self.patience)
        spec: Any = SimpleNamespace(stop_rule=None, metric="loss", mode="min")
        self.ranking, self.waits = Ranking(spec), Rungs(rule, setting.max_reports)
        self.rungs = rungs(1, setting.factor, setting.max_reports)

    def run(self) -> dict[str, float]:
        """Reports, seconds, and how much worse the best of those that ran to their end is than the best there was."""
        while self._begin() or self.left_s or self._waiting():
            self._pass()
            for trial in [self.trials[trial_id] for trial_id, left_s in self.left_s.items() if left_s <= 1e-9]:
                del self.left_s[trial.trial_id]
                self._report(trial)
            self._ask()
        ended = [trial.index for trial in self.trials.values() if len(trial.reports) == self.setting.max_reports]
        worse = min(self.curves[index][-1] for index in ended) - min(curve[-1] for curve in self.curves)
        return {"reports": self.num_reports, "seconds": self.now_s, "worse": float(worse)}

    def _rate(self) -> float:
        num = len(self.left_s)
        return WORTH[min(num, len(WORTH) - 1)] / max(1, num) if self.setting.is_shared else 1.0

    def _due(self, trial: Trial, _now_s: float) -> float | None:
        left_s = self.left_s.get(trial.trial_id)
        return None if left_s is None else left_s / self._rate()

    def _waiting(self) -> list[Trial]:
        return [
            trial for trial in self.trials.values() if trial.state is TrialState.RUNNING and trial.slot_id == "asks"
        ]

    def _begin(self) -> bool:
        """Fill the slots."""
        running = sum(trial.state is TrialState.RUNNING for trial in self.trials.values())
        for index in range(
            len(self.trials), min(self.setting.num_trials, len(self.trials) + self.setting.num_slots - running)
        ):
            trial = Trial(run_id="", trial_id=TrialId(f"t{index:03}"), index=index, params={}, state=TrialState.RUNNING)
            self.trials[trial.trial_id] = trial
            trial.wanted = 0
            self._train(trial)
        return bool(self.left_s)

    def _train(self, trial: Trial) -> None:
        trial.slot_id = "trains"
        trial.report_began_s = self.now_s
        self.left_s[trial.trial_id] = float(np.exp(self.draw.normal(0.0, JITTER)))

    def _pass(self) -> None:
        """On to the next report, or a little where somebody waits."""
        rate = self._rate()
        step_s = min((left_s / rate for left_s in self.left_s.values()), default=LOOK_S)
        step_s = min(step_s, LOOK_S) if self._waiting() else step_s
        self.now_s += step_s
        for trial_id in self.left_s:
            self.left_s[trial_id] -= step_s * rate

    def _report(self, trial: Trial) -> None:
        number = len(trial.reports)
        loss = float(self.curves[trial.index][number])
        trial.reports.append(TrialReport(index=number, step=0, num_samples=0, metrics={"loss": loss}, checkpoint=None))
        self.num_reports += 1
        trial.slot_id = "asks"
        self.waits.reach(self.trials, trial, self.ranking.loss_of(trial.reports[-1]), self.now_s)

    def _ask(self) -> None:
        """Every stand-in asks until nobody is told any more."""
        is_news = True
        while is_news:
            is_news = False
            for number in self.waits.openable(self.trials, self.now_s, self._due):
                self.waits.open(number, self.now_s)
            due = self.waits.due(self.trials, self.now_s)
            if due is not None:
                self.waits.tell(due.trial_id, due.index, self.now_s)
            for trial in self._waiting():
                if self.waits.is_free(trial.trial_id, len(trial.reports) - 1):
                    is_news = True
                    self._judge(trial)

    def _judge(self, trial: Trial) -> None:
        number = len(trial.reports)
        loss = trial.reports[-1].metrics["loss"]
        is_worse = False
        if number in self.rungs:
            recorded = self.judged[number]
            is_worse = stops(recorded, loss, self.setting.factor)
            recorded.append(loss)
        if number == self.setting.max_reports or is_worse:
            trial.state, trial.stop = TrialState.STOPPED, StopMode.DISCARD
            trial.wanted = float("inf")
        else:
            trial.wanted = number
            self._train(trial)


def drawn(setting: Setting, seed: int) -> Curves:
    """A loss per report of each trial: of learning rates over one and a half decades, with the best among them."""
    draw = np.random.default_rng(10_000 + seed)
    rates = draw.uniform(-4.0, -2.5, setting.num_trials)
    base = 0.8 + 0.35 * (rates + 3.3) ** 2 + np.where(draw.random(setting.num_trials) < setting.diverging, 1.2, 0.0)
    numbers = np.arange(setting.max_reports)
    return base[:, None] + 0.2 / (numbers + 1) + draw.normal(0.0, NOISE, (setting.num_trials, setting.max_reports))


def recorded() -> Curves:
    """The medians of each trial's losses over all runs; where a report was never made, the one before it."""
    found: defaultdict[tuple[int, int], list[float]] = defaultdict(list)
    for line in RECORDED.read_text().splitlines():
        row = json.loads(line)
        if row["arm"].startswith("ours") and row["size"] == "7M":
            for entry in row["judged"]:
                if entry[1] == "result":
                    found[int(entry[2][-2:]), entry[3]].append(entry[4])
    curves = np.full((12, 4), np.nan)
    for (index, number), losses in found.items():
        curves[index, number] = statistics.median(losses)
    for number in range(1, 4):
        missing = np.isnan(curves[:, number])
        curves[missing, number] = curves[missing, number - 1]
    return curves


def mean_figure(name: str, values: list[float], unit: str) -> Figure:
    """The mean over seeds with its interval."""
    low, high = bootstrap_interval(values, statistics.fmean)
    return Figure(
        name=name,
        value=statistics.fmean(values),
        statistic="mean over seeds",
        unit=unit,
        low=low,
        high=high,
        spread="95 % bootstrap",
        values=[round(value, 5) for value in values],
    )


def compare(report: Report, name: str, setting: Setting, curves: Any) -> None:
    """Every search with and without patience."""
    rows = []
    for seed in range(report.options.repeats):
        of_seed = curves(seed)
        rows.append({str(patience): Search(setting, of_seed, patience, seed).run() for patience in (0.0, 0.25)})
    for key, unit in (("reports", "reports"), ("seconds", "s"), ("worse", "nats")):
        for patience, words in (("0.0", "as they come"), ("0.25", "together")):
            report.add(mean_figure(f"{name}: {key}, {words}", [row[patience][key] for row in rows], unit))
    for key in ("reports", "seconds"):
        ratios = [row["0.25"][key] / row["0.0"][key] for row in rows]
        report.add(mean_figure(f"  {key}, together / as they come", ratios, "x"))


def main() -> None:
    """Measure all settings."""
    report = Report(options("rungs", repeats=200, quick_repeats=5))
    for setting in SETTINGS:
        where = "a GPU" if setting.is_shared else "GPUs of their own"
        name = (
            f"{setting.num_trials} trials, {setting.num_slots} at a time on {where}, one in {setting.factor},"
            f" {setting.diverging:.0%} diverge"
        )
        compare(report, name, setting, lambda seed, setting=setting: drawn(setting, seed))
    curves = recorded()
    for num_slots in (4, 8):
        setting = replace(SETTINGS[0], num_slots=num_slots)
        compare(report, f"the recorded 12, {num_slots} at a time", setting, lambda _seed: curves)
    report.write()


if __name__ == "__main__":
    main()
