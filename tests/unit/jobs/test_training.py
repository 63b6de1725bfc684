"""Declared trainings: whoever writes one and however it is named, it goes through the same door."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator.config.resolve import load_config
from orchestrator.control.orders import Status
from orchestrator.errors import ConfigError
from orchestrator.jobs import build_job, check_param, complete_params, job_info, own
from orchestrator.jobs.classes import JOBS
from orchestrator.jobs.job import Job
from orchestrator.jobs.own import UserCodeError, add_import_paths
from orchestrator.jobs.parts import NEEDED, OPTIONAL
from orchestrator.jobs.table import JOB_INFO
from orchestrator.jobs.training import Training
from orchestrator.run_spec import run_spec
from orchestrator.train.stepper import Stepper
from tests.unit.orchestrator.train.links import ONE_RANK, Script, loop, order

README = Path(__file__).parents[3] / "jobs" / "README.md"
MAX_LINES = 40


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on the import path; what is imported from it is forgotten."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    add_import_paths([str(tmp_path)])
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


def import_path(job_class: type) -> str:
    return f"{job_class.__module__}:{job_class.__qualname__}"


@pytest.mark.parametrize("name", list(JOBS))
def test_a_job_of_the_table_is_a_training_by_its_import_path_too(name: str) -> None:
    job_class: Any = JOBS[name]
    found, row = job_info(import_path(job_class)), JOB_INFO[name]
    assert found.kind == row.kind == "training"
    assert found.metric == row.metric
    assert [(param.name, param.default) for param in found.params] == [(p.name, p.default) for p in row.params]
    assert complete_params(import_path(job_class), {}) == complete_params(name, {})


def test_by_either_name_it_trains_alike(tmp_path: Path) -> None:
    losses = []
    for job in ("mlp", "orchestrator.jobs.mlp:MlpJob"):
        first = order(tmp_path / job)
        assert first.trial is not None
        trial = replace(first.trial, job=job)
        torch.manual_seed(trial.seed)
        training = build_job(job, trial.params)
        script = Script(replace(first, trial=trial))
        assert loop(script, training).run().status is Status.DONE
        losses.append(list(script.records["loss"]))
    assert losses[0] == losses[1]


def test_the_jobs_train_as_they_did_when_clipping_and_warm_up_were_forced(job: Job, tmp_path: Path) -> None:
    """The loop that every training went through before: clip to 1, a warm-up of 20 steps, one rate for all groups."""
    first = order(tmp_path, samples_per_report=4000).trial
    assert first is not None
    trial = replace(first, job=job.name)
    torch.manual_seed(trial.seed)
    one = Stepper(trial, job, ONE_RANK)
    torch.manual_seed(trial.seed)
    model = job.build_model()
    optimizer = job.build_optimizer(model)
    base_lr, cursor = float(optimizer.param_groups[0]["lr"]), one.cursor
    torch.manual_seed(trial.seed)
    for _ in range(20):  # before the noise is measured, for which a micro-batch is cut
        found = one.step()
        indices, after = cursor.take(8)
        terms = job.loss(model, job.batch(indices.tolist(), torch.device("cpu")))
        (terms.loss_sum * torch.tensor(1 / job.num_elements(8))).backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = base_lr * max(cursor.position, 1) / 160
        optimizer.step()
        optimizer.zero_grad()
        assert found.learning_rate == optimizer.param_groups[0]["lr"]
        assert found.loss == pytest.approx(float(terms.loss_sum.detach()) / terms.num_elements, rel=1e-5)
        assert found.grad_norm == pytest.approx(float(norm), rel=1e-4)
        cursor = after


def example() -> str:
    (block,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    return str(block)


def test_the_example_of_the_readme_is_short_and_trains(package: Path) -> None:
    assert len([line for line in example().splitlines() if line.strip()]) <= MAX_LINES
    (package / "readme_example.py").write_text(example())
    job = "readme_example:Digits"
    assert (job_info(job).metric, job_info(job).mode) == ("accuracy", "max")
    first = order(package / "trial", samples_per_report=1000)
    assert first.trial is not None
    start = replace(first.trial.start, micro_batch=20)
    trial = replace(first.trial, job=job, params={"width": 24}, start=start, max_reports=4)
    assert first.grant is not None
    script = Script(replace(first, trial=trial, credit=4, grant=replace(first.grant, settings=start)))
    torch.manual_seed(0)
    assert loop(script, build_job(job, trial.params)).run().status is Status.DONE
    script.collect()
    assert script.reports[-1].metrics["accuracy"] > 0.8


def test_the_readme_lists_every_part() -> None:
    text = README.read_text()
    listed = set(re.findall(r"`(\w+)[`(]", text))
    assert listed >= {name for names, _ in NEEDED for name in names}
    assert listed >= set(OPTIONAL) - {"name"}


INCOMPLETE = """
class Half:
    def __init__(self, width: int = 4, lr: float = 0.1): ...
    def build_model(self): ...
    def training_data(self): ...
    def optimizer(self, model): ...
