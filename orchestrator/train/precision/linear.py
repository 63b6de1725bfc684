"""A linear layer whose precision tier can be turned between two steps, without touching its parameters.

It has the parameter names and the state dict of `nn.Linear`, so checkpoints and optimizers cannot tell them apart.
It does not know who turns the tier; `tiers.install` makes these layers and `tiers.set_tier` turns them.
"""

from __future__ import annotations

from torch import Tensor, nn

from orchestrator.policies.tier import Tier
from orchestrator.train.precision.products import LinearFunction, function_of, tier_of_layer


class PrecisionLinear(nn.Linear):
    """`nn.Linear` that computes in `tier`. Made by `tiers.install` out of an existing layer, never constructed.

    Attributes:
        tier: the tier it was turned to.
        real_tier: the tier it computes in, another one where its shape does not allow `tier`.
        keeps_weight: whether it may keep its cast weight from the forward to the backward pass.
        function: computes the layer. Set on the instance, never on the class: a class attribute shadowed later is a
            different guard for torch.compile and costs one more compilation.
    """

    tier: Tier
    real_tier: Tier
    keeps_weight: bool
    function: LinearFunction

    def turn(self, tier: Tier) -> None:
        """Compute in `tier` from the next forward on, as far as the shape allows."""
        self.tier = tier
        self.real_tier = tier_of_layer(tier, self.in_features, self.out_features)
        self.function = function_of(self.real_tier, keeps_weight=self.keeps_weight)

    def forward(self, x: Tensor) -> Tensor:
        """The layer's product in its tier."""
        return self.function(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        """The layer's sizes and its tier."""
        return f"{super().extra_repr()}, tier={self.tier.value}"
