"""What events of single trials change, and why one may be impossible. Only `transition.apply` calls these."""

from __future__ import annotations

from dataclasses import replace

from orchestrator.control import events as ev
from orchestrator.control import signals as sig
from orchestrator.control.effects import Decide, DiscardCommits, Effect
from orchestrator.control.grants import Account
from orchestrator.control.orders import Cause, DialReport, Report, StopMode
from orchestrator.control.world import CLONED, Run, Slot, SlotState, Trial, TrialState, World
from orchestrator.policies.learn.fit import NOTHING_FITTED, capped, inherit
from orchestrator.policies.snapshot import DeviceKind, Override
from orchestrator.telemetry.window import TrialWindow

REFUSED_PATIENCES = 5
"""A number of ranks that could not be had is not tried again for so many times the patience."""

Effects = tuple[Effect, ...]


# Why not.


def refuse_unknown(_world: World, run: Run, event: ev.ReportTold) -> str | None:
    """The event is of a trial that was never submitted."""
    return None if event.trial_id in run.trials else f"there is no trial {event.trial_id!r}"


def refuse_known(_world: World, run: Run, event: ev.TrialQueued) -> str | None:
    """The trial was submitted before."""
    return f"{event.trial_id} is known already" if event.trial_id in run.trials else None


def refuse_ended(world: World, run: Run, event: ev.TrialRequeued) -> str | None:
    """The trial is unknown, or nothing more can happen to it."""
    if event.trial_id not in run.trials:
        return refuse_unknown(world, run, event)  # type: ignore[arg-type]
    state = run.trials[event.trial_id].state
    return f"{event.trial_id} is {state.value}" if state.is_final else None


def refuse_end(_world: World, run: Run, event: ev.TrialEnded) -> str | None:
    """The trial is unknown or ended otherwise, or the state is no end."""
    trial = run.trials.get(event.trial_id)
    if trial is None:
        return f"there is no trial {event.trial_id!r}"
    if event.state not in {state.value for state in TrialState if state.is_final}:
        return f"{event.state!r} is no end of a trial"
    is_other = trial.state.is_final and trial.state.value != event.state
    return f"{event.trial_id} is {trial.state.value} already" if is_other else None


def refuse_assignment(_world: World, run: Run, event: ev.TrialAssigned) -> str | None:
    """The trial does not wait, or the slot cannot take it."""
    trial, slot = run.trials.get(event.trial_id), _world.slots.get(event.slot_id)
    if trial is None or trial.state is not TrialState.QUEUED:
        return f"{event.trial_id} does not wait for a slot"
    if slot is None or slot.hello is None or slot.trials or not slot.is_open:
        return f"{event.slot_id} cannot take a trial"
    return None


def refuse_stop(world: World, run: Run, event: ev.TrialToldToStop) -> str | None:
    """The trial has ended, or there is no such way to stop."""
    if event.mode not in set(StopMode):
        return f"{event.mode!r} is no way to stop"
    return refuse_ended(world, run, event)  # type: ignore[arg-type]


def refuse_continuation(_world: World, run: Run, event: ev.TrialContinued) -> str | None:
    """The trial is unknown, or still in a slot."""
    trial = run.trials.get(event.trial_id)
    if trial is None or trial.slot_id is not None:
        return f"{event.trial_id} is {'unknown' if trial is None else f'in {trial.slot_id}'}"
    return None


def refuse_report(_world: World, run: Run, event: ev.Reported) -> str | None:
    """The trial is unknown, or it is not its next report."""
    trial = run.trials.get(event.trial_id)
    num_reports = None if trial is None else len(trial.reports)
    return None if event.index == num_reports else f"the next report of {event.trial_id} is {num_reports}"


def refuse_pin(_world: World, run: Run, event: ev.CommitPinned) -> str | None:
    """The trial is unknown, or has not made that report."""
    trial = run.trials.get(event.trial_id)
    is_there = trial is not None and 0 <= event.index < len(trial.reports)
    return None if is_there else f"{event.trial_id} has made no report {event.index}"


def refuse_unplaced(_world: World, run: Run, event: sig.RecordsCame) -> str | None:
    """The trial is in no slot."""
    trial = run.trials.get(event.trial_id)
    return None if trial is not None and trial.account is not None else f"{event.trial_id} is in no slot"


def refuse_rung(_world: World, run: Run, event: sig.RungOpened) -> str | None:
    """There is no such rung, or nobody waits there."""
    rung = run.rungs.rungs.get(event.number)
    return None if rung is not None and rung.held and not rung.order else f"rung {event.number} has nothing to open"


# What changes.


