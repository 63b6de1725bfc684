"""The runs of `bench_two_gpus`: searches of equal trials, alone and disturbed, and what is read from them.

All trials have the same seed and parameters, so one that ran alone says what the losses of all must be.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.bench.gpu_job import SIZES
from tests.bench.part_process import start_run
from tests.bench.results_file import ROOT

Row = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """How large everything is.

    Attributes:
        params: of the job.
        global_batch: samples per step of a trial.
        steps: steps of a trial, and `grow_steps` of one that grows and of the one alone; `two_rank_steps` of two ranks
            before it goes back; `report_steps` between two commits. None below 400 steps: the warm-up of the learning
            rate is a twentieth of a shorter trial, and its losses are then not those of a longer one.
        shares: of a rank at the start, the two that swap, and of a rank whose trial has no neighbour.
        tolerance: relative difference of losses at any step where nothing but shares and workers changed, and with
            changes of batch and tier.
    """

    params: Row
    global_batch: int
    steps: int
    grow_steps: int
    two_rank_steps: int
    report_steps: int
    shares: tuple[float, float, float, float]
    device: str
    tolerance: tuple[float, float] = (0.01, 0.03)


ON_GPUS = Scale(
    params=SIZES["7M"][0],
    global_batch=32,
    steps=400,
    grow_steps=600,
    two_rank_steps=150,
    report_steps=50,
    shares=(0.5, 0.4, 0.6, 1.0),
    device="gpu",
)
REHEARSAL = Scale(
    params={"width": 32, "layers": 2, "heads": 2, "context": 32},
    global_batch=16,
    steps=400,
    grow_steps=1200,
    two_rank_steps=100,
    report_steps=50,
    shares=(0.25, 0.2, 0.3, 0.5),
    device="cpu",
)


def run_file(part: str, scale: Scale, storage: Path, gpu_share: str) -> Row:
    """The run file of a part: alone, pair, turned, kill or grow.

    The trial that grows begins with micro-batches of one sample, since its steps must not run out while the group of
    two ranks opens beside it; on two ranks, and back on one, it has the largest that go.
    """
    is_turned, is_growing = part in {"pair", "turned"}, part == "grow"
    num_trials = 2 if part in {"pair", "kill"} else 1
    num_workers, steps = (1, scale.grow_steps) if is_growing else (2, scale.steps)
    steps = scale.grow_steps if part == "alone" else steps
    batch, (share, low, high, whole) = scale.global_batch, scale.shares
    policy: Row = {"name": "static", "period_s": 0.1}
    if is_turned:
        params = {"every": batch * scale.steps // 12, "low_share": low, "high_share": high}
        policy |= {"name": "tests.bench.turning_policy:TurnBySamples", "params": params}
    if is_growing:
        policy |= {"name": "tests.resizing_policy:ThereAndBack", "params": {"num_steps": scale.two_rank_steps}}
    return {
        "name": part,
        "storage": str(storage),
        "seed": 1,
        "job": {"name": "language", "params": {**scale.params, "eval_windows": 64}},
        "search": {"num_trials": num_trials, "max_concurrent": num_trials, "scheduler": {"name": "fifo"}},
        "trial": {
            "samples_per_report": batch * scale.report_steps,
            "max_reports": steps // scale.report_steps,
            "num_workers": num_workers,
            **({"micro_batch": 1, "grad_accum": batch} if is_growing else {"micro_batch": batch // num_workers}),
            "share": whole if part in {"alone", "grow"} else share,
        },
        "dials": {
            "share": {"enabled": is_turned},
            "batch": {"enabled": is_turned or is_growing, "max_micro": batch, "min_global": batch, "max_global": batch},
            "precision": {
                "enabled": is_turned,
                "tiers": ["fp32", "bf16"] if is_turned else ["fp32"],
                "probe_budget": 0,
            },
            "workers": {"enabled": is_growing, "min": 1, "max": 2},
        },
        "policy": policy,
        "telemetry": {"send_period_s": 0.1},
        "devices": {"use": scale.device, "step_mode": "eager"}
        | ({"gpu_share": gpu_share, "memory_fraction": 0.3} if scale.device == "gpu" else {}),
    }


@dataclass(frozen=True, slots=True)
class Run:
    """A run that has ended."""

    directory: Path
    exit_code: int
    seconds: float
    tail: str
    watched: Row

    def entries(self, kind: str) -> list[Row]:
        """Journal entries of one kind, oldest first."""
        return entries(self.directory, kind)

    def steps(self) -> Any:
        """One row per step and rank, of the course that survived."""
        import orchestrator

        table = orchestrator.load_run(self.directory).to_pandas("steps")
        return table.sort_values("attempt").drop_duplicates(["trial_id", "rank", "step"], keep="last")

    def losses(self, trial: str) -> dict[int, float]:
        """Mean loss over the ranks by step."""
        table = self.steps()
        mine = table[(table["trial_id"] == trial) & (table["num_samples"] > 0)]
        newest = mine.groupby("step", observed=True)["attempt"].transform("max")
        means = mine[mine["attempt"] == newest].groupby("step", observed=True)["loss"].mean()
        return {int(step): float(loss) for step, loss in means.items()}


def entries(directory: Path, kind: str) -> list[Row]:
    """Journal entries of one kind, oldest first; none before there is a journal."""
    from orchestrator.control.journal import read

    path = directory / "journal.jsonl"
    return [entry for entry in read(path) if entry["kind"] == kind] if path.exists() else []


def run(
    part: str, scale: Scale, storage: Path, gpu_share: str, watch: Callable[[Path], Row | None] | None = None
) -> Run:
    """One `orchestrator run`; `watch` looks at its directory from time to time until it returns something."""
    storage.mkdir(parents=True, exist_ok=True)
    file = storage / f"{part}.yaml"
    file.write_text(yaml.safe_dump(run_file(part, scale, storage, gpu_share)))
    log = storage / f"{part}.out"
    began_s, watched = time.monotonic(), None
    with log.open("w") as out:
        process = start_run(file, out)
        while process.poll() is None:
            if watch is not None and watched is None:
                watched = watch(storage / part)
            time.sleep(0.1)
    seconds = time.monotonic() - began_s
    return Run(storage / part, process.returncode, seconds, log.read_text()[-1500:], watched or {})


def kill_a_rank(directory: Path) -> Row | None:
    """Kill the second rank of the first trial once that has committed; what was killed, None as long as it is early."""
    results = [entry for entry in entries(directory, "result") if entry["trial_id"] == "trial-00000"]
    running = {entry["trial_id"] for entry in entries(directory, "ack")}
    if not results or len(running) < 2:
        return None
    slot_id = [e for e in entries(directory, "trial_assigned") if e["trial_id"] == "trial-00000"][-1]["slot_id"]
    hello = [e for e in entries(directory, "slot") if e["slot_id"] == slot_id and e.get("hello")][-1]["hello"]
    time.sleep(0.3)
    os.kill(hello["pids"][1], signal.SIGKILL)
    return {"slot_id": slot_id, "pid": hello["pids"][1], "at_s": time.monotonic(), "committed": results[-1]["step"]}


def facts(done: Run) -> Row:
    """What every part tells: how it ended, where the ranks sat, what verify says, and the trials' speeds."""
    command = [sys.executable, "-m", "orchestrator", "verify", str(done.directory), "--json"]
    verified = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    report: Row = {"text": verified.stdout[-500:] + verified.stderr[-500:]}
    with contextlib.suppress(ValueError):
        report = json.loads(verified.stdout)
    slots = [entry for entry in done.entries("slot") if entry.get("hello")]
    steps = done.steps()
    speeds = steps[steps["rank"] == 0].groupby(["trial_id", "num_workers", "tier"], observed=True)["step_s"]
    return {
        "exit_code": done.exit_code,
        "seconds": done.seconds,
        "tail": done.tail if done.exit_code else done.tail[-300:],
        "verify_exit_code": verified.returncode,
        "violations": report.get("violations", report),
        "verify_notes": report.get("notes"),
        "verify_checked": report.get("checked"),
        "placements": [
            {"slot_id": e["slot_id"], "epoch": e["epoch"], "placement": e["hello"]["placement"]} for e in slots
        ],
        "ranks_apart": all(
            len(set(e["hello"]["placement"])) == len(e["hello"]["placement"])
            for e in slots
            if not e["hello"]["placement"][0].startswith("cpu")
        ),
        "enforced_by": sorted({f"{e['hello']['enforced_by']}: {e['hello']['enforcement']}" for e in slots}),
        "trials": [
            {key: e[key] for key in ("trial_id", "state", "reason", "step")} for e in done.entries("trial_ended")
        ],
        "attempts": [
            {key: e[key] for key in ("trial_id", "attempt", "slot_id")} for e in done.entries("trial_assigned")
        ],
        "median_step_ms": {" ".join(map(str, key)): 1e3 * value for key, value in speeds.median().items()},
        "max_memory_bytes": int(steps["memory_bytes"].max()),
        "checks": [
            {key: e.get(key) for key in ("trial_id", "what", "expected", "observed", "verdict")}
            for e in done.entries("check")
        ],
    }


