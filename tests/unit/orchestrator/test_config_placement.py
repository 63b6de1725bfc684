"""Policies that pause and move trials, and the section `queue`: what is taken, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.config import Machine, fit_problems, load_config
from orchestrator.control.spec import RunSpec
from orchestrator.errors import ConfigError
from orchestrator.run_spec import run_spec

RUN = """\
name: placed
job: {name: mlp, params: {width: 64, depth: 2}}
search: {space: {lr: {loguniform: [1.0e-3, 1.0e-2]}}, num_trials: 6, max_concurrent: 3}
dials: {share: {min: 0.25}}
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "run.yaml").write_text(RUN)
    return tmp_path / "run.yaml"


def test_policies_that_do_nothing_else_place_and_others_do_not(path: Path) -> None:
    for name, places in (("fifo", True), ("sia", True), ("goodput_joint", False), ("goodput", False)):
        assert run_spec(load_config(path, [f"policy.name={name}"])).places is places
    spec = run_spec(load_config(path, ["policy.name=goodput_joint", "dials.placement.enabled=true"]))
    assert spec.places
    assert (spec.limits.min_share, spec.limits.max_share, spec.start.share) == (0.25, 1.0, 1.0)


def test_without_the_share_dial_a_placed_trial_has_whole_devices(path: Path) -> None:
    spec = run_spec(load_config(path, ["policy.name=fluid", "dials.share.enabled=false"]))
    assert (spec.limits.min_share, spec.limits.max_share, spec.start.share) == (1.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("change", "key", "words"),
    [
        ("dials.placement.enabled=false", "dials.placement.enabled", "allowed: null or true, or another policy.name"),
        ("trial.num_workers=2", "trial.num_workers", "got 2 while policy fifo pauses trials"),
        ("trial.share=0.5", "trial.share", "allowed: null"),
        ("dials.share.max=0.5", "dials.share.max", "allowed: 1"),
        ("dials.workers={enabled: true}", "dials.workers.enabled", "allowed: false, or dials.placement.enabled"),
    ],
)
def test_what_contradicts_it_is_refused(path: Path, change: str, key: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(path, ["policy.name=fifo", change])
    assert caught.value.key == key
    assert words in str(caught.value)


def test_the_section_queue_becomes_the_terms_of_the_run(path: Path) -> None:
    queue = "queue={user: anna, priority: 2, weight: 3.0, deadline: '2999-01-01T00:00+00:00', protected: true}"
    terms = run_spec(load_config(path, [queue])).terms
    assert (terms.user, terms.priority, terms.weight, terms.protected) == ("anna", 2, 3.0, True)
    assert terms.deadline == 32472144000.0
    assert RunSpec.from_jsonable(run_spec(load_config(path, [queue])).to_jsonable()).terms == terms


@pytest.mark.parametrize(
    ("change", "key", "words"),
    [
        ("queue.deadline=soon", "queue.deadline", "allowed: a moment such as"),
        ("queue.weight=0.0", "queue.weight", "0"),
        ("queue.priority=1001", "queue.priority", "1000"),
        ("queue.user='a b'", "queue.user", "a b"),
        ("queue.max_devices=0.5", "queue.max_devices", "allowed: at least 1"),
        ("queue.max_devices=2.0", "queue.max_devices", "only with dials.placement"),
        ("queue.guaranteed_devices=1.0", "queue.guaranteed_devices", "only with dials.placement"),
    ],
)
def test_a_mistake_in_the_section_queue_is_one_message(path: Path, change: str, key: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(path, [change])
    assert caught.value.key == key
    assert words in str(caught.value)


def test_no_trial_is_promised_more_than_it_can_have(path: Path) -> None:
    with pytest.raises(ConfigError, match="more than a trial can have"):
        load_config(path, ["policy.name=fifo", "queue.guaranteed_devices=2.0"])


def test_a_deadline_in_the_past_is_refused_where_a_run_begins_and_not_where_it_goes_on(path: Path) -> None:
    resolved = load_config(path, ["queue.deadline=2020-01-01T00:00"])
    machine = Machine(num_cores=2, num_gpus=0)
    (problem,) = fit_problems(resolved, machine)
    assert "ago; allowed: a moment to come" in str(problem)
    assert fit_problems(resolved, machine, is_new=False) == []
