from __future__ import annotations

import dataclasses

import pytest

from orchestrator.policies.decide.fair_share import FairShare
from orchestrator.policies.decide.goodput import Goodput
from orchestrator.policies.invariants import check
from orchestrator.policies.learn.fit import TrialFit, note_tiers, protect, update
from orchestrator.policies.learn.tier_fit import TierFit
from orchestrator.policies.plan import Allocation, Plan, TrialId
from orchestrator.policies.snapshot import DeviceKind, Override, Snapshot, TrialView
from orchestrator.policies.tier import Tier
from tests.unit.policies.builders import in_force, limits, measured, observation, settings, trial, world

BOTH = (Tier.FP32, Tier.BF16)
NOISY = (1000.0, 1.0)


def decide(snap: Snapshot, policy: Goodput | None = None) -> Plan:
    plan = (policy or Goodput()).decide(snap)
    assert check(snap, plan) == ()
    return plan


def only(snap: Snapshot, policy: Goodput | None = None) -> Allocation:
    (row,) = decide(snap, policy).allocations
    return row


def running(*rows: TrialView, share: float = 0.5, now_s: float = 100.0) -> Snapshot:
    """The trials with that share in force since second 0."""
    return world(rows, plan=in_force(rows, dict.fromkeys((row.trial_id for row in rows), share)), now_s=now_s)


def fp32_at_two_sizes(noise: tuple[float, float] | None = NOISY) -> TrialFit:
    """Twice the samples cost 1.2 times the step."""
    return measured(observation(0.10, noise=noise), observation(0.12, micro_batch=16, noise=noise))


def with_bf16(step_s: float) -> TrialFit:
    return measured(observation(0.1), observation(step_s, tier=Tier.BF16))


def test_when_nothing_is_measured_shares_are_the_fair_ones() -> None:
    rows = [trial("a", weight=2.0), trial("b"), trial("c", dials=limits(shares=(0.05, 0.1)))]
    fair = FairShare().decide(world(rows))
    assert [r.settings for r in decide(world(rows)).allocations] == [r.settings for r in fair.allocations]


def test_a_newcomer_begins_with_its_start_settings() -> None:
    row = trial("a", fit=fp32_at_two_sizes(), dials=limits(batches=(8, 64)))
    assert only(world([row])).settings.micro_batch == 8


def proved(tier: Tier = Tier.BF16, step_s: float = 0.5, is_safe: bool = True) -> TrialFit:
    """Measured in both, and by its guard."""
    known = (
        TierFit(tier=Tier.FP32, is_real=True, is_safe=True, step_s=1.0),
        TierFit(tier=tier, is_real=True, is_safe=is_safe, step_s=step_s, noise_ratio=0.001),
    )
    return note_tiers(measured(observation(0.1), observation(0.05, tier=tier)), known)


def begins_in(*peers: TrialView, **changes: object) -> Tier:
    """The tier in which a trial of the same shape begins beside these."""
    new = dataclasses.replace(trial("z", dials=limits(tiers=(*BOTH, Tier.FP8))), **changes)  # type: ignore[arg-type]
    plan = in_force(peers, {row.trial_id: 0.9 / len(peers) for row in peers})
    rows = world([*peers, new], plan=plan)
    found = decide(rows).allocation(new.trial_id)
    assert found is not None
    return found.settings.tier


def peer(name: str, fit: TrialFit, tier: Tier = Tier.BF16, **changes: object) -> TrialView:
    row = trial(name, start=settings(tier=tier), fit=fit, dials=limits(tiers=(*BOTH, Tier.FP8)))
    return dataclasses.replace(row, **changes)  # type: ignore[arg-type]


def test_a_newcomer_begins_in_the_tier_that_its_kind_has_proved() -> None:
    assert begins_in(peer("a", proved())) is Tier.BF16
    assert begins_in(peer("a", proved()), peer("b", proved(is_safe=False), Tier.FP32), peer("c", proved())) is Tier.BF16


def test_one_that_has_begun_in_a_tier_and_not_probed_it_enough_has_no_say() -> None:
    assert (
        begins_in(peer("a", proved()), peer("b", proved(is_safe=False)), peer("c", proved(is_safe=False))) is Tier.BF16
    )


