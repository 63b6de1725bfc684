"""Run directories made by hand, for the tests of what reads them. Healthy unless a test breaks them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from orchestrator import evidence
from orchestrator.control.orders import SlotHello
from orchestrator.policies.codec import to_jsonable
from orchestrator.policies.learn.fit import TrialFit
from orchestrator.policies.plan import (
    EMPTY_PLAN,
    Allocation,
    Alternative,
    DeviceId,
    Generation,
    Plan,
    Settings,
    TrialId,
    effect_of,
)
from orchestrator.policies.snapshot import DeviceKind, DeviceView, DialLimits, Snapshot, TrialView
from orchestrator.policies.tier import Tier
from orchestrator.telemetry.record import STEP_DTYPE, TIERS, StepArray
from orchestrator.telemetry.store import TelemetryWriter
from orchestrator.train import manifest

DEVICE = DeviceView(device_id=DeviceId("node0/cpu"), node_id="node0", kind=DeviceKind.CPU, units=2)
START = Settings(share=0.5, micro_batch=4, grad_accum=1, tier=Tier.FP32, num_workers=2)
LIMITS = DialLimits(
    min_share=0.1,
    max_share=1.0,
    min_global_batch=1,
    max_global_batch=64,
    max_micro_batch=32,
    tiers=(Tier.FP32, Tier.BF16),
)
ONE_RANK = Settings(share=0.5, micro_batch=8, grad_accum=1, tier=Tier.FP32, num_workers=1)
CHEAPER = Settings(share=0.25, micro_batch=4, grad_accum=2, tier=Tier.BF16, num_workers=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class TurningPolicy:
    """A policy to replay: the first plan gives everyone `ONE_RANK`, the second `CHEAPER`, and so on."""

    gain: float = 0.25

    def decide(self, snapshot: Snapshot) -> Plan:
        generation = Generation(snapshot.plan.generation + 1)
        settings = ONE_RANK if generation % 2 else CHEAPER
        return Plan(
            generation=generation,
            reason=f"turn {generation}",
            allocations=tuple(self._allocation(snapshot, trial, settings) for trial in snapshot.trials),
        )

    def _allocation(self, snapshot: Snapshot, trial: TrialView, settings: Settings) -> Allocation:
        old = snapshot.settings_in_force(trial)
        return Allocation(
            trial_id=trial.trial_id,
            settings=settings,
            placement=trial.placement,
            effect=effect_of(old, settings),
            reason=f"share {settings.share:g} and tier {settings.tier}",
            binding="memory",
            predicted_goodput=100.0,
            predicted_gain=None if old is None else self.gain,
            alternatives=(Alternative(settings=ONE_RANK, goodput=80.0), Alternative(settings=CHEAPER, goodput=100.0)),
        )


POLICY = {"name": "tests.run_directory:TurningPolicy", "params": {"gain": 0.25}}


def trial_view(trial_id: str) -> TrialView:
    return TrialView(
        trial_id=TrialId(trial_id),
        shape="mlp",
        start=ONE_RANK,
        limits=LIMITS,
        placement=(DEVICE.device_id,),
        weight=1.0,
        step=0,
        num_samples=0,
        target_samples=1000,
        throughput_per_s=50.0,
        loss=1.5,
        is_stale=False,
        fit=TrialFit(),
        override=None,
        changed_at_s=0.0,
        began_at_s=0.0,
    )


def snapshot(trial_ids: Sequence[str], plan: Plan = EMPTY_PLAN, now_s: float = 1.0) -> Snapshot:
    trials = tuple(trial_view(trial_id) for trial_id in sorted(trial_ids))
    return Snapshot(now_s=now_s, seed=0, plan=plan, devices=(DEVICE,), trials=trials)


def records(
    num: int,
    *,
    seq: int = 0,
    step: int = 0,
    cursor: int = 0,
    generation: int = 1,
    settings: Settings = ONE_RANK,
    start_s: float = 10.0,
) -> StepArray:
    """`num` consecutive steps of 0.1 s each under the same settings."""
    array = np.zeros(num, dtype=STEP_DTYPE)
    count = np.arange(num)
    array["seq"], array["step"] = seq + count, step + count
    array["num_samples"] = settings.global_batch
    array["cursor"] = cursor + count * settings.global_batch
    array["generation"] = generation
    for name in ("share", "micro_batch", "grad_accum", "num_workers"):
        array[name] = getattr(settings, name)
    array["tier"] = TIERS.index(settings.tier)
    array["start_s"], array["step_s"] = start_s + 0.1 * count, 0.1
    array["loss"] = 2.0
    return array


@dataclass(slots=True)
class RunDirectory:
    """Writes the files of a run as the controller would. Every entry is one second after the one before it."""

    path: Path
    entries: list[dict[str, Any]] = field(default_factory=list)
    plan: Plan = EMPTY_PLAN

    @property
    def telemetry(self) -> Path:
        return self.path / "telemetry"

    def log(self, kind: str, **fields: Any) -> dict[str, Any]:
        seq = len(self.entries) + 1
        entry = {"kind": kind, "seq": seq, "t_s": float(seq), "wall_s": 1e9 + seq, **fields}
        self.entries.append(entry)
        return entry

    def begin(self, *trial_ids: str) -> None:
        """Head, slots, and the first attempt of each trial."""
        spec = {"policy": POLICY["name"], "policy_params": POLICY["params"]}
        self.log("run", schema=1, run_id="demo", start_id="s1", spec=spec)
        for trial_id in trial_ids:
            hello = SlotHello(
                slot_id=f"slot-{trial_id}",
                placement=(DEVICE.device_id,),
                devices=(DEVICE,),
                enforced_by="cpu_cores",
                enforcement="",
            )
            self.log("slot", slot_id=f"slot-{trial_id}", state="idle", epoch=1, hello=to_jsonable(hello))
            self.log("trial_queued", trial_id=trial_id, params={"lr": 0.1, "width": 32})
            self.assign(trial_id)

    def assign(self, trial_id: str, attempt: int = 0) -> None:
        self.log("trial_assigned", trial_id=trial_id, attempt=attempt, slot_id=f"slot-{trial_id}", epoch=1)

    def decide(self, *trial_ids: str) -> Plan:
        """Journal the policy's next plan for these trials."""
        world = snapshot(trial_ids, self.plan, now_s=float(len(self.entries)))
        self.plan = TurningPolicy(gain=0.25).decide(world)
        self.log("plan", generation=self.plan.generation, snapshot=to_jsonable(world), plan=to_jsonable(self.plan))
        return self.plan

    def offer(self, trial_id: str, settings: Settings | None = None) -> None:
        chosen = settings or self._allocated(trial_id)
        self.log("offer", generation=self.plan.generation, trial_id=trial_id, settings=to_jsonable(chosen), units=[[0]])

    def ack(self, trial_id: str, step: int, settings: Settings | None = None, *, attempt: int = 0) -> None:
        self.log(
            "ack",
            generation=self.plan.generation,
            trial_id=trial_id,
            attempt=attempt,
            step=step,
            settings=to_jsonable(settings or self._allocated(trial_id)),
            ack_s=0.2,
            switch_s=0.01,
            dials=["share"] if self.plan.generation > 1 else [],
        )

    def result(self, trial_id: str, index: int, step: int, num_samples: int) -> None:
        metrics = {"val_loss": 1.0 / (index + 1), "broken": None}
        checkpoint = f"trials/{trial_id}/checkpoints/step-{step}"
        row = {"trial_id": trial_id, "index": index, "num_samples": num_samples, "step": step}
        self.log("result", **row, metrics=metrics, checkpoint=checkpoint)

    def end(self, trial_id: str, step: int, num_samples: int, state: str = "done", reason: str = "") -> None:
        self.log("trial_ended", trial_id=trial_id, state=state, reason=reason, step=step, num_samples=num_samples)

    def finish(self, **leaks: int) -> None:
        self.log("run_ended", state="done", leaks={"processes": 0, "actors": 0, "placement_groups": 0, **leaks})

    def write(self, tail: bytes = b"") -> Path:
        """Write the journal as it stands; returns the run directory."""
        self.path.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(entry, sort_keys=True, separators=(",", ":")).encode() + b"\n" for entry in self.entries]
        (self.path / "journal.jsonl").write_bytes(b"".join(lines) + tail)
        return self.path

    def record(self, trial_id: str, *parts: StepArray, attempt: int = 0, rank: int = 0) -> None:
        """Store step records of one rank and leave the segment open-ended, as a running actor does."""
        writer = TelemetryWriter(self.telemetry)
        for part in parts:
            writer.append_steps(trial_id, attempt, rank, part)
        assert writer.flush()

    def complete(self, state: str = "done") -> Path:
        """Write everything that a run has when it ended, its commits and the record of its evidence too."""
        self.write()
        writer = TelemetryWriter(self.telemetry)
        for entry in self.entries:
            if entry["kind"] == "result":
                names = ("trial_id", "index", "step", "num_samples", "metrics", "checkpoint", "t_s", "wall_s")
                writer.append_results([{"attempt": 0, **{name: entry[name] for name in names}}])
                self._commit(self.path / entry["checkpoint"], entry["step"])
        writer.append_devices([{"device_id": "cpu", "t_s": 1.0}])
        writer.close()
        (self.path / "status.json").write_text(json.dumps({"state": state, "trials": []}))
        (self.path / "control").mkdir(exist_ok=True)
        (self.path / "control" / "run.yaml").write_text("# schema: 1\nname: demo\n")
        evidence.record(self.path)
        return self.path

    def _commit(self, path: Path, step: int) -> None:
        path.mkdir(parents=True, exist_ok=True)
        (path / "__0_0.distcp").write_bytes(bytes(range(256)) * 4)
        (path / "rng_rank0.pt").write_bytes(b"generators")
        files = tuple(manifest.describe(file) for file in sorted(path.iterdir()) if file.name != manifest.MANIFEST_NAME)
        made = manifest.Manifest(
            schema=1, step=step, world_size=1, torch_version="2", extra={}, tensors={}, files=files
        )
        (path / manifest.MANIFEST_NAME).write_bytes(manifest.encode(made))

    def _allocated(self, trial_id: str) -> Settings:
        allocation = self.plan.allocation(TrialId(trial_id))
        assert allocation is not None
        return allocation.settings


