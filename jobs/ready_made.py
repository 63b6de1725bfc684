"""Declared trainings made of a library's model: what Lightning and Hugging Face have in common; no torch.

`job.name` leads to the model, `job.data` to its data, and `job.args` holds what the library's own trainer would be
given. Parameters of a trial are those that model, data and arguments take, each by its name. Knows nothing of how a
model is trained: see `lightning_model` and `huggingface_model`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Literal

from orchestrator.jobs.job_key import JobKey
from orchestrator.jobs.own import UserCodeError, load, load_data, params_of, signature_of, takes_any
from orchestrator.jobs.param import JobInfo, Param, ParamKind, did_you_mean

FUNCTION_ROUTE = "name a function of yours that makes the library's trainer and calls it, which runs unchanged"


def _arg(name: str, kind: ParamKind, default: object, what: str, *, changes_speed: bool = False) -> Param:
    return Param(name=name, kind=kind, default=default, description=what, changes_speed=changes_speed)


_FLOAT, _INT, _TEXT = ParamKind.FLOAT, ParamKind.INT, ParamKind.TEXT

LIGHTNING_ARGS = (
    _arg("gradient_clip_val", _FLOAT, None, "gradients are clipped to it"),
    _arg("gradient_clip_algorithm", _TEXT, "norm", "norm or value"),
    _arg("accumulate_grad_batches", _INT, 1, "micro-batches per step"),
    _arg("max_epochs", _INT, None, "epochs of a trial"),
)
HUGGINGFACE_ARGS = (
    _arg("learning_rate", _FLOAT, 5e-5, "of the optimizer, before its schedule"),
    _arg("weight_decay", _FLOAT, 0.0, "of all parameters but biases and norms"),
    _arg("adam_beta1", _FLOAT, 0.9, "of the Adam family"),
    _arg("adam_beta2", _FLOAT, 0.999, "of the Adam family"),
    _arg("adam_epsilon", _FLOAT, 1e-8, "of the Adam family"),
    _arg("optim", _TEXT, None, "name of the optimizer; null: the library's default", changes_speed=True),
    _arg("optim_args", _TEXT, None, "more arguments of the optimizer, as name=value,name=value"),
    _arg("lr_scheduler_type", _TEXT, "linear", "name of the schedule"),
    _arg("lr_scheduler_kwargs", ParamKind.ANY, None, "more arguments of the schedule"),
    _arg("warmup_steps", _FLOAT, 0.0, "steps over which the rate rises from zero; below 1: a part of all steps"),
    _arg("max_grad_norm", _FLOAT, 1.0, "gradients are clipped to this norm; 0: not"),
    _arg("num_train_epochs", _INT, 3, "epochs of a trial"),
    _arg("per_device_train_batch_size", _INT, 8, "samples per rank per forward"),
    _arg("per_device_eval_batch_size", _INT, 8, "samples per forward of an evaluation"),
    _arg("gradient_accumulation_steps", _INT, 1, "micro-batches per step"),
)
_TRIAL_FIELDS = {
    "accumulate_grad_batches": "grad_accum",
    "gradient_accumulation_steps": "grad_accum",
    "per_device_train_batch_size": "micro_batch",
}
"""Arguments that say what the section `trial` of the run file says as well, which is what counts."""
_EPOCHS = ("max_epochs", "num_train_epochs")
_REFUSED = {
    "max_steps": "a trial lasts trial.max_reports reports, or a number of epochs",
    "eval_steps": "trial.samples_per_report or trial.epochs_per_report says when it is evaluated",
    "eval_strategy": "trial.samples_per_report or trial.epochs_per_report says when it is evaluated",
    "fp16": "dials.precision says in what a trial computes",
    "bf16": "dials.precision says in what a trial computes",
    "precision": "dials.precision says in what a trial computes",
    "seed": "seed of the run file is that of all trials",
    "output_dir": "a trial's checkpoints are in the run directory",
    "devices": "trial.num_workers says how many ranks a trial has",
}


def info_of_model(key: JobKey, kind: Literal["lightning", "huggingface"]) -> JobInfo:
    """What the outside must know of a library's model as a training.

    Raises:
        UserCodeError: model or data cannot be loaded, or an argument is not known or of the wrong kind.
    """
    is_huggingface = kind == "huggingface"
    known = HUGGINGFACE_ARGS if is_huggingface else LIGHTNING_ARGS
    args = {param.name: param.default for param in known} | _checked(key, known)
    found = maker_of(key)
    params: dict[str, Param] = {}
    for maker, path in ((found, key.path), (None if key.data is None else load_data(key.data), key.data or "")):
        if maker is not None:
            for param in params_of(maker, path):
                params.setdefault(param.name, param)
    for param in known:
        if param.name not in (*_TRIAL_FIELDS, *_EPOCHS):
            arg = _arg(param.name, param.kind, args[param.name], param.description, changes_speed=param.changes_speed)
            params.setdefault(param.name, arg)
    epochs = next(args[name] for name in _EPOCHS if name in args)
    return JobInfo(
        learning_rate_rule="sqrt",
        metric="eval_loss" if is_huggingface else "",
        mode="min",
        summary=(inspect.getdoc(load(key.path)) or "").partition("\n")[0],
        params=tuple(params.values()),
        kind=kind,
        takes_any=takes_any(signature_of(found, key.path)),
        start={field: args[name] for name, field in _TRIAL_FIELDS.items() if name in args},
        num_epochs=epochs,
        reports_epochs=True,
        given={name: field for name, field in _TRIAL_FIELDS.items() if name in key.args},
    )


def maker_of(key: JobKey) -> Callable[..., Any]:
    """What makes the model; of a model class of Hugging Face, which is built from a configuration, that of its own."""
    found = load(key.path)
    config_class = getattr(found, "config_class", None)
    return config_class if isinstance(found, type) and callable(config_class) else found


def taken(maker: Callable[..., Any], path: str, params: Mapping[str, Any], others: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters that a callable takes: by name, and where it takes any those that are not for others."""
    signature = signature_of(maker, path)
    names = signature.parameters
    takes_more = takes_any(signature)
    return {name: value for name, value in params.items() if name in names or (takes_more and name not in others)}


