from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orchestrator.control.events import SCHEMA_VERSION, SPARE_REASON
from orchestrator.errors import ConfigError, JournalError
from orchestrator.policies import FairShare
from orchestrator.policies.codec import to_jsonable
from orchestrator.policies.plan import EMPTY_PLAN, Settings
from orchestrator.view.verify import verify
from tests.run_directory import CHEAPER, ONE_RANK, START, RunDirectory, healthy_run, records, snapshot


def codes(run: RunDirectory) -> list[str]:
    return [violation["code"] for violation in verify(run.write())["violations"]]


def one_trial(path: Path) -> RunDirectory:
    """One trial that was granted plan 1 and applied it."""
    run = RunDirectory(path)
    run.begin("a")
    run.decide("a")
    run.offer("a")
    run.ack("a", 0)
    return run


def test_a_healthy_run_has_no_violation_and_everything_was_looked_at(tmp_path: Path) -> None:
    answer = verify(healthy_run(tmp_path).write())
    assert answer["violations"] == []
    assert answer["notes"] == []
    assert answer["checked"] == {
        "entries": 26,
        "plans": 2,
        "plans_replayed": 2,
        "offers": 4,
        "acks": 4,
        "results": 4,
        "trials": 2,
        "attempts": 2,
        "steps": 20,
    }


def test_the_answer_is_plain_json_with_the_promised_keys(tmp_path: Path) -> None:
    run = healthy_run(tmp_path)
    run.entries[-1]["leaks"]["actors"] = 2
    (violation,) = json.loads(json.dumps(verify(run.write())))["violations"]
    assert violation == {"code": "leak", "text": "the run left behind 2 actors", "trial_id": None, "generation": None}


@pytest.mark.parametrize(("lost", "words"), [(slice(-1, None), "last word"), (slice(1), "head")])
def test_a_journal_that_lost_its_end_or_its_head_is_torn(tmp_path: Path, lost: slice, words: str) -> None:
    run = healthy_run(tmp_path)
    del run.entries[lost]
    run_dir = run.write()
    (run_dir / "status.json").write_text('{"state": "done"}')
    violations = verify(run_dir)["violations"]
    assert any(v["code"] == "journal_torn" and words in v["text"] for v in violations), violations


def test_a_directory_that_is_no_run_is_a_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a run directory"):
        verify(tmp_path)


# Grants.


def two_trials(path: Path) -> RunDirectory:
    """Trials a and b; a runs with 0.5, b has nothing yet."""
    run = RunDirectory(path)
    run.begin("a", "b")
    run.decide("a", "b")
    run.offer("a")
    run.ack("a", 0)
    return run


def share(value: float) -> Settings:
    return replace(ONE_RANK, share=value)


def test_an_offer_beyond_the_device_is_an_over_commitment(tmp_path: Path) -> None:
    run = two_trials(tmp_path)
    run.offer("b", share(0.6))
    (violation,) = verify(run.write())["violations"]
    assert (violation["code"], violation["trial_id"], violation["generation"]) == ("over_commitment", "b", 1)
    assert "node0/cpu was granted to 1.100 of 1" in violation["text"]


def test_a_release_counts_only_when_it_is_acknowledged(tmp_path: Path) -> None:
    run = two_trials(tmp_path)
    run.decide("a", "b")
    run.offer("a", share(0.25))
    run.offer("b", share(0.75))
    run.ack("a", 5, share(0.25))
    assert codes(run) == ["over_commitment"]


def test_a_grant_after_the_acknowledged_release_is_fine(tmp_path: Path) -> None:
    run = two_trials(tmp_path)
    run.decide("a", "b")
    run.offer("a", share(0.25))
    run.ack("a", 5, share(0.25))
    run.offer("b", share(0.75))
    run.ack("b", 0, share(0.75))
    assert codes(run) == []


