"""Records the loss of every optimizer step of a training that runs plainly, without the orchestrator.

The training is seen from outside: steps by torch's global optimizer hooks, losses by `Tensor.backward`. So the same
file that an orchestrated run trains gives the losses to compare with. As a command it runs one training of this folder
and writes what it saw as JSON:

    python -m tests.foreign.losses gan OUT.json                   as `python tests/foreign/gan.py` would
    python -m tests.foreign.losses gan OUT.json --params '{...}'  its entry point with these parameters
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import runpy
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from tests.foreign.trainings import BY_NAME, ROOT, ForeignTraining

OUTPUT = "output.txt"
"""What a training's process printed, in its working directory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepLosses:
    """One step of an optimizer.

    `optimizer` counts optimizers in the order of their first step. `losses` are the values that `backward` was called
    on since the step before, of whichever optimizer: one for a plain loop, one per micro-batch with accumulation (as
    divided by the training itself), one per evaluation of a closure.
    """

    optimizer: int
    losses: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """What one training did: its steps, and the metrics it passed to Ray's `report`, in order."""

    steps: list[StepLosses] = field(default_factory=list)
    reports: list[dict[str, Any]] = field(default_factory=list)


def step_means(steps: list[StepLosses]) -> list[float]:
    """The losses that a trial records, one per step of the first optimizer: the mean of those since its step before."""
    means: list[float] = []
    pending: list[float] = []
    for step in steps:
        pending += step.losses
        if step.optimizer == 0:
            means.append(sum(pending) / len(pending))
            pending = []
    return means


@contextmanager
def recorded() -> Iterator[Recorded]:
    """While open, every optimizer step of this process is appended to `steps` of what it gives.

    The step ends an entry, not its beginning, because a closure (LBFGS, Lightning) runs forward and backward inside
    the step.
    """
    seen = Recorded()
    pending: list[torch.Tensor] = []
    optimizers: list[Optimizer] = []
    backward = torch.Tensor.backward

    def noting_backward(loss: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        if loss.numel() == 1:
            pending.append(loss.detach().clone())
        backward(loss, *args, **kwargs)  # type: ignore[no-untyped-call]

    def after_step(optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
        if not any(known is optimizer for known in optimizers):
            optimizers.append(optimizer)
        which = next(index for index, known in enumerate(optimizers) if known is optimizer)
        seen.steps.append(StepLosses(optimizer=which, losses=tuple(loss.item() for loss in pending)))
        pending.clear()

    torch.Tensor.backward = noting_backward  # type: ignore[method-assign, assignment]
    hook = register_optimizer_step_post_hook(after_step)
    try:
        yield seen
    finally:
        hook.remove()
        torch.Tensor.backward = backward  # type: ignore[method-assign]


def run_plain(
    training: ForeignTraining, directory: Path, params: Mapping[str, Any] | None = None
) -> tuple[Recorded, str]:
    """A training in a process of its own, on one core, with `directory` as its working directory.

    Args:
        training: which one.
        directory: where it runs; what it writes to relative paths lands there.
        params: for its entry point; without, the file is run as its author runs it.

    Returns:
        Its steps, and what it printed.

    Raises:
        AssertionError: if it ended with an error; with its output.
    """
    return finish_plain(start_plain(training, directory, params), directory)


def start_plain(
    training: ForeignTraining, directory: Path, params: Mapping[str, Any] | None = None
) -> subprocess.Popen[str]:
    """`run_plain`, not waited for: several may run side by side."""
    command = ["-m", "tests.foreign.losses", training.name, str(directory / "losses.json")]
    return start_process([*command, "--params", json.dumps(dict(params))] if params is not None else command, directory)


def finish_plain(process: subprocess.Popen[str], directory: Path) -> tuple[Recorded, str]:
    """Wait for `start_plain` and read what it recorded; fails with its output if it ended with an error."""
    output = finish_process(process, directory)
    read = json.loads((directory / "losses.json").read_text())
    steps = [StepLosses(optimizer=which, losses=tuple(losses)) for which, losses in read["steps"]]
    return Recorded(steps=steps, reports=read["reports"]), output


def start_process(command: list[str], directory: Path) -> subprocess.Popen[str]:
    """Python with these arguments, on one core of any, in that directory, with no GPU and no network."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
    }
    with (directory / OUTPUT).open("w") as output:
        return subprocess.Popen(
            [sys.executable, *command],
            cwd=directory,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
        )


def finish_process(process: subprocess.Popen[str], directory: Path) -> str:
    """Wait for `start_process` and return what it printed; fails with that if it ended with an error."""
    try:
        code = process.wait()
    finally:
        process.kill()
        process.wait()
    output = (directory / OUTPUT).read_text(errors="replace")
    assert code == 0, f"exit code {code}:\n{output[-4000:]}"
    return output


@contextmanager
def _noting_reports(module: str, reports: list[dict[str, Any]]) -> Iterator[None]:
    """Append what is passed to `report` of a module of Ray's.

    Has to be open before the training is imported, which may take the function by its name.
    """
    ray: Any = importlib.import_module(module)
    report = ray.report

    def noting_report(metrics: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        reports.append(dict(metrics))
        report(metrics, *args, **kwargs)

    ray.report = noting_report
    try:
        yield
    finally:
        ray.report = report


def main() -> None:
    """Run one training and write its steps, as pairs of optimizer and losses, and its reports."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("name", choices=sorted(BY_NAME))
    parser.add_argument("output", type=Path)
    parser.add_argument("--params", type=json.loads)
    arguments = parser.parse_args()
    training = BY_NAME[arguments.name]
    with ExitStack() as stack:
        seen = stack.enter_context(recorded())
        if training.reports.startswith("ray."):
            stack.enter_context(_noting_reports(training.reports, seen.reports))
        if arguments.params is None:
            sys.argv = [str(training.path)]
            runpy.run_path(str(training.path), run_name="__main__")
        else:
            training.call(arguments.params)
    steps = [(step.optimizer, step.losses) for step in seen.steps]
    arguments.output.write_text(json.dumps({"steps": steps, "reports": seen.reports}))


if __name__ == "__main__":
    main()