def split(returned: Any, path: str) -> tuple[Any, Any, Mapping[str, Any]]:  # noqa: ANN401 - the user's
    """What `job.data` returned as data to train on, data to evaluate on (None for none), and whatever else it named.

    Raises:
        UserCodeError: it returned nothing to train on.
    """
    if isinstance(returned, tuple) and len(returned) == 2:
        return returned[0], returned[1], {}
    if not isinstance(returned, Mapping):
        return returned, None, {}
    parts = {str(name): value for name, value in returned.items()}
    train = parts.pop("train", None)
    held_out = [parts.pop(name, None) for name in ("eval", "validation", "val", "test")]
    if train is None:
        raise UserCodeError(
            f"{path} returned {', '.join(map(str, returned)) or 'nothing'}; allowed: data to train on, a pair of those"
            " to train on and to evaluate on, or a dict with train and eval"
        )
    return train, next((data for data in held_out if data is not None), None), parts


def _checked(key: JobKey, known: tuple[Param, ...]) -> dict[str, Any]:
    """The arguments of the run file in their own types.

    Raises:
        UserCodeError: one is not known here, or of the wrong kind.
    """
    checked: dict[str, Any] = {}
    names = [param.name for param in known]
    for name, given in key.args.items():
        param = next((each for each in known if each.name == name), None)
        if param is None:
            why = f"; {_REFUSED[name]}" if name in _REFUSED else did_you_mean(name, names)
            raise UserCodeError(
                f"job.args.{name} is not known{why}; allowed: {', '.join(names)}; for anything else {FUNCTION_ROUTE}"
            )
        is_whole = param.kind is ParamKind.INT and isinstance(given, float) and given.is_integer()
        value = int(given) if is_whole else given
        try:
            checked[name] = param.check(value)
        except ValueError as error:
            raise UserCodeError(f"job.args.{error}") from None
        if name in (*_TRIAL_FIELDS, *_EPOCHS, "per_device_eval_batch_size") and (checked[name] or 0) < 1:
            raise UserCodeError(f"job.args.{name} is {value!r}; allowed: a whole number >= 1")
    return checked
