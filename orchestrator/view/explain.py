"""Why a decision was taken: what was weighed and chosen, what held it back, what was predicted and what came true.

Reads the journal alone, so it also works while the run goes on, after a crash and on another machine. `explain` gives
plain values for `--json`, `render` makes them readable.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from orchestrator.control.events import (
    Acknowledged,
    GainRealised,
    Overridden,
    PlanCommitted,
    PlanRefused,
    ShareChecked,
    TrialResized,
)
from orchestrator.control.journal import History, read_history
from orchestrator.errors import ConfigError, JournalError
from orchestrator.policies.codec import to_jsonable
from orchestrator.policies.decide.candidates import split
from orchestrator.policies.decide.fitted import FittedTrial, fit_trials
from orchestrator.policies.plan import Allocation, Generation, Plan, Settings, TrialId, changed_dials, diff, numbers
from orchestrator.policies.snapshot import Snapshot, TrialView
from orchestrator.share.verification import Verdict, judge_speed
from orchestrator.view.text import (
    MISSING,
    clean,
    dicts,
    mapping,
    show_count,
    show_gain,
    show_number,
    show_seconds,
    show_settings,
    table,
    wrap,
)

_WIDTH = 100


def explain(run_dir: Path, decision: int | None) -> dict[str, Any]:
    """One decision in full, or all of them in short.

    Args:
        run_dir: the run.
        decision: generation of the plan; None for the summary of all.

    Returns:
        For one decision `generation`, `reason`, `chosen` (what changed, one item per trial), `alternatives`, `binding`,
        `predicted_gain`, `realised_gain`, `applied`, `nodes` (the wish for each type of node, with the one before) and
        `trials`, which holds the same keys for each changed trial, and throughput, efficiency and goodput before and
        after: `predicted` (of trials that stay where they are) and `measured`; of several trials the top-level values
        are those of the one with the largest predicted gain.
        Each of `trials` also has `checks`: what was seen of its share and speed, in words, and `survival`: the
        probability to survive its next rung that the decision was taken with, None where it has none.
        For all of them `run_id`, `decisions`, `overrides`, `deviations` (shares that were not real), `resizes` and
        `refusals`.

    Raises:
        ConfigError: there is no such run or decision.
        JournalError: the decision is there but cannot be read.
    """
    history = read_history(run_dir)
    if decision is None:
        return _summary(run_dir, history)
    plans = {entry.generation: entry for entry in history.of(PlanCommitted)}
    entry = next((plan for generation, plan in plans.items() if generation == decision), None)
    if entry is None:
        allowed = f"{min(plans)} to {max(plans)}" if plans else "none yet, the run has taken no decision"
        raise ConfigError(
            f"decision {decision} is not in {run_dir}; allowed: {allowed}; `orchestrator explain {run_dir}` lists them"
        )
    return _one(entry, _Outcomes(history))


def render(answer: Mapping[str, Any]) -> str:
    """What `explain` returned, for people."""
    return "\n".join(_render_summary(answer) if "decisions" in answer else _render_one(answer))


class _Outcomes:
    """What became of allocations, by generation and trial."""

    def __init__(self, history: History) -> None:
        self._acks: dict[tuple[Generation, TrialId], list[Acknowledged]] = {}
        self._gains: dict[tuple[Generation, TrialId], GainRealised] = {}
        self._checks: dict[tuple[Generation, TrialId], list[str]] = {}
        for entry in history.entries:
            if isinstance(entry, Acknowledged):
                self._acks.setdefault((entry.generation, entry.trial_id), []).append(entry)
            elif isinstance(entry, GainRealised):
                self._gains[entry.generation, entry.trial_id] = entry
            elif isinstance(entry, ShareChecked):
                self._checks.setdefault((entry.generation, entry.trial_id), []).append(entry.reason)

    def realised_gain(self, generation: Generation, trial_id: TrialId) -> float | None:
        gain = self._gains.get((generation, trial_id))
        return None if gain is None else gain.realised

    def measured(self, generation: Generation, trial_id: TrialId) -> dict[str, dict[str, float]] | None:
        """Throughput, efficiency and goodput before and after, where they were measured."""
        gain = self._gains.get((generation, trial_id))
        return {"before": dict(gain.before), "after": dict(gain.after)} if gain is not None and gain.after else None

    def checks(self, generation: Generation, trial_id: TrialId) -> list[str]:
        """What was seen of the share, and of the speed against what was predicted, in words."""
        gain = self._gains.get((generation, trial_id))
        speed = None if gain is None else judge_speed(gain.predicted, gain.realised)
        return [*self._checks.get((generation, trial_id), []), *([] if speed is None else [speed.reason])]

    def applied(self, generation: Generation, trial_id: TrialId) -> list[dict[str, Any]]:
        acks = self._acks.get((generation, trial_id), [])
        return [{"trial": ack.trial_id, "step": ack.step, "ack_s": ack.ack_s} for ack in acks]


def _one(entry: PlanCommitted, outcomes: _Outcomes) -> dict[str, Any]:
    snapshot, plan = _decoded(entry)
    before = {trial.trial_id: snapshot.settings_in_force(trial) for trial in snapshot.trials}
    fitted_trials = {fitted.trial_id: fitted for fitted in fit_trials(split(snapshot)[0])}
    views = {trial.trial_id: trial for trial in snapshot.trials}
    trials = [
        {
            **_trial(plan.generation, allocation, before.get(allocation.trial_id), outcomes),
            "predicted": _predicted(fitted_trials.get(allocation.trial_id), allocation.settings),
            "survival": None if (view := views.get(allocation.trial_id)) is None else view.survival,
            "step_mode": None if view is None else _step_mode(view, allocation.settings),
        }
        for allocation in _changed(snapshot.plan, plan, before)
    ]
    trials.sort(key=lambda item: (item["predicted_gain"] is None, -(item["predicted_gain"] or 0.0), item["trial"]))
    first: Mapping[str, Any] = trials[0] if trials else {}
    return {
        "generation": int(plan.generation),
        "reason": plan.reason,
        "chosen": [item["chosen"] for item in trials],
        "alternatives": first.get("alternatives", []),
        "binding": first.get("binding", "none"),
        "predicted_gain": first.get("predicted_gain"),
        "realised_gain": first.get("realised_gain"),
        "applied": [ack for item in trials for ack in item["applied"]],
        "nodes": _nodes(snapshot.plan, plan),
        "trials": trials,
        "t_s": entry.t_s,
        "wall_s": entry.wall_s,
    }


def _step_mode(trial: TrialView, chosen: Settings) -> str | None:
    """How steps with the chosen dials are executed, as far as the decision knew; None where there is no choice."""
    for mode in trial.step_modes:
        if (mode.tier, mode.micro_batch, mode.grad_accum) == (chosen.tier, chosen.micro_batch, chosen.grad_accum):
            name = "graph" if mode.is_replayed else "eager"
            return f"{name}: eager {1e3 * mode.eager_s:.2f} ms, graph {1e3 * mode.replayed_s:.2f} ms per step"
    return "not measured yet with these dials" if trial.step_modes else None


def _nodes(old: Plan, new: Plan) -> list[dict[str, Any]]:
    """What the decision wants of the cluster."""
    before = numbers(old.nodes)
    return [
        {
            "node_type": wish.node_type,
            "before": before.get(wish.node_type),
            "num_nodes": wish.num_nodes,
            "cost_per_hour": wish.cost_per_hour,
            "reason": wish.reason,
        }
        for wish in new.nodes
    ]


def _trial(
    generation: Generation, allocation: Allocation, before: Settings | None, outcomes: _Outcomes
) -> dict[str, Any]:
    """What the decision meant for one trial."""
    trial_id = allocation.trial_id
    return {
        "trial": trial_id,
        "reason": allocation.reason,
        "chosen": {
            "trial": trial_id,
            "before": None if before is None else to_jsonable(before),
            "after": to_jsonable(allocation.settings),
            "dials": [] if before is None else list(changed_dials(before, allocation.settings)),
            "placement": list(allocation.placement),
            "effect": allocation.effect.value,
            "reason": allocation.reason,
            "goodput": allocation.predicted_goodput,
            "resize_to": allocation.resize_to,
        },
        "alternatives": [
            {"allocation": to_jsonable(other.settings), "goodput": other.goodput} for other in allocation.alternatives
        ],
        "binding": allocation.binding,
        "predicted_gain": allocation.predicted_gain,
        "realised_gain": outcomes.realised_gain(generation, trial_id),
        "measured": outcomes.measured(generation, trial_id),
        "applied": outcomes.applied(generation, trial_id),
        "checks": outcomes.checks(generation, trial_id),
    }


def _node_words(nodes: list[dict[str, Any]]) -> str:
    """The wishes that changed, to go behind the reason of a plan."""
    changed = [wish for wish in nodes if wish["before"] != wish["num_nodes"]]
    return "".join(f"; {wish['num_nodes']} nodes {wish['node_type']}" for wish in changed)


def _predicted(fitted: FittedTrial | None, after: Settings) -> dict[str, dict[str, float]] | None:
    """What was expected of the settings in force and of the new ones; None where nothing could be."""
    if fitted is None or fitted.in_force is None:
        return None
    sides = {"before": _expected(fitted, fitted.in_force), "after": _expected(fitted, after)}
    return {side: pace for side, pace in sides.items() if pace is not None} or None


def _expected(fitted: FittedTrial, settings: Settings) -> dict[str, float] | None:
    prediction, goodput = fitted.predict(settings), fitted.goodput(settings)
    if prediction is None or goodput is None:
        return None
    throughput = settings.global_batch / prediction.step_s
    return {"throughput": throughput, "efficiency": goodput / throughput, "goodput": goodput}


def _changed(old: Plan, new: Plan, before: Mapping[TrialId, Settings | None]) -> tuple[Allocation, ...]:
    """Allocations that differ from what was in force, overrides included; of a plan that changes none, all of them."""
    moved = {allocation.trial_id for allocation in diff(old, new)}
    changed = [a for a in new.allocations if a.trial_id in moved or before.get(a.trial_id) != a.settings]
    return tuple(changed) or new.allocations


def _decoded(entry: PlanCommitted) -> tuple[Snapshot, Plan]:
    try:
        return entry.decode()
    except ValueError as error:
        raise JournalError(
            f"decision {entry.generation} cannot be read: {error}; allowed: what this version of the orchestrator wrote"
        ) from error


def _summary(run_dir: Path, history: History) -> dict[str, Any]:
    origin_s = history.entries[0].wall_s if history.entries else 0.0
    outcomes = _Outcomes(history)
    decisions: list[dict[str, Any]] = []
    for entry in history.of(PlanCommitted):
        try:
            one = _one(entry, outcomes)
        except JournalError as error:
            decisions.append({"generation": int(entry.generation), "error": str(error)})
            continue
        decisions.append(
            {
                "generation": one["generation"],
                "after_s": entry.wall_s - origin_s,
                "reason": one["reason"] + _node_words(one["nodes"]),
                "num_changed": len(one["chosen"]),
                "num_applied": len(one["applied"]),
                "predicted_gain": one["predicted_gain"],
                "realised_gain": one["realised_gain"],
            }
        )
    return {
        "run_id": run_dir.name,
        "decisions": decisions,
        "overrides": [
            {"trial": o.trial_id, "generation": int(o.generation), "reason": o.reason, "after_s": o.wall_s - origin_s}
            for o in history.of(Overridden)
        ],
        "resizes": [
            {
                "trial": r.trial_id,
                "stage": r.stage,
                "num_workers": r.num_workers,
                "reason": r.reason,
                "restart_s": r.restart_s if r.stage == "done" else None,
                "after_s": r.wall_s - origin_s,
            }
            for r in history.of(TrialResized)
        ],
        "deviations": [
            {"trial": c.trial_id, "generation": int(c.generation), "reason": c.reason, "after_s": c.wall_s - origin_s}
            for c in history.of(ShareChecked)
            if c.verdict == Verdict.NOT_HELD
        ],
        "refusals": [
            {"reason": r.reason, "violations": list(r.violations), "after_s": r.wall_s - origin_s}
            for r in history.of(PlanRefused)
        ],
    }


def _render_summary(answer: Mapping[str, Any]) -> list[str]:
    decisions = dicts(answer["decisions"])
    if not decisions:
        lines = ["no decision has been taken yet"]
    else:
        columns = ["plan", "after", "changed", "applied", "predicted", "realised", "reason"]
        rows = [
            [
                show_count(item["generation"]),
                show_seconds(item.get("after_s")),
                show_count(item.get("num_changed")),
                show_count(item.get("num_applied")),
                show_gain(item.get("predicted_gain")),
                show_gain(item.get("realised_gain")),
                str(item.get("reason") or item.get("error")),
            ]
            for item in decisions
        ]
        lines = table(columns, rows, numeric=columns[:-1])
    for item in dicts(answer["overrides"]):
        lines.append(
            f"override after {show_seconds(item['after_s'])} by {clean(item['trial'])}: {clean(item['reason'])}"
        )
    for item in dicts(answer["deviations"]):
        what = f"{clean(item['trial'])} under plan {show_count(item['generation'])}: {clean(item['reason'])}"
        lines.append(f"share not real after {show_seconds(item['after_s'])}: {what}")
    for item in dicts(answer["resizes"]):
        cost_s = item.get("restart_s")
        cost = "" if cost_s is None else f", {show_seconds(cost_s)} without a step"
        stage = clean(str(item["stage"]).replace("_", " "))
        what = f"{clean(item['trial'])}: {clean(item['reason'])}{cost}"
        lines.append(f"ranks {stage} after {show_seconds(item['after_s'])} for {what}")
    for item in dicts(answer["refusals"]):
        lines.append(f"refused after {show_seconds(item['after_s'])}: {clean(item['reason'])}")
        lines.extend(f"  {clean(text)}" for text in _texts(item["violations"]))
    if decisions:
        lines.append(f"one of them in full: orchestrator explain RUN --decision {decisions[-1]['generation']}")
    return lines


def _render_one(answer: Mapping[str, Any]) -> list[str]:
    lines = wrap(f"decision {show_count(answer['generation'])}: {clean(answer['reason'])}", _WIDTH)
    for wish in dicts(answer["nodes"]):
        was = "" if wish["before"] in {None, wish["num_nodes"]} else f" instead of {show_count(wish['before'])}"
        what = f"nodes {clean(wish['node_type'])}: {show_count(wish['num_nodes'])}{was}"
        lines += wrap(f"{what}, {show_number(wish['cost_per_hour'], 3)} an hour: {clean(wish['reason'])}", _WIDTH)
    for item in dicts(answer["trials"]):
        lines += ["", *_render_trial(item)]
    return lines


def _render_trial(item: Mapping[str, object]) -> list[str]:
    chosen = mapping(item["chosen"])
    before, after = mapping(chosen["before"]), mapping(chosen["after"])
    rows = [["CHOSEN", show_settings(after), show_number(chosen["goodput"])]]
    others = [other for other in dicts(item["alternatives"]) if other["allocation"] != after]
    if before and before != after and all(other["allocation"] != before for other in others):
        rows.append(["before", show_settings(before), MISSING])
    for other in others:
        settings = mapping(other["allocation"])
        label = "before" if settings == before else ""
        rows.append([label, show_settings(settings), show_number(other["goodput"])])
    applied = [
        f"at step {show_count(ack['step'])}, {show_number(ack['ack_s'], 3)} s after the decision"
        for ack in dicts(item["applied"])
    ]
    effect, ranks = clean(chosen["effect"]), chosen.get("resize_to")
    wish = [] if ranks is None else [f"  goes on with {show_count(ranks)} ranks when a worker group of them is there"]
    return [
        *wrap(f"{clean(item['trial'])}: {clean(item['reason'])}", _WIDTH),
        *wish,
        *(f"  {line}" for line in table(["", "settings", "goodput/s"], rows, numeric=["goodput/s"])),
        f"  bound by {clean(item['binding'])}; applied {'; '.join(applied) or 'not yet'} ({effect} effect)",
        f"  gain predicted {show_gain(item['predicted_gain'])}, realised {show_gain(item['realised_gain'])}",
        *([f"  step mode {clean(item['step_mode'])}"] if item.get("step_mode") else []),
        *([f"  chance to survive its next rung {show_number(chance, 2)}"] if (chance := item.get("survival")) else []),
        *(f"  {clean(text)}" for text in _texts(item.get("checks"))),
        *_render_paces(item),
    ]


def _render_paces(item: Mapping[str, object]) -> list[str]:
    """Throughput, efficiency and goodput on both sides of a change, as predicted and as measured."""
    rows = []
    for kind in ("predicted", "measured"):
        sides = mapping(item.get(kind) or {})
        for side, pace in sides.items():
            values = (show_number(mapping(pace).get(key)) for key in ("throughput", "efficiency", "goodput"))
            rows.append([f"{kind} {side}", *values])
    if not rows:
        return []
    columns = ["", "samples/s", "efficiency", "goodput/s"]
    return [f"  {line}" for line in table(columns, rows, numeric=columns[1:])]


def _texts(value: object) -> list[str]:
    return [str(text) for text in value] if isinstance(value, list) else []