"""


def test_a_class_that_lacks_parts_is_one_message_when_the_run_file_is_checked(package: Path) -> None:
    (package / "half_a_training.py").write_text(INCOMPLETE)
    with pytest.raises(UserCodeError) as caught:
        job_info("half_a_training:Half")
    text = str(caught.value)
    assert text.startswith("'half_a_training:Half' has no train_data() that returns a Dataset")
    assert "(it has training_data())" in text
    assert "no loss(model, batch) that returns the mean loss" in text
    assert "no build_optimizer(model) that returns an optimizer" in text
    assert "(it has optimizer())" in text
    assert "no evaluate(model)" in text
    own._loaded.cache_clear()
    own.info_of.cache_clear()


def test_parameters_of_a_class_are_those_of_its_constructor(package: Path) -> None:
    (package / "readme_params.py").write_text(example())
    job = "readme_params:Digits"
    assert complete_params(job, {"lr": 1}) == {"width": 32, "lr": 1.0, "num_epochs": 4}
    with pytest.raises(ValueError, match=r"no parameter 'widht'; allowed: width, lr, num_epochs. Did you mean 'width'"):
        check_param(job, "widht", 3)
    with pytest.raises(ValueError, match=r"width='3' has type str; allowed: int"):
        check_param(job, "width", "3")


def test_samples_per_report_of_a_class_must_be_a_number_of_samples(package: Path) -> None:
    ending = "\n    samples_per_report = 1000\n\nclass Bad(Digits):\n    samples_per_report = '1 epoch'\n"
    (package / "reporting.py").write_text(example() + ending)
    assert job_info("reporting:Digits").samples_per_report == 1000
    with pytest.raises(UserCodeError, match="samples_per_report = '1 epoch'; allowed: a whole number >= 1"):
        job_info("reporting:Bad")


def test_a_class_says_when_it_reports_unless_the_run_file_does(package: Path) -> None:
    (package / "epochs.py").write_text(example() + "\n    samples_per_report = 1000\n")
    run_file = package / "run.yaml"
    head = "name: r\njob: {name: 'epochs:Digits'}\ndials: {batch: {max_global: 64}}\n"
    for more, expected in (("", 1000), ("trial: {samples_per_report: 500}\n", 500)):
        run_file.write_text(head + more)
        resolved = load_config(run_file)
        assert run_spec(resolved).samples_per_report == expected
        assert (run_spec(resolved).metric, run_spec(resolved).mode) == ("accuracy", "max")


def test_a_class_that_evaluates_must_say_its_metric_or_the_run_file_must(package: Path) -> None:
    (package / "unsaid.py").write_text(example().replace('    metric, mode = "accuracy", "max"\n', ""))
    run_file = package / "run.yaml"
    run_file.write_text("name: r\njob: {name: 'unsaid:Digits'}\n")
    with pytest.raises(ConfigError, match=r"search.metric.*is missing, and unsaid:Digits has no attribute metric"):
        load_config(run_file)
    run_file.write_text("name: r\njob: {name: 'unsaid:Digits'}\nsearch: {metric: accuracy, mode: max}\n")
    assert run_spec(load_config(run_file)).metric == "accuracy"


def test_an_attribute_may_be_a_parameter(package: Path) -> None:
    text = example().replace(
        "        self.width, self.lr", "        self.clip_norm = 5 * lr\n        self.width, self.lr"
    )
    (package / "clipping.py").write_text(text)
    assert Training(build_job("clipping:Digits", {})).clip_norm == 0.5
    assert Training(build_job("mlp", {})).clip_norm == 1.0
