"""The jobs that exist and the parameters each of them takes, without torch.

Knows names, types, defaults and ranges; deliberately not the classes, which import torch (`jobs.classes` has them).
Read by the run-file checker, by `build_job` and by the policies' set-up; a test compares it with the classes.
"""

from __future__ import annotations

from collections.abc import Mapping

from orchestrator.jobs.job_key import JobKey
from orchestrator.jobs.own import info_of, is_own
from orchestrator.jobs.param import (
    JobInfo,
    Param,
    ParamKind,
    ParamValue,
    adamw_params,
    bad_file_and_seed,
    bad_file_param,
    choice_param,
    data_params,
    did_you_mean,
    float_param,
    int_param,
    speed_free,
    text_param,
)

__all__ = [
    "JOB_INFO",
    "JobInfo",
    "Param",
    "ParamKind",
    "ParamValue",
    "check_param",
    "complete_params",
    "did_you_mean",
    "job_info",
]

JOB_INFO: dict[str, JobInfo] = {
    "language": JobInfo(
        learning_rate_rule="sqrt",
        metric="val_loss",
        mode="min",
        summary="byte-level GPT on the Python standard library's own source files, or any text",
        params=(
            int_param("width", 64, 1, 16384, "features per token"),
            int_param("layers", 2, 1, 256, "transformer blocks"),
            int_param("heads", 4, 1, 256, "attention heads per block; width must be a multiple of it"),
            int_param("context", 64, 1, 8192, "bytes the model sees at once; a sample is one window of them"),
            float_param("dropout", 0.0, 0.0, 0.95, "probability of dropping an activation in training"),
            speed_free(float_param("lr", 1e-3, 1e-9, 10.0, "learning rate of AdamW at the start global batch")),
            speed_free(float_param("weight_decay", 0.1, 0.0, 10.0, "decoupled weight decay of the matrices")),
            speed_free(float_param("beta1", 0.9, 0.0, 0.99999, "AdamW's decay of the mean gradient")),
            speed_free(float_param("beta2", 0.95, 0.0, 0.99999, "AdamW's decay of the mean squared gradient")),
            speed_free(int_param("eval_windows", 256, 1, 1_000_000, "held-out windows at most per evaluation")),
            speed_free(
                int_param("max_bytes", None, 1, 1 << 40, "training text to use at most, in bytes; null for all")
            ),
            speed_free(
                int_param(
                    "shuffle_block",
                    None,
                    1,
                    1 << 30,
                    "windows shuffled among themselves, of text that stays on disk; null: all, text in memory",
                )
            ),
            text_param("data_dir", None, "file, or folder of files, that is read in place of the standard library's"),
            bad_file_param(),
        ),
        divisible=(("width", "heads"),),
    ),
    "image": JobInfo(
        learning_rate_rule="sqrt",
        metric="val_accuracy",
        mode="max",
        summary="image classification with a small ViT or ResNet, on digits, CIFAR files or a folder per class",
        params=(
            choice_param("model", ("vit", "resnet"), "kind of network"),
            int_param("width", 48, 1, 8192, "features per patch (vit) or of the first stage (resnet)"),
            int_param("layers", 3, 1, 256, "transformer blocks (vit) or residual blocks per stage (resnet)"),
            int_param("heads", 4, 1, 256, "attention heads per block (vit); width must be a multiple of it"),
            int_param("patch", 2, 1, 256, "side of a patch in pixels (vit); the image's side must be a multiple of it"),
            int_param(
                "size", None, 4, 2048, "side in pixels that images are brought to; null: as they are, 32 in folders"
            ),
            *adamw_params(2e-3),
            speed_free(int_param("max_samples", None, 1, 1 << 40, "training images to use at most; null for all")),
            speed_free(int_param("eval_samples", 1024, 1, 1_000_000, "held-out images at most per evaluation")),
            int_param(
                "loader_processes", 0, 0, 256, "processes per rank that decode images of folders; 0: all are in memory"
            ),
            *data_params(
                ("digits", "shapes"),
                "digits of scikit-learn, or shapes drawn here,",
                "folder with CIFAR files, or with a folder of images per class (also below train and val)",
            ),
        ),
        libraries=(("digits", "sklearn"),),
        divisible=(("width", "heads"),),
    ),
    "tissue": JobInfo(
        learning_rate_rule="sqrt",
        metric="val_dice",
        mode="max",
        summary="segmentation of medical pictures with a small U-Net: stained tissue, a fundus, pictures and masks",
        params=(
            int_param("width", 8, 1, 4096, "channels of the first level; each level below has twice as many"),
            int_param("levels", 3, 1, 8, "times the side is halved"),
            int_param("size", 32, 8, 4096, "side of a patch in pixels; a multiple of 2 to the power of levels"),
            *adamw_params(3e-3),
            *data_params(
                ("ihc", "fundus", "cells"),
                "tissue or retina of scikit-image with computed masks, or cells drawn here,",
                "folder with pictures in `images` and masks of the same names in `masks`",
            ),
        ),
        libraries=(("ihc", "skimage"), ("fundus", "skimage")),
        folder_library="PIL",
    ),
    "speech": JobInfo(
        learning_rate_rule="sqrt",
        metric="val_word_error_rate",
        mode="min",
        summary="speech recognition with convolutions, a transformer and CTC, on made utterances or a folder of them",
        params=(
            int_param("width", 64, 1, 8192, "features per position"),
            int_param("layers", 2, 1, 256, "transformer blocks"),
            int_param("heads", 4, 1, 256, "attention heads per block; width must be a multiple of it"),
            choice_param("units", ("words", "letters"), "what CTC writes: words of a small vocabulary, or letters"),
            int_param("rate", 8000, 4000, 48000, "samples per second that sound is brought to"),
            float_param("max_seconds", 4.0, 0.1, 600.0, "seconds that an utterance of a folder may last"),
            *adamw_params(2e-3),
            speed_free(int_param("max_samples", None, 1, 1 << 40, "training utterances at most; null for all")),
            speed_free(int_param("eval_samples", 192, 1, 1_000_000, "held-out utterances at most per evaluation")),
            *data_params(
                ("auto", "espeak", "signal"),
                "spoken digits by espeak-ng, as added-up signals, or auto for what is installed,",
                "folder laid out like LibriSpeech (*.trans.txt) or Speech Commands (a folder per word)",
            ),
        ),
        divisible=(("width", "heads"),),
    ),
    "genome": JobInfo(
        learning_rate_rule="sqrt",
        metric="val_auc",
        mode="max",
        summary="two classes of DNA or RNA with a small convolutional network, on planted motifs or two FASTA files",
        params=(
            int_param("width", 32, 1, 8192, "features per letter"),
            int_param("layers", 1, 1, 256, "residual convolutions behind the first one"),
            int_param("length", 64, 4, 1 << 20, "letters per sequence; longer ones are cut to their middle"),
            *adamw_params(3e-3),
            speed_free(int_param("max_samples", None, 1, 1 << 40, "training sequences at most; null for all")),
            speed_free(int_param("eval_samples", 2048, 2, 1 << 40, "held-out sequences at most per evaluation")),
            text_param("data_dir", None, "folder with two FASTA files, one per class; null for planted motifs"),
            *bad_file_and_seed(),
        ),
    ),
    "mlp": JobInfo(
        learning_rate_rule="linear",
        metric="val_loss",
        mode="min",
        summary="multi-layer perceptron on synthetic classes, the smallest job, for tests",
        params=(
            int_param("width", 32, 1, 65536, "features per hidden layer"),
            int_param("depth", 2, 1, 256, "hidden layers"),
            speed_free(float_param("lr", 0.05, 1e-9, 10.0, "learning rate of SGD at the start global batch")),
            speed_free(int_param("num_samples", 4096, 1, 10_000_000, "training samples to make")),
            speed_free(
                int_param("seed", 0, 0, (1 << 63) - 1, "seed of the synthetic data; the model's start is torch's")
            ),
        ),
    ),
}


