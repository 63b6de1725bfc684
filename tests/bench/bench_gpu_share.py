"""Trials that share one GPU: by hand and ours, a protected one, whether shares are real, and how soon a trial begins.

Each part is a process of its own with a limit, its result one line of JSON that is appended to --out at once:

- `by_hand`: 1 to 8 hand-written loops (CUDA graph, bf16) under one MPS without caps; the best sum of tokens/s.
- `ours`: endless equal trials under `orchestrator run`, their number found by the knee; the same sum against that.
- `protected`: one trial beside three on SM groups, its share turned live; the curve, and what the policy chooses.
- `verify`, `control`: whether shares are seen to hold, and that shares which are none are seen too.
- `warm`: seconds from a slot to a trial's first step, against stock Ray Tune and Ray Train.
- `report`: what a report costs a trial, its commit piece by piece.

`report`, `verify_eager` and `ours_known` run only if asked for.

--rehearse runs all of it on cores, with a tiny model.
"""

from __future__ import annotations

import argparse
import statistics
from functools import partial
from pathlib import Path
from typing import Any

from tests.bench import run_timeline, share_parts, share_runs
from tests.bench.hand_trials import Hands, tokens_per_step
from tests.bench.part_process import Row, keep
from tests.bench.part_runner import Part, leave, left, main_of
from tests.bench.report_cost import report_cost
from tests.bench.results_file import say

LIMITS_S = {
    "by_hand": 110.0,
    "ours": 240.0,
    "ours_known": 150.0,
    "protected": 130.0,
    "verify": 150.0,
    "verify_eager": 150.0,
    "control": 80.0,
    "warm": 150.0,
    "report": 60.0,
}
DEFAULT = ("by_hand", "ours", "protected", "warm", "verify", "control")
COUNTS = (1, 2, 4, 6, 8)
WINDOW_S = 4.0
NUM_SLOTS = 8
TRAIN_S = {"7M": 50.0, "34M": 40.0, "tiny": 25.0}
LAST_S, LEAVING_S = 15.0, 1.0
SHARE_TARGET, WARM_TARGET = 0.95, 0.1
WARM_TRIALS, WARM_STEPS, STOCK_TRIALS = 6, 300, 2


def sizes(given: argparse.Namespace) -> tuple[str, ...]:
    """Of the models."""
    return ("tiny",) if given.rehearse else ("7M", "34M")


def by_hand(given: argparse.Namespace) -> Row:
    """Tokens/s of 1 to 8 hand-written loops at a time, of each size."""
    from orchestrator.share.mps import OwnMps

    counts, window_s = ((1, 2), 2.0) if given.rehearse else (COUNTS, WINDOW_S)
    mps = None if given.rehearse else OwnMps()
    found: Row = {"counts": counts, "window_s": window_s, "under_mps": mps is not None, "sizes": {}}
    try:
        hands = Hands(counts[-1], sizes(given), {} if mps is None else mps.start().environment)
        try:
            for size in sizes(given):
                found["sizes"][size] = _by_hand(hands, size, counts, window_s)
                leave(given, "by_hand", found["sizes"])
        finally:
            hands.close()
    finally:
        if mps is not None:
            mps.stop()
    return found


def _by_hand(hands: Hands, size: str, counts: tuple[int, ...], window_s: float) -> Row:
    sums: dict[str, float] = {}
    step_ms: dict[str, list[float]] = {}
    for count in counts:
        each = hands.together(count, size, window_s)
        sums[str(count)] = sum(tokens_per_step(size) * one["steps"] / one["seconds"] for one in each)
        step_ms[str(count)] = [1e3 * one["seconds"] / one["steps"] for one in each]
        say(f"by hand, {count} x {size}: {sums[str(count)]:.0f} tokens/s")
    best = max(sums, key=lambda count: sums[count])
    return {"tokens_per_s": sums, "step_ms": step_ms, "best_count": int(best), "best_tokens_per_s": sums[best]}


def ours(given: argparse.Namespace) -> Row:
    """Endless equal trials, as many at a time as the run finds best."""
    return _ours(given, "found", {size: TRAIN_S[size] for size in sizes(given)})


def ours_known(given: argparse.Namespace) -> Row:
    """The same once more beside the number of trials that `ours` has found: as many begin at once."""
    return _ours(given, "known", {size: LAST_S + 10 for size in sizes(given)})


