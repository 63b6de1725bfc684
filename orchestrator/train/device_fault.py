"""Whether an error means that this process can compute no more: a GPU fault, of its own or of a neighbour under MPS.

Under MPS all clients of a GPU share one server, and a fault of one ends the CUDA context of every one of them, without
telling whose it was. A process whose context is dead must end; its trial goes on from its last commit elsewhere.
"""

from __future__ import annotations

_FATAL_TEXTS = (
    "illegal memory access",
    "unspecified launch failure",
    "device-side assert",
    "misaligned address",
    "illegal instruction",
    "hardware stack error",
    "uncorrectable ecc error",
    "invalid program counter",
    "mps client",
    "mps server",
    "mps connection",
    "context is destroyed",
    "the launch timed out",
)


def is_device_fault(error: BaseException) -> bool:
    """Whether the CUDA context of this process is gone; memory that ran out, and mistakes in Python, are no such fault.

    Torch tells by text only: the driver's own words are in its message.
    """
    seen: BaseException | None = error
    while seen is not None:
        text = str(seen).lower()
        is_cuda = "cuda" in text or type(seen).__name__ == "AcceleratorError"
        if is_cuda and "out of memory" not in text and any(fatal in text for fatal in _FATAL_TEXTS):
            return True
        seen = seen.__cause__ or seen.__context__
    return False
