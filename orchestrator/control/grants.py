"""Who may use how much of which device, right now: plain arithmetic on the accounts of trials. No state of its own.

A plan says what shall be; an account says what is: wanted, offered, applied. A grant is offered only when the releases
that it depends on are acknowledged, so that no device is over-committed at any instant. Called by `transition`, which
alone changes accounts, and by the controller, which asks what can be offered.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from orchestrator.control.orders import Grant
from orchestrator.policies.plan import Allocation, DeviceId, Plan, Settings, TrialId
from orchestrator.policies.snapshot import DeviceKind, DeviceView
from orchestrator.share.grouping import assign_groups
from orchestrator.share.packing import assign_units

_EPSILON = 1e-9


@dataclass(slots=True)
class Account:
    """What one trial in a slot may be using.

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
    offers: tuple[Grant, ...] = ()
    applied: Grant | None = None
    override: Settings | None = None
    override_generation: int = 0
    num_overrides: int = 0

    @property
    def newest(self) -> Grant | None:
        """The newest grant that was offered, acknowledged or not."""
        return self.offers[-1] if self.offers else self.applied

    @property
    def settings(self) -> Settings | None:
        """What the trial runs with as far as it has said so; None before its first acknowledgement."""
        return None if self.applied is None else self.override or self.applied.settings

    def held_share(self) -> float:
        """The largest share per rank that may be in use: applied, or offered and perhaps applied already."""
        shares = [grant.settings.share for grant in self.offers]
        if self.applied is not None:
            shares.append(self.applied.settings.share)
        return max(shares, default=0.0)

    def held_units(self, device_id: DeviceId) -> set[int]:
        """Units of a device that any rank may be using: applied, or offered and perhaps applied."""
        grants = [*self.offers, *([] if self.applied is None else [self.applied])]
        return {
            unit
            for grant in grants
            for place, units in zip(self.placement, grant.units, strict=False)
            if place == device_id
            for unit in units
        }

    def acknowledge(self, generation: int) -> None:
        """The offer of that generation is applied; those before it are void, those behind it stay.

        An override of the same generation came after it was applied, whatever arrived first here, and stays.
        """
        index = next(index for index, grant in enumerate(self.offers) if grant.generation == generation)
        self.applied, self.offers = self.offers[index], self.offers[index + 1 :]
        if self.override_generation < generation:
            self.override = None


Accounts = Mapping[TrialId, Account]
Devices = Mapping[DeviceId, DeviceView]


def held(accounts: Accounts, device_id: DeviceId, but: TrialId | None = None) -> float:
    """Share of a device that may be in use, over all ranks of all trials but one."""
    return sum(
        account.held_share() * account.placement.count(device_id) for key, account in accounts.items() if key != but
    )


def targets(accounts: Accounts, devices: Devices, plan: Plan) -> dict[TrialId, Grant]:
    """What a plan wants for each trial that has an account on the devices that the plan has for it."""
    rows = [row for row in plan.allocations if _is_placed(accounts.get(row.trial_id), devices, row)]
    units = _assign_units(accounts, devices, rows)
    return {row.trial_id: _grant(devices, plan, row, units[row.trial_id]) for row in rows}


def offers(accounts: Accounts, devices: Devices, own: Collection[TrialId] | None = None) -> list[tuple[TrialId, Grant]]:
    """Grants that can be offered now without over-committing any device, in the order in which they are.

    Releases come first. A grant that has to wait is offered by a later call, after the acknowledgements. `own` are the
    trials that may be offered something, None for all.
    """
    draft = {key: replace(account) for key, account in accounts.items()}
    asking = draft if own is None else own
    waiting = [(key, draft[key].target) for key in sorted(asking) if _wants_offer(draft[key])]
    wanted = [(key, target) for key, target in waiting if target is not None]
    wanted.sort(key=lambda item: item[1].settings.share - draft[item[0]].held_share())
    found = []
    for trial_id, target in wanted:
        if fits(draft, devices, trial_id, target):
            draft[trial_id].offers += (target,)
            found.append((trial_id, target))
    return found


