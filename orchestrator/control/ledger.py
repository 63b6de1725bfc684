"""Who may use how much of which device, right now.

A plan says what shall be; the ledger says what is: proposed, offered, applied. It offers a grant only when the releases
it depends on are acknowledged, so that no device is over-committed at any instant. Plain state, no Ray, no clock.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, replace

from orchestrator.control.orders import Grant
from orchestrator.policies.plan import Allocation, DeviceId, Plan, Settings, TrialId
from orchestrator.policies.snapshot import DeviceKind, DeviceView
from orchestrator.share.grouping import assign_groups
from orchestrator.share.packing import assign_units

_EPSILON = 1e-9


@dataclass(slots=True)
class Line:
    """The account of one trial.

    Attributes:
        placement: device of each rank.
        target: what the plan in force wants, None before the first plan that holds the trial.
        offers: offers not yet acknowledged, oldest first.
        applied: the last acknowledged grant.
        override: settings the trial protects itself with since, if any.
        override_generation: the generation that it was a protection from.
        num_overrides: overrides recorded so far.
    """

    placement: tuple[DeviceId, ...]
    target: Grant | None = None
    offers: deque[Grant] = field(default_factory=deque)
    applied: Grant | None = None
    override: Settings | None = None
    override_generation: int = 0
    num_overrides: int = 0

    def held_share(self) -> float:
        """The largest share per rank that the trial may be using: applied, or offered and perhaps applied already."""
        shares = [grant.settings.share for grant in self.offers]
        if self.applied is not None:
            shares.append(self.applied.settings.share)
        return max(shares, default=0.0)

    def held_units(self, device_id: DeviceId) -> set[int]:
        """Units of a device that any rank of the trial may be using: applied, or offered and perhaps applied."""
        grants = [*self.offers, *([] if self.applied is None else [self.applied])]
        return {
            unit
            for grant in grants
            for place, units in zip(self.placement, grant.units, strict=False)
            if place == device_id
            for unit in units
        }


class Ledger:
    """Accounts of all trials that hold a worker group."""

    def __init__(self) -> None:
        self._lines: dict[TrialId, Line] = {}
        self._devices: dict[DeviceId, DeviceView] = {}

    @property
    def lines(self) -> dict[TrialId, Line]:
        """The accounts, to read."""
        return self._lines

    def set_devices(self, devices: tuple[DeviceView, ...]) -> None:
        """Replace the known devices."""
        self._devices = {device.device_id: device for device in devices}

    def open_line(self, trial_id: TrialId, placement: tuple[DeviceId, ...]) -> None:
        """A trial got a worker group on these devices. It holds nothing yet."""
        self._lines[trial_id] = Line(placement=placement)

    def close_line(self, trial_id: TrialId) -> None:
        """The trial's processes use nothing any more."""
        self._lines.pop(trial_id, None)

    def held(self, device_id: DeviceId, but: TrialId | None = None) -> float:
        """Share of a device that may be in use, over all ranks of all trials but one."""
        return sum(
            line.held_share() * line.placement.count(device_id) for key, line in self._lines.items() if key != but
        )

    def commit(self, plan: Plan) -> None:
        """Take a plan as the target; nothing is offered yet. Unknown trials are ignored."""
        units = self._assign_units(plan)
        for allocation in plan.allocations:
            line = self._lines.get(allocation.trial_id)
            if line is None:
                continue
            line.target = self._grant(plan, allocation, units[allocation.trial_id])

    def offer(self) -> dict[TrialId, Grant]:
        """Grants that can be offered now without over-committing any device; they count as held from here on.

        Releases come first. A grant that has to wait is offered by a later call, after the acknowledgements.
        """
        offered: dict[TrialId, Grant] = {}
        waiting = [(key, line) for key, line in sorted(self._lines.items()) if self._wants_offer(line)]
        waiting.sort(key=lambda item: item[1].target.settings.share - item[1].held_share() if item[1].target else 0.0)
        for trial_id, line in waiting:
            assert line.target is not None
            if self._fits(trial_id, line, line.target.settings.share):
                line.offers.append(line.target)
                offered[trial_id] = line.target
        return offered

    def acknowledge(self, trial_id: TrialId, generation: int) -> Grant | None:
        """The trial applied the offer of that generation; returns it, or None when it is old news or unknown.

        An override of the same generation came after it was applied, whatever came first here, and stays.
        """
        line = self._lines.get(trial_id)
        if line is None or all(grant.generation != generation for grant in line.offers):
            return None
        while line.offers:
            grant = line.offers.popleft()
            if grant.generation == generation:
                line.applied = grant
                if line.override_generation < generation:
                    line.override = None
                return grant
        return None

    def record_override(self, trial_id: TrialId, number: int, settings: Settings, generation: int = 0) -> bool:
        """The trial moved inside its envelope; False for old news. An override never enlarges what is held."""
        line = self._lines.get(trial_id)
        if line is None or number <= line.num_overrides:
            return False
        line.num_overrides = number
        line.override, line.override_generation = settings, generation
        return True

    def running_settings(self, trial_id: TrialId) -> Settings | None:
        """What the trial runs with as far as it has said so; None before its first acknowledgement."""
        line = self._lines.get(trial_id)
        if line is None or line.applied is None:
            return None
        return line.override or line.applied.settings

    def _wants_offer(self, line: Line) -> bool:
        newest = line.offers[-1] if line.offers else line.applied
        if line.target is None or (line.target.settings.share > 0 and not all(line.target.units)):
            return False  # no plan yet, or more trials than groups: this one waits until another ends
        return newest is None or _differs(newest, line.target)

    def _fits(self, trial_id: TrialId, line: Line, share: float) -> bool:
        if not self._units_are_free(trial_id, line):
            return False
        if share <= line.held_share():
            return True
        return all(
            self.held(device_id, but=trial_id) + share * line.placement.count(device_id) <= 1.0 + _EPSILON
            for device_id in set(line.placement)
        )

    def _units_are_free(self, trial_id: TrialId, line: Line) -> bool:
        """Whether no other trial may still be using a unit of the target that cannot be shared."""
        assert line.target is not None
        for device_id, units in zip(line.placement, line.target.units, strict=False):
            others = (other for key, other in self._lines.items() if key != trial_id)
            if self._is_exclusive(device_id) and any(other.held_units(device_id) & set(units) for other in others):
                return False
        return True

    def _is_exclusive(self, device_id: DeviceId) -> bool:
        """Whether a device is cut into units that two trials must never both use: SM groups, unlike cores."""
        device = self._devices[device_id]
        return device.kind is DeviceKind.CUDA and device.units > 1

    def _grant(self, plan: Plan, allocation: Allocation, units: tuple[tuple[int, ...], ...]) -> Grant:
        """The plan's part of a trial; where units are exclusive the amount is their number, alike for all ranks."""
        least = min((self._devices[device_id].units for device_id in allocation.placement), default=1)
        amount = allocation.settings.share * least
        if any(self._is_exclusive(device_id) for device_id in allocation.placement):
            count = min((len(each) for each in units), default=0)
            units, amount = tuple(each[:count] for each in units), float(count)
        return Grant(generation=plan.generation, settings=allocation.settings, units=units, amount=amount)

    def _assign_units(self, plan: Plan) -> dict[TrialId, tuple[tuple[int, ...], ...]]:
        """Cut every device's units among the ranks of the plan's trials."""
        wanted: dict[DeviceId, list[tuple[tuple[TrialId, int], float]]] = {}
        known = [allocation for allocation in plan.allocations if allocation.trial_id in self._lines]
        for allocation in known:
            for rank, device_id in enumerate(allocation.placement):
                key = (allocation.trial_id, rank)
                wanted.setdefault(device_id, []).append((key, allocation.settings.share))
        cut: dict[tuple[TrialId, int], tuple[int, ...]] = {}
        for device_id, shares in wanted.items():
            num_units = self._devices[device_id].units
            if self._is_exclusive(device_id):
                cut |= assign_groups(shares, num_units, {key: self._last_offered(*key) for key, _ in shares})
                continue
            previous = {key: self._previous_units(*key) for key, _ in shares}
            cut |= assign_units(shares, num_units, {k: v for k, v in previous.items() if v})
        return {a.trial_id: tuple(cut[a.trial_id, rank] for rank in range(len(a.placement))) for a in known}

    def _last_offered(self, trial_id: TrialId, rank: int) -> tuple[int, ...]:
        """What the rank will use once it has caught up; newest offers of all trials are disjoint."""
        line = self._lines[trial_id]
        newest = line.offers[-1] if line.offers else line.applied
        return () if newest is None or rank >= len(newest.units) else newest.units[rank]

    def _previous_units(self, trial_id: TrialId, rank: int) -> tuple[int, ...]:
        target = self._lines[trial_id].target
        return target.units[rank] if target is not None and rank < len(target.units) else ()


def _differs(old: Grant, new: Grant) -> bool:
    """Whether a trial would notice going from one grant to the other."""
    return replace(old, generation=0) != replace(new, generation=0)
