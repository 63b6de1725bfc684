"""What the devices of this node say about themselves: utilisation, memory, power, temperature.

The only file that imports pynvml, and only when GPUs are asked for. NVML is not trusted: a field that a GPU does not
support, an error, a lost GPU or a nonsensical value is None, and a call that hangs costs a second once, then nothing
until it returns. Knows no trial and no plan. Called about once a second, by one thread.
"""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ParamSpec, Protocol, TypeVar, cast

import psutil

from orchestrator.errors import UnfitEnvironmentError
from orchestrator.policies.plan import DeviceId
from orchestrator.telemetry.gpm import SILENT, open_gpm
from orchestrator.telemetry.gpu_processes import read_processes
from orchestrator.telemetry.patience import Patience

T = TypeVar("T")
P = ParamSpec("P")

NVML_TIMEOUT_S = 1.0
_MAX_POWER_MW = 10_000_000
_MAX_TEMPERATURE_C = 150


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceSample:
    """One device at one instant; None where it does not tell.

    Attributes:
        device_id: the device.
        utilisation_ratio: part of the time since the last sample in which it computed, in [0, 1].
        memory_used_bytes: in use by anybody.
        memory_total_bytes: installed.
        power_w: drawn now.
        temperature_c: degrees Celsius.
        sm_active_ratio, tensor_active_ratio, dram_active_ratio: how busy these parts of a GPU were since the last
            sample, in [0, 1]; Hopper and newer.
        problem: why nothing could be read at all, None if something could.
        processes: ids and bytes of the processes that hold memory of a GPU, as the host counts them.
    """

    device_id: DeviceId
    utilisation_ratio: float | None = None
    memory_used_bytes: int | None = None
    memory_total_bytes: int | None = None
    power_w: float | None = None
    temperature_c: float | None = None
    sm_active_ratio: float | None = None
    tensor_active_ratio: float | None = None
    dram_active_ratio: float | None = None
    problem: str | None = None
    processes: tuple[tuple[int, int], ...] | None = None


class MemoryInfo(Protocol):
    """What NVML says about a GPU's memory, in bytes."""

    used: int
    total: int


class UtilisationRates(Protocol):
    """What NVML says about a GPU's load, in percent."""

    gpu: int


class Nvml(Protocol):
    """The part of the module pynvml that is used here; handles are opaque. Names are pynvml's own."""

    NVML_TEMPERATURE_GPU: int
    NVMLError: type[Exception]
    NVMLError_Uninitialized: type[Exception]

    def nvmlInit(self) -> None: ...  # noqa: D102, N802
    def nvmlShutdown(self) -> None: ...  # noqa: D102, N802
    def nvmlDeviceGetCount(self) -> int: ...  # noqa: D102, N802
    def nvmlDeviceGetHandleByIndex(self, index: int) -> object: ...  # noqa: D102, N802
    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> object: ...  # noqa: D102, N802
    def nvmlDeviceGetUUID(self, handle: object) -> str: ...  # noqa: D102, N802
    def nvmlDeviceGetMemoryInfo(self, handle: object) -> MemoryInfo: ...  # noqa: D102, N802
    def nvmlDeviceGetUtilizationRates(self, handle: object) -> UtilisationRates: ...  # noqa: D102, N802
    def nvmlDeviceGetPowerUsage(self, handle: object) -> int: ...  # noqa: D102, N802
    def nvmlDeviceGetTemperature(self, handle: object, sensor: int) -> int: ...  # noqa: D102, N802


class Sampler(Protocol):
    """Reads some devices."""

    def sample(self) -> tuple[DeviceSample, ...]:
        """One sample per device, always the same devices in the same order; never raises, never blocks for long."""
        ...

    def close(self) -> None:
        """Stop reading."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Samplers:
    """What `open_samplers` could open, and why not the rest."""

    available: tuple[Sampler, ...]
    problems: tuple[UnfitEnvironmentError, ...]

    def sample(self) -> tuple[DeviceSample, ...]:
        """One sample per device of all samplers."""
        return tuple(sample for sampler in self.available for sample in sampler.sample())

    def close(self) -> None:
        """Close all samplers."""
        for sampler in self.available:
            sampler.close()


def open_samplers(
    cpu_device_id: DeviceId | None = None,
    gpu_device_ids: Mapping[str, DeviceId] | None = None,
    load_nvml: Callable[[], Nvml] | None = None,
) -> Samplers:
    """Open what this node offers of the devices asked for; what is missing is told, not raised.

    Args:
        cpu_device_id: id of the node's cores, None to leave them out.
        gpu_device_ids: id of each GPU by its UUID, or by its NVML index as a decimal; None or empty leaves NVML alone.
        load_nvml: imports pynvml; for tests.
    """
    available: list[Sampler] = []
    problems: list[UnfitEnvironmentError] = []
    if cpu_device_id is not None:
        available.append(CpuSampler(cpu_device_id))
    if gpu_device_ids:
        try:
            available.append(NvmlSampler(_load(load_nvml), gpu_device_ids))
        except UnfitEnvironmentError as problem:
            problems.append(problem)
    return Samplers(available=tuple(available), problems=tuple(problems))


def open_gpu_samplers(load_nvml: Callable[[], Nvml] | None = None) -> Samplers:
    """Open all GPUs that NVML shows on this node, under the ids that ranks give them."""
    try:
        nvml = _load(load_nvml)
        listed = Patience(NVML_TIMEOUT_S, time.monotonic).call(lambda: _uuids(nvml))
        if isinstance(listed, UnfitEnvironmentError):
            raise listed
        if not listed:
            raise UnfitEnvironmentError("NVML shows no GPU, or does not answer; GPUs go unwatched; see `nvidia-smi -L`")
        sampler = NvmlSampler(nvml, {uuid: cuda_device_id(uuid) for uuid in listed})
    except UnfitEnvironmentError as problem:
        return Samplers(available=(), problems=(problem,))
    return Samplers(available=(sampler,), problems=())


def cuda_device_id(uuid: str) -> DeviceId:
    """The id of a GPU: its UUID as torch writes it, without NVML's prefix."""
    return DeviceId(f"cuda:{uuid.removeprefix('GPU-')}")


