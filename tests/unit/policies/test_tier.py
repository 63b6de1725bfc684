"""A tier is a word that knows its facts, and a device says which of them it has units for."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.policies.tier import (
    NAMED_TIERS,
    DeviceFacts,
    FixedPoint,
    Rounding,
    Tier,
    auto_tiers,
    by_cost,
    is_cheaper,
    real_tiers,
    support_of,
    tier_facts,
)

FIXED = st.builds(
    FixedPoint,
    k=st.integers(0, 40),
    bits=st.one_of(st.none(), st.integers(2, 32)),
    mode=st.sampled_from(Rounding),
)
H200 = DeviceFacts(name="H200", capability=(9, 0))
A100 = DeviceFacts(name="A100", capability=(8, 0))
V100 = DeviceFacts(name="V100", capability=(7, 0))
PLAIN_CPU = DeviceFacts(name="this processor")
NEW_CPU = DeviceFacts(name="this processor", cpu_flags=frozenset({"avx512_bf16", "avx512_vnni"}))


@given(FIXED)
def test_a_fixed_point_tier_is_its_format_and_one_object(fixed: FixedPoint) -> None:
    tier = Tier(fixed.word)
    assert tier.fixed == fixed
    assert tier is Tier(tier.value) is pickle.loads(pickle.dumps(tier)) is copy.deepcopy(tier)
    assert json.loads(json.dumps({tier: tier})) == {fixed.word: fixed.word}
    assert is_cheaper(tier, Tier.INT8)


@pytest.mark.parametrize(
    ("word", "canonical"),
    [
        ("fixed(k=8,bits=16)", "fixed(k=8,bits=16)"),
        ("fixed(4,8,floor)", "fixed(k=4,bits=8,floor)"),
        ("fixed( 2 , 6 )", "fixed(k=2,bits=6)"),
        ("fixed(k=32)", "fixed(k=32)"),
        ("fixed(k=32,floor)", "fixed(k=32,floor)"),
        ("fixed(k=8,bits=16,mode=nearest)", "fixed(k=8,bits=16)"),
    ],
)
def test_a_format_is_written_in_several_ways_and_kept_in_one(word: str, canonical: str) -> None:
    assert Tier(word) == canonical
    assert Tier(word) is Tier(canonical)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("fp64", "allowed: fp32, tf32"),
        ("fixed(k=41)", "k=41; allowed: 0 to 40"),
        ("fixed(8,1)", "bits=1; allowed: 2 to 32"),
        ("fixed(8,16,up)", "names no tier"),
        ("", "names no tier"),
        (7, "names no tier"),
        ([[]], "names no tier"),
    ],
)
def test_another_word_is_refused_with_what_is_allowed(word: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Tier(word)


def test_a_tier_is_a_word_everywhere() -> None:
    assert isinstance(Tier.BF16, str)
    assert f"{Tier.BF16}" == "bf16" == Tier.BF16.value
    assert type(Tier.BF16.value) is str
    assert {str(Tier.BF16): 1}["bf16"] == 1


def test_the_ladder_of_the_guard_test_is_in_order() -> None:
    ladder = [Tier("fp32"), Tier("bf16"), Tier("int8"), Tier("fixed(4,8,floor)"), Tier("fixed(2,6)")]
    assert list(by_cost(reversed(ladder))) == ladder


def test_devices_have_the_tiers_they_have_units_for() -> None:
    assert real_tiers(H200) == NAMED_TIERS
    assert real_tiers(A100) == ("fp32", "tf32", "bf16", "fp16", "int8")
    assert real_tiers(V100) == ("fp32", "fp16")
    assert real_tiers(PLAIN_CPU) == ("fp32",)
    assert real_tiers(NEW_CPU) == ("fp32", "bf16", "int8")
    assert auto_tiers(NEW_CPU) == ("fp32", "bf16"), "int8 gains nothing there and costs accuracy"
    assert auto_tiers(A100) == real_tiers(A100)


@pytest.mark.parametrize(
    ("tier", "device", "reason", "nearest"),
    [
        (Tier.FP8, A100, "compute capability 8.0; fp8 needs 8.9", "bf16"),
        (Tier.BF16, V100, "compute capability 7.0; bf16 needs 8.0", "fp32"),
        (Tier.FP8, NEW_CPU, "no processor has", "bf16"),
        (Tier.FP8, PLAIN_CPU, "no processor has", "fp32"),
        (Tier.BF16, PLAIN_CPU, "none of avx512_bf16, amx_bf16", "fp32"),
        (Tier("fixed(8,16)"), H200, "no device computes in fixed", "bf16"),
    ],
)
def test_a_device_says_why_not_and_what_instead(tier: Tier, device: DeviceFacts, reason: str, nearest: str) -> None:
    support = support_of(tier, device)
    assert not support.is_real
    assert reason in support.reason
    assert support.nearest == nearest


def test_masters_are_fp32_and_every_fallback_is_dearer() -> None:
    for tier in (*NAMED_TIERS, Tier("fixed(2,6)"), Tier("fixed(k=32)")):
        facts = tier_facts(tier)
        assert facts.master_dtype == "float32"
        assert facts.fallback is None or is_cheaper(tier, facts.fallback)
