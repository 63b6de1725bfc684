"""When the search is told of a report: trials that reach a rung together are judged together. No Ray, no clock.

Successive halving as Ray Tune runs it judges a trial by those that reached its rung before it, and lets the first one
pass whatever it is. Trials that began together reach a rung within seconds of each other, in any order: told as they
come, one that diverged may run to its end because it was first, and the worse those at a rung are, the more pass it. So
a report at a rung waits for the trials that are about to reach it, for a part of the time that the first of them took,
and they are told in an order, each as soon as the one before was judged: the best; those that are not among the best of
`factor` (rounded up); the rest. Of the first that reach a rung, where no two are alike, one in `factor` passes at most
(rounded up), the best one always, and it makes no difference who came first. Where the rung has judged others before,
what they were still counts. Once it has judged enough, nobody waits.

A search that is started anew asks for all reports again and judges as it goes; it is told of them in the order of the
first time, which is in the journal. Asked by `RunState` whenever a stand-in wants a report.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from orchestrator.control.lifecycle import Trial, TrialState
from orchestrator.control.orders import StopMode
from orchestrator.control.ranking import Ranking
from orchestrator.control.spec import StopRule
from orchestrator.policies.learn.survival import rungs
from orchestrator.policies.plan import TrialId

_ENOUGH_WAVES = 2
"""A rung that has judged so many times `factor` trials has something to compare with."""

_JUDGED_WITHIN_S = 2.0
"""Who was told of a report and says nothing for so long holds the others up no more; Ray Tune takes milliseconds."""

_BACK_WITHIN_S = 10.0
"""The same of one that was told before the search was started anew: its stand-in may only be starting."""

_LOOK_AGAIN_S = 0.25
"""Between two looks at who is about to come."""


@dataclass(frozen=True, slots=True)
class Told:
    """A report that the search is told of now.

    Attributes:
        is_judged: whether it is judged by it, for the first time.
        place: how many of those that waited with it were told before.
        held_s: how long it waited.
    """

    is_judged: bool = False
    place: int = 0
    held_s: float = 0.0


@dataclass(slots=True)
class _Rung:
    """Those that wait at a rung, with their loss and since when; how long at most; and who was told last, and when.

    `order` is that in which those are told who need not wait for others any more. `told` are all that were ever told,
    `again` those of them that a search which was started anew has yet to be told of, and `back_s` since when it asks.
    """

    held: dict[TrialId, tuple[float, float]] = field(default_factory=dict)
    stretch_s: float = 0.0
    until_s: float = 0.0
    look_s: float = 0.0
    order: list[TrialId] = field(default_factory=list)
    place: int = 0
    told: list[TrialId] = field(default_factory=list)
    again: list[TrialId] = field(default_factory=list)
    back_s: dict[TrialId, float] = field(default_factory=dict)
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
        self._wanted: dict[TrialId, float] = {}

    # What happens.

    def began(self, trial_id: TrialId, now_s: float) -> None:
        """A trial begins to train towards its next report."""
        self._began_s[trial_id] = now_s

    def reached(self, trial: Trial, now_s: float) -> None:
        """A trial has made its newest report."""
        rung = self._rungs.get(len(trial.reports))
        loss = self._ranking.loss_of(trial.reports[-1])
        if rung is None or loss is None:
            return
        for gone in [trial_id for trial_id in rung.held if self._is_leaving(trial_id)]:
            self._drop(gone, rung)  # its stand-in may never ask
        if not rung.held:
            rung.stretch_s = now_s - self._began_s.get(trial.trial_id, now_s)
            has_few = len(rung.told) < _ENOUGH_WAVES * self._factor
            rung.until_s = now_s + (self._part * rung.stretch_s if has_few else 0.0)
            rung.order, rung.place = [], 0
        rung.held[trial.trial_id] = (loss, now_s)
        rung.look_s = now_s

    def wants(self, trial_id: TrialId, index: int) -> None:
        """The search asks for report `index` of a trial: it has judged those before it."""
        self._wanted[trial_id] = index

    def released(self, trial_id: TrialId) -> None:
        """The search has no further use for a trial."""
        self._wanted[trial_id] = math.inf

    def recovered(self, trial_id: TrialId, index: int) -> None:
        """The journal says that the search was told of a report."""
        rung = self._rungs.get(index + 1)
        if rung is not None and trial_id not in rung.told:
            rung.told.append(trial_id)

    def begin_again(self) -> None:
        """The search is started anew, and asks for all reports again."""
        for number, rung in self._rungs.items():
            reached = [trial_id for trial_id, trial in self._trials.items() if len(trial.reports) >= number]
            rung.again = [*rung.told, *(trial_id for trial_id in reached if trial_id not in rung.told)]

    # What follows.

    def tell(self, trial: Trial, index: int, now_s: float) -> Told | None:
        """Report `index` of a trial is asked for; None while it has to wait."""
        rung, trial_id = self._rungs.get(index + 1), trial.trial_id
        if rung is None:
            return Told()
        if trial_id in rung.again:
            rung.back_s.setdefault(trial_id, now_s)
            if not self._is_turn_again(trial_id, index + 1, rung, now_s):
                return None
            # Those before it that never came back: not each of the others shall wait for them anew.
            before = rung.again[: rung.again.index(trial_id)]
            gone = {each for each in before if each not in rung.back_s}
            rung.again = [each for each in rung.again if each != trial_id and each not in gone]
            return self._note(trial_id, rung, now_s, Told(is_judged=trial_id not in rung.told))
        if trial_id not in rung.held:
            return Told()
        self._open(index + 1, rung, now_s)
        if not self._is_turn(trial_id, index + 1, rung, now_s):
            return None
        _, since_s = rung.held[trial_id]
        self._drop(trial_id, rung)
        rung.place += 1
        return self._note(trial_id, rung, now_s, Told(is_judged=True, place=rung.place - 1, held_s=now_s - since_s))

    def is_waiting(self, trial_id: TrialId) -> bool:
        """Whether a report of the trial waits for those of others."""
        return any(trial_id in rung.held for rung in self._rungs.values()) and not self._is_leaving(trial_id)

    def ready(self, now_s: float) -> set[TrialId]:
        """Those that wait and need not any more."""
        found = set()
        for number, rung in self._rungs.items():
            self._open(number, rung, now_s)
            found |= {trial_id for trial_id in rung.held if self._is_turn(trial_id, number, rung, now_s)}
            back = [trial_id for trial_id in rung.again if trial_id in rung.back_s]
            found |= {trial_id for trial_id in back if self._is_turn_again(trial_id, number, rung, now_s)}
        return found

    def _open(self, number: int, rung: _Rung, now_s: float) -> None:
        """Fix the order of those that wait, once nobody is waited for any more."""
        if rung.order or not rung.held:
            return
        if now_s < rung.until_s:
            if now_s < rung.look_s:
                return
            if any(self._is_coming(trial, number, rung, now_s) for trial in self._trials.values()):
                rung.look_s = now_s + _LOOK_AGAIN_S
                return
        best_first = sorted(rung.held, key=lambda trial_id: (rung.held[trial_id][0], trial_id))
        num_passing = -(-len(best_first) // self._factor)
        rung.order = best_first[:1] + best_first[num_passing:] + best_first[1:num_passing]
        rung.since_s = max(rung.since_s, now_s)

    def _note(self, trial_id: TrialId, rung: _Rung, now_s: float, told: Told) -> Told:
        rung.asked, rung.since_s = trial_id, now_s
        if told.is_judged:
            rung.told.append(trial_id)
        return told

    def _drop(self, trial_id: TrialId, rung: _Rung) -> None:
        del rung.held[trial_id]
        if trial_id in rung.order:
            rung.order.remove(trial_id)

    def _is_turn(self, trial_id: TrialId, number: int, rung: _Rung, now_s: float) -> bool:
        if self._is_leaving(trial_id):
            return True
        if not rung.order:
            return False
        if now_s >= rung.since_s + _JUDGED_WITHIN_S:
            return True  # the search is busy with something else: better in any order than not at all
        if rung.asked is not None and not self._is_judged(rung.asked, number):
            return False
        return trial_id == next((each for each in rung.order if not self._is_leaving(each)), None)

    def _is_turn_again(self, trial_id: TrialId, number: int, rung: _Rung, now_s: float) -> bool:
        if now_s >= max(rung.back_s[trial_id], rung.since_s) + _BACK_WITHIN_S:
            return True
        is_judged = rung.asked is None or self._is_judged(rung.asked, number)
        return trial_id == rung.again[0] and is_judged

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
        if self._wanted.get(trial_id, -1) >= number:
            return True
        return self._is_leaving(trial_id) and not self._trials[trial_id].state.is_final

    def _is_leaving(self, trial_id: TrialId) -> bool:
        trial = self._trials[trial_id]
        return trial.stop is not StopMode.NONE or trial.state.is_final or trial.state is TrialState.PAUSED
