"""Job tables that others published, or that were measured: step times of placements, gradient statistics of a course.

Step times: `application`, then `placement` (workers on each node as digits, '44' is two nodes of four) or `num_nodes`
and `num_replicas`, then `local_bsz`, `step_time`, `sync_time` (seconds). Gradient statistics: `progress` (steps at the
base batch so far), `grad_sqr`, `grad_var` (at the base batch). Those are the columns of the Pollux simulator, whose
tables can be read as they are. Shares and tiers: `throughput` at a `share` of one device, or in a `tier`; what this
project measured is in the folder `measured`. Takes lines and knows no file.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

from orchestrator.policies.simulator.application import Application, NoiseCurve
from orchestrator.policies.simulator.response import Measured, Sharing
from orchestrator.policies.simulator.rows import Row, TableError, read_rows
from orchestrator.policies.tier import NAMED_TIERS, Tier

SPEED_COLUMNS = ("local_bsz", "step_time", "sync_time")
SPEED_OPTIONAL = ("application", "placement", "num_nodes", "num_replicas")
NOISE_COLUMNS = ("progress", "grad_sqr", "grad_var")
NOISE_OPTIONAL = ("application", "iteration", "metric")
SHARING_COLUMNS = ("application", "share", "throughput")
SHARING_OPTIONAL = ("tier", "micro_batch", "sequence", "trials", "step_mode")
TIER_COLUMNS = ("application", "tier", "throughput")
TIER_OPTIONAL = ("step_mode", "micro_batch", "sequence")
MAX_NOISE_SCALE = float(2**20)

Cells = dict[tuple[int, int], tuple[tuple[int, float, float], ...]]


def read_speeds(lines: Iterable[str], source: str) -> dict[str, Cells]:
    """Step times by application ('' where the table has no such column); placements of one size are averaged.

    Raises:
        TableError: something in it cannot be used; the message names line, column, value and what is allowed.
    """
    sums: dict[str, dict[tuple[int, int, int], list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    for row in read_rows(lines, source, SPEED_COLUMNS, SPEED_OPTIONAL):
        num_nodes, num_workers = _placement(row)
        step_s, sync_s = row.number("step_time", above=0.0), row.number("sync_time")
        if sync_s >= step_s:
            raise row.wrong("sync_time", f"less than step_time, {step_s:g}")
        key = (num_nodes, num_workers, row.integer("local_bsz"))
        sums[row.optional("application") or ""][key].append((step_s, sync_s))
    if not sums:
        raise TableError(f"{source}: there is no measurement in it; allowed: at least one line below the head")
    return {application: _cells(found) for application, found in sums.items()}


def read_noise(lines: Iterable[str], source: str, base_batch: int) -> tuple[NoiseCurve, float]:
    """The noise curve of a course, and its length in samples at the base batch.

    Raises:
        TableError: something in it cannot be used; the message names line, column, value and what is allowed.
    """
    ends: list[float] = []
    scales: list[float] = []
    for row in read_rows(lines, source, NOISE_COLUMNS, NOISE_OPTIONAL):
        progress = row.number("progress", above=ends[-1] if ends else 0.0)
        variance, square = row.number("grad_var"), row.number("grad_sqr")
        scale = MAX_NOISE_SCALE if variance >= square * MAX_NOISE_SCALE / base_batch else base_batch * variance / square
        ends.append(progress)
        scales.append(max(1.0, scale))
    if not ends:
        raise TableError(f"{source}: there is no line below the head; allowed: one for each epoch at least")
    total = ends[-1]
    return NoiseCurve(ends=tuple(end / total for end in ends), scales=tuple(scales)), total * base_batch


def read_sharing(lines: Iterable[str], source: str) -> dict[str, Sharing]:
    """Speed against share by application, from throughputs measured at shares; several of one share are averaged.

    The table must hold share 1 of each application: the whole device, alone.

    Raises:
        TableError: something in it cannot be used; the message names line, column, value and what is allowed.
    """
    found: dict[str, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in read_rows(lines, source, SHARING_COLUMNS, SHARING_OPTIONAL):
        share = row.number("share", above=0.0, most=1.0)
        found[row.text("application")][share].append(row.number("throughput", above=0.0))
    for application, points in found.items():
        if 1.0 not in points:
            raise TableError(f"{source}: {application!r} has no line with share 1; allowed: one at least, alone")
    return {
        application: Sharing(
            points=tuple((share, _mean(points[share]) / _mean(points[1.0])) for share in sorted(points))
        )
        for application, points in found.items()
    }


def read_tiers(lines: Iterable[str], source: str, step_mode: str = "eager") -> dict[str, dict[Tier, float]]:
    """Throughput of each tier by application, in one step mode; only ratios between tiers mean anything.

    Raises:
        TableError: something in it cannot be used; the message names line, column, value and what is allowed.
    """
    found: dict[str, dict[Tier, float]] = defaultdict(dict)
    for row in read_rows(lines, source, TIER_COLUMNS, TIER_OPTIONAL):
        tier = Tier(row.one_of("tier", [each.value for each in NAMED_TIERS]))
        throughput = row.number("throughput", above=0.0)
        if (row.optional("step_mode") or step_mode) == step_mode:
            found[row.text("application")][tier] = throughput
    return dict(found)


def application_from(
    name: str, cells: Cells, noise: tuple[NoiseCurve, float], *, batches: Sequence[int], max_workers: int = 64
) -> Application:
    """An application made of tables.

    Args:
        name: what workloads call it.
        cells: its step times.
        noise: its noise curve and length, at the smallest of `batches`.
        batches: global batches between which it may be trained; the smallest is the base batch.
        max_workers: most ranks that make sense.
    """
    sizes = [size for found in cells.values() for size, _, _ in found]
    base_batch, max_batch = min(batches), max(batches)
    curve, num_samples = noise
    return Application(
        name=name,
        base_batch=base_batch,
        max_batch=max_batch,
        min_micro_batch=min(*sizes, base_batch),
        max_micro_batch=max(sizes),
        max_workers=max(1, min(max_workers, max_batch // min(*sizes, max_batch))),
        num_samples=num_samples,
        noise=curve,
        response=Measured(cells=cells),
        requests=((1, base_batch),),
    )


def _placement(row: Row) -> tuple[int, int]:
    """Nodes and workers of a line."""
    placement = row.optional("placement")
    if placement is None:
        num_nodes, num_workers = row.integer("num_nodes"), row.integer("num_replicas")
        if num_workers < num_nodes:
            raise row.wrong("num_replicas", f"a whole number >= num_nodes, {num_nodes}")
        return num_nodes, num_workers
    if not placement.isdigit() or not placement.isascii() or "0" in placement:
        raise row.wrong("placement", "the workers on each node as digits 1 to 9, such as 44")
    return len(placement), sum(int(digit) for digit in placement)


def _cells(found: dict[tuple[int, int, int], list[tuple[float, float]]]) -> Cells:
    groups: dict[tuple[int, int], list[tuple[int, float, float]]] = defaultdict(list)
    for (num_nodes, num_workers, size), times in sorted(found.items()):
        step_s = sum(step for step, _ in times) / len(times)
        sync_s = sum(sync for _, sync in times) / len(times)
        groups[num_nodes, num_workers].append((size, step_s, sync_s))
    return {key: tuple(cells) for key, cells in groups.items()}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