def queue(_world: World, run: Run, event: ev.TrialQueued) -> Effects:
    """Queue a new trial.

    Of trials that wait for their first attempt the search's first is next: their stand-ins start side by side and
    submit in any order, and who begins first matters to a scheduler that judges each by those before it.
    """
    trial = Trial(
        run_id=event.run_id,
        trial_id=event.trial_id,
        index=len(run.trials),
        params=dict(event.params),
        token=event.token,
        queued_at_s=event.t_s,
        submitted_at_s=event.t_s,
        changed_at_s=event.t_s,
    )
    trial.credit = 0 if trial.has_stand_in else run.spec.max_reports
    run.trials[trial.trial_id] = trial
    trial.story.append("queued")
    if trial.token.startswith(CLONED):
        return ()
    place = len(run.queue)
    while place and run.trials[run.queue[place - 1]].attempt == 0 and run.queue[place - 1] > trial.trial_id:
        place -= 1
    run.queue.insert(place, trial.trial_id)
    return (Decide(),) if run.spec.places else ()


def assign(world: World, run: Run, event: ev.TrialAssigned) -> Effects:
    """Begin an attempt in a slot; it holds nothing yet."""
    trial, slot = run.trials[event.trial_id], world.slots[event.slot_id]
    assert slot.hello is not None
    placement, shape = slot.hello.placement, run.spec.shape(trial.params)
    run.queue.remove(trial.trial_id)
    slot.state, slot.trials = SlotState.RUNNING, (*slot.trials, trial.key)
    trial.state, trial.slot_id, trial.attempt = TrialState.RUNNING, slot.slot_id, event.attempt
    trial.story.append(f"attempt {trial.attempt} began in {slot.slot_id}")
    trial.began_at_s = trial.report_began_s = trial.changed_at_s = trial.fit_changed_at_s = event.t_s
    trial.is_resized = trial.num_workers is not None and trial.size not in {0, len(placement)}
    trial.size, trial.wish = len(placement), None
    _forget_grant(run, trial)
    trial.account, trial.charged_at_s = Account(placement=placement), event.t_s
    known = [world.devices[each].kind for each in placement if each in world.devices]
    trial.window = TrialWindow(
        stale_after_s=run.spec.stale_after_s,
        num_workers=len(placement),
        computes_on_cpu=bool(known) and all(kind is DeviceKind.CPU for kind in known),
        max_samples=None if run.spec.is_function else run.spec.max_step_samples,
    )
    fit = trial.kept_fit or inherit(run.shape_fits.get(shape, NOTHING_FITTED))
    # A micro-batch that overflowed is not the first to be tried again.
    trial.fit = fit if trial.resume is None else capped(fit, trial.resume.micro_batch)
    trial.kept_fit = None
    row = run.plan.allocation(trial.trial_id)
    if row is not None and trial.resume is not None:
        # The plan in force still has what did not fit.
        reason = "ran out of memory in the attempt before"
        trial.override = Override(number=0, generation=run.plan.generation, settings=trial.resume, reason=reason)
    elif row is not None and trial.precision_off:
        first = replace(row.settings, tier=run.spec.start.tier)
        trial.override = Override(number=0, generation=run.plan.generation, settings=first, reason=trial.precision_off)
    return ()


def stop(world: World, run: Run, event: ev.TrialToldToStop) -> Effects:
    """A trial shall leave; one that waits ends at once where it is of no further use."""
    trial, mode = run.trials[event.trial_id], StopMode(event.mode)
    trial.stop = mode
    if mode is StopMode.RESIZE:
        trial.moves_to, trial.left_at_s = event.num_workers or trial.moves_to, event.t_s
    elif mode is StopMode.MOVE:
        trial.left_at_s = event.t_s
    if mode is StopMode.DISCARD and trial.state is not TrialState.RUNNING:
        _finish(world, run, trial, event, TrialState.STOPPED, "stopped while it was waiting")
    return ()


def requeue(world: World, run: Run, event: ev.TrialRequeued) -> Effects:
    """Put a trial at the front of the queue for its next attempt."""
    trial = run.trials[event.trial_id]
    is_moving = trial.stop is StopMode.MOVE and trial.left_at_s is not None
    if trial.fit is not None and (is_moving or trial.moves_to is not None):
        trial.kept_fit = trial.fit
    if is_moving and trial.left_at_s is not None:
        trial.move_s = event.t_s - trial.left_at_s
    if trial.moves_to is None:
        trial.left_at_s, trial.pace = None, None
    take_out(world, run, trial, event.t_s)
    trial.state, trial.attempt, trial.stop = TrialState.QUEUED, event.attempt, StopMode.NONE
    trial.queued_at_s = trial.changed_at_s = event.t_s
    run.queue.insert(0, trial.trial_id)
    trial.num_workers, trial.moves_to, trial.onward = event.num_workers, None, event.onward
    trial.num_restarts, trial.num_overflows, trial.resume = event.num_restarts, event.num_overflows, event.resume
    trial.checkpoint = event.checkpoint
    if event.precision_off:
        first = run.spec.start_on(trial.size)
        said = trial.allows or DialReport(step=0, start=first, limits=run.spec.limits, off={})
        trial.allows = said.without_precision(first.tier, event.precision_off)
        trial.precision_off = event.precision_off
    if trial.next is not None and not trial.is_given_up_for(trial.next[1]):
        trial.next = None  # it goes on from its own newest anyway
    _progress(trial, event.step, event.num_samples)
    tell_story(trial, event.reason)
    return ()


