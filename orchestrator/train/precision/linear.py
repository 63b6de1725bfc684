"""A linear layer whose precision tier can be turned between two steps, without touching its parameters.

It has the parameter names and the state dict of `nn.Linear`, so checkpoints and optimizers cannot tell them apart.
It does not know who turns the tier; `tiers.install` makes these layers and `tiers.set_tier` turns them.
"""

from __future__ import annotations

from torch import Tensor, nn

from orchestrator.train.precision.products import TIER_FUNCTIONS
from policies.tier import Tier


class PrecisionLinear(nn.Linear):
    """`nn.Linear` that computes in `tier`. Made by `tiers.install` out of an existing layer, never constructed.

    Attributes:
        tier: the tier of the next forward and of its backward pass. Set on the instance, never on the class: a class
            attribute shadowed later is a different guard for torch.compile and costs one more compilation.
    """

    tier: Tier

    def forward(self, x: Tensor) -> Tensor:
        """The layer's product in its tier, in the input's dtype."""
        return TIER_FUNCTIONS[self.tier](x, self.weight, self.bias)

    def extra_repr(self) -> str:
        """The layer's sizes and its tier."""
        return f"{super().extra_repr()}, tier={self.tier.value}"
