"""Put precision tiers into a model, turn them between steps, and say which of them a device has and a model runs in.

Knows layers and devices only: not which tier is wise (the policy, the guard) nor how fast it is (`calibrate`). The
training loop calls `install` once, before sharding, and `set_tier` at a step boundary on every rank before the same
step; around each forward pass it opens `lowered`, which brings everything that is no linear layer along.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from orchestrator.hardware import cpu_facts
from orchestrator.policies.tier import DeviceFacts, Tier, support_of, tier_facts
from orchestrator.train.precision.attention import ShortAttentionInFp32
from orchestrator.train.precision.linear import PrecisionLinear
from orchestrator.train.precision.products import TIER_FUNCTIONS, tier_of_layer

__all__ = [
    "TIER_FUNCTIONS",
    "Coverage",
    "coverage",
    "facts_of",
    "install",
    "is_real",
    "lowered",
    "set_tier",
    "tiers_in_use",
    "uninstall",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Coverage:
    """How many linear layers a model has, and how many of them really compute in the tier they were turned to."""

    num_layers: int
    num_in_tier: int


def install(model: nn.Module, *, keeps_weights: bool = False) -> int:
    """Turn every `nn.Linear` of `model` into a `PrecisionLinear` in tier fp32, in place; parameters stay the same.

    The class of the module is changed rather than the module replaced: parameters, hooks and references to it (also
    to the model itself, where that is one linear layer) stay valid. Call it before `fully_shard`, which puts its own
    class above this one. Subclasses of `nn.Linear` are left alone: they compute in their own way.

    Args:
        model: the model.
        keeps_weights: whether layers keep their cast weights from the forward to the backward pass, which saves casting
            them again and takes 2 bytes per parameter meanwhile; not for a model that will be sharded.

    Returns:
        How many layers were changed; 0 when called again.
    """
    layers = [module for module in model.modules() if type(module) is nn.Linear]
    for layer in layers:
        layer.__class__ = PrecisionLinear
        layer.keeps_weight = keeps_weights  # type: ignore[assignment]
        layer.turn(Tier.FP32)  # type: ignore[operator]  # mypy still sees the old class
    return len(layers)


def uninstall(model: nn.Module) -> None:
    """Make plain `nn.Linear` layers again of those that `install` changed; parameters stay the same."""
    for layer in [module for module in model.modules() if type(module) is PrecisionLinear]:
        layer.__class__ = nn.Linear  # type: ignore[assignment]
        for name in ("tier", "real_tier", "function", "keeps_weight"):
            layer.__dict__.pop(name, None)


def set_tier(model: nn.Module, tier: Tier, *, turns_tensor_cores: bool = True) -> int:
    """Turn every `PrecisionLinear` of `model` to `tier`; parameters, gradients and optimizer state are not touched.

    Call it between two steps, on every rank before the same step: a change between a forward and its backward pass
    would not harm, but ranks in different tiers average gradients of different precision. On a GPU it also turns the
    process's switch between fp32 and tf32, unless that is the affair of the caller.

    Returns:
        How many layers changed.
    """
    tier = Tier(tier)
    layers = [m for m in model.modules() if isinstance(m, PrecisionLinear) and m.tier is not tier]
    for layer in layers:
        layer.turn(tier)
    if turns_tensor_cores and any(param.is_cuda for param in model.parameters()):
        _turn_tensor_cores(is_on=tier is not Tier.FP32)
    return len(layers)


def lowered(tier: Tier, device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Where convolutions, attention and the like compute in the tier's 16-bit dtype; norms, softmax and losses do not.

    On a CPU attention over short windows stays in fp32 beside bf16, which is faster there. Without a cache of cast
    weights: it would outlive a captured graph, and linear layers do not use it.
    """
    companion = tier_facts(tier).companion_dtype
    if companion is None:
        return contextlib.nullcontext()
    lower = torch.autocast(device.type, dtype=getattr(torch, companion), cache_enabled=False)
    return _with_attention(lower) if (device.type, companion) == ("cpu", "bfloat16") else lower


@contextlib.contextmanager
def _with_attention(lower: torch.autocast) -> Iterator[None]:
    with lower, ShortAttentionInFp32():
        yield


def coverage(model: nn.Module, tier: Tier | None = None) -> Coverage:
    """How many linear layers compute in the tier they were turned to; or would, if that were `tier`."""
    layers = [module for module in model.modules() if isinstance(module, PrecisionLinear)]
    wanted = [layer.tier if tier is None else tier for layer in layers]
    pairs = zip(layers, wanted, strict=True)
    num_in_tier = sum(1 for layer, own in pairs if tier_of_layer(own, layer.in_features, layer.out_features) is own)
    return Coverage(num_layers=len(layers), num_in_tier=num_in_tier)


def tiers_in_use(model: nn.Module) -> dict[Tier, int]:
    """How many layers of `model` really compute in each tier; tiers without a layer are absent."""
    counts: dict[Tier, int] = {}
    for module in model.modules():
        if isinstance(module, PrecisionLinear):
            counts[module.real_tier] = counts.get(module.real_tier, 0) + 1
    return counts


def facts_of(device: torch.device) -> DeviceFacts:
    """What of the device decides which tiers it has.

    Raises:
        ValueError: it is neither a CPU nor a CUDA device, or not there.
    """
    if device.type == "cpu":
        return cpu_facts()
    if device.type != "cuda":
        raise ValueError(f"device type {device.type!r} is not supported; allowed: cpu, cuda")
    if not torch.cuda.is_available():
        raise ValueError(f"{device} is not there: this torch ({torch.__version__}) finds no CUDA device")
    major, minor = torch.cuda.get_device_capability(device)
    return DeviceFacts(name=torch.cuda.get_device_name(device), capability=(major, minor))


def is_real(tier: Tier, device: torch.device) -> bool:
    """Whether the device has a unit for the tier; otherwise it is emulated: the same numbers and no speed."""
    return support_of(tier, facts_of(device)).is_real


def _turn_tensor_cores(*, is_on: bool) -> None:
    """Whether fp32 products of this process may use tf32. What is not fp32 is not touched by it."""
    with warnings.catch_warnings():
        # The older of torch's two interfaces: torch.compile reads it, and refuses a mixture of both.
        warnings.simplefilter("ignore")
        torch.set_float32_matmul_precision("high" if is_on else "highest")
        torch.backends.cudnn.allow_tf32 = is_on
