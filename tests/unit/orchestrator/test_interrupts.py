"""Signals that ask for the end of a run, and the last resort where it does not come."""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path
from typing import cast

import pytest

from orchestrator import interrupts
from orchestrator.clock import ManualClock
from orchestrator.interrupts import ENDING_S, Interrupts, LastResort, reinstall, terminable
from orchestrator.output import Screen


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_asks_for_the_end_and_decides_the_exit_code(number: signal.Signals, code: int) -> None:
    before = signal.getsignal(number)
    asked = Interrupts()
    with asked.taken():
        os.kill(os.getpid(), number)
        assert (asked.number, asked.exit_code) == (1, code)
    assert signal.getsignal(number) is before


def test_signals_at_once_are_one_and_a_later_one_is_the_second() -> None:
    """`timeout` sends one to its child and one to the child's group."""
    clock = ManualClock()
    asked = Interrupts(clock.now_s)
    asked.note(signal.SIGTERM)
    clock.advance(0.1)
    asked.note(signal.SIGTERM)
    assert asked.number == 1
    clock.advance(2.0)
    asked.note(signal.SIGINT)
    assert (asked.number, asked.exit_code) == (2, 143), "the first signal decides"
    clock.advance(2.0)
    asked.note(signal.SIGINT)
    assert asked.number == 2


def test_a_terminal_that_hangs_up_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    with os.fdopen(writer, "w") as stream:
        screen = Screen(stream, tmp_path / "run.log")
        monkeypatch.setattr(sys, "stdout", screen)
        asked = Interrupts()
        with asked.taken():
            os.kill(os.getpid(), signal.SIGHUP)
            assert asked.number == 0
        screen.write("on and on\n")
        screen.end()
    os.close(reader)
    assert (tmp_path / "run.log").read_text() == "on and on\n"


def test_a_hang_up_that_is_ignored_already_stays_so() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interrupts().taken():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_handlers_are_in_force_again_after_somebody_put_others_below_python() -> None:
    asked = Interrupts()
    with asked.taken():
        handler = signal.getsignal(signal.SIGTERM)
        reinstall()
        assert signal.getsignal(signal.SIGTERM) is handler


def test_a_command_that_takes_no_signals_is_ended_in_order() -> None:
    class EndError(BaseException):
        pass

    with pytest.raises(EndError), terminable(EndError):
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    with terminable(EndError), terminable(lambda: AssertionError("the outer one has it")):
        assert cast(object, signal.getsignal(signal.SIGTERM)) is not signal.SIG_DFL


def last_resort(asked: Interrupts) -> tuple[LastResort, threading.Event, list[int]]:
    ended, codes = threading.Event(), []

    def leave(code: int) -> None:
        codes.append(code)
        ended.set()

    return LastResort(asked, lambda: 143, leave), ended, codes


def test_a_run_that_does_not_end_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interrupts, "_LOOK_S", 0.001)
    asked = Interrupts()
    resort, ended, codes = last_resort(asked)
    resort.allow(0.0)
    with resort:
        assert not ended.wait(0.05), "nobody asked for the end"
        asked.note(signal.SIGTERM)
        assert ended.wait(10.0)
    assert codes == [143]


def test_a_run_has_time_for_its_checkpoints_and_less_when_asked_twice() -> None:
    clock = ManualClock(1000.0)
    asked = Interrupts(clock.now_s)
    resort, _, _ = last_resort(asked)
    assert resort.deadline_s == float("inf")
    asked.note(signal.SIGINT)
    assert resort.deadline_s >= 1000.0 + ENDING_S
    resort.allow(60.0)
    first = resort.deadline_s
    clock.advance(5.0)
    asked.note(signal.SIGINT)
    assert resort.deadline_s <= first


def test_the_process_ends_also_where_its_last_word_cannot_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interrupts, "_LOOK_S", 0.001)
    asked, codes, ended = Interrupts(), [], threading.Event()

    def fail() -> int:
        raise OSError("No space left on device")

    def leave(code: int) -> None:
        codes.append(code)
        ended.set()

    resort = LastResort(asked, fail, leave)
    resort.allow(0.0)
    with resort:
        asked.note(signal.SIGTERM)
        assert ended.wait(10.0)
    assert codes == [143]
