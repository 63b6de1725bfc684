from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.view.text import (
    clean,
    clip,
    clip_front,
    pad,
    show_count,
    show_gain,
    show_number,
    show_params,
    show_seconds,
    table,
    width_of,
    wrap,
)


@given(st.text())
def test_clean_text_prints_and_stays_on_one_line(text: str) -> None:
    shown = clean(text)
    assert shown.isprintable()
    assert "\n" not in shown


@given(st.text(), st.integers(0, 40))
def test_clipped_text_fits(text: str, width: int) -> None:
    assert width_of(clip(clean(text), width)) <= width
    assert width_of(clip_front(clean(text), width)) <= width


@given(st.text(), st.integers(0, 40), st.booleans())
def test_padded_text_has_exactly_the_width(text: str, width: int, right: bool) -> None:
    assert width_of(pad(clean(text), width, right=right)) == width


def test_wide_characters_count_twice_and_combining_marks_not_at_all() -> None:
    assert width_of("\u4e2d\u6587") == 4
    assert width_of("e\u0301") == 1
    assert clip("\u4e2d" * 10, 8) == "\u4e2d\u4e2d..."


def test_wrapping_loses_no_character() -> None:
    path = "/a/very/long/path/" * 10
    assert "".join(wrap(path, 40)) == path


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "-"),
        (math.nan, "-"),
        ("x", "-"),
        (True, "-"),
        (0, "0.000"),
        (2.34567, "2.346"),
        (812.44, "812.4"),
        (0.01234, "0.012"),
        (123456.0, "1.2e+05"),
        (-3.5, "-3.500"),
        (1e-9, "1.0e-09"),
    ],
)
def test_numbers_take_few_characters(value: object, shown: str) -> None:
    assert show_number(value) == shown


@given(st.one_of(st.floats(), st.integers(), st.none()))
def test_any_number_is_short(value: float | None) -> None:
    assert len(show_number(value)) <= 9


@given(st.integers(0, 10**13 - 1))
def test_any_count_takes_five_characters(value: int) -> None:
    assert len(show_count(value)) <= 5


@pytest.mark.parametrize(
    ("value", "shown"), [(0, "0:00"), (83.9, "1:23"), (3723, "1:02:03"), (400_000, "4d 15h"), (-5, "0:00")]
)
def test_durations_read_as_clocks(value: float, shown: str) -> None:
    assert show_seconds(value) == shown


@pytest.mark.parametrize(("value", "shown"), [(0.312, "+31 %"), (-0.05, "-5 %"), (None, "-")])
def test_gains_have_a_sign(value: float | None, shown: str) -> None:
    assert show_gain(value) == shown


def test_a_table_is_aligned() -> None:
    assert table(["name", "n"], [["a", "1"], ["long name", "22"]], numeric=["n"]) == [
        "name        n",
        "a           1",
        "long name  22",
    ]


def test_parameters_are_shortened_from_the_middle() -> None:
    params = {"lr": 0.00123456, "width": 64, "name": "something long", "seed": 3}
    assert show_params(params, 80) == "lr=0.001235 width=64 name=something long seed=3"
    assert show_params(params, 40) == "lr=0.001235 width=64 ... seed=3"
    assert show_params(params, 24) == "lr=0.001235 ... seed=3"
    assert show_params(params, 16) == "lr=0.001235 ..."
    assert show_params({"name": "a" * 50 + "b" * 50}, 13) == "name=...bbbbb"
    assert show_params({}, 5) == ""


@given(st.dictionaries(st.text(max_size=9), st.floats() | st.text(max_size=30), max_size=9), st.integers(0, 60))
def test_parameters_never_take_more_room_than_there_is(params: dict[str, object], width: int) -> None:
    assert width_of(show_params(params, width)) <= width
