from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NoReturn

import numpy as np
import pytest

from orchestrator.policies.decide.static import Static
from orchestrator.policies.invariants import Violation, check
from orchestrator.policies.plan import (
    Allocation,
    Alternative,
    DeviceId,
    Effect,
    Generation,
    Plan,
    Settings,
    TrialId,
    effect_of,
)
from orchestrator.policies.sample_worlds import snapshot
from orchestrator.policies.snapshot import Override, Snapshot
from orchestrator.policies.tier import Tier
from tests.unit.policies.builders import DEVICE, in_force, limits, settings, trial, world

A, B = TrialId("a"), TrialId("b")


def two_trials(**changes: Any) -> Snapshot:
    """Two trials with half a device each in force; `changes` go to trial a."""
    dials = limits(shares=(0.1, 0.9), batches=(4, 32), max_micro_batch=16, can_pause=False)
    rows = [trial("a", dials=dials), trial("b", dials=dials)]
    plan = in_force(rows, {"a": 0.5, "b": 0.5})
    return world([dataclasses.replace(rows[0], **changes), rows[1]], plan=plan)


def legal(snap: Snapshot) -> Plan:
    rows = []
    for row in snap.trials:
        old = snap.settings_in_force(row)
        new = old or row.start
        rows.append(
            Allocation(
                trial_id=row.trial_id,
                settings=new,
                placement=row.placement,
                effect=effect_of(old, new),
                reason="share 0.5 stays",
            )
        )
    return Plan(generation=Generation(snap.plan.generation + 1), allocations=tuple(rows), reason="2 trials")


def with_a(snap: Snapshot, **changes: Any) -> Plan:
    """The legal plan with trial a's allocation changed; the effect follows the settings unless it is given."""
    plan = legal(snap)
    first = plan.allocations[0]
    new = changes.get("settings", first.settings)
    if isinstance(new, Settings):
        changes.setdefault("effect", effect_of(snap.settings_in_force(snap.trials[0]), new))
    return dataclasses.replace(plan, allocations=(dataclasses.replace(first, **changes), *plan.allocations[1:]))


def dial_a(snap: Snapshot, **dials: Any) -> Plan:
    return with_a(snap, settings=dataclasses.replace(legal(snap).allocations[0].settings, **dials), effect=Effect.STEP)


def codes(snap: Snapshot, plan: object) -> list[str]:
    return [violation.code for violation in check(snap, plan)]


def test_a_legal_plan_breaks_nothing() -> None:
    snap = two_trials()
    assert check(snap, legal(snap)) == ()
    assert check(snap, dial_a(snap, share=0.25, micro_batch=16, grad_accum=2)) == ()


def test_a_stale_or_skipped_generation_is_named_with_the_expected_one() -> None:
    snap = two_trials()
    (violation,) = check(snap, dataclasses.replace(legal(snap), generation=Generation(1)))
    assert violation == Violation(code="plan.generation", trial_id=None, text="generation=1; allowed: 2")
    assert codes(snap, dataclasses.replace(legal(snap), generation=Generation(3))) == ["plan.generation"]


def test_every_trial_has_exactly_one_allocation_in_order() -> None:
    snap = two_trials()
    plan = legal(snap)
    a, b = plan.allocations
    unknown = dataclasses.replace(b, trial_id=TrialId("c"))
    assert codes(snap, dataclasses.replace(plan, allocations=(a,))) == ["plan.missing"]
    assert codes(snap, dataclasses.replace(plan, allocations=(a, a, b))) == ["plan.repeated", "device.overcommitted"]
    assert codes(snap, dataclasses.replace(plan, allocations=(a, b, unknown))) == ["plan.unknown"]
    assert codes(snap, dataclasses.replace(plan, allocations=(b, a))) == ["plan.order"]


