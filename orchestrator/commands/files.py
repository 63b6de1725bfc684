"""Commands on run files: `init`, `check`, `run`, `schema`.

Deliberately thin: what a run file may say is in `orchestrator.config`, what a run does is in `orchestrator.driver`.
Only `run` itself may import torch or ray, and only after the file has passed every check.
"""

from __future__ import annotations

import json
import re
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from orchestrator.errors import ConfigError

if TYPE_CHECKING:
    from orchestrator.config import ResolvedRun

_SET_HELP = "Override a value of the file: a.b=value (YAML). May be repeated; the last one wins."
_file = click.argument("file", type=click.Path(path_type=Path))
_set = click.option("--set", "overrides", multiple=True, metavar="PATH=VALUE", help=_SET_HELP)


@click.command(
    epilog="\b\nExamples:\n  orchestrator init\n  orchestrator init search.yaml --job mlp\n"
    "  orchestrator init --job my_package.my_module:train"
)
@click.argument("file", type=click.Path(path_type=Path), default=Path("run.yaml"))
@click.option("--job", default="language", show_default=True, help="Job, or package.module:name of your own.")
@click.option("--data", default=None, metavar="PATH", help="Import path of a Lightning or Hugging Face model's data.")
def init(file: Path, job: str, data: str | None) -> int:
    """Write a commented run file to FILE (default run.yaml); an existing file is never overwritten.

    Of a training of your own the parameters are those of its signature; where there is no such module yet, a small
    training is written there: a class for a name with a capital letter, else a function.
    """
    if file.exists():
        raise ConfigError("exists already and is not overwritten; name another file", str(file))
    if ":" in job:
        from orchestrator.commands.own_training import write_training

        written = write_training(job)
        if written is not None:
            click.echo(f"wrote {written}")
    text = template(job, _run_name(file), data)
    try:
        with file.open("x", encoding="utf-8") as stream:
            stream.write(text)
    except FileExistsError:
        raise ConfigError("exists already and is not overwritten; name another file", str(file)) from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot be written ({error}); name a file in a directory that exists", str(file)) from None
    click.echo(f"wrote {file}\nnext:  orchestrator check {file}\n       orchestrator run {file}")
    return 0


def _run_name(file: Path) -> str:
    """A run name made of the file's own name."""
    return re.sub(r"[^A-Za-z0-9._-]", "-", file.stem).strip("-._")[:64] or "run"


# What the template says of each job: fixed parameters and search space.
_JOB_LINES = {
    "language": ("{layers: 2, context: 64}", "{loguniform: [1.0e-3, 1.0e-2]}", "{choice: [48, 64]}"),
    "image": ("{model: vit, layers: 3, patch: 2}", "{loguniform: [1.0e-3, 3.0e-3]}", "{choice: [32, 48]}"),
    "tissue": ("{levels: 3, size: 32}", "{loguniform: [2.0e-3, 8.0e-3]}", "{choice: [8, 12]}"),
    "speech": ("{layers: 2, units: words}", "{loguniform: [1.0e-3, 4.0e-3]}", "{choice: [48, 64]}"),
    "genome": ("{layers: 1, length: 64}", "{loguniform: [1.0e-3, 1.0e-2]}", "{choice: [24, 32]}"),
    "mlp": ("{depth: 2}", "{loguniform: [1.0e-2, 1.0e-1]}", "{choice: [16, 32]}"),
}


def template(job: str, name: str, data: str | None = None) -> str:
    """The commented run file for a job, or for a training named by import path, with its data.

    Raises:
        ConfigError: there is no such job.
    """
    text = resources.files("orchestrator.templates").joinpath("run.yaml").read_text(encoding="utf-8")
    text = text.replace("@NAME@", name).replace("@JOB@", f'"{job}"' if ":" in job else job)
    if ":" in job:
        from orchestrator.commands.own_training import own_template

        return own_template(text, job, data)
    from orchestrator.config.words import did_you_mean, seen
    from orchestrator.jobs.table import JOB_INFO

    if job not in JOB_INFO:
        names = list(JOB_INFO)
        text = f"unknown job {seen(job)}; allowed: {', '.join(names)}{did_you_mean(job, names)}, or package.module:name"
        raise ConfigError(text, "--job")
    params, rate, width = _JOB_LINES.get(job, ("{}", "", ""))
    text = text.replace("@PARAMS@", params)
    if rate:
        return text.replace("@LR@", rate).replace("@WIDTH@", width)
    # A job without suggestions of its own starts with nothing searched; the comments still say how.
    lines = [line for line in text.splitlines(keepends=True) if "@LR@" not in line and "@WIDTH@" not in line]
    return "".join(lines).replace("  space:\n", "  space: {}\n")


