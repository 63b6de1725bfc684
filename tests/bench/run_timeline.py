"""Where the time of a run went: who trained when, the sum of all speeds by number of trials, reports, starts.

Reads the tables and the journal of a run directory, nothing else. Used by `bench_gpu_share`; by itself
`python -m tests.bench.run_timeline DIRECTORY` prints what it finds as JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

Row = dict[str, Any]

SETTLE_S = 1.5
"""Seconds after a trial came or went that are left out of a speed."""
BIN_S = 0.25


def entries(directory: Path, kind: str) -> list[Row]:
    """Journal entries of one kind, oldest first; none before there is a journal."""
    from orchestrator.control.journal import read

    path = directory / "journal.jsonl"
    return [entry for entry in read(path) if entry["kind"] == kind] if path.exists() else []


def steps_of(directory: Path) -> Any:
    """The steps of every trial's first rank by time, with the moment at which each ended."""
    import orchestrator

    table = orchestrator.load_run(directory).to_pandas("steps")
    table = table[table["rank"] == 0].sort_values("start_s")
    return table.assign(end_s=table["start_s"] + table["step_s"], trial_id=table["trial_id"].astype(str))


def spans(table: Any) -> dict[str, tuple[float, float]]:
    """When each trial was there: from its first step to the end of its last one."""
    found = table.groupby("trial_id").agg({"start_s": "min", "end_s": "max"})
    return {str(trial): (float(row["start_s"]), float(row["end_s"])) for trial, row in found.iterrows()}


def speed_by_count(table: Any) -> dict[int, Row]:
    """Samples/s of all trials together while so many of them were there, the moments of coming and going left out."""
    there = spans(table)
    edges = sorted(edge for span in there.values() for edge in span)
    ends_s, samples = table["end_s"].to_numpy(), table["num_samples"].to_numpy()
    rates: defaultdict[int, list[float]] = defaultdict(list)
    for low, high in itertools.pairwise(edges):
        count = sum(begin <= low and high <= end for begin, end in there.values())
        for begin in np.arange(low + SETTLE_S, high - BIN_S, BIN_S):
            inside = (ends_s >= begin) & (ends_s < begin + BIN_S)
            rates[count].append(float(samples[inside].sum()) / BIN_S)
    return {
        count: {
            "seconds": BIN_S * len(values),
            "samples_per_s": statistics.mean(values),
            "median_samples_per_s": statistics.median(values),
        }
        for count, values in sorted(rates.items())
        if count
    }


def speed_between(table: Any, low_s: float, high_s: float) -> dict[str, float]:
    """Samples/s of each trial over a time."""
    inside = table[(table["end_s"] >= low_s) & (table["end_s"] < high_s)]
    found = inside.groupby("trial_id")["num_samples"].sum() / (high_s - low_s)
    return {str(trial): float(value) for trial, value in found.items()}


