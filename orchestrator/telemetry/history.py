"""A run as its journal tells it, in typed values, for those who read runs: load, explain and verify.

Knows the kinds of journal entries but not what to think of them. Unlike the controller's own reader it never gives up:
a damaged line is skipped and reported, because a damaged run is exactly what people want to look at.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

from orchestrator.control.journal import FILE_NAME as JOURNAL_NAME
from orchestrator.errors import ConfigError
from orchestrator.policies.codec import settings_from
from orchestrator.policies.plan import DeviceId, Generation, Settings, TrialId

EntryT = TypeVar("EntryT", bound="Entry")


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """What every journal entry has. Kinds without a class of their own are plain entries."""

    kind: str
    seq: int
    t_s: float
    wall_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RunBegun(Entry):
    """The head of the journal."""

    run_id: str
    policy: str
    policy_params: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovered(Entry):
    """The controller was started again; `are_workers_gone` when it is a new start of the whole run."""

    are_workers_gone: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotChanged(Entry):
    """A slot opened, closed or was lost; `placement` is what it brought when it attached."""

    slot_id: str
    state: str
    epoch: int
    placement: tuple[DeviceId, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialQueued(Entry):
    """The search submitted a trial."""

    trial_id: TrialId
    params: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialAssigned(Entry):
    """An attempt of a trial began in a slot."""

    trial_id: TrialId
    attempt: int
    slot_id: str
    epoch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanCommitted(Entry):
    """A decision, undecoded: `policies.codec` turns both into values."""

    generation: Generation
    snapshot: Mapping[str, Any]
    plan: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Offered(Entry):
    """The ledger granted an allocation to a trial."""

    generation: Generation
    trial_id: TrialId
    settings: Settings


@dataclass(frozen=True, slots=True, kw_only=True)
class Acknowledged(Entry):
    """All ranks of a trial run with an allocation since `step`, `ack_s` seconds after its plan was committed."""

    generation: Generation
    trial_id: TrialId
    attempt: int
    step: int
    settings: Settings
    ack_s: float
    switch_s: float
    dials: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Overridden(Entry):
    """A trial protected itself inside its envelope."""

    generation: Generation
    trial_id: TrialId
    number: int
    settings: Settings
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused(Entry):
    """A plan was not taken."""

    reason: str
    violations: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reported(Entry):
    """A trial reported to the search."""

    trial_id: TrialId
    index: int
    step: int
    num_samples: int
    metrics: Mapping[str, float | None]
    checkpoint: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialRequeued(Entry):
    """An attempt ended before the trial did; `attempt` is the number of the next one."""

    trial_id: TrialId
    attempt: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialPaused(TrialRequeued):
    """The search put a trial aside; it is in no slot and no queue."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialContinued(Entry):
    """A trial goes on: at its own end, or (`origin`) behind report `num_reports` of another trial."""

    trial_id: TrialId
    attempt: int
    params: Mapping[str, Any]
    origin: TrialId | None
    num_reports: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialEnded(Entry):
    """Nothing more happens to a trial."""

    trial_id: TrialId
    state: str
    reason: str
    step: int
    num_samples: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialResized(Entry):
    """What became of a wish for `num_workers` ranks: `stage` is wanted, done or given_up.

    `restart_s` is what the last move of any trial cost it, None before the first.
    """

    trial_id: TrialId
    stage: str
    num_workers: int
    reason: str
    restart_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class GainRealised(Entry):
    """What an allocation really brought a trial, as a ratio minus one.

    `before` and `after` hold throughput (samples/s), efficiency and goodput, as measured; empty in older journals.
    """

    generation: Generation
    trial_id: TrialId
    dial: str
    predicted: float | None
    realised: float
    before: Mapping[str, float] = field(default_factory=dict)
    after: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class ShareChecked(Entry):
    """What was seen of a trial's share under an allocation; `verdict` is held or not held."""

    generation: Generation
    trial_id: TrialId
    what: str
    verdict: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RunEnded(Entry):
    """The end of a run and what it left behind."""

    state: str
    leaks: Mapping[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """A journal as far as it can be read.

    Attributes:
        entries: in file order.
        damage: one sentence per line that could not be read, or number that is missing.
        torn_tail_bytes: bytes after the last newline: cut off by a crash, or still being written.
    """

    entries: tuple[Entry, ...]
    damage: tuple[str, ...]
    torn_tail_bytes: int

    def of(self, kind: type[EntryT]) -> Iterator[EntryT]:
        """Entries of one class, in order."""
        return (entry for entry in self.entries if type(entry) is kind)


def read_history(run_dir: Path) -> History:
    """Read the journal of a run.

    Raises:
        ConfigError: there is none: the directory is no run.
    """
    path = run_dir / JOURNAL_NAME
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"{run_dir} is not a run directory: cannot read {JOURNAL_NAME} ({error.strerror});"
            " give the directory that the run printed as its last line, or see `orchestrator list`"
        ) from error
    *lines, tail = data.split(b"\n")
    entries: list[Entry] = []
    damage: list[str] = []
    for number, line in enumerate(lines, start=1):
        try:
            entries.append(parse(json.loads(line)))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            damage.append(f"line {number} is damaged: {type(error).__name__} {str(error)[:100]}")
    for before, after in pairwise(entries):
        if after.seq != before.seq + 1:
            damage.append(f"entry {before.seq} is followed by entry {after.seq}")
    return History(entries=tuple(entries), damage=tuple(damage), torn_tail_bytes=len(tail))


