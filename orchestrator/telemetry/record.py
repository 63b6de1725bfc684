"""The wire format of telemetry: what each rank says about each optimizer step.

A batch of records travels as one bytes object: an 8-byte header and a packed numpy structured array. Who sent it is
bound to the connection (slot, epoch, rank), never to a field of the payload, so a trial cannot write as another one.
Knows nothing of Ray, windows or files. Written by `orchestrator.train`, read by `telemetry.window` and `.store`.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from orchestrator.errors import TelemetryError
from orchestrator.policies.tier import FixedPoint, Rounding, Tier

SCHEMA_VERSION = 1
MAX_BATCH_BYTES = 1 << 20
_MAGIC = 0x6F72
_HEADER = struct.Struct("<HHI")

TIERS: tuple[Tier, ...] = (Tier.FP32, Tier.BF16, Tier.TF32, Tier.FP16, Tier.FP8, Tier.INT8)
"""Tiers without parameters by wire code, the index into this tuple. New ones are appended, never inserted."""

# The code of a fixed-point tier: this bit, then two bits of rounding mode, six of word width (0: none), six of k.
_FIXED_BIT = 1 << 14
_MODES = (Rounding.NEAREST, Rounding.FLOOR, Rounding.STOCHASTIC)

STEP_DTYPE = np.dtype(
    [
        ("seq", "<u8"),  # per (slot, epoch, rank, attempt), from 0, without gaps
        ("step", "<i8"),  # optimizer steps done before this one
        ("generation", "<i8"),  # of the allocation in force during the step
        ("cursor", "<i8"),  # global sample position at which the step began
        ("num_samples", "<i4"),  # samples consumed by the step over all ranks; 0 when the step was skipped
        ("micro_batch", "<i4"),
        ("grad_accum", "<i4"),
        ("num_workers", "<i4"),
        ("tier", "<i2"),  # see `tier_code`
        ("flags", "<u2"),  # bits of FLAG_SKIPPED and so on
        ("share", "<f4"),
        ("cores", "<f4"),  # device units granted to this rank
        ("start_s", "<f8"),  # CLOCK_MONOTONIC at the start of the step, of the policy actor's node
        ("step_s", "<f4"),  # whole step, from boundary to boundary
        ("data_s", "<f4"),  # waiting for data
        ("wait_s", "<f4"),  # held back at the boundary to enforce the share
        ("switch_s", "<f4"),  # spent applying an allocation
        ("cpu_s", "<f4"),  # CPU seconds of the process during the step
        ("loss", "<f4"),  # mean training loss of this rank's samples
        ("grad_norm", "<f4"),  # of the whole gradient, before clipping
        ("learning_rate", "<f4"),
        ("noise_trace", "<f4"),  # estimate of tr(Sigma) per sample; NaN when not estimated
        ("grad_sq", "<f4"),  # estimate of |G|^2; NaN when not estimated
        ("memory_bytes", "<i8"),  # peak device (or resident host) memory of the rank
    ]
)

FLAG_SKIPPED = 1
FLAG_APPLIED = 2
FLAG_GRAPH = 4
FLAG_ROLLED_BACK = 8
FLAG_UNSETTLED = 16
FLAG_COMPILED = 32
FLAG_SEVERAL = 64
FLAG_BUNDLE = 128
"""Non-finite and skipped; an allocation was applied before it; replayed from a graph; began at an earlier state; in
another step mode than steps with these dials will have, or while that is being found out; of compiled kernels, where it
was replayed; it tells of several steps in a row, beginning with `step`: `num_samples` and times are those of all, the
loss is their mean, and `num_steps_of` says how many they are; it was stepped as one with other trials."""

MODE_FLAGS = FLAG_GRAPH | FLAG_COMPILED | FLAG_BUNDLE
"""The step mode."""


def mode_of(flags: int) -> str:
    """The step mode in a word."""
    modes = ((FLAG_BUNDLE, "bundle"), (FLAG_COMPILED, "compiled"), (FLAG_GRAPH, "graph"))
    return next((word for flag, word in modes if flags & flag), "eager")


StepArray = npt.NDArray[np.void]


def num_steps_of(rows: Mapping[str, npt.NDArray[Any]] | StepArray) -> npt.NDArray[np.int64]:
    """Optimizer steps that each record tells of; one for a step that was skipped."""
    full = rows["micro_batch"].astype(np.int64) * rows["grad_accum"] * rows["num_workers"]
    several = rows["num_samples"] // np.maximum(full, 1)
    found: npt.NDArray[np.int64] = np.where(rows["flags"] & FLAG_SEVERAL, np.maximum(several, 1), 1).astype(np.int64)
    return found


def step_seconds_of(rows: StepArray) -> npt.NDArray[np.float64]:
    """Seconds of a step, the mean where a record tells of several."""
    return rows["step_s"].astype(np.float64) / num_steps_of(rows)


def pack(records: StepArray) -> bytes:
    """Encode a structured array of dtype `STEP_DTYPE` as one message."""
    if records.dtype != STEP_DTYPE:
        raise TelemetryError(f"records have dtype {records.dtype}; allowed: STEP_DTYPE of schema {SCHEMA_VERSION}")
    return _HEADER.pack(_MAGIC, SCHEMA_VERSION, len(records)) + records.tobytes()


def unpack(message: bytes) -> StepArray:
    """Decode one message; the result is read-only and shares its memory.

    Raises:
        TelemetryError: wrong magic, schema, length, or more than `MAX_BATCH_BYTES`.
    """
    if len(message) > MAX_BATCH_BYTES:
        raise TelemetryError(f"a telemetry message has {len(message)} bytes; allowed: {MAX_BATCH_BYTES}")
    if len(message) < _HEADER.size:
        raise TelemetryError(f"a telemetry message has {len(message)} bytes; the header alone has {_HEADER.size}")
    magic, version, count = _HEADER.unpack_from(message)
    if (magic, version) != (_MAGIC, SCHEMA_VERSION):
        raise TelemetryError(
            f"telemetry magic {magic:#x} schema {version}; allowed: {_MAGIC:#x} schema {SCHEMA_VERSION}"
        )
    if len(message) - _HEADER.size != count * STEP_DTYPE.itemsize:
        raise TelemetryError(f"a telemetry message announces {count} records but holds {len(message)} bytes")
    return np.frombuffer(message, dtype=STEP_DTYPE, offset=_HEADER.size)


@cache
def tier_code(tier: Tier) -> int:
    """The wire code of a tier."""
    fixed = tier.fixed
    if fixed is None:
        return TIERS.index(tier)
    return _FIXED_BIT | _MODES.index(fixed.mode) << 12 | (fixed.bits or 0) << 6 | fixed.k


@cache
def tier_of(code: int) -> Tier | None:
    """The tier of a wire code, None for a code that names none."""
    if 0 <= code < len(TIERS):
        return TIERS[code]
    mode, bits, k = code >> 12 & 3, code >> 6 & 63, code & 63
    if not _FIXED_BIT <= code < 2 * _FIXED_BIT or mode >= len(_MODES):
        return None
    try:
        return Tier(FixedPoint(k=k, bits=bits or None, mode=_MODES[mode]).word)
    except ValueError:
        return None
