"""A scripted outside for the training loop: orders by step, everything said is kept."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch

from orchestrator.control.orders import (
    Ack,
    DialReport,
    Fallback,
    Grant,
    Note,
    Outcome,
    OverrideReport,
    Report,
    SlotOp,
    SlotOrder,
    StopMode,
    TierReport,
    TrialOrder,
)
from orchestrator.policies.plan import Settings, TrialId
from orchestrator.policies.snapshot import DialLimits
from orchestrator.policies.tier import Tier
from orchestrator.share.mechanism import Enforcement
from orchestrator.telemetry.record import StepArray, unpack
from orchestrator.train.boundary import Boundary
from orchestrator.train.groups import Ranks
from orchestrator.train.link import Outbox
from orchestrator.train.loop import TrialLoop

ONE_RANK = Ranks(rank=0, world_size=1, device=torch.device("cpu"))


class FakeShare:
    """Enforces nothing and remembers what it was told."""

    name: ClassVar[str] = "fake"

    def __init__(self) -> None:
        self.applied: list[tuple[tuple[int, ...], float]] = []

    @property
    def enforcement(self) -> Enforcement:
        return Enforcement(compute=False, memory=False, live=True, note="a test's")

    def apply(self, units: tuple[int, ...], amount: float) -> None:
        self.applied.append((units, amount))

    def hold_back(self) -> float:
        return 0.0

    def wake(self) -> None: ...

    def charged_s(self) -> float:
        return 0.0

    def release(self) -> None: ...


class Script:
    """A link whose orders follow a script: `at(step, ...)` changes the order when that many steps were recorded."""

    def __init__(self, order: SlotOrder) -> None:
        self.version = 1
        self.outbox = Outbox()
        self._order = order
        self._plans: list[tuple[int, Callable[[SlotOrder], SlotOrder]]] = []
        self.acks: list[Ack] = []
        self.overrides: list[OverrideReport] = []
        self.reports: list[Report] = []
        self.dials: list[DialReport] = []
        self.tiers: list[TierReport] = []
        self.fallbacks: list[Fallback] = []
        self.notes: list[Note] = []
        self._records: list[bytes] = []
        self._num_steps = 0
        add_record = self.outbox.add_record

        def counted(row: tuple[float, ...]) -> None:
            add_record(row)
            self._num_steps += 1
            self._advance()

        self.outbox.add_record = counted  # type: ignore[method-assign]

    def at(self, num_steps: int, change: Callable[[SlotOrder], SlotOrder]) -> None:
        self._plans.append((num_steps, change))
        self._plans.sort(key=lambda plan: plan[0])
        self._advance()

    def order(self) -> SlotOrder:
        return self._order

    def wait(self, version: int, timeout_s: float) -> None:
        if self.version == version:
            time.sleep(min(0.001, timeout_s))

    def flush(self, timeout_s: float) -> bool:
        self.collect()
        return True

    def fault(self, reason: str) -> None:
        raise AssertionError(f"no test has a GPU that fails: {reason}")

    def leave(self, outcome: Outcome) -> Outcome:
        return outcome

    def collect(self) -> None:
        events = self.outbox.take()
        self.acks += events.acks
        self.overrides += events.overrides
        self.reports += events.reports
        self.dials += events.dials
        self.tiers += events.tiers
        self.fallbacks += events.fallbacks
        self.notes += events.notes
        self._records += events.records

    @property
    def records(self) -> StepArray:
        self.collect()
        return np.concatenate([unpack(message) for message in self._records])

    def _advance(self) -> None:
        while self._plans and self._plans[0][0] <= self._num_steps:
            self._order = self._plans.pop(0)[1](self._order)
            self.version += 1


def settings(**changes: object) -> Settings:
    values: dict[str, object] = {"share": 0.5, "micro_batch": 8, "grad_accum": 1, "tier": Tier.FP32, "num_workers": 1}
    return Settings(**{**values, **changes})  # type: ignore[arg-type]


def grant(generation: int = 1, num_ranks: int = 1, **changes: object) -> Grant:
    dials = settings(num_workers=num_ranks, **changes)
    return Grant(generation=generation, settings=dials, units=tuple((0,) for _ in range(num_ranks)), amount=1.0)


def order(directory: Path, *, num_ranks: int = 1, samples_per_report: int = 160, **changes: object) -> SlotOrder:
    start = settings(num_workers=num_ranks, micro_batch=8 // num_ranks)
    trial = TrialOrder(
        trial_id=TrialId("t"),
        attempt=0,
        seed=3,
        job="mlp",
        params={"width": 16, "num_samples": 512},
        start=start,
        limits=DialLimits(
            min_share=0.1,
            max_share=1.0,
            min_global_batch=8,
            max_global_batch=64,
            max_micro_batch=64,
            tiers=(Tier.FP32, Tier.BF16),
        ),
        samples_per_report=samples_per_report,
        max_reports=2,
        directory=str(directory),
        resume_from=None,
        num_reports_done=0,
    )
    values: dict[str, object] = {
        "incarnation": "i",
        "seq": 1,
        "op": SlotOp.RUN,
        "trial": trial,
        "grant": grant(num_ranks=num_ranks, micro_batch=8 // num_ranks),
        "credit": 2,
        "stop": StopMode.NONE,
    }
    return SlotOrder(**{**values, **changes})  # type: ignore[arg-type]


def loop(script: Script, job: object, share: FakeShare | None = None, ranks: Ranks = ONE_RANK) -> TrialLoop:
    boundary = Boundary(script, ranks.rank, ranks.world_size, ranks.group)
    first = boundary.cross()
    if first is None:
        first = boundary.wait()
    assert first is not None
    return TrialLoop(first, job, ranks, boundary, script, share or FakeShare())
