"""Dropout and attention inside a bundle: each member draws for itself, and fused attention stays fused.

While `Folded` is open, dropout and `scaled_dot_product_attention` inside `torch.func.vmap` see all members at once. A
member's mask depends on its own state alone, never on its row or its company: on a CPU it is drawn from the member's
own generator, as the trial alone draws it; on a GPU, where a recorded step cannot switch generators, it is computed
from the member's seed, its step, the place in the model and the element. Called by the bundle's forward pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_LOSSES = frozenset(
    {
        F.binary_cross_entropy_with_logits,
        F.cross_entropy,
        F.huber_loss,
        F.kl_div,
        F.l1_loss,
        F.mse_loss,
        F.nll_loss,
        F.smooth_l1_loss,
    }
)
"""What autocast computes in fp32 in a trial alone; inside of vmap it does not see some of these as a whole."""


class Rate(float):
    """The dropout rate of a layer, which in a bundle is one for each row; as a number, that of the first."""

    rows: Tensor


class Draws:
    """What masks are drawn from.

    Args:
        generators: one for each member, on the host; rows beyond them draw nothing.
        seeds: (K,) int64, on the device.
        steps: (K,) float, updates of each row so far, on the device.
    """

    def __init__(self, generators: list[torch.Generator], seeds: Tensor, steps: Tensor) -> None:
        self.generators, self._seeds, self._steps = generators, seeds, steps
        self._site, self._part = 0, torch.zeros(1, dtype=torch.int64, device=steps.device)

    def begin(self, part: Tensor) -> None:
        """A forward pass begins, over that micro-batch of the step: places in the model are counted anew."""
        self._site, self._part = 0, part

    @property
    def are_used(self) -> bool:
        """Whether anything was drawn since the pass began."""
        return self._site > 0

    def keep(self, shape: torch.Size, rates: Tensor) -> Tensor:
        """A mask (K, *shape) of what stays, with each row's own rate."""
        self._site += 1
        if rates.device.type == "cpu":
            rows = [_drawn(shape, rate, own) for rate, own in zip(rates.tolist(), self.generators, strict=False)]
            rows += [torch.ones(shape)] * (len(rates) - len(rows))
            return torch.stack(rows)
        return self._counted(shape, rates)

    def _counted(self, shape: torch.Size, rates: Tensor) -> Tensor:
        """Three rounds of a 32-bit mixing function over seed, step, place and element. Source: Wellons, hash-prospector
        (lowbias32), 2018.
        """
        ones = (1,) * len(shape)
        count = torch.arange(math.prod(shape), device=rates.device, dtype=torch.int64).view(shape)
        row = self._seeds * 0x9E3779B1 + self._steps.to(torch.int64) * 0x85EBCA6B + self._site * 0xC2B2AE35
        row = (row + self._part * 0x27D4EB2F) & _WORD
        bits = (_mixed(row).view(-1, *ones) + count) & _WORD
        return _mixed(bits) >= (rates.double() * 2.0**32).to(torch.int64).view(-1, *ones)


_WORD = 0xFFFFFFFF


def _mixed(x: Tensor) -> Tensor:
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _WORD
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _WORD
    return x ^ (x >> 16)


def _drawn(shape: torch.Size, rate: float, generator: torch.Generator) -> Tensor:
    """As torch draws it on a CPU; nothing is drawn at a rate of zero."""
    if rate == 0.0:
        return torch.ones(shape)
    return torch.empty(shape).bernoulli_(1.0 - rate, generator=generator)


class _Dropped(torch.autograd.Function):
    """Dropout of all members; `vmap` sees them stacked, and ordinary autograd records what it does."""

    @staticmethod
    def forward(x: Tensor, rate: float, draws: Draws) -> Tensor:
        """Never called: there is always a bundle around it."""
        raise NotImplementedError("dropout of a bundle outside of one")

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:  # noqa: ANN401
        """Nothing to keep."""

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], x: Tensor, rate: float, draws: Draws) -> tuple[Tensor, int]:  # noqa: ANN401
        """Members are the first dimension of what comes back."""
        stacked = _stacked(x, in_dims[0], info.batch_size)
        return _dropped(stacked, _rates(rate, stacked), draws), 0