@pytest.mark.parametrize(("kind", "expected"), [(DeviceKind.CUDA, Tier.BF16), (DeviceKind.CPU, Tier.FP32)])
def test_on_a_gpu_tiers_are_compared_by_calibration(kind: DeviceKind, expected: Tier) -> None:
    """Measured bf16 is slower than fp32: others were beside it then. Calibration says twice as fast."""
    row = dataclasses.replace(peer("a", proved()), fit=note_tiers(with_bf16(0.11), proved().tiers))
    snap = running(row, share=1.0)
    devices = tuple(dataclasses.replace(each, kind=kind) for each in snap.devices)
    assert only(dataclasses.replace(snap, devices=devices)).settings.tier is expected


def test_a_newcomer_begins_as_given_where_its_kind_has_not_proved_a_cheaper_tier() -> None:
    assert begins_in(peer("a", proved(), Tier.FP32)) is Tier.FP32, "nobody runs in it"
    assert begins_in(peer("a", proved(is_safe=False))) is Tier.FP32
    assert begins_in(peer("a", proved()), peer("b", proved(is_safe=False), Tier.FP32)) is Tier.FP32, (
        "as many are against"
    )
    fled = protect(proved(), settings(tier=Tier.BF16), settings(tier=Tier.FP32))
    assert begins_in(peer("a", proved()), peer("b", fled, Tier.FP32)) is Tier.FP32, "one has fled from it"
    assert begins_in(peer("a", proved(step_s=0.97))) is Tier.FP32, "gains 3 %, less than the threshold"
    assert begins_in(peer("a", proved(), is_stale=True)) is Tier.FP32
    assert begins_in(peer("a", proved(), shape="other")) is Tier.FP32
    assert begins_in(peer("a", proved(Tier.FP8), Tier.FP8)) is Tier.FP32, "too coarse to begin in"


def test_a_trial_that_goes_on_is_no_newcomer() -> None:
    assert begins_in(peer("a", proved()), num_samples=8) is Tier.FP32
    assert begins_in(peer("a", proved()), resume=settings()) is Tier.FP32
    assert begins_in(peer("a", proved()), limits=limits()) is Tier.FP32, "not allowed"
    fled = protect(TrialFit(), settings(tier=Tier.BF16), settings(tier=Tier.FP32))
    assert begins_in(peer("a", proved()), fit=fled) is Tier.FP32


def test_the_dials_of_a_short_trial_rest_for_less_than_the_cooldown() -> None:
    """Changed 5 s ago; 10,000 samples take 20 s at 500 samples/s, and 200 s at 50."""
    row = trial("a", fit=fp32_at_two_sizes(), dials=limits(batches=(8, 64)), changed_at_s=95.0)
    for throughput, batch in ((None, 8), (50.0, 8), (500.0, 16)):
        now = dataclasses.replace(row, throughput_per_s=throughput)
        assert only(running(now, share=1.0)).settings.micro_batch == batch


def test_the_batch_doubles_where_that_pays() -> None:
    allocation = only(running(trial("a", fit=fp32_at_two_sizes(), dials=limits(batches=(8, 64))), share=1.0))
    assert allocation.settings.micro_batch == 16
    assert "batch 8 -> 16" in allocation.reason
    assert "noise scale 1000" in allocation.reason
    assert allocation.predicted_gain == pytest.approx(2 / 1.2 * 1008 / 1016 - 1, rel=1e-6)
    assert allocation.predicted_goodput == pytest.approx(16 / 0.12 * 2**0.8 * 1008 / 1016, rel=1e-6)
    assert [a.settings.micro_batch for a in allocation.alternatives] == [8]


def test_the_batch_stays_as_long_as_the_noise_is_unknown() -> None:
    row = trial("a", fit=fp32_at_two_sizes(noise=None), dials=limits(batches=(8, 64)))
    assert only(running(row)).settings.micro_batch == 8


def test_the_batch_stays_where_samples_would_be_wasted() -> None:
    row = trial("a", fit=fp32_at_two_sizes(noise=(1.0, 1.0)), dials=limits(batches=(8, 64)))
    assert only(running(row)).settings.micro_batch == 8


