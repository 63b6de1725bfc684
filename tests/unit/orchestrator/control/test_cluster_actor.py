"""The policy actor that runs share, without Ray: who may join, what a restart remembers, and what people are shown."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orchestrator.control.cluster_actor import REGISTRY, ClusterActor
from orchestrator.control.cluster_spec import ClusterSpec
from orchestrator.control.orders import SlotHello
from orchestrator.control.spec import RunSpec
from orchestrator.control.terms import Terms
from orchestrator.errors import OrchestratorError
from orchestrator.policies.plan import TrialId
from tests.unit.orchestrator.control.worlds import DEVICE, World, spec

V = "1"


def cluster_spec(path: Path, **changes: Any) -> ClusterSpec:
    plain = ClusterSpec(
        version=V,
        owner="root@head",
        storage=str(path / "cluster"),
        policy="fair_share",
        policy_params={},
        places=False,
        period_s=60.0,
        deadline_s=2.0,
        idle_timeout_s=100.0,
    )
    return replace(plain, **changes)


def run_of(path: Path, name: str, **changes: Any) -> RunSpec:
    return replace(spec(path / name), run_id=name, terms=Terms(user=f"{name}-user"), **changes)


def hello(slot_id: str) -> SlotHello:
    return SlotHello(
        slot_id=slot_id, placement=(DEVICE.device_id,), devices=(DEVICE,), enforced_by="cpu_cores", enforcement=""
    )


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    made = asyncio.new_event_loop()
    yield made
    for task in asyncio.all_tasks(made):
        task.cancel()
    made.run_until_complete(asyncio.sleep(0))
    made.run_until_complete(made.shutdown_default_executor())
    made.close()


async def begin(actor: ClusterActor, run: RunSpec) -> str:
    """Join, and submit a trial that a slot takes."""
    found = await actor.join(run, "s1", V)
    key = found["run"]
    await actor.call(key, "attach", hello("slot-0"))
    await actor.call(key, "submit", TrialId("t0"), {"lr": 0.1})
    return key


def test_runs_that_join_are_decided_together_and_shown_to_people(
    tmp_path: Path, loop: asyncio.AbstractEventLoop
) -> None:
    async def story() -> dict[str, Any]:
        actor = ClusterActor(cluster_spec(tmp_path))
        keys = [await begin(actor, run_of(tmp_path, name)) for name in ("one", "two")]
        assert len(set(keys)) == 2
        await actor.decide()
        shown = await actor.queue()
        for key in keys:
            await actor.leave(key)
        assert (await actor.queue())["runs"] == []
        with pytest.raises(OrchestratorError, match="is not one of this policy actor's"):
            await actor.call(keys[0], "status")
        return shown

    shown = loop.run_until_complete(story())
    assert (shown["policy"], shown["owner"]) == ("fair_share", "root@head")
    assert [(row["name"], row["user"], row["num_running"]) for row in shown["runs"]] == [
        ("one", "one-user", 1),
        ("two", "two-user", 1),
    ]
    plans = [json.loads(line) for line in (tmp_path / "one" / "journal.jsonl").read_text().splitlines()]
    plan = [entry["plan"] for entry in plans if entry["kind"] == "plan"][-1]
    assert [row["settings"]["share"] for row in plan["allocations"]] == [0.5, 0.5]


def test_a_run_of_another_version_is_refused_with_both(tmp_path: Path, loop: asyncio.AbstractEventLoop) -> None:
    async def story() -> dict[str, str]:
        actor = ClusterActor(cluster_spec(tmp_path))
        return await actor.join(run_of(tmp_path, "one"), "s1", "2")

    error = loop.run_until_complete(story())["error"]
    assert "version 2" in error
    assert "version 1" in error


def test_what_runs_that_share_a_policy_cannot_have_is_refused(tmp_path: Path, loop: asyncio.AbstractEventLoop) -> None:
    async def story() -> list[dict[str, str]]:
        actor = ClusterActor(cluster_spec(tmp_path, policy="fifo", places=True))
        wide = run_of(tmp_path, "wide")
        sizes = run_of(tmp_path, "sizes")
        return [
            await actor.join(replace(wide, start=replace(wide.start, num_workers=2)), "s1", V),
            await actor.join(replace(sizes, limits=replace(sizes.limits, min_workers=1, max_workers=2)), "s1", V),
        ]

    wide, sizes = loop.run_until_complete(story())
    assert "have 2 ranks" in wide["error"]
    assert "dials.workers" in sizes["error"]


def test_a_run_that_began_alone_does_not_join_and_one_that_joined_may_come_again(
    tmp_path: Path, loop: asyncio.AbstractEventLoop
) -> None:
    alone = World(tmp_path / "alone")
    alone.close()

    async def story() -> None:
        actor = ClusterActor(cluster_spec(tmp_path))
        found = await actor.join(replace(alone.spec, run_dir=str(tmp_path / "alone")), "s2", V)
        assert "it began alone" in found["error"]
        first = await begin(actor, run_of(tmp_path, "one"))
        again = await actor.join(run_of(tmp_path, "one"), "s2", V)
        assert again["run"] == first, "its trials have the same names in its journal"
        assert len((await actor.queue())["runs"]) == 1

    loop.run_until_complete(story())


def test_two_owners_cannot_both_set_the_policy_while_runs_go_on(
    tmp_path: Path, loop: asyncio.AbstractEventLoop
) -> None:
    async def story() -> list[str]:
        actor = ClusterActor(cluster_spec(tmp_path))
        key = await begin(actor, run_of(tmp_path, "one"))
        other = cluster_spec(tmp_path, policy="goodput", owner="bert@head")
        found = [await actor.change(other), await actor.change(cluster_spec(tmp_path, idle_timeout_s=5.0))]
        await actor.leave(key)
        return [*found, await actor.change(other), await actor.change(cluster_spec(tmp_path, version="2"))]

    refused, taken, later, version = loop.run_until_complete(story())
    assert "decided by fair_share, as root@head has set it" in refused
    assert taken == later == ""
    assert "version 2" in version


def test_a_restarted_actor_has_the_same_runs(tmp_path: Path, loop: asyncio.AbstractEventLoop) -> None:
    async def story() -> tuple[str, dict[str, Any], dict[str, Any]]:
        actor = ClusterActor(cluster_spec(tmp_path))
        key = await begin(actor, run_of(tmp_path, "one"))
        await actor.decide()
        before = await actor.queue()
        again = ClusterActor(cluster_spec(tmp_path))
        status = await again.call(key, "status")
        assert [trial["state"] for trial in status["trials"]] == ["running"]
        return key, before, await again.queue()

    key, before, after = loop.run_until_complete(story())
    assert [row["name"] for row in before["runs"]] == [row["name"] for row in after["runs"]]
    assert json.loads((tmp_path / "cluster" / REGISTRY).read_text())["runs"].keys() == {key}


def test_a_run_that_goes_on_alone_keeps_the_policy_and_the_names_that_it_began_with(
    tmp_path: Path, loop: asyncio.AbstractEventLoop
) -> None:
    from orchestrator.control_plane import as_begun

    alone = run_of(tmp_path, "one", policy="goodput")
    assert as_begun(alone) == alone

    async def story() -> None:
        await begin(ClusterActor(cluster_spec(tmp_path)), alone)

    loop.run_until_complete(story())
    resumed = as_begun(alone)
    assert resumed.policy == "fair_share", "as it was decided until now, so that all of it can be replayed"
    assert resumed.prefix
    assert replace(resumed, policy="goodput", prefix="", policy_params={}, deadline_s=2.0) == alone


def test_a_run_that_nobody_calls_for_any_more_is_let_go(
    tmp_path: Path, loop: asyncio.AbstractEventLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    from orchestrator.control import cluster_actor

    monkeypatch.setattr(cluster_actor, "_LOOK_S", 0.01)

    async def story() -> int:
        actor = ClusterActor(cluster_spec(tmp_path))
        await begin(actor, run_of(tmp_path, "one"))
        monkeypatch.setattr(cluster_actor, "_SILENT_S", 0.0)
        for _ in range(200):
            if not (await actor.queue())["runs"]:
                break
            await asyncio.sleep(0.01)
        return len((await actor.queue())["runs"])

    assert loop.run_until_complete(story()) == 0
