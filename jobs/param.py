"""What a parameter of a job is and what it allows, and what the outside must know of a job; no torch.

Knows nothing of any one job: `jobs.table` has the rows.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, Literal

ParamValue = Any
"""Plain data: a number, text, a bool, None, or lists and mappings of these; the table's own jobs take scalars only."""


class ParamKind(StrEnum):
    """The type of a parameter as a word for people."""

    INT = "int"
    FLOAT = "float"
    TEXT = "str"
    BOOL = "bool"
    ANY = "any value"


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
        changes_speed: whether it may change the time of a step.
        choices: the words allowed, for kind str; empty allows any text.
        is_required: whether it must be given, since it has no default.
        allows_null: whether None is allowed although the default is another value.
    """

    name: str
    kind: ParamKind
    default: ParamValue
    description: str
    minimum: float | None = None
    maximum: float | None = None
    changes_speed: bool = True
    choices: tuple[str, ...] = ()
    is_required: bool = False
    allows_null: bool = False

    @property
    def _may_be_null(self) -> bool:
        return self.allows_null or (self.default is None and not self.is_required)

    @property
    def allowed(self) -> str:
        """The allowed values in words."""
        words = f"one of {', '.join(self.choices)}" if self.choices else str(self.kind)
        if self.minimum is not None and self.maximum is not None:
            # Large whole numbers would otherwise be rounded: 1.09951e+12.
            form = "g" if self.kind is ParamKind.FLOAT else "d"
            words += f" from {self.minimum:{form}} to {self.maximum:{form}}"
        return f"{words}, or null" if self._may_be_null else words

    def check(self, value: object) -> ParamValue:
        """The value in the parameter's own type.

        Raises:
            ValueError: wrong type or out of range; the message does not name the job.
        """
        if self.kind is ParamKind.ANY or (value is None and self._may_be_null):
            return value
        if isinstance(value, bool) and self.kind is ParamKind.BOOL:
            return value
        if isinstance(value, bool) or not isinstance(value, _ACCEPTED[self.kind]):
            raise ValueError(f"{self.name}={value!r} has type {type(value).__name__}; allowed: {self.allowed}")
        if isinstance(value, str):
            if self.choices and value not in self.choices:
                hint = did_you_mean(value, self.choices)
                raise ValueError(f"{self.name}={value!r} does not exist; allowed: {self.allowed}.{hint}")
            return value
        if self.minimum is not None and self.maximum is not None and not self.minimum <= value <= self.maximum:
            raise ValueError(f"{self.name}={value!r} is out of range; allowed: {self.allowed}")
        return float(value) if self.kind is ParamKind.FLOAT else int(value)


_ACCEPTED: dict[ParamKind, tuple[type[int] | type[float] | type[str], ...]] = {
    ParamKind.INT: (int,),
    ParamKind.FLOAT: (int, float),
    ParamKind.TEXT: (str,),
    ParamKind.BOOL: (),
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
        libraries: pairs of a word of the parameter `data` and the module that is imported to make it.
        folder_library: the module that reads whatever `data_dir` names; None where that depends on its files.
        kind: a declared training, or a function that trains by itself.
        takes_any: whether it takes parameters beyond `params`.
        takes_config: whether it takes all parameters as one dict named `config`.
        samples_per_report: samples between two reports where the run file says nothing; None where that has a default.
        start: fields of the section `trial` where the run file says nothing: `micro_batch`, `grad_accum`.
        num_epochs: epochs of a whole trial where the run file says nothing; None where that has a default.
        reports_epochs: whether the default unit of reports is an epoch.
        given: fields of the section `trial` that `job.args` says, by the name of the argument.
    """

    learning_rate_rule: Literal["sqrt", "linear"]
    metric: str
    mode: Literal["min", "max"]
    summary: str = ""
    params: tuple[Param, ...] = ()
    divisible: tuple[tuple[str, str], ...] = ()
    libraries: tuple[tuple[str, str], ...] = ()
    folder_library: str | None = None
    kind: Literal["training", "function", "lightning", "huggingface"] = "training"
    takes_any: bool = False
    takes_config: bool = False
    samples_per_report: int | None = None
    start: Mapping[str, int] = field(default_factory=dict)
    num_epochs: int | None = None
    reports_epochs: bool = False
    given: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_function(self) -> bool:
        """Whether it trains by itself, and its steps are only seen from outside."""
        return self.kind == "function"

    def param(self, name: str) -> Param | None:
        """The parameter of that name, None where there is none."""
        return next((param for param in self.params if param.name == name), None)


def int_param(name: str, default: int | None, minimum: int, maximum: int, description: str) -> Param:
    """A whole number from `minimum` to `maximum`."""
    kind = ParamKind.INT
    return Param(name=name, kind=kind, default=default, minimum=minimum, maximum=maximum, description=description)


def float_param(name: str, default: float, minimum: float, maximum: float, description: str) -> Param:
    """A number from `minimum` to `maximum`."""
    kind = ParamKind.FLOAT
    return Param(name=name, kind=kind, default=default, minimum=minimum, maximum=maximum, description=description)


def speed_free(param: Param) -> Param:
    """The same parameter, known to leave the time of a step as it is."""
    return replace(param, changes_speed=False)


def text_param(name: str, default: str | None, description: str) -> Param:
    """Any text; how fast a step is does not depend on it."""
    return Param(name=name, kind=ParamKind.TEXT, default=default, description=description, changes_speed=False)


def choice_param(name: str, choices: tuple[str, ...], description: str) -> Param:
    """One of several words; the first is the default."""
    return Param(name=name, kind=ParamKind.TEXT, default=choices[0], description=description, choices=choices)


def adamw_params(lr: float) -> tuple[Param, ...]:
    """What every job with AdamW lets be set."""
    return (
        speed_free(float_param("lr", lr, 1e-9, 10.0, "learning rate of AdamW at the start global batch")),
        speed_free(float_param("weight_decay", 0.05, 0.0, 10.0, "decoupled weight decay of the matrices")),
    )


def data_params(bundled: tuple[str, ...], what: str, folder: str) -> tuple[Param, ...]:
    """Where a job's data comes from, and what happens to a file that cannot be read."""
    return (
        choice_param("data", bundled, f"{what} when data_dir is null"),
        text_param("data_dir", None, folder),
        *bad_file_and_seed(),
    )


def bad_file_param() -> Param:
    """What happens to a file that cannot be read."""
    return speed_free(
        choice_param("on_bad_file", ("stop", "skip"), "what a file that cannot be read does to the trial")
    )


def bad_file_and_seed() -> tuple[Param, ...]:
    """What happens to a file that cannot be read, and the seed of what is made."""
    return (
        bad_file_param(),
        speed_free(int_param("seed", 0, 0, (1 << 63) - 1, "seed of made data; the model's start is torch's")),
    )


def did_you_mean(word: str, allowed: Iterable[str]) -> str:
    """' Did you mean ...?' with the closest allowed word, or nothing where none is close."""
    close = difflib.get_close_matches(word, list(allowed), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""
