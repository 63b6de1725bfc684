"""What a simulation is made of, read from files and arguments: workload, tables of applications, cluster, policy.

Every mistake of the user becomes one error with file, line, value and what is allowed. Called by the command.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from orchestrator.config.policy_params import type_problem
from orchestrator.config.source import parse
from orchestrator.config.words import did_you_mean, printable
from orchestrator.errors import ConfigError, TraceError
from orchestrator.policies import POLICIES, Policy, build_policy
from orchestrator.policies.simulator import (
    POLLUX_APPLICATIONS,
    Applications,
    Cluster,
    TableError,
    Workload,
    helios_like,
    parse_cluster,
    philly_like,
    read_events,
    read_workload,
)
from orchestrator.policies.simulator.tables import Cells, application_from, read_noise, read_speeds

SYNTHETIC: dict[str, Callable[[Applications, int], Workload]] = {
    "philly-like": lambda applications, seed: philly_like(applications, seed=seed),
    "helios-like": lambda applications, seed: helios_like(applications, seed=seed),
}
"""Workloads that are made up by seed, by the word that stands for them instead of a file."""
_VALIDATION = re.compile(r"validation-(\d{1,9})\.csv")
_Read = TypeVar("_Read")


def is_workload(target: str) -> bool:
    """Whether a TARGET is a workload and not a run."""
    return target in SYNTHETIC or target.endswith(".csv")


def workload_of(target: str, applications: Applications, seed: int) -> Workload:
    """The workload of a file, or one that is made up.

    Raises:
        TraceError: the file cannot be read, or a line of it is wrong.
    """
    if target in SYNTHETIC:
        try:
            return SYNTHETIC[target](applications, seed)
        except KeyError as error:
            raise TraceError(
                f"{target} needs the application {error}; --tables has {', '.join(sorted(applications))}"
            ) from None
    return _read(Path(target), lambda lines, name: read_workload(lines, name, applications))


def cluster_of(text: str, events: Path | None) -> Cluster:
    """The cluster that `--cluster` describes, with the events of a file.

    Raises:
        ConfigError: it is no cluster.
        TraceError: the file cannot be read, or a line of it is wrong.
    """
    try:
        cluster = parse_cluster(text)
    except ValueError as error:
        raise ConfigError(str(error), "--cluster") from None
    if events is None:
        return cluster
    found = _read(events, lambda lines, name: read_events(lines, name, cluster))
    return Cluster(nodes=cluster.nodes, events=found)


def applications_of(directory: Path | None) -> Applications:
    """The applications of a directory of tables, one folder each; those published with Pollux where none is given.

    A folder holds step times in `placements.csv`, `scalability.csv` or `speeds.csv`, and gradient statistics of batch B
    in `validation-B.csv`; those of the smallest batch count.

    Raises:
        ConfigError: it holds no application.
        TraceError: a table cannot be read, or a line of it is wrong.
    """
    if directory is None:
        return POLLUX_APPLICATIONS
    folders = sorted(path for path in directory.iterdir() if path.is_dir()) if directory.is_dir() else []
    found = {}
    for folder in folders:
        batches = {int(match[1]): path for path in folder.iterdir() if (match := _VALIDATION.fullmatch(path.name))}
        cells: Cells = {}
        for name in ("scalability.csv", "placements.csv", "speeds.csv"):
            path = folder / name
            if path.exists():
                tables = _read(path, read_speeds)
                cells.update(tables.get("", {}) | tables.get(folder.name, {}))
        if not batches or not cells:
            continue
        base = min(batches)
        noise = _read(batches[base], lambda lines, name, base=base: read_noise(lines, name, base))  # type: ignore[misc]
        found[folder.name] = application_from(folder.name, cells, noise, batches=sorted(batches))
    if not found:
        raise ConfigError(
            f"there is no application in {printable(str(directory))}; allowed: a directory with a folder for each, "
            "which holds placements.csv (or scalability.csv, speeds.csv) and validation-BATCH.csv",
            "--tables",
        )
    return found


def policy_of(name: str, settings: Iterable[str]) -> Policy:
    """The policy of that name with `key=value` parameters.

    Raises:
        ConfigError: there is none, or a parameter is unknown or refused.
    """
    params: dict[str, Any] = {}
    for setting in settings:
        key, sign, value = setting.partition("=")
        if not sign or not key:
            raise ConfigError(f"{printable(setting, 60)!r} is no parameter; allowed: KEY=VALUE", "--set")
        try:
            params[key] = parse(value, "--set").data  # as in a run file: 1e1 is a number
        except ConfigError:
            raise ConfigError(f"{printable(value, 60)!r} is no value; allowed: a number or a word", "--set") from None
        problem = type_problem(POLICIES.get(name), key, params[key])
        if problem is not None:
            raise ConfigError(problem, "--set", None, printable(key, 60))
    return policy_with(name, params)


def policy_with(name: str, params: Mapping[str, Any]) -> Policy:
    """The policy of that name with those parameters. Raises ConfigError where there is none."""
    try:
        return build_policy(name, params)
    except ValueError as error:
        raise ConfigError(str(error), "--policy") from None


def check_target(target: str) -> None:
    """Refuse what looks like neither run nor workload, with a suggestion."""
    if not Path(target).exists() and (hint := did_you_mean(target, SYNTHETIC)):
        raise ConfigError(f"there is no run or file {printable(target, 60)!r}{hint}", "TARGET")


def _read(path: Path, reader: Callable[[Iterable[str], str], _Read]) -> _Read:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise TraceError(f"cannot read {path}: {reason}; allowed: a CSV file") from None
    try:
        return reader(lines, str(path))
    except TableError as error:
        raise TraceError(str(error)) from None
