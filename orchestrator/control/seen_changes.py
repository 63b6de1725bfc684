"""What telemetry and measurements change of a trial. Only `transition.apply` calls these."""

from __future__ import annotations

from orchestrator.control import signals as sig
from orchestrator.control.effects import Effect, StoreSteps, Warn
from orchestrator.control.world import Run, World
from orchestrator.policies.learn.fit import note_tiers
from orchestrator.policies.snapshot import StepModeView

Effects = tuple[Effect, ...]


def fold_records(_world: World, run: Run, event: sig.RecordsCame) -> Effects:
    """Fold step records into the rates of the attempt; those that can be true go into the table."""
    trial = run.trials[event.trial_id]
    assert trial.window is not None
    found = trial.window.fold(event.rank, event.records, event.t_s, newest_generation=run.plan.generation)
    effects: list[Effect] = []
    if found.accepted:
        records = event.records[found.mask]
        effects.append(StoreSteps(trial.trial_id, trial.attempt, event.rank, records))
    if found.refused:
        text = f"telemetry.refused trial={trial.trial_id} rank={event.rank} {found.reasons}"
        effects.append(Warn(text))
    return tuple(effects)


def note_tier_fits(_world: World, run: Run, event: sig.TiersFound) -> Effects:
    """What a trial found out about its tiers; the newest holds."""
    trial = run.trials[event.trial_id]
    assert trial.fit is not None
    trial.fit, trial.fit_changed_at_s = note_tiers(trial.fit, event.report.tiers), event.t_s
    return ()


def note_mode(_world: World, run: Run, event: sig.StepModeFound) -> Effects:
    """Which step mode is the faster with some dials; the newest holds."""
    trial = run.trials[event.trial_id]
    modes = {_dials(mode): mode for mode in (*trial.step_modes, event.found)}
    trial.step_modes = tuple(modes[dials] for dials in sorted(modes))
    return ()


def advance_fit(_world: World, run: Run, event: sig.FitAdvanced) -> Effects:
    """What was observed of a trial since the last time is learned, also for trials of its shape to come."""
    trial = run.trials[event.trial_id]
    trial.loss = trial.loss if event.loss is None else event.loss
    if event.fit is not trial.fit:
        trial.fit = event.fit
        if event.is_shared:
            run.shape_fits[run.spec.shape(trial.params)] = event.fit
    return ()


def note_pace(_world: World, run: Run, event: sig.PaceSeen) -> Effects:
    """Keep the pace of a trial for the comparison with that in its next slot."""
    run.trials[event.trial_id].pace = event.pace, event.predicted
    return ()


def begin_measurement(_world: World, run: Run, event: sig.MeasurementBegan) -> Effects:
    """Measure a change; it takes the place of an older one."""
    trial = run.trials[event.trial_id]
    trial.measurement, trial.pace = event.measurement, None
    return ()


def note_check(_world: World, run: Run, event: sig.CheckMade) -> Effects:
    """The newest check of its kind."""
    run.trials[event.trial_id].checks[event.check.what] = event.check
    return ()


def _dials(mode: StepModeView) -> tuple[str, int, int]:
    return mode.tier.value, mode.micro_batch, mode.grad_accum
