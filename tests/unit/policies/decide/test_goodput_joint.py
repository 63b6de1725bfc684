"""The joint decision, one consideration at a time."""

from __future__ import annotations

import dataclasses

import pytest

from orchestrator.policies.decide.goodput_joint import GoodputJoint
from orchestrator.policies.invariants import check
from orchestrator.policies.learn.fit import Observation, TrialFit, update
from orchestrator.policies.plan import EMPTY_PLAN, DeviceId, Plan, Settings, TrialId
from orchestrator.policies.sample_fleets import after
from orchestrator.policies.snapshot import DeviceKind, DeviceView, DialLimits, Quota, Snapshot, TrialView
from orchestrator.policies.tier import Tier
from tests.unit.policies.builders import trial

UNITS = 15


def fit(sync_s: float = 0.01, exponent: float = 1.0, noise: float = 20.0) -> TrialFit:
    """Measured on one, two and four ranks and on parts of a device; about 1, 1.4, 1.7 and 2 times as fast on 1 to 4."""
    seen = []
    for workers, share in ((1, 1.0), (2, 1.0), (4, 1.0), (1, 0.5), (1, 0.25)):
        for micro_batch in (8, 16):
            step_s = (0.02 + 0.01 * micro_batch) / share**exponent + (sync_s if workers > 1 else 0.0)
            seen += [
                Observation(
                    cores=UNITS * share,
                    tier=Tier.FP32,
                    micro_batch=micro_batch,
                    grad_accum=1,
                    num_workers=workers,
                    num_steps=10,
                    step_s=step_s,
                    noise_trace=noise,
                    grad_sq=1.0,
                    num_noise=5,
                )
            ] * 3
    return update(TrialFit(), seen)


def candidate(name: str, *, remaining: int = 100_000, min_share: float = 1.0, **changes: object) -> TrialView:
    limits = DialLimits(
        min_share=min_share,
        max_share=1.0,
        min_global_batch=8,
        max_global_batch=512,
        max_micro_batch=16,
        tiers=(Tier.FP32,),
        can_pause=True,
        can_move=True,
        min_workers=1,
        max_workers=8,
    )
    start = Settings(share=1.0, micro_batch=8, grad_accum=1, tier=Tier.FP32, num_workers=1)
    view = trial(name, start=start, dials=limits, placement=(), fit=fit())
    view = dataclasses.replace(view, start=start, target_samples=remaining, num_samples=0, restart_s=30.0)
    return dataclasses.replace(view, **changes)  # type: ignore[arg-type]


def world(*trials: TrialView, num_devices: int = 4, quotas: tuple[Quota, ...] = ()) -> Snapshot:
    devices = tuple(
        DeviceView(device_id=DeviceId(f"gpu-{i}"), node_id=f"n{i // 4}", kind=DeviceKind.CUDA, units=UNITS)
        for i in range(num_devices)
    )
    return Snapshot(now_s=1000.0, seed=0, plan=EMPTY_PLAN, devices=devices, trials=trials, quotas=quotas)


def held(plan: Plan) -> dict[str, float]:
    return {row.trial_id: row.settings.share * len(row.placement) for row in plan.allocations}


def decide(policy: GoodputJoint, snapshot: Snapshot) -> Plan:
    plan = policy.decide(snapshot)
    assert check(snapshot, plan) == ()
    return plan


def test_of_trials_that_scale_alike_the_shorter_has_more_and_nobody_of_two_starves() -> None:
    plan = decide(GoodputJoint(), world(candidate("long", remaining=900_000), candidate("short", remaining=10_000)))
    assert held(plan)["short"] > held(plan)["long"] > 0


def test_without_short_first_they_have_the_same() -> None:
    trials = candidate("long", remaining=900_000), candidate("short", remaining=10_000)
    assert held(decide(GoodputJoint(short_first=0.0), world(*trials))) == {"long": 2.0, "short": 2.0}


def test_no_batch_makes_a_sample_worth_less_than_is_allowed() -> None:
    """At noise scale 2000 a sample of 16 is worth 0.996 of one of 8, a sample of 12 0.998."""
    batches = {}
    for least in (0.0, 0.997, 0.999):
        row = candidate("a", fit=fit(noise=2000.0))
        limits = dataclasses.replace(row.limits, min_efficiency=least, max_workers=1)
        (found,) = decide(GoodputJoint(), world(dataclasses.replace(row, limits=limits))).allocations
        batches[least] = found.settings.global_batch
    assert batches[0.0] >= 16 > batches[0.997] > batches[0.999] >= 8