def test_a_gain_below_the_threshold_changes_nothing_and_is_named() -> None:
    row = trial("a", fit=fp32_at_two_sizes(), dials=limits(batches=(8, 64)))
    allocation = only(running(row, share=1.0), Goodput(min_gain=0.7))
    assert allocation.settings.micro_batch == 8
    assert allocation.binding == "hysteresis"
    assert "less than 70.0%" in allocation.reason


def test_a_gain_smaller_than_the_doubt_about_the_present_speed_changes_nothing() -> None:
    shaky = measured(*(observation(s, noise=NOISY) for s in (0.02, 0.1, 0.4)), windows=1)
    row = trial("a", fit=shaky, dials=limits(batches=(8, 64)))
    assert only(running(row, share=1.0)).binding == "hysteresis"


@pytest.mark.parametrize("reason", ["cooldown", "stale", "unmeasured"])
def test_dials_rest_in_the_cooldown_while_stale_and_while_unmeasured(reason: str) -> None:
    row = trial("a", fit=fp32_at_two_sizes(), dials=limits(batches=(8, 64)))
    if reason == "cooldown":
        row = dataclasses.replace(row, changed_at_s=91.0)
    elif reason == "stale":
        row = dataclasses.replace(row, is_stale=True)
    else:
        row = dataclasses.replace(row, start=settings(micro_batch=12))
    snap = running(row, share=1.0)
    allocation = only(snap)
    assert allocation.settings == snap.plan.allocations[0].settings
    assert allocation.binding == reason


def test_one_trial_of_each_shape_explores_a_cheaper_tier_that_nobody_measured() -> None:
    dials = limits(tiers=BOTH)
    rows = [trial(name, fit=measured(observation(0.1)), dials=dials, shape=name[0]) for name in ("a1", "a2", "b1")]
    plan = decide(running(*rows, share=1 / 3))
    assert [row.settings.tier for row in plan.allocations] == [Tier.BF16, Tier.FP32, Tier.BF16]
    assert plan.allocations[0].binding == "exploring"
    assert "explores tier bf16" in plan.allocations[0].reason


def test_nobody_explores_while_another_of_the_shape_does() -> None:
    dials = limits(tiers=BOTH)
    rows = [trial(name, fit=measured(observation(0.1)), dials=dials) for name in ("a", "b")]
    plan = in_force(rows, {"a": 0.5, "b": 0.5}, b=settings(tier=Tier.BF16))
    tiers = [row.settings.tier for row in decide(world(rows, plan=plan)).allocations]
    assert tiers == [Tier.FP32, Tier.BF16]


@pytest.mark.parametrize("why", ["dial", "switch", "unmeasured", "banned"])
def test_a_tier_is_not_explored_where_it_is_forbidden_or_too_early(why: str) -> None:
    fit = TrialFit() if why == "unmeasured" else measured(observation(0.1))
    if why == "banned":
        fit = protect(fit, settings(tier=Tier.BF16), settings(tier=Tier.FP32))
    row = trial("a", fit=fit, dials=limits(tiers=(Tier.FP32,) if why == "dial" else BOTH))
    assert only(running(row), Goodput(explores=why != "switch")).settings.tier is Tier.FP32


def test_a_dearer_tier_is_not_explored() -> None:
    fit = measured(observation(0.1, tier=Tier.BF16))
    row = trial("a", start=settings(tier=Tier.BF16), fit=fit, dials=limits(tiers=BOTH))
    assert only(running(row)).settings.tier is Tier.BF16