def parse(fields: Mapping[str, Any]) -> Entry:
    """One journal entry.

    Raises:
        KeyError, TypeError, ValueError: a field is missing or of another type.
    """
    head: dict[str, Any] = {
        "kind": str(fields["kind"]),
        "seq": int(fields["seq"]),
        "t_s": float(fields["t_s"]),
        "wall_s": float(fields["wall_s"]),
    }
    parser = _PARSERS.get(head["kind"])
    return Entry(**head) if parser is None else parser(head, fields)


def _trial(fields: Mapping[str, Any]) -> TrialId:
    return TrialId(str(fields["trial_id"]))


def _generation(fields: Mapping[str, Any]) -> Generation:
    return Generation(int(fields["generation"]))


def _number(value: Any) -> float | None:  # noqa: ANN401 - a JSON value
    return None if value is None else float(value)


def _run(head: dict[str, Any], fields: Mapping[str, Any]) -> Entry:
    spec = fields.get("spec") or {}
    policy = fields.get("policy") or {"name": spec["policy"], "params": spec.get("policy_params", {})}
    return RunBegun(
        **head, run_id=str(fields["run_id"]), policy=str(policy["name"]), policy_params=dict(policy.get("params") or {})
    )


def _slot(head: dict[str, Any], fields: Mapping[str, Any]) -> Entry:
    hello = fields.get("hello") or {}
    return SlotChanged(
        **head,
        slot_id=str(fields["slot_id"]),
        state=str(fields["state"]),
        epoch=int(fields["epoch"]),
        placement=tuple(DeviceId(str(device)) for device in hello.get("placement", ())),
    )


def _plan(head: dict[str, Any], fields: Mapping[str, Any]) -> Entry:
    return PlanCommitted(
        **head, generation=_generation(fields), snapshot=dict(fields["snapshot"]), plan=dict(fields["plan"])
    )


def _offer(head: dict[str, Any], fields: Mapping[str, Any]) -> Entry:
    return Offered(
        **head, generation=_generation(fields), trial_id=_trial(fields), settings=settings_from(fields["settings"])
    )


def _ack(head: dict[str, Any], fields: Mapping[str, Any]) -> Entry:
    return Acknowledged(
        **head,
        generation=_generation(fields),
        trial_id=_trial(fields),
        attempt=int(fields["attempt"]),
        step=int(fields["step"]),
        settings=settings_from(fields["settings"]),
        ack_s=float(fields["ack_s"]),
        switch_s=float(fields["switch_s"]),
        dials=tuple(str(dial) for dial in fields["dials"]),
    )


