from __future__ import annotations

import importlib
import threading
from dataclasses import dataclass, field
from typing import NoReturn

import pytest

from orchestrator.errors import UnfitEnvironmentError
from orchestrator.policies.plan import DeviceId
from orchestrator.telemetry.sampler import CpuSampler, DeviceSample, NvmlSampler, open_samplers

GPU = DeviceId("node/cuda:0")
OTHER = DeviceId("node/cuda:1")


class NVMLError(Exception):
    """As in pynvml: the text says what happened, the class which error it was."""


class NVMLError_NotSupported(NVMLError):  # noqa: N801, N818
    def __str__(self) -> str:
        return "Not Supported"


class NVMLError_GpuIsLost(NVMLError):  # noqa: N801, N818
    def __str__(self) -> str:
        return "GPU is lost"


class NVMLError_Uninitialized(NVMLError):  # noqa: N801, N818
    def __str__(self) -> str:
        return "Uninitialized"


class NVMLError_NotFound(NVMLError):  # noqa: N801, N818
    def __str__(self) -> str:
        return "Not Found"


class NVMLError_LibraryNotFound(NVMLError):  # noqa: N801, N818
    def __str__(self) -> str:
        return "NVML Shared Library Not Found"


@dataclass
class Memory:
    used: int
    total: int


@dataclass
class Rates:
    gpu: int


@dataclass
class FakeNvml:
    """pynvml as far as it is used, with two GPUs; handles are the UUIDs. `fails` maps a function to its error."""

    NVML_TEMPERATURE_GPU: int = 0
    NVMLError: type[Exception] = NVMLError
    NVMLError_Uninitialized: type[Exception] = NVMLError_Uninitialized
    uuids: list[str] = field(default_factory=lambda: ["GPU-a", "GPU-b"])
    fails: dict[str, Exception] = field(default_factory=dict)
    is_up: bool = False
    memory: Memory = field(default_factory=lambda: Memory(used=10, total=100))
    gpu_percent: int = 40
    power_mw: int = 350_000
    temperature: int = 55
    hang: threading.Event | None = None
    num_calls: int = 0

    def nvmlInit(self) -> None:  # noqa: N802
        self._answer("nvmlInit")
        self.is_up = True

    def nvmlShutdown(self) -> None:  # noqa: N802
        self._answer("nvmlShutdown", needs_init=True)
        self.is_up = False

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> object:  # noqa: N802
        self._answer("nvmlDeviceGetHandleByIndex", needs_init=True)
        if index >= len(self.uuids):
            raise NVMLError_NotFound
        return self.uuids[index]

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> object:  # noqa: N802
        self._answer("nvmlDeviceGetHandleByUUID", needs_init=True)
        if uuid not in self.uuids:
            raise NVMLError_NotFound
        return uuid

    def nvmlDeviceGetUUID(self, handle: object) -> str:  # noqa: N802
        self._answer("nvmlDeviceGetUUID", needs_init=True)
        return str(handle)

    def nvmlDeviceGetMemoryInfo(self, handle: object) -> Memory:  # noqa: N802
        self._answer("nvmlDeviceGetMemoryInfo", needs_init=True)
        return self.memory

    def nvmlDeviceGetUtilizationRates(self, handle: object) -> Rates:  # noqa: N802
        self._answer("nvmlDeviceGetUtilizationRates", needs_init=True)
        return Rates(gpu=self.gpu_percent)

    def nvmlDeviceGetPowerUsage(self, handle: object) -> int:  # noqa: N802
        self._answer("nvmlDeviceGetPowerUsage", needs_init=True)
        return self.power_mw

    def nvmlDeviceGetTemperature(self, handle: object, sensor: int) -> int:  # noqa: N802
        self._answer("nvmlDeviceGetTemperature", needs_init=True)
        return self.temperature

    def _answer(self, name: str, *, needs_init: bool = False) -> None:
        self.num_calls += 1
        if self.hang is not None:
            self.hang.wait()
        if name in self.fails:
            raise self.fails[name]
        if needs_init and not self.is_up:
            raise NVMLError_Uninitialized


class Now:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


READINGS = ("nvmlDeviceGetMemoryInfo", "nvmlDeviceGetUtilizationRates", "nvmlDeviceGetPowerUsage")


def test_the_fake_has_only_names_that_the_real_module_has() -> None:
    real = importlib.import_module("pynvml")
    names = [name for name in dir(FakeNvml) if name.startswith(("nvml", "NVML"))]
    assert len(names) == 13
    assert [name for name in names if not hasattr(real, name)] == []
    for error in (NVMLError_NotSupported, NVMLError_GpuIsLost, NVMLError_Uninitialized, NVMLError_NotFound):
        assert issubclass(getattr(real, error.__name__), real.NVMLError)
        assert str(getattr(real, error.__name__)()) == str(error())


def test_a_healthy_gpu_tells_everything_in_our_units() -> None:
    (sample,) = NvmlSampler(FakeNvml(), {"GPU-b": GPU}).sample()
    assert sample == DeviceSample(
        device_id=GPU,
        utilisation_ratio=0.4,
        memory_used_bytes=10,
        memory_total_bytes=100,
        power_w=350.0,
        temperature_c=55.0,
    )


