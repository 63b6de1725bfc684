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
first time, which is in the journal. `transition` changes the rungs, the controller asks who is due.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from orchestrator.control.spec import StopRule
from orchestrator.policies.learn.survival import rungs
from orchestrator.policies.plan import TrialId

if TYPE_CHECKING:
    from orchestrator.control.world import Trial

_ENOUGH_WAVES = 2
"""A rung that has judged so many times `factor` trials has something to compare with."""
_JUDGED_WITHIN_S = 2.0
"""Wait this long for the search's verdict on the trial that was told last, then continue; Ray Tune takes milliseconds.
"""
_BACK_WITHIN_S = 10.0
"""The same in a search that was started anew: its stand-ins may only be starting."""

Trials = Mapping[TrialId, "Trial"]


@dataclass(frozen=True, slots=True)
class Due:
    """A report that the search is to be told of now.

    Attributes:
        trial_id: whose it is.
        index: its number.
        is_judged: whether the trial is judged by it for the first time.
        place: how many of those that waited with it were told before.
        held_s: how long it waited.
    """

    trial_id: TrialId
    index: int
    is_judged: bool = True
    place: int = 0
    held_s: float = 0.0


@dataclass(slots=True)
class Rung:
    """One rung.

    Attributes:
        held: trials that wait, each with its loss and since when.
        stretch_s: how long the first of them took from the rung before.
        until_s: when they wait no more for others.
        order: that in which they are told, once nobody is waited for.
        place: how many of them were told.
        told: all that were ever told.
        again: those of `told` that a search which was started anew has yet to be told of.
        back_s: since when each of these asks.
        asked: who was told last.
        since_s: when that was.
    """

    held: dict[TrialId, tuple[float, float]] = field(default_factory=dict)
    stretch_s: float = 0.0
    until_s: float = 0.0
    order: list[TrialId] = field(default_factory=list)
    place: int = 0
    told: list[TrialId] = field(default_factory=list)
    again: list[TrialId] = field(default_factory=list)
    back_s: dict[TrialId, float] = field(default_factory=dict)
    asked: TrialId | None = None
    since_s: float = 0.0

    def drop(self, trial_id: TrialId) -> None:
        """A trial waits no more."""
        self.held.pop(trial_id, None)
        if trial_id in self.order:
            self.order.remove(trial_id)