@pytest.mark.parametrize("how", ["ended", "requeued", "recovered"])
def test_a_trial_that_is_gone_holds_nothing(tmp_path: Path, how: str) -> None:
    run = two_trials(tmp_path)
    if how == "ended":
        run.end("a", 0, 0)
    elif how == "requeued":
        run.log("trial_requeued", trial_id="a", attempt=1, reason="its worker group died")
    else:
        run.log("recovered", start_id="x", are_workers_gone=True)
    run.offer("b", share(1.0))
    assert codes(run) == []


def test_a_restarted_controller_forgets_no_grant(tmp_path: Path) -> None:
    run = two_trials(tmp_path)
    run.log("recovered", start_id="x", are_workers_gone=False)
    run.offer("b", share(1.0))
    assert codes(run) == ["over_commitment"]


def test_an_override_gives_nothing_back_before_it_is_acknowledged(tmp_path: Path) -> None:
    run = two_trials(tmp_path)
    run.log("override", trial_id="a", generation=1, number=1, settings=to_jsonable(share(0.1)), reason="x")
    run.offer("b", share(0.9))
    assert codes(run) == ["over_commitment"]


def test_a_trial_that_acknowledges_more_than_it_was_granted_is_seen(tmp_path: Path) -> None:
    run = two_trials(tmp_path)
    run.offer("b", share(0.5))
    run.ack("b", 0, share(0.7))
    assert codes(run) == ["over_commitment"]


def test_every_rank_on_a_device_counts(tmp_path: Path) -> None:
    run = one_trial(tmp_path)
    run.decide("a")
    plan = run.entries[-1]["plan"]["allocations"][0]
    plan |= {"placement": ["node0/cpu", "node0/cpu"], "settings": to_jsonable(replace(START, share=0.6))}
    run.offer("a", replace(START, share=0.6))
    assert "over_commitment" in codes(run)


def test_an_offer_before_its_plan_is_written_is_seen(tmp_path: Path) -> None:
    run = one_trial(tmp_path)
    run.decide("a")
    plan = run.entries.pop()
    run.offer("a")
    run.ack("a", 5)
    run.entries.append({**plan, "seq": 99})
    violations = verify(run.write())["violations"]
    assert [v["code"] for v in violations if v["code"] != "journal_torn"] == ["plan_not_first", "plan_not_first"]


def test_a_generation_that_goes_back_is_seen(tmp_path: Path) -> None:
    run = one_trial(tmp_path)
    run.plan = EMPTY_PLAN
    run.decide("a")
    assert codes(run) == ["plan_not_first"]


def test_an_acknowledgement_of_nothing_offered_is_seen(tmp_path: Path) -> None:
    run = one_trial(tmp_path)
    run.decide("a")
    run.ack("a", 5)
    assert codes(run) == ["ack_without_offer"]


# Offers that nobody answers.


def ignored_offer(path: Path) -> RunDirectory:
    """Plan 2 is offered at 9 s and the trial runs on for 30 s."""
    run = one_trial(path)
    run.decide("a")
    run.offer("a")
    run.record("a", records(300, start_s=8.0))
    return run


def test_an_offer_that_is_never_acknowledged_is_seen(tmp_path: Path) -> None:
    (violation,) = verify(ignored_offer(tmp_path).write())["violations"]
    assert (violation["code"], violation["trial_id"], violation["generation"]) == ("unacknowledged", "a", 2)


@pytest.mark.parametrize("answer", ["ack", "offer", "short run", "end", "requeue"])
def test_an_offer_that_is_answered_superseded_or_too_late_is_fine(tmp_path: Path, answer: str) -> None:
    if answer == "short run":
        run = one_trial(tmp_path)
        run.decide("a")
        run.offer("a")
        run.record("a", records(40, start_s=8.0))
    else:
        run = ignored_offer(tmp_path)
    if answer == "ack":
        run.ack("a", 300)
    elif answer == "offer":
        run.decide("a")
        run.offer("a")
        run.ack("a", 300)
    elif answer == "end":
        run.end("a", 300, 2400)
    elif answer == "requeue":
        run.log("trial_requeued", trial_id="a", attempt=1, reason="its worker group died")
    assert codes(run) == []