@pytest.mark.parametrize(
    ("dials", "code"),
    [
        ({"share": 0.09}, "share"),
        ({"share": 0.0}, "share"),
        ({"share": -0.1}, "share"),
        ({"share": math.nan}, "share"),
        ({"share": "0.5"}, "share"),
        ({"share": np.float64(0.25)}, "share"),
        ({"micro_batch": 0}, "micro_batch"),
        ({"micro_batch": 17}, "micro_batch"),
        ({"micro_batch": True}, "micro_batch"),
        ({"micro_batch": 10**5000}, "micro_batch"),
        ({"grad_accum": 5}, "global_batch"),
        ({"grad_accum": 1.0}, "grad_accum"),
        ({"micro_batch": 3}, "global_batch"),
        ({"num_workers": None}, "num_workers"),
        ({"tier": Tier.BF16}, "tier"),
        ({"tier": "fp32"}, "tier"),
    ],
)
def test_a_dial_outside_its_limits_is_named(dials: dict[str, object], code: str) -> None:
    snap = two_trials()
    (violation,) = check(snap, dial_a(snap, **dials))
    assert violation.code == code
    assert violation.trial_id == A
    assert "allowed" in violation.text


def test_another_number_of_workers_than_ranks_placed_is_named() -> None:
    snap = two_trials()
    plan = with_a(snap, settings=dataclasses.replace(settings(), num_workers=2))
    assert codes(snap, plan) == ["num_workers"]


def test_an_over_committed_device_is_named_with_the_sum() -> None:
    snap = two_trials()
    (violation,) = check(snap, dial_a(snap, share=0.6))
    assert (violation.code, violation.trial_id) == ("device.overcommitted", None)
    assert "1.1" in violation.text
    assert check(snap, dial_a(snap, share=0.5 + 1e-10)) == ()


def test_every_rank_on_a_device_counts() -> None:
    rows = [trial("a", placement=(DEVICE, DEVICE))]
    snap = world(rows, plan=in_force(rows, {"a": 0.5}))
    assert check(snap, legal(snap)) == ()
    assert codes(snap, dial_a(snap, share=0.51)) == ["device.overcommitted"]


def test_pausing_is_legal_where_allowed_and_where_it_already_is() -> None:
    may = two_trials(limits=limits(shares=(0.1, 0.9), batches=(4, 32), can_pause=True))
    assert check(may, dial_a(may, share=0.0)) == ()
    paused = two_trials(override=Override(number=1, generation=1, settings=settings(share=0.0), reason="memory"))
    assert check(paused, with_a(paused, settings=settings(share=0.0))) == ()
    assert codes(paused, with_a(paused, settings=settings(share=0.05))) == ["share"]


def test_what_an_override_set_outside_the_limits_may_stay_but_go_no_further() -> None:
    fled = settings(micro_batch=2, tier=Tier.BF16)
    snap = two_trials(override=Override(number=1, generation=1, settings=fled, reason="memory"))
    assert check(snap, with_a(snap, settings=fled)) == ()
    further = dataclasses.replace(fled, micro_batch=1)
    assert codes(snap, with_a(snap, settings=further)) == ["global_batch"]


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"placement": (DeviceId("gpu-7"),)}, "placement"),
        ({"placement": [DEVICE]}, "placement"),
        ({"placement": (b"cpu-0",)}, "placement"),
        ({"effect": Effect.STEP}, "effect"),
        ({"effect": "none"}, "effect"),
        ({"reason": "  "}, "reason"),
        ({"reason": "one\ntwo"}, "reason"),
        ({"reason": "one\x00two"}, "reason"),
        ({"reason": 7}, "reason"),
        ({"binding": ""}, "binding"),
        ({"predicted_goodput": math.inf}, "predicted_goodput"),
        ({"predicted_gain": "much"}, "predicted_gain"),
        ({"alternatives": [1]}, "alternatives"),
        ({"alternatives": (None,)}, "alternatives"),
        ({"alternatives": (Alternative(settings=settings(), goodput=1.0),) * 9}, "alternatives"),
        ({"alternatives": (Alternative(settings=settings(), goodput=math.nan),)}, "alternatives"),
        ({"alternatives": (Alternative(settings=settings(share=2.0), goodput=None),)}, "alternatives"),
        ({"settings": None}, "settings"),
    ],
)
def test_a_wrong_part_of_an_allocation_is_named(changes: dict[str, object], code: str) -> None:
    snap = two_trials()
    (violation,) = check(snap, with_a(snap, **changes))
    assert violation.code == code


