"""How much of a GPU's memory each process holds, as NVML counts it, MPS clients included.

Named as in pynvml, which this file is given, not imports. Process ids are those of the host: in a container NVML may
show others than the processes know of themselves, or none. Called by `telemetry.sampler`, on the thread that may hang.
"""

from __future__ import annotations

from typing import Any

_LISTS = ("nvmlDeviceGetComputeRunningProcesses", "nvmlDeviceGetMPSComputeRunningProcesses")
_MAX_BYTES = 1 << 45


def read_processes(nvml: Any, handle: object) -> tuple[tuple[int, int], ...] | None:  # noqa: ANN401 - the module pynvml
    """Pairs of process id and bytes, sorted; None where NVML does not tell."""
    found: dict[int, int] = {}
    is_told = False
    for name in _LISTS:
        try:
            listed = getattr(nvml, name)(handle)
        except (nvml.NVMLError, AttributeError):  # not supported, or an old pynvml
            continue
        is_told = True
        for each in listed:
            used = each.usedGpuMemory  # None, or all bits set, where the driver does not say
            if isinstance(used, int) and 0 <= used <= _MAX_BYTES:
                found[int(each.pid)] = max(used, found.get(int(each.pid), 0))
    return tuple(sorted(found.items())) if is_told else None
