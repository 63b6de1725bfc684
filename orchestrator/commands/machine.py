"""Commands on this machine: `doctor`, `clean` and `completion`. None imports torch or ray."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from orchestrator.commands.shared import json_option, print_json, storage_option
from orchestrator.errors import UnfitEnvironmentError


@click.command(epilog="\b\nExamples:\n  orchestrator doctor\n  orchestrator doctor --json")
@storage_option
@json_option
def doctor(storage: Path, as_json: bool) -> int:
    """Check whether this machine has what a run needs, and say what to do where it has not.

    Exit code 3 if a check fails. With --json: {checks: [{name, status, remedy}]}.
    """
    from orchestrator.doctor import Status, examine

    checks = examine(storage)
    failed = any(check.status is Status.FAIL for check in checks)
    if as_json:
        print_json({"checks": [asdict(check) for check in checks]})
    else:
        width = max(len(check.name) for check in checks)
        for check in checks:
            click.echo(f"{check.status.value:<4}  {check.name:<{width}}  {check.detail}")
            if check.remedy:
                click.echo(f"{'':<4}  {'':<{width}}  -> {check.remedy}")
    return UnfitEnvironmentError.exit_code if failed else 0


@click.command(epilog="\b\nExamples:\n  orchestrator clean\n  orchestrator clean --yes")
@click.option("--yes", is_flag=True, help="Remove it; without this nothing is touched.")
@json_option
def clean(yes: bool, as_json: bool) -> int:
    """Find what killed runs left on this host: temporary directories, and processes that still run in them.

    Removed with --yes is only what belongs to a run of this host whose driver is provably dead; a new run does so as
    well. With --json: {removed: bool, leftovers: [{directory, run_dir, life, pids}]}.
    """
    from orchestrator.leftovers import find, sweep
    from orchestrator.processes import Life

    found = [leftover for leftover in find() if leftover.life is not Life.ALIVE]
    removed = sweep() if yes else []
    if as_json:
        print_json({"removed": yes, "leftovers": [asdict(leftover) for leftover in found]})
        return 0
    dead = removed if yes else [leftover for leftover in found if leftover.life is Life.DEAD]
    for leftover in dead:
        click.echo(f"{'removed' if yes else 'would remove'} {leftover}: its driver is dead")
    for leftover in found:
        if leftover.life is Life.UNKNOWN:
            click.echo(f"left alone: {leftover}; nothing proves that its driver is dead, or that it was of this host")
    if not dead:
        click.echo("nothing to remove")
    elif not yes:
        click.echo("nothing was touched; `orchestrator clean --yes` removes it")
    return 0


@click.command(
    epilog='\b\nExamples:\n  eval "$(orchestrator completion bash)"\n'
    "  orchestrator completion fish > ~/.config/fish/completions/orchestrator.fish"
)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> int:
    """Print the completion script of SHELL; it completes commands, options and names of runs."""
    from click.shell_completion import get_completion_class

    from orchestrator.cli import COMPLETE_VARIABLE, orchestrator

    kind = get_completion_class(shell)
    if kind is None:
        raise UnfitEnvironmentError(f"this version of click has no completion for {shell}; allowed: bash, zsh, fish")
    click.echo(kind(orchestrator, {}, "orchestrator", COMPLETE_VARIABLE).source())
    return 0


TABLE: dict[str, click.Command] = {"doctor": doctor, "clean": clean, "completion": completion}
