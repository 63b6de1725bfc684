"""The losses and gradients of all members of a bundle, from one pass over stacked parameters.

The training's own `loss` runs unchanged under `torch.func.vmap`, on a copy of a member's model whose parameters are
swapped for stacked ones: every product becomes a batched product. Gradients are taken outside of vmap, where attention
is one fused call over all members. For torch.compile, which cannot see through all of that, the pass is first traced
into the operations that it comes to.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from orchestrator.jobs.job import LossTerms
from orchestrator.jobs.training import Training
from orchestrator.policies.tier import Tier
from orchestrator.train.bundle.draws import Draws, Folded, set_rates
from orchestrator.train.bundle.linear import full_linear, half_linear
from orchestrator.train.bundle.member import Member
from orchestrator.train.bundle.stacked import join_of
from orchestrator.train.precision.linear import PrecisionLinear
from orchestrator.train.precision.tiers import lowered

Batch = tuple[Tensor, ...]
Join = Callable[[Sequence[Tensor]], Tensor]


class _Whole(nn.Module):
    """A training's loss as a module, so that parameters can be swapped around all of it."""

    def __init__(self, model: nn.Module, training: Training) -> None:
        super().__init__()
        self.model, self._training = model, training
        self.terms: LossTerms | None = None

    def forward(self, batch: Batch) -> Tensor:
        """The sum of losses; how many elements that are is kept aside, a plain number alike for all members."""
        terms = self._training.loss(self.model, batch)
        self.terms = LossTerms(loss_sum=torch.empty(0), num_elements=int(terms.num_elements), is_mean=terms.is_mean)
        return terms.loss_sum


class Forward:
    """The stacked forward and backward pass of trials of one kind.

    Args:
        training: of one of them; the others' must compute the same, which the bundle checks.
        model: of the same one.
        tier: of all of them.
        join: puts the gradients of all parameters, (K, ...) each, into one matrix.
        is_compiled: whether torch.compile makes its kernels.
    """

    def __init__(
        self, training: Training, model: nn.Module, tier: Tier, join: Join, *, is_compiled: bool = False
    ) -> None:
        self._device = next(model.parameters()).device
        self._tier, self.is_compiled = tier, is_compiled
        self._whole = _Whole(_functional(model, tier), training)
        self._losses = vmap(self._one, in_dims=(0, None, 0), randomness="error")
        self._compiled: dict[int, Callable[..., tuple[Tensor, Tensor]]] = {}
        self._join = join

    @property
    def num_elements(self) -> int:
        """Loss elements of one member's micro-batch, known once it was passed."""
        assert self._whole.terms is not None
        return self._whole.terms.num_elements

    @property
    def is_mean(self) -> bool:
        """Whether the loss is a mean over the micro-batch."""
        assert self._whole.terms is not None
        return self._whole.terms.is_mean

    def versions(self) -> list[int]:
        """A number for each buffer that grows when it is changed."""
        return [buffer._version for buffer in self._whole.model.buffers()]

    def set_rates(self, models: Sequence[nn.Module], num_rows: int) -> None:
        """Whose dropout rates the rows have."""
        set_rates(self._whole.model, list(models), num_rows)

    def pass_over(
        self, values: dict[str, Tensor], batch: Batch, draws: Draws, *, is_dry: bool = False
    ) -> tuple[Tensor, Tensor]:
        """The loss of each row, (K,), and its gradient, (K, N), as `join` puts parameters together.

        Args:
            values: stacked parameters by name, in the order of `join`.
            batch: (K, B, ...) each.
            draws: what dropout draws from.
            is_dry: leave dropout out, to compare with a trial alone.

        Raises:
            RuntimeError: the model does what cannot be stacked, or does not use a parameter.
        """
        if not self.is_compiled or is_dry:
            return self._passed(values, batch, draws, is_dry=is_dry)
        num_rows = len(batch[0])
        if num_rows not in self._compiled:
            # What joins the gradients is traced as well: they are written where they belong, and not copied there.
            traced = make_fx(lambda values, batch: self._passed(values, batch, draws))(dict(values), batch)
            if draws.are_used:
                raise RuntimeError("dropout draws anew at every step, which a trace would not")
            self._compiled[num_rows] = torch.compile(traced, dynamic=False)
        return self._compiled[num_rows](dict(values), batch)

    def alone(self, training: Training, model: nn.Module, batch: Batch) -> Tensor:
        """The loss of one member by its own training and model, without dropout; for comparison."""
        with lowered(self._tier, self._device), _Dry():
            return training.loss(model, batch).loss_sum

    def _passed(
        self, values: dict[str, Tensor], batch: Batch, draws: Draws, *, is_dry: bool = False
    ) -> tuple[Tensor, Tensor]:
        leaves = {f"model.{name}": value.detach().requires_grad_() for name, value in values.items()}
        with lowered(self._tier, self._device):
            with Folded(draws, is_dry=is_dry):
                losses = self._losses(leaves, self._others(), batch)
            grads = torch.autograd.grad(losses.sum(), list(leaves.values()))
        return losses.detach(), self._join(grads)

    def _one(self, leaves: dict[str, Tensor], others: dict[str, Tensor], batch: Batch) -> Tensor:
        loss: Tensor = functional_call(self._whole, (leaves, others), (batch,))
        return loss

    def _others(self) -> dict[str, Tensor]:
        """Buffers and frozen parameters, alike in all members."""
        model = self._whole.model
        frozen = {f"model.{name}": param for name, param in model.named_parameters() if not param.requires_grad}
        return frozen | {f"model.{name}": buffer for name, buffer in model.named_buffers()}


def forward_of(member: Member, *, is_compiled: bool = False) -> Forward:
    """The stacked pass of all trials like this one."""
    stepper = member.stepper
    join = join_of(stepper.model, stepper.optimizers.one)
    return Forward(stepper.job, stepper.model, stepper.settings.tier, join, is_compiled=is_compiled)


class _Dry(Folded):
    """Leaves dropout out of a trial alone."""

    def __init__(self) -> None:
        super().__init__(Draws([], torch.empty(0), torch.empty(0)), is_dry=True)

    def _attend(  # noqa: PLR0913, PLR0917 - as torch has it
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,  # noqa: ARG002
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa
        )


@contextlib.contextmanager
def without_gradients_of(model: nn.Module) -> Iterator[None]:
    """Keep the gradients of a model as they were."""
    before = [(param, param.grad) for param in model.parameters()]
    yield
    for param, grad in before:
        param.grad = grad


def _functional(model: nn.Module, tier: Tier) -> nn.Module:
    """A copy whose linear layers are plain operations in the tier, without functions that vmap does not know."""
    with without_gradients_of(model):
        for param in model.parameters():
            param.grad = None
        base = copy.deepcopy(model)
    for layer in base.modules():
        if isinstance(layer, PrecisionLinear):
            layer.function = half_linear if tier is Tier.BF16 else full_linear
    for param in base.parameters():
        if param.requires_grad:
            param.data = param.data.new_empty(0)  # never read: the stacked ones take its place
    return base
