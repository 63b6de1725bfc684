"""What must hold between the values of a run file, whatever machine it runs on.

Every check looks at the whole configuration and yields all it finds as (path, text); none of them reads a file, a clock
or the machine. Called by `config.resolve` once every single value is valid.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import re
import sys
import textwrap
from collections.abc import Iterator

from orchestrator.config.model import RunConfig
from orchestrator.config.placement import check_placement
from orchestrator.config.policy_params import type_problem
from orchestrator.config.queue import check_queue
from orchestrator.config.search_checks import Finding, check_search, check_values, known_info
from orchestrator.config.words import did_you_mean, printable, seen
from orchestrator.jobs.own import UserCodeError
from orchestrator.jobs.table import JOB_INFO, JobInfo, job_info
from orchestrator.policies.tier import by_cost, is_cheaper

_MODULE_CLASS = re.compile(r"([A-Za-z_][A-Za-z0-9_]*(?:\.[A-Za-z_][A-Za-z0-9_]*)*):([A-Za-z_][A-Za-z0-9_]*)", re.ASCII)
_HOST_PORT = re.compile(r"([A-Za-z0-9]([A-Za-z0-9.-]{0,253})|\[[0-9A-Fa-f:.]{2,45}\]):([0-9]{1,5})", re.ASCII)
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:/")
_VARIABLE = re.compile(r"\$\w|\$\{|\$\(|%\w+%|%\(\w+\)")
_NODE_TYPE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}", re.ASCII)
POLICIES_OF_FIXED_RANKS = frozenset({"static", "fair_share", "goodput"})
"""Policies of a run that leave the number of ranks of every trial as it is."""


def check_all(config: RunConfig) -> Iterator[Finding]:
    """Every contradiction of the configuration, section by section."""
    for check in (
        _storage,
        _job,
        _metric,
        _function,
        check_search,
        _batch,
        _shares,
        _workers,
        check_placement,
        check_queue,
        _tiers,
        _policy,
        _times,
        _cluster,
    ):
        yield from check(config)


def _storage(config: RunConfig) -> Iterator[Finding]:
    if not config.storage.isprintable():
        yield ("storage",), f"got {seen(config.storage)}; allowed: a path without control characters"
    elif config.storage.startswith("~"):
        yield ("storage",), f"got {seen(config.storage)}; '~' is not expanded, write the path out"
    elif _URL.match(config.storage):
        text = "a URL; allowed: a path of this machine or of a file system that is mounted on it, such as /mnt/runs"
        yield ("storage",), f"got {seen(config.storage)}, {text}; copy the run directory afterwards if need be"
    elif _VARIABLE.search(config.storage):
        text = f"got {seen(config.storage)}; variables are not expanded: write the path out, or let your shell do it: "
        yield ("storage",), f'{text}--set storage="..."'


def _job(config: RunConfig) -> Iterator[Finding]:
    job = config.job.name
    try:
        info = job_info(config.job.key)
    except UserCodeError as error:
        details = textwrap.indent(error.details, "    ")
        yield ("job", "name"), f"{printable(error.text)}\n{details}" if details else printable(error.text)
        return
    except ValueError:
        names = list(JOB_INFO)
        text = f"unknown job {seen(job)}; allowed: {', '.join(names)}{did_you_mean(job, names)}, or an import path"
        yield ("job", "name"), f"{text} package.module:name of your own"
        return
    if config.job.kind not in {"auto", info.kind}:
        yield ("job", "kind"), f"got {config.job.kind}, but {printable(job, 100)} is a {info.kind}; allowed: auto"
    for name, value in config.job.params.items():
        yield from check_values(config.job.key, name, [value], ("job", "params", name))
    yield from _declared(config, info)


def _declared(config: RunConfig, info: JobInfo) -> Iterator[Finding]:
    """What `job.args` and the section `trial` both say must be the same."""
    trial = config.trial
    for name, part in info.given.items():
        if getattr(trial, part) != info.start[part]:
            text = f"got {getattr(trial, part)}, and job.args.{name} is {info.start[part]}; keep one of them"
            yield ("trial", part), text
    if trial.epochs_per_report is None:
        return
    if info.is_function:
        yield (
            ("trial", "epochs_per_report"),
            f"got {trial.epochs_per_report}; a function reports by itself; leave it out",
        )
    elif trial.samples_per_report is not None:
        text = f"got {trial.epochs_per_report}, and samples_per_report is {trial.samples_per_report}; keep one of them"
        yield ("trial", "epochs_per_report"), text


def _metric(config: RunConfig) -> Iterator[Finding]:
    """A class that evaluates by itself must say which of its metrics trials are compared by."""
    info, name = known_info(config), printable(config.job.name, 100)
    if info is None or info.is_function or info.metric or config.search.metric is not None:
        return
    if info.kind == "lightning":
        yield ("search", "metric"), f"is missing; allowed: the name of a value that validation_step of {name} logs"
    else:
        text = f"is missing, and {name} has no attribute metric; allowed: the name of a value that its evaluate returns"
        yield ("search", "metric"), text


def _function(config: RunConfig) -> Iterator[Finding]:
    """What a function, of which nothing is known from outside, needs in the run file."""
    info = known_info(config)
    if info is None or not info.is_function:
        return
    for name, what in (("metric", "the name of the value that it reports"), ("mode", "min or max")):
        if getattr(config.search, name) is None:
            yield ("search", name), f"is missing; a function needs {what}, by which trials are compared"
    if config.dials.workers.enabled:
        text = "got true, but the ranks of a function cannot change while it runs; allowed: false"
        yield ("dials", "workers", "enabled"), text
    if config.search.scheduler.name == "hyperband" and config.trial.max_reports is None:
        yield ("trial", "max_reports"), "is null; hyperband needs the number of reports that a whole trial makes"


def _batch(config: RunConfig) -> Iterator[Finding]:
    trial, dial = config.trial, config.dials.batch
    batch = trial.global_batch
    how = f"trial.micro_batch {trial.micro_batch} x grad_accum {trial.grad_accum} x num_workers {trial.num_workers}"
    largest = batch
    if dial.enabled and trial.micro_batch > dial.max_micro:
        yield (
            ("dials", "batch", "max_micro"),
            f"got {dial.max_micro}; allowed: at least trial.micro_batch = {trial.micro_batch}",
        )
    if dial.enabled and dial.change_global:
        if dial.min_global > dial.max_global:
            yield (
                ("dials", "batch", "min_global"),
                f"got {dial.min_global}; allowed: at most max_global = {dial.max_global}",
            )
            return
        if not dial.min_global <= batch <= dial.max_global:
            text = f"{how} = {batch} samples per step; allowed: dials.batch from {dial.min_global} to {dial.max_global}"
            yield ("trial", "micro_batch"), text
            return
        largest = dial.max_global
    info = known_info(config)
    has_epochs = config.trial.epochs_per_report is not None
    if info is not None and not info.is_function and not has_epochs and config.samples_per_report < largest:
        what = how if largest == batch else "dials.batch.max_global"
        text = f"got {config.samples_per_report}; allowed: at least one step between reports, {what} = {largest}"
        yield ("trial", "samples_per_report"), text


def _shares(config: RunConfig) -> Iterator[Finding]:
    dial, share = config.dials.share, config.trial.share
    if not dial.enabled:
        return
    if dial.min > dial.max:
        yield ("dials", "share", "min"), f"got {dial.min}; allowed: at most max = {dial.max}"
    elif share is not None and not dial.min <= share <= dial.max:
        yield ("trial", "share"), f"got {share}; allowed: dials.share from {dial.min} to {dial.max}"


def _workers(config: RunConfig) -> Iterator[Finding]:
    """A range of ranks that the start is in, over which its global batch can be kept, and a policy that uses it; and
    lanes only where every trial has one rank.
    """
    lanes, info = config.slots.lanes, known_info(config)
    if lanes > 1 and (config.most_workers > 1 or (info is not None and info.is_function)):
        text = f"got {lanes}; trials side by side in one process are declared trainings on one rank each"
        yield ("slots", "lanes"), f"{text}; allowed: 1, or a class, trial.num_workers: 1 and no dial workers"
    dial, trial, path = config.dials.workers, config.trial, ("dials", "workers")
    if not dial.enabled:
        return
    if dial.min > dial.max:
        yield (*path, "min"), f"got {dial.min}; allowed: at most max = {dial.max}"
        return
    if not dial.min <= trial.num_workers <= dial.max:
        yield ("trial", "num_workers"), f"got {trial.num_workers}; allowed: dials.workers from {dial.min} to {dial.max}"
    for name, workers in (("min", dial.min), ("max", dial.max)):
        if trial.global_batch % workers:
            divisors = [str(n) for n in range(1, min(64, trial.global_batch) + 1) if trial.global_batch % n == 0]
            text = (
                f"got {workers}, over which a step's {trial.global_batch} samples cannot be divided evenly; allowed: "
            )
            yield (*path, name), f"{text}{', '.join(divisors)}, or another trial.micro_batch"
    if config.policy.name in POLICIES_OF_FIXED_RANKS:
        text = f"got true, but policy {config.policy.name} leaves the number of ranks of a trial alone; allowed: "
        yield (*path, "enabled"), f"{text}policy.name: goodput_joint, or module:Class of your own, or enabled: false"


def _tiers(config: RunConfig) -> Iterator[Finding]:
    path, tiers = ("dials", "precision", "tiers"), config.dials.precision.tiers
    if len(set(tiers)) != len(tiers):
        yield path, f"got [{', '.join(tiers)}]; allowed: each tier once"
    elif any(is_cheaper(before, after) for before, after in itertools.pairwise(tiers)):
        yield path, f"got [{', '.join(tiers)}]; allowed: dearest first, [{', '.join(by_cost(tiers))}]"
    for tier in config.dials.precision.emulate:
        if tier not in tiers:
            yield (*path[:2], "emulate"), f"got {tier}, which is not among tiers; add it there or leave it out here"


def _policy(config: RunConfig) -> Iterator[Finding]:
    from orchestrator.policies import POLICIES

    name, path = config.policy.name, ("policy", "name")
    if name in POLICIES:
        yield from _policy_params(config, POLICIES[name])
        return
    match = _MODULE_CLASS.fullmatch(name)
    if match is None:
        allowed = f"allowed: {', '.join(POLICIES)}, or module:Class{did_you_mean(name, POLICIES)}"
        yield path, f"unknown policy {seen(name)}; {allowed}"
        return
    # Only the outermost package is looked for: looking deeper would run the user's code, and `check` runs none.
    package = match[1].split(".")[0]
    if package in sys.stdlib_module_names:
        yield path, f"got {seen(name)}; a policy cannot come from the standard library; name a module of your own"
    elif package not in sys.modules and importlib.util.find_spec(package) is None:
        yield path, f"got {seen(name)}; no module '{package}' is installed or on PYTHONPATH"


def _policy_params(config: RunConfig, policy: type) -> Iterator[Finding]:
    from orchestrator.policies import build_policy

    fields = [field.name for field in dataclasses.fields(policy) if field.init]
    unknown = [name for name in config.policy.params if name not in fields]
    for name in unknown:
        allowed = f"allowed: {', '.join(fields) or 'none, it takes no parameters'}{did_you_mean(name, fields)}"
        text = f"unknown parameter '{printable(name, 60)}' of policy {config.policy.name}; {allowed}"
        yield ("policy", "params", name), text
    for name, value in config.policy.params.items():
        problem = type_problem(policy, name, value)
        if problem is not None:
            yield ("policy", "params", name), problem
            continue
        try:
            build_policy(config.policy.name, {} if name in unknown else {name: value})
        except ValueError as error:
            yield ("policy", "params", name), f"got {seen(value)}; {printable(str(error))}"


def _times(config: RunConfig) -> Iterator[Finding]:
    stale_s, send_s = config.telemetry.stale_after_s, config.telemetry.send_period_s
    if stale_s < 2 * send_s:
        text = f"got {stale_s}; allowed: at least twice send_period_s = {send_s}, or every trial would look stale"
        yield ("telemetry", "stale_after_s"), text


def _cluster(config: RunConfig) -> Iterator[Finding]:
    address = config.cluster.address
    match = _HOST_PORT.fullmatch(address)
    if address not in {"local", "auto"} and (match is None or not 1 <= int(match[3]) <= 65535):
        suggestion = did_you_mean(address, ("local", "auto"))
        yield ("cluster", "address"), f"got {seen(address)}; allowed: local, auto, or host:port{suggestion}"
    elif address != "local" and config.cluster.num_cpus is not None:
        text = f"got {config.cluster.num_cpus}; allowed: only with address: local, a running cluster has its own cores"
        yield ("cluster", "num_cpus"), text
    if address == "local" and config.cluster.autoscale:
        yield (
            ("cluster", "autoscale"),
            "got true; allowed: only with address: auto or host:port, a local cluster is fixed",
        )
    if config.cluster.node_types:
        yield from _node_types(config)
    elif config.cluster.max_cost_per_hour is not None:
        text = (
            f"got {config.cluster.max_cost_per_hour:g} without cluster.node_types; name the nodes that cost something"
        )
        yield ("cluster", "max_cost_per_hour"), text


def _node_types(config: RunConfig) -> Iterator[Finding]:
    cluster, path = config.cluster, ("cluster", "node_types")
    if cluster.address == "local":
        yield path, "allowed: only with address: auto or host:port, a local cluster is fixed"
    if cluster.autoscale:
        text = "got true with node_types, for which the policy alone asks; allowed: one of the two"
        yield ("cluster", "autoscale"), text
    if config.policy.name != "goodput_joint" and ":" not in config.policy.name:
        text = (
            f"got {seen(config.policy.name)}, which wishes for no nodes; allowed with cluster.node_types: goodput_joint"
        )
        yield ("policy", "name"), f"{text}, or module:Class of your own"
    for name in cluster.node_types:
        yield from _node_type(config, name)
    for name, other in itertools.permutations(cluster.node_types, 2):
        one, two = cluster.node_types[name].resources, cluster.node_types[other].resources
        is_double = one == two and name > other
        if is_double or (one != two and all(two.get(key, 0) >= amount for key, amount in one.items())):
            text = f"a request for one could be met by a node of {printable(other, 60)}, which has all of its resources"
            text += f"; give each a resource of its own, such as {printable(name, 60)}: 1"
            yield (*path, name, "resources"), text


def _node_type(config: RunConfig, name: str) -> Iterator[Finding]:
    each, budget = config.cluster.node_types[name], config.cluster.max_cost_per_hour
    path = ("cluster", "node_types", name)
    if _NODE_TYPE.fullmatch(name) is None:
        yield path, "allowed as a name: at most 63 letters, digits, '_', '-' and '.'"
    if any(not amount > 0 for amount in each.resources.values()):
        yield (*path, "resources"), f"got {dict(each.resources)}; allowed: amounts above 0"
    elif each.resources.get("CPU", 0) < 1:
        yield (*path, "resources"), "got no CPU; allowed: at least CPU: 1, which each rank of a trial needs"
    elif config.devices.use == "gpu" and each.resources.get("GPU", 0) < 1:
        yield (*path, "resources"), "got no GPU; allowed with devices.use gpu: at least GPU: 1"
    if budget is not None and each.max_nodes and each.price_per_hour > budget:
        text = f"got {each.price_per_hour:g}, above cluster.max_cost_per_hour {budget:g}; no such node could be had"
        yield (*path, "price_per_hour"), text
