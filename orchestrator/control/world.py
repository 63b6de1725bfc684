"""Everything the control plane knows: runs with their trials, slots, devices and nodes. Values and questions only.

`transition.apply` is the only function that changes any of it; asking changes nothing. What is kept of a trial is in
`Trial`, of a slot in `Slot`. Trials are keyed by run, and a slot can hold several. No Ray, no clock, no files.

    slot:  OPENING -attach-> IDLE -assign-> RUNNING -finish-> IDLE -close-> CLOSED
                ^---- attach again (its processes died; the epoch grows) ----'   LOST: its controller died
    trial: QUEUED -assign-> RUNNING -> DONE | STOPPED | FAILED, or back to QUEUED, or PAUSED until the search goes on
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from orchestrator.control.gain import GainMean, Measurement, Pace
from orchestrator.control.grants import Account
from orchestrator.control.orders import Cause, DialReport, Outcome, Report, Resumption, SlotHello, StopMode
from orchestrator.control.ranking import Ranking
from orchestrator.control.rungs import Rungs
from orchestrator.control.spec import RunSpec
from orchestrator.control.terms import Terms
from orchestrator.policies.learn.fit import TrialFit
from orchestrator.policies.plan import EMPTY_PLAN, DeviceId, NodeWish, Plan, Settings, TrialId
from orchestrator.policies.snapshot import DeviceKind, DeviceView, Override, StepModeView
from orchestrator.share.verification import Check, Subject
from orchestrator.telemetry.window import TrialWindow

STORY_LENGTH = 20
REQUESTED = "request:"
"""How the token of a trial begins that somebody asked for: the search has no stand-in of it."""
CLONED = "request:clone:"
"""The same of a trial that begins with the state of another: it waits in no queue until it has that."""

TrialKey = tuple[str, TrialId]
"""A run, and a trial of it."""


class SlotState(StrEnum):
    """Where a slot is in its life."""

    OPENING = "opening"
    IDLE = "idle"
    RUNNING = "running"
    CLOSED = "closed"
    LOST = "lost"


class TrialState(StrEnum):
    """Where a trial is in its life."""

    QUEUED = "queued"
    RUNNING = "running"
    PAUSED = "paused"
    DONE = "done"
    STOPPED = "stopped"
    FAILED = "failed"

    @property
    def is_final(self) -> bool:
        """Whether nothing more will happen to the trial."""
        return self in {TrialState.DONE, TrialState.STOPPED, TrialState.FAILED}


class NodeState(StrEnum):
    """Where a node is in its life."""

    JOINED = "joined"
    DRAINING = "draining"
    RELEASED = "released"
    LEFT = "left"


@dataclass(slots=True)
class Node:
    """A node that was ever seen. `node_type` is one of the run file's, or empty."""

    state: NodeState
    num_cores: int = 0
    node_type: str = ""


@dataclass(slots=True)
class Slot:
    """A long-lived worker group that serves trials.

    Attributes:
        slot_id: its name.
        num_workers: ranks that it has, or will have once it is open.
        state: where it is in its life.
        epoch: number of its newest processes; messages of earlier ones are refused.
        hello: what the newest processes said of themselves, None before the first.
        trials: those that it carries now.
        is_closing: whether it was told to end.
        idle_since_s: when it last had nothing to do.
        poison: why its ranks lost each other, until the group has restarted.
    """

    slot_id: str
    num_workers: int = 1
    state: SlotState = SlotState.OPENING
    epoch: int = 0
    hello: SlotHello | None = None
    trials: tuple[TrialKey, ...] = ()
    is_closing: bool = False
    idle_since_s: float = 0.0
    poison: Outcome | None = None

    @property
    def trial_id(self) -> TrialId | None:
        """The trial that it carries; today's slots carry one at a time."""
        return self.trials[0][1] if self.trials else None

    @property
    def is_open(self) -> bool:
        """Whether it is neither closed nor lost."""
        return self.state not in {SlotState.CLOSED, SlotState.LOST}

    @property
    def cards(self) -> tuple[DeviceId, ...]:
        """The GPU of each rank; empty on cores."""
        if self.hello is None or any(device.kind is not DeviceKind.CUDA for device in self.hello.devices):
            return ()
        return self.hello.placement


