"""The page of `orchestrator report` in a browser without a network: it draws, filters, and fits a phone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.view.page import build
from tests.integration.chromium import PHONE, SCREEN, Chromium, find_chromium
from tests.unit.orchestrator.view.page_runs import search_run
from tests.unit.orchestrator.view.test_page import HOSTILE, hostile_run

PROGRAM = find_chromium()
pytestmark = pytest.mark.skipif(
    PROGRAM is None, reason="no chromium on this machine (on Debian and Ubuntu: apt install chromium)"
)
ROWS = "document.querySelectorAll('#ranking tr.trial').length"
CURVES = "echarts.getInstanceByDom(document.getElementById('curves')).getOption().series.length"
PARALLEL = "echarts.getInstanceByDom(document.getElementById('parallel')).getOption().series[0].data.length"
COUNT = "document.getElementById('count').textContent"
OVERFLOW = "document.documentElement.scrollWidth - innerWidth"
DRAWN = """(() => [...document.querySelectorAll('.chart')].filter((box) => box.clientHeight).map((box) => {
  const canvas = box.querySelector('canvas');
  return canvas !== null && canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data.some((v) => v);
}))()"""


@pytest.fixture(name="browser")
def open_browser(tmp_path: Path) -> Iterator[Chromium]:
    assert PROGRAM is not None
    with Chromium(PROGRAM, tmp_path / "profile") as browser:
        yield browser
        assert browser.errors == []
        assert all(url.startswith(("file:", "data:", "blob:")) for url in browser.requests)


@pytest.fixture(name="page", scope="module")
def write_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of two runs, of 14 trials and of two."""
    folder = tmp_path_factory.mktemp("pages")
    runs = [search_run(folder / "first", 14, num_steps=80), search_run(folder / "second", 2, num_steps=80)]
    build.write(build.render(runs, 1.7e9), folder / "page.html")
    return folder / "page.html"


def choose(browser: Chromium, field: str, value: str, event: str = "change") -> None:
    """Put a value into a field as a person does."""
    browser.ask(f"""(() => {{
      const field = document.getElementById({field!r});
      field.value = {json.dumps(value)};
      field.dispatchEvent(new Event({event!r}));
    }})()""")


@pytest.mark.parametrize("is_dark", [False, True])
def test_every_chart_is_drawn_in_light_and_dark(browser: Chromium, page: Path, is_dark: bool) -> None:
    browser.open(page, is_dark=is_dark)
    drawn = browser.ask(DRAWN)
    assert len(drawn) >= 6
    assert all(drawn)
    assert browser.ask("document.documentElement.dataset.theme") == ("dark" if is_dark else "light")
    browser.ask("document.getElementById('theme').click()")
    assert browser.ask("document.documentElement.dataset.theme") == ("light" if is_dark else "dark")


def test_filters_act_on_the_table_and_all_charts(browser: Chromium, page: Path) -> None:
    browser.open(page)
    assert [browser.ask(each) for each in (ROWS, CURVES, PARALLEL, COUNT)] == [14, 14, 14, "14 of 14 trials"]
    browser.ask("document.querySelector('#states button[data-state=stopped]').click()")
    assert [browser.ask(each) for each in (ROWS, CURVES, PARALLEL, COUNT)] == [12, 12, 12, "12 of 14 trials"]
    choose(browser, "most", "5")
    assert [browser.ask(each) for each in (ROWS, CURVES, PARALLEL)] == [5, 5, 5]
    choose(browser, "find", "trial-00003", "input")
    assert [browser.ask(each) for each in (ROWS, CURVES, PARALLEL)] == [1, 1, 1]
    assert browser.ask("document.getElementById('trial').value") == "trial-00003"
    measured = "document.querySelector('#dials tbody tr td:nth-child(3)').textContent"
    assert browser.ask(measured) == "1"


