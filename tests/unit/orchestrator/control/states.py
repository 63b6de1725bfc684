"""What of a world survives its actor, as plain values that can be compared and stored."""

from __future__ import annotations

from typing import Any

from orchestrator.control.world import Run, Trial, World
from orchestrator.policies.codec import to_jsonable


def durable_state(world: World, run: Run) -> dict[str, Any]:
    """Everything that follows from the entries of the journal alone."""
    return {
        "plan": to_jsonable(run.plan),
        "queue": list(run.queue),
        "trials": {trial.trial_id: _trial(trial) for trial in run.trials.values()},
        "slots": {s.slot_id: [s.state.value, s.epoch, s.trial_id, s.num_workers] for s in world.slots.values()},
        "devices": sorted(f"{device.device_id}:{device.units}" for device in world.devices.values()),
        "nodes": {key: node.state.value for key, node in world.nodes.items()},
        "changes": run.changes_applied,
        "restart_s": run.restart_s,
        "wishes": to_jsonable(run.wishes),
        "told": {str(number): list(rung.told) for number, rung in run.rungs.rungs.items()},
        "values": {str(number): values for number, values in sorted(run.ranking._values.items()) if values},
        "gains": {dial: round(mean.per_change, 9) for dial, mean in sorted(run.gains.items())},
    }


def _trial(trial: Trial) -> dict[str, Any]:
    same = ("attempt", "checkpoint", "step", "num_samples", "num_overflows", "num_workers", "size", "moves_to", "loss")
    account = trial.account
    return {
        **{name: getattr(trial, name) for name in same},
        "state": trial.state.value,
        "slot": trial.slot_id,
        "params": to_jsonable(trial.params),
        "reports": [[r.index, r.step, r.num_samples, r.checkpoint, sorted(r.metrics)] for r in trial.reports],
        "stop": trial.stop.value,
        "resume": _json(trial.resume),
        **({"precision_off": trial.precision_off} if trial.precision_off else {}),
        **({} if trial.allows is None else {"allows": _json(trial.allows)}),
        "onward": _json(trial.onward),
        "refused": sorted(trial.refused),
        "override": _json(trial.override),
        "modes": to_jsonable(trial.step_modes),
        "line": None
        if account is None
        else {
            "placement": list(account.placement),
            "target": _json(account.target),
            "offers": [_json(grant) for grant in account.offers],
            "applied": _json(account.applied),
            "override": _json(account.override),
            "num": account.num_overrides,
        },
    }


def _json(value: object) -> Any:
    return None if value is None else to_jsonable(value)
