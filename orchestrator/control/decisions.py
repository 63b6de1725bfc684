"""From telemetry to a plan: what is learned of trials, the snapshot that a policy decides on, and what a plan changes.

The policy itself is called in between, by the actor, because it may overrun. A refused plan changes nothing: the plan
in force stays, and trials that are new to it are served by fair shares until the policy is sane again. Pure: every
function answers with values or events.
"""

from __future__ import annotations

import dataclasses
from dataclasses import replace

from orchestrator.control import grants, moves
from orchestrator.control.events import SPARE_REASON, Acknowledged, Event, GainRealised, Offered, PlanCommitted
from orchestrator.control.gain import Measurement, Pace, efficiency_of, settled
from orchestrator.control.memory import memory_fields
from orchestrator.control.node_views import node_type_views, waiting_views
from orchestrator.control.orders import Ack, Note
from orchestrator.control.ranking import Outlook
from orchestrator.control.resizing import arrived, limits_now
from orchestrator.control.signals import CheckMade, FitAdvanced, MeasurementBegan, TrialNoted
from orchestrator.control.trust import Trust, judged
from orchestrator.control.world import Run, Trial, World
from orchestrator.policies.decide.fair_share import FairShare
from orchestrator.policies.learn.fit import NOTHING_FITTED, Observation, inherit, update
from orchestrator.policies.plan import Allocation, Generation, Plan, Settings, changed_dials, diff, is_same
from orchestrator.policies.snapshot import Quota, Snapshot, TrialView
from orchestrator.share.verification import judge_speed
from orchestrator.telemetry.stretch import Stretch


def learned(world: World, run: Run, now_s: float) -> list[Event]:
    """What the running trials have shown since this was last asked and applied."""
    found: list[Event] = []
    trust = judged(run, now_s)
    for trial in run.running():
        assert trial.window is not None
        assert trial.fit is not None
        found += _doubted(trial, trust)
        seen = trial.window.observations(now_s)
        loss = trial.window.view(now_s).loss
        if seen or loss not in {None, trial.loss}:
            fit = update(trial.fit, completed(world, run, trial, seen)) if seen else trial.fit
            is_shared = trust.is_example(trial.trial_id)
            found.append(FitAdvanced(trial_id=trial.trial_id, fit=fit, loss=loss, is_shared=is_shared))
    return found


def _doubted(trial: Trial, trust: Trust) -> list[Event]:
    """Say whose telemetry is not believed, where that is news."""
    why = trust.doubts.get(trial.trial_id)
    text = "" if why is None else f"its telemetry is not believed: {why}"
    if trial.notes.get("trust", "") == text:
        return []
    return [TrialNoted(trial_id=trial.trial_id, note=Note(kind="trust", text=text))]


def completed(world: World, run: Run, trial: Trial, seen: tuple[Observation, ...]) -> tuple[Observation, ...]:
    """Observations of a running trial with its nodes, its type of device and what others hold beside it.

    The rows of one window may straddle a change beside the trial; what is in force when they are taken in counts for
    all of them, and the fit's medians outlive one window under a wrong heading.
    """
    placement = () if trial.account is None else trial.account.placement
    devices = [world.devices[each] for each in placement if each in world.devices]
    if not devices:
        return seen
    accounts = world.accounts(run)
    slowest = min(devices, key=lambda device: (device.speed, device.device_type))
    crowd_share = max(grants.held(accounts, device.device_id, but=trial.trial_id) for device in devices)
    return tuple(
        dataclasses.replace(
            one,
            num_nodes=len({device.node_id for device in devices}),
            device_type=slowest.device_type,
            crowd_share=min(1.0, max(0.0, crowd_share)),
        )
        for one in seen
    )


def snapshot(world: World, run: Run, now_s: float) -> Snapshot | None:
    """The world as a policy sees it; None when no trial runs, unless trials wait for what a policy decides."""
    trials = run.running()
    if run.spec.places:
        trials = sorted((*trials, *run.waiting()), key=lambda trial: trial.trial_id)
    waiting = waiting_views(run)
    outlooks = run.ranking.outlooks(trials, run.trials.values())
    devices = moves.devices(world) if run.spec.places else tuple(world.devices.values())
    if (not trials and not waiting) or (run.spec.places and not devices):
        return None
    trust = judged(run, now_s)
    return Snapshot(
        now_s=now_s,
        seed=run.spec.seed,
        plan=run.plan,
        devices=tuple(sorted(devices, key=lambda device: device.device_id)),
        trials=tuple(
            trust.shown(_view(world, run, trial, now_s, outlooks[trial.trial_id]), _num_beside(run, trial))
            for trial in trials
        ),
        quotas=_quotas(run),
        node_types=node_type_views(world, run),
        waiting=waiting,
        max_cost_per_hour=run.spec.max_cost_per_hour,
    )


