"""A run as a job of a running Ray cluster: submit, follow, stop so that it checkpoints, resume as a new job.

The same as `ray job submit -- orchestrator run ...` on the command line, with what is easily forgotten there: time for
checkpoints when the job is stopped, and a storage directory that outlives the job's working directory. Public API:
`ray.job_submission`.
"""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.config import load_config
from orchestrator.errors import ConfigError, OrchestratorError

STOP_WAIT_S = 150
"""Seconds that a stopped job has before Ray kills it (its own default is 3): checkpoints must be on disk by then."""

_POLL_S = 0.5
_ENDED = frozenset({"SUCCEEDED", "STOPPED", "FAILED"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Packages:
    """What the job needs on the cluster's nodes.

    Attributes:
        working_dir: sent to the nodes, and where the job starts; it holds the run file.
        pip: packages that are installed for the job.
        py_modules: directories of packages that are sent along.
        env_vars: environment of the job's processes.
        python: the interpreter on the nodes that has Ray and, unless it is in `py_modules`, the orchestrator.
    """

    working_dir: Path
    pip: tuple[str, ...] = ()
    py_modules: tuple[str, ...] = ()
    env_vars: Mapping[str, str] | None = None
    python: str = "python"

    @property
    def command(self) -> str:
        """How the orchestrator is called on the nodes."""
        return f"{shlex.quote(self.python)} -m orchestrator"

    def runtime_env(self) -> dict[str, Any]:
        """Ray's form of it."""
        environment: dict[str, Any] = {
            "working_dir": str(self.working_dir),
            "excludes": [".git", ".venv", "runs"],
            "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S), **(self.env_vars or {})},
        }
        if self.pip:
            environment["pip"] = list(self.pip)
        if self.py_modules:
            environment["py_modules"] = list(self.py_modules)
        return environment


@dataclass(frozen=True, slots=True, kw_only=True)
class SubmittedRun:
    """A run that is a job of a cluster.

    Attributes:
        address: of the cluster's dashboard.
        job_id: Ray's name of the job.
        run_dir: of the run, on a file system that the nodes share.
        packages: what it was submitted with.
    """

    address: str
    job_id: str
    run_dir: Path
    packages: Packages

    def status(self) -> str:
        """PENDING, RUNNING, SUCCEEDED, STOPPED or FAILED."""
        return str(_client(self.address).get_job_status(self.job_id).value)

    def metadata(self) -> dict[str, str]:
        """What was attached to the job."""
        return dict(_client(self.address).get_job_info(self.job_id).metadata or {})

    def follow(self, say: Callable[[str], object] = print, timeout_s: float | None = None) -> str:
        """Pass on new lines of the job's log until it ends; its last status.

        Raises:
            OrchestratorError: it has not ended in time.
        """
        client, seen = _client(self.address), 0
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            status = str(client.get_job_status(self.job_id).value)
            whole, end, _ = str(client.get_job_logs(self.job_id))[seen:].rpartition("\n")
            seen += len(whole) + len(end)
            for line in whole.splitlines():
                say(line)
            if status in _ENDED:
                return status
            if deadline_s is not None and time.monotonic() > deadline_s:
                raise OrchestratorError(f"job {self.job_id} is {status} and has not ended within {timeout_s:g} s")
            time.sleep(_POLL_S)

    def stop(self, timeout_s: float = STOP_WAIT_S + 30.0) -> str:
        """Ask the job to stop; its trials write checkpoints first. Its last status.

        Raises:
            OrchestratorError: it has not ended in time.
        """
        _client(self.address).stop_job(self.job_id)
        return self.follow(lambda _line: None, timeout_s)

    def resume(self, metadata: Mapping[str, str] | None = None) -> SubmittedRun:
        """Go on with the run as a new job.

        Raises:
            OrchestratorError: this job has not ended.
        """
        if (status := self.status()) not in _ENDED:
            raise OrchestratorError(f"job {self.job_id} is {status}; a run is resumed when its job has ended: stop()")
        command = f"{self.packages.command} resume {shlex.quote(str(self.run_dir))} --plain"
        return _submit(self.address, command, self.run_dir, self.packages, metadata or {})


def submit(
    run_file: Path | str,
    packages: Packages,
    *,
    address: str | None = None,
    overrides: Iterable[str] = (),
    metadata: Mapping[str, str] | None = None,
) -> SubmittedRun:
    """Start a run as a job of a running cluster.

    Args:
        run_file: relative to `packages.working_dir`.
        packages: what is sent along.
        address: of the dashboard, such as http://127.0.0.1:8265; RAY_API_SERVER_ADDRESS says it otherwise.
        overrides: `a.b=value`, as on the command line. `cluster.address=auto` is added.
        metadata: attached to the job, beside the run's name and directory.

    Raises:
        ConfigError: the run file is wrong, or its storage is relative: the job's directory goes with the job.
    """
    place = address or os.environ.get("RAY_API_SERVER_ADDRESS") or "http://127.0.0.1:8265"
    settings = ["cluster.address=auto", *overrides]
    resolved = load_config(packages.working_dir / run_file, settings)
    storage = Path(resolved.config.storage)
    if not storage.is_absolute():
        raise ConfigError(
            f"got '{storage}'; allowed: an absolute path that all nodes share, because a job's working directory is a"
            " copy that is removed with it (--set storage=/mnt/runs)",
            key="storage",
        )
    words = [shlex.quote(word) for setting in settings for word in ("--set", setting)]
    command = f"{packages.command} run {shlex.quote(str(run_file))} --plain {' '.join(words)}"
    return _submit(place, command, resolved.run_dir, packages, metadata or {})


def _submit(address: str, command: str, run_dir: Path, packages: Packages, metadata: Mapping[str, str]) -> SubmittedRun:
    """Hand a command to the cluster."""
    job_id = _client(address).submit_job(
        entrypoint=command,
        runtime_env=packages.runtime_env(),
        metadata={"orchestrator_run": run_dir.name, "orchestrator_run_dir": str(run_dir), **metadata},
    )
    return SubmittedRun(address=address, job_id=str(job_id), run_dir=run_dir, packages=packages)


def _client(address: str) -> Any:
    from ray.job_submission import JobSubmissionClient

    return JobSubmissionClient(address)
