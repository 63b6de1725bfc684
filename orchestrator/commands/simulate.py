"""The command `simulate`: a workload under any policy, or the decisions of a run taken again.

Deliberately thin: files are read in `orchestrator.simulate`, what happens is in `policies.simulator`.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from orchestrator.commands.shared import NumberRange, json_option, opened, print_json, storage_option
from orchestrator.errors import EXIT_DONE, EXIT_FAILED, PlanError

if TYPE_CHECKING:
    from orchestrator.policies.simulator import Summary

_DEFAULT_POLICY = "goodput"
_EPILOG = """\b
Examples:
  orchestrator simulate demo
  orchestrator simulate demo --policy fair_share
  orchestrator simulate jobs.csv --cluster 16x4 --policy goodput --interval 60 --json
  orchestrator simulate philly-like --seed 3 --plot pictures"""


@click.command(epilog=_EPILOG)
@click.argument("target")
@storage_option
@click.option("--policy", metavar="NAME", help=f"Policy to ask: that of the run, or {_DEFAULT_POLICY} for a workload.")
@click.option(
    "--set", "settings", multiple=True, metavar="KEY=VALUE", help="A parameter of the policy. May be repeated."
)
@click.option("--cluster", default="16x4", show_default=True, help="NODESxDEVICES[:type@speed$price], joined by '+'.")
@click.option(
    "--interval", type=NumberRange(1, 86_400), default=60.0, show_default=True, help="Seconds between decisions."
)
@click.option("--seed", type=click.IntRange(0, 2**31), default=0, show_default=True, help="Seed of what is drawn.")
@click.option(
    "--horizon", type=NumberRange(0, min_open=True), metavar="HOURS", help="Simulated hours after which to stop."
)
@click.option("--tables", type=click.Path(path_type=Path), metavar="DIR", help="Job tables: a folder per application.")
@click.option(
    "--events", type=click.Path(path_type=Path), metavar="FILE", help="Nodes that come, go, change price (CSV)."
)
@click.option("--plot", type=click.Path(path_type=Path), metavar="DIR", help="Write pictures to this directory.")
@json_option
def simulate(target: str, plot: Path | None, as_json: bool, **options: object) -> int:
    """Simulate a workload, or take the decisions of a run again.

    TARGET is a workload (a CSV with name,time,application,num_replicas,batch_size; or philly-like or helios-like,
    made up by --seed), or a run. A simulation that would never end stops and says why (exit code 1). Of a run the
    journal is replayed: its own policy must decide the same byte for byte (exit code 1 if not); with --policy, what
    that one would have decided on the same snapshots.
    """
    from orchestrator.simulate import inputs

    if plot is not None:
        from orchestrator.simulate import plots

        plots.require()
    if inputs.is_workload(target):
        return _workload(target, plot, as_json, options)
    inputs.check_target(target)
    return _run(target, plot, as_json, options)


def _run(target: str, plot: Path | None, as_json: bool, options: dict[str, object]) -> int:
    from orchestrator.simulate import inputs, replay

    run_dir = opened(target, Path(str(options["storage"])))
    name, settings = options["policy"], options["settings"]
    assert isinstance(settings, tuple)
    is_own = name is None
    policy = None if is_own else inputs.policy_of(str(name), settings)
    found = replay.replay(run_dir, policy, None if is_own else str(name))
    files = []
    if plot is not None:
        from orchestrator.simulate import plots

        files = plots.plot_replay(found, plot)
    if as_json:
        print_json(replay.to_dict(found, is_own=is_own) | {"pictures": files})
    else:
        click.echo("\n".join([replay.render(found, is_own=is_own), *(f"wrote {file}" for file in files)]))
    return 1 if is_own and found.num_same < len(found.decisions) else 0


def _workload(target: str, plot: Path | None, as_json: bool, options: dict[str, object]) -> int:
    from orchestrator.policies.simulator import PolicyFaultError, Rules, simulate
    from orchestrator.simulate import inputs

    settings, tables, events, seed = (options[name] for name in ("settings", "tables", "events", "seed"))
    assert isinstance(settings, tuple)
    assert isinstance(seed, int)
    name = str(options["policy"] or _DEFAULT_POLICY)
    policy = inputs.policy_of(name, settings)
    cluster = inputs.cluster_of(str(options["cluster"]), events if isinstance(events, Path) else None)
    applications = inputs.applications_of(tables if isinstance(tables, Path) else None)
    workload = inputs.workload_of(target, applications, seed)
    horizon = options["horizon"]
    horizon_s = horizon * 3600 if isinstance(horizon, float) else float("inf")
    interval = options["interval"]
    assert isinstance(interval, float)
    rules = Rules(interval_s=interval, seed=seed, horizon_s=horizon_s, keeps_timeline=plot is not None)
    try:
        summary = simulate(policy, workload, cluster, name=name, applications=applications, rules=rules)
    except PolicyFaultError as error:
        raise PlanError(str(error)) from error
    files = []
    if plot is not None:
        from orchestrator.simulate import plots

        files = plots.plot_summary(summary, cluster.num_devices, plot)
    if as_json:
        jobs = [asdict(job) for job in summary.jobs]
        print_json({"workload": target, **summary.figures(), "jobs": jobs, "pictures": files})
    else:
        click.echo("\n".join([*_lines(target, summary), *(f"wrote {file}" for file in files)]))
    return EXIT_DONE if summary.stopped is None else EXIT_FAILED


def _lines(target: str, summary: Summary) -> list[str]:
    """The figures for people."""

    def hours(seconds: float | None) -> str:
        return "-" if seconds is None else f"{seconds / 3600:.2f} h"

    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.2f}"

    jct = (hours(summary.jct_mean_s), hours(summary.jct_p50_s), hours(summary.jct_p99_s))
    stopped = [] if summary.stopped is None else [f"stopped: {summary.stopped}"]
    return [
        f"{target} under {summary.policy}: {summary.num_ended} of {summary.num_jobs} jobs ended",
        f"  completion time  mean {jct[0]}, median {jct[1]}, 99 % {jct[2]}; makespan {hours(summary.makespan_s)}",
        f"  goodput          {summary.goodput:.1f} devices' worth; {summary.utilisation:.0%} of the devices held",
        f"  device-hours     {summary.device_hours:.1f}; cost {summary.cost:.2f}",
        f"  fairness         finish time over an equal part's: mean {number(summary.fairness_mean)}, "
        f"99 % {number(summary.fairness_p99)}, {summary.unfair_ratio or 0:.0%} above 1",
        f"  changes          {summary.num_restarts} restarts, {summary.num_changes} live; "
        f"{summary.num_failures} failures",
        *stopped,
        "assumed: speeds and noise scales are those of the applications (policies/simulator/README.md says which)",
    ]


TABLE: dict[str, click.Command] = {"simulate": simulate}