def test_an_offer_ignored_until_the_end_of_a_long_run_is_seen(tmp_path: Path) -> None:
    run = ignored_offer(tmp_path)
    for _ in range(20):
        run.log("slot", slot_id="other", state="closed", epoch=1, hello=None)
    run.end("a", 300, 2400)
    assert codes(run) == ["unacknowledged"]


# Replay.


def test_a_plan_the_policy_would_not_take_again_is_seen(tmp_path: Path) -> None:
    run = healthy_run(tmp_path)
    entry = next(entry for entry in run.entries if entry["kind"] == "plan" and entry["generation"] == 2)
    entry["plan"]["allocations"][0]["predicted_gain"] = 0.26
    (violation,) = verify(run.write())["violations"]
    assert (violation["code"], violation["generation"]) == ("replay_mismatch", 2)


def test_a_plan_with_other_words_is_no_exact_replay(tmp_path: Path) -> None:
    run = healthy_run(tmp_path)
    next(entry for entry in run.entries if entry["kind"] == "plan")["plan"]["reason"] = "something else"
    assert codes(run) == ["replay_mismatch"]


def test_a_snapshot_that_cannot_be_read_cannot_be_replayed(tmp_path: Path) -> None:
    run = healthy_run(tmp_path)
    del next(entry for entry in run.entries if entry["kind"] == "plan")["snapshot"]["seed"]
    (violation,) = verify(run.write())["violations"]
    assert violation["code"] == "replay_mismatch"
    assert "lacks the key 'seed'" in violation["text"]


def test_a_policy_that_is_not_here_is_noted_and_everything_else_checked(tmp_path: Path) -> None:
    run = healthy_run(tmp_path)
    run.entries[0]["spec"] = {"policy": "not_a_module_here:Mine", "policy_params": {}}
    answer = verify(run.write())
    assert answer["violations"] == []
    assert answer["checked"]["plans_replayed"] == 0
    assert "decisions were not replayed" in answer["notes"][0]


def test_a_policy_with_other_parameters_than_the_head_says_is_no_match(tmp_path: Path) -> None:
    run = healthy_run(tmp_path)
    run.entries[0]["spec"]["policy_params"] = {"gain": 0.5}
    assert codes(run) == ["replay_mismatch"]


def test_a_journal_of_a_newer_version_is_refused_by_name(tmp_path: Path) -> None:
    run = healthy_run(tmp_path)
    run.entries[0]["schema"] = SCHEMA_VERSION + 1
    with pytest.raises(JournalError, match=f"schema {SCHEMA_VERSION + 1}.*reads up to {SCHEMA_VERSION}"):
        verify(run.write())


