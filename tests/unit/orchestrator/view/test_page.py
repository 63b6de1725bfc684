"""`orchestrator report`: what is gathered of a run, and the page that is made of it."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from orchestrator import cli
from orchestrator.control.journal import read_history
from orchestrator.errors import ConfigError
from orchestrator.policies.codec import to_jsonable
from orchestrator.view.page import build
from orchestrator.view.page.gather import gather
from orchestrator.view.page.importance import importance_of
from orchestrator.view.page.values import RunPage, TrialPage
from tests.run_directory import CHEAPER, DEVICE, ONE_RANK, healthy_run, records
from tests.unit.orchestrator.view.page_runs import METRIC, search_run

JOURNALS = Path(__file__).parents[1] / "control" / "journals"
ECHARTS = Path(build.__file__).parent / "assets" / "echarts"
HOSTILE = '</script><img src=x onerror="document.title=1">&lt;\u2028{b}'


class Elements(HTMLParser):
    """The elements of a page, and the text of each script."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.found and self.found[-1][0] == "script":
            self.scripts[-1] += data


def trial(page: RunPage, trial_id: str) -> TrialPage:
    return next(each for each in page.trials if each.trial_id == trial_id)


@pytest.fixture(name="page", scope="module")
def search_page(tmp_path_factory: pytest.TempPathFactory) -> RunPage:
    return gather(search_run(tmp_path_factory.mktemp("runs") / "search", 12, num_steps=1200))


def test_trials_have_their_best_value_state_and_parameters(page: RunPage) -> None:
    first = trial(page, "trial-00000")
    assert (page.metric, page.mode, page.state, len(page.trials)) == (METRIC, "min", "done", 12)
    assert first.state == "done"
    assert first.best == min(value for value in first.curves[METRIC].values if value is not None)
    assert page.searched == ("kind", "lr", "width")
    assert page.fixed == ("depth",)


def test_a_value_that_was_fixed_but_differs_counts_as_searched(tmp_path: Path) -> None:
    run = healthy_run(tmp_path / "run")
    run.entries[0]["spec"]["params"] = {"width": 32, "lr": 0.1}
    next(e for e in run.entries if e["kind"] == "trial_queued" and e["trial_id"] == "b")["params"]["lr"] = 0.2
    page = gather(run.write())
    assert (page.searched, page.fixed) == (("lr",), ("width",))


def test_trials_that_ended_early_say_why_and_show_the_end_of_their_log(page: RunPage) -> None:
    stopped, failed = trial(page, "trial-00006"), trial(page, "trial-00010")
    assert stopped.why == "worse than 3 of 4 at report 3"
    assert stopped.log[-1] == "worse than 3 of 4 at report 3"
    assert failed.why == "ValueError: width must divide heads"
    assert trial(page, "trial-00000").log == ()


def test_a_failed_trial_shows_its_traceback(tmp_path: Path) -> None:
    run_dir = search_run(tmp_path / "run", 11)
    log = run_dir / "trials" / "trial-00010" / "log.txt"
    log.write_text("before\n" + "Traceback (most recent call last):\n  File x\nValueError: \x1b[31mno\n")
    assert trial(gather(run_dir), "trial-00010").log == (
        "Traceback (most recent call last):",
        "  File x",
        "ValueError: \\x1b[31mno",
    )


def test_a_trial_that_the_search_stopped_without_a_word_is_placed_beside_the_others(tmp_path: Path) -> None:
    run_dir = search_run(tmp_path / "run", 8)
    journal = run_dir / "journal.jsonl"
    journal.write_text(journal.read_text().replace("worse than 3 of 4 at report 3", ""))
    assert re.fullmatch(
        rf"stopped by the search: place \d of 8 at report 3, {METRIC} [0-9.]+",
        trial(gather(run_dir), "trial-00006").why,
    )


def test_each_change_has_its_reason_and_both_gains(page: RunPage) -> None:
    changes = trial(page, "trial-00001").changes
    assert [change.what for change in changes] == [
        "starts with share 0.125, batch 8 x 1, precision fp32",
        "share 0.125 to 0.25",
        "batch 8 x 1 to 16 x 2",
        "precision fp32 to bf16",
        "done",
    ]
    turned = changes[2]
    assert (turned.dials, turned.reason) == (("batch",), "share 0.25, batch 32, fp32: goodput +20 %")
    assert turned.predicted is not None
    assert turned.realised is not None
    assert changes[0].predicted is None


def test_dials_execution_and_place_cover_the_stay(page: RunPage) -> None:
    one = trial(page, "trial-00001")
    (stay,) = one.stays
    assert (stay.slot, stay.devices) == ("slot-1", (DEVICE.device_id,))
    assert [held.share for held in one.dials] == [0.125, 0.25, 0.25, 0.25]
    assert [held.tier for held in one.dials] == ["fp32", "fp32", "fp32", "bf16"]
    assert one.dials[-1].end_s == stay.end_s
    assert [span.word for span in one.execution] == ["eager", "graph", "eager", "graph"]
    assert max(value for value in one.memory.values if value is not None) == (1 << 30) + 3 * (1 << 28)


