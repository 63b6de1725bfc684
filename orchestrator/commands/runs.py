"""Commands on runs that live or could live again: `list`, `watch`, `stop`, `resume`.

They reach a run only through its directory (`orchestrator.run_dirs`) and leave the rest to `orchestrator.view.terminal`
and `orchestrator.driver`, which are imported when needed.
"""

from __future__ import annotations

import dataclasses
from datetime import UTC, datetime
from pathlib import Path

import click

from orchestrator.commands.shared import (
    NumberRange,
    json_option,
    opened,
    print_json,
    run_argument,
    storage_option,
    trust_option,
)
from orchestrator.errors import ConfigError
from orchestrator.run_dirs import (
    ENDED_STATES,
    RunSummary,
    StopKind,
    StopResult,
    list_runs,
    read_status,
    request_stop,
    wait_until_ended,
)


@click.command(
    name="list", epilog="\b\nExamples:\n  orchestrator list\n  orchestrator list --storage /data/runs --json"
)
@storage_option
@json_option
def list_(storage: Path, as_json: bool) -> int:
    """List the runs below --storage, newest first, with the state each of them is in."""
    if not storage.is_dir() and storage != Path("runs"):
        raise ConfigError(f"storage '{storage}' is no directory; name the directory that holds the runs", "--storage")
    runs = list_runs(storage)
    if as_json:
        print_json({"storage": str(storage), "runs": [dataclasses.asdict(run) for run in runs]})
        return 0
    if not runs:
        click.echo(f"no runs in {storage}; `orchestrator run FILE` makes one")
        return 0
    width = max(len("run"), *(len(run.name) for run in runs))
    click.echo(f"{'run':<{width}}  {'state':<12}  {'trials':>9}  updated (UTC)")
    for run in runs:
        click.echo(_row(run, width))
    return 0


def _row(run: RunSummary, width: int) -> str:
    updated = datetime.fromtimestamp(run.updated_s, tz=UTC).strftime("%Y-%m-%d %H:%M:%S")
    return f"{run.name:<{width}}  {run.state:<12}  {f'{run.num_ended}/{run.num_trials}':>9}  {updated}"


@click.command(epilog="\b\nExamples:\n  orchestrator watch demo\n  orchestrator watch runs/demo --once")
@run_argument
@storage_option
@click.option("--once", is_flag=True, help="Print the table once and end.")
def watch(run: str, storage: Path, once: bool) -> int:
    """Show the live table of RUN (a name or a directory), from its files; the run does not notice."""
    run_dir = opened(run, storage)
    from orchestrator.view import terminal

    return int(terminal.watch(run_dir, once) or 0)


@click.command(epilog="\b\nExamples:\n  orchestrator stop demo\n  orchestrator stop demo --now")
@run_argument
@storage_option
@click.option("--now", is_flag=True, help="Do not wait for checkpoints; work since the last one is lost.")
@click.option("--no-wait", is_flag=True, help="Write the request and return at once.")
@click.option("--timeout-s", type=NumberRange(min=0), default=300.0, show_default=True, help="Seconds to wait at most.")
@click.option("--trial", default=None, metavar="ID", help="Stop this trial alone; the run goes on.")
@json_option
def stop(run: str, storage: Path, now: bool, no_wait: bool, timeout_s: float, trial: str | None, as_json: bool) -> int:
    """Stop RUN: its trials checkpoint, its processes end, and `resume` can go on with it.

    With --trial a single trial leaves and the run goes on; then with --json: {schema, request_id, command, trial_id}.
    """
    run_dir = opened(run, storage)
    if trial is not None:
        return _steered(run_dir, "stop", trial, as_json=as_json)
    state = (read_status(run_dir) or {}).get("state")
    if state in ENDED_STATES:
        click.echo(f"{run_dir.name} has ended already ({state})")
        return 0
    request_stop(run_dir, StopKind.NOW if now else StopKind.GRACEFUL)
    if no_wait:
        click.echo(f"{run_dir.name} was asked to stop")
        return 0
    result = wait_until_ended(run_dir, timeout_s)
    if result is StopResult.ENDED:
        state = (read_status(run_dir) or {}).get("state")
        click.echo(f"{run_dir.name} has ended ({state}); `orchestrator resume {run}` goes on with it")
        return 0
    if result is StopResult.DRIVER_GONE:
        text = f"the process that ran {run_dir.name} is gone without a last word"
        click.echo(f"error: {text}; `orchestrator resume {run}` goes on from its last checkpoints", err=True)
    else:
        text = f"{run_dir.name} has not ended within {timeout_s:g} s"
        click.echo(f"error: {text}; wait longer (--timeout-s) or stop it at once (--now)", err=True)
    return 1


@click.command(epilog="\b\nExamples:\n  orchestrator resume demo\n  orchestrator resume demo --retry-failed")
@run_argument
@storage_option
@click.option("--plain", is_flag=True, help="One line every few seconds instead of the live table.")
@click.option("--retry-failed", is_flag=True, help="Try every trial again that failed, whatever the reason.")
@click.option("--trial", default=None, metavar="ID", help="In a run that goes on: this trial alone.")
@trust_option
@json_option
def resume(
    run: str, storage: Path, plain: bool, retry_failed: bool, trial: str | None, trust_storage: bool, as_json: bool
) -> int:
    """Go on with RUN from its last checkpoints; trials that ended well are not run again.

    A trial that failed for a reason outside of it (memory, disk, a damaged checkpoint, a device, processes that died)
    is tried again.

    With --trial, in a run that goes on: a trial goes on that was paused, was stopped, or failed; then with --json:
    {schema, request_id, command, trial_id}.
    """
    run_dir = opened(run, storage, may_be_new=True)
    if trial is not None:
        return _steered(run_dir, "resume", trial, as_json=as_json)
    from orchestrator.driver import resume as resume_run

    return int(resume_run(run_dir, plain=plain or None, retries_all=retry_failed, trusts_storage=trust_storage))


def _steered(run_dir: Path, command: str, trial: str, *, as_json: bool) -> int:
    from orchestrator import steer

    answer = steer.ask(run_dir, command, trial)
    if as_json:
        print_json({"schema": steer.SCHEMA, **answer})
    else:
        click.echo(f"{trial} {'goes on' if command == 'resume' else 'is told to leave; its commits stay'}")
    return 0


TABLE: dict[str, click.Command] = {"list": list_, "watch": watch, "stop": stop, "resume": resume}