def _override(head: dict[str, Any], fields: Mapping[str, Any]) -> Entry:
    return Overridden(
        **head,
        generation=_generation(fields),
        trial_id=_trial(fields),
        number=int(fields["number"]),
        settings=settings_from(fields["settings"]),
        reason=str(fields["reason"]),
    )


def _result(head: dict[str, Any], fields: Mapping[str, Any]) -> Entry:
    checkpoint = fields.get("checkpoint")
    return Reported(
        **head,
        trial_id=_trial(fields),
        index=int(fields["index"]),
        step=int(fields["step"]),
        num_samples=int(fields["num_samples"]),
        metrics={str(name): _number(value) for name, value in fields["metrics"].items()},
        checkpoint=None if checkpoint is None else str(checkpoint),
    )


def _ended(head: dict[str, Any], fields: Mapping[str, Any]) -> Entry:
    return TrialEnded(
        **head,
        trial_id=_trial(fields),
        state=str(fields["state"]),
        reason=str(fields["reason"]),
        step=int(fields["step"]),
        num_samples=int(fields["num_samples"]),
    )


def _gain(head: dict[str, Any], fields: Mapping[str, Any]) -> Entry:
    return GainRealised(
        **head,
        generation=_generation(fields),
        trial_id=_trial(fields),
        dial=str(fields["dial"]),
        predicted=_number(fields["predicted"]),
        realised=float(fields["realised"]),
        before={str(key): float(value) for key, value in dict(fields.get("before", {})).items()},
        after={str(key): float(value) for key, value in dict(fields.get("after", {})).items()},
    )


_PARSERS: dict[str, Callable[[dict[str, Any], Mapping[str, Any]], Entry]] = {
    "run": _run,
    "recovered": lambda head, f: Recovered(**head, are_workers_gone=bool(f["are_workers_gone"])),
    "slot": _slot,
    "trial_queued": lambda head, f: TrialQueued(**head, trial_id=_trial(f), params=dict(f["params"])),
    "trial_assigned": lambda head, f: TrialAssigned(
        **head, trial_id=_trial(f), attempt=int(f["attempt"]), slot_id=str(f["slot_id"]), epoch=int(f["epoch"])
    ),
    "plan": _plan,
    "offer": _offer,
    "ack": _ack,
    "override": _override,
    "refusal": lambda head, f: Refused(
        **head, reason=str(f["reason"]), violations=tuple(str(text) for text in f["violations"])
    ),
    "result": _result,
    "trial_requeued": lambda head, f: TrialRequeued(
        **head, trial_id=_trial(f), attempt=int(f["attempt"]), reason=str(f["reason"])
    ),
    "trial_paused": lambda head, f: TrialPaused(
        **head, trial_id=_trial(f), attempt=int(f["attempt"]), reason=str(f["reason"])
    ),
    "trial_continued": lambda head, f: TrialContinued(
        **head,
        trial_id=_trial(f),
        attempt=int(f["attempt"]),
        params=dict(f["params"]),
        origin=None if f["origin"] is None else TrialId(str(f["origin"])),
        num_reports=int(f["num_reports"]),
    ),
    "trial_resize": lambda head, f: TrialResized(
        **head,
        trial_id=_trial(f),
        stage=str(f["stage"]),
        num_workers=int(f["num_workers"]),
        reason=str(f["reason"]),
        restart_s=_number(f["restart_s"]),
    ),
    "trial_ended": _ended,
    "gain": _gain,
    "check": lambda head, f: ShareChecked(
        **head,
        generation=_generation(f),
        trial_id=_trial(f),
        what=str(f["what"]),
        verdict=str(f["verdict"]),
        reason=str(f["reason"]),
    ),
    "run_ended": lambda head, f: RunEnded(
        **head, state=str(f["state"]), leaks={str(name): int(count) for name, count in f["leaks"].items()}
    ),
}
