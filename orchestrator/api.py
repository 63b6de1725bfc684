"""The orchestrator from Python: `run` starts a run and waits for it, `Run` is what came of one.

A run is a process of its own, the same as `orchestrator run FILE`: so it works in a script, a thread and a notebook
alike, and leaves nothing in the process that asked for it. Imported when `run` or `Run` is asked for.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from orchestrator.errors import ConfigError, OrchestratorError
from orchestrator.jobs.job_key import JobKey
from orchestrator.jobs.own import PICKLE_SUFFIX, digest_of
from orchestrator.run_dirs import find_run, read_status
from orchestrator.run_process import execute, status_of
from orchestrator.space import as_space
from orchestrator.storage_trust import require_trusted
from orchestrator.view.notebook import LiveTable, notebook, status_html
from orchestrator.view.text import dicts, mapping

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

    from orchestrator.telemetry.load import RunTables
    from orchestrator.train.export import Source

Training = Callable[..., object] | str | Path | Mapping[str, Any]
_SEARCH = ("space", "metric", "mode", "num_trials", "max_concurrent", "algorithm", "scheduler")
_JOB = ("kind", "data", "args")


def run(
    training: Training,
    *,
    name: str | None = None,
    storage: str | Path = "runs",
    params: Mapping[str, Any] | None = None,
    quiet: bool = False,
    **options: Any,  # noqa: ANN401 - values of a run file
) -> Run:
    """Run a search and wait for its end.

    Args:
        training: a function or class, its import path, a run file, or the content of one as a dict.
        name: of the run; by default that of the training and the time.
        storage: directory of all runs.
        params: parameters that are the same for every trial.
        quiet: print nothing.
        options: `space`, `metric`, `mode`, `num_trials`, `max_concurrent`, `algorithm` and `scheduler` of the search,
            `kind`, `data` and `args` of the job, where `data` may be a class or function, and whole sections of the
            run file (`trial`, `dials`, `policy`, `devices` ...) as dicts. In `space` a list
            is a choice, and Ray Tune's `tune.uniform` and the like work as the run file's `{uniform: [0, 1]}` does.

    Returns:
        The run; trials that failed are in it.

    Raises:
        ConfigError: something of it is wrong.
        UnfitEnvironmentError: this machine lacks something.
        OrchestratorError: no trial ended well.
        KeyboardInterrupt: it was interrupted; the run can be resumed.
    """
    with run_file_of(training, name=name, storage=storage, params=params, **options) as (file, settings):
        arguments = [part for setting in settings for part in ("--set", setting)]
        screen = None if quiet else notebook()
        with contextlib.nullcontext() if screen is None else LiveTable(screen, status_of(file, settings)):
            return Run(execute([str(file), *arguments], quiet=quiet, has_table=screen is not None))


@contextmanager
def run_file_of(
    training: Training,
    *,
    name: str | None = None,
    storage: str | Path = "runs",
    params: Mapping[str, Any] | None = None,
    **options: Any,  # noqa: ANN401 - values of a run file
) -> Iterator[tuple[Path, Sequence[str]]]:
    """The run file for what `run` takes, and settings to go before it; a file that is made is there meanwhile."""
    if isinstance(training, Path) or (isinstance(training, str) and ":" not in training):
        yield Path(training), _overrides(name, storage, params, options)
        return
    with tempfile.TemporaryDirectory(prefix="orchestrator-") as folder:
        content = _content(training, Path(folder), name, storage, params, options)
        file = Path(folder) / "run.yaml"
        file.write_text(yaml.safe_dump(content, sort_keys=False))
        yield file, []


class Run:
    """A run that has ended, or goes on: read from its directory when it is asked.

    Args:
        path: the run directory, or the name of a run.
        trust_storage: read checkpoints also where others can write the directory.

    Attributes:
        path: the run directory.
    """

    def __init__(self, path: str | Path, *, trust_storage: bool = False) -> None:
        self.path, self._trusts_storage = find_run(str(path), Path("runs")), trust_storage

    def __repr__(self) -> str:
        trials = dicts(self._status.get("trials"))
        return f"Run({str(self.path)!r}: {self.state}, {len(trials)} trials)"

    def _repr_html_(self) -> str:
        """As a notebook shows it."""
        return status_html(self._status) if self._status else f"<p>{escape(repr(self))}</p>"

    @property
    def state(self) -> str:
        """running, done, failed, interrupted ..."""
        return str(self._status.get("state", "starting"))

    @property
    def trials(self) -> pd.DataFrame:
        """One row per trial, best first: its state, the search's metric, and a column for each parameter."""
        import pandas as pd

        from orchestrator.view.report import rank

        metric = str(self._status.get("metric"))
        rows = [
            {
                "trial_id": trial.get("trial_id"),
                "state": trial.get("state"),
                metric: trial.get("metric_value"),
                **mapping(trial.get("params")),
                "step": trial.get("step"),
                "num_samples": trial.get("num_samples"),
                "error": trial.get("error"),
            }
            for trial in rank(dicts(self._status.get("trials")), str(self._status.get("mode")))
        ]
        return pd.DataFrame(rows)

    @property
    def best(self) -> BestTrial:
        """The trial whose best report with a checkpoint is the best of all.

        Raises:
            OrchestratorError: no trial has a checkpoint.
        """
        return BestTrial(source=self.source())

    @property
    def tables(self) -> RunTables:
        """Every step, device sample, result and plan as Arrow tables."""
        from orchestrator.telemetry.load import load_run

        return load_run(self.path)

    def explain(self, decision: int | None = None) -> str:
        """All decisions as text, or one of them in full."""
        from orchestrator.view import explain as view

        return view.render(view.explain(self.path, decision))

    def export(self, output: str | Path, trial: str | None = None) -> str:
        """Write the best trial's model, or that of `trial`, into a new directory; returns the line that loads it.

        Raises:
            ConfigError: there is no such trial, or the directory is not empty.
            OrchestratorError: it has no checkpoint.
        """
        from orchestrator.train.export import export

        return export(self.source(trial), Path(output))

    def add(self, *, request_id: str | None = None, **params: Any) -> str:  # noqa: ANN401 - values of any training
        """Add one more trial to a run that goes on, beside its search; returns the trial's id.

        Raises:
            ConfigError: a parameter is wrong, or one is missing.
            RequestError: the run has ended, or does not answer.
        """
        return str(self._ask("add", "", params, request_id)["trial_id"])

    def clone(self, trial: str, *, request_id: str | None = None, **params: Any) -> str:  # noqa: ANN401
        """Add a trial that goes on behind the newest report of another, with other parameters; returns its id."""
        return str(self._ask("clone", trial, params, request_id)["trial_id"])

    def pause(self, trial: str, *, request_id: str | None = None) -> None:
        """Let a trial commit and leave its slot until it is resumed."""
        self._ask("pause", trial, {}, request_id)

    def resume(self, trial: str, *, request_id: str | None = None) -> None:
        """Let a trial go on that was paused, was stopped, or failed."""
        self._ask("resume", trial, {}, request_id)

    def stop(self, trial: str, *, request_id: str | None = None) -> None:
        """Stop a trial; its commits stay."""
        self._ask("stop", trial, {}, request_id)

    def set(self, trial: str = "", *, request_id: str | None = None, **terms: Any) -> None:  # noqa: ANN401
        """Change what the run, or a trial, asks of the policy: `priority=2`, `weight=3.0`, `deadline=...`."""
        self._ask("set", trial, terms, request_id)

    def wait(self, until: str = "done", timeout_s: float | None = None) -> bool:
        """Wait for done, first-report, best<1.2 or best>0.9; False where the run ended without.

        Raises:
            RequestError: it has not happened within `timeout_s`.
        """
        from orchestrator import steer

        return bool(steer.wait(self.path, until, timeout_s)["is_reached"])

    def source(self, trial_id: str | None = None) -> Source:
        """What `export` reads: the best commit of a trial, by default of the best one.

        Raises:
            ConfigError: there is no such trial, or others can have written the checkpoints.
            OrchestratorError: there is no commit.
        """
        from orchestrator.train import best
        from orchestrator.train.checkpoint import newest
        from orchestrator.train.export import Source

        require_trusted(self.path, is_trusted=self._trusts_storage)
        status = self._status
        trials = {str(trial.get("trial_id")): trial for trial in dicts(status.get("trials"))}
        if trial_id is not None and trial_id not in trials:
            raise ConfigError(
                f"{self.path} has no trial {trial_id!r}; allowed: {', '.join(trials) or 'none'}", "--trial"
            )
        job = self._job()
        found: list[tuple[str, Path, float | None]] = []
        for name in trials if trial_id is None else [trial_id]:
            commits = self.path / "trials" / name / "checkpoints"
            noted = best.read(commits)
            if noted is not None and (commits / noted.commit).is_dir():
                found.append((name, commits / noted.commit, noted.value))
            elif (commit := newest(commits)) is not None:
                found.append((name, commit, None))
        if not found:
            whose = "no trial has" if trial_id is None else f"{trial_id} has no"
            raise OrchestratorError(f"{whose} a checkpoint in {self.path}; a function reports one with its metrics")
        sign = -1.0 if status.get("mode") == "max" else 1.0
        name, commit, value = min(found, key=lambda each: (each[2] is None, sign * (each[2] or 0.0)))
        params = {**dict(job.get("params", {})), **mapping(trials[name].get("params"))}
        metric = str(status.get("metric"))
        key = JobKey(
            path=job["name"], kind=job.get("kind", "auto"), data=job.get("data"), args=job.get("args") or {}
        ).text
        return Source(trial_id=name, job=key, params=params, commit=commit, metric=metric, value=value)

    def _ask(self, command: str, trial: str, values: Mapping[str, Any], request_id: str | None) -> dict[str, Any]:
        from orchestrator import steer

        return steer.ask(self.path, command, trial, values, request_id=request_id)

    @property
    def _status(self) -> Mapping[str, Any]:
        return read_status(self.path) or {}

    def _job(self) -> dict[str, Any]:
        """The section `job` of the run file; a training of the user's own can be imported from here on."""
        from orchestrator.jobs.own import add_import_paths

        job: dict[str, Any] = yaml.safe_load((self.path / "run.yaml").read_text())["job"]
        add_import_paths(job.get("import_paths", ()))
        return job


