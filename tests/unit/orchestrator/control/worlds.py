"""A run without Ray: a controller on a manual clock, and worker groups that do what they are told."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from orchestrator.clock import ManualClock
from orchestrator.control.controller import Answer, Controller
from orchestrator.control.grants import held
from orchestrator.control.nodes import NodeOrder, order
from orchestrator.control.orders import (
    Ack,
    Events,
    Grant,
    Outcome,
    Report,
    SlotHello,
    SlotOp,
    SlotOrder,
    Status,
)
from orchestrator.control.placement import wants_slot
from orchestrator.control.resizing import slots_to_open
from orchestrator.control.spec import RunSpec, StopRule
from orchestrator.control.status import StatusWriter
from orchestrator.control.terms import Terms
from orchestrator.control.world import Trial
from orchestrator.policies import build_policy
from orchestrator.policies.plan import DeviceId, Settings, TrialId
from orchestrator.policies.policy import Policy
from orchestrator.policies.snapshot import DeviceKind, DeviceView, DialLimits, NodeType, Snapshot
from orchestrator.policies.tier import Tier
from orchestrator.telemetry.record import STEP_DTYPE, TIERS, pack
from orchestrator.view.frame import build_frame

DEVICE = DeviceView(device_id=DeviceId("cpu:0"), node_id="n0", kind=DeviceKind.CPU, units=2)
SPOT = NodeType(
    name="spot", kind=DeviceKind.CPU, num_devices=1, units=2, num_ranks=2, price_per_hour=0.5, max_nodes=3, is_spot=True
)


def resizing_spec(run_dir: Path, policy: str, max_running: int) -> RunSpec:
    """The same run, whose trials may have one or two ranks."""
    plain = spec(run_dir, policy)
    limits = replace(plain.limits, min_workers=1, max_workers=2)
    dials = (*plain.dials, "workers")
    return replace(plain, limits=limits, max_running=max_running, dials=dials, max_reports=1000)


def placing_spec(run_dir: Path, policy: str, params: dict[str, Any], *, is_function: bool = False) -> RunSpec:
    """The same run, whose trials the policy pauses and moves."""
    plain = spec(run_dir, policy)
    return replace(
        plain,
        start=replace(plain.start, share=1.0),
        limits=replace(plain.limits, max_share=1.0),
        max_running=4,
        policy_params=params,
        is_function=is_function,
        places=True,
    )


def spec(run_dir: Path, policy: str = "fair_share", node_types: tuple[NodeType, ...] = ()) -> RunSpec:
    run_dir.mkdir(parents=True, exist_ok=True)
    return spec_of(run_dir, policy, node_types)


def spec_of(run_dir: Path, policy: str = "fair_share", node_types: tuple[NodeType, ...] = ()) -> RunSpec:
    """A run in a directory that need not be there."""
    return RunSpec(
        run_id="r",
        run_dir=str(run_dir),
        seed=0,
        job="mlp",
        params={"depth": 2},
        speed_free_params=("lr",),
        start=Settings(share=0.5, micro_batch=8, grad_accum=1, tier=Tier.FP32, num_workers=1),
        limits=DialLimits(
            min_share=0.125,
            max_share=1.0,
            min_global_batch=8,
            max_global_batch=64,
            max_micro_batch=32,
            tiers=(Tier.FP32, Tier.BF16),
        ),
        dials=("share", "batch", "precision"),
        samples_per_report=800,
        max_reports=3,
        policy=policy,
        policy_params={},
        period_s=0.5,
        deadline_s=2.0,
        restart_budget=1,
        stale_after_s=10.0,
        idle_close_s=60.0,
        max_units=None,
        metric="val_loss",
        mode="min",
        node_types=node_types,
        max_running=4 if node_types else 0,
    )


@dataclass
class Worker:
    """One slot's worker group."""

    world: World
    slot_id: str
    epoch: int
    num_workers: int = 1
    grant: Grant | None = None
    seen: int = 0
    seq: int = 0
    step: int = 0
    position: int = 0
    attempt: tuple[TrialId, int] | None = None

    def order(self) -> SlotOrder | None:
        self.world.perform()
        return self.world.controller.order(self.slot_id, self.epoch)

    def obey(self, num_steps: int = 5, step_s: float = 0.02) -> None:
        """Apply what is granted and train some steps."""
        order = self.order()
        if order is None or order.op is not SlotOp.RUN or order.trial is None:
            return
        attempt = (order.trial.trial_id, order.trial.attempt)
        if attempt != self.attempt:
            self.attempt, self.grant, self.seq = attempt, None, 0
            self.step, self.position = self.world.commits.get(order.trial.resume_from or "", (0, 0))
        acks: tuple[Ack, ...] = ()
        if order.grant is not None and (self.grant is None or order.grant.generation > self.grant.generation):
            self.grant = order.grant
            acks = (self.ack(order.grant),)
        records = (self.train(num_steps, step_s),) if self.grant is not None else ()
        self.tell(Events(number=0, acks=acks, records=records))
        for rank in range(1, self.num_workers):
            self.tell(Events(number=0, records=records), rank)

    def ack(self, grant: Grant) -> Ack:
        now_s = self.world.clock.now_s()
        return Ack(
            generation=grant.generation, settings=grant.settings, step=self.step, applied_s=now_s, switch_s=0.001
        )

    def train(self, num_steps: int, step_s: float) -> bytes:
        assert self.grant is not None
        rows = np.zeros(num_steps, dtype=STEP_DTYPE)
        settings = self.grant.settings
        start_s = self.world.clock.now_s()
        self.world.clock.advance(num_steps * step_s)
        for index in range(num_steps):
            rows[index]["seq"], rows[index]["step"] = self.seq, self.step
            rows[index]["generation"] = self.grant.generation
            rows[index]["cursor"], rows[index]["num_samples"] = self.position, settings.global_batch
            rows[index]["micro_batch"], rows[index]["grad_accum"] = settings.micro_batch, settings.grad_accum
            rows[index]["num_workers"], rows[index]["tier"] = settings.num_workers, TIERS.index(settings.tier)
            rows[index]["share"], rows[index]["cores"] = settings.share, self.grant.amount
            rows[index]["start_s"], rows[index]["step_s"] = start_s + index * step_s, step_s
            rows[index]["cpu_s"], rows[index]["loss"], rows[index]["grad_norm"] = step_s, 2.0, 1.0
            rows[index]["learning_rate"] = 0.1
            rows[index]["noise_trace"] = rows[index]["grad_sq"] = np.nan
            rows[index]["memory_bytes"] = 1 << 20
            self.seq, self.step, self.position = self.seq + 1, self.step + 1, self.position + settings.global_batch
        return pack(rows)

    def report(self, index: int, value: float = 1.0) -> None:
        report = Report(
            index=index,
            step=self.step,
            num_samples=self.position,
            metrics={"val_loss": value},
            checkpoint=f"/c/{index}",
        )
        self.world.commits[f"/c/{index}"] = self.step, self.position
        self.tell(Events(number=0, reports=(report,)))

    def leave(self) -> bool:
        """Commit and leave if that is asked for; whether it was."""
        order = self.order()
        if order is None or order.trial is None or not order.stop.commits or self.attempt is None:
            return False
        name = f"/c/{order.trial.trial_id}-{order.trial.attempt}"
        self.world.commits[name] = self.step, self.position
        self.finish(Status.INTERRUPTED, checkpoint=name if self.grant is not None else None)
        return True

    def tell(self, events: Events, rank: int = 0) -> bool:
        assert self.attempt is not None
        return self.world.controller.take_events(self.slot_id, self.epoch, self.attempt, rank, events)

    def finish(self, status: Status = Status.DONE, reason: str = "", checkpoint: str | None = None) -> None:
        assert self.attempt is not None
        outcome = Outcome(
            status=status, step=self.step, num_samples=self.position, reason=reason, checkpoint=checkpoint
        )
        self.world.controller.finish(self.slot_id, self.epoch, self.attempt, outcome)


