"""Where each trial of the search stands among the others, and what that says of its next rung. No Ray.

The search and its scheduler run elsewhere and tell nothing; all that is known here is the rule of the run file and the
reports that trials made, of ended trials too. They are kept sorted by number of reports, so that asking is cheap.

- asha: a trial stands where it stood at its last rung among all that were judged there, or among those that have made
  as many reports as it has, once they are as many as a rung takes to let one go on.
- median: its best result among the means of the others, as the rule compares them; too few others stop nobody.
- hyperband: which bracket a trial is in is not known, so it is compared with all that made as many reports.
- pbt: nobody is stopped; not to survive is to lose its own state to that of a better trial.
"""

from __future__ import annotations

import math
from bisect import insort
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from orchestrator.control.orders import Report
from orchestrator.control.spec import RunSpec, StopRule
from orchestrator.policies.learn.survival import MOST, chance, chance_after_rung, place, rungs
from orchestrator.policies.plan import TrialId

if TYPE_CHECKING:
    from orchestrator.control.world import Trial


@dataclass(frozen=True, slots=True)
class Outlook:
    """What is ahead of a trial in the search; the fields of a `TrialView` of the same names.

    `survival` is None before a trial's first report: the others are judged against it.
    """

    survival: float | None = None
    rung_samples: int | None = None


_NOTHING = Outlook()


class Ranking:
    """The reports of a search, under its rule."""

    def __init__(self, spec: RunSpec) -> None:
        self._spec, self._rule = spec, spec.stop_rule
        self._rungs: tuple[int, ...] = ()
        if self._rule is not None and self._rule.name == "asha":
            self._rungs = rungs(self._rule.grace_reports, self._rule.reduction_factor, spec.max_reports)
        self._values: defaultdict[int, list[float]] = defaultdict(list)
        """By number of reports, ascending: the losses of that report; of the median rule the means up to it."""

    def take(self, trial: Trial) -> None:
        """Note the newest report of a trial."""
        if self._rule is None or self._rule.name == "pbt":
            return
        value = self._mean(trial, self._rule) if self._rule.name == "median" else self.loss_of(trial.reports[-1])
        if value is not None:
            insort(self._values[len(trial.reports)], value)

    def loss_of(self, report: Report) -> float | None:
        """The metric as a loss; infinite where it diverged, None where the report has none."""
        value = report.metrics.get(self._spec.metric)
        if value is None:
            return None
        if not math.isfinite(value):
            return math.inf
        return value if self._spec.mode == "min" else -value

    def outlooks(self, trials: Iterable[Trial], everybody: Iterable[Trial]) -> dict[TrialId, Outlook]:
        """The outlook of some trials; `everybody` are all of the search."""
        if self._rule is None:
            return {trial.trial_id: _NOTHING for trial in trials}
        population: list[float] = []
        if self._rule.name == "pbt":
            alive = (t for t in everybody if t.reports and t.has_stand_in and not t.state.is_final)
            newest = (self.loss_of(t.reports[-1]) for t in alive)
            population = sorted(loss for loss in newest if loss is not None)
        return {trial.trial_id: self._outlook(trial, self._rule, population) for trial in trials}

    def _outlook(self, trial: Trial, rule: StopRule, population: Sequence[float]) -> Outlook:
        num_reports = len(trial.reports)
        rung = self._next_rung(num_reports, rule) if trial.has_stand_in else None
        if rung is None:
            return _NOTHING
        samples = None if rule.name == "hyperband" else rung * self._spec.samples_per_report
        if num_reports == 0:
            return Outlook(None, samples)
        if rule.name == "median":
            return Outlook(self._by_median(trial, rule), samples)
        loss = self.loss_of(trial.reports[-1])
        if loss is None:
            return Outlook(None, samples)
        if rule.name == "pbt":
            return Outlook(_by_quantile(population, loss, rule), samples)
        return Outlook(self._by_halving(trial, loss, rule), samples)

    def _next_rung(self, num_reports: int, rule: StopRule) -> int | None:
        """Number of reports at which the trial is judged next; None where it runs to its end from here."""
        if rule.name == "asha":
            return next((rung for rung in self._rungs if rung > num_reports), None)
        rung = num_reports + 1
        if rule.name == "median":
            rung = max(rung, rule.grace_reports)
        elif rule.name == "pbt":
            rung = (num_reports // rule.grace_reports + 1) * rule.grace_reports
        return rung if rung < self._spec.max_reports else None

    def _by_halving(self, trial: Trial, loss: float, rule: StopRule) -> float | None:
        """Successive halving. Those that reported since the last rung are those that get as far as the next."""
        num_reports, factor = len(trial.reports), rule.reduction_factor
        last = max((rung for rung in self._rungs if rung <= num_reports), default=0)
        judged = self.loss_of(trial.reports[last - 1]) if last else None
        if judged is not None and (last == num_reports or len(self._values[num_reports]) < factor):
            return chance_after_rung(self._values[last], judged, factor)
        return chance(place(self._values[num_reports], loss), 1 / factor)

    def _by_median(self, trial: Trial, rule: StopRule) -> float:
        """A trial stops when the median of the others' means is better than its best result."""
        means, own = self._values[len(trial.reports)], self._mean(trial, rule)
        num_others = len(means) - (own is not None)
        if num_others < max(1, rule.min_trials):
            return MOST
        losses = (self.loss_of(report) for report in trial.reports)
        best = min((loss for loss in losses if loss is not None), default=math.inf)
        num_better = round(place(means, best) * len(means))  # its own mean is never better than its best
        return chance(num_better / num_others, 0.5)

    def _mean(self, trial: Trial, rule: StopRule) -> float | None:
        """Mean of the losses since the trial's grace; None where there is none, or it is not finite."""
        losses = [self.loss_of(report) for report in trial.reports[rule.grace_reports - 1 :]]
        known = [loss for loss in losses if loss is not None]
        return math.fsum(known) / len(known) if known and all(map(math.isfinite, known)) else None


def _by_quantile(population: Sequence[float], loss: float, rule: StopRule) -> float:
    """Population based training: whoever is in the worst quantile takes up the state of one of the best."""
    size = len(population)
    num_worst = min(math.ceil(size * rule.quantile), size // 2)
    middle = place(population, loss) + 0.5 / size if size else 0.0  # no part of a population so small is even
    return chance(middle, 1 - num_worst / size) if num_worst else MOST
