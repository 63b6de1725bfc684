"""What must hold of every plan, whoever made it: the same check live, in a replay and in tests.

The numbers in the comments are those of `policies/README.md`. A policy may be anybody's code and return anything, so
nothing here trusts a type: fields are read by name, exact types are compared first, and only then values. The snapshot
is ours and is trusted. Called by the controller before a plan is journalled, and by `orchestrator verify`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeGuard

from orchestrator.policies.plan import (
    Allocation,
    Alternative,
    DeviceId,
    Effect,
    NodeWish,
    Plan,
    Settings,
    TrialId,
    can_split,
    effect_of,
)
from orchestrator.policies.snapshot import Snapshot, TrialView
from orchestrator.policies.tier import Tier

TOLERANCE = 1e-9
MAX_ALTERNATIVES = 8
MAX_INT = 2**40
"""No count in a plan comes near it; beyond it even printing a number could fail."""
_MISSING = object()
_TYPE_NAME = type.__dict__["__name__"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Violation:
    """One broken invariant.

    Attributes:
        code: which one, a dotted word that does not change.
        trial_id: the trial it concerns, None for the plan as a whole.
        text: one line with the value seen and what is allowed.
    """

    code: str
    trial_id: TrialId | None
    text: str


def check(snapshot: Snapshot, plan: object) -> tuple[Violation, ...]:
    """All invariants that `plan`, of whatever type, breaks in the world of `snapshot`. Empty means legal."""
    return tuple(_violations(snapshot, plan))


def _violations(snapshot: Snapshot, plan: object) -> Iterator[Violation]:
    if type(plan) is not Plan:
        yield _plan_violation("plan.type", f"decide returned a {_kind(plan)}; allowed: Plan")
        return
    generation = _read(plan, "generation")
    expected = snapshot.plan.generation + 1  # 1
    if not _is_int(generation) or generation != expected:
        yield _plan_violation("plan.generation", f"generation={_show(generation)}; allowed: {expected}")
    if problem := _text_problem(_read(plan, "reason")):
        yield _plan_violation("plan.reason", f"the plan's reason {problem}")
    rows = _read(plan, "allocations")
    if type(rows) is not tuple:
        yield _plan_violation("plan.allocations", f"allocations is a {_kind(rows)}; allowed: a tuple of Allocation")
        return
    yield from _roster(snapshot, rows)
    yield from _rows(snapshot, rows)
    yield from (_plan_violation("nodes", text) for text in _wish_problems(snapshot, _read(plan, "nodes")))


def _rows(snapshot: Snapshot, rows: tuple[object, ...]) -> Iterator[Violation]:
    """Every allocation by itself, then the sum of the shares on each device."""
    trials = {str(trial.trial_id): trial for trial in snapshot.trials}
    in_force = {allocation.trial_id: allocation.settings for allocation in snapshot.plan.allocations}
    devices = frozenset(str(device.device_id) for device in snapshot.devices)
    load: dict[DeviceId, list[float]] = {}
    used: dict[str, list[float]] = {}
    held: dict[str, list[float]] = {}
    for row in rows:
        trial_id = _read(row, "trial_id")
        trial = trials.get(trial_id) if type(trial_id) is str else None
        if trial is None or type(row) is not Allocation:
            continue
        old = in_force.get(trial.trial_id) if trial.override is None else trial.override.settings
        for code, text in _allocation_problems(trial, old, row, devices):
            yield Violation(code=code, trial_id=trial.trial_id, text=f"{_show(trial_id)}: {text}")
        share, placement = _read(_read(row, "settings"), "share"), _seats(trial, _read(row, "placement"))
        if _is_number(share):
            for device_id in placement:
                load.setdefault(device_id, []).append(float(share))
            used.setdefault(trial.user, []).append(share * len(placement))
            held.setdefault(trial.user, []).append(0.0 if old is None else old.share * len(trial.placement))
    for device_id, shares in load.items():  # 6
        if math.fsum(shares) > 1 + TOLERANCE:
            total = f"shares on {device_id!r} sum to {math.fsum(shares):.9f} over {len(shares)} ranks"
            yield _plan_violation("device.overcommitted", f"{total}; allowed: 1")
    for quota in snapshot.quotas:  # 15
        total_used, total_held = (math.fsum(table.get(quota.user, ())) for table in (used, held))
        if total_used > max(quota.max_devices, total_held) + TOLERANCE:
            text = f"user {_show(quota.user)} gets {total_used:.6f} devices; allowed: {quota.max_devices:g}, its quota"
            yield _plan_violation("quota", text)


def _wish_problems(snapshot: Snapshot, nodes: object) -> Iterator[str]:
    """17: no wish at all, or one per type of node, within the most there may be and the budget."""
    if type(nodes) is tuple and not nodes:
        return
    if type(nodes) is not tuple or any(type(wish) is not NodeWish for wish in nodes):
        yield f"nodes is {_show(nodes)}; allowed: a tuple of NodeWish"
        return
    names = [_read(wish, "node_type") for wish in nodes]
    known = [node_type.name for node_type in snapshot.node_types]
    if not all(type(name) is str for name in names) or names != known:
        yield f"nodes are of the types {_show(tuple(names))}; allowed: {_show(tuple(known))}, each once"
        return
    cost = 0.0
    for wish, node_type in zip(nodes, snapshot.node_types, strict=True):
        count, since_s = _read(wish, "num_nodes"), _read(wish, "since_s")
        if not _is_int(count) or not 0 <= count <= node_type.max_nodes:
            yield f"{node_type.name}: num_nodes={_show(count)}; allowed: 0 to {node_type.max_nodes}"
            return
        cost += count * node_type.price_per_hour
        if not _is_number(_read(wish, "cost_per_hour")) or not _is_number(since_s):  # 12
            yield f"{node_type.name}: cost_per_hour and since_s; allowed: finite numbers"
        if type(_read(wish, "grows")) is not bool:
            yield f"{node_type.name}: grows={_show(_read(wish, 'grows'))}; allowed: True or False"
        if problem := _text_problem(_read(wish, "reason")):  # 10
            yield f"{node_type.name}: the reason {problem}"
    budget = snapshot.max_cost_per_hour
    if budget is not None and cost > budget + TOLERANCE:
        yield f"nodes cost {cost:g} an hour; allowed: {budget:g}"


def _roster(snapshot: Snapshot, rows: tuple[object, ...]) -> Iterator[Violation]:
    """2: exactly one allocation per trial of the snapshot, none for others, sorted."""
    seen: list[str] = []
    for index, row in enumerate(rows):
        if type(row) is not Allocation:
            yield _plan_violation("plan.allocations", f"allocations[{index}] is a {_kind(row)}; allowed: Allocation")
        elif type(trial_id := _read(row, "trial_id")) is not str:
            text = f"allocations[{index}].trial_id={_show(trial_id)}; allowed: a str"
            yield _plan_violation("plan.allocations", text)
        else:
            seen.append(trial_id)
    known = {str(trial.trial_id) for trial in snapshot.trials}
    counts = Counter(seen)
    for trial_id in sorted(known - counts.keys()):
        text = f"no allocation for {_show(trial_id)}; allowed: exactly one per trial"
        yield Violation(code="plan.missing", trial_id=TrialId(trial_id), text=text)
    for trial_id, count in sorted(counts.items()):
        if trial_id not in known:
            yield _plan_violation("plan.unknown", f"an allocation for {_show(trial_id)}, which is not in the snapshot")
        elif count > 1:
            text = f"{count} allocations for {_show(trial_id)}; allowed: exactly one"
            yield Violation(code="plan.repeated", trial_id=TrialId(trial_id), text=text)
    if seen != sorted(seen):
        yield _plan_violation("plan.order", "allocations are not sorted by trial id; allowed: ascending")


def _allocation_problems(
    trial: TrialView, old: Settings | None, row: Allocation, devices: frozenset[str]
) -> Iterator[tuple[str, str]]:
    """Every broken invariant of one allocation, as (code, text)."""
    settings, placement = _read(row, "settings"), _read(row, "placement")
    if problem := _placement_problem(trial, placement, _read(settings, "share"), devices):  # 3
        yield "placement", f"placement={_show(placement)}; allowed: {problem}"
    if problem := _text_problem(_read(row, "reason")):  # 10
        yield "reason", f"the reason {problem}"
    if problem := _text_problem(_read(row, "binding")):
        yield "binding", f"the binding constraint {problem}"
    for name in ("predicted_goodput", "predicted_gain", "cost_s"):  # 12
        value = _read(row, name)
        if (value is not None or name == "cost_s") and not _is_number(value):
            yield name, f"{name}={_show(value)}; allowed: a finite number{'' if name == 'cost_s' else ' or None'}"
    yield from _alternative_problems(_read(row, "alternatives"))
    types_wrong = list(_settings_problems("settings", settings))
    yield from types_wrong
    if types_wrong or type(settings) is not Settings:
        return
    seats = _seats(trial, placement)
    resize_to = _read(row, "resize_to")
    if problem := _resize_problem(trial, settings, resize_to):  # 16
        yield "resize_to", f"resize_to={_show(resize_to)}; allowed: {problem}"
    is_stranded = not devices.issuperset(trial.placement)
    yield from _limit_problems(trial, old, settings, seats, may_pause=is_stranded)
    yield from _promise_problems(trial, old, settings, seats, devices)
    effect, needed = _read(row, "effect"), effect_of(old, settings, moves=seats != trial.placement)  # 9
    needed = needed if resize_to is None else Effect.RESTART
    if type(effect) is not Effect or effect is not needed:
        yield "effect", f"effect={_show(effect)}; allowed: {needed.value!r}, what the change takes"


def _placement_problem(trial: TrialView, placement: object, share: object, devices: frozenset[str]) -> str | None:
    """What is allowed where the placement is wrong, else None."""
    if not _are_ids(placement):
        return "a tuple of device ids"
    if not trial.limits.can_move:
        return None if placement == trial.placement else f"{_show(trial.placement)}, the trial's own"
    if share == 0:
        return None if not placement else "(), for a trial that may move and gets share 0"
    if not placement or len(set(placement)) != len(placement):
        return "another device for each rank"
    gone = sorted(set(placement) - devices)
    return f"devices of the snapshot, which {_show(gone[0])} is not" if gone else None


def _promise_problems(
    trial: TrialView, old: Settings | None, new: Settings, placement: tuple[DeviceId, ...], devices: frozenset[str]
) -> Iterator[tuple[str, str]]:
    """13, 14: what a running trial was promised, as long as the devices it runs on are there."""
    if old is None or not trial.placement or not old.share > 0 or not devices.issuperset(trial.placement):
        return
    held, kept = old.share * len(trial.placement), min(trial.guaranteed, old.share * len(trial.placement))
    given = new.share * len(placement)
    if given < kept - TOLERANCE:  # 13
        yield "guaranteed", f"{given:.6f} devices of the {held:.6f} it has; allowed: at least {kept:.6f}, guaranteed"
    if trial.is_protected and (placement != trial.placement or new.share == 0):  # 14
        yield "protected", f"placement={_show(placement)} at share {new.share}; allowed: where it runs, it is protected"


def _settings_problems(where: str, settings: object) -> Iterator[tuple[str, str]]:
    """4, 5, 8, 12: types, finiteness and lower bounds of the dials, which hold in every world."""
    if type(settings) is not Settings:
        yield "settings", f"{where} is a {_kind(settings)}; allowed: Settings"
        return
    share, tier = _read(settings, "share"), _read(settings, "tier")
    if not _is_number(share) or not 0 <= share <= 1:
        yield "share", f"{where}.share={_show(share)}; allowed: a finite number in [0, 1]"
    for name in ("micro_batch", "grad_accum", "num_workers"):
        value = _read(settings, name)
        if not _is_int(value) or value < 1:
            yield name, f"{where}.{name}={_show(value)}; allowed: an integer >= 1"
    if type(tier) is not Tier:
        yield "tier", f"{where}.tier={_show(tier)}; allowed: a Tier"


def _limit_problems(
    trial: TrialView, old: Settings | None, new: Settings, placement: tuple[DeviceId, ...], *, may_pause: bool
) -> Iterator[tuple[str, str]]:
    """4 to 8: the trial's limits. What an override or an earlier plan already set may stay, though nothing new."""
    limits = trial.limits
    if problem := _workers_problem(trial, old, new, placement):
        yield "num_workers", f"num_workers={new.num_workers}; allowed: {problem}"
    may_pause = may_pause or limits.can_pause or not trial.placement or (old is not None and old.share == 0)
    inside = limits.min_share - TOLERANCE <= new.share <= limits.max_share + TOLERANCE
    if not inside and not (new.share == 0 and may_pause):
        allowed = f"[{limits.min_share}, {limits.max_share}]{' or 0' if may_pause else ''}"
        yield "share", f"share={new.share}; allowed: {allowed}"
    if new.micro_batch > limits.max_micro_batch and (old is None or new.micro_batch > old.micro_batch):
        yield "micro_batch", f"micro_batch={new.micro_batch}; allowed: <= {limits.max_micro_batch}"
    most = limits.max_grad_accum
    if most is not None and new.grad_accum > most and (old is None or new.grad_accum > old.grad_accum):
        yield "grad_accum", f"grad_accum={new.grad_accum}; allowed: <= {most}"
    same_batch = old is not None and new.global_batch == old.global_batch
    # A batch need not divide by a number of ranks that the policy chose: less than one sample each may be off.
    slack = new.num_workers * new.grad_accum - 1 if limits.can_move else 0
    low, high = limits.min_global_batch - slack, limits.max_global_batch + slack
    if not low <= new.global_batch <= high and not same_batch:
        allowed = f"[{limits.min_global_batch}, {limits.max_global_batch}]"
        yield "global_batch", f"global batch {_show(new.global_batch)}; allowed: {allowed}"
    if new.tier not in limits.tiers and (old is None or new.tier is not old.tier):
        yield "tier", f"tier={new.tier.value!r}; allowed: {', '.join(tier.value for tier in limits.tiers)}"


