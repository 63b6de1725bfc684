"""Pollux: whole devices by goodput relative to a fair share, batch tuned to the devices.

Maximises the power mean (p = -1) of the trials' speed-ups over their fair share, each scaled down by what it has lost
to restarts if its devices would change. At most one trial that spans nodes is on any node, and a trial may have at most
twice the devices it ever had. The batch is the one of the best goodput.

Source: Qiao et al., Pollux (OSDI 2021), section 4.2, equations 8 to 11, with the constants of its published simulator
(p = -1, restarts of 30 s). Unlike there, device counts are found by dynamic programming instead of a genetic search,
which can only help it, and trials of one shape share what was measured of their speed, though not the limit of twice.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from orchestrator.policies.fixed import with_fixed
from orchestrator.policies.fleet import Fleet
from orchestrator.policies.movable import Budget, Mover, keep, run, wait
from orchestrator.policies.placing import Given, realise, size_now
from orchestrator.policies.plan import Allocation, Plan, TrialId
from orchestrator.policies.prospects import Ask, Prospect, Size, prospects
from orchestrator.policies.sizing import NONE, Menu, best_counts
from orchestrator.policies.snapshot import Snapshot
from orchestrator.policies.world import make_plan

_ASK = Ask(pools=False, counts=tuple(range(1, 65)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Pollux:
    """Goodput with whole devices.

    Attributes:
        power: exponent of the mean; more negative is more fair.
        min_speedup: what is added to every speed-up, so that a waiting trial's is not zero.
    """

    power: float = -1.0
    min_speedup: float = 1e-3

    def __post_init__(self) -> None:
        if not self.power < 0:
            raise ValueError(f"power={self.power!r}; allowed: below 0, such as -1")
        if not self.min_speedup > 0:
            raise ValueError(f"min_speedup={self.min_speedup!r}; allowed: above 0, such as 0.001")

    def decide(self, snapshot: Snapshot) -> Plan:
        """Return the plan with the best mean speed-up."""
        return make_plan(snapshot, "pollux", with_fixed(snapshot, lambda m, f, b: self._place(m, f, b, snapshot.now_s)))

    def _place(self, movers: tuple[Mover, ...], fleet: Fleet, budget: Budget, now_s: float) -> Iterator[Allocation]:
        outlooks = prospects(movers, fleet, _ASK)
        wanted = self._sizes(movers, outlooks, fleet, now_s)
        given = realise(movers, wanted, fleet, budget, one_spread_per_node=True)
        for mover, outlook in zip(movers, outlooks, strict=True):
            if mover.trial_id not in given:
                yield wait(
                    mover, f"waits: {len(given)} trials on {len(fleet.devices)} devices have a better mean speed-up"
                )
            elif outlook.is_prior and mover.seats and given[mover.trial_id][0] == mover.seats:
                yield keep(mover, fleet, f"keeps its {len(mover.seats)} devices until measured", "unmeasured")
            else:
                yield _row(mover, outlook, fleet, given[mover.trial_id], len(movers))

    def _sizes(
        self, movers: Sequence[Mover], outlooks: Sequence[Prospect], fleet: Fleet, now_s: float
    ) -> dict[TrialId, Size]:
        """The size of every trial that runs. Pollux knows no device types: each trial has one, in turn."""
        wanted: dict[TrialId, Size] = {}
        for kind, members in _by_kind(movers, fleet).items():
            capacity = fleet.capacity(kind)
            fair = math.ceil(capacity / max(1, len(members)))
            sizes = [_of_kind(outlooks[i], kind) for i in members]
            menus = [
                self._menu(movers[i], outlooks[i], indices, fleet, (fair, now_s))
                for i, indices in zip(members, sizes, strict=True)
            ]
            for i, indices, choice in zip(members, sizes, best_counts(menus, capacity), strict=True):
                if choice != NONE:
                    wanted[movers[i].trial_id] = outlooks[i].sizes[indices[choice]]
        return wanted

    def _menu(
        self, mover: Mover, outlook: Prospect, indices: Sequence[int], fleet: Fleet, terms: tuple[int, float]
    ) -> Menu:
        fair, now_s = terms
        base = _fair_goodput(outlook, indices, fair)
        age_s = now_s - mover.trial.began_at_s
        factor = max(0.0, age_s - mover.trial.num_restarts * mover.restart_s) / (age_s + mover.restart_s)
        now = size_now(mover, fleet)
        values = []
        for index in indices:
            size = outlook.sizes[index]
            stays = size == now
            spans = stays and fleet.num_nodes(mover.seats) > 1
            rate = outlook.goodput(index, spans_nodes=spans) or outlook.across[index]
            speedup = rate / base * (1.0 if stays else factor) / max(1, fleet.node_sizes[size.kind])
            values.append(-((speedup + self.min_speedup) ** self.power))
            if mover.is_pinned:
                values[-1] = 0.0 if stays else -math.inf
        workers = tuple(outlook.sizes[index].workers for index in indices)
        idle = -math.inf if mover.is_pinned and now is not None else -(self.min_speedup**self.power)
        return Menu((0,) * len(indices), workers, tuple(values), idle)


def _of_kind(outlook: Prospect, kind: int) -> list[int]:
    return [index for index, size in enumerate(outlook.sizes) if size.kind == kind]


def _fair_goodput(outlook: Prospect, indices: Sequence[int], fair: int) -> float:
    """Goodput of a fair share: the largest size up to it, or the smallest there is."""
    fitting = [i for i in indices if outlook.sizes[i].workers <= fair] or list(indices[:1])
    rates = [outlook.inside[i] or outlook.across[i] for i in fitting]
    if not rates or not rates[-1] > 0:
        return 1.0
    # Sizes end where the trial may not grow yet; beyond that a fair share is taken as linear.
    return rates[-1] * max(1.0, fair / outlook.sizes[fitting[-1]].workers)


def _by_kind(movers: Sequence[Mover], fleet: Fleet) -> dict[int, list[int]]:
    """Trials by the type of device they are tied to: that on which they run, else the one with most room for each."""
    members: dict[int, list[int]] = {kind: [] for kind in range(len(fleet.types))}
    waiting = []
    for position, mover in enumerate(movers):
        if mover.seats:
            members[fleet.type_of[mover.seats[0]]].append(position)
        else:
            waiting.append(position)
    for position in waiting if members else ():
        kind = max(members, key=lambda k: (fleet.capacity(k) / (1 + len(members[k])), -k))
        members[kind].append(position)
    return {kind: sorted(positions) for kind, positions in members.items()}


def _row(mover: Mover, outlook: Prospect, fleet: Fleet, given: Given, num_trials: int) -> Allocation:
    seats, share = given
    size = Size(fleet.type_of[seats[0]], len(seats), share)
    index = outlook.sizes.index(size) if size in outlook.sizes else None
    if index is None or mover.is_pinned:
        return keep(mover, fleet, f"keeps its {len(mover.seats)} devices", "pinned")
    spans = fleet.num_nodes(seats) > 1
    dials = outlook.dials(index, spans_nodes=spans)
    rate = outlook.goodput(index, spans_nodes=spans)
    reason = f"{len(seats)} devices on {fleet.num_nodes(seats)} nodes among {num_trials} trials"
    predicted = None if outlook.is_prior else rate
    return run(mover, fleet, seats, dials, reason, binding="mean speed-up", predicted=predicted)
