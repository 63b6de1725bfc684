"""The parts of `bench_gpu_share` that need shares to differ: a protected trial, and whether shares are real."""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.bench import run_timeline, share_runs
from tests.bench.live_plane import Plane, opened
from tests.bench.part_process import Row, keep
from tests.bench.part_runner import left
from tests.bench.results_file import ROOT, say
from tests.bench.share_control import Controls
from tests.bench.sharing_policy import CYCLE, ProtectFirst, TakeTurns
from tests.bench.two_gpu_parts import compare

SIZE = "34M"
"""Its steps fill the card, so shares matter; those of 7 M wait for their launches."""
ALONE_S, NUM_TRIALS = 6.0, 4
SETTLE_S = 1.2
SHARE_FIELDS = {"enabled": True, "min": 1 / 16, "max": 1.0}
FRONT_SLACK = 0.03
"""Part by which another point must be better in one thing, and as good in the other, to be better than a point."""
STAGE_PHASES = 4
MEMORY_FRACTION = 0.2
TOLERANCE = 0.02
CONTROL_S = 3.0
_STARTED_STEPS = 30


def protected(given: argparse.Namespace) -> Row:
    """One trial beside three, whose share turns: its speed against alone, the sum of all, and what the policy does."""
    size, policy = _size(given), ProtectFirst()
    num_turns = len(policy.parts.split(",")) + len(policy.urgencies.split(","))
    file = share_runs.run_file(
        "protected",
        given.directory / "runs-protected",
        size,
        search={"num_trials": NUM_TRIALS, "max_concurrent": NUM_TRIALS},
        dials={**_dials(given), "share": SHARE_FIELDS},
        policy={"name": "tests.bench.sharing_policy:ProtectFirst", "period_s": 0.1},
        devices={"use": "cpu"} if given.rehearse else {"use": "gpu", "gpu_share": "sm_groups"},
        telemetry={"send_period_s": 0.1},
    )
    with opened(file, num_known=NUM_TRIALS) as plane:
        plane.begin(0, {})
        plane.wait_for_step(0, _STARTED_STEPS, 30.0)
        time.sleep(ALONE_S)
        for number in range(1, NUM_TRIALS):
            plane.begin(number, {})
        for number in range(1, NUM_TRIALS):
            plane.wait_for_step(number, _STARTED_STEPS, 30.0)
        time.sleep(policy.lead_s + policy.phase_s * num_turns + 0.5)
    return _curve(given, plane.directory, size, policy)


def _curve(given: argparse.Namespace, directory: Path, size: str, policy: ProtectFirst) -> Row:
    table = run_timeline.steps_of(directory)
    factor = float(share_runs.model_of(size)[0]["context"])
    assigned = {entry["trial_id"]: entry["t_s"] for entry in run_timeline.entries(directory, "trial_assigned")}
    first, last_s = min(assigned), max(assigned.values())
    before_s = min(moment for trial, moment in assigned.items() if trial != first)
    alone = factor * run_timeline.speed_between(table, before_s - ALONE_S / 2, before_s - 0.2)[first]
    begin_s = last_s + policy.lead_s
    parts, urgencies = policy.parts.split(","), policy.urgencies.split(",")
    points = []
    for number, name in enumerate([*(f"parts {p}" for p in parts), *(f"urgency {u}" for u in urgencies)]):
        low_s, high_s = begin_s + number * policy.phase_s + SETTLE_S, begin_s + (number + 1) * policy.phase_s
        speeds = {trial: factor * each for trial, each in run_timeline.speed_between(table, low_s, high_s).items()}
        inside = table[(table["start_s"] >= low_s) & (table["end_s"] < high_s)]
        points.append(
            {
                "turn": name,
                "is_policy": number >= len(parts),
                "shares": {str(t): float(v) for t, v in inside.groupby("trial_id")["share"].last().items()},
                "cores": {str(t): float(v) for t, v in inside.groupby("trial_id")["cores"].last().items()},
                "protected_tokens_per_s": speeds.get(first, 0.0),
                "protected_to_alone": speeds.get(first, 0.0) / alone,
                "sum_tokens_per_s": sum(speeds.values()),
            }
        )
    for point in points:
        point["is_on_front"] = not any(_is_better(other, point) for other in points)
        say(
            f"{point['turn']}: {point['protected_to_alone']:.2f} of alone, {point['sum_tokens_per_s']:.0f} in sum, "
            f"on the front: {point['is_on_front']}"
        )
    return {
        "size": size,
        "alone_tokens_per_s": alone,
        "plain_mps": _plain(given, size, alone),
        "points": points,
        "policy_is_on_front": all(point["is_on_front"] for point in points if point["is_policy"]),
        "refusals": [entry["violations"] for entry in run_timeline.entries(directory, "refusal")],
        **_mechanism(directory),
    }


