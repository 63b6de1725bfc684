from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.errors import ConfigError, JournalError
from orchestrator.policies.codec import to_jsonable
from orchestrator.policies.learn.fit import NOTHING_FITTED, Observation, update
from orchestrator.policies.snapshot import StepModeView
from orchestrator.view.explain import explain, render
from tests.run_directory import CHEAPER, ONE_RANK, RunDirectory, healthy_run

KEYS = ("generation", "reason", "chosen", "alternatives", "binding", "predicted_gain", "realised_gain", "applied")


def test_a_decision_has_the_promised_keys(tmp_path: Path) -> None:
    answer = explain(healthy_run(tmp_path).write(), 2)
    assert tuple(answer)[: len(KEYS)] == KEYS
    assert (answer["generation"], answer["reason"], answer["binding"]) == (2, "turn 2", "memory")
    assert (answer["predicted_gain"], answer["realised_gain"]) == (0.25, 0.2)
    assert answer["applied"] == [{"trial": "a", "step": 5, "ack_s": 0.2}, {"trial": "b", "step": 5, "ack_s": 0.2}]
    assert answer["alternatives"][0] == {"allocation": to_jsonable(ONE_RANK), "goodput": 80.0}
    json.dumps(answer, allow_nan=False)


def test_what_was_chosen_names_the_settings_before_and_after(tmp_path: Path) -> None:
    chosen = explain(healthy_run(tmp_path).write(), 2)["chosen"][0]
    assert chosen["before"] == to_jsonable(ONE_RANK)
    assert chosen["after"] == to_jsonable(CHEAPER)
    assert chosen["dials"] == ["share", "batch", "precision"]
    assert (chosen["effect"], chosen["reason"]) == ("step", "share 0.25 and tier bf16")


def test_a_trial_that_is_new_to_the_plan_has_nothing_before(tmp_path: Path) -> None:
    answer = explain(healthy_run(tmp_path).write(), 1)
    assert [item["before"] for item in answer["chosen"]] == [None, None]
    assert answer["realised_gain"] is None


def test_of_several_trials_the_largest_predicted_gain_speaks_for_all(tmp_path: Path) -> None:
    run = healthy_run(tmp_path)
    plan = next(entry for entry in run.entries if entry["kind"] == "plan" and entry["generation"] == 2)["plan"]
    plan["allocations"][1] |= {"predicted_gain": 0.9, "binding": "device"}
    plan["allocations"][0] |= {"predicted_gain": None}
    answer = explain(run.write(), 2)
    assert (answer["predicted_gain"], answer["binding"]) == (0.9, "device")
    assert [item["trial"] for item in answer["trials"]] == ["b", "a"]
    assert all(set(item) >= set(KEYS) - {"generation"} for item in answer["trials"])


def test_an_override_counts_as_what_was_in_force_before(tmp_path: Path) -> None:
    run = healthy_run(tmp_path)
    entry = next(entry for entry in run.entries if entry["kind"] == "plan" and entry["generation"] == 2)
    forced = replace(ONE_RANK, micro_batch=2)
    override = {"number": 1, "generation": 1, "settings": to_jsonable(forced), "reason": "out of memory"}
    entry["snapshot"]["trials"][0]["override"] = override
    entry["plan"]["allocations"][0]["settings"] = to_jsonable(ONE_RANK)  # as in plan 1: only the override is undone
    chosen = {item["trial"]: item for item in explain(run.write(), 2)["chosen"]}
    assert chosen["a"]["before"] == to_jsonable(forced)
    assert chosen["a"]["dials"] == ["batch"]


def test_without_a_decision_all_are_listed(tmp_path: Path) -> None:
    run = healthy_run(tmp_path)
    run.log("override", trial_id="a", generation=2, number=1, settings=to_jsonable(CHEAPER), reason="not finite")
    run.log("refusal", generation=2, reason="the plan breaks invariants", violations=["too much"])
    answer = explain(run.write(), None)
    assert [item["generation"] for item in answer["decisions"]] == [1, 2]
    assert answer["decisions"][1] | {"after_s": 0} == {
        "generation": 2,
        "after_s": 0,
        "reason": "turn 2",
        "num_changed": 2,
        "num_applied": 2,
        "predicted_gain": 0.25,
        "realised_gain": 0.2,
    }
    text = render(answer)
    assert "by a: not finite" in text
    assert "too much" in text
    json.dumps(answer, allow_nan=False)


def test_the_text_shows_what_was_chosen_against_what_else_was_weighed(tmp_path: Path) -> None:
    lines = render(explain(healthy_run(tmp_path).write(), 2)).splitlines()
    assert lines[:8] == [
        "decision 2: turn 2",
        "",
        "a: share 0.25 and tier bf16",
        "          settings                   goodput/s",
        "  CHOSEN  share 0.25 batch 4x2 bf16      100.0",
        "  before  share 0.50 batch 8x1 fp32      80.00",
        "  bound by memory; applied at step 5, 0.20 s after the decision (step effect)",
        "  gain predicted +25 %, realised +20 %",
    ]


@pytest.mark.parametrize("decision", [0, 3, 99])
def test_an_unknown_decision_is_a_users_mistake_and_the_range_is_told(tmp_path: Path, decision: int) -> None:
    with pytest.raises(ConfigError, match=f"decision {decision} is not in .*; allowed: 1 to 2"):
        explain(healthy_run(tmp_path).write(), decision)