def pause(world: World, run: Run, event: ev.TrialPaused) -> Effects:
    """The trial waits in no slot and no queue until the search lets it go on."""
    trial = run.trials[event.trial_id]
    take_out(world, run, trial, event.t_s)
    trial.state, trial.attempt, trial.stop = TrialState.PAUSED, event.attempt, StopMode.NONE
    trial.num_workers, trial.moves_to, trial.left_at_s, trial.pace = None, None, None, None
    trial.step, trial.num_samples, trial.checkpoint = event.step, event.num_samples, event.checkpoint
    tell_story(trial, event.reason)
    return ()


def end(world: World, run: Run, event: ev.TrialEnded) -> Effects:
    """Nothing more will happen to a trial."""
    trial = run.trials[event.trial_id]
    _finish(world, run, trial, event, TrialState(event.state), event.reason)
    trial.cause = Cause(event.cause) if event.cause in set(Cause) else Cause.OWN
    _progress(trial, event.step, event.num_samples)
    return ()


def resize(_world: World, run: Run, event: ev.TrialResized) -> Effects:
    """What became of a wish for another number of ranks."""
    trial = run.trials[event.trial_id]
    run.restart_s = event.restart_s
    tell_story(trial, f"resize {event.stage}: {event.reason}")
    if event.stage == "wanted":
        trial.wish = event.num_workers, event.t_s
    elif event.stage == "done":
        trial.is_resized, trial.left_at_s = False, None
    elif event.stage == "given_up":
        # Any group will do for a trial that waits, and no policy may ask for that number for a while.
        trial.refused[event.num_workers] = event.t_s + REFUSED_PATIENCES * run.spec.resize_patience_s
        trial.num_workers, trial.wish = None, None
        return (Decide(),)
    return ()


def suspect(_world: World, run: Run, event: ev.TrialSuspected) -> Effects:
    """The trial runs alone from now on."""
    trial = run.trials[event.trial_id]
    trial.is_suspect = True
    tell_story(trial, f"the GPU failed under it: {event.reason}")
    return ()


def declare_dials(_world: World, run: Run, event: ev.DialsDeclared) -> Effects:
    """What the training allows of its dials: later plans keep to that."""
    trial = run.trials[event.trial_id]
    trial.allows = DialReport(step=event.step, start=event.start, limits=event.limits, off=dict(event.off))
    trial.story.append(f"at step {event.step} these dials are off: {', '.join(sorted(event.off)) or 'none'}")
    return (Decide(),)


def want_on(_world: World, run: Run, event: ev.ResumptionWanted) -> Effects:
    """What the search asked for happens once the trial has left its slot."""
    trial = run.trials[event.trial_id]
    trial.token = event.resumption.token
    trial.next = dict(event.params), event.resumption
    return ()


def note_token(_world: World, run: Run, event: sig.TokenSeen) -> Effects:
    """A resend of that life changes nothing."""
    run.trials[event.trial_id].token = event.token
    return ()


def go_on(world: World, run: Run, event: ev.TrialContinued) -> Effects:
    """Queue a trial for its next attempt, behind those that wait; with `origin` it has the past of another."""
    trial = run.trials[event.trial_id]
    trial.params, trial.next = dict(event.params), None
    trial.token = event.token or trial.token
    if event.origin is not None:
        _rebase(run, trial, event)
    if not trial.has_stand_in:
        trial.credit, trial.num_restarts, trial.num_overflows = run.spec.max_reports, 0, 0
    take_out(world, run, trial, event.t_s)
    trial.state, trial.stop, trial.reason, trial.attempt = TrialState.QUEUED, StopMode.NONE, "", event.attempt
    trial.queued_at_s = trial.changed_at_s = event.t_s
    run.queue.append(trial.trial_id)
    return (DiscardCommits(trial.trial_id),) if event.origin is not None else ()