def job_info(job: str) -> JobInfo:
    """The table row of a job, or what the signature of a training named by import path says; the latter imports it.

    Raises:
        ValueError: there is no job of that name, or it cannot be imported.
    """
    if is_own(job):
        return info_of(job)
    if job not in JOB_INFO:
        raise ValueError(f"job {job!r} does not exist; allowed: {', '.join(JOB_INFO)}.{did_you_mean(job, JOB_INFO)}")
    return JOB_INFO[job]


def check_param(job: str, name: str, value: object) -> ParamValue:
    """One value for one parameter, in the parameter's own type; a search space is checked value by value.

    Raises:
        ValueError: unknown job or parameter, wrong type, or out of range.
    """
    info = job_info(job)
    param, job = info.param(name), JobKey.of(job).path
    if param is None and info.takes_any:
        return value
    if param is None:
        names = [known.name for known in info.params]
        allowed = ", ".join(names)
        raise ValueError(f"job {job} has no parameter {name!r}; allowed: {allowed}.{did_you_mean(str(name), names)}")
    try:
        return param.check(value)
    except ValueError as error:
        means = f"; it means: {param.description}" if param.description else ""
        raise ValueError(f"job {job}: {error}{means}") from None


def complete_params(job: str, params: Mapping[str, object]) -> dict[str, ParamValue]:
    """Every parameter of a job: those given, checked, and the defaults of the others.

    Raises:
        ValueError: unknown job or parameter, wrong type, out of range, or values that do not go together.
    """
    info = job_info(job)
    title = JobKey.of(job).path
    complete = {param.name: param.default for param in info.params if not param.is_required}
    complete.update({name: check_param(job, name, value) for name, value in params.items()})
    missing = [param.name for param in info.params if param.name not in complete]
    if missing:
        raise ValueError(f"job {title}: no value for {', '.join(missing)}; give it in job.params or search.space")
    for multiple, divisor in info.divisible:
        number, by = complete[multiple], complete[divisor]
        if isinstance(number, int) and isinstance(by, int) and number % by:
            nearest = f"{number - number % by} and {number - number % by + by}" if number > by else f"{by}"
            raise ValueError(
                f"job {title}: {multiple}={number} is not a multiple of {divisor}={by}; nearest that is: {nearest}"
            )
    return complete
