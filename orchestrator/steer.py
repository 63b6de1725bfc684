"""Steering a run that goes on, for the command line and for `Run`: what is asked is checked here, then sent to the run.

What has to be right about a run's own state (a trial is there, it has a commit) is said by its policy actor.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from orchestrator import requests
from orchestrator.config.overrides import parse_override
from orchestrator.config.words import printable
from orchestrator.errors import ConfigError, RequestError
from orchestrator.requests import Request
from orchestrator.run_dirs import ENDED_STATES, is_driver_gone, read_status
from orchestrator.view.text import dicts

SCHEMA = 1
"""Of what `--json` prints."""
_UNTIL = re.compile(r"(done|first-report)|best\s*([<>])\s*([-+0-9.eE]+)")
_TERMS = ("user", "priority", "weight", "deadline", "guaranteed_devices", "protected", "max_devices")
_POLL_S = 0.2


def ask(
    run_dir: Path,
    command: str,
    trial_id: str = "",
    values: Mapping[str, Any] | None = None,
    *,
    request_id: str | None = None,
    timeout_s: float = requests.TIMEOUT_S,
) -> dict[str, Any]:
    """Check what is asked, send it to a run, and wait for the answer; the answer.

    Args:
        run_dir: the run.
        command: add, clone, stop, pause, resume or set.
        trial_id: the trial that it is about; empty for the run.
        values: parameters of a trial to add or clone, or terms to set.
        request_id: under which it is done once, however often it is asked; a new one if not given.
        timeout_s: how long to wait.

    Raises:
        ConfigError: a value is wrong.
        RequestError: the run has ended, does not answer, or refuses.
    """
    given = dict(values or {})
    if command in {"add", "clone"}:
        _require_params(run_dir, given, is_whole=command == "add")
    elif command == "set":
        given = _terms(run_dir, given, trial_id)
    request = Request(
        request_id=request_id or requests.new_id(),
        command=command,
        trial_id=trial_id,
        values=given,
        by=requests.asker(),
    )
    return requests.ask(run_dir, request, timeout_s)


def params_of(settings: tuple[str, ...]) -> dict[str, Any]:
    """Parameters from texts of the form name=value.

    Raises:
        ConfigError: one is no such text.
    """
    found = {}
    for text in settings:
        override = parse_override(text)
        if len(override.path) != 1:
            raise ConfigError(f"got '{printable(text, 80)}'; allowed: name=value, such as lr=0.01", "--set")
        found[str(override.path[0])] = override.value
    return found


def wait(run_dir: Path, until: str, timeout_s: float | None = None) -> dict[str, Any]:
    """Wait until a run is done, has its first report, or a report whose metric is below or above a number.

    Args:
        run_dir: the run.
        until: done, first-report, best<1.2 or best>0.9.
        timeout_s: how long to wait; None for ever.

    Returns:
        `is_reached`, `state`, and the `best` newest metric of any trial.

    Raises:
        ConfigError: `until` is none of these.
        RequestError: it has not happened within `timeout_s`.
    """
    match = _UNTIL.fullmatch(until.strip())
    try:
        limit = float(match[3]) if match is not None and match[3] else 0.0
    except ValueError:
        match = None
    if match is None:
        raise ConfigError(f"got {printable(until, 60)!r}; allowed: done, first-report, best<1.2, best>0.9", "--until")
    deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
    while True:
        status = read_status(run_dir) or {}
        state, best = str(status.get("state", "starting")), _best(status)
        has_ended = state in ENDED_STATES or is_driver_gone(run_dir)
        if match[1] == "done":
            is_reached = state == "done"
        elif match[1]:
            is_reached = any(trial.get("metric_value") is not None for trial in dicts(status.get("trials")))
        else:
            is_reached = best is not None and (best < limit if match[2] == "<" else best > limit)
        if is_reached or has_ended:
            return {"is_reached": is_reached, "state": state, "best": best}
        if deadline_s is not None and time.monotonic() >= deadline_s:
            raise RequestError(f"{until} was not reached within {timeout_s:g} s; the run is {state}", "timeout")
        time.sleep(_POLL_S)


def log_of(run_dir: Path, trial_id: str) -> Path:
    """The log of a trial.

    Raises:
        ConfigError: there is no such trial, or it has written nothing yet.
    """
    known = [str(trial.get("trial_id")) for trial in dicts((read_status(run_dir) or {}).get("trials"))]
    if trial_id not in known:
        allowed = ", ".join(known) or "none yet"
        raise ConfigError(f"{run_dir} has no trial {printable(trial_id, 60)!r}; allowed: {allowed}", "--trial")
    path = run_dir / "trials" / trial_id / "log.txt"
    if not path.is_file():
        raise ConfigError(f"{trial_id} has written no log yet; it waits for a slot", "--trial")
    return path


def _best(status: Mapping[str, Any]) -> float | None:
    found = (trial.get("metric_value") for trial in dicts(status.get("trials")))
    values = [float(value) for value in found if isinstance(value, int | float)]
    if not values:
        return None
    return max(values) if status.get("mode") == "max" else min(values)


def _require_params(run_dir: Path, params: Mapping[str, Any], *, is_whole: bool) -> None:
    """Values that the run's job takes, and where they are all that a new trial has, one for each that is searched."""
    from orchestrator.beginning import load_begun
    from orchestrator.jobs.table import check_param, job_info

    config = load_begun(run_dir).config
    for name, value in params.items():
        try:
            check_param(config.job.key, name, value)
        except ValueError as error:
            raise ConfigError(printable(str(error), 400), "--set") from None
    required = {param.name for param in job_info(config.job.key).params if param.is_required}
    missing = sorted((required | config.search.one_space.keys()) - params.keys() - config.job.params.keys())
    if is_whole and missing:
        raise ConfigError(f"no value for {', '.join(missing)}; allowed: --set {missing[0]}=VALUE for each", "--set")


def _terms(run_dir: Path, values: Mapping[str, Any], trial_id: str) -> dict[str, Any]:
    """Terms as the policy actor takes them, checked as the section `queue` of the run's file would be."""
    import json

    from orchestrator.beginning import load_begun
    from orchestrator.config.queue import check_deadline
    from orchestrator.run_spec import terms

    names = [name for name in _TERMS if not trial_id or name not in {"user", "max_devices"}]
    unknown = [name for name in values if name not in names]
    if unknown or not values:
        got = f"got {', '.join(printable(name, 40) for name in unknown)}" if unknown else "got nothing to set"
        raise ConfigError(f"{got}; allowed: {', '.join(names)}, such as priority=2")
    resolved = load_begun(run_dir, [f"queue.{name}={json.dumps(value)}" for name, value in values.items()])
    if "deadline" in values:
        for path, text in check_deadline(resolved.config):
            raise resolved.place.error(path, text)
    found = terms(resolved.config)
    return {name: getattr(found, name) for name in values}
