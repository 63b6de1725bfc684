"""A trial is paused and resumed, and two take turns on one device: how long that takes, what it frees, what it costs.

On a GPU the 34 M language model, on cores a small one; about three minutes. Figures come from the journal and, for the
memory of a GPU, from its agent's samples.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import psutil

import orchestrator
from orchestrator.api import Run
from orchestrator.view.verify import verify
from tests.bench.gpu_job import SIZES
from tests.bench.language_job import PARAMS
from tests.bench.orchestrated import scratch, write_run_file
from tests.bench.results_file import Report, median_figure, options, say
from tests.integration.runs import Started, results, start

TRIAL = "trial-00000"
_SETTLE_S = 4.0
"""The agent of a GPU samples once a second."""


def story(
    directory: Path, name: str, *, is_gpu: bool, policy: dict[str, Any], num_trials: int, is_paused: bool
) -> Started:
    """One run to its end; the only trial of it is paused for a while behind its first report if that is asked for."""
    params, micro_batch = SIZES["34M"] if is_gpu else (PARAMS, 8)
    steps = 400 if is_gpu else 60
    file = write_run_file(
        directory / f"{name}.yaml",
        name,
        job={"name": "language", "params": {**params, "eval_windows": 64}},
        search={
            "space": {"lr": {"loguniform": [0.001, 0.003]}},
            "num_trials": num_trials,
            "max_concurrent": num_trials,
        },
        trial={"samples_per_report": steps * micro_batch, "max_reports": 4, "micro_batch": micro_batch},
        policy=policy,
        devices={"use": "gpu" if is_gpu else "cpu"},
    )
    run = start("run", str(file), "--plain", run_dir=directory / "runs" / name)
    try:
        if is_paused:
            run.wait_until(lambda: run.of("result"), "its first report")
            time.sleep(_SETTLE_S)
            Run(run.run_dir).pause(TRIAL)
            run.wait_until(lambda: run.of("trial_paused"), "it has left")
            time.sleep(_SETTLE_S)
            Run(run.run_dir).resume(TRIAL)
        code, output = run.end()
    finally:
        if run.process.poll() is None:
            run.kill()
    if code:
        raise RuntimeError(output)
    return run


def moves(run: Started) -> dict[str, list[float]]:
    """Seconds that trials took to leave, and from a slot that took them up again to their first acknowledgement."""
    told: dict[str, float] = {}
    found: dict[str, list[float]] = {"to leave": [], "to come back": []}
    begun: dict[str, float] = {}
    for entry in run.entries:
        trial_id = str(entry.get("trial_id"))
        if entry["kind"] == "trial_stop" and entry["mode"] in {"move", "pause"}:
            told[trial_id] = entry["t_s"]
        elif entry["kind"] in {"trial_requeued", "trial_paused"} and trial_id in told:
            found["to leave"].append(entry["t_s"] - told.pop(trial_id))
        elif entry["kind"] == "trial_assigned" and entry["attempt"]:
            begun[trial_id] = entry["t_s"]
        elif entry["kind"] == "ack" and trial_id in begun:
            found["to come back"].append(entry["t_s"] - begun.pop(trial_id))
    return found


def freed(run: Started) -> float | None:
    """The part of a paused trial's memory that was free while it was away; None on cores."""
    tables = orchestrator.load_run(run.run_dir)
    devices = tables.devices.to_pandas()
    used = devices[devices.device_id.str.startswith("cuda")] if len(devices) else devices
    if not len(used):
        return None
    paused_s = run.of("trial_paused")[0]["t_s"]
    back_s = next(e["t_s"] for e in run.of("trial_assigned") if e["t_s"] > paused_s)
    told_s = next(e["t_s"] for e in run.of("trial_stop") if e["mode"] == "pause")
    before = used[(used.t_s < told_s) & (used.t_s > told_s - _SETTLE_S)].memory_used_bytes.median()
    during = used[(used.t_s > paused_s + 1.0) & (used.t_s < back_s)].memory_used_bytes.median()
    own = tables.steps.to_pandas().memory_bytes.max()
    return float((before - during) / own)


def main() -> None:
    """Measure all of it, so many times."""
    settings = options("pause", repeats=1)
    report = Report(settings)
    is_gpu = bool(list(Path("/dev").glob("nvidia[0-9]*"))) and not settings.is_quick
    turns = {"name": "tiresias", "params": {"thresholds_s": [4.0 if is_gpu else 2.0]}}
    plain, fifo = {"name": "static"}, {"name": "fifo"}
    raw: list[dict[str, Any]] = []
    for number in range(settings.repeats):
        with scratch() as directory:
            alone = story(directory, "alone", is_gpu=is_gpu, policy=plain, num_trials=1, is_paused=False)
            paused = story(directory, "paused", is_gpu=is_gpu, policy=plain, num_trials=1, is_paused=True)
            rows = story(directory, "rows", is_gpu=is_gpu, policy=fifo, num_trials=2, is_paused=False)
            turned = story(directory, "turned", is_gpu=is_gpu, policy=turns, num_trials=2, is_paused=False)
            raw.append(
                {
                    "pause": moves(paused),
                    "turns": moves(turned),
                    "freed": freed(paused),
                    "is_equal": results(alone.run_dir) == results(paused.run_dir)
                    and results(rows.run_dir) == results(turned.run_dir),
                    "violations": [verify(run.run_dir)["violations"] for run in (paused, turned)],
                }
            )
            say(f"  repeat {number}: {raw[-1]}")
    report.raw["repeats"] = raw
    report.notes.append(f"{psutil.cpu_count()} logical cores; pauses by request and turns that tiresias takes, both")
    for what in ("to leave", "to come back"):
        values = [value for one in raw for kind in ("pause", "turns") for value in one[kind][what]]
        report.add(
            median_figure(f"pause: {what}", values, "s", target="<= 0.5 s", is_met=lambda value, _l, _h: value <= 0.5)
        )
    memory = [one["freed"] for one in raw if one["freed"] is not None]
    if memory:
        report.add(
            median_figure("memory freed", memory, "", target=">= 0.95", is_met=lambda value, _l, _h: value >= 0.95)
        )
    equal = [float(one["is_equal"] and not any(one["violations"])) for one in raw]
    report.add(
        median_figure("losses equal, verify clean", equal, "", target="always", is_met=lambda _v, low, _h: low == 1)
    )
    report.write()


if __name__ == "__main__":
    main()