def report(_world: World, run: Run, event: ev.Reported) -> Effects:
    """The trial's next report."""
    trial, made = run.trials[event.trial_id], event.report
    trial.reports.append(made)
    trial.checkpoint = made.checkpoint or trial.checkpoint
    trial.step, trial.num_samples, trial.num_overflows = made.step, made.num_samples, 0
    trial.story.append(f"report {made.index} at step {made.step}")
    if trial.has_stand_in:
        run.ranking.take(trial)
        run.rungs.reach(run.trials, trial, run.ranking.loss_of(made), event.t_s)
    return ()


def pin(_world: World, run: Run, event: ev.CommitPinned) -> Effects:
    """The checkpoint behind a report has another name."""
    reports = run.trials[event.trial_id].reports
    reports[event.index] = replace(reports[event.index], checkpoint=event.checkpoint)
    return ()


def tell(_world: World, run: Run, event: ev.ReportTold | sig.ReportToldAgain) -> Effects:
    """The search knows of a report."""
    run.rungs.tell(event.trial_id, event.index, event.t_s)
    if isinstance(event, ev.ReportTold):
        text = f"report {event.index} told after {event.held_s:.1f} s, behind {event.place} others at its rung"
        run.trials[event.trial_id].story.append(text)
    return ()


def want_report(_world: World, run: Run, event: sig.ReportWanted) -> Effects:
    """Asking for a report grants the trial that report."""
    trial = run.trials[event.trial_id]
    trial.wanted = event.index
    run.rungs.ask(trial.trial_id, event.index, event.t_s)
    if trial.credit <= event.index and event.index >= len(trial.reports) and not trial.state.is_final:
        trial.credit, trial.report_began_s = event.index + 1, event.t_s
    return ()


def release(_world: World, run: Run, event: sig.TrialReleased) -> Effects:
    """The search has judged all reports of a trial."""
    run.trials[event.trial_id].wanted = float("inf")
    return ()


def open_rung(_world: World, run: Run, event: sig.RungOpened) -> Effects:
    """Those that wait at a rung are told in an order from here on."""
    run.rungs.open(event.number, event.t_s)
    return ()


# Parts of several of them.


def take_out(world: World, run: Run, trial: Trial, now_s: float) -> None:
    """The trial is in no slot and no queue; its processes use nothing any more."""
    if trial.trial_id in run.queue:
        run.queue.remove(trial.trial_id)
    trial.attained_s, trial.charged_at_s = trial.attained_until(now_s), None
    slot: Slot | None = world.slot_of(trial)
    if slot is not None:
        slot.trials = tuple(key for key in slot.trials if key != trial.key)
        if not slot.trials and slot.state is SlotState.RUNNING:
            slot.state, slot.idle_since_s = SlotState.IDLE, now_s
    trial.slot_id, trial.account, trial.window, trial.fit = None, None, None, None
    trial.override, trial.measurement, trial.step_modes, trial.checks, trial.notes = None, None, (), {}, {}


def tell_story(trial: Trial, text: str) -> None:
    """Add to a trial's story what is not its last line already."""
    if not trial.story or trial.story[-1] != text:
        trial.story.append(text)


def _finish(world: World, run: Run, trial: Trial, event: ev.Event, state: TrialState, reason: str) -> None:
    take_out(world, run, trial, event.t_s)
    trial.state, trial.reason, trial.moves_to = state, reason, None
    if trial.next is not None and not (trial.next[1].reopens or trial.is_given_up_for(trial.next[1])):
        trial.next = None
    tell_story(trial, f"{state.value}: {reason}" if reason else state.value)


def _progress(trial: Trial, step: int | None, num_samples: int | None) -> None:
    trial.step = trial.step if step is None else step
    trial.num_samples = trial.num_samples if num_samples is None else num_samples


def _forget_grant(run: Run, trial: Trial) -> None:
    """What the plan in force grants a slot of another size is nothing to a trial that begins: it is new to it."""
    row = run.plan.allocation(trial.trial_id)
    if row is not None and row.settings.num_workers != trial.size:
        rest = tuple(a for a in run.plan.allocations if a.trial_id != trial.trial_id)
        run.plan = replace(run.plan, allocations=rest)


def _rebase(run: Run, trial: Trial, event: ev.TrialContinued) -> None:
    """Give a trial the past of another one: its reports so far, its commit, its step."""
    origin = run.trials.get(event.origin or trial.trial_id)
    reports = [] if origin is None else list(origin.reports[: event.num_reports])
    for index in range(len(reports), event.num_reports):  # its own past has been replaced since
        unknown = Report(index=index, step=event.step, num_samples=event.num_samples, metrics={}, checkpoint="")
        reports.append(unknown)
    if reports:
        reports[-1] = replace(reports[-1], checkpoint=event.checkpoint)
    trial.reports, trial.credit, trial.checkpoint = reports, len(reports), event.checkpoint
    trial.step, trial.num_samples = event.step, event.num_samples
    trial.story.append(f"takes up {event.origin} behind its report {event.num_reports}")
