"""The parts of a declared training by name: which a class must have, and what to write where one is missing; no torch.

`jobs/README.md` explains them. Read by `jobs.own` when the run file is checked, and by `jobs.training`, which calls
them.
"""

from __future__ import annotations

from collections.abc import Iterator

from orchestrator.jobs.param import did_you_mean

SAMPLES = ("train_data", "batch")
STEPS = ("loss", "train_step")
RESULTS = ("evaluate", "eval_data")

NEEDED: tuple[tuple[tuple[str, ...], str], ...] = (
    (("build_model",), "build_model() that returns an nn.Module"),
    (SAMPLES, "train_data() that returns a Dataset, an IterableDataset or a DataLoader"),
    (STEPS, "loss(model, batch) that returns the mean loss, or a pair of the sum and the number of elements"),
    (("build_optimizer",), "build_optimizer(model) that returns an optimizer, or an optimizer and a scheduler"),
    (RESULTS, "evaluate(model) that returns a dict of metrics, or eval_data() for the mean loss of held-out samples"),
)
"""For each part that a training needs: the names of which one is enough, and the first of them in words."""

OPTIONAL = (
    "after_step",
    "blocks",
    "clip_norm",
    "clip_value",
    "depends_on_batch",
    "forward_methods",
    "learning_rate_rule",
    "load_state_dict",
    "metric",
    "mode",
    "monitor",
    "name",
    "note_progress",
    "num_elements",
    "num_train_samples",
    "prepare",
    "reader",
    "samples_per_report",
    "scheduler_interval",
    "state_dict",
    "warmup_steps",
)
"""Parts that have a default."""

_ALL = sorted({*OPTIONAL, *(name for names, _ in NEEDED for name in names)})
_SIGNS = ("build_model", "build_optimizer", "train_data", "train_step")


def is_training(found: type) -> bool:
    """Whether a class is meant as a declared training, complete or not: a part of one or a close misspelling."""
    return any(callable(getattr(found, name, None)) for name in _SIGNS)


def missing_parts(found: type) -> Iterator[str]:
    """What is missing, one phrase for each part."""
    own = [name for name in dir(found) if not name.startswith("_") and name not in _ALL]
    for names, words in NEEDED:
        if not any(callable(getattr(found, name, None)) for name in names):
            close = [word for name in names for word in own if did_you_mean(name, [word])]
            yield words + (f" (it has {close[0]}())" if close else "")