def _workers_problem(
    trial: TrialView, old: Settings | None, new: Settings, placement: tuple[DeviceId, ...]
) -> str | None:
    """What is allowed where the number of ranks is wrong, else None."""
    limits, num_workers = trial.limits, new.num_workers
    if (placement or not limits.can_move) and num_workers != len(placement):
        return f"{len(placement)}, the length of the placement"
    if not limits.can_move or (old is not None and old.num_workers == num_workers):
        return None
    low, high = limits.min_workers or trial.start.num_workers, limits.max_workers or trial.start.num_workers
    return None if low <= num_workers <= high else f"{low} to {high}"


def _resize_problem(trial: TrialView, settings: Settings, resize_to: object) -> str | None:
    """What is allowed where a wish for another worker group is wrong, else None."""
    if resize_to is None:
        return None
    if not trial.limits.can_resize or trial.is_protected:
        return "None, its number of ranks is fixed"
    low, high = trial.limits.min_workers or trial.start.num_workers, trial.limits.max_workers or trial.start.num_workers
    if not _is_int(resize_to) or not low <= resize_to <= high or resize_to == len(trial.placement):
        return f"{low} to {high}, other than the {len(trial.placement)} it has, or None"
    for batch in (settings, trial.start):
        if not can_split(batch, resize_to):
            return f"a divisor of the global batch, {batch.global_batch}, or None"
    return None


