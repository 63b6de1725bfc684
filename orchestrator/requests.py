"""What people and programs ask of a run that goes on, as files in its directory: requests, and the answers to them.

A request is a file in `control/requests`; the policy actor reads it, does what it asks, and puts the answer into
`control/answers`, both under the request's id. A request that is sent again under the same id is done once. Knows
neither Ray nor the journal; what a request means is in `control.steering`.
"""

from __future__ import annotations

import contextlib
import getpass
import json
import re
import socket
import time
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from orchestrator.errors import ConfigError, RequestError
from orchestrator.names import write_atomically
from orchestrator.run_dirs import ENDED_STATES, is_driver_gone, read_status

REQUESTS, ANSWERS = ("control", "requests"), ("control", "answers")
COMMANDS = ("add", "clone", "stop", "pause", "resume", "set")
TIMEOUT_S = 30.0
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", re.ASCII)
_MAX_BYTES = 1 << 20
_POLL_S = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What is asked of a run.

    Attributes:
        request_id: under which it is done once.
        command: one of `COMMANDS`.
        trial_id: the trial that it is about; empty for the run.
        values: parameters of a trial to add or clone, or terms to set, by name.
        by: who asks, for people.
    """

    request_id: str
    command: str
    trial_id: str = ""
    values: Mapping[str, Any] = field(default_factory=dict)
    by: str = ""


def new_id() -> str:
    """An id that no other request has."""
    return uuid.uuid4().hex[:16]


def asker() -> str:
    """Who asks: the user and the host of this process."""
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # a container's user without a name
        user = "unknown"
    return f"{user}@{socket.gethostname()}"


def ask(run_dir: Path, request: Request, timeout_s: float = TIMEOUT_S) -> dict[str, Any]:
    """Send a request to a run and wait for its answer.

    Raises:
        ConfigError: the request cannot be written, or its id is none.
        RequestError: the run has ended, refuses the request, or does not answer; then the request is taken back.
    """
    if _ID.fullmatch(request.request_id) is None:
        text = f"got {request.request_id[:80]!r}; allowed: at most 64 letters, digits, '_', '-' and '.'"
        raise ConfigError(text, key="--request-id")
    known = answer_to(run_dir, request.request_id)
    if known is None:
        _require_live(run_dir)
        path = run_dir.joinpath(*REQUESTS, f"{request.request_id}.json")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, json.dumps(asdict(request)))
        except (OSError, TypeError) as error:
            raise ConfigError(f"the request cannot be written ({error}); allowed: a run directory of yours") from None
        known = _await(run_dir, request.request_id, path, timeout_s)
    if "error" in known:
        raise RequestError(str(known["error"]["message"]), str(known["error"]["code"]))
    return known


def pending(run_dir: Path) -> list[Request]:
    """Requests that nobody has answered, oldest first; what is no request is removed."""
    found = []
    for path in sorted(run_dir.joinpath(*REQUESTS).glob("*.json"), key=lambda path: (path.stat().st_mtime, path.name)):
        try:
            values = json.loads(path.read_bytes()[:_MAX_BYTES])
            request = Request(**values)
            is_sound = request.request_id == path.stem and _ID.fullmatch(path.stem) and request.command in COMMANDS
            if not is_sound or not isinstance(request.values, dict):
                raise ValueError(path.name)
        except FileNotFoundError:  # taken back
            continue
        except (OSError, ValueError, TypeError):
            path.unlink(missing_ok=True)
            continue
        found.append(request)
    return found


def answer(run_dir: Path, request: Request, found: Mapping[str, Any]) -> None:
    """Answer a request."""
    path = run_dir.joinpath(*ANSWERS, f"{request.request_id}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps({"request_id": request.request_id, **found}))
    run_dir.joinpath(*REQUESTS, f"{request.request_id}.json").unlink(missing_ok=True)


def answer_to(run_dir: Path, request_id: str) -> dict[str, Any] | None:
    """The answer to a request; None while there is none."""
    try:
        found = json.loads(run_dir.joinpath(*ANSWERS, f"{request_id}.json").read_bytes())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _require_live(run_dir: Path) -> None:
    state = (read_status(run_dir) or {}).get("state")
    if state in ENDED_STATES:
        raise RequestError(f"{run_dir.name} has ended ({state}); allowed: a run that goes on", "run_ended")
    if is_driver_gone(run_dir):
        text = f"the process that ran {run_dir.name} is gone; `orchestrator resume {run_dir}` goes on with it"
        raise RequestError(text, "run_lost")


def _await(run_dir: Path, request_id: str, path: Path, timeout_s: float) -> dict[str, Any]:
    deadline_s = time.monotonic() + timeout_s
    while True:
        found = answer_to(run_dir, request_id)
        if found is not None:
            return found
        if time.monotonic() >= deadline_s:
            with contextlib.suppress(OSError):
                path.unlink()
            text = f"{run_dir.name} has not answered within {timeout_s:g} s, and the request was taken back"
            raise RequestError(f"{text}; ask again under the same --request-id {request_id}", "timeout")
        time.sleep(_POLL_S)
