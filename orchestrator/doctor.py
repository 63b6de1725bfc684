"""Whether this machine has what a run needs, one finding per line, each with what to do about it.

Looks at package metadata, the kernel's files and sockets; imports neither torch nor ray, so that it also answers where
those are broken. Called by `orchestrator doctor`.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from importlib import metadata
from pathlib import Path

from orchestrator.config.machine import this_machine
from orchestrator.devices.choice import GpuFacts, GpuShare, choose, gpu_facts
from orchestrator.host import cpu_quota, is_short, make_temporary, without_proxy

PYTHON_RANGE = ((3, 11), (3, 13))
# Distribution -> range that is installed: at least the first, below the second; a test holds it against pyproject.toml.
PACKAGE_RANGES: dict[str, tuple[tuple[int, ...], tuple[int, ...] | None]] = {
    "torch": ((2, 11), (2, 16)),
    "ray": ((2, 60), (2, 61)),
    "nvidia-ml-py": ((13,), None),
    "pyarrow": ((17,), None),
    "numpy": ((2,), None),
    "psutil": ((6,), None),
    "click": ((8, 1), None),
    "pydantic": ((2, 10), None),
    "pyyaml": ((6,), None),
    "rich": ((13, 9), None),
    "safetensors": ((0, 5), None),
}
TESTED_VERSIONS: dict[str, tuple[tuple[int, ...], ...]] = {"torch": ((2, 11), (2, 13))}
"""The versions inside a range that the tests ran on: 2.13, and 2.11 on GPUs, as the README says."""
# What Ray's State API and dashboard, Train and Tune need beyond ray itself.
STATE_API_MODULES = ("aiohttp", "aiohttp_cors", "grpc", "opencensus", "prometheus_client")
RAY_EXTRA_MODULES = ("fsspec", "pandas", "requests", "tensorboardX")
COMPILED_MODULES = ("torch", "ray")
"""What takes Python longest to compile."""
_GIB = 1 << 30
_MIN_DISK_BYTES = 2 * _GIB
_MIN_SHM_BYTES = _GIB
_NUM_PORTS = 8


class Status(StrEnum):
    """How bad a finding is: `warn` costs speed or a feature, `fail` keeps runs from working."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One finding. `remedy` is empty where nothing is to be done."""

    name: str
    status: Status
    detail: str
    remedy: str = ""


def examine(storage: Path) -> list[Check]:
    """All checks, in a fixed order; `storage` is where runs will be written."""
    checks = [check_python(sys.version_info[:3])]
    checks += [check_package(name, installed_version(name)) for name in PACKAGE_RANGES]
    checks += [check_modules("state api", "ray[default]", STATE_API_MODULES)]
    checks += [check_modules("train and tune", "ray[train,tune]", RAY_EXTRA_MODULES)]
    checks += [check_bytecode()]
    machine = this_machine()
    checks += [check_cores(machine.num_cores, os.cpu_count() or 1, cpu_quota()), check_affinity()]
    checks += [check_devices(machine.num_gpus), check_nvml(machine.num_gpus)]
    checks += [check_gpu_share(machine.num_gpus), check_ports(), check_proxy(os.environ)]
    checks += [check_disk(storage), check_shared_memory(Path("/dev/shm")), check_temporary()]
    home = Path(os.path.expanduser("~"))  # noqa: PTH111 - Path.home raises for a user without an entry
    checks += [check_home(home), check_token(home / ".ray" / "auth_token")]
    return checks


def installed_version(distribution: str) -> str | None:
    """Version of an installed distribution, None where it is not installed."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def parse_version(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: '2.13.0+cpu' -> (2, 13, 0)."""
    numbers = []
    for part in version.partition("+")[0].split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        numbers.append(int(digits))
        if digits != part:
            break
    return tuple(numbers)


def check_python(version: tuple[int, ...]) -> Check:
    """Whether this Python is one of those that are tested."""
    low, high = PYTHON_RANGE
    detail = ".".join(str(n) for n in version)
    if low <= version[:2] < high:
        return Check(name="python", status=Status.OK, detail=detail)
    remedy = f"use Python {_dotted(low)} or newer, below {_dotted(high)}"
    return Check(name="python", status=Status.FAIL, detail=detail, remedy=remedy)


def check_package(name: str, version: str | None) -> Check:
    """Whether a distribution is installed in a tested version: too old fails, too new warns."""
    low, high = PACKAGE_RANGES[name]
    wanted = f"'{name}>={_dotted(low)}{f',<{_dotted(high)}' if high else ''}'"
    if version is None:
        return Check(name=name, status=Status.FAIL, detail="not installed", remedy=f"pip install {wanted}")
    numbers = parse_version(version)
    if numbers < low:
        return Check(name=name, status=Status.FAIL, detail=f"{version} is too old", remedy=f"pip install {wanted}")
    if high is not None and numbers >= high:
        detail = f"{version} is newer than what is tested"
        return Check(name=name, status=Status.WARN, detail=detail, remedy=f"pip install {wanted}")
    tested = TESTED_VERSIONS.get(name)
    if tested is not None and numbers[:2] not in tested:
        detail = f"{version} was not tested; tested: {', '.join(_dotted(each) for each in tested)}"
        remedy = f"nothing, if it works; else pip install '{name}=={_dotted(tested[-1])}.*'"
        return Check(name=name, status=Status.WARN, detail=detail, remedy=remedy)
    return Check(name=name, status=Status.OK, detail=version)


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(str(n) for n in version)


