"""The command line: `orchestrator COMMAND`.

Holds the group, the one rule that turns errors into exit codes, and nothing of what the commands do; they live in
`orchestrator.commands` and import what they need when they run, so that `--help` is quick. Neither torch nor ray is
imported here. Called by the `orchestrator` script and by `python -m orchestrator`.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
from collections.abc import Sequence

import click

from orchestrator.errors import OrchestratorError

logger = logging.getLogger(__name__)

EXIT_FAILED = 1
EXIT_INTERRUPTED = 130
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
    "explain": ("orchestrator.commands.after", "Explain a decision: what was weighed, chosen and gained."),
    "verify": ("orchestrator.commands.after", "Check a run's journal and telemetry for violations."),
    "simulate": ("orchestrator.commands.simulate", "Simulate a workload, or take a run's decisions again."),
    "doctor": ("orchestrator.commands.machine", "Check this machine: versions, devices, ports, disk."),
    "schema": ("orchestrator.commands.files", "Print the JSON schema of run files, for editors."),
    "completion": ("orchestrator.commands.machine", "Print the completion script of a shell."),
}


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
130 interrupted."""


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
    try:
        code = _run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        return _reader_is_gone()
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        return EXIT_INTERRUPTED
    except Exception:  # the last of three places that may catch everything: a bug must still end with exit code 1
        logger.exception("the command ended with an unexpected error; please report it with the lines below")
        return EXIT_FAILED
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
        click.echo(f"error: {error}", err=True)
        return error.exit_code
    return code if isinstance(code, int) else 0


def _reader_is_gone() -> int:
    """`orchestrator list | head -1`: end quietly, and keep the interpreter from flushing into the closed pipe."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
    return EXIT_FAILED
