from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.errors import TelemetryError
from orchestrator.policies.tier import FixedPoint, Rounding, Tier
from orchestrator.telemetry.record import MAX_BATCH_BYTES, STEP_DTYPE, TIERS, pack, tier_code, tier_of, unpack


@given(st.integers(0, 20), st.randoms(use_true_random=False))
def test_whatever_bits_a_batch_holds_it_arrives_unchanged(num_rows: int, random: object) -> None:
    generator = np.random.default_rng(hash(str(random)) % 2**32)
    records = np.frombuffer(generator.bytes(num_rows * STEP_DTYPE.itemsize), dtype=STEP_DTYPE)
    arrived = unpack(pack(records))
    assert arrived.dtype == STEP_DTYPE
    assert arrived.tobytes() == records.tobytes()


def test_an_unpacked_batch_cannot_be_written_to() -> None:
    arrived = unpack(pack(np.zeros(1, dtype=STEP_DTYPE)))
    with pytest.raises(ValueError, match="read-only"):
        arrived["seq"] = 1


def test_records_of_another_dtype_are_not_sent() -> None:
    with pytest.raises(TelemetryError, match="schema"):
        pack(np.zeros(1, dtype=[("seq", "<u8")]))


@pytest.mark.parametrize(
    ("message", "what"),
    [
        (b"", "header"),
        (b"\0" * 7, "header"),
        (struct.pack("<HHI", 0, 1, 0), "magic"),
        (struct.pack("<HHI", 0x6F72, 2, 0), "schema 2"),
        (struct.pack("<HHI", 0x6F72, 1, 1), "announces 1"),
        (struct.pack("<HHI", 0x6F72, 1, 0) + b"\0", "announces 0"),
        (struct.pack("<HHI", 0x6F72, 1, 2**32 - 1) + b"\0" * STEP_DTYPE.itemsize, "announces"),
        (b"\0" * (MAX_BATCH_BYTES + 1), "allowed"),
    ],
)
def test_a_damaged_message_is_refused_by_name(message: bytes, what: str) -> None:
    with pytest.raises(TelemetryError, match=what):
        unpack(message)


@given(st.binary(max_size=2 * STEP_DTYPE.itemsize))
def test_random_bytes_are_refused_and_never_crash(message: bytes) -> None:
    with pytest.raises(TelemetryError):
        unpack(message)


def test_codes_of_tiers_stay_where_old_tables_expect_them() -> None:
    assert TIERS == (Tier.FP32, Tier.BF16, Tier.TF32, Tier.FP16, Tier.FP8, Tier.INT8)


@given(st.integers(0, 40), st.one_of(st.none(), st.integers(2, 32)), st.sampled_from(Rounding))
def test_every_tier_has_its_own_code(k: int, bits: int | None, mode: Rounding) -> None:
    tier = Tier(FixedPoint(k=k, bits=bits, mode=mode).word)
    assert 0 <= tier_code(tier) < 2**15
    assert tier_of(tier_code(tier)) is tier


def test_a_code_is_of_one_tier_or_of_none() -> None:
    known = [tier for code in range(-5, 2**15) if (tier := tier_of(code)) is not None]
    assert len(known) == len(set(known))
    assert set(TIERS) < set(known)
