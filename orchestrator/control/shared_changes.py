"""What events of runs, slots, nodes, plans and grants change, and why one may be impossible. For `transition.apply`."""

from __future__ import annotations

from dataclasses import replace

from orchestrator.control import departures, grants, trial_changes
from orchestrator.control import events as ev
from orchestrator.control import signals as sig
from orchestrator.control.effects import Decide, Effect, Publish, Wake
from orchestrator.control.orders import Grant, StopMode
from orchestrator.control.spec import RunSpec
from orchestrator.control.world import Node, NodeState, Run, Slot, SlotState, World
from orchestrator.errors import ShareError
from orchestrator.policies.learn.fit import protect
from orchestrator.policies.plan import DeviceId, diff
from orchestrator.policies.snapshot import DeviceKind, DeviceView, Override

Effects = tuple[Effect, ...]


# Runs.


def add_run(world: World, event: ev.Event) -> None:
    """A run that the world does not know yet, as the head of its journal describes it."""
    assert isinstance(event, ev.RunBegan)
    world.runs[event.run_id] = Run(RunSpec.from_jsonable(dict(event.spec)))


def begin_run(_world: World, run: Run, event: ev.RunBegan) -> Effects:
    """The first start of a run."""
    run.start_ids.append(event.start_id)
    run.epoch_s = event.wall_s - event.t_s
    return ()


def recover(world: World, run: Run, event: ev.Recovered) -> Effects:
    """The actor was started again. Where the whole run was, its worker groups have ended, at no charge to trials."""
    run.start_ids.append(event.start_id)
    run.epoch_s = event.wall_s - event.t_s
    run.why_no_slots = ""
    run.rungs.begin_again(run.trials, is_search_new=event.are_workers_gone)
    if not event.are_workers_gone:
        return (Decide(),)
    run.is_interrupted = False
    for trial in run.trials.values():
        trial.num_restarts, trial.wanted = 0, -1
        trial.submitted_at_s, trial.charged_at_s = event.t_s, None  # the clock may have begun anew with the machine
        if trial.stop.commits:
            trial.stop = StopMode.NONE
        trial.num_workers, trial.moves_to = None, None  # slots of other sizes open only when a policy asks anew
    for slot in world.slots.values():
        _lose(world, slot, "the run was started anew", event.t_s)
        slot.state = SlotState.CLOSED
    return (Decide(), *(Publish(slot_id) for slot_id in world.slots))


def interrupt(_world: World, run: Run, _event: ev.RunInterrupted) -> Effects:
    """Nothing is assigned any more, and every report is told."""
    run.is_interrupted = True
    return tuple(Wake(trial_id) for trial_id in run.trials)


def give_up_slots(_world: World, run: Run, event: sig.SlotsGivenUp) -> Effects:
    """No slot will ever open for the run."""
    run.why_no_slots = event.reason
    return ()


# Slots.


def refuse_slot(world: World, _run: Run, event: ev.SlotChanged) -> str | None:
    """The epoch of a group that attaches is not new, or one that ends is not known."""
    slot = world.slots.get(event.slot_id)
    if event.hello is None:
        return None if slot is not None else f"there is no slot {event.slot_id!r}"
    newest = 0 if slot is None else slot.epoch
    return None if event.epoch > newest else f"epoch {event.epoch} is not above {newest}"


def change_slot(world: World, run: Run, event: ev.SlotChanged) -> Effects:
    """A worker group attached, closed or was lost; the trial that its earlier processes had goes back to the queue."""
    slot = world.slots.setdefault(event.slot_id, Slot(event.slot_id))
    carried = world.trial_in(slot)
    if event.hello is None:
        _lose(world, slot, "lost", event.t_s)
        slot.state = SlotState.LOST if event.state == SlotState.LOST else SlotState.CLOSED
    else:
        _lose(world, slot, "its worker group died", event.t_s)
        _set_devices(world, event.hello.devices)
        slot.state, slot.epoch, slot.hello = SlotState.IDLE, event.epoch, event.hello
        slot.num_workers, slot.idle_since_s = len(event.hello.placement), event.t_s
    woken: Effects = () if carried is None else (Wake(carried.trial_id), Decide())
    if run.spec.places:
        woken = (*woken, Decide())  # there is another place to choose, or one less
    return (Publish(slot.slot_id), *woken)


def refuse_poison(world: World, _run: Run, event: ev.SlotPoisoned) -> str | None:
    """The epoch is over."""
    slot = world.slots.get(event.slot_id)
    return None if slot is not None and slot.epoch == event.epoch else f"{event.slot_id} is not in epoch {event.epoch}"


