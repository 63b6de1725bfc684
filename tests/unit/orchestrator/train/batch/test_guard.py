"""Running out of memory on one rank: the step is done again with the same samples, or the trial says why not."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from orchestrator.control.orders import Status
from orchestrator.errors import OutOfMemoryError
from orchestrator.policies.plan import Settings
from orchestrator.policies.tier import Tier
from orchestrator.train.batch.guard import MAX_ATTEMPTS, MemoryGuard, is_out_of_memory
from orchestrator.train.batch.memory import MemoryMeter
from tests.unit.orchestrator.train.batch.overflows import OverflowingJob
from tests.unit.orchestrator.train.links import ONE_RANK, Script, grant, loop, order, settings

NEVER = 10**9


def job_of(place: str = "forward", at: int = NEVER, **changes: int) -> OverflowingJob:
    torch.manual_seed(3)
    job = OverflowingJob(place, at, width=16, num_samples=512, **changes)
    job.prepare()
    return job


def run(directory: Path, job: OverflowingJob) -> Script:
    script = Script(order(directory))
    outcome = loop(script, job).run()
    assert outcome.status is Status.DONE
    script.collect()
    return script


@pytest.mark.parametrize("place", ["forward", "backward", "optimizer"])
def test_the_step_is_done_again_with_the_same_samples_and_the_same_loss(tmp_path: Path, place: str) -> None:
    undisturbed = run(tmp_path / "a", job_of()).records
    job = job_of(place, at=8)
    script = run(tmp_path / "b", job)
    records = script.records
    assert job.num_fired == 1
    for name in ("step", "cursor", "num_samples"):
        assert (records[name] == undisturbed[name]).all(), name
    np.testing.assert_allclose(records["loss"], undisturbed["loss"], rtol=1e-5)
    assert set(records["micro_batch"][:7]) == {8}
    assert set(records["micro_batch"][7:]) == {4}
    assert set(records["grad_accum"][7:]) == {2}
    (override,) = script.overrides
    assert override.instead_of == settings()
    assert override.settings == settings(micro_batch=4, grad_accum=2)
    assert override.reason == "out of memory at step 7 with micro-batch 8 in fp32: goes on with 4 x 2"


def test_a_second_overflow_of_the_step_goes_down_once_more(tmp_path: Path) -> None:
    job = job_of("forward", at=8, fits=2, times=2)
    script = run(tmp_path, job)
    assert job.num_fired == 2
    assert [o.settings.micro_batch for o in script.overrides] == [2]


def test_after_three_attempts_the_trial_fails_by_name(tmp_path: Path) -> None:
    job = job_of("forward", at=8, fits=0, times=NEVER)
    with pytest.raises(OutOfMemoryError, match="t ran out of memory 3 times at step 7, the last time with") as failure:
        loop(Script(order(tmp_path)), job).run()
    assert failure.value.is_final
    assert job.num_fired == MAX_ATTEMPTS


def test_a_half_done_update_is_not_repeated_but_begun_again_from_the_commit(tmp_path: Path) -> None:
    job = job_of("torn", at=8)
    with pytest.raises(OutOfMemoryError) as failure:
        loop(Script(order(tmp_path)), job).run()
    assert not failure.value.is_final
    assert failure.value.settings == settings(micro_batch=4, grad_accum=2)


def test_the_error_survives_pickling() -> None:
    error = OutOfMemoryError("t: full", settings=settings(), is_final=True)
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.settings, again.is_final) == ("t: full", settings(), True)


def test_what_out_of_memory_looks_like() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("x"))
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"))
    with pytest.raises(RuntimeError) as real:
        torch.empty(1 << 50, dtype=torch.uint8)
    assert is_out_of_memory(real.value)
    assert not is_out_of_memory(RuntimeError("shape mismatch"))
    assert not is_out_of_memory(ValueError("out of memory"))


class FakeGauge:
    """A device of a known size, on which a step takes 100 bytes and 10 for each sample."""

    def __init__(self, room_bytes: int) -> None:
        self.room_bytes = room_bytes
        self.micro_batch = 8
        self.asked: list[int] = []

    def reset(self) -> None: ...

    def peak_bytes(self) -> int:
        return 100 + 10 * self.micro_batch

    def fixed_bytes(self) -> int:
        return 100

    def can_hold(self, needed_bytes: int) -> bool:
        self.asked.append(needed_bytes)
        return needed_bytes <= self.room_bytes


class FakeStepper:
    def __init__(self, now: Settings, whole: str = "") -> None:
        self.settings, self.whole = now, whole


def guard_with(
    room_bytes: int, limit_bytes: int = 0, now: Settings | None = None, whole: str = ""
) -> tuple[MemoryGuard, FakeGauge]:
    gauge = FakeGauge(room_bytes)
    meter = MemoryMeter(torch.device("cpu"), limit_bytes, gauge)
    now = now or settings()
    for _ in range(4):
        meter.observe(now)
    return MemoryGuard(FakeStepper(now, whole), ONE_RANK, meter, "t"), gauge  # type: ignore[arg-type]


def test_a_micro_batch_that_may_not_be_cut_stays_where_there_is_no_room() -> None:
    guard, _ = guard_with(0, whole="BatchNorm")
    asked = settings(share=0.1, grad_accum=3, tier=Tier.BF16)
    assert guard.prepare(asked) == settings(share=0.1)


def test_running_out_of_memory_with_one_begins_the_trial_again_with_more(tmp_path: Path) -> None:
    job = job_of("forward", at=8)
    job.depends_on_batch = True  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError) as failure:
        loop(Script(order(tmp_path)), job).run()
    assert is_out_of_memory(failure.value)
    assert job.num_fired == 1


def test_what_does_not_grow_is_not_checked() -> None:
    guard, gauge = guard_with(0)
    for asked in (settings(), settings(micro_batch=4, grad_accum=16), settings(share=0.1)):
        assert guard.prepare(asked) == asked
    assert gauge.asked == []


@pytest.mark.parametrize(
    ("room_bytes", "expected"),
    [(10_000, (96, 1)), (680, (48, 2)), (500, (32, 3)), (200, (8, 12)), (0, (8, 12))],
)
def test_a_larger_micro_batch_becomes_the_largest_that_there_is_room_for(
    room_bytes: int, expected: tuple[int, int]
) -> None:
    guard, gauge = guard_with(room_bytes)
    found = guard.prepare(settings(micro_batch=96))
    assert (found.micro_batch, found.grad_accum) == expected
    assert found.global_batch == 96
    assert len(gauge.asked) <= 5, "the search is bounded"


def test_the_grant_bounds_it_as_the_device_does() -> None:
    guard, _ = guard_with(10_000, limit_bytes=500)
    assert guard.prepare(settings(micro_batch=96)).micro_batch == 32


def test_a_tier_without_room_is_not_taken() -> None:
    guard, _ = guard_with(100)
    asked = settings(tier=Tier.BF16)
    assert guard.prepare(asked) == settings()
    guard, _ = guard_with(160)
    assert guard.prepare(asked) == replace(asked, micro_batch=4, grad_accum=2)


def test_a_grant_without_room_is_followed_as_far_as_it_can_be(tmp_path: Path) -> None:
    first = order(tmp_path)
    script = Script(first)
    script.at(6, lambda now: replace(now, grant=grant(2, micro_batch=64)))
    trained = loop(script, job_of())
    trained._meter = MemoryMeter(torch.device("cpu"), 0, FakeGauge(500))
    trained.run()
    script.collect()
    assert set(script.records["micro_batch"]) == {8, 32}
    assert [(o.generation, o.settings.micro_batch, o.settings.grad_accum) for o in script.overrides] == [(2, 32, 2)]
    assert script.overrides[0].instead_of == grant(2, micro_batch=64).settings
    assert [ack.generation for ack in script.acks] == [1, 2]


def test_peaks_are_read_in_few_steps_and_anew_after_a_change() -> None:
    gauge = FakeGauge(0)
    meter = MemoryMeter(torch.device("cpu"), 0, gauge)
    seen = [meter.observe(settings()) for _ in range(5)]
    assert seen == [0, 0, 180, 180, 180]
    gauge.micro_batch = 16
    seen = [meter.observe(settings(micro_batch=16)) for _ in range(5)]
    assert seen == [0, 0, 260, 260, 260]
    line = meter.line(settings())
    assert line is not None
    assert (round(line.fixed_bytes), round(line.sample_bytes), line.largest) == (100, 10, 16)
