"""From the resolved run file to what the controller and the search need of it. No Ray, no torch."""

from __future__ import annotations

import math

from orchestrator.config import ResolvedRun
from orchestrator.config.machine import this_machine
from orchestrator.config.model import (
    AshaScheduler,
    HyperbandScheduler,
    MedianScheduler,
    PbtScheduler,
    RunConfig,
    Scheduler,
)
from orchestrator.config.queue import seconds_of
from orchestrator.control.spec import RunSpec, StopRule
from orchestrator.control.terms import Terms
from orchestrator.jobs.own import changes_speed
from orchestrator.jobs.table import JobInfo, complete_params, job_info
from orchestrator.policies.plan import Settings
from orchestrator.policies.snapshot import DeviceKind, DialLimits, NodeType
from orchestrator.policies.tier import Tier, auto_tiers
from orchestrator.space import first_drawn


def run_spec(resolved: ResolvedRun) -> RunSpec:
    """The controller's view of a run."""
    config = resolved.config
    info = job_info(config.job.key)
    start = start_settings(config)
    dials = config.dials
    enabled = {"share": dials.share.enabled, "batch": dials.batch.enabled, "precision": dials.precision.enabled}
    enabled["workers"] = dials.workers.enabled
    return RunSpec(
        run_id=config.name,
        run_dir=str(resolved.run_dir),
        seed=config.seed,
        job=config.job.key,
        params=dict(config.job.params),
        speed_free_params=speed_free_params(config, info),
        start=start,
        limits=dial_limits(config, start),
        dials=tuple(dial for dial, is_enabled in enabled.items() if is_enabled),
        samples_per_report=config.samples_per_report,
        max_reports=config.max_reports,
        policy=config.policy.name,
        policy_params=dict(config.policy.params),
        period_s=config.policy.period_s,
        deadline_s=config.policy.deadline_s,
        restart_budget=config.slots.restart_budget,
        stale_after_s=config.telemetry.stale_after_s,
        idle_close_s=config.slots.idle_close_s,
        max_units=config.cluster.num_cpus,
        metric=config.search.metric or info.metric,
        mode=config.search.mode or info.mode,
        probe_budget=config.dials.precision.probe_budget if config.dials.precision.enabled else 0.0,
        exchange_follows_tier=config.dials.precision.exchange == "tier",
        max_running=config.search.num_slots,
        resize_patience_s=config.slots.open_timeout_s,
        node_types=node_types(config),
        max_cost_per_hour=config.cluster.max_cost_per_hour,
        stop_rule=stop_rule(config.search.scheduler),
        is_function=info.is_function,
        import_paths=config.job.import_paths,
        places=config.places,
        terms=terms(config),
    )


def terms(config: RunConfig) -> Terms:
    """The section `queue`, with the deadline in seconds since 1970."""
    queue = config.queue
    values = queue.model_dump()
    return Terms(**{**values, "deadline": None if queue.deadline is None else seconds_of(queue.deadline)})


def speed_free_params(config: RunConfig, info: JobInfo) -> tuple[str, ...]:
    """Names of the parameters that leave the time of a step as it is."""
    known = {param.name: param.changes_speed for param in info.params}
    names = [*known, *(name for name in (*config.job.params, *config.search.searched) if name not in known)]
    return tuple(name for name in names if not known.get(name, changes_speed(name)))


def stop_rule(scheduler: Scheduler) -> StopRule | None:
    """How a scheduler of the run file stops trials; None where it stops none."""
    match scheduler:
        case AshaScheduler():
            return StopRule(
                name="asha",
                grace_reports=scheduler.grace_reports,
                reduction_factor=scheduler.reduction_factor,
                rung_patience=scheduler.rung_patience,
            )
        case MedianScheduler():
            return StopRule(name="median", grace_reports=scheduler.grace_reports, min_trials=scheduler.min_trials)
        case HyperbandScheduler():
            return StopRule(name="hyperband", reduction_factor=scheduler.reduction_factor)
        case PbtScheduler():
            return StopRule(name="pbt", grace_reports=scheduler.interval_reports, quantile=scheduler.quantile)
        case _:
            return None


