"""What the benchmark of shared GPUs computes from a run, and the plans of its policies."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pandas as pd
import pytest

from orchestrator.policies import (
    EMPTY_PLAN,
    NOTHING_FITTED,
    DeviceId,
    DeviceKind,
    DeviceView,
    DialLimits,
    Policy,
    Settings,
    Snapshot,
    Tier,
    TrialId,
    TrialView,
    check,
)
from tests.bench.run_timeline import speed_between, speed_by_count
from tests.bench.share_parts import _is_better
from tests.bench.sharing_policy import ProtectFirst, TakeTurns

START = Settings(share=0.25, micro_batch=8, grad_accum=1, tier=Tier.BF16, num_workers=1)
GPU = DeviceId("gpu-0")


def world(count: int, now_s: float, began_s: float = 0.0) -> Snapshot:
    limits = DialLimits(
        min_share=1 / 16, max_share=1.0, tiers=(Tier.BF16,), min_global_batch=8, max_global_batch=8, max_micro_batch=8
    )
    trials = tuple(
        TrialView(
            trial_id=TrialId(f"trial-{number:05d}"),
            shape="s",
            start=START,
            limits=limits,
            placement=(GPU,),
            weight=1.0,
            step=0,
            num_samples=0,
            target_samples=1000,
            throughput_per_s=None,
            loss=None,
            is_stale=False,
            fit=NOTHING_FITTED,
            override=None,
            changed_at_s=began_s,
            began_at_s=began_s,
        )
        for number in range(count)
    )
    device = DeviceView(device_id=GPU, node_id="n", kind=DeviceKind.CUDA, units=15)
    return Snapshot(now_s=now_s, seed=0, plan=EMPTY_PLAN, devices=(device,), trials=trials)


def shares(policy: Policy, snapshot: Snapshot) -> list[float]:
    plan = policy.decide(snapshot)
    assert check(snapshot, plan) == ()
    return [round(15 * row.settings.share, 3) for row in plan.allocations]


def test_the_first_trial_gets_its_parts_by_the_clock() -> None:
    policy = ProtectFirst(count=4, lead_s=2.0, phase_s=3.0, parts="6,12", urgencies="1,9")
    assert shares(policy, world(1, 50.0)) == [15.0]
    assert shares(policy, world(4, 1.0)) == pytest.approx([3.75] * 4)
    assert shares(policy, world(4, 2.5)) == pytest.approx([6, 3, 3, 3], abs=1e-3)
    assert shares(policy, world(4, 5.5)) == pytest.approx([12, 1, 1, 1], abs=1e-3)
    assert sum(shares(policy, world(4, 60.0))) <= 15.0


@pytest.mark.parametrize("now_s", [0.5, 4.5, 8.5, 13.0])
def test_turns_of_a_trial_do_not_depend_on_its_neighbours(now_s: float) -> None:
    policy = TakeTurns(phase_s=4.0)
    both = shares(policy, world(2, now_s))
    assert sum(both) == pytest.approx(15.0, abs=1e-3)
    assert shares(policy, world(1, now_s)) == both[:1]
    later = world(3, now_s)
    later = replace(later, trials=later.trials[1:])
    assert shares(policy, later) == pytest.approx([both[1], 4.0], abs=1e-3)


def steps(trial: str, begin_s: float, end_s: float, step_s: float) -> list[dict[str, Any]]:
    count = round((end_s - begin_s) / step_s)
    return [
        {"trial_id": trial, "start_s": begin_s + n * step_s, "end_s": begin_s + (n + 1) * step_s, "num_samples": 10}
        for n in range(count)
    ]


def test_the_sum_of_all_speeds_is_told_apart_by_the_number_of_trials() -> None:
    table = pd.DataFrame(steps("a", 0.0, 20.0, 0.05) + steps("b", 10.0, 20.0, 0.1))
    found = speed_by_count(table)
    assert set(found) == {1, 2}
    assert found[1]["samples_per_s"] == pytest.approx(200, rel=0.05)
    assert found[2]["samples_per_s"] == pytest.approx(300, rel=0.05)
    assert speed_between(table, 12.0, 18.0) == pytest.approx({"a": 200.0, "b": 100.0}, rel=0.05)


def test_a_point_is_beaten_only_by_one_that_loses_nothing() -> None:
    def point(speed: float, total: float) -> dict[str, float]:
        return {"protected_tokens_per_s": speed, "sum_tokens_per_s": total}

    assert _is_better(point(110, 100), point(100, 100))
    assert not _is_better(point(102, 100), point(100, 100))
    assert not _is_better(point(150, 90), point(100, 100))
