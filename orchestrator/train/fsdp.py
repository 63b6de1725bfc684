"""Sharding a model over ranks with FSDP2, or leaving it alone on one rank, behind the same few functions.

One rank has nothing to shard, and wrapping every block costs a small model 2.6 times its step there, so one rank keeps
the plain model; parameter names are the same in every form, and a trial changes form through its checkpoint.
Uses public API of `torch.distributed.fsdp` only, present in torch 2.11 to 2.13 with one meaning: `fully_shard` (also
of a list of modules), `FSDPModule.set_requires_gradient_sync`,
`set_is_last_backward`, `register_fsdp_forward_method`. Only 2.13 has been run.
Mixed precision stays off (`MixedPrecisionPolicy()`): precision is the tier of each linear layer, turned live, while the
dtype of communication is fixed when the model is wrapped. Knows nothing of plans or of Ray; called by the loop.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

DEFAULT_MIN_UNIT_BYTES = 4 << 20
"""Below about this size a collective's fixed cost outweighs what overlapping it with compute can hide."""


def shard(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    mesh: DeviceMesh | None,
    *,
    methods: Sequence[str] = (),
    min_unit_bytes: int = DEFAULT_MIN_UNIT_BYTES,
) -> int:
    """Shard `model` over `mesh` in place, in units of neighbouring blocks; on one rank leave it untouched.

    Make the optimizer afterwards: sharding replaces the parameters.

    Args:
        model: the model, with its precision tiers installed already.
        blocks: parts of `model` in forward order, none inside another.
        mesh: one-dimensional mesh over the ranks, or None for one rank.
        methods: of the model, beside `forward`, that are called for a forward pass.
        min_unit_bytes: neighbouring blocks share a unit until it holds this many bytes of parameters; what is
            left over, and all that is in no block, belongs to the root unit.

    Returns:
        Number of units, the root's included; 0 where nothing was sharded.

    Raises:
        ValueError: the mesh has more than one dimension.
    """
    if mesh is None or mesh.size() == 1:
        return 0
    if mesh.ndim != 1:
        raise ValueError(f"mesh has {mesh.ndim} dimensions; allowed: 1; pass the sub-mesh over the data ranks")
    num_units = shard_over(model, blocks, mesh, min_unit_bytes)
    for method in methods:
        register_fsdp_forward_method(model, method)
    return num_units


def shard_over(
    model: nn.Module, blocks: Sequence[nn.Module], mesh: DeviceMesh, min_unit_bytes: int = DEFAULT_MIN_UNIT_BYTES
) -> int:
    """`shard` over a mesh of any size, one rank too; number of units."""
    units = group_blocks([_parameter_bytes(block) for block in blocks], min_unit_bytes)
    policy = MixedPrecisionPolicy()
    for start, stop in units:
        fully_shard(list(blocks[start:stop]), mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    return len(units) + 1


def group_blocks(block_bytes: Sequence[int], min_unit_bytes: int) -> list[tuple[int, int]]:
    """Neighbouring blocks as [start, stop) ranges of at least `min_unit_bytes` each; a short rest is in no range.

    One range over all blocks would only stand beside the root unit and hide nothing, so it is dropped too.
    """
    units, start, held = [], 0, 0
    for index, size in enumerate(block_bytes):
        held += size
        if held >= min_unit_bytes:
            units.append((start, index + 1))
            start, held = index + 1, 0
    return [] if units == [(0, len(block_bytes))] else units


def _parameter_bytes(module: nn.Module) -> int:
    """Bytes of all parameters of `module`."""
    return sum(p.numel() * p.element_size() for p in module.parameters())


def set_gradient_sync(model: nn.Module, is_last: bool) -> None:
    """Whether the next backward pass reduces gradients over the ranks: only the last micro-batch of a step needs it.

    Does nothing to a model that is not sharded. Until the last micro-batch FSDP2 keeps unsharded gradients.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(is_last)
        model.set_is_last_backward(is_last)


def local_grads(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    """The part of every gradient that this rank holds, in that order; a rank's part may be empty."""
    return [local_part(param.grad) for param in parameters if param.grad is not None]


def local_part(tensor: Tensor) -> Tensor:
    """The part of `tensor` that lives on this rank."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def sum_sq(tensors: Iterable[Tensor], group: dist.ProcessGroup | None) -> Tensor:
    """Sum of squares over all local `tensors` and, with a `group`, over its ranks; a scalar on the tensors' device.

    With a group the tensors must be disjoint shards: what every rank holds whole would be counted once per rank.
    """
    total: Tensor = torch.nn.utils.get_total_norm(list(tensors)).square()
    if group is not None:
        dist.all_reduce(total, group=group)
    return total


def clip_and_norm(parameters: Iterable[nn.Parameter], max_norm: float | None, max_value: float | None = None) -> Tensor:
    """The norm of the whole gradient over all ranks, before it is clipped.

    Each element is clipped to `max_value` in size and then the whole to the norm `max_norm`; None: not.

    A plain scalar on the parameters' device, the same on every rank; nothing waits for the device until it is read.
    Sharded gradients are clipped as the plain tensors that each rank holds, after one sum over the ranks: through
    DTensor most of the time goes into dispatch, tensor by tensor.
    """
    params = [param for param in parameters if param.grad is not None]
    mesh = _mesh_of(params)
    grads = local_grads(params)
    group = None if mesh is None else mesh.get_group()
    if mesh is None and max_norm is not None and max_value is None:
        return torch.nn.utils.clip_grad_norm_(params, max_norm)
    norm = torch.nn.utils.get_total_norm(grads) if group is None else sum_sq(grads, group).sqrt()
    clipped = norm
    if max_value is not None:
        for grad in grads:
            grad.clamp_(-max_value, max_value)
        clipped = sum_sq(grads, group).sqrt()
    if max_norm is not None:
        # The rule of torch.nn.utils.clip_grad_norm_; no branch, so that nobody has to wait for the number.
        factor = torch.clamp(max_norm / (clipped + 1e-6), max=1.0)
        for grad in grads:
            grad.mul_(factor)
    return norm


def _mesh_of(params: Sequence[nn.Parameter]) -> DeviceMesh | None:
    """The mesh over which `params` are sharded, None where they are not."""
    first = next((param.data for param in params), None)
    return first.device_mesh if isinstance(first, DTensor) else None


def full_named_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter by name, whole and detached; gathers over the ranks, so every rank must exhaust it."""
    for name, param in model.named_parameters():
        whole = param.detach()
        yield name, whole.full_tensor() if isinstance(whole, DTensor) else whole