def test_device_seconds_are_share_times_seconds(page: RunPage) -> None:
    one = trial(page, "trial-00001")
    expected = sum((held.end_s - held.start_s) * held.share for held in one.dials)
    assert one.device_s == pytest.approx(expected, rel=1e-3)
    assert page.device_s == pytest.approx(sum(each.device_s for each in page.trials), rel=1e-3)
    granted = page.devices[0].granted
    width = page.elapsed_s / len(granted)
    assert sum(value or 0.0 for value in granted) * width == pytest.approx(page.device_s, rel=1e-2)


def test_curves_are_thinned_and_advance_on_every_axis(page: RunPage) -> None:
    curve = trial(page, "trial-00002").curves[""]
    assert len(curve.values) == 400
    assert (curve.samples[0], curve.samples[-1]) == (16, 1200 * 16)
    for column in (curve.samples, curve.seconds, curve.device_s):
        known = [value for value in column if value is not None]
        assert known == sorted(known)
        assert len(known) == 400


def test_steps_that_were_undone_leave_the_curve(tmp_path: Path) -> None:
    run = healthy_run(tmp_path / "run")
    run.assign("a", attempt=1)
    again = records(2, cursor=8, start_s=1.0)
    again["loss"] = 1.0
    run.record("a", again, attempt=1)
    curve = trial(gather(run.write()), "a").curves[""]
    assert curve.samples == (8, 16, 24)
    assert curve.values == (2, 1, 1)


def test_gains_are_those_of_the_journal(page: RunPage) -> None:
    assert len(page.gains) == 3 * 12
    assert {gain.dial for gain in page.gains} == {"share", "batch", "precision"}
    assert [(dial.name, dial.is_enabled, dial.num_changes) for dial in page.dials] == [
        (name, True, 12) for name in ("share", "batch", "precision")
    ]


def test_best_so_far_only_gets_better(page: RunPage) -> None:
    values = [value for value in page.best_so_far.values if value is not None]
    assert values == sorted(values, reverse=True)
    assert values[-1] == min(each.best for each in page.trials if each.best is not None)
    assert page.best_so_far.device_s[-1] == pytest.approx(page.device_s, rel=1e-3)