def starts(directory: Path, table: Any) -> list[Row]:
    """Seconds from a trial's arrival and from its slot to the end of its first step, and of its first replayed one."""
    queued = {entry["trial_id"]: entry["t_s"] for entry in entries(directory, "trial_queued")}
    opened = {entry["slot_id"]: entry["t_s"] for entry in entries(directory, "slot") if entry.get("hello")}
    found = []
    for entry in entries(directory, "trial_assigned"):
        mine = table[(table["trial_id"] == entry["trial_id"]) & (table["attempt"] == entry["attempt"])]
        if not len(mine):
            continue
        replayed = mine[mine["flags"] // 4 % 2 == 1]
        found.append(
            {
                "trial": entry["trial_id"],
                "queued_to_assigned_s": entry["t_s"] - queued[entry["trial_id"]],
                "slot_open_before_s": entry["t_s"] - opened.get(entry["slot_id"], entry["t_s"]),
                "assigned_to_step_s": float(mine["end_s"].iloc[0]) - entry["t_s"],
                "assigned_to_graph_s": float(replayed["end_s"].iloc[0]) - entry["t_s"] if len(replayed) else None,
            }
        )
    return found


def dials(table: Any) -> dict[str, list[Row]]:
    """What each trial ran with, one stretch of alike steps after the other."""
    found: dict[str, list[Row]] = {}
    for trial, mine in table.groupby("trial_id"):
        columns = (mine["micro_batch"], mine["grad_accum"], mine["tier"].astype(str), mine["flags"] // 4 % 2 == 1)
        keys = list(zip(*(column.tolist() for column in columns), strict=True))
        begin, rows = 0, []
        for key, group in itertools.groupby(keys):
            stretch = mine.iloc[begin : begin + len(list(group))]
            begin += len(stretch)
            rows.append(
                {
                    **dict(zip(("micro_batch", "grad_accum", "tier", "is_replayed"), key, strict=True)),
                    "steps": len(stretch),
                    "seconds": float(stretch["end_s"].iloc[-1] - stretch["start_s"].iloc[0]),
                    "median_step_ms": 1e3 * float(stretch["step_s"].median()),
                }
            )
        found[str(trial)] = rows
    return found


def openings(directory: Path) -> list[Row]:
    """How each slot got ready: seconds from the run's begin to its process, and from there on."""
    (run, *_) = entries(directory, "run")
    found = []
    for entry in entries(directory, "slot"):
        stages = (entry.get("hello") or {}).get("opening")
        if stages:
            found.append({"slot": entry["slot_id"], "process_s": stages.pop("began_wall_s") - run["wall_s"], **stages})
    return found


def reports(directory: Path, table: Any) -> Row:
    """What a report costs its trial: from its last step until the actor has the report, and on to its next step."""
    told, waited = [], []
    for entry in entries(directory, "result"):
        mine = table[table["trial_id"] == entry["trial_id"]]
        before, after = mine[mine["end_s"] <= entry["t_s"]], mine[mine["start_s"] > entry["t_s"]]
        if len(before):
            told.append(entry["t_s"] - float(before["end_s"].max()))
        if len(before) and len(after):
            waited.append(float(after["start_s"].min()) - entry["t_s"])
    return {"count": len(told), "evaluated_committed_told_s": told, "waited_for_the_search_s": waited}


def whole(directory: Path) -> Row:
    """All of it, with the sum of the seconds that trials spent in steps, in reports and on their way to a step."""
    table = steps_of(directory)
    if not len(table):
        return {"steps": 0}
    there, begun, told = spans(table), starts(directory, table), reports(directory, table)
    first_s, last_s = min(begin for begin, _ in there.values()), max(end for _, end in there.values())
    edges = sorted({edge for span in there.values() for edge in span})
    present: defaultdict[int, float] = defaultdict(float)
    for low, high in itertools.pairwise(edges):
        present[sum(begin <= low and high <= end for begin, end in there.values())] += high - low
    return {
        "steps": len(table),
        "seconds": last_s - first_s,
        "seconds_with_so_many_trials": dict(sorted(present.items())),
        "trial_seconds_there": sum(end - begin for begin, end in there.values()),
        "trial_seconds_in_steps": float(table["step_s"].sum()),
        "trial_seconds_evaluated_committed_told": sum(told["evaluated_committed_told_s"]),
        "trial_seconds_waited_for_the_search": sum(told["waited_for_the_search_s"]),
        "trial_seconds_assigned_to_step": sum(row["assigned_to_step_s"] for row in begun),
        "median_step_ms": 1e3 * float(table["step_s"].median()),
        "speed_by_count": speed_by_count(table),
        "median_report_s": {key: median(told[key]) for key in told if key != "count"},
        "dials": dials(table),
        "openings": openings(directory),
        "starts": begun,
        "knee": knee_words(directory),
    }


def knee_words(directory: Path) -> list[str]:
    """What the search for the number of trials said."""
    log = directory / "policy.log"
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    return [line.split("knee: ", 1)[1] for line in lines if "knee: " in line]


def median(values: Sequence[float]) -> float | None:
    """The median, None of nothing."""
    return statistics.median(values) if values else None


def main() -> None:
    """Print what is found of a run directory."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    sys.stdout.write(json.dumps(whole(parser.parse_args().directory), indent=1, default=float) + "\n")


if __name__ == "__main__":
    main()