def test_a_row_opens_why_a_trial_failed_and_selects_its_timeline(browser: Chromium, page: Path) -> None:
    browser.open(page)
    row = "[...document.querySelectorAll('#ranking tr.trial')].find((row) => row.textContent.includes('trial-00010'))"
    browser.ask(f"{row}.querySelector('button').click()")
    detail = browser.ask("document.querySelector('#ranking .detail').textContent")
    assert "failed: ValueError: width must divide heads" in detail
    assert "begins with" in browser.ask("document.querySelector('#ranking pre').textContent")
    assert browser.ask("document.getElementById('trial').value") == "trial-00010"
    assert "batch 8 x 1 to 16 x 2" in browser.ask("document.getElementById('changes').textContent")


def test_a_change_shows_its_reason_and_gains_where_the_pointer_is(browser: Chromium, page: Path) -> None:
    browser.open(page)
    browser.ask("document.getElementById('timeline').scrollIntoView({ block: 'center' })")
    x, y = browser.ask("""(() => {
      const box = document.getElementById('timeline').getBoundingClientRect();
      const chart = echarts.getInstanceByDom(document.getElementById('timeline'));
      const [x, y] = chart.convertToPixel({ seriesIndex: 0 }, chart.getOption().series[0].data[1].value);
      return [box.left + x, box.top + y];
    })()""")
    for place in (x - 3, x):
        browser.call("Input.dispatchMouseEvent", type="mouseMoved", x=place, y=y)
    browser.ask("new Promise((done) => requestAnimationFrame(done))")
    shown = browser.ask("document.querySelector('#timeline .tip').textContent")
    assert shown.startswith("share 0.125 to 0.25")
    assert "gain predicted +" in shown
    assert "realised" in shown


def test_another_run_is_one_choice_away(browser: Chromium, page: Path) -> None:
    browser.open(page)
    choose(browser, "run", "1")
    assert browser.ask(COUNT) == "2 of 2 trials"
    assert browser.ask("document.querySelectorAll('#runs tbody tr').length") == 2
    assert "needs 10 trials" in browser.ask("document.getElementById('importance-note').textContent")


def test_a_run_that_has_only_begun_draws_without_errors(browser: Chromium, tmp_path: Path) -> None:
    (tmp_path / "journal.jsonl").touch()
    build.write(build.render([tmp_path], 1.7e9), tmp_path / "page.html")
    browser.open(tmp_path / "page.html", PHONE)
    assert browser.ask(COUNT) == "0 of 0 trials"
    assert "No device was measured yet." in browser.ask("document.getElementById('devices').textContent")
    assert browser.ask(OVERFLOW) == 0


def test_a_phone_needs_no_scrolling_to_the_side(browser: Chromium, page: Path) -> None:
    browser.open(page, PHONE)
    assert browser.ask("innerWidth") == 390
    assert browser.ask(OVERFLOW) == 0
    browser.ask("document.querySelector('#ranking tr.trial').click()")
    assert browser.ask(OVERFLOW) == 0
    browser.resize(SCREEN)
    assert browser.ask(OVERFLOW) == 0


@pytest.mark.parametrize("size", [PHONE, SCREEN])
def test_hostile_names_are_shown_as_they_are_and_run_nothing(
    browser: Chromium, tmp_path: Path, size: tuple[int, int]
) -> None:
    file = tmp_path / "page.html"
    build.write(build.render([hostile_run(tmp_path / "run")], 1.7e9), file)
    browser.open(file, size)
    browser.ask("document.querySelectorAll('#ranking tr.trial button').forEach((button) => button.click())")
    for metric in ("toString", HOSTILE):
        choose(browser, "value", metric)
    assert "[native code]" not in browser.ask("document.body.innerText")
    assert browser.ask("document.querySelectorAll('img, iframe').length") == 0
    assert "onerror" in browser.ask("document.getElementById('ranking').textContent")
    assert browser.ask("document.title").endswith("orchestrator report")
    assert browser.ask(OVERFLOW) == 0
