"""NVIDIA's Multi-Process Service on this node: one that runs already, or an own one that ends with whoever started it.

Under MPS kernels of several processes run on a GPU at the same time; without it processes take turns. An own daemon has
a directory of its own, so it serves those processes only that are given its environment before they touch CUDA. A
guardian outside of the process tree stops it when its starter is gone, however that died. No setting of the card is
ever changed: no compute mode, no clocks, no MIG. No torch, no Ray; called by the device agent and by `doctor`.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from orchestrator.errors import ShareError

CONTROL = "nvidia-cuda-mps-control"
DEFAULT_DIRECTORY = "/tmp/nvidia-mps"
_PIPE, _LOG = "CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_LOG_DIRECTORY"
_THREADS = "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"
_START_TIMEOUT_S = 10.0
_ASK_TIMEOUT_S = 5.0
_QUIT_TIMEOUT_S = 5

Ask = Callable[[str, Mapping[str, str]], str]
"""Sends one line to the control daemon of that environment; returns its answer. Raises OSError or SubprocessError."""

_GUARDIAN = f"""
import os, shutil, subprocess, sys
os.setsid()
sys.stdin.buffer.read()  # ends when the starter is gone
subprocess.run([{CONTROL!r}], input="quit -t {_QUIT_TIMEOUT_S}\\n", text=True, timeout=30, env=dict(os.environ),
               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
shutil.rmtree(sys.argv[1], ignore_errors=True)
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class MpsFound:
    """An MPS daemon that answers.

    Attributes:
        environment: what a process must have before it touches CUDA to be served by it.
        is_own: whether it was started here, and ends with its starter.
        limits: what it holds every client to, in words; empty without limits.
    """

    environment: dict[str, str]
    is_own: bool
    limits: str = ""


def ask_control(line: str, environment: Mapping[str, str]) -> str:
    """Send one line to the control daemon; its answer."""
    answer = subprocess.run(
        [CONTROL],
        input=f"{line}\n",
        capture_output=True,
        text=True,
        timeout=_ASK_TIMEOUT_S,
        check=True,
        env={**os.environ, **environment},
    )
    return answer.stdout.strip()


def find_running(environment: Mapping[str, str], ask: Ask = ask_control) -> MpsFound | None:
    """The MPS daemon that a process with this environment would be served by, None where none answers."""
    directory = environment.get(_PIPE, DEFAULT_DIRECTORY)
    if not (Path(directory) / "control").exists():
        return None
    wanted = {_PIPE: directory}
    try:
        answer = ask("get_default_active_thread_percentage", wanted)
    except (OSError, subprocess.SubprocessError):
        return None
    limits = [f"{_percent(answer):g} % of the SMs per process"] if _percent(answer) < 100 else []
    if environment.get(_THREADS, "100") not in {"", "100", "100.0"}:
        limits.append(f"{_THREADS}={environment[_THREADS]}")
    return MpsFound(environment=wanted, is_own=False, limits=", ".join(limits))


def _percent(answer: str) -> float:
    """The percentage in an answer of the control daemon; 100 where it says nothing that is a number."""
    with contextlib.suppress(ValueError, IndexError):
        return float(answer.rsplit(maxsplit=1)[-1])
    return 100.0


class OwnMps:
    """A daemon of our own, from `start` until `stop` or the end of this process.

    Args:
        directory: its own, which does not exist yet; short, since it holds sockets. None for a new one.
        ask: talks to the daemon.
    """

    def __init__(self, directory: Path | None = None, ask: Ask = ask_control) -> None:
        self._wanted, self._ask = directory, ask
        self._directory: Path | None = None
        self._guardian: int | None = None

    def start(self) -> MpsFound:
        """Start it and wait until it answers.

        Raises:
            ShareError: there is no MPS here, or it does not start; what it said is in the message.
        """
        if shutil.which(CONTROL) is None:
            raise ShareError(f"MPS cannot start: no {CONTROL} on the PATH; install it with the NVIDIA driver")
        try:
            self._directory = self._wanted or Path(tempfile.mkdtemp(prefix="mps-", dir="/tmp"))
            self._directory.mkdir(mode=0o700, exist_ok=self._wanted is None)
        except OSError as error:
            raise ShareError(f"MPS cannot start: no directory for it: {error}") from error
        environment = {_PIPE: str(self._directory), _LOG: str(self._directory / "log")}
        (self._directory / "log").mkdir()
        try:
            self._guard(environment)
            started = subprocess.run(
                [CONTROL, "-d"],
                capture_output=True,
                text=True,
                timeout=_START_TIMEOUT_S,
                check=False,
                env={**_without_limits(), **environment},
            )
            if started.returncode != 0:
                raise ShareError(f"MPS does not start: {_told(started)}")
            self._wait(environment)
        except (OSError, subprocess.SubprocessError) as error:
            self.stop()
            raise ShareError(f"MPS does not start: {error}") from error
        except ShareError:
            self.stop()
            raise
        return MpsFound(environment=environment, is_own=True)

    def stop(self) -> None:
        """Let the guardian stop it; harmless when it does not run. Returns at once."""
        if self._guardian is not None:
            os.close(self._guardian)
            self._guardian = None

    def _wait(self, environment: Mapping[str, str]) -> None:
        deadline_s = time.monotonic() + _START_TIMEOUT_S
        while True:
            try:
                self._ask("get_default_active_thread_percentage", environment)
            except (OSError, subprocess.SubprocessError) as error:
                if time.monotonic() > deadline_s:
                    raise ShareError(f"MPS does not answer {_START_TIMEOUT_S:g} s after its start: {error}") from error
                time.sleep(0.1)
            else:
                return

    def _guard(self, environment: Mapping[str, str]) -> None:
        """Start the guardian before the daemon, so that there is no moment without one."""
        assert self._directory is not None
        read, write = os.pipe()  # not inheritable: the write end lives in this process only
        # Through a shell that ends at once: the guardian is no child of ours, so nobody ends it together with us. What
        # a shell runs behind `&` reads nothing unless it is told to, hence the detour over descriptor 3.
        detached = ["sh", "-c", 'exec 3<&0; "$@" <&3 3<&- >/dev/null 2>&1 &', "sh"]
        try:
            subprocess.run(
                [*detached, sys.executable, "-c", _GUARDIAN, str(self._directory)],
                stdin=read,
                check=True,
                timeout=_START_TIMEOUT_S,
                env={**_without_limits(), **environment},
            )
        except BaseException:
            os.close(write)
            raise
        finally:
            os.close(read)
        self._guardian = write


def _without_limits() -> dict[str, str]:
    """The environment without what would limit every client of the daemon, or hide a GPU from it."""
    return {name: value for name, value in os.environ.items() if name not in {_THREADS, "CUDA_VISIBLE_DEVICES"}}


def _told(process: subprocess.CompletedProcess[str]) -> str:
    """What a process said before it failed, in one line."""
    text = " ".join((process.stderr or process.stdout).split())
    return text[:300] or f"exit code {process.returncode}"
