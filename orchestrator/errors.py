"""Every deliberate error of the orchestrator, in one tree.

    OrchestratorError
    |- ConfigError         the run file or a command-line argument is wrong      (exit 2)
    |- RequestError        what was asked of a running run cannot be done         (exit 2)
    |- UnfitEnvironmentError  the machine or the cluster lacks something          (exit 3)
    |- PlanError           a policy raised, overran or returned an illegal plan
    |- ApplyError          a trial could not apply an allocation
    |  |- OutOfMemoryError   a step needs more memory than there is
    |  `- TierError          a user's function raised in a cheaper tier than the one it began in
    |- FunctionError       a user's training function reported nothing, or nothing that the search can use
    |- TelemetryError      a record that cannot be true, or a damaged table
    |- ShareError          a share cannot be enforced as asked
    |- CheckpointError     a checkpoint is missing, damaged or does not fit
    |  |- DamagedError       neither it nor one before it is as it was written
    |  `- NoRoomError        the disk has no room for it
    |- JournalError        the journal cannot be read or written
    |- TraceError          a trace or workload file is malformed                  (exit 2)
    `- WorkerGroupError    a slot or its worker group failed

A message says what failed, the value seen, what is allowed and what to do. Every class survives pickling: Ray does it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from orchestrator.policies.plan import Settings

EXIT_DONE, EXIT_FAILED, EXIT_SOME_FAILED, EXIT_INTERRUPTED, EXIT_TERMINATED = 0, 1, 4, 130, 143
"""What the command line returns; 2 and 3 are those of the errors below."""


class OrchestratorError(Exception):
    """Base of all deliberate errors.

    Attributes:
        exit_code: what the command line returns for it.
        code: one word for programs, in what `--json` prints.
    """

    exit_code = 1
    code = "failed"


class ConfigError(OrchestratorError):
    """A user's mistake in a run file or an argument.

    Attributes:
        text: the message without its place.
        file: the run file, if one is to blame.
        line: 1-based line in it, if known.
        key: dotted path of the key, if known.
    """

    exit_code = 2
    code = "input"

    def __init__(
        self, text: str, file: Path | str | None = None, line: int | None = None, key: str | None = None
    ) -> None:
        self.text, self.file, self.line, self.key = text, file, line, key
        place = "" if file is None else f"{file}:{line}: " if line is not None else f"{file}: "
        super().__init__(f"{place}{key}: {text}" if key else f"{place}{text}")

    def __reduce__(self) -> tuple[type[ConfigError], tuple[object, ...]]:
        """Pickle by constructor arguments, not by the formatted message."""
        return type(self), (self.text, self.file, self.line, self.key)


class UnfitEnvironmentError(OrchestratorError):
    """The machine or the cluster lacks something a run needs."""

    exit_code = 3
    code = "environment"


class RequestError(OrchestratorError):
    """What was asked of a running run cannot be done.

    Attributes:
        code: why: no_trial, no_commit, trial_ended, not_paused, run_ended, run_stopping, run_lost or timeout.
    """

    exit_code = 2

    def __init__(self, text: str, code: str) -> None:
        self.text, self.code = text, code
        super().__init__(text)

    def __reduce__(self) -> tuple[type[RequestError], tuple[object, ...]]:
        """Pickle by constructor arguments."""
        return type(self), (self.text, self.code)


class PlanError(OrchestratorError):
    """A policy raised, overran its deadline or returned an illegal plan."""


class FunctionError(OrchestratorError):
    """A user's training function ended without a report, or its report lacks the metric of the search."""


class ApplyError(OrchestratorError):
    """A trial could not apply an allocation."""


class OutOfMemoryError(ApplyError):
    """A step needs more memory than there is.

    Attributes:
        settings: the dials with which the trial shall begin again from its last commit (`policies.plan.Settings`).
        is_final: whether it shall not: all attempts are used up.
    """

    def __init__(self, text: str, settings: Settings | None = None, *, is_final: bool = False) -> None:
        self.text, self.settings, self.is_final = text, settings, is_final
        super().__init__(text)

    def __reduce__(self) -> tuple[Callable[..., OutOfMemoryError], tuple[object, ...]]:
        """Pickle by constructor arguments."""
        return partial(type(self), is_final=self.is_final), (self.text, self.settings)


class TierError(ApplyError):
    """A user's function raised in a cheaper tier than the one it began in; its cause is what the function raised."""


class TelemetryError(OrchestratorError):
    """A record that cannot be true, or a telemetry table that cannot be read."""


class ShareError(OrchestratorError):
    """A share cannot be enforced as asked."""


class CheckpointError(OrchestratorError):
    """A checkpoint is missing, damaged or does not fit the trial."""


class DamagedError(CheckpointError):
    """Neither a checkpoint nor one before it is as it was written."""


class NoRoomError(CheckpointError):
    """The disk has no room for a checkpoint; nothing of it was kept, and it may be tried again."""


class JournalError(OrchestratorError):
    """The journal cannot be read or written."""


class TraceError(OrchestratorError):
    """A trace or workload file is malformed."""

    exit_code = 2


class WorkerGroupError(OrchestratorError):
    """A slot or its worker group failed. `story` holds the last events of the trial, oldest first."""

    def __init__(self, text: str, story: tuple[str, ...] = ()) -> None:
        self.text, self.story = text, story
        super().__init__("\n  ".join((text, *story)))

    def __reduce__(self) -> tuple[type[WorkerGroupError], tuple[object, ...]]:
        """Pickle by constructor arguments."""
        return type(self), (self.text, self.story)
