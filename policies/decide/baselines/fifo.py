"""First in, first out: what most clusters do.

Trials start in the order in which they came, on the devices their users asked for, and keep them until they end. One
that does not fit makes all behind it wait.

Source: the default order of batch systems (Slurm's `priority/basic`; YARN's FIFO scheduler), without backfilling.
"""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.policies.decide.baselines.fixed import with_fixed
from orchestrator.policies.decide.first_come import first_come
from orchestrator.policies.decide.fitted import make_plan
from orchestrator.policies.plan import Plan
from orchestrator.policies.snapshot import Snapshot


@dataclass(frozen=True, slots=True, kw_only=True)
class Fifo:
    """Serves movable trials in the order of their arrival; the others keep their start shares.

    Attributes:
        blocks: whether those behind a trial that does not fit have to wait for it.
    """

    blocks: bool = True

    def decide(self, snapshot: Snapshot) -> Plan:
        """Return the plan that lets the first run as they asked."""
        return make_plan(
            snapshot, "fifo", with_fixed(snapshot, lambda m, f, b: first_come(m, f, b, blocks=self.blocks))
        )
