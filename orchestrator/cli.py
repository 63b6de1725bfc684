"""The command line: `orchestrator COMMAND`.

Holds the group, the one rule that turns errors into exit codes, and nothing of what the commands do; they live in
`orchestrator.commands` and import what they need when they run, so that `--help` is quick. Neither torch nor ray is
imported here. Called by the `orchestrator` script and by `python -m orchestrator`.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import os
import sys
from collections.abc import Sequence

import click

from orchestrator.errors import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_TERMINATED,
    OrchestratorError,
    UnfitEnvironmentError,
)
from orchestrator.host import require_linux
from orchestrator.interrupts import terminable
from orchestrator.output import give_up, open_standard_streams

logger = logging.getLogger(__name__)

ERROR_SCHEMA = 1
"""Of the object that a command with `--json` prints where it fails."""
COMPLETE_VARIABLE = "_ORCHESTRATOR_COMPLETE"

# command -> (module, one line for the list of commands); the module is imported when the command is used.
COMMANDS: dict[str, tuple[str, str]] = {
    "init": ("orchestrator.commands.files", "Write a commented run file to start from."),
    "run": ("orchestrator.commands.files", "Run the search that a run file describes."),
    "check": ("orchestrator.commands.files", "Validate a run file and show where each value comes from."),
    "list": ("orchestrator.commands.runs", "List runs and their states."),
    "watch": ("orchestrator.commands.runs", "Watch a run: trials, dials, devices, decisions."),
    "stop": ("orchestrator.commands.runs", "Stop a run so that it can be resumed."),
    "resume": ("orchestrator.commands.runs", "Go on with a stopped or broken run."),
    "wait": ("orchestrator.commands.steer", "Wait until a run is done, or has come so far."),
    "add": ("orchestrator.commands.steer", "Add one more trial to a running search."),
    "clone": ("orchestrator.commands.steer", "Add a trial that goes on from the state of another."),
    "pause": ("orchestrator.commands.steer", "Let a trial commit and leave until it is resumed."),
    "set": ("orchestrator.commands.steer", "Change the priority, weight ... of a run or a trial."),
    "logs": ("orchestrator.commands.steer", "Print the end of a trial's log."),
    "explain": ("orchestrator.commands.after", "Explain a decision: what was weighed, chosen and gained."),
    "report": ("orchestrator.commands.after", "Write a run, or several, as one HTML page to look at."),
    "export": ("orchestrator.commands.after", "Write the best trial's model as files that plain PyTorch loads."),
    "verify": ("orchestrator.commands.after", "Check a run's journal and telemetry for violations."),
    "repair": ("orchestrator.commands.after", "Make a damaged journal whole, as far as it can be."),
    "up": ("orchestrator.commands.cluster", "Let the runs of a cluster share one policy actor."),
    "down": ("orchestrator.commands.cluster", "End the policy actor that runs share."),
    "queue": ("orchestrator.commands.cluster", "Show who holds and waits for what on a cluster."),
    "simulate": ("orchestrator.commands.simulate", "Simulate a workload, or take a run's decisions again."),
    "doctor": ("orchestrator.commands.machine", "Check this machine: versions, devices, ports, disk."),
    "clean": ("orchestrator.commands.machine", "Find and remove what killed runs left on this host."),
    "schema": ("orchestrator.commands.files", "Print the JSON schema of run files, for editors."),
    "completion": ("orchestrator.commands.machine", "Print the completion script of a shell."),
}


_NEED_LINUX = ("run", "resume", "stop", "doctor", "clean")


class CommandTable(click.Group):
    """A click group that imports a command's module only when that command is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click fixes the signature
        """Names of all commands, in the order of a run's life."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        """Import and return one command; None for an unknown one, which click reports with a suggestion."""
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(COMMANDS[cmd_name][0])
        command: click.Command = module.TABLE[cmd_name]
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command that `args` begin with, or say which one was probably meant."""
        if args[0] not in COMMANDS and not args[0].startswith("-"):
            from orchestrator.config.words import did_you_mean, printable

            allowed = f"allowed: {', '.join(COMMANDS)}{did_you_mean(args[0], COMMANDS)}"
            raise click.UsageError(f"no command '{printable(args[0], 60)}'; {allowed}", ctx)
        if args[0] in _NEED_LINUX and not {"--help", "-h"} & set(args):
            require_linux()
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        """List the commands from the table, without importing any."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary) for name, (_, summary) in COMMANDS.items()])


def _version(ctx: click.Context, _parameter: click.Parameter, value: bool) -> None:
    if not value or ctx.resilient_parsing:
        return
    from importlib import metadata

    try:
        installed = metadata.version("ray-orchestrator")
    except metadata.PackageNotFoundError:
        installed = "(not installed, run from its source)"
    click.echo(f"orchestrator {installed}")
    ctx.exit()


EPILOG = """\b
Examples:
  orchestrator init search.yaml
  orchestrator check search.yaml
  orchestrator run search.yaml --set search.num_trials=12
  orchestrator explain demo --decision 7

