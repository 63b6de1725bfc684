from __future__ import annotations

import copy
import dataclasses
import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.policies.codec import (
    allocation_from,
    device_from,
    dumps,
    fit_from,
    limits_from,
    observation_from,
    override_from,
    plan_from,
    settings_from,
    snapshot_from,
    to_jsonable,
    trial_from,
)
from orchestrator.policies.decide.goodput import Goodput
from orchestrator.policies.plan import Settings
from orchestrator.policies.sample_worlds import snapshot
from orchestrator.policies.snapshot import Override
from orchestrator.policies.tier import NAMED_TIERS, Tier
from tests.unit.policies.builders import measured, observation, settings, trial

SETTINGS = st.builds(
    Settings,
    share=st.floats(0, 1),
    micro_batch=st.integers(1, 2**40),
    grad_accum=st.integers(1, 2**40),
    tier=st.sampled_from([*NAMED_TIERS, Tier("fixed(k=4,bits=8)")]),
    num_workers=st.integers(1, 100),
)


@given(st.integers(0, 10_000))
def test_a_snapshot_and_its_plan_come_back_equal_and_byte_for_byte(seed: int) -> None:
    world = snapshot(seed)
    text = dumps(world)
    again = snapshot_from(json.loads(text))
    assert again == world
    assert dumps(again) == text
    plan = Goodput().decide(world)
    plan_text = dumps(plan)
    assert plan_from(json.loads(plan_text)) == plan
    assert dumps(Goodput().decide(again)) == plan_text


@given(SETTINGS, st.text())
def test_any_settings_and_text_round_trip(dials: Settings, reason: str) -> None:
    override = Override(number=1, generation=2, settings=dials, reason=reason)
    text = dumps(override)
    assert text.isascii()
    assert "\n" not in text
    assert override_from(json.loads(text)) == override
    assert settings_from(json.loads(dumps(dials))) == dials


def test_every_kind_of_value_has_a_way_back() -> None:
    row = trial("a", fit=measured(observation(0.1, noise=(2.0, 1.0))))
    world = snapshot(3, num_trials=4)
    assert trial_from(to_jsonable(row)) == row
    assert fit_from(to_jsonable(row.fit)) == row.fit
    assert limits_from(to_jsonable(row.limits)) == row.limits
    assert device_from(to_jsonable(world.devices[0])) == world.devices[0]
    assert observation_from(to_jsonable(observation(0.1))) == observation(0.1)
    allocation = Goodput().decide(world).allocations[0]
    assert allocation_from(to_jsonable(allocation)) == allocation


def test_the_form_is_canonical() -> None:
    assert dumps(settings(share=0.1)) == ('{"grad_accum":1,"micro_batch":8,"num_workers":1,"share":0.1,"tier":"fp32"}')


def test_an_integer_in_a_float_field_is_written_as_a_float() -> None:
    whole = settings(share=1)
    assert '"share":1.0' in dumps(whole)
    assert dumps(settings_from(json.loads(dumps(whole)))) == dumps(whole)
    allocation = dataclasses.replace(Goodput().decide(snapshot(3, num_trials=1)).allocations[0], predicted_goodput=5)
    assert '"predicted_goodput":5.0' in dumps(allocation)


def test_mappings_lists_and_plain_values_are_written_too() -> None:
    assert dumps({"b": [1, 2.5, None, True], "a": Tier.BF16}) == '{"a":"bf16","b":[1,2.5,null,true]}'


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_json_cannot_say_is_refused_with_its_path(value: float) -> None:
    with pytest.raises(ValueError, match=r"Settings\.share"):
        dumps(settings(share=value))


@pytest.mark.parametrize("value", [object(), {1, 2}, b"x", {1: 2}, Settings])
def test_a_type_without_a_json_form_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match=r"allowed"):
        dumps(value)


def _set(obj: Any, path: tuple[str | int, ...], value: object) -> object:
    changed = copy.deepcopy(obj)
    inner = changed
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return changed


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("now_s",), "soon", r"snapshot\.now_s='soon'.*a finite number"),
        (("now_s",), True, r"snapshot\.now_s=True"),
        (("now_s",), math.nan, r"snapshot\.now_s=nan"),
        (("now_s",), 10**400, r"snapshot\.now_s=an integer beyond 64 bits"),
        (("seed",), 1.5, r"snapshot\.seed=1\.5.*an integer"),
        (("trials",), {}, r"snapshot\.trials=\{\}.*a list"),
        (("trials", 1, "limits", "min_share"), None, r"snapshot\.trials\[1\]\.limits\.min_share=None"),
        (("trials", 1, "limits", "tiers", 0), "fp99", r"tiers\[0\]='fp99'.*fp32, tf32, bf16"),
        (("trials", 0, "start"), 3, r"snapshot\.trials\[0\]\.start=3.*share"),
        (("trials", 0, "start", "shar"), 3, r"trials\[0\]\.start has the unknown key 'shar'.*share"),
        (("trials", 0, "is_stale"), 0, r"is_stale=0.*true or false"),
        (("trials", 0, "trial_id"), 0, r"trial_id=0.*a string"),
        (("plan", "generation"), "1", r"snapshot\.plan\.generation='1'"),
    ],
)
def test_a_wrong_value_is_refused_with_its_path(path: tuple[str | int, ...], value: object, message: str) -> None:
    good = to_jsonable(snapshot(1, num_trials=3))
    with pytest.raises(ValueError, match=message):
        snapshot_from(_set(good, path, value))


def test_a_missing_key_is_refused_unless_it_has_a_default() -> None:
    obj = to_jsonable(settings())
    del obj["tier"]
    with pytest.raises(ValueError, match=r"settings lacks the key 'tier'"):
        settings_from(obj)
    old_trace = to_jsonable(trial("a").limits)
    del old_trace["can_pause"]
    assert limits_from(old_trace).can_pause is False
