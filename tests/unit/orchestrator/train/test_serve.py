"""A slot serves trials in turn: nothing of one trial reaches the next, and a trial's error ends only the trial."""

from __future__ import annotations

import os
import random
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import orchestrator
from orchestrator.control.orders import Outcome, SlotOp, SlotOrder, Status, TrialOrder
from orchestrator.errors import WorkerGroupError
from orchestrator.jobs.job import Job, LossTerms
from orchestrator.jobs.mlp import MlpJob
from orchestrator.policies.plan import TrialId
from orchestrator.policies.tier import Tier
from orchestrator.telemetry.record import STEP_DTYPE, StepArray
from orchestrator.train.boundary import Boundary
from orchestrator.train.groups import Groups, Ranks
from orchestrator.train.isolation import ProcessState
from orchestrator.train.loop import TrialLoop
from orchestrator.train.serve import Server
from tests.unit.orchestrator.train.links import FakeShare, Script, grant, order


class DrawingJob(MlpJob):
    """Its batches depend on every generator, the default dtype and an environment variable."""

    def batch(self, indices: object, device: torch.device) -> tuple[Tensor, ...]:
        inputs, labels = super().batch(indices, device)  # type: ignore[arg-type]
        noise = torch.rand(1) + random.random() + float(np.random.rand())
        return (inputs + noise.to(inputs.dtype) * float(os.environ.get("SCALE", "1"))), labels


class DirtyJob(DrawingJob):
    """Changes everything in its process that a trial should leave alone, and fails."""

    def loss(self, model: nn.Module, batch: tuple[Tensor, ...]) -> LossTerms:
        torch.set_default_dtype(torch.float64)
        torch.set_num_threads(2)
        torch.use_deterministic_algorithms(True)
        torch.set_grad_enabled(False)
        torch.set_float32_matmul_precision("medium")
        os.environ["SCALE"] = "7"
        os.chdir("/")
        random.seed(99)
        torch.manual_seed(99)
        raise ValueError("as dirty as can be")


class SlotScript(Script):
    """One order after the other; what a trial said is kept by trial."""

    def __init__(self, orders: list[SlotOrder]) -> None:
        super().__init__(orders[0])
        self._queue = orders[1:]
        self.outcomes: list[Outcome] = []
        self.faults: list[str] = []
        self.told: list[StepArray] = []

    def begin(self, trial_id: TrialId, attempt: int) -> None:
        self._records.clear()
        self.outbox.take()

    def fault(self, reason: str) -> None:
        self.faults.append(reason)

    def finish(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)
        self.told.append(self.records if self._records else np.empty(0, dtype=STEP_DTYPE))
        self._order = self._queue.pop(0)
        self.version += 1


def serve(tmp_path: Path, jobs: list[Job], groups: Groups | None = None) -> SlotScript:
    """Serve a trial for each job, one after the other, in this process."""
    orders = []
    for number in range(len(jobs)):
        first = order(tmp_path / f"t{number}")
        assert first.trial is not None
        orders.append(replace(first, trial=replace(first.trial, trial_id=TrialId(f"t{number}"))))
    script = SlotScript([*orders, SlotOrder(incarnation="i", seq=9, op=SlotOp.CLOSE)])

    def build(trial: TrialOrder) -> Job:
        return jobs[int(trial.trial_id[1:])]

    boundary = Boundary(script, 0, 1, None)
    clean = ProcessState.capture()
    Server(
        groups=groups or Groups(0, 1, torch.device("cpu")),
        boundary=boundary,
        link=script,
        share=FakeShare(),
        clean=clean,
        build=build,
    ).serve()
    return script


def job(kind: type[MlpJob] = DrawingJob) -> MlpJob:
    return kind(width=16, num_samples=512)


def with_numpy() -> None:
    """A user's function that NumPy keeps from computing in bf16."""
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        output = model(torch.ones(4, 2))
        output.float().sum().backward()
        optimizer.step()
        output.detach().numpy()
    orchestrator.report({"loss": 0.0})


