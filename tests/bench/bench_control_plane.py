"""What the orchestrator costs per step: its loop against the best loop written by hand, in the same Ray worker.

Real trials run in a real slot with the real policy actor; between blocks of 200 of their steps, the same processes run
200 steps of the bare loop, in the order A B B A. The policy actor is stopped (SIGSTOP) during bare blocks, so that the
bare loop does not pay for it. Every two rounds are a trial of their own with freshly made models on both sides: where
a model happens to lie in memory alone makes a per cent. Beside it: the bare loop in plain processes, without Ray.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any, ClassVar

from tests.bench.language_job import PARAMS, BareLoop, fastest, forms, run_outside, sized_micro_batch, steps_per_s
from tests.bench.orchestrated import Parts, cluster, read_json, scratch, write_run_file
from tests.bench.results_file import Figure, Options, Report, median_figure, options

STEP_MS = 20.0
TARGET, LOWER_BOUND = 0.99, 0.98
_WARM_UP_STEPS = 40
_SPARE_STEPS = 5
"""Steps after the last block, so that the trial does not end inside it."""

ORCHESTRATED = "orchestrated"


_ROUNDS_PER_TRIAL = 2


def block_order(which: list[str], number: int, num_rounds: int) -> list[str]:
    """The blocks of trial `number`: each kind once per round, every other round backwards."""
    once = [ORCHESTRATED, *which]
    return [kind for index in range(number, number + num_rounds) for kind in (once if index % 2 == 0 else once[::-1])]


class Stopwatch:
    """Wall seconds and CPU seconds of the training thread and of the whole process, since it was made."""

    def __init__(self) -> None:
        self._began = self._now()

    def block(self, form: str) -> dict[str, Any]:
        """The times so far, as a block of that form."""
        times = (now - then for now, then in zip(self._now(), self._began, strict=True))
        return {"form": form, **dict(zip(("seconds", "thread_s", "process_s"), times, strict=True))}

    @staticmethod
    def _now() -> tuple[float, float, float]:
        return time.perf_counter(), time.thread_time(), time.process_time()


class AlternatingShare:
    """The CPU share of the trial, which at given steps runs blocks of the bare loop before it lets the step begin."""

    name: ClassVar[str] = "cpu_cores"

    def __init__(self, plan: dict[str, Any]) -> None:
        import ray.train

        from orchestrator.share import CpuCores

        context = ray.train.get_context()
        self._rank, self._world_size = context.get_world_rank(), context.get_world_size()
        self._share, self._plan = CpuCores(), plan
        self._blocks: list[dict[str, Any]] = []
        self._num_trials = 0
        self._begin_trial()

    @property
    def enforcement(self) -> Any:
        return self._share.enforcement

    def apply(self, units: tuple[int, ...], amount: float) -> None:
        self._share.apply(units, amount)

    def wake(self) -> None:
        self._share.wake()

    def charged_s(self) -> float:
        return self._share.charged_s()

    def release(self) -> None:
        """A trial has ended."""
        self._share.release()
        if self._loops:
            self._num_trials += 1
            self._begin_trial()

    def hold_back(self) -> float:
        slept_s = self._share.hold_back()
        if self._steps_left == 0:
            self._change_block()
        self._steps_left -= 1
        return slept_s

    def _begin_trial(self) -> None:
        order: list[list[str]] = self._plan["orders"]
        self._order = list(order[self._num_trials]) if self._num_trials < len(order) else []
        self._loops: dict[str, BareLoop] = {}
        self._steps_left = _WARM_UP_STEPS
        self._watch: Stopwatch | None = None

    def _change_block(self) -> None:
        """A block of orchestrated steps has ended: run the bare blocks up to the next one."""
        if self._watch is None:
            self._prepare()
        else:
            self._blocks.append(self._watch.block(ORCHESTRATED))
        while self._order and self._order[0] != ORCHESTRATED:
            self._run_bare(self._order.pop(0))
        if not self._order:
            self._write()
            return  # the count goes below zero and never meets it again: the trial goes on to its end
        self._order.pop(0)
        self._steps_left = self._plan["steps"]
        self._watch = Stopwatch()

    def _run_bare(self, form: str) -> None:
        if self._rank == 0:
            os.kill(self._plan["actor_pid"], signal.SIGSTOP)
        try:
            watch = Stopwatch()
            self._loops[form].run(self._plan["steps"])
            self._blocks.append(watch.block(form))
        finally:
            if self._rank == 0:
                os.kill(self._plan["actor_pid"], signal.SIGCONT)

    def _prepare(self) -> None:
        from orchestrator.jobs import build_job

        job = build_job("language", PARAMS)
        job.prepare()
        for form in forms(self._world_size):
            self._loops[form] = BareLoop(job, form, self._plan["micro_batch"], self._rank, self._world_size)
            self._loops[form].run(_WARM_UP_STEPS)

    def _write(self) -> None:
        if self._rank == 0:
            Path(self._plan["out"]).write_text(json.dumps(self._blocks))


def alternating_slot_loop(config: dict[str, Any]) -> None:
    """The slot's own loop, with the share that alternates."""
    from orchestrator.train import slot

    plan = config["bench"]
    # The one seam through which a step can be interrupted without changing the loop that is measured.
    slot.CpuCores = lambda: AlternatingShare(plan)  # type: ignore[misc,assignment,attr-defined]
    slot.slot_loop(config)


