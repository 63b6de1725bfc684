"""Search spaces: several of them, values inside of others, and functions of Optuna's trial."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml
from ray import tune
from ray.tune.search.variant_generator import generate_variants

from orchestrator import api
from orchestrator.beginning import load_begun, make_run_dir
from orchestrator.config import load_config
from orchestrator.config.model import SearchSection
from orchestrator.errors import ConfigError
from orchestrator.jobs import own
from orchestrator.jobs.own import UserCodeError
from orchestrator.run_spec import middle_params
from orchestrator.space import Define, as_space, first_drawn
from orchestrator.tune.adapter import WHOLE
from orchestrator.tune.search import Search

HERE = __name__
NESTED = {
    "optimizer": {
        "choice": [{"name": "sgd", "momentum": {"uniform": [0.5, 1.0]}}, {"name": "adam", "betas": [{"choice": [0.8]}]}]
    },
    "lr": {"loguniform": [1e-3, 1e-1]},
}
UNION = [NESTED, {"lr": {"choice": [7.0]}, "layers": {"randint": [1, 4]}}]


def train(config: dict[str, Any]) -> None:
    """Any parameters."""


def asked(trial: Any) -> None:
    if trial.suggest_categorical("kind", ["deep", "wide"]) == "deep":
        trial.suggest_int("layers", 2, 8)
    else:
        trial.suggest_int("width", 64, 256, log=True)


def returned(trial: Any) -> dict[str, Any]:
    return {"model": {"layers": trial.suggest_int("layers", 2, 8)}, "seed": 1}


def wrong(trial: Any) -> Any:
    return [1]


def run_file(folder: Path, space: Any, **search: Any) -> Path:
    content = {
        "name": "r",
        "job": {"name": f"{HERE}:train"},
        "search": {"metric": "loss", "mode": "min", "space": space, "num_trials": 4, **search},
    }
    (folder / "r.yaml").write_text(yaml.safe_dump(content))
    return folder / "r.yaml"


def is_right(point: dict[str, Any]) -> bool:
    """Whether a point is of one of the two spaces, and of one only."""
    if "layers" in point:
        return point["lr"] == 7.0 and point["layers"] in {1, 2, 3} and set(point) == {"lr", "layers"}
    optimizer = point["optimizer"]
    is_sgd = optimizer["name"] == "sgd" and 0.5 <= optimizer["momentum"] <= 1.0 and len(optimizer) == 2
    is_adam = optimizer == {"name": "adam", "betas": [0.8]}
    return 1e-3 <= point["lr"] <= 1e-1 and (is_sgd or is_adam) and set(point) == {"lr", "optimizer"}


def test_each_trial_draws_from_one_space_of_a_list_and_what_is_inside_of_its_values(tmp_path: Path) -> None:
    config = load_config(run_file(tmp_path, UNION)).config
    space = Search(config, "loss", "min", str(tmp_path))._space()
    points = [spec["config"][WHOLE] for n in range(40) for _, spec in generate_variants({"config": space}, n)]
    assert all(is_right(point) for point in points)
    assert {"layers" in point for point in points} == {True, False}
    assert {point.get("optimizer", {}).get("name") for point in points} == {"sgd", "adam", None}


def test_optuna_draws_the_same_by_being_asked() -> None:
    spaces = SearchSection.model_validate({"space": UNION}).spaces
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    points = [Define(spaces=spaces)(study.ask()) for _ in range(40)]
    assert all(is_right(point) for point in points)
    assert {"layers" in point for point in points} == {True, False}


@pytest.mark.parametrize(("algorithm", "sampler"), [("random", "RandomSampler"), ("optuna", "TPESampler")])
def test_a_function_of_optunas_trial_draws_the_parameters_of_a_trial(
    tmp_path: Path, algorithm: str, sampler: str
) -> None:
    config = load_config(run_file(tmp_path, f"{HERE}:asked", algorithm=algorithm)).config
    search = Search(config, "loss", "min", str(tmp_path))
    assert search._space() == {}
    assert not search._is_simple, "a resumed search is taken up from Tune's state"
    searcher = search._searcher()
    assert type(searcher._sampler).__name__ == sampler
    searcher.set_search_properties("loss", "min", {})
    points = [searcher.suggest(f"t{n}")[WHOLE] for n in range(20)]
    assert {frozenset(point) for point in points} == {frozenset({"kind", "layers"}), frozenset({"kind", "width"})}
    searcher.save(str(tmp_path / "state"))
    searcher.restore(str(tmp_path / "state"))
    assert searcher.suggest("t20")[WHOLE]


def test_what_a_function_returns_is_the_parameters_and_nothing_else() -> None:
    study = optuna.create_study()
    found = Define(path=f"{HERE}:returned")(study.ask())
    assert set(found) == {"model", "seed"}
    assert set(first_drawn(f"{HERE}:returned")["model"]) == {"layers"}
    with pytest.raises(UserCodeError, match="wrong returned a list; allowed: a dict of parameters, or nothing"):
        Define(path=f"{HERE}:wrong")(study.ask())


def test_a_warm_up_takes_the_first_of_everything(tmp_path: Path) -> None:
    config = load_config(run_file(tmp_path, UNION)).config
    assert middle_params(config) == {"lr": 1e-3, "optimizer": {"name": "sgd", "momentum": 0.5}}


def test_in_python_a_space_may_be_a_list_a_function_or_nested(tmp_path: Path) -> None:
    made = as_space([{"lr": [1, 2]}, {"o": [{"m": tune.uniform(0, 1)}, {"n": 1}]}])
    assert made == [{"lr": {"choice": [1, 2]}}, {"o": {"choice": [{"m": {"uniform": [0.0, 1.0]}}, {"n": 1}]}}]
    assert as_space({"o": {"m": tune.choice([1, 2]), "k": 3}}) == {"o": {"choice": [{"m": {"choice": [1, 2]}, "k": 3}]}}
    content = api._content(train, tmp_path, None, "runs", None, {"space": asked})
    assert content["search"]["space"] == f"{HERE}:asked"
    shipped = api._content(
        train, tmp_path, None, "runs", None, {"space": lambda trial: {"x": trial.suggest_int("x", 1, 2)}}
    )
    file = tmp_path / shipped["search"]["space"].partition(":")[0]
    assert callable(pickle.loads(file.read_bytes()))
    assert str(tmp_path) in shipped["job"]["import_paths"]


@pytest.mark.parametrize(
    ("space", "search", "message"),
    [
        ([{"lr": {"grid": [1, 2]}}, {}], {}, "search.space[0].lr: got a grid in a list of spaces; give it as a choice"),
        ([{"lr": {"unif": [0, 1]}}], {}, "search.space[0].lr"),
        (
            {"o": {"choice": [{"m": {"uniform": [2, 1]}}]}},
            {},
            "search.space.o: uniform: got [2.0, 1.0]; allowed: low < high",
        ),
        ({"o": {"grid": [{"m": {"uniform": [1, 2]}}]}}, {}, "grid: a value holds a distribution; give it as a choice"),
        (UNION, {"algorithm": "grid"}, "got 'grid' with a list of spaces; allowed: random or optuna"),
        (UNION, {"scheduler": {"name": "pbt"}}, "got pbt, which perturbs within one space"),
        (f"{HERE}:nowhere", {}, "search.space: module"),
        (f"{HERE}:asked", {"algorithm": "grid"}, "got grid, and a function draws by itself; allowed: random or optuna"),
        ("asked", {}, "search.space: got 'asked'"),
        ([], {}, "search.space"),
    ],
)
def test_a_wrong_space_is_one_message(tmp_path: Path, space: Any, search: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(run_file(tmp_path, space, **search))
    assert message in str(error.value)


def test_a_function_of_this_process_is_kept_in_the_run_directory_for_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    options: dict[str, Any] = {
        "space": lambda trial: {"x": trial.suggest_int("x", 1, 2)},
        "metric": "loss",
        "mode": "min",
    }
    with api.run_file_of(train, name="mine", storage=tmp_path / "runs", **options) as (file, settings):
        resolved = load_config(file, settings)
        make_run_dir(resolved)
    again = load_begun(resolved.run_dir)
    assert again.config.job.import_paths[0] == str(resolved.run_dir)
    own._loaded.cache_clear()
    assert first_drawn(str(again.config.search.space))["x"] in {1, 2}


def test_a_function_may_draw_for_a_job_of_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "space_of_mine.py").write_text("def space(trial):\n    trial.suggest_float('lr', 0.01, 0.1)\n")
    (tmp_path / "r.yaml").write_text('{name: r, job: {name: mlp}, search: {space: "space_of_mine:space"}}')
    assert 0.01 <= float(str(middle_params(load_config(tmp_path / "r.yaml").config)["lr"])) <= 0.1
