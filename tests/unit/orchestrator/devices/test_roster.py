"""Agents of GPU nodes that come and go: who gets one, who serves, and that none is left behind."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from orchestrator.devices.agent import DeviceAgent, NodeReady
from orchestrator.devices.choice import GpuFacts, GpuShare
from orchestrator.devices.ray_agents import gpu_nodes
from orchestrator.devices.roster import RETRY_S, Roster
from orchestrator.errors import ShareError
from orchestrator.share.mps import MpsFound
from orchestrator.telemetry.sampler import Samplers

GOOD = GpuFacts(driver_version=13_000, has_bindings=True, running_mps=None, can_start_mps=True, is_mig=False)
NO_MPS = replace(GOOD, can_start_mps=False)


class FakeMps:
    def __init__(self, directory: Path) -> None:
        self.directory, self.is_running = directory, False

    def start(self) -> MpsFound:
        self.is_running = True
        return MpsFound(environment={"CUDA_MPS_PIPE_DIRECTORY": str(self.directory)}, is_own=True)

    def stop(self) -> None:
        self.is_running = False


@dataclass
class Node:
    """A node with fake GPUs, and its agent as the driver sees it."""

    facts: GpuFacts = GOOD
    is_slow: bool = False
    error: str = ""
    mps: list[FakeMps] = field(default_factory=list)
    num_watches: int = 0
    is_dropped: bool = False

    def __post_init__(self) -> None:
        def make(directory: Path) -> FakeMps:
            self.mps.append(FakeMps(directory))
            return self.mps[-1]

        self.agent = DeviceAgent(
            "auto",
            turns_shares=True,
            token="t",
            own_mps=make,
            ask=lambda: self.facts,
            open_gpus=lambda: Samplers(available=(), problems=()),
        )

    def found(self) -> NodeReady | None:
        if self.error:
            raise ShareError(self.error)
        return None if self.is_slow else self.agent.prepare()

    def watch(self) -> list[str] | None:
        self.num_watches += 1
        return self.agent.watch(print)

    def drop(self) -> None:
        self.is_dropped = True
        self.agent.stop()


@dataclass
class Cluster:
    """Nodes by id, and a clock."""

    nodes: dict[str, Node]
    now_s: float = 100.0
    spawned: list[str] = field(default_factory=list)

    def roster(self) -> Roster:
        return Roster(self._spawn, lambda: self.now_s)

    def _spawn(self, node_id: str) -> Node:
        self.spawned.append(node_id)
        return self.nodes[node_id]


def test_a_node_that_joins_late_gets_an_agent_and_serves_when_it_is_ready() -> None:
    late = Node(is_slow=True)
    cluster = Cluster({"a": Node(), "late": late})
    roster = cluster.roster()
    assert roster.follow(["a"]) == {"a"}
    assert roster.settle() is not None
    assert roster.follow(["a", "late"]) == {"a"}
    assert roster.is_looking
    late.is_slow = False
    assert roster.follow(["a", "late"]) == {"a", "late"}
    assert cluster.spawned == ["a", "late"], "one agent per node"
    assert late.mps[0].is_running


def test_an_agent_goes_with_its_node_and_a_node_that_comes_back_gets_another() -> None:
    cluster = Cluster({"a": Node(), "b": Node()})
    roster = cluster.roster()
    roster.follow(["a", "b"])
    roster.settle()
    assert roster.follow(["b"]) == {"b"}
    assert cluster.nodes["a"].is_dropped
    assert not cluster.nodes["a"].mps[0].is_running
    cluster.nodes["a"] = Node()
    assert roster.follow(["a", "b"]) == {"a", "b"}
    roster.close()
    assert all(node.is_dropped and not node.mps[0].is_running for node in cluster.nodes.values())


def test_every_agent_watches_once() -> None:
    cluster = Cluster({"a": Node(), "b": Node()})
    roster = cluster.roster()
    for node_ids in (["a"], ["a", "b"], ["a", "b"]):
        roster.follow(node_ids)
        roster.watch()
    assert [node.num_watches for node in cluster.nodes.values()] == [1, 1]


def test_a_late_node_that_offers_less_does_not_serve(caplog: pytest.LogCaptureFixture) -> None:
    cluster = Cluster({"a": Node(), "poor": Node(facts=NO_MPS)})
    roster = cluster.roster()
    roster.follow(["a"])
    settled = roster.settle()
    assert settled is not None
    assert settled.share is GpuShare.SM_GROUPS
    assert roster.follow(["a", "poor"]) == {"a"}
    assert roster.follow(["a", "poor"]) == {"a"}
    assert caplog.text.count("no slot opens on node poor") == 1


def test_what_is_known_at_the_start_settles_for_all() -> None:
    cluster = Cluster({"a": Node(), "poor": Node(facts=NO_MPS), "late": Node()})
    roster = cluster.roster()
    roster.follow(["a", "poor"])
    settled = roster.settle()
    assert settled is not None
    assert settled.share is GpuShare.TIME_SLICE
    assert roster.follow(["a", "poor", "late"]) == {"a", "poor", "late"}


def test_an_agent_that_fails_is_started_again_later() -> None:
    cluster = Cluster({"a": Node(error="its process died")})
    roster = cluster.roster()
    assert roster.follow(["a"]) == set()
    assert cluster.nodes["a"].is_dropped
    cluster.nodes["a"] = Node()
    assert roster.follow(["a"]) == set()
    assert cluster.spawned == ["a"]
    cluster.now_s += RETRY_S
    assert roster.follow(["a"]) == {"a"}
    assert cluster.spawned == ["a", "a"]


def test_only_nodes_that_are_there_and_have_a_gpu_get_one() -> None:
    nodes = [
        {"NodeID": "cpu", "Alive": True, "Resources": {"CPU": 4.0}},
        {"NodeID": "gpu", "Alive": True, "Resources": {"CPU": 4.0, "GPU": 1.0}},
        {"NodeID": "gone", "Alive": False, "Resources": {"GPU": 1.0}},
    ]
    assert gpu_nodes(nodes) == ["gpu"]
