"""Commands that steer a run while it goes on: `add`, `clone`, `pause`, `set`, `wait`, `logs`.

`stop --trial` and `resume --trial` are in `runs`. All of them reach the run through its directory.
"""

from __future__ import annotations

import collections
from pathlib import Path
from typing import Any

import click

from orchestrator import steer
from orchestrator.commands.shared import NumberRange, json_option, opened, print_json, run_argument, storage_option

_params = click.option(
    "--set", "settings", multiple=True, metavar="NAME=VALUE", help="A parameter of the new trial. May be repeated."
)
_trial = click.option("--trial", required=True, metavar="ID", help="Which trial.")
request_id_option = click.option(
    "--request-id", default=None, metavar="ID", help="A request that comes again under its id is done once."
)


def tell(answer: dict[str, Any], text: str, *, as_json: bool) -> int:
    """Print the answer to a request."""
    if as_json:
        print_json({"schema": steer.SCHEMA, **answer})
    else:
        click.echo(text)
    return 0


@click.command(epilog="\b\nExample:\n  orchestrator add demo --set lr=0.01 --set width=32")
@run_argument
@storage_option
@_params
@request_id_option
@json_option
def add(run: str, storage: Path, settings: tuple[str, ...], request_id: str | None, as_json: bool) -> int:
    """Add one more trial to RUN; it trains beside the search, which does not judge it.

    With --json: {schema, request_id, command, trial_id}.
    """
    run_dir = opened(run, storage)
    answer = steer.ask(run_dir, "add", values=steer.params_of(settings), request_id=request_id)
    return tell(answer, f"{answer['trial_id']} was added to {run_dir.name}", as_json=as_json)


@click.command(epilog="\b\nExample:\n  orchestrator clone demo --trial trial-00003 --set lr=0.01")
@run_argument
@storage_option
@_trial
@_params
@request_id_option
@json_option
def clone(run: str, storage: Path, trial: str, settings: tuple[str, ...], request_id: str | None, as_json: bool) -> int:
    """Add a trial to RUN that goes on behind the newest report of another, with other parameters.

    With --json: {schema, request_id, command, trial_id}.
    """
    run_dir = opened(run, storage)
    answer = steer.ask(run_dir, "clone", trial, steer.params_of(settings), request_id=request_id)
    return tell(answer, f"{answer['trial_id']} goes on from {trial}", as_json=as_json)


@click.command(epilog="\b\nExample:\n  orchestrator pause demo --trial trial-00003")
@run_argument
@storage_option
@_trial
@request_id_option
@json_option
def pause(run: str, storage: Path, trial: str, request_id: str | None, as_json: bool) -> int:
    """Let a trial of RUN commit and leave its slot; it stays away until `resume --trial`, and the run does not end.

    With --json: {schema, request_id, command, trial_id}.
    """
    answer = steer.ask(opened(run, storage), "pause", trial, request_id=request_id)
    text = f"{trial} is told to commit and leave; `orchestrator resume {run} --trial {trial}` lets it go on"
    return tell(answer, text, as_json=as_json)


@click.command(name="set", epilog="\b\nExample:\n  orchestrator set demo priority=2 weight=3")
@run_argument
@click.argument("terms", nargs=-1, required=True, metavar="NAME=VALUE...")
@storage_option
@click.option("--trial", default="", metavar="ID", help="For this trial alone.")
@request_id_option
@json_option
def set_(run: str, terms: tuple[str, ...], storage: Path, trial: str, request_id: str | None, as_json: bool) -> int:
    """Change what RUN, or a trial of it, asks of the policy: priority, weight, deadline, protected ...

    The names are those of the run file's section `queue`. With --json: {schema, request_id, command, trial_id}.
    """
    answer = steer.ask(opened(run, storage), "set", trial, steer.params_of(terms), request_id=request_id)
    return tell(answer, f"{trial or run}: {', '.join(terms)}", as_json=as_json)


@click.command(epilog="\b\nExamples:\n  orchestrator wait demo\n  orchestrator wait demo --until 'best<1.2'")
@run_argument
@storage_option
@click.option(
    "--until",
    default="done",
    show_default=True,
    metavar="EVENT",
    help="done, first-report, best<NUMBER or best>NUMBER.",
)
@click.option("--timeout-s", type=NumberRange(min=0), default=None, help="Seconds to wait at most.")
@json_option
def wait(run: str, storage: Path, until: str, timeout_s: float | None, as_json: bool) -> int:
    """Wait until RUN is done, has its first report, or a metric beyond a number; exit code 1 if it ended without.

    With --json: {schema, is_reached, state, best}.
    """
    answer = steer.wait(opened(run, storage, may_be_new=True), until, timeout_s)
    tell(answer, f"{run} is {answer['state']}, best {answer['best']}", as_json=as_json)
    return 0 if answer["is_reached"] else 1


@click.command(epilog="\b\nExample:\n  orchestrator logs demo --trial trial-00003 --lines 20")
@run_argument
@storage_option
@_trial
@click.option("--lines", type=click.IntRange(min=1), default=100, show_default=True, help="Lines at the end.")
@json_option
def logs(run: str, storage: Path, trial: str, lines: int, as_json: bool) -> int:
    """Print the end of a trial's log. With --json: {schema, path, lines}."""
    path = steer.log_of(opened(run, storage), trial)
    with path.open(encoding="utf-8", errors="replace") as stream:
        last = list(collections.deque((line.rstrip("\n") for line in stream), maxlen=lines))
    return tell({"path": path, "lines": last}, "\n".join(last), as_json=as_json)


TABLE: dict[str, click.Command] = {
    "add": add,
    "clone": clone,
    "pause": pause,
    "set": set_,
    "wait": wait,
    "logs": logs,
}