def test_a_function_that_raises_in_a_cheaper_tier_shall_begin_again_in_its_own(tmp_path: Path) -> None:
    first = order(tmp_path / "t", credit=1000, grant=grant(tier=Tier.BF16))
    assert first.trial is not None
    trial = replace(first.trial, job=f"{__name__}:with_numpy", params={}, metric="loss", max_reports=1000)
    again = replace(trial, attempt=1, precision_off="it raised in bf16")
    script = SlotScript([
        replace(first, trial=trial),
        replace(first, trial=again),
        SlotOrder(incarnation="i", seq=9, op=SlotOp.CLOSE),
    ])  # fmt: skip
    Server(
        groups=Groups(0, 1, torch.device("cpu")),
        boundary=Boundary(script, 0, 1, None),
        link=script,
        share=FakeShare(),
        clean=ProcessState.capture(),
    ).serve()
    raised, done = script.outcomes
    assert raised.status is Status.TIER
    assert raised.reason.startswith("it raised in bf16: TypeError: Got unsupported ScalarType BFloat16 (test_serve.py:")
    assert done.status is Status.DONE
    log = (tmp_path / "t" / "log.txt").read_text()
    assert "    output.detach().numpy()" in log, "the traceback of their code"


def test_a_trial_after_a_dirty_one_is_bit_equal_to_one_in_a_clean_process(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    clean = serve(tmp_path / "clean", [job()])
    after = serve(tmp_path / "after", [job(), job(DirtyJob), job()])
    assert [outcome.status for outcome in after.outcomes] == [Status.DONE, Status.FAILED, Status.DONE]
    assert len(clean.told[0]) == 40
    for trial in (0, 2):
        assert (after.told[trial]["loss"] == clean.told[0]["loss"]).all()
    assert torch.get_default_dtype() is torch.float32
    assert torch.is_grad_enabled()
    assert "SCALE" not in os.environ
    named = " ".join(record.getMessage() for record in caplog.records if " left " in record.getMessage())
    for word in ("dtype", "SCALE"):
        assert word in named, "what was left is named in the log"


def test_a_failed_trial_says_where_and_its_log_has_the_traceback(tmp_path: Path) -> None:
    script = serve(tmp_path, [job(DirtyJob)])
    assert script.outcomes[0].reason.startswith("ValueError: as dirty as can be (test_serve.py:")
    assert "Traceback" in (tmp_path / "t0" / "log.txt").read_text()


class ThreadJob(MlpJob):
    """Leaves a thread behind."""

    def prepare(self) -> None:
        super().prepare()
        self.is_over = threading.Event()
        threading.Thread(target=self.is_over.wait, name="left-behind", daemon=True).start()


def test_a_thread_left_behind_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    leaky = ThreadJob(width=16, num_samples=512)
    try:
        serve(tmp_path, [leaky])
        assert any("left-behind" in record.getMessage() for record in caplog.records)
    finally:
        leaky.is_over.set()


class TwoRanks(Groups):
    """Two ranks as far as the server asks, and whether the other one has gone."""

    def __init__(self, *, is_other_gone: bool) -> None:
        super().__init__(0, 1, torch.device("cpu"))
        self.ranks = replace(self.ranks, world_size=2)
        self._is_other_gone = is_other_gone

    def is_broken(self, timeout_ms: int) -> bool:
        return self._is_other_gone


def test_each_trial_has_fewer_trials_behind_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is worth doing for all that a process is expected to serve is worth less for its last ones."""
    seen = []

    class NotedLoop(TrialLoop):
        def __init__(self, order: SlotOrder, job: Job, ranks: Ranks, *rest: Any) -> None:
            seen.append(ranks.trials_ahead)
            super().__init__(order, job, ranks, *rest)

    monkeypatch.setattr("orchestrator.train.serve.TrialLoop", NotedLoop)
    groups = Groups(0, 1, torch.device("cpu"), trials_ahead=2.5)
    assert len(serve(tmp_path, [job(MlpJob) for _ in range(4)], groups).outcomes) == 4
    assert seen == [2.5, 1.5, 1.0, 1.0]


class BrokenJob(MlpJob):
    """Raises what gloo raises when a process has gone, before anything is trained."""

    def prepare(self) -> None:
        raise RuntimeError("Connection reset by peer")


@pytest.mark.parametrize("is_other_gone", [True, False])
def test_what_a_rank_raises_when_another_was_killed_does_not_fail_the_trial(
    tmp_path: Path, is_other_gone: bool
) -> None:
    first = order(tmp_path / "t0")
    script = SlotScript([first, SlotOrder(incarnation="i", seq=9, op=SlotOp.CLOSE)])
    server = Server(
        groups=TwoRanks(is_other_gone=is_other_gone),
        boundary=Boundary(script, 0, 1, None),
        link=script,
        share=FakeShare(),
        clean=ProcessState.capture(),
        build=lambda _trial: job(BrokenJob),
    )
    if is_other_gone:
        with pytest.raises(WorkerGroupError, match="Connection reset by peer"):
            server.serve()
        assert script.outcomes == [], "its slot is lost, and it goes on from its last commit"
    else:
        server.serve()
        assert [outcome.status for outcome in script.outcomes] == [Status.FAILED]
