"""What every test gets: an own corner for Ray, and a check that neither a process nor a signal handler is left behind.

The environment is set when pytest loads this file, before anything can import Ray, so that processes started by tests
inherit it. Ray itself is not imported here.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from hypothesis import HealthCheck, settings

CHILD_GRACE_S = 5.0
"""How long a test's processes may take to end after it."""

ORPHAN_GRACE_S = 15.0
"""How long the processes of a module's Ray may take to end after its shutdown."""

MARK = "ORCHESTRATOR_TEST_SESSION"
"""Environment variable by which processes are known as ours, also after their parent died."""

# Short, because Ray puts sockets below it and their paths may have 107 bytes at most.
SESSION_DIR = Path(tempfile.mkdtemp(prefix="rt", dir="/tmp"))


# What a property says does not depend on how fast or how busy the machine is.
settings.register_profile("orchestrator", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("orchestrator")


def _isolate_ray() -> None:
    token_file = SESSION_DIR / "token"
    token_file.touch(mode=0o600)
    token_file.write_text(secrets.token_hex(32))
    os.environ.update(
        {
            MARK: SESSION_DIR.name,
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_TMPDIR": str(SESSION_DIR),
            "RAY_AUTH_MODE": "token",
            # One token for the whole session: Ray reads it once per process and keeps it.
            "RAY_AUTH_TOKEN_PATH": str(token_file),
        }
    )
    # A developer's running cluster must neither be used nor disturbed.
    os.environ.pop("RAY_ADDRESS", None)


_isolate_ray()
if "PYTEST_XDIST_WORKER" in os.environ:  # a process of these for each processor: more threads stand in each other's way
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_unconfigure() -> None:
    """Remove the session's folder."""
    shutil.rmtree(SESSION_DIR, ignore_errors=True)


def _has_children() -> bool:
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


def _is_alive(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _command(process: psutil.Process) -> str:
    try:
        return f"{process.pid} ({' '.join(process.cmdline())[:160]})"
    except psutil.Error:
        return str(process.pid)


def _children() -> set[psutil.Process]:
    """Direct children of pytest that run; Python's own resource tracker stays until the end and does not count."""
    # Walking /proc costs milliseconds; most tests start nothing, which one system call tells.
    if not _has_children():
        return set()
    children = {child for child in psutil.Process().children() if _is_alive(child)}
    return {child for child in children if "multiprocessing.resource_tracker" not in _command(child)}


def _marked() -> set[psutil.Process]:
    """Running processes that inherited this session's environment, whoever their parent is now."""
    found = set()
    for process in psutil.process_iter():
        try:
            is_ours = process.pid != os.getpid() and process.environ().get(MARK) == SESSION_DIR.name
            if is_ours and _is_alive(process) and "multiprocessing.resource_tracker" not in _command(process):
                found.add(process)
        except psutil.Error:
            continue
    return found


def _end(processes: set[psutil.Process]) -> None:
    for process in processes:
        try:
            process.kill()
        except psutil.Error:
            continue
    psutil.wait_procs(processes, timeout=5)


def _left_after(before: set[psutil.Process], grace_s: float, *, is_orphan_check: bool) -> set[psutil.Process]:
    look = _marked if is_orphan_check else _children
    deadline_s = time.monotonic() + grace_s
    while (left := look() - before) and time.monotonic() < deadline_s:
        time.sleep(0.1)
    return left


def _fail_on(left: set[psutil.Process], who: str, grace_s: float) -> None:
    if not left:
        return
    commands = "\n  ".join(sorted(map(_command, left)))
    _end(left)
    pytest.fail(f"{who} left processes running {grace_s:g} s after its end (now killed):\n  {commands}", pytrace=False)


@pytest.fixture(scope="module", autouse=True)
def _no_orphan_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a module that leaves processes behind, also ones whose parent died. Unit tests start none: not looked at."""
    if "unit" in request.path.relative_to(Path(__file__).parent).parts:
        yield
        return
    before = _marked()
    yield
    _fail_on(_left_after(before, ORPHAN_GRACE_S, is_orphan_check=True), str(request.path.name), ORPHAN_GRACE_S)


@pytest.fixture(scope="module", autouse=True)
def _signals_as_before() -> Iterator[None]:
    """Give each module the signal handlers of a fresh process: Ray puts one of its own in the place of SIGTERM's."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def _no_child_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test that leaves a child process running."""
    before = _children()
    yield
    _fail_on(_left_after(before, CHILD_GRACE_S, is_orphan_check=False), str(request.node.name), CHILD_GRACE_S)
