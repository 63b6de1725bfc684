"""Splitting a global batch into micro-batches, and the batches one change away from the present one.

Pure arithmetic on settings and limits; knows nothing of speed or noise. Called by `policies.decide.dials`.
"""

from __future__ import annotations

import dataclasses

from orchestrator.policies.plan import Settings
from orchestrator.policies.snapshot import DialLimits


def most_micro_batch(limits: DialLimits, micro_batch_cap: int | None) -> int:
    """The largest micro-batch that is allowed and, as far as that was seen, does not overflow."""
    return min(limits.max_micro_batch, micro_batch_cap or limits.max_micro_batch)


def neighbours(settings: Settings, limits: DialLimits, micro_batch_cap: int | None = None) -> tuple[Settings, ...]:
    """Other batches that differ by at most a factor two in micro-batch, accumulation and global batch.

    All lie inside the limits; of two splits of one global batch only the one with less accumulation is kept.
    Sorted by global batch.
    """
    max_micro = most_micro_batch(limits, micro_batch_cap)
    best: dict[int, Settings] = {}
    for micro_batch in _one_change(settings.micro_batch, max_micro):
        for grad_accum in _one_change(settings.grad_accum, settings.grad_accum * 2):
            other = dataclasses.replace(settings, micro_batch=micro_batch, grad_accum=grad_accum)
            if not _is_near(settings, other) or not _is_allowed(other, limits, settings):
                continue
            rival = best.get(other.global_batch)
            if rival is None or other.grad_accum < rival.grad_accum:
                best[other.global_batch] = other
    best.update(_to_the_edges(settings, limits, max_micro, set(best)))
    same = best.get(settings.global_batch)
    if same is not None and same.grad_accum >= settings.grad_accum:
        del best[settings.global_batch]
    return tuple(best[batch] for batch in sorted(best))


def _one_change(value: int, largest: int) -> tuple[int, ...]:
    """Half of, the same and twice a count, at most `largest` unless it already is larger."""
    options = {(value + 1) // 2, value, 2 * value}
    if value < largest < 2 * value:
        options.add(largest)
    return tuple(sorted(option for option in options if option <= max(value, largest)))


def _to_the_edges(settings: Settings, limits: DialLimits, max_micro: int, have: set[int]) -> dict[int, Settings]:
    """The batches at the limits themselves, where doubling or halving would overshoot and a split exists."""
    edges = {}
    for batch in (limits.min_global_batch, limits.max_global_batch):
        per_step = settings.num_workers * settings.grad_accum
        micro_batch, rest = divmod(batch, per_step)
        if rest or batch in have or not 1 <= micro_batch <= max(max_micro, settings.micro_batch):
            continue
        other = dataclasses.replace(settings, micro_batch=micro_batch)
        if other != settings and _is_near(settings, other):
            edges[batch] = other
    return edges


def _is_near(old: Settings, new: Settings) -> bool:
    pairs = ((old.global_batch, new.global_batch), (old.micro_batch, new.micro_batch))
    return all(one <= 2 * other and other <= 2 * one for one, other in pairs)


def _is_allowed(settings: Settings, limits: DialLimits, now: Settings) -> bool:
    is_within = limits.min_global_batch <= settings.global_batch <= limits.max_global_batch
    return is_within and settings.grad_accum <= max(now.grad_accum, limits.max_grad_accum or settings.grad_accum)
