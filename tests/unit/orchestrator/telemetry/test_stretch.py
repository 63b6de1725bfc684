"""How fast a trial trained since its dials last turned, as its own records say."""

from __future__ import annotations

import numpy as np
import pytest

from orchestrator.telemetry.record import (
    FLAG_APPLIED,
    FLAG_GRAPH,
    FLAG_SKIPPED,
    FLAG_UNSETTLED,
    STEP_DTYPE,
    StepArray,
)
from orchestrator.telemetry.stretch import newest_stretch


def steps(count: int, step_s: float, *, generation: int = 1, micro_batch: int = 8) -> StepArray:
    rows = np.zeros(count, dtype=STEP_DTYPE)
    rows["generation"], rows["micro_batch"], rows["grad_accum"], rows["num_workers"] = generation, micro_batch, 1, 1
    rows["num_samples"], rows["step_s"], rows["cores"] = micro_batch, step_s, 1.0
    return rows


def test_without_a_step_nothing_is_known() -> None:
    assert newest_stretch(steps(0, 0.1)) is None


def test_only_steps_since_the_last_change_count() -> None:
    rows = np.concatenate([steps(50, 0.1), steps(20, 0.2, generation=2, micro_batch=16)])
    found = newest_stretch(rows)
    assert found is not None
    assert (found.generation, found.num_steps) == (2, 20)
    assert found.samples_per_s == pytest.approx(80.0)
    assert found.seconds == pytest.approx(4.0)


def test_a_protective_move_inside_a_generation_is_a_change() -> None:
    rows = np.concatenate([steps(50, 0.1, micro_batch=16), steps(20, 0.1, micro_batch=8)])
    found = newest_stretch(rows)
    assert found is not None
    assert found.num_steps == 20


def test_the_step_that_applies_skipped_steps_short_ones_and_interrupted_ones_do_not_count() -> None:
    rows = steps(20, 0.1)
    rows["flags"][0], rows["step_s"][0] = FLAG_APPLIED, 9.0
    rows["flags"][1], rows["num_samples"][1] = FLAG_SKIPPED, 0
    rows["num_samples"][2] = 3
    rows["step_s"][3] = 4.0
    found = newest_stretch(rows)
    assert found is not None
    assert found.num_steps == 16
    assert found.samples_per_s == pytest.approx(80.0)


def test_where_the_newest_step_is_no_ordinary_one_nothing_is_known_yet() -> None:
    last = steps(1, 9.0, generation=2)
    last["flags"] = FLAG_APPLIED
    assert newest_stretch(np.concatenate([steps(20, 0.1), last])) is None


def test_steps_while_the_step_mode_is_measured_do_not_count_and_modes_are_not_mixed() -> None:
    eager, tried, settled = steps(20, 0.1), steps(6, 0.05), steps(30, 0.02)
    eager["flags"], tried["flags"], settled["flags"] = FLAG_UNSETTLED, FLAG_UNSETTLED | FLAG_GRAPH, FLAG_GRAPH
    assert newest_stretch(eager) is None
    found = newest_stretch(np.concatenate([eager, tried, settled]))
    assert found is not None
    assert (found.num_steps, found.is_replayed) == (30, True)
    assert found.samples_per_s == pytest.approx(400.0)
    plain = steps(10, 0.1)
    found = newest_stretch(np.concatenate([settled, plain]))
    assert found is not None
    assert (found.num_steps, found.is_replayed) == (10, False)
