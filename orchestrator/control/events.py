"""Every entry of the journal as one frozen, typed class: with `fault_events` the only place where its words stand.

An event says what happened, in the past tense, with all that is needed to repeat it. The controller writes events, and
`recovery`, `verify`, `explain`, the tables and the simulator's replay read the same classes. Knows of no files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

from orchestrator.control.joint import parts_of
from orchestrator.control.orders import Outcome, Report, Resumption, SlotHello
from orchestrator.policies.codec import plan_from, snapshot_from, to_jsonable
from orchestrator.policies.plan import DeviceId, Generation, Plan, Settings, TrialId
from orchestrator.policies.snapshot import DialLimits, Snapshot

SCHEMA_VERSION = 2
"""Version of the entries that are written; older ones are read, newer ones are refused."""
SPARE_REASON = "fair shares while the policy is refused"
"""How the reason of a plan begins that stands in for a refused policy; a replay decides it with `FairShare`."""
IN_JOURNAL = "in the journal"
"""Key of a field's metadata: RAW (JSON values already), LEFT_OUT (not written), SPARSE (not while at its default)."""
RAW, LEFT_OUT, SPARSE = "raw", "left out", "sparse"


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """What every entry has.

    Attributes:
        seq: its number in the journal, from 1 without gaps; 0 before it was written.
        t_s: when it happened, in seconds of the monotonic clock of the actor's node.
        wall_s: the same in seconds since 1970, for people.
        run_id: the run; the head of a journal says it for all entries.
    """

    kind: ClassVar[str]
    seq: int = 0
    t_s: float = 0.0
    wall_s: float = 0.0
    run_id: str = field(default="", metadata={IN_JOURNAL: LEFT_OUT})