def _uuids(nvml: Nvml) -> list[str] | UnfitEnvironmentError:
    try:
        nvml.nvmlInit()
        handles = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
        return [nvml.nvmlDeviceGetUUID(handle) for handle in handles]
    except nvml.NVMLError as error:
        return UnfitEnvironmentError(f"NVML does not start: {error}; GPUs go unwatched; install the NVIDIA driver")


class CpuSampler:
    """The cores that this process may use, as one device. Power and temperature are not read.

    Args:
        device_id: the id to report under.
        cores: the cores to look at, None for those this process may use now.
        read_times: busy and total seconds of every core of the machine since boot.
        read_memory: used and total bytes.
    """

    def __init__(
        self,
        device_id: DeviceId,
        cores: Sequence[int] | None = None,
        read_times: Callable[[], Sequence[tuple[float, float]]] | None = None,
        read_memory: Callable[[], tuple[int, int]] | None = None,
    ) -> None:
        self._device_id = device_id
        self._cores = tuple(sorted(os.sched_getaffinity(0) if cores is None else cores))
        self._read_times = _core_times if read_times is None else read_times
        self._read_memory = _memory if read_memory is None else read_memory
        self._last = self._sums()

    def sample(self) -> tuple[DeviceSample, ...]:
        """Utilisation since the last call, and the machine's memory."""
        before, self._last = self._last, self._sums()
        used_bytes, total_bytes = self._read_memory()
        sample = DeviceSample(
            device_id=self._device_id,
            utilisation_ratio=_utilisation(before, self._last),
            memory_used_bytes=used_bytes,
            memory_total_bytes=total_bytes,
        )
        return (sample,)

    def close(self) -> None:
        """Nothing is held open."""

    def _sums(self) -> tuple[float, float] | None:
        times = self._read_times()
        if not self._cores or self._cores[-1] >= len(times):
            return None  # with cores switched off, positions are no longer core numbers
        mine = [times[core] for core in self._cores]
        return sum(busy for busy, _ in mine), sum(total for _, total in mine)


def _utilisation(before: tuple[float, float] | None, after: tuple[float, float] | None) -> float | None:
    if before is None or after is None or after[1] <= before[1]:
        return None
    return min(1.0, max(0.0, (after[0] - before[0]) / (after[1] - before[1])))


def _core_times() -> list[tuple[float, float]]:
    times = []
    for core in psutil.cpu_times(percpu=True):
        # Guest time is contained in user time already.
        total = sum(core) - getattr(core, "guest", 0.0) - getattr(core, "guest_nice", 0.0)
        times.append((total - core.idle - getattr(core, "iowait", 0.0), total))
    return times


def _memory() -> tuple[int, int]:
    memory = psutil.virtual_memory()
    return memory.total - memory.available, memory.total