@dataclass(slots=True)
class Trial:
    """One trial of a run and all that is known of it.

    Attributes:
        run_id, trial_id: whose it is, and its name.
        index: its number in the search.
        params: its parameters, those of the run included.
        state: where it is in its life.
        attempt: number of the attempt that runs, or runs next.
        slot_id: the slot that it is in.
        reason: why it ended.
        story: the last things that happened to it, for people.
        num_restarts: slots that died under it.
        num_overflows: how often it ran out of memory since its last report.
        is_suspect: whether it ran when its GPU failed; it runs alone from then on.
        stop: how it was told to leave its slot.
        began_at_s, queued_at_s: when the attempt began, and when the trial last came into the queue.
        submitted_at_s: when the search first wanted it.
        attained_s: device-seconds that it has had, up to `charged_at_s`; None there while it is in no slot.
        move_s: seconds that leaving its last slot for the policy took, until it has begun again.
        step, num_samples, checkpoint: how far it had come by its last report or end, and from where it resumes.
        reports: all of them, oldest first.
        credit: it may make reports with an index below this.
        wanted: index of the report that the search asks for; infinite once it has no further use for the trial.
        report_began_s: since when it trains towards its next report.
        token: names the newest life of the search's stand-in.
        next: what the search asked to go on with once the trial has left its slot.
        num_workers: ranks that its slot must have, None where any will do.
        size: ranks that its last slot had.
        wish: another number of ranks that the plan in force wants, and since when.
        moves_to: that number once the trial was told to leave for it.
        left_at_s: when it was told so, or to leave for the policy.
        onward: dials with which it goes on there.
        is_resized: whether the attempt is the first with another number of ranks and has acknowledged nothing yet.
        refused: numbers of ranks that could not be had, each with the time until which they are not tried again.
        resume: dials with which it begins again after it ran out of memory.
        precision_off: why its precision dial is off for good: what its function raised in a cheaper tier.
        allows: what its training said that it allows of its dials, None where that is all.
        account: what it may use of its devices, None in no slot.
        window: telemetry of the attempt, None in no slot.
        fit: what is learned of the attempt, None in no slot.
        kept_fit: what was learned, while the trial is between two slots of different sizes.
        step_modes: how its steps are executed, where it measured both ways.
        override: its protective move since the plan in force.
        fit_changed_at_s: when that last changed by anything else than steps.
        changed_at_s: when its settings last changed.
        loss: the training loss that was seen last, in whichever attempt.
        pace: its pace before it left for another slot, and the gain that was predicted.
        measurement: the change of dials whose gain is being measured.
        checks: the newest check of each kind of its share.
        own_terms: terms by name that were set for it alone.
        is_held: whether somebody paused it; it is in no slot until they resume it.
        cause: why it failed, where the reason lies outside of it.
        notes: what is amiss with it now, or was in this attempt, by kind: damage, room, silence.
    """

    run_id: str
    trial_id: TrialId
    index: int
    params: dict[str, Any]
    state: TrialState = TrialState.QUEUED
    attempt: int = 0
    slot_id: str | None = None
    reason: str = ""
    story: deque[str] = field(default_factory=lambda: deque(maxlen=STORY_LENGTH))
    num_restarts: int = 0
    num_overflows: int = 0
    is_suspect: bool = False
    stop: StopMode = StopMode.NONE
    began_at_s: float = 0.0
    queued_at_s: float = 0.0
    submitted_at_s: float = 0.0
    attained_s: float = 0.0
    charged_at_s: float | None = None
    move_s: float | None = None
    step: int = 0
    num_samples: int = 0
    checkpoint: str | None = None
    reports: list[Report] = field(default_factory=list)
    credit: int = 0
    wanted: float = -1
    report_began_s: float | None = None
    token: str = ""
    next: tuple[dict[str, Any], Resumption] | None = None
    num_workers: int | None = None
    size: int = 0
    wish: tuple[int, float] | None = None
    moves_to: int | None = None
    left_at_s: float | None = None
    onward: Settings | None = None
    is_resized: bool = False
    refused: dict[int, float] = field(default_factory=dict)
    resume: Settings | None = None
    precision_off: str = ""
    allows: DialReport | None = None
    account: Account | None = None
    window: TrialWindow | None = None
    fit: TrialFit | None = None
    fit_changed_at_s: float = 0.0
    kept_fit: TrialFit | None = None
    step_modes: tuple[StepModeView, ...] = ()
    override: Override | None = None
    changed_at_s: float = 0.0
    loss: float | None = None
    pace: tuple[Pace, float | None] | None = None
    measurement: Measurement | None = None
    checks: dict[Subject, Check] = field(default_factory=dict)
    own_terms: dict[str, Any] = field(default_factory=dict)
    is_held: bool = False
    cause: Cause = Cause.OWN
    notes: dict[str, str] = field(default_factory=dict)

    @property
    def key(self) -> TrialKey:
        """Run and trial."""
        return self.run_id, self.trial_id

    @property
    def has_stand_in(self) -> bool:
        """Whether the search knows it, and judges it."""
        return not self.token.startswith(REQUESTED)

    @property
    def off(self) -> dict[str, str]:
        """Name of each dial that its training does not have, and why."""
        return {} if self.allows is None else dict(self.allows.off)

    @property
    def start(self) -> Settings | None:
        """The dials that its training has of its own; None where they are those of the run file."""
        return None if self.allows is None else self.allows.start

    @property
    def is_leaving(self) -> bool:
        """Whether it will make no further report in this attempt, or is in none that could."""
        return self.stop is not StopMode.NONE or self.state.is_final or self.state is TrialState.PAUSED

    def attained_until(self, now_s: float) -> float:
        """Device-seconds that it has had: share times ranks times seconds, as acknowledged."""
        if self.charged_at_s is None or self.account is None or self.account.applied is None:
            return self.attained_s
        devices = self.account.applied.settings.share * len(self.account.placement)
        return self.attained_s + devices * max(0.0, now_s - self.charged_at_s)

    def is_given_up_for(self, wanted: Resumption) -> bool:
        """Whether the state to go on with is not the trial's own newest, however much newer that is."""
        if wanted.origin is None:
            return False
        return wanted.origin != self.trial_id or wanted.num_reports > len(self.reports)


