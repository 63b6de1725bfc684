"""What a slot is told, made from the world: to run its trial so and so, or to be idle, or to close. Pure.

The controller publishes what comes of it, when it differs from what was published last.
"""

from __future__ import annotations

from pathlib import Path

from orchestrator.control.memory import granted_bytes
from orchestrator.control.orders import SlotOp, SlotOrder, TrialOrder
from orchestrator.control.world import Run, Slot, Trial, World


def order_of(world: World, slot: Slot) -> SlotOrder:
    """What a slot shall do now, without the number that its publisher gives it."""
    trial = world.trial_in(slot)
    if trial is None or trial.account is None:
        return SlotOrder(incarnation="", seq=0, op=SlotOp.CLOSE if slot.is_closing else SlotOp.IDLE)
    run = world.runs[trial.run_id]
    return SlotOrder(
        incarnation="",
        seq=0,
        op=SlotOp.RUN,
        trial=_trial_order(world, run, trial),
        grant=trial.account.newest,
        credit=trial.credit,
        stop=trial.stop,
    )


def _trial_order(world: World, run: Run, trial: Trial) -> TrialOrder:
    spec = run.spec
    placement = () if trial.account is None else trial.account.placement
    return TrialOrder(
        trial_id=trial.trial_id,
        attempt=trial.attempt,
        seed=spec.seed,
        job=spec.job,
        params=trial.params,
        start=spec.start_on(trial.size),
        limits=spec.limits,
        samples_per_report=spec.samples_per_report,
        max_reports=spec.max_reports,
        directory=str(Path(spec.run_dir) / "trials" / trial.trial_id),
        resume_from=trial.checkpoint,
        num_reports_done=len(trial.reports),
        memory_bytes=granted_bytes(world, placement),
        probe_budget=spec.probe_budget,
        exchange_follows_tier=spec.exchange_follows_tier,
        metric=spec.metric,
        mode=spec.mode,
        import_paths=spec.import_paths,
        precision_off=trial.precision_off,
    )
