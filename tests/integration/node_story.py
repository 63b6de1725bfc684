"""A search on several Ray nodes of one machine: one joins, one drains, one is lost. Told once, for a test and a bench.

Nodes of `ray.cluster_utils` have logical CPUs only: all of them share this machine's cores. Times are in seconds of the
machine's monotonic clock, which journal, step records and this process have in common.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import orchestrator
from orchestrator.view.verify import verify
from tests.integration.runs import Started, call, run_file, start

ENVIRONMENT = {
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
}


@dataclass
class Nodes:
    """What happened to a run while nodes came and went, all times in seconds after the cause."""

    run: Started
    violations: list[Any] = field(default_factory=list)
    times: dict[str, float] = field(default_factory=dict)
    drained: list[dict[str, Any]] = field(default_factory=list)
    lost: list[dict[str, Any]] = field(default_factory=list)
    actor_node: str = ""
    head_node: str = ""


@contextlib.contextmanager
def ray_nodes() -> Iterator[Any]:
    """A cluster whose head has no CPU; nodes are added and removed by the test, in the main thread.

    Ray reads RAY_AUTH_MODE once, when it is imported: `tests/conftest.py` has set it.
    """
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        cluster = Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": 0, "include_dashboard": True, "object_store_memory": 100 * 1024**2},
        )
        try:
            yield cluster
        finally:
            cluster.shutdown()


def add(cluster: Any, num_cpus: int) -> Any:
    return cluster.add_node(num_cpus=num_cpus, object_store_memory=80 * 1024**2)


def drain(cluster: Any, node: Any) -> None:
    """What a cloud's spot notice leads to."""
    from ray._raylet import GcsClient  # type: ignore[attr-defined]
    from ray.core.generated import autoscaler_pb2

    reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    deadline_ms = int((time.time() + 120) * 1000)
    accepted = GcsClient(address=cluster.address).drain_node(node.node_id, reason, "spot notice", deadline_ms)
    assert accepted[0], accepted


def tell(directory: Path) -> Nodes:
    """The whole story."""
    changes = {
        "search": {"space": {"lr": {"loguniform": [0.002, 0.05]}}, "num_trials": 2, "max_concurrent": 2},
        "trial": {"samples_per_report": 20000, "max_reports": 10000, "micro_batch": 16},
        "job": {"name": "mlp", "params": {"width": 128, "depth": 2}},
    }
    with ray_nodes() as cluster:
        first = add(cluster, 1)
        path = run_file(directory / "run.yaml", **changes)
        run = start("run", str(path), "--set", f"cluster.address={cluster.address}", run_dir=directory / "runs" / "r")
        story = Nodes(run)
        try:
            _tell(story, cluster, first)
        finally:
            if run.process.poll() is None:
                run.kill()
    return story


def _tell(story: Nodes, cluster: Any, first: Any) -> None:
    run = story.run
    run.wait_until(lambda: run.of("ack"), "training on the first node")
    story.head_node, story.actor_node = cluster.head_node.node_id, _node_of_actor(cluster)
    second = add(cluster, 2)
    joined_s = time.monotonic()
    run.wait_until(lambda: _slots_on(run, second) and _acks(run, second), "training on the second node")
    drained_s = time.monotonic()
    carried = _trials_on(run, first)
    drain(cluster, first)
    run.wait_until(lambda: _went_on(run, carried, drained_s), "the drained trial went on")
    cluster.remove_node(first)
    third = add(cluster, 2)
    run.wait_until(lambda: _node(run, third, "joined"), "the third node is known")
    lost_s = time.monotonic()
    carried_hard = _trials_on(run, second)
    cluster.remove_node(second, allow_graceful=False)
    run.wait_until(lambda: _went_on(run, carried_hard, lost_s), "the lost trials went on")
    run.wait_until(lambda: len([e for e in run.of("result") if e["t_s"] > lost_s]) >= 2, "they report again")
    stopped = call("stop", str(run.run_dir))
    assert stopped.returncode == 0, stopped.stderr
    code, output = run.end()
    assert code == 130, output
    story.violations = verify(run.run_dir)["violations"]
    story.drained = [e for e in run.of("trial_requeued") if drained_s < e["t_s"] < lost_s]
    story.lost = [e for e in run.of("trial_requeued") if lost_s < e["t_s"] and "left the cluster" in e["reason"]]
    story.times = {
        "joined -> in the ledger": _node(run, second, "joined")[0]["t_s"] - joined_s,
        "joined -> its slot opened": _slots_on(run, second)[0]["t_s"] - joined_s,
        "joined -> share granted": _acks(run, second)[0]["t_s"] - joined_s,
        "joined -> first step on it": _first_step(run, joined_s) - joined_s,
        "drained -> its trial has committed": story.drained[0]["t_s"] - drained_s,
        "drained -> first new step of its trial": max(_steps_of(run, carried, drained_s)) - drained_s,
        "lost -> shares out of the ledger": _node(run, second, "left")[0]["t_s"] - lost_s,
        "lost -> first new step of its trials": max(_steps_of(run, carried_hard, lost_s)) - lost_s,
    }


def _node_of_actor(cluster: Any) -> str:
    from ray.util.state import list_actors

    found = list_actors(cluster.address, filters=[("class_name", "=", "PolicyActor"), ("state", "=", "ALIVE")])
    return str(found[0].node_id)


def _node(run: Started, node: Any, state: str) -> list[dict[str, Any]]:
    return [e for e in run.of("node") if e["node_id"] == node.node_id and e["state"] == state]


def _slots_on(run: Started, node: Any) -> list[dict[str, Any]]:
    return [e for e in run.of("slot") if e["hello"] and e["hello"]["devices"][0]["node_id"] == node.node_id]


def _assigned_on(run: Started, node: Any) -> list[dict[str, Any]]:
    slots = {(e["slot_id"], e["epoch"]) for e in _slots_on(run, node)}
    return [e for e in run.of("trial_assigned") if (e["slot_id"], e["epoch"]) in slots]


def _trials_on(run: Started, node: Any) -> list[str]:
    return sorted({e["trial_id"] for e in _assigned_on(run, node)})


def _acks(run: Started, node: Any) -> list[dict[str, Any]]:
    attempts = {(e["trial_id"], e["attempt"]) for e in _assigned_on(run, node)}
    return [e for e in run.of("ack") if (e["trial_id"], e["attempt"]) in attempts]


def _went_on(run: Started, trials: list[str], since_s: float) -> bool:
    again = {(e["trial_id"], e["attempt"]) for e in run.of("trial_assigned") if e["t_s"] > since_s}
    acked = {e["trial_id"] for e in run.of("ack") if (e["trial_id"], e["attempt"]) in again}
    return bool(trials) and acked >= set(trials)


def _steps_of(run: Started, trials: list[str], since_s: float) -> list[float]:
    """For each trial when the first step of its next attempt was done."""
    again = {e["trial_id"]: e["attempt"] for e in reversed(run.of("trial_assigned")) if e["t_s"] > since_s}
    steps = orchestrator.load_run(run.run_dir).steps.to_pandas()
    rows = [steps[(steps.trial_id == trial) & (steps.attempt == again[trial])] for trial in trials]
    return [float((row.start_s + row.step_s).min()) for row in rows]


def _first_step(run: Started, since_s: float) -> float:
    return min(_steps_of(run, [e["trial_id"] for e in run.of("trial_assigned") if e["t_s"] > since_s][:1], since_s))