def _quotas(run: Run) -> tuple[Quota, ...]:
    user, most = run.spec.hidden(run.terms.user), run.terms.max_devices
    return () if most is None else (Quota(user=user, max_devices=most),)


def _num_beside(run: Run, trial: Trial) -> int:
    """Ranks on the fullest device of a trial."""
    places = [each for account in run.accounts().values() for each in account.placement]
    own = () if trial.account is None else trial.account.placement
    return max((places.count(each) for each in own), default=1)


def committed(run: Run, seen: Snapshot, plan: Plan, entry: PlanCommitted | None = None) -> list[Event]:
    """A plan that breaks no invariant takes effect; nothing where another one did since, or it changes nothing.

    Even the same plan is news to a trial that came back since the plan in force was committed. `entry` is the decision
    for all runs, of which `seen` and `plan` are the part of this one; None where the run is alone.
    """
    has_newcomers = any(account.target is None for account in run.accounts().values())
    if seen.plan is not run.plan or (is_same(run.plan, plan) and not has_newcomers):
        return []
    rows = [(row, run.trials[row.trial_id]) for row in diff(seen.plan, plan)]
    gains = [event for _, trial in rows for event in realised(trial, is_last=True)]
    begun = [event for row, trial in rows for event in _measured(trial, seen, plan, row)]
    return [entry or PlanCommitted.of(seen, plan), *gains, *begun]


def stand_in(run: Run, seen: Snapshot, reason: str) -> Plan | None:
    """Fair shares for trials that have no allocation yet while the policy is refused; None where all have one."""
    if all(run.plan.allocation(trial.trial_id) is not None for trial in seen.trials):
        return None
    return replace(FairShare().decide(seen), reason=f"{SPARE_REASON} ({reason})")


def offered(world: World, run: Run) -> list[Event]:
    """Grants that have become possible."""
    return [
        Offered(
            generation=Generation(grant.generation),
            trial_id=trial_id,
            settings=grant.settings,
            units=grant.units,
            amount=grant.amount,
        )
        for trial_id, grant in grants.offers(world.accounts(run), world.devices, run.accounts().keys())
    ]


def realised(trial: Trial, *, is_last: bool = False) -> list[Event]:
    """The gain of a trial's last change, where it has settled, and what it says of the prediction.

    `is_last` says that the trial is about to change again, so that less has to be enough.
    """
    stretch = None if trial.window is None else trial.window.stretch()
    gain = settled(trial.trial_id, trial.measurement, stretch, is_last=is_last)
    if gain is None:
        return []
    entry = GainRealised(
        generation=Generation(gain.generation),
        trial_id=gain.trial_id,
        dial="+".join(gain.dials),
        predicted=gain.predicted,
        realised=gain.realised,
        before=_words(gain.before),
        after=_words(gain.after),
    )
    check = judge_speed(gain.predicted, gain.realised)
    return [entry] if check is None else [entry, CheckMade(trial_id=trial.trial_id, check=check)]