def healthy_run(path: Path) -> RunDirectory:
    """Two trials, two decisions, both applied; one trial ends, the run ends. Nothing is wrong with it."""
    run = RunDirectory(path)
    run.begin("a", "b")
    for step in (0, 5):
        run.decide("a", "b")
        for trial_id in ("a", "b"):
            run.offer(trial_id)
            run.ack(trial_id, step)
    for trial_id in ("a", "b"):
        run.log("gain", generation=2, trial_id=trial_id, dial="share+batch", predicted=0.25, realised=0.2)
        run.record(
            trial_id,
            records(5),
            records(5, seq=5, step=5, cursor=40, generation=2, settings=CHEAPER, start_s=20.0),
        )
        run.result(trial_id, 0, 5, 40)
        run.result(trial_id, 1, 10, 80)
        run.end(trial_id, 10, 80)
    run.finish()
    return run


def status(run_dir: Path, **changes: Any) -> dict[str, Any]:
    """A status as the controller writes it: two trials, one failed."""
    trial = {
        "trial_id": "trial-0001",
        "index": 0,
        "state": "running",
        "slot_id": "slot-0",
        "attempt": 0,
        "step": 1234,
        "num_samples": 39488,
        "target_samples": 100000,
        "loss": 2.3456,
        "metric_value": 2.5,
        "throughput_per_s": 812.4,
        "share": 0.5,
        "amount": 1.0,
        "num_workers": 1,
        "enforced_by": "cpu_cores",
        "micro_batch": 16,
        "grad_accum": 2,
        "global_batch": 32,
        "tier": "bf16",
        "decision": {"generation": 12, "reason": "share 0.25 -> 0.50: predicted goodput +31 %"},
        "time_left_s": 74.5,
        "log_path": str(run_dir / "trials/trial-0001/log.txt"),
        "error": None,
        "params": {"lr": 0.01, "width": 64},
    }
    failed = {
        **trial,
        "trial_id": "trial-0002",
        "index": 1,
        "state": "failed",
        "slot_id": None,
        "metric_value": None,
        "loss": None,
        "throughput_per_s": None,
        "decision": None,
        "time_left_s": None,
        "error": "ValueError: width must divide heads",
        "log_path": str(run_dir / "trials/trial-0002/log.txt"),
        "params": {"lr": 0.1, "width": 63},
    }
    return {
        "schema": 1,
        "run_id": "demo",
        "state": "running",
        "started_at": 1000.0,
        "updated_at": 1083.0,
        "policy": "goodput",
        "generation": 12,
        "metric": "val_loss",
        "mode": "min",
        "dials": {
            "share": {"enabled": True, "changes_applied": 5, "gain": 0.31},
            "batch": {"enabled": True, "changes_applied": 2, "gain": None},
            "precision": {"enabled": False, "changes_applied": 0, "gain": None},
        },
        "devices": [
            {
                "device_id": "node0/cpu",
                "kind": "cpu",
                "units": 2,
                "granted_share": 0.5,
                "utilisation_ratio": 0.47,
                "memory_used_bytes": 3 * 2**30,
                "memory_total_bytes": 16 * 2**30,
            }
        ],
        "nodes": [],
        "slots": [{"slot_id": "slot-0", "state": "running", "epoch": 1, "trial_id": "trial-0001"}],
        "trials": [trial, failed],
        **changes,
    }
