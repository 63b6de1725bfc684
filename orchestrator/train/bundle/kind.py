"""Which trials may be stepped as one: those whose steps differ in numbers only. Called before a bundle is made.

Same training, same layers of the same sizes, same kind of optimizer, same batch and tier. Learning rates, decays,
momenta, seeds, dropout rates, clipping and the samples may differ. What cannot be seen here, such as a loss that reads
a hyper-parameter, is found by comparing gradients when a trial enters (`bundle.py`).
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import nn

from orchestrator.policies.tier import Tier
from orchestrator.train.stepper import Stepper

_OPTIMIZERS: dict[type[torch.optim.Optimizer], tuple[str, ...]] = {
    torch.optim.SGD: ("nesterov", "dampening", "maximize", "differentiable"),
    torch.optim.Adam: ("amsgrad", "maximize", "differentiable", "decoupled_weight_decay"),
    torch.optim.AdamW: ("amsgrad", "maximize", "differentiable", "decoupled_weight_decay"),
}
"""Optimizers whose update is known, and what of their options must be alike in all members."""
_UNKNOWN_OPTIONS = ("dampening", "maximize", "differentiable", "amsgrad")
_TIERS = {"cpu": (Tier.FP32, Tier.BF16), "cuda": (Tier.FP32, Tier.TF32, Tier.BF16)}
_PLAIN = (int, float, str, bool, type(None), torch.dtype)


def why_alone(stepper: Stepper) -> str:
    """Why a trial cannot be stepped together with any other, empty where it can."""
    training, tier = stepper.job, stepper.settings.tier
    device = next(stepper.model.parameters()).device
    if training.has_own_step or hasattr(training.own, "after_step"):
        return "it steps by itself (train_step, after_step)"
    if training.state() is not None:
        return "it has state of its own (state_dict)"
    if training.reader is not None and not hasattr(training.own, "train_data"):
        return "it reads its samples from disk while it trains"
    if tier not in _TIERS.get(device.type, ()):
        return f"tier {tier.value} is computed by functions of its own on {device.type}"
    return stepper.whole or _why_not_updated(stepper) or _why_not_stacked(stepper.model, stepper.optimizers.one)


def kind_of(stepper: Stepper) -> Hashable:
    """Trials of one kind may be stepped as one."""
    settings, optimizer = stepper.settings, stepper.optimizers.one
    names = {id(param): name for name, param in stepper.model.named_parameters()}
    groups = tuple(
        (
            tuple(names[id(param)] for param in group["params"]),
            tuple((option, group.get(option)) for option in _OPTIMIZERS.get(type(optimizer), ())),
        )
        for group in optimizer.param_groups
    )
    params = tuple((name, tuple(p.shape), p.requires_grad) for name, p in stepper.model.named_parameters())
    layers = tuple((name, type(module), _numbers_of(module)) for name, module in stepper.model.named_modules())
    dials = settings.micro_batch, settings.grad_accum, settings.tier
    return type(stepper.job.own), type(optimizer), groups, params, layers, dials


def numbers_now(stepper: Stepper) -> Hashable:
    """Plain attributes of the training and of all layers: a loss that changes any counts something by itself."""
    own = getattr(stepper.job.own, "__dict__", {})
    counted = tuple((name, value) for name, value in sorted(own.items()) if isinstance(value, _PLAIN))
    return counted, tuple(_numbers_of(module) for module in stepper.model.modules())


def _why_not_updated(stepper: Stepper) -> str:
    members = stepper.optimizers.members
    if len(members) > 1 or type(members[0]) not in _OPTIMIZERS:
        names = "+".join(type(each).__name__ for each in members)
        return f"its optimizer is {names}; known: {', '.join(each.__name__ for each in _OPTIMIZERS)}"
    used = [name for group in members[0].param_groups for name in _UNKNOWN_OPTIONS if group.get(name)]
    return f"its optimizer has {', '.join(sorted(set(used)))}" if used else ""


def _why_not_stacked(model: nn.Module, optimizer: torch.optim.Optimizer) -> str:
    trained = [param for param in model.parameters() if param.requires_grad]
    held = {id(param) for group in optimizer.param_groups for param in group["params"]}
    if not trained or any(id(param) not in held for param in trained) or len(held) != len(trained):
        return "its optimizer does not hold exactly the parameters that are trained"
    if any(param.dtype is not torch.float32 for param in trained):
        return "its parameters are not all fp32"
    hooked = [
        name
        for name, module in model.named_modules()
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks  # no public list of them
    ]
    return f"layer {hooked[0] or 'model'!r} has hooks" if hooked else ""


def _numbers_of(module: nn.Module) -> tuple[tuple[str, Any], ...]:
    """Plain attributes of a layer; the rate of a dropout layer may differ between members."""
    free = {"training", "p"} if type(module) is nn.Dropout else {"training"}
    return tuple(
        (name, value)
        for name, value in sorted(vars(module).items())
        if not name.startswith("_") and name not in free and isinstance(value, _PLAIN)
    )