class _Attended(torch.autograd.Function):
    """Attention of all members as one call with members folded into the batch: a fused kernel for all of them."""

    @staticmethod
    def forward(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: _Options) -> Tensor:
        """Never called: there is always a bundle around it."""
        raise NotImplementedError("attention of a bundle outside of one")

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:  # noqa: ANN401
        """Nothing to keep."""

    @staticmethod
    def vmap(
        info: Any,  # noqa: ANN401
        in_dims: tuple[Any, ...],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        options: _Options,
    ) -> tuple[Tensor, int]:
        """Members are the first dimension of what comes back."""
        num_rows = info.batch_size
        parts = [_stacked(each, dim, num_rows) for each, dim in zip((query, key, value), in_dims[:3], strict=True)]
        if mask is not None and in_dims[3] is not None:
            mask = _stacked(mask, in_dims[3], num_rows)
            missing = parts[0].ndim - mask.ndim  # between members and what the mask has: heads, samples
            mask = mask.view(num_rows, *(1,) * missing, *mask.shape[1:])
        elif mask is not None:
            mask = mask.expand(*parts[0].shape[1:-1], parts[1].shape[-2]).expand(num_rows, *(-1,) * (parts[0].ndim - 1))
        if options.rate > 0.0:
            return _attended(parts, mask, options, _rates(options.rate, parts[0])), 0
        stacked_query, stacked_key, stacked_value = (each.flatten(0, 1) for each in parts)
        if mask is not None:
            mask = mask.expand(*parts[0].shape[:-1], parts[1].shape[-2]).flatten(0, 1)
        found = F.scaled_dot_product_attention(
            stacked_query,
            stacked_key,
            stacked_value,
            attn_mask=mask,
            is_causal=options.is_causal,
            scale=options.scale,
        )
        return found.reshape(num_rows, -1, *found.shape[1:]), 0


class _Options:
    """What attention takes beside tensors."""

    __slots__ = ("draws", "is_causal", "rate", "scale")

    def __init__(self, rate: float, is_causal: bool, scale: float | None, draws: Draws) -> None:
        self.rate, self.is_causal, self.scale, self.draws = rate, is_causal, scale, draws


class Folded(TorchFunctionMode):
    """Where open, dropout and attention take all members at once; `is_dry` leaves dropout out."""

    def __init__(self, draws: Draws, *, is_dry: bool = False) -> None:
        super().__init__()
        self._draws, self._is_dry = draws, is_dry

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        """Every call of torch passes here, nearly all unchanged."""
        named = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self._attend(*args, **named)
        if func is F.dropout:
            return self._drop(*args, **named)
        if func in _LOSSES:
            return func(*map(_raised, args), **{name: _raised(value) for name, value in named.items()})
        return func(*args, **named)

    def _drop(self, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        is_off = not training or (p == 0.0 and not isinstance(p, Rate))
        if is_off or self._is_dry:
            return input
        found: Tensor = _Dropped.apply(input, p, self._draws)  # type: ignore[no-untyped-call]
        return input.copy_(found) if inplace else found

    def _attend(  # noqa: PLR0913, PLR0917 - as torch has it
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if enable_gqa or query.ndim != 4:
            return F.scaled_dot_product_attention(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )
        options = _Options(0.0 if self._is_dry else dropout_p, is_causal, scale, self._draws)
        found: Tensor = _Attended.apply(query, key, value, attn_mask, options)  # type: ignore[no-untyped-call]
        return found


def set_rates(base: nn.Module, models: list[nn.Module], num_rows: int) -> None:
    """Give each dropout layer of the functional model the rates of all rows; rows beyond the members have none."""
    own = [dict(model.named_modules()) for model in models]
    device = next(models[0].parameters()).device
    for name, layer in base.named_modules():
        if type(layer) is nn.Dropout:
            rates = [float(modules[name].p) for modules in own]
            rate = Rate(rates[0])
            rate.rows = torch.tensor(rates + [0.0] * (num_rows - len(rates)), device=device)
            layer.p = rate if any(rates) else 0.0


def _raised(value: Any) -> Any:  # noqa: ANN401
    """A tensor of 16-bit numbers in fp32; everything else as it is."""
    is_half = isinstance(value, Tensor) and value.dtype in {torch.bfloat16, torch.float16}
    return value.float() if is_half else value


def _stacked(x: Tensor, dim: int | None, num_rows: int) -> Tensor:
    return x.unsqueeze(0).expand(num_rows, *x.shape) if dim is None else x.movedim(dim, 0)


def _rates(rate: float, like: Tensor) -> Tensor:
    return rate.rows if isinstance(rate, Rate) else torch.full((len(like),), rate, device=like.device)


def _dropped(x: Tensor, rates: Tensor, draws: Draws) -> Tensor:
    keep = draws.keep(x.shape[1:], rates)
    scale = (1.0 / (1.0 - rates)).view(-1, *(1,) * (x.ndim - 1)).to(x.dtype)
    return x * (keep.to(x.dtype) * scale)


def _attended(parts: list[Tensor], mask: Tensor | None, options: _Options, rates: Tensor) -> Tensor:
    """Attention with dropout, written out: no fused kernel takes a rate or a generator for each member."""
    query, key, value = parts
    scale = 1.0 / math.sqrt(query.shape[-1]) if options.scale is None else options.scale
    scores = (query * math.sqrt(scale)) @ (key * math.sqrt(scale)).transpose(-2, -1)
    if options.is_causal:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~seen, float("-inf"))
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype is torch.bool else scores + mask
    weights = _dropped(scores.softmax(-1), rates, options.draws)
    return weights @ value
