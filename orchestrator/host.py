"""What the surroundings of a process allow and demand: cores, a short directory for sockets, ways around a proxy.

Asks the operating system and the environment only. Knows no run. Used by `check`, `doctor` and the driver.
"""

from __future__ import annotations

import math
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from orchestrator.errors import UnfitEnvironmentError

_CGROUP_ROOT = Path("/sys/fs/cgroup")
MAX_TEMPORARY_BYTES = 32
"""Bytes that the path of a run's own temporary directory may have.

A Unix socket's path may have 107. Below that directory Ray puts `/ray/session_<26 characters>_<process id>/sockets/`,
which are up to 55, and names of up to 20 behind it.
"""
_PROXIES = ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def why_not_here() -> str | None:
    """Why no run can take place on this operating system, and what to do; None on Linux."""
    if sys.platform == "linux":
        return None
    name = {"darwin": "macOS", "win32": "Windows", "cygwin": "Windows"}.get(sys.platform, sys.platform)
    way = "WSL 2 (wsl --install)" if name == "Windows" else "a Linux machine"
    return (
        f"this is {name}, and a run needs Linux, whose scheduler and /proc its shares and its clean-up are made with;"
        f" allowed: {way}, a container (docker run -it -v .:/work -w /work python:3.12), or `ray job submit` to a Linux"
        " cluster. Here work: init, check, schema, and all that only reads run directories, such as watch and export"
    )


def require_linux() -> None:
    """Refuse what needs Linux elsewhere, before anything is imported that only Linux has.

    Raises:
        UnfitEnvironmentError: this is another operating system.
    """
    why = why_not_here()
    if why is not None:
        raise UnfitEnvironmentError(why)


def num_usable_cores(root: Path = _CGROUP_ROOT, own: Path = Path("/proc/self/cgroup")) -> int:
    """Cores that this process may use: those it is bound to, no more than its container's quota, at least one."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    cores, quota = len(affinity(0)) if affinity else (os.cpu_count() or 1), cpu_quota(root, own)
    return cores if quota is None else max(1, min(cores, math.floor(quota + 1e-9)))


def cpu_quota(root: Path = _CGROUP_ROOT, own: Path = Path("/proc/self/cgroup")) -> float | None:
    """CPU seconds per second that the control groups of this process allow, None where they set no limit.

    Args:
        root: where control groups are mounted.
        own: the list of the groups that this process is in.

    Source: Documentation/admin-guide/cgroup-v2.rst (cpu.max) and scheduler/sched-bwc.rst (cpu.cfs_quota_us) of Linux.
    """
    quotas = [*_quotas_v2(root, own), *_quotas_v1(root, own)]
    return min(quotas, default=None)


def _quotas_v2(root: Path, own: Path) -> Iterator[float]:
    """Of each group from the process's own up to the mount: a limit holds for all below it."""
    for directory in _groups(root, _own_path(own, "")):
        quota, _, period = _read(directory / "cpu.max").partition(" ")
        if quota.isdigit() and period.isdigit() and int(period):
            yield int(quota) / int(period)


def _quotas_v1(root: Path, own: Path) -> Iterator[float]:
    for name in ("cpu", "cpu,cpuacct", "cpuacct,cpu"):
        for directory in _groups(root / name, _own_path(own, "cpu")):
            quota, period = _read(directory / "cpu.cfs_quota_us"), _read(directory / "cpu.cfs_period_us")
            if quota.isdigit() and period.isdigit() and int(period):  # no limit is -1
                yield int(quota) / int(period)


def _groups(mount: Path, path: str) -> Iterator[Path]:
    """The group at that path below the mount and those above it, as far as they are there.

    In a container the mount often shows the container's own group as its root, whatever the path says.
    """
    directory = mount / path.lstrip("/")
    while directory != mount and mount in directory.parents:
        yield directory
        directory = directory.parent
    yield mount


def _own_path(own: Path, controller: str) -> str:
    """The path of this process's group: of the hierarchy with that controller, or of version 2 where it is empty."""
    for line in _read(own).splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if (not controller and number == "0" and not controllers) or (
            controller and controller in controllers.split(",")
        ):
            return path
    return "/"


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return ""


def temporary_places(environment: Mapping[str, str] = os.environ) -> list[Path]:
    """Where the temporary directory of a run may be, best first; not all of them need exist."""
    named = [environment[name] for name in ("TMPDIR", "XDG_RUNTIME_DIR") if environment.get(name)]
    return [Path(place) for place in ("/tmp", *named, "/var/tmp", "/dev/shm")]


def make_temporary(prefix: str, places: list[Path] | None = None) -> Path:
    """A new directory, readable by this user only, whose path is short enough for the sockets of a Ray cluster.

    Raises:
        OSError: there is no place for it; the message says what was tried.
    """
    problems = []
    for place in temporary_places() if places is None else places:
        length = len(os.fsencode(place / "orch-12345678"))
        if length > MAX_TEMPORARY_BYTES:
            problems.append(f"{place}: its path is too long by {length - MAX_TEMPORARY_BYTES} bytes")
            continue
        try:
            return Path(tempfile.mkdtemp(prefix=prefix, dir=place))
        except OSError as error:
            problems.append(f"{place}: {error.strerror}")
    raise OSError("; ".join(problems))


def is_short(directory: str) -> bool:
    """Whether programs may keep sockets below this temporary directory, and it can be written to."""
    return len(os.fsencode(directory)) <= MAX_TEMPORARY_BYTES + 16 and os.access(directory, os.W_OK | os.X_OK)


def without_proxy(environment: Mapping[str, str], hosts: tuple[str, ...] = LOOPBACK) -> dict[str, str]:
    """What the environment must say so that these hosts are spoken to directly; nothing where no proxy is set."""
    if not any(environment.get(name) for name in _PROXIES):
        return {}
    named = ",".join(filter(None, (environment.get("no_proxy"), environment.get("NO_PROXY"))))
    if named.strip() == "*":
        return {}
    known = [host for host in (part.strip() for part in named.split(",")) if host]
    value = ",".join(dict.fromkeys([*known, *hosts]))
    return {"no_proxy": value, "NO_PROXY": value}
