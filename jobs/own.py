"""Users' own trainings, named by import path: `package.module:name`, a function or a class.

Loads the object, says which kind of training it is, and reads its parameters from its signature. Knows nothing of how
it is run. Called by `job_info` and `build_job` for every name with a colon, in the driver and in the workers.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import pickle
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from orchestrator.jobs.job_key import JobKey
from orchestrator.jobs.param import JobInfo, Param, ParamKind, did_you_mean
from orchestrator.jobs.parts import is_training, missing_parts

PICKLE_SUFFIX = ".pkl"
"""A module part that ends so is a file that holds the function itself, as `orchestrator.run` ships a lambda."""

_SPEED_FREE = ("lr", "learning_rate", "weight_decay", "wd", "momentum", "beta", "eps", "dropout", "seed", "gamma")
_SPEED_FREE_PARTS = ("warmup", "clip", "smoothing", "decay", "_lr", "lr_", "dropout")
"""Names of parameters that leave the time of a step as it is, by custom. Trials that differ in others do not share what
is learnt of their speed."""

Kind = Literal["function", "training", "lightning", "huggingface"]


class UserCodeError(ValueError):
    """A user's training cannot be loaded or built.

    Attributes:
        details: the traceback of their code, where it raised; empty otherwise.
    """

    def __init__(self, text: str, details: str = "") -> None:
        super().__init__(text, details)
        self.text, self.details = text, details

    def __str__(self) -> str:
        return f"{self.text}\n{self.details}" if self.details else self.text


def is_own(job: str) -> bool:
    """Whether the name of a job is an import path and not a row of the table."""
    return ":" in job


@contextmanager
def import_paths(paths: Sequence[str]) -> Iterator[None]:
    """Look for modules in these directories first, meanwhile."""
    before = list(sys.path)
    sys.path[:0] = [path for path in paths if path not in before]
    try:
        yield
    finally:
        sys.path[:] = before


def add_import_paths(paths: Sequence[str]) -> None:
    """Look for modules in these directories first, from now on."""
    sys.path[:0] = [path for path in paths if path not in sys.path]


def load(job: str) -> Callable[..., Any]:
    """The function or class of an import path.

    Raises:
        UserCodeError: it is not there, cannot be called, or its module raises when it is imported.
    """
    path = JobKey.of(job).path
    found: Callable[..., Any] = _loaded(path)
    if not callable(found):
        raise UserCodeError(
            f"{path!r} is {_a(type(found).__name__)}; allowed: a function, or a class with the parts of a training"
        )
    return found


def load_data(path: str) -> Callable[..., Any]:
    """What makes the data at an import path: a function or class that is there, or what returns the object that is.

    Raises:
        UserCodeError: it is not there, or its module raises when it is imported.
    """
    found = _loaded(path)
    return found if callable(found) else lambda: found


@cache
def _loaded(path: str) -> Any:  # noqa: ANN401 - the user's
    module_name, _, name = path.partition(":")
    if not module_name or not name:
        raise UserCodeError(f"{path!r} is no import path; allowed: package.module:name, or a name of the table")
    if module_name.endswith(PICKLE_SUFFIX):
        return _unpickled(module_name, path)
    return _imported(module_name, name, path)


def kind_of(found: Callable[..., Any], key: JobKey) -> Kind:
    """What kind of training it is: a class with the parts of one, a model of a library, or else a function.

    A function that is given data does not train by itself: it returns a model of Hugging Face, or of the kind that the
    run file names.
    """
    if not isinstance(found, type):
        if key.kind in {"lightning", "huggingface"}:
            return key.kind
        return "huggingface" if key.data else "function"
    bases = {f"{base.__module__.partition('.')[0]}.{base.__name__}" for base in found.__mro__}
    if bases & {"lightning.LightningModule", "pytorch_lightning.LightningModule"}:
        return "lightning"
    if "transformers.PreTrainedModel" in bases:
        return "huggingface"
    return "training" if is_training(found) else "function"


@cache
def info_of(job: str) -> JobInfo:
    """What the outside must know of a training named by import path; its parameters are those of its signature.

    Raises:
        UserCodeError: it cannot be loaded, is a class that lacks parts of a training, or is given what it cannot take.
    """
    key = JobKey.of(job)
    found = load(job)
    kind = kind_of(found, key)
    if kind in {"lightning", "huggingface"}:
        from orchestrator.jobs.ready_made import info_of_model

        return info_of_model(key, kind)
    for part, given in (("data", key.data), ("args", key.args)):
        if given:
            raise UserCodeError(
                f"{key.path!r} is a {kind} and takes no job.{part}; allowed: job.params, or the class of a Lightning or"
                " Hugging Face model as job.name"
            )
    missing = list(missing_parts(found)) if kind == "training" and isinstance(found, type) else []
    if missing:
        raise UserCodeError(f"{key.path!r} has no {'; no '.join(missing)}; a training needs each of these")
    signature = signature_of(found, key.path)
    takes_config = kind == "function" and list(signature.parameters) == ["config"]
    rule: Literal["sqrt", "linear"] = "linear" if getattr(found, "learning_rate_rule", "") == "linear" else "sqrt"
    return JobInfo(
        learning_rate_rule=rule,
        metric=_metric(found) if kind == "training" else "",
        mode="max" if getattr(found, "mode", "min") == "max" else "min",
        summary=(inspect.getdoc(found) or "").partition("\n")[0],
        params=() if takes_config else tuple(params_of(found, key.path)),
        kind=kind,
        takes_any=takes_config or takes_any(signature),
        takes_config=takes_config,
        samples_per_report=_samples_per_report(found, key.path) if kind == "training" else None,
    )


def _metric(found: object) -> str:
    """The metric that a class declares; the mean held-out loss where it does not evaluate by itself."""
    return str(getattr(found, "metric", "") or ("" if hasattr(found, "evaluate") else "val_loss"))


def _samples_per_report(found: object, job: str) -> int | None:
    """Samples between two reports as a class declares them, such as those of an epoch."""
    value = getattr(found, "samples_per_report", None)
    if value is None or isinstance(value, property):
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserCodeError(f"{job!r} has samples_per_report = {value!r}; allowed: a whole number >= 1")
    return value


def call_function(job: str, params: Mapping[str, object]) -> object:
    """Call a user's training function with its parameters: as one dict where it asks for `config`, else by keyword."""
    found, info = load(job), info_of(job)
    return found(dict(params)) if info.takes_config else found(**params)