@click.command(
    epilog="\b\nExamples:\n  orchestrator check search.yaml\n  orchestrator check demo.yaml --set seed=3 --json"
)
@_file
@_set
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def check(file: Path, overrides: tuple[str, ...], as_json: bool) -> int:
    """Validate FILE, print every value with its origin, and say whether this machine can serve it.

    Starts nothing and writes nothing. Exit code 2 if the file is wrong or does not fit.
    """
    from orchestrator.config import fit_problems, load_config, this_machine

    machine = this_machine()
    try:
        resolved = load_config(file, overrides)
    except ConfigError as error:
        if not as_json:
            raise
        click.echo(
            _json({"valid": False, "fits": False, "problems": str(error).splitlines(), "machine": machine.words})
        )
        return error.exit_code
    problems = [str(problem) for problem in fit_problems(resolved, machine)]
    if as_json:
        answer = {"valid": True, "fits": not problems, "problems": problems, "machine": machine.words}
        answer |= {"config": resolved.to_dict(), "origins": dict(resolved.origins), "run_dir": str(resolved.run_dir)}
        click.echo(_json(answer))
        return ConfigError.exit_code if problems else 0
    click.echo(resolved.to_yaml(with_origins=True))
    if problems:
        click.echo("\n".join(f"error: {problem}" for problem in problems), err=True)
        click.echo(f"valid, but does not fit this machine ({machine.words})", err=True)
        return ConfigError.exit_code
    click.echo(f"valid; fits this machine ({machine.words}): {_summary(resolved)}")
    return 0


def _json(answer: dict[str, Any]) -> str:
    return json.dumps(answer, indent=2)


def _summary(resolved: ResolvedRun) -> str:
    config = resolved.config
    ranks = f"{config.trial.num_workers} rank{'s' if config.trial.num_workers > 1 else ''}"
    if config.dials.workers.enabled:
        ranks += f" ({config.dials.workers.min} to {config.dials.workers.max})"
    share = f"share {config.start_share:.3g} per rank to start with"
    trials = f"{config.search.num_trials} trial{'s' if config.search.num_trials > 1 else ''}"
    return f"{trials}, {config.search.num_slots} at a time, {ranks} each, {share}, policy {config.policy.name}"


@click.command(
    epilog="\b\nExamples:\n  orchestrator run demo.yaml\n"
    "  orchestrator run demo.yaml --set name=second --set search.num_trials=12\n  orchestrator run demo.yaml --dry-run"
)
@_file
@_set
@click.option("--dry-run", is_flag=True, help="Check everything, say what would run, start nothing.")
@click.option("--plain", is_flag=True, help="One line every few seconds instead of the live table.")
@click.option("--quiet", is_flag=True, help="Print nothing but errors and, at the end, the run directory.")
def run(file: Path, overrides: tuple[str, ...], dry_run: bool, plain: bool, quiet: bool) -> int:
    """Run the search that FILE describes, in the directory storage/name.

    Ctrl-C once checkpoints and stops, so that `resume` can go on; twice stops at once.
    """
    from orchestrator.config import load_config, require_fit

    resolved = load_config(file, overrides)
    require_fit(resolved)
    if dry_run:
        click.echo(f"would run {_summary(resolved)}\nwould write to {resolved.run_dir}\nnothing was started")
        return 0
    from orchestrator.driver import start

    return int(start(resolved, plain=True if quiet else plain or None, is_quiet=quiet))


@click.command(epilog="\b\nExample:\n  orchestrator schema > run.schema.json")
def schema() -> int:
    """Print the JSON schema of run files.

    An editor with a YAML language server completes and checks keys when the run file's first line is
    `# yaml-language-server: $schema=run.schema.json`.
    """
    from orchestrator.config import RunConfig

    document = {"$schema": "https://json-schema.org/draft/2020-12/schema", **RunConfig.model_json_schema()}
    click.echo(_json(document))
    return 0


TABLE: dict[str, click.Command] = {"init": init, "check": check, "run": run, "schema": schema}
