"""Which SM groups of a GPU each rank may use: whole groups, and none of them twice.

Two trials on one group leave half the card idle (measured: 437 against 610 TFLOP/s), so groups are never shared, unlike
the cores that `packing` cuts. Who keeps, gives and gets what follows from what each holds now: a share that shrinks
keeps a part of its groups and one that grows keeps all of them, so no two ever wait for each other. Pure arithmetic;
called by the ledger at every plan.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar

from orchestrator.errors import ShareError

Key = TypeVar("Key", bound=Hashable)

_SLACK = 1e-4
"""Groups by which a share may miss a whole number and still be one: shares are rounded on their way here."""


def count_groups(shares: Sequence[tuple[Key, float]], num_groups: int) -> dict[Key, int]:
    """Whole groups for each key: its share rounded down, at least one, and what is left by the largest remainder.

    Nobody gets more than its share rounded up. Keys beyond the number of groups get none, the last ones first.

    Raises:
        ShareError: the shares do not fit the device, or a key comes twice.
    """
    _check(shares, num_groups)
    wanted = [(key, share * num_groups) for key, share in shares if share > 0]
    counts = {key: 0 for key, _ in shares}
    for key, amount in wanted[:num_groups]:
        counts[key] = max(1, math.floor(amount + _SLACK))
    while sum(counts.values()) > num_groups:  # the guaranteed single groups were too many: the largest give them
        counts[max(counts, key=lambda key: counts[key])] -= 1
    by_remainder = sorted(wanted[:num_groups], key=lambda item: counts[item[0]] - item[1])
    for key, amount in by_remainder:
        if sum(counts.values()) < num_groups and counts[key] + _SLACK < amount:
            counts[key] += 1
    return counts


def assign_groups(
    shares: Sequence[tuple[Key, float]], num_groups: int, held: Mapping[Key, tuple[int, ...]] | None = None
) -> dict[Key, tuple[int, ...]]:
    """Groups for each key, ascending and disjoint; each result is a part of what the key holds, or all of it and more.

    Args:
        shares: key and fraction of the device in [0, 1]; keys are distinct and in a stable order.
        num_groups: groups of the device, >= 1.
        held: groups that keys were last offered; disjoint. Those of keys that are not in `shares` are left alone.

    Raises:
        ShareError: the shares do not fit the device, or a key comes twice.
    """
    counts = count_groups(shares, num_groups)
    before = {key: tuple(sorted(groups)) for key, groups in (held or {}).items()}
    strangers = {group for key, groups in before.items() if key not in counts for group in groups}
    kept = {key: before.get(key, ())[:count] for key, count in counts.items()}
    taken = strangers | {group for groups in kept.values() for group in groups}
    leaving = {group for key in counts for group in before.get(key, ())} - taken
    # Groups that nobody has to leave first: they can be used at once.
    free = sorted((g for g in range(num_groups) if g not in taken), key=lambda group: (group in leaving, group))
    assigned = {}
    for key, count in counts.items():
        missing = count - len(kept[key])
        assigned[key] = tuple(sorted((*kept[key], *free[:missing])))
        free = free[missing:] if missing > 0 else free
    return assigned


def _check(shares: Sequence[tuple[Key, float]], num_groups: int) -> None:
    if num_groups < 1:
        raise ShareError(f"a GPU with {num_groups} SM groups cannot be cut; allowed: >= 1")
    if len({key for key, _ in shares}) != len(shares):
        raise ShareError(f"a key comes twice in {[key for key, _ in shares]}; allowed: one share per key and device")
    total = math.fsum(share for _, share in shares)
    if any(not 0 <= share <= 1 + _SLACK for _, share in shares) or total > 1 + _SLACK * max(1, len(shares)):
        raise ShareError(
            f"shares {[round(share, 4) for _, share in shares]} do not fit one GPU; allowed: 0 to 1 each, 1 in all; "
            "check the plan against its invariants first"
        )
