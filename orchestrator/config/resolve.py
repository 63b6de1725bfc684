"""From a run file and `--set` to a configuration that is known to be right, with the origin of each value.

Precedence: `--set` over the file over the default; the environment plays no part. Nothing here starts a process or
writes a file. Called by the command line, and by `resume` with the configuration a run directory holds.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from orchestrator.config.checks import check_all
from orchestrator.config.machine import Machine, check_fit, this_machine
from orchestrator.config.model import RunConfig
from orchestrator.config.overrides import apply_overrides, parse_override
from orchestrator.config.problems import Place, from_pydantic, join
from orchestrator.config.render import to_yaml
from orchestrator.config.search_checks import Finding, missing_params
from orchestrator.config.source import KeyPath, parse, read_text
from orchestrator.config.words import printable
from orchestrator.errors import ConfigError
from orchestrator.host import why_not_here
from orchestrator.jobs.own import PICKLE_SUFFIX, add_import_paths
from orchestrator.jobs.table import job_info
from orchestrator.names import run_directory

DEFAULT = "default"
SET = "--set"


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedRun:
    """A valid configuration.

    Attributes:
        config: the values.
        origins: dotted path of each value -> 'file:line', '--set' or 'default'.
        place: finds the line of a key, for problems found later.
    """

    config: RunConfig
    origins: Mapping[str, str]
    place: Place

    @property
    def run_dir(self) -> Path:
        """Absolute path of the run directory, whether or not it exists."""
        return run_directory(self.config.storage, self.config.name)

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists and scalars that `load_config` would read back."""
        return self.config.model_dump(mode="json")

    def to_yaml(self, *, with_origins: bool = False) -> str:
        """The configuration as a run file, every value written out."""
        return to_yaml(self.to_dict(), self.origins if with_origins else None)


def load_config(path: Path | str, overrides: Sequence[str] = (), *, has_own_search: bool = False) -> ResolvedRun:
    """Read, overlay and check a run file. The machine is not looked at: see `require_fit`.

    Args:
        path: the run file.
        overrides: texts of the form 'a.b=value', later ones winning.
        has_own_search: whether the search is a Tuner of the user's own, which brings parameters of its own.

    Raises:
        ConfigError: anything is wrong; its message has one line per problem.
    """
    path = Path(path)
    shown = printable(str(path), 200)
    document = parse(read_text(path), shown)
    parsed = [parse_override(text) for text in overrides]
    place = Place(document, shown, tuple(override.path for override in parsed))
    problems = list(document.problems)
    config = None
    try:
        config = RunConfig.model_validate(apply_overrides(document.data, parsed))
    except ValidationError as error:
        problems += from_pydantic(error, RunConfig, place)
    if config is not None:
        config = _with_declared(_with_import_paths(config, path))
        problems += as_errors(check_all(config), place)
        if not has_own_search:
            problems += as_errors(missing_params(config), place)
    if problems or config is None:
        raise join(sorted(problems, key=lambda problem: problem.line or 0))
    return ResolvedRun(config=config, origins=_origins(config, place), place=place)


def _with_import_paths(config: RunConfig, path: Path) -> RunConfig:
    """The configuration with the directories in which a training of the user's own is looked for, which it puts first
    on this process's import path: that training is imported to know its parameters.
    """
    if not config.import_names:
        return config
    given = config.job.import_paths or (str(Path.cwd()), str(path.absolute().parent))
    if any(name.partition(":")[0].endswith(PICKLE_SUFFIX) for name in config.import_names):
        given = (str(run_directory(config.storage, config.name)), *given)
    paths = tuple(dict.fromkeys(str(Path(each).absolute()) for each in given))
    add_import_paths(paths)
    return config.model_copy(update={"job": config.job.model_copy(update={"import_paths": paths})})


def _with_declared(config: RunConfig) -> RunConfig:
    """The configuration with what a training of the user's own says of its trials, where the run file does not."""
    try:
        info = job_info(config.job.key)
    except ValueError:  # the checks say why
        return config
    trial = config.trial
    found: dict[str, int] = {part: n for part, n in info.start.items() if part not in trial.model_fields_set}
    epochs = trial.epochs_per_report
    if info.reports_epochs and epochs is None and trial.samples_per_report is None:
        found["epochs_per_report"] = epochs = 1
    if info.num_epochs is not None and epochs is not None and trial.max_reports is None:
        found["max_reports"] = -(-info.num_epochs // epochs)
    return config.model_copy(update={"trial": trial.model_copy(update=found)}) if found else config


def fit_problems(resolved: ResolvedRun, machine: Machine | None = None, *, is_new: bool = True) -> list[ConfigError]:
    """What keeps a valid configuration from running on this machine; empty if nothing does."""
    why = why_not_here()
    elsewhere = [] if why is None else [ConfigError(why)]
    return [
        *elsewhere,
        *as_errors(check_fit(resolved.config, machine or this_machine(), is_new=is_new), resolved.place),
    ]


def require_fit(resolved: ResolvedRun, machine: Machine | None = None, *, is_new: bool = True) -> None:
    """Refuse a run that this machine can never serve, or whose directory exists already.

    Raises:
        ConfigError: it does not fit; its message has one line per problem.
    """
    problems = fit_problems(resolved, machine, is_new=is_new)
    if problems:
        raise join(problems)


def as_errors(findings: Iterable[Finding], place: Place) -> list[ConfigError]:
    """The findings with file and line."""
    return [place.error(path, text) for path, text in findings]


def _origins(config: RunConfig, place: Place) -> dict[str, str]:
    return {
        ".".join(str(p) for p in path): _origin(path, place) for path in _leaves(config.model_dump(mode="json"), ())
    }


def _origin(path: KeyPath, place: Place) -> str:
    if place.is_set(path):
        return SET
    line = place.document.lines.get(path)
    # A value reached through an alias has no line of its own; its nearest key has.
    is_written = line is not None or _is_inside_alias(path, place)
    return f"{place.file}:{line or place.document.line_of(path)}" if is_written else DEFAULT


def _is_inside_alias(path: KeyPath, place: Place) -> bool:
    data = place.document.data
    for part in path:
        if not isinstance(data, Mapping) or part not in data:
            return False
        data = data[part]
    return True


def _leaves(data: Mapping[str, object], path: KeyPath) -> Iterator[KeyPath]:
    for key, value in data.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, (*path, key))
        else:
            yield (*path, key)