@dataclass(frozen=True, slots=True, kw_only=True)
class RunBegan(Event):
    """The head of a journal: what the run is. `start_id` names the start of the run that wrote it."""

    kind: ClassVar[str] = "run"
    schema: int
    run_id: str
    start_id: str = ""
    spec: Mapping[str, Any] = field(metadata={IN_JOURNAL: RAW})

    @property
    def policy(self) -> str:
        """Name of the run's policy."""
        return str(self.spec["policy"])

    @property
    def policy_params(self) -> Mapping[str, Any]:
        """Parameters of the run's policy."""
        return dict(self.spec.get("policy_params") or {})


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovered(Event):
    """The actor was started again; with `are_workers_gone` the whole run was, and its worker groups had ended.

    `schema` is that of the entries from here on; journals of schema 1 do not say it.
    """

    kind: ClassVar[str] = "recovered"
    start_id: str = ""
    are_workers_gone: bool
    schema: int = field(default=1, metadata={IN_JOURNAL: SPARSE})


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotChanged(Event):
    """A worker group attached (`hello` is what it said of itself), closed or was lost."""

    kind: ClassVar[str] = "slot"
    slot_id: str
    state: str
    epoch: int
    hello: SlotHello | None = None

    @property
    def placement(self) -> tuple[DeviceId, ...]:
        """The device of each rank of a group that attached; empty for one that ended."""
        return () if self.hello is None else self.hello.placement


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeChanged(Event):
    """A node joined, drains, is released by the policy, or left. `num_cores` is what it offers to trials."""

    kind: ClassVar[str] = "node"
    node_id: str
    state: str
    num_cores: int
    node_type: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialQueued(Event):
    """The search submitted a trial; `token` names the life of its stand-in there."""

    kind: ClassVar[str] = "trial_queued"
    trial_id: TrialId
    params: Mapping[str, Any]
    token: str = field(default="", metadata={IN_JOURNAL: SPARSE})


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialAssigned(Event):
    """An attempt of a trial began in a slot."""

    kind: ClassVar[str] = "trial_assigned"
    trial_id: TrialId
    attempt: int
    slot_id: str
    epoch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialToldToStop(Event):
    """A trial was told to leave its slot; `num_workers` is the size of the group that it leaves for, with `resize`."""

    kind: ClassVar[str] = "trial_stop"
    trial_id: TrialId
    mode: str
    num_workers: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialRequeued(Event):
    """An attempt ended before the trial did.

    Attributes:
        attempt: number of the next one.
        num_restarts: slots that died under the trial so far.
        checkpoint: from which it resumes, None for the beginning.
        num_overflows: times that it ran out of memory since its last report.
        resume: dials with which it begins again after that.
        num_workers: size of the slot that it needs, None for any.
        onward: dials with which it goes on in a slot of another size.
        step, num_samples: how far it has come; None in journals of schema 1.
        precision_off: why its precision dial is off from here on: what its function raised in a cheaper tier.
    """

    kind: ClassVar[str] = "trial_requeued"
    trial_id: TrialId
    attempt: int
    num_restarts: int = 0
    checkpoint: str | None = None
    reason: str
    num_overflows: int = 0
    resume: Settings | None = None
    num_workers: int | None = None
    onward: Settings | None = None
    step: int | None = field(default=None, metadata={IN_JOURNAL: SPARSE})
    num_samples: int | None = field(default=None, metadata={IN_JOURNAL: SPARSE})
    precision_off: str = field(default="", metadata={IN_JOURNAL: SPARSE})


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialResized(Event):
    """What became of a wish for `num_workers` ranks: `stage` is wanted, done or given_up.

    `restart_s` is what the last move of any trial cost it, None before the first.
    """

    kind: ClassVar[str] = "trial_resize"
    trial_id: TrialId
    attempt: int = 0
    stage: str
    num_workers: int
    reason: str
    restart_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialPaused(Event):
    """The search put a trial aside; it has committed and is in no slot and no queue."""

    kind: ClassVar[str] = "trial_paused"
    trial_id: TrialId
    attempt: int
    reason: str
    checkpoint: str | None = None
    step: int = 0
    num_samples: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ResumptionWanted(Event):
    """The search wants a known trial to go on, once it has left its slot; `resumption` says where, as it was asked."""

    kind: ClassVar[str] = "trial_wanted"
    trial_id: TrialId
    params: Mapping[str, Any]
    resumption: Resumption


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialContinued(Event):
    """A trial goes on: at its own end, or (`origin`) behind report `num_reports` of another trial."""

    kind: ClassVar[str] = "trial_continued"
    trial_id: TrialId
    attempt: int
    params: Mapping[str, Any]
    origin: TrialId | None
    num_reports: int
    checkpoint: str | None = None
    step: int = 0
    num_samples: int = 0
    token: str = field(default="", metadata={IN_JOURNAL: SPARSE})


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialEnded(Event):
    """Nothing more happens to a trial; `cause` as in `orders.Cause`."""

    kind: ClassVar[str] = "trial_ended"
    trial_id: TrialId
    state: str
    reason: str
    step: int
    num_samples: int
    cause: str = field(default="", metadata={IN_JOURNAL: SPARSE})


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanCommitted(Event):
    """A decision and what it was made from, as JSON values; of several runs, whose trials then have prefixes."""

    kind: ClassVar[str] = "plan"
    generation: Generation
    snapshot: Mapping[str, Any] = field(metadata={IN_JOURNAL: RAW})
    plan: Mapping[str, Any] = field(metadata={IN_JOURNAL: RAW})
    prefix: str = field(default="", metadata={IN_JOURNAL: SPARSE})
    decoded: tuple[Snapshot, Plan, Plan] | None = field(
        default=None, compare=False, repr=False, metadata={IN_JOURNAL: LEFT_OUT}
    )

    @classmethod
    def of(cls, snapshot: Snapshot, plan: Plan) -> PlanCommitted:
        """The entry of a decision that was just taken."""
        encoded, values = (to_jsonable(snapshot), to_jsonable(plan)), (snapshot, plan, plan)
        return cls(generation=plan.generation, snapshot=encoded[0], plan=encoded[1], decoded=values)

    def decode(self) -> tuple[Snapshot, Plan]:
        """The decision as values, of several runs this run's part; `ValueError` where it cannot be read."""
        return self._values()[:2]

    def seen_by_run(self) -> Plan:
        """The whole plan, in which this run's trials have their own names."""
        return self._values()[2]

    def _values(self) -> tuple[Snapshot, Plan, Plan]:
        found = self.decoded or parts_of(snapshot_from(self.snapshot), plan_from(self.plan), self.prefix)
        object.__setattr__(self, "decoded", found)  # once: it takes milliseconds
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRefused(Event):
    """A decision was not taken; `generation` is that of the plan in force."""

    kind: ClassVar[str] = "refusal"
    generation: Generation
    reason: str
    violations: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Offered(Event):
    """A trial was granted an allocation: `units` of each rank's device, `amount` of them in use."""

    kind: ClassVar[str] = "offer"
    generation: Generation
    trial_id: TrialId
    settings: Settings
    units: tuple[tuple[int, ...], ...]
    amount: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Acknowledged(Event):
    """All ranks of a trial run with an allocation since `step`, `ack_s` seconds after its plan was committed."""

    kind: ClassVar[str] = "ack"
    generation: Generation
    trial_id: TrialId
    attempt: int
    step: int
    settings: Settings
    ack_s: float
    switch_s: float
    dials: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class DialsDeclared(Event):
    """A training said what it allows of its dials; fields as in `orders.DialReport`."""

    kind: ClassVar[str] = "dials"
    trial_id: TrialId
    step: int
    start: Settings
    limits: DialLimits
    off: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Overridden(Event):
    """A trial protected itself inside its envelope; fields as in `orders.OverrideReport`."""

    kind: ClassVar[str] = "override"
    trial_id: TrialId
    generation: Generation
    number: int
    settings: Settings
    step: int = 0
    reason: str
    instead_of: Settings | None = None
    is_lasting: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Reported(Event):
    """A trial reported to the search, after evaluation and commit; a metric that is not finite is None."""

    kind: ClassVar[str] = "result"
    trial_id: TrialId
    index: int
    step: int
    num_samples: int
    metrics: Mapping[str, float | None]
    checkpoint: str | None = None

    @classmethod
    def of(cls, trial_id: TrialId, report: Report) -> Reported:
        """The entry of a report."""
        metrics = {key: value if math.isfinite(value) else None for key, value in report.metrics.items()}
        return cls(trial_id=trial_id, **{**asdict(report), "metrics": metrics})

    @property
    def report(self) -> Report:
        """The report; a metric that was not finite is NaN."""
        return Report(
            index=self.index,
            step=self.step,
            num_samples=self.num_samples,
            metrics={key: float("nan") if value is None else value for key, value in self.metrics.items()},
            checkpoint=self.checkpoint,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class CommitPinned(Event):
    """The checkpoint behind a report is kept, under a name of its own, for as long as the search may want it."""

    kind: ClassVar[str] = "trial_pinned"
    trial_id: TrialId
    index: int
    checkpoint: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialSuspected(Event):
    """A GPU failed under a trial; whose fault that was is not known, so the trial runs alone from then on."""

    kind: ClassVar[str] = "trial_suspected"
    trial_id: TrialId
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotPoisoned(Event):
    """The ranks of a slot lost each other over one rank's outcome: it decides about the trial when they restart."""

    kind: ClassVar[str] = "slot_poisoned"
    slot_id: str
    epoch: int
    outcome: Outcome


@dataclass(frozen=True, slots=True, kw_only=True)
class RunInterrupted(Event):
    """All trials were told to commit and leave, and no trial is assigned any more until the run is started anew."""

    kind: ClassVar[str] = "run_interrupted"


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportTold(Event):
    """The search was told of a report at a rung, after `held_s` and behind `place` others that waited with it."""

    kind: ClassVar[str] = "told"
    trial_id: TrialId
    index: int
    place: int = 0
    held_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ShareChecked(Event):
    """What was seen of a trial's share under an allocation; `verdict` is held or not held."""

    kind: ClassVar[str] = "check"
    generation: Generation
    trial_id: TrialId
    what: str
    expected: float | None = None
    observed: float | None = None
    unit: str = ""
    verdict: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class GainRealised(Event):
    """What a change of dials brought a trial: goodput after over before, minus one.

    `before` and `after` hold throughput (samples/s), efficiency and goodput, as measured; empty in older journals.
    """

    kind: ClassVar[str] = "gain"
    generation: Generation
    trial_id: TrialId
    dial: str
    predicted: float | None
    realised: float
    before: Mapping[str, float] = field(default_factory=dict)
    after: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunEnded(Event):
    """The driver's last word: how the run ended, and how many processes, actors and placement groups it left behind."""

    kind: ClassVar[str] = "run_ended"
    state: str
    leaks: Mapping[str, int]
