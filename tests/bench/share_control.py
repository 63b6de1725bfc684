"""Trials on SM groups that are chosen on purpose, without Ray and without a ledger: the control of `verify`.

`Controls` starts processes under one MPS and gives them work; started as a module this file is one of them. Each line
on its input is a JSON object: `steps` trains a trial of so many on `units`, `take` allocates a part of the memory under
a cap of `cap`. The answers carry seconds per step, and what the allocator said. Units of the size `tiny` are cores.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.bench.hand_trials import TINY, TINY_MICRO_BATCH
from tests.bench.line_workers import LineWorkers, answer

Row = dict[str, Any]


class Controls:
    """So many processes.

    Args:
        count: processes.
        size: of the model; `tiny` computes on cores.
        environment: of the MPS that serves them.
    """

    def __init__(self, count: int, size: str, environment: Mapping[str, str]) -> None:
        self._workers = LineWorkers(count, ["tests.bench.share_control", "--size", size], environment)

    def do(self, work: Mapping[int, Row]) -> dict[int, Row]:
        """Give processes work at the same time; the answer of each."""
        answers = self._workers.ask({number: json.dumps(order) for number, order in work.items()})
        return {number: json.loads(line) for number, line in answers.items()}

    def close(self) -> None:
        """Let them end."""
        self._workers.close()


def train(units: Sequence[int], num_steps: int, size: str, share: Any) -> Row:
    """One trial on those units: seconds per step in its middle, and its step mode."""
    from dataclasses import replace

    from orchestrator.policies.tier import Tier
    from tests.bench.gpu_job import first_order, run_ours

    device, tier = ("cpu", Tier.FP32) if size == "tiny" else ("cuda", Tier.BF16)
    with tempfile.TemporaryDirectory(prefix="control-", dir="/tmp") as directory:
        first = first_order(Path(directory), size, tier, num_steps)
        assert first.grant is not None
        first = replace(first, grant=replace(first.grant, units=(tuple(units),), amount=float(len(units))))
        records = run_ours(first, share=share, device=device).records
    share.release()
    starts = records["start_s"][len(records) * 4 // 10 : len(records) * 9 // 10]
    return {
        "step_s": float((starts[-1] - starts[0]) / (len(starts) - 1)),
        "graph_ratio": float((records["flags"] // 4 % 2).mean()),
    }


def allocate(cap: float | None, take: float) -> Row:
    """Take a part of the card's memory in two halves under a cap, None without one; what was said and held at most."""
    import torch

    from orchestrator.share import SmGroups

    share = SmGroups(memory_fraction=cap)
    share.apply((0,), 1.0)
    total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    gc.collect()  # trials before it
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    refused, held = "", []
    try:
        for _ in range(2):
            held.append(torch.empty(int(take / 2 * total), dtype=torch.uint8, device="cuda"))
    except torch.OutOfMemoryError as error:
        refused = str(error).splitlines()[0][:200]
    peak = torch.cuda.max_memory_reserved()
    held.clear()
    share.release()
    torch.cuda.empty_cache()
    return {"cap": cap, "take": take, "refused": refused, "peak_bytes": int(peak), "total_bytes": int(total)}


def main() -> None:
    """Serve until the input ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", required=True)
    size = parser.parse_args().size
    from orchestrator.share import CpuCores, SmGroups
    from tests.bench import gpu_job

    gpu_job.SIZES["tiny"] = TINY, TINY_MICRO_BATCH
    share: Any = CpuCores() if size == "tiny" else SmGroups()
    num_units = len(share.node_cores) if size == "tiny" else share.num_units
    answer(json.dumps({"units": num_units}))
    for line in sys.stdin:
        order = json.loads(line)
        if "take" in order:
            answer(json.dumps(allocate(order["cap"], order["take"])))
        else:
            answer(json.dumps(train(order["units"], order["steps"], size, share)))


if __name__ == "__main__":
    main()