class Rungs:
    """The rungs of a search, by the number of reports at which a trial is judged.

    Args:
        rule: that of the search; None, or one whose trials are not judged at rungs, lets nobody wait.
        max_reports: of a trial that runs to its end.
    """

    def __init__(self, rule: StopRule | None, max_reports: int) -> None:
        self._factor, self._part = 1, 0.0
        self.rungs: dict[int, Rung] = {}
        if rule is not None and rule.name == "asha" and rule.rung_patience > 0:
            self._factor, self._part = rule.reduction_factor, rule.rung_patience
            self.rungs = {rung: Rung() for rung in rungs(rule.grace_reports, self._factor, max_reports)}

    # Changes.

    def reach(self, trials: Trials, trial: Trial, loss: float | None, now_s: float) -> None:
        """A trial has made its newest report."""
        rung = self.rungs.get(len(trial.reports))
        if rung is None or loss is None:
            return
        for gone in [trial_id for trial_id in rung.held if trials[trial_id].is_leaving]:
            rung.drop(gone)  # its stand-in may never ask
        if not rung.held:
            began_s = trial.report_began_s
            rung.stretch_s = 0.0 if began_s is None else now_s - began_s
            has_few = len(rung.told) < _ENOUGH_WAVES * self._factor
            rung.until_s = now_s + (self._part * rung.stretch_s if has_few else 0.0)
            rung.order, rung.place = [], 0
        rung.held[trial.trial_id] = (loss, now_s)

    def ask(self, trial_id: TrialId, index: int, now_s: float) -> None:
        """The search asks for a report; one that was started anew may ask a second time."""
        rung = self.rungs.get(index + 1)
        if rung is not None and trial_id in rung.again:
            rung.back_s.setdefault(trial_id, now_s)

    def open(self, number: int, now_s: float) -> None:
        """Nobody is waited for any more: fix the order of those that wait at a rung."""
        rung = self.rungs[number]
        best_first = sorted(rung.held, key=lambda trial_id: (rung.held[trial_id][0], trial_id))
        num_passing = -(-len(best_first) // self._factor)
        rung.order = best_first[:1] + best_first[num_passing:] + best_first[1:num_passing]
        rung.since_s = max(rung.since_s, now_s)

    def tell(self, trial_id: TrialId, index: int, now_s: float) -> None:
        """The search was told of a report."""
        rung = self.rungs.get(index + 1)
        if rung is None:
            return
        if trial_id in rung.again:
            # Those before it that never came back: not each of the others shall wait for them anew.
            before = rung.again[: rung.again.index(trial_id)]
            gone = {trial_id, *(each for each in before if each not in rung.back_s)}
            rung.again = [each for each in rung.again if each not in gone]
        elif trial_id in rung.held:
            rung.drop(trial_id)
            rung.place += 1
        if trial_id not in rung.told:
            rung.told.append(trial_id)
        rung.asked, rung.since_s = trial_id, now_s

    def begin_again(self, trials: Trials, *, is_search_new: bool) -> None:
        """The actor was started again; where the search was too, it asks for all reports a second time."""
        for number, rung in self.rungs.items():
            rung.again, rung.back_s = [], {}
            if is_search_new:
                reached = [key for key, trial in trials.items() if len(trial.reports) >= number and trial.has_stand_in]
                rung.again = [*rung.told, *(trial_id for trial_id in reached if trial_id not in rung.told)]
                rung.held, rung.order, rung.asked, rung.since_s = {}, [], None, 0.0

    # Questions.

    def is_free(self, trial_id: TrialId, index: int) -> bool:
        """Whether the search may know a report: it is at no rung, or was told."""
        rung = self.rungs.get(index + 1)
        return rung is None or (trial_id not in rung.held and trial_id not in rung.again)

    def is_waiting(self, trial: Trial) -> bool:
        """Whether a report of the trial waits for those of others."""
        return not trial.is_leaving and any(trial.trial_id in rung.held for rung in self.rungs.values())

    def openable(self, trials: Trials, now_s: float, left_s: Callable[[Trial, float], float | None]) -> list[int]:
        """Rungs at which nobody is waited for any more and whose order is not fixed.

        Args:
            trials: all of the search.
            now_s: the time.
            left_s: seconds of steps that a running trial has left until its next report, None where not known.
        """
        found = []
        for number, rung in self.rungs.items():
            if rung.order or not rung.held:
                continue
            due_s = rung.until_s - now_s
            if due_s <= 0 or not any(
                _is_coming(trial, number, rung, now_s, left_s) for trial in trials.values() if not trial.is_leaving
            ):
                found.append(number)
        return found

    def due(self, trials: Trials, now_s: float) -> Due | None:
        """The next report that the search asks for and is to be told of now."""
        for number, rung in self.rungs.items():
            in_turn = [*rung.order, *(trial_id for trial_id in rung.held if trial_id not in rung.order)]
            for trial_id in in_turn:
                if trials[trial_id].wanted == number - 1 and _is_turn(trials, trial_id, number, rung, now_s):
                    return Due(trial_id, number - 1, place=rung.place, held_s=now_s - rung.held[trial_id][1])
            for trial_id in rung.again:
                if trial_id in rung.back_s and _is_turn_again(trials, trial_id, number, rung, now_s):
                    return Due(trial_id, number - 1, is_judged=trial_id not in rung.told)
        return None


def _is_turn(trials: Trials, trial_id: TrialId, number: int, rung: Rung, now_s: float) -> bool:
    if trials[trial_id].is_leaving:
        return True
    if not rung.order:
        return False
    if now_s >= rung.since_s + _JUDGED_WITHIN_S:
        return True  # the search is busy with something else: better in any order than not at all
    if rung.asked is not None and not _is_judged(trials[rung.asked], number):
        return False
    return trial_id == next((each for each in rung.order if not trials[each].is_leaving), None)


def _is_turn_again(trials: Trials, trial_id: TrialId, number: int, rung: Rung, now_s: float) -> bool:
    if now_s >= max(rung.back_s[trial_id], rung.since_s) + _BACK_WITHIN_S:
        return True
    is_judged = rung.asked is None or _is_judged(trials[rung.asked], number)
    return trial_id == rung.again[0] and is_judged


def _is_coming(
    trial: Trial, number: int, rung: Rung, now_s: float, left_s: Callable[[Trial, float], float | None]
) -> bool:
    """Whether a trial reaches the rung in time: by its own pace, or if it is as fast as the one that waits."""
    if trial.slot_id is None or len(trial.reports) != number - 1 or not trial.has_stand_in:
        return False
    rest_s = left_s(trial, now_s)
    if rest_s is None:
        began_s = trial.report_began_s
        return began_s is not None and began_s + rung.stretch_s <= rung.until_s
    return now_s + rest_s <= rung.until_s


def _is_judged(trial: Trial, number: int) -> bool:
    """Whether the search has let the trial go on from the rung, or stopped it."""
    return trial.wanted >= number or (trial.is_leaving and not trial.state.is_final)
