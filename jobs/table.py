"""The jobs that exist and the parameters each of them takes, without torch.

Knows names, types, defaults and ranges; deliberately not the classes, which import torch (`jobs.classes` has them).
Read by the run-file checker, by `build_job` and by the policies' set-up; a test compares it with the classes.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Literal

ParamValue = int | float | str | None


class ParamKind(StrEnum):
    """The type of a parameter as a word for people."""

    INT = "int"
    FLOAT = "float"
    TEXT = "str"


@dataclass(frozen=True, slots=True, kw_only=True)
class Param:
    """One parameter of a job.

    Attributes:
        name: the keyword argument of the class.
        kind: its type; an int is also accepted where a float is asked for.
        default: value when it is not given. A default of None also allows None.
        description: one sentence, with the unit.
        minimum: smallest allowed value, an int for kind int; None for kinds without an order.
        maximum: largest allowed value, likewise.
    """

    name: str
    kind: ParamKind
    default: ParamValue
    description: str
    minimum: float | None = None
    maximum: float | None = None
    changes_speed: bool = True

    @property
    def allowed(self) -> str:
        """The allowed values in words."""
        words = str(self.kind)
        if self.minimum is not None and self.maximum is not None:
            # Large whole numbers would otherwise be rounded: 1.09951e+12.
            form = "g" if self.kind is ParamKind.FLOAT else "d"
            words += f" from {self.minimum:{form}} to {self.maximum:{form}}"
        return f"{words}, or null" if self.default is None else words

    def check(self, value: object) -> ParamValue:
        """The value in the parameter's own type.

        Raises:
            ValueError: wrong type or out of range; the message does not name the job.
        """
        if value is None and self.default is None:
            return None
        if isinstance(value, bool) or not isinstance(value, _ACCEPTED[self.kind]):
            raise ValueError(f"{self.name}={value!r} has type {type(value).__name__}; allowed: {self.allowed}")
        if isinstance(value, str):
            return value
        if self.minimum is not None and self.maximum is not None and not self.minimum <= value <= self.maximum:
            raise ValueError(f"{self.name}={value!r} is out of range; allowed: {self.allowed}")
        return float(value) if self.kind is ParamKind.FLOAT else int(value)


_ACCEPTED: dict[ParamKind, tuple[type[int] | type[float] | type[str], ...]] = {
    ParamKind.INT: (int,),
    ParamKind.FLOAT: (int, float),
    ParamKind.TEXT: (str,),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class JobInfo:
    """What the outside must know of a job without importing it.

    Attributes:
        learning_rate_rule: 'sqrt' (Adam family) or 'linear' (SGD), applied when the global batch changes.
        metric: name of the validation metric.
        mode: 'min' or 'max'.
        summary: one sentence for lists.
        params: what the class takes, in the order of its signature.
        divisible: pairs (a, b) of int parameters where `a` must be a multiple of `b`.
    """

    learning_rate_rule: Literal["sqrt", "linear"]
    metric: str
    mode: Literal["min", "max"]
    summary: str = ""
    params: tuple[Param, ...] = ()
    divisible: tuple[tuple[str, str], ...] = ()

    def param(self, name: str) -> Param | None:
        """The parameter of that name, None where there is none."""
        return next((param for param in self.params if param.name == name), None)


def _int(name: str, default: int | None, minimum: int, maximum: int, description: str) -> Param:
    kind = ParamKind.INT
    return Param(name=name, kind=kind, default=default, minimum=minimum, maximum=maximum, description=description)


def _float(name: str, default: float, minimum: float, maximum: float, description: str) -> Param:
    kind = ParamKind.FLOAT
    return Param(name=name, kind=kind, default=default, minimum=minimum, maximum=maximum, description=description)


def _speed_free(param: Param) -> Param:
    """The same parameter, known to leave the time of a step as it is."""
    return replace(param, changes_speed=False)


JOB_INFO: dict[str, JobInfo] = {
    "language": JobInfo(
        learning_rate_rule="sqrt",
        metric="val_loss",
        mode="min",
        summary="byte-level GPT on the Python standard library's own source files",
        params=(
            _int("width", 64, 1, 16384, "features per token"),
            _int("layers", 2, 1, 256, "transformer blocks"),
            _int("heads", 4, 1, 256, "attention heads per block; width must be a multiple of it"),
            _int("context", 64, 1, 8192, "bytes the model sees at once; a sample is one window of them"),
            _float("dropout", 0.0, 0.0, 0.95, "probability of dropping an activation in training"),
            _speed_free(_float("lr", 1e-3, 1e-9, 10.0, "learning rate of AdamW at the start global batch")),
            _speed_free(_float("weight_decay", 0.1, 0.0, 10.0, "decoupled weight decay of the matrices")),
            _speed_free(_float("beta1", 0.9, 0.0, 0.99999, "AdamW's decay of the mean gradient")),
            _speed_free(_float("beta2", 0.95, 0.0, 0.99999, "AdamW's decay of the mean squared gradient")),
            _speed_free(_int("eval_windows", 256, 1, 1_000_000, "held-out windows at most per evaluation")),
            _speed_free(_int("max_bytes", None, 1, 1 << 40, "training text to use at most, in bytes; null for all")),
            Param(
                name="data_dir",
                kind=ParamKind.TEXT,
                default=None,
                description="folder whose *.py files are read in place of the standard library's",
                changes_speed=False,
            ),
        ),
        divisible=(("width", "heads"),),
    ),
    "mlp": JobInfo(
        learning_rate_rule="linear",
        metric="val_loss",
        mode="min",
        summary="multi-layer perceptron on synthetic classes, the smallest job, for tests",
        params=(
            _int("width", 32, 1, 65536, "features per hidden layer"),
            _int("depth", 2, 1, 256, "hidden layers"),
            _speed_free(_float("lr", 0.05, 1e-9, 10.0, "learning rate of SGD at the start global batch")),
            _speed_free(_int("num_samples", 4096, 1, 10_000_000, "training samples to make")),
            _speed_free(_int("seed", 0, 0, (1 << 63) - 1, "seed of the synthetic data; the model's start is torch's")),
        ),
    ),
}


def did_you_mean(word: str, allowed: Iterable[str]) -> str:
    """' Did you mean ...?' with the closest allowed word, or nothing where none is close."""
    close = difflib.get_close_matches(word, list(allowed), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def job_info(job: str) -> JobInfo:
    """The table row of a job.

    Raises:
        ValueError: there is no job of that name.
    """
    if job not in JOB_INFO:
        raise ValueError(f"job {job!r} does not exist; allowed: {', '.join(JOB_INFO)}.{did_you_mean(job, JOB_INFO)}")
    return JOB_INFO[job]


def check_param(job: str, name: str, value: object) -> ParamValue:
    """One value for one parameter, in the parameter's own type; a search space is checked value by value.

    Raises:
        ValueError: unknown job or parameter, wrong type, or out of range.
    """
    info = job_info(job)
    param = info.param(name)
    if param is None:
        names = [known.name for known in info.params]
        allowed = ", ".join(names)
        raise ValueError(f"job {job} has no parameter {name!r}; allowed: {allowed}.{did_you_mean(str(name), names)}")
    try:
        return param.check(value)
    except ValueError as error:
        raise ValueError(f"job {job}: {error}; it means: {param.description}") from None


def complete_params(job: str, params: Mapping[str, object]) -> dict[str, ParamValue]:
    """Every parameter of a job: those given, checked, and the defaults of the others.

    Raises:
        ValueError: unknown job or parameter, wrong type, out of range, or values that do not go together.
    """
    info = job_info(job)
    complete = {param.name: param.default for param in info.params}
    complete.update({name: check_param(job, name, value) for name, value in params.items()})
    for multiple, divisor in info.divisible:
        number, by = complete[multiple], complete[divisor]
        if isinstance(number, int) and isinstance(by, int) and number % by:
            nearest = f"{number - number % by} and {number - number % by + by}" if number > by else f"{by}"
            raise ValueError(
                f"job {job}: {multiple}={number} is not a multiple of {divisor}={by}; nearest that is: {nearest}"
            )
    return complete
