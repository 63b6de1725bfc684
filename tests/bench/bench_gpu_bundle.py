"""Trials stepped as one against the same trials one after the other and under MPS, and whether they train the same.

`python -m tests.bench.bench_gpu_bundle [OUT.jsonl] [--quick] [--no-mps] [--only PART]`: one line of JSON per row, on
standard output too, each as soon as it is there; an arm that fails is a row that says why. On a GPU within five
minutes; without one, or with `--quick`, a small size of everything. No Ray.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from orchestrator.jobs import build_job
from orchestrator.policies.tier import Tier
from orchestrator.train.bundle.bundle import Bundle
from orchestrator.train.bundle.forward import forward_of
from orchestrator.train.bundle.member import Member
from orchestrator.train.groups import Ranks
from orchestrator.train.precision.tiers import set_tier
from orchestrator.train.step_mode.choice import StepMode
from orchestrator.train.step_mode.recorder import CudaRecorder
from orchestrator.train.stepper import Stepper
from tests.bench.gpu_job import profiled
from tests.bench.results_file import say
from tests.unit.orchestrator.train.links import order, settings

IS_CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if IS_CUDA else torch.device("cpu")
_TARGET_S = 0.1
_MPS_WARM_S = 90.0


class Perceptron:
    """784-256-256-10 on random samples that lie on the device, as those of a small table may."""

    metric = "val_loss"
    num_train_samples = 8192
    _data: tuple[Tensor, Tensor] | None = None

    def __init__(self, *, lr: float = 1e-3, weight_decay: float = 0.0) -> None:
        self.lr, self.weight_decay = lr, weight_decay

    def build_model(self) -> nn.Module:
        layers = [nn.Linear(784, 256), nn.GELU(), nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 10)]
        return nn.Sequential(*layers)

    def batch(self, numbers: Any, device: torch.device) -> tuple[Tensor, Tensor]:
        if Perceptron._data is None:
            drawn = torch.Generator().manual_seed(0)
            inputs = torch.randn(self.num_train_samples, 784, generator=drawn)
            labels = torch.randint(10, (self.num_train_samples,), generator=drawn)
            Perceptron._data = inputs.to(DEVICE), labels.to(DEVICE)
        chosen = torch.as_tensor(numbers, dtype=torch.int64)
        if IS_CUDA:
            chosen = chosen.pin_memory().to(DEVICE, non_blocking=True)
        inputs, labels = Perceptron._data
        return inputs.index_select(0, chosen).to(device), labels.index_select(0, chosen).to(device)

    def num_elements(self, num_samples: int) -> int:
        return num_samples

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, int]:
        inputs, labels = batch
        return functional.cross_entropy(model(inputs).float(), labels, reduction="sum"), len(labels)

    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.parameters(), lr=self.lr, weight_decay=self.weight_decay, fused=True)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        raise AssertionError("nothing is evaluated here")


@dataclass(frozen=True, slots=True)
class Case:
    """Trials that are measured: what they train, how many, their batch, and what MPS made of them before (k/s)."""

    name: str
    params: dict[str, Any] | None
    num_trials: int
    batch: int
    known: float | None = None

    def job(self, index: int) -> Any:
        """That of one trial, with rates of its own."""
        own = {"lr": 1e-4 * 10 ** (index % 8 / 7), "weight_decay": 0.02 * (1 + index % 5)}
        if self.params is None:
            return Perceptron(**own)
        job = build_job("language", {**self.params, **own, "eval_windows": 8})
        job.prepare()
        return job


CASES = (
    Case("7M x8", {"width": 384, "layers": 4, "heads": 6, "context": 128}, 8, 16, 22.5),
    Case("0.14M x32", {"width": 64, "layers": 2, "heads": 4, "context": 64}, 32, 16, 147.0),
    Case("perceptron x32", None, 32, 128, 5445.0),
)
SMALL = (
    Case("tiny x4", {"width": 32, "layers": 1, "heads": 2, "context": 16, "max_bytes": 400_000}, 4, 8),
    Case("perceptron x4", None, 4, 32),
)


def stepper(case: Case, index: int, tier: Tier, mode: StepMode = StepMode.EAGER) -> Stepper:
    first = order(Path("unused"))
    assert first.trial is not None
    start = settings(micro_batch=case.batch, tier=tier)
    trial = replace(first.trial, seed=0, start=start, samples_per_report=1 << 40)  # all trials of a run have its seed
    ranks = Ranks(rank=0, world_size=1, device=DEVICE, step_mode=mode)
    torch.manual_seed(index)
    return Stepper(trial, case.job(index), ranks)


def member(case: Case, index: int, tier: Tier) -> Member:
    made = stepper(case, index, tier)
    generator = torch.Generator()
    generator.set_state(torch.get_rng_state())
    return Member(made, generator)


def bundled(members: list[Member], *, how: str) -> Bundle:
    """`how` is eager, graph or compiled (and recorded)."""
    is_compiled = how == "compiled"
    forward = forward_of(members[0], is_compiled=is_compiled)
    recorder = CudaRecorder() if IS_CUDA and how != "eager" else None
    compiler = partial(torch.compile, dynamic=False) if is_compiled else None
    return Bundle(members, forward, recorder=recorder, compile=compiler)


def synchronize() -> None:
    if IS_CUDA:
        torch.cuda.synchronize()


def rates(step: Callable[[], int], seconds: float, repeats: int = 3) -> list[float]:
    """Samples per second of repeated measurements; `step` says how many samples it took."""
    found = []
    for _ in range(repeats):
        synchronize()
        began_s, count = time.perf_counter(), 0
        while time.perf_counter() - began_s < seconds:
            count += step()
        synchronize()
        found.append(count / (time.perf_counter() - began_s))
    return found


def separate(case: Case, tier: Tier, mode: StepMode, seconds: float) -> dict[str, Any]:
    """One trial alone: of several in turn in one process each has its part of that."""
    made = stepper(case, 0, tier, mode)
    began_s = time.perf_counter()
    while time.perf_counter() - began_s < seconds:  # also finds its step mode
        made.advance()

    def step() -> int:
        made.advance()
        return case.batch

    return {"samples_per_s": rates(step, seconds), "mode": made.mode_words}


def fused(case: Case, tier: Tier, how: str, seconds: float) -> dict[str, Any]:
    began_s = time.perf_counter()
    members = [member(case, index, tier) for index in range(case.num_trials)]
    built_s = time.perf_counter() - began_s
    whole = bundled(members, how=how)
    whole.advance()
    synchronize()
    first_s = time.perf_counter() - began_s - built_s
    for _ in range(3):
        whole.advance(1 << 20, _TARGET_S)

    def step() -> int:
        return sum(result.num_samples for results in whole.advance(1 << 20, _TARGET_S) for result in results)

    found = rates(step, seconds)
    step_s = whole.step_s or 0.0
    kernels = kernels_of(whole) if IS_CUDA and how != "eager" else {}
    closing_s = time.perf_counter()
    whole.close()
    synchronize()
    closed_s = time.perf_counter() - closing_s
    again_s = time.perf_counter()
    others = bundled(members[:-1], how="graph")  # one has left
    others.advance()
    synchronize()
    return {
        "samples_per_s": found,
        "device_samples_per_s": case.num_trials * case.batch / step_s if step_s else None,
        "build_s": built_s,
        "first_step_s": first_s,
        "close_s": closed_s,
        "one_left_s": time.perf_counter() - again_s,
        **kernels,
    }


def kernels_of(whole: Bundle) -> dict[str, Any]:
    """What the GPU does in a step: milliseconds and kernels, and the dearest of them in microseconds."""
    steps: list[int] = []
    ns, count = profiled(lambda: steps.append(whole.advance(1 << 20, 0.02)[0][0].num_steps))
    dearest = [
        [name[:70], ns[name] / steps[0] / 1e3, count[name] / steps[0]] for name in sorted(ns, key=lambda n: -ns[n])
    ]
    busy_ms, num_kernels = sum(ns.values()) / steps[0] / 1e6, sum(count.values()) / steps[0]
    return {"busy_ms": busy_ms, "kernels": num_kernels, "dearest_us": dearest[:14]}


def exact(case: Case, how: str, num_steps: int) -> dict[str, Any]:
    """Losses of four trials as a bundle against each alone, step by step; bf16 beside what bf16 itself changes."""
    found: dict[str, Any] = {}
    alone: dict[Tier, Tensor] = {}
    for tier in (Tier.FP32, Tier.BF16):
        losses = []
        for index in range(4):
            made = stepper(case, index, tier)
            set_tier(made.model, tier)
            losses.append([made.advance()[0].loss for _ in range(num_steps)])
        alone[tier] = torch.tensor(losses)
        members = [member(case, index, tier) for index in range(4)]
        set_tier(members[0].stepper.model, Tier.BF16 if tier is Tier.FP32 else Tier.FP32)  # the switch of the process
        set_tier(members[0].stepper.model, tier)
        whole = bundled(members, how=how)
        steps = [whole.advance() for _ in range(num_steps)]
        together = torch.tensor([[step[row][0].loss for step in steps] for row in range(4)])
        found[f"{tier.value}_relative"] = float(((together - alone[tier]) / alone[tier]).abs().max())
        whole.close()
    found["bf16_against_fp32"] = float(((alone[Tier.BF16] - alone[Tier.FP32]) / alone[Tier.FP32]).abs().max())
    return found


def under_mps(case: Case, tier: Tier, seconds: float) -> dict[str, Any]:
    """As many processes as trials (fourteen at most) under MPS, each with recorded steps; all measure together."""
    num = min(case.num_trials, 14)
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        environment = {**os.environ, "CUDA_MPS_PIPE_DIRECTORY": name, "CUDA_MPS_LOG_DIRECTORY": name}
        subprocess.run(["nvidia-cuda-mps-control", "-d"], env=environment, check=True, timeout=20)
        command = [sys.executable, "-m", "tests.bench.bench_gpu_bundle", "--process", case.name, tier.value]
        processes = []
        try:
            for number in range(num):
                arguments = [*command, str(directory / str(number)), str(seconds)]
                processes.append(subprocess.Popen(arguments, env={**environment, "OMP_NUM_THREADS": "1"}))
            began_s = time.perf_counter()
            while len(list(directory.glob("*.ready"))) < num and time.perf_counter() - began_s < _MPS_WARM_S:
                time.sleep(0.05)
            num_ready = len(list(directory.glob("*.ready")))
            (directory / "go").touch()
            for process in processes:
                process.wait(timeout=seconds + 30)
            found = [float(path.read_text()) for path in sorted(directory.glob("*.rate"))]
        finally:
            for process in processes:
                process.kill()
            subprocess.run(["nvidia-cuda-mps-control"], input=b"quit\n", env=environment, check=False, timeout=20)
    return {"samples_per_s": [sum(found)], "processes": len(found), "ready": num_ready}


def one_process(name: str, tier: str, path: str, seconds: float) -> None:
    """A trial of `under_mps`."""
    case = next(each for each in (*CASES, *SMALL) if each.name == name)
    made = stepper(case, int(Path(path).name), Tier(tier), StepMode.GRAPH)
    for _ in range(64):
        made.advance()
    Path(f"{path}.ready").touch()
    go = Path(path).with_name("go")
    while not go.exists():
        made.advance()

    def step() -> int:
        made.advance()
        return case.batch

    Path(f"{path}.rate").write_text(str(rates(step, seconds, 1)[0]))


def arms(is_small: bool, has_mps: bool) -> list[tuple[str, str, Callable[[], dict[str, Any]]]]:
    """Name of the case, of the arm, and what measures it; what matters most comes first."""
    cases, seconds = (SMALL, 0.3) if is_small else (CASES, 1.0)
    tier = Tier.BF16 if IS_CUDA else Tier.FP32
    found: list[tuple[str, str, Callable[[], dict[str, Any]]]] = []
    num_steps = 10 if is_small else 50
    found += [(case.name, "fused graph", partial(fused, case, tier, "graph", seconds)) for case in cases]
    found += [(case.name, "exact graph", partial(exact, case, "graph", num_steps)) for case in cases]
    found += [(case.name, "fused compiled", partial(fused, case, tier, "compiled", seconds)) for case in cases]
    for mode in (StepMode.GRAPH, StepMode.EAGER):
        found += [(case.name, f"separate {mode.value}", partial(separate, case, tier, mode, seconds)) for case in cases]
    found += [(case.name, "fused eager", partial(fused, case, tier, "eager", seconds)) for case in cases]
    found.append((cases[-1].name, "exact compiled", partial(exact, cases[-1], "compiled", num_steps)))
    found.append((cases[-2].name, "exact compiled", partial(exact, cases[-2], "compiled", num_steps)))
    if has_mps:
        found += [(case.name, "mps graph", partial(under_mps, case, tier, 3.0)) for case in cases]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", nargs="?", type=Path)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--no-mps", action="store_true")
    parser.add_argument("--only", default="", help="words of case and arm, several apart by commas")
    parser.add_argument("--seconds", type=float, default=270.0, help="no arm begins after so many")
    parser.add_argument("--process", nargs=4)
    chosen = parser.parse_args()
    if chosen.process:
        name, tier, path, seconds = chosen.process
        one_process(name, tier, path, float(seconds))
        return
    is_small = chosen.quick or not IS_CUDA
    has_mps = IS_CUDA and not chosen.no_mps and shutil.which("nvidia-cuda-mps-control") is not None
    hardware = torch.cuda.get_device_name(0) if IS_CUDA else "cpu"
    known = {case.name: case for case in (*CASES, *SMALL)}
    started_s = time.perf_counter()
    for name, arm, measure in arms(is_small, has_mps):
        began_s = time.perf_counter()
        if (
            not any(words in f"{name} {arm}" for words in chosen.only.split(","))
            or began_s - started_s > chosen.seconds
        ):
            continue
        row: dict[str, Any] = {"case": name, "arm": arm, "hardware": hardware, "torch": torch.__version__}
        try:
            row |= measure()
        except Exception as error:
            row |= {"error": f"{type(error).__name__}: {error}"[:400], "where": traceback.format_exc()[-1500:]}
        if row.get("samples_per_s") and known[name].known:
            row["over_mps_known"] = statistics.median(row["samples_per_s"]) / known[name].known / 1e3
        row["took_s"] = round(time.perf_counter() - began_s, 1)
        line = json.dumps(row)
        say(line)
        if chosen.out is not None:
            with chosen.out.open("a") as file:
                file.write(line + "\n")
        torch.compiler.reset()
        gc.collect()
        if IS_CUDA:
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
