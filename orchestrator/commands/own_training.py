"""What `init` writes for a training of the user's own: the lines of a run file, and a training where there is none yet.

Parameters, metric and kind are read from the training; what cannot be known is written so that `check` asks for it.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from orchestrator.config.words import printable
from orchestrator.errors import ConfigError
from orchestrator.jobs.job_key import JobKey
from orchestrator.jobs.own import UserCodeError, add_import_paths, load
from orchestrator.jobs.param import JobInfo, Param, ParamKind
from orchestrator.jobs.table import job_info

_COMMENT_COLUMN = 33
_RATES = ("lr", "learning_rate")
_REPORTED = re.compile(r"(?:report|log_dict|log)\(\s*(?:\{([^}]*)\}|[\"']([^\"']+)[\"'])")
_KEY = re.compile(r"[\"']([^\"']+)[\"']\s*:")
_HIGHER_IS_BETTER = re.compile(r"acc|auc|f1|dice|iou|reward|score|r2|bleu")

FUNCTION = '''"""A training function: one call is one trial."""

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import orchestrator


def {name}(lr: float = 0.01, width: int = 32, epochs: int = 4):
    torch.manual_seed(0)
    x = torch.randn(2048, 8)
    y = (x[:, :3].sum(1) > 0).long()
    train, held_out = TensorDataset(x[:1536], y[:1536]), (x[1536:], y[1536:])
    model = nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    for _ in range(epochs):
        for features, labels in DataLoader(train, batch_size=32, shuffle=True):
            loss = nn.functional.cross_entropy(model(features), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            val_loss = nn.functional.cross_entropy(model(held_out[0]), held_out[1]).item()
        torch.save(model.state_dict(), "model.pt")  # each trial has a working directory of its own
        orchestrator.report({{"val_loss": val_loss}}, checkpoint=".")
'''

CLASS = '''"""A declared training: its parts, of which the orchestrator makes the steps."""

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class {name}:
    metric, mode = "accuracy", "max"

    def __init__(self, lr: float = 0.01, width: int = 32):
        self.lr, self.width = lr, width
        x = torch.randn(2048, 8, generator=torch.Generator().manual_seed(0))
        y = (x[:, :3].sum(1) > 0).long()
        self.train, self.held_out = TensorDataset(x[:1536], y[:1536]), (x[1536:], y[1536:])

    def build_model(self):
        return nn.Sequential(nn.Linear(8, self.width), nn.ReLU(), nn.Linear(self.width, 2))

    def train_data(self):
        return DataLoader(self.train, shuffle=True)

    def loss(self, model, batch):
        features, labels = batch
        return nn.functional.cross_entropy(model(features), labels)

    def build_optimizer(self, model):
        return torch.optim.AdamW(model.parameters(), lr=self.lr)

    def evaluate(self, model):
        features, labels = self.held_out
        return {{"accuracy": float((model(features).argmax(1) == labels).float().mean())}}
'''


def own_template(text: str, job: str, data: str | None) -> str:
    """The lines of the template `text` for a training named by import path, with data of its own or None.

    Raises:
        ConfigError: it cannot be loaded.
    """
    key = JobKey(path=job, data=data)
    try:
        info = job_info(key.text)
        metric, mode = _metric(info, key)
    except UserCodeError as error:
        raise ConfigError(printable(error.text) + (f"\n{error.details}" if error.details else ""), "--job") from None
    searched = {param.name: _distribution(param) for param in info.params if _is_searched(param)}
    fixed = {param.name: param.default for param in info.params if param.name not in searched}
    if info.kind in {"lightning", "huggingface"}:
        from orchestrator.jobs.ready_made import HUGGINGFACE_ARGS, LIGHTNING_ARGS

        args = {param.name for param in (*HUGGINGFACE_ARGS, *LIGHTNING_ARGS)}
        fixed = {name: value for name, value in fixed.items() if name not in args}
    space = "".join(f"    {name}: {words}\n" for name, words in searched.items())
    lines: Mapping[str, str] = {
        "  params: @PARAMS@ ": f"  params: {_flow(fixed)} ",
        "  data: null ": f"  data: {_flow(data)} ",
        "  metric: null ": f"  metric: {_flow(metric)} ",
        "  mode: null ": f"  mode: {mode} ",
        "    lr: @LR@\n    width: @WIDTH@\n": space,
        **_trial_lines(info),
    }
    for before, after in lines.items():
        text = text.replace(before, after)
    text = text if space else text.replace("  space:  ", "  space: {}  ")
    return "\n".join(_aligned(line) for line in text.split("\n"))


def _aligned(line: str) -> str:
    """A line whose comment begins where those of the others do."""
    content, mark, comment = line.partition("  # ")
    return f"{content.rstrip():<{_COMMENT_COLUMN - 2}}{mark}{comment}" if mark and content.strip() else line


def write_training(job: str) -> Path | None:
    """Write a small training into the file that an import path names, if there is no such module; returns it.

    A name that begins with a capital letter becomes a class, any other a function.

    Raises:
        ConfigError: the import path is none, or the file cannot be written.
    """
    module, _, name = job.partition(":")
    parts = [*module.split("."), name]
    if not all(part.isidentifier() for part in parts):
        raise ConfigError(f"got {printable(job, 100)!r}; allowed: a job, or package.module:name of your own", "--job")
    add_import_paths([str(Path.cwd())])
    if _is_there(module):
        return None
    file = Path(*module.split(".")).with_suffix(".py")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("x", encoding="utf-8") as stream:
            stream.write((CLASS if name[0].isupper() else FUNCTION).format(name=name))
    except OSError as error:
        raise ConfigError(f"{file} cannot be written ({error.strerror}); name another module", "--job") from None
    importlib.invalidate_caches()
    return file


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # a package on the way to it is not there
        return False
    except Exception:  # a package on the way raises; loading it says how
        return True


def _is_searched(param: Param) -> bool:
    """Whether a parameter is worth searching as far as its name says: a rate, or a number without a default."""
    is_number = param.kind in {ParamKind.FLOAT, ParamKind.INT}
    is_rate = param.name in _RATES and (param.default is None or isinstance(param.default, float | int))
    return is_rate or (param.is_required and is_number)


def _distribution(param: Param) -> str:
    if param.kind is ParamKind.INT and param.name not in _RATES:
        return "{choice: [16, 32, 64]}"
    middle = float(param.default) if isinstance(param.default, float | int) and param.default > 0 else 1e-2
    return f"{{loguniform: [{_exponent(middle / 10)}, {_exponent(middle * 10)}]}}"


def _exponent(value: float) -> str:
    """A number in the form that YAML reads as one: 1.0e-3."""
    mantissa, _, exponent = f"{value:.1e}".partition("e")
    return f"{mantissa}e{int(exponent)}"


def _metric(info: JobInfo, key: JobKey) -> tuple[str | None, str]:
    """The metric and its mode as the training declares them, else as its source seems to report them."""
    if info.metric:
        return info.metric, info.mode
    try:
        source = inspect.getsource(load(key.path))
    except (OSError, TypeError):
        source = ""
    names = list(_names_in(source))
    held_out = [name for name in names if "val" in name or "eval" in name or "test" in name]
    metric = next(iter([*held_out, *names]), "loss")
    return metric, "max" if _HIGHER_IS_BETTER.search(metric) else "min"


def _names_in(source: str) -> Iterator[str]:
    for match in _REPORTED.finditer(source):
        if match[2]:
            yield match[2]
        else:
            yield from _KEY.findall(match[1])


def _trial_lines(info: JobInfo) -> dict[str, str]:
    if info.is_function:
        return {
            "  samples_per_report: 4096 ": "  samples_per_report: null ",
            "  max_reports: 4    ": "  max_reports: null ",
        }
    if info.reports_epochs:
        return {
            "  samples_per_report: 4096 ": "  samples_per_report: null ",
            "  epochs_per_report: null ": "  epochs_per_report: 1    ",
        }
    return {"  samples_per_report: 4096 ": "  samples_per_report: null "} if info.samples_per_report else {}


def _flow(value: Any) -> str:  # noqa: ANN401 - plain data, or whatever a default is
    """A value on one line of YAML; null for one that YAML has no form for."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {_flow(each)}" for name, each in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_flow(each) for each in value) + "]"
    if isinstance(value, float) and math.isfinite(value):
        return _exponent(value) if 0 < abs(value) < 1e-3 and float(_exponent(value)) == value else repr(value)
    return json.dumps(value) if isinstance(value, str | int | bool) else "null"
