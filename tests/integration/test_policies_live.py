"""Every policy in a live run on two nodes, with trials that it pauses and moves: all end as undisturbed ones.

`make test` runs one that pauses and one that moves; `make policies` runs all.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.policies import POLICIES
from orchestrator.view.verify import verify
from tests.integration.node_story import add, ray_nodes
from tests.integration.runs import Started, results, run_file, start

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SEARCH = {"space": {"lr": {"loguniform": [0.002, 0.05]}}, "num_trials": 4, "max_concurrent": 3}
TRIAL = {"samples_per_report": 16000, "max_reports": 2, "micro_batch": 16}
PAUSES = {"name": "tiresias", "params": {"thresholds_s": [0.8]}, "period_s": 0.2}
MOVES = {"name": "tests.moving_policy:Wanders", "params": {"every": 8000}, "period_s": 0.2}
OTHERS = sorted(POLICIES.keys() - {"tiresias"})


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Two nodes with a core each; all slots of a run fit on them."""
    with ray_nodes() as cluster:
        add(cluster, 2)
        add(cluster, 2)
        yield cluster.address


@pytest.fixture(scope="module")
def undisturbed(address: str, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], Any]:
    """The results of trials that stay where they begin."""
    return results(whole_run(tmp_path_factory.mktemp("static"), address, {"name": "static"}, places=False).run_dir)


def whole_run(directory: Path, address: str, policy: dict[str, Any], *, places: bool = True) -> Started:
    fixed = {name: {"enabled": False} for name in ("share", "batch", "precision")}
    dials = {**fixed, "placement": {"enabled": places}}
    path = run_file(directory / "run.yaml", search=SEARCH, trial=TRIAL, policy=policy, dials=dials)
    run = start("run", str(path), "--set", f"cluster.address={address}", run_dir=directory / "runs" / "r")
    try:
        code, output = run.end()
    finally:
        if run.process.poll() is None:
            run.kill()
    assert code == 0, output
    return run


def require_conformity(run: Started, undisturbed: dict[tuple[str, int], Any]) -> None:
    assert run.of("refusal") == []
    assert verify(run.run_dir)["violations"] == []
    assert {trial["state"] for trial in run.status["trials"]} == {"done"}
    assert results(run.run_dir) == undisturbed
    assert run.of("run_ended")[-1]["leaks"] == {"actors": 0, "placement_groups": 0, "processes": 0}


def test_a_trial_that_is_paused_ends_as_one_that_is_not(
    address: str, undisturbed: dict[tuple[str, int], Any], tmp_path: Path
) -> None:
    run = whole_run(tmp_path, address, PAUSES)
    require_conformity(run, undisturbed)
    paused = [entry for entry in run.of("trial_requeued") if "gave its devices back" in entry["reason"]]
    assert any(entry["step"] % 1000 for entry in paused), "between two reports, at a commit of its own"


def test_a_trial_that_moves_from_node_to_node_ends_as_one_that_stays(
    address: str, undisturbed: dict[tuple[str, int], Any], tmp_path: Path
) -> None:
    run = whole_run(tmp_path, address, MOVES)
    require_conformity(run, undisturbed)
    nodes = {entry["slot_id"]: entry["hello"]["placement"][0] for entry in run.of("slot") if entry["hello"]}
    placed: dict[str, list[str]] = {}
    for entry in run.of("trial_assigned"):
        placed.setdefault(entry["trial_id"], []).append(nodes[entry["slot_id"]])
    assert any(len(set(each)) == 2 for each in placed.values()), placed


@pytest.mark.policies
@pytest.mark.parametrize("name", OTHERS)
def test_every_policy_lets_all_trials_end_as_undisturbed_ones(
    name: str, address: str, undisturbed: dict[tuple[str, int], Any], tmp_path: Path
) -> None:
    require_conformity(whole_run(tmp_path, address, {"name": name, "period_s": 0.2}), undisturbed)
