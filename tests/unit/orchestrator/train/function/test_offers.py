"""Results that a library makes by itself are reported, unless the function reports them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from orchestrator.train.function.offers import Offers

Taken = list[tuple[dict[str, Any], Path | None]]


def offers(metric: str = "eval_loss") -> tuple[Offers, Taken]:
    taken: Taken = []

    def report(values: Mapping[str, Any], checkpoint: Path | None) -> None:
        taken.append((dict(values), checkpoint))

    return Offers(metric, report), taken


def test_what_is_offered_before_the_next_step_is_one_report(tmp_path: Path) -> None:
    some, taken = offers()
    some.offer({"eval_first_loss": 2.0})
    some.offer({"eval_loss": 1.0})
    assert some.is_open
    some.offer({}, tmp_path)
    assert taken == []
    some.settle()
    some.settle()
    assert taken == [({"eval_first_loss": 2.0, "eval_loss": 1.0}, tmp_path)]
    assert not some.is_open


def test_an_offer_without_the_metric_is_no_report_and_its_names_are_remembered() -> None:
    some, taken = offers("score")
    some.offer({"eval_loss": 1.0})
    some.settle()
    assert taken == []
    assert some.other_names == {"eval_loss"}
    some.offer({"score": 3.0})
    some.settle()
    assert taken == [({"score": 3.0}, None)]


def test_a_function_that_reports_by_itself_has_the_last_word() -> None:
    some, taken = offers()
    some.offer({"eval_loss": 1.0})
    some.stand_back()
    some.settle()
    some.offer({"eval_loss": 2.0})
    some.settle()
    assert taken == []


def test_a_checkpoint_that_its_library_has_removed_is_left_out(tmp_path: Path) -> None:
    some, taken = offers()
    some.offer({"eval_loss": 1.0}, tmp_path / "gone")
    some.settle()
    assert taken == [({"eval_loss": 1.0}, None)]