def test_importance_names_the_parameter_that_matters(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    pytest.importorskip("sklearn")
    found = gather(search_run(tmp_path / "run", 40, num_steps=12)).importance
    assert found.shares[0][0] == "lr"
    assert found.shares[0][1] > 0.5
    assert sum(share for _, share in found.shares) == pytest.approx(1.0)
    assert "40 trials" in found.note


def test_importance_says_why_there_is_none(tmp_path: Path) -> None:
    assert gather(healthy_run(tmp_path).write()).importance.note == (
        "needs 10 trials with a value of the metric; there are 0"
    )


@pytest.mark.parametrize("missing", ["optuna", "sklearn"])
def test_importance_names_the_package_that_is_missing(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    params = [{"lr": 0.1 * number, "width": number % 3} for number in range(12)]
    found = importance_of(params, [float(number) for number in range(12)])
    assert found.shares == ()
    assert found.note == f"needs optuna and scikit-learn; {missing} is not installed"


def test_overrides_pauses_and_restarts_are_changes(tmp_path: Path) -> None:
    run = healthy_run(tmp_path / "run")
    run.entries = [entry for entry in run.entries if entry["kind"] not in {"trial_ended", "run_ended"}]
    named = {"trial_id": "a", "reason": "out of memory"}
    run.log("override", **named, generation=2, number=1, settings=to_jsonable(ONE_RANK), step=7)
    run.log("trial_paused", **named | {"reason": "made room for b"}, attempt=1, checkpoint=None, step=9, num_samples=72)
    page = trial(gather(run.write()), "a")
    assert (page.state, page.why) == ("paused", "made room for b")
    assert [change.kind for change in page.changes] == ["dials", "dials", "override", "paused"]
    assert page.changes[2].what.startswith(f"share {CHEAPER.share:g}")
    assert page.stays[0].end_s == page.changes[3].t_s


def test_a_run_that_goes_on_is_shown_as_far_as_it_is(tmp_path: Path) -> None:
    run = healthy_run(tmp_path / "run")
    ends = {"trial_ended", "run_ended"}
    run.entries = [entry for entry in run.entries if entry["kind"] not in ends]
    run_dir = run.write(tail=b'{"kind":"ack"')
    told = {"state": "running", "updated_at": 1e9 + 100, "trials": []}
    (run_dir / "status.json").write_text(json.dumps(told))
    page = gather(run_dir)
    assert (page.state, page.elapsed_s) == ("running", 99)
    assert trial(page, "a").stays[0].end_s is None
    assert trial(page, "a").dials[-1].end_s == 99
    assert any("torn" in note for note in page.notes)


def test_a_run_that_has_only_begun_is_an_empty_page(tmp_path: Path) -> None:
    (tmp_path / "journal.jsonl").touch()
    (tmp_path / "status.json").write_text(json.dumps({"state": "running", "updated_at": 1.7e9, "trials": []}))
    page = gather(tmp_path)
    assert (page.elapsed_s, page.trials, page.devices) == (0, (), ())
    assert "needs 10 trials" in page.importance.note


@pytest.mark.parametrize("name", ["kept", "resize", "search"])
def test_every_kept_journal_becomes_a_page(name: str, tmp_path: Path) -> None:
    shutil.copy(JOURNALS / f"{name}.jsonl", tmp_path / "journal.jsonl")
    page = gather(tmp_path)
    queued = {entry.trial_id for entry in read_history(tmp_path).entries if entry.kind == "trial_queued"}  # type: ignore[attr-defined]
    assert {each.trial_id for each in page.trials} == queued
    assert all(change.what for each in page.trials for change in each.changes)
    assert Elements(build.render([tmp_path], 0.0)).scripts


def hostile_run(path: Path) -> Path:
    """A run whose names, parameters, metrics, reasons and logs are all made to break a page."""
    run_dir = search_run(path, 11, num_steps=24, params={HOSTILE: HOSTILE, "nan": "NaN", "__proto__": "x"})
    journal = run_dir / "journal.jsonl"
    word = json.dumps(HOSTILE)[1:-1]
    text = journal.read_text().replace("accuracy", word).replace("width must divide heads", word)
    text = text.replace('"kind":"deep"', '"constructor":1,"kind":"deep"', 1)  # a parameter that one trial has
    text = text.replace('"broken":null', '"toString":0.5', 1)  # and a metric
    journal.write_text(text.replace("goodput +20 %", word))
    (run_dir / "trials" / "trial-00006" / "log.txt").write_text(f"{HOSTILE}\n]]>\n<!--\n")
    return run_dir


def test_hostile_names_stay_data(tmp_path: Path) -> None:
    text = build.render([hostile_run(tmp_path / "run")], 0.0)
    elements = Elements(text)
    assert [tag for tag, _ in elements.found if tag in {"img", "iframe", "link"}] == []
    assert [attrs for tag, attrs in elements.found if tag == "script"] == [
        {"id": "data", "type": "application/json"},
        {},
        {},
    ]
    assert "<" not in elements.scripts[0]
    data: Any = json.loads(elements.scripts[0])
    assert data["runs"][0]["trials"][0]["params"][HOSTILE] == HOSTILE
    assert HOSTILE in data["runs"][0]["trials"][0]["curves"]


def test_the_page_asks_for_nothing(tmp_path: Path) -> None:
    elements = Elements(build.render([healthy_run(tmp_path).write()], 0.0))
    assert not [attrs for _, attrs in elements.found if {"src", "href", "srcset", "action"} & set(attrs)]
    policy = next(attrs["content"] or "" for tag, attrs in elements.found if attrs.get("http-equiv"))
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "http" not in policy
    own = "".join(path.read_text() for path in ECHARTS.parent.glob("page.*")) + elements.scripts[2]
    assert not re.findall(r"https?://|@import|url\(|innerHTML|insertAdjacentHTML|outerHTML|eval\(|fetch\(", own)


def test_the_chart_library_is_the_one_its_note_names() -> None:
    note = (ECHARTS / "README.md").read_text()
    assert hashlib.sha256((ECHARTS / "echarts.min.js").read_bytes()).hexdigest() in note
    assert (ECHARTS / "NOTICE").read_text().startswith("Apache ECharts")
    assert "Apache License" in (ECHARTS / "LICENSE").read_text()


def test_several_runs_are_compared_in_the_order_given(tmp_path: Path) -> None:
    runs = [search_run(tmp_path / name, 2, num_steps=12) for name in ("one", "two")]
    data: Any = json.loads(Elements(build.render(runs[::-1], 0.0)).scripts[0])
    assert [run["name"] for run in data["runs"]] == ["two", "one"]


def test_a_page_of_fifty_trials_has_at_most_two_megabytes(tmp_path: Path) -> None:
    text = build.render([search_run(tmp_path / "run", 50, num_steps=800)], 0.0)
    assert len(text.encode()) <= 2_000_000


def test_the_command_writes_a_page_and_replaces_only_pages(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = healthy_run(tmp_path / "run").complete()
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert cli.main(["report", str(run_dir)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "run.html"
    assert Path("run.html").read_text().startswith(build.MARK)
    Path("notes.html").write_text("mine")
    assert cli.main(["report", str(run_dir), "--output", "notes.html"]) == 2
    assert "exists and is no report" in capsys.readouterr().err
    assert Path("notes.html").read_text() == "mine"
    assert cli.main(["report", str(run_dir), str(run_dir), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["output"], len(told["runs"])) == ("report.html", 2)


@pytest.mark.parametrize("output", ["", "missing/run.html"])
def test_a_place_that_cannot_be_written_is_named(output: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="directory"):
        build.check_output(tmp_path / output)


def test_a_run_that_is_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", "nothing", "--storage", str(tmp_path)]) == 2
    assert "nothing" in capsys.readouterr().err
