"""Training throughput on this CPU by share, co-location and tier: the tables `cpu_*.csv` that the simulator reads.

Each trial is a process that trains one of the jobs with the stepper of a run, under the mechanism by which a run cuts a
CPU (`CpuCores`) and in the environment of a rank. A share is a part of all cores of the machine. The processes of one
job are started once and told case by case what to train; those not in a case sleep. Without Ray. `--repeats` rounds,
every case once in each. Only a full run writes the tables beside its results file.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.policies import simulator
from orchestrator.share.cpu_cores import WORKER_ENVIRONMENT
from tests.bench.results_file import ROOT, Report, machine, median_figure, options, say

MEASURED = Path(simulator.__file__).parent / "measured"
JOBS: dict[str, tuple[dict[str, Any], int]] = {
    "mlp": ({"width": 128, "depth": 3}, 64),
    "language": ({"width": 128, "layers": 2, "context": 64}, 8),
    "image": ({"width": 32, "layers": 2}, 32),
}
"""Parameters and micro-batch of each job."""
TIERS = ("fp32", "bf16")
ALONE = (1.0, 0.75, 0.5, 0.25, 0.125)
BESIDE = ((0.5, 0.5), (0.75, 0.25), (0.25, 0.25, 0.25, 0.25))
"""Shares of the trials that train at a time; tiers are compared with the whole machine and alone."""
SECONDS = 2.0
WARM_STEPS = 3


@dataclass(frozen=True)
class Lane:
    """What one process is told: whole cores, the amount of them, a tier and for how long."""

    units: tuple[int, ...]
    amount: float
    tier: str
    seconds: float


def lanes(shares: Sequence[float], num_cores: int, tier: str, seconds: float) -> list[Lane]:
    """Cores of each trial, cut one after the other as a run does."""
    found, start = [], 0.0
    for share in shares:
        end = start + share * num_cores
        units = tuple(core for core in range(num_cores) if core < end - 1e-9 and core + 1 > start + 1e-9)
        found.append(Lane(units, share * num_cores, tier, seconds))
        start = end
    return found


def serve(job_name: str) -> None:
    """One process: reads a lane a line, trains in it, answers with samples and seconds."""
    from orchestrator.policies.tier import Tier
    from orchestrator.share.cpu_cores import CpuCores
    from tests.bench.guarded_trial import Recipe, begin

    params, micro_batch = JOBS[job_name]
    tiers = tuple(Tier(word) for word in TIERS)
    stepper, _ = begin(
        Recipe(job=job_name, params=params, num_steps=10**6, micro_batch=micro_batch, ladder=tiers, seed=0, budget=0.0)
    )
    share = CpuCores()
    for line in sys.stdin:
        lane = Lane(**json.loads(line))
        stepper.turn(dataclasses.replace(stepper.settings, tier=Tier(lane.tier)))
        share.apply(tuple(lane.units), lane.amount)
        for _ in range(WARM_STEPS):
            stepper.step()
            share.hold_back()
        began_s, num_steps = time.monotonic(), 0
        while time.monotonic() - began_s < lane.seconds:
            stepper.step()
            share.hold_back()
            num_steps += 1
        seconds = time.monotonic() - began_s
        sys.stdout.write(json.dumps({"samples": num_steps * micro_batch, "seconds": seconds}) + "\n")
        sys.stdout.flush()


class Crew:
    """The processes of one job."""

    def __init__(self, job_name: str, count: int) -> None:
        command = [sys.executable, "-m", "tests.bench.bench_cpu_tables", "--serve", job_name]
        environment = {**os.environ, **WORKER_ENVIRONMENT}
        self._members = [
            subprocess.Popen(
                command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            for _ in range(count)
        ]
        self.train([Lane((0,), 1.0, TIERS[0], 0.0)] * count)  # once all answer, all have loaded

    def train(self, told: Sequence[Lane]) -> list[float]:
        """Samples/s of each lane while all of them train."""
        busy = self._members[: len(told)]
        for member, lane in zip(busy, told, strict=True):
            assert member.stdin is not None
            member.stdin.write(json.dumps(dataclasses.asdict(lane)) + "\n")
            member.stdin.flush()
        answers = []
        for member in busy:
            assert member.stdout is not None
            answers.append(json.loads(member.stdout.readline()))
        return [answer["samples"] / answer["seconds"] for answer in answers]

    def close(self) -> None:
        """Let all of them end."""
        for member in self._members:
            assert member.stdin is not None
            member.stdin.close()
        for member in self._members:
            member.wait(timeout=30)


def measure(job_name: str, repeats: int, seconds: float) -> list[dict[str, Any]]:
    """Every case of one job, `repeats` times in turn: {tier, shares, throughputs}."""
    num_cores = len(os.sched_getaffinity(0))
    cases = [(share,) for share in ALONE] + list(BESIDE)
    crew, rows = Crew(job_name, max(len(shares) for shares in cases)), []
    try:
        for _ in range(repeats):
            for shares in cases:
                for tier in TIERS:
                    throughputs = crew.train(lanes(shares, num_cores, tier, seconds))
                    rows.append({"tier": tier, "shares": shares, "throughputs": throughputs})
    finally:
        crew.close()
    return rows


def tables(found: dict[str, list[dict[str, Any]]]) -> tuple[str, str]:
    """The two CSV texts: by share and co-location, and by tier on the whole machine."""
    facts = machine()
    head = (
        f"# {{what}} on {facts['cores']} cores of one {facts['cpu']} processor, torch {facts['torch']},\n"
        "# measured by this project: tests/bench/bench_cpu_tables.py, medians of its rounds.\n"
    )
    sharing = [
        head.format(what="Training throughput in samples/s by share of all cores"),
        "# trials is how many trained at that time, with this share or what is left; 1 is alone.\n",
        "application,tier,micro_batch,share,trials,throughput\n",
    ]
    speeds = [
        head.format(what="Training throughput in samples/s by precision tier, alone"),
        "application,step_mode,tier,micro_batch,throughput\n",
    ]
    for job_name, rows in found.items():
        micro_batch = JOBS[job_name][1]
        groups: dict[tuple[str, float, int], list[float]] = defaultdict(list)
        for row in rows:
            for share, throughput in zip(row["shares"], row["throughputs"], strict=True):
                groups[row["tier"], share, len(row["shares"])].append(throughput)
        for tier, share, trials in sorted(groups, key=lambda key: (TIERS.index(key[0]), -key[1], key[2])):
            value = statistics.median(groups[tier, share, trials])
            sharing.append(f"{job_name},{tier},{micro_batch},{share:g},{trials},{value:.1f}\n")
            if (share, trials) == (1.0, 1):
                speeds.append(f"{job_name},eager,{tier},{micro_batch},{value:.1f}\n")
    return "".join(sharing), "".join(speeds)


def main() -> None:
    """All jobs, one results file, and the tables."""
    if len(sys.argv) == 3 and sys.argv[1] == "--serve":
        serve(sys.argv[2])
        return
    settings = options("cpu_tables", repeats=2)
    report = Report(settings)
    seconds = 0.2 if settings.is_quick else SECONDS
    found = {}
    for job_name in JOBS:
        found[job_name] = measure(job_name, settings.repeats, seconds)
        for shares in ((0.5,), (0.25,), (0.5, 0.5), (0.25,) * 4):
            report.add(speed_figure(job_name, shares, found[job_name]))
    report.raw["cases"] = found
    report.raw["jobs"] = {name: {"params": params, "micro_batch": size} for name, (params, size) in JOBS.items()}
    report.notes.append(f"{seconds:g} s a case; shares are of all cores; tiers {', '.join(TIERS)}; no Ray")
    report.write()
    if not settings.is_quick:
        for name, text in zip(("cpu_sharing.csv", "cpu_tiers.csv"), tables(found), strict=True):
            (MEASURED / name).write_text(text)
            say(f"  -> {MEASURED / name}")


def speed_figure(job_name: str, shares: tuple[float, ...], rows: list[dict[str, Any]]) -> Any:
    """Speed of a share relative to the whole machine, fp32, over rounds and trials."""
    mine = [row for row in rows if row["tier"] == TIERS[0]]
    whole = statistics.median(row["throughputs"][0] for row in mine if row["shares"] == (1.0,))
    values = [value / whole for row in mine if row["shares"] == shares for value in row["throughputs"]]
    words = "alone" if len(shares) == 1 else f"beside {len(shares) - 1} more"
    return median_figure(f"{job_name}: speed at share {shares[0]:g}, {words}, over the whole machine", values, "x")


if __name__ == "__main__":
    main()
