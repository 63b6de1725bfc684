"""Whether a run kept its promises, judged from what it wrote: the journal and the telemetry.

Trusts nothing the controller says of itself: grants are replayed, decisions are taken again, samples are counted. Needs
neither torch nor Ray. Works on a run that goes on, whose last second may not be on disk yet.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from orchestrator import evidence
from orchestrator.control.events import (
    SPARE_REASON,
    Acknowledged,
    GainRealised,
    Offered,
    PlanCommitted,
    Reported,
    RunBegan,
    RunEnded,
    ShareChecked,
    TrialQueued,
)
from orchestrator.control.joint import part_of
from orchestrator.control.journal import History, read_history, segments
from orchestrator.policies import FairShare, Plan, Policy, Snapshot, build_policy, dumps, plan_from, snapshot_from
from orchestrator.policies.plan import Generation
from orchestrator.run_dirs import ENDED_STATES, read_status
from orchestrator.share.verification import SPEED_TOLERANCE, Verdict, judge_speed
from orchestrator.telemetry.store import read_table
from orchestrator.telemetry.tables import TableKind
from orchestrator.view import verify_evidence, verify_grants, verify_steps
from orchestrator.view.finding import Code, Finding

_NOTHING_TOLD = "the journal is gone: nothing but the files themselves was looked at"


def verify(run_dir: Path, *, reads_checkpoints: bool = False) -> dict[str, Any]:
    """Check a run.

    Args:
        run_dir: its directory.
        reads_checkpoints: read every byte of every checkpoint; otherwise their manifests and the sizes of their files.

    Returns:
        `violations` (a list of `{code, text, trial_id, generation}`), `checked` (how many of what were looked at) and
        `notes` (what could not be checked, and damage that costs nothing).

    Raises:
        ConfigError: the directory is no run.
        TelemetryError: it was written by a newer version.
    """
    if not any(path.exists() for path in segments(run_dir)) and evidence.is_recorded(run_dir):
        gone = verify_evidence.recorded(run_dir, has_ended=True, notes=[])
        return {"violations": [asdict(finding) for finding in gone], "checked": {}, "notes": [_NOTHING_TOLD]}
    history = read_history(run_dir)
    steps = read_table(run_dir / "telemetry", TableKind.STEPS)
    notes = [f"telemetry: {note}" for note in steps.notes]
    findings = list(_journal(run_dir, history, notes))
    plans = _plans(history, findings)
    findings += verify_grants.wrong_order(history)
    findings += verify_grants.over_commitments(history, plans)
    findings += verify_grants.results_out_of_order(history)
    num_replayed = _replay(history, plans, findings, notes)
    attempts = verify_steps.attempts_of(steps.table)
    findings += verify_steps.unanswered(attempts, verify_grants.open_offers(history))
    findings += verify_steps.torn(attempts)
    findings += verify_steps.samples(attempts, history, notes)
    findings += verify_steps.gaps(attempts)
    findings += verify_grants.endings(history)
    has_ended = (read_status(run_dir) or {}).get("state") in ENDED_STATES
    results = read_table(run_dir / "telemetry", TableKind.RESULTS)
    notes += [f"telemetry: {note}" for note in results.notes]
    findings += verify_evidence.recorded(run_dir, has_ended=has_ended, notes=notes)
    findings += verify_evidence.unreadable([*steps.notes, *results.notes])
    findings += verify_evidence.missing_steps(history, attempts)
    findings += verify_evidence.results(history, results.table, has_ended=has_ended)
    findings += verify_evidence.checkpoints(run_dir, history, has_ended=has_ended, reads_all=reads_checkpoints)
    notes += _deviations(history)
    checked = {
        "entries": len(history.entries),
        "plans": len(plans),
        "plans_replayed": num_replayed,
        "offers": sum(1 for _ in history.of(Offered)),
        "acks": sum(1 for _ in history.of(Acknowledged)),
        "results": sum(1 for _ in history.of(Reported)),
        "trials": sum(1 for _ in history.of(TrialQueued)),
        "attempts": len(attempts),
        "steps": steps.table.num_rows,
    }
    return {"violations": [asdict(finding) for finding in findings], "checked": checked, "notes": notes}


def _deviations(history: History) -> Iterator[str]:
    """Shares that were not what was granted, and changes that did not bring what was predicted: seen, not broken."""
    for entry in history.of(ShareChecked):
        if entry.verdict == Verdict.NOT_HELD:
            yield f"share of {entry.trial_id} under plan {entry.generation} not real: {entry.reason}"
    judged = [check for gain in history.of(GainRealised) if (check := judge_speed(gain.predicted, gain.realised))]
    num_off = sum(check.verdict is Verdict.NOT_HELD for check in judged)
    if num_off:
        yield (
            f"{num_off} of {len(judged)} changes with a prediction brought more than {100 * SPEED_TOLERANCE:.0f} %"
            " more or less goodput than predicted"
        )


def _journal(run_dir: Path, history: History, notes: list[str]) -> Iterator[Finding]:
    """Damaged lines; a torn last one is expected of a run that goes on or crashed, and costs nothing."""
    for damage in history.damage:
        yield Finding(code=Code.JOURNAL_TORN, text=f"journal: {damage}")
    state = (read_status(run_dir) or {}).get("state")
    if state in ENDED_STATES and not any(history.of(RunEnded)):
        yield Finding(code=Code.JOURNAL_TORN, text=f"journal: the run is {state}, and its last word is missing")
    if history.entries and next(history.of(RunBegan), None) is None:
        yield Finding(code=Code.JOURNAL_TORN, text="journal: its head is missing")
    if not history.torn_tail_bytes:
        return
    text = f"journal: the last line is torn ({history.torn_tail_bytes} bytes)"
    if state in ENDED_STATES:
        yield Finding(code=Code.JOURNAL_TORN, text=f"{text} although the run ended")
    else:
        notes.append(f"{text}: cut off by a crash or still being written, in either case not acted upon")


def _plans(history: History, findings: list[Finding]) -> dict[Generation, Plan]:
    plans: dict[Generation, Plan] = {}
    for entry in history.of(PlanCommitted):
        try:
            plans[entry.generation] = part_of(plan_from(entry.plan), entry.prefix)
        except ValueError as error:
            text = f"plan {entry.generation} cannot be read: {error}"
            findings.append(Finding(code=Code.JOURNAL_TORN, text=text, generation=int(entry.generation)))
    return plans


def _replay(history: History, plans: dict[Generation, Plan], findings: list[Finding], notes: list[str]) -> int:
    """Take every decision again; returns how many could be."""
    head = next(history.of(RunBegan), None)
    if head is None:
        notes.append("decisions were not replayed: the journal has no head that names the policy")
        return 0
    try:
        policy = build_policy(head.policy, head.policy_params)
    except (ValueError, ImportError, SyntaxError) as error:
        notes.append(f"decisions were not replayed: {error}")
        return 0
    num_replayed = 0
    for entry in history.of(PlanCommitted):
        if entry.generation not in plans:
            continue
        plan = plan_from(entry.plan)  # of all runs that were decided together
        problem = _mismatch(policy, entry, plan)
        num_replayed += 1
        if problem is not None:
            findings.append(Finding(code=Code.REPLAY_MISMATCH, text=problem, generation=int(entry.generation)))
    return num_replayed


def _mismatch(policy: Policy, entry: PlanCommitted, plan: Plan) -> str | None:
    """Why the replay of a decision is not what the journal has; None when it is, byte for byte."""
    try:
        again = _decide(policy, snapshot_from(entry.snapshot), plan)
        text = dumps(again)
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        return f"plan {entry.generation} cannot be decided again: {type(error).__name__}: {error}"
    if text == dumps(plan):
        return None
    for new, old in zip(again.allocations, plan.allocations, strict=False):
        if new != old:
            return (
                f"plan {entry.generation} decided again gives {new.trial_id} {dumps(new.settings)} ({new.reason}),"
                f" the journal has {dumps(old.settings)} for {old.trial_id} ({old.reason})"
            )
    return f"plan {entry.generation} decided again differs: '{again.reason}' against '{plan.reason}'"


def _decide(policy: Policy, snapshot: Snapshot, plan: Plan) -> Plan:
    if plan.reason.startswith(SPARE_REASON):
        return replace(FairShare().decide(snapshot), reason=plan.reason)
    return policy.decide(snapshot)