class Run:
    """One run of a search.

    Attributes:
        spec: what the controller must know of it.
        trials: all that the search ever submitted, in that order.
        queue: those that wait for a slot, next first.
        plan: the plan in force.
        wishes: the last wish for nodes of each type; empty where none was made.
        shape_fits: the newest fit of each shape, for trials yet to come.
        ranking: where trials stand in the search.
        rungs: reports that wait to be told to the search.
        committed_at_s: when each plan was committed, by generation.
        changes_applied: acknowledged changes per dial.
        gains: typical realised gain per dial.
        restart_s: seconds that the last move of a trial to another slot cost it, None before the first.
        start_ids: the starts of the run so far.
        requests: the trial that each request was about, by the request's id; empty for the run.
        terms: whose it is, how much it counts, and what it was promised.
        epoch_s: seconds since 1970 at which the monotonic clock of this start of the run was 0.
        is_interrupted: whether its trials were told to commit and leave, and nothing is assigned any more.
        why_no_slots: why no slot will ever open for it; empty while one may.
    """

    def __init__(self, spec: RunSpec) -> None:
        self.spec = spec
        self.trials: dict[TrialId, Trial] = {}
        self.queue: list[TrialId] = []
        self.plan: Plan = EMPTY_PLAN
        self.wishes: tuple[NodeWish, ...] = ()
        self.shape_fits: dict[str, TrialFit] = {}
        self.ranking = Ranking(spec)
        self.rungs = Rungs(spec.stop_rule, spec.max_reports)
        self.committed_at_s: dict[int, float] = {}
        self.changes_applied: dict[str, int] = dict.fromkeys(("share", "batch", "precision"), 0)
        self.gains: defaultdict[str, GainMean] = defaultdict(GainMean)
        self.restart_s: float | None = None
        self.start_ids: list[str] = []
        self.requests: dict[str, str] = {}
        self.terms: Terms = spec.terms
        self.epoch_s = 0.0
        self.is_interrupted = False
        self.why_no_slots = ""

    def running(self) -> list[Trial]:
        """Trials in a slot, by id."""
        return sorted((t for t in self.trials.values() if t.state is TrialState.RUNNING), key=lambda t: t.trial_id)

    def waiting(self) -> list[Trial]:
        """Trials in the queue, next first."""
        return [self.trials[trial_id] for trial_id in self.queue]

    def accounts(self) -> dict[TrialId, Account]:
        """The accounts of the trials in a slot."""
        return {key: trial.account for key, trial in self.trials.items() if trial.account is not None}

    def terms_of(self, trial: Trial) -> Terms:
        """The terms of the run, with those that were set for the trial alone."""
        return self.terms.changed(trial.own_terms)

    def left_s(self, trial: Trial, now_s: float) -> float | None:
        """Seconds of steps that a running trial has left until its next report, at the pace that was seen."""
        seen = None if trial.window is None else trial.window.view(now_s)
        if seen is None or not seen.throughput_per_s:
            return None
        due = (len(trial.reports) + 1) * self.spec.samples_per_report
        return max(0, due - seen.num_samples) / seen.throughput_per_s