HUGE = 10**5000


class Hostile:
    """Everything one does with it raises."""

    def _raise(self, *args: object) -> NoReturn:
        raise RuntimeError("touched")

    __eq__ = __hash__ = __bool__ = __len__ = __iter__ = __str__ = __repr__ = __getattr__ = _raise
    __lt__ = __float__ = __int__ = __format__ = _raise


class HostileMeta(type):
    def __getattribute__(cls, name: str) -> NoReturn:
        raise RuntimeError("touched")


class HostileType(metaclass=HostileMeta):
    pass


GARBAGE: list[Callable[[], object]] = [
    lambda: None,
    lambda: 7,
    lambda: HUGE,
    lambda: "plan\n",
    lambda: "\ud800",
    lambda: [],
    lambda: {},
    lambda: (),
    lambda: ((((),),),),
    lambda: math.nan,
    lambda: Plan,
    lambda: np.array([1.0, 2.0]),
    lambda: object.__new__(Plan),
    lambda: object.__new__(Allocation),
    lambda: object.__new__(Settings),
    lambda: object.__new__(Alternative),
    Hostile,
    lambda: (Hostile(),),
    HostileType,
]


PLACES = [
    "plan",
    *(f"plan.{field.name}" for field in dataclasses.fields(Plan)),
    "row",
    *(f"row.{field.name}" for field in dataclasses.fields(Allocation)),
    *(f"dial.{field.name}" for field in dataclasses.fields(Settings)),
    "alternative.goodput",
    "alternative.settings",
]


def spoiled(plan: Plan, where: str, junk: Any) -> object:
    """The plan with `junk` at one place."""
    owner, _, name = where.partition(".")
    row = plan.allocations[0]
    if owner == "plan":
        return dataclasses.replace(plan, **{name: junk}) if name else junk
    if owner == "row":
        row = dataclasses.replace(row, **{name: junk}) if name else junk
    elif owner == "dial":
        row = dataclasses.replace(row, settings=dataclasses.replace(row.settings, **{name: junk}))
    else:
        alternative = dataclasses.replace(Alternative(settings=row.settings, goodput=1.0), **{name: junk})
        row = dataclasses.replace(row, alternatives=(alternative,))
    return dataclasses.replace(plan, allocations=(row, plan.allocations[1]))


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("index", range(len(GARBAGE)))
def test_garbage_anywhere_in_a_plan_is_a_violation_and_never_an_exception(where: str, index: int) -> None:
    snap = two_trials()
    junk = GARBAGE[index]()
    violations = check(snap, spoiled(legal(snap), where, junk))
    for violation in violations:
        assert len(violation.text.splitlines()) == 1
        violation.text.encode("ascii")
    is_number = where in {"row.predicted_goodput", "row.predicted_gain", "alternative.goodput"}
    is_good = (is_number and (junk is None or (type(junk) is int and junk == 7))) or (
        where in {"row.alternatives", "plan.nodes"} and type(junk) is tuple and not junk
    )
    is_good = is_good or (where == "row.cost_s" and type(junk) is int and junk == 7)
    is_good = is_good or (where == "row.resize_to" and junk is None)
    assert bool(violations) != is_good


def test_breaking_one_thing_in_a_legal_plan_is_always_seen() -> None:
    for seed in range(200):
        snap = snapshot(seed)
        plan = Static().decide(snap)
        for index, row in enumerate(plan.allocations):
            before, behind = plan.allocations[:index], plan.allocations[index + 1 :]
            assert check(snap, dataclasses.replace(plan, allocations=(*before, *behind)))
            for broken in (
                dataclasses.replace(row, settings=dataclasses.replace(row.settings, share=1.01)),
                dataclasses.replace(row, placement=(*row.placement, row.placement[0])),
                dataclasses.replace(row, settings=dataclasses.replace(row.settings, micro_batch=2**30)),
            ):
                assert check(snap, dataclasses.replace(plan, allocations=(*before, broken, *behind)))
