"""The precision tiers and the facts a policy may rely on about each of them.

A tier says in which number format the matrix products of a trial are computed; master weights are fp32 in every tier.
A tier is a word (`Tier("bf16")`) and reads, writes and compares as one; fixed point has parameters in its word:
`fixed(k=8,bits=16)`. This table deliberately holds no speeds: how fast a tier is on a machine is measured there.
Read by policies, by the run-file validation and by `orchestrator.train.precision`, which has the functions.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar

MAX_FRACTION_BITS = 40
MAX_WORD_BITS = 32


class Rounding(StrEnum):
    """How fixed point rounds what lies between two numbers of its grid."""

    NEAREST = "nearest"
    FLOOR = "floor"
    STOCHASTIC = "stochastic"


@dataclass(frozen=True, slots=True, kw_only=True)
class FixedPoint:
    """A fixed-point format: multiples of 2**-k, in a word of `bits` bits that saturates.

    Attributes:
        k: binary digits behind the point.
        bits: width of the word with its sign, or None for a word without end, which never saturates.
        mode: how it rounds.
    """

    k: int
    bits: int | None
    mode: Rounding

    @property
    def word(self) -> str:
        """The canonical word.

        >>> FixedPoint(k=8, bits=16, mode=Rounding.NEAREST).word
        'fixed(k=8,bits=16)'
        """
        width = "" if self.bits is None else f",bits={self.bits}"
        return f"fixed(k={self.k}{width}{'' if self.mode is Rounding.NEAREST else f',{self.mode.value}'})"


class Tier(str):
    """Precision tier: the word used in run files, telemetry and plans. Equal words are the same object.

    >>> Tier("bf16") is Tier.BF16, Tier("fixed(8, 16, floor)"), Tier("fixed(8,16)").fixed.k
    (True, 'fixed(k=8,bits=16,floor)', 8)

    Raises:
        ValueError: the word names no tier; the message lists what is allowed.
    """

    FP32: ClassVar[Tier]
    TF32: ClassVar[Tier]
    BF16: ClassVar[Tier]
    FP16: ClassVar[Tier]
    FP8: ClassVar[Tier]
    INT8: ClassVar[Tier]

    def __new__(cls, word: str) -> Tier:
        """The one object of that tier."""
        # A run file may hold anything here, also what cannot be a key of a dict.
        known = _INTERNED.get(word) if isinstance(word, str) else None
        if known is None:
            canonical = _canonical(word)
            known = _INTERNED.get(canonical)
            if known is None:
                known = _INTERNED[canonical] = super().__new__(cls, canonical)
        return known

    @property
    def value(self) -> str:
        """The word as a plain str."""
        return str.__str__(self)

    @property
    def fixed(self) -> FixedPoint | None:
        """The format of a fixed-point tier, None for every other."""
        return _parse_fixed(self.value)


_INTERNED: dict[str, Tier] = {}
_NAMES = ("fp32", "tf32", "bf16", "fp16", "fp8", "int8")
TIER_WORDS = f"{', '.join(_NAMES)} or fixed(k=8,bits=16) with a rounding mode such as floor behind it"
_FIXED = re.compile(
    r"fixed\(\s*(?:k\s*=\s*)?([0-9]{1,2})\s*"
    r"(?:,\s*(?:bits\s*=\s*)?([0-9]{1,2})\s*)?"
    r"(?:,\s*(?:mode\s*=\s*)?(nearest|floor|stochastic)\s*)?\)"
)


def _canonical(word: object) -> str:
    if isinstance(word, str):
        if word in _NAMES:
            return str(word)
        found = _parse_fixed(word)
        if found is not None:
            return found.word
    raise ValueError(f"{word!r} names no tier; allowed: {TIER_WORDS}")


def _parse_fixed(word: str) -> FixedPoint | None:
    """The format a word describes, None where it describes none.

    Raises:
        ValueError: it has the form of one and a number out of range.
    """
    match = _FIXED.fullmatch(word)
    if match is None:
        return None
    k, bits = int(match[1]), None if match[2] is None else int(match[2])
    if k > MAX_FRACTION_BITS:
        raise ValueError(f"{word!r} has k={k}; allowed: 0 to {MAX_FRACTION_BITS}")
    if bits is not None and not 2 <= bits <= MAX_WORD_BITS:
        raise ValueError(f"{word!r} has bits={bits}; allowed: 2 to {MAX_WORD_BITS}, or none for a word without end")
    return FixedPoint(k=k, bits=bits, mode=Rounding(match[3] or "nearest"))


Tier.FP32, Tier.TF32, Tier.BF16, Tier.FP16, Tier.FP8, Tier.INT8 = (Tier(name) for name in _NAMES)

NAMED_TIERS: tuple[Tier, ...] = tuple(Tier(name) for name in _NAMES)
"""Every tier without parameters, dearest first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TierFacts:
    """What is true of a tier on every machine.

    Attributes:
        master_dtype: dtype of the weights that the optimizer updates.
        compute_dtype: format of the operands of a linear layer's products, in words.
        companion_dtype: dtype of convolutions, attention and what else autocast lowers; None for fp32.
        compute_bytes: bytes of one operand element.
        min_cuda_capability: lowest CUDA compute capability with a unit for it; None where no GPU has one.
        cpu_flags: processor flags of which one is needed for a unit; () where every processor has one, None where none
            has.
        cost_rank: 0 is the dearest; a larger rank is a cheaper tier.
        fallback: the tier to use where this one is not available; None for the last resort.
    """

    master_dtype: str
    compute_dtype: str
    companion_dtype: str | None
    compute_bytes: float
    min_cuda_capability: tuple[int, int] | None
    cpu_flags: tuple[str, ...] | None
    cost_rank: int
    fallback: Tier | None