def compare(found: dict[int, float], reference: dict[int, float], tolerance: float) -> Row:
    """How far losses are from those of an undisturbed trial, step by step over the steps that both have."""
    both = sorted(found.keys() & reference.keys())
    off = [abs(found[step] - reference[step]) / abs(reference[step]) for step in both]
    worst = max(off, default=float("nan"))
    return {
        "steps_compared": len(both),
        "steps_missing": sorted(set(range(max(found, default=0))) - found.keys())[:20],
        "max_relative_difference": worst,
        "median_relative_difference": statistics.median(off) if off else None,
        "relative_difference_at_50": off[50] if len(off) > 50 else None,
        "tolerance": tolerance,
        "is_within": bool(off) and worst <= tolerance,
        "losses": [round(found[step], 5) for step in both],
    }


def overlap_s(done: Run) -> float:
    """Seconds in which both trials were stepping."""
    steps = done.steps()
    spans = steps.groupby("trial_id", observed=True)["start_s"].agg(["min", "max"])
    return float(max(0.0, spans["max"].min() - spans["min"].max())) if len(spans) > 1 else 0.0


def turns(done: Run) -> Row:
    """How often each dial was turned, and what that took on the ranks."""
    counted: dict[str, int] = {}
    for entry in done.entries("ack"):
        for dial in entry["dials"]:
            counted[f"{entry['trial_id']} {dial}"] = counted.get(f"{entry['trial_id']} {dial}", 0) + 1
    table = done.steps()
    switches = [1e3 * float(value) for value in table[table["switch_s"] > 0]["switch_s"]]
    return {"turned": counted, "switch_ms": {"median": statistics.median(switches), "max": max(switches)}}


