"""Model, optimizer and generators as flat, named tensors that mean the same for every number of ranks.

Tensors are named after the model's parameters (`model.<name>`, `optimizer.<name>.<key>`), never by rank or position;
everything that is no tensor goes into a JSON-able description. So torch's distributed checkpoint sees tensors only:
it neither pickles values nor has to step the optimizer to find out what its state looks like.
Knows no files and no ranks; called by `checkpoint`.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from orchestrator.errors import CheckpointError
from orchestrator.train.fsdp import local_part
from orchestrator.train.optimizers import has_plain_state, name_of

# How a step is computed, not what: a fused optimizer of one rank must not fuse the sharded one that takes over.
_IMPLEMENTATION_OPTIONS = frozenset({"params", "fused", "foreach", "capturable", "differentiable"})
_MAX_NAMES_SHOWN = 5


def flatten(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of both by name (sharing memory with them), and the JSON-able description of the rest.

    Raises:
        CheckpointError: state that is neither tensor nor JSON, or a parameter of the optimizer that is not the model's.
    """
    tensors = _model_tensors(model)
    described: dict[str, Any] = {"model": {name: _facts(tensor) for name, tensor in tensors.items()}}
    state: dict[str, dict[str, Any]] = {}
    values: dict[str, dict[str, Any]] = {}
    for name, key, value in _optimizer_state(model, optimizer):
        if isinstance(value, Tensor):
            tensors[f"optimizer.{name}.{key}"] = value
            state.setdefault(name, {})[key] = _facts(value)
        else:
            values.setdefault(name, {})[key] = value
    described["optimizer"] = {
        "class": name_of(optimizer),
        "groups": _groups(model, optimizer),
        "state": state,
        "values": values,
    }
    return tensors, described


def first_non_finite(model: nn.Module) -> str | None:
    """Name of the first parameter whose local part holds a NaN or an infinity, or None."""
    named = [(name, param.detach()) for name, param in model.named_parameters() if param.is_floating_point()]
    if not named:
        return None
    # One answer for all parameters: on an accelerator each would be a wait of its own.
    finite = [torch.isfinite(local_part(param)).all() for _, param in named]
    flags = torch.stack(finite).tolist()
    return next((name for (name, _), is_finite in zip(named, flags, strict=True) if not is_finite), None)


def targets(
    model: nn.Module, optimizer: torch.optim.Optimizer, described: dict[str, Any]
) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """Where to load a checkpoint of that description: the model's own tensors, and new ones for the optimizer's state.

    Returns:
        All tensors by name, and the optimizer's new state by parameter name.

    Raises:
        CheckpointError: the checkpoint does not fit this model or optimizer.
    """
    tensors = _model_tensors(model)
    _check_model(tensors, described["model"])
    saved = described["optimizer"]
    _check_optimizer(model, optimizer, saved)
    state: dict[str, dict[str, Any]] = {name: dict(values) for name, values in saved["values"].items()}
    params = dict(model.named_parameters())
    for name, keys in saved["state"].items():
        for key, (shape, dtype_name) in keys.items():
            dtype = getattr(torch, dtype_name)
            like = params[name].detach()
            if tuple(shape) == tuple(like.shape):
                new = torch.zeros_like(like, dtype=dtype)
            else:
                new = torch.zeros(shape, dtype=dtype)
            tensors[f"optimizer.{name}.{key}"] = new
            state.setdefault(name, {})[key] = new
    return tensors, state


def load_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, dict[str, Any]], described: dict[str, Any]
) -> None:
    """Give `optimizer` that state and the saved options (rates, decays), keeping how it is implemented."""
    live = optimizer.state_dict()
    names = _parameter_names(model)
    index_of: dict[str, int] = {}
    for group, packed in zip(optimizer.param_groups, live["param_groups"], strict=True):
        index_of |= {names[id(param)]: index for param, index in zip(group["params"], packed["params"], strict=True)}
    options_before = [dict(group) for group in optimizer.param_groups]
    optimizer.load_state_dict(
        {"state": {index_of[name]: values for name, values in state.items()}, "param_groups": live["param_groups"]}
    )
    saved_groups = described["optimizer"]["groups"]
    for group, before, saved in zip(optimizer.param_groups, options_before, saved_groups, strict=True):
        for option, value in saved["options"].items():
            held = before.get(option)
            if isinstance(held, Tensor):
                # `load_state_dict` puts a copy in its place, but a captured graph reads the tensor it knows.
                held.fill_(value)
                group[option] = held
            else:
                group[option] = tuple(value) if isinstance(value, list) else value


