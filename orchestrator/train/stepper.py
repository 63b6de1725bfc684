"""One trial's model and optimizer, and how one optimizer step of it is done.

Knows nothing of boundaries or telemetry: `loop` turns the dials here between two steps and reads what a step did.
"""

from __future__ import annotations

import copy
import gc
import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from orchestrator.control.orders import TrialOrder
from orchestrator.jobs.data import Indices, SampleCursor, rank_slice
from orchestrator.jobs.job import LossTerms
from orchestrator.jobs.own import UserCodeError
from orchestrator.jobs.training import Training
from orchestrator.policies.plan import Settings
from orchestrator.policies.snapshot import StepModeView
from orchestrator.policies.tier import Tier, tier_facts
from orchestrator.train import checkpoint, fsdp
from orchestrator.train.batch.learning_rate import LearningRate
from orchestrator.train.batch.meter import NoiseMeter
from orchestrator.train.batch.schedule import schedule_of
from orchestrator.train.flat_state import version_of
from orchestrator.train.gradients import Gradients
from orchestrator.train.groups import Ranks
from orchestrator.train.offload import Offload
from orchestrator.train.optimizers import Optimizers, has_plain_state
from orchestrator.train.precision.loss_scale import LossScale
from orchestrator.train.precision.tiers import install, lowered, set_tier
from orchestrator.train.read_ahead import first_cursor, take
from orchestrator.train.step_mode.choice import StepMode
from orchestrator.train.step_mode.recorded import RecordedSteps
from orchestrator.train.step_result import StepResult

logger = logging.getLogger(__name__)

_WARM_UP_STEPS = 1000
"""Steps that a schedule is built for where no trial is trained."""


