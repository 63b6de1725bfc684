"""What NVML's GPU performance monitoring says: how busy SMs, tensor cores and memory were between two readings.

Hopper and newer, and only where the driver allows it; everywhere else every value is None. Named as in pynvml, which
this file is given, not imports. Called by `telemetry.sampler`, on the thread that may hang.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class Activity:
    """Parts of the time between two readings, in [0, 1]; None where the GPU does not tell.

    Attributes:
        sm_ratio: in which an SM had work.
        tensor_ratio: in which the tensor cores did.
        dram_ratio: of the memory's bandwidth that was used.
    """

    sm_ratio: float | None = None
    tensor_ratio: float | None = None
    dram_ratio: float | None = None


SILENT = Activity()


class GpmNvml(Protocol):
    """The part of pynvml that is used here."""

    NVMLError: type[Exception]
    NVML_GPM_METRIC_SM_UTIL: int
    NVML_GPM_METRIC_ANY_TENSOR_UTIL: int
    NVML_GPM_METRIC_DRAM_BW_UTIL: int
    NVML_GPM_METRICS_GET_VERSION: int

    def nvmlGpmQueryDeviceSupport(self, handle: object) -> Any: ...  # noqa: D102, N802, ANN401
    def nvmlGpmSampleAlloc(self) -> object: ...  # noqa: D102, N802
    def nvmlGpmSampleFree(self, sample: object) -> object: ...  # noqa: D102, N802
    def nvmlGpmSampleGet(self, handle: object, sample: object) -> object: ...  # noqa: D102, N802
    def nvmlGpmMetricsGet(self, request: Any) -> object: ...  # noqa: D102, N802, ANN401
    def c_nvmlGpmMetricsGet_t(self) -> Any: ...  # noqa: D102, N802, ANN401


class GpmReader:
    """Reads the activity of some GPUs; each reading spans the time since the last one."""

    def __init__(self, nvml: GpmNvml) -> None:
        self._nvml = nvml
        self._metrics = (
            nvml.NVML_GPM_METRIC_SM_UTIL,
            nvml.NVML_GPM_METRIC_ANY_TENSOR_UTIL,
            nvml.NVML_GPM_METRIC_DRAM_BW_UTIL,
        )
        self._last: dict[str, object] = {}
        self._unsupported: set[str] = set()

    def read(self, uuid: str, handle: object) -> Activity:
        """The activity since the last call for that GPU; silent on the first, and where it is not supported."""
        if uuid in self._unsupported:
            return SILENT
        nvml = self._nvml
        try:
            if uuid not in self._last and not nvml.nvmlGpmQueryDeviceSupport(handle).isSupportedDevice:
                self._unsupported.add(uuid)
                return SILENT
            sample = nvml.nvmlGpmSampleAlloc()
            nvml.nvmlGpmSampleGet(handle, sample)
            before = self._last.get(uuid)
            self._last[uuid] = sample
            if before is None:
                return SILENT
            values = self._between(before, sample)
            nvml.nvmlGpmSampleFree(before)
        except (nvml.NVMLError, AttributeError):  # an old driver, or an old pynvml
            self._unsupported.add(uuid)
            return SILENT
        return Activity(sm_ratio=values[0], tensor_ratio=values[1], dram_ratio=values[2])

    def _between(self, before: object, after: object) -> list[float | None]:
        request = self._nvml.c_nvmlGpmMetricsGet_t()
        request.version = self._nvml.NVML_GPM_METRICS_GET_VERSION
        request.numMetrics = len(self._metrics)
        request.sample1, request.sample2 = before, after
        for number, metric in enumerate(self._metrics):
            request.metrics[number].metricId = metric
        self._nvml.nvmlGpmMetricsGet(request)
        found = [request.metrics[number] for number in range(len(self._metrics))]
        return [_ratio(each.value) if each.nvmlReturn == 0 else None for each in found]


def _ratio(percent: float) -> float | None:
    return percent / 100 if 0 <= percent <= 100.5 else None


def open_gpm(nvml: object) -> GpmReader | None:
    """A reader where this pynvml knows performance monitoring at all, else None."""
    needed = ("nvmlGpmQueryDeviceSupport", "NVML_GPM_METRIC_SM_UTIL", "NVML_GPM_METRIC_DRAM_BW_UTIL")
    return GpmReader(nvml) if all(hasattr(nvml, name) for name in needed) else None  # type: ignore[arg-type]
