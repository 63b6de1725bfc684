"""The loop of a slot: a long-lived Ray Train worker group that serves trials in turn.

`slot_loop` is what `TorchTrainer` runs on every rank. It attaches to the policy actor, warms up, and then runs whatever
trial it is given, one after the other, in the same processes, cleaning up in between. It returns when told to close; it
raises when the ranks lost each other, and Ray Train restarts the group, which attaches anew.
"""

from __future__ import annotations

import gc
import logging
import os
import threading
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import ray
import ray.train
import torch
import torch.distributed as dist

from orchestrator.control.orders import Opening, SlotHello
from orchestrator.errors import ShareError, UnfitEnvironmentError
from orchestrator.hung import answer_with_stacks
from orchestrator.jobs import build_job, job_info
from orchestrator.jobs.own import add_import_paths, is_own
from orchestrator.policies.plan import DeviceId
from orchestrator.policies.snapshot import DeviceKind, DeviceView
from orchestrator.share import CpuCores, Mps, ShareMechanism, SmGroups, TimeSlice
from orchestrator.telemetry.sampler import cuda_device_id
from orchestrator.train.batch.memory import CudaGauge
from orchestrator.train.boundary import Boundary
from orchestrator.train.bundle.company import STEPS_S, Company, recorder_for
from orchestrator.train.device_fault import is_device_fault
from orchestrator.train.function import reports
from orchestrator.train.groups import Groups, Ranks
from orchestrator.train.isolation import ProcessState
from orchestrator.train.lanes import Lane, LaneServer, Shared
from orchestrator.train.ray_link import RayLink
from orchestrator.train.read_ahead import reading
from orchestrator.train.serve import Server
from orchestrator.train.step_mode.choice import StepMode
from orchestrator.train.step_mode.compiled import set_up
from orchestrator.train.stepper import Stepper

logger = logging.getLogger(__name__)

_LOADED_WALL_S = time.time()


def slot_loop(config: dict[str, Any]) -> None:
    """Serve trials until told to close. `config` is plain: see `orchestrator.supervisor`.

    Raises:
        WorkerGroupError: the ranks could not agree on the end of a trial.
    """
    logging.getLogger("orchestrator").setLevel(config["log_level"])
    # Beside the runs, so that the next one of the same kind need not compile again.
    set_up(Path(config["warm_up"].directory).parents[2] / ".compiled")
    context = ray.train.get_context()
    step_mode = StepMode(config["step_mode"])
    rank, world_size = context.get_world_rank(), context.get_world_size()
    groups = Groups(rank, world_size, _own_device(), step_mode, config["trials_per_slot"])
    ranks = groups.ranks
    joined_wall_s = time.time()
    share, words = _share(config, ranks)
    shared_wall_s = time.time()
    _warm_up(config, ranks)
    opening = _opening(joined_wall_s, shared_wall_s)
    hello = replace(_hello(config, ranks, share, words), opening=opening)
    lanes = config.get("lanes", (config["slot_id"],))
    answer_with_stacks(Path(config["warm_up"].directory).parents[1])
    try:
        if len(lanes) > 1:
            _serve_lanes(config, ranks, share, hello)
        else:
            _serve(config, groups, share, replace(hello, slot_id=lanes[0]))
    finally:
        share.release()


def _serve(config: dict[str, Any], groups: Groups, share: ShareMechanism, hello: SlotHello) -> None:
    """One trial at a time, on all ranks."""
    ranks = groups.ranks
    link = _link(config, hello.slot_id, ranks.rank)
    link.on_news = share.wake  # a long sleep that enforces a share must not delay a stop or a new plan
    epoch = [link.attach(hello) if ranks.rank == 0 else -1]
    if ranks.world_size > 1:
        dist.broadcast_object_list(epoch, src=0, group=ranks.group)
    link.start(epoch[0])
    boundary = Boundary(link, ranks.rank, ranks.world_size, ranks.group)
    try:
        Server(groups=groups, boundary=boundary, link=link, share=share, clean=_clean()).serve()
    finally:
        link.close()


def _serve_lanes(config: dict[str, Any], ranks: Ranks, share: ShareMechanism, hello: SlotHello) -> None:
    """Several trials at a time, each in a lane that is a slot of its own for the control plane."""
    shared, news = Shared(share), threading.Event()

    def wake() -> None:
        share.wake()
        news.set()

    links = [_link(config, lane_id, ranks.rank) for lane_id in config["lanes"]]
    lanes = []
    try:
        for number, (lane_id, link) in enumerate(zip(config["lanes"], links, strict=True)):
            link.on_news = wake
            link.start(link.attach(replace(hello, slot_id=lane_id)))
            lanes.append(Lane(number, link, Boundary(link, 0, 1, None), shared.lane(number)))
        is_eager, is_compiled = ranks.step_mode is StepMode.EAGER, ranks.step_mode is StepMode.COMPILED
        recorder = None if is_eager else recorder_for(ranks.device)
        company = Company(
            target_s=STEPS_S,
            recorder=recorder,
            is_compiled=is_compiled,
            is_measured=ranks.device.type == "cpu",
        )
        LaneServer(lanes, ranks, shared, _clean(), company, news).serve()
    finally:
        for link in links:
            link.close()


def _link(config: dict[str, Any], slot_id: str, rank: int) -> RayLink:
    return RayLink(config["actor"], config["namespace"], slot_id, rank, config["send_period_s"])


def _clean() -> ProcessState:
    """The process before its first trial; taken last: what the slot itself keeps open is no trial's leak."""
    clean = ProcessState.capture()
    gc.collect()
    gc.freeze()  # what is here now stays: later collections, between two trials, need not look at it again
    return clean