def _plain(given: argparse.Namespace, size: str, alone: float) -> Row:
    """As many equal trials under plain MPS, as earlier parts measured them: by hand, and ours where it came by."""
    hand, mine = left(given, "by_hand") or {}, left(given, f"ours-{size}") or {}
    sums = {
        "by hand": hand.get(size, {}).get("tokens_per_s", {}).get(str(NUM_TRIALS)),
        "ours": mine.get("by_count", {}).get(str(NUM_TRIALS), {}).get("tokens_per_s"),
    }
    return {
        name: {"sum_tokens_per_s": total, "protected_to_alone": total / NUM_TRIALS / alone}
        for name, total in sums.items()
        if total is not None
    }


def _is_better(one: Row, other: Row) -> bool:
    """Whether a point is better in one thing by more than the slack, and not worse in the other by more than that."""
    gains = [one[key] / max(other[key], 1e-9) for key in ("protected_tokens_per_s", "sum_tokens_per_s")]
    return bool(max(gains) > 1 + FRONT_SLACK and min(gains) >= 1.0)


def verify(given: argparse.Namespace, step_mode: str = "auto") -> Row:
    """Trials whose groups turn, alone and beside each other: the checks in the journal, and losses against one still.

    The first is alone, then beside the second, which is then alone, then beside a third that keeps its share. So the
    first and the second have been without each neighbour before, and are checked; the third is the undisturbed one.
    """
    size, policy = _size(given), TakeTurns()
    cap: Row = {} if given.rehearse else {"gpu_share": "sm_groups", "memory_fraction": MEMORY_FRACTION}
    file = share_runs.run_file(
        f"verify-{step_mode}",
        given.directory / "runs-verify",
        size,
        search={"num_trials": 3, "max_concurrent": 2},
        dials={**_dials(given), "share": SHARE_FIELDS},
        policy={"name": "tests.bench.sharing_policy:TakeTurns", "period_s": 0.1},
        devices={"use": "cpu" if given.rehearse else "gpu", "step_mode": step_mode, **cap},
        telemetry={"send_period_s": 0.1},
    )
    with opened(file, num_known=2) as plane:
        for stage in _stages(plane, policy.phase_s):
            say(f"{stage} at {time.monotonic():.1f} s")
    directory = plane.directory
    checks = run_timeline.entries(directory, "check")
    losses = {f"trial-{number:05d}": _losses(directory, number) for number in range(3)}
    verdicts: dict[str, int] = {}
    for entry in checks:
        key = f"{entry['trial_id']} {entry['what']} {entry['verdict']}"
        verdicts[key] = verdicts.get(key, 0) + 1
    still = losses["trial-00002"]
    return {
        "size": size,
        "graph_ratio": float((run_timeline.steps_of(directory)["flags"] // 4 % 2).mean()),
        "parts": CYCLE,
        "verdicts": verdicts,
        # `speed` compares with a policy's prediction, and this policy makes none.
        "all_held": bool(checks) and all(entry["verdict"] == "held" for entry in checks),
        "checks": [{k: e.get(k) for k in ("trial_id", "what", "expected", "observed", "reason")} for e in checks],
        "changes": len([e for e in run_timeline.entries(directory, "ack") if "share" in e["dials"]]),
        "against_still": {
            name: {k: v for k, v in compare(mine, still, TOLERANCE).items() if k not in {"losses", "steps_missing"}}
            for name, mine in losses.items()
        },
        "verified": _verified(directory),
        "refusals": [entry["violations"] for entry in run_timeline.entries(directory, "refusal")],
        **_mechanism(directory),
    }


def _stages(plane: Plane, phase_s: float) -> Iterator[str]:
    """Who trains when. A stage begins with a phase and sees it again in full at its end, and each other one once."""
    time.sleep(phase_s - time.monotonic() % phase_s)
    plane.begin(0, {})
    yield "the first alone"
    time.sleep(STAGE_PHASES * phase_s)
    plane.begin(1, {})
    yield "the second beside it"
    time.sleep(STAGE_PHASES * phase_s)
    plane.end(0)
    yield "the second alone"
    time.sleep(STAGE_PHASES * phase_s)
    plane.begin(2, {})
    yield "a third beside it, whose share stays"
    time.sleep(STAGE_PHASES * phase_s)


def control(given: argparse.Namespace) -> Row:
    """Shares that are none: the same groups for two trials, and no cap of memory; `verification` must say so."""
    from orchestrator.share.mps import OwnMps

    size = _size(given)
    mps = None if given.rehearse else OwnMps()
    try:
        controls = Controls(2, size, {} if mps is None else mps.start().environment)
        try:
            found = _contention(controls, size, *(((0,), (1,)) if given.rehearse else (range(7), range(7, 14))))
            keep(given, "control, so far", found)
            if given.rehearse:
                return {**found, "memory": "makes no sense on cores: their memory is nobody's part"}
            return {**found, "memory": _memory(controls)}
        finally:
            controls.close()
    finally:
        if mps is not None:
            mps.stop()


def _contention(controls: Controls, size: str, one: Any, other: Any) -> Row:
    """Two trials alone, beside each other on units of their own, and on the same ones; what is said of each."""
    from orchestrator.share.contention import Contention

    probe = controls.do({0: {"units": list(one), "steps": 80}})[0]["step_s"]
    steps = max(80, int(CONTROL_S / probe))
    orders = [{"units": list(units), "steps": steps} for units in (one, other)]
    alone = {number: controls.do({number: orders[number]})[number] for number in (0, 1)}
    found: Row = {"size": size, "steps": steps, "alone": alone}
    for name, pair in (("disjoint", orders), ("same", [orders[0], orders[0]])):
        beside = controls.do(dict(enumerate(pair)))
        told = {}
        for number in (0, 1):
            judge = Contention()
            judge.note("same share", frozenset(), alone[number]["step_s"])
            check = judge.note("same share", frozenset({"the other"}), beside[number]["step_s"])
            told[number] = {"step_s": beside[number]["step_s"], "ratio": check.observed, "verdict": check.verdict.value}
        found[name] = told
        say(f"{name}: {told}")
    found["disjoint_is_held"] = all(each["verdict"] == "held" for each in found["disjoint"].values())
    found["same_is_not_held"] = all(each["verdict"] == "not held" for each in found["same"].values())
    return found


def _memory(controls: Controls) -> Row:
    """A cap that refuses, and the same allocation without one, judged against the cap it should have had."""
    from orchestrator.share.verification import judge_memory

    found: Row = {}
    for name, cap in (("capped", MEMORY_FRACTION), ("uncapped", None)):
        answer = controls.do({0: {"cap": cap, "take": 1.5 * MEMORY_FRACTION}})[0]
        check = judge_memory(int(MEMORY_FRACTION * answer["total_bytes"]), answer["peak_bytes"], "the rank's own peak")
        found[name] = {**answer, "verdict": check.verdict.value, "reason": check.reason}
    found["capped_is_refused_and_held"] = bool(found["capped"]["refused"]) and found["capped"]["verdict"] == "held"
    found["uncapped_is_not_held"] = found["uncapped"]["verdict"] == "not held"
    return found


def _size(given: argparse.Namespace) -> str:
    return "tiny" if given.rehearse else SIZE


def _dials(given: argparse.Namespace) -> Row:
    tier = "fp32" if given.rehearse else "bf16"
    return {"batch": {"enabled": False}, "precision": {"enabled": False, "tiers": [tier]}}


def _losses(directory: Path, number: int) -> dict[int, float]:
    table = run_timeline.steps_of(directory)
    mine = table[(table["trial_id"] == f"trial-{number:05d}") & (table["num_samples"] > 0)]
    return dict(zip(mine["step"].astype(int), mine["loss"].astype(float), strict=True))


def _verified(directory: Path) -> Row:
    """What `orchestrator verify` says of the run: that no unit was granted twice, among others."""
    command = [sys.executable, "-m", "orchestrator", "verify", str(directory), "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    with contextlib.suppress(ValueError):
        report = json.loads(done.stdout)
        return {"exit_code": done.returncode, **{key: report.get(key) for key in ("violations", "notes", "checked")}}
    return {"exit_code": done.returncode, "text": done.stdout[-500:] + done.stderr[-500:]}


def _mechanism(directory: Path) -> Row:
    hellos = [entry["hello"] for entry in run_timeline.entries(directory, "slot") if entry.get("hello")]
    return {"enforced_by": sorted({f"{hello['enforced_by']}: {hello['enforcement']}" for hello in hellos})}