def _facts(
    rank: int,
    words: tuple[str, str | None],
    compute_bytes: float,
    native: tuple[tuple[int, int] | None, tuple[str, ...] | None],
    fallback: Tier | None,
) -> TierFacts:
    return TierFacts(
        master_dtype="float32",
        compute_dtype=words[0],
        companion_dtype=words[1],
        compute_bytes=compute_bytes,
        min_cuda_capability=native[0],
        cpu_flags=native[1],
        cost_rank=rank,
        fallback=fallback,
    )


_BF16_FLAGS = ("avx512_bf16", "amx_bf16")
_INT8_FLAGS = ("avx512_vnni", "avx_vnni", "amx_int8")

TIER_FACTS: dict[Tier, TierFacts] = {
    Tier.FP32: _facts(0, ("float32", None), 4, ((3, 5), ()), None),
    Tier.TF32: _facts(1, ("tf32", None), 4, ((8, 0), None), Tier.FP32),
    Tier.BF16: _facts(2, ("bfloat16", "bfloat16"), 2, ((8, 0), _BF16_FLAGS), Tier.FP32),
    Tier.FP16: _facts(3, ("float16", "float16"), 2, ((7, 0), None), Tier.BF16),
    Tier.FP8: _facts(4, ("e4m3 forward, e5m2 gradients", "bfloat16"), 1, ((8, 9), None), Tier.BF16),
    Tier.INT8: _facts(5, ("int8", "bfloat16"), 1, ((7, 5), _INT8_FLAGS), Tier.BF16),
}
"""The facts of the tiers without parameters; `tier_facts` knows those of every tier."""


def tier_facts(tier: Tier) -> TierFacts:
    """What is true of the tier on every machine.

    >>> tier_facts(Tier("fixed(k=4,bits=8)")).compute_bytes, tier_facts(Tier.BF16).fallback
    (1.0, 'fp32')
    """
    known = TIER_FACTS.get(tier)
    if known is not None:
        return known
    fixed = tier.fixed
    assert fixed is not None
    width = 64 if fixed.bits is None else fixed.bits
    # Fewer bits are cheaper; of words equally wide that with fewer digits behind the point, then the coarser rounding.
    order = ((64 - width) * 64 + MAX_FRACTION_BITS - fixed.k) * 4 + (fixed.mode is Rounding.FLOOR)
    words = f"fixed point, {fixed.k} binary digits behind the point", None
    return _facts(100 + order, words, 4.0 if fixed.bits is None else width / 8, (None, None), Tier.BF16)


