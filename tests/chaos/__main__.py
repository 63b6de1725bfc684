"""`make chaos`: every kind of fault many times, in parts that can be taken up again.

Each schedule that has been played is a line of `OUT/results.jsonl`; it is not played again. `--part k/n` plays every
n-th of those that are left over, beginning with the k-th, so that n machines or n evenings share them.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import random
import shutil
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.injections import INJECTIONS
from tests.chaos.real import Results, disturbed, undisturbed
from tests.chaos.simulated import KINDS, simulate

SIMULATED, REAL = "simulated", "real"


@dataclass(frozen=True, slots=True, order=True)
class Schedule:
    """One fault to play: simulated or real, its kind, its seed."""

    seed: int
    what: str
    kind: str


def schedules(num_simulated: int, num_real: int) -> list[Schedule]:
    """All of them: the first ones have every kind, and each part some of all."""
    found: list[Schedule] = []
    for seed in range(max(num_simulated, num_real)):
        block = [Schedule(seed, SIMULATED, kind) for kind in KINDS if seed < num_simulated]
        block += [Schedule(seed, REAL, kind) for kind in INJECTIONS if seed < num_real]
        random.Random(seed).shuffle(block)
        found += block
    return found


def part_of(all_of_them: list[Schedule], part: str) -> list[Schedule]:
    """The k-th of n parts, as `k/n`; k from 1.

    Raises:
        ValueError: it is no such part.
    """
    number, _, total = part.partition("/")
    if not (number.isdigit() and total.isdigit() and 1 <= int(number) <= int(total)):
        raise ValueError(f"PART={part!r} is no part; allowed: k/n with 1 <= k <= n, such as 2/5")
    return all_of_them[int(number) - 1 :: int(total)]


def played(file: Path) -> set[Schedule]:
    """The schedules whose results are there."""
    if not file.exists():
        return set()
    lines = [json.loads(line) for line in file.read_text().splitlines() if line.endswith("}")]
    return {Schedule(line["seed"], line["what"], line["kind"]) for line in lines}


def play(schedule: Schedule, place: Path, wanted: Results) -> dict[str, Any]:
    """The line of one schedule."""
    began_s, facts = time.monotonic(), {}
    try:
        if schedule.what == SIMULATED:
            fired, violations = simulate(place, schedule.kind, schedule.seed)
            fault = "; ".join(fired)
        else:
            found = disturbed(place, [schedule.kind], schedule.seed, wanted)
            fault, violations, facts = "; ".join(found.faults), list(found.violations), found.facts
        if not fault:
            violations = [*violations, "no fault has struck"]
    except PermissionError as error:
        fault, violations, facts = "", [], {"skipped": str(error)}
    except (Exception, pytest.fail.Exception) as error:  # the schedule is judged, and the others are played
        fault, violations = "", [f"{type(error).__name__}: {error}", traceback.format_exc(limit=-4)]
    took_s = round(time.monotonic() - began_s, 2)
    values = {"seed": schedule.seed, "what": schedule.what, "kind": schedule.kind, "fault": fault}
    return {**values, "violations": violations, "facts": facts, "took_s": took_s}


def lines_of(todo: list[Schedule], out: Path) -> Iterator[dict[str, Any]]:
    """Play what is left over; what a schedule that was violated has left is kept."""
    wanted: Results = {}
    for schedule in todo:
        place = out / "work" / f"{schedule.what}-{schedule.kind}-{schedule.seed}".replace(" ", "_").replace(":", "")
        shutil.rmtree(place, ignore_errors=True)
        if schedule.what == REAL and not wanted:
            twin = out / "undisturbed"
            shutil.rmtree(twin, ignore_errors=True)
            twin.mkdir(parents=True)
            wanted = undisturbed(twin)
        line = play(schedule, place, wanted)
        if not line["violations"]:
            shutil.rmtree(place, ignore_errors=True)
        yield line


def main() -> int:
    """Play a part; 1 where anything was violated."""
    parser = argparse.ArgumentParser(prog="make chaos")
    parser.add_argument("--part", default="1/1")
    parser.add_argument("--out", type=Path, default=Path("runs/chaos"))
    parser.add_argument("--simulated", type=int, default=300, help="of each kind")
    parser.add_argument("--real", type=int, default=20, help="of each kind")
    parser.add_argument("--for-s", type=float, default=float("inf"), help="begin no more schedules after so long")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    file, began_s = options.out / "results.jsonl", time.monotonic()
    lock = (options.out / "lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        parser.error(f"another process plays in {options.out}; allowed: one at a time, or another --out for each part")
    known = played(file)
    todo = [each for each in part_of(schedules(options.simulated, options.real), options.part) if each not in known]
    num_played = num_bad = 0
    with file.open("a") as results:
        for line in lines_of(todo, options.out):
            results.write(json.dumps(line, sort_keys=True) + "\n")
            results.flush()
            num_played, num_bad = num_played + 1, num_bad + bool(line["violations"])
            if line["violations"] or line["what"] == REAL:
                sys.stdout.write(
                    f"{line['what']} {line['kind']} {line['seed']}: {line['fault']} {line['violations']}\n"
                )
                sys.stdout.flush()
            if time.monotonic() - began_s > options.for_s:
                break
    left = len(todo) - num_played
    sys.stdout.write(f"{num_played} schedules played, {num_bad} with violations, {left} left; results in {file}\n")
    return 1 if num_bad else 0


if __name__ == "__main__":
    sys.exit(main())
