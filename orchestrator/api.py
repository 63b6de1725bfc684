"""The orchestrator from Python: `run` starts a run and waits for it, `Run` is what came of one.

A run is a process of its own, the same as `orchestrator run FILE`: so it works in a script, a thread and a notebook
alike, and leaves nothing in the process that asked for it. Imported when `run` or `Run` is asked for.
"""

from __future__ import annotations

import importlib
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from orchestrator.errors import ConfigError, OrchestratorError, UnfitEnvironmentError
from orchestrator.jobs.own import PICKLE_SUFFIX, digest_of
from orchestrator.run_dirs import find_run, read_status
from orchestrator.space import as_distribution
from orchestrator.storage_trust import require_trusted
from orchestrator.view.text import dicts, mapping

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

    from orchestrator.telemetry.load import RunTables
    from orchestrator.train.export import Source

Training = Callable[..., object] | str | Path | Mapping[str, Any]
_SEARCH = ("space", "metric", "mode", "num_trials", "max_concurrent", "algorithm", "scheduler")
_ERRORS = {2: ConfigError, 3: UnfitEnvironmentError}


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
            and whole sections of the run file (`trial`, `dials`, `policy`, `devices` ...) as dicts. In `space` a list
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
        return Run(_execute([str(file), *arguments], quiet=quiet))


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
        return Source(trial_id=name, job=job["name"], params=params, commit=commit, metric=metric, value=value)

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
    content.update({key: value for key, value in options.items() if key not in _SEARCH})
    search = {**content.get("search", {}), **{key: options[key] for key in _SEARCH if key in options}}
    if isinstance(search.get("space"), Mapping):
        search["space"] = {key: as_distribution(key, value) for key, value in search["space"].items()}
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
    values = {f"search.{key}" if key in _SEARCH else key: value for key, value in options.items()}
    values |= {f"job.params.{key}": value for key, value in (params or {}).items()}
    values |= {"name": name} if name is not None else {}
    values |= {"storage": str(storage)} if str(storage) != "runs" else {}
    return [f"{key}={json.dumps(value)}" for key, value in values.items()]


def _execute(arguments: Sequence[str], *, quiet: bool) -> Path:
    """Run `orchestrator run` and pass on what it says; the run directory, which is its last line.

    Raises:
        OrchestratorError: it did not end well; the message is what it said.
    """
    mode = ["--quiet"] if quiet else ["--plain"]
    command = [sys.executable, "-m", "orchestrator", "run", *arguments, *mode]
    with _started(command) as process:
        assert process.stdout is not None
        last, said = "", []
        for line in process.stdout:
            last = line.strip() or last
            said.append(line)
            if not quiet:
                sys.stdout.write(line)
                sys.stdout.flush()
        errors = process.stderr.read() if process.stderr is not None else ""
        code = process.wait()
    if code in {0, 4}:
        return Path(next(line.strip() for line in reversed(said) if Path(line.strip()).is_dir()))
    if code in {130, 143}:
        raise KeyboardInterrupt
    text = errors.strip().removeprefix("error: ") or last or f"the run ended with exit code {code}"
    raise _ERRORS.get(code, OrchestratorError)(text)


@contextmanager
def _started(command: Sequence[str]) -> Iterator[subprocess.Popen[str]]:
    """A process that is told once to stop if this one is interrupted, and waited for."""
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, start_new_session=True) as process:
        try:
            yield process
        except BaseException:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
                process.wait()
            raise
