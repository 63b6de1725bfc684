"""A simulator for policies: any workload on any cluster through the very same `decide`, with a manual clock.

Standard library and numpy only; reads no file and no clock. What it takes as true (responses) is stated with every
figure: parametric models of the literature's form, tables that others published, or tables this project measured.
"""

from __future__ import annotations

from collections.abc import Callable

from orchestrator.policies.policy import Policy
from orchestrator.policies.simulator.application import Application, Applications, NoiseCurve
from orchestrator.policies.simulator.cluster import Cluster, Node, NodeChange, NodeEvent, parse_cluster, read_events
from orchestrator.policies.simulator.engine import Engine
from orchestrator.policies.simulator.guard import Guard, PolicyFaultError
from orchestrator.policies.simulator.job import Job
from orchestrator.policies.simulator.overseer import Nobody, Overseer
from orchestrator.policies.simulator.published import POLLUX_APPLICATIONS
from orchestrator.policies.simulator.record import Calibration, Span
from orchestrator.policies.simulator.report import JobResult, Summary, summarise
from orchestrator.policies.simulator.response import Load, Measured, Parametric, Response, Sharing
from orchestrator.policies.simulator.rows import TableError
from orchestrator.policies.simulator.rules import Rules
from orchestrator.policies.simulator.synthetic import helios_like, philly_like
from orchestrator.policies.simulator.workload import Submission, Workload, read_workload, write_workload
from orchestrator.policies.simulator.world import job_of

__all__ = [
    "POLLUX_APPLICATIONS",
    "Application",
    "Applications",
    "Calibration",
    "Cluster",
    "Engine",
    "Guard",
    "Job",
    "JobResult",
    "Load",
    "Measured",
    "Nobody",
    "Node",
    "NodeChange",
    "NodeEvent",
    "NoiseCurve",
    "Overseer",
    "Parametric",
    "PolicyFaultError",
    "Response",
    "Rules",
    "Sharing",
    "Span",
    "Submission",
    "Summary",
    "TableError",
    "Workload",
    "helios_like",
    "parse_cluster",
    "philly_like",
    "read_events",
    "read_workload",
    "simulate",
    "summarise",
    "write_workload",
]


def simulate(  # noqa: PLR0913 -- all but three are by name and have a default
    policy: Policy,
    workload: Workload,
    cluster: Cluster,
    *,
    name: str = "policy",
    applications: Applications = POLLUX_APPLICATIONS,
    rules: Rules | None = None,
    overseer: Overseer | None = None,
    make: Callable[[Submission, Applications], Job] = job_of,
) -> Summary:
    """Run a workload on a cluster under a policy, and say what came of it.

    `overseer` may end and submit jobs as it likes; `make` makes a job of a submission.

    Raises:
        PolicyFaultError: the policy raised, returned an illegal plan or did not return.
        KeyError: the workload names an application that is not in `applications`.
    """
    rules = rules or Rules()
    guard = Guard(policy=policy, name=name, limit_s=rules.limit_s)
    engine = Engine(guard, applications, cluster, rules, overseer or Nobody(), make)
    engine.run(workload)
    return summarise(engine, name)
