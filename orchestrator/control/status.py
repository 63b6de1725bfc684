"""The run as one dict: the content of `status.json`, from which every view is made.

Reads the world, changes nothing in it. The file is replaced atomically, so that a reader never sees half of one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from orchestrator.clock import Clock
from orchestrator.control import grants
from orchestrator.control.node_views import node_type_views
from orchestrator.control.world import Run, Trial, TrialState, World
from orchestrator.policies.plan import DeviceId, Settings
from orchestrator.policies.snapshot import DeviceKind
from orchestrator.room import is_full
from orchestrator.telemetry.sampler import DeviceSample, Samplers, open_samplers

FILE_NAME = "status.json"
SCHEMA_VERSION = 1
_SPARE_BYTES = 4096


class StatusWriter:
    """Makes and writes the status of one run.

    Attributes:
        run_state: what the driver last said.
        trouble: why nothing is decided at the moment; None where nothing is in the way.
        alarms: what else people should see to, one sentence each.
    """

    def __init__(self, world: World, run: Run, clock: Clock) -> None:
        self._world, self._run, self._clock = world, run, clock
        self._samplers: Samplers | None = None
        self._sampled: tuple[str, ...] = ()
        self._started_at = clock.wall_s()
        self._samples: dict[str, DeviceSample] = {}
        self.run_state = "starting"
        self.trouble: str | None = None
        self.alarms: tuple[str, ...] = ()

    def sample_devices(self) -> list[dict[str, Any]]:
        """Look at the cores of this node; rows for the telemetry table. GPUs are looked at by their agents."""
        return self.take_samples([asdict(sample) for sample in self._open_samplers().sample()])

    def take_samples(self, samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Keep the newest sample of each device; rows for the telemetry table."""
        now_s, wall_s = self._clock.now_s(), self._clock.wall_s()
        for sample in samples:
            self._samples[sample["device_id"]] = DeviceSample(**sample)
        told = ({key: value for key, value in sample.items() if key != "processes"} for sample in samples)
        return [{**sample, "t_s": now_s, "wall_s": wall_s} for sample in told]

    def now(self) -> dict[str, Any]:
        """The status of this instant."""
        world, run = self._world, self._run
        spec = run.spec
        return {
            "schema": SCHEMA_VERSION,
            "run_id": spec.run_id,
            "state": self.run_state,
            "started_at": self._started_at,
            "actor_pid": os.getpid(),
            "updated_at": self._clock.wall_s(),
            "policy": spec.policy,
            "generation": int(run.plan.generation),
            "metric": spec.metric,
            "mode": spec.mode,
            "trouble": self.trouble,
            "alarms": list(self.alarms),
            "dials": {
                dial: {
                    "enabled": dial in spec.dials,
                    "changes_applied": run.changes_applied.get(dial, 0),
                    "gain": run.gains[dial].per_change if dial in run.gains else None,
                }
                for dial in ("share", "batch", "precision", *(["workers"] if "workers" in spec.dials else []))
            },
            "devices": [self._device(device_id) for device_id in sorted(world.devices)],
            "nodes": self._nodes(),
            "slots": [
                {"slot_id": slot.slot_id, "state": slot.state.value, "epoch": slot.epoch, "trial_id": slot.trial_id}
                for slot in sorted(world.slots.values(), key=lambda slot: slot.slot_id)
            ],
            "trials": [self._trial(trial) for trial in run.trials.values()],
        }

    def write(self) -> None:
        """Replace the file; where the disk is full, write over it."""
        write_file(Path(self._run.spec.run_dir), self.now())

    def _open_samplers(self) -> Samplers:
        """Samplers of the devices known now; the actor sees those of its own node."""
        known = tuple(sorted(self._world.devices))
        if self._samplers is None or known != self._sampled:
            if self._samplers is not None:
                self._samplers.close()
            devices = self._world.devices.values()
            cpus = [device.device_id for device in devices if device.kind is DeviceKind.CPU]
            self._samplers, self._sampled = open_samplers(cpus[0] if cpus else None), known
        return self._samplers

    def _device(self, device_id: DeviceId) -> dict[str, Any]:
        device = self._world.devices[device_id]
        sample = self._samples.get(device_id)
        return {
            "device_id": device_id,
            "kind": device.kind.value,
            "units": device.units,
            "granted_share": round(grants.held(self._world.accounts(self._run), device.device_id), 6),
            "utilisation_ratio": None if sample is None else sample.utilisation_ratio,
            "memory_used_bytes": None if sample is None else sample.memory_used_bytes,
            "memory_total_bytes": None if sample is None else sample.memory_total_bytes,
        }

    def _nodes(self) -> list[dict[str, Any]]:
        """The nodes of each type that can be asked for: those that are there, those wished for, and their price."""
        wishes = {wish.node_type: wish for wish in self._run.wishes}
        found = []
        for each in node_type_views(self._world, self._run):
            wish = wishes.get(each.name)
            num_nodes = len(each.nodes) + len(each.leaving)
            found.append(
                {
                    "node_type": each.name,
                    "is_spot": each.is_spot,
                    "num_nodes": num_nodes,
                    "num_leaving": len(each.leaving),
                    "num_wished": None if wish is None else wish.num_nodes,
                    "max_nodes": each.max_nodes,
                    "price_per_hour": each.price_per_hour,
                    "cost_per_hour": num_nodes * each.price_per_hour,
                    "reason": None if wish is None else wish.reason,
                }
            )
        return found

    def _trial(self, trial: Trial) -> dict[str, Any]:
        spec, account = self._run.spec, trial.account
        view = None if trial.window is None else trial.window.view(self._clock.now_s())
        settings = None if account is None else account.settings
        slot = self._world.slot_of(trial)
        num_samples = max(trial.num_samples, 0 if view is None else view.num_samples)
        throughput = None if view is None else view.throughput_per_s
        last = trial.reports[-1].metrics if trial.reports else {}
        return {
            "trial_id": trial.trial_id,
            "index": trial.index,
            "state": trial.state.value,
            "slot_id": trial.slot_id,
            "attempt": trial.attempt,
            "step": max(trial.step, 0 if view is None else view.step),
            "num_samples": num_samples,
            "target_samples": None if spec.is_function else spec.target_samples,
            "loss": None if view is None else view.loss,
            "metric_value": last.get(spec.metric),
            "throughput_per_s": throughput,
            "amount": None if account is None or account.applied is None else account.applied.amount,
            "step_mode": None if view is None else view.step_mode,
            "enforced_by": None if slot is None or slot.hello is None else slot.hello.enforced_by,
            "checks": [asdict(check) for _, check in sorted(trial.checks.items())],
            **_dials(settings, trial.start or (spec.start_on(trial.size) if trial.size else spec.start)),
            "resize_to": _resize_to(trial),
            "waits_at_rung": self._run.rungs.is_waiting(trial),
            "is_report_wanted": trial.credit > len(trial.reports),
            "tier_layers": self._tier_layers(trial, settings),
            "decision": self._decision(trial),
            "time_left_s": None
            if spec.is_function
            else _time_left_s(trial, spec.target_samples - num_samples, throughput),
            "off": dict(trial.off),
            "is_asked_for": not trial.has_stand_in,
            "is_held": trial.is_held,
            "log_path": str(Path(spec.run_dir) / "trials" / trial.trial_id / "log.txt"),
            "error": trial.reason if trial.state is TrialState.FAILED else None,
            "cause": trial.cause.value or None,
            "notes": [trial.notes[kind] for kind in sorted(trial.notes)],
            "params": trial.params,
        }

    def _tier_layers(self, trial: Trial, settings: Settings | None) -> str | None:
        """How many linear layers really compute in the trial's tier, where it has said so: '12 of 13'."""
        tiers = () if trial.fit is None or settings is None else trial.fit.tiers
        found = next((known for known in tiers if settings is not None and known.tier is settings.tier), None)
        return None if found is None or not found.num_layers else f"{found.num_in_tier} of {found.num_layers}"

    def _decision(self, trial: Trial) -> dict[str, Any] | None:
        allocation = self._run.plan.allocation(trial.trial_id)
        if allocation is not None and trial.state is TrialState.QUEUED and self._run.spec.places:
            return {"generation": int(self._run.plan.generation), "reason": allocation.reason}
        if allocation is None or trial.account is None or trial.account.target is None:
            return None
        reason = allocation.reason if trial.override is None else f"override: {trial.override.reason}"
        return {"generation": trial.account.target.generation, "reason": reason}


