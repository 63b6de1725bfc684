"""The precision tiers and the facts a policy may rely on about each of them.

A tier says in which number format the matrix products of a trial are computed; master weights are fp32 in every tier.
This table deliberately holds no speeds: how fast a tier is on a machine is measured there (see `fit.py`).
Read by policies, by the run-file validation and by `orchestrator.train.precision`, which has one function per tier.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Tier(StrEnum):
    """Precision tier, dearest first. The value is the word used in run files, telemetry and plans."""

    FP32 = "fp32"
    BF16 = "bf16"


@dataclass(frozen=True, slots=True, kw_only=True)
class TierFacts:
    """What is true of a tier on every machine.

    Attributes:
        master_dtype: dtype of the weights that the optimizer updates.
        compute_dtype: dtype of the operands of matrix products.
        compute_bytes: bytes of one operand element.
        min_cuda_capability: lowest CUDA compute capability with a native unit, or None where every device has one.
        cost_rank: 0 is the dearest; a larger rank is a cheaper tier.
        fallback: the tier to use where this one is not available; None for the last resort.
    """

    master_dtype: str
    compute_dtype: str
    compute_bytes: int
    min_cuda_capability: tuple[int, int] | None
    cost_rank: int
    fallback: Tier | None


TIER_FACTS: dict[Tier, TierFacts] = {
    Tier.FP32: TierFacts(
        master_dtype="float32",
        compute_dtype="float32",
        compute_bytes=4,
        min_cuda_capability=None,
        cost_rank=0,
        fallback=None,
    ),
    Tier.BF16: TierFacts(
        master_dtype="float32",
        compute_dtype="bfloat16",
        compute_bytes=2,
        min_cuda_capability=(8, 0),
        cost_rank=1,
        fallback=Tier.FP32,
    ),
}


def is_cheaper(tier: Tier, other: Tier) -> bool:
    """Whether `tier` stands below `other` on the ladder (fewer bits, less accuracy).

    >>> is_cheaper(Tier.BF16, Tier.FP32)
    True
    """
    return TIER_FACTS[tier].cost_rank > TIER_FACTS[other].cost_rank