def test_a_tier_measured_faster_by_another_trial_of_the_shape_is_taken() -> None:
    rows = [
        trial("a", fit=measured(observation(0.1)), dials=limits(tiers=BOTH)),
        trial("b", fit=with_bf16(0.05), dials=limits(tiers=BOTH)),
    ]
    plan = decide(running(*rows))
    assert [row.settings.tier for row in plan.allocations] == [Tier.BF16, Tier.BF16]
    assert "tier fp32 -> bf16" in plan.allocations[0].reason
    assert plan.allocations[0].predicted_gain == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("now", "bf16_step_s", "expected"),
    [
        (Tier.FP32, 0.09, Tier.BF16),
        (Tier.FP32, 0.097, Tier.FP32),  # gains 3 %, less than the threshold
        (Tier.BF16, 0.097, Tier.BF16),
        (Tier.BF16, 0.103, Tier.FP32),  # no faster: it has not earned its place
    ],
)
def test_a_cheaper_tier_must_earn_its_place(now: Tier, bf16_step_s: float, expected: Tier) -> None:
    row = trial("a", start=settings(tier=now), fit=with_bf16(bf16_step_s), dials=limits(tiers=BOTH))
    assert only(running(row, share=1.0)).settings.tier is expected


def test_a_tier_and_the_batch_never_change_together() -> None:
    fit = measured(observation(0.10, noise=NOISY), observation(0.12, micro_batch=16), observation(0.05, tier=Tier.BF16))
    row = trial("a", fit=fit, dials=limits(batches=(8, 64), tiers=BOTH))
    after = only(running(row, share=1.0)).settings
    assert (after.tier, after.micro_batch) in {(Tier.BF16, 8), (Tier.FP32, 16)}


def test_batch_and_tier_wait_while_the_share_changes() -> None:
    row = trial("a", fit=fp32_at_two_sizes(), dials=limits(batches=(8, 64)))
    allocation = only(running(row))
    assert (allocation.settings.share, allocation.settings.micro_batch) == (1.0, 8)
    assert "kept while its share changes" in allocation.reason


def test_a_batch_that_gains_only_if_the_noise_scale_is_right_is_left_alone() -> None:
    """Twice the samples cost 1.8 times the step, so that 8 -> 16 gains from a noise scale of 64 on."""
    speeds = [observation(0.10, cores=2.0), observation(0.18, cores=2.0, micro_batch=16)]
    settled = [observation(0.10, cores=2.0, noise=(200.0, 1.0))] * 6
    scattered = [observation(0.10, cores=2.0, noise=(200.0, square)) for square in (6.0, -4.0) * 3]
    for noise, batch in ((settled, 16), (scattered, 8)):
        row = trial("a", fit=measured(*speeds, *noise, windows=1), dials=limits(batches=(8, 16)))
        row = dataclasses.replace(row, fit=update(row.fit, speeds * 3))
        allocation = only(running(row, share=1.0), Goodput(min_gain=0.0))
        assert allocation.settings.micro_batch == batch, allocation.reason
    assert allocation.binding == "noise"
    assert "the noise scale lies between" in allocation.reason


def careful(noise: float, start: int = 8, least: float = 0.9, windows: int = 6) -> TrialView:
    """Twice the samples cost 1.2 times the step; a sample may be worth no less than that."""
    seen = [observation(0.10, noise=(noise, 1.0)), observation(0.12, micro_batch=16, noise=(noise, 1.0))]
    seen.append(observation(0.144, micro_batch=32, noise=(noise, 1.0)))
    dials = dataclasses.replace(limits(batches=(8, 64)), min_efficiency=least)
    return trial("a", start=settings(micro_batch=start), fit=measured(*seen, windows=windows), dials=dials)


@pytest.mark.parametrize(("noise", "batch"), [(60.0, 8), (75.0, 16)])
def test_a_larger_batch_is_left_where_its_samples_would_be_worth_too_little(noise: float, batch: int) -> None:
    """(noise + 8) / (noise + 16) is 0.895 at 60 and 0.912 at 75; either would gain half again as much goodput."""
    allocation = only(running(careful(noise), share=1.0))
    assert allocation.settings.micro_batch == batch
    if batch == 8:
        assert allocation.binding == "efficiency"
        assert (
            "batch 16 would gain 49.1% but a sample of 16 is worth 0.89 of one of 8 at noise scale 58, less"
            in allocation.reason
        )
    assert only(running(careful(noise, least=0.0), share=1.0)).settings.micro_batch == 16


