"""The control plane of one run, with trials that are begun and ended by hand: for experiments that a search cannot do.

Starts what `orchestrator run` starts, Ray Tune excepted. Knows no figures.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from orchestrator.config import load_config
from orchestrator.control.admission import FILE_NAME as KNEES
from orchestrator.policies.plan import TrialId
from tests.bench.results_file import machine

MAX_UNITS = 64

_POLL_S = 0.1


class Plane:
    """Policy actor and slots that are open; see `opened`."""

    def __init__(self, policy: Any, directory: Path) -> None:
        self._policy, self.directory = policy, directory
        self._begun: set[int] = set()

    def begin(self, number: int, params: dict[str, Any]) -> None:
        """Queue a trial with those parameters; where a slot is idle it begins at once."""
        import ray

        ray.get(self._policy.submit.remote(TrialId(f"trial-{number:05d}"), params), timeout=30.0)
        self._begun.add(number)

    def end(self, number: int) -> None:
        """Let a trial leave its slot; returns at once."""
        import ray

        ray.get(self._policy.release.remote(TrialId(f"trial-{number:05d}")), timeout=30.0)
        self._begun.discard(number)

    def end_all(self) -> None:
        """Let all of them leave."""
        for number in sorted(self._begun):
            self.end(number)

    def wait_for_step(self, number: int, step: int, timeout_s: float) -> None:
        """Return when a trial has done so many steps.

        Raises:
            RuntimeError: it has not within the time, or has ended.
        """
        import ray

        name, deadline_s = f"trial-{number:05d}", time.monotonic() + timeout_s
        while True:
            trials = ray.get(self._policy.status.remote(), timeout=30.0)["trials"]
            mine: dict[str, Any] = next((trial for trial in trials if trial["trial_id"] == name), {})
            if (mine.get("step") or 0) >= step:
                return
            if mine.get("state") in {"failed", "stopped", "done"} or time.monotonic() > deadline_s:
                raise RuntimeError(f"{name} has not done {step} steps within {timeout_s:g} s: {mine}")
            time.sleep(_POLL_S)


@contextlib.contextmanager
def opened(file: dict[str, Any], *, num_known: int, timeout_s: float = 90.0) -> Iterator[Plane]:
    """The plane of a run file once all of its slots are idle; closed afterwards.

    Args:
        file: content of the run file.
        num_known: trials at a time that an earlier run is taken to have found best, so that none waits for the knee.
        timeout_s: seconds that the slots may take.

    Raises:
        RuntimeError: they are not within the time.
    """
    import ray

    from orchestrator.cluster import RayCluster
    from orchestrator.control_plane import ControlPlane

    storage = Path(file["storage"])
    storage.mkdir(parents=True, exist_ok=True)
    path = storage / f"{file['name']}.yaml"
    path.write_text(yaml.safe_dump(file))
    resolved = load_config(path)
    shutil.rmtree(resolved.run_dir, ignore_errors=True)  # of an earlier try
    (resolved.run_dir / "control").mkdir(parents=True)
    plane = ControlPlane(resolved, resolved.run_dir)
    _make_known(storage / KNEES, plane.spec.shape(plane.spec.params), num_known)
    uses_gpus = resolved.config.devices.use != "cpu"
    with RayCluster(resolved.config.cluster, plane.namespace, resolved.run_dir, uses_gpus=uses_gpus).opened():
        try:
            plane.open()
            deadline_s, wanted = time.monotonic() + timeout_s, resolved.config.search.num_slots
            while True:
                plane.require_slots()
                slots = ray.get(plane.policy.status.remote(), timeout=30.0)["slots"]
                if sum(slot["state"] == "idle" for slot in slots) >= wanted:
                    break
                if time.monotonic() > deadline_s:
                    raise RuntimeError(f"{wanted} slots did not open within {timeout_s:g} s: {slots}")
                time.sleep(_POLL_S)
            ray.get(plane.policy.set_state.remote("running"))
            opened_plane = Plane(plane.policy, resolved.run_dir)
            try:
                yield opened_plane
            finally:
                opened_plane.end_all()  # a slot that trains when it is closed is ended by force
        finally:
            plane.close("done")


def _make_known(path: Path, shape: str, count: int) -> None:
    """Write down a number of trials for this machine's GPU, into however many units it is cut."""
    names = machine()["gpus"][:1]
    path.write_text(json.dumps({f"{name}/{units}: {shape}": count for name in names for units in range(1, MAX_UNITS)}))
