"""Which commits of a trial a directory holds, and which of them are whole. No tensors; see `checkpoint`."""

from __future__ import annotations

import logging
import re
from pathlib import Path

from orchestrator.errors import CheckpointError, DamagedError
from orchestrator.train import manifest
from orchestrator.train.manifest import Manifest

COMMIT_NAME = re.compile(r"step-(0|[1-9][0-9]{0,17})")
UNFINISHED_NAME = re.compile(COMMIT_NAME.pattern + r"\.(tmp|old)-[0-9a-f]+")

_log = logging.getLogger(__name__)


def verify(path: Path) -> list[str]:
    """What is wrong with the commit in `path`; empty where nothing is. Unpickles nothing."""
    try:
        verified(path)
    except CheckpointError as error:
        return [str(error)]
    return []


def newest(directory: Path) -> Path | None:
    """The newest commit in `directory`, whole or not; None where there is none."""
    return max(commits_in(directory), default=(0, None))[1]


def step_of(path: Path) -> int | None:
    """The step of a commit by its name; None where it is not named like one."""
    match = COMMIT_NAME.fullmatch(path.name)
    return None if match is None else int(match.group(1))


def newest_whole(path: Path, *, also_later: bool = False) -> tuple[Path, Manifest]:
    """The commit in `path`, or the newest before it that verifies, with a warning that says what that costs.

    With `also_later` the newest of all that verify, which is for whoever wants a model and not the trial's course.

    Raises:
        DamagedError: there is none; its text is that of `path` itself.
    """
    try:
        return path, verified(path)
    except CheckpointError as damage:
        step = step_of(path)
        for older, candidate in sorted(commits_in(path.parent), reverse=True):
            if step is None or older == step or (older > step and not also_later):
                continue
            try:
                record = verified(candidate)
            except CheckpointError as error:
                _log.warning("checkpoint.damaged %s is skipped: %s", candidate, error)
                continue
            steps = f"{abs(step - older)} step{'s' * (abs(step - older) != 1)}"
            cost = f"{steps} are done again" if older < step else f"it is {steps} later"
            _log.warning("checkpoint.damaged %s; going on from %s, %s", damage, candidate, cost)
            return candidate, record
        raise DamagedError(str(damage)) from damage


def commits_in(directory: Path) -> list[tuple[int, Path]]:
    """(step, path) of everything in `directory` that is named like a commit."""
    if not directory.is_dir():
        return []
    found = ((COMMIT_NAME.fullmatch(path.name), path) for path in directory.iterdir())
    return [(int(match.group(1)), path) for match, path in found if match is not None]


def verified(path: Path) -> Manifest:
    """The manifest of the commit in `path`, once every file has been found to be as it says.

    Raises:
        CheckpointError: it is not.
    """
    match = COMMIT_NAME.fullmatch(path.name)
    if match is None:
        raise CheckpointError(f"{path} is not named like a commit; allowed: step-<n>, as `commit` names it")
    record = manifest.read(path)
    problems = manifest.problems_of(path, record)
    if record.step != int(match.group(1)):
        problems.append(f"the manifest is of step {record.step}")
    if problems:
        raise CheckpointError(f"{path} is damaged: {'; '.join(problems)}; use an older commit")
    return record