def fits(accounts: Accounts, devices: Devices, trial_id: TrialId, grant: Grant) -> bool:
    """Whether a trial may be offered a grant while the others use what they may be using."""
    account = accounts[trial_id]
    if not _units_are_free(accounts, devices, trial_id, grant):
        return False
    share = grant.settings.share
    if share <= account.held_share():
        return True
    return all(
        held(accounts, device_id, but=trial_id) + share * account.placement.count(device_id) <= 1.0 + _EPSILON
        for device_id in set(account.placement)
    )


def _is_placed(account: Account | None, devices: Devices, row: Allocation) -> bool:
    """Whether a trial is where a plan has it: it may have begun elsewhere while the policy decided."""
    return account is not None and account.placement == row.placement and all(each in devices for each in row.placement)


def _wants_offer(account: Account) -> bool:
    target = account.target
    if target is None or (target.settings.share > 0 and not all(target.units)):
        return False  # no plan yet, or more trials than groups: this one waits until another ends
    return account.newest is None or _differs(account.newest, target)


def _units_are_free(accounts: Accounts, devices: Devices, trial_id: TrialId, grant: Grant) -> bool:
    """Whether no other trial may still be using a unit of the grant that cannot be shared."""
    for device_id, units in zip(accounts[trial_id].placement, grant.units, strict=False):
        others = (other for key, other in accounts.items() if key != trial_id)
        if _is_exclusive(devices, device_id) and any(other.held_units(device_id) & set(units) for other in others):
            return False
    return True


def _is_exclusive(devices: Devices, device_id: DeviceId) -> bool:
    """Whether a device is cut into units that two trials must never both use: SM groups, unlike cores."""
    device = devices.get(device_id)
    return device is not None and device.kind is DeviceKind.CUDA and device.units > 1


def _grant(devices: Devices, plan: Plan, row: Allocation, units: tuple[tuple[int, ...], ...]) -> Grant:
    """The plan's part of a trial; where units are exclusive the amount is their number, alike for all ranks."""
    least = min((devices[device_id].units for device_id in row.placement), default=1)
    amount = row.settings.share * least
    if any(_is_exclusive(devices, device_id) for device_id in row.placement):
        count = min((len(each) for each in units), default=0)
        units, amount = tuple(each[:count] for each in units), float(count)
    return Grant(generation=plan.generation, settings=row.settings, units=units, amount=amount)


def _assign_units(
    accounts: Accounts, devices: Devices, rows: list[Allocation]
) -> dict[TrialId, tuple[tuple[int, ...], ...]]:
    """Cut every device's units among the ranks of a plan's trials."""
    wanted: dict[DeviceId, list[tuple[tuple[TrialId, int], float]]] = {}
    for row in rows:
        for rank, device_id in enumerate(row.placement):
            wanted.setdefault(device_id, []).append(((row.trial_id, rank), row.settings.share))
    cut: dict[tuple[TrialId, int], tuple[int, ...]] = {}
    for device_id, shares in wanted.items():
        num_units = devices[device_id].units
        if _is_exclusive(devices, device_id):
            # What a rank will use once it has caught up; newest offers of all trials are disjoint.
            last = {key: _units_of(accounts[key[0]].newest, key[1]) for key, _ in shares}
            cut |= assign_groups(shares, num_units, last)
        else:
            last = {key: _units_of(accounts[key[0]].target, key[1]) for key, _ in shares}
            cut |= assign_units(shares, num_units, {key: units for key, units in last.items() if units})
    return {row.trial_id: tuple(cut[row.trial_id, rank] for rank in range(len(row.placement))) for row in rows}


def _units_of(grant: Grant | None, rank: int) -> tuple[int, ...]:
    return () if grant is None or rank >= len(grant.units) else grant.units[rank]


def _differs(old: Grant, new: Grant) -> bool:
    """Whether a trial would notice going from one grant to the other."""
    return replace(old, generation=0) != replace(new, generation=0)