def _share(config: dict[str, Any], ranks: Ranks) -> tuple[ShareMechanism, str]:
    """What holds this rank to its share, and how it came to that where something better was wanted."""
    if ranks.device.type == "cpu":
        return CpuCores(), ""
    wanted, words, fraction = config["gpu_share"], config["gpu_words"], config["memory_fraction"]
    if wanted == SmGroups.name:
        try:
            groups = SmGroups(memory_fraction=fraction)
            if groups.num_units >= config["num_slots"]:
                return groups, words
            words = f"mps; no sm_groups: {config['num_slots']} slots and {groups.num_units} groups"
        except ShareError as error:
            words = f"mps; no sm_groups: {error}"
        wanted = Mps.name
    whole = Mps if wanted == Mps.name else TimeSlice
    return whole(memory_fraction=fraction), words


def _own_device() -> torch.device:
    """The GPU that Ray gave this process, or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def _warm_up(config: dict[str, Any], ranks: Ranks) -> None:
    """Pay what is paid once per process before the first trial does: data, imports, the first step's lazy set-up.

    Data that cannot be read, or a user's code that raises, is no reason to open the slot again: the trial that needs it
    fails, and says why.
    """
    trial = config["warm_up"]
    is_prepared = False
    try:
        if is_own(trial.job):
            add_import_paths(trial.import_paths)
            reports.install()  # before the user's module takes hold of what is replaced
            if job_info(trial.job).is_function:
                return
        with reading(build_job(trial.job, trial.params)) as job:
            job.prepare()
            is_prepared = True
            stepper = Stepper(trial, job, ranks)
            for tier in trial.limits.tiers:
                stepper.turn(replace(trial.start, tier=tier))
                stepper.step()
                if ranks.device.type == "cuda":
                    stepper.rehearse()  # what is loaded at a first capture need not be loaded in a trial
    except Exception as error:
        if is_device_fault(error) or (is_prepared and ranks.world_size > 1):
            raise  # the other ranks wait in a step that this one has left
        logger.warning("not warmed up: %s: %s", type(error).__name__, error)
    if ranks.world_size > 1:
        dist.barrier(group=ranks.group)


def _opening(joined_wall_s: float, shared_wall_s: float) -> Opening:
    """Asked when this process is warm."""
    began_wall_s = psutil.Process().create_time()
    return Opening(
        began_wall_s=began_wall_s,
        loaded_s=_LOADED_WALL_S - began_wall_s,
        joined_s=joined_wall_s - began_wall_s,
        shared_s=shared_wall_s - began_wall_s,
        warm_s=time.time() - began_wall_s,
    )


def _hello(config: dict[str, Any], ranks: Ranks, share: ShareMechanism, words: str) -> SlotHello:
    """What the group tells the actor about itself, gathered from all ranks.

    Raises:
        UnfitEnvironmentError: two ranks are on one GPU, which NCCL refuses.
    """
    peak_bytes = CudaGauge(ranks.device).peak_bytes() if ranks.device.type == "cuda" else 0
    mine = (_device(ranks.device, share, config["max_units"]), os.getpid(), peak_bytes)
    all_ranks: list[Any] = [mine]
    if ranks.world_size > 1:
        all_ranks = [None] * ranks.world_size
        dist.all_gather_object(all_ranks, mine, group=ranks.group)
    views, pids, peaks = zip(*all_ranks, strict=True)
    devices = {view.device_id: view for view in views}
    if ranks.device.type == "cuda" and len(devices) < ranks.world_size:
        raise UnfitEnvironmentError(
            f"{ranks.world_size} ranks of one trial are on {len(devices)} GPUs, and ranks of one trial never share one;"
            " allowed: trial.num_workers at most the GPUs of a node, and so few trials at a time that each has its own"
        )
    return SlotHello(
        slot_id=config["slot_id"],
        placement=tuple(view.device_id for view in views),
        devices=tuple(devices.values()),
        enforced_by=share.name,
        enforcement=share.enforcement.note + (f" ({words})" if words else ""),
        pids=pids,
        enforces=tuple(what for what in ("compute", "memory") if getattr(share.enforcement, what)),
        memory_cap_bytes=_cap_bytes(config["memory_fraction"], devices.values()) if share.enforcement.memory else None,
        warm_peak_bytes=max(peaks) or None,
    )


def _cap_bytes(fraction: float, devices: Iterable[DeviceView]) -> int:
    """What each rank's allocator may take: of the smallest GPU, where they differ."""
    return int(fraction * min(device.memory_bytes for device in devices))


def _device(device: torch.device, share: ShareMechanism, max_units: int | None) -> DeviceView:
    """The device of this rank: a GPU, or the cores of its node that the process may use."""
    node_id = ray.get_runtime_context().get_node_id()
    if device.type == "cuda":
        facts = torch.cuda.get_device_properties(device)
        return DeviceView(
            device_id=cuda_device_id(str(facts.uuid)),
            node_id=node_id,
            kind=DeviceKind.CUDA,
            units=share.num_units if isinstance(share, SmGroups | TimeSlice) else 1,
            device_type=facts.name,
            memory_bytes=facts.total_memory,
        )
    num_cores = len(os.sched_getaffinity(0))
    units = num_cores if max_units is None else min(max_units, num_cores)
    return DeviceView(device_id=DeviceId(f"cpu:{node_id[:8]}"), node_id=node_id, kind=DeviceKind.CPU, units=units)