def _view(world: World, run: Run, trial: Trial, now_s: float, outlook: Outlook) -> TrialView:
    seen = None if trial.window is None else trial.window.view(now_s)
    shape, terms = run.spec.shape(trial.params), run.terms_of(trial)
    fit = trial.fit or trial.kept_fit or inherit(run.shape_fits.get(shape, NOTHING_FITTED))
    placement = () if trial.account is None else trial.account.placement
    view = TrialView(
        trial_id=trial.trial_id,
        shape=shape,
        start=trial.start or run.spec.start_on(trial.size or run.spec.start.num_workers),
        limits=limits_now(run, trial, now_s),
        placement=placement,
        weight=terms.weight,
        step=trial.step if seen is None else max(seen.step, trial.step),
        num_samples=trial.num_samples if seen is None else max(seen.num_samples, trial.num_samples),
        target_samples=run.spec.target_samples,
        throughput_per_s=None if seen is None else seen.throughput_per_s,
        loss=trial.loss,
        is_stale=seen is not None and seen.is_stale,
        fit=fit,
        override=trial.override,
        **memory_fields(world, run, trial, fit),
        changed_at_s=trial.changed_at_s,
        began_at_s=trial.began_at_s,
        restart_s=run.restart_s,
        survival=outlook.survival,
        rung_samples=outlook.rung_samples,
        step_modes=trial.step_modes,
        user=run.spec.hidden(terms.user),
        priority=terms.priority,
        is_protected=terms.protected,
        guaranteed=terms.guaranteed_devices,
        deadline_s=None if terms.deadline is None else terms.deadline - run.epoch_s,
    )
    return _placed(world, run, trial, view, now_s) if run.spec.places else view


def _placed(world: World, run: Run, trial: Trial, view: TrialView, now_s: float) -> TrialView:
    """A trial as a policy sees it that may pause and move it."""
    return replace(
        view,
        limits=moves.limits_of(world, run, trial, view.limits),
        placement=moves.placement_of(run, trial),
        began_at_s=trial.submitted_at_s,
        attained_s=trial.attained_until(now_s),
        num_restarts=trial.attempt,
        target_samples=None if run.spec.is_function else view.target_samples,
    )


def _measured(trial: Trial, seen: Snapshot, plan: Plan, row: Allocation) -> list[Event]:
    """From now on the gain of a change is measured, where the trial runs with what it had before."""
    view = next(each for each in seen.trials if each.trial_id == row.trial_id)
    before, after = seen.settings_in_force(view), _efficiency(view, row.settings)
    if before is None:
        # One that has just moved to a slot of another size is compared with what it was in the old one.
        if trial.pace is None or not trial.is_resized:
            return []
        pace, predicted = trial.pace
        return [_begun(trial, plan, ("workers",), predicted, pace, after)]
    dials = changed_dials(before, row.settings)
    now: Stretch | None = None if trial.window is None else trial.window.stretch()
    if now is None or not dials or not _runs_with(trial, now.generation):
        return []
    pace = Pace(throughput=now.samples_per_s, efficiency=_efficiency(view, before))
    return [_begun(trial, plan, dials, row.predicted_gain, pace, after)]


def _begun(
    trial: Trial, plan: Plan, dials: tuple[str, ...], predicted: float | None, before: Pace, after: float
) -> MeasurementBegan:
    found = Measurement(
        generation=plan.generation, dials=dials, predicted=predicted, before=before, efficiency_after=after
    )
    return MeasurementBegan(trial_id=trial.trial_id, measurement=found)


def _runs_with(trial: Trial, generation: int) -> bool:
    """Whether a trial runs with what that generation gave it, and nothing newer is on its way."""
    account = trial.account
    if account is None or account.offers or account.applied is None:
        return False
    return account.applied.generation == generation


def _words(pace: Pace) -> dict[str, float]:
    return {"throughput": pace.throughput, "efficiency": pace.efficiency, "goodput": pace.goodput}


def _efficiency(view: TrialView, settings: Settings) -> float:
    return efficiency_of(view.fit, view.start.global_batch, settings.global_batch)


def acknowledged(run: Run, trial: Trial, ack: Ack, now_s: float) -> list[Event]:
    """A trial has applied what it was offered; nothing where that was not."""
    account = trial.account
    granted = None if account is None else next((g for g in account.offers if g.generation == ack.generation), None)
    if account is None or granted is None:
        return []
    before = account.settings
    arrival = arrived(run, trial, now_s) if before is None else None
    dials = ("workers",) if arrival is not None else ()
    entry = Acknowledged(
        generation=Generation(ack.generation),
        trial_id=trial.trial_id,
        attempt=trial.attempt,
        step=ack.step,
        settings=ack.settings,
        ack_s=max(0.0, ack.applied_s - run.committed_at_s.get(ack.generation, ack.applied_s)),
        switch_s=ack.switch_s,
        dials=dials if before is None else changed_dials(before, granted.settings),
    )
    return [entry] if arrival is None else [arrival, entry]
