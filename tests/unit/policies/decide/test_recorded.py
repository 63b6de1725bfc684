"""Decisions of recorded searches taken again, where one of them turned out to be wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from orchestrator.policies.codec import snapshot_from
from orchestrator.policies.decide.goodput import Goodput
from orchestrator.policies.invariants import check
from orchestrator.policies.plan import TrialId

ROWS = [json.loads(line) for line in (Path(__file__).parent / "recorded/turned_back.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("row", ROWS, ids=[row["turned_back"][0] for row in ROWS])
def test_no_trial_on_a_gpu_goes_back_to_a_dearer_tier_because_others_were_busier(row: dict[str, Any]) -> None:
    """bf16 had been measured beside trials in tf32 and was therefore held to be the slower one."""
    snapshot = snapshot_from(row["snapshot"])
    plan = Goodput().decide(snapshot)
    assert check(snapshot, plan) == ()
    for trial_id in map(TrialId, row["turned_back"]):
        trial = next(trial for trial in snapshot.trials if trial.trial_id == trial_id)
        before, after = snapshot.settings_in_force(trial), plan.allocation(trial_id)
        assert before is not None
        assert after is not None
        assert after.settings.tier is before.tier, after.reason
