"""Two GPUs and trials of one and two ranks: nothing is over-committed at any instant, no group is granted twice."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.policies.plan import Allocation, DeviceId, Effect, Generation, Plan, Settings, TrialId
from orchestrator.policies.snapshot import DeviceKind, DeviceView
from orchestrator.policies.tier import Tier
from tests.unit.orchestrator.control.books import Books

CARDS = tuple(
    DeviceView(device_id=DeviceId(f"cuda:{name}"), node_id="n", kind=DeviceKind.CUDA, units=15) for name in "ab"
)
A, B = (card.device_id for card in CARDS)
PLACEMENTS = ((A, B), (B, A), (A,), (B,))


def plan(generation: int, made: Books, weights: dict[TrialId, float]) -> Plan:
    """Shares in those proportions, as large as both GPUs allow."""
    loads = [sum(weight * made.lines[key].placement.count(card) for key, weight in weights.items()) for card in (A, B)]
    most = max(*loads, 1e-9)
    rows = tuple(
        Allocation(
            trial_id=key,
            settings=Settings(
                share=weight / most,
                micro_batch=8,
                grad_accum=1,
                tier=Tier.FP32,
                num_workers=len(made.lines[key].placement),
            ),
            placement=made.lines[key].placement,
            effect=Effect.STEP,
            reason="a test's",
        )
        for key, weight in sorted(weights.items())
    )
    return Plan(generation=Generation(generation), allocations=rows, reason="a test's")


def assert_within(made: Books) -> None:
    for card in (A, B):
        assert made.held(card) <= 1.0 + 1e-6
        units = [unit for line in made.lines.values() for unit in line.held_units(card)]
        assert len(units) == len(set(units))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 6))
def test_two_gpus_are_never_over_committed_and_ranks_get_as_many_groups(seed: int, num_trials: int) -> None:
    draw, made = random.Random(seed), Books()
    made.set_devices(CARDS)
    for number in range(num_trials):
        made.open_line(TrialId(f"t{number}"), draw.choice(PLACEMENTS))
    unanswered: list[tuple[TrialId, int]] = []
    for generation in range(1, 25):
        made.commit(plan(generation, made, {key: draw.choice([0.0, 1.0, 2.0, 5.0]) for key in made.lines}))
        for _ in range(draw.randint(0, 4)):
            for key, grant in made.offer().items():
                assert len({len(groups) for groups in grant.units}) == 1, "ranks of a trial wait for the slowest"
                unanswered.append((key, grant.generation))
            assert_within(made)
            if unanswered and draw.random() < 0.6:
                made.acknowledge(*unanswered.pop(draw.randrange(len(unanswered))))
            if draw.random() < 0.1:  # a trial grows or shrinks: it leaves, and begins elsewhere
                key = draw.choice(sorted(made.lines))
                made.close_line(key)
                made.open_line(key, draw.choice(PLACEMENTS))
                unanswered = [each for each in unanswered if each[0] != key]
            assert_within(made)
    for _ in range(3 * num_trials):
        for key, generation in unanswered:
            made.acknowledge(key, generation)
        unanswered = [(key, grant.generation) for key, grant in made.offer().items()]
        assert_within(made)
    assert not unanswered, "nobody waits for ever"
