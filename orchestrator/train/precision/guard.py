"""When a cheaper tier may be taken and when it must be left: a state machine of numbers in, moves out. No torch.

It is told what every step showed for free and what every probe measured (`probe`), and answers with the move a trial
must make at once, if any. Demotion is the policy's: the guard only says which cheaper tier is safe. Every rank runs the
same guard on the same numbers, so that none has to be told. Called by `watch`.

The rule (thresholds in `Rules`), from one bad sign to many:
- a step that is not finite: one tier dearer at once; a second one soon after: back to the last good state, two tiers
  dearer, and no cheaper tier for ten probes. In fp16 an overflow with a finite loss is the scale's affair, until there
  are more than two in a hundred steps;
- a loss far above its own average: back to the last good state likewise;
- an operand of which nearly all falls out of the tier's range: one tier dearer, and that tier is banned;
- much falls out of it, or gradients are far from as long as they were in the tier before: a probe at once;
- a probe that finds the error of the tier to be more than a tenth of the noise of the mini-batch, the length of the
  gradient off by a quarter, or the bias of the last probes more than a tenth of the gradient itself (the noise shrinks
  in a large batch and may be large late in training; a bias must be small beside what is to be learned): one tier
  dearer, and that tier is banned for 2, 4, 8 ... probes;
- below 16 bits all that counts for more: a weight is rounded the same way for many steps, and such errors add up;
- the last tenth of a trial runs in bf16 or dearer.
A cheaper tier is safe after three probes in a row well below those limits.

Source: thresholds as measured on one task, and held against others in tests/bench/bench_precision.py. A task whose end
is chaotic (samples learned by heart at a constant rate) ends elsewhere in every tier, and in fp32 after a nudge too.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

from orchestrator.policies.tier import Tier, is_cheaper, is_coarse
from orchestrator.train.precision.averages import LossAverage, NormAverage

_MEAN_GAIN, _MIN_MEANS = 0.25, 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """The thresholds.

    Attributes:
        safe_noise, bad_noise: error power of a tier over the noise power of the batch gradient: to enter, to leave.
        coarse_part: by what both are multiplied for tiers of less than 16 bits.
        safe_bias, bad_bias: power of what a tier adds to every gradient over the power of the gradient without noise.
        safe_norm, bad_norm: length of its gradient over that of the reference: allowed to enter, to stay.
        safe_loss, bad_loss: relative difference of its loss on the same samples, likewise.
        num_safe: probes in a row before a tier is safe.
        num_frozen: probes without any cheaper tier after a hard fault.
        final_part: part of a trial at its end that runs in bf16 or dearer.
        spike_z: how many deviations above its average a loss is a fault.
        soon_steps: within which a second non-finite step counts as a hard fault.
        max_backoffs: of the loss scale within `backoff_steps`.
        much_lost, all_lost: parts of an operand that saturate, and that vanish: for a probe, to leave.
        usual_norm: length of the gradient over that in the tier before; a probe where it is outside.
    """

    safe_noise: float = 0.025
    bad_noise: float = 0.10
    coarse_part: float = 0.4
    safe_bias: float = 0.025
    bad_bias: float = 0.10
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
    much_lost: tuple[float, float] = (0.01, 0.5)
    all_lost: tuple[float, float] = (0.25, 0.95)
    usual_norm: tuple[float, float] = (0.67, 1.5)


class Cause(StrEnum):
    """What made a trial leave a tier."""

    NON_FINITE = "non-finite"
    OVERFLOWS = "overflows"
    SPIKE = "loss spike"
    RANGE = "out of range"
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
        bias_sq: power of the error that both halves of the samples have in common; may come out negative.
        signal_sq: power of the gradient without its noise, likewise.
    """

    noise_ratio: float
    norm_ratio: float
    loss_gap: float
    bias_sq: float = 0.0
    signal_sq: float = 0.0


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
        grad_norm: length of the gradient before clipping, NaN where unknown.
        saturated, vanished: parts of the operand that fares worst which fall out of the tier's range, where counted.
    """

    step: int
    is_skipped: bool
    is_loss_finite: bool
    loss: float
    loss_scale: float
    progress: float
    grad_norm: float = math.nan
    saturated: float = 0.0
    vanished: float = 0.0


@dataclass(slots=True)
class _Record:
    """What is remembered of one tier. Both powers are means over the last probes: of one alone they say little."""

    num_safe: int = 0
    num_probes: int = 0
    num_bans: int = 0
    banned_until: int = 0
    noise_ratio: float | None = None
    bias_sq: float = 0.0
    signal_sq: float = 0.0
    num_means: int = 0
    num_alarms: int = 0
    quiet_until: int = 0

    def add(self, probe: Probe) -> None:
        """Take in one probe."""
        self.num_probes += 1
        self.noise_ratio = probe.noise_ratio if math.isfinite(probe.noise_ratio) else None
        if math.isfinite(probe.bias_sq) and math.isfinite(probe.signal_sq):
            self.num_means += 1
            gain = max(1 / self.num_means, _MEAN_GAIN)
            self.bias_sq += gain * (probe.bias_sq - self.bias_sq)
            self.signal_sq += gain * (probe.signal_sq - self.signal_sq)

    @property
    def bias_ratio(self) -> float:
        """Bias over signal; 0 as long as neither stands out of the noise of the probes."""
        is_known = self.num_means >= _MIN_MEANS and self.signal_sq > 0
        return max(0.0, self.bias_sq / self.signal_sq) if is_known else 0.0


@dataclass(slots=True)
class Guard:
    """The guard of one trial.

    Attributes:
        ladder: allowed tiers, dearest first.
        rules: the thresholds.
        num_probes: probes taken so far; bans are counted in them.
        alarm: what a step showed that calls for a probe now; empty where nothing does.
    """

    ladder: Sequence[Tier]
    rules: Rules = field(default_factory=Rules)
    num_probes: int = 0
    alarm: str = ""
    _records: dict[Tier, _Record] = field(default_factory=dict)
    _frozen_until: int = 0
    _is_final: bool = False
    _skips: deque[int] = field(default_factory=deque)
    _average: LossAverage = field(default_factory=LossAverage)
    _norms: NormAverage = field(default_factory=NormAverage)

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

    def is_promising(self, tier: Tier) -> bool:
        """Whether the tier is not known to be safe yet, and nothing speaks against it."""
        record = self._record(tier)
        return record.num_bans == 0 and record.num_probes == record.num_safe < self.rules.num_safe

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
        self.alarm = ""
        for tier, probe in found.items():
            record = self._record(tier)
            record.add(probe)
            record.num_safe = record.num_safe + 1 if self._is_good(tier, probe) else 0
        own, target = found.get(current), self.dearer(current)
        why = None if own is None else self._why_bad(current, own)
        if why is None or target is None:
            return None
        self._ban(current)
        return Move(tier=target, cause=Cause.PROBE, reason=f"probe {self.num_probes} in {current}: {why}")

    def take_step(self, current: Tier, signs: StepSigns) -> Move | None:
        """Learn from a step."""
        move = self._after_skip(current, signs) if signs.is_skipped else self._after_loss(current, signs)
        move = move or self._after_range(current, signs)
        if move is None and signs.progress >= 1 - self.rules.final_part:
            move = self._final(current)
        if move is not None:
            self.forget_losses()
        return move

    def forget_losses(self, *, is_same_batch: bool = True) -> None:
        """The settings changed: what losses are usual must be learned anew; so must lengths of gradients."""
        self._average = LossAverage()
        self._norms.turned(is_comparable=is_same_batch)

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

    def _after_range(self, current: Tier, signs: StepSigns) -> Move | None:
        """What fell out of the range of the tier, and whether gradients are as long as they were in the one before."""
        rules, lost = self.rules, (signs.saturated, signs.vanished)
        text = f"{lost[0]:.1%} of an operand saturates and {lost[1]:.1%} vanishes"
        target = self.dearer(current)
        if target is None:
            return None
        if any(part > limit for part, limit in zip(lost, rules.all_lost, strict=True)):
            self._ban(current)
            return Move(tier=target, cause=Cause.RANGE, reason=f"{text} at step {signs.step} in {current}")
        if any(part > limit for part, limit in zip(lost, rules.much_lost, strict=True)):
            self._raise_alarm(current, signs.step, text)
        ratio = None if signs.is_skipped else self._norms.add(signs.grad_norm)
        if ratio is not None and not rules.usual_norm[0] <= ratio <= rules.usual_norm[1]:
            self._raise_alarm(current, signs.step, f"gradients are {ratio:.2f} times as long as in the tier before")
        return None

    def _raise_alarm(self, current: Tier, step: int, text: str) -> None:
        """Ask for a probe now; where that happens again and again in a tier, less and less often."""
        record = self._record(current)
        if step < record.quiet_until:
            return
        record.num_alarms += 1
        record.quiet_until = step + self.rules.soon_steps * 2 ** min(record.num_alarms, 10)
        self.alarm = f"{text} at step {step} in {current}"

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

    def _is_good(self, tier: Tier, probe: Probe) -> bool:
        rules, (low, high) = self.rules, self.rules.safe_norm
        # Written so that NaN fails.
        return (
            probe.noise_ratio < rules.safe_noise * self._part(tier)
            and low <= probe.norm_ratio <= high
            and probe.loss_gap < rules.safe_loss
            and self._record(tier).bias_ratio < rules.safe_bias
        )

    def _why_bad(self, tier: Tier, probe: Probe) -> str | None:
        rules, (low, high) = self.rules, self.rules.bad_norm
        allowed, bias = rules.bad_noise * self._part(tier), self._record(tier).bias_ratio
        if not probe.noise_ratio <= allowed:
            return f"error power {probe.noise_ratio:.3g} of the batch's noise, allowed {allowed:g}"
        if not bias <= rules.bad_bias:
            return f"bias power {bias:.3g} of the gradient's, allowed {rules.bad_bias:g}"
        if not low <= probe.norm_ratio <= high:
            return f"gradient {probe.norm_ratio:.3g} times as long as it should be, allowed {low:g} to {high:g}"
        if not probe.loss_gap <= rules.bad_loss:
            return f"loss off by {probe.loss_gap:.2%}, allowed {rules.bad_loss:.0%}"
        return None

    def _part(self, tier: Tier) -> float:
        return self.rules.coarse_part if is_coarse(tier) else 1.0
