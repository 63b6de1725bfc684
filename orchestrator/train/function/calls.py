"""What a watched model was called with while it trained, kept to be computed again in another precision tier.

Two calls are kept, each the first of a step, with the gradients that arrived at their outputs. The model is then run
on the same inputs and the same gradients are sent back through it: that gives its parameters' gradients in any tier
without calling the function's loss a second time. Nothing is kept unless it was asked for. Called by `watched`.
"""

from __future__ import annotations

import copy
import itertools
import logging
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

logger = logging.getLogger(__name__)

NUM_CALLS = 2
"""Calls that a probe compares; their difference is the noise of the batch."""
MAX_BYTES = 1 << 30
"""Inputs and outputs of a call that are larger are not kept: that is memory that the function does not know of."""


@dataclass(slots=True)
class Call:
    """One call of a model: copies of its arguments, its outputs' values, and the gradients that they received.

    Attributes:
        args, kwargs: the arguments, detached.
        grads: by the number of an output tensor, its gradient; filled by the backward pass.
        product: sum of the products of outputs and gradients.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    grads: dict[int, Tensor] = field(default_factory=dict)
    product: float = 0.0


class Calls:
    """Keeps calls of one model."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._calls: list[Call] = []
        self._has_one = self._is_replaying = self._is_off = False
        self._hook: RemovableHandle | None = None

    @property
    def complete(self) -> list[Call]:
        """The calls, once all of them were kept and had a backward pass; until then none."""
        calls = [call for call in self._calls if call.grads]
        return calls if len(calls) == NUM_CALLS else []

    def arm(self) -> None:
        """Keep the first call of each of the next steps, unless that is so already."""
        if self._hook is None and not self._is_off:
            self._calls, self._has_one = [], False
            self._hook = self._model.register_forward_hook(_Hook(self), with_kwargs=True)

    def end_step(self) -> None:
        """A step is over: a call in the next one is another one."""
        self._has_one = False
        self._calls = [call for call in self._calls if call.grads]  # one without a backward pass was no training
        if len(self._calls) == NUM_CALLS:
            self._unhook()

    def drop(self) -> None:
        """Forget the calls, give their memory back, and leave the model alone."""
        self._calls = []
        self._unhook()

    def _unhook(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def replay(self, call: Call) -> float:
        """Run the model on a call again and send its gradients back; they are added to the parameters'.

        Returns:
            By how much the loss differs from that of the call, to first order: the outputs' changes times their
            gradients.
        """
        self._is_replaying = True
        try:
            with torch.enable_grad():
                outputs = dict(enumerate(tensors_in(self._model(*call.args, **call.kwargs))))
                pairs = [(outputs[number], grad) for number, grad in call.grads.items()]
                torch.autograd.backward([out for out, _ in pairs], [grad.to(out.dtype) for out, grad in pairs])
        finally:
            self._is_replaying = False
        products = [_product(out, grad) for out, grad in pairs]
        return float(torch.stack(products).sum()) - call.product

    def seen(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Keep a call; what it returns takes the place of the output: the same values, whose gradients are seen.

        Of an output from which the model has computed another one, such as a loss, only the gradient that comes from
        outside counts; so each is a copy, which the model itself does not use.
        """
        is_wanted = not self._has_one and len(self._calls) < NUM_CALLS
        if not is_wanted or self._is_replaying or not torch.is_grad_enabled():
            return None
        if sum(tensor.numel() * tensor.element_size() for tensor in tensors_in((args, kwargs, output))) > MAX_BYTES:
            logger.info(
                "no tier is probed: inputs and outputs of the watched model are larger than %d bytes", MAX_BYTES
            )
            self._is_off = True
            return None
        call = Call(args=mapped(args, _copy), kwargs=mapped(kwargs, _copy))
        self._calls.append(call)
        self._has_one = True
        numbers = itertools.count()

        def copied(tensor: Tensor) -> Tensor:
            number = next(numbers)
            if not tensor.requires_grad:
                return tensor
            own = tensor.clone()
            own.register_hook(partial(_arrived, call, number, own.detach()))  # type: ignore[no-untyped-call]
            return own

        return mapped(output, copied)


class _Hook:
    """The forward hook of `calls`; in a copy of the model, or a pickle of it, it does nothing."""

    def __init__(self, calls: Calls | None = None) -> None:
        self._calls = calls

    def __call__(self, _model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        return None if self._calls is None else self._calls.seen(args, kwargs, output)

    def __reduce__(self) -> tuple[type[_Hook], tuple[()]]:
        """Copying uses it as well."""
        return _Hook, ()


def _arrived(call: Call, number: int, output: Tensor, grad: Tensor) -> None:
    if number not in call.grads:  # a graph may be walked twice
        call.grads[number] = grad.detach().clone()
        call.product += float(_product(output, grad))


def _product(output: Tensor, grad: Tensor) -> Tensor:
    """Sum of the products of all elements; without another tensor of that size, which a language model's may be."""
    return torch.dot(output.detach().flatten().float(), grad.detach().flatten().float()).double()


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().clone()


def mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A value of nested mappings, lists and tuples with every tensor changed; anything else stays what it is."""
    if isinstance(value, Tensor):
        return change(value)
    if type(value) in {list, tuple}:
        return type(value)(mapped(each, change) for each in value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(mapped(each, change) for each in value))
    if isinstance(value, MutableMapping):
        changed = copy.copy(value)  # of its own class, such as an output of Hugging Face's
        for key, each in value.items():
            changed[key] = mapped(each, change)
        return changed
    return value


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in nested mappings, lists and tuples, in their order."""
    if isinstance(value, Tensor):
        yield value
        return
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    for part in parts:
        yield from tensors_in(part)