class Stepper:
    """Trains one trial, one step at a time. Every rank of the worker group has one.

    Attributes:
        is_torn: whether an update of the weights was left half done: the step cannot be done again in place.
        noise: measures the gradient noise.
        rate: what the batch does to learning rates.
    """

    def __init__(self, order: TrialOrder, job: object, ranks: Ranks) -> None:
        """Build the model and the optimizers of a training that a user's class declares.

        Raises:
            UserCodeError: the class is not complete, or what it returned is not what it should.
        """
        self.job, self._ranks, self._order = Training.of(job), ranks, order
        with ranks.device:
            self.model = self.job.build_model().to(ranks.device)
        install(self.model, keeps_weights=ranks.world_size == 1)
        fsdp.shard(self.model, self.job.blocks(self.model), ranks.mesh, methods=self.job.forward_methods)
        self.cursor = first_cursor(self.job, order.seed)
        self.optimizers = self._optimizers()
        self.optimizer = self.optimizers.one
        self.step_index = 0
        self.settings = order.start
        self.offload = Offload(self.model, self.optimizer)
        self._has_stepped = False
        self._unsaid: list[StepResult] = []
        self.is_torn = False
        self.noise = NoiseMeter(self.model, self.optimizer, ranks.world_size)
        self.gradients = Gradients(self.job, self.model, ranks, self.noise, self.loss)
        self._recorded = RecordedSteps(self, order, ranks, self.noise)
        self._is_noise_measured = len(self.optimizers.members) == 1 and not self.optimizers.needs_closure
        schedule = schedule_of(order, self.job, self.optimizers.members[0])
        self.rate = LearningRate.start(schedule, order.start.global_batch)
        set_tier(self.model, order.start.tier)
        self._exchange(order.start.tier)
        # Every rank built the same model from the same seed; what it draws from here on (dropout) is its own.
        torch.manual_seed(order.seed + ranks.rank)

    def _optimizers(self) -> Optimizers:
        """The training's optimizers and schedulers.

        Raises:
            UserCodeError: they cannot train on these ranks.
        """
        order = self._order
        total, batch = order.samples_per_report * order.max_reports, order.start.global_batch
        is_whole = total > batch  # a warm-up is no whole trial, and takes a few steps
        num_steps = math.ceil(total / batch) if is_whole else _WARM_UP_STEPS
        members, schedulers = self.job.build_optimizers(self.model, num_steps)
        is_epoch = self.job.scheduler_interval == "epoch"
        unit = self.cursor.num_samples if is_epoch else batch
        built = Optimizers(members, schedulers, unit, math.ceil(total / unit) if is_whole else None)
        if built.needs_closure and (self._ranks.world_size > 1 or len(members) > 1):
            raise UserCodeError(
                f"{self.job.title}.build_optimizer returned an optimizer whose step needs a closure, on"
                f" {self._ranks.world_size} ranks and with {len(members) - 1} others; allowed: one rank, no other"
            )
        return built

    @property
    def whole(self) -> str:
        """Why a micro-batch must not be cut, empty where it may."""
        return self.gradients.whole

    @property
    def loss_scale(self) -> LossScale:
        """Of fp16."""
        return self.gradients.loss_scale

    def turn(self, settings: Settings) -> None:
        """Apply batch and tier; share belongs to the process, world size to the worker group. `settle` before it."""
        if settings.tier is not self.settings.tier:
            set_tier(self.model, settings.tier)
            self._exchange(settings.tier)
        if (settings.global_batch, settings.tier) != (self.settings.global_batch, self.settings.tier):
            self.noise.reset()
            self.rate = self.rate.with_batch(settings.global_batch, self.cursor.position, self.noise.scale)
        self.settings = settings

    def advance(self) -> list[StepResult]:
        """Begin one more step; what came of steps that are over, oldest first: in eager mode that of this one.

        In graph mode results come some steps later. When one says that it was skipped, those behind it did nothing and
        the stepper is back where that one began.
        """
        if self._has_stepped and self._recorded.is_next:
            self._unsaid += self._recorded.settle_modes()
            if any(result.is_skipped for result in self._unsaid):
                return self._say()
            launched = self._recorded.launch()
            if launched is not None:
                self._unsaid += launched
                return self._say()
        self._unsaid += self.settle()  # kept if this step raises
        if not any(result.is_skipped for result in self._unsaid):
            began_s = time.monotonic()
            self._unsaid.append(self.step())
            self._recorded.note_eager(time.monotonic() - began_s)
            self._has_stepped = True
        return self._say()

    def _say(self) -> list[StepResult]:
        results, self._unsaid = self._unsaid, []
        return results

    def away(self) -> None:
        """Give the GPU's memory back while the trial waits without a share; its steps must be recorded again."""
        self._recorded.drop()
        self.offload.away()

    def rehearse(self) -> None:
        """Do two more steps in the mode that is wished for, and wait for them: for a warm-up."""
        self._has_stepped = True
        self._recorded.rehearse()
        self.settle()

    def settle(self) -> list[StepResult]:
        """Wait for every step that was begun; call it before anything that needs to know where the trial stands."""
        return self._recorded.settle()

    def is_settled_on(self, mode: StepMode) -> bool:
        """Whether steps with these dials are executed that way from now on."""
        return self._recorded.is_settled_on(mode)

    @property
    def measured_mode(self) -> StepModeView | None:
        """The step mode of these dials where both were measured."""
        return self._recorded.measured_mode

    @property
    def mode_words(self) -> str:
        """How steps are executed with these dials, and why; empty while that is being measured."""
        return self._recorded.words

    @property
    def may_replay(self) -> bool:
        """Whether its steps may be replayed from a graph."""
        return self._recorded.is_possible

    def _exchange(self, tier: Tier) -> None:
        """Let ranks exchange gradients in bf16 (of fp16 too, for its range) with the tier, if the run file says so."""
        companion = tier_facts(tier).companion_dtype if self._order.exchange_follows_tier else None
        self.noise.exchange_in(None if companion is None else torch.bfloat16)

    def step(self) -> StepResult:
        """One optimizer step, eagerly, of `settings.global_batch` samples; on a non-finite gradient nothing changes."""
        self.job.note_progress(self.step_index, self.cursor.epoch)
        if self.job.has_own_step:
            return self._own_step()
        settings, world_size = self.settings, self._ranks.world_size
        indices, cursor = take(self.job, self.cursor, settings, self._ranks)
        mine, noise = rank_slice(indices, self._ranks.rank, world_size), None
        is_measured = self._is_noise_measured and self.noise.begin(self.step_index)
        sums = self.gradients.add(mine, len(indices), settings)
        if is_measured:
            counts = [len(rank_slice(indices, rank, world_size)) for rank in range(world_size)]
            scale = self.loss_scale.factor(settings.tier) / sums.correction
            noise = self.noise.end(counts, self._ranks.group, loss_scale=scale)
        # Read together and late: whoever reads from a device waits for all that it was given.
        *losses, grad_norm = torch.stack([*sums.losses, self.gradients.clip_and_norm()]).tolist()
        loss = sum(losses) / max(1, sums.num_elements)
        is_skipped = not math.isfinite(grad_norm)
        rate = self.apply_rates()
        if not is_skipped:
            self._update(self._loss_again(mine, len(indices), loss))
        self.optimizer.zero_grad(set_to_none=True)
        self.loss_scale.update(settings.tier, is_skipped=is_skipped)
        return self._done(
            cursor,
            is_skipped=is_skipped,
            num_samples=0 if is_skipped else len(indices),
            loss=loss,
            grad_norm=grad_norm,
            learning_rate=rate,
            noise=None if is_skipped else noise,
            data_s=sums.data_s,
        )

    def _own_step(self) -> StepResult:
        """A step that the training does itself, of one batch; only its rates are set from here."""
        now = self.settings
        one = replace(now, micro_batch=now.micro_batch * now.grad_accum, grad_accum=1)
        indices, cursor = take(self.job, self.cursor, one, self._ranks)
        mine = rank_slice(indices, self._ranks.rank, self._ranks.world_size)
        began_s = time.monotonic()
        batch = self.job.batch(mine.tolist(), self._ranks.device)
        data_s = time.monotonic() - began_s
        rate = self.apply_rates()
        with lowered(self.settings.tier, self._ranks.device):
            loss = float(self.job.train_step(self.model, batch, self.optimizers.members))
        return self._done(
            cursor,
            is_skipped=False,
            num_samples=len(indices),
            loss=loss,
            grad_norm=float("nan"),
            learning_rate=rate,
            noise=None,
            data_s=data_s,
        )

    def _done(self, cursor: SampleCursor, **result: Any) -> StepResult:  # noqa: ANN401 - fields of a StepResult
        """Go on behind a step, unless it was skipped; returns what it did."""
        step, position = self.step_index, self.cursor.position
        if not result["is_skipped"]:
            self.noise.keep(result["noise"])
            self.cursor = cursor
            self.step_index += 1
            self.optimizers.advance(cursor.position)
            self.job.after_step(self.model)
        is_finite = math.isfinite(result["loss"])
        return StepResult(step=step, position=position, mode=StepMode.EAGER, is_loss_finite=is_finite, **result)

    def clip_and_norm(self) -> Tensor:
        """Clip the gradients as the training declares; returns their norm before, on the device."""
        return self.gradients.clip_and_norm()

    def apply_rates(self) -> float:
        """Set every group's learning rate for the next step; returns that of the first."""
        position, scale = self.cursor.position, self.noise.scale
        return self.optimizers.apply(lambda base_lr: self.rate.at(base_lr, position, scale))

    def _loss_again(self, mine: Indices, num_samples: int, loss: float) -> Callable[[], float]:
        """The loss and the gradients of this step for an optimizer that evaluates it several times, as LBFGS does."""
        known = [loss]  # its gradients are there

        def evaluate() -> float:
            if known:
                return known.pop()
            self.optimizer.zero_grad(set_to_none=True)
            sums = self.gradients.add(mine, num_samples, self.settings)
            self.gradients.clip_and_norm()
            return float(torch.stack(sums.losses).sum()) / max(1, sums.num_elements)

        return evaluate

    def release_memory(self) -> None:
        """Drop what a step that raised has left, so that it can be done again."""
        self.noise.reset()
        self.optimizer.zero_grad(set_to_none=True)
        self._recorded.forget()
        gc.collect()
        if self._ranks.device.type == "cuda":
            torch.cuda.empty_cache()

    def _update(self, closure: Callable[[], float]) -> None:
        """Change the weights; if that raises, note whether it had begun to."""
        before = version_of(self.optimizer) if self._ranks.world_size == 1 else 0
        try:
            if self.optimizers.needs_closure:
                self.optimizer.step(closure)
            else:
                self.optimizer.step()
        except BaseException:
            self.is_torn = self._ranks.world_size > 1 or version_of(self.optimizer) != before
            raise

    @property
    def progress(self) -> float:
        """Part of the trial that is done, 0 to 1."""
        return self.cursor.position / (self._order.samples_per_report * self._order.max_reports)

    def probe_batch(self, num_samples: int) -> Any:  # noqa: ANN401 - whatever the training's batches are
        """The next `num_samples` of this rank, which are not used up."""
        return self.job.batch(self._next(num_samples).tolist(), self._ranks.device)

    def probe_halves(self) -> tuple[tuple[Any, Any], int]:
        """Two batches of the next samples, which are not used up, and the samples of each on a rank.

        Together they are as large as a micro-batch; twice as large where a micro-batch may not be cut.
        """
        micro_batch = self.settings.micro_batch
        half = micro_batch if self.gradients.whole else max(1, micro_batch // 2)
        mine, device = self._next(2 * half).tolist(), self._ranks.device
        return (self.job.batch(mine[:half], device), self.job.batch(mine[half:], device)), half

    def _next(self, num_samples: int) -> Indices:
        indices, _ = self.cursor.take(num_samples * self._ranks.world_size)
        return rank_slice(indices, self._ranks.rank, self._ranks.world_size)

    def mean_gradient(self, batch: Any, tier: Tier) -> float:  # noqa: ANN401
        """Add the gradient of the mean loss of `batch` in `tier`; the model is left in its own. Returns that loss."""
        set_tier(self.model, tier)
        try:
            return self.gradients.add_mean(batch, tier)
        finally:
            set_tier(self.model, self.settings.tier)

    def add_gradient(self, batch: Any, tier: Tier) -> None:  # noqa: ANN401
        """Do what `mean_gradient` does without reading anything back, as a recorded step does."""
        set_tier(self.model, tier)
        try:
            terms = self.loss(self.model, batch, tier)
            (terms.loss_sum * (1 / terms.num_elements)).backward()  # type: ignore[no-untyped-call]
        finally:
            set_tier(self.model, self.settings.tier)

    def position(self) -> dict[str, Any]:
        """What beside model and optimizer a step changes."""
        return {
            "step": self.step_index,
            "cursor": self.cursor,
            "rate": self.rate.state(),
            "loss_scale": self.loss_scale.state(),
            "objects": copy.deepcopy(self._objects()),
        }

    def go_back(self, position: dict[str, Any]) -> None:
        """The inverse of `position`; the batch may have changed since, and stays."""
        self.step_index, self.cursor = int(position["step"]), position["cursor"]
        self.rate = LearningRate.restored(self.rate.schedule, position["rate"]).with_batch(
            self.settings.global_batch, self.cursor.position, self.noise.scale
        )
        self.gradients.loss_scale = LossScale.restored(position["loss_scale"])
        self._load_objects(position["objects"])
        self.noise.reset()

    def evaluate(self) -> dict[str, float]:
        """Validation metrics, in the tier the trial runs with."""
        pulse = self._ranks.pulse
        beating = self.model.register_forward_hook(lambda *_: pulse.beat("evaluation"))
        self.model.eval()
        self.job.note_progress(self.step_index, self.cursor.epoch)
        try:
            with pulse.long("evaluation"), lowered(self.settings.tier, self._ranks.device):
                found = self.job.evaluate(self.model, self._ranks.device)
        finally:
            beating.remove()
            self.model.train()
        metric = self._order.metric or self.job.metric
        self.optimizers.take_metric(found.get(self.job.monitor or metric or "val_loss"))
        return self.job.checked(found, metric)

    def commit(self, directory: Path, extra: dict[str, Any]) -> Path:
        """Write a checkpoint that `resume` can continue from; returns when it is durable on all ranks."""
        return checkpoint.commit(
            directory,
            model=self.model,
            optimizer=self.optimizer,
            extra={
                **extra,
                "step": self.step_index,
                "position": self.cursor.position,
                "rate": self.rate.state(),
                "noise": self.noise.state(),
                "loss_scale": self.loss_scale.state(),
                "objects": self._objects(),
            },
            rank=self._ranks.rank,
            world_size=self._ranks.world_size,
            group=self._ranks.group,
        )

    def _objects(self) -> dict[str, Any]:
        """What a checkpoint must keep beside tensors and numbers: schedulers, and the training's own state."""
        is_whole = not has_plain_state(self.optimizer)
        own = self.job.state()
        kept = {} if own is None else {"training": own}
        if is_whole or self.optimizers.is_scheduled:
            kept["optimizers"] = self.optimizers.state(with_members=is_whole)
        return kept

    def _load_objects(self, kept: Mapping[str, Any]) -> None:
        """The inverse of `_objects`."""
        self.optimizers.forget_applied()
        if "optimizers" in kept:
            self.optimizers.load(kept["optimizers"])
        self.job.load_state(copy.deepcopy(kept.get("training")))

    def resume(self, path: Path) -> dict[str, Any]:
        """Continue from a commit; returns the `extra` it was written with."""
        extra = checkpoint.load(
            path,
            model=self.model,
            optimizer=self.optimizer,
            rank=self._ranks.rank,
            world_size=self._ranks.world_size,
            group=self._ranks.group,
        )
        self.cursor = replace(self.cursor, position=int(extra["position"]))
        self.step_index = int(extra["step"])
        self.rate = LearningRate.restored(self.rate.schedule, extra["rate"])
        self.gradients.loss_scale = LossScale.restored(extra.get("loss_scale"))
        self._load_objects(extra.get("objects", {}))
        self._recorded.drop()  # what was recorded reads the optimizer state of before
        if "noise" in extra:
            self.noise.restore(extra["noise"])
        return extra

    def loss(self, model: nn.Module, batch: Any, tier: Tier) -> LossTerms:  # noqa: ANN401
        """The forward pass, with what is no linear layer lowered as the tier says."""
        with lowered(tier, self._ranks.device):
            return self.job.loss(model, batch)