@dataclass(frozen=True, slots=True, kw_only=True)
class BestTrial:
    """The best trial of a run, at its best report."""

    source: Source

    @property
    def trial_id(self) -> str:
        """Its name."""
        return self.source.trial_id

    @property
    def params(self) -> dict[str, Any]:
        """Its parameters, the fixed ones included."""
        return dict(self.source.params)

    @property
    def value(self) -> float | None:
        """The metric of the search in its best report."""
        return self.source.value

    @property
    def checkpoint(self) -> Path:
        """The directory of that report's commit."""
        return self.source.commit

    def state_dict(self) -> dict[str, Tensor]:
        """Its weights by name, on the CPU.

        Raises:
            CheckpointError: the commit is damaged, or a function's files do not say which of them holds weights.
        """
        from orchestrator.train.export import state_dict

        return state_dict(self.source)


def _content(
    training: Callable[..., object] | str | Mapping[str, Any] | Path,
    folder: Path,
    name: str | None,
    storage: str | Path,
    params: Mapping[str, Any] | None,
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """The content of a run file."""
    content: dict[str, Any] = dict(training) if isinstance(training, Mapping) else {"job": _job_of(training, folder)}
    content.update({key: value for key, value in options.items() if key not in (*_SEARCH, *_JOB)})
    content["job"] = _with_data(content["job"], {key: options[key] for key in _JOB if key in options}, folder)
    search = {**content.get("search", {}), **{key: options[key] for key in _SEARCH if key in options}}
    if callable(search.get("space")):
        function = _job_of(search["space"], folder)
        paths = dict.fromkeys([*content["job"].get("import_paths", ()), *function["import_paths"]])
        search["space"], content["job"] = function["name"], {**content["job"], "import_paths": list(paths)}
    elif "space" in search:
        search["space"] = as_space(search["space"])
    if isinstance(search.get("scheduler"), str):
        search["scheduler"] = {"name": search["scheduler"]}
    if isinstance(content.get("policy"), str):
        content["policy"] = {"name": content["policy"]}
    if search:
        content["search"] = search
    if params:
        content["job"] = {**content["job"], "params": {**content["job"].get("params", {}), **params}}
    if name is not None or "name" not in content:
        what = str(content["job"].get("name", "run")).rpartition(":")[2].rpartition(".")[2].strip("_<>") or "run"
        content["name"] = name or f"{what}-{time.strftime('%Y%m%d-%H%M%S')}"
    if str(storage) != "runs" or "storage" not in content:
        content["storage"] = str(storage)
    return content


def _job_of(training: Callable[..., object] | str | Path, folder: Path) -> dict[str, Any]:
    """The section `job` for a training: its import path, or a file that holds it, where it has none."""
    script = getattr(sys.modules.get("__main__"), "__file__", None)
    paths = list(dict.fromkeys([str(Path.cwd()), *([str(Path(script).absolute().parent)] if script else [])]))
    if not callable(training):
        return {"name": str(training), "import_paths": paths}
    found = _import_path(training)
    if found is not None:
        return {"name": found, "import_paths": [*paths, *_directories_of(found)]}
    from ray import cloudpickle

    draft = folder / f"function{PICKLE_SUFFIX}"
    draft.write_bytes(cloudpickle.dumps(training))
    shipped = draft.rename(folder / f"function-{digest_of(draft)[:16]}{PICKLE_SUFFIX}")
    name = getattr(training, "__name__", type(training).__name__).strip("<>")
    return {"name": f"{shipped.name}:{name}", "import_paths": [str(folder), *paths]}


def _with_data(job: Mapping[str, Any], given: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The section `job` with what else was given for it; data that is a class or function is named, or shipped."""
    if not callable(given.get("data")):
        return {**job, **given}
    data = _job_of(given["data"], folder)
    paths = dict.fromkeys([*job.get("import_paths", ()), *data["import_paths"]])
    return {**job, **given, "data": data["name"], "import_paths": list(paths)}


def _import_path(training: Callable[..., object]) -> str | None:
    """The path that leads to the very same object in another process; None for what lives in this one only."""
    module, name = getattr(training, "__module__", None), getattr(training, "__qualname__", "<")
    if module in {None, "__main__", "__mp_main__"} or "<" in name:
        return None
    found: Any = sys.modules.get(str(module))
    for part in name.split("."):
        found = getattr(found, part, None)
    return f"{module}:{name}" if found is training else None


def _directories_of(path: str) -> list[str]:
    """The directory in which the outermost package of an import path lies."""
    package = importlib.import_module(path.partition(":")[0].partition(".")[0])
    file = getattr(package, "__file__", None)
    if file is None:
        return [str(Path(each).parent) for each in getattr(package, "__path__", ())]
    return [str(Path(file).parents[1 if Path(file).stem == "__init__" else 0])]


def _overrides(
    name: str | None, storage: str | Path, params: Mapping[str, Any] | None, options: Mapping[str, Any]
) -> Sequence[str]:
    """Settings, `a.b=value`, for what was given beside a run file."""
    sections = {**dict.fromkeys(_SEARCH, "search."), **dict.fromkeys(_JOB, "job.")}
    values = {f"{sections.get(key, '')}{key}": value for key, value in options.items()}
    values |= {f"job.params.{key}": value for key, value in (params or {}).items()}
    values |= {"name": name} if name is not None else {}
    values |= {"storage": str(storage)} if str(storage) != "runs" else {}
    return [f"{key}={json.dumps(value)}" for key, value in values.items()]