def test_fair_shares_that_stood_in_for_a_refused_policy_are_replayed_as_such(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.begin("a")
    world = snapshot(["a"])
    plan = replace(FairShare().decide(world), reason=f"{SPARE_REASON} (it raised)")
    run.log("plan", generation=1, snapshot=to_jsonable(world), plan=to_jsonable(plan))
    assert codes(run) == []


# Ranks.


def two_ranks(
    path: Path, *, late: int = 0, change: Callable[[np.ndarray[Any, Any]], None] | None = None
) -> RunDirectory:
    """Rank 1 applies plan 2 `late` steps after rank 0."""
    run = RunDirectory(path)
    run.begin("a")
    for rank, switch in ((0, 5), (1, 5 + late)):
        before = records(switch, settings=START)
        after = records(20 - switch, seq=switch, step=switch, cursor=8 * switch, generation=2, settings=START)
        rows = np.concatenate([before, after])
        if rank == 1 and change is not None:
            change(rows)
        run.record("a", rows, rank=rank)
    return run


def test_an_allocation_that_ranks_apply_at_different_steps_is_torn(tmp_path: Path) -> None:
    (violation,) = verify(two_ranks(tmp_path, late=1).write())["violations"]
    assert (violation["code"], violation["trial_id"], violation["generation"]) == ("torn_allocation", "a", 2)
    assert "rank 0 at step 5, rank 1 at step 6" in violation["text"]


def test_an_allocation_that_one_rank_never_applies_is_torn(tmp_path: Path) -> None:
    def stay(rows: np.ndarray[Any, Any]) -> None:
        rows["generation"] = 1

    (violation,) = verify(two_ranks(tmp_path, change=stay).write())["violations"]
    assert "rank 1 never" in violation["text"]


def test_ranks_that_apply_at_the_same_step_are_whole(tmp_path: Path) -> None:
    assert codes(two_ranks(tmp_path)) == []


def test_a_rank_whose_records_end_before_the_change_proves_nothing(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.begin("a")
    later = records(5, seq=5, step=5, cursor=40, generation=2, settings=START)
    run.record("a", records(5, settings=START), later)
    run.record("a", records(5, settings=START), rank=1)
    assert codes(run) == []


@pytest.mark.parametrize("name", ["micro_batch", "grad_accum", "tier", "num_workers", "share"])
def test_ranks_with_different_settings_in_one_step_are_torn(tmp_path: Path, name: str) -> None:
    def differ(rows: np.ndarray[Any, Any]) -> None:
        rows[name][7] = 1 if name == "tier" else rows[name][7] * 2

    (violation,) = verify(two_ranks(tmp_path, change=differ).write())["violations"]
    assert violation["code"] == "torn_allocation"
    assert f"{name} differs between ranks at 1 steps, first at step 7" in violation["text"]


def test_ranks_that_disagree_about_the_samples_are_seen(tmp_path: Path) -> None:
    def shift(rows: np.ndarray[Any, Any]) -> None:
        rows["cursor"][7:] += 8

    assert codes(two_ranks(tmp_path, change=shift)) == ["samples_repeated"]


# Samples.


def steps(tmp_path: Path, *attempts: list[Any]) -> RunDirectory:
    """A trial whose attempts wrote these records."""
    run = RunDirectory(tmp_path)
    run.begin("a")
    for attempt, parts in enumerate(attempts):
        if attempt:
            run.log("trial_requeued", trial_id="a", attempt=attempt, reason="its worker group died")
            run.assign("a", attempt)
        run.record("a", *parts, attempt=attempt)
    return run


def test_a_jump_in_the_cursor_loses_samples(tmp_path: Path) -> None:
    run = steps(tmp_path, [records(5), records(5, seq=5, step=5, cursor=48)])
    (violation,) = verify(run.write())["violations"]
    assert violation["code"] == "samples_lost"
    assert violation["text"] == "step 5 begins at sample 48 instead of 40: it skips 8 samples"


def test_a_cursor_that_goes_back_repeats_samples(tmp_path: Path) -> None:
    assert codes(steps(tmp_path, [records(5), records(5, seq=5, step=5, cursor=32)])) == ["samples_repeated"]


def test_a_trial_that_does_not_begin_at_the_first_sample_loses_some(tmp_path: Path) -> None:
    assert codes(steps(tmp_path, [records(5, cursor=8)])) == ["samples_lost"]


def test_a_skipped_step_is_done_again_with_the_same_samples(tmp_path: Path) -> None:
    skipped = records(1, seq=5, step=5, cursor=40)
    skipped["num_samples"], skipped["flags"] = 0, 1
    run = steps(tmp_path, [records(5), skipped, records(5, seq=6, step=5, cursor=40, settings=CHEAPER)])
    assert codes(run) == []


def test_steps_that_a_later_attempt_did_again_do_not_count(tmp_path: Path) -> None:
    run = steps(tmp_path, [records(9)], [records(10, step=5, cursor=40)])
    assert codes(run) == []


def test_a_resume_at_the_wrong_sample_is_seen(tmp_path: Path) -> None:
    """Step 5 is resumed, but the sampler goes on after step 9: samples 40 to 72 were never trained on."""
    assert codes(steps(tmp_path, [records(9)], [records(10, step=5, cursor=72)])) == ["samples_lost"]


def test_a_resume_that_repeats_committed_samples_is_seen(tmp_path: Path) -> None:
    assert codes(steps(tmp_path, [records(9)], [records(10, step=5, cursor=32)])) == ["samples_repeated"]


def test_the_lineage_goes_through_three_attempts(tmp_path: Path) -> None:
    run = steps(tmp_path, [records(9)], [records(9, step=6, cursor=48)], [records(9, step=3, cursor=24)])
    assert codes(run) == []


def test_records_that_died_with_a_worker_are_no_lost_samples(tmp_path: Path) -> None:
    run = steps(tmp_path, [records(5)], [records(5, step=8, cursor=64)])
    answer = verify(run.write())
    assert answer["violations"] == []
    assert "3 steps before step 8 died with a worker; the 24 samples" in answer["notes"][0]


def test_a_journalled_commit_vouches_for_records_that_died(tmp_path: Path) -> None:
    run = steps(tmp_path, [records(5)], [records(5, step=8, cursor=64)])
    run.result("a", 0, 8, 64)
    answer = verify(run.write())
    assert (answer["violations"], answer["notes"]) == ([], [])


@pytest.mark.parametrize(("num_samples", "code"), [(48, "samples_lost"), (32, "samples_repeated")])
def test_a_commit_that_counts_other_samples_than_were_trained_is_seen(
    tmp_path: Path, num_samples: int, code: str
) -> None:
    run = steps(tmp_path, [records(10)])
    run.result("a", 0, 5, num_samples)
    assert codes(run) == [code]


def test_an_end_that_counts_other_samples_than_were_trained_is_seen(tmp_path: Path) -> None:
    run = steps(tmp_path, [records(10)])
    run.end("a", 10, 88)
    assert codes(run) == ["samples_lost"]


def test_missing_records_are_a_gap_and_nothing_else(tmp_path: Path) -> None:
    run = steps(tmp_path, [records(5), records(5, seq=8, step=8, cursor=64)])
    (violation,) = verify(run.write())["violations"]
    assert violation["code"] == "telemetry_gap"
    assert violation["text"] == "3 of 13 step records of rank 0, attempt 0, are missing"


def test_missing_first_records_are_a_gap(tmp_path: Path) -> None:
    assert codes(steps(tmp_path, [records(5, seq=2, step=2, cursor=16)])) == ["telemetry_gap"]


def test_resent_records_are_no_violation(tmp_path: Path) -> None:
    run = steps(tmp_path, [records(10)])
    run.record("a", records(10))
    assert codes(run) == []


# Results, ends and the journal itself.


@pytest.mark.parametrize("indices", [[1], [0, 2], [0, 0], [0, 1, 0]])
def test_reports_that_are_missing_or_repeated_are_seen(tmp_path: Path, indices: list[int]) -> None:
    run = RunDirectory(tmp_path)
    run.begin("a")
    for index in indices:
        run.result("a", index, 5 * index, 40 * index)
    assert codes(run) == ["results_out_of_order"]


def test_a_report_that_goes_back_is_seen(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.begin("a")
    run.result("a", 0, 10, 80)
    run.result("a", 1, 5, 40)
    assert codes(run) == ["results_out_of_order"]


def test_a_trial_that_a_done_run_forgot_is_seen(tmp_path: Path) -> None:
    run = one_trial(tmp_path)
    run.finish()
    assert codes(run) == ["trial_lost"]


def test_an_interrupted_run_may_have_open_trials(tmp_path: Path) -> None:
    run = one_trial(tmp_path)
    run.finish()
    run.entries[-1]["state"] = "interrupted"
    assert codes(run) == []


@pytest.mark.parametrize("name", ["processes", "actors", "placement_groups"])
def test_what_a_run_leaves_behind_is_a_leak(tmp_path: Path, name: str) -> None:
    run = healthy_run(tmp_path)
    run.entries[-1]["leaks"][name] = 1
    assert codes(run) == ["leak"]


def test_a_damaged_line_is_a_torn_journal(tmp_path: Path) -> None:
    run = healthy_run(tmp_path)
    run.write()
    path = tmp_path / "journal.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    lines[3] = lines[3][: len(lines[3]) // 2] + b"\n"
    path.write_bytes(b"".join(lines))
    texts = [v["text"] for v in verify(tmp_path)["violations"] if v["code"] == "journal_torn"]
    assert any("line 4 is damaged" in text for text in texts)


def test_a_line_that_is_missing_is_seen_by_its_number(tmp_path: Path) -> None:
    run = healthy_run(tmp_path)
    run.entries = [entry for entry in run.entries if entry["kind"] != "gain"]
    texts = [v["text"] for v in verify(run.write())["violations"]]
    assert "is followed by entry" in texts[0]


def test_a_torn_last_line_of_a_run_that_goes_on_is_noted(tmp_path: Path) -> None:
    answer = verify(one_trial(tmp_path).write(tail=b'{"kind":"pl'))
    assert answer["violations"] == []
    assert "11 bytes" in answer["notes"][0]


def test_a_torn_last_line_of_a_run_that_ended_is_a_violation(tmp_path: Path) -> None:
    run = healthy_run(tmp_path)
    run.complete()
    assert verify(tmp_path)["violations"] == []
    run.write(tail=b"{")
    assert [v["code"] for v in verify(tmp_path)["violations"]] == ["journal_torn"]


def test_a_torn_telemetry_segment_is_noted(tmp_path: Path) -> None:
    run = steps(tmp_path, [records(5)])
    (segment,) = run.telemetry.iterdir()
    with segment.open("ab") as file:
        file.write(b"\xff\xff\xff\xff\x10")
    answer = verify(run.write())
    assert answer["violations"] == []
    assert "torn after 5 rows" in answer["notes"][0]


def test_shares_that_were_not_real_and_wrong_predictions_are_mentioned_and_break_nothing(tmp_path: Path) -> None:
    run = healthy_run(tmp_path)
    seen = {"expected": 1.0, "observed": 1.9, "unit": "cores", "reason": "compute not held: 1.90 cores"}
    run.log("check", generation=2, trial_id="a", what="compute", verdict="not held", **seen)
    run.log("check", generation=1, trial_id="a", what="compute", verdict="held", **seen)
    run.log("gain", generation=2, trial_id="a", dial="share", predicted=1.0, realised=0.0)
    answer = verify(run.write())
    assert answer["violations"] == []
    assert answer["notes"] == [
        "share of a under plan 2 not real: compute not held: 1.90 cores",
        "1 of 3 changes with a prediction brought more than 30 % more or less goodput than predicted",
    ]


@pytest.mark.parametrize(
    ("step", "num_samples", "found"), [(24, 192, []), (25, 200, ["evidence_missing"]), (24, 200, ["samples_lost"])]
)
def test_records_of_several_steps_are_counted_as_those_steps(
    tmp_path: Path, step: int, num_samples: int, found: list[str]
) -> None:
    several = records(2, step=4, seq=4, cursor=32)
    several["num_samples"], several["flags"] = 80, 64
    several["step"], several["cursor"] = (4, 14), (32, 112)
    run = steps(tmp_path, [records(4), several])
    run.log("trial_ended", trial_id="a", state="done", reason="", step=step, num_samples=num_samples)
    assert codes(run) == found
