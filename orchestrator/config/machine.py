"""Whether this machine can serve a run file: devices, cores, libraries, the storage directory, the run directory.

Asks the operating system only (no torch, no Ray, no NVML), so that `check` stays quick. A run that addresses another
cluster is not held against this machine's cores. Called by `check` and `run` before any process starts.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from orchestrator.config.model import RunConfig
from orchestrator.config.queue import check_deadline
from orchestrator.config.search_checks import Finding
from orchestrator.config.source import KeyPath
from orchestrator.config.values import ParamValue
from orchestrator.config.words import printable
from orchestrator.errors import ConfigError
from orchestrator.hardware import this_device
from orchestrator.host import num_usable_cores
from orchestrator.jobs.extras import fault_of
from orchestrator.jobs.table import job_info
from orchestrator.names import run_directory
from orchestrator.policies.tier import DeviceFacts, support_of

_PLAIN = DeviceFacts(name="this processor")


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What a run may use here.

    Attributes:
        num_cores: cores this process may use: those it is bound to, and no more than its container's quota.
        num_gpus: NVIDIA devices the kernel shows; CUDA_VISIBLE_DEVICES may hide some of them later.
        device: which number formats ranks have units for.
    """

    num_cores: int
    num_gpus: int
    device: DeviceFacts = _PLAIN

    @property
    def num_devices(self) -> int:
        """Devices a share is cut from: the GPUs, or the CPU as one device."""
        return self.num_gpus or 1

    @property
    def words(self) -> str:
        """The machine in a few words."""
        cores = f"{self.num_cores} core{'s' if self.num_cores != 1 else ''}"
        return (
            f"{cores}, {self.num_gpus} GPU{'s' if self.num_gpus != 1 else ''}" if self.num_gpus else f"{cores}, no GPU"
        )


def this_machine() -> Machine:
    """The machine this process runs on."""
    gpus = sum(1 for path in Path("/dev").glob("nvidia*") if path.name.removeprefix("nvidia").isdigit())
    return Machine(num_cores=num_usable_cores(), num_gpus=gpus, device=this_device(gpus))


def check_fit(config: RunConfig, machine: Machine, *, is_new: bool = True) -> Iterator[Finding]:
    """Everything that keeps the run from working here; `is_new` is False for a run that is resumed."""
    if config.devices.use == "cpu":
        machine = dataclasses.replace(machine, num_gpus=0)
    if config.cluster.address == "local":
        yield from _gpus(config, machine)
        yield from _cores(config, machine)
        yield from _shares(config, machine)
        yield from _tiers(config, machine)
        yield from _libraries(config)
    if is_new:
        yield from check_deadline(config)
    yield from _directories(config, is_new=is_new)


def _gpus(config: RunConfig, machine: Machine) -> Iterator[Finding]:
    """GPUs that are asked for by name must be there, and one for each rank of a trial: NCCL lets none share."""
    if config.devices.use == "gpu" and machine.num_gpus == 0:
        text = "got gpu, and this machine has none; allowed: cpu or auto; for why, see: orchestrator doctor"
        yield ("devices", "use"), text
    workers = config.most_workers
    if machine.num_gpus and workers > machine.num_gpus:
        text = f"got {workers}, and ranks of one trial never share a GPU; allowed: at most {machine.num_gpus} here, or "
        path = ("dials", "workers", "max") if config.dials.workers.enabled else ("trial", "num_workers")
        yield path, text + "devices.use: cpu"


def _cores(config: RunConfig, machine: Machine) -> Iterator[Finding]:
    asked = config.cluster.num_cpus
    if asked is not None and asked > machine.num_cores:
        text = f"got {asked}; allowed: at most the {machine.num_cores} this process may use, or null for all of them"
        yield ("cluster", "num_cpus"), text