def test_a_larger_batch_is_left_as_long_as_its_worth_is_in_doubt() -> None:
    row = careful(90.0)
    assert only(running(row, share=1.0)).settings.micro_batch == 16
    scattered = [observation(0.10, noise=(90.0, square)) for square in (9.0, -7.0) * 9]
    doubtful = dataclasses.replace(row, fit=update(row.fit, scattered))
    allocation = only(running(doubtful, share=1.0))
    assert allocation.settings.micro_batch == 8, allocation.reason
    assert allocation.binding == "efficiency"


@pytest.mark.parametrize(("noise", "batch"), [(30.0, 16), (400.0, 32)])
def test_a_batch_whose_samples_have_come_to_be_worth_too_little_goes_back(noise: float, batch: int) -> None:
    """Of 32 a sample is worth 0.61 of one of 8 at noise scale 30, and little more at the upper end of the doubt."""
    row = careful(noise)
    plan = in_force([row], {"a": 1.0}, a=settings(micro_batch=32))
    allocation = only(world([row], plan=plan))
    assert allocation.settings.micro_batch == batch
    if batch == 16:
        assert allocation.binding == "efficiency"
        assert (
            "batch 32 -> 16 (16 x 1): a sample of 32 is worth 0.62 of one of 8 at noise scale 31" in allocation.reason
        )


def test_the_start_batch_may_be_as_wasteful_as_the_user_likes() -> None:
    row = careful(1.0, start=16, least=1.0)
    dials = dataclasses.replace(row.limits, min_global_batch=16)
    assert only(running(dataclasses.replace(row, limits=dials), share=1.0)).settings.micro_batch == 16


def test_a_batch_shrinks_only_if_that_pays_when_the_noise_scale_has_doubled() -> None:
    """Half the samples cost 0.56 of the step, so that 16 -> 8 gains up to a noise scale of 64."""
    for noise, batch in ((20.0, 8), (33.0, 16)):
        seen = [observation(0.18, micro_batch=16, noise=(noise, 1.0)), observation(0.10)]
        row = trial("a", start=settings(micro_batch=16), fit=measured(*seen, windows=6), dials=limits(batches=(8, 16)))
        allocation = only(running(row, share=1.0), Goodput(min_gain=0.0))
        assert allocation.settings.micro_batch == batch, allocation.reason
    assert allocation.binding == "noise"


def test_the_first_other_batch_of_a_shape_needs_no_min_gain() -> None:
    """On a CPU a second size promises 8 % where noise prevails; that is enough once, however large `min_gain` is."""
    row = trial("a", fit=measured(observation(0.10, noise=(1e5, 1.0))), dials=limits(batches=(8, 64)))
    allocation = only(running(row, share=1.0), Goodput(min_gain=0.5))
    assert allocation.settings.micro_batch == 16
    assert allocation.predicted_gain == pytest.approx(2 / 1.85 - 1, rel=0.01)


def test_a_device_is_not_filled_with_cores_that_slow_a_trial_down() -> None:
    fit = measured(observation(0.1, cores=1.0), observation(0.15, cores=2.0), windows=5)
    row = trial("a", fit=fit)
    allocation = only(running(row, share=1.0))
    assert allocation.settings.share == 0.5
    assert allocation.predicted_gain is not None
    assert allocation.predicted_gain > 0.2


def test_an_override_stands_until_the_cooldown_is_over() -> None:
    fled = settings(micro_batch=4, grad_accum=2)
    override = Override(number=1, generation=1, settings=fled, reason="out of memory")
    fit = measured(observation(0.1, noise=NOISY), observation(0.14, micro_batch=4, grad_accum=2))
    row = trial("a", fit=fit, dials=limits(batches=(8, 8), shares=(0.5, 0.5)), override=override, changed_at_s=95.0)
    early = only(running(row))
    assert early.settings == fled
    assert early.binding == "override"
    late = only(running(row, now_s=105.0))
    assert (late.settings.micro_batch, late.settings.grad_accum) == (8, 1)


def test_a_micro_batch_that_ran_out_of_memory_is_not_tried_again() -> None:
    fled = settings(micro_batch=4, grad_accum=2)
    fit = measured(observation(0.1, noise=NOISY), observation(0.14, micro_batch=4, grad_accum=2))
    row = trial("a", fit=protect(fit, settings(micro_batch=8), fled), dials=limits(batches=(8, 8)))
    snap = world([row], plan=in_force([row], {"a": 0.5}, a=fled))
    assert only(snap).settings.micro_batch == 4