def test_an_index_is_resolved_once_and_follows_its_gpu() -> None:
    nvml = FakeNvml()
    sampler = NvmlSampler(nvml, {"1": GPU})
    nvml.uuids = ["GPU-b"]
    assert sampler.sample()[0].problem is None
    nvml.uuids = ["GPU-a"]
    assert sampler.sample()[0].problem == "Not Found"


@pytest.mark.parametrize("error", [NVMLError_NotSupported(), NVMLError_GpuIsLost(), NVMLError()])
@pytest.mark.parametrize(
    ("function", "fields"),
    [
        ("nvmlDeviceGetMemoryInfo", {"memory_used_bytes", "memory_total_bytes"}),
        ("nvmlDeviceGetUtilizationRates", {"utilisation_ratio"}),
        ("nvmlDeviceGetPowerUsage", {"power_w"}),
        ("nvmlDeviceGetTemperature", {"temperature_c"}),
    ],
)
def test_a_field_that_fails_is_none_and_the_others_are_read(function: str, fields: set[str], error: Exception) -> None:
    nvml = FakeNvml(fails={function: error})
    (sample,) = NvmlSampler(nvml, {"GPU-a": GPU}).sample()
    read = {"utilisation_ratio", "memory_used_bytes", "memory_total_bytes", "power_w", "temperature_c"}
    assert {name for name in read if getattr(sample, name) is None} == fields
    assert sample.problem is None


@pytest.mark.parametrize(
    ("garbage", "field_name"),
    [
        ({"gpu_percent": 255}, "utilisation_ratio"),
        ({"gpu_percent": -1}, "utilisation_ratio"),
        ({"memory": Memory(used=101, total=100)}, "memory_used_bytes"),
        ({"memory": Memory(used=101, total=100)}, "memory_total_bytes"),
        ({"memory": Memory(used=0, total=0)}, "memory_total_bytes"),
        ({"power_mw": 2**32 - 1}, "power_w"),
        ({"temperature": 255}, "temperature_c"),
    ],
)
def test_a_value_that_cannot_be_true_is_none(garbage: dict[str, object], field_name: str) -> None:
    nvml = FakeNvml()
    for name, value in garbage.items():
        setattr(nvml, name, value)
    (sample,) = NvmlSampler(nvml, {"GPU-a": GPU}).sample()
    assert getattr(sample, field_name) is None


def test_a_lost_gpu_is_named_and_the_other_one_still_read() -> None:
    nvml = FakeNvml()
    sampler = NvmlSampler(nvml, {"GPU-a": GPU, "GPU-b": OTHER})
    nvml.uuids = ["GPU-b"]
    lost, fine = sampler.sample()
    assert (lost.device_id, lost.problem, lost.power_w) == (GPU, "Not Found", None)
    assert (fine.device_id, fine.problem) == (OTHER, None)


def test_a_gpu_that_answers_no_question_says_why() -> None:
    nvml = FakeNvml(fails={name: NVMLError_GpuIsLost() for name in (*READINGS, "nvmlDeviceGetTemperature")})
    (sample,) = NvmlSampler(nvml, {"GPU-a": GPU}).sample()
    assert sample == DeviceSample(device_id=GPU, problem="GPU is lost")


def test_nvml_that_was_shut_down_by_others_is_started_again() -> None:
    nvml = FakeNvml()
    sampler = NvmlSampler(nvml, {"GPU-a": GPU})
    nvml.is_up = False
    assert sampler.sample()[0].power_w is None
    assert sampler.sample()[0].power_w == 350.0


def test_a_hung_call_is_waited_for_once_then_left_alone_until_it_returns_and_the_backoff_is_over() -> None:
    nvml, now = FakeNvml(), Now()
    sampler = NvmlSampler(nvml, {"GPU-a": GPU}, timeout_s=0.5, now_s=now)
    nvml.hang = threading.Event()
    silent = (DeviceSample(device_id=GPU, problem="NVML does not answer"),)
    assert sampler.sample() == silent
    num_calls = nvml.num_calls
    now.now_s = 1000.0
    assert sampler.sample() == silent
    assert nvml.num_calls == num_calls  # the first call is still stuck: no second thread
    nvml.hang.set()
    nvml.hang = None
    for thread in threading.enumerate():
        if thread.name == "patience":
            thread.join()
    assert sampler.sample()[0].power_w == 350.0


def test_after_a_hang_nvml_is_left_alone_for_a_while() -> None:
    nvml, now = FakeNvml(), Now()
    sampler = NvmlSampler(nvml, {"GPU-a": GPU}, timeout_s=0.5, now_s=now)
    hang = nvml.hang = threading.Event()
    sampler.sample()
    hang.set()
    nvml.hang = None
    for thread in threading.enumerate():
        if thread.name == "patience":
            thread.join()
    now.now_s = 4.9
    assert sampler.sample()[0].problem is not None
    now.now_s = 5.0
    assert sampler.sample()[0].problem is None