def poison(world: World, _run: Run, event: ev.SlotPoisoned) -> Effects:
    """Keep the outcome for the trial until the group has restarted."""
    world.slots[event.slot_id].poison = event.outcome
    return ()


def expect_slot(world: World, _run: Run, event: sig.SlotExpected) -> Effects:
    """A slot is on its way."""
    slot = world.slots.setdefault(event.slot_id, Slot(event.slot_id))
    slot.num_workers = event.num_workers
    if not slot.is_open:
        slot.state, slot.is_closing = SlotState.OPENING, False
    return ()


def refuse_closing(world: World, _run: Run, event: sig.SlotToldToClose) -> str | None:
    """There is no such slot."""
    return None if event.slot_id in world.slots else f"there is no slot {event.slot_id!r}"


def close_when_idle(world: World, _run: Run, event: sig.SlotToldToClose) -> Effects:
    """The slot takes no more trials."""
    world.slots[event.slot_id].is_closing = True
    return (Publish(event.slot_id),)


def _lose(world: World, slot: Slot, reason: str, now_s: float) -> None:
    """The processes of a slot have ended: each trial goes on as `departures.lost` says, at no charge.

    In the journal the entry of the trial follows, with what it is charged.
    """
    for run_id, trial_id in slot.trials:
        run = world.runs[run_id]
        trial = run.trials[trial_id]
        fate = replace(departures.lost(run, slot, trial, reason, is_charged=False), t_s=now_s)
        if isinstance(fate, ev.TrialRequeued):
            trial.moves_to = None
            trial_changes.requeue(world, run, fate)
        elif isinstance(fate, ev.TrialPaused):
            trial_changes.pause(world, run, fate)
        elif isinstance(fate, ev.TrialEnded):
            trial_changes.end(world, run, fate)
    slot.poison = None


# Devices and nodes.


def refuse_node(_world: World, _run: Run, event: ev.NodeChanged) -> str | None:
    """There is no such state."""
    return None if event.state in set(NodeState) else f"{event.state!r} is no state of a node"


def change_node(world: World, _run: Run, event: ev.NodeChanged) -> Effects:
    """A node's cores count as soon as it joins, before any worker group runs there, and no more when it left."""
    state = NodeState(event.state)
    node = world.nodes.setdefault(event.node_id, Node(state))
    node.state, node.node_type = state, event.node_type or node.node_type
    if state is NodeState.LEFT:
        world.devices = {key: device for key, device in world.devices.items() if device.node_id != event.node_id}
    elif state is NodeState.JOINED and event.num_cores > 0:
        node.num_cores = event.num_cores
        device_id = DeviceId(f"cpu:{event.node_id[:8]}")
        if device_id not in world.devices:
            cores = DeviceView(device_id=device_id, node_id=event.node_id, kind=DeviceKind.CPU, units=event.num_cores)
            _set_devices(world, (cores,))
    return (Decide(),)


def _set_devices(world: World, devices: tuple[DeviceView, ...]) -> None:
    """Add devices that a worker group brought; a node may offer less than its machine has."""
    found = dict(world.devices)
    for device in devices:
        node = world.nodes.get(device.node_id)
        offered = node.num_cores if node is not None and node.num_cores else device.units
        is_less = device.kind is DeviceKind.CPU and offered < device.units
        found[device.device_id] = replace(device, units=offered) if is_less else device
    world.devices = found


# Plans and grants.


def refuse_plan(world: World, run: Run, event: ev.PlanCommitted) -> str | None:
    """The plan is not newer than the one in force, cannot be read, or gives away more than there is."""
    if event.generation <= run.plan.generation:
        return f"generation {event.generation} is not above {run.plan.generation}"
    try:
        _, plan = event.decode()
        grants.targets(run.accounts(), world.devices, plan)
    except ValueError as error:
        return f"it cannot be read: {error}"
    except ShareError as error:
        return f"it cannot be granted: {error}"
    return None


