"""Attention on a CPU in the tiers that compute in bf16: in fp32 where windows are short, since that is faster there.

The backward pass of torch's `scaled_dot_product_attention` in bf16 hardly gains from a processor's bf16 instructions
and pays for packing its operands: over short windows it takes longer than in fp32, over long ones it does not. So
operands are raised, and the result comes back in the dtype that autocast gives it elsewhere. What a step gains by it
beside plain autocast is in `tests/bench/bench_precision_speed.py`. Opened by `tiers.lowered` around each forward pass;
knows no models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.overrides import TorchFunctionMode

LONGEST = 256
"""Positions of keys up to which fp32 is at least as fast. Measured on an EPYC with avx512_bf16, heads of 32 to 128."""


class ShortAttentionInFp32(TorchFunctionMode):
    """Where open, attention over up to `LONGEST` positions computes in fp32 whatever autocast says.

    Costs a microsecond for each call of torch: nothing to a model that is large enough to gain from bf16, and what it
    costs a smaller one is in what calibration finds.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        """Every call of torch passes here, all but attention unchanged."""
        named = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **named)
        key = named["key"] if "key" in named else args[1]
        if key.shape[-2] > LONGEST:
            return func(*args, **named)
        with torch.autocast("cpu", enabled=False):
            mixed: Tensor = func(*map(_raised, args), **{name: _raised(value) for name, value in named.items()})
        return mixed.to(torch.get_autocast_dtype("cpu"))


def _raised(value: Any) -> Any:  # noqa: ANN401
    """Operands and masks of numbers in fp32; everything else, masks of bools too, as it is."""
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value
