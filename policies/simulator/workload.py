"""A workload: who submits which job when, read from and written to CSV.

The columns `name,time,application,num_replicas,batch_size` are those of the Pollux simulator (OSDI 2021); more may
follow, so that tenants, deadlines and jobs that end early can be told. Knows neither what an application is nor how it
is scheduled.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from orchestrator.policies.simulator.rows import Row, TableError, read_rows

REQUIRED = ("name", "time", "application", "num_replicas", "batch_size")
OPTIONAL = ("user", "priority", "deadline", "length", "stops_at")


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """One job as its user submits it.

    Attributes:
        name: unique in the workload.
        time_s: when it is submitted.
        application: what it trains; the key of its response.
        num_replicas: workers its user asks for; policies that choose themselves ignore it.
        batch_size: global batch its user asks for, in samples.
        user: who submits it.
        priority: trials of a higher priority are served first.
        deadline_s: seconds after its submission by which it should have ended; None without one.
        length: how long it is, as a ratio of the application's usual number of samples.
        stops_at: part of its length after which it ends early, by its user or its search; 1 for one that completes.
    """

    name: str
    time_s: float
    application: str
    num_replicas: int
    batch_size: int
    user: str = ""
    priority: int = 0
    deadline_s: float | None = None
    length: float = 1.0
    stops_at: float = 1.0


Workload = tuple[Submission, ...]
"""Submissions in the order of their time."""


def read_workload(lines: Iterable[str], source: str, applications: Collection[str] | None = None) -> Workload:
    """The workload of a CSV, sorted by time.

    Args:
        lines: the lines of the file.
        source: what errors call it.
        applications: the known ones; None takes any name.

    Raises:
        TableError: something in it cannot be used; the message names line, column, value and what is allowed.

    >>> read_workload(["name,time,application,num_replicas,batch_size", "a,60,mlp,2,64"], "jobs.csv")[0].num_replicas
    2
    """
    seen: dict[str, int] = {}
    found = []
    for row in read_rows(lines, source, REQUIRED, OPTIONAL):
        job = _submission(row, applications)
        if job.name in seen:
            raise row.wrong("name", f"a name of its own; line {seen[job.name]} has the same")
        seen[job.name] = row.line
        found.append(job)
    if not found:
        raise TableError(f"{source}: there is no job in it; allowed: at least one line below the head")
    return tuple(sorted(found, key=lambda job: (job.time_s, job.name)))


def write_workload(workload: Workload) -> str:
    """The workload as CSV text that `read_workload` reads back equal."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*REQUIRED, *OPTIONAL])
    for job in workload:
        deadline = "" if job.deadline_s is None else repr(job.deadline_s)
        cells = [job.name, repr(job.time_s), job.application, job.num_replicas, job.batch_size]
        writer.writerow([*cells, job.user, job.priority, deadline, repr(job.length), repr(job.stops_at)])
    return text.getvalue()


def _submission(row: Row, applications: Collection[str] | None) -> Submission:
    name = row.text("name")
    if not name.isprintable():
        raise row.wrong("name", "printable characters")
    application = row.text("application") if applications is None else row.one_of("application", applications)
    return Submission(
        name=name,
        time_s=row.seconds("time"),
        application=application,
        num_replicas=row.integer("num_replicas"),
        batch_size=row.integer("batch_size"),
        user=row.optional("user") or "",
        priority=row.integer("priority", least=0) if row.optional("priority") else 0,
        deadline_s=row.number("deadline", above=0.0) if row.optional("deadline") else None,
        length=row.number("length", above=0.0) if row.optional("length") else 1.0,
        stops_at=row.number("stops_at", above=0.0, most=1.0) if row.optional("stops_at") else 1.0,
    )