def test_a_run_that_decided_nothing_says_so(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.begin("a")
    run.write()
    with pytest.raises(ConfigError, match="has taken no decision"):
        explain(tmp_path, 1)
    assert render(explain(tmp_path, None)) == "no decision has been taken yet"


def test_a_decision_that_cannot_be_read_is_named_and_does_not_hide_the_others(tmp_path: Path) -> None:
    run = healthy_run(tmp_path)
    entry = next(entry for entry in run.entries if entry["kind"] == "plan")
    del entry["snapshot"]["seed"]
    run.write()
    with pytest.raises(JournalError, match="decision 1 cannot be read"):
        explain(tmp_path, 1)
    assert "error" in explain(tmp_path, None)["decisions"][0]
    assert "turn 2" in render(explain(tmp_path, None))


def test_hostile_texts_are_shown_harmless(tmp_path: Path) -> None:
    run = healthy_run(tmp_path)
    for entry in run.entries:
        if entry["kind"] == "plan":
            entry["plan"]["reason"] = "\x1b[2J\nx"
            for allocation in entry["plan"]["allocations"]:
                allocation |= {"reason": "\x1b[31m\u202e", "binding": "\x07"}
    run.write()
    for decision in (None, 2):
        assert all(line.isprintable() for line in render(explain(tmp_path, decision)).split("\n"))


def test_throughput_efficiency_and_goodput_are_told_before_and_after_predicted_and_measured(tmp_path: Path) -> None:
    run = healthy_run(tmp_path)
    entry = next(entry for entry in run.entries if entry["kind"] == "plan" and entry["generation"] == 2)
    seen = [
        Observation(
            cores=1.0,
            tier=dials.tier,
            micro_batch=dials.micro_batch,
            grad_accum=dials.grad_accum,
            num_workers=dials.num_workers,
            num_steps=20,
            step_s=step_s,
        )
        for dials, step_s in ((ONE_RANK, 0.08), (CHEAPER, 0.02))
    ]
    fit = update(NOTHING_FITTED, [one for one in seen for _ in range(3)])
    entry["snapshot"]["trials"][0]["fit"] = to_jsonable(fit)
    gain = next(entry for entry in run.entries if entry["kind"] == "gain" and entry["trial_id"] == "a")
    gain |= {side: {"throughput": 50.0, "efficiency": 0.5, "goodput": 25.0} for side in ("before", "after")}
    answer = explain(run.write(), 2)
    told = next(item for item in answer["trials"] if item["trial"] == "a")
    assert list(told["predicted"]) == list(told["measured"]) == ["before", "after"]
    for pace in (*told["predicted"].values(), *told["measured"].values()):
        assert pace["goodput"] == pytest.approx(pace["throughput"] * pace["efficiency"])
    assert told["predicted"]["after"]["throughput"] > told["predicted"]["before"]["throughput"]
    text = render(answer)
    assert all(f"{kind} {side}" in text for kind in ("predicted", "measured") for side in ("before", "after"))


def test_what_was_seen_of_a_share_is_told_with_its_decision_and_deviations_with_all(tmp_path: Path) -> None:
    run = healthy_run(tmp_path)
    head = {"generation": 2, "trial_id": "a", "what": "compute", "expected": 1.0, "unit": "cores"}
    run.log(
        "check", **head, observed=1.9, verdict="not held", reason="compute not held: 1.90 cores, granted 1.00 cores"
    )
    directory = run.write()
    one = explain(directory, 2)
    seen = next(item["checks"] for item in one["trials"] if item["trial"] == "a")
    assert seen[0] == "compute not held: 1.90 cores, granted 1.00 cores"
    assert seen[1].startswith("speed held: 1.20 times, predicted 1.25 times")
    assert "  compute not held: 1.90 cores, granted 1.00 cores" in render(one).splitlines()
    text = render(explain(directory, None))
    assert "a under plan 2: compute not held: 1.90 cores, granted 1.00 cores" in text


def test_the_step_mode_that_a_decision_knew_is_named_with_its_times(tmp_path: Path) -> None:
    run = healthy_run(tmp_path)
    entry = next(entry for entry in run.entries if entry["kind"] == "plan" and entry["generation"] == 2)
    mode = StepModeView(
        tier=CHEAPER.tier,
        micro_batch=CHEAPER.micro_batch,
        grad_accum=CHEAPER.grad_accum,
        is_replayed=True,
        eager_s=0.0054,
        replayed_s=0.0015,
    )
    entry["snapshot"]["trials"][0]["step_modes"] = [to_jsonable(mode)]
    other = replace(mode, micro_batch=1)
    entry["snapshot"]["trials"][1]["step_modes"] = [to_jsonable(other)]
    directory = run.write()
    told = {item["trial"]: item["step_mode"] for item in explain(directory, 2)["trials"]}
    assert told == {
        "a": "graph: eager 5.40 ms, graph 1.50 ms per step",
        "b": "not measured yet with these dials",
    }
    assert "  step mode graph: eager 5.40 ms, graph 1.50 ms per step" in render(explain(directory, 2)).splitlines()
    assert {item["step_mode"] for item in explain(directory, 1)["trials"]} == {None}
