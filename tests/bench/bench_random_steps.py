"""Ten thousand random steps of every policy: guaranteed minima and quotas violated, devices over-committed.

A step is a decision in a fleet of movable trials, after which the plan is in force and the world goes on by chance:
time, progress, arrivals, endings, overrides, silence, new promises and quotas, nodes that leave and return
(`policies.sample_fleets.walk`). Every plan is held against its numbers and against `policies.invariants`. Counts only,
no speed: the machine does not matter. `--repeats` is the number of thousands of steps per policy.
"""

from __future__ import annotations

import time
from typing import Any

from orchestrator.policies import POLICIES, build_policy
from orchestrator.policies.decide.goodput_joint import GoodputJoint
from orchestrator.policies.decide.worth import OBJECTIVES
from orchestrator.policies.invariants import check
from orchestrator.policies.policy import Policy
from orchestrator.policies.sample_fleets import walk
from tests.bench.results_file import Figure, Report, options, say
from tests.unit.policies.promises import broken_promises

THOUSAND = 1_000
MAX_KEPT = 5


def cases() -> dict[str, Policy]:
    """Every policy of the table, and the joint one under each objective, with fractions and without resting."""
    found: dict[str, Policy] = {name: build_policy(name) for name in sorted(POLICIES)}
    for objective in OBJECTIVES:
        name = f"goodput_joint, {objective}, fractions, no rest"
        found[name] = GoodputJoint(objective=objective, uses_fractions=True, cooldown_s=0.0)
    return found


def count(policy: Policy, seed: int, num_steps: int) -> dict[str, Any]:
    """What one walk of a policy broke; a policy that raises has broken everything."""
    broken: list[str] = []
    illegal: list[str] = []
    num_taken = num_allocations = 0
    for world, plan in walk(policy, seed, num_steps):
        num_taken += 1
        num_allocations += len(plan.allocations)
        broken += broken_promises(world, plan)
        illegal += [violation.text for violation in check(world, plan)]
    return {"steps": num_taken, "allocations": num_allocations, "broken": broken, "illegal": illegal}


def main() -> None:
    """All policies, one results file."""
    settings = options("random_steps", repeats=10)
    report = Report(settings)
    num_steps = 100 if settings.is_quick else THOUSAND
    rows: dict[str, Any] = {}
    for name, policy in cases().items():
        began_s = time.perf_counter()
        found = [count(policy, seed, num_steps) for seed in range(settings.repeats)]
        total = sum(each["steps"] for each in found)
        rows[name] = {
            "steps": total,
            "allocations": sum(each["allocations"] for each in found),
            "broken": sum(len(each["broken"]) for each in found),
            "illegal": sum(len(each["illegal"]) for each in found),
            "first": [text for each in found for text in (*each["broken"], *each["illegal"])][:MAX_KEPT],
        }
        say(f"  {name}: {total} steps in {time.perf_counter() - began_s:.0f} s, {rows[name]['broken']} broken promises")
    for kind, words in (("broken", "promises broken"), ("illegal", "invariants broken")):
        values = [float(row[kind]) for row in rows.values()]
        report.add(
            Figure(
                name=f"{words} in {min(row['steps'] for row in rows.values())} random steps of each policy",
                value=sum(values),
                statistic="sum over policies",
                unit="",
                low=min(values),
                high=max(values),
                spread="min to max over policies",
                values=values,
                target="0",
                is_met=sum(values) == 0,
            )
        )
    report.raw["policies"] = rows
    report.notes.append("promises: guaranteed minima, quotas of users, at most one of every device")
    report.write()


if __name__ == "__main__":
    main()
