"""SM groups of the current GPU through the CUDA driver: green contexts, and their streams for torch.

The only file that touches `cuda.bindings`. Groups are chosen by number, because torch's own green contexts always take
the first SMs and two trials would overlap. A green context limits SMs only; memory comes from the primary context.
Knows no share and no trial; called by `share.sm_groups`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from orchestrator.errors import ShareError

SMS_PER_GROUP = 8
"""SMs of a group: the granularity of Hopper. 132 SMs give 15 groups; the driver keeps the rest of 12 for no group."""

MIN_DRIVER_VERSION = 12_040
"""CUDA driver that has green contexts, as `cuDriverGetVersion` counts: 12.4."""

_MAX_GROUPS = 64


@dataclass(frozen=True, slots=True)
class Lane:
    """A stream whose kernels run on some SM groups only, and what must be destroyed with it."""

    groups: tuple[int, ...]
    stream: Any
    context: Any = None
    handle: Any = None


class SmDriver(Protocol):
    """What a GPU lets a process do with its SMs."""

    def num_groups(self) -> int:
        """SM groups of the GPU."""
        ...

    def open(self, groups: tuple[int, ...]) -> Lane:
        """A lane over those groups; 1 to 3 ms.

        Raises:
            ShareError: the driver refuses.
        """
        ...

    def enter(self, lane: Lane | None) -> None:
        """Compute in that lane from now on, None for the whole device, after all that was begun before."""
        ...

    def close(self, lane: Lane) -> None:
        """Destroy a lane that is not the current one, once its work is done."""
        ...


class CudaSmDriver:
    """The GPU that torch computes on in this process.

    Raises:
        ShareError: no cuda-bindings, or a driver or GPU without green contexts.
    """

    def __init__(self) -> None:
        import torch

        try:
            from cuda.bindings import driver
        except ImportError as error:
            raise ShareError(
                f"SM groups need the Python package cuda-bindings ({error}); install cuda-bindings>=12.8, or set "
                "devices.gpu_share: mps"
            ) from error
        self._torch, self._driver = torch, driver
        try:
            version = self._call("cuDriverGetVersion")
            if version < MIN_DRIVER_VERSION:
                raise ShareError(
                    f"SM groups need a driver for CUDA 12.4; this one is for {version // 1000}.{version % 1000 // 10}; "
                    "install a newer NVIDIA driver, or set devices.gpu_share: mps"
                )
            torch.cuda.current_stream()  # makes the primary context
            self._device = self._call("cuDeviceGet", torch.cuda.current_device())
            sms = self._call("cuDeviceGetDevResource", self._device, driver.CUdevResourceType.CU_DEV_RESOURCE_TYPE_SM)
            self._groups = self._split(sms)
        except RuntimeError as error:  # cuda-bindings raises it where there is no libcuda
            raise ShareError(f"the CUDA driver cannot cut this GPU into SM groups: {error}") from error

    def num_groups(self) -> int:
        """SM groups of the GPU."""
        return len(self._groups)

    def open(self, groups: tuple[int, ...]) -> Lane:
        """A green context over those groups and its stream.

        Raises:
            ShareError: the driver refuses.
        """
        driver = self._driver
        flags = driver.CUgreenCtxCreate_flags.CU_GREEN_CTX_DEFAULT_STREAM
        description = self._call("cuDevResourceGenerateDesc", [self._groups[group] for group in groups], len(groups))
        context = self._call("cuGreenCtxCreate", description, self._device, flags)
        handle = self._call("cuGreenCtxStreamCreate", context, driver.CUstream_flags.CU_STREAM_NON_BLOCKING, 0)
        stream = self._torch.cuda.ExternalStream(int(handle))  # type: ignore[no-untyped-call]
        return Lane(groups=groups, stream=stream, context=context, handle=handle)

    def enter(self, lane: Lane | None) -> None:
        """Make the lane's stream torch's current one; it waits for everything on the stream that was current."""
        cuda = self._torch.cuda
        old = cuda.current_stream()
        new = cuda.default_stream() if lane is None else lane.stream
        if new != old:
            # Without this wait the first step in the new lane reads weights that the last one still writes.
            new.wait_stream(old)
            cuda.set_stream(new)

    def close(self, lane: Lane) -> None:
        """Destroy stream and green context."""
        lane.stream.synchronize()
        self._call("cuStreamDestroy", lane.handle)
        self._call("cuGreenCtxDestroy", lane.context)

    def _split(self, sms: Any) -> list[Any]:
        """The GPU's groups in the driver's order, which is the same in every process."""
        groups, _, _ = self._call_all("cuDevSmResourceSplitByCount", _MAX_GROUPS, sms, 0, SMS_PER_GROUP)
        found = [group for group in groups if group.sm.smCount]
        if not found:
            raise ShareError(f"this GPU has no group of {SMS_PER_GROUP} SMs; set devices.gpu_share: mps")
        return found

    def _call(self, name: str, *arguments: Any) -> Any:
        results = self._call_all(name, *arguments)
        return results[0] if results else None

    def _call_all(self, name: str, *arguments: Any) -> tuple[Any, ...]:
        """Call the driver; what it returns beside the status.

        Raises:
            ShareError: the status is an error.
        """
        status, *results = getattr(self._driver, name)(*arguments)
        if int(status) != 0:
            raise ShareError(f"{name} failed with {status.name}; see: orchestrator doctor")
        return tuple(results)
