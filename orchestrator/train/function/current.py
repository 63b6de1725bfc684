"""The attempt that runs in this process now, for calls that a user's function makes: report, checkpoint, trial.

One process runs one function at a time. Outside of a trial there is none, and such calls do nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from orchestrator.control.orders import TrialOrder
    from orchestrator.train.groups import Ranks


class Running(Protocol):
    """What a running function can ask for."""

    def report(self, metrics: Mapping[str, Any], checkpoint: Path | None) -> None:
        """Tell the search of results, with a directory that holds the state behind them."""
        ...

    def watch(self, model: object, optimizer: object, loader: object) -> None:
        """Keep the state of a model, and probe precision tiers with it."""
        ...

    @property
    def checkpoint(self) -> Path | None:
        """The directory that the newest checkpoint was kept in, None where there is none."""
        ...

    @property
    def num_reports(self) -> int:
        """Reports made, those of earlier attempts included from whose state this one goes on."""
        ...

    @property
    def info(self) -> TrialInfo:
        """Who is asking."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialInfo:
    """A trial as its own training sees it.

    Attributes:
        trial_id: unique in the run.
        run: name of the run.
        directory: the trial's own; its working directory is `work` below it.
        rank: of this process, from 0.
        world_size: ranks of this trial.
        attempt: 0 for the first, more after an interruption.
    """

    trial_id: str
    run: str
    directory: Path
    rank: int
    world_size: int
    attempt: int

    @classmethod
    def of(cls, trial: TrialOrder, directory: Path, ranks: Ranks) -> TrialInfo:
        """What a rank of that trial says of itself."""
        run = directory.parents[1].name
        return cls(
            trial_id=trial.trial_id,
            run=run,
            directory=directory,
            rank=ranks.rank,
            world_size=ranks.world_size,
            attempt=trial.attempt,
        )


class _Now:
    running: Running | None = None


def running() -> Running | None:
    """The function attempt of this process, None outside of one."""
    return _Now.running


@contextmanager
def running_as(attempt: Running) -> Iterator[None]:
    """Make `attempt` the one that runs."""
    before, _Now.running = _Now.running, attempt
    try:
        yield
    finally:
        _Now.running = before
