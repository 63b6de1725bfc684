"""The decisions of a run taken again: by its own policy, byte for byte, or by another one on the same snapshots.

Reads the journal only. The other policy answers each snapshot as it was: what it would have done at that instant, not
what would have followed from it. Called by the command `simulate`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from orchestrator.control.events import SPARE_REASON, GainRealised, PlanCommitted, RunBegan
from orchestrator.control.journal import History, read_history
from orchestrator.errors import JournalError, PlanError
from orchestrator.policies import FairShare, Plan, Policy, Snapshot, dumps, plan_from, snapshot_from, to_jsonable
from orchestrator.policies.simulator import Guard, PolicyFaultError
from orchestrator.simulate.inputs import policy_with


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """One recorded decision and the one taken again.

    Attributes:
        generation: its number.
        now_s: when it was taken, on the run's clock.
        snapshot: what it was made from.
        recorded: the plan of the journal.
        decided: the plan that the asked policy gives.
        is_same: whether both are the same, byte for byte.
    """

    generation: int
    now_s: float
    snapshot: Snapshot
    recorded: Plan
    decided: Plan
    is_same: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """All decisions of a run, taken again by one policy.

    Attributes:
        run_id: the run.
        policy: who was asked now.
        own_policy: who decided then.
        decisions: in order.
        gains: (predicted, realised) gain of changes that settled, as the run recorded them.
        notes: what could not be read.
    """

    run_id: str
    policy: str
    own_policy: str
    decisions: tuple[Decision, ...]
    gains: tuple[tuple[float, float], ...]
    notes: tuple[str, ...]

    @property
    def num_same(self) -> int:
        """Decisions that came out the same, byte for byte."""
        return sum(decision.is_same for decision in self.decisions)


def replay(run_dir: Path, policy: Policy | None = None, name: str | None = None) -> Replay:
    """Take the decisions of a run again, by the policy of its journal where none is given.

    Raises:
        ConfigError: the directory is no run, or its policy is not there any more.
        JournalError: the journal names no policy, or a decision cannot be read.
        PlanError: the policy raised, returned an illegal plan or did not return.
    """
    history = read_history(run_dir)
    head = next(history.of(RunBegan), None)
    if head is None:
        raise JournalError(f"the journal of {run_dir} has no head that names its policy; name one with --policy")
    asked = policy or policy_with(head.policy, head.policy_params)
    guard = Guard(policy=asked, name=name or head.policy)
    try:
        decisions = tuple(_decisions(history, guard, is_own=policy is None))
    except PolicyFaultError as error:
        raise PlanError(str(error)) from error
    finally:
        guard.close()
    return Replay(
        run_id=head.run_id,
        policy=guard.name,
        own_policy=head.policy,
        decisions=decisions,
        gains=tuple((g.predicted, g.realised) for g in history.of(GainRealised) if g.predicted is not None),
        notes=history.damage,
    )


def to_dict(found: Replay, *, is_own: bool) -> dict[str, Any]:
    """What `--json` prints."""
    answer: dict[str, Any] = {
        "run_id": found.run_id,
        "policy": found.policy,
        "own_policy": found.own_policy,
        "num_decisions": len(found.decisions),
        "num_same": found.num_same,
        "notes": list(found.notes),
    }
    if not is_own or found.num_same < len(found.decisions):
        answer["decisions"] = [_compared(decision) for decision in found.decisions]
    return answer


def render(found: Replay, *, is_own: bool) -> str:
    """The replay in a few lines for people."""
    total = len(found.decisions)
    if is_own:
        lines = [f"{found.run_id}: {found.num_same} of {total} decisions of {found.policy} reproduced byte for byte"]
    else:
        lines = [f"{found.run_id}: {found.policy} instead of {found.own_policy} on the same {total} snapshots"]
    for decision in found.decisions:
        if decision.is_same:
            continue
        changes = _changes(decision)
        text = "; ".join(changes[:4]) or f"reasons only: {decision.decided.reason}"
        more = f"; {len(changes) - 4} more" if len(changes) > 4 else ""
        lines.append(f"  plan {decision.generation} at {decision.now_s:.1f} s: {text}{more}")
    if not is_own:
        lines.append(f"  {total - found.num_same} of {total} plans differ; each is what it would have done right then")
    return "\n".join([*lines, *(f"  note: {note}" for note in found.notes)])


def _decisions(history: History, guard: Guard, *, is_own: bool) -> Iterator[Decision]:
    for entry in history.of(PlanCommitted):
        try:
            snapshot, recorded = snapshot_from(entry.snapshot), plan_from(entry.plan)
        except ValueError as error:
            raise JournalError(f"decision {entry.generation} cannot be read: {error}") from error
        if is_own and recorded.reason.startswith(SPARE_REASON):
            decided = replace(FairShare().decide(snapshot), reason=recorded.reason)
        else:
            decided = guard.decide(snapshot)
        yield Decision(
            generation=int(entry.generation),
            now_s=snapshot.now_s,
            snapshot=snapshot,
            recorded=recorded,
            decided=decided,
            is_same=dumps(decided) == _canonical(entry.plan),
        )


def _canonical(value: Mapping[str, Any]) -> str:
    """What the journal holds, as bytes were written."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _compared(decision: Decision) -> dict[str, Any]:
    rows = []
    for then, now in zip(decision.recorded.allocations, decision.decided.allocations, strict=True):
        rows.append(
            {
                "trial": then.trial_id,
                "recorded": to_jsonable(then.settings),
                "decided": to_jsonable(now.settings),
                "recorded_goodput": then.predicted_goodput,
                "decided_goodput": now.predicted_goodput,
                "reason": now.reason,
            }
        )
    return {
        "generation": decision.generation,
        "now_s": decision.now_s,
        "is_same": decision.is_same,
        "reason": decision.decided.reason,
        "trials": rows,
    }


def _changes(decision: Decision) -> list[str]:
    """One clause for each trial that would get something else."""
    found = []
    for then, now in zip(decision.recorded.allocations, decision.decided.allocations, strict=True):
        parts = [
            f"{word} {before} -> {after}"
            for word, before, after in (
                ("share", f"{then.settings.share:.3f}", f"{now.settings.share:.3f}"),
                ("batch", str(then.settings.global_batch), str(now.settings.global_batch)),
                ("tier", then.settings.tier.value, now.settings.tier.value),
            )
            if before != after
        ]
        if parts:
            found.append(f"{now.trial_id} {', '.join(parts)}")
    return found