def node_types(config: RunConfig) -> tuple[NodeType, ...]:
    """The nodes that can be asked for, as a policy sees them."""
    found = []
    gpus_per_rank = gpu_part(num_gpus_at_most(config), config.num_ranks)
    for name, each in sorted(config.cluster.node_types.items()):
        cpus, gpus = int(each.resources["CPU"]), int(each.resources.get("GPU", 0))
        has_gpus = bool(gpus) and config.devices.use != "cpu"
        found.append(
            NodeType(
                name=name,
                kind=DeviceKind.CUDA if has_gpus else DeviceKind.CPU,
                num_devices=gpus if has_gpus else 1,
                units=1 if has_gpus else cpus,
                num_ranks=min(cpus, int(gpus / gpus_per_rank + 1e-9)) if has_gpus else cpus,
                price_per_hour=each.price_per_hour,
                max_nodes=each.max_nodes,
                device_type=each.device_type,
                speed=each.speed,
                is_spot=each.is_spot,
            )
        )
    return tuple(found)


def num_gpus_at_most(config: RunConfig) -> float:
    """GPUs of all nodes that can be asked for."""
    return sum(each.max_nodes * each.resources.get("GPU", 0) for each in config.cluster.node_types.values())


def gpu_part(num_gpus: float, num_ranks: int) -> float:
    """The part of a GPU that each rank reserves from Ray: whole GPUs where there are enough, else equal parts."""
    ranks_per_gpu = math.ceil(num_ranks / max(1.0, num_gpus))
    return math.floor(10_000 / ranks_per_gpu) / 10_000  # Ray counts in ten-thousandths


def start_settings(config: RunConfig) -> Settings:
    """The dials with which every trial begins."""
    return Settings(
        share=config.start_share,
        micro_batch=config.trial.micro_batch,
        grad_accum=config.trial.grad_accum,
        tier=allowed_tiers(config)[0],
        num_workers=config.trial.num_workers,
    )


def dial_limits(config: RunConfig, start: Settings) -> DialLimits:
    """The ranges of the dials; a dial that may not be turned has its start as only value."""
    share, batch, precision = config.dials.share, config.dials.batch, config.dials.precision
    can_change_global = batch.enabled and batch.change_global
    return DialLimits(
        min_share=share.min if share.enabled else start.share,
        max_share=share.max if share.enabled and not config.places else start.share,
        min_global_batch=batch.min_global if can_change_global else start.global_batch,
        max_global_batch=batch.max_global if can_change_global else start.global_batch,
        max_micro_batch=batch.max_micro if batch.enabled else start.micro_batch,
        tiers=allowed_tiers(config) if precision.enabled else (start.tier,),
        min_workers=config.dials.workers.min if config.dials.workers.enabled else None,
        max_workers=config.dials.workers.max if config.dials.workers.enabled else None,
        min_efficiency=batch.min_efficiency if can_change_global else 0.0,
    )


def allowed_tiers(config: RunConfig) -> tuple[Tier, ...]:
    """The tiers of the run file; with `auto` those that pay on this machine."""
    return config.dials.precision.tiers or auto_tiers(this_machine().device)


def middle_params(config: RunConfig) -> dict[str, object]:
    """Parameters of a trial that stands for the search: the fixed ones and, of each searched one, its first value.

    Of several spaces that is the first; where a function draws it is what that draws first.
    """
    params: dict[str, object] = dict(config.job.params)
    if isinstance(config.search.space, str):
        params |= first_drawn(config.search.space)
    for name, distribution in next(iter(config.search.spaces), {}).items():
        params[name] = distribution.samples[0]
    required = {param.name for param in job_info(config.job.key).params if param.is_required}
    return dict(complete_params(config.job.key, params)) if required <= params.keys() else params
