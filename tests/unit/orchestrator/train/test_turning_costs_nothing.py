"""Training with every dial turning ends as well as training with none: within what another seed makes of it."""

from __future__ import annotations

import statistics
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from orchestrator.control.orders import SlotOrder, Status
from orchestrator.jobs import build_job
from orchestrator.policies.tier import Tier
from tests.unit.orchestrator.train.links import Script, grant, loop, order

SEEDS = range(3)
NUM_SAMPLES = 2_400
TURNS: tuple[dict[str, Any], ...] = (
    {"share": 0.25},
    {"micro_batch": 4, "grad_accum": 2},
    {"tier": Tier.BF16},
    {"micro_batch": 16},
    {"share": 1.0, "micro_batch": 16},
    {"tier": Tier.BF16, "micro_batch": 8, "grad_accum": 2},
    {"micro_batch": 16},
    {},
)
"""What changes against the start, one after the other; every dial goes there and back, the global batch to twice."""


def final_loss(directory: Path, seed: int, *, turns: bool) -> float:
    first = order(directory, samples_per_report=NUM_SAMPLES // 2)
    assert first.trial is not None
    first = replace(first, trial=replace(first.trial, seed=seed))
    assert first.trial is not None
    script = Script(first)
    for number, turn in enumerate(TURNS if turns else ()):
        script.at(20 * (number + 1), partial(with_grant, number=number, turn=turn))
    torch.manual_seed(seed)
    job = build_job(first.trial.job, first.trial.params)
    job.prepare()
    assert loop(script, job).run().status is Status.DONE
    script.collect()
    if turns:
        assert len(script.acks) == len(TURNS) + 1, "every turn was applied"
    return script.reports[-1].metrics["val_loss"]


def with_grant(now: SlotOrder, number: int, turn: dict[str, Any]) -> SlotOrder:
    return replace(now, grant=grant(number + 2, **turn))


def test_all_dials_turning_ends_within_the_spread_of_seeds(tmp_path: Path) -> None:
    none = [final_loss(tmp_path / f"none{seed}", seed, turns=False) for seed in SEEDS]
    turned = [final_loss(tmp_path / f"turned{seed}", seed, turns=True) for seed in SEEDS]
    spread = statistics.stdev(none)
    assert spread > 0
    gap = statistics.mean(turned) - statistics.mean(none)
    assert abs(gap) <= spread, f"{turned} against {none}"