class NvmlSampler:
    """GPUs through NVML.

    Args:
        nvml: the module pynvml.
        device_ids: id of each GPU by UUID, or by NVML index as a decimal; an index is resolved once, here.
        timeout_s: how long a call may take before it counts as hung.
        now_s: monotonic time, for the back-off.

    Raises:
        UnfitEnvironmentError: NVML does not start, or knows no such GPU.
    """

    def __init__(
        self,
        nvml: Nvml,
        device_ids: Mapping[str, DeviceId],
        timeout_s: float = NVML_TIMEOUT_S,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._nvml = nvml
        self._gpm = open_gpm(nvml)
        self._patience = Patience(timeout_s, now_s)
        opened = self._patience.call(lambda: self._open(device_ids))
        if opened is None:
            raise UnfitEnvironmentError(
                f"NVML did not answer within {timeout_s} s; GPUs go unwatched; check `nvidia-smi` and the kernel log"
            )
        if isinstance(opened, UnfitEnvironmentError):
            raise opened
        self._device_ids = opened

    def sample(self) -> tuple[DeviceSample, ...]:
        """One sample per GPU; a GPU or a field that cannot be read is None."""
        samples = self._patience.call(self._read_all)
        if samples is None:
            problem = "NVML does not answer"
            return tuple(DeviceSample(device_id=device_id, problem=problem) for device_id in self._device_ids.values())
        return samples

    def close(self) -> None:
        """Shut NVML down, if it still answers."""
        self._patience.call(lambda: self._field([], self._nvml.nvmlShutdown))

    def _open(self, device_ids: Mapping[str, DeviceId]) -> dict[str, DeviceId] | UnfitEnvironmentError:
        """Device ids by UUID, or what is wrong; runs on the thread that may hang."""
        try:
            self._nvml.nvmlInit()
        except self._nvml.NVMLError as error:
            return UnfitEnvironmentError(
                f"NVML does not start: {error}; GPUs go unwatched; install the NVIDIA driver, or give the container "
                "access to it (libnvidia-ml.so.1)"
            )
        resolved = {}
        for key, device_id in device_ids.items():
            try:
                handle = self._handle(key)
                resolved[self._nvml.nvmlDeviceGetUUID(handle)] = device_id
            except self._nvml.NVMLError as error:
                return UnfitEnvironmentError(
                    f"NVML knows no GPU {key} ({device_id}): {error}; allowed: a UUID or index of `nvidia-smi -L`"
                )
        return resolved

    def _handle(self, key: str) -> object:
        if key.isdecimal():
            return self._nvml.nvmlDeviceGetHandleByIndex(int(key))
        return self._nvml.nvmlDeviceGetHandleByUUID(key)

    def _read_all(self) -> tuple[DeviceSample, ...]:
        return tuple(self._read(uuid, device_id) for uuid, device_id in self._device_ids.items())

    def _read(self, uuid: str, device_id: DeviceId) -> DeviceSample:
        nvml = self._nvml
        errors: list[str] = []
        try:
            # Asked for by UUID every time: indices and handles change when a GPU falls off the bus.
            handle = nvml.nvmlDeviceGetHandleByUUID(uuid)
        except nvml.NVMLError_Uninitialized:
            self._field(errors, nvml.nvmlInit)
            return DeviceSample(device_id=device_id, problem="NVML was shut down and is started again")
        except nvml.NVMLError as error:
            return DeviceSample(device_id=device_id, problem=str(error))
        memory = self._field(errors, nvml.nvmlDeviceGetMemoryInfo, handle)
        rates = self._field(errors, nvml.nvmlDeviceGetUtilizationRates, handle)
        power_mw = self._field(errors, nvml.nvmlDeviceGetPowerUsage, handle)
        temperature = self._field(errors, nvml.nvmlDeviceGetTemperature, handle, nvml.NVML_TEMPERATURE_GPU)
        is_silent = memory is None and rates is None and power_mw is None and temperature is None
        used_bytes, total_bytes = _memory_fields(memory)
        activity = SILENT if self._gpm is None else self._gpm.read(uuid, handle)
        return DeviceSample(
            device_id=device_id,
            utilisation_ratio=None if rates is None else _scaled(rates.gpu, 100, 100),
            memory_used_bytes=used_bytes,
            memory_total_bytes=total_bytes,
            power_w=None if power_mw is None else _scaled(power_mw, 1000, _MAX_POWER_MW),
            temperature_c=None if temperature is None else _scaled(temperature, 1, _MAX_TEMPERATURE_C),
            sm_active_ratio=activity.sm_ratio,
            tensor_active_ratio=activity.tensor_ratio,
            dram_active_ratio=activity.dram_ratio,
            problem=errors[-1] if is_silent else None,
            processes=read_processes(nvml, handle),
        )

    def _field(self, errors: list[str], read: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | None:
        """What NVML answers; None, and the error noted, if it answers with one."""
        try:
            return read(*args, **kwargs)
        except self._nvml.NVMLError as error:
            errors.append(str(error))
            return None


def _load(load_nvml: Callable[[], Nvml] | None) -> Nvml:
    try:
        return cast(Nvml, importlib.import_module("pynvml")) if load_nvml is None else load_nvml()
    except ImportError as error:
        raise UnfitEnvironmentError(
            f"the Python package for NVML is missing ({error}); GPUs go unwatched; install nvidia-ml-py>=13"
        ) from error


def _memory_fields(info: MemoryInfo | None) -> tuple[int | None, int | None]:
    """Used and total bytes; neither is believed if they contradict each other."""
    if info is None or not 0 <= info.used <= info.total or info.total == 0:
        return None, None
    return int(info.used), int(info.total)


def _scaled(value: float, divisor: float, highest: float) -> float | None:
    """`value / divisor`, if the value can be true."""
    return value / divisor if 0 <= value <= highest else None
