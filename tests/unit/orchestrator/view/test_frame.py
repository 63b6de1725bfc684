from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.view.frame import WIDE, Role, build_frame, plain_line
from orchestrator.view.text import width_of
from tests.run_directory import status

RUN_DIR = Path("runs/demo")
HOSTILE = [
    "\x1b[2J\x1b[31mred",
    "\x1b]0;title\x07",
    "\x9b31m",
    "a\nb\rc\td",
    "[bold red]markup[/bold red]",
    "\u202egnp.exe",
    "\u200b\ufeff",
    "\x00\x08\x7f",
    "\ud800",
    "x" * 5000,
]

NARROW_80 = """\
demo  running 1:23  policy goodput  plan 12  val_loss (min)
2 trials: 1 running, 1 failed
trial         state     step     loss  samples/s  share     batch  tier     left
trial-0001    running   1234    2.346      812.4   0.50      16x2  bf16     1:14
  lr=0.01 width=64; 1.00 cores by cpu_cores; plan 12: share 0.25 -> 0.50: pre...
trial-0002    failed    1234  lr=0.1 width=63
node0/cpu [#####.....] granted 50 % of 2 cores, used 47 %, memory 3.0/16.0 GiB
dials: share 5 changes, gain +31 %; batch 2 changes; precision off
trial-0002 failed: ValueError: width must divide heads; log:
runs/demo/trials/trial-0002/log.txt"""

WIDE_200 = [
    "trial                 state     step     loss  samples/s  share     batch  tier     left"
    "  parameters; metric; share enforced by; last decision",
    "trial-0001            running   1234    2.346      812.4   0.50      16x2  bf16     1:14"
    "  lr=0.01 width=64; val_loss 2.500; 1.00 cores by cpu_cores; plan 12: share 0.25 -> 0.50: predicted goodput +...",
    "trial-0002            failed    1234  lr=0.1 width=63",
]


def frame_text(content: dict[str, Any], width: int = 80, max_rows: int = 50, now_s: float = 1083.0) -> str:
    return build_frame(content, width=width, max_rows=max_rows, now_s=now_s).text


def test_a_narrow_frame_shows_parameters_and_dials_in_80_columns() -> None:
    assert frame_text(status(RUN_DIR)) == NARROW_80


def test_a_wide_frame_shows_the_decision_beside_its_trial() -> None:
    assert frame_text(status(RUN_DIR), width=200).splitlines()[2:5] == WIDE_200


@pytest.mark.parametrize("width", [40, 60, 79, 80, 100, WIDE - 1, WIDE, 200])
def test_no_line_is_wider_than_the_terminal(width: int) -> None:
    content = status(RUN_DIR)
    content["trials"][0] |= {
        "trial_id": "x" * 200,
        "step": 10**12,
        "loss": -1.5e-300,
        "time_left_s": 1e9,
        "num_workers": 8,
    }
    for line in build_frame(content, width=width, max_rows=9, now_s=1083.0).lines:
        assert width_of(line.text) <= width


def test_an_ended_trial_is_shown_with_its_metric() -> None:
    content = status(RUN_DIR)
    content["trials"][0]["state"] = "stopped"
    assert "trial-0001    stopped   1234  val_loss 2.500  lr=0.01 width=64" in frame_text(content).splitlines()


def test_a_running_trial_shows_the_metric_of_its_last_report_where_there_is_room() -> None:
    content = status(RUN_DIR)
    assert "\n  lr=0.01 width=64; val_loss 2.500; 1.00 cores by cpu_cores; plan 12" in frame_text(content, width=100)
    assert " loss 2.346 val_loss 2.500 812 samples/s" in plain_line(content, 1083.0)
    content["trials"][0]["metric_value"] = None
    assert "\n  lr=0.01 width=64; 1.00 cores by cpu_cores; plan 12" in frame_text(content, width=100)


def test_running_trials_come_first_and_the_rest_is_counted() -> None:
    content = status(RUN_DIR)
    running = content["trials"][0]
    states = ["done", "queued", "running", "stopped", "running"]
    content["trials"] = [
        {**running, "trial_id": f"t{index}", "index": index, "state": state} for index, state in enumerate(states)
    ]
    lines = frame_text(content, max_rows=3).splitlines()
    assert [line.split()[0] for line in lines[3:8:2]] == ["t2", "t4", "t1"]
    assert "... and 2 more: 2 trials: 1 done, 1 stopped" in lines


def test_a_failed_trial_is_shown_with_its_log_however_many_trials_there_are() -> None:
    content = status(RUN_DIR)
    assert "runs/demo/trials/trial-0002/log.txt" in frame_text(content, max_rows=1)