def capture_generators() -> dict[str, Any]:
    """State of this process's generators, in types that `torch.load(weights_only=True)` reads."""
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": (str(name), torch.from_numpy(np.array(keys)), int(position), int(has_gauss), float(cached)),
    }
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_generators(state: dict[str, Any]) -> None:
    """Set this process's generators to a state from `capture_generators`."""
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy(), position, has_gauss, cached))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _facts(tensor: Tensor) -> list[Any]:
    """Global shape and dtype, for the description."""
    return [list(tensor.shape), str(tensor.dtype).removeprefix("torch.")]


def _model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by `model.<name>`."""
    tensors = {}
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            raise CheckpointError(
                f"state {name!r} of the model is a {type(value).__name__}; allowed: tensors; make it a buffer"
            )
        tensors[f"model.{name}"] = value.detach()
    return tensors


def _parameter_names(model: nn.Module) -> dict[int, str]:
    return {id(param): name for name, param in model.named_parameters()}


def _groups(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Parameter names and options of every group."""
    names = _parameter_names(model)
    described = []
    for number, group in enumerate(optimizer.param_groups):
        strangers = sum(id(param) not in names for param in group["params"])
        if strangers:
            raise CheckpointError(
                f"{strangers} parameters in optimizer group {number} are not the model's; allowed: parameters of the "
                "model given; make the optimizer after sharding, and checkpoint between steps only"
            )
        options = {k: _plain(v) for k, v in group.items() if k not in _IMPLEMENTATION_OPTIONS}
        described.append({"params": [names[id(param)] for param in group["params"]], "options": options})
    return described


def _plain(value: object) -> object:
    """A one-element tensor as a number, a tuple as a list; anything else as it is."""
    if isinstance(value, Tensor):
        return value.item()
    return list(value) if isinstance(value, tuple) else value


def _optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, str, Any]]:
    """(parameter name, key, value) of all optimizer state, in the order of the groups.

    None where it is more than tensors and plain values, as that of LBFGS is: then it is kept whole, as an object.
    """
    names = _parameter_names(model)
    if not has_plain_state(optimizer):
        return
    for group in optimizer.param_groups:
        for param in group["params"]:
            for key, value in optimizer.state.get(param, {}).items():
                if id(param) in names:
                    yield names[id(param)], key, value


def _check_model(tensors: dict[str, Tensor], saved: dict[str, list[Any]]) -> None:
    """Refuse a checkpoint whose names, shapes or dtypes are not the model's."""
    live = {name: _facts(tensor) for name, tensor in tensors.items()}
    if live == saved:
        return
    wrong = sorted(name for name in live.keys() | saved.keys() if live.get(name) != saved.get(name))
    shown = "; ".join(f"{n}: checkpoint {saved.get(n)}, model {live.get(n)}" for n in wrong[:_MAX_NAMES_SHOWN])
    raise CheckpointError(
        f"the checkpoint does not fit the model in {len(wrong)} tensors ({shown}); allowed: the same names, shapes and "
        "dtypes; build the model with the parameters it was saved with"
    )


def _check_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Refuse state of another kind of optimizer or of other parameter groups."""
    if saved["class"] != name_of(optimizer):
        raise CheckpointError(
            f"the checkpoint holds state of {saved['class']}, the trial uses {name_of(optimizer)}; "
            "allowed: the same optimizer; start the trial afresh to change it"
        )
    live = [group["params"] for group in _groups(model, optimizer)]
    kept = [group["params"] for group in saved["groups"]]
    if live != kept:
        sizes = [len(group) for group in kept], [len(group) for group in live]
        raise CheckpointError(
            f"optimizer groups differ: the checkpoint has {sizes[0]} parameters per group, the trial {sizes[1]}, or in "
            "another order; allowed: the same groups; build the optimizer as it was built before"
        )


def version_of(optimizer: torch.optim.Optimizer) -> int:
    """A number that grows with every change of a weight, and with the first change of optimizer state in a step.

    An optimizer begins each of its groups at one end, so the state of the parameters between need not be looked at.
    """
    total = 0
    for group in optimizer.param_groups:
        params = group["params"]
        total += sum(param._version for param in params)
        for param in (*params[:1], *params[-1:]):
            values = optimizer.state[param].values() if param in optimizer.state else ()
            total += sum(value._version for value in values if isinstance(value, Tensor))
    return total
