"""Which units a device has for number formats: processor flags and CUDA compute capability, asked without torch.

Reads /proc/cpuinfo and calls the driver's management library directly, so that `check` stays quick. Knows no tiers:
what follows from the facts is in `policies.tier`. Ranks ask torch instead (`train.precision.tiers.facts_of`).
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

from orchestrator.policies.tier import TIER_FACTS, DeviceFacts

_FLAGS = frozenset(flag for facts in TIER_FACTS.values() for flag in facts.cpu_flags or ())


def this_device(num_gpus: int) -> DeviceFacts:
    """What ranks compute on here: the GPU with the least capability, or the processor where there is none."""
    gpus = cuda_devices() if num_gpus else ()
    if not gpus:
        return cpu_facts()
    return min(gpus, key=lambda facts: facts.capability or (0, 0))


@cache
def cpu_facts(path: Path = Path("/proc/cpuinfo")) -> DeviceFacts:
    """The processor; without any flag where they cannot be read."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        lines = []
    flags = next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), [])
    return DeviceFacts(name="this processor", cpu_flags=_FLAGS.intersection(flags))


def cuda_devices() -> tuple[DeviceFacts, ...]:
    """The NVIDIA GPUs that the driver lists; none where it cannot be asked."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
        if nvml.nvmlInit_v2():
            return ()
    except (OSError, AttributeError):
        return ()
    try:
        count = ctypes.c_uint()
        if nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)):
            return ()
        return tuple(facts for index in range(count.value) if (facts := _cuda_device(nvml, index)) is not None)
    finally:
        nvml.nvmlShutdown()


def _cuda_device(nvml: ctypes.CDLL, index: int) -> DeviceFacts | None:
    handle, major, minor = ctypes.c_void_p(), ctypes.c_int(), ctypes.c_int()
    if nvml.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(index), ctypes.byref(handle)):
        return None
    if nvml.nvmlDeviceGetCudaComputeCapability(handle, ctypes.byref(major), ctypes.byref(minor)):
        return None
    name = ctypes.create_string_buffer(96)
    nvml.nvmlDeviceGetName(handle, name, ctypes.c_uint(96))
    shown = name.value.decode("ascii", "replace") or f"GPU {index}"
    return DeviceFacts(name=shown, capability=(major.value, minor.value))
