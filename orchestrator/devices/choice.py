"""By which mechanism a GPU is shared on a node, and why not by a better one.

Asks the driver, the file system and the environment; no torch, no Ray, no NVML, so that `doctor` stays quick. Called
by the device agent, which acts on the answer, and by `doctor`, which prints it.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from orchestrator.share.mps import CONTROL, MpsFound, find_running
from orchestrator.share.sm_driver import MIN_DRIVER_VERSION


class GpuShare(StrEnum):
    """How trials share a GPU; `auto` takes the best that works."""

    AUTO = "auto"
    SM_GROUPS = "sm_groups"
    MPS = "mps"
    TIME_SLICE = "time_slice"


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuFacts:
    """What a node offers for sharing its GPUs.

    Attributes:
        driver_version: newest CUDA of the driver as it counts, 12040 for 12.4; None where there is no driver.
        has_bindings: whether the package cuda-bindings can be imported.
        running_mps: an MPS daemon that is there already.
        can_start_mps: whether the control program is on the PATH.
        is_mig: whether the GPUs are MIG instances: parts that are cut already.
    """

    driver_version: int | None
    has_bindings: bool
    running_mps: MpsFound | None
    can_start_mps: bool
    is_mig: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A mechanism, and for each better one why it is not it, in words."""

    share: GpuShare
    missing: dict[GpuShare, str]

    @property
    def words(self) -> str:
        """All in one line."""
        reasons = "".join(f"; no {better}: {reason}" for better, reason in self.missing.items())
        return f"{self.share}{reasons}"


def gpu_facts(environment: Mapping[str, str] | None = None) -> GpuFacts:
    """Ask this node."""
    given = os.environ if environment is None else environment
    return GpuFacts(
        driver_version=_driver_version(),
        has_bindings=_has_bindings(),
        running_mps=find_running(given),
        can_start_mps=shutil.which(CONTROL, path=given.get("PATH")) is not None,
        is_mig=any(part.strip().startswith("MIG-") for part in given.get("CUDA_VISIBLE_DEVICES", "").split(",")),
    )


def choose(wish: GpuShare, facts: GpuFacts, *, turns_shares: bool) -> Choice:
    """The mechanism for a wish.

    `auto` takes SM groups where a policy may turn shares, and plain MPS where none may: trials that are all alike do
    best without a cap. A wish that cannot be met takes the next best, with the reason.

    Args:
        wish: what the run file says.
        facts: of the node.
        turns_shares: whether shares differ or change in this run.
    """
    missing: dict[GpuShare, str] = {}
    if wish is GpuShare.TIME_SLICE:
        return Choice(share=wish, missing={})
    no_mps = _against_mps(facts)
    no_groups = no_mps or _against_groups(facts)
    if wish is GpuShare.SM_GROUPS or (wish is GpuShare.AUTO and turns_shares):
        if no_groups is None:
            return Choice(share=GpuShare.SM_GROUPS, missing={})
        missing[GpuShare.SM_GROUPS] = no_groups
    elif wish is GpuShare.AUTO and no_groups is None:
        missing[GpuShare.SM_GROUPS] = "no dial of this run turns shares, and equal trials are faster without a cap"
    if no_mps is None:
        return Choice(share=GpuShare.MPS, missing=missing)
    missing[GpuShare.MPS] = no_mps
    return Choice(share=GpuShare.TIME_SLICE, missing=missing)


def _against_mps(facts: GpuFacts) -> str | None:
    if facts.driver_version is None:
        return "there is no CUDA driver (libcuda.so.1)"
    if facts.is_mig:
        return "CUDA_VISIBLE_DEVICES names MIG instances, which are cut already"
    if facts.running_mps is None and not facts.can_start_mps:
        return f"no {CONTROL} on the PATH; it comes with the NVIDIA driver"
    return None


def _against_groups(facts: GpuFacts) -> str | None:
    version = facts.driver_version or 0
    if version < MIN_DRIVER_VERSION:
        return f"the driver is for CUDA {_dotted(version)}; green contexts need 12.4"
    if not facts.has_bindings:
        return "the package cuda-bindings is missing; pip install 'cuda-bindings>=12.8'"
    if facts.running_mps is not None and facts.running_mps.limits:
        return f"the MPS that runs here limits clients ({facts.running_mps.limits})"
    return None


def _dotted(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"


def _driver_version() -> int | None:
    """The CUDA version of the driver; needs no GPU and makes no context."""
    version = ctypes.c_int()
    try:
        if ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version)):
            return None
    except (OSError, AttributeError):
        return None
    return version.value


def _has_bindings() -> bool:
    try:
        return importlib.util.find_spec("cuda.bindings") is not None
    except ImportError:
        return False
