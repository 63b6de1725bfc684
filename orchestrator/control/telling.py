"""When the search is told of a report: trials that reach a rung together are judged together. No Ray, no clock.

Successive halving as Ray Tune runs it judges a trial by those that reached its rung before it, and lets the first one
pass whatever it is. Trials that began together reach a rung within seconds of each other, in any order: told as they
come, one that diverged may run to its end because it was first, and the worse those at a rung are, the more pass it. So
a report at a rung waits for the trials that are about to reach it, for a part of the time that it took itself, and they
are told in an order in which the rule keeps its word, each as soon as the one before was judged: the best; those that
are not among the best of `factor` (rounded up), which it stops; the rest, which it then lets pass. Who passes does not
depend on who came first, and never is it more of them than the rule says. Once a rung has judged enough, nobody waits.

Asked by `RunState` whenever a stand-in wants a report. What waits is not in the journal: after a restart it is told.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from orchestrator.control.lifecycle import Trial, TrialState
from orchestrator.control.orders import StopMode
from orchestrator.control.ranking import Ranking
from orchestrator.control.spec import StopRule
from policies.plan import TrialId
from policies.survival import rungs

_ENOUGH_WAVES = 2
"""A rung that has judged so many times `factor` trials has something to compare with."""

_JUDGED_WITHIN_S = 2.0
"""Who was told of a report and says nothing for so long holds the others up no more; Ray Tune takes milliseconds."""


@dataclass(frozen=True, slots=True)
class Told:
    """A report that the search is told of now.

    Attributes:
        place: how many of those that waited with it were told before.
        held_s: how long it waited.
    """

    place: int
    held_s: float


@dataclass(slots=True)
class _Rung:
    """Those that wait at a rung, with their loss and since when; how long at most; and who was told last, and when.

    `order` is that in which those are told who need not wait for others any more.
    """

    held: dict[TrialId, tuple[float, float]] = field(default_factory=dict)
    stretch_s: float = 0.0
    until_s: float = 0.0
    order: list[TrialId] = field(default_factory=list)
    place: int = 0
    num_told: int = 0
    asked: TrialId | None = None
    since_s: float = 0.0


class Telling:
    """The reports of a search that wait to be told.

    Args:
        rule: that of the search; None, or one whose trials are not judged at rungs, lets nobody wait.
        max_reports: of a trial that runs to its end.
        trials: all of the search, as they are at any time.
        ranking: knows the loss of a report.
        left_s: seconds of steps that a running trial has left until its next report, None where that is not known.
    """

    def __init__(
        self,
        rule: StopRule | None,
        max_reports: int,
        trials: Mapping[TrialId, Trial],
        ranking: Ranking,
        left_s: Callable[[Trial], float | None],
    ) -> None:
        self._trials, self._ranking, self._left_s = trials, ranking, left_s
        self._factor, self._part = 1, 0.0
        self._rungs: dict[int, _Rung] = {}
        if rule is not None and rule.name == "asha" and rule.rung_patience > 0:
            self._factor, self._part = rule.reduction_factor, rule.rung_patience
            self._rungs = {rung: _Rung() for rung in rungs(rule.grace_reports, self._factor, max_reports)}
        self._began_s: dict[TrialId, float] = {}

    def began(self, trial_id: TrialId, now_s: float) -> None:
        """A trial begins to train towards its next report."""
        self._began_s[trial_id] = now_s

    def reached(self, trial: Trial, now_s: float) -> None:
        """A trial has made its newest report."""
        rung = self._rungs.get(len(trial.reports))
        loss = self._ranking.loss_of(trial.reports[-1])
        if rung is None or loss is None:
            return
        if not rung.held:
            rung.stretch_s = now_s - self._began_s.get(trial.trial_id, now_s)
            has_few = rung.num_told < _ENOUGH_WAVES * self._factor
            rung.until_s = now_s + (self._part * rung.stretch_s if has_few else 0.0)
            rung.order, rung.place = [], 0
        rung.held[trial.trial_id] = (loss, now_s)

    def tell(self, trial: Trial, index: int, now_s: float) -> Told | None:
        """Report `index` of a trial is asked for; None while it has to wait."""
        rung = self._rungs.get(index + 1)
        if rung is None or trial.trial_id not in rung.held:
            return Told(0, 0.0)
        if not self._is_turn(trial.trial_id, index + 1, rung, now_s):
            return None
        _, since_s = rung.held.pop(trial.trial_id)
        if trial.trial_id in rung.order:
            rung.order.remove(trial.trial_id)
        told = Told(rung.place, now_s - since_s)
        rung.asked, rung.since_s = trial.trial_id, now_s
        rung.place += 1
        rung.num_told += 1
        return told

    def is_waiting(self, trial_id: TrialId) -> bool:
        """Whether a report of the trial waits for those of others."""
        return any(trial_id in rung.held for rung in self._rungs.values())

    def ready(self, now_s: float) -> set[TrialId]:
        """Those that wait and need not any more."""
        return {
            trial_id
            for number, rung in self._rungs.items()
            for trial_id in rung.held
            if self._is_turn(trial_id, number, rung, now_s)
        }

    def _is_turn(self, trial_id: TrialId, number: int, rung: _Rung, now_s: float) -> bool:
        if self._is_leaving(trial_id):
            return True
        if not rung.order:
            if now_s < rung.until_s and any(
                self._is_coming(trial, number, rung, now_s) for trial in self._trials.values()
            ):
                return False
            rung.order = self._order_of(rung)
            rung.since_s = max(rung.since_s, now_s)
        if now_s >= rung.since_s + _JUDGED_WITHIN_S:
            return True  # the search is busy with something else: better in any order than not at all
        if rung.asked is not None and not self._is_judged(rung.asked, number):
            return False
        return trial_id == next((each for each in rung.order if not self._is_leaving(each)), None)

    def _order_of(self, rung: _Rung) -> list[TrialId]:
        """Those that wait, in the order in which they are told."""
        best_first = sorted(rung.held, key=lambda trial_id: (rung.held[trial_id][0], trial_id))
        num_passing = -(-len(best_first) // self._factor)
        return best_first[:1] + best_first[num_passing:] + best_first[1:num_passing]

    def _is_coming(self, trial: Trial, number: int, rung: _Rung, now_s: float) -> bool:
        """Whether a trial reaches the rung in time: by its own pace, or if it is as fast as the one that waits."""
        is_on_its_way = trial.state is TrialState.RUNNING and trial.stop is StopMode.NONE
        if not is_on_its_way or len(trial.reports) != number - 1:
            return False
        left_s = self._left_s(trial)
        if left_s is None:
            began_s = self._began_s.get(trial.trial_id)
            return began_s is not None and began_s + rung.stretch_s <= rung.until_s
        return now_s + left_s <= rung.until_s

    def _is_judged(self, trial_id: TrialId, number: int) -> bool:
        """Whether the search has let the trial go on from the rung, or stopped it."""
        return self._is_leaving(trial_id) or self._trials[trial_id].credit > number

    def _is_leaving(self, trial_id: TrialId) -> bool:
        trial = self._trials[trial_id]
        return trial.stop is not StopMode.NONE or trial.state.is_final or trial.state is TrialState.PAUSED
