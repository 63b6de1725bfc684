"""What must hold between a search and its training: spaces, grids, who proposes trials and who stops them.

A part of `config.checks`, which calls `check_search`.
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Iterator

from orchestrator.config.model import AshaScheduler, MedianScheduler, PbtScheduler, RunConfig
from orchestrator.config.source import KeyPath
from orchestrator.config.values import ParamValue
from orchestrator.config.words import did_you_mean, printable, seen
from orchestrator.jobs.job_key import JobKey
from orchestrator.jobs.own import UserCodeError, changes_speed, load
from orchestrator.jobs.table import JobInfo, check_param, job_info

Finding = tuple[KeyPath, str]
_MAX_PAIRS = 4096


def check_search(config: RunConfig) -> Iterator[Finding]:
    """Every contradiction of the section `search`."""
    for check in (_space, _grid, _algorithm, _scheduler, _pbt):
        yield from check(config)


def known_info(config: RunConfig) -> JobInfo | None:
    """What is known of the job, None where `_job` finds that there is none."""
    try:
        return job_info(config.job.key)
    except ValueError:
        return None


def check_values(job: str, name: str, values: list[ParamValue], path: KeyPath) -> Iterator[Finding]:
    """What is wrong with values that a parameter of a job is to have."""
    info = job_info(job)
    title = printable(JobKey.of(job).path, 100)
    names = [param.name for param in info.params]
    if name not in names and info.takes_any:
        return
    if name not in names:
        shown = f"'{printable(name, 60)}'"
        yield path, f"unknown parameter {shown} of job {title}; allowed: {', '.join(names)}{did_you_mean(name, names)}"
        return
    for value in values:
        try:
            check_param(job, name, value)
        except ValueError as error:
            yield path, f"got {seen(value)}; {printable(str(error))}"
            return


def missing_params(config: RunConfig) -> Iterator[Finding]:
    """Parameters without a default that neither the run file gives nor its search.

    Not asked of a run whose search is a Tuner of the user's own, which brings them.
    """
    info = known_info(config)
    for number, space in enumerate(config.search.spaces):
        given = {*config.job.params, *space}
        missing = [] if info is None else [p.name for p in info.params if p.is_required and p.name not in given]
        if missing:
            where = "search.space" if len(config.search.spaces) == 1 else f"search.space[{number}]"
            yield ("job", "params"), f"no value for {', '.join(missing)}; give it here or search it in {where}"
            return


def _space(config: RunConfig) -> Iterator[Finding]:
    job, info, search = config.job.key, known_info(config), config.search
    if isinstance(search.space, str):
        yield from _space_function(config)
    if info is None:
        return
    for number, space in enumerate(search.spaces):
        root: KeyPath = ("search", "space", number) if isinstance(search.space, tuple) else ("search", "space")
        for name, distribution in space.items():
            path = (*root, name)
            if name in config.job.params:
                yield path, "is searched here and fixed in job.params; keep one of them"
            elif name in config.job.args:
                yield path, "is searched here and fixed in job.args; keep one of them"
            if isinstance(search.space, tuple) and distribution.grid is not None:
                yield path, "got a grid in a list of spaces; give it as a choice"
            yield from check_values(job, name, list(distribution.samples), path)
    for multiple, divisor in info.divisible:
        yield from _divisible(config, multiple, divisor)


def _space_function(config: RunConfig) -> Iterator[Finding]:
    """A function that draws must be there, and so must Optuna, whose trial it is given."""
    path, name = ("search", "space"), str(config.search.space)
    try:
        load(name)
    except UserCodeError as error:
        yield path, printable(error.text)
    if importlib.util.find_spec("optuna") is None:
        yield path, "got a function, which needs Optuna: pip install 'ray-orchestrator[optuna]'"
    if config.search.algorithm == "grid":
        yield ("search", "algorithm"), "got grid, and a function draws by itself; allowed: random or optuna"


def _divisible(config: RunConfig, multiple: str, divisor: str) -> Iterator[Finding]:
    pairs = itertools.product(_integers(config, multiple), _integers(config, divisor))
    for number, by in itertools.islice(pairs, _MAX_PAIRS):
        if by > 0 and number % by:
            text = (
                f"a trial could get {multiple}={number} with {divisor}={by}; {multiple} must be a multiple of {divisor}"
            )
            name = multiple if multiple in (*config.search.searched, *config.job.params) else divisor
            yield (("search", "space", name) if name in config.search.one_space else ("job", "params", name)), text
            return


def _integers(config: RunConfig, name: str) -> list[int]:
    """All integers a parameter can take; of a long range, its beginning."""
    if name in config.search.one_space:
        distribution = config.search.one_space[name]
        if distribution.randint is not None:
            low, high = distribution.randint
            return list(range(low, min(high, low + _MAX_PAIRS)))
        values: tuple[ParamValue, ...] = distribution.values
    else:
        param = job_info(config.job.key).param(name)
        values = (config.job.params.get(name, param.default if param else None),)
    return [v for v in values if isinstance(v, int) and not isinstance(v, bool)]


def _grid(config: RunConfig) -> Iterator[Finding]:
    points, trials = config.search.grid_points, config.search.num_trials
    if trials % points:
        nearest = max(points, trials - trials % points)
        text = f"got {trials}; the grid has {points} points and each is tried equally often; allowed: {nearest} or "
        yield ("search", "num_trials"), text + "another multiple"


def _scheduler(config: RunConfig) -> Iterator[Finding]:
    scheduler = config.search.scheduler
    if known_info(config) is None or not isinstance(scheduler, AshaScheduler | MedianScheduler):
        return
    if scheduler.grace_reports > config.max_reports:
        text = f"got {scheduler.grace_reports}; allowed: at most trial.max_reports = {config.max_reports}"
        yield ("search", "scheduler", "grace_reports"), text


def _algorithm(config: RunConfig) -> Iterator[Finding]:
    search, path = config.search, ("search", "algorithm")
    space = search.one_space
    grids = [name for name, distribution in space.items() if distribution.grid is not None]
    if search.algorithm == "grid" and len(search.spaces) > 1:
        yield path, "got 'grid' with a list of spaces; allowed: random or optuna"
    if search.algorithm == "grid" and len(grids) < len(space):
        other = next(name for name in space if name not in grids)
        yield path, f"got 'grid', but {other} is no grid; give it as {{grid: [...]}}, or choose random"
    elif search.algorithm == "optuna":
        if grids:
            yield path, f"got 'optuna', which proposes values by itself, but {grids[0]} is a grid; give it as a choice"
        if importlib.util.find_spec("optuna") is None:
            yield path, "got 'optuna', which is not installed: pip install 'ray-orchestrator[optuna]'"
        if search.scheduler.name == "pbt":
            yield path, "got 'optuna' with scheduler pbt, which perturbs parameters by itself; allowed: random or grid"


def _pbt(config: RunConfig) -> Iterator[Finding]:
    scheduler, path = config.search.scheduler, ("search", "scheduler", "mutate")
    if not isinstance(scheduler, PbtScheduler) or known_info(config) is None:
        return
    if len(config.search.spaces) != 1:
        yield ("search", "scheduler", "name"), "got pbt, which perturbs within one space; allowed: asha, median, fifo"
        return
    mutable = mutable_params(config)
    for name in scheduler.mutate or ():
        if name not in mutable:
            yield path, f"got '{printable(name, 60)}'; allowed: {', '.join(mutable) or 'none of those searched'}"
    if not mutable:
        text = "pbt has nothing to perturb: no searched parameter leaves the model as it is"
        yield ("search", "scheduler", "name"), f"{text}; search one such as lr, or choose asha"
    if config.search.num_trials < 2:
        yield ("search", "num_trials"), f"got {config.search.num_trials}; allowed: at least 2 with scheduler pbt"


def mutable_params(config: RunConfig) -> list[str]:
    """Searched parameters that a trial can change and still load the state of another."""
    info = job_info(config.job.key)
    changing = {param.name for param in info.params if param.changes_speed}
    known = {param.name for param in info.params}
    space = config.search.one_space
    return [name for name in space if name not in changing and (name in known or not changes_speed(name))]