def check_modules(name: str, extra: str, modules: tuple[str, ...]) -> Check:
    """Whether the modules of a Ray extra can be found (they are not imported)."""
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        remedy = f"pip install '{extra}'; without it stopped trials leak and metrics are missing"
        return Check(name=name, status=Status.FAIL, detail=f"missing: {', '.join(missing)}", remedy=remedy)
    return Check(name=name, status=Status.OK, detail=f"{extra} is complete")


def check_bytecode(modules: tuple[str, ...] = COMPILED_MODULES) -> Check:
    """Whether Python finds these modules compiled: each process of a run loads them."""
    found = {module: importlib.util.find_spec(module) for module in modules}
    origins = {module: spec.origin for module, spec in found.items() if spec is not None and spec.origin is not None}
    missing = [name for name, origin in origins.items() if not Path(importlib.util.cache_from_source(origin)).exists()]
    folders = [Path(origins[name]).parent for name in missing]
    if missing and (sys.dont_write_bytecode or not all(os.access(folder, os.W_OK) for folder in folders)):
        names = " ".join(str(folder) for folder in folders)
        remedy = f"unset PYTHONDONTWRITEBYTECODE, or once: {sys.executable} -m compileall -q {names}"
        detail = f"every process compiles {' and '.join(missing)} anew, and a slot opens tens of seconds later"
        return Check(name="bytecode", status=Status.WARN, detail=detail, remedy=remedy)
    detail = "is kept" if not missing else f"that of {' and '.join(missing)} is written by the first run"
    return Check(name="bytecode", status=Status.OK, detail=detail)


def check_cores(num_usable: int, num_present: int, quota: float | None = None) -> Check:
    """How many cores this process may use; `quota` is what its container allows, in cores."""
    detail = f"{num_usable} of {num_present} usable"
    if quota is not None:
        detail += f", by a container's quota of {quota:g}"
    if quota is not None and quota < 1:
        remedy = f"give the container a whole core: every process stands still for {1 - quota:.0%} of the time"
        return Check(name="cores", status=Status.WARN, detail=detail, remedy=remedy)
    if num_usable < 2:
        remedy = "two or more cores let two trials run at a time; set search.max_concurrent: 1 here"
        return Check(name="cores", status=Status.WARN, detail=detail, remedy=remedy)
    return Check(name="cores", status=Status.OK, detail=detail)


def check_affinity() -> Check:
    """Whether the process may pin itself, which is how a share of a CPU is enforced."""
    try:
        os.sched_setaffinity(0, os.sched_getaffinity(0))
    except OSError as error:
        remedy = "allow sched_setaffinity (seccomp profile of the container), or set dials.share.enabled: false"
        return Check(name="cpu affinity", status=Status.FAIL, detail=f"refused: {error}", remedy=remedy)
    return Check(name="cpu affinity", status=Status.OK, detail="may be set")


def check_devices(num_gpus: int) -> Check:
    """Which devices trials run on."""
    if num_gpus == 0:
        return Check(name="devices", status=Status.OK, detail="the CPU (no NVIDIA device found)")
    return Check(name="devices", status=Status.OK, detail=f"{num_gpus} NVIDIA device{'s' if num_gpus > 1 else ''}")


def _load_nvml() -> None:
    ctypes.CDLL("libnvidia-ml.so.1")


def check_nvml(num_gpus: int, load: Callable[[], None] = _load_nvml) -> Check:
    """Whether the driver's management library can be loaded where there is a GPU."""
    if num_gpus == 0:
        return Check(name="nvml", status=Status.OK, detail="not needed without a GPU")
    try:
        load()
    except OSError as error:
        remedy = "install the NVIDIA driver's libnvidia-ml, or run the container with the utility capability"
        return Check(name="nvml", status=Status.WARN, detail=f"cannot be loaded: {error}", remedy=remedy)
    return Check(name="nvml", status=Status.OK, detail="can be loaded")


def check_gpu_share(num_gpus: int, ask: Callable[[], GpuFacts] = gpu_facts) -> Check:
    """By which mechanism trials would share a GPU, and why by no better one."""
    if num_gpus == 0:
        return Check(name="gpu share", status=Status.OK, detail="not needed without a GPU")
    choice = choose(GpuShare.SM_GROUPS, ask(), turns_shares=True)
    if not choice.missing:
        detail = "sm_groups: parts of a GPU are cut in hardware and changed live"
        return Check(name="gpu share", status=Status.OK, detail=detail)
    remedy = "; ".join(f"for {share}: {reason}" for share, reason in choice.missing.items())
    return Check(name="gpu share", status=Status.WARN, detail=choice.share.value, remedy=remedy)


