"""The file that `orchestrator up` takes: what it says by default, and every mistake in one message."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.config.cluster_file import load_cluster_file
from orchestrator.errors import ConfigError


def test_without_a_file_everything_has_a_default() -> None:
    file = load_cluster_file(None)
    assert (file.policy.name, file.places, file.idle_timeout_s, file.quotas) == ("goodput", False, 3600.0, {})


def test_policies_that_do_nothing_else_place_and_others_where_it_is_said(tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text("policy: {name: tiresias}\nquotas: {anna: 2}\n")
    assert load_cluster_file(path).places
    path.write_text("policy: {name: goodput_joint}\nplacement: true\n")
    assert load_cluster_file(path).places


@pytest.mark.parametrize(
    ("text", "key", "words"),
    [
        ("policy: {name: fluid}\nquotas: {anna: 0.5}", "quotas.anna", "allowed: at least 1"),
        ("quotas: {anna: 2}", "quotas", "allowed: placement: true, or no quotas"),
        ("policy: {name: fifo}\nplacement: false", "placement", "all that policy fifo does"),
        ("policy: {name: nobody}", "policy", "nobody"),
        ("idle_timeout_s: 0", "idle_timeout_s", "1"),
        ("colour: red", "colour", "unknown key"),
    ],
)
def test_a_mistake_is_one_message(tmp_path: Path, text: str, key: str, words: str) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_cluster_file(path)
    assert caught.value.key == key
    assert caught.value.line is not None
    assert words in str(caught.value)