def measure(num_ranks: int, micro_batch: int, settings: Options, directory: Path) -> list[dict[str, Any]]:
    """All blocks, in the order in which they ran."""
    steps = num_block_steps(settings)
    rounds = [min(_ROUNDS_PER_TRIAL, settings.repeats - done) for done in range(0, settings.repeats, _ROUNDS_PER_TRIAL)]
    trial = {
        "samples_per_report": (_WARM_UP_STEPS + steps * max(rounds) + _SPARE_STEPS) * micro_batch * num_ranks,
        "max_reports": 1,
        "num_workers": num_ranks,
        "micro_batch": micro_batch,
        "share": 0.5,
    }
    parts = Parts(write_run_file(directory / f"{num_ranks}.yaml", f"ranks{num_ranks}", trial=trial))
    out = directory / f"blocks-{num_ranks}.json"
    plan = {
        "orders": [block_order(forms(num_ranks), number, count) for number, count in enumerate(rounds)],
        "steps": steps,
        "micro_batch": micro_batch,
        "actor_pid": parts.actor_pid,
        "out": str(out),
    }
    slot = threading.Thread(target=_open_slot, args=(parts, num_ranks, plan, directory), daemon=True)
    slot.start()
    for number in range(len(rounds)):
        _run_trial(parts, f"trial-{number}", slot)
    parts.ask("close_slot", "slot-0")
    slot.join(60.0)
    parts.end()
    return list(read_json(out))


def _run_trial(parts: Parts, trial_id: str, slot: threading.Thread) -> None:
    """Queue a trial and wait for its end."""
    parts.ask("submit", trial_id, {})
    answer = None
    while answer is None or not answer.is_last:
        if not slot.is_alive():
            raise RuntimeError(f"the slot ended before the trial; see {parts.run_dir}")
        # Asking is also what grants the report.
        answer = parts.ask("answer", trial_id, 0 if answer is None or answer.report is None else 1)
    if answer.reason:
        raise RuntimeError(f"{trial_id} ended as {answer.state}: {answer.reason}")


def _open_slot(parts: Parts, num_ranks: int, plan: dict[str, Any], directory: Path) -> None:
    """Run the slot's worker group until it is told to close."""
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    TorchTrainer(
        alternating_slot_loop,
        train_loop_config={**parts.slot_spec.loop_config, "slot_id": "slot-0", "bench": plan},
        scaling_config=ScalingConfig(num_workers=num_ranks, resources_per_worker={"CPU": 1}),
        run_config=RunConfig(name=f"ranks{num_ranks}", storage_path=str(directory / "ray")),
    ).fit()


def num_block_steps(settings: Options) -> int:
    """Steps per block."""
    return 20 if settings.is_quick else 200


def ratio_figure(name: str, blocks: list[dict[str, Any]], form: str, *, has_target: bool) -> Figure:
    """Steps/s under the orchestrator over steps/s of one bare form, pair by pair."""
    ours = [block["seconds"] for block in blocks if block["form"] == ORCHESTRATED]
    bare = [block["seconds"] for block in blocks if block["form"] == form]
    ratios = [bare_s / ours_s for ours_s, bare_s in zip(ours, bare, strict=True)]
    return median_figure(
        name,
        ratios,
        "x",
        bootstrap=True,
        target=f"median >= {TARGET}, lower bound >= {LOWER_BOUND}" if has_target else None,
        is_met=(lambda value, low, _high: value >= TARGET and low >= LOWER_BOUND) if has_target else None,
    )


def report_ranks(report: Report, num_ranks: int, micro_batch: int, directory: Path) -> None:
    """Measure one rank count and add its figures."""
    settings, which = report.options, forms(num_ranks)
    steps = num_block_steps(settings)
    num_outside = max(1, settings.repeats // 2)
    arguments = ["--micro-batch", str(micro_batch), "--blocks", str(num_outside), "--steps", str(steps)]
    outside = run_outside(num_ranks, which, arguments)
    with cluster(num_cpus=2):
        inside = measure(num_ranks, micro_batch, settings, directory)
    report.raw[f"{num_ranks} ranks"] = {"inside": inside, "outside": outside, "steps_per_block": steps}
    best = fastest(inside, which)
    for form in which:
        name = f"control plane, {num_ranks} ranks, against bare {form}{' (the fastest)' if form == best else ''}"
        report.add(ratio_figure(name, inside, form, has_target=form in {best, "fsdp2"}))
    for kind in (ORCHESTRATED, *which):
        report.add(median_figure(f"  {kind} in the Ray worker", steps_per_s(inside, kind, steps), "steps/s"))
    for form in which:
        report.add(median_figure(f"  bare {form} without Ray", steps_per_s(outside, form, steps), "steps/s"))


def main() -> None:
    """Measure one and two ranks, each on one core per rank."""
    settings = options("control_plane", repeats=10, quick_repeats=2)
    report = Report(settings)
    micro_batch = sized_micro_batch(STEP_MS)
    report.raw |= {"job": PARAMS, "micro_batch": micro_batch}
    with scratch() as directory:
        for num_ranks in (1, 2):
            report_ranks(report, num_ranks, micro_batch, directory)
    report.write()


if __name__ == "__main__":
    main()
