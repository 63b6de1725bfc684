"""Tables and run directories that nobody would write: each is read, or refused in one message; none is a traceback."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from hypothesis import given
from hypothesis import strategies as st

from orchestrator import evidence
from orchestrator.errors import ConfigError, TraceError
from orchestrator.policies.simulator import POLLUX_APPLICATIONS
from orchestrator.policies.simulator.workload import REQUIRED
from orchestrator.processes import Life, Owner
from orchestrator.run_dirs import find_run, is_driver_gone, list_runs, state_of
from orchestrator.simulate.inputs import policy_of, workload_of

Found = TypeVar("Found")
HEAD = ",".join(REQUIRED)
CELLS = st.one_of(
    st.sampled_from(
        ["a", "#1", "cifar10", "0", "1", "-1", "1e400", "nan", "1796060376000000000", "", '"', "1_0", "\ufeff"]
    ),
    st.text(max_size=12),
)
LINES = st.lists(st.lists(CELLS, min_size=1, max_size=7).map(",".join), max_size=6)
JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
STATUS = st.one_of(
    JSON,
    st.fixed_dictionaries({}, optional={"schema": JSON, "state": JSON, "trials": JSON, "updated_at": JSON}),
)


def outcome(call: Callable[[], Found], error: type[Exception]) -> tuple[Found | None, str | None]:
    """What a call gives, or the message of the one error that it may end in."""
    try:
        return call(), None
    except error as refused:
        return None, str(refused)


@given(lines=LINES, has_head=st.booleans())
def test_a_table_is_a_workload_or_one_message(lines: list[str], has_head: bool) -> None:
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "jobs.csv"
        file.write_text("\n".join([HEAD, *lines] if has_head else lines), encoding="utf-8")
        jobs, message = outcome(lambda: workload_of(str(file), POLLUX_APPLICATIONS, 0), TraceError)
        assert message is None or str(file) in message
        assert all(0 <= job.time_s <= 1e11 for job in jobs or ())


@given(status=STATUS, lock=st.one_of(st.text(max_size=40), JSON.map(json.dumps)))
def test_a_run_directory_has_a_state_whatever_is_in_it(status: object, lock: str) -> None:
    with tempfile.TemporaryDirectory() as place:
        run_dir = Path(place) / "run"
        (run_dir / "control").mkdir(parents=True)
        (run_dir / "status.json").write_text(json.dumps(status), encoding="utf-8")
        (run_dir / "control" / "lock").write_text(lock, encoding="utf-8", errors="replace")
        assert [run.name for run in list_runs(Path(place))] == ["run"]
        assert is_driver_gone(run_dir) in {True, False}
        assert state_of(run_dir, status if isinstance(status, dict) else None).isprintable()
        _, message = outcome(lambda: find_run("run", Path(place)), ConfigError)
        assert message is None or "newer version" in message


@given(
    text=st.one_of(
        st.text(max_size=60), JSON.map(json.dumps), st.builds(lambda f: json.dumps({"schema": 1, "files": f}), JSON)
    )
)
def test_a_record_of_evidence_is_compared_or_refused(text: str) -> None:
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / "control").mkdir()
        Path(place).joinpath(*evidence.FILE).write_text(text, encoding="utf-8", errors="replace")
        found, message = outcome(lambda: list(evidence.differences(Path(place))), ValueError)
        assert message is None or "control/evidence.json" in message
        assert all(str(difference) for difference in found or ())


@given(text=st.one_of(st.text(max_size=60), JSON.map(json.dumps)))
def test_a_text_names_an_owner_or_none(text: str) -> None:
    owner = Owner.parse(text)
    assert owner is None or owner.life in set(Life)


@given(settings=st.lists(st.one_of(st.text(max_size=20), st.text(max_size=12).map("cooldown_s={}".format)), max_size=2))
def test_parameters_of_a_policy_are_taken_or_refused_in_one_message(settings: list[str]) -> None:
    _, message = outcome(lambda: policy_of("goodput", settings), ConfigError)
    assert message is None or message
