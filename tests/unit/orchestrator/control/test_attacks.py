"""A trial that lies about itself takes nothing from the others: the attacks, and what honest trials keep.

Three trials of one shape share a device. Each makes the steps that its share, batch and tier really allow, on one
clock; the third tells what an attack makes of its records. Honest trials must do at least 95 % of the samples that they
do beside an honest third.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest

from orchestrator.control.orders import Ack, Events, Grant, OverrideReport, SlotOp
from orchestrator.control.trust import BURST_ROWS, ROWS_PER_S, Allowance, Trust, judged
from orchestrator.policies.plan import TrialId
from orchestrator.policies.tier import Tier
from orchestrator.telemetry.record import STEP_DTYPE, TIERS, StepArray, pack
from tests.unit.orchestrator.control.worlds import Worker, World

LIAR = TrialId("t2")
HONEST = (TrialId("t0"), TrialId("t1"))
TICK_S, NUM_TICKS = 0.5, 80
WORK_S = 0.004
"""Seconds of one core for a sample; in bf16 three quarters of it."""

Attack = Callable[[StepArray, int, float], StepArray]
"""Records as they are true, the tick, and the time; what is told instead."""


@dataclass
class Trainer:
    """One worker group that trains as fast as it is allowed to."""

    worker: Worker
    grant: Grant | None = None
    seq: int = 0
    step: int = 0
    position: int = 0
    due_s: float = 0.0
    attempt: tuple[TrialId, int] | None = None
    told: list[bytes] = field(default_factory=list)

    def tick(self, now_s: float, attack: Attack | None, number: int) -> None:
        """Obey, and tell of the steps that ended in this tick."""
        order = self.worker.order()
        if order is None or order.op is not SlotOp.RUN or order.trial is None or order.grant is None:
            return
        self.worker.attempt = self.attempt = (order.trial.trial_id, order.trial.attempt)
        acks: tuple[Ack, ...] = ()
        if self.grant is None or order.grant.generation > self.grant.generation:
            self.grant = order.grant
            told = {"generation": order.grant.generation, "settings": order.grant.settings, "step": self.step}
            acks = (Ack(**told, applied_s=now_s, switch_s=0.001),)  # type: ignore[arg-type]
            self.due_s = max(self.due_s, now_s - TICK_S)
        rows = self.rows(now_s)
        if attack is not None and len(rows):
            rows = attack(rows, number, now_s)
        self.told = [pack(part) for part in np.array_split(rows, -(-len(rows) // 4000))] if len(rows) else []
        self.worker.tell(Events(number=0, acks=acks, records=tuple(self.told)))

    def rows(self, now_s: float) -> StepArray:
        """The steps that ended by now."""
        assert self.grant is not None
        dials, found = self.grant.settings, []
        cores = max(self.grant.amount, 1e-3)
        step_s = dials.global_batch * WORK_S * (0.75 if dials.tier is Tier.BF16 else 1.0) / cores
        while self.due_s + step_s <= now_s:
            row = np.zeros((), dtype=STEP_DTYPE)
            for name, value in {
                "seq": self.seq,
                "step": self.step,
                "generation": self.grant.generation,
                "cursor": self.position,
                "num_samples": dials.global_batch,
                "micro_batch": dials.micro_batch,
                "grad_accum": dials.grad_accum,
                "num_workers": 1,
                "tier": TIERS.index(dials.tier),
                "share": dials.share,
                "cores": self.grant.amount,
                "start_s": self.due_s,
                "step_s": step_s,
                "cpu_s": step_s * min(1.0, cores),
                "loss": 2.0 + 10.0 / (10 + self.step),
                "grad_norm": 1.0,
                "learning_rate": 0.1,
                "noise_trace": 300.0,
                "grad_sq": 1.0,
                "memory_bytes": 1 << 20,
            }.items():
                row[name] = value
            found.append(row)
            self.seq, self.step, self.position = self.seq + 1, self.step + 1, self.position + dials.global_batch
            self.due_s += step_s
        return np.array(found, dtype=STEP_DTYPE)


def faster(rows: StepArray, _tick: int, _now_s: float) -> StepArray:
    """Throughput x 10: steps that last a tenth, and ten times as many."""
    return _as_many(rows, 10)


def slower(rows: StepArray, _tick: int, _now_s: float) -> StepArray:
    """Throughput x 0.1, for pity: every tenth step, each of them ten times as long."""
    rows = rows.copy()
    rows["step_s"] *= 10
    return rows


def many_samples(rows: StepArray, _tick: int, _now_s: float) -> StepArray:
    """A thousand times the samples in each step."""
    rows = rows.copy()
    rows["num_samples"] *= 1000
    rows["micro_batch"] *= 1000
    return rows


def slow_in_bf16(rows: StepArray, _tick: int, _now_s: float) -> StepArray:
    """The cheaper tier is said to be slow, so that nobody else tries it."""
    rows = rows[rows["seq"] % 4 == 0].copy()
    rows["seq"] //= 4
    rows["step"] //= 4
    rows["step_s"] *= np.where(rows["tier"] == TIERS.index(Tier.BF16), 3.9, 1.0)
    return rows


def slow_at_its_share(rows: StepArray, _tick: int, _now_s: float) -> StepArray:
    """Everything is said to be slow at the share that it has."""
    rows = rows[rows["seq"] % 4 == 0].copy()
    rows["seq"] //= 4
    rows["step"] //= 4
    rows["step_s"] *= np.where(rows["share"] < 0.34, 3.9, 1.0)
    return rows


def falling_loss(rows: StepArray, tick: int, _now_s: float) -> StepArray:
    rows = rows.copy()
    rows["loss"] = 1.0 / (tick + 1)
    rows["noise_trace"], rows["grad_sq"] = 1e9, 1e-9
    return rows


def no_loss(rows: StepArray, _tick: int, _now_s: float) -> StepArray:
    rows = rows.copy()
    rows["loss"] = np.nan
    return rows


def busy_while_asleep(rows: StepArray, _tick: int, _now_s: float) -> StepArray:
    """All cores, all the time."""
    rows = rows.copy()
    rows["cpu_s"] = rows["step_s"] * 64
    rows["cores"] = 64.0
    return rows


def jumping_steps(rows: StepArray, tick: int, _now_s: float) -> StepArray:
    rows = rows.copy()
    rows["step"] += 1_000_000 * (tick % 7)
    return rows


def replayed(rows: StepArray, _tick: int, _now_s: float) -> StepArray:
    """The same steps again and again, under new numbers."""
    again = np.concatenate([rows] * 3)
    again["seq"] = rows["seq"][0] * 3 + np.arange(len(again), dtype=np.uint64)
    return again


def from_the_future(rows: StepArray, _tick: int, _now_s: float) -> StepArray:
    rows = rows.copy()
    rows["start_s"] += 3600.0
    return rows


def slow_clock(rows: StepArray, _tick: int, now_s: float) -> StepArray:
    """Its clock goes at a tenth of the pace: ten times the speed, and everything fits together."""
    rows = rows.copy()
    rows["start_s"] = 100.0 + (rows["start_s"] - 100.0) / 10
    rows["step_s"] /= 10
    rows["cpu_s"] /= 10
    return rows


def flood(rows: StepArray, _tick: int, _now_s: float) -> StepArray:
    """Ten thousand rows a second."""
    return _as_many(rows, max(1, 5000 // len(rows)))


def flapping(rows: StepArray, tick: int, now_s: float) -> StepArray:
    return faster(rows, tick, now_s) if tick // 4 % 2 else slower(rows, tick, now_s)


def _as_many(rows: StepArray, factor: int) -> StepArray:
    found = np.repeat(rows, factor)
    part = np.tile(np.arange(factor), len(rows))
    step_s = found["step_s"].astype(np.float64) / factor
    found["start_s"] += part * step_s
    found["step_s"] = step_s
    found["cpu_s"] /= factor
    found["seq"] = found["seq"] * factor + part.astype(np.uint64)
    found["step"] = found["step"] * factor + part
    found["cursor"] = found["cursor"] * factor + part * found["num_samples"]
    return found


ATTACKS: dict[str, Attack] = {
    "ten times the throughput": faster,
    "a tenth of the throughput": slower,
    "a thousand times the samples": many_samples,
    "a loss that falls": falling_loss,
    "no loss": no_loss,
    "busy while asleep": busy_while_asleep,
    "jumping steps": jumping_steps,
    "replayed steps": replayed,
    "from the future": from_the_future,
    "a slow clock": slow_clock,
    "a flood of rows": flood,
    "flapping": flapping,
    "a cheaper tier is slow": slow_in_bf16,
    "slow at its share": slow_at_its_share,
}


def played(attack: Attack | None, *, cries: bool = False, speaks_for: TrialId | None = None) -> tuple[list[int], World]:
    """Samples that each trial has really done."""
    with TemporaryDirectory() as place, pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda _file: None)
        patch.setattr(logging.getLogger("orchestrator"), "level", logging.CRITICAL)
        world = World(Path(place) / "r", policy_name="goodput")
        world.restart()
        trainers = [Trainer(world.attach(f"slot-{number}")) for number in range(3)]
        for trial_id in (*HONEST, LIAR):
            world.controller.submit(trial_id, {"lr": 0.1})
            world.ask(trial_id, 0)
        for number in range(NUM_TICKS):
            world.clock.advance(TICK_S)
            now_s = world.clock.now_s()
            world.decide()
            for trainer in trainers:
                is_liar = trainer.worker.slot_id == "slot-2"
                trainer.due_s = trainer.due_s or now_s
                trainer.tick(now_s, attack if is_liar else None, number)
                if is_liar and cries and trainer.grant is not None:
                    _cry(trainer, number)
                if is_liar and speaks_for is not None and trainer.told:
                    told = Events(number=0, records=tuple(trainer.told))
                    world.controller.take_events("slot-2", trainer.worker.epoch, (speaks_for, 0), 0, told)
            assert world.held() <= 1.0 + 1e-9
        return [trainer.position for trainer in trainers], world


def _cry(trainer: Trainer, number: int) -> None:
    """Out of memory, in every tick."""
    assert trainer.grant is not None
    report = OverrideReport(
        generation=trainer.grant.generation,
        number=number + 1,
        settings=trainer.grant.settings,
        step=trainer.step,
        reason="full",
    )
    trainer.worker.tell(Events(number=1, overrides=(report,)))


@cache
def undisturbed() -> tuple[int, ...]:
    return tuple(played(None)[0])


def kept(samples: list[int]) -> float:
    """The least part of its samples that an honest trial keeps."""
    return min(now / before for now, before in zip(samples[:2], undisturbed()[:2], strict=True))


@pytest.mark.parametrize("name", list(ATTACKS))
def test_honest_trials_keep_their_samples_beside_a_liar(name: str) -> None:
    samples, _ = played(ATTACKS[name])
    assert min(undisturbed()) > 1000
    assert kept(samples) >= 0.95, (samples, undisturbed())


def test_a_trial_that_cries_for_memory_in_every_tick_takes_nothing_from_the_others() -> None:
    assert kept(played(None, cries=True)[0]) >= 0.95


def test_nobody_speaks_for_another_trial() -> None:
    samples, _ = played(None, speaks_for=HONEST[0])
    assert samples == list(undisturbed())


def test_without_the_judgement_a_liar_does_take_from_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """The guard is what protects them: the attacks are real."""
    before = undisturbed()
    monkeypatch.setattr("orchestrator.control.decisions.judged", lambda _run, _now_s: Trust())
    samples = [played(ATTACKS[name])[0] for name in ("a cheaper tier is slow", "slow at its share")]
    for each in samples:
        assert min(now / then for now, then in zip(each[:2], before[:2], strict=True)) < 0.85


def test_a_rank_sends_no_more_rows_than_it_may() -> None:
    allowance, sender = Allowance(), (LIAR, 0)
    assert allowance.takes(sender, BURST_ROWS, 0.0), "what was kept while nobody took it"
    assert not allowance.takes(sender, ROWS_PER_S, 0.5)
    assert allowance.takes(sender, ROWS_PER_S, 1.0)
    assert allowance.takes((HONEST[0], 0), ROWS_PER_S, 1.0)


def test_of_two_that_disagree_each_is_believed_of_itself_alone(tmp_path: Path) -> None:
    world = World(tmp_path / "r", policy_name="goodput")
    trainers = [Trainer(world.attach(f"slot-{number}")) for number in range(2)]
    for trial_id in HONEST:
        world.controller.submit(trial_id, {"lr": 0.1})
        world.ask(trial_id, 0)
    for number in range(30):
        world.clock.advance(TICK_S)
        world.decide()
        for trainer in trainers:
            trainer.due_s = trainer.due_s or world.clock.now_s()
            trainer.tick(world.clock.now_s(), faster if trainer is trainers[1] else None, number)
    trust = judged(world.controller.run, world.clock.now_s())
    assert trust.doubts == {}
    assert trust.alone == set(HONEST)
    seen = world.snapshot()
    assert seen is not None
    assert len({trial.shape for trial in seen.trials}) == 2
