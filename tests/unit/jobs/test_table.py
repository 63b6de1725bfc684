"""The torch-free table of jobs: it agrees with the classes, and every wrong parameter is named with what is allowed."""

from __future__ import annotations

import inspect
import math
import subprocess
import sys
from typing import Any

import pytest

from orchestrator import jobs
from orchestrator.jobs.classes import JOBS
from orchestrator.jobs.extras import PACKAGES
from orchestrator.jobs.table import JOB_INFO, JobInfo, Param, ParamKind, check_param, complete_params, did_you_mean


def test_table_and_classes_name_the_same_jobs() -> None:
    assert list(JOB_INFO) == list(JOBS)


@pytest.mark.parametrize(("name", "job_class"), JOBS.items())
def test_table_agrees_with_the_signature_of_the_class(name: str, job_class: type[Any]) -> None:
    signature = inspect.signature(job_class)
    hints = inspect.get_annotations(job_class.__dict__["__init__"])
    info = JOB_INFO[name]
    assert [param.name for param in info.params] == list(signature.parameters)
    for param in info.params:
        assert signature.parameters[param.name].default == param.default, param.name
        expected = f"{param.kind} | None" if param.default is None else str(param.kind)
        assert hints[param.name] == expected, param.name
    assert (job_class.name, job_class.metric) == (name, info.metric)


@pytest.mark.parametrize("job", list(JOB_INFO))
def test_every_default_is_allowed_and_every_parameter_is_described(job: str) -> None:
    for param in JOB_INFO[job].params:
        assert param.check(param.default) == param.default
        assert param.description
        assert (param.minimum is None) == (param.maximum is None) == (param.kind is ParamKind.TEXT)


@pytest.mark.parametrize(
    ("job", "params", "message"),
    [
        ("langauge", {}, r"job 'langauge' does not exist; allowed: language, .*, mlp\. Did you mean 'language'\?"),
        ("x", {}, r"job 'x' does not exist; allowed: language, .*, mlp\.$"),
        ("mlp", {"widht": 3}, r"job mlp has no parameter 'widht'; allowed: width, .*\. Did you mean 'width'\?"),
        ("mlp", {"width": "3"}, r"job mlp: width='3' has type str; allowed: int from 1 to 65536; it means: features"),
        ("mlp", {"width": True}, r"width=True has type bool"),
        ("mlp", {"width": 3.0}, r"width=3.0 has type float; allowed: int"),
        ("mlp", {"width": None}, r"width=None has type NoneType"),
        ("mlp", {"depth": 0}, r"depth=0 is out of range; allowed: int from 1 to 256"),
        ("mlp", {"lr": math.nan}, r"lr=nan is out of range"),
        ("mlp", {"lr": math.inf}, r"lr=inf is out of range"),
        ("mlp", {"lr": 0}, r"lr=0 is out of range"),
        ("mlp", {"seed": -1}, r"seed=-1 is out of range; allowed: int from 0 to 9223372036854775807;"),
        ("language", {"dropout": 1.0}, r"dropout=1.0 is out of range; allowed: float from 0 to 0.95"),
        ("language", {"data_dir": 3}, r"data_dir=3 has type int; allowed: str, or null"),
        ("language", {"max_bytes": "1"}, r"max_bytes='1' has type str; allowed: int from 1 .*, or null"),
        ("language", {"width": 50}, r"width=50 is not a multiple of heads=4; nearest that is: 48 and 52"),
        ("language", {"width": 2}, r"width=2 is not a multiple of heads=4; nearest that is: 4$"),
    ],
)
def test_a_wrong_parameter_is_named_with_what_is_allowed(job: str, params: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        jobs.build_job(job, params)


def test_an_int_is_taken_where_a_float_is_asked_for() -> None:
    value = check_param("mlp", "lr", 1)
    assert isinstance(value, float)
    assert value == 1.0


def test_null_is_taken_where_the_default_is_null() -> None:
    assert check_param("language", "max_bytes", None) is None
    assert check_param("language", "data_dir", "somewhere") == "somewhere"


def test_parameters_not_given_take_their_defaults() -> None:
    assert complete_params("mlp", {"width": 8}) == {
        "width": 8,
        "depth": 2,
        "lr": 0.05,
        "num_samples": 4096,
        "seed": 0,
    }


def test_build_job_passes_the_parameters_on() -> None:
    assert jobs.build_job("mlp", {"num_samples": 77}).num_train_samples == 77


def test_no_suggestion_is_made_for_a_word_unlike_all_others() -> None:
    assert did_you_mean("zzz", ["width", "depth"]) == ""


def test_a_row_can_be_written_with_its_three_facts_alone() -> None:
    info = JobInfo(learning_rate_rule="sqrt", metric="val_loss", mode="min")
    assert info.param("width") is None
    row = JobInfo(
        learning_rate_rule="sqrt",
        metric="val_loss",
        mode="min",
        params=(Param(name="a", kind=ParamKind.TEXT, default="x", description="a word"),),
    )
    assert row.param("a") is row.params[0]


def test_importing_the_table_does_not_import_torch() -> None:
    code = "import sys, orchestrator.jobs as jobs; jobs.complete_params('mlp', {}); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("job", list(JOB_INFO))
def test_a_library_is_named_for_words_of_data_that_exist_and_with_its_package(job: str) -> None:
    info = JOB_INFO[job]
    data = info.param("data")
    assert {word for word, _ in info.libraries} < set(data.choices if data else ("none",))
    assert {*dict(info.libraries).values(), info.folder_library} - {None} <= set(PACKAGES)
