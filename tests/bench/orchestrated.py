"""The orchestrator's own parts, started as `orchestrator run` starts them, for benchmarks that need them one by one.

`cluster` is the driver's own local Ray; `Parts` are a policy actor, the slots' specification and a supervisor. Uses the
driver's inside on purpose: a copy of it here would measure something else than what a user runs.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from orchestrator.config import ResolvedRun, load_config
from orchestrator.control.journal import read
from tests.bench.language_job import PARAMS

CLOSE_TIMEOUT_S = 60.0


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A directory that is gone afterwards; short, because Ray puts sockets below it."""
    directory = Path(tempfile.mkdtemp(prefix="bench-", dir="/tmp"))
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def write_run_file(path: Path, name: str, **changes: Any) -> Path:
    """A run file of the language job in which nothing turns; `changes` replace whole sections."""
    config: dict[str, Any] = {
        "name": name,
        "storage": str(path.parent / "runs"),
        "seed": 1,
        "job": {"name": "language", "params": {**PARAMS, "eval_windows": 64}},
        "search": {"num_trials": 1, "max_concurrent": 1, "scheduler": {"name": "fifo"}},
        "dials": {"share": {"enabled": False}, "batch": {"enabled": False}, "precision": {"enabled": False}},
        "policy": {"name": "static"},
    }
    path.write_text(yaml.safe_dump(config | changes))
    return path


@contextlib.contextmanager
def cluster(num_cpus: int) -> Iterator[None]:
    """The driver's own local Ray."""
    from orchestrator.cluster import RayCluster
    from orchestrator.config.model import ClusterSection

    ray_cluster = RayCluster(ClusterSection(address="local", num_cpus=num_cpus), "bench", Path.cwd())
    with ray_cluster.opened():
        yield
    if ray_cluster.num_left:
        raise RuntimeError(
            f"{ray_cluster.num_left} processes of the benchmark's Ray are still there after its shutdown"
        )


class Parts:
    """A policy actor for one run file, and what is needed to open slots for it."""

    def __init__(self, run_file: Path) -> None:
        import ray

        from orchestrator.control_plane import ControlPlane, start_actor
        from orchestrator.policy_handle import OWN_NAME

        resolved: ResolvedRun = load_config(run_file)
        self.config, self.run_dir = resolved.config, resolved.run_dir
        (self.run_dir / "control").mkdir(parents=True)
        plane = ControlPlane(resolved, self.run_dir)
        self.spec, self.namespace, self.actor_name = plane.spec, plane.namespace, OWN_NAME
        self.slot_spec = plane.slot_spec()
        self.policy = start_actor(self.spec, self.namespace)
        self.actor_pid = int(ray.get(self.policy.ready.remote()))

    def ask(self, method: str, *arguments: Any) -> Any:
        """Call the policy actor and wait for its answer."""
        import ray

        return ray.get(getattr(self.policy, method).remote(*arguments), timeout=60.0)

    def wait_for_slots(self, num_slots: int, timeout_s: float = 180.0) -> None:
        """Return when so many slots have nothing to do and wait for a trial."""
        deadline_s = time.monotonic() + timeout_s
        while sum(slot["state"] == "idle" for slot in self.ask("status")["slots"]) < num_slots:
            if time.monotonic() > deadline_s:
                raise RuntimeError(f"{num_slots} slots did not open within {timeout_s:g} s")
            time.sleep(0.05)

    def entries(self, kind: str) -> list[dict[str, Any]]:
        """Journal entries of one kind, oldest first."""
        return [entry for entry in read(self.run_dir / "journal.jsonl") if entry["kind"] == kind]

    def end(self, state: str = "done") -> None:
        """End the actor; its journal and tables are complete afterwards."""
        import ray

        self.ask("end_run", state)
        ray.kill(self.policy)


def read_json(path: Path) -> Any:
    """What a worker wrote."""
    return json.loads(path.read_text())
