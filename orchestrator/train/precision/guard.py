"""When a cheaper tier may be taken and when it must be left: a state machine of numbers in, moves out. No torch.

It is told what every step showed for free and what every probe measured (`probe`), and answers with the move a trial
must make at once, if any. Demotion is the policy's: the guard only says which cheaper tier is safe. Every rank runs the
same guard on the same numbers, so that none has to be told. Called by `watch`.

The rule (thresholds in `Rules`), from one bad sign to many:
- a step that is not finite: one tier dearer at once; a second one soon after: back to the last good state, two tiers
  dearer, and no cheaper tier for ten probes. In fp16 an overflow with a finite loss is the scale's affair, until there
  are more than two in a hundred steps;
- a loss far above its own average: back to the last good state likewise;
- a probe that finds the error of the tier to be more than a tenth of the noise of the mini-batch, or the length of the
  gradient off by a quarter: one tier dearer, and that tier is banned for 2, 4, 8 ... probes;
- the last tenth of a trial runs in bf16 or dearer.
A cheaper tier is safe after three probes in a row well below those limits.

Source: thresholds as measured on one task. They do not hold everywhere: in tests/bench/bench_precision.py
int8 worsens the final training loss of a model that learns its samples by heart, though no probe objects.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

from policies.tier import Tier, is_cheaper


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """The thresholds.

    Attributes:
        safe_noise, bad_noise: error power of a tier over the noise power of the batch gradient: to enter, to leave.
        safe_norm, bad_norm: length of its gradient over that of the reference: allowed to enter, to stay.
        safe_loss, bad_loss: relative difference of its loss on the same samples, likewise.
        num_safe: probes in a row before a tier is safe.
        num_frozen: probes without any cheaper tier after a hard fault.
        final_part: part of a trial at its end that runs in bf16 or dearer.
        spike_z: how many deviations above its average a loss is a fault.
        soon_steps: within which a second non-finite step counts as a hard fault.
        max_backoffs: of the loss scale within `backoff_steps`.
    """

    safe_noise: float = 0.025
    bad_noise: float = 0.10
    safe_norm: tuple[float, float] = (0.9, 1.1)
    bad_norm: tuple[float, float] = (0.8, 1.25)
    safe_loss: float = 0.02
    bad_loss: float = 0.05
    num_safe: int = 3
    num_frozen: int = 10
    final_part: float = 0.1
    spike_z: float = 8.0
    soon_steps: int = 20
    max_backoffs: int = 2
    backoff_steps: int = 100


class Cause(StrEnum):
    """What made a trial leave a tier."""

    NON_FINITE = "non-finite"
    OVERFLOWS = "overflows"
    SPIKE = "loss spike"
    PROBE = "probe"
    FINAL = "final part"


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """What the trial must do before its next step: go on in `tier`, from the last good state if `is_rollback`."""

    tier: Tier
    cause: Cause
    reason: str
    is_rollback: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """What a probe found of one tier.

    Attributes:
        noise_ratio: error power over the noise power of the mini-batch gradient.
        norm_ratio: length of the gradient over that of the reference.
        loss_gap: relative difference of the loss.
    """

    noise_ratio: float
    norm_ratio: float
    loss_gap: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSigns:
    """What a step showed for free, the same on all ranks.

    Attributes:
        step: optimizer steps done before it.
        is_skipped: the gradient was not finite.
        is_loss_finite: whether the loss was, where that is known; an overflow in fp16 alone leaves it finite.
        loss: mean loss over all ranks of this or the step before; NaN where unknown.
        loss_scale: of fp16.
        progress: part of the trial that is done.
    """

    step: int
    is_skipped: bool
    is_loss_finite: bool
    loss: float
    loss_scale: float
    progress: float


@dataclass(slots=True)
class _Record:
    """What is remembered of one tier."""

    num_safe: int = 0
    num_bans: int = 0
    banned_until: int = 0
    noise_ratio: float | None = None


@dataclass(slots=True)
class _LossAverage:
    """Exponential mean and variance of the loss; forgets all when the settings change."""

    mean: float = 0.0
    variance: float = 0.0
    num: int = 0

    def deviation(self, loss: float) -> float:
        """How many deviations `loss` lies above the average; 0 until that is known."""
        if self.num < 30 or self.variance <= 0:
            return 0.0
        return (loss - self.mean) / math.sqrt(self.variance)

    def add(self, loss: float) -> None:
        """Take in one loss."""
        self.num += 1
        gain = max(1 / self.num, 0.02)
        difference = loss - self.mean
        self.mean += gain * difference
        self.variance = (1 - gain) * (self.variance + gain * difference * difference)


@dataclass(slots=True)
class Guard:
    """The guard of one trial.

    Attributes:
        ladder: allowed tiers, dearest first.
        rules: the thresholds.
        num_probes: probes taken so far; bans are counted in them.
    """

    ladder: Sequence[Tier]
    rules: Rules = field(default_factory=Rules)
    num_probes: int = 0
    _records: dict[Tier, _Record] = field(default_factory=dict)
    _frozen_until: int = 0
    _is_final: bool = False
    _skips: deque[int] = field(default_factory=deque)
    _average: _LossAverage = field(default_factory=_LossAverage)

    def candidate(self, current: Tier, costs: Mapping[Tier, float]) -> Tier | None:
        """The next cheaper tier worth a probe: the dearest below `current` that is faster, or smaller; None if none.

        `costs` has what a step costs in each tier that may be chosen for its cost; tiers without one are never taken.
        """
        if self._is_final_for(current) or self.num_probes < self._frozen_until or current not in costs:
            return None
        for tier in self.ladder:
            if not is_cheaper(tier, current) or tier not in costs or costs[tier] >= 0.97 * costs[current]:
                continue
            if self._is_final_for(tier):
                return None
            return None if self.is_banned(tier) else tier
        return None

    def is_banned(self, tier: Tier) -> bool:
        """Whether the tier may not be entered for now."""
        return self.num_probes < self._record(tier).banned_until

    def is_safe(self, tier: Tier) -> bool:
        """Whether a policy may take the tier now."""
        record = self._record(tier)
        is_open = self.num_probes >= self._frozen_until and not self._is_final_for(tier)
        return is_open and record.num_safe >= self.rules.num_safe and not self.is_banned(tier)

    def noise_ratio(self, tier: Tier) -> float | None:
        """What the last probe of the tier found, None before the first."""
        return self._record(tier).noise_ratio

    def dearer(self, tier: Tier, num: int = 1) -> Tier | None:
        """The allowed tier that many places up, the dearest at most; None at the top."""
        above = [other for other in self.ladder if is_cheaper(tier, other)]
        return above[max(0, len(above) - num)] if above else None

    def take_probe(self, current: Tier, found: Mapping[Tier, Probe]) -> Move | None:
        """Learn from a probe of `current` and a candidate."""
        self.num_probes += 1
        rules = self.rules
        for tier, probe in found.items():
            record = self._record(tier)
            record.noise_ratio = probe.noise_ratio if math.isfinite(probe.noise_ratio) else None
            record.num_safe = record.num_safe + 1 if self._is_good(probe, rules) else 0
        own, target = found.get(current), self.dearer(current)
        if own is None or target is None:
            return None
        why = self._why_bad(own, rules)
        if why is None:
            return None
        self._ban(current)
        return Move(tier=target, cause=Cause.PROBE, reason=f"probe {self.num_probes} in {current}: {why}")

    def take_step(self, current: Tier, signs: StepSigns) -> Move | None:
        """Learn from a step."""
        move = self._after_skip(current, signs) if signs.is_skipped else self._after_loss(current, signs)
        if move is None and signs.progress >= 1 - self.rules.final_part:
            move = self._final(current)
        if move is not None:
            self.forget_losses()
        return move

    def forget_losses(self) -> None:
        """The settings changed: what losses are usual must be learned anew."""
        self._average = _LossAverage()

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: bans outlive a restart."""
        records = {tier.value: asdict(record) for tier, record in self._records.items()}
        return {"num_probes": self.num_probes, "frozen_until": self._frozen_until, "records": records}

    def restore(self, state: Mapping[str, Any] | None) -> None:
        """Take up the state of a checkpoint."""
        if state is None:
            return
        self.num_probes, self._frozen_until = int(state["num_probes"]), int(state["frozen_until"])
        self._records = {Tier(word): _Record(**record) for word, record in state["records"].items()}

    def _after_skip(self, current: Tier, signs: StepSigns) -> Move | None:
        rules = self.rules
        self._skips.append(signs.step)
        target = self.dearer(current)
        if target is None:
            return None
        if current is Tier.FP16 and signs.is_loss_finite:
            recent = [step for step in self._skips if step > signs.step - rules.backoff_steps]
            if len(recent) <= rules.max_backoffs and signs.loss_scale >= 1:
                return None
            self._ban(current)
            reason = f"{len(recent)} overflows in {rules.backoff_steps} steps in {current}, scale {signs.loss_scale:g}"
            return Move(tier=target, cause=Cause.OVERFLOWS, reason=reason)
        # A step that is skipped is done again: what counts is whether the fault came back after one move.
        earlier = [step for step in list(self._skips)[:-1] if step > signs.step - rules.soon_steps]
        self._ban(current)
        if earlier:
            return self._hard(current, Cause.NON_FINITE, f"non-finite again at step {signs.step} in {current}")
        reason = f"non-finite {'gradient' if signs.is_loss_finite else 'loss'} at step {signs.step} in {current}"
        return Move(tier=target, cause=Cause.NON_FINITE, reason=reason)

    def _after_loss(self, current: Tier, signs: StepSigns) -> Move | None:
        if not math.isfinite(signs.loss):
            return None
        z = self._average.deviation(signs.loss)
        if z > self.rules.spike_z and self.dearer(current) is not None:
            self._ban(current)
            text = f"loss {signs.loss:.4g} at step {signs.step} in {current} is {z:.1f} deviations above its average"
            return self._hard(current, Cause.SPIKE, text)
        self._average.add(signs.loss)
        return None

    def _hard(self, current: Tier, cause: Cause, reason: str) -> Move:
        target = self.dearer(current, 2)
        assert target is not None
        self._frozen_until = self.num_probes + self.rules.num_frozen
        for record in self._records.values():
            record.num_safe = 0
        return Move(tier=target, cause=cause, reason=reason, is_rollback=True)

    def _final(self, current: Tier) -> Move | None:
        self._is_final = True
        if not self._is_final_for(current):
            return None
        fine = [tier for tier in self.ladder if not is_cheaper(tier, Tier.BF16)]
        if not fine:
            return None
        part = f"the last {self.rules.final_part:.0%} of a trial"
        return Move(tier=fine[-1], cause=Cause.FINAL, reason=f"{part}: {current} is not fine enough to end in")

    def _is_final_for(self, tier: Tier) -> bool:
        """Whether the end of the trial is too near for a tier as cheap as that."""
        return self._is_final and is_cheaper(tier, Tier.BF16)

    def _ban(self, tier: Tier) -> None:
        """For 2, 4, 8 ... probes; after that it has to prove itself again."""
        record = self._record(tier)
        record.num_bans += 1
        record.banned_until = self.num_probes + 2 ** min(record.num_bans, 10)
        record.num_safe = 0

    def _record(self, tier: Tier) -> _Record:
        return self._records.setdefault(tier, _Record())

    @staticmethod
    def _is_good(probe: Probe, rules: Rules) -> bool:
        low, high = rules.safe_norm
        # Written so that NaN fails.
        return (
            probe.noise_ratio < rules.safe_noise
            and low <= probe.norm_ratio <= high
            and probe.loss_gap < rules.safe_loss
        )

    @staticmethod
    def _why_bad(probe: Probe, rules: Rules) -> str | None:
        low, high = rules.bad_norm
        if not probe.noise_ratio <= rules.bad_noise:
            return f"error power {probe.noise_ratio:.3g} of the batch's noise, allowed {rules.bad_noise:g}"
        if not low <= probe.norm_ratio <= high:
            return f"gradient {probe.norm_ratio:.3g} times as long as it should be, allowed {low:g} to {high:g}"
        if not probe.loss_gap <= rules.bad_loss:
            return f"loss off by {probe.loss_gap:.2%}, allowed {rules.bad_loss:.0%}"
        return None
