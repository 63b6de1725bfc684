"""Checks of the step records: nothing torn between ranks, no sample lost or repeated, no record missing.

Knows of the journal only what it is handed. Times of records and journal are compared as they are, which holds for one
node, where CLOCK_MONOTONIC is common. Called by `view.verify`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from orchestrator.control.events import Reported, TrialContinued, TrialEnded
from orchestrator.control.journal import History
from orchestrator.telemetry.record import FLAG_ROLLED_BACK, FLAG_SKIPPED, num_steps_of
from orchestrator.view.finding import Code, Finding
from orchestrator.view.verify_grants import OpenOffer

GRACE_S = 5.0
GRACE_STEPS = 10
"""An offer is unanswered when the trial did this many steps that began at least this long after it."""

_SETTINGS = ("micro_batch", "grad_accum", "num_workers", "tier", "share")
_COLUMNS = ("seq", "step", "generation", "cursor", "num_samples", "flags", "start_s", *_SETTINGS)

Rows = Mapping[str, npt.NDArray[Any]]
"""Columns of one rank in one attempt, by `seq`."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """The records of one attempt of a trial, by rank."""

    trial_id: str
    attempt: int
    ranks: dict[int, Rows] = field(default_factory=dict)

    @property
    def leader(self) -> Rows:
        """The lowest rank there are records of."""
        return self.ranks[min(self.ranks)]


def attempts_of(steps: pa.Table) -> list[Attempt]:
    """The step table cut into attempts, in order of trial and attempt. It must be sorted as `store.read_table` does."""
    if not steps.num_rows:
        return []
    keys = {name: _column(steps, name) for name in ("trial_id", "attempt", "rank")}
    columns = {name: _column(steps, name) for name in _COLUMNS}
    is_first = np.zeros(steps.num_rows, dtype=bool)
    is_first[0] = True
    for values in keys.values():
        is_first[1:] |= values[1:] != values[:-1]
    starts = [*np.flatnonzero(is_first), steps.num_rows]
    found: dict[tuple[str, int], Attempt] = {}
    for start, end in pairwise(starts):
        key = str(steps["trial_id"][int(start)].as_py()), int(keys["attempt"][start])
        rows = {name: values[start:end] for name, values in columns.items()}
        found.setdefault(key, Attempt(*key)).ranks[int(keys["rank"][start])] = rows
    return list(found.values())


def gaps(attempts: Sequence[Attempt]) -> Iterator[Finding]:
    """Numbers missing in a rank's sequence of records."""
    for attempt in attempts:
        for rank, rows in attempt.ranks.items():
            num_sent = int(rows["seq"][-1]) + 1
            if num_sent != len(rows["seq"]):
                missing = f"{num_sent - len(rows['seq'])} of {num_sent} step records"
                text = f"{missing} of rank {rank}, attempt {attempt.attempt}, are missing"
                yield Finding(code=Code.TELEMETRY_GAP, text=text, trial_id=attempt.trial_id)


def torn(attempts: Sequence[Attempt]) -> Iterator[Finding]:
    """Allocations that ranks began at different steps, and steps at which ranks ran with different settings."""
    for attempt in attempts:
        # Where records are missing the first one seen proves nothing; the gap itself is reported.
        ranks = {rank: rows for rank, rows in attempt.ranks.items() if not _has_gap(rows)}
        if len(ranks) > 1:
            yield from _torn_generations(attempt, ranks)
            yield from _differing_ranks(attempt, ranks)


def unanswered(attempts: Sequence[Attempt], offers: Sequence[OpenOffer]) -> Iterator[Finding]:
    """Offers a trial never answered although it ran on."""
    by_key = {(attempt.trial_id, attempt.attempt): attempt for attempt in attempts}
    for offer in offers:
        attempt = by_key.get((offer.trial_id, offer.attempt))
        if attempt is None:
            continue
        started_s = attempt.leader["start_s"]
        is_late = started_s > offer.offered_s + GRACE_S
        if offer.ended_s is not None:
            is_late &= started_s < offer.ended_s
        num_steps = int(is_late.sum())
        if num_steps >= GRACE_STEPS:
            late = f"{num_steps} steps began over {GRACE_S:g} s later"
            text = f"plan {offer.generation} was offered but never acknowledged; {late}"
            yield Finding(
                code=Code.UNACKNOWLEDGED, text=text, trial_id=offer.trial_id, generation=int(offer.generation)
            )