def test_ranks_are_part_of_the_batch() -> None:
    content = status(RUN_DIR)
    content["trials"][0]["num_workers"] = 2
    assert " 16x2*2 " in frame_text(content)


def test_what_keeps_decisions_from_being_taken_is_said() -> None:
    shown = frame_text(status(RUN_DIR, trouble="cannot write the journal: No space left on device"), width=100)
    assert "nothing is decided: cannot write the journal: No space left on device" in shown


def test_an_old_status_of_a_running_run_is_called_old() -> None:
    found = frame_text(status(RUN_DIR), now_s=1183.0, width=200)
    assert "no news for 1:40: the policy actor is silent; training goes on" in found
    assert "resume" not in found, "which would be refused while the driver lives"
    assert "`orchestrator resume` goes on" in frame_text(status(RUN_DIR, state="lost"), now_s=1183.0, width=200)
    assert "no news" not in frame_text(status(RUN_DIR, state="done"), now_s=1183.0)
    assert "no news" not in frame_text(status(RUN_DIR), now_s=1090.0)


def test_the_clock_of_an_ended_run_stands_still() -> None:
    assert "done 1:23" in frame_text(status(RUN_DIR, state="done"), now_s=99999.0)


def test_failures_are_marked_as_such() -> None:
    frame = build_frame(status(RUN_DIR), width=80, max_rows=9, now_s=1083.0)
    assert {line.role for line in frame.lines if "trial-0002" in line.text} == {Role.FAILED}


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_texts_cannot_steer_the_terminal(text: str) -> None:
    content = status(RUN_DIR, run_id=text, policy=text, metric=text, state=text)
    for trial in content["trials"]:
        trial |= {"trial_id": text, "error": text, "tier": text, "enforced_by": text, "log_path": text}
        trial["decision"] = {"generation": 1, "reason": text}
    content["devices"][0]["device_id"] = text
    for shown in (*frame_text(content).split("\n"), plain_line(content, 1083.0)):
        assert shown.isprintable()


def test_the_plain_line_has_the_same_facts() -> None:
    assert plain_line(status(RUN_DIR), 1083.0) == (
        "1:23 running plan 12: 2 trials: 1 running, 1 failed"
        " | trial-0001 step 1234 loss 2.346 val_loss 2.500 812 samples/s share 0.5 (cpu_cores)"
        " batch 16x2 bf16 left 1:14"
        " plan 12: share 0.25 -> 0.50: predicted goodput +31 %"
        " | node0/cpu granted 50 % used 47 %"
        " | dials share 5 changes, gain +31 %, batch 2 changes, precision off"
    )


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_a_status_of_any_content_can_be_shown(data: st.DataObject) -> None:
    content = status(RUN_DIR)
    targets = [content, content["trials"][0], content["devices"][0], content["dials"]["share"]]
    target = data.draw(st.sampled_from(targets))
    target[data.draw(st.sampled_from(sorted(target)))] = data.draw(JSON)
    assert all(line.isprintable() for line in frame_text(content).split("\n"))
    assert plain_line(content, 1083.0).isprintable()


@pytest.mark.parametrize(
    ("verdict", "shown"), [("held", " by cpu_cores (held)"), ("not held", " by cpu_cores (compute: 1.90 cores)")]
)
def test_what_was_seen_of_a_share_stands_beside_what_enforces_it(verdict: str, shown: str) -> None:
    content = status(Path("/runs/demo"))
    content["trials"][0]["checks"] = [{"what": "compute", "verdict": verdict, "reason": "compute: 1.90 cores"}]
    assert shown in frame_text(content, width=200)
    assert "(held)" not in frame_text(status(Path("/runs/demo")), width=200), "nothing was seen"


@pytest.mark.parametrize("state", ["running", "done"])
@pytest.mark.parametrize("width", [80, 100, 200])
def test_of_thirty_parameters_the_searched_ones_and_the_last_are_shown(state: str, width: int) -> None:
    content = status(RUN_DIR, metric="eval/loss")
    params = {"learning_rate": 0.0012345, "width": 64, **{f"fixed_{n}": "word" * 3 for n in range(28)}}
    content["trials"][0] |= {"state": state, "params": params, "metric_value": 0.25}
    lines = frame_text(content, width=width).splitlines()
    assert all(width_of(line) <= width for line in lines)
    (line,) = [line for line in lines if "learning_rate=0.001234" in line]
    assert " ..." in line
    if width == 200 and state == "done":
        assert "width=64" in line
        assert line.endswith("fixed_27=wordwordword"), "the last one"
    if state == "done":
        assert "eval/loss 0.250  learning_rate=0.001234" in line
