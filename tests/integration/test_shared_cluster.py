"""Two searches on one cluster under one policy actor: nothing is over-committed between them, each is as if alone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orchestrator.api import Run
from orchestrator.control.events import Event
from orchestrator.control.journal import History, read_history
from orchestrator.view.verify import verify
from orchestrator.view.verify_grants import over_commitments
from tests.integration.node_story import add, ray_nodes
from tests.integration.runs import Started, call, run_file, start

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def merged(runs: list[Started]) -> History:
    """The grants of several runs in the order in which they happened, by one clock."""
    entries: list[Event] = []
    for run in runs:
        for event in read_history(run.run_dir).entries:
            names = {
                name: f"{run.run_dir.name}/{getattr(event, name)}"
                for name in ("trial_id", "slot_id")
                if hasattr(event, name)
            }
            entries.append(replace(event, **names))  # type: ignore[arg-type]
    return History(entries=tuple(sorted(entries, key=lambda event: event.t_s)), damage=(), torn_tail_bytes=0)


def decided_together(run: Started) -> bool:
    """Whether a trial has acknowledged its part of a plan for the trials of both runs, after a report of its own."""
    joint = {entry["generation"] for entry in run.of("plan") if len(entry["plan"]["allocations"]) == 2}
    return bool(run.of("result")) and any(entry["generation"] in joint for entry in run.of("ack"))


def test_two_searches_share_a_cluster(tmp_path: Path) -> None:
    search = {"space": {"lr": {"loguniform": [0.002, 0.05]}}, "num_trials": 1, "max_concurrent": 1}
    trial = {"samples_per_report": 16000, "max_reports": 10000, "micro_batch": 16}  # they end when they are told to
    dials = {"share": {"min": 0.125}, "batch": {"enabled": False}, "precision": {"enabled": False}}
    policy = tmp_path / "policy.yaml"
    policy.write_text(f"policy: {{name: fair_share}}\nstorage: {tmp_path / 'cluster'}\n")
    with ray_nodes() as cluster:
        add(cluster, 2)
        where = ("--address", cluster.address)
        begun = call("up", str(policy), *where, "--json")
        assert begun.returncode == 0, begun.stderr
        runs: list[Started] = []
        for name in ("one", "two"):
            file = tmp_path / f"{name}.yaml"
            queue = {"user": f"user-{name}"}
            run_file(file, name=name, search=search, trial=trial, dials=dials, queue=queue)
            runs.append(
                start("run", str(file), "--set", f"cluster.address={cluster.address}", run_dir=tmp_path / "runs" / name)
            )
        try:
            for run in runs:
                run.wait_until(lambda run=run: decided_together(run), "both trials share the cores")  # type: ignore[misc]
            shown: dict[str, Any] = json.loads(call("queue", *where, "--json").stdout)
            refused = call("down", *where)
            for run in runs:
                Run(run.run_dir).stop("trial-00000")
            ends = [run.end() for run in runs]
        finally:
            for run in runs:
                if run.process.poll() is None:
                    run.kill()
        left = json.loads(call("queue", *where, "--json").stdout)["runs"]
        ended = call("down", *where)
    assert [code for code, _ in ends] == [0, 0], ends
    assert {row["name"] for row in shown["runs"]} == {"one", "two"}
    assert sum(row["devices"] for row in shown["runs"]) <= 1.0 + 1e-6
    assert refused.returncode == 1
    assert "2 runs go on" in refused.stderr
    assert left == []
    assert ended.returncode == 0, ended.stderr
    assert list(over_commitments(merged(runs), {})) == []
    for run, other in zip(runs, reversed(runs), strict=True):
        assert verify(run.run_dir)["violations"] == []
        assert {each["state"] for each in run.status["trials"]} == {"stopped"}
        assert {each["state"] for each in run.of("trial_ended")} == {"stopped"}
        assert run.of("run_ended")[-1]["leaks"] == {"actors": 0, "placement_groups": 0, "processes": 0}
        text = (run.run_dir / "journal.jsonl").read_text()
        assert f"user-{other.run_dir.name}" not in text
        assert str(other.run_dir) not in text
