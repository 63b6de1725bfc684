"""The messages between the policy actor and the worker groups: plain frozen values, no Ray.

Orders are states, not events: a worker that missed ten of them and reads the eleventh knows all it needs. What workers
send back is idempotent: acknowledged by (trial, attempt, number), so a resend after a lost answer does no harm.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

from orchestrator.policies.learn.tier_fit import TierFit
from orchestrator.policies.plan import DeviceId, Settings, TrialId
from orchestrator.policies.snapshot import DeviceView, DialLimits, StepModeView
from orchestrator.policies.tier import Tier


class SlotOp(StrEnum):
    """What a slot shall do now."""

    IDLE = "idle"
    RUN = "run"
    CLOSE = "close"


class StopMode(StrEnum):
    """How a trial shall leave its slot."""

    NONE = "none"
    DISCARD = "discard"  # the search has no further use for it
    CHECKPOINT = "checkpoint"  # commit first: the run is interrupted and will be resumed
    PAUSE = "pause"  # commit first: the search may want it to go on later
    RESIZE = "resize"  # commit first: a worker group of another size is ready for it
    MOVE = "move"  # commit first: the plan has no devices for it, or others

    @property
    def commits(self) -> bool:
        """Whether the trial writes a checkpoint before it leaves."""
        return self not in {StopMode.NONE, StopMode.DISCARD}


class Status(StrEnum):
    """How a trial left its slot, as the worker group saw it."""

    DONE = "done"
    STOPPED = "stopped"
    INTERRUPTED = "interrupted"
    MEMORY = "memory"  # it ran out of memory and begins again from its last commit
    TIER = "tier"  # its code raised in a cheaper tier: it begins again from its last commit, in the start tier for good
    FAILED = "failed"
    LOST = "lost"  # another rank was gone when this one raised: the group begins again, and the trial with it


@dataclass(frozen=True, slots=True, kw_only=True)
class Grant:
    """An allocation as offered to the ranks of a trial.

    Attributes:
        generation: of the plan it belongs to.
        settings: the dials.
        units: for each rank, the numbers of the device units it may use (cores, SM groups).
        amount: how many units' worth each rank may use, e.g. 0.5 cores.
    """

    generation: int
    settings: Settings
    units: tuple[tuple[int, ...], ...]
    amount: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialOrder:
    """Everything a worker group needs to run one attempt of a trial.

    Attributes:
        trial_id: the trial.
        attempt: 0 for the first; later ones resume from the last commit.
        seed: of model initialisation and sampling.
        job: a key of `jobs.JOBS`, or the import path of a user's training.
        params: its parameters, those of the search included.
        start: the user's settings; `start.global_batch` is the base of the learning-rate rule.
        limits: the envelope of safety overrides.
        samples_per_report: samples between two reports to the search.
        max_reports: reports after which the trial is done.
        directory: the trial's own directory (log, checkpoints).
        resume_from: a committed checkpoint, or None.
        num_reports_done: reports that were already taken before this attempt.
        memory_bytes: memory that each rank may take; 0 where nobody knows.
        probe_budget: part of the trial's time for probes of cheaper tiers; 0 for none.
        exchange_follows_tier: whether ranks exchange gradients in 16 bits while a tier computes in no more.
        metric: name of the value that the search looks at.
        mode: 'min' or 'max', whichever of it is better.
        import_paths: directories where a job named by import path is looked for, first.
        precision_off: why an earlier attempt of a function gave its precision dial up; empty where none did.
    """

    trial_id: TrialId
    attempt: int
    seed: int
    job: str
    params: dict[str, Any]
    start: Settings
    limits: DialLimits
    samples_per_report: int
    max_reports: int
    directory: str
    resume_from: str | None
    num_reports_done: int
    memory_bytes: int = 0
    probe_budget: float = 0.0
    exchange_follows_tier: bool = False
    metric: str = ""
    mode: str = "min"
    import_paths: tuple[str, ...] = ()
    precision_off: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotOrder:
    """The state a slot shall reach. `seq` grows with every change; `incarnation` changes when the actor restarts.

    Attributes:
        op: idle, run or close.
        trial: the trial to run, with `op` RUN.
        grant: the newest offered allocation of that trial, None until its first.
        credit: the trial may take reports with an index below this number.
        stop: whether and how the trial shall leave.
    """

    incarnation: str
    seq: int
    op: SlotOp
    trial: TrialOrder | None = None
    grant: Grant | None = None
    credit: int = 0
    stop: StopMode = StopMode.NONE


@dataclass(frozen=True, slots=True, kw_only=True)
class Opening:
    """How long the first rank of a slot took to get ready: seconds since its process began.

    Attributes:
        began_wall_s: when it began, in Unix time.
        loaded_s: the libraries were loaded.
        joined_s: the ranks had found each other and their device.
        shared_s: the device was held to a share.
        warm_s: a trial like those of the run had done its first steps.
    """

    began_wall_s: float
    loaded_s: float
    joined_s: float
    shared_s: float
    warm_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotHello:
    """What a worker group says of itself when it attaches.

    Attributes:
        slot_id: the slot.
        placement: device of each rank.
        devices: those of the placement.
        enforced_by: the mechanism that holds its ranks to their share.
        enforcement: what that enforces, in words.
        pids: process of each rank.
        enforces: the same as a claim that can be checked: some of compute, memory.
        memory_cap_bytes: what each rank's allocator may take of its GPU, None without a cap.
        warm_peak_bytes: the most a rank's allocator took while it warmed up with steps of the run's job, None on cores.
        opening: where the time went until it was ready, None where nobody looked.
    """

    slot_id: str
    placement: tuple[DeviceId, ...]
    devices: tuple[DeviceView, ...]
    enforced_by: str
    enforcement: str
    pids: tuple[int, ...] = ()
    enforces: tuple[str, ...] = ()
    memory_cap_bytes: int | None = None
    warm_peak_bytes: int | None = None
    opening: Opening | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Ack:
    """All ranks of the trial run with the allocation since `step`."""

    generation: int
    settings: Settings
    step: int
    applied_s: float  # CLOCK_MONOTONIC of the node; of the policy actor's node once it was sent
    switch_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class OverrideReport:
    """A protective move of the trial: it runs with `settings` since `step`, inside the envelope of `generation`.

    `instead_of` is what it had or was granted and could not keep; None where that is what it last acknowledged.
    `is_lasting` is False where the trial's own guard says how long the tier that was left stays forbidden.
    """

    generation: int
    number: int
    settings: Settings
    step: int
    reason: str
    instead_of: Settings | None = None
    is_lasting: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class TierReport:
    """What a trial found out about its tiers: the newest one holds."""

    step: int
    tiers: tuple[TierFit, ...]
    spent_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class DialReport:
    """What a training allows of its dials, as far as that is known at `step`: the newest one holds.

    Attributes:
        step: optimizer steps done.
        start: the dials that the training has of its own, such as the batch size of its DataLoader.
        limits: the part of the run file's limits that it can follow.
        off: name of each dial that it does not have, and why.
    """

    step: int
    start: Settings
    limits: DialLimits
    off: dict[str, str]

    def without_precision(self, tier: Tier, reason: str) -> DialReport:
        """The same with the precision dial off, at `tier`."""
        limits, start = replace(self.limits, tiers=(tier,)), replace(self.start, tier=tier)
        return replace(self, start=start, limits=limits, off={**self.off, "precision": reason})


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """One report of a trial to the search; taken after evaluation and commit."""

    index: int
    step: int
    num_samples: int
    metrics: dict[str, float]
    checkpoint: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Resumption:
    """Where the search wants a trial to go on: at its own end, or with the state of another trial.

    Attributes:
        token: names one life of the trial's stand-in; a resend carries the same.
        reopens: whether a trial that was stopped or failed may go on.
        origin: the trial whose state is taken up, None for the trial's own newest.
        num_reports: reports of `origin` that lie behind that state.
        checkpoint: the commit that holds it, None for the very beginning.
        step: optimizer steps in it.
        num_samples: samples in it.
    """

    token: str
    reopens: bool = False
    origin: TrialId | None = None
    num_reports: int = 0
    checkpoint: str | None = None
    step: int = 0
    num_samples: int = 0


class Cause(StrEnum):
    """Why a trial failed, where the reason lies outside of it: `resume` tries such a trial again."""

    OWN = ""  # its own, or nobody knows
    MEMORY = "memory"
    DISK = "disk"
    DAMAGE = "damage"  # of its checkpoints
    DEVICE = "device"
    PROCESS = "process"  # its worker groups died under it
    NO_SLOT = "no slot"  # none opened


class Retry(StrEnum):
    """Which failed trials are tried again when a run is started anew."""

    NONE = "none"  # the search is the user's own, and says so itself
    OUTSIDE = "outside"  # those that failed for a reason outside of them
    ALL = "all"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fallback:
    """An attempt went on from the commit of `step`, because the one it was given is damaged."""

    checkpoint: str
    step: int
    num_steps: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Beat:
    """The heartbeat of a rank: `number` grows while it is well; silence for `limit_s` means that it hangs."""

    number: int
    doing: str
    limit_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Note:
    """What is amiss with a trial now, of one kind (`room`); an empty text says that it is over."""

    kind: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How an attempt ended, as one rank saw it.

    `checkpoint` is set when it was interrupted after a commit, `settings` when it shall begin again with other dials,
    `cause` when it failed for a reason outside of it.
    """

    status: Status
    step: int
    num_samples: int
    reason: str = ""
    checkpoint: str | None = None
    settings: Settings | None = None
    cause: Cause = Cause.OWN


@dataclass(frozen=True, slots=True, kw_only=True)
class Events:
    """One message of a rank: what happened since the last one, oldest first, and packed step records."""

    number: int
    acks: tuple[Ack, ...] = ()
    overrides: tuple[OverrideReport, ...] = ()
    reports: tuple[Report, ...] = ()
    tiers: tuple[TierReport, ...] = ()
    modes: tuple[StepModeView, ...] = ()
    dials: tuple[DialReport, ...] = ()
    fallbacks: tuple[Fallback, ...] = ()
    notes: tuple[Note, ...] = ()
    beat: Beat | None = None
    records: tuple[bytes, ...] = field(default=())

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to send."""
        told = (self.acks, self.overrides, self.reports, self.tiers, self.modes, self.dials, self.records)
        return not any((*told, self.fallbacks, self.notes))