\b
Exit codes: 0 done, 1 failed, 2 your mistake, 3 this machine lacks something,
4 some trials failed, 130 interrupted, 143 terminated."""


@click.group(
    cls=CommandTable, epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.option(
    "--version", is_flag=True, expose_value=False, is_eager=True, callback=_version, help="Print the version."
)
def orchestrator() -> None:
    """Train many models on few devices: one policy turns share, batch and precision of every trial, live."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; the only place where errors become exit codes."""
    open_standard_streams()
    try:
        with terminable(_TerminatedError):
            code = _run(arguments)
        _flush()
    except BrokenPipeError:
        give_up(sys.stdout)
        return EXIT_FAILED
    except (click.Abort, KeyboardInterrupt):
        _complain("interrupted")
        return EXIT_INTERRUPTED
    except _TerminatedError:
        _complain("terminated")
        return EXIT_TERMINATED
    except OSError as error:
        place = "" if error.filename is None else f"{error.filename}: "
        _complain(f"error: {place}{error.strerror or error}; allowed: what this user may read and write, with room")
        return UnfitEnvironmentError.exit_code
    except Exception:  # the last of three places that may catch everything: a bug must still end with exit code 1
        logger.exception("the command ended with an unexpected error; please report it with the lines below")
        return EXIT_FAILED
    if arguments is None and "ray" in sys.modules:
        _leave(code)
    return code


def _run(arguments: Sequence[str] | None) -> int:
    try:
        code = orchestrator.main(
            None if arguments is None else list(arguments),
            prog_name="orchestrator",
            complete_var=COMPLETE_VARIABLE,
            standalone_mode=False,
        )
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except OrchestratorError as error:
        _complain(f"error: {error}")
        if "--json" in (sys.argv[1:] if arguments is None else arguments):
            problem = {"code": error.code, "message": str(error)}
            click.echo(json.dumps({"schema": ERROR_SCHEMA, "error": problem}, indent=2))
        return error.exit_code
    return code if isinstance(code, int) else 0


class _TerminatedError(BaseException):
    """SIGTERM came while a command ran that does not take it itself."""


def _complain(text: str) -> None:
    """Say what is wrong, where somebody is there to read it; the exit code says it anyway."""
    try:
        click.echo(text, err=True)
    except (OSError, ValueError):
        give_up(sys.stderr)


def _leave(code: int) -> None:
    """End this process at once. All that a run began has ended by now, and what was printed has been passed on; the
    interpreter would take another one or two seconds to unload torch and Ray.
    """
    logging.shutdown()
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.flush()
    os._exit(code)


def _flush() -> None:
    """Pass on what was printed, and keep the interpreter from trying it again at its end where that fails."""
    try:
        sys.stdout.flush()
    except OSError:
        give_up(sys.stdout)
        raise
