"""Trials that go on with another number of ranks: the wish of a plan, the group that opens for it, the move.

A worker group cannot grow, so another one opens beside it while the trial trains on. Only when that one is there does
the trial commit at its boundary and leave; it is first in the queue, and holds nothing until the new group has begun.
A group that does not open within the patience of the run costs the trial nothing: it stays as it is. No Ray.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

from orchestrator.control.events import TrialResized
from orchestrator.control.gain import Pace, efficiency_of
from orchestrator.control.lifecycle import SlotState, Trial
from orchestrator.control.orders import Outcome, Status, StopMode
from orchestrator.control.state import RunState
from orchestrator.policies.plan import TrialId, can_split, on_ranks
from orchestrator.policies.snapshot import DialLimits

logger = logging.getLogger(__name__)

REFUSED_PATIENCES = 5
"""A number of ranks that could not be had is not tried again for so many times the patience."""


class Resizes:
    """The part of the controller that moves trials between worker groups of different sizes."""

    def __init__(self, state: RunState, stop: Callable[[TrialId, StopMode], None]) -> None:
        self._state, self._stop = state, stop
        self._left_at_s: dict[TrialId, float] = {}

    def advance(self) -> None:
        """Let trials go whose new group is there, and forget wishes that nobody fulfilled in time."""
        for trial in self._state.lifecycle.running():
            self._note_wish(trial)
            if trial.wish is None or trial.stop is not StopMode.NONE:
                continue
            if self._state.lifecycle.free_slots(trial.wish[0]):
                self._let_go(trial, trial.wish[0])
            elif self._is_over(trial.wish):
                self._give_up(trial, trial.wish[0])
        for trial_id in self._state.lifecycle.queue:
            self._advance_waiting(self._state.lifecycle.trials[trial_id])

    def slots_to_open(self) -> tuple[int, ...]:
        """Sizes of the worker groups that trials wait for and nobody opens yet."""
        lifecycle = self._state.lifecycle
        wanted = Counter(t.wish[0] for t in lifecycle.running() if t.wish is not None and t.stop is StopMode.NONE)
        queued = (lifecycle.trials[trial_id].num_workers for trial_id in lifecycle.queue)
        wanted += Counter(size for size in queued if size is not None)
        there = Counter(slot.num_workers for slot in lifecycle.free_slots())
        there += Counter(slot.num_workers for slot in lifecycle.slots.values() if slot.state is SlotState.OPENING)
        return tuple(sorted((wanted - there).elements()))

    def leaving(self, trial: Trial, outcome: Outcome) -> None:
        """A trial is about to leave its slot: keep what it needs on the other side, if it leaves for another group."""
        state = self._state
        if trial.stop is not StopMode.RESIZE or trial.moves_to is None or outcome.status is not Status.INTERRUPTED:
            self._left_at_s.pop(trial.trial_id, None)
            state.paces.pop(trial.trial_id, None)
            return
        running = state.ledger.running_settings(trial.trial_id) or state.spec.start_on(trial.size)
        if can_split(running, trial.moves_to):  # an override may have come since the plan
            trial.onward = on_ranks(running, trial.moves_to, state.spec.limits.max_micro_batch)
        trial.resume = None
        state.kept_fits[trial.trial_id] = state.fits[trial.trial_id]

    def acknowledged(self, trial: Trial) -> tuple[str, ...]:
        """A trial runs with its first grant: the dial that has turned by that, if its group has another size."""
        left_at_s = self._left_at_s.pop(trial.trial_id, None)
        if not trial.is_resized:
            return ()
        trial.is_resized = False
        state = self._state
        if left_at_s is not None:
            state.restart_s = state.clock.now_s() - left_at_s
        self._log(trial, "done", trial.size, f"goes on with {trial.size} ranks")
        return ("workers",)

    def _note_wish(self, trial: Trial) -> None:
        row = self._state.plan.allocation(trial.trial_id)
        wanted = None if row is None else row.resize_to
        if wanted is None or wanted == trial.size or not self._is_allowed(trial, wanted):
            trial.wish = None
        elif trial.wish is None or trial.wish[0] != wanted:
            trial.wish = wanted, self._state.clock.now_s()
            self._log(trial, "wanted", wanted, f"{wanted} ranks instead of {trial.size}")

    def _is_allowed(self, trial: Trial, num_workers: int) -> bool:
        """Whether a plan that was made earlier may still be followed: a number may have been given up since."""
        limits = limits_now(self._state, trial)
        low, high = limits.min_workers, limits.max_workers
        return low is not None and high is not None and low <= num_workers <= high

    def _let_go(self, trial: Trial, num_workers: int) -> None:
        state = self._state
        row = state.plan.allocation(trial.trial_id)
        stretch = state.windows[trial.trial_id].stretch()
        if stretch is not None and row is not None:
            base_batch = state.spec.start.global_batch
            efficiency = efficiency_of(state.fits[trial.trial_id], base_batch, row.settings.global_batch)
            pace = Pace(throughput=stretch.samples_per_s, efficiency=efficiency)
            state.paces[trial.trial_id] = pace, row.predicted_gain
        self._left_at_s[trial.trial_id] = state.clock.now_s()
        trial.moves_to = num_workers
        self._stop(trial.trial_id, StopMode.RESIZE)

    def _advance_waiting(self, trial: Trial) -> None:
        """A trial that has left its group and whose new one died before it came waits for another, but not for long."""
        if trial.num_workers is None:
            return
        if trial.wish is None or trial.wish[0] != trial.num_workers:
            trial.wish = trial.num_workers, self._state.clock.now_s()
        elif self._is_over(trial.wish):
            self._give_up(trial, trial.num_workers)

    def _is_over(self, wish: tuple[int, float]) -> bool:
        return self._state.clock.now_s() - wish[1] > self._state.spec.resize_patience_s

    def _give_up(self, trial: Trial, num_workers: int) -> None:
        patience_s = self._state.spec.resize_patience_s
        self._log(trial, "given_up", num_workers, f"no group of {num_workers} ranks opened within {patience_s:g} s")
        refuse(self._state, trial, num_workers)

    def _log(self, trial: Trial, stage: str, num_workers: int, reason: str) -> None:
        state = self._state
        trial.story.append(f"resize {stage}: {reason}")
        logger.info("trial.resize %s %s: %s", trial.trial_id, stage, reason)
        state.log(
            TrialResized(
                trial_id=trial.trial_id,
                attempt=trial.attempt,
                stage=stage,
                num_workers=num_workers,
                reason=reason,
                restart_s=state.restart_s,
            )
        )
        state.journal.sync()


def refuse(state: RunState, trial: Trial, num_workers: int) -> None:
    """So many ranks could not be had: any group will do for a trial that waits, and no policy may ask for a while."""
    trial.refused[num_workers] = state.clock.now_s() + REFUSED_PATIENCES * state.spec.resize_patience_s
    trial.num_workers, trial.wish = None, None
    state.wants_decision = True


def limits_now(state: RunState, trial: Trial) -> DialLimits:
    """What a trial's dials can be set to: what its training allows, less the numbers of ranks tried for in vain."""
    limits, now_s = state.spec.limits, state.clock.now_s()
    if trial.allows is not None:
        return trial.allows.limits
    if limits.min_workers is None or limits.max_workers is None:
        return limits
    vain = [number for number, until_s in trial.refused.items() if until_s > now_s]
    low = max([limits.min_workers, *(number + 1 for number in vain if number < trial.size)])
    high = min([limits.max_workers, *(number - 1 for number in vain if number > trial.size)])
    return replace(limits, min_workers=low, max_workers=high)
