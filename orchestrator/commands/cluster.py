"""Commands on the policy actor that the runs of a cluster share: `up`, `down`, `queue`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from orchestrator.commands.shared import json_option, print_json

_SCHEMA = 1
_address = click.option("--address", default="auto", show_default=True, help="The cluster: auto, or host:port.")


@click.command(epilog="\b\nExamples:\n  orchestrator up\n  orchestrator up policy.yaml --address 10.0.0.1:6379")
@click.argument("file", type=click.Path(path_type=Path), required=False)
@_address
@json_option
def up(file: Path | None, address: str, as_json: bool) -> int:
    """Let the runs of a running cluster share one policy actor; runs that begin from here on join it.

    FILE says the policy, the quotas of users and the time without a run after which it ends. Called again it changes
    these. With --json: {schema, policy, owner, version, ...}.
    """
    from orchestrator import shared_policy
    from orchestrator.config.cluster_file import load_cluster_file

    wanted = load_cluster_file(file)
    with shared_policy.connected(address):
        found = shared_policy.up(wanted)
    if as_json:
        print_json({"schema": _SCHEMA, **found})
    else:
        idle = f"it ends after {found['idle_timeout_s']:g} s without a run"
        click.echo(f"runs that begin on this cluster from here on are decided by {found['policy']}; {idle}")
    return 0


@click.command(epilog="\b\nExample:\n  orchestrator down")
@_address
@click.option("--force", is_flag=True, help="Also while runs go on; they are then without a policy actor.")
@json_option
def down(address: str, force: bool, as_json: bool) -> int:
    """End the policy actor that runs of a cluster share. With --json: {schema, runs}."""
    from orchestrator import shared_policy

    with shared_policy.connected(address):
        runs = shared_policy.down(is_forced=force)
    if as_json:
        print_json({"schema": _SCHEMA, "runs": runs})
    else:
        click.echo("the shared policy actor has ended")
    return 0


@click.command(epilog="\b\nExample:\n  orchestrator queue --json")
@_address
@json_option
def queue(address: str, as_json: bool) -> int:
    """Show the runs that share a policy actor: whose they are, what they hold, and what their trials wait for.

    With --json: {schema, policy, owner, version, quotas, runs: [{name, user, priority, weight, devices, ...}]}.
    """
    from orchestrator import shared_policy

    with shared_policy.connected(address):
        found = shared_policy.queue()
    if as_json:
        print_json({"schema": _SCHEMA, **found})
        return 0
    click.echo(f"policy {found['policy']}, set by {found['owner']}; {len(found['runs'])} runs")
    for row in found["runs"]:
        click.echo(_line(row))
    return 0


def _line(row: dict[str, Any]) -> str:
    waits = f", {row['num_waiting']} wait: {row['waits_for']}" if row["num_waiting"] else ""
    who = f" of {row['user']}" if row["user"] else ""
    return (
        f"{row['name']}{who}: priority {row['priority']}, weight {row['weight']:g}, holds {row['devices']:g} devices,"
        f" {row['num_running']} trials run{waits}"
    )


TABLE: dict[str, click.Command] = {"up": up, "down": down, "queue": queue}
