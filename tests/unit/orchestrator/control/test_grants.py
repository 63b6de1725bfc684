"""The ledger: no device is over-committed at any instant, however slowly trials acknowledge."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.policies.plan import Allocation, DeviceId, Effect, Generation, Plan, Settings, TrialId
from orchestrator.policies.snapshot import DeviceKind, DeviceView
from orchestrator.policies.tier import Tier
from tests.unit.orchestrator.control.books import Books

A, B, C = TrialId("a"), TrialId("b"), TrialId("c")
DEVICE = DeviceView(device_id=DeviceId("cpu:0"), node_id="n", kind=DeviceKind.CPU, units=4)


def dials(share: float, tier: Tier = Tier.FP32) -> Settings:
    return Settings(share=share, micro_batch=8, grad_accum=1, tier=tier, num_workers=1)


def plan(generation: int, **shares: float) -> Plan:
    allocations = tuple(
        Allocation(
            trial_id=TrialId(name),
            settings=dials(share),
            placement=(DEVICE.device_id,),
            effect=Effect.STEP,
            reason="because",
        )
        for name, share in sorted(shares.items())
    )
    return Plan(generation=Generation(generation), allocations=allocations, reason="because")


def ledger(*trials: TrialId) -> Books:
    result = Books()
    result.set_devices((DEVICE,))
    for trial in trials:
        result.open_line(trial, (DEVICE.device_id,))
    return result


def test_a_grant_waits_for_the_release_it_depends_on() -> None:
    books = ledger(A)
    books.commit(plan(1, a=1.0))
    assert set(books.offer()) == {A}
    books.acknowledge(A, 1)
    books.open_line(B, (DEVICE.device_id,))
    books.commit(plan(2, a=0.5, b=0.5))
    assert set(books.offer()) == {A}, "only the release may go out"
    assert books.held(DEVICE.device_id) == 1.0
    assert books.offer() == {}
    books.acknowledge(A, 2)
    assert set(books.offer()) == {B}
    assert books.held(DEVICE.device_id) == 1.0


def test_an_acknowledgement_of_an_older_offer_does_not_free_what_a_newer_one_holds() -> None:
    books = ledger(A)
    books.commit(plan(1, a=0.25))
    books.offer()
    books.commit(plan(2, a=1.0))
    books.offer()
    books.acknowledge(A, 1)
    assert books.held(DEVICE.device_id) == 1.0


def test_a_release_frees_nothing_before_it_is_acknowledged() -> None:
    books = ledger(A)
    books.commit(plan(1, a=1.0))
    books.offer()
    books.acknowledge(A, 1)
    books.commit(plan(2, a=0.25))
    books.offer()
    assert books.held(DEVICE.device_id) == 1.0
    books.acknowledge(A, 2)
    assert books.held(DEVICE.device_id) == 0.25


def test_a_stale_or_unknown_acknowledgement_is_ignored() -> None:
    books = ledger(A)
    books.commit(plan(3, a=0.5))
    books.offer()
    assert books.acknowledge(A, 2) is None
    assert books.acknowledge(B, 3) is None
    assert books.acknowledge(A, 3) is not None
    assert books.acknowledge(A, 3) is None


def test_an_unchanged_target_is_not_offered_again() -> None:
    books = ledger(A)
    books.commit(plan(1, a=0.5))
    books.offer()
    books.acknowledge(A, 1)
    books.commit(plan(2, a=0.5))
    assert books.offer() == {}


def test_whole_units_are_disjoint() -> None:
    books = ledger(A, B)
    books.commit(plan(1, a=0.5, b=0.5))
    offers = books.offer()
    assert not set(offers[A].units[0]) & set(offers[B].units[0])
    assert [offers[trial].amount for trial in (A, B)] == [2.0, 2.0]


def test_an_override_is_recorded_once_and_never_enlarges_what_is_held() -> None:
    books = ledger(A)
    books.commit(plan(1, a=0.5))
    books.offer()
    books.acknowledge(A, 1)
    assert books.record_override(A, 1, dials(0.5, Tier.BF16))
    assert not books.record_override(A, 1, dials(0.5, Tier.FP32))
    assert books.running_settings(A) == dials(0.5, Tier.BF16)
    assert books.held(DEVICE.device_id) == 0.5


shares = st.sampled_from([0.125, 0.25, 0.5, 0.75, 1.0])
moves = st.lists(
    st.one_of(
        st.tuples(st.just("plan"), shares, shares, shares),
        st.tuples(st.just("ack"), st.sampled_from([A, B, C]), st.integers(0, 3)),
        st.tuples(st.just("end"), st.sampled_from([A, B, C])),
    ),
    max_size=40,
)


@given(moves)
@settings(max_examples=300, deadline=None)
def test_no_history_ever_over_commits_a_device(history: list[tuple[object, ...]]) -> None:
    """What trials may be using by what they were told never exceeds the device, however slow they are."""
    books = ledger(A, B, C)
    told: dict[TrialId, list[tuple[int, float]]] = {A: [(0, 0.0)], B: [(0, 0.0)], C: [(0, 0.0)]}
    generation = 0
    for move in history:
        if move[0] == "plan":
            wanted = [float(str(share)) for share in move[1:]]
            total = max(1.0, sum(wanted))
            live = {t: w / total for t, w in zip((A, B, C), wanted, strict=True) if t in books.lines}
            generation += 1
            books.commit(plan(generation, **{str(trial): share for trial, share in live.items()}))
        elif move[0] == "ack":
            trial, number = TrialId(str(move[1])), int(str(move[2]))
            offers = told[trial][1:]
            if trial in books.lines and number < len(offers):  # it applied this one and all before it
                acknowledged = offers[number]
                told[trial] = [acknowledged, *offers[number + 1 :]]
                books.acknowledge(trial, acknowledged[0])
        else:
            trial = TrialId(str(move[1]))
            books.close_line(trial)
            told[trial] = [(0, 0.0)]
        for trial, grant in books.offer().items():
            told[trial].append((grant.generation, grant.settings.share))
        worst = sum(max(share for _, share in offers) for offers in told.values())
        assert worst <= 1.0 + 1e-9
