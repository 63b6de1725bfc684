from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.policies.simulator import (
    POLLUX_APPLICATIONS,
    Load,
    Measured,
    NoiseCurve,
    Parametric,
    Sharing,
    TableError,
)
from orchestrator.policies.simulator.tables import application_from, read_noise, read_speeds
from orchestrator.policies.tier import Tier

ONE = Load(num_workers=1, num_nodes=1, micro_batch=10, grad_accum=1, tier=Tier.FP32)
MODEL = Parametric(alpha_c=0.1, beta_c=0.01, alpha_r=0.2, beta_r=0.01, alpha_n=0.5, beta_n=0.02, gamma=1.0)
SPEEDS = [
    "placement,local_bsz,step_time,sync_time",
    "1,10,0.1,0.0",
    "1,20,0.2,0.0",
    "4,10,0.3,0.2",
    "4,20,0.4,0.2",
    "44,10,0.9,0.8",
    "44,20,1.1,0.8",
]


def test_step_time_has_the_published_form() -> None:
    assert MODEL.step_s(ONE) == pytest.approx(0.2)
    four = dataclasses.replace(ONE, num_workers=4)
    assert MODEL.step_s(four) == pytest.approx(0.2 + 0.2 + 0.02)
    apart = dataclasses.replace(four, num_nodes=2, grad_accum=3)
    assert MODEL.step_s(apart) == pytest.approx(2 * 0.2 + 0.2 + 0.5 + 0.04)
    overlapped = dataclasses.replace(MODEL, gamma=10.0)
    assert overlapped.step_s(apart) == pytest.approx(2 * 0.2 + 0.54, rel=0.01)


def test_tier_device_and_share_change_compute_and_not_synchronisation() -> None:
    model = dataclasses.replace(
        MODEL, tiers={Tier.BF16: 2.0}, devices={"fast": 4.0}, sharing=Sharing(points=((0.5, 0.8), (1.0, 1.0)))
    )
    four = dataclasses.replace(ONE, num_workers=4)
    assert model.step_s(dataclasses.replace(four, tier=Tier.BF16)) == pytest.approx(0.1 + 0.22)
    assert model.step_s(dataclasses.replace(four, device_type="fast")) == pytest.approx(0.05 + 0.22)
    assert model.step_s(dataclasses.replace(four, share=0.5)) == pytest.approx(0.25 + 0.22)


@given(st.floats(0.01, 1.0), st.floats(0.01, 1.0), st.floats(0.0, 1.0))
def test_more_of_a_device_is_never_slower_and_a_crowd_never_faster(one: float, other: float, crowd: float) -> None:
    sharing = Sharing(points=((0.1, 0.3), (0.5, 0.8), (1.0, 1.0)), crowding=0.2)
    assert (sharing.speed(one) >= sharing.speed(other)) or one < other
    assert 0 < sharing.speed(one, crowd) <= sharing.speed(one) <= 1


@pytest.mark.parametrize("points", [(), ((0.5, 0.5),), ((1.0, 1.0), (0.5, 0.6)), ((0.0, 0.1), (1.0, 1.0))])
def test_a_sharing_that_cannot_be_is_refused(points: tuple[tuple[float, float], ...]) -> None:
    with pytest.raises((ValueError, IndexError)):
        Sharing(points=points)


def test_a_table_is_read_and_interpolated() -> None:
    model = Measured(cells=read_speeds(SPEEDS, "speeds.csv")[""])
    assert model.step_s(dataclasses.replace(ONE, micro_batch=15)) == pytest.approx(0.15)
    four = dataclasses.replace(ONE, num_workers=4, micro_batch=15, grad_accum=2)
    assert model.step_s(four) == pytest.approx(2 * 0.15 + 0.2)
    near = dataclasses.replace(ONE, num_workers=6, num_nodes=2)
    assert 0.3 < model.step_s(near) < 0.9 * 1.01  # nearer to two nodes of four than to anything on one node


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("x4,10,0.1,0.0", "t.csv:2: placement='x4'; allowed: the workers on each node as digits"),
        ("40,10,0.1,0.0", "t.csv:2: placement='40'"),
        ("4,0,0.1,0.0", "t.csv:2: local_bsz='0'"),
        ("4,1,0,0.0", "t.csv:2: step_time='0'; allowed: a number > 0"),
        ("4,1,0.1,0.2", "t.csv:2: sync_time='0.2'; allowed: less than step_time, 0.1"),
        ("4,1,inf,0.2", "t.csv:2: step_time='inf'"),
    ],
)
def test_a_bad_line_of_a_table_is_named(line: str, text: str) -> None:
    with pytest.raises(TableError, match=text):
        read_speeds([SPEEDS[0], line], "t.csv")


def test_nodes_and_replicas_may_stand_for_a_placement_and_applications_for_files() -> None:
    lines = ["application,num_nodes,num_replicas,local_bsz,step_time,sync_time", "a,2,8,10,0.5,0.1", "b,1,1,10,0.2,0"]
    assert read_speeds(lines, "t.csv") == {"a": {(2, 8): ((10, 0.5, 0.1),)}, "b": {(1, 1): ((10, 0.2, 0.0),)}}
    with pytest.raises(TableError, match="num_replicas='1'; allowed: a whole number >= num_nodes, 2"):
        read_speeds([lines[0], "a,2,1,10,0.5,0.1"], "t.csv")


def test_gradient_statistics_become_a_noise_curve_and_a_length() -> None:
    lines = ["progress,iteration,metric,grad_sqr,grad_var", "100,50,0.5,2.0,4.0", "400,80,0.6,1.0,8.0"]
    curve, num_samples = read_noise(lines, "validation-32.csv", 32)
    assert (curve.ends, curve.scales, num_samples) == ((0.25, 1.0), (64.0, 256.0), 12_800)
    with pytest.raises(TableError, match=r"v\.csv:3: progress='100'; allowed: a number > 100"):
        read_noise([*lines[:2], "100,60,0.6,1.0,8.0"], "v.csv", 32)
    application = application_from("a", read_speeds(SPEEDS, "s")[""], (curve, num_samples), batches=(32, 256))
    assert (application.base_batch, application.max_micro_batch, application.max_workers) == (32, 20, 25)


def test_a_job_alone_is_faster_on_more_devices_until_synchronising_eats_it() -> None:
    for application in POLLUX_APPLICATIONS.values():
        times = [application.alone_s(num, 4) for num in (0.5, 1, 2, 4)]
        assert times == sorted(times, reverse=True)
        assert times[0] == pytest.approx(2 * times[1])


def test_a_noise_curve_that_cannot_be_is_refused() -> None:
    for ends, scales in (((0.5,), (1.0,)), ((1.0,), (0.0,)), ((0.5, 1.0), (1.0,))):
        with pytest.raises(ValueError, match="allowed"):
            NoiseCurve(ends=ends, scales=scales)
