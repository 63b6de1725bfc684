"""Two trials of two ranks each, over NCCL on the same two GPUs under one MPS: in which way do they not stop each other.

A collective's kernel spins on one GPU until its other end runs on the other, so what keeps a kernel of one trial from
starting while one of the other spins stops both for ever. Each way is tried by itself, with a limit; ranks that are not
through some seconds before it write where they are. No Ray, no orchestrator run: `card_ranks` with changing SM groups.
`python -m tests.bench.bench_neighbour_ranks --out FILE [--ways NAME ...]`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from threading import Thread
from typing import Any

from tests.bench.card_ranks import RankPlan, tell_where, train
from tests.bench.gpu_job import SIZES
from tests.bench.part_process import keep, run_for, tail
from tests.bench.results_file import say

NUM_CHANGES, NUM_STEPS = 16, 480
LANES = (
    ((0, 1, 2, 3, 4, 5), (0, 1, 2, 3, 4, 5, 12, 13, 14)),
    ((6, 7, 8, 9, 10, 11, 12, 13, 14), (6, 7, 8, 9, 10, 11)),
)
"""The SM groups of both trials, before and after each second change."""
TOLD_BEFORE_S = 12.0
WAYS: dict[str, tuple[dict[str, bool], dict[str, str]]] = {
    "lanes, memory given back at every change": ({"has_lanes": True, "gives_back": True}, {}),
    "lanes": ({"has_lanes": True}, {}),
    "no lanes, memory given back": ({"gives_back": True}, {}),
    "lanes, memory given back, kernels loaded at once": (
        {"has_lanes": True, "gives_back": True},
        {"CUDA_MODULE_LOADING": "EAGER"},
    ),
    "lanes, memory given back, 32 connections": (
        {"has_lanes": True, "gives_back": True},
        {"CUDA_DEVICE_MAX_CONNECTIONS": "32"},
    ),
    "lanes, memory given back, no P2P": ({"has_lanes": True, "gives_back": True}, {"NCCL_P2P_DISABLE": "1"}),
}


def one_trial(number: int, way: str, directory: Path, limit_s: float) -> None:
    """The ranks of one trial, in this process's children."""
    tell_at_s = time.monotonic() + limit_s - TOLD_BEFORE_S
    tell_where(tell_at_s)
    options, _ = WAYS[way]
    lanes = tuple(LANES[number][change % 2] for change in range(NUM_CHANGES)) if options.get("has_lanes") else ()
    plan = RankPlan(
        directory=directory,
        params=SIZES["7M"][0],
        micro_batch=16,
        tier="fp32",
        world_size=2,
        num_steps=NUM_STEPS,
        lanes=lanes,
        gives_back_every=NUM_STEPS // NUM_CHANGES if options.get("gives_back") else 0,
        tell_at_s=tell_at_s,
    )
    ranks = train(plan)
    found = {"median_step_ms": 1e3 * ranks[0]["median_step_s"], "losses": ranks[0]["losses"][::40]}
    (directory / "found.json").write_text(json.dumps(found))


def try_way(way: str, given: argparse.Namespace, environment: dict[str, str]) -> dict[str, Any]:
    """Both trials at once; how they ended."""
    began_s = time.monotonic()
    codes: list[int | None] = [None, None]
    directories = [given.directory / f"{list(WAYS).index(way)}-{number}" for number in range(2)]

    def run(number: int) -> None:
        directories[number].mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "tests.bench.bench_neighbour_ranks", "--trial", str(number), "--way", way]
        command += ["--directory", str(directories[number]), "--limit", str(given.limit), "--out", str(given.out)]
        codes[number] = run_for(command, given.limit, directories[number] / "log", {**environment, **WAYS[way][1]})

    threads = [Thread(target=run, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = [directory / "found.json" for directory in directories]
    return {
        "way": way,
        "seconds": time.monotonic() - began_s,
        "exit_codes": codes,
        "are_through": codes == [0, 0],
        "trials": [json.loads(path.read_text()) if path.exists() else None for path in found],
        "tails": [] if codes == [0, 0] else [tail(directory / "log", 9000) for directory in directories],
    }


def main() -> None:
    """Every way in turn."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="JSON lines, appended to")
    parser.add_argument("--directory", type=Path, default=Path("/tmp/neighbours"))
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--limit", type=float, default=60.0, help="seconds for each way")
    parser.add_argument("--trial", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--way", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.trial is not None:
        one_trial(given.trial, given.way, given.directory, given.limit)
        return
    from orchestrator.share.mps import OwnMps

    for way in given.ways:
        own = OwnMps()  # one for each way: what hangs must not be in the way of the next
        try:
            row = try_way(way, given, own.start().environment)
        finally:
            own.stop()
        keep(given, way, row)
        say(f"{way}: {row['exit_codes']} after {row['seconds']:.0f} s")


if __name__ == "__main__":
    main()
