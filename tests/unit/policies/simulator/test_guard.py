from __future__ import annotations

import dataclasses
import threading
from typing import Any

import pytest

from orchestrator.policies.plan import Plan
from orchestrator.policies.simulator import PolicyFaultError, Rules, parse_cluster, simulate
from orchestrator.policies.snapshot import Snapshot
from tests.unit.policies.simulator.worlds import APPLICATIONS, FirstFit, submissions


def run(policy: Any, **rules: float) -> None:
    simulate(
        policy,
        submissions(0.0),
        parse_cluster("1x1"),
        name="mine",
        applications=APPLICATIONS,
        rules=Rules(**rules),  # type: ignore[arg-type]
    )


def test_what_a_policy_raises_is_told_with_when_and_where() -> None:
    class Raises:
        def decide(self, snapshot: Snapshot) -> Plan:
            raise KeyError("job-7")

    with pytest.raises(
        PolicyFaultError, match="policy 'mine', decision 1 at 0 s with 1 trials on 1 devices: raised Key"
    ):
        run(Raises())


def test_an_illegal_plan_is_told_with_its_violations() -> None:
    class Greedy(FirstFit):
        def decide(self, snapshot: Snapshot) -> Plan:
            plan = super().decide(snapshot)
            row = plan.allocations[0]
            twice = dataclasses.replace(row, settings=dataclasses.replace(row.settings, micro_batch=2**20))
            return dataclasses.replace(plan, allocations=(twice,))

    with pytest.raises(PolicyFaultError, match="an illegal plan: 'job-0': micro_batch=1048576; allowed: <= 20"):
        run(Greedy())


@pytest.mark.parametrize("answer", [None, 7, "plan"])
def test_something_that_is_no_plan_is_told(answer: object) -> None:
    class Wrong:
        def decide(self, snapshot: Snapshot) -> Any:
            return answer

    with pytest.raises(PolicyFaultError, match="allowed: Plan"):
        run(Wrong())


def test_a_policy_that_never_returns_is_left() -> None:
    released = threading.Event()

    class Hangs:
        def decide(self, snapshot: Snapshot) -> Plan:
            released.wait()
            return FirstFit().decide(snapshot)

    try:
        with pytest.raises(PolicyFaultError, match=r"no plan after 0\.05 s; allowed: one within that time"):
            run(Hangs(), limit_s=0.05)
    finally:
        released.set()
