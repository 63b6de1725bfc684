"""The part `probe` of `bench_two_gpus`: in which way two ranks find each other over NCCL, under an own MPS or without.

Every way is a process with a limit of its own. Ranks and the process itself write where they are some seconds before
it, so that one that hangs is a finding too.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from tests.bench.card_ranks import RankPlan, tell_where, train
from tests.bench.part_process import Row, run_for, tail
from tests.bench.two_gpu_parts import compare

LIMIT_S = 75.0
TOLD_BEFORE_S = 8.0
WAYS: dict[str, tuple[str, dict[str, str]]] = {
    "sm_groups": ("sm_groups", {}),
    "sm_groups, no cuMem": ("sm_groups", {"NCCL_CUMEM_ENABLE": "0"}),
    "sm_groups, no cuMem, no P2P": ("sm_groups", {"NCCL_CUMEM_ENABLE": "0", "NCCL_P2P_DISABLE": "1"}),
    "time_slice": ("time_slice", {}),
}
"""What is tried in turn: how the cards are shared, and what NCCL is told."""
LANES = ((0, 1, 2, 3, 4), (5, 6, 7), (2, 3, 4, 5, 6, 7, 8, 9), (0, 1))
_TRANSPORT = re.compile(r"NCCL INFO .*(?: via |NCCL version|Using network|Init COMPLETE|NVLS|CUMEM)")


def probe(directory: Path, passed_on: list[str], factor: float, keep: Callable[[Row], None]) -> Row:
    """The first way in which two ranks train: under MPS, while SM groups change; then without.

    Args:
        directory: for logs, and for `chosen.json`, which says what the parts behind it shall use.
        passed_on: arguments of the processes that try a way.
        factor: of the limit.
        keep: called with the ways so far, each as it comes.
    """
    tried: dict[str, Row] = {}
    log = directory / "way.log"
    for name, (gpu_share, environment) in WAYS.items():
        began_s = time.monotonic()
        command = [sys.executable, "-m", "tests.bench.bench_two_gpus", "--way", gpu_share, *passed_on]
        code = run_for(command, LIMIT_S * factor, log, {**environment, "NCCL_DEBUG": "INFO"})
        tried[name] = {"seconds": time.monotonic() - began_s, "exit_code": code, "nccl": transport(log)}
        if code == 0:
            way = json.loads((directory / "way.json").read_text())
            (directory / "chosen.json").write_text(json.dumps([gpu_share, environment]))
            return {"chosen": name, "tried": tried, **way}
        tried[name]["tail"] = tail(log, 12_000)
        keep({"tried": tried})
    return {"chosen": None, "tried": tried}


def try_way(gpu_share: str, plan: RankPlan, factor: float) -> None:
    """Two ranks, some steps undisturbed and the same while SM groups change, under an own MPS where asked."""
    from orchestrator.share.mps import OwnMps

    tell_at_s = time.monotonic() + LIMIT_S * factor - TOLD_BEFORE_S
    tell_where(tell_at_s)
    plan = replace(plan, tell_at_s=tell_at_s)
    is_on_cores = plan.device == "cpu"
    mps = OwnMps() if gpu_share != "time_slice" and not is_on_cores else None
    times_s: Row = {"begun": time.monotonic()}
    try:
        if mps is not None:
            os.environ.update(mps.start().environment)
        times_s["mps"] = time.monotonic()
        still = train(plan)
        times_s["still"] = time.monotonic()
        moved = still if is_on_cores else train(replace(plan, lanes=LANES))
        times_s["moved"] = time.monotonic()
    finally:
        if mps is not None:
            mps.stop()
    losses = [dict(enumerate(_mean(ranks))) for ranks in (still, moved)]
    found = {
        "lanes": LANES,
        "cards": [rank["card"] for rank in moved],
        "num_units": moved[0]["num_units"],
        "environment": moved[0]["environment"],
        "median_step_ms": [1e3 * ranks[0]["median_step_s"] for ranks in (still, moved)],
        "losses_on_lanes": compare(losses[1], losses[0], 1e-3),
        "seconds_of": {name: at_s - times_s["begun"] for name, at_s in times_s.items()},
    }
    (plan.directory / "way.json").write_text(json.dumps(found))


def _mean(ranks: list[Row]) -> list[float]:
    """Losses of all samples, step by step."""
    return [sum(losses) / len(losses) for losses in zip(*(rank["losses"] for rank in ranks), strict=True)]


def transport(log: Path) -> list[str]:
    """What NCCL says of how the ranks reach each other; a few lines."""
    lines = (line for line in tail(log, 1_000_000).splitlines() if _TRANSPORT.search(line))
    return [line.split("NCCL INFO", 1)[1].strip() for line in lines][:24]