def write_file(run_dir: Path, status: Mapping[str, Any]) -> None:
    """Replace the status of a run atomically; where the disk is full, write over it, which needs no room.

    A reader may then see a part of it, which is no JSON, and looks again.

    Raises:
        OSError: it cannot be written.
    """
    path = run_dir / FILE_NAME
    text = json.dumps(status, allow_nan=False, default=_plain).encode()
    data = text.ljust(-(-(len(text) + _SPARE_BYTES) // _SPARE_BYTES) * _SPARE_BYTES)  # room to grow on a full disk
    draft = path.with_suffix(".tmp")
    try:
        draft.write_bytes(data)
        os.replace(draft, path)  # noqa: PTH105
    except OSError as error:
        draft.unlink(missing_ok=True)
        if not is_full(error) or not path.exists() or path.stat().st_size < len(text):
            raise
        with path.open("r+b") as file:
            file.write(text.ljust(path.stat().st_size))


def _resize_to(trial: Trial) -> int | None:
    """A number of ranks that is on its way."""
    if trial.state is TrialState.QUEUED:
        return trial.num_workers
    return trial.moves_to or (None if trial.wish is None else trial.wish[0])


def _dials(settings: Settings | None, start: Settings) -> dict[str, Any]:
    """The dials as the trial last acknowledged them; the user's own before that, without a share."""
    shown = settings or start
    return {
        "share": None if settings is None else settings.share,
        "num_workers": shown.num_workers,
        "micro_batch": shown.micro_batch,
        "grad_accum": shown.grad_accum,
        "global_batch": shown.global_batch,
        "tier": shown.tier.value,
    }


def _time_left_s(trial: Trial, samples_left: int, throughput_per_s: float | None) -> float | None:
    if trial.state is not TrialState.RUNNING or not throughput_per_s:
        return None
    return max(0.0, samples_left / throughput_per_s)


def _plain(value: object) -> object:
    """JSON for the few values that are not plain: numpy scalars."""
    return value.item() if hasattr(value, "item") else str(value)
