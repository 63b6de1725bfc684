"""The work of the GPU benchmarks: byte-level language models of 7, 34 and 98 million parameters, and their best loop.

`BestLoop` is what an expert writes by hand for one GPU: the whole step in one CUDA graph, fused AdamW, batches through
pinned memory, the loss left on the device. `Ours` is a trial as a slot runs it, with a scripted outside instead of Ray.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orchestrator.control.orders import SlotOrder
    from orchestrator.share import ShareMechanism

MAX_GRAD_NORM = 1.0
SIZES: dict[str, tuple[dict[str, Any], int]] = {
    "7M": ({"width": 384, "layers": 4, "heads": 6, "context": 128}, 16),
    "34M": ({"width": 640, "layers": 7, "heads": 10, "context": 256}, 16),
    "98M": ({"width": 768, "layers": 14, "heads": 12, "context": 512}, 8),
}
"""Parameters of the job `language`, and the micro-batch."""


def job_of(size: str, eval_windows: int = 64, **params: Any) -> Any:
    """The job of a size, its data loaded."""
    from orchestrator.jobs import build_job

    job = build_job("language", {**SIZES[size][0], "eval_windows": eval_windows, **params})
    job.prepare()
    return job


@contextlib.contextmanager
def tf32() -> Iterator[None]:
    """Products of fp32 tensors in tf32, as an expert sets it."""
    import torch

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class BestLoop:
    """The hand-written loop. `form` is 'tf32' or 'bf16' (autocast); call it inside `tf32()` for the former.

    `seed` is that of the model and of the order of samples; `is_compiled` has torch.compile make the kernels of the
    loss; `params` go to the job.
    """

    def __init__(self, size: str, form: str, *, seed: int = 0, is_compiled: bool = False, **params: Any) -> None:
        import numpy as np
        import torch

        self._torch, self._job = torch, job_of(size, **params)
        self._micro_batch = SIZES[size][1]
        torch.manual_seed(seed)
        with torch.device("cuda"):
            self.model = self._job.build_model()
        self.optimizer = self._job.build_optimizer(self.model)
        self._order = np.random.default_rng(seed).permutation(self._job.num_train_samples)
        self._position, self._form = 0, form
        self._loss_of = torch.compile(self._loss_sum, fullgraph=True) if is_compiled else self._loss_sum
        for group in self.optimizer.param_groups:
            group["capturable"] = True
        first = self._host_batch()
        self._static = [part.cuda() for part in first]
        self._pinned = [[part.clone().pin_memory() for part in first] for _ in range(4)]
        self._events = [torch.cuda.Event() for _ in range(4)]  # type: ignore[no-untyped-call]
        before = [param.detach().clone() for param in self.model.parameters()]
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self._body()
        torch.cuda.current_stream().wait_stream(side)
        self._begin_again(before)
        self._graph = torch.cuda.CUDAGraph()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.cuda.graph(self._graph):
            self._loss = self._body()

    def evaluate(self) -> dict[str, float]:
        """The job's own evaluation."""
        found: dict[str, float] = self._job.evaluate(self.model, self._torch.device("cuda"))
        return found

    def _begin_again(self, before: list[Any]) -> None:
        """Take the warming up back."""
        torch = self._torch
        with torch.no_grad():
            for param, value in zip(self.model.parameters(), before, strict=True):
                param.copy_(value)
            for state in self.optimizer.state.values():
                for value in state.values():
                    value.zero_()
        self._position = 0

    def run(self, num_steps: int) -> float:
        """Train so many steps; seconds per step."""
        torch = self._torch
        torch.cuda.synchronize()
        began_s = time.perf_counter()
        for number in range(num_steps):
            self._step(number)
        torch.cuda.synchronize()
        return (time.perf_counter() - began_s) / num_steps

    def run_for(self, seconds: float) -> tuple[int, float]:
        """Train for so long; the steps, and the seconds that they really took."""
        torch = self._torch
        torch.cuda.synchronize()
        began_s, count = time.perf_counter(), 0
        while time.perf_counter() - began_s < seconds:
            self._step(count)
            count += 1
        torch.cuda.synchronize()
        return count, time.perf_counter() - began_s

    def _step(self, number: int) -> None:
        slot = number % 4
        self._events[slot].synchronize()
        for held, static, part in zip(self._pinned[slot], self._static, self._host_batch(), strict=True):
            held.copy_(part)
            static.copy_(held, non_blocking=True)
        self._events[slot].record()
        self._graph.replay()

    def _body(self) -> Any:
        torch = self._torch
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda", torch.bfloat16, enabled=self._form == "bf16", cache_enabled=False):
            loss_sum, num_elements = self._loss_of(tuple(self._static))
        (loss_sum / num_elements).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), MAX_GRAD_NORM)
        self.optimizer.step()
        return loss_sum.detach()

    def _loss_sum(self, batch: Any) -> Any:
        terms = self._job.loss(self.model, batch)
        return terms.loss_sum, terms.num_elements

    def _host_batch(self) -> Any:
        if self._position + self._micro_batch > len(self._order):
            self._position = 0
        indices = self._order[self._position : self._position + self._micro_batch]
        self._position += self._micro_batch
        return self._job.batch(indices, self._torch.device("cpu"))


