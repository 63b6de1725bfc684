"""Whatever a run file holds, `load_config` gives a configuration that reads back or raises `ConfigError`."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from orchestrator.config import Machine, fit_problems, load_config
from orchestrator.config.render import to_yaml
from orchestrator.config.source import parse
from orchestrator.errors import ConfigError

ROOT = Path(__file__).parents[3]
DEMO: Any = parse((ROOT / "demo.yaml").read_text(encoding="utf-8"), "demo.yaml").data

fuzz = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def load_or_refuse(path: Path, overrides: tuple[str, ...] = ()) -> None:
    refused = None
    try:
        resolved = load_config(path, overrides)
    except ConfigError as error:
        refused = str(error)
    if refused is not None:
        assert refused
        assert all(line.isprintable() for line in refused.split("\n"))
        return
    for problem in fit_problems(resolved, Machine(num_cores=2, num_gpus=0)):
        assert str(problem).isprintable()
    again = path.with_name("again.yaml")
    again.write_text(resolved.to_yaml(with_origins=True), encoding="utf-8")
    assert load_config(again).config == resolved.config


def paths(data: dict[str, Any], prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found = []
    for key, value in data.items():
        found.append((*prefix, key))
        if isinstance(value, dict):
            found += paths(value, (*prefix, key))
    return found


ODD_VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2, 10**18, -(10**18), 0.0, -0.0, 0.5, 1e-300, 1e300, float("nan"), float("inf"),
    "", " ", "1", "0x10", "true", "null", "../x", "a/b", "/etc", "a\nb", "\x1b[31m", "\u202e", "\u00e9", "x" * 5000,
    [], [1], [None], [[]], ["fp32"], ["bf16", "fp32"], {}, {"a": 1}, {"name": "asha"}, {"name": None}, {"": ""},
    {"uniform": [1, 2]}, {"grid": [1, 2, 3]}, {"randint": [5, 5]}, {"choice": [1, "a", None]},
]  # fmt: skip

odd_values = st.sampled_from(ODD_VALUES) | st.integers() | st.floats() | st.text(max_size=30)


@fuzz
@given(path=st.sampled_from(paths(DEMO)), value=odd_values)
def test_any_value_anywhere_is_accepted_or_refused(tmp_path: Path, path: tuple[str, ...], value: object) -> None:
    data = copy.deepcopy(DEMO)
    section: Any = data
    for key in path[:-1]:
        section = section[key]
    section[path[-1]] = value
    file = tmp_path / "run.yaml"
    file.write_text(to_yaml(data), encoding="utf-8", errors="replace")
    load_or_refuse(file)


@fuzz
@given(text=st.text(alphabet=st.sampled_from("ab:-?!&*#|>%@`'\"[]{},~ \n\t0.1e"), max_size=60) | st.text(max_size=40))
@example("a: &a\n  b: *a\n")
@example("? \n: \n")
@example("{? a : b}")
@example("%TAG ! x:\n---\n!a b")
def test_any_text_is_accepted_or_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text, encoding="utf-8", errors="replace", newline="")
    load_or_refuse(file)


@fuzz
@given(raw=st.binary(max_size=60))
def test_any_bytes_are_accepted_or_refused(tmp_path: Path, raw: bytes) -> None:
    file = tmp_path / "run.yaml"
    file.write_bytes(raw)
    load_or_refuse(file)


@fuzz
@given(cut=st.integers(0, 3000), extra=st.text(max_size=8), at=st.integers(0, 3000))
def test_a_damaged_file_is_accepted_or_refused(tmp_path: Path, cut: int, extra: str, at: int) -> None:
    text = (ROOT / "demo.yaml").read_text(encoding="utf-8")
    file = tmp_path / "run.yaml"
    file.write_text((text[:at] + extra + text[at:])[: max(cut, 1)], encoding="utf-8", errors="replace", newline="")
    load_or_refuse(file)


@fuzz
@given(path=st.text(max_size=15) | st.sampled_from([".".join(p) for p in paths(DEMO)]), value=st.text(max_size=20))
def test_any_override_is_accepted_or_refused(tmp_path: Path, path: str, value: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text((ROOT / "demo.yaml").read_text(encoding="utf-8"), encoding="utf-8")
    load_or_refuse(file, (f"{path}={value}",))


@pytest.mark.parametrize("words", ["name", "name:", "a=b", "{", "\0", "\ud800", "\U0001f600"])
def test_any_path_is_accepted_or_refused(words: str) -> None:
    with pytest.raises(ConfigError):
        load_config(Path(words))