def samples(attempts: Sequence[Attempt], history: History, notes: list[str]) -> Iterator[Finding]:
    """Samples that the surviving steps of a trial skip or take twice.

    Steps that a later attempt did again, because it resumed from an earlier commit, do not count. Steps whose records
    died with a worker cannot be checked; they are noted.
    """
    by_trial: dict[str, list[Attempt]] = {}
    for attempt in attempts:
        by_trial.setdefault(attempt.trial_id, []).append(attempt)
    taken: dict[str, TrialContinued] = {e.trial_id: e for e in history.of(TrialContinued) if e.origin is not None}
    results: dict[str, list[Reported]] = {}
    for result in history.of(Reported):
        if result.trial_id not in taken or result.seq > taken[result.trial_id].seq:
            results.setdefault(result.trial_id, []).append(result)
    ended = {entry.trial_id: entry for entry in history.of(TrialEnded)}
    for trial_id, all_of_it in by_trial.items():
        own = all_of_it
        if trial_id in taken:  # what it did before it took up another trial's state is no part of its course
            own = [attempt for attempt in own if attempt.attempt >= taken[trial_id].attempt]
            if not own:
                continue
        lineage = _lineage(own)
        commits = {(result.step, result.num_samples) for result in results.get(trial_id, []) if result.checkpoint}
        yield from _breaks(trial_id, lineage, commits, notes)
        claims = sorted((step, num) for step, num in commits)
        end = next((entry for key, entry in ended.items() if key == trial_id), None)
        if end is not None:
            claims.append((end.step, end.num_samples))
        yield from _false_claims(trial_id, lineage, claims)


def _torn_generations(attempt: Attempt, ranks: Mapping[int, Rows]) -> Iterator[Finding]:
    first: dict[int, dict[int, int]] = {}
    for rank, rows in ranks.items():
        generations, index = np.unique(rows["generation"], return_index=True)
        for generation, step in zip(generations, rows["step"][index], strict=True):
            first.setdefault(int(generation), {})[rank] = int(step)
    for generation, begun in sorted(first.items()):
        earliest = min(begun.values())
        never = [rank for rank, rows in ranks.items() if rank not in begun and int(rows["step"].max()) >= earliest]
        if len(set(begun.values())) > 1 or never:
            told = [f"rank {rank} at step {step}" for rank, step in sorted(begun.items())]
            told += [f"rank {rank} never" for rank in never]
            text = f"plan {generation} was applied by {', '.join(told)} (attempt {attempt.attempt})"
            yield Finding(code=Code.TORN_ALLOCATION, text=text, trial_id=attempt.trial_id, generation=generation)


def _differing_ranks(attempt: Attempt, ranks: Mapping[int, Rows]) -> Iterator[Finding]:
    """Compare every rank with the lowest, at steps that both did exactly once (a skipped step is done again)."""
    lowest, *others = sorted(ranks)
    for rank in others:
        here, there = _common(ranks[lowest], ranks[rank])
        for names, code in ((_SETTINGS, Code.TORN_ALLOCATION), (("cursor", "num_samples"), Code.SAMPLES_REPEATED)):
            for name in names:
                mine, theirs = ranks[lowest][name][here], ranks[rank][name][there]
                wrong = np.flatnonzero(mine != theirs)
                if len(wrong):
                    step = int(ranks[lowest]["step"][here][wrong[0]])
                    values = f"{mine[wrong[0]]} on rank {lowest}, {theirs[wrong[0]]} on rank {rank}"
                    text = (
                        f"{name} differs between ranks at {len(wrong)} steps, first at step {step}:"
                        f" {values} (attempt {attempt.attempt})"
                    )
                    yield Finding(code=code, text=text, trial_id=attempt.trial_id)


def _common(mine: Rows, theirs: Rows) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """Positions of the steps that occur exactly once in both."""
    once = []
    for rows in (mine, theirs):
        steps, index, count = np.unique(rows["step"], return_index=True, return_counts=True)
        once.append((steps[count == 1], index[count == 1]))
    (steps_a, index_a), (steps_b, index_b) = once
    _, in_a, in_b = np.intersect1d(steps_a, steps_b, assume_unique=True, return_indices=True)
    return index_a[in_a], index_b[in_b]


