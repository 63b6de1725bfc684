"""Step records per second into the policy actor, from eight processes, while it decides every second.

Each sender plays a slot with one trial: it attaches, is given a trial, and tells what a rank tells, through the same
method and in the same form, at most ten messages a second, each answered before the next one goes. Everything the actor
does with records is included: judging each row, fitting, deciding, and writing them to disk before the answer. After
the paced runs one without a pace shows where the limit lies.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import orchestrator
from tests.bench.orchestrated import Parts, cluster, scratch, write_run_file
from tests.bench.results_file import Options, Report, median_figure, options

NUM_SENDERS, MESSAGES_PER_S = 8, 10
RATE_TARGET_PER_S, CPU_TARGET = 20_000.0, 0.3
_RATE_PER_S = 22_400
"""Offered by all senders together; a little above the target."""


def send(config: dict[str, Any]) -> dict[str, int]:
    """One sender: tells step records for so many seconds; how many it sent and how many messages that took."""
    import numpy as np
    import ray

    from orchestrator.control.orders import Ack, Events, SlotHello, SlotOp
    from orchestrator.policies.plan import DeviceId
    from orchestrator.policies.snapshot import DeviceKind, DeviceView
    from orchestrator.telemetry.record import STEP_DTYPE, pack

    actor = ray.get_actor(config["actor"], namespace=config["namespace"])
    slot_id, rows = f"slot-{config['number']}", config["rows"]
    device = DeviceView(device_id=DeviceId("cpu:0"), node_id="n", kind=DeviceKind.CPU, units=NUM_SENDERS)
    hello = SlotHello(
        slot_id=slot_id, placement=(device.device_id,), devices=(device,), enforced_by="none", enforcement="a benchmark"
    )
    epoch = ray.get(actor.attach.remote(hello))
    incarnation, seq, order = "", 0, None
    while order is None or order.op is not SlotOp.RUN or order.grant is None:
        order = ray.get(actor.watch.remote(slot_id, epoch, incarnation, seq))
        incarnation, seq = order.incarnation, order.seq
    assert order.trial is not None
    attempt, grant = (order.trial.trial_id, order.trial.attempt), order.grant
    ack = Ack(generation=grant.generation, settings=grant.settings, step=0, applied_s=time.monotonic(), switch_s=0.0)
    ray.get(actor.tell.remote(slot_id, epoch, attempt, 0, Events(number=0, acks=(ack,))))
    batch = np.zeros(rows, dtype=STEP_DTYPE)
    for field in ("micro_batch", "grad_accum", "num_workers"):
        batch[field] = getattr(grant.settings, field)
    batch["num_samples"] = grant.settings.global_batch
    batch["generation"], batch["share"], batch["cores"] = grant.generation, grant.settings.share, grant.amount
    batch["loss"], batch["learning_rate"], batch["grad_norm"], batch["memory_bytes"] = 1.0, 1e-3, 1.0, 1 << 28
    batch["noise_trace"], batch["grad_sq"] = 4.0, 0.1
    sent = messages = 0
    while time.time() < config["begin_at"]:
        time.sleep(0.001)
    last_s = began_s = time.monotonic()
    while last_s - began_s < config["seconds"]:
        now_s = time.monotonic()
        if config["is_paced"]:
            time.sleep(max(0.0, began_s + (messages + 1) / MESSAGES_PER_S - now_s))
            now_s = time.monotonic()
        numbers = np.arange(sent, sent + rows)
        batch["seq"] = batch["step"] = numbers
        batch["cursor"] = numbers * grant.settings.global_batch
        batch["step_s"] = (now_s - last_s) / rows
        batch["start_s"] = last_s + np.arange(rows) * ((now_s - last_s) / rows)
        events = Events(number=messages + 1, records=(pack(batch),))
        ray.get(actor.tell.remote(slot_id, epoch, attempt, 0, events))
        sent, messages, last_s = sent + rows, messages + 1, now_s
    return {"sent": sent, "messages": messages}


def measure(directory: Path, name: str, seconds: float, *, is_paced: bool) -> dict[str, Any]:
    """One run of all senders: records per second, CPU seconds of the actor, and what reached the tables."""
    import psutil
    import ray

    parts = Parts(
        write_run_file(
            directory / f"{name}.yaml",
            name,
            search={"num_trials": NUM_SENDERS, "max_concurrent": NUM_SENDERS, "scheduler": {"name": "fifo"}},
            trial={"samples_per_report": 10**12, "max_reports": 1, "micro_batch": 8},
            dials={"share": {"min": 0.125, "max": 0.125}, "batch": {"enabled": False}, "precision": {"enabled": False}},
            policy={"name": "goodput", "period_s": 1.0},
        )
    )
    for number in range(NUM_SENDERS):
        parts.ask("expect_slot", f"slot-{number}")
        parts.ask("submit", f"trial-{number}", {})
    config: dict[str, Any] = {
        "actor": parts.actor_name,
        "namespace": parts.namespace,
        "rows": _RATE_PER_S // (NUM_SENDERS * MESSAGES_PER_S),
        "seconds": seconds,
        "is_paced": is_paced,
        "begin_at": time.time() + 8.0,
    }
    sender = ray.remote(send).options(num_cpus=0.1)
    calls = [sender.remote({**config, "number": number}) for number in range(NUM_SENDERS)]
    time.sleep(max(0.0, config["begin_at"] - time.time()))
    actor = psutil.Process(parts.actor_pid)
    before, began_s = actor.cpu_times(), time.monotonic()
    found = ray.get(calls)
    after, ended_s = actor.cpu_times(), time.monotonic()
    wall_s = ended_s - began_s
    decisions = len(parts.entries("plan"))
    parts.end()
    return {
        "wall_s": wall_s,
        "sent": sum(one["sent"] for one in found),
        "messages": sum(one["messages"] for one in found),
        "stored": orchestrator.load_run(parts.run_dir).steps.num_rows,
        "actor_cpu_s": (after.user - before.user) + (after.system - before.system),
        "plans": decisions,
    }


def main() -> None:
    """Paced runs against the target, then one run at full speed."""
    settings: Options = options("ingest", repeats=3)
    report = Report(settings)
    seconds = 3.0 if settings.is_quick else 20.0
    with scratch() as directory, cluster(num_cpus=2):
        runs = [measure(directory, f"paced{number}", seconds, is_paced=True) for number in range(settings.repeats)]
        full = measure(directory, "full", seconds, is_paced=False)
    for run in [*runs, full]:
        if run["stored"] != run["sent"]:
            raise RuntimeError(f"{run['sent']} records were sent and {run['stored']} stored")
    report.raw |= {"paced": runs, "full speed": full, "rows_per_message": _RATE_PER_S // NUM_SENDERS // MESSAGES_PER_S}
    report.add(
        median_figure(
            f"records/s into the actor, {NUM_SENDERS} processes, <= {MESSAGES_PER_S} messages/s each",
            [run["sent"] / run["wall_s"] for run in runs],
            "records/s",
            target=f">= {RATE_TARGET_PER_S:g}",
            is_met=lambda value, _low, _high: value >= RATE_TARGET_PER_S,
        )
    )
    report.add(
        median_figure(
            "  cores of the actor meanwhile",
            [run["actor_cpu_s"] / run["wall_s"] for run in runs],
            "cores",
            target=f"<= {CPU_TARGET}",
            is_met=lambda value, _low, _high: value <= CPU_TARGET,
        )
    )
    report.add(median_figure("  records/s without a pace", [full["sent"] / full["wall_s"]], "records/s"))
    report.notes.append("every record that was answered is in the tables afterwards; the benchmark fails otherwise")
    report.write()


if __name__ == "__main__":
    main()