class World:
    """All runs of a journal, and the slots, devices and nodes that they share.

    `neighbours` are the worlds of other runs under the same policy, by the prefix of their trials: they have journals
    of their own, and hold parts of the same devices.
    """

    def __init__(self, specs: tuple[RunSpec, ...] = ()) -> None:
        self.runs: dict[str, Run] = {spec.run_id: Run(spec) for spec in specs}
        self.slots: dict[str, Slot] = {}
        self.devices: Mapping[DeviceId, DeviceView] = {}
        self.nodes: dict[str, Node] = {}
        self.neighbours: dict[str, World] = {}

    def __getstate__(self) -> dict[str, Any]:
        """What a snapshot on disk holds; the worlds of other runs have their own."""
        return {**self.__dict__, "neighbours": {}}

    def accounts(self, run: Run) -> dict[TrialId, Account]:
        """Who holds what on the devices of a run: its own trials, and under prefixed names those of other runs."""
        found = run.accounts()
        for prefix, world in self.neighbours.items():
            for other in world.runs.values():
                found |= {TrialId(f"{prefix}{key}"): account for key, account in other.accounts().items()}
        return found

    def trial_in(self, slot: Slot) -> Trial | None:
        """The trial that a slot carries."""
        if not slot.trials:
            return None
        run_id, trial_id = slot.trials[0]
        return self.runs[run_id].trials[trial_id]

    def slot_of(self, trial: Trial) -> Slot | None:
        """The slot that carries a trial."""
        return None if trial.slot_id is None else self.slots.get(trial.slot_id)

    def open_slots(self) -> list[Slot]:
        """Slots that are not closed or lost."""
        return [slot for slot in self.slots.values() if slot.is_open]

    def slots_on(self, node_id: str) -> list[Slot]:
        """Open slots with a rank on that node."""
        return [
            slot
            for slot in self.open_slots()
            if slot.hello is not None and any(device.node_id == node_id for device in slot.hello.devices)
        ]

    def attempt_in(self, slot_id: str, epoch: int, attempt: tuple[TrialId, int]) -> Trial | None:
        """The trial that a message of a slot's processes speaks for; None where that epoch or attempt is over."""
        slot = self.slots.get(slot_id)
        trial = None if slot is None or slot.epoch != epoch else self.trial_in(slot)
        return trial if trial is not None and (trial.trial_id, trial.attempt) == attempt else None