def _shares(config: RunConfig, machine: Machine) -> Iterator[Finding]:
    """Every slot's ranks must get their smallest share at the same time, or a trial would wait for ever."""
    if config.places:
        return  # the policy lets some of them wait, and others later
    slots, workers, devices = config.search.num_slots, config.most_workers, machine.num_devices
    given = config.trial.share
    asked: list[tuple[float, str, KeyPath]] = [(given, "trial.share", ("trial", "share"))] if given is not None else []
    if config.dials.share.enabled:
        asked.append((config.dials.share.min, "dials.share.min", ("dials", "share", "min")))
    elif given is None:
        return
    for share, name, path in asked:
        # A rank lies on one device, so a device serves only whole ranks; the tolerance is for 10 x 0.1.
        ranks = devices * int(1 / share + 1e-9)
        if slots * workers <= ranks:
            continue
        text = f"{slots} trials at a time x {workers} ranks x {name} {share} = {slots * workers * share:.3g} devices, "
        text += f"but {machine.words} make {devices}; "
        fits = ranks // workers
        if fits:
            text += (
                f"allowed: search.max_concurrent at most {fits}, or {name} at most {_largest(slots * workers, devices)}"
            )
        else:
            most = "dials.workers.max" if config.dials.workers.enabled else "trial.num_workers"
            text += f"allowed: {most} at most {ranks}, or {name} at most {_largest(slots * workers, devices)}"
        yield path, text
        return


def _tiers(config: RunConfig, machine: Machine) -> Iterator[Finding]:
    """A tier that this kind of device has no unit for is refused, unless its emulation is asked for by name.

    A processor that lacks an instruction that others have computes the tier all the same; no policy picks it for speed.
    """
    dial, device = config.dials.precision, machine.device
    for number, tier in enumerate(dial.tiers):
        support = support_of(tier, device)
        # No device has a fixed-point unit: who names that tier asks for the emulation.
        if support.is_real or support.is_near or tier.fixed is not None or tier in dial.emulate:
            continue
        text = f"{support.reason}; nearest tier: {support.nearest}; to emulate it, slower, add emulate: [{tier}]"
        yield ("dials", "precision", "tiers", number), text


def _libraries(config: RunConfig) -> Iterator[Finding]:
    """A library that the job's data needs must be installed, or every trial would end before its first step.

    What the files of a folder need besides is known only once they are looked at: the trial says it then.
    """
    info = job_info(config.job.key)
    path, folders = _values(config, "data_dir")
    if info.folder_library and any(folder is not None for folder in folders):
        fault = fault_of(info.folder_library)
        if fault:
            yield path, f"reading that folder {fault}"
    if None not in folders:
        return
    path, words = _values(config, "data")
    for word, module in info.libraries:
        fault = fault_of(module) if word in words else None
        if fault:
            data, needing = info.param("data"), dict(info.libraries)
            free = [choice for choice in data.choices if choice not in needing] if data else []
            yield path, f"{word} {fault}; without it: {', '.join(free)}, or a data_dir"


def _values(config: RunConfig, name: str) -> tuple[KeyPath, tuple[ParamValue, ...]]:
    """Where a parameter of the job is set, and what it can be."""
    if name in config.search.searched:
        return ("search", "space", name), config.search.searched[name]
    param = job_info(config.job.key).param(name)
    return ("job", "params", name), (config.job.params.get(name, param.default if param else None),)


def _largest(ranks: int, devices: int) -> str:
    per_device = -(-ranks // devices)
    return f"{int(1000 / per_device) / 1000:g}"


def _directories(config: RunConfig, *, is_new: bool) -> Iterator[Finding]:
    storage = Path(config.storage)
    existing = storage
    try:
        while not existing.exists() and existing != existing.parent:
            existing = existing.parent
        if not existing.is_dir():
            yield ("storage",), f"{_shown(existing)} is a file; allowed: a directory, or one that can be made"
            return
        if not os.access(existing, os.W_OK | os.X_OK):
            yield (
                ("storage",),
                f"{_shown(existing)} cannot be written; choose another directory or change its permissions",
            )
            return
        directory = run_directory(storage, config.name)
        if is_new and directory.exists():
            text = (
                f"{_shown(storage / config.name)} exists already; `orchestrator resume {config.name}` goes on with it"
            )
            yield ("name",), f"{text}, or choose another name (--set name=...)"
    except ConfigError as error:
        yield ("name",), error.text
    except (OSError, RuntimeError) as error:
        yield ("storage",), f"{_shown(storage)} cannot be used ({printable(str(error), 120)}); choose another directory"


def _shown(path: Path) -> str:
    return printable(str(path), 200)
