"""Policies that divide a device by a timetable, for benchmarks of what a share is worth and whether it is real.

Pure like every policy: what is due follows from the snapshot's clock and from when its trials began.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from orchestrator.policies import Allocation, Generation, Goodput, Plan, Snapshot, TrialView, effect_of

WHOLE = 15
"""Parts in which shares are told here: the SM groups of an H100 or H200."""
CYCLE = ((8, 7), (12, 3), (4, 11))
"""Parts of the first and of the second trial, in turn."""
_THIRD = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class ProtectFirst:
    """Gives the first trial one share after the other, then lets `goodput` divide, the first trial counting for more.

    Alone it has the device. With `count` trials there everybody has the same for `lead_s`, then each turn takes
    `phase_s`.

    Attributes:
        count: trials in all.
        lead_s, phase_s: seconds.
        parts: of the first trial, in fifteenths, separated by commas; the others share the rest.
        urgencies: what a speed-up of the first trial is worth against one of another, by turns, after the parts.
    """

    count: int = 4
    lead_s: float = 3.0
    phase_s: float = 3.5
    parts: str = "4,6,8,10,12"
    urgencies: str = "1,3,9"

    def decide(self, snapshot: Snapshot) -> Plan:
        """The shares that are due."""
        trials = sorted(snapshot.trials, key=lambda trial: trial.trial_id)
        if len(trials) < self.count:
            return _plan(snapshot, trials, [1 / len(trials)] * len(trials))
        since_s = snapshot.now_s - max(trial.began_at_s for trial in trials) - self.lead_s
        parts = [float(part) / WHOLE for part in self.parts.split(",")]
        number = int(since_s // self.phase_s)
        if number < 0:
            return _plan(snapshot, trials, [1 / self.count] * self.count)
        if number < len(parts):
            rest = (1 - parts[number]) / (self.count - 1)
            return _plan(snapshot, trials, [parts[number], *[rest] * (self.count - 1)])
        urgencies = [float(each) for each in self.urgencies.split(",")]
        urgency = urgencies[min(number - len(parts), len(urgencies) - 1)]
        policy = Goodput(min_gain=0.0, cooldown_s=0.5, quantum=1 / WHOLE)
        return policy.decide_by(snapshot, {trials[0].trial_id: urgency})


@dataclass(frozen=True, slots=True, kw_only=True)
class TakeTurns:
    """The first and the second trial have the parts of `CYCLE` in turn, by the clock; a third one always the same.

    Nobody's part depends on who else is there, so each can be compared with itself, alone and beside a neighbour.

    Attributes:
        phase_s: seconds that a pair of parts stays.
    """

    phase_s: float = 4.0

    def decide(self, snapshot: Snapshot) -> Plan:
        """The shares that are due."""
        trials = sorted(snapshot.trials, key=lambda trial: trial.trial_id)
        due = CYCLE[int(snapshot.now_s // self.phase_s) % len(CYCLE)]
        parts = [due[number] if (number := _number(trial)) < len(due) else _THIRD for trial in trials]
        return _plan(snapshot, trials, [part / WHOLE for part in parts])


def _number(trial: TrialView) -> int:
    """The number at the end of a trial's name."""
    return int(trial.trial_id.rsplit("-", 1)[-1])


def _plan(snapshot: Snapshot, trials: Sequence[TrialView], shares: Sequence[float]) -> Plan:
    """Everybody where it is, with its new share, and everything else as it was."""
    rows = []
    for trial, share in zip(trials, shares, strict=True):
        old = snapshot.settings_in_force(trial)
        # Rounded down, so that fifteenths never add up to more than the whole.
        new = replace(old or trial.start, share=int(share * 1e6) / 1e6)
        rows.append(
            Allocation(
                trial_id=trial.trial_id,
                settings=new,
                placement=trial.placement,
                effect=effect_of(old, new),
                reason=f"share {new.share:.3f} is due",
            )
        )
    generation = Generation(snapshot.plan.generation + 1)
    return Plan(generation=generation, allocations=tuple(rows), reason=f"shares of {len(rows)} trials are due")
