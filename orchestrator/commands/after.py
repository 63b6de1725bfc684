"""Commands on what a run left behind.

`explain`, `report`, `export` and `verify` also work while the run goes on, and only read it. `repair` mends its
journal.
"""

from __future__ import annotations

import time
import webbrowser
from dataclasses import asdict
from pathlib import Path

import click

from orchestrator.commands.shared import (
    json_option,
    opened,
    print_json,
    run_argument,
    runs_argument,
    storage_option,
    trust_option,
)
from orchestrator.config.words import printable
from orchestrator.errors import ConfigError
from orchestrator.run_dirs import read_status, state_of

_LIVE = {"starting", "running", "stopping"}


@click.command(epilog="\b\nExamples:\n  orchestrator explain demo\n  orchestrator explain demo --decision 7 --json")
@run_argument
@storage_option
@click.option(
    "--decision",
    type=click.IntRange(min=0),
    default=None,
    metavar="N",
    help="Generation of the plan to explain; the last one if not given.",
)
@json_option
def explain(run: str, storage: Path, decision: int | None, as_json: bool) -> int:
    """Explain a decision of RUN: what was weighed, what was chosen and why, what it gained.

    With --json: {generation, reason, chosen, alternatives, binding, predicted_gain, realised_gain, applied}.
    """
    run_dir = opened(run, storage)
    from orchestrator.view import explain as view

    answer = view.explain(run_dir, decision)
    if as_json:
        print_json(answer)
    else:
        click.echo(view.render(answer))
    return 0


@click.command(
    epilog="\b\nExamples:\n  orchestrator report demo --open\n  orchestrator report demo second --output compared.html"
)
@runs_argument
@storage_option
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    default=None,
    metavar="FILE",
    help="The file to write; RUN.html in this directory if not given, report.html for several runs.",
)
@click.option("--open", "opens", is_flag=True, help="Show it in the browser.")
@json_option
def report(runs: tuple[str, ...], storage: Path, output: Path | None, opens: bool, as_json: bool) -> int:
    """Write RUN, or several runs to compare, as one HTML file that needs no network.

    It holds the ranking of trials, their curves, parameters, decisions and logs, as far as they have come: write it
    again to see more of a run that goes on. Prints the name of the file; with --json: {output, runs, num_bytes}.
    """
    run_dirs = [opened(run, storage) for run in runs]
    from orchestrator.view.page import build

    file = output or Path(f"{run_dirs[0].name if len(run_dirs) == 1 else 'report'}.html")
    build.check_output(file)
    text = build.render(run_dirs, time.time())
    build.write(text, file)
    if as_json:
        print_json({"output": file, "runs": run_dirs, "num_bytes": len(text.encode())})
    else:
        click.echo(file)
    if opens and not webbrowser.open(file.absolute().as_uri()):
        click.echo(f"no browser could be started; open {file.absolute()}", err=True)
    return 0


@click.command(
    epilog="\b\nExamples:\n  orchestrator export demo --output best\n"
    "  orchestrator export demo --output third --trial trial-00003"
)
@run_argument
@storage_option
@click.option("--output", type=click.Path(path_type=Path), required=True, metavar="DIR", help="A new directory.")
@click.option("--trial", default=None, metavar="ID", help="Which trial; the best one if not given.")
@trust_option
@json_option
def export(run: str, storage: Path, output: Path, trial: str | None, trust_storage: bool, as_json: bool) -> int:
    """Write the model of RUN's best trial, at its best report, and its parameters as params.json.

    A declared training's weights go to model.safetensors, a Hugging Face model in that library's layout; what a
    function reported is copied as it is. Prints the line of Python that loads it.
    """
    run_dir = opened(run, storage)
    from orchestrator.api import Run

    line = Run(run_dir, trust_storage=trust_storage).export(output, trial)
    if as_json:
        print_json({"output": output, "load": line})
    else:
        click.echo(f"wrote {output}; to load it:\n{line}")
    return 0


@click.command(epilog="\b\nExamples:\n  orchestrator verify demo\n  orchestrator verify runs/demo --json")
@run_argument
@storage_option
@click.option("--checkpoints", is_flag=True, help="Read every byte of every checkpoint as well.")
@json_option
def verify(run: str, storage: Path, checkpoints: bool, as_json: bool) -> int:
    """Check the journal and telemetry of RUN: over-commitment, torn allocations, lost samples, leaks, lost evidence.

    Exit code 1 if anything is found. Notes say what could not be checked, and which shares were not real. With --json:
    {violations: [...], checked: {...}, notes: [...]}.
    """
    run_dir = opened(run, storage)
    from orchestrator.view.finding import sentence
    from orchestrator.view.verify import verify as verify_run

    answer = verify_run(run_dir, reads_checkpoints=checkpoints)
    violations = answer["violations"]
    if as_json:
        print_json(answer)
    else:
        for violation in violations:
            click.echo(f"violation: {printable(sentence(violation))}")
        for note in answer["notes"]:
            click.echo(f"note: {printable(str(note))}")
        count = len(violations)
        click.echo(f"{run_dir.name}: {count or 'no'} violation{'' if count == 1 else 's'}")
    return 1 if violations else 0


@click.command(epilog="\b\nExamples:\n  orchestrator repair demo\n  orchestrator repair runs/demo --json")
@run_argument
@storage_option
@json_option
def repair(run: str, storage: Path, as_json: bool) -> int:
    """Make the journal of RUN whole where lines of it are damaged, so that the run can be resumed.

    Says what is kept and what is not. The damaged journal stays beside it, checkpoints are not touched. With --json:
    {num_lines, num_kept, damage: [...], impossible: [...], num_restored, kept_as}.
    """
    run_dir = opened(run, storage)
    if state_of(run_dir, read_status(run_dir)) in _LIVE:
        raise ConfigError(f"{run_dir.name} is running; stop it first: orchestrator stop {run_dir}")
    from orchestrator import evidence
    from orchestrator.control.repair import repair as repair_run

    found = repair_run(run_dir)
    if found.kept_as is not None:
        evidence.forget(run_dir)  # the journal is not what it was when the run ended
    if as_json:
        print_json(asdict(found))
        return 0
    for text in found.damage:
        click.echo(f"damaged: {printable(text)}")
    for text in found.impossible:
        click.echo(f"left out, because it cannot have happened without what is lost: {printable(text)}")
    click.echo(f"{run_dir.name}: {found.num_kept} of {found.num_lines} entries kept", nl=False)
    click.echo(f", {found.num_restored} reports taken from the tables" if found.num_restored else "")
    if found.kept_as is not None:
        click.echo(f"the damaged journal is {found.kept_as}; go on with: orchestrator resume {run_dir}")
    return 0


TABLE: dict[str, click.Command] = {
    "explain": explain,
    "report": report,
    "export": export,
    "verify": verify,
    "repair": repair,
}
