"""A search of the user's own: the control plane around a `Tuner` that somebody else builds and runs.

What `orchestrator run` is for the command line. Knows nothing of the search: what Tune's stand-ins ask for is all it
hears of it.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator
from pathlib import Path

import ray
from ray import tune
from ray.exceptions import RayError

from orchestrator.cluster import cluster_leaks, ray_cluster
from orchestrator.config import ResolvedRun, load_config, require_fit
from orchestrator.config.render import scalar
from orchestrator.control_plane import ACTOR_NAME, ControlPlane
from orchestrator.errors import ConfigError, OrchestratorError
from orchestrator.names import write_atomically
from orchestrator.run import log_end, single_driver
from orchestrator.tune.adapter import SlotTrial
from orchestrator.tune.admission import HEAD, require_tested_ray, sliver

logger = logging.getLogger(__name__)

_LOOK_S = 1.0


@contextlib.contextmanager
def open_session(run_file: Path, overrides: list[str], *, is_resumed: bool) -> Iterator[type]:
    """See `orchestrator.tune.trainable`."""
    require_tested_ray()
    resolved = load_config(run_file, overrides)
    run_dir = _run_dir(resolved, is_resumed=is_resumed)
    if is_resumed:
        place = [f"storage={scalar(str(run_dir.parent))}", f"name={scalar(run_dir.name)}"]
        resolved = load_config(run_dir / "run.yaml", place)
    plane = ControlPlane(resolved, run_dir)
    with single_driver(run_dir), _connected(resolved, plane.namespace):
        before = cluster_leaks(0.0)
        state = "failed"
        try:
            part = sliver(resolved.config.search.num_slots, ray.available_resources().get(HEAD, 0.0))
            plane.open()
            ray.get(plane.policy.set_state.remote("running"))
            with _watched(plane):
                yield tune.with_resources(
                    tune.with_parameters(SlotTrial, actor=ACTOR_NAME, namespace=plane.namespace, is_foreign=True),
                    {HEAD: part},
                )
            state = _end_search(plane)
        except BaseException:
            with contextlib.suppress(RayError):
                _end_search(plane)
            state = "interrupted"
            raise
        finally:
            plane.close(state)
            left = cluster_leaks()
            log_end(run_dir, state, {name: max(0, count - before[name]) for name, count in left.items()})


def _run_dir(resolved: ResolvedRun, *, is_resumed: bool) -> Path:
    """The run's directory, made if the run is new.

    Raises:
        ConfigError: it is there and must not be, or the other way round.
    """
    run_dir = resolved.run_dir
    require_fit(resolved, is_new=not is_resumed)
    if is_resumed:
        if not (run_dir / "run.yaml").exists():
            raise ConfigError(f"{run_dir} holds no run.yaml; leave resume=True out to begin a new run")
        (run_dir / "control" / "stop").unlink(missing_ok=True)
        return run_dir
    run_dir.mkdir(parents=True, mode=0o700)
    (run_dir / "control").mkdir()
    write_atomically(run_dir / "run.yaml", resolved.to_yaml(with_origins=True))
    return run_dir


@contextlib.contextmanager
def _connected(resolved: ResolvedRun, namespace: str) -> Iterator[None]:
    """The cluster of the run file, or the one this process is connected to already, which then stays connected."""
    if ray.is_initialized():
        yield
        return
    uses_gpus = resolved.config.devices.use != "cpu"
    with ray_cluster(resolved.config.cluster, namespace, is_quiet=False, uses_gpus=uses_gpus):
        yield


@contextlib.contextmanager
def _watched(plane: ControlPlane) -> Iterator[None]:
    """Fail the search when no slot opens: the actor is told, and every waiting stand-in hears it.

    Raises:
        OrchestratorError: that has happened.
    """
    is_over = threading.Event()
    problems: list[OrchestratorError] = []

    def look() -> None:
        while not is_over.wait(_LOOK_S):
            try:
                plane.require_slots()
            except OrchestratorError as problem:
                problems.append(problem)
                plane.policy.give_up.remote(str(problem))
                return

    watcher = threading.Thread(target=look, name="slots", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        is_over.set()
        watcher.join()
    if problems:
        raise problems[0]


def _end_search(plane: ControlPlane) -> str:
    """How the search ended: cut off when trials still run, which then commit and leave."""
    trials = ray.get(plane.policy.status.remote(), timeout=30.0)["trials"]
    if any(trial["state"] in {"running", "queued"} for trial in trials):
        plane.interrupt(lambda: False)
        return "interrupted"
    return "done" if any(trial["state"] in {"done", "stopped", "paused"} for trial in trials) else "failed"
