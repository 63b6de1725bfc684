"""The section `dials` of a run file: what a policy may turn, and how far. The shape and the range of single values."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from orchestrator.config.values import Section, TierList, TierWord
from orchestrator.policies.tier import Tier


class ShareDial(Section):
    """The part of a device each rank may use."""

    enabled: bool = Field(default=True, description="whether the policy may turn it")
    min: float = Field(default=0.125, gt=0, le=1, description="smallest share per rank, fraction of a device")
    max: float = Field(default=1.0, gt=0, le=1, description="largest share per rank, fraction of a device")


class BatchDial(Section):
    """Micro-batch, accumulation and global batch."""

    enabled: bool = Field(default=True, description="whether the policy may turn it")
    min_global: int = Field(default=1, ge=1, le=2**30, description="smallest samples per optimizer step")
    max_global: int = Field(default=128, ge=1, le=2**30, description="largest samples per optimizer step")
    max_micro: int = Field(
        default=64, ge=1, le=2**20, description="largest samples per rank per forward; of a function max_global"
    )
    change_global: bool = Field(default=True, description="whether samples per step may change; learning rate follows")
    min_efficiency: float = Field(
        default=0.9, ge=0, le=1, description="least worth of a sample at a batch above the start's; 0 for no limit"
    )


class PrecisionDial(Section):
    """The number format of the matrix products."""

    enabled: bool = Field(default=True, description="whether the policy may turn it")
    tiers: TierList = Field(
        default=(Tier.FP32, Tier.BF16),
        description="allowed tiers, dearest first, trials start at it; auto for all that pay on the device",
    )
    emulate: Annotated[tuple[TierWord, ...], Field(strict=False)] = Field(
        default=(), description="tiers to compute without a unit for them, slowly, to study what they do to learning"
    )
    probe_budget: float = Field(
        default=0.025,
        ge=0,
        le=0.5,
        description="part of a trial's time for probes that guard what it learns; 0 turns the guard off",
    )
    exchange: Literal["fp32", "tier"] = Field(
        default="fp32",
        description="in what ranks of a trial exchange gradients; tier: in bf16 while the tier computes in 16 bits",
    )


class WorkersDial(Section):
    """How many ranks a trial has: it commits, and goes on in a worker group of another size."""

    enabled: bool = Field(default=False, description="whether the policy may turn it")
    min: int = Field(default=1, ge=1, le=64, description="fewest ranks of a trial")
    max: int = Field(default=2, ge=1, le=64, description="most ranks of a trial")


class PlacementDial(Section):
    """Where a trial computes, and whether it computes now: it commits, and goes on later or on another device."""

    enabled: bool | None = Field(
        default=None,
        description="whether the policy may pause trials and choose their devices; null: where it does nothing else",
    )


class DialsSection(Section):
    """What a policy may turn while trials run, and how far."""

    share: ShareDial = Field(default=ShareDial(), description="part of a device")
    batch: BatchDial = Field(default=BatchDial(), description="samples per forward and per step")
    precision: PrecisionDial = Field(default=PrecisionDial(), description="number format")
    workers: WorkersDial = Field(default=WorkersDial(), description="ranks, by a restart of the trial")
    placement: PlacementDial = Field(default=PlacementDial(), description="devices, by pausing and moving the trial")