def test_shares_move_to_the_trial_that_makes_more_of_them() -> None:
    seen = (1.0, 4.0, 8.0)
    steep = measured(*(observation(0.1 / c**0.95, cores=c) for c in seen), windows=5)
    flat = measured(*(observation(0.1 / c**0.3, cores=c) for c in seen), windows=5)
    rows = [trial("a", fit=steep, shape="steep"), trial("b", fit=flat, shape="flat")]
    plan = Goodput().decide(world(rows, units=16))
    a, b = (row.settings.share for row in plan.allocations)
    assert a > 0.6
    assert b >= 0.25  # half of its fair share is guaranteed
    assert "speed-up" in plan.allocations[0].reason


def test_shares_stay_for_a_small_gain_and_move_for_a_large_one() -> None:
    fit = measured(observation(0.1))
    rows = [trial("a", fit=fit), trial("b", fit=fit)]
    near = world(rows, plan=in_force(rows, {"a": 0.52, "b": 0.48}), units=16)
    assert [row.settings.share for row in decide(near).allocations] == [0.52, 0.48]
    assert "less than 5.0%" in decide(near).allocations[0].reason
    far = world(rows, plan=in_force(rows, {"a": 0.9, "b": 0.1}), units=16)
    assert [row.settings.share for row in decide(far).allocations] == [0.5, 0.5]


def test_a_share_in_its_cooldown_moves_only_when_others_come_or_go() -> None:
    fit = measured(observation(0.1))
    rows = [trial("a", fit=fit, changed_at_s=99.0), trial("b", fit=fit, changed_at_s=99.0)]
    plan = in_force(rows, {"a": 0.9, "b": 0.1})
    assert [r.settings.share for r in decide(world(rows, plan=plan, units=16)).allocations] == [0.9, 0.1]
    assert [r.settings.share for r in decide(world(rows[:1], plan=plan, units=16)).allocations] == [1.0]
    joined = decide(world([*rows, trial("c", fit=fit)], plan=plan, units=16))
    assert [r.settings.share for r in joined.allocations] == pytest.approx([1 / 3] * 3, abs=1 / 64)


def test_a_departure_on_another_device_moves_nothing_here() -> None:
    fit = measured(observation(0.1))
    rows = [trial("a", fit=fit, changed_at_s=99.0), trial("b", fit=fit, changed_at_s=99.0)]
    gone = trial("c", placement=(type(rows[0].placement[0])("cpu-9"),))
    plan = in_force([*rows, gone], {"a": 0.9, "b": 0.1, "c": 1.0})
    assert [r.settings.share for r in decide(world(rows, plan=plan)).allocations] == [0.9, 0.1]


def test_a_stale_trial_keeps_all_of_its_allocation() -> None:
    rows = [trial("a", fit=fp32_at_two_sizes(), dials=limits(batches=(8, 64)), is_stale=True), trial("b")]
    snap = world(rows, plan=in_force(rows[:1], {"a": 0.7}))
    kept = decide(snap).allocation(TrialId("a"))
    assert kept is not None
    assert kept.settings == snap.plan.allocations[0].settings
    assert kept.binding == "stale"


def test_a_paused_trial_is_said_to_wait() -> None:
    override = Override(number=1, generation=1, settings=settings(share=0.0), reason="memory")
    row = trial("a", override=override, changed_at_s=99.0)
    allocation = only(running(row))
    assert allocation.settings.share == 0
    assert allocation.predicted_goodput is None
    assert "wait" in allocation.reason


@pytest.mark.parametrize(
    "params",
    [{"guarantee": 1.1}, {"min_gain": -0.1}, {"cooldown_s": -1.0}, {"quantum": 0.0}, {"min_gain": float("nan")}],
)
def test_impossible_parameters_are_refused_by_name(params: dict[str, float]) -> None:
    (name,) = params
    with pytest.raises(ValueError, match=f"{name}="):
        Goodput(**params)  # type: ignore[arg-type]