def _ours(given: argparse.Namespace, name: str, train_s: dict[str, float]) -> Row:
    found: Row = {"target": SHARE_TARGET, "sizes": {}}
    for size in sizes(given):
        storage = given.directory / f"runs-{size}"  # one for both, since numbers found lie beside the runs
        slots = 2 if given.rehearse else NUM_SLOTS
        file = share_runs.run_file(
            f"{name}-{size}", storage, size, search={"num_trials": 2 * slots, "max_concurrent": slots}
        )
        limit_s = LIMITS_S[given.only] / len(sizes(given)) - 5
        try:
            done = share_runs.run(file, train_s=train_s[size], limit_s=limit_s)
        except RuntimeError as error:  # the other size is a finding of its own
            found["sizes"][size] = {"failed": str(error)}
            say(f"ours, {size}: {error}")
            continue
        row = done | _sums(Path(done["directory"]), size, left(given, "by_hand"))
        found["sizes"][size] = row
        say(f"ours, {size}: {row['last_tokens_per_s']:.0f} tokens/s, {row['last_count']} at a time; {row['knee']}")
        leave(given, f"ours-{size}", row)
        keep(given, f"ours, so far ({name} {size})", row)
    return found


def _sums(directory: Path, size: str, hand: Any) -> Row:
    """The sum of all speeds over the last seconds, and for each number of trials, against the best by hand."""
    table = run_timeline.steps_of(directory)
    factor = share_runs.model_of(size)[0]["context"]
    last_s = float(table["end_s"].max()) - LEAVING_S
    speeds = run_timeline.speed_between(table, last_s - LAST_S, last_s)
    by_count = {
        str(count): {**row, "tokens_per_s": factor * row["samples_per_s"]}
        for count, row in run_timeline.speed_by_count(table).items()
    }
    total = factor * sum(speeds.values())
    best = None if not hand or size not in hand else hand[size]["best_tokens_per_s"]
    slots = run_timeline.entries(directory, "slot")
    return {
        "last_tokens_per_s": total,
        "last_count": len(speeds),
        "by_count": by_count,
        "best_by_hand_tokens_per_s": best,
        "last_to_best_by_hand": None if best is None else total / best,
        "by_count_to_best_by_hand": None
        if best is None
        else {count: row["tokens_per_s"] / best for count, row in by_count.items()},
        "knee": run_timeline.knee_words(directory),
        "timeline": run_timeline.whole(directory),
        "graph_ratio": float((table["flags"] // 4 % 2).mean()),
        "max_memory_bytes": int(table["memory_bytes"].max()),
        "enforced_by": sorted({entry["hello"]["enforcement"] for entry in slots if entry.get("hello")}),
    }


def warm(given: argparse.Namespace) -> Row:
    """Seconds from a slot to the first step of a trial and to its first replayed one, against stock of the same run."""
    from tests.bench.stock_starts import run_stock

    size = sizes(given)[0]
    micro_batch = share_runs.model_of(size)[1]
    file = share_runs.run_file(
        "warm",
        given.directory / "runs-warm",
        size,
        search={
            "num_trials": WARM_TRIALS,
            "max_concurrent": 2,
            "space": {"lr": {"loguniform": [1e-4, 3e-3]}},
        },
        trial={"samples_per_report": WARM_STEPS * micro_batch},
    )
    done = share_runs.run(file, train_s=None, limit_s=90.0 * (2 if given.rehearse else 1))
    directory = Path(done["directory"])
    begun = run_timeline.starts(directory, run_timeline.steps_of(directory))
    found: Row = {**done, "starts": begun, "size": size, "target": WARM_TARGET}
    for key in ("assigned_to_step_s", "assigned_to_graph_s"):
        found[f"median_{key}"] = run_timeline.median([row[key] for row in begun if row[key] is not None])
    keep(given, "warm, so far (ours)", found)
    stock = run_stock(given.directory, share_runs.model_of(size), STOCK_TRIALS, use_gpu=not given.rehearse)
    theirs = statistics.median(row["admitted_to_step_s"] for row in stock["trials"])
    found |= {"stock": stock, "median_stock_s": theirs}
    for key in ("assigned_to_step_s", "assigned_to_graph_s"):
        mine = found[f"median_{key}"]
        found[f"{key}_to_stock"] = None if mine is None else mine / theirs
    return found


PARTS: dict[str, Part] = {
    "by_hand": by_hand,
    "ours": ours,
    "ours_known": ours_known,
    "protected": share_parts.protected,
    "verify": share_parts.verify,
    "verify_eager": partial(share_parts.verify, step_mode="eager"),
    "control": share_parts.control,
    "warm": warm,
    "report": report_cost,
}


if __name__ == "__main__":
    main_of("tests.bench.bench_gpu_share", PARTS, LIMITS_S, default=DEFAULT, doc=__doc__)
