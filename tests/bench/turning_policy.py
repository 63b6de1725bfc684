"""A policy that turns one dial after the other, for benchmarks of what a turn costs.

Pure like every policy: which dial comes next follows from the generation, when it comes from the snapshot's clock.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from orchestrator.policies import Allocation, Generation, Plan, Snapshot, TrialView, effect_of
from orchestrator.policies.plan import Settings
from orchestrator.policies.tier import Tier

DIALS = ("share", "batch", "precision")


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnInOrder:
    """Turns share, batch and precision in turn, back and forth, all trials at once.

    Attributes:
        rest_s: seconds between two turns.
        low_share, high_share: trials with an even and an odd number have one and the other, and swap.
    """

    rest_s: float = 1.0
    low_share: float = 0.5
    high_share: float = 1.0

    def decide(self, snapshot: Snapshot) -> Plan:
        """The plan in force with one dial turned, or unchanged while it rests."""
        generation = Generation(snapshot.plan.generation + 1)
        trials = sorted(snapshot.trials, key=lambda trial: trial.trial_id)
        rests = any(snapshot.now_s - trial.changed_at_s < self.rest_s for trial in trials)
        rows = []
        for number, trial in enumerate(trials):
            old = snapshot.settings_in_force(trial)
            new = self._first(trial.start, number) if old is None else old
            if old is not None and not rests:
                new = self._turned(old, DIALS[generation % len(DIALS)])
            rows.append(_row(trial, new, f"generation {generation}", old))
        return Plan(generation=generation, allocations=tuple(rows), reason=f"turned {len(rows)} trials")

    def _first(self, start: Settings, number: int) -> Settings:
        return replace(start, share=self.low_share if number % 2 == 0 else self.high_share)

    def _turned(self, old: Settings, dial: str) -> Settings:
        """`old` with that dial at its other value."""
        if dial == "share":
            return replace(old, share=self.high_share if old.share == self.low_share else self.low_share)
        if dial == "batch":
            # The same global batch cut in half: what is measured is the turn, not a larger step.
            halves = old.grad_accum == 1
            micro = old.micro_batch // 2 if halves else old.micro_batch * 2
            return replace(old, micro_batch=micro, grad_accum=2 if halves else 1)
        return replace(old, tier=Tier.BF16 if old.tier is Tier.FP32 else Tier.FP32)


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnBySamples:
    """Turns the three dials of all trials in turn, by how far the slowest of them is: twice the same run turns alike.

    The global batch stays: the micro-batch is cut in half and doubled. Trials with an even and an odd number swap
    their shares.

    Attributes:
        every: samples of the slowest trial between two turns.
        low_share, high_share: the two shares.
    """

    every: int = 1000
    low_share: float = 0.4
    high_share: float = 0.6

    def decide(self, snapshot: Snapshot) -> Plan:
        """The settings that are due."""
        generation = Generation(snapshot.plan.generation + 1)
        trials = sorted(snapshot.trials, key=lambda trial: trial.trial_id)
        num_turns = min((trial.num_samples for trial in trials), default=0) // self.every
        # How often each dial was turned after so many turns of one after the other.
        shares, batches, tiers = ((num_turns + 2 - number) // 3 % 2 for number in range(3))
        rows = []
        for number, trial in enumerate(trials):
            old, start = snapshot.settings_in_force(trial), trial.start
            is_low, cut = (number + shares) % 2 == 0, 2 if batches and start.micro_batch % 2 == 0 else 1
            new = replace(
                start,
                share=self.low_share if is_low else self.high_share,
                micro_batch=start.micro_batch // cut,
                grad_accum=start.grad_accum * cut,
                tier=Tier.BF16 if tiers else start.tier,
            )
            rows.append(_row(trial, new, f"turn {num_turns}", old))
        return Plan(generation=generation, allocations=tuple(rows), reason=f"turn {num_turns}")


def _row(trial: TrialView, new: Settings, when: str, old: Settings | None) -> Allocation:
    """The trial where it is, with its new settings."""
    return Allocation(
        trial_id=trial.trial_id,
        settings=new,
        placement=trial.placement,
        effect=effect_of(old, new),
        reason=f"{when}: share {new.share:g}, micro-batch {new.micro_batch}, {new.tier}",
    )