def test_nvml_that_hangs_at_the_start_is_a_problem_not_a_wait() -> None:
    hang = threading.Event()
    with pytest.raises(UnfitEnvironmentError, match="did not answer"):
        NvmlSampler(FakeNvml(hang=hang), {"GPU-a": GPU}, timeout_s=0.01)
    hang.set()


def test_closing_shuts_nvml_down_and_bears_that_it_is_down_already() -> None:
    nvml = FakeNvml()
    sampler = NvmlSampler(nvml, {"GPU-a": GPU})
    sampler.close()
    assert not nvml.is_up
    sampler.close()


def no_package() -> NoReturn:
    raise ModuleNotFoundError("No module named 'pynvml'")


def no_library() -> FakeNvml:
    return FakeNvml(fails={"nvmlInit": NVMLError_LibraryNotFound()})


def test_what_is_missing_is_told_with_a_remedy_and_the_rest_is_opened() -> None:
    for load, remedy in ((no_package, "nvidia-ml-py"), (no_library, "NVIDIA driver")):
        samplers = open_samplers(DeviceId("node/cpu"), {"0": GPU}, load)
        assert [type(sampler) for sampler in samplers.available] == [CpuSampler]
        assert [remedy in str(problem) for problem in samplers.problems] == [True]
        assert [sample.device_id for sample in samplers.sample()] == ["node/cpu"]
        samplers.close()


def test_a_gpu_that_does_not_exist_is_a_problem_with_its_name() -> None:
    samplers = open_samplers(None, {"7": GPU}, FakeNvml)
    assert samplers.available == ()
    assert "no GPU 7" in str(samplers.problems[0])


def test_nvml_is_left_alone_where_no_gpu_is_asked_for() -> None:
    samplers = open_samplers(DeviceId("node/cpu"), None, no_package)
    assert samplers.problems == ()
    assert len(samplers.available) == 1


class Cores:
    """Busy and total seconds of three cores, of which the process may use the last two."""

    def __init__(self) -> None:
        self.times = [(0.0, 0.0), (100.0, 1000.0), (50.0, 1000.0)]

    def sampler(self) -> CpuSampler:
        return CpuSampler(
            DeviceId("node/cpu"), cores=(1, 2), read_times=lambda: list(self.times), read_memory=lambda: (3, 8)
        )


def test_utilisation_is_that_of_the_allowed_cores_since_the_last_sample() -> None:
    cores = Cores()
    sampler = cores.sampler()
    cores.times = [(99.0, 99.0), (100.5, 1001.0), (51.0, 1001.0)]
    (sample,) = sampler.sample()
    assert sample == DeviceSample(
        device_id=DeviceId("node/cpu"), utilisation_ratio=0.75, memory_used_bytes=3, memory_total_bytes=8
    )
    assert sampler.sample()[0].utilisation_ratio is None  # no time has passed


def test_cores_that_the_machine_does_not_list_leave_utilisation_unknown() -> None:
    cores = Cores()
    sampler = cores.sampler()
    cores.times = [(1.0, 2.0), (1.0, 2.0)]
    assert sampler.sample()[0].utilisation_ratio is None


def test_this_machine_has_cores_and_memory() -> None:
    samplers = open_samplers(DeviceId("node/cpu"))
    (sample,) = samplers.sample()
    assert sample.memory_used_bytes is not None
    assert sample.memory_total_bytes is not None
    assert 0 < sample.memory_used_bytes < sample.memory_total_bytes
    assert sample.utilisation_ratio is None or 0 <= sample.utilisation_ratio <= 1


@dataclass
class Process:
    pid: int
    usedGpuMemory: int | None  # noqa: N815


class NvmlWithProcesses(FakeNvml):
    """As on the H200 under MPS: clients are listed apart from plain processes."""

    def nvmlDeviceGetComputeRunningProcesses(self, handle: object) -> list[Process]:  # noqa: N802
        self._answer("nvmlDeviceGetComputeRunningProcesses", needs_init=True)
        return [Process(7, 100), Process(8, None)]

    def nvmlDeviceGetMPSComputeRunningProcesses(self, handle: object) -> list[Process]:  # noqa: N802
        self._answer("nvmlDeviceGetMPSComputeRunningProcesses", needs_init=True)
        return [Process(5, 300), Process(7, 200), Process(9, (1 << 64) - 1)]


def test_memory_is_told_by_process_where_nvml_does() -> None:
    nvml = NvmlWithProcesses()
    sampler = NvmlSampler(nvml, {"GPU-b": GPU})
    assert sampler.sample()[0].processes == ((5, 300), (7, 200)), "what the driver does not say is left out"
    nvml.fails["nvmlDeviceGetMPSComputeRunningProcesses"] = NVMLError_NotSupported()
    assert sampler.sample()[0].processes == ((7, 100),)
    nvml.fails["nvmlDeviceGetComputeRunningProcesses"] = NVMLError_NotSupported()
    assert sampler.sample()[0].processes is None
    real = importlib.import_module("pynvml")
    assert all(hasattr(real, name) for name in dir(NvmlWithProcesses) if name.startswith("nvml"))
