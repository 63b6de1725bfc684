"""Runs as `orchestrator report` finds them, of any size, made by hand: trials that take turns in four slots."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

from orchestrator.control.orders import SlotHello
from orchestrator.policies.codec import to_jsonable
from orchestrator.policies.plan import Allocation, Generation, Plan, Settings, TrialId, effect_of
from orchestrator.policies.tier import Tier
from orchestrator.telemetry.record import FLAG_GRAPH
from orchestrator.telemetry.store import TelemetryWriter
from tests.run_directory import DEVICE, RunDirectory, records, snapshot

METRIC = "val_loss"
_NUM_SLOTS, _SLOT_S, _NUM_REPORTS = 4, 60.0, 6
_WALL_S = 1.7e9
_COURSE = (
    Settings(share=0.125, micro_batch=8, grad_accum=1, tier=Tier.FP32, num_workers=1),
    Settings(share=0.25, micro_batch=8, grad_accum=1, tier=Tier.FP32, num_workers=1),
    Settings(share=0.25, micro_batch=16, grad_accum=2, tier=Tier.FP32, num_workers=1),
    Settings(share=0.25, micro_batch=16, grad_accum=2, tier=Tier.BF16, num_workers=1),
)
_DIALS = ((), ("share",), ("batch",), ("precision",))


def search_run(path: Path, num_trials: int, *, num_steps: int = 300, params: dict[str, Any] | None = None) -> Path:
    """A run that ended: every seventh trial was stopped, every eleventh failed, the others are done.

    Args:
        path: the run directory.
        num_trials: of the search, four at a time.
        num_steps: of each trial.
        params: more parameters of each trial.
    """
    maker = _Maker(path, num_steps, params or {})
    for number in range(num_trials):
        maker.trial(number)
    return maker.write()


class _Maker:
    def __init__(self, path: Path, num_steps: int, params: dict[str, Any]) -> None:
        self.run = RunDirectory(path)
        self._events: list[tuple[float, str, dict[str, Any]]] = []
        self._writer = TelemetryWriter(path / "telemetry")
        self._random = random.Random(0)
        self._num_steps, self._params = num_steps, params
        self._generation = 0
        self._plan_of: dict[str, Plan] = {}
        self._status: list[dict[str, Any]] = []

    def trial(self, number: int) -> None:
        """One trial from its beginning to its end."""
        trial_id, slot = f"trial-{number:05d}", number % _NUM_SLOTS
        start_s = 2.0 + _SLOT_S * (number // _NUM_SLOTS) + slot
        drawn = {"lr": 10 ** self._random.uniform(-4, -1), "width": self._random.choice([64, 128, 256])}
        params = {**drawn, "kind": self._random.choice(["deep", "wide"]), "depth": 2, **self._params}
        self._at(start_s, "trial_queued", trial_id=trial_id, params=params)
        self._at(start_s, "trial_assigned", trial_id=trial_id, attempt=0, slot_id=f"slot-{slot}", epoch=1)
        quality = 0.4 + abs(math.log10(params["lr"]) + 2.5) / 3 + self._random.uniform(0, 0.1)
        self._dials(trial_id, start_s)
        self._steps(trial_id, start_s, quality)
        state = "failed" if number % 11 == 10 else "stopped" if number % 7 == 6 else "done"
        self._reports(trial_id, start_s, quality, num=_NUM_REPORTS if state == "done" else 3)
        reason = {"failed": "ValueError: width must divide heads", "stopped": "worse than 3 of 4 at report 3"}.get(
            state, ""
        )
        end = {"step": self._num_steps, "num_samples": 16 * self._num_steps}
        self._at(start_s + _SLOT_S - 2, "trial_ended", trial_id=trial_id, state=state, reason=reason, **end)
        log = self.run.path / "trials" / trial_id / "log.txt"
        log.parent.mkdir(parents=True)
        log.write_text(f"begins with {params['lr']:.3g}\nstep {self._num_steps}\n{reason}\n")

    def write(self) -> Path:
        """All that the run left behind."""
        fixed = {"depth": 2}
        spec = {
            "policy": "goodput",
            "metric": METRIC,
            "mode": "min",
            "params": fixed,
            "dials": ["share", "batch", "precision"],
        }
        self.run.log("run", schema=1, run_id="demo", start_id="s1", spec=spec, t_s=0.0, wall_s=_WALL_S)
        for slot in range(_NUM_SLOTS):
            hello = SlotHello(
                slot_id=f"slot-{slot}",
                placement=(DEVICE.device_id,),
                devices=(DEVICE,),
                enforced_by="cpu_cores",
                enforcement="",
            )
            self._at(1.0, "slot", slot_id=f"slot-{slot}", state="idle", epoch=1, hello=to_jsonable(hello))
        for t_s, kind, fields in sorted(self._events, key=lambda event: event[0]):
            self.run.log(kind, t_s=t_s, wall_s=_WALL_S + t_s, **fields)
        end_s = max(t_s for t_s, _, _ in self._events) + 1
        self.run.log("run_ended", state="done", leaks={}, t_s=end_s, wall_s=_WALL_S + end_s)
        self._writer.append_devices(
            [
                {
                    "device_id": DEVICE.device_id,
                    "kind": "cpu",
                    "t_s": float(t_s),
                    "wall_s": _WALL_S + t_s,
                    "utilisation_ratio": 0.8 + 0.1 * math.sin(t_s / 20),
                    "memory_used_bytes": 6 << 30,
                    "memory_total_bytes": 16 << 30,
                }
                for t_s in range(1, int(end_s), max(1, int(end_s) // 2000))
            ]
        )
        self._writer.close()
        path = self.run.write()
        told = {"state": "done", "metric": METRIC, "mode": "min", "updated_at": _WALL_S + end_s, "trials": []}
        (path / "status.json").write_text(json.dumps(told))
        return path

    def _at(self, t_s: float, kind: str, **fields: Any) -> None:
        self._events.append((t_s, kind, fields))

    def _dials(self, trial_id: str, start_s: float) -> None:
        """The course of its dials: a decision, its acknowledgement, and what it brought."""
        old: Settings | None = None
        for place, (settings, dials) in enumerate(zip(_COURSE, _DIALS, strict=True)):
            self._generation += 1
            t_s, generation = start_s + 1 + 12 * place, Generation(self._generation)
            predicted = None if old is None else 0.1 * place + self._random.uniform(0, 0.2)
            allocation = Allocation(
                trial_id=TrialId(trial_id),
                settings=settings,
                placement=(DEVICE.device_id,),
                effect=effect_of(old, settings),
                reason=f"share {settings.share:g}, batch {settings.global_batch}, {settings.tier}: goodput +{place}0 %",
                binding="device",
                predicted_goodput=100.0,
                predicted_gain=predicted,
                alternatives=(),
            )
            plan = Plan(generation=generation, reason="turn", allocations=(allocation,))
            world = snapshot([trial_id], now_s=t_s)
            named = {"generation": generation, "trial_id": trial_id}
            self._at(t_s, "plan", generation=generation, snapshot=to_jsonable(world), plan=to_jsonable(plan))
            acked = {"attempt": 0, "step": place * self._num_steps // 4, "settings": to_jsonable(settings)}
            self._at(t_s + 0.1, "ack", **named, **acked, ack_s=0.1, switch_s=0.0, dials=list(dials))
            if predicted is not None:
                realised = predicted + self._random.uniform(-0.15, 0.1)
                self._at(t_s + 8, "gain", **named, dial=dials[0], predicted=predicted, realised=realised)
            old = settings

    def _steps(self, trial_id: str, start_s: float, quality: float) -> None:
        part = self._num_steps // 4
        for place, settings in enumerate(_COURSE):
            rows = records(
                part,
                seq=place * part,
                step=place * part,
                cursor=16 * place * part,
                settings=replace(settings, micro_batch=16, grad_accum=1),
                start_s=start_s + 1 + 12 * place,
            )
            rows["start_s"] = start_s + 1.2 + 12 * place + 11.0 / part * (rows["step"] - place * part)
            rows["step_s"] = 11.0 / part
            noise = [self._random.gauss(0, 0.05) for _ in range(part)]
            rows["loss"] = quality + 2.0 * (1 + rows["step"]) ** -0.4 + noise
            rows["memory_bytes"] = (1 << 30) + (1 << 28) * place
            rows["flags"] = FLAG_GRAPH if place % 2 else 0
            self._writer.append_steps(trial_id, 0, 0, rows)

    def _reports(self, trial_id: str, start_s: float, quality: float, num: int) -> None:
        for index in range(num):
            step = (index + 1) * self._num_steps // _NUM_REPORTS
            metrics = {METRIC: quality + (1 + step) ** -0.4, "accuracy": 1 - quality / 3, "broken": None}
            row = {"trial_id": trial_id, "index": index, "step": step, "num_samples": 16 * step}
            self._at(start_s + 8 * (index + 1), "result", **row, metrics=metrics, checkpoint=None)
