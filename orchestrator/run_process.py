"""`orchestrator run` as a process of its own, for whoever starts a run from Python: what it says, and how far it is.

Called by `orchestrator.api`.
"""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from orchestrator.config.overrides import apply_overrides, parse_override
from orchestrator.config.source import parse, read_text
from orchestrator.errors import ConfigError, OrchestratorError, UnfitEnvironmentError
from orchestrator.run_dirs import read_status
from orchestrator.view.text import mapping

_ERRORS = {2: ConfigError, 3: UnfitEnvironmentError}
_PROGRESS = re.compile(r"(\d+:)?\d+:\d\d \w+ plan ")
"""A line that says how far a run is."""


def status_of(file: Path, settings: Sequence[str]) -> Callable[[], Mapping[str, Any] | None]:
    """What reads the status of the run that a run file names; the file is not checked, and may be wrong."""
    values: Any = apply_overrides(parse(read_text(file), str(file)).data, [parse_override(each) for each in settings])
    found = mapping(values)
    directory = Path(str(found.get("storage") or "runs")) / str(found.get("name") or "")
    began_s = time.time()

    def read() -> Mapping[str, Any] | None:
        status = read_status(directory)  # of a run before, if it is older
        return status if status is not None and float(status.get("started_at") or 0.0) >= began_s - 1.0 else None

    return read


def execute(arguments: Sequence[str], *, quiet: bool, has_table: bool = False) -> Path:
    """Run `orchestrator run` and pass on what it says; the run directory, which is its last line.

    Where a table shows how far the run is, its lines that say so are left out.

    Raises:
        OrchestratorError: it did not end well; the message is what it said.
    """
    mode = ["--quiet"] if quiet else ["--plain"]
    command = [sys.executable, "-m", "orchestrator", "run", *arguments, *mode]
    with _started(command) as process:
        assert process.stdout is not None
        last, said = "", []
        for line in process.stdout:
            last = line.strip() or last
            said.append(line)
            if not quiet and not (has_table and _PROGRESS.match(line)):
                sys.stdout.write(line)
                sys.stdout.flush()
        errors = process.stderr.read() if process.stderr is not None else ""
        code = process.wait()
    if code in {0, 4}:
        return Path(next(line.strip() for line in reversed(said) if Path(line.strip()).is_dir()))
    if code in {130, 143}:
        raise KeyboardInterrupt
    text = errors.strip().removeprefix("error: ") or last or f"the run ended with exit code {code}"
    raise _ERRORS.get(code, OrchestratorError)(text)


@contextmanager
def _started(command: Sequence[str]) -> Iterator[subprocess.Popen[str]]:
    """A process that is told once to stop if this one is interrupted, and waited for."""
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, start_new_session=True) as process:
        try:
            yield process
        except BaseException:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
                process.wait()
            raise
