"""Hand-written training loops in processes side by side under one MPS, without caps: what an expert reaches by hand.

`Hands` starts the processes and lets the first k of them train at the same time; started as a module this file is one
of them. It builds the loop of every size, says `ready`, and then trains as each line on its input asks: a size and
seconds. A model named `tiny` trains on a core, eagerly, to rehearse.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Protocol

from tests.bench.line_workers import LineWorkers, answer

TINY = {"width": 32, "layers": 2, "heads": 2, "context": 32}
TINY_MICRO_BATCH = 16
LEAD_IN_S = 0.7
"""Trained before what is counted, until all of them are under way."""


class _Loop(Protocol):
    def run_for(self, seconds: float) -> tuple[int, float]: ...


class Hands:
    """So many processes, each with a loop of every size.

    Args:
        count: processes.
        sizes: of models.
        environment: of the MPS that serves them.
    """

    def __init__(self, count: int, sizes: Sequence[str], environment: Mapping[str, str]) -> None:
        self._workers = LineWorkers(count, ["tests.bench.hand_trials", "--sizes", *sizes], environment)

    def together(self, count: int, size: str, seconds: float) -> list[dict[str, float]]:
        """What each of the first `count` made while all of them trained: steps, and the seconds of those."""
        answers = self._workers.ask(dict.fromkeys(range(count), f"{size} {seconds}"))
        return [json.loads(answers[number]) for number in range(count)]

    def close(self) -> None:
        """Let them end."""
        self._workers.close()


def tokens_per_step(size: str) -> int:
    """Of one process."""
    from tests.bench.gpu_job import SIZES

    params, micro_batch = (TINY, TINY_MICRO_BATCH) if size == "tiny" else SIZES[size]
    return int(params["context"]) * micro_batch


class _EagerLoop:
    """A loop on a core."""

    def __init__(self) -> None:
        import torch

        from orchestrator.jobs import build_job

        torch.set_num_threads(1)
        self._job = build_job("language", {**TINY, "eval_windows": 8})
        self._job.prepare()
        self._model = self._job.build_model()
        self._optimizer = self._job.build_optimizer(self._model)
        self._batch = self._job.batch(list(range(TINY_MICRO_BATCH)), torch.device("cpu"))

    def run_for(self, seconds: float) -> tuple[int, float]:
        """Train for so long; the steps, and the seconds that they really took."""
        began_s, count = time.perf_counter(), 0
        while time.perf_counter() - began_s < seconds:
            terms = self._job.loss(self._model, self._batch)
            (terms.loss_sum / terms.num_elements).backward()  # type: ignore[no-untyped-call]
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)
            count += 1
        return count, time.perf_counter() - began_s


def _loops(sizes: Sequence[str]) -> dict[str, _Loop]:
    if "tiny" in sizes:
        return {"tiny": _EagerLoop()}
    from tests.bench.gpu_job import BestLoop

    return {size: BestLoop(size, "bf16") for size in sizes}


def main() -> None:
    """Serve until the input ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="+", required=True)
    loops = _loops(parser.parse_args().sizes)
    answer("ready")
    for line in sys.stdin:
        size, seconds = line.split()
        loops[size].run_for(LEAD_IN_S)
        steps, took_s = loops[size].run_for(float(seconds))
        loops[size].run_for(LEAD_IN_S / 2)  # so that nobody is alone while another still counts
        answer(json.dumps({"steps": steps, "seconds": took_s}))


if __name__ == "__main__":
    main()
