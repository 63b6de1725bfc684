"""How a stop reaches a search that is somebody else's: once per `fit()`, and only where somebody listens."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.run_dirs import StopKind, request_stop
from orchestrator.tune.session import Stopping


@pytest.fixture(autouse=True)
def _signal_is_as_before() -> Iterator[None]:
    before = signal.getsignal(signal.SIGUSR1)
    yield
    signal.signal(signal.SIGUSR1, before)


def test_nothing_is_sent_before_anybody_asks(tmp_path: Path) -> None:
    sent: list[int] = []
    stopping = Stopping(tmp_path, lambda: sent.append(1))
    stopping.look()
    assert (stopping.kind, sent) == (None, [])


def test_each_fit_is_told_once_and_a_process_that_does_not_listen_never(tmp_path: Path) -> None:
    sent: list[int] = []
    stopping = Stopping(tmp_path, lambda: sent.append(1))
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    request_stop(tmp_path, StopKind.GRACEFUL)
    stopping.look()
    assert (stopping.kind, sent) == (StopKind.GRACEFUL, []), "the signal would end the process"
    for count in (1, 2):
        signal.signal(signal.SIGUSR1, lambda *_: None)
        stopping.look()
        stopping.look()
        assert len(sent) == count


def test_a_stop_may_become_hurried(tmp_path: Path) -> None:
    stopping = Stopping(tmp_path, lambda: None)
    request_stop(tmp_path, StopKind.GRACEFUL)
    stopping.look()
    request_stop(tmp_path, StopKind.NOW)
    stopping.look()
    assert stopping.kind is StopKind.NOW


def test_the_signal_reaches_the_handler_of_this_process(tmp_path: Path) -> None:
    heard: list[int] = []
    signal.signal(signal.SIGUSR1, lambda *_: heard.append(1))
    request_stop(tmp_path, StopKind.GRACEFUL)
    Stopping(tmp_path).look()
    assert heard == [1]