def spans_of(work: Callable[[], object]) -> list[tuple[str, float, float]]:
    """Name, begin and end in milliseconds of all that the GPU does in `work`; watching the host too would slow it."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    activity = ProfilerActivity.CUDA if torch.cuda.is_available() else ProfilerActivity.CPU
    with profile(activities=[activity]) as trace:
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    kernels = [event for event in trace.events() or () if event.device_type.name == "CUDA"]
    return [(event.name, event.time_range.start / 1e3, event.time_range.end / 1e3) for event in kernels]


def profiled(work: Callable[[], object]) -> tuple[Counter[str], Counter[str]]:
    """Nanoseconds on the GPU and number of what it did, by name."""
    nanoseconds, count = Counter[str](), Counter[str]()
    for name, begin_ms, end_ms in spans_of(work):
        nanoseconds[name] += round(1e6 * (end_ms - begin_ms))
        count[name] += 1
    return nanoseconds, count


def first_order(directory: Path, size: str, tier: Any, num_steps: int) -> SlotOrder:
    """The order of a trial of one report of so many steps."""
    from tests.unit.orchestrator.train.links import grant, order

    micro_batch = SIZES[size][1]
    given = order(directory, samples_per_report=num_steps * micro_batch)
    assert given.trial is not None
    start = replace(given.trial.start, micro_batch=micro_batch, tier=tier)
    params = {**SIZES[size][0], "eval_windows": 64}
    trial = replace(given.trial, job="language", params=params, start=start, max_reports=1)
    return replace(given, trial=trial, grant=grant(1, micro_batch=micro_batch, tier=tier))


def run_ours(
    first: SlotOrder,
    *,
    mode: str = "auto",
    share: ShareMechanism | None = None,
    script: Callable[[Any], None] | None = None,
    device: str = "cuda",
) -> Any:
    """One trial in this process; the script it leaves, with the records of its steps."""
    import torch

    from orchestrator.jobs import build_job
    from orchestrator.train.groups import Ranks
    from orchestrator.train.step_mode.choice import StepMode
    from tests.unit.orchestrator.train.links import Script, loop

    assert first.trial is not None
    outside = Script(first)
    if script is not None:
        script(outside)
    torch.manual_seed(first.trial.seed)
    job = build_job(first.trial.job, first.trial.params)
    job.prepare()
    ranks = Ranks(rank=0, world_size=1, device=torch.device(device), step_mode=StepMode(mode))
    loop(outside, job, share=share, ranks=ranks).run()  # type: ignore[arg-type]
    return outside


def seconds_per_step(records: Any, skip: int) -> float:
    """Wall time per step, from the start of one step to that of a later one."""
    starts = records["start_s"][skip:]
    return float((starts[-1] - starts[0]) / (len(starts) - 1))


def typical(values: Any) -> float:
    """The median."""
    return float(statistics.median([float(value) for value in values]))
