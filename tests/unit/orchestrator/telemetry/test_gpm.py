"""Activity of a GPU between two readings, with an NVML that follows the real one's answers and errors."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from orchestrator.telemetry.gpm import SILENT, GpmReader, open_gpm


class NVMLError(Exception):
    pass


class FakeNvml:
    """Three metrics; `nvmlReturn` of each, and an error to raise instead."""

    NVMLError: type[Exception] = NVMLError
    NVML_GPM_METRIC_SM_UTIL, NVML_GPM_METRIC_ANY_TENSOR_UTIL, NVML_GPM_METRIC_DRAM_BW_UTIL = 2, 5, 10
    NVML_GPM_METRICS_GET_VERSION = 1

    def __init__(self, *, supported: int = 1, returns: tuple[int, ...] = (0, 0, 0), error: str = "") -> None:
        self.supported, self.returns, self.error = supported, returns, error
        self.num_samples = self.num_freed = 0

    def nvmlGpmQueryDeviceSupport(self, handle: object) -> Any:  # noqa: N802
        return SimpleNamespace(isSupportedDevice=self.supported)

    def nvmlGpmSampleAlloc(self) -> object:  # noqa: N802
        self.num_samples += 1
        return self.num_samples

    def nvmlGpmSampleFree(self, sample: object) -> object:  # noqa: N802
        self.num_freed += 1
        return None

    def nvmlGpmSampleGet(self, handle: object, sample: object) -> object:  # noqa: N802
        if self.error:
            raise NVMLError(self.error)
        return sample

    def nvmlGpmMetricsGet(self, request: Any) -> object:  # noqa: N802
        for number, value in enumerate((60.4, 57.6, 8.0)):
            request.metrics[number].value, request.metrics[number].nvmlReturn = value, self.returns[number]
        return request

    def c_nvmlGpmMetricsGet_t(self) -> Any:  # noqa: N802
        return SimpleNamespace(metrics=[SimpleNamespace() for _ in range(8)])


def test_a_reading_spans_the_time_since_the_last_one() -> None:
    nvml = FakeNvml()
    reader = GpmReader(nvml)
    assert reader.read("a", "handle") == SILENT
    activity = reader.read("a", "handle")
    assert (activity.sm_ratio, activity.tensor_ratio, activity.dram_ratio) == pytest.approx((0.604, 0.576, 0.08))
    reader.read("a", "handle")
    assert nvml.num_samples - nvml.num_freed == 1, "samples do not pile up"


@pytest.mark.parametrize("nvml", [FakeNvml(supported=0), FakeNvml(error="Not Supported")])
def test_what_is_not_supported_is_silent_and_not_asked_again(nvml: FakeNvml) -> None:
    reader = GpmReader(nvml)
    for _ in range(3):
        assert reader.read("a", "handle") == SILENT
    assert nvml.num_samples <= 1


def test_a_metric_that_fails_leaves_the_others() -> None:
    reader = GpmReader(FakeNvml(returns=(0, 3, 0)))
    reader.read("a", "handle")
    activity = reader.read("a", "handle")
    assert activity.tensor_ratio is None
    assert activity.sm_ratio is not None


def test_an_old_pynvml_has_no_reader() -> None:
    assert open_gpm(SimpleNamespace()) is None
    assert open_gpm(FakeNvml()) is not None
