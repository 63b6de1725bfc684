"""The policy actor without Ray: long polls wake at once, and no policy, however bad, stops training."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from orchestrator.control.actor import PolicyActor
from orchestrator.control.journal import read
from orchestrator.control.orders import Ack, Events, Outcome, Report, SlotHello, SlotOp, SlotOrder, Status
from orchestrator.errors import JournalError, TelemetryError
from orchestrator.policies.plan import TrialId
from orchestrator.telemetry.record import STEP_DTYPE, pack
from orchestrator.telemetry.store import read_table
from orchestrator.telemetry.tables import TableKind
from tests.unit.orchestrator.control import bad_policies
from tests.unit.orchestrator.control.worlds import DEVICE, spec

T0 = TrialId("t0")


@pytest.fixture(autouse=True)
def _no_policy_is_left_waiting() -> Iterator[None]:
    bad_policies.release.clear()
    yield
    bad_policies.release.set()


def hello() -> SlotHello:
    return SlotHello(
        slot_id="slot-0",
        placement=(DEVICE.device_id,),
        devices=(DEVICE,),
        enforced_by="cpu_cores",
        enforcement="",
    )


async def until_granted(actor: PolicyActor, epoch: int) -> SlotOrder:
    """What a worker sees, order by order, until it is granted something."""
    order: SlotOrder | None = None
    while order is None or order.grant is None:
        seen = ("", 0) if order is None else (order.incarnation, order.seq)
        order = await asyncio.wait_for(actor.watch("slot-0", epoch, *seen), 10.0)
        assert order is not None
    return order


@pytest.mark.parametrize("policy", ["Raising", "Never", "Empty", "Nonsense"])
def test_a_bad_policy_is_refused_and_the_trial_is_served_all_the_same(tmp_path: Path, policy: str) -> None:
    bad = replace(spec(tmp_path), policy=f"tests.unit.orchestrator.control.bad_policies:{policy}", deadline_s=0.05)

    async def run() -> SlotOrder:
        actor = PolicyActor(bad, "s1")
        epoch = await actor.attach(hello())
        await actor.submit(T0, {})
        order = await until_granted(actor, epoch)
        await actor.end_run("done")
        return order

    order = asyncio.run(run())
    assert order.grant is not None
    assert order.grant.settings.share == 1.0
    entries = list(read(tmp_path / "journal.jsonl"))
    (refusal,) = [entry for entry in entries if entry["kind"] == "refusal"]
    assert refusal["reason"] or refusal["violations"]
    (plan,) = [entry["plan"] for entry in entries if entry["kind"] == "plan"]
    assert plan["reason"].startswith("fair shares while the policy is refused")


def test_a_whole_trial_through_the_actor(tmp_path: Path) -> None:
    async def run() -> None:
        actor = PolicyActor(spec(tmp_path), "s1")
        epoch = await actor.attach(hello())
        await actor.submit(T0, {})
        asked = asyncio.ensure_future(actor.answer(T0, 0))
        order = await until_granted(actor, epoch)
        assert order.grant is not None
        ack = Ack(generation=order.grant.generation, settings=order.grant.settings, step=0, applied_s=0.0, switch_s=0.0)
        report = Report(index=0, step=9, num_samples=80, metrics={"val_loss": 0.5}, checkpoint=None)
        assert await actor.tell("slot-0", epoch, (T0, 0), 0, Events(number=0, acks=(ack,), reports=(report,)))
        answer = await asyncio.wait_for(asked, 10.0)
        assert answer is not None
        assert answer.report == report
        outcome = Outcome(status=Status.DONE, step=9, num_samples=80)
        await actor.finish("slot-0", epoch, (T0, 0), outcome)
        idle = await asyncio.wait_for(actor.watch("slot-0", epoch, order.incarnation, order.seq), 10.0)
        assert idle is not None
        assert idle.op is SlotOp.IDLE
        await actor.end_run("done")

    asyncio.run(run())
    status = json.loads((tmp_path / "status.json").read_text())
    assert status["state"] == "done"
    assert [trial["state"] for trial in status["trials"]] == ["done"]


def test_damaged_telemetry_is_refused_without_harm(tmp_path: Path) -> None:
    async def run() -> bool:
        actor = PolicyActor(spec(tmp_path), "s1")
        epoch = await actor.attach(hello())
        await actor.submit(T0, {})
        is_current = await actor.tell("slot-0", epoch, (T0, 0), 0, Events(number=0, records=(b"garbage",)))
        await actor.end_run("done")
        return is_current

    assert asyncio.run(run())


def test_records_that_the_disk_does_not_take_are_not_acknowledged_and_come_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They would die with the actor, if it is killed while the disk is full."""
    rows = np.zeros(5, dtype=STEP_DTYPE)
    for name, values in {"seq": range(5), "step": range(5), "cursor": range(0, 40, 8)}.items():
        rows[name] = list(values)
    for name, value in {"num_samples": 8, "micro_batch": 8, "grad_accum": 1, "num_workers": 1, "step_s": 0.001}.items():
        rows[name] = value
    rows["start_s"] = time.monotonic() - 1.0 + np.arange(5) * 0.002

    def full(*_arguments: object) -> None:
        raise OSError(28, "No space left on device")

    async def run() -> None:
        actor = PolicyActor(spec(tmp_path), "s1")
        epoch = await actor.attach(hello())
        await actor.submit(T0, {})
        message = Events(number=0, records=(pack(rows),))
        with monkeypatch.context() as patch:
            patch.setattr("orchestrator.telemetry.segment.Segment._open", full)
            for _ in range(2):
                with pytest.raises(JournalError, match=r"\d+ rows of telemetry wait: no room on the disk"):
                    await actor.tell("slot-0", epoch, (T0, 0), 0, message)
            with pytest.raises(TelemetryError, match="no room"):
                await actor.end_run("done")
        assert await actor.tell("slot-0", epoch, (T0, 0), 0, message)
        await actor.end_run("done")

    asyncio.run(run())
    assert read_table(tmp_path / "telemetry", TableKind.STEPS).table.num_rows == 5
