"""Checks of a journal alone: grants safe at every instant, plans written first, results in order, an end without leaks.

Replays offers, acknowledgements and ends independently of the controller's ledger, so that an error there is seen here.
Pure functions of a history; called by `view.verify`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from orchestrator.control.events import (
    Acknowledged,
    Event,
    Offered,
    Overridden,
    PlanCommitted,
    Recovered,
    Reported,
    RunEnded,
    SlotChanged,
    TrialAssigned,
    TrialContinued,
    TrialEnded,
    TrialPaused,
    TrialQueued,
    TrialRequeued,
)
from orchestrator.control.journal import History
from orchestrator.policies.plan import DeviceId, Generation, Plan, TrialId
from orchestrator.view.finding import Code, Finding

_TOLERANCE = 1e-6

Plans = Mapping[Generation, Plan]


@dataclass(slots=True)
class _Holding:
    """A share that a trial may be using on each of some devices."""

    share: float
    placement: tuple[DeviceId, ...]

    def on(self, device_id: DeviceId) -> float:
        return self.share * self.placement.count(device_id)


@dataclass(slots=True)
class _Account:
    """What one trial may be using: the allocation it acknowledged last, or any it was offered since."""

    placement: tuple[DeviceId, ...] = ()
    applied: _Holding | None = None
    offers: dict[Generation, _Holding] = field(default_factory=dict)

    def held(self, device_id: DeviceId) -> float:
        holdings = [*self.offers.values(), *([self.applied] if self.applied else [])]
        return max((holding.on(device_id) for holding in holdings), default=0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenOffer:
    """An offer that nothing ever answered: no acknowledgement, no newer offer.

    Attributes:
        trial_id, attempt: to whom it was made.
        generation: of the plan.
        offered_s: when, on the journal's monotonic clock.
        ended_s: when the attempt ended, None when it goes on.
    """

    trial_id: TrialId
    attempt: int
    generation: Generation
    offered_s: float
    ended_s: float | None


def over_commitments(history: History, plans: Plans) -> Iterator[Finding]:
    """Instants at which the shares in use or on offer on a device exceed it."""
    slots: dict[str, tuple[DeviceId, ...]] = {}
    accounts: dict[TrialId, _Account] = {}
    exceeded: set[DeviceId] = set()
    for entry in history.entries:
        if isinstance(entry, SlotChanged) and entry.placement:
            slots[entry.slot_id] = entry.placement
        elif isinstance(entry, Recovered) and entry.are_workers_gone:
            accounts.clear()
        elif isinstance(entry, TrialAssigned):
            accounts[entry.trial_id] = _Account(placement=slots.get(entry.slot_id, ()))
        elif isinstance(entry, TrialRequeued | TrialPaused | TrialEnded):
            accounts.pop(entry.trial_id, None)
        elif isinstance(entry, Offered | Acknowledged | Overridden):
            _move(accounts.setdefault(entry.trial_id, _Account()), entry, plans)
        else:
            continue
        now = {device_id: held for device_id, held in _held(accounts).items() if held > 1.0 + _TOLERANCE}
        if isinstance(entry, Offered | Acknowledged | Overridden):
            for device_id in now.keys() - exceeded:
                text = f"{device_id} was granted to {now[device_id]:.3f} of 1 by entry {entry.seq} ({entry.kind})"
                yield Finding(
                    code=Code.OVER_COMMITMENT, text=text, trial_id=entry.trial_id, generation=entry.generation
                )
        exceeded = set(now)


def _move(account: _Account, entry: Offered | Acknowledged | Overridden, plans: Plans) -> None:
    plan = plans.get(entry.generation)
    allocation = None if plan is None else plan.allocation(entry.trial_id)
    placement = account.placement if allocation is None else allocation.placement
    holding = _Holding(entry.settings.share, placement)
    if isinstance(entry, Offered):
        account.offers[entry.generation] = holding
    elif isinstance(entry, Acknowledged):
        offered = account.offers.get(entry.generation)
        holding.share = max(holding.share, 0.0 if offered is None else offered.share)
        account.applied = holding
        account.offers = {g: offer for g, offer in account.offers.items() if g > entry.generation}
    elif account.applied is None or holding.share > account.applied.share:
        # An override gives nothing back: the ledger counts the grant until the next acknowledgement.
        account.applied = holding


def _held(accounts: Mapping[TrialId, _Account]) -> dict[DeviceId, float]:
    devices = {
        device_id
        for account in accounts.values()
        for holding in [*account.offers.values(), *([account.applied] if account.applied else [])]
        for device_id in holding.placement
    }
    return {device_id: sum(account.held(device_id) for account in accounts.values()) for device_id in devices}


def open_offers(history: History) -> list[OpenOffer]:
    """Offers that were neither acknowledged nor followed by a newer one in the same attempt."""
    attempts: dict[TrialId, int] = {}
    pending: dict[TrialId, Offered] = {}
    found: list[OpenOffer] = []
    for entry in history.entries:
        if isinstance(entry, Offered):
            pending[entry.trial_id] = entry
        elif isinstance(entry, Acknowledged):
            offer = pending.get(entry.trial_id)
            if offer is not None and offer.generation <= entry.generation:
                del pending[entry.trial_id]
        elif isinstance(entry, TrialAssigned | TrialRequeued | TrialPaused | TrialEnded):
            offer = pending.pop(entry.trial_id, None)
            if offer is not None:
                found.append(_open(offer, attempts, entry.t_s))
            if isinstance(entry, TrialAssigned):
                attempts[entry.trial_id] = entry.attempt
        elif isinstance(entry, Recovered) and entry.are_workers_gone:
            pending.clear()  # the clock may have started anew with the machine
    return [*found, *(_open(offer, attempts, None) for offer in pending.values())]


def _open(offer: Offered, attempts: Mapping[TrialId, int], ended_s: float | None) -> OpenOffer:
    return OpenOffer(
        trial_id=offer.trial_id,
        attempt=attempts.get(offer.trial_id, 0),
        generation=offer.generation,
        offered_s=offer.t_s,
        ended_s=ended_s,
    )


def wrong_order(history: History) -> Iterator[Finding]:
    """Offers and acknowledgements before their plan, acknowledgements without an offer, plans that go back."""
    committed: set[Generation] = set()
    offered: set[tuple[TrialId, Generation]] = set()
    newest = Generation(0)
    for entry in history.entries:
        if isinstance(entry, PlanCommitted):
            if entry.generation <= newest:
                text = f"plan {entry.generation} was written after plan {newest}; generations must grow"
                yield Finding(code=Code.PLAN_NOT_FIRST, text=text, generation=entry.generation)
            newest = max(newest, entry.generation)
            committed.add(entry.generation)
        elif isinstance(entry, Offered | Acknowledged):
            generation, trial_id = entry.generation, entry.trial_id
            if generation not in committed:
                what = "offered" if isinstance(entry, Offered) else "acknowledged"
                text = f"plan {generation} was {what} by entry {entry.seq} before it was written"
                yield Finding(code=Code.PLAN_NOT_FIRST, text=text, trial_id=trial_id, generation=generation)
            elif isinstance(entry, Acknowledged) and (trial_id, generation) not in offered:
                text = f"entry {entry.seq} acknowledges plan {generation}, which this trial was not offered"
                yield Finding(code=Code.ACK_WITHOUT_OFFER, text=text, trial_id=trial_id, generation=generation)
            if isinstance(entry, Offered):
                offered.add((trial_id, generation))


def results_out_of_order(history: History) -> Iterator[Finding]:
    """Reports that are missing, repeated or go back in steps or samples."""
    last: dict[TrialId, Reported] = {}
    wanted: dict[TrialId, int] = {}
    for entry in history.entries:
        if isinstance(entry, TrialContinued) and entry.origin is not None:
            last.pop(entry.trial_id, None)  # it goes on behind a report of another trial
            wanted[entry.trial_id] = entry.num_reports
        if not isinstance(entry, Reported):
            continue
        before, due = last.get(entry.trial_id), wanted.get(entry.trial_id, 0)
        if entry.index != due:
            text = f"report {entry.index} came where report {due} was due"
            yield Finding(code=Code.RESULTS_OUT_OF_ORDER, text=text, trial_id=entry.trial_id)
        elif before is not None and (entry.step < before.step or entry.num_samples < before.num_samples):
            text = (
                f"report {entry.index} is of step {entry.step} and {entry.num_samples} samples, the one before it of"
                f" step {before.step} and {before.num_samples}"
            )
            yield Finding(code=Code.RESULTS_OUT_OF_ORDER, text=text, trial_id=entry.trial_id)
        last[entry.trial_id], wanted[entry.trial_id] = entry, entry.index + 1


def endings(history: History) -> Iterator[Finding]:
    """Things a run left behind, and trials that a run which calls itself done never ended."""
    for ended in history.of(RunEnded):
        left = [f"{count} {name.replace('_', ' ')}" for name, count in sorted(ended.leaks.items()) if count]
        if left:
            yield Finding(code=Code.LEAK, text=f"the run left behind {', '.join(left)}")
    if _is_done(history.entries):
        over = {entry.trial_id for entry in history.of(TrialEnded)}
        for queued in history.of(TrialQueued):
            if queued.trial_id not in over:
                text = "the run is done, but this trial neither ended nor failed"
                yield Finding(code=Code.TRIAL_LOST, text=text, trial_id=queued.trial_id)


def _is_done(entries: Sequence[Event]) -> bool:
    return bool(entries) and isinstance(last := entries[-1], RunEnded) and last.state == "done"