def _free_ports(count: int) -> Iterator[int]:
    opened = []
    try:
        for _ in range(count):
            server = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
            opened.append(server)
            server.bind(("127.0.0.1", 0))
            server.listen(1)
            yield server.getsockname()[1]
    finally:
        for server in opened:
            server.close()


def check_ports(free_ports: Callable[[int], Iterator[int]] = _free_ports) -> Check:
    """Whether a local cluster could listen on as many loopback ports as it needs."""
    try:
        ports = list(free_ports(_NUM_PORTS))
    except OSError as error:
        remedy = "allow listening on 127.0.0.1 and check net.ipv4.ip_local_port_range"
        return Check(name="ports", status=Status.FAIL, detail=f"cannot listen: {error}", remedy=remedy)
    return Check(name="ports", status=Status.OK, detail=f"{len(ports)} loopback ports can be opened")


def check_proxy(environment: Mapping[str, str]) -> Check:
    """Whether a proxy stands between the processes of a run; where it does, the run goes around it."""
    missing = without_proxy(environment)
    if not missing:
        return Check(name="proxy", status=Status.OK, detail="none in the way")
    detail = "set without no_proxy for this machine; a run sets that for itself"
    return Check(name="proxy", status=Status.OK, detail=detail)


def check_temporary(make: Callable[[str], Path] = make_temporary) -> Check:
    """Whether there is a directory whose path is short enough for Ray's sockets, and whether TMPDIR is."""
    try:
        place = make("orch-doctor-")
    except OSError as error:
        remedy = "make /tmp or /var/tmp writable for you (chmod 1777), or set TMPDIR to a short path that is"
        return Check(name="temporary", status=Status.FAIL, detail=f"no place for sockets: {error}", remedy=remedy)
    place.rmdir()
    detail = f"sockets are kept in {place.parent}"
    named = os.environ.get("TMPDIR")
    if named and not is_short(named):
        detail += "; TMPDIR is too long for sockets or cannot be written, and a run does not use it"
    return Check(name="temporary", status=Status.OK, detail=detail)


def check_home(home: Path) -> Check:
    """Whether libraries can keep files in the home directory; a run itself needs none there."""
    if home.is_dir() and os.access(home, os.W_OK | os.X_OK):
        return Check(name="home", status=Status.OK, detail=f"{home} can be written")
    detail = f"{home} cannot be written; data sets and models that libraries would keep there are loaded anew"
    remedy = "set HOME to a directory of yours; of single libraries HF_HOME, TORCH_HOME, XDG_CACHE_HOME"
    return Check(name="home", status=Status.WARN, detail=detail, remedy=remedy)


def check_token(path: Path) -> Check:
    """Whether a token file makes every Ray of this user ask for it; earlier versions of ours left one there."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return Check(name="ray token", status=Status.OK, detail="none is kept for all clusters of this user")
    detail = f"{path} makes every `ray start` and `ray job submit` of this user ask for it"
    if mode & 0o077:
        detail += ", and others can read it"
    remedy = f"rm {path}, unless you made it for a cluster of yours; then chmod 600 {path}"
    return Check(name="ray token", status=Status.WARN, detail=detail, remedy=remedy)


def _nearest_existing(path: Path) -> Path:
    path = path.absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def check_disk(storage: Path) -> Check:
    """Whether the storage directory can be written and has room for checkpoints."""
    place = _nearest_existing(storage)
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        remedy = "name another directory (storage in the run file), or change its permissions"
        return Check(name="disk", status=Status.FAIL, detail=f"{place} cannot be written", remedy=remedy)
    return _check_room("disk", place, _MIN_DISK_BYTES, "free some space or name another directory (storage)")


def check_shared_memory(place: Path) -> Check:
    """Whether /dev/shm has room for Ray's object store; with less Ray falls back to slow files in /tmp."""
    if not place.is_dir():
        remedy = "mount a tmpfs on /dev/shm (docker run --shm-size=2g)"
        return Check(name="shared memory", status=Status.WARN, detail=f"there is no {place}", remedy=remedy)
    return _check_room("shared memory", place, _MIN_SHM_BYTES, "docker run --shm-size=2g, or a larger tmpfs")


def _check_room(name: str, place: Path, needed_bytes: int, remedy: str) -> Check:
    free_bytes = shutil.disk_usage(place).free
    detail = f"{free_bytes / _GIB:.1f} GiB free on {place}"
    if free_bytes < needed_bytes:
        detail += f", recommended {needed_bytes / _GIB:.0f} GiB"
        return Check(name=name, status=Status.WARN, detail=detail, remedy=remedy)
    return Check(name=name, status=Status.OK, detail=detail)
