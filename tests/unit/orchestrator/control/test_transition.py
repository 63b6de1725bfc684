"""`apply`: in whatever order events come, it never raises, keeps the world consistent, and refuses with a reason."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.control import events as ev
from orchestrator.control import fault_events as fev
from orchestrator.control import signals as sig
from orchestrator.control.effects import Applied, Refused
from orchestrator.control.entries import EVENTS
from orchestrator.control.gain import Measurement, Pace
from orchestrator.control.grants import held
from orchestrator.control.orders import Note, Outcome, Resumption, SlotHello, Status, StopMode, TierReport
from orchestrator.control.requested import RequestTaken
from orchestrator.control.transition import _RULES, apply
from orchestrator.control.world import NodeState, SlotState, TrialState, World
from orchestrator.policies.codec import to_jsonable
from orchestrator.policies.learn.fit import TrialFit
from orchestrator.policies.plan import Allocation, Effect, Generation, Plan, Settings, TrialId
from orchestrator.policies.snapshot import DeviceKind, DeviceView, Snapshot, StepModeView
from orchestrator.policies.tier import Tier
from orchestrator.share.verification import judge_memory
from tests.unit.orchestrator.control.states import durable_state
from tests.unit.orchestrator.control.worlds import DEVICE, resizing_spec, spec_of

SPEC = spec_of(Path("none"))
TRIALS = st.sampled_from([TrialId("t0"), TrialId("t1"), TrialId("t2")])
SLOTS = st.sampled_from(["slot-0", "slot-1"])
GPU = DeviceView(device_id="gpu:0", node_id="n0", kind=DeviceKind.CUDA, units=4)  # type: ignore[arg-type]
DEVICES = {DEVICE.device_id: DEVICE, GPU.device_id: GPU}
SMALL = st.integers(0, 3)
TEXT = st.sampled_from(["", "why"])
SETTINGS = st.builds(
    Settings,
    share=st.sampled_from([0.25, 0.5, 1.0]),
    micro_batch=st.sampled_from([4, 8]),
    grad_accum=st.just(1),
    tier=st.sampled_from([Tier.FP32, Tier.BF16]),
    num_workers=st.sampled_from([1, 2]),
)
PLACES = st.lists(st.sampled_from(list(DEVICES)), min_size=1, max_size=2).map(tuple)


def hello(slot_id: str, placement: tuple[Any, ...]) -> SlotHello:
    devices = tuple(DEVICES[each] for each in dict.fromkeys(placement))
    return SlotHello(slot_id=slot_id, placement=placement, devices=devices, enforced_by="x", enforcement="")


def plan(generation: int, rows: dict[TrialId, tuple[Settings, tuple[Any, ...]]], resize_to: int | None) -> ev.Event:
    found = Plan(
        generation=Generation(generation),
        reason="because",
        allocations=tuple(
            Allocation(
                trial_id=key,
                settings=dials,
                placement=places,
                effect=Effect.STEP,
                reason="because",
                resize_to=resize_to,
            )
            for key, (dials, places) in sorted(rows.items())
        ),
    )
    seen = Snapshot(now_s=1.0, seed=0, plan=found, devices=(DEVICE,), trials=())
    return ev.PlanCommitted.of(seen, found)


def outcome(status: Status) -> Outcome:
    return Outcome(status=status, step=1, num_samples=8, reason="why")


EVENTS_OF: dict[type[ev.Event], st.SearchStrategy[Any]] = {
    fev.CommitDamaged: st.builds(
        fev.CommitDamaged, trial_id=TRIALS, attempt=SMALL, checkpoint=TEXT, step=SMALL, num_steps=SMALL
    ),
    sig.TrialNoted: st.builds(sig.TrialNoted, trial_id=TRIALS, note=st.builds(Note, kind=TEXT, text=TEXT)),
    fev.RankSilent: st.builds(
        fev.RankSilent,
        trial_id=TRIALS,
        attempt=SMALL,
        slot_id=SLOTS,
        rank=SMALL,
        silent_s=st.just(12.0),
        limit_s=st.just(10.0),
        doing=TEXT,
        process=TEXT,
        stack=TEXT,
        is_restarted=st.booleans(),
    ),
    fev.TrialRetried: st.builds(
        fev.TrialRetried, trial_id=TRIALS, attempt=SMALL, checkpoint=st.sampled_from([None, "/c/0"]), reason=TEXT
    ),
    ev.RunBegan: st.builds(ev.RunBegan, schema=st.just(2), run_id=st.just("r"), spec=st.just(SPEC.to_jsonable())),
    ev.Recovered: st.builds(ev.Recovered, start_id=TEXT, are_workers_gone=st.booleans()),
    ev.RunInterrupted: st.builds(ev.RunInterrupted),
    ev.RunEnded: st.builds(ev.RunEnded, state=TEXT, leaks=st.just({})),
    ev.SlotChanged: st.one_of(
        st.builds(ev.SlotChanged, slot_id=SLOTS, state=st.sampled_from(list(SlotState)), epoch=SMALL),
        st.builds(
            lambda slot_id, epoch, places: ev.SlotChanged(
                slot_id=slot_id, state="idle", epoch=epoch, hello=hello(slot_id, places)
            ),
            SLOTS,
            st.integers(0, 9),
            PLACES,
        ),
    ),
    RequestTaken: st.builds(
        RequestTaken,
        request_id=TEXT,
        by=TEXT,
        command=st.sampled_from(["add", "clone", "stop", "pause", "resume", "set"]),
        trial_id=st.one_of(TRIALS, st.just(TrialId(""))),
        values=st.sampled_from([{}, {"weight": 2.0}, {"priority": 1}]),
    ),
    ev.SlotPoisoned: st.builds(
        ev.SlotPoisoned,
        slot_id=SLOTS,
        epoch=SMALL,
        outcome=st.sampled_from([Status.MEMORY, Status.TIER, Status.FAILED]).map(outcome),
    ),
    ev.NodeChanged: st.builds(
        ev.NodeChanged, node_id=st.sampled_from(["n0", "n1"]), state=st.sampled_from([*NodeState, "?"]), num_cores=SMALL
    ),
    ev.PlanCommitted: st.builds(
        plan,
        st.integers(0, 9),
        st.dictionaries(TRIALS, st.tuples(SETTINGS, PLACES), max_size=3),
        st.sampled_from([None, 2]),
    ),
    ev.PlanRefused: st.builds(ev.PlanRefused, generation=SMALL, reason=TEXT, violations=st.just(())),
    ev.Offered: st.builds(
        ev.Offered,
        generation=SMALL,
        trial_id=TRIALS,
        settings=SETTINGS,
        units=st.just(((0,), (1,))),
        amount=st.just(1.0),
    ),
    ev.Acknowledged: st.builds(
        ev.Acknowledged,
        generation=SMALL,
        trial_id=TRIALS,
        attempt=SMALL,
        step=SMALL,
        settings=SETTINGS,
        ack_s=st.just(0.1),
        switch_s=st.just(0.1),
        dials=st.just(("share",)),
    ),
    ev.Overridden: st.builds(
        ev.Overridden, trial_id=TRIALS, generation=SMALL, number=SMALL, settings=SETTINGS, reason=TEXT
    ),
    ev.GainRealised: st.builds(
        ev.GainRealised,
        generation=SMALL,
        trial_id=TRIALS,
        dial=st.just("share+batch"),
        predicted=st.just(None),
        realised=st.sampled_from([-2.0, 0.5]),
    ),
    ev.ShareChecked: st.builds(
        ev.ShareChecked, generation=SMALL, trial_id=TRIALS, what=TEXT, verdict=TEXT, reason=TEXT
    ),
    ev.TrialQueued: st.builds(ev.TrialQueued, trial_id=TRIALS, params=st.just({"lr": 0.1})),
    ev.TrialAssigned: st.builds(ev.TrialAssigned, trial_id=TRIALS, attempt=SMALL, slot_id=SLOTS, epoch=SMALL),
    ev.TrialToldToStop: st.builds(
        ev.TrialToldToStop, trial_id=TRIALS, mode=st.sampled_from([*StopMode, "?"]), num_workers=st.just(2)
    ),
    ev.TrialRequeued: st.builds(
        ev.TrialRequeued, trial_id=TRIALS, attempt=SMALL, reason=TEXT, num_workers=st.sampled_from([None, 2])
    ),
    ev.TrialPaused: st.builds(ev.TrialPaused, trial_id=TRIALS, attempt=SMALL, reason=TEXT),
    ev.TrialEnded: st.builds(
        ev.TrialEnded,
        trial_id=TRIALS,
        state=st.sampled_from([*TrialState, "?"]),
        reason=TEXT,
        step=SMALL,
        num_samples=SMALL,
    ),
    ev.TrialResized: st.builds(
        ev.TrialResized,
        trial_id=TRIALS,
        stage=st.sampled_from(["wanted", "done", "given_up", "?"]),
        num_workers=st.just(2),
        reason=TEXT,
        restart_s=st.just(None),
    ),
    ev.DialsDeclared: st.builds(
        ev.DialsDeclared,
        trial_id=TRIALS,
        step=SMALL,
        start=SETTINGS,
        limits=st.just(SPEC.limits),
        off=st.sampled_from([{}, {"precision": "why"}]),
    ),
    ev.TrialSuspected: st.builds(ev.TrialSuspected, trial_id=TRIALS, reason=TEXT),
    ev.ResumptionWanted: st.builds(
        ev.ResumptionWanted,
        trial_id=TRIALS,
        params=st.just({}),
        resumption=st.builds(Resumption, token=TEXT, origin=TRIALS, num_reports=SMALL),
    ),
    ev.TrialContinued: st.builds(
        ev.TrialContinued,
        trial_id=TRIALS,
        attempt=SMALL,
        params=st.just({}),
        origin=st.one_of(st.none(), TRIALS),
        num_reports=SMALL,
    ),
    ev.Reported: st.builds(
        ev.Reported,
        trial_id=TRIALS,
        index=SMALL,
        step=SMALL,
        num_samples=SMALL,
        metrics=st.sampled_from([{"val_loss": 1.0}, {"val_loss": None}, {}]),
    ),
    ev.CommitPinned: st.builds(ev.CommitPinned, trial_id=TRIALS, index=SMALL, checkpoint=st.just("/kept")),
    ev.ReportTold: st.builds(ev.ReportTold, trial_id=TRIALS, index=SMALL),
    sig.ReportToldAgain: st.builds(sig.ReportToldAgain, trial_id=TRIALS, index=SMALL),
    sig.ReportWanted: st.builds(sig.ReportWanted, trial_id=TRIALS, index=SMALL),
    sig.TrialReleased: st.builds(sig.TrialReleased, trial_id=TRIALS),
    sig.TokenSeen: st.builds(sig.TokenSeen, trial_id=TRIALS, token=TEXT),
    sig.RungOpened: st.builds(sig.RungOpened, number=SMALL),
    sig.SlotExpected: st.builds(sig.SlotExpected, slot_id=SLOTS, num_workers=st.sampled_from([1, 2])),
    sig.SlotToldToClose: st.builds(sig.SlotToldToClose, slot_id=SLOTS),
    sig.SlotsGivenUp: st.builds(sig.SlotsGivenUp, reason=TEXT),
    sig.TiersFound: st.builds(
        sig.TiersFound, trial_id=TRIALS, report=st.just(TierReport(step=1, tiers=(), spent_s=0.0))
    ),
    sig.StepModeFound: st.builds(
        sig.StepModeFound,
        trial_id=TRIALS,
        found=st.just(
            StepModeView(tier=Tier.FP32, micro_batch=8, grad_accum=1, is_replayed=False, eager_s=0.1, replayed_s=0.2)
        ),
    ),
    sig.FitAdvanced: st.builds(
        sig.FitAdvanced, trial_id=TRIALS, fit=st.just(TrialFit()), loss=st.sampled_from([None, 1.0])
    ),
    sig.PaceSeen: st.builds(
        sig.PaceSeen, trial_id=TRIALS, pace=st.just(Pace(throughput=1.0, efficiency=1.0)), predicted=st.just(None)
    ),
    sig.MeasurementBegan: st.builds(
        sig.MeasurementBegan,
        trial_id=TRIALS,
        measurement=st.builds(
            Measurement,
            generation=SMALL,
            dials=st.just(("share",)),
            predicted=st.just(None),
            before=st.just(Pace(throughput=1.0, efficiency=1.0)),
            efficiency_after=st.just(1.0),
        ),
    ),
    sig.CheckMade: st.builds(sig.CheckMade, trial_id=TRIALS, check=st.just(judge_memory(1, 1, "seen"))),
}
OFTEN = (ev.SlotChanged, ev.TrialAssigned, ev.PlanCommitted, ev.Offered, ev.Acknowledged, ev.Reported)
ANY = st.one_of([*EVENTS_OF.values(), *(EVENTS_OF[each] for each in OFTEN for _ in range(6))])
BEGUN = (
    *(ev.TrialQueued(trial_id=TrialId(name), params={}) for name in ("t0", "t1", "t2")),
    *(
        ev.SlotChanged(slot_id=name, state="idle", epoch=1, hello=hello(name, (DEVICE.device_id,)))
        for name in ("slot-0", "slot-1")
    ),
    *(
        ev.TrialAssigned(trial_id=TrialId(trial), attempt=0, slot_id=slot, epoch=1)
        for trial, slot in (("t0", "slot-0"), ("t1", "slot-1"))
    ),
)


def test_every_event_has_a_rule_and_is_tried_here() -> None:
    assert set(EVENTS.values()) <= set(_RULES)
    signals = {each for each in vars(sig).values() if isinstance(each, type) and issubclass(each, sig.Signal)}
    assert set(EVENTS.values()) | signals - {sig.Signal} == set(_RULES)
    assert set(_RULES) - {sig.RecordsCame} == set(EVENTS_OF), "records are folded in every run of `worlds`"


@given(st.lists(ANY, min_size=20, max_size=80), st.booleans())
@settings(max_examples=100, deadline=None)
def test_whatever_happens_in_whatever_order_the_world_stays_consistent(
    events: list[ev.Event], is_resizing: bool
) -> None:
    spec = resizing_spec(Path("none"), "static", 2) if is_resizing else SPEC
    world = World((spec,))
    run = world.runs["r"]
    for number, event in enumerate([*BEGUN, *events]):
        before = durable_state(world, run)
        found = apply(world, _with(event, number))
        if isinstance(found, Refused):
            assert found.reason.startswith(type(event).__name__)
            assert durable_state(world, run) == before
        check(world)


def check(world: World) -> None:
    run = world.runs["r"]
    assert sorted(run.queue) == sorted(t.trial_id for t in run.trials.values() if t.state is TrialState.QUEUED)
    for trial in run.trials.values():
        is_in_slot = trial.state is TrialState.RUNNING
        assert is_in_slot == (trial.slot_id is not None) == (trial.account is not None) == (trial.window is not None)
        slot = world.slot_of(trial)
        assert slot is None or (slot.trials == (trial.key,) and slot.state is SlotState.RUNNING)
        assert [report.index for report in trial.reports] == list(range(len(trial.reports)))
    for slot in world.slots.values():
        assert (slot.state is SlotState.RUNNING) == bool(slot.trials)
    for device_id in DEVICES:
        assert held(run.accounts(), device_id) <= 1.0 + 1e-9


def _with(event: ev.Event, number: int) -> ev.Event:
    return replace(event, t_s=float(number), run_id="r")


def test_what_cannot_have_happened_is_refused_with_the_reason() -> None:
    world = World((SPEC,))
    end = ev.TrialEnded(run_id="r", trial_id=TrialId("t9"), state="done", reason="", step=0, num_samples=0)
    found = apply(world, end)
    assert found == Refused("TrialEnded: there is no trial 't9'")
    assert apply(world, ev.Recovered(run_id="s", are_workers_gone=True)) == Refused("Recovered: there is no run 's'")


def test_the_head_of_a_journal_makes_its_run_known() -> None:
    world = World()
    head = ev.RunBegan(schema=2, run_id="r", start_id="s1", spec=SPEC.to_jsonable())
    assert isinstance(apply(world, head), Applied)
    assert to_jsonable(world.runs["r"].spec) == to_jsonable(SPEC)
    assert world.runs["r"].start_ids == ["s1"]


def test_a_plan_that_cannot_be_read_is_refused() -> None:
    world = World((SPEC,))
    torn = ev.PlanCommitted(run_id="r", generation=Generation(1), snapshot={}, plan={})
    found = apply(world, torn)
    assert isinstance(found, Refused)
    assert "cannot be read" in found.reason
    assert world.runs["r"].plan.generation == 0


@pytest.mark.parametrize("share", [0.5, 0.6])
def test_an_offer_that_would_over_commit_a_device_is_refused(share: float) -> None:
    world = World((SPEC,))
    for name in ("t0", "t1"):
        for event in (
            ev.TrialQueued(trial_id=TrialId(name), params={}),
            ev.SlotChanged(slot_id=name, state="idle", epoch=1, hello=hello(name, (DEVICE.device_id,))),
            ev.TrialAssigned(trial_id=TrialId(name), attempt=0, slot_id=name, epoch=1),
        ):
            assert isinstance(apply(world, _with(event, 0)), Applied)
    dials = Settings(share=0.5, micro_batch=8, grad_accum=1, tier=Tier.FP32, num_workers=1)
    first = ev.Offered(generation=Generation(1), trial_id=TrialId("t0"), settings=dials, units=((0,),), amount=1.0)
    assert isinstance(apply(world, _with(first, 0)), Applied)
    more = Settings(share=share, micro_batch=8, grad_accum=1, tier=Tier.FP32, num_workers=1)
    second = ev.Offered(generation=Generation(1), trial_id=TrialId("t1"), settings=more, units=((1,),), amount=1.0)
    assert isinstance(apply(world, _with(second, 0)), Applied) == (share == 0.5)