def _alternative_problems(alternatives: object) -> Iterator[tuple[str, str]]:
    """11, 12: at most eight, of the right types, with finite numbers."""
    if type(alternatives) is not tuple or len(alternatives) > MAX_ALTERNATIVES:
        seen = f"{len(alternatives)} of them" if type(alternatives) is tuple else f"a {_kind(alternatives)}"
        yield "alternatives", f"alternatives: {seen}; allowed: a tuple of at most {MAX_ALTERNATIVES}"
        return
    for index, item in enumerate(alternatives):
        where = f"alternatives[{index}]"
        if type(item) is not Alternative:
            yield "alternatives", f"{where} is a {_kind(item)}; allowed: Alternative"
            continue
        goodput = _read(item, "goodput")
        if goodput is not None and not _is_number(goodput):
            yield "alternatives", f"{where}.goodput={_show(goodput)}; allowed: a finite number or None"
        for _, text in _settings_problems(f"{where}.settings", _read(item, "settings")):
            yield "alternatives", text


def _text_problem(value: object) -> str | None:
    """What is wrong with a sentence, or None."""
    if type(value) is not str:
        return f"is a {_kind(value)}; allowed: a str"
    if not value.strip():
        return "is empty; allowed: one sentence"
    if not value.isprintable():  # line breaks, control characters, and halves of a surrogate that no file can hold
        return f"is not one printable line ({_show(value)}); allowed: one sentence without line breaks"
    return None


