"""What is checked and written before a run starts, and what is read of it before it goes on.

Nothing here starts a process. Called by the driver, and for a search of the user's own by `orchestrator.tune`.
"""

from __future__ import annotations

import dataclasses
import os
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path

from orchestrator.config import ResolvedRun, load_config
from orchestrator.config.model import RunConfig
from orchestrator.config.render import scalar
from orchestrator.config.source import read_text
from orchestrator.control.journal import FILE_NAME as JOURNAL_NAME
from orchestrator.control.journal import has_entries, read_run
from orchestrator.errors import ConfigError, OrchestratorError, UnfitEnvironmentError
from orchestrator.host import num_usable_cores
from orchestrator.jobs.own import PICKLE_SUFFIX
from orchestrator.names import write_atomically
from orchestrator.output import say
from orchestrator.policies import build_policy
from orchestrator.room import is_full, words
from orchestrator.run_dirs import BEGUN_FILE, RUN_FILE, SCHEMA, read_status, run_file_schema, with_schema
from orchestrator.run_spec import middle_params
from orchestrator.train.epoch_size import num_samples


def require_policy(resolved: ResolvedRun) -> None:
    """Build the policy once before anything starts: `check` runs no code of the user's, and its actor comes late.

    Raises:
        ConfigError: there is no such policy, or it refuses its parameters.
    """
    policy = resolved.config.policy
    try:
        build_policy(policy.name, policy.params)
    except ValueError as error:
        raise resolved.place.error(("policy",), str(error)) from error


def within_quota(resolved: ResolvedRun) -> ResolvedRun:
    """The same run on no more cores than this process's container may use, where it says nothing of cores.

    Not written to the run file: a run may be resumed in another container.
    """
    cluster, cores = resolved.config.cluster, num_usable_cores()
    if cluster.address != "local" or cluster.num_cpus is not None or cores == len(os.sched_getaffinity(0)):
        return resolved
    cluster = cluster.model_copy(update={"num_cpus": cores})
    return dataclasses.replace(resolved, config=resolved.config.model_copy(update={"cluster": cluster}))


def with_counted_epochs(resolved: ResolvedRun) -> ResolvedRun:
    """The same run with the samples between two reports as a number, where the run file gives them in epochs.

    They are counted with the first value of each searched parameter: the data is one and the same for all trials.

    Raises:
        ConfigError: the data cannot be loaded, or has no length.
    """
    config, trial = resolved.config, resolved.config.trial
    if trial.epochs_per_report is None:
        return resolved
    try:
        found = num_samples(config.job.key, middle_params(config), config.job.import_paths)
    except OrchestratorError as error:
        text = f"the samples of an epoch cannot be counted: {error}"
        raise resolved.place.error(("trial", "epochs_per_report"), text) from None
    samples = found * trial.epochs_per_report
    largest = max(trial.global_batch, config.dials.batch.max_global if config.dials.batch.enabled else 1)
    if samples < largest:
        text = f"{trial.epochs_per_report} epochs are {samples} samples; allowed: at least a step, of {largest}"
        raise resolved.place.error(("trial", "epochs_per_report"), f"{text} with dials.batch.max_global")
    say(f"{found} samples per epoch; a report every {samples}")
    counted = trial.model_copy(update={"samples_per_report": samples, "epochs_per_report": None})
    return dataclasses.replace(resolved, config=config.model_copy(update={"trial": counted}))


def make_run_dir(resolved: ResolvedRun) -> None:
    """The directory of a new run, with its run file.

    Raises:
        ConfigError: it cannot be made there.
        UnfitEnvironmentError: the disk is full.
    """
    run_dir = resolved.run_dir
    try:
        run_dir.mkdir(parents=True, mode=0o700)
        _ship_functions(resolved.config, run_dir)
        (run_dir / BEGUN_FILE[0]).mkdir()
        for place in (run_dir.joinpath(*BEGUN_FILE), run_dir / RUN_FILE):
            write_atomically(place, with_schema(resolved.to_yaml(with_origins=True)))
    except FileExistsError:
        raise ConfigError(f"{run_dir} exists already; allowed: another name, or `orchestrator resume`") from None
    except OSError as error:
        if is_full(error):
            shutil.rmtree(run_dir, ignore_errors=True)
            raise UnfitEnvironmentError(f"storage: {words(run_dir)}; then start the run again") from None
        raise ConfigError(
            f"storage: {run_dir} cannot be made ({error.strerror}); allowed: a directory that you may write to"
        ) from None


def load_begun(run_dir: Path, overrides: Sequence[str] = ()) -> ResolvedRun:
    """The configuration that a run began with; says so where its run file was edited since.

    Parameters of trials, plans and reports of an earlier start are in the journal and belong to that configuration.
    `overrides` are laid over it, to see whether such values would be right.

    Raises:
        ConfigError: it cannot be read, or a newer version wrote it.
    """
    begun, shown = run_dir.joinpath(*BEGUN_FILE), run_dir / RUN_FILE
    if not begun.exists():  # a run of an earlier version
        begun = shown
    schema = run_file_schema(read_text(begun))
    if schema > SCHEMA:
        raise ConfigError(f"was written by a newer version (schema {schema}); allowed: up to schema {SCHEMA}", begun, 1)
    place = [f"storage={scalar(str(run_dir.parent))}", f"name={scalar(run_dir.name)}"]
    resolved = load_config(begun, [*place, *overrides], has_own_search=True)  # it was looked at when the run began
    if not overrides and begun != shown and shown.exists() and read_text(shown) != read_text(begun):
        command = f"orchestrator run {shlex.quote(str(shown))} --set name=NEW"
        say(f"{shown} was edited since the run began; what counts is what it began with ({begun}). As a run: {command}")
    return resolved


def require_history(run_dir: Path) -> None:
    """Refuse to begin a run from its start whose trials have run already.

    Raises:
        ConfigError: its journal is empty or gone.
        JournalError: it is damaged, or a newer version wrote it.
    """
    journal = run_dir / JOURNAL_NAME
    if has_entries(run_dir):
        for _ in read_run(run_dir):
            pass
        return
    status = read_status(run_dir) or {}
    if any(path.name != "warm-up" for path in run_dir.glob("trials/*")) or status.get("trials"):
        raise ConfigError(
            f"{journal} is empty or gone although trials ran: what they had done is not known;"
            " allowed: a run with its journal. Restore it, or begin a new run under another name"
        )


def _ship_functions(config: RunConfig, run_dir: Path) -> None:
    """Copy what has no import path into the run directory, where workers and `resume` look for it first."""
    for name in (each.partition(":")[0] for each in config.import_names):
        found = next((Path(path) / name for path in config.job.import_paths if (Path(path) / name).is_file()), None)
        if name.endswith(PICKLE_SUFFIX) and found is not None:
            shutil.copyfile(found, run_dir / name)
