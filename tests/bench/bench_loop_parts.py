"""What the training loop adds to a step, part by part: it against the loop written by hand, in one process without Ray.

Explains `bench_control_plane`, which has the whole: there the threads that talk to the policy actor come on top. One
rank on one core; blocks of the bare loop run between blocks of the trial's own steps, at its boundary.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from orchestrator.jobs import build_job
from orchestrator.share.mechanism import ShareMechanism
from orchestrator.train import stepper as steppers
from orchestrator.train.batch.meter import NoiseMeter
from orchestrator.train.loop import TrialLoop
from tests.bench.bench_control_plane import STEP_MS
from tests.bench.language_job import PARAMS, BareLoop, sized_micro_batch
from tests.bench.results_file import Report, median_figure, options
from tests.unit.orchestrator.train import links

WARM_UP_STEPS = 60
PARTS: dict[str, tuple[Any, str]] = {
    "noise scale: its part after the backward pass": (NoiseMeter, "end"),
    "noise scale: keeping the first half": (NoiseMeter, "after_part"),
    "records and guard, after the step": (TrialLoop, "_take"),
    "boundary": (TrialLoop, "_cross"),
    "whether an update was left half done": (steppers, "version_of"),
}
"""What no loop written by hand has; each is timed as a whole and told per step."""


class Alternating(links.FakeShare):
    """Runs a block of the bare loop after each block of the trial's steps; nothing is held back."""

    def __init__(self, bare: BareLoop, num_steps: int) -> None:
        super().__init__()
        self._bare, self._num_steps, self._left = bare, num_steps, WARM_UP_STEPS
        self._began_s: float | None = None
        self.ours: list[float] = []
        self.others: list[float] = []

    def hold_back(self) -> float:
        """The boundary of a step; seconds are told per step."""
        if self._left == 0:
            self._left = self._num_steps
            now_s = time.perf_counter()
            if self._began_s is not None:
                self.ours.append((now_s - self._began_s) / self._num_steps)
            self._bare.run(self._num_steps)
            self.others.append((time.perf_counter() - now_s) / self._num_steps)
            self._began_s = time.perf_counter()
        self._left -= 1
        return 0.0


def timed(owner: Any, name: str, seconds: dict[str, float], key: str) -> None:
    """Add up what calls of a function take."""
    function: Callable[..., Any] = getattr(owner, name)

    def call(*arguments: Any, **named: Any) -> Any:
        began_s = time.perf_counter()
        try:
            return function(*arguments, **named)
        finally:
            seconds[key] += time.perf_counter() - began_s

    setattr(owner, name, call)


def run(micro_batch: int, num_blocks: int, num_steps: int, directory: Path) -> Alternating:
    """One trial of so many blocks."""
    job = build_job("language", PARAMS)
    job.prepare()
    bare = BareLoop(job, "plain", micro_batch, 0, 1)
    bare.run(WARM_UP_STEPS)
    share = Alternating(bare, num_steps)
    order = links.order(directory, samples_per_report=micro_batch * (WARM_UP_STEPS + num_steps * num_blocks + 1))
    assert order.trial is not None
    assert order.grant is not None
    start = replace(order.trial.start, micro_batch=micro_batch)
    trial = replace(order.trial, job="language", params=PARAMS, start=start, max_reports=1)
    script = links.Script(replace(order, trial=trial, grant=replace(order.grant, settings=start)))
    as_share: ShareMechanism = share
    links.loop(script, job, as_share).run()  # type: ignore[arg-type]
    return share


def main() -> None:
    """First the whole, then the same again with its parts timed, which itself costs some microseconds."""
    settings = options("loop_parts", repeats=8)
    report = Report(settings)
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    micro_batch, num_steps = sized_micro_batch(STEP_MS), 20 if settings.is_quick else 100
    seconds: dict[str, float] = defaultdict(float)
    with tempfile.TemporaryDirectory() as directory:
        # A model's place in memory alone makes a per cent, so each pair of blocks has models of its own.
        runs = [run(micro_batch, 3, num_steps, Path(directory) / str(number)) for number in range(settings.repeats)]
        ratios = [other / ours for one in runs for ours, other in zip(one.ours, one.others[1:], strict=True)]
        for key, (owner, name) in PARTS.items():
            timed(owner, name, seconds, key)
        parts = run(micro_batch, 4 * settings.repeats, num_steps, Path(directory) / "parts")
    report.raw |= {"micro_batch": micro_batch, "steps_per_block": num_steps}
    report.raw["ours_s"], report.raw["bare_s"] = ([getattr(one, side) for one in runs] for side in ("ours", "others"))
    report.add(median_figure("steps/s of the trial's loop over the bare loop", ratios, "x", bootstrap=True))
    usual_s = [value for one in runs for value in one.others]
    report.add(median_figure("  a step of the bare loop", [1e3 * value for value in usual_s], "ms"))
    count = WARM_UP_STEPS + num_steps * (len(parts.ours) + 1)
    for key in PARTS:
        report.add(median_figure(f"  {key}, mean per step", [1e3 * seconds[key] / count], "ms"))
    report.write()


if __name__ == "__main__":
    main()
