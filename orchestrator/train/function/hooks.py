"""What is seen of a training that does not cooperate: its steps, its losses and its gradients; and its learning rate.

Steps: torch's global optimizer hooks. Of several optimizers those of the first count, which is the first that steps.
Losses: what `Tensor.backward` is called on. The learning rate is multiplied before each optimizer's step and put back
behind it, so that a scheduler of the user's never sees the factor. Installed while a function runs, and removed then.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from orchestrator.train.batch.learning_rate import ScalingRule
from orchestrator.train.function.autocast import LINE_SEARCH, OWN, SCALER
from orchestrator.train.function.patches import replaced

_LINEAR = (torch.optim.SGD, torch.optim.ASGD, torch.optim.LBFGS)
"""Optimizers whose update is proportional to the gradient: their rate follows the batch itself (AdaScale), others' its
square root."""


class Steps:
    """Watches optimizers and losses.

    Calls `computed` behind each backward pass, `ahead` in front of each step of any optimizer, and `boundary` behind
    those of the first.

    Attributes:
        first: the optimizer whose steps are counted; None until one has made a step.
        factor: what learning rates are multiplied by during a step.
        loss: mean of the losses since the last step, on their device, None where there was none.
        num_backwards: backward passes since the last step.
        scales_loss: whether the training scales its loss by itself (GradScaler).
        casts: whether the training uses autocast by itself.
    """

    def __init__(
        self,
        boundary: Callable[[Optimizer], None],
        ahead: Callable[[Optimizer], None] = lambda _optimizer: None,
        computed: Callable[[int], None] = lambda _num_backwards: None,
    ) -> None:
        self._boundary, self._ahead, self._computed = boundary, ahead, computed
        self.first: Optimizer | None = None
        self._rates: dict[int, list[float | Tensor]] = {}
        self._losses: list[Tensor] = []
        self._last_rate = float("nan")
        self._num_rate_changes = 0
        self._num_steps = 0
        self.factor = 1.0
        self.num_backwards = 0
        self.scales_loss = self.casts = False

    @property
    def rule(self) -> ScalingRule:
        """How the learning rate follows the batch under the optimizer whose steps are counted."""
        return ScalingRule.ADASCALE if isinstance(self.first, _LINEAR) else ScalingRule.SQRT

    @property
    def own_precision(self) -> str:
        """Why the training has to choose its precision by itself; empty where nothing says so yet."""
        if self.scales_loss:
            return SCALER
        if self.casts:
            return OWN
        return LINE_SEARCH if isinstance(self.first, torch.optim.LBFGS) else ""

    @property
    def counts_steps(self) -> bool:
        """Whether the learning rate has changed with at least every second step, as a schedule over steps has it."""
        return self._num_steps > 1 and self._num_rate_changes * 2 >= self._num_steps - 1

    @property
    def learning_rate(self) -> float:
        """Of the first parameter group, as the user's schedule has it, in the step that was just made."""
        return self._last_rate * self.factor

    def take_loss(self) -> Tensor | None:
        """The mean of the losses since the last call, a scalar on its device; None where there was none."""
        losses, self._losses, self.num_backwards = self._losses, [], 0
        if not losses:
            return None
        same = [loss for loss in losses if loss.device == losses[0].device]
        return same[0] if len(same) == 1 else torch.stack([loss.float() for loss in same]).mean()

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Watch, within."""
        hooks = [
            register_optimizer_step_pre_hook(lambda optimizer, _args, _kwargs: self._before(optimizer)),
            register_optimizer_step_post_hook(lambda optimizer, _args, _kwargs: self._after(optimizer)),
        ]
        patches = [
            replaced(Tensor, "backward", self._with_loss(Tensor.backward)),
            replaced(torch.autocast, "__enter__", self._with_autocast(torch.autocast.__enter__)),
            replaced(torch.amp.GradScaler, "scale", self._with_scaler(torch.amp.GradScaler.scale)),
        ]
        for patch in patches:
            patch.__enter__()
        try:
            yield
        finally:
            for patch in reversed(patches):
                patch.__exit__(None, None, None)
            for hook in hooks:
                hook.remove()

    def _before(self, optimizer: Optimizer) -> None:
        self._ahead(optimizer)
        if self.factor == 1.0:
            return
        rates: list[float | Tensor] = []
        for group in optimizer.param_groups:
            rate = group["lr"]
            rates.append(rate.clone() if isinstance(rate, Tensor) else rate)
            _set_rate(group, rate * self.factor)
        self._rates[id(optimizer)] = rates

    def _after(self, optimizer: Optimizer) -> None:
        for group, rate in zip(optimizer.param_groups, self._rates.pop(id(optimizer), []), strict=False):
            _set_rate(group, rate)
        if self.first is None:
            self.first = optimizer
        if optimizer is self.first:
            self._num_steps += 1
            rate = float(optimizer.param_groups[0]["lr"]) if optimizer.param_groups else 0.0
            self._num_rate_changes += self._num_steps > 1 and rate != self._last_rate
            self._last_rate = rate
            self._boundary(optimizer)

    def _with_loss(self, plain: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(plain)
        def backward(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            if tensor.numel() == 1:
                self._losses.append(tensor.detach().reshape(()))
            self.num_backwards += 1
            plain(tensor, *args, **kwargs)
            self._computed(self.num_backwards)

        return backward

    def _with_autocast(self, plain: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(plain)
        def enter(context: torch.autocast) -> Any:
            entered = plain(context)
            # Recomputed activations enter it inside of torch, with the state that they were computed in; and models
            # keep some of their layers in fp32 by a context that switches it off.
            is_torch = sys._getframe(1).f_globals.get("__name__", "").startswith("torch.")
            self.casts |= not is_torch and torch.is_autocast_enabled(context.device)
            return entered

        return enter

    def _with_scaler(self, plain: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(plain)
        def scale(scaler: torch.amp.GradScaler, *args: Any, **kwargs: Any) -> Any:
            self.scales_loss |= scaler.is_enabled()
            return plain(scaler, *args, **kwargs)

        return scale


def _set_rate(group: dict[str, Any], rate: float | Tensor) -> None:
    """Set a group's learning rate; a tensor keeps its place, which an optimizer may have captured."""
    if isinstance(group["lr"], Tensor):
        group["lr"].copy_(torch.as_tensor(rate))
    else:
        group["lr"] = float(rate)
