"""Whose telemetry is believed. A trial whose claims cannot be true harms nobody but itself. Pure.

Every row is held against ranges and against the rows before it when it arrives (`telemetry.validation`). Here a whole
trial is judged: by its refused rows, its clock, and the speeds that trials of its shape measured with the same dials,
of which the median counts. Who is not believed is decided about as if nothing had been measured of it, gets a fair
share at most, and is no example to others; it is believed again as soon as the reason is gone.
"""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import exp, log
from statistics import median_low

from orchestrator.control.world import Run, Trial
from orchestrator.policies.learn.fit import NOTHING_FITTED, TrialFit
from orchestrator.policies.learn.speed import MIN_WINDOWS, CellKey
from orchestrator.policies.plan import TrialId
from orchestrator.policies.snapshot import TrialView
from orchestrator.policies.tier import is_cheaper

MAX_LAG_S = 5.0
"""A clock that tells the time so much too late is not believed; messages take a second or two."""
DISAGREEMENT = 2.0
"""Speeds of trials of one shape with the same dials differ by less, on devices of one kind."""
_MAJORITY = 3
ROWS_PER_S, BURST_ROWS = 10_000, 1 << 19
"""Step records that a rank may send: twice what a rank keeps while nobody takes them, at once."""
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Trust:
    """Who is not believed.

    Attributes:
        doubts: trials whose telemetry is not believed, and why.
        alone: trials whose speeds are believed of themselves only: two disagree, and nobody knows who is right; or one
            alone found a cheaper tier to bring nothing, which would keep all others from trying it.
    """

    doubts: Mapping[TrialId, str] = field(default_factory=dict)
    alone: frozenset[TrialId] = frozenset()

    def is_example(self, trial_id: TrialId) -> bool:
        """Whether others may learn from it."""
        return trial_id not in self.doubts and trial_id not in self.alone

    def shown(self, view: TrialView, num_beside: int) -> TrialView:
        """A trial as a policy shall see it; `num_beside` ranks are on its fullest device, its own included."""
        if self.is_example(view.trial_id):
            return view
        own = replace(view, shape=f"{view.shape}#{view.trial_id}")
        if view.trial_id not in self.doubts:
            return own
        fair = max(view.limits.min_share, min(view.limits.max_share, 1.0 / max(1, num_beside)))
        return replace(own, fit=_unmeasured(view.fit), limits=replace(view.limits, max_share=fair))


class Allowance:
    """How many step records a rank may still send: a bucket that fills with time. More are dropped, and said so."""

    def __init__(self) -> None:
        self._left: dict[tuple[TrialId, int], tuple[float, float]] = {}
        self._warned: set[tuple[TrialId, int]] = set()

    def takes(self, sender: tuple[TrialId, int], num_rows: int, now_s: float) -> bool:
        """Whether so many rows of a rank are taken now."""
        left, since_s = self._left.get(sender, (float(BURST_ROWS), now_s))
        left = min(float(BURST_ROWS), left + (now_s - since_s) * ROWS_PER_S)
        is_taken = num_rows <= left
        self._left[sender] = (left - num_rows if is_taken else left, now_s)
        if not is_taken and sender not in self._warned:
            self._warned.add(sender)
            logger.warning("telemetry.dropped trial=%s rank=%d: more than %d records a second", *sender, ROWS_PER_S)
        return is_taken


def judged(run: Run, now_s: float) -> Trust:
    """Who is not believed now."""
    doubts = {trial.trial_id: why for trial in run.running() if (why := _own_doubt(trial, now_s)) is not None}
    by_shape: dict[str, list[Trial]] = defaultdict(list)
    for trial in run.running():
        if trial.trial_id not in doubts:
            by_shape[run.spec.shape(trial.params)].append(trial)
    alone: set[TrialId] = set()
    for trials in by_shape.values():
        found, undecided = _outliers(trials)
        doubts |= found
        alone |= undecided | _unconfirmed(trials)
    return Trust(doubts=doubts, alone=frozenset(alone))


def _own_doubt(trial: Trial, now_s: float) -> str | None:
    """Why a trial is not believed whatever others say; None where it may be."""
    assert trial.window is not None
    view = trial.window.view(now_s)
    if view.is_suspect:
        return f"{view.num_refused} of its step records cannot be true"
    lag_s = trial.window.lag.lag_s
    return f"its clock is {lag_s:.0f} s behind" if lag_s > MAX_LAG_S else None


def _outliers(trials: Sequence[Trial]) -> tuple[dict[TrialId, str], set[TrialId]]:
    """Of trials of one shape those whose speed is not that of most, and those who disagree without a majority."""
    measured: dict[CellKey, list[tuple[float, TrialId]]] = defaultdict(list)
    for trial in trials:
        for cell in () if trial.fit is None else trial.fit.cells:
            if len(cell.recent) >= MIN_WINDOWS:
                measured[cell.key].append((cell.log_work, trial.trial_id))
    doubts: dict[TrialId, str] = {}
    alone: set[TrialId] = set()
    for found in measured.values():
        middle = median_low([work for work, _ in found])
        apart = [(work, trial_id) for work, trial_id in found if abs(work - middle) > log(DISAGREEMENT)]
        if apart and len(found) - len(apart) < max(2, _MAJORITY - 1):
            alone |= {trial_id for _, trial_id in found}
            continue
        for work, trial_id in apart:
            factor = exp(abs(middle - work))
            than = "faster" if work < middle else "slower"
            doubts[trial_id] = f"it says that it is {factor:.1f} times {than} than others of its kind"
    return doubts, alone - doubts.keys()


def _unconfirmed(trials: Sequence[Trial]) -> set[TrialId]:
    """Trials that alone measured a cheaper tier, and found it no faster: a second one has to see that, too."""
    fits = {trial.trial_id: _cells(trial) for trial in trials}
    num_measured = Counter(key for cells in fits.values() for key in cells)
    if len(trials) < 2:
        return set()
    return {
        trial_id
        for trial_id, cells in fits.items()
        if any(num_measured[key] == 1 and _brings_nothing(key, cells) for key in cells)
    }


def _cells(trial: Trial) -> dict[CellKey, float]:
    """Logarithm of the seconds of work at each setting that a trial has measured."""
    cells = () if trial.fit is None else trial.fit.cells
    return {cell.key: cell.log_work for cell in cells if len(cell.recent) >= MIN_WINDOWS}


def _brings_nothing(key: CellKey, cells: Mapping[CellKey, float]) -> bool:
    """Whether a tier is no faster than a dearer one at the same other settings."""
    tier, *others = key
    dearer = [work for (other, *rest), work in cells.items() if rest == others and is_cheaper(tier, other)]
    return any(cells[key] >= work for work in dearer)


def _unmeasured(fit: TrialFit) -> TrialFit:
    """A fit that keeps what protects the trial itself: tiers and micro-batches that failed."""
    return replace(
        NOTHING_FITTED,
        banned_tiers=fit.banned_tiers,
        micro_batch_cap=fit.micro_batch_cap,
        cap_until=fit.cap_until,
        num_overflows=fit.num_overflows,
        num_observations=fit.num_observations,
    )
