"""What the cluster of a run changes around it, as far as that needs no cluster."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from orchestrator import cluster
from orchestrator.cluster import RayCluster, StartGivenUpError
from orchestrator.config.model import ClusterSection
from orchestrator.errors import UnfitEnvironmentError

Start = Callable[..., object]


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch) -> Callable[[Start], None]:
    """Puts something in the place of Ray's start; its shutdown does nothing."""
    monkeypatch.setattr("ray.shutdown", lambda: None)
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE", "TMPDIR", "http_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)

    def put(start: Start) -> None:
        monkeypatch.setattr(cluster, "_start", start)

    return put


def new(run_dir: Path, address: str = "local") -> RayCluster:
    return RayCluster(ClusterSection(address=address), "test", run_dir)


def test_the_token_of_a_run_is_in_its_environment_only_and_gone_with_it(
    starts: Callable[[Start], None], tmp_path: Path
) -> None:
    """A file in the user's home had made every other cluster of the user ask for it."""
    seen: dict[str, str] = {}
    starts(lambda *_, **__: seen.update(os.environ))
    before = dict(os.environ)
    one = new(tmp_path)
    with one.opened():
        assert one.home is not None
        home = one.home
        assert len(seen["RAY_AUTH_TOKEN"]) >= 32
        assert seen["RAY_TMPDIR"] == str(home)
        assert seen["GLOO_SOCKET_IFNAME"] == "lo"
        os.environ["RAY_AUTH_MODE"] = "token"  # as Ray does
    assert dict(os.environ) == before
    assert not home.exists()


def test_a_token_of_the_users_own_is_left_alone(
    starts: Callable[[Start], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, str] = {}
    starts(lambda *_, **__: seen.update(os.environ))
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/secret")
    with new(tmp_path).opened():
        assert "RAY_AUTH_TOKEN" not in seen
    with new(tmp_path, "auto").opened():
        assert "GLOO_SOCKET_IFNAME" not in {name for name in os.environ if name not in seen}
        assert "RAY_TMPDIR" not in os.environ or os.environ["RAY_TMPDIR"] == seen.get("RAY_TMPDIR", "")


@pytest.mark.parametrize("length", [10, 200])
def test_a_long_tmpdir_is_not_used_and_a_proxy_is_gone_around(
    starts: Callable[[Start], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, length: int
) -> None:
    seen: dict[str, str] = {}
    starts(lambda *_, **__: seen.update(os.environ))
    place = Path("/tmp") if length < 100 else tmp_path / ("x" * length)
    place.mkdir(exist_ok=True)
    monkeypatch.setenv("TMPDIR", str(place))
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    one = new(tmp_path)
    with one.opened():
        assert seen["TMPDIR"] == (str(place) if length < 100 else str(one.home))
        assert "127.0.0.1" in seen["no_proxy"].split(",")


def test_a_start_that_fails_is_one_line_and_the_rest_is_in_the_log(
    starts: Callable[[Start], None], tmp_path: Path
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("Failed to start GCS.\nTraceback (most recent call last):\n  File ...")

    starts(fail)
    words = (
        r"^Ray does not start at address 'local': Failed to start GCS\.; all of it: .*run\.log; see: orch\w+ doctor$"
    )
    with pytest.raises(UnfitEnvironmentError, match=words), new(tmp_path).opened():
        pytest.fail("it did not start")
    assert "Traceback" in (tmp_path / "run.log").read_text()


def test_a_start_that_nobody_wants_any_more_is_given_up(
    starts: Callable[[Start], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    goes_on = threading.Event()
    monkeypatch.setattr(cluster, "_START_GRACE_S", 0.05)
    starts(lambda *_, **__: goes_on.wait(60.0))
    one = new(tmp_path)
    with pytest.raises(StartGivenUpError), one.opened(lambda: True):
        pytest.fail("it did not start")
    assert one.is_stuck
    assert one.home is not None
    assert not one.home.exists()
    goes_on.set()


def test_a_place_for_sockets_that_is_missing_is_said_with_what_was_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nowhere(_run_dir: Path) -> Path:
        raise OSError("/tmp: Read-only file system; /var/tmp: Permission denied")

    monkeypatch.setattr(cluster, "make_home", nowhere)
    with (
        pytest.raises(
            UnfitEnvironmentError, match=r"no place for Ray's sockets \(/tmp: Read-only .*allowed: one of these"
        ),
        new(tmp_path).opened(),
    ):
        pytest.fail("it did not start")


@contextlib.contextmanager
def starting() -> Iterator[None]:
    cluster._is_starting.set()
    try:
        yield
    finally:
        cluster._is_starting.clear()


def test_rays_processes_are_in_groups_of_their_own_and_other_children_are_not() -> None:
    """A signal to the group of the run reaches the driver, which has checkpoints to wait for, and not Ray."""
    code = [sys.executable, "-c", "import os; print(os.getpgid(0) == os.getpid())"]

    def as_ray_does() -> str:
        done = subprocess.run(code, preexec_fn=lambda: None, capture_output=True, text=True, check=True, timeout=50)
        return done.stdout.strip()

    with starting():
        assert as_ray_does() == "True"
    assert as_ray_does() == "False"


def test_a_server_of_ray_that_ended_is_noticed(
    starts: Callable[[Start], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    servers: list[subprocess.Popen[bytes]] = []
    starts(lambda *_, **__: servers.append(subprocess.Popen(["/bin/sleep", "60"])))
    one = new(tmp_path)
    monkeypatch.setattr(cluster, "_RAY_PROCESSES", frozenset({"sleep"}))
    try:
        with one.opened():
            assert one.is_there
            one.require()
            servers[0].kill()
            os.waitid(os.P_PID, servers[0].pid, os.WEXITED | os.WNOWAIT)
            assert not one.is_there
            with pytest.raises(UnfitEnvironmentError, match="a process of Ray ended while the run went on"):
                one.require()
    finally:
        servers[0].kill()
        servers[0].wait()
