from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.policies.learn.fit import Observation
from orchestrator.policies.tier import Tier
from orchestrator.telemetry.record import (
    FLAG_APPLIED,
    FLAG_GRAPH,
    FLAG_SEVERAL,
    FLAG_SKIPPED,
    FLAG_UNSETTLED,
    STEP_DTYPE,
    StepArray,
    pack,
    unpack,
)
from orchestrator.telemetry.window import MAX_PENDING_ROWS, TrialWindow
from orchestrator.telemetry.window_view import FoldReport

STEP_S = 0.02
START_S = 1000.0


def honest_rows(count: int, first: int = 0, *, generation: int = 1, num_workers: int = 1) -> StepArray:
    """Steps of 20 ms back to back, 32 samples per rank each."""
    rows = np.zeros(count, dtype=STEP_DTYPE)
    number = np.arange(first, first + count)
    rows["seq"], rows["step"] = number, number
    rows["cursor"] = number * 32 * num_workers
    rows["num_samples"] = 32 * num_workers
    rows["generation"], rows["num_workers"] = generation, num_workers
    rows["micro_batch"], rows["grad_accum"] = 16, 2
    rows["share"], rows["cores"] = 0.5, 1.0
    rows["start_s"], rows["step_s"] = START_S + number * STEP_S, STEP_S
    rows["loss"], rows["grad_norm"], rows["learning_rate"] = 2.0, 1.0, 0.1
    rows["noise_trace"], rows["grad_sq"] = np.nan, np.nan
    rows["memory_bytes"] = 1_000_000
    return rows


def at(step: int) -> float:
    """When a step ended."""
    return START_S + (step + 1) * STEP_S


class Trial:
    """A window and the batches sent to it."""

    def __init__(self, num_workers: int = 1, *, has_shared_clock: bool = True, on_cpu: bool = False) -> None:
        self.window = TrialWindow(
            stale_after_s=5.0, num_workers=num_workers, has_shared_clock=has_shared_clock, computes_on_cpu=on_cpu
        )

    def send(self, rows: StepArray, rank: int = 0, now_s: float | None = None, newest: int = 1) -> FoldReport:
        now_s = float(rows["start_s"][-1] + rows["step_s"][-1]) if now_s is None else now_s
        return self.window.fold(rank, unpack(pack(rows)), now_s, newest_generation=newest)


def test_honest_rows_are_all_accepted_batch_after_batch() -> None:
    trial = Trial()
    for first in range(0, 1000, 250):
        report = trial.send(honest_rows(250, first))
        assert (report.accepted, report.refused, report.duplicates, report.missing) == (250, 0, 0, 0)
        assert report.mask.all()
    view = trial.window.view(at(999))
    assert (view.step, view.num_samples, view.cursor, view.generation) == (1000, 32_000, 32_000, 1)
    assert view.throughput_per_s == pytest.approx(32 / STEP_S, rel=1e-3)
    assert view.step_s == pytest.approx(STEP_S)
    assert view.loss == pytest.approx(2.0)
    assert view.memory_bytes == 1_000_000
    assert not view.is_stale
    assert not view.is_suspect


def test_a_batch_sent_again_changes_nothing() -> None:
    trial = Trial()
    trial.send(honest_rows(10))
    before = trial.window.view(at(9))
    report = trial.send(honest_rows(10))
    assert (report.accepted, report.refused, report.duplicates) == (0, 0, 10)
    assert trial.window.view(at(9)) == before
    overlapping = trial.send(honest_rows(10, 5))
    assert (overlapping.accepted, overlapping.duplicates) == (5, 5)
    assert trial.window.view(at(14)).num_samples == 15 * 32


def test_refused_rows_that_are_sent_again_are_counted_once() -> None:
    trial = Trial()
    rows = honest_rows(10)
    rows["tier"][-3:] = 99
    assert trial.send(rows).refused == 3
    assert trial.send(rows).refused == 0
    assert trial.window.view(at(9)).num_refused == 3