def kill_facts(done: Run) -> Row:
    """What a killed rank cost: the steps done again, when the trial went on, and the neighbour's longest step."""
    import orchestrator

    table = orchestrator.load_run(done.directory).to_pandas("steps")
    first = table[(table["trial_id"] == "trial-00000") & (table["rank"] == 0)]
    before, after = first[first["attempt"] == 0], first[first["attempt"] > 0]
    other = table[(table["trial_id"] == "trial-00001") & (table["rank"] == 0)].sort_values("start_s")
    at_s = done.watched.get("at_s", float("nan"))
    near = other[(other["start_s"] > at_s - 3) & (other["start_s"] < at_s + 10)]["start_s"].diff().dropna()
    return {
        "killed": done.watched,
        "last_step_before": int(before["step"].max()) if len(before) else None,
        "first_step_after": int(after["step"].min()) if len(after) else None,
        "seconds_without": float(after["start_s"].min() - before["start_s"].max()) if len(after) else None,
        "neighbour_attempts": int(other["attempt"].max()) + 1 if len(other) else None,
        "neighbour_gap_ms": {"median": 1e3 * near.median(), "max": 1e3 * near.max()} if len(near) else None,
    }


def grow_facts(done: Run) -> Row:
    """The way there and back."""
    table = done.steps()
    ranks = table[table["rank"] == 0].sort_values("step").groupby("attempt", observed=True)
    return {
        "resizes": [
            {key: entry[key] for key in ("stage", "num_workers", "reason", "restart_s", "t_s")}
            for entry in done.entries("trial_resize")
        ],
        "attempts_by_workers": [
            {
                "attempt": int(attempt),
                "num_workers": int(rows["num_workers"].iloc[0]),
                "steps": [int(rows["step"].min()), int(rows["step"].max())],
                "median_step_ms": 1e3 * float(rows["step_s"].median()),
            }
            for attempt, rows in ranks
        ],
    }
