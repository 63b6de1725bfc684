"""The state of a run inside the policy actor, shared by the parts that change it.

One object, owned by one event loop: the controller takes events in, the decider makes plans, status reads. Every change
that must survive a crash goes through `log`, which is the journal.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import fields, replace

from orchestrator.clock import Clock
from orchestrator.control.events import DialsDeclared, Event, ReportTold, TrialEnded
from orchestrator.control.gain import GainMean, GainMeter, Pace
from orchestrator.control.journal import Journal
from orchestrator.control.ledger import Ledger
from orchestrator.control.lifecycle import Lifecycle, Slot, SlotState, Trial
from orchestrator.control.orders import DialReport, Report, SlotOp, SlotOrder
from orchestrator.control.ranking import Ranking
from orchestrator.control.spec import RunSpec
from orchestrator.control.telling import Telling
from orchestrator.policies.learn.fit import NOTHING_FITTED, TrialFit, capped, inherit
from orchestrator.policies.plan import EMPTY_PLAN, DeviceId, NodeWish, Plan, TrialId
from orchestrator.policies.snapshot import DeviceKind, DeviceView, Override, StepModeView
from orchestrator.share.verification import Check, Subject
from orchestrator.telemetry.window import TrialWindow


class RunState:
    """Everything the actor knows of one run.

    Attributes:
        plan: the plan in force.
        nodes: nodes of the cluster ever seen, and the state of each.
        node_cores: cores that each of them offers to trials, where it offers any.
        node_types: the type of each of them that is of one of the run file's.
        wishes: the last wish for nodes of each type; empty where none was made.
        windows: telemetry of the running trials.
        fits: what is learned of the running trials.
        shape_fits: the newest fit of each shape, for trials yet to come.
        overrides: protective moves since the plan in force.
        changed_at_s: when each trial's settings last changed.
        orders: the newest order of each slot.
        changes_applied: acknowledged changes per dial.
        gains: typical realised gain per dial.
        restart_s: seconds that the last move of a trial to a group of another size cost it, None before the first.
        kept_fits: what is learned of trials that are between two groups.
        step_modes: how the steps of each running trial are executed, where it measured both ways.
        checks: the newest check of each kind of every running trial's share.
        ranking: where trials stand in the search.
        telling: reports that wait to be told to the search.
        paces: of trials that leave for another group: their pace, and the gain that the move was predicted to bring.
    """

    def __init__(self, spec: RunSpec, clock: Clock, journal: Journal, incarnation: str) -> None:
        self.spec, self.clock, self.journal = spec, clock, journal
        self.incarnation = incarnation
        self.lifecycle = Lifecycle(
            spec.restart_budget, num_workers=spec.start.num_workers, max_running=spec.max_running
        )
        self.ledger = Ledger()
        self.ranking = Ranking(spec)
        self.telling = Telling(spec.stop_rule, spec.max_reports, self.lifecycle.trials, self.ranking, self.left_s)
        self.plan: Plan = EMPTY_PLAN
        self.devices: dict[DeviceId, DeviceView] = {}
        self.nodes: dict[str, str] = {}
        self.node_cores: dict[str, int] = {}
        self.node_types: dict[str, str] = {}
        self.wishes: tuple[NodeWish, ...] = ()
        self.windows: dict[TrialId, TrialWindow] = {}
        self.fits: dict[TrialId, TrialFit] = {}
        self.shape_fits: dict[str, TrialFit] = {}
        self.overrides: dict[TrialId, Override] = {}
        self.changed_at_s: dict[TrialId, float] = {}
        self.meter = GainMeter()
        self.orders: dict[str, SlotOrder] = {}
        self.changes_applied: dict[str, int] = dict.fromkeys(("share", "batch", "precision"), 0)
        self.gains: dict[str, GainMean] = defaultdict(GainMean)
        self.restart_s: float | None = None
        self.kept_fits: dict[TrialId, TrialFit] = {}
        self.paces: dict[TrialId, tuple[Pace, float | None]] = {}
        self.step_modes: dict[TrialId, tuple[StepModeView, ...]] = {}
        self.checks: dict[TrialId, dict[Subject, Check]] = {}
        self.committed_at_s: dict[int, float] = {}
        self.changed_slots: set[str] = set()
        self.changed_trials: set[TrialId] = set()
        self.wants_decision = False

    def log(self, event: Event) -> None:
        """Append an event to the journal; durable after `journal.sync()`."""
        self.journal.append(replace(event, t_s=self.clock.now_s(), wall_s=self.clock.wall_s()))

    def log_ended(self, trial: Trial) -> None:
        """Journal that nothing more will happen to a trial."""
        self.log(
            TrialEnded(
                trial_id=trial.trial_id,
                state=trial.state.value,
                reason=trial.reason,
                step=trial.step,
                num_samples=trial.num_samples,
            )
        )
        self.journal.sync()
        self.changed_trials.add(trial.trial_id)

    def take_report(self, trial: Trial, report: Report) -> bool:
        """Take the trial's next report; False for one already taken.

        Raises:
            ValueError: a report is missing in between.
        """
        is_new = self.lifecycle.add_report(trial, report)
        if is_new:
            self.ranking.take(trial)
        return is_new

    def may_tell(self, trial: Trial, index: int) -> bool:
        """Whether the search is told of a report now; it may have to wait for those of other trials."""
        told = self.telling.tell(trial, index, self.clock.now_s())
        if told is not None and told.is_judged:
            self.log(ReportTold(trial_id=trial.trial_id, index=index, place=told.place, held_s=told.held_s))
            trial.story.append(f"report {index} told after {told.held_s:.1f} s, behind {told.place} others at its rung")
        return told is not None

    def left_s(self, trial: Trial) -> float | None:
        """Seconds of steps that a running trial has left until its next report, at the pace that was seen."""
        window = self.windows.get(trial.trial_id)
        seen = None if window is None else window.view(self.clock.now_s())
        if seen is None or not seen.throughput_per_s:
            return None
        due = (len(trial.reports) + 1) * self.spec.samples_per_report
        return max(0, due - seen.num_samples) / seen.throughput_per_s

    def set_devices(self, devices: tuple[DeviceView, ...]) -> None:
        """Add devices that a worker group brought."""
        for device in devices:
            offered = self.node_cores.get(device.node_id, device.units)  # a node may offer less than its machine has
            is_less = device.kind is DeviceKind.CPU and offered < device.units
            self.devices[device.device_id] = replace(device, units=offered) if is_less else device
        self.ledger.set_devices(tuple(self.devices.values()))

    def drop_devices(self, node_id: str) -> None:
        """Forget the devices of a node that is gone."""
        self.devices = {key: device for key, device in self.devices.items() if device.node_id != node_id}
        self.ledger.set_devices(tuple(self.devices.values()))

    def begin_trial(self, trial: Trial, slot: Slot) -> None:
        """Open the accounts of a trial that was assigned to a slot."""
        assert slot.hello is not None
        now_s, num_workers = self.clock.now_s(), len(slot.hello.placement)
        shape = self.spec.shape(trial.params)
        trial.began_at_s = now_s
        self.telling.began(trial.trial_id, now_s)
        trial.is_resized = trial.num_workers is not None and trial.size not in {0, num_workers}
        trial.size, trial.wish = num_workers, None
        self._forget_grant(trial)
        self.ledger.open_line(trial.trial_id, slot.hello.placement)
        known = [self.devices[each].kind for each in slot.hello.placement if each in self.devices]
        self.windows[trial.trial_id] = TrialWindow(
            stale_after_s=self.spec.stale_after_s,
            num_workers=num_workers,
            computes_on_cpu=bool(known) and all(kind is DeviceKind.CPU for kind in known),
        )
        fit = self.kept_fits.pop(trial.trial_id, None) or inherit(self.shape_fits.get(shape, NOTHING_FITTED))
        # A micro-batch that overflowed is not the first to be tried again.
        self.fits[trial.trial_id] = fit if trial.resume is None else capped(fit, trial.resume.micro_batch)
        if trial.resume is not None and self.plan.allocation(trial.trial_id) is not None:
            # The plan in force still has what did not fit.
            self.overrides[trial.trial_id] = Override(
                number=0,
                generation=self.plan.generation,
                settings=trial.resume,
                reason="ran out of memory in the attempt before",
            )
        self.changed_at_s[trial.trial_id] = now_s
        self.changed_trials.add(trial.trial_id)
        self.wants_decision = True

    def _forget_grant(self, trial: Trial) -> None:
        """What the plan in force grants a group of another size is nothing to a trial that begins: it is new to it."""
        row = self.plan.allocation(trial.trial_id)
        if row is not None and row.settings.num_workers != trial.size:
            rest = tuple(a for a in self.plan.allocations if a.trial_id != trial.trial_id)
            self.plan = replace(self.plan, allocations=rest)

    def end_trial(self, trial_id: TrialId) -> None:
        """Close the accounts of a trial whose processes use nothing any more."""
        self.ledger.close_line(trial_id)
        self.meter.forget(trial_id)
        for table in (self.windows, self.fits, self.overrides, self.changed_at_s, self.checks, self.step_modes):
            table.pop(trial_id, None)
        self.changed_trials.add(trial_id)
        self.wants_decision = True

    def note_dials(self, trial: Trial, report: DialReport) -> None:
        """A training said what it allows of its dials: later plans keep to that."""
        if trial.allows == report:
            return
        trial.allows = report
        trial.story.append(f"at step {report.step} these dials are off: {', '.join(sorted(report.off)) or 'none'}")
        self.log(DialsDeclared(trial_id=trial.trial_id, **{f.name: getattr(report, f.name) for f in fields(report)}))
        self.changed_trials.add(trial.trial_id)
        self.wants_decision = True

    def note_mode(self, trial_id: TrialId, found: StepModeView) -> None:
        """A trial measured which step mode is the faster with some dials."""
        modes = {_dials(mode): mode for mode in (*self.step_modes.get(trial_id, ()), found)}
        self.step_modes[trial_id] = tuple(modes[dials] for dials in sorted(modes))

    def publish(self, slot: Slot, order: SlotOrder) -> None:
        """Make `order` the slot's newest, numbered after the last one."""
        self.orders[slot.slot_id] = order
        self.changed_slots.add(slot.slot_id)

    def next_seq(self, slot: Slot) -> int:
        """Number for the slot's next order; unique over restarts of the actor through the incarnation."""
        last = self.orders.get(slot.slot_id)
        return 1 if last is None else last.seq + 1

    def idle_order(self, slot: Slot) -> SlotOrder:
        """What a slot without a trial shall do."""
        op = SlotOp.CLOSE if slot.is_closing else SlotOp.IDLE
        return SlotOrder(incarnation=self.incarnation, seq=self.next_seq(slot), op=op)

    def slot_of(self, trial: Trial) -> Slot | None:
        """The slot that carries the trial."""
        return None if trial.slot_id is None else self.lifecycle.slots.get(trial.slot_id)

    def open_slots(self) -> list[Slot]:
        """Slots that are not closed or lost."""
        gone = {SlotState.CLOSED, SlotState.LOST}
        return [slot for slot in self.lifecycle.slots.values() if slot.state not in gone]


def _dials(mode: StepModeView) -> tuple[str, int, int]:
    return mode.tier.value, mode.micro_batch, mode.grad_accum
