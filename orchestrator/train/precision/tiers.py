"""Put precision tiers into a model, turn them between steps, and say which of them a device has.

Knows layers and devices only: not which tier is wise (the policy) nor how fast it is (measured). The training loop
calls `install` once, before sharding, and `set_tier` at a step boundary on every rank before the same step.
"""

from __future__ import annotations

import torch
from torch import nn

from orchestrator.train.precision.linear import PrecisionLinear
from orchestrator.train.precision.products import TIER_FUNCTIONS
from policies.tier import Tier, tier_facts

__all__ = ["TIER_FUNCTIONS", "available_tiers", "install", "set_tier", "tiers_in_use"]


def install(model: nn.Module) -> int:
    """Turn every `nn.Linear` of `model` into a `PrecisionLinear` in tier fp32, in place; parameters stay the same.

    The class of the module is changed rather than the module replaced: parameters, hooks and references to it (also
    to the model itself, where that is one linear layer) stay valid. Call it before `fully_shard`, which puts its own
    class above this one. Subclasses of `nn.Linear` are left alone: they compute in their own way.

    Returns:
        How many layers were changed; 0 when called again.
    """
    layers = [module for module in model.modules() if type(module) is nn.Linear]
    for layer in layers:
        layer.__class__ = PrecisionLinear
        layer.tier = Tier.FP32  # type: ignore[assignment]  # mypy still sees the old class
    return len(layers)


def set_tier(model: nn.Module, tier: Tier) -> int:
    """Turn every `PrecisionLinear` of `model` to `tier`; parameters, gradients and optimizer state are not touched.

    Call it between two steps, on every rank before the same step: a change between a forward and its backward pass
    would not harm, but ranks in different tiers average gradients of different precision.

    Returns:
        How many layers changed.
    """
    if tier not in TIER_FUNCTIONS:
        allowed = ", ".join(TIER_FUNCTIONS)
        raise ValueError(f"tier={tier!r} has no function; allowed: {allowed}; add one to TIER_FUNCTIONS")
    layers = [m for m in model.modules() if isinstance(m, PrecisionLinear) and m.tier is not tier]
    for layer in layers:
        layer.tier = tier
    return len(layers)


def tiers_in_use(model: nn.Module) -> dict[Tier, int]:
    """How many layers of `model` compute in each tier; tiers without a layer are absent."""
    counts: dict[Tier, int] = {}
    for module in model.modules():
        if isinstance(module, PrecisionLinear):
            counts[module.tier] = counts.get(module.tier, 0) + 1
    return counts


def available_tiers(device: torch.device) -> dict[Tier, str | None]:
    """For each tier None where `device` can compute in it, else the reason why not.

    Says what is possible, not what is fast: a CPU without bf16 instructions computes bf16 correctly and slowly.
    """
    return {tier: _reason_against(tier, device) for tier in TIER_FUNCTIONS}


def _reason_against(tier: Tier, device: torch.device) -> str | None:
    """Why `device` cannot compute in `tier`, or None."""
    if device.type not in {"cpu", "cuda"}:
        return f"device type {device.type!r} is not supported; allowed: cpu, cuda"
    if device.type == "cpu":
        return None
    if not torch.cuda.is_available():
        return f"{device} is not there: this torch ({torch.__version__}) finds no CUDA device"
    needed = tier_facts(tier).min_cuda_capability
    found = torch.cuda.get_device_capability(device)
    if needed is None or found >= needed:
        return None
    return f"{device} has compute capability {found[0]}.{found[1]}; tier {tier} needs {needed[0]}.{needed[1]}"
