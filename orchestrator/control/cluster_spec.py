"""What `orchestrator up` says of the policy actor that runs share. Values only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from orchestrator.control.spec import RunSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterSpec:
    """A shared policy actor.

    Attributes:
        version: of the orchestrator; runs of another one are refused.
        owner: who started it.
        storage: its own directory, for its log and the list of its runs.
        policy: a key of `policies.POLICIES`, or 'module:Class'; it decides for all runs.
        policy_params: its parameters.
        places: whether it pauses trials and chooses their devices.
        period_s: seconds between two decisions.
        deadline_s: seconds a decision may take.
        idle_timeout_s: seconds without a run after which the actor ends.
        quotas: the most devices that all trials of a user hold together.
    """

    version: str
    owner: str
    storage: str
    policy: str
    policy_params: dict[str, Any]
    places: bool
    period_s: float
    deadline_s: float
    idle_timeout_s: float
    quotas: Mapping[str, float] = field(default_factory=dict)

    def joined(self, spec: RunSpec, prefix: str) -> RunSpec | str:
        """A run as it is among others under this actor; why it cannot be, if it cannot."""
        if spec.node_types:
            return "it asks for nodes (cluster.node_types), which a run that shares a policy actor cannot"
        if spec.limits.can_resize:
            return "its trials change their number of ranks (dials.workers), which those of runs that share one cannot"
        start, limits = spec.start, spec.limits
        if self.places:
            if start.num_workers != 1:
                return f"its trials have {start.num_workers} ranks, and policy {self.policy} moves trials of one rank"
            start = replace(start, share=1.0)
            limits = replace(limits, min_share=limits.min_share if "share" in spec.dials else 1.0, max_share=1.0)
        return replace(
            spec,
            policy=self.policy,
            policy_params=dict(self.policy_params),
            places=self.places,
            period_s=self.period_s,
            deadline_s=self.deadline_s,
            prefix=prefix,
            start=start,
            limits=limits,
        )