def is_cheaper(tier: Tier, other: Tier) -> bool:
    """Whether `tier` comes after `other` in the order of tiers (fewer bits, less accuracy).

    >>> is_cheaper(Tier.BF16, Tier.FP32)
    True
    """
    return tier_facts(tier).cost_rank > tier_facts(other).cost_rank


FINE_BYTES = 2
"""Bytes of an operand below which a tier is coarse: a weight is rounded the same way for many steps."""


def is_coarse(tier: Tier) -> bool:
    """Whether it has less than 16 bits.

    >>> is_coarse(Tier.BF16), is_coarse(Tier.FP8)
    (False, True)
    """
    return tier_facts(tier).compute_bytes < FINE_BYTES


def by_cost(tiers: Iterable[Tier]) -> tuple[Tier, ...]:
    """The tiers dearest first, each once."""
    return tuple(sorted(set(tiers), key=lambda tier: tier_facts(tier).cost_rank))


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceFacts:
    """What of a device decides which tiers it has.

    Attributes:
        name: for messages.
        capability: CUDA compute capability, None for a CPU.
        cpu_flags: the processor's flags that tiers ask for; empty for a GPU.
    """

    name: str
    capability: tuple[int, int] | None = None
    cpu_flags: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class TierSupport:
    """Whether a device has a unit for a tier. Where it has none the tier can be emulated: same numbers, no speed.

    Attributes:
        is_real: whether there is a unit for it.
        reason: why not; empty where there is.
        nearest: the tier itself, or the nearest one the device has a unit for.
        is_near: whether other devices of its kind compute in it without a separate emulation: a processor that only
            lacks the instructions.
    """

    is_real: bool
    reason: str
    nearest: Tier
    is_near: bool = False


def support_of(tier: Tier, device: DeviceFacts) -> TierSupport:
    """Whether `device` has a unit for `tier`, and what it has instead.

    >>> support_of(Tier.FP8, DeviceFacts(name="A100", capability=(8, 0))).reason
    'A100 has compute capability 8.0; fp8 needs 8.9'
    """
    reason = _reason_against(tier, device)
    if reason is None:
        return TierSupport(is_real=True, reason="", nearest=tier)
    nearest = tier_facts(tier).fallback
    while nearest is not None and _reason_against(nearest, device) is not None:
        nearest = tier_facts(nearest).fallback
    is_near = device.capability is None and tier_facts(tier).cpu_flags is not None
    return TierSupport(is_real=False, reason=reason, nearest=nearest or Tier.FP32, is_near=is_near)


def real_tiers(device: DeviceFacts) -> tuple[Tier, ...]:
    """The tiers that the device has units for, dearest first."""
    return tuple(tier for tier in NAMED_TIERS if _reason_against(tier, device) is None)


def auto_tiers(device: DeviceFacts) -> tuple[Tier, ...]:
    """What `tiers: auto` means on the device: all it has units for, less int8 on a processor.

    There the product in int8 is faster and the layer is not, because of the quantisation around it; bf16 is both faster
    and finer. Who wants int8 names it.

    >>> auto_tiers(DeviceFacts(name="a server", cpu_flags=frozenset({"avx512_bf16", "avx512_vnni"})))
    ('fp32', 'bf16')
    """
    return tuple(tier for tier in real_tiers(device) if device.capability is not None or tier is not Tier.INT8)


def _reason_against(tier: Tier, device: DeviceFacts) -> str | None:
    facts = tier_facts(tier)
    if facts.min_cuda_capability is None and facts.cpu_flags is None:
        return f"no device computes in {tier}"
    if device.capability is not None:
        needed = facts.min_cuda_capability
        if needed is None:
            return f"no GPU computes in {tier}"
        have = "{}.{}".format(*device.capability)
        short = f"{device.name} has compute capability {have}; {tier} needs {needed[0]}.{needed[1]}"
        return None if device.capability >= needed else short
    if facts.cpu_flags is None:
        return f"{device.name} has no {tier} unit, no processor has"
    if facts.cpu_flags and not device.cpu_flags.intersection(facts.cpu_flags):
        return f"{device.name} has none of {', '.join(facts.cpu_flags)}, which {tier} needs"
    return None