def test_where_trials_outnumber_devices_the_longest_wait() -> None:
    trials = [candidate(f"t{i}", remaining=10_000 * (1 + i)) for i in range(6)]
    plan = held(decide(GoodputJoint(), world(*trials)))
    assert {name for name, devices in plan.items() if devices == 0} == {"t4", "t5"}


def test_a_trial_about_to_end_is_not_restarted_for_more_devices() -> None:
    """At 80 samples/s and more, 100 samples are over before a restart of 30 s is."""
    for remaining, grows in ((100, False), (1_000_000, True)):
        first = world(candidate("a", remaining=remaining), candidate("b"))
        plan = GoodputJoint(cooldown_s=0.0).decide(first)
        alone = dataclasses.replace(after(first, plan, seconds=1000.0), trials=after(first, plan).trials[:1])
        later = decide(GoodputJoint(cooldown_s=0.0), alone)
        assert (held(later)["a"] > held(plan)["a"]) is grows


def test_a_quota_is_used_for_what_gains_most() -> None:
    trials = [candidate(name, user="ann") for name in ("a", "b", "c")]
    plan = decide(
        GoodputJoint(short_first=0.0), world(*trials, num_devices=8, quotas=(Quota(user="ann", max_devices=3.0),))
    )
    assert sorted(held(plan).values()) == [1.0, 1.0, 1.0]


def test_pinned_trials_over_their_quota_keep_what_they_have_and_others_of_the_user_wait() -> None:
    first = world(candidate("a", user="ann"))
    plan = GoodputJoint().decide(first)
    assert held(plan)["a"] == 4.0
    later = after(first, plan, seconds=1000.0)
    pinned = dataclasses.replace(later.trials[0], is_protected=True)
    newcomer = candidate("b", user="ann")
    crowded = dataclasses.replace(later, trials=(pinned, newcomer), quotas=(Quota(user="ann", max_devices=1.0),))
    assert held(decide(GoodputJoint(), crowded)) == {"a": 4.0, "b": 0.0}


@pytest.mark.parametrize(("min_share", "expected"), [(0.125, True), (1.0, False)])
def test_a_device_is_shared_where_that_gains_and_limits_allow_it(min_share: float, expected: bool) -> None:
    trials = [candidate(f"t{i}", min_share=min_share, fit=fit(exponent=0.4)) for i in range(3)]
    plan = decide(GoodputJoint(), world(*trials, num_devices=1))
    assert (sum(1 for devices in held(plan).values() if devices > 0) > 1) is expected
    whole = decide(GoodputJoint(uses_fractions=False), world(*trials, num_devices=1))
    assert sorted(held(whole).values()) == [0.0, 0.0, 1.0]


def test_a_priority_comes_before_any_number_of_short_trials() -> None:
    urgent = candidate("urgent", remaining=900_000, priority=1)
    plan = held(decide(GoodputJoint(), world(urgent, *(candidate(f"t{i}", remaining=1000) for i in range(8)))))
    assert plan[TrialId("urgent")] > 0


def test_a_search_holds_back_the_hopeless_only_where_a_leader_makes_as_much_of_the_device() -> None:
    """Weights saturate: trials yet to report run beside a leader, and a leader has more than one without a chance."""
    policy, response = GoodputJoint(objective="search"), fit(exponent=0.55)

    def shares(*losses_and_chances: tuple[float | None, float]) -> list[float]:
        trials = [
            candidate(f"t{i}", min_share=0.125, fit=response, loss=loss, survival=chance)
            for i, (loss, chance) in enumerate(losses_and_chances)
        ]
        found = held(decide(policy, world(*trials, num_devices=1)))
        return [found[trial.trial_id] for trial in trials]

    newcomer, leader, hopeless = (None, 0.25), (1.0, 0.95), (1.0, 0.01)
    assert min(shares(leader, newcomer, newcomer, newcomer, newcomer)) > 0
    *others, last = shares(leader, leader, newcomer, newcomer, hopeless)
    assert last < min(others)
    assert shares(hopeless) == [1.0]
