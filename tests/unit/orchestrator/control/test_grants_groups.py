"""SM groups in the ledger: none is granted twice at any instant, however late trials answer, and all get theirs."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.policies.plan import Allocation, DeviceId, Effect, Generation, Plan, Settings, TrialId
from orchestrator.policies.snapshot import DeviceKind, DeviceView
from orchestrator.policies.tier import Tier
from tests.unit.orchestrator.control.books import Books

GPU = DeviceView(device_id=DeviceId("cuda:0"), node_id="n", kind=DeviceKind.CUDA, units=15)


def plan(generation: int, shares: dict[str, float]) -> Plan:
    rows = tuple(
        Allocation(
            trial_id=TrialId(key),
            settings=Settings(share=share, micro_batch=8, grad_accum=1, tier=Tier.FP32, num_workers=1),
            placement=(GPU.device_id,),
            effect=Effect.STEP,
            reason="a test's",
        )
        for key, share in sorted(shares.items())
    )
    return Plan(generation=Generation(generation), allocations=rows, reason="a test's")


def ledger(*trials: str) -> Books:
    made = Books()
    made.set_devices((GPU,))
    for trial in trials:
        made.open_line(TrialId(trial), (GPU.device_id,))
    return made


def held(made: Books) -> dict[str, set[int]]:
    return {key: line.held_units(GPU.device_id) for key, line in made.lines.items()}


def assert_disjoint(made: Books) -> None:
    units = [unit for groups in held(made).values() for unit in groups]
    assert len(units) == len(set(units)), held(made)


def test_a_group_moves_only_when_it_was_given_back() -> None:
    made = ledger("a", "b")
    made.commit(plan(1, {"a": 12 / 15, "b": 3 / 15}))
    assert set(made.offer()) == {"a", "b"}
    made.acknowledge(TrialId("b"), 1)
    made.commit(plan(2, {"a": 4 / 15, "b": 11 / 15}))
    assert set(made.offer()) == {"a"}, "b waits for what a may still be using"
    made.acknowledge(TrialId("a"), 1)
    assert made.offer() == {}
    made.acknowledge(TrialId("a"), 2)
    assert made.offer()[TrialId("b")].amount == 11
    assert_disjoint(made)


def test_a_pause_gives_all_groups_back() -> None:
    made = ledger("a", "b")
    made.commit(plan(1, {"a": 1.0, "b": 0.0}))
    assert made.offer()[TrialId("b")].units == ((),)
    made.acknowledge(TrialId("a"), 1)
    made.acknowledge(TrialId("b"), 1)
    made.commit(plan(2, {"a": 0.0, "b": 1.0}))
    assert set(made.offer()) == {"a"}
    made.acknowledge(TrialId("a"), 2)
    assert made.offer()[TrialId("b")].amount == 15


def test_a_trial_without_a_group_waits_for_one() -> None:
    names = [f"t{i:02}" for i in range(16)]
    made = ledger(*names)
    made.commit(plan(1, dict.fromkeys(names, 1 / 16)))
    assert set(made.offer()) == set(names[:15])
    made.close_line(TrialId("t03"))
    made.commit(plan(2, {name: 1 / 16 for name in names if name != "t03"}))
    assert "t15" in made.offer()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 6))
def test_no_group_is_ever_granted_twice_and_everybody_gets_what_was_planned(seed: int, num_trials: int) -> None:
    draw = random.Random(seed)
    names = [f"t{i}" for i in range(num_trials)]
    made = ledger(*names)
    unanswered: list[tuple[str, int]] = []
    for generation in range(1, 30):
        weights = {name: draw.choice([0.0, 1.0, 2.0, 5.0]) for name in made.lines}
        total = sum(weights.values()) or 1.0
        made.commit(plan(generation, {name: weight / total for name, weight in weights.items()}))
        for _ in range(draw.randint(0, 4)):
            unanswered += [(key, grant.generation) for key, grant in made.offer().items()]
            assert_disjoint(made)
            if unanswered and draw.random() < 0.6:  # the others are slow to release
                made.acknowledge(*unanswered.pop(draw.randrange(len(unanswered))))  # type: ignore[arg-type]
            if draw.random() < 0.05 and len(made.lines) > 1:
                made.close_line(draw.choice(sorted(made.lines)))
            assert_disjoint(made)
    for _ in range(3 * num_trials):  # everybody answers: nobody may wait for ever
        for key, generation in unanswered:
            made.acknowledge(TrialId(key), generation)
        unanswered = [(key, grant.generation) for key, grant in made.offer().items()]
        assert_disjoint(made)
    for line in made.lines.values():
        assert line.applied is not None
        assert line.target is not None
        assert line.applied.units == line.target.units