@dataclass
class World:
    """A controller and its surroundings."""

    run_dir: Path
    policy_name: str = "fair_share"
    start_id: str = "s1"
    node_types: tuple[NodeType, ...] = ()
    clock: ManualClock = field(default_factory=lambda: ManualClock(100.0))
    policy_params: dict[str, Any] = field(default_factory=dict)
    stop_rule: StopRule | None = None
    mode: str = "min"
    max_running: int = 0
    enforces: tuple[str, ...] = ("compute",)
    memory_cap_bytes: int | None = None
    places: bool = False
    is_function: bool = False
    terms: Terms = field(default_factory=Terms)
    commits: dict[str, tuple[int, int]] = field(default_factory=dict)
    num_attached: int = 0

    def __post_init__(self) -> None:
        self.policy: Policy = build_policy(self.policy_name, self.policy_params)
        self.restart()

    @property
    def spec(self) -> RunSpec:
        return replace(self._plain_spec, terms=self.terms)

    @property
    def _plain_spec(self) -> RunSpec:
        if self.stop_rule is not None:
            plain = spec(self.run_dir, self.policy_name)
            return replace(plain, max_reports=16, stop_rule=self.stop_rule, mode=self.mode)
        if self.places:
            return placing_spec(self.run_dir, self.policy_name, self.policy_params, is_function=self.is_function)
        if not self.max_running:
            return spec(self.run_dir, self.policy_name, self.node_types)
        resizing = resizing_spec(self.run_dir, self.policy_name, self.max_running)
        return replace(resizing, policy_params=dict(self.policy_params))

    def restart(self) -> None:
        """A new actor process on the same run directory."""
        self.controller = Controller(self.spec, self.clock, incarnation="i")
        self.controller.begin(self.start_id)

    def attach(self, slot_id: str, num_workers: int = 1, devices: tuple[DeviceView, ...] = ()) -> Worker:
        """A worker group on the cores, or with a rank on each of these devices."""
        self.num_attached += 1
        hello = SlotHello(
            slot_id=slot_id,
            placement=tuple(device.device_id for device in devices) or (DEVICE.device_id,) * num_workers,
            devices=devices or (DEVICE,),
            enforced_by="cpu_cores",
            enforcement="",
            pids=(self.num_attached,),
            enforces=self.enforces,
            memory_cap_bytes=self.memory_cap_bytes,
        )
        return Worker(self, slot_id, self.controller.attach(hello), num_workers)

    def snapshot(self) -> Snapshot | None:
        """What a policy is shown, as the actor makes it."""
        self.controller.learn()
        return self.controller.snapshot()

    def decide(self) -> None:
        snapshot = self.snapshot()
        if snapshot is not None:
            self.controller.accept(snapshot, self.policy.decide(snapshot))
        self.controller.offer()

    def ask(self, trial_id: TrialId, index: int) -> Answer | None:
        """What the search is told when it asks for a report."""
        self.controller.want(trial_id, index)
        return self.controller.answer(trial_id, index)

    def perform(self) -> None:
        """Make durable what happened, and do what follows, as the actor does behind every message."""
        self.controller.engine.sync()
        self.controller.engine.perform()

    def take_changes(self) -> tuple[set[str], set[TrialId]]:
        """Slots and trials that the actor wakes now."""
        self.controller.advance_rungs()
        self.perform()
        return self.controller.engine.take_changes()

    def observe(self) -> None:
        """Look whether shares are real."""
        for event in self.controller.checks.observe(self.clock.now_s()):
            self.controller.engine.emit(event)

    def flush(self) -> None:
        """Write the tables."""
        self.perform()
        self.controller.engine.telemetry.flush()

    def close(self) -> None:
        """The actor ends in order."""
        self.perform()
        self.controller.engine.close()

    def node_order(self) -> NodeOrder:
        return order(self.controller.world, self.controller.run)

    def slots_to_open(self) -> tuple[int, ...]:
        return slots_to_open(self.controller.world, self.controller.run)

    def wants_slot(self) -> bool:
        return wants_slot(self.controller.world, self.controller.run)

    def trial(self, trial_id: TrialId) -> Trial:
        return self.controller.run.trials[trial_id]

    def status(self) -> StatusWriter:
        return StatusWriter(self.controller.world, self.controller.run, self.clock)

    def shown(self) -> str:
        """The live table."""
        status = self.status().now()
        frame = build_frame(status, width=200, max_rows=50, now_s=self.clock.wall_s())
        return "\n".join(line.text for line in frame.lines)

    def held(self) -> float:
        return held(self.controller.run.accounts(), DEVICE.device_id)
