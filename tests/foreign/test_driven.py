"""The trainings of this folder under the driver of functions, against themselves by themselves; no line is changed.

Each runs in processes of its own, without a Ray cluster; whole runs are in `tests/integration/`.
"""

from __future__ import annotations

import difflib
import math
from pathlib import Path
from typing import Any

import pytest

from tests.foreign.driven import Driven, run_driven
from tests.foreign.losses import StepLosses, finish_plain, start_plain, step_means
from tests.foreign.test_standalone import skip_without_its_libraries
from tests.foreign.trainings import BY_NAME, SCHEDULE, TRAININGS, ForeignTraining

pytestmark = pytest.mark.timeout(400)  # imports take most of it, and other work may share the cores

EACH = pytest.mark.parametrize("training", TRAININGS, ids=lambda training: training.name)
TURNING = [training for training in TRAININGS if "batch" not in training.off]
VARIANTS = [(training.name, variant) for training in TRAININGS for variant in training.variants]


def side_by_side(
    training: ForeignTraining, tmp_path: Path, params: dict[str, Any]
) -> tuple[list[StepLosses], list[dict[str, Any]], Driven]:
    """Steps and reports of the training by itself, and the training under the driver; both at once, a core each."""
    directories = [tmp_path / "plain", tmp_path / "driven"]
    for directory in directories:
        directory.mkdir()
    plain = start_plain(training, directories[0], params)
    try:
        driven = run_driven(training, directories[1], params=params)
    except AssertionError:
        plain.kill()
        raise
    finally:
        seen, _ = finish_plain(plain, directories[0])
    return seen.steps, seen.reports, driven


def assert_equal_losses(driven: list[StepLosses], plain: list[StepLosses]) -> None:
    assert [step.optimizer for step in driven] == [step.optimizer for step in plain]
    for step, twin in zip(driven, plain, strict=True):
        assert step.losses == pytest.approx(twin.losses, rel=1e-5)


@EACH
def test_with_its_dials_held_still_it_trains_as_by_itself_with_no_line_changed(
    training: ForeignTraining, tmp_path: Path
) -> None:
    skip_without_its_libraries(training)
    steps, reports, driven = side_by_side(training, tmp_path, dict(training.params))
    assert_equal_losses(driven.steps, steps)
    assert driven.status == "done"
    assert driven.off == training.off
    assert len(driven.records["step"]) == driven.step == training.num_steps
    assert [report["index"] for report in driven.reports] == list(range(training.num_reports))
    for report, own in zip(driven.reports, reports, strict=False):  # what it would have reported by itself
        assert report["metrics"][training.metric] == pytest.approx(own[training.metric], rel=1e-5)
    changed = [line for line in difflib.ndiff(driven.source, training.path.read_text().splitlines()) if line[0] in "+-"]
    assert len(changed) == 0


@EACH
def test_the_loss_that_is_recorded_is_the_mean_of_those_of_a_step(training: ForeignTraining, tmp_path: Path) -> None:
    skip_without_its_libraries(training)
    driven = run_driven(training, tmp_path, max_reports=2)
    assert driven.status == "done"
    assert driven.records["loss"] == pytest.approx(step_means(driven.steps), rel=1e-5)
    assert len(driven.reports) == 2


@pytest.mark.parametrize(("name", "variant"), VARIANTS)
def test_variants_train_as_by_themselves_too(name: str, variant: str, tmp_path: Path) -> None:
    training = BY_NAME[name]
    skip_without_its_libraries(training)
    steps, _, driven = side_by_side(training, tmp_path, dict(training.variants[variant]))
    assert_equal_losses(driven.steps, steps)
    expected = {**training.off, **({"batch": SCHEDULE} if variant == "onecycle" else {})}
    if variant == "rmsprop":
        del expected["precision"]
    assert driven.off == expected


@pytest.mark.parametrize("training", TURNING, ids=lambda training: training.name)
def test_with_its_dials_turning_it_reports_as_often_and_learns(training: ForeignTraining, tmp_path: Path) -> None:
    skip_without_its_libraries(training)
    size = int(training.params.get("batch_size", 32))
    turns = {
        "15": {"micro_batch": 2 * size, "grad_accum": 1},
        "25": {"micro_batch": 2 * size, "grad_accum": 1, "tier": "bf16"},
        "40": {"micro_batch": size // 2, "grad_accum": 1, "tier": "fp32"},
    }
    driven = run_driven(training, tmp_path, turns=turns)
    records = driven.records
    sizes = records["num_samples"]
    assert driven.status == "done"
    assert set(sizes[:15]) <= {size, *range(1, size)}
    assert {2 * size, size // 2} <= set(sizes)
    assert len(set(records["tier"])) == 2
    assert len(driven.reports) == training.num_reports
    assert all(math.isfinite(loss) for loss in records["loss"])
    # Every sample of every epoch was seen once; where the last batch of an epoch is dropped, all but that.
    still_samples = training.num_steps * size
    assert still_samples * 0.9 <= sum(sizes) <= still_samples * 1.1
    first, last = driven.reports[0]["metrics"], driven.reports[-1]["metrics"]
    better = min if training.mode == "min" else max
    assert better(first[training.metric], last[training.metric]) == last[training.metric]


def test_under_lightning_the_batch_changes_between_epochs_only(tmp_path: Path) -> None:
    training = BY_NAME["lightning_trainer"]
    skip_without_its_libraries(training)
    turns = {"40": {"micro_batch": 64, "grad_accum": 1}, "70": {"micro_batch": 16, "grad_accum": 1}}
    driven = run_driven(training, tmp_path, turns=turns)
    sizes = driven.records["num_samples"]
    assert sizes == [32] * 64 + [64] * 16 + [16] * 64 * 3
    assert [report["step"] for report in driven.reports] == [32, 64, 80, 144, 208, 272]
    rates = driven.records["learning_rate"]
    assert rates[79] == pytest.approx(5e-3 * 2**0.5, rel=1e-5)  # AdamW: by the square root of the batch
    assert rates[63] == pytest.approx(5e-3, rel=1e-5)


@pytest.mark.parametrize("name", ["hf_trainer", "hf_peft", "ray_train_loop", "tune_function", "lightning_trainer"])
def test_after_an_interruption_it_goes_on_from_its_newest_checkpoint(name: str, tmp_path: Path) -> None:
    training = BY_NAME[name]
    skip_without_its_libraries(training)
    steps, _, whole = side_by_side(training, tmp_path, dict(training.params))
    stop_at = training.num_steps * 2 // 3 + 1
    first = run_driven(training, tmp_path / "driven", stop_at=stop_at)
    assert first.status == "interrupted"
    num_done, commit = len(first.reports), first.checkpoint
    assert commit is not None
    begun = int(commit.rpartition("-")[2])
    assert 0 < begun < stop_at
    second = run_driven(training, tmp_path / "driven", attempt=1, resume_from=commit, num_reports_done=num_done)
    assert second.status == "done"
    assert second.records["step"][0] == begun
    assert second.step == training.num_steps
    reports = first.reports + second.reports
    assert [report["index"] for report in reports] == list(range(training.num_reports))
    assert [report["step"] for report in reports] == [report["step"] for report in whole.reports]
    if name != "lightning_trainer":  # which keeps no state of the random generators
        assert_equal_losses(second.steps, steps[begun:])