def _plan_violation(code: str, text: str) -> Violation:
    return Violation(code=code, trial_id=None, text=text)


def _read(owner: object, name: str) -> object:
    """A field of a plan's value; a marker where a half-built object lacks it or the owner is something else."""
    if type(owner) not in (Plan, Allocation, Settings, Alternative, NodeWish):
        return _MISSING
    return getattr(owner, name, _MISSING)


def _seats(trial: TrialView, placement: object) -> tuple[DeviceId, ...]:
    """The devices a row means: the trial's own unless it may move and the row has something usable."""
    return placement if trial.limits.can_move and _are_ids(placement) else trial.placement


def _are_ids(placement: object) -> TypeGuard[tuple[DeviceId, ...]]:
    """Whether it is a tuple of plain strings, as device ids are."""
    return type(placement) is tuple and all(type(device_id) is str for device_id in placement)


def _is_int(value: object) -> TypeGuard[int]:
    return type(value) is int and -MAX_INT < value < MAX_INT


def _is_number(value: object) -> TypeGuard[float]:
    return _is_int(value) or (type(value) is float and math.isfinite(value))


def _kind(value: object) -> str:
    """The name of a value's type, read past whatever its metaclass may do."""
    return "missing field" if value is _MISSING else ascii(_TYPE_NAME.__get__(type(value)))[1:81].rstrip("'")


def _show(value: object) -> str:
    """A short text of a value that may be anything; calls no code of types that are not built in."""
    if type(value) is int and not _is_int(value):
        return f"an integer of {value.bit_length()} bits"
    if value is None or type(value) in (int, float, bool, Tier, Effect):
        return str(value)
    if type(value) is str:
        return repr(value[:80])
    if type(value) is tuple:
        inner = ", ".join(_show(item) if type(item) is not tuple else "..." for item in value[:8])
        return f"({inner}{', ...' if len(value) > 8 else ''})"
    return f"a {_kind(value)}"