def test_lost_rows_are_counted_and_do_no_other_harm() -> None:
    trial = Trial()
    assert trial.send(honest_rows(10)).missing == 0
    report = trial.send(honest_rows(10, 17))
    assert (report.accepted, report.missing) == (10, 7)
    kept = honest_rows(10, 27)[[0, 1, 5, 9]]
    assert trial.send(kept).missing == 6
    assert trial.window.view(at(36)).num_missing == 13


def test_a_window_opened_late_goes_on_from_what_it_sees() -> None:
    trial = Trial()
    assert trial.send(honest_rows(5, 1000)).missing == 0
    view = trial.window.view(at(1004))
    assert (view.step, view.num_samples) == (1005, 1005 * 32)


LIES = {
    "seq": ("seq", 2**60, "seq"),
    "step far ahead": ("step", 10_000, "order"),
    "step back within the batch": ("step", 11, "order"),
    "step negative": ("step", -1, "step"),
    "step huge": ("step", 2**62, "step"),
    "generation not offered": ("generation", 2, "generation"),
    "generation negative": ("generation", -1, "generation"),
    "cursor negative": ("cursor", -5, "cursor"),
    "micro-batch zero": ("micro_batch", 0, "batch"),
    "accumulation negative": ("grad_accum", -2, "batch"),
    "workers of another trial": ("num_workers", 4, "batch"),
    "batch that overflows": ("micro_batch", 2**31 - 1, "batch"),
    "more samples than the batch": ("num_samples", 320, "samples"),
    "no samples and not skipped": ("num_samples", 0, "samples"),
    "samples negative": ("num_samples", -32, "samples"),
    "tier unknown": ("tier", 7, "tier"),
    "tier negative": ("tier", -1, "tier"),
    "flag unknown": ("flags", 256, "flags"),
    "share above one": ("share", 1.5, "share"),
    "share not a number": ("share", np.nan, "share"),
    "cores infinite": ("cores", np.inf, "share"),
    "start not a number": ("start_s", np.nan, "time"),
    "start infinite": ("start_s", -np.inf, "time"),
    "step without duration": ("step_s", 0.0, "time"),
    "step backwards": ("step_s", -1.0, "time"),
    "step of infinite duration": ("step_s", np.inf, "time"),
    "waiting longer than the step": ("wait_s", 3.0, "time"),
    "data time not a number": ("data_s", np.nan, "time"),
    "cpu time negative": ("cpu_s", -1.0, "time"),
    "in the future": ("start_s", START_S + 3600.0, "future"),
    "longer than it can have been": ("step_s", 100.0, "future"),
    "before the step before": ("start_s", START_S - 1.0, "overlap"),
    "loss not a number": ("loss", np.nan, "loss"),
    "loss infinite": ("loss", -np.inf, "loss"),
    "gradient norm infinite": ("grad_norm", np.inf, "gradient"),
    "gradient norm negative": ("grad_norm", -1.0, "gradient"),
    "learning rate not a number": ("learning_rate", np.nan, "gradient"),
    "noise infinite": ("noise_trace", np.inf, "gradient"),
    "memory negative": ("memory_bytes", -1, "memory"),
    "memory beyond reason": ("memory_bytes", 2**60, "memory"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_row_that_cannot_be_true_is_refused_by_its_reason_and_the_others_count(lie: str) -> None:
    name, value, reason = LIES[lie]
    trial = Trial()
    trial.send(honest_rows(10))
    rows = honest_rows(20, 10)
    rows[name][7] = value
    report = trial.send(rows, now_s=at(29))
    assert report.reasons == ((reason, 1),)
    assert not report.mask[7]
    assert (report.accepted, report.refused) == (19, 1)
    assert trial.window.view(at(29)).step == 30
    assert trial.send(honest_rows(10, 30)).accepted == 10


@pytest.mark.parametrize("lie", LIES)
def test_the_same_lie_in_the_first_row_of_all_costs_at_most_the_liar(lie: str) -> None:
    name, value, _ = LIES[lie]
    trial = Trial()
    rows = honest_rows(20)
    rows[name][0] = value
    report = trial.send(rows, now_s=at(19))
    assert report.accepted + report.refused + report.duplicates == 20


def test_a_skipped_step_may_have_any_loss_but_no_samples() -> None:
    trial = Trial()
    rows = honest_rows(3)
    rows["flags"][1], rows["num_samples"][1] = FLAG_SKIPPED, 0
    rows["loss"][1], rows["grad_norm"][1] = np.nan, np.inf
    rows["step"][2] = 1  # a skipped step is no optimizer step
    assert trial.send(rows).accepted == 3
    view = trial.window.view(at(2))
    assert (view.step, view.num_samples) == (2, 64)
    assert view.loss == pytest.approx(2.0)
    last = honest_rows(1, 3)
    last["flags"], last["num_samples"], last["step"] = FLAG_SKIPPED, 0, 2
    assert trial.send(last).accepted == 1
    assert trial.window.view(at(3)).step == 2
    lying = honest_rows(1, 4)
    lying["flags"] = FLAG_SKIPPED
    assert trial.send(lying).reasons == (("samples", 1),)


def test_a_smaller_last_batch_counts_but_is_not_an_observation() -> None:
    trial = Trial()
    rows = honest_rows(4)
    rows["num_samples"][3] = 5
    assert trial.send(rows).accepted == 4
    assert trial.window.view(at(3)).num_samples == 3 * 32 + 5
    assert [seen.num_steps for seen in trial.window.observations(at(3))] == [3]


def test_time_cannot_be_told_twice() -> None:
    """The pity attack: every step claims to have taken ten times as long as it can have."""
    trial = Trial()
    trial.send(honest_rows(10))
    rows = honest_rows(200, 10)
    rows["step_s"] = 10 * STEP_S
    report = trial.send(rows)
    assert {reason for reason, _ in report.reasons} == {"overlap"}
    assert report.accepted <= 1.02 * 200 / 10 + 1


def test_a_pause_is_no_credit_for_steps_that_overlap() -> None:
    trial = Trial()
    trial.send(honest_rows(10))
    rows = honest_rows(50, 10)
    rows["start_s"] += 60.0
    rows["step_s"] = 10 * STEP_S
    report = trial.send(rows)
    assert np.sum(rows["step_s"][report.mask]) <= 50 * STEP_S + 10 * STEP_S


def test_short_steps_cannot_hide_in_the_slack_between_boundaries() -> None:
    trial = Trial()
    rows = honest_rows(250)
    number = np.arange(250)
    rows["start_s"], rows["step_s"] = START_S + number * 0.001, 0.005
    report = trial.send(rows, now_s=START_S + 0.25)
    assert np.sum(rows["step_s"][report.mask]) <= 0.25 * 1.02 + 0.05 + 0.005


def test_time_between_steps_that_nobody_accounts_for_lowers_the_rate() -> None:
    """A step that claims to be ten times as fast does not speed the trial up."""
    trial = Trial()
    rows = honest_rows(100)
    rows["step_s"] = STEP_S / 10
    assert trial.send(rows).accepted == 100
    assert trial.window.view(at(99)).throughput_per_s == pytest.approx(32 / STEP_S, rel=0.02)


def test_a_batch_from_the_future_is_refused_within_a_second() -> None:
    trial = Trial()
    assert trial.send(honest_rows(1), now_s=at(0) - 0.9).accepted == 1
    trial = Trial()
    assert trial.send(honest_rows(1), now_s=at(0) - 1.1).reasons == (("future", 1),)


def test_a_rank_on_another_node_is_judged_by_its_own_clock() -> None:
    trial = Trial(has_shared_clock=False)
    assert trial.send(honest_rows(10), now_s=5.0).accepted == 10
    assert trial.send(honest_rows(10, 10), now_s=5.2).accepted == 10
    assert trial.send(honest_rows(100, 20), now_s=5.4).refused > 40


def test_a_batch_of_a_rank_that_the_trial_does_not_have_is_refused_whole() -> None:
    trial = Trial(num_workers=2)
    for rank in (-1, 2):
        report = trial.send(honest_rows(3, num_workers=2), rank=rank)
        assert report.reasons == (("rank", 3),)


def test_a_batch_of_another_shape_is_refused_whole() -> None:
    window = Trial().window
    report = window.fold(0, np.zeros(3, dtype=[("seq", "<u8")]), 0.0, newest_generation=1)
    assert report.reasons == (("shape", 3),)
    assert window.fold(0, np.zeros(0, dtype=STEP_DTYPE), 0.0, newest_generation=1).accepted == 0


@given(st.lists(st.binary(min_size=STEP_DTYPE.itemsize, max_size=STEP_DTYPE.itemsize), min_size=1, max_size=5))
def test_rows_of_random_bits_are_judged_without_a_warning(noise: list[bytes]) -> None:
    window = TrialWindow(stale_after_s=5.0)
    window.fold(0, honest_rows(5), at(4), newest_generation=1)
    records = np.frombuffer(b"".join(noise), dtype=STEP_DTYPE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = window.fold(0, records, at(4), newest_generation=1)
    assert report.accepted + report.refused + report.duplicates == len(noise)
    assert window.view(at(4)).step >= 5


def test_infinities_that_cancel_are_judged_without_a_warning() -> None:
    trial = Trial()
    rows = honest_rows(3)
    rows["start_s"][1], rows["step_s"][1] = np.inf, -np.inf
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert trial.send(rows).reasons == (("time", 1),)


def test_rank_zero_speaks_for_the_trial_and_the_others_show_stragglers() -> None:
    trial = Trial(num_workers=3)
    for rank in range(3):
        rows = honest_rows(20, num_workers=3)
        if rank != 2:
            rows["wait_s"] = 0.015
        rows["memory_bytes"] = 1000 * (rank + 1)
        trial.send(rows, rank=rank)
    view = trial.window.view(at(19))
    assert view.num_samples == 20 * 96
    assert view.memory_bytes == 3000
    assert view.straggler_ratio == pytest.approx(4.0, rel=1e-3)
    assert [seen.num_steps for seen in trial.window.observations(at(19))] == [20]


def test_observations_are_medians_per_setting_without_the_step_of_the_change() -> None:
    trial = Trial()
    rows = honest_rows(12)
    rows["step_s"][2] = STEP_S / 2  # one odd step does not move a median
    rows["generation"][6:] = 2
    rows["cores"][6:] = 0.3
    rows["tier"][6:] = 1
    rows["flags"][6] = FLAG_APPLIED
    rows["noise_trace"][:3], rows["grad_sq"][:3] = [3.0, 4.0, 5.0], [1.0, np.nan, 2.0]
    assert trial.send(rows, newest=2).accepted == 12
    first = Observation(
        cores=1.0,
        tier=Tier.FP32,
        micro_batch=16,
        grad_accum=2,
        num_workers=1,
        num_steps=6,
        step_s=float(np.float32(STEP_S)),
        noise_trace=4.0,
        grad_sq=1.5,
        num_noise=2,
        memory_bytes=int(rows["memory_bytes"].max()),
    )
    second = replace(first, cores=0.3, tier=Tier.BF16, num_steps=5, noise_trace=None, grad_sq=None, num_noise=0)
    assert trial.window.observations(at(11)) == (first, second)
    assert trial.window.observations(at(11)) == ()


def test_waiting_for_other_ranks_is_what_one_core_of_a_cpu_did_not_spend() -> None:
    rows = honest_rows(9, num_workers=2)
    rows["cpu_s"], rows["data_s"], rows["wait_s"] = 0.010, 0.002, 0.001
    trial = Trial(num_workers=2, on_cpu=True)
    trial.send(rows)
    (seen,) = trial.window.observations(at(8))
    assert seen.sync_s == pytest.approx(0.007, rel=1e-3)


@pytest.mark.parametrize("case", ["one rank", "a GPU", "two cores", "half a core"])
def test_waiting_for_other_ranks_is_unknown_where_cpu_seconds_do_not_tell(case: str) -> None:
    num_workers = 1 if case == "one rank" else 2
    rows = honest_rows(9, num_workers=num_workers)
    rows["cores"] = {"two cores": 2.0, "half a core": 0.5}.get(case, 1.0)
    trial = Trial(num_workers=num_workers, on_cpu=case != "a GPU")
    trial.send(rows)
    (seen,) = trial.window.observations(at(8))
    assert seen.sync_s is None


def test_a_rank_busy_for_longer_than_its_step_waited_for_nobody() -> None:
    rows = honest_rows(9, num_workers=2)
    rows["cpu_s"] = 2 * STEP_S
    trial = Trial(num_workers=2, on_cpu=True)
    trial.send(rows)
    assert [seen.sync_s for seen in trial.window.observations(at(8))] == [0.0]


def test_the_same_settings_in_two_runs_are_one_observation() -> None:
    trial = Trial()
    rows = honest_rows(9)
    rows["micro_batch"][3:6], rows["grad_accum"][3:6] = 32, 1
    trial.send(rows)
    assert [(seen.micro_batch, seen.num_steps) for seen in trial.window.observations(at(8))] == [(16, 6), (32, 3)]


def test_the_last_estimate_of_the_noise_is_shown() -> None:
    trial = Trial()
    rows = honest_rows(5)
    rows["noise_trace"][:2], rows["grad_sq"][:2] = [3.0, 4.0], [1.0, -2.0]
    trial.send(rows)
    view = trial.window.view(at(4))
    assert (view.noise_trace, view.grad_sq) == (4.0, -2.0)


def test_loss_is_smoothed_alike_however_the_steps_are_batched() -> None:
    losses = np.linspace(4.0, 1.0, 60)
    whole, pieces = Trial(), Trial()
    rows = honest_rows(60)
    rows["loss"] = losses
    whole.send(rows)
    for first in range(0, 60, 7):
        pieces.send(rows[first : first + 7])
    smoothed = whole.window.view(at(59)).loss
    assert smoothed == pytest.approx(pieces.window.view(at(59)).loss)
    assert smoothed is not None
    assert 1.0 < smoothed < 2.5


def test_a_trial_is_stale_after_silence_and_fresh_after_a_row() -> None:
    trial = Trial()
    assert not trial.window.view(START_S).is_stale
    assert trial.window.view(START_S + 5.1).is_stale
    trial.send(honest_rows(10))
    assert not trial.window.view(at(9) + 4.9).is_stale
    assert trial.window.view(at(9) + 5.1).is_stale


def test_refused_rows_do_not_keep_a_trial_fresh() -> None:
    trial = Trial()
    trial.send(honest_rows(10))
    lies = honest_rows(10, 10)
    lies["loss"] = np.nan
    trial.send(lies, now_s=at(9) + 5.0)
    assert trial.window.view(at(9) + 5.1).is_stale


def test_long_steps_are_given_the_time_they_take() -> None:
    trial = Trial()
    rows = honest_rows(2)
    rows["start_s"], rows["step_s"] = [START_S, START_S + 4.0], 4.0
    trial.send(rows)
    assert not trial.window.view(START_S + 8.0 + 19.0).is_stale
    assert trial.window.view(START_S + 8.0 + 21.0).is_stale


def test_throughput_looks_back_a_few_seconds_only() -> None:
    trial = Trial()
    slow = honest_rows(10, 500)
    slow["start_s"], slow["step_s"] = at(499) + np.arange(10), 1.0
    assert trial.send(np.concatenate((honest_rows(500), slow))).accepted == 510
    assert trial.window.view(at(499) + 10.0).throughput_per_s == pytest.approx(32.0, rel=0.01)


def test_nothing_is_known_before_the_first_row() -> None:
    view = Trial().window.view(0.0)
    assert (view.step, view.num_samples, view.straggler_ratio) == (0, 0, 1.0)
    assert view.throughput_per_s is view.step_s is view.loss is view.memory_bytes is view.noise_trace is None


def test_a_flood_leaves_a_bounded_window() -> None:
    trial = Trial()
    for first in range(0, MAX_PENDING_ROWS + 5000, 1000):
        trial.send(honest_rows(1000, first))
    (seen,) = trial.window.observations(0.0)
    assert seen.num_steps == MAX_PENDING_ROWS


def test_a_liar_becomes_suspect_and_is_forgiven_after_behaving() -> None:
    trial = Trial()
    rows = honest_rows(2000)
    rows["loss"] = np.nan
    trial.send(rows)
    assert trial.window.view(at(1999)).is_suspect
    for first in range(2000, 10_000, 200):
        trial.send(honest_rows(200, first))
    view = trial.window.view(at(9999))
    assert view.num_refused == 2000
    assert not view.is_suspect


def test_a_few_bad_rows_make_nobody_suspect() -> None:
    trial = Trial()
    rows = honest_rows(20)
    rows["loss"][::2] = np.nan
    trial.send(rows)
    assert not trial.window.view(at(19)).is_suspect


def test_observations_hold_steps_of_the_settled_mode_only() -> None:
    trial = Trial()
    rows = honest_rows(30)
    rows["flags"][:4] = FLAG_UNSETTLED
    rows["flags"][4:8] = FLAG_UNSETTLED | FLAG_GRAPH
    rows["flags"][8:] = FLAG_GRAPH
    trial.send(rows)
    (seen,) = trial.window.observations(at(30))
    assert (seen.num_steps, seen.is_replayed) == (22, True)
    more = honest_rows(10, 30)  # it could not be recorded again
    trial.send(more, now_s=at(39))
    (seen,) = trial.window.observations(at(40))
    assert (seen.num_steps, seen.is_replayed) == (10, False)


def together(rows: StepArray, sizes: list[int]) -> StepArray:
    """The same steps told of in records of so many each."""
    ends = np.cumsum(sizes)
    found = np.zeros(len(sizes), dtype=STEP_DTYPE)
    for number, (begin, end) in enumerate(zip(ends - sizes, ends, strict=True)):
        found[number] = rows[begin]
        part = rows[begin:end]
        found[number]["seq"], found[number]["flags"] = number, FLAG_SEVERAL if end - begin > 1 else 0
        for name in ("num_samples", "step_s", "cpu_s", "wait_s"):
            found[number][name] = part[name].sum()
        found[number]["loss"] = part["loss"].mean()
    return found


def test_records_of_several_steps_say_what_those_steps_say() -> None:
    rows = honest_rows(300)
    one, several = Trial(), Trial()
    one.send(rows)
    sent = together(rows, [1, 2, 47, 100, 3, 147])
    for part in (sent[:3], sent[3:4], sent[4:]):
        report = several.send(part, now_s=at(299))
        assert (report.refused, report.missing) == (0, 0), report.reasons
    wanted, found = (trial.window.view(at(299)) for trial in (one, several))
    assert (found.step, found.num_samples, found.cursor) == (wanted.step, wanted.num_samples, wanted.cursor)
    assert found.step_s == pytest.approx(STEP_S, rel=1e-3)
    assert found.loss == pytest.approx(wanted.loss, rel=1e-6)
    assert found.throughput_per_s == pytest.approx(wanted.throughput_per_s, rel=1e-3)
    (seen,) = several.window.observations(at(299))
    assert seen.num_steps == 300
    assert seen.step_s == pytest.approx(STEP_S, rel=1e-3)
    stretch = several.window.stretch()
    assert stretch is not None
    assert stretch.num_steps >= 147
    assert stretch.samples_per_s == pytest.approx(32 / STEP_S, rel=1e-3)


def test_more_steps_than_records_tell_of_are_refused() -> None:
    sent = together(honest_rows(60), [20, 20, 20])
    sent["step"][2] += 1
    report = Trial().send(sent)
    assert dict(report.reasons) == {"order": 1}
    partial = together(honest_rows(60), [20, 20, 20])
    partial["num_samples"][1] -= 1
    assert dict(Trial().send(partial).reasons)["samples"] == 1


def test_steps_go_on_behind_a_lost_record_of_several() -> None:
    trial = Trial()
    sent = together(honest_rows(80), [20, 20, 20, 20])
    trial.send(sent[:1], now_s=at(79))
    report = trial.send(sent[2:], now_s=at(79))
    assert (report.accepted, report.refused, report.missing) == (2, 0, 1)
    assert trial.window.view(at(79)).step == 80