def changes_speed(name: str) -> bool:
    """Whether a parameter of that name may change the time of a step, by its name alone."""
    word = name.lower()
    return word not in _SPEED_FREE and not any(part in word for part in _SPEED_FREE_PARTS)


def tail_of(error: BaseException) -> str:
    """The traceback of an error, from the first frame on that is not of this package: their own, where they erred."""
    frames: TracebackType | None = error.__traceback__
    while frames is not None and _is_ours(frames.tb_frame.f_code.co_filename):
        frames = frames.tb_next
    if frames is None:  # an error of ours
        frames = error.__traceback__
    return "".join(traceback.format_exception(type(error), error, frames)).rstrip()


def digest_of(path: Path) -> str:
    """SHA-256 of a shipped function."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


_PACKAGE = str(Path(__file__).parents[1])


def _is_ours(filename: str) -> bool:
    return filename.startswith((_PACKAGE, "<frozen")) or filename == importlib.__file__


def _imported(module_name: str, name: str, job: str) -> object:
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if module_name == missing or module_name.startswith(f"{missing}."):
            raise UserCodeError(
                f"{job!r}: there is no module {missing!r}; allowed: a module in the working directory, beside the run"
                " file, in job.import_paths, or installed"
            ) from None
        raise UserCodeError(f"importing {module_name!r} failed: {error}", tail_of(error)) from None
    except (Exception, SystemExit) as error:
        text = f"importing {module_name!r} failed: {type(error).__name__}: {error}"
        raise UserCodeError(text, tail_of(error)) from None
    found: object = module
    for part in name.split("."):
        if not hasattr(found, part):
            names = [each for each, value in vars(module).items() if callable(value) and not each.startswith("_")]
            raise UserCodeError(f"module {module_name!r} has no {name!r}.{did_you_mean(name, names)}")
        found = getattr(found, part)
    return found


def _unpickled(file_name: str, job: str) -> object:
    """The function in a file of the run directory; Ray's cloudpickle wrote it, plain pickle reads it."""
    path = next((Path(each) / file_name for each in sys.path if (Path(each) / file_name).is_file()), None)
    if path is None:
        raise UserCodeError(f"{job!r}: there is no file {file_name!r} in the run directory; it holds the function")
    try:
        found: object = pickle.loads(path.read_bytes())
        return found
    except Exception as error:
        text = f"the function in {path} cannot be loaded: {type(error).__name__}: {error}"
        raise UserCodeError(text, tail_of(error)) from None


def takes_any(signature: inspect.Signature) -> bool:
    """Whether a callable takes parameters beyond those that it names."""
    return any(p.kind is inspect.Parameter.VAR_KEYWORD for p in signature.parameters.values())


def signature_of(found: Callable[..., Any], job: str) -> inspect.Signature:
    """The parameters of a callable.

    Raises:
        UserCodeError: they cannot be read.
    """
    try:
        return inspect.signature(found)
    except (TypeError, ValueError) as error:
        raise UserCodeError(f"the parameters of {job!r} cannot be read ({error}); write it in Python") from None


def params_of(found: Callable[..., Any], job: str) -> Iterator[Param]:
    """A parameter of the job for each parameter of a callable that can be given by name."""
    signature = signature_of(found, job)
    target = vars(found).get("__init__", found) if isinstance(found, type) else found
    try:
        hints = get_type_hints(target)
    except Exception:  # annotations may name what only a type checker imports
        hints = {}
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    for name, parameter in signature.parameters.items():
        if parameter.kind not in named:
            continue
        is_required = parameter.default is inspect.Parameter.empty
        default = None if is_required else parameter.default
        yield Param(
            name=name,
            kind=_kind(hints.get(name), default),
            default=default,
            description="",
            changes_speed=changes_speed(name),
            is_required=is_required,
            allows_null=(default is None and not is_required) or type(None) in get_args(hints.get(name)),
        )


_KINDS: dict[type, ParamKind] = {
    bool: ParamKind.BOOL,
    int: ParamKind.INT,
    float: ParamKind.FLOAT,
    str: ParamKind.TEXT,
}


def _kind(hint: object, default: object) -> ParamKind:
    """The kind of a parameter by its annotation; without one by its default; any value where neither says."""
    if hint is not None:
        options = (
            [each for each in get_args(hint) if each is not type(None)] if get_origin(hint) is not None else [hint]
        )
        known = [_KINDS[each] for each in options if each in _KINDS]
        return known[0] if len(known) == 1 and len(options) == 1 else ParamKind.ANY
    # A default of 1 may well mean any number, so only what cannot be mistaken is taken as a type.
    return _KINDS[type(default)] if type(default) in {bool, str} else ParamKind.ANY


def _a(word: str) -> str:
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"