def commit(world: World, run: Run, event: ev.PlanCommitted) -> Effects:
    """Make a plan the target. What it was made from is what is known of the trials, unless they said more since."""
    snapshot, plan = event.decode()
    for view in snapshot.trials:
        run.shape_fits[view.shape] = view.fit
        trial = run.trials.get(view.trial_id)
        if trial is None:
            continue
        trial.loss = view.loss
        if trial.fit is not None and trial.fit_changed_at_s <= snapshot.now_s:
            trial.fit, trial.step_modes = view.fit, view.step_modes
    for row in diff(run.plan, plan):
        # From here and not from the acknowledgement: a policy must not turn again what is on its way.
        trial = run.trials.get(row.trial_id)
        if trial is not None and trial.account is not None:
            trial.changed_at_s, trial.measurement = snapshot.now_s, None
    run.plan, run.wishes = plan, plan.nodes or run.wishes
    run.committed_at_s[plan.generation] = event.t_s
    for trial in run.trials.values():
        trial.override = None
        wanted = plan.allocation(trial.trial_id)
        if trial.wish is not None and (wanted is None or wanted.resize_to != trial.wish[0]):
            trial.wish = None
    own = run.accounts()
    # Cores and SM groups are cut for all runs at once; what others get of them they set themselves.
    for trial_id, target in grants.targets(world.accounts(run), world.devices, event.seen_by_run()).items():
        if trial_id in own:
            own[trial_id].target = target
    return ()


def refuse_offer(world: World, run: Run, event: ev.Offered) -> str | None:
    """The trial is in no slot, or the grant would over-commit a device."""
    trial = run.trials.get(event.trial_id)
    if trial is None or trial.account is None:
        return f"{event.trial_id} is in no slot"
    if not grants.fits(world.accounts(run), world.devices, trial.trial_id, _grant(event)):
        return f"{event.trial_id} cannot have {event.settings.share:g} of its devices beside the others"
    return None


def offer(_world: World, run: Run, event: ev.Offered) -> Effects:
    """A grant counts as held from here on."""
    account = run.trials[event.trial_id].account
    assert account is not None
    account.offers += (_grant(event),)
    return ()


def refuse_ack(_world: World, run: Run, event: ev.Acknowledged) -> str | None:
    """The trial has no such offer: it ended, or this was acknowledged before."""
    trial = run.trials.get(event.trial_id)
    known = () if trial is None or trial.account is None else trial.account.offers
    is_open = any(grant.generation == event.generation for grant in known)
    return None if is_open else f"{event.trial_id} has no open offer of generation {event.generation}"


def acknowledge(_world: World, run: Run, event: ev.Acknowledged) -> Effects:
    """All ranks of a trial run with an offer; what it held before is free."""
    trial = run.trials[event.trial_id]
    assert trial.account is not None
    trial.attained_s, trial.charged_at_s = trial.attained_until(event.t_s), event.t_s
    if trial.move_s is not None:
        run.restart_s, trial.move_s = trial.move_s + event.t_s - trial.began_at_s, None
    trial.account.acknowledge(event.generation)
    trial.is_resized = False
    for dial in event.dials:
        run.changes_applied[dial] = run.changes_applied.get(dial, 0) + 1
    if event.dials:
        trial.changed_at_s = event.t_s
    if trial.override is not None and trial.override.generation < event.generation:
        trial.override = None
    return ()


def refuse_override(_world: World, run: Run, event: ev.Overridden) -> str | None:
    """The trial is in no slot, or told of it before."""
    trial = run.trials.get(event.trial_id)
    if trial is None or trial.account is None:
        return f"{event.trial_id} is in no slot"
    return None if event.number > trial.account.num_overrides else f"override {event.number} is known"


def override(_world: World, run: Run, event: ev.Overridden) -> Effects:
    """The trial protects itself inside its envelope, which never enlarges what it holds."""
    trial = run.trials[event.trial_id]
    account = trial.account
    assert account is not None
    before = event.instead_of or account.settings
    account.num_overrides = event.number
    account.override, account.override_generation = event.settings, event.generation
    trial.override = Override(
        number=event.number, generation=event.generation, settings=event.settings, reason=event.reason
    )
    trial.changed_at_s, trial.measurement = event.t_s, None
    if before is not None and event.is_lasting and trial.fit is not None:
        trial.fit, trial.fit_changed_at_s = protect(trial.fit, before, event.settings), event.t_s
    trial.story.append(f"override {event.number} at step {event.step}: {event.reason}")
    return (Decide(),)


def refuse_gain(_world: World, _run: Run, event: ev.GainRealised) -> str | None:
    """No change takes away more than everything."""
    return None if event.realised > -1 else f"a gain of {event.realised:g} is not possible"


def add_gain(_world: World, run: Run, event: ev.GainRealised) -> Effects:
    """The gain of a change is known."""
    for dial in event.dial.split("+"):
        run.gains[dial].add(event.realised)
    trial = run.trials.get(event.trial_id)
    if trial is not None and trial.measurement is not None and trial.measurement.generation == event.generation:
        trial.measurement = None
    return ()


def _grant(event: ev.Offered) -> Grant:
    return Grant(generation=event.generation, settings=event.settings, units=event.units, amount=event.amount)
