"""Models of Lightning and Hugging Face as declared trainings: the same losses as by the library's own trainer."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.multiprocessing.spawn import start_processes
from torch.utils.data import SequentialSampler

pytest.importorskip("lightning", reason="lightning is not installed: pip install 'ray-orchestrator[lightning]'")
pytest.importorskip("transformers", reason="transformers is not installed: pip install 'ray-orchestrator[huggingface]'")

import lightning
import transformers

from orchestrator.config.resolve import load_config
from orchestrator.control.orders import TrialOrder
from orchestrator.errors import ConfigError
from orchestrator.jobs import JobKey, build_job, job_info
from orchestrator.jobs.own import UserCodeError
from orchestrator.train import checkpoint
from orchestrator.train.epoch_size import num_samples
from orchestrator.train.export import Source, export
from orchestrator.train.groups import Ranks
from orchestrator.train.step_mode.choice import StepMode
from orchestrator.train.stepper import Stepper
from tests.unit.jobs import library_models as models
from tests.unit.jobs.library_ranks import WORLD_SIZE, main
from tests.unit.orchestrator.train.links import ONE_RANK, order
from tests.unit.orchestrator.train.step_mode.recorders import CallAgain

HERE = models.__name__
TRAINER_OFF = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
ARGS: dict[str, Any] = {
    "learning_rate": 3e-3,
    "weight_decay": 0.01,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 6,
    "num_train_epochs": 2,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 2,
    "max_grad_norm": 0.5,
}


@pytest.fixture(autouse=True)
def _quiet() -> None:
    for name in ("lightning.pytorch", "lightning.fabric", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)


def key(path: str, data: str | None = None, **more: Any) -> str:
    path = path if ":" in path else f"{HERE}:{path}"
    return JobKey(path=path, data=None if data is None else f"{HERE}:{data}", **more).text


def trial(folder: Path, samples: int, reports: int, metric: str, **start: Any) -> TrialOrder:
    made = order(folder).trial
    assert made is not None
    return replace(
        made, start=replace(made.start, **start), samples_per_report=samples, max_reports=reports, metric=metric
    )


def stepper(
    folder: Path, job: str, params: dict[str, Any], metric: str = "val_loss", ranks: Ranks = ONE_RANK, **start: int
) -> Stepper:
    torch.manual_seed(3)
    start = {"micro_batch": 16, **start}
    samples, reports = start.pop("samples", 256), start.pop("reports", 3)
    return Stepper(trial(folder, samples, reports, metric, **start), build_job(job, params), ranks)


class Losses(lightning.Callback):  # type: ignore[misc]
    def __init__(self) -> None:
        self.found: list[float] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *_: Any) -> None:
        self.found.append(float(outputs["loss"]))


@pytest.mark.parametrize("schedule", ["none", "onecycle", "steps", "plateau"])
@pytest.mark.parametrize("clip", ["norm", "value"])
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_losses_and_metrics_are_those_of_lightnings_trainer(tmp_path: Path, schedule: str, clip: str) -> None:
    clipped = {"gradient_clip_val": 0.3 if clip == "norm" else 0.01, "gradient_clip_algorithm": clip}
    job = key("Classifier", "Points", args={**clipped, "max_epochs": 3})
    ours = stepper(tmp_path, job, {"schedule": schedule})
    losses: list[float] = []
    for _ in range(3):
        losses += [ours.step().loss for _ in range(16)]
        metrics = ours.evaluate()

    torch.manual_seed(3)
    module, seen = models.Classifier(schedule=schedule), Losses()
    trainer = lightning.Trainer(
        max_epochs=3, callbacks=[seen], enable_model_summary=False, num_sanity_val_steps=0, **TRAINER_OFF, **clipped
    )
    trainer.fit(module, models.Points())
    assert losses == pytest.approx(seen.found, rel=1e-5)
    for name in ("val_loss", "accuracy", "largest"):
        assert metrics[name] == pytest.approx(float(trainer.callback_metrics[name]), rel=1e-5)


class Logs(transformers.TrainerCallback):  # type: ignore[misc]
    def __init__(self) -> None:
        self.found: list[tuple[float, float, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        if "loss" in logs:
            self.found.append((logs["loss"], logs["grad_norm"], logs["learning_rate"]))


class InOrder(transformers.Trainer):  # type: ignore[misc]
    def _get_train_sampler(self, *_: Any) -> Any:
        return SequentialSampler(self.train_dataset)


@pytest.mark.parametrize("is_masked", [True, False])
@pytest.mark.parametrize("is_class", [True, False])
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_losses_norms_rates_and_metrics_are_those_of_hugging_faces_trainer(
    tmp_path: Path, is_masked: bool, is_class: bool
) -> None:
    wanted = models.gpt2().config.to_diff_dict() if is_class else {}
    names = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "resid_pdrop", "embd_pdrop", "attn_pdrop")
    params = {"is_masked": is_masked, **{name: wanted[name] for name in names if name in wanted}}
    job = key("transformers:GPT2LMHeadModel" if is_class else "gpt2", "sums", args=ARGS)
    ours = stepper(tmp_path, job, params, "eval_loss", micro_batch=8, grad_accum=2, samples=192, reports=2)
    steps = [ours.step() for _ in range(24)]
    metrics = ours.evaluate()

    torch.manual_seed(3)
    data, logs = models.sums(is_masked), Logs()
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), logging_steps=1, report_to="none", save_strategy="no", use_cpu=True, **ARGS
    )
    arguments.disable_tqdm = True
    trainer = InOrder(
        model=models.gpt2(),
        args=arguments,
        train_dataset=data["train"].dataset,
        eval_dataset=data["eval"],
        compute_metrics=models.accuracy,
        callbacks=[logs],
    )
    trainer.train()
    theirs = trainer.evaluate()
    assert [step.loss for step in steps] == pytest.approx([loss for loss, _, _ in logs.found], rel=1e-5)
    assert [step.grad_norm for step in steps] == pytest.approx([norm for _, norm, _ in logs.found], rel=1e-4)
    assert [step.learning_rate for step in steps] == pytest.approx([rate for _, _, rate in logs.found])
    assert set(metrics) == {"eval_loss", "eval_accuracy"}
    for name, value in metrics.items():
        assert value == pytest.approx(theirs[name], rel=1e-5)
    assert ("known only with the batch" in ours.job.why_not_replayed) == is_masked, "unmasked rows can be replayed"


def test_rows_with_one_label_count_by_their_samples(tmp_path: Path) -> None:
    job = key("bert", "texts", args={"learning_rate": 1e-2, "lr_scheduler_type": "constant"})
    whole = stepper(tmp_path, job, {}, "eval_loss", micro_batch=16, samples=64)
    parts = stepper(tmp_path, job, {}, "eval_loss", micro_batch=4, grad_accum=4, samples=64)
    assert [whole.step().loss for _ in range(8)] == pytest.approx([parts.step().loss for _ in range(8)], rel=1e-4)
    assert whole.job.why_not_replayed == ""


REPLAYABLE = [
    (key("gpt2", "sums"), {"is_masked": False}, "eval_loss"),
    (key("bert", "texts"), {}, "eval_loss"),
    (key("Classifier", "Points"), {"fused": True, "schedule": "steps"}, "val_loss"),
]


@pytest.mark.parametrize(("job", "params", "metric"), REPLAYABLE)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_steps_of_library_models_are_replayed_with_the_losses_of_eager_ones(
    tmp_path: Path, job: str, params: dict[str, Any], metric: str
) -> None:
    replayed = replace(ONE_RANK, step_mode=StepMode.GRAPH, recorder=CallAgain)
    one = stepper(tmp_path, job, params, metric, ranks=replayed, micro_batch=8, samples=64)
    found = [result for _ in range(16) for result in one.advance()] + one.settle()
    assert {result.mode for result in found[1:]} == {StepMode.GRAPH}
    eager = stepper(tmp_path, job, params, metric, micro_batch=8, samples=64)
    wanted = [eager.step() for _ in found]
    assert [result.loss for result in found] == pytest.approx([result.loss for result in wanted], rel=1e-5)
    assert [result.learning_rate for result in found] == [result.learning_rate for result in wanted]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_schedule_that_turns_more_than_the_rate_is_not_replayed(tmp_path: Path) -> None:
    """Betas are part of a recording; a recorder that runs the step anew, as the one of the tests does, hides that."""
    replayed = replace(ONE_RANK, step_mode=StepMode.GRAPH, recorder=CallAgain)
    job = key("Classifier", "Points")
    one = stepper(tmp_path, job, {"fused": True}, ranks=replayed, micro_batch=8, samples=64)
    found = [result for _ in range(8) for result in one.advance()] + one.settle()
    assert {result.mode for result in found} == {StepMode.EAGER}
    assert "a schedule changes betas" in one.mode_words


def test_data_may_be_an_object_that_is_there_already(tmp_path: Path) -> None:
    one = stepper(tmp_path, key("gpt2", "KEPT_SUMS"), {}, "eval_loss", micro_batch=8)
    assert one.cursor.num_samples == 64
    assert one.step().num_samples == 8
    assert set(one.evaluate()) == {"eval_loss"}


def test_an_argument_may_be_searched_and_is_that_of_the_trial(tmp_path: Path) -> None:
    job = key("gpt2", "sums", args={"lr_scheduler_type": "constant"})
    one = stepper(tmp_path, job, {"learning_rate": 0.07, "weight_decay": 0.5}, "eval_loss", micro_batch=8)
    assert one.step().learning_rate == pytest.approx(0.07)
    assert [group["weight_decay"] for group in one.optimizer.param_groups] == [0.5, 0.0]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_module_with_its_own_loaders_knows_how_far_it_is_and_resumes(tmp_path: Path) -> None:
    job = key("WithItsOwnData")
    one = stepper(tmp_path, job, {})
    for _ in range(20):
        one.step()
    assert one.model.epochs_seen == [0] * 16 + [1] * 4
    assert one.job.why_not_replayed == "WithItsOwnData.training_step reads current_epoch and global_step"
    commit = one.commit(tmp_path / "checkpoints", {"num_reports": 1})
    again = stepper(tmp_path, job, {})
    again.resume(commit)
    assert again.model.epochs_seen == one.model.epochs_seen
    assert again.step().loss == one.step().loss


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_exported_model_is_in_the_librarys_layout(tmp_path: Path) -> None:
    one = stepper(tmp_path, key("gpt2", "sums"), {}, "eval_loss", micro_batch=8)
    one.step()
    commit = one.commit(tmp_path / "checkpoints", {"num_reports": 1})
    assert not checkpoint.verify(commit)
    source = Source(trial_id="t", job=key("gpt2", "sums"), params={}, commit=commit, metric="eval_loss", value=1.0)
    line = export(source, tmp_path / "out")
    assert line.startswith("from transformers import GPT2LMHeadModel")
    loaded = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "out")
    for name, value in loaded.state_dict().items():
        torch.testing.assert_close(value, one.model.state_dict()[name])
    facts = yaml.safe_load((tmp_path / "out" / "params.json").read_text())
    assert (facts["job"], facts["data"]) == (f"{HERE}:gpt2", f"{HERE}:sums")


def test_samples_are_counted_in_a_process_of_its_own() -> None:
    assert num_samples(key("Classifier", "Points"), {"num_points": 320}, ["."]) == 320


@pytest.mark.parametrize(
    ("job", "message"),
    [
        (
            key("ByHand", "Points"),
            "ByHand: automatic_optimization is off; allowed in a declared training: on; else name",
        ),
        (key("WithHooks", "Points"), "it overrides on_train_epoch_end, optimizer_step, which nobody would call here"),
        (
            key("TwoOptimizers", "Points"),
            "configure_optimizers returned 2 optimizers; allowed in a declared training: one",
        ),
        (key("NoLoss", "Points"), "NoLoss.training_step returned NoneType; allowed: the loss as a scalar tensor"),
        (key("Classifier"), "Classifier has no train_dataloader; allowed: one, or a LightningDataModule as job.data"),
        (key("gpt2", "Points", kind="lightning"), "gpt2 returned a GPT2LMHeadModel; allowed: a LightningModule"),
        (key("Classifier", "Points", args={"gradient_clip_algorithm": "no"}), "is 'no'; allowed: norm, value"),
        (key("gpt2", "unlabelled"), "gpt2 returned no loss for input_ids; allowed: data with labels"),
        (key("gpt2", "wrong_parts"), "returned trian; allowed: data to train on, a pair"),
        (key("gpt2", kind="huggingface"), "gpt2 has no data; allowed: job.data with the import path"),
        (key("gpt2", "sums", args={"optim": "adamm"}), "job.args: adamm is not a valid OptimizerNames"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_a_declared_training_cannot_do_is_refused_by_name(tmp_path: Path, job: str, message: str) -> None:
    with pytest.raises(UserCodeError) as error:
        stepper(tmp_path, job, {}).step()
    assert message in str(error.value)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_is_not_known_of_the_trainer_is_said(tmp_path: Path) -> None:
    with pytest.raises(AttributeError, match=r"self\.trainer\.num_devices is not known.*estimated_stepping_batches"):
        stepper(tmp_path, key("AsksForMore", "Points"), {})


def test_without_data_to_evaluate_on_it_says_so(tmp_path: Path) -> None:
    one = stepper(tmp_path, key("gpt2", "nothing_to_evaluate"), {}, "eval_loss", micro_batch=8)
    with pytest.raises(UserCodeError, match="returned no data to evaluate on; allowed: a pair, or a dict with eval"):
        one.evaluate()


@pytest.mark.parametrize(
    ("name", "data", "kind", "found"),
    [
        ("Classifier", "Points", "auto", "lightning"),
        ("transformers:GPT2LMHeadModel", "sums", "auto", "huggingface"),
        ("gpt2", "sums", "auto", "huggingface"),
        ("gpt2", None, "auto", "function"),
        ("gpt2", None, "huggingface", "huggingface"),
        ("tests.unit.orchestrator.train.declared:TwoGroups", None, "auto", "training"),
    ],
)
def test_auto_recognises_each_kind(name: str, data: str | None, kind: Any, found: str) -> None:
    assert job_info(key(name, data, kind=kind)).kind == found


def run_file(path: Path, **changes: Any) -> Path:
    content: dict[str, Any] = {
        "name": "r",
        "job": {"name": f"{HERE}:Classifier", "data": f"{HERE}:Points", "args": {"max_epochs": 6}},
        "search": {"metric": "val_loss", "space": {"lr": {"loguniform": [1e-3, 1e-1]}}, "num_trials": 2},
    }
    for name, value in changes.items():
        content[name] = {**content.get(name, {}), **value}
    path.write_text(yaml.safe_dump(content))
    return path


def test_the_run_file_takes_what_the_arguments_say(tmp_path: Path) -> None:
    config = load_config(run_file(tmp_path / "r.yaml", trial={"epochs_per_report": 2})).config
    assert (config.max_reports, config.trial.epochs_per_report) == (3, 2)
    args = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3}
    job = {"name": f"{HERE}:gpt2", "data": f"{HERE}:sums", "args": args}
    found = load_config(run_file(tmp_path / "h.yaml", job=job, search={"metric": None, "space": {}})).config
    assert (found.trial.micro_batch, found.trial.grad_accum, found.trial.epochs_per_report) == (4, 3, 1)
    assert found.max_reports == 3, "the library's own number of epochs"
    assert JobKey.of(found.job.key) == JobKey(path=f"{HERE}:gpt2", data=f"{HERE}:sums", args=args)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"job": {"args": {"max_steps": 9}}},
            "job.args.max_steps is not known; a trial lasts trial.max_reports reports",
        ),
        ({"job": {"args": {"max_epoch": 9}}}, "job.args.max_epoch is not known Did you mean 'max_epochs'?"),
        ({"job": {"args": {"gradient_clip_val": "a"}}}, "job.args.gradient_clip_val='a' has type str; allowed: float"),
        ({"job": {"args": {"max_epochs": 0}}}, "job.args.max_epochs is 0; allowed: a whole number >= 1"),
        ({"job": {"data": f"{HERE}:Nowhere"}}, "has no 'Nowhere'"),
        (
            {"job": {"kind": "huggingface"}},
            "got huggingface, but tests.unit.jobs.library_models:Classifier is a lightning",
        ),
        ({"job": {"name": "tests.unit.orchestrator.train.declared:TwoGroups"}}, "is a training and takes no job.data"),
        (
            {"job": {"args": {"accumulate_grad_batches": 4}}, "trial": {"grad_accum": 2}},
            "job.args.accumulate_grad_batches is 4",
        ),
        ({"search": {"metric": None}}, "is missing; allowed: the name of a value that validation_step of"),
        (
            {"search": {"space": {"lr": {"choice": [1]}, "max_epochs": {"choice": [1]}}}},
            "unknown parameter 'max_epochs'",
        ),
        ({"trial": {"samples_per_report": 100, "epochs_per_report": 1}}, "keep one of them"),
        (
            {
                "job": {"args": {"gradient_clip_val": 1.0}},
                "search": {"space": {"gradient_clip_val": {"choice": [1.0]}}},
            },
            "fixed in job.args",
        ),
    ],
)
def test_wrong_input_is_one_message(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(run_file(tmp_path / "r.yaml", **changes))
    assert message in str(error.value)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    directory = tmp_path_factory.mktemp("library_ranks")
    start_processes(main, args=(str(directory),), nprocs=WORLD_SIZE)  # type: ignore[no-untyped-call]
    found: dict[str, Any] = json.loads((directory / "results.json").read_text())
    return found


@pytest.mark.timeout(240)
@pytest.mark.parametrize("name", ["lightning", "huggingface"])
def test_two_ranks_have_the_gradients_of_one(two_ranks: dict[str, Any], name: str) -> None:
    assert two_ranks[name]["shared"] == pytest.approx(two_ranks[name]["alone"], rel=1e-4)