def _lineage(attempts: Sequence[Attempt]) -> dict[str, npt.NDArray[np.int64]]:
    """Rows of the steps that made the final state, in order: of each course those before the next one's first step.

    A new course begins with an attempt, and where a trial went back to an earlier state in memory.
    """
    parts: list[dict[str, npt.NDArray[np.int64]]] = []
    limit = np.iinfo(np.int64).max
    for attempt in sorted(attempts, key=lambda item: item.attempt, reverse=True):
        for rows in reversed(_courses(attempt.leader)):
            survives = rows["step"] < limit
            names = ("seq", "step", "cursor", "num_samples", "flags")
            part = {name: rows[name][survives].astype(np.int64) for name in names}
            part["num_steps"] = num_steps_of(rows)[survives]
            part["attempt"] = np.full(len(part["seq"]), attempt.attempt, dtype=np.int64)
            parts.insert(0, part)
            limit = min(limit, int(rows["step"].min()))
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _courses(rows: Rows) -> list[Rows]:
    """The rows of an attempt cut where it went back."""
    cuts = np.flatnonzero(rows["flags"] & FLAG_ROLLED_BACK)
    bounds = sorted({0, *cuts.tolist(), len(rows["step"])})
    return [{name: values[start:end] for name, values in rows.items()} for start, end in pairwise(bounds)]


def _breaks(
    trial_id: str, rows: Mapping[str, npt.NDArray[np.int64]], commits: set[tuple[int, int]], notes: list[str]
) -> Iterator[Finding]:
    cursor, end = rows["cursor"], rows["cursor"] + rows["num_samples"]
    done = rows["step"] + np.where(rows["flags"] & FLAG_SKIPPED, 0, rows["num_steps"])
    if len(cursor) and rows["seq"][0] == 0 and rows["step"][0] == 0 and cursor[0] != 0:
        yield _jump(trial_id, 0, int(cursor[0]), 0)
    for i in np.flatnonzero(cursor[1:] != end[:-1]):
        delta, num_unseen = int(cursor[i + 1] - end[i]), int(rows["step"][i + 1] - done[i])
        is_same_attempt = rows["attempt"][i] == rows["attempt"][i + 1]
        is_unseen = rows["seq"][i + 1] != rows["seq"][i] + 1 if is_same_attempt else num_unseen > 0
        if is_unseen and delta > 0:
            step = int(rows["step"][i + 1])
            if not is_same_attempt and (step, int(cursor[i + 1])) not in commits:
                notes.append(
                    f"{trial_id}: records of {num_unseen} steps before step {step} died with a worker;"
                    f" the {delta} samples of them cannot be checked"
                )
            continue
        yield _jump(trial_id, int(end[i]), int(cursor[i + 1]), int(rows["step"][i + 1]))


def _jump(trial_id: str, expected: int, seen: int, step: int) -> Finding:
    code = Code.SAMPLES_LOST if seen > expected else Code.SAMPLES_REPEATED
    verb = "skips" if seen > expected else "repeats"
    text = f"step {step} begins at sample {seen} instead of {expected}: it {verb} {abs(seen - expected)} samples"
    return Finding(code=code, text=text, trial_id=trial_id)


def _false_claims(
    trial_id: str, rows: Mapping[str, npt.NDArray[np.int64]], claims: Sequence[tuple[int, int]]
) -> Iterator[Finding]:
    """Commits and ends whose sample count is not that of the steps before them."""
    trained = rows["flags"] & FLAG_SKIPPED == 0
    steps, ends = (rows["step"] + rows["num_steps"])[trained], (rows["cursor"] + rows["num_samples"])[trained]
    by_step = dict(zip(steps.tolist(), ends.tolist(), strict=True))
    for step, num_samples in claims:
        seen = by_step.get(step, num_samples)
        if seen != num_samples:
            code = Code.SAMPLES_LOST if num_samples > seen else Code.SAMPLES_REPEATED
            text = f"after step {step} the journal counts {num_samples} samples, the step records {seen}"
            yield Finding(code=code, text=text, trial_id=trial_id)


def _column(steps: pa.Table, name: str) -> npt.NDArray[Any]:
    column = steps[name]
    if pa.types.is_dictionary(column.type):
        column = pa.chunked_array([chunk.indices for chunk in column.unify_dictionaries().chunks])
    if column.null_count:  # of an older schema: the same everywhere, so that nothing is concluded from it
        column = pc.fill_null(column, pa.scalar(-1 if name == "tier" else 0, column.type))
    return np.asarray(column.to_numpy())


def _has_gap(rows: Rows) -> bool:
    return int(rows["seq"][-1]) + 1 != len(rows["seq"])
