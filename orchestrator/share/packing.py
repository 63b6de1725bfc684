"""Which units of a device each rank may touch: the device's line of units, cut by share.

Pure arithmetic: no torch, no device, no trial. Overlap on one unit costs a GPU half its speed and a CPU its caches, so
whole-unit shares never overlap anything and fractional ones only each other. Called by the ledger at every plan.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar

from orchestrator.errors import ShareError

Key = TypeVar("Key", bound=Hashable)

_WHOLE_SLACK = 1e-4
"""Units by which an amount may miss a whole number and still be one: shares are rounded on their way here."""


def assign_units(
    shares: Sequence[tuple[Key, float]], units: int, previous: Mapping[Key, tuple[int, ...]] | None = None
) -> dict[Key, tuple[int, ...]]:
    """Units of a device for each key, ascending; empty for share 0.

    Whole-unit shares come first and keep their units if they can. Fractional shares cut what is left in the given
    order, each getting every unit that its interval touches; those of `previous` stay where they were if the others
    still fit. The same arguments always give the same result, and a result passed as `previous` comes back unchanged.

    Args:
        shares: key and fraction of the device in [0, 1]; keys are distinct.
        units: units of the device, >= 1.
        previous: units that keys had so far.

    Raises:
        ShareError: the shares do not fit the device, or a key comes twice.
    """
    _check(shares, units)
    before = previous or {}
    amounts = {key: share * units for key, share in shares if share > 0}
    whole = {key: round(amount) for key, amount in amounts.items() if _is_whole(amount)}
    rest = {key: amount for key, amount in amounts.items() if key not in whole}
    assigned: dict[Key, tuple[int, ...]] = {key: () for key, _ in shares}
    assigned |= _place_whole(whole, rest, units, before)
    taken = {unit for held in assigned.values() for unit in held}
    free = [unit for unit in range(units) if unit not in taken]
    assigned |= _place_rest(rest, free, before)
    return assigned


def _check(shares: Sequence[tuple[Key, float]], units: int) -> None:
    if units < 1:
        raise ShareError(f"a device with units={units} cannot be cut; allowed: >= 1")
    if len({key for key, _ in shares}) != len(shares):
        raise ShareError(f"a key comes twice in {[key for key, _ in shares]}; allowed: one share per key and device")
    for key, share in shares:
        if not 0 <= share <= 1 + _WHOLE_SLACK:
            raise ShareError(f"share={share} of {key} is not a share; allowed: 0 to 1")
    total = math.fsum(share for _, share in shares) * units
    if total > units + _WHOLE_SLACK * max(1, len(shares)):
        raise ShareError(
            f"shares of {len(shares)} keys add up to {total:.4f} of {units} units; allowed: at most all of them; "
            "check the plan against its invariants first"
        )


def _is_whole(amount: float) -> bool:
    return round(amount) >= 1 and abs(amount - round(amount)) <= _WHOLE_SLACK


def _place_whole(
    whole: Mapping[Key, int], rest: Mapping[Key, float], units: int, before: Mapping[Key, tuple[int, ...]]
) -> dict[Key, tuple[int, ...]]:
    """Units of the whole-unit shares: their own first, then those that disturb no fractional share."""
    free = set(range(units))
    placed: dict[Key, tuple[int, ...]] = {}
    for key, count in whole.items():
        held = set(before.get(key, ()))
        if len(held) == count and held <= free:
            placed[key] = tuple(sorted(held))
            free -= held
    disturbed = {unit for key in rest for unit in before.get(key, ())}
    for key, count in whole.items():
        if key in placed:
            continue
        held = set(before.get(key, ()))
        # Own units first, so that a share that grew keeps what it had; then units that nobody has to leave.
        best = sorted(free, key=lambda unit: (unit not in held, unit in disturbed, unit))[:count]
        placed[key] = tuple(sorted(best))
        free -= set(best)
    return placed


def _place_rest(
    rest: Mapping[Key, float], free: Sequence[int], before: Mapping[Key, tuple[int, ...]]
) -> dict[Key, tuple[int, ...]]:
    """Units of the fractional shares, kept where they were unless that would scatter another one."""
    room = dict.fromkeys(free, 1.0)
    kept: dict[Key, tuple[int, ...]] = {}
    # Earliest right end first: with intervals filled from the left, no other order fits more of them.
    for key in sorted((k for k in rest if before.get(k)), key=lambda k: (max(before[k]), min(before[k]))):
        held = tuple(sorted(set(before[key])))
        if len(held) > _most_units(rest[key]) or len(held) + _WHOLE_SLACK < rest[key]:
            continue
        if all(unit in room for unit in held) and sum(room[unit] for unit in held) >= rest[key] - _WHOLE_SLACK:
            _pour(rest[key], held, room)
            kept[key] = held
    placed = kept | {key: _pour(amount, free, room) for key, amount in rest.items() if key not in kept}
    if all(len(placed[key]) <= _most_units(amount) for key, amount in rest.items()):
        return placed
    room = dict.fromkeys(free, 1.0)
    return {key: _pour(amount, free, room) for key, amount in rest.items()}


def _most_units(amount: float) -> int:
    """Units that an interval of that length can touch."""
    return math.ceil(amount - _WHOLE_SLACK) + 1


def _pour(amount: float, line: Sequence[int], room: dict[int, float]) -> tuple[int, ...]:
    """Take `amount` from the room left on the line, from its left end; returns the units touched."""
    touched: list[int] = []
    for unit in line:
        if amount <= _WHOLE_SLACK and touched:
            break
        if room[unit] <= _WHOLE_SLACK:
            continue
        taken = min(amount, room[unit])
        room[unit] -= taken
        amount -= taken
        touched.append(unit)
    return tuple(touched) or tuple(line[-1:])
