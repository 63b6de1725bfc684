"""One trial's model and optimizer, and how one optimizer step of it is done.

Knows nothing of boundaries or telemetry: `loop` turns the dials here between two steps and reads what a step did.
"""

from __future__ import annotations

import gc
import logging
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from orchestrator.control.orders import TrialOrder
from orchestrator.jobs.data import Indices, micro_batches, rank_slice
from orchestrator.jobs.job import Job, LossTerms
from orchestrator.policies.plan import Settings
from orchestrator.policies.snapshot import StepModeView
from orchestrator.policies.tier import Tier, tier_facts
from orchestrator.train import checkpoint, fsdp
from orchestrator.train.batch.learning_rate import LearningRate, apply
from orchestrator.train.batch.meter import NoiseMeter
from orchestrator.train.batch.schedule import schedule_of
from orchestrator.train.flat_state import version_of
from orchestrator.train.groups import Ranks
from orchestrator.train.offload import Offload
from orchestrator.train.precision.loss_scale import LossScale
from orchestrator.train.precision.tiers import install, lowered, set_tier
from orchestrator.train.read_ahead import first_cursor, take
from orchestrator.train.step_mode.choice import ModeChoice, StepMode
from orchestrator.train.step_mode.compiled import Compilation, ahead_of
from orchestrator.train.step_mode.recorder import CudaRecorder
from orchestrator.train.step_mode.replay import (
    CPU,
    Launched,
    Lowered,
    Replay,
    Returned,
    open_replay,
    refusal,
    refusal_of,
    result_of,
)
from orchestrator.train.step_result import StepResult

logger = logging.getLogger(__name__)

MAX_GRAD_NORM = 1.0


class Stepper:
    """Trains one trial, one step at a time. Every rank of the worker group has one.

    Attributes:
        is_torn: whether an update of the weights was left half done: the step cannot be done again in place.
    """

    def __init__(self, order: TrialOrder, job: Job, ranks: Ranks) -> None:
        self.job, self._ranks, self._order = job, ranks, order
        with ranks.device:
            self.model = job.build_model()
        install(self.model, keeps_weights=ranks.world_size == 1)
        fsdp.shard(self.model, job.blocks(self.model), ranks.mesh)
        self.optimizer = job.build_optimizer(self.model)
        self._params = list(self.model.parameters())  # the modules need not be walked in every step
        self.cursor = first_cursor(job, order.seed)
        self.step_index = 0
        self.settings = order.start
        self.loss_scale = LossScale()
        is_possible = ranks.device.type == "cuda" or ranks.recorder is not None
        whole = refusal(ranks.world_size, self.optimizer, is_possible=is_possible)
        self._modes = ModeChoice(ranks.step_mode, whole, refusal_of)
        self._compilation = Compilation(job, self.model, ahead_of(order, ranks.trials_ahead))
        self._lowered = Lowered(self)
        self._replay: Replay | None = None
        self.offload = Offload(self.model, self.optimizer)
        self._has_stepped = False
        self._unsaid: list[StepResult] = []
        self.is_torn = False
        self._noise = NoiseMeter(self.model, self.optimizer, ranks.world_size)
        base_lr = float(self.optimizer.param_groups[0]["lr"])
        self._rate = LearningRate.start(schedule_of(order, base_lr), order.start.global_batch)
        set_tier(self.model, order.start.tier)
        self._exchange(order.start.tier)
        # Every rank built the same model from the same seed; what it draws from here on (dropout) is its own.
        torch.manual_seed(order.seed + ranks.rank)

    def turn(self, settings: Settings) -> None:
        """Apply batch and tier; share belongs to the process, world size to the worker group. `settle` before it."""
        if settings.tier is not self.settings.tier:
            set_tier(self.model, settings.tier)
            self._exchange(settings.tier)
        if (settings.global_batch, settings.tier) != (self.settings.global_batch, self.settings.tier):
            self._noise.reset()
            self._rate = self._rate.with_batch(settings.global_batch, self.cursor.position, self._noise.scale)
        self.settings = settings

    def advance(self) -> list[StepResult]:
        """Begin one more step; what came of steps that are over, oldest first: in eager mode that of this one.

        In graph mode results come some steps later. When one says that it was skipped, those behind it did nothing and
        the stepper is back where that one began.
        """
        if self._has_stepped and self._modes.mode(self._dials).is_replayed:
            if self._settle_modes():
                results, self._unsaid = self._unsaid, []
                return results
            launched = self._launch(self._modes.mode(self._dials))
            if launched is not None:
                results, self._unsaid = [*self._unsaid, *launched], []
                return results
        self._unsaid += self.settle()  # kept if this step raises
        if not any(result.is_skipped for result in self._unsaid):
            began_s = time.monotonic()
            self._unsaid.append(self.step())
            self._modes.note(self._dials, StepMode.EAGER, time.monotonic() - began_s)
            self._has_stepped = True
        results, self._unsaid = self._unsaid, []
        return results

    def away(self) -> None:
        """Give the GPU's memory back while the trial waits without a share; its steps must be recorded again."""
        self._replay = None
        self.offload.away()

    def rehearse(self) -> None:
        """Do two more steps in the mode that is wished for, and wait for them: for a warm-up."""
        self._has_stepped = True
        for _ in range(2 if self.may_replay else 0):
            mode = self._modes.mode(self._dials)
            self._launch(mode if mode.is_replayed else StepMode.GRAPH)
        self.settle()

    def settle(self) -> list[StepResult]:
        """Wait for every step that was begun; call it before anything that needs to know where the trial stands."""
        return [] if self._replay is None else self._results(self._replay.collect(0))

    def is_settled_on(self, mode: StepMode) -> bool:
        """Whether steps with these dials are executed that way from now on."""
        return self._modes.is_settled(self._dials) and self._modes.mode(self._dials) is mode

    @property
    def measured_mode(self) -> StepModeView | None:
        """The step mode of these dials where both were measured."""
        return self._modes.measured(self._dials, self.settings)

    @property
    def mode_words(self) -> str:
        """How steps are executed with these dials, and why; empty while that is being measured."""
        return self._modes.words(self._dials) if self._modes.is_settled(self._dials) else ""

    def _exchange(self, tier: Tier) -> None:
        """Let ranks exchange gradients in bf16 (of fp16 too, for its range) with the tier, if the run file says so."""
        companion = tier_facts(tier).companion_dtype if self._order.exchange_follows_tier else None
        self._noise.exchange_in(None if companion is None else torch.bfloat16)

    def step(self) -> StepResult:
        """One optimizer step, eagerly, of `settings.global_batch` samples; on a non-finite gradient nothing changes."""
        settings, world_size = self.settings, self._ranks.world_size
        indices, cursor = take(self.job, self.cursor, settings, self._ranks)
        mine, noise = rank_slice(indices, self._ranks.rank, world_size), None
        is_measured = self._noise.begin(self.step_index)
        sums, num_elements, data_s = self._accumulate(mine, self.job.num_elements(len(indices)))
        if is_measured:
            counts = [len(rank_slice(indices, rank, world_size)) for rank in range(world_size)]
            noise = self._noise.end(counts, self._ranks.group, loss_scale=self.loss_scale.factor(settings.tier))
        # Read together and late: whoever reads from a device waits for all that it was given.
        *losses, grad_norm = torch.stack([*sums, fsdp.clip_and_norm(self._params, MAX_GRAD_NORM)]).tolist()
        loss = sum(losses) / max(1, num_elements)
        is_skipped = not math.isfinite(grad_norm)
        rate = self._rate.at(self.cursor.position, self._noise.scale)
        step, position = self.step_index, self.cursor.position
        if not is_skipped:
            self._update(rate)
            self._noise.keep(noise)
            self.cursor = cursor
            self.step_index += 1
        self.optimizer.zero_grad(set_to_none=True)
        self.loss_scale.update(settings.tier, is_skipped=is_skipped)
        return StepResult(
            step=step,
            position=position,
            mode=StepMode.EAGER,
            is_skipped=is_skipped,
            num_samples=0 if is_skipped else len(indices),
            loss=loss,
            grad_norm=grad_norm,
            learning_rate=rate,
            noise=None if is_skipped else noise,
            data_s=data_s,
            is_loss_finite=math.isfinite(loss),
        )

    def release_memory(self) -> None:
        """Drop what a step that raised has left, so that it can be done again."""
        self._noise.reset()
        self.optimizer.zero_grad(set_to_none=True)
        if self._replay is not None:
            self._replay.captured.forget()
        gc.collect()
        if self._ranks.device.type == "cuda":
            torch.cuda.empty_cache()

    def _accumulate(self, mine: Indices, total_elements: int) -> tuple[list[Tensor], int, float]:
        """Gradients of this rank's samples, micro-batch by micro-batch; returns the sum of losses of each, on the
        device, how many losses are in all of them, and seconds of data.
        """
        sums: list[Tensor] = []
        num_elements, data_s = 0, 0.0
        parts = self._noise.parts(mine, self.settings.micro_batch)
        for number, part in enumerate(parts, start=1):
            fsdp.set_gradient_sync(self.model, number == len(parts))
            began_s = time.monotonic()
            batch = self.job.batch(part.tolist(), self._ranks.device)
            data_s += time.monotonic() - began_s
            # Sharded gradients are averaged over the ranks, so that the sum over all samples needs the rank count.
            terms = self.backward(batch, self.settings.tier, self._ranks.world_size / total_elements)
            sums.append(terms.loss_sum.detach())
            num_elements += terms.num_elements
            self._noise.after_part(number, self.loss_scale.factor(self.settings.tier))
        self.loss_scale.unscale(self.settings.tier, fsdp.local_grads(self._params))
        return sums, num_elements, data_s

    def _update(self, rate: float) -> None:
        """Change the weights; if that raises, note whether it had begun to."""
        apply(self.optimizer, rate)
        before = version_of(self.optimizer) if self._ranks.world_size == 1 else 0
        try:
            self.optimizer.step()
        except BaseException:
            self.is_torn = self._ranks.world_size > 1 or version_of(self.optimizer) != before
            raise

    def backward(self, batch: tuple[Tensor, ...], tier: Tier, weight: float) -> LossTerms:
        """Forward and backward pass of `weight` times the loss; gradients add up, scaled where the tier is fp16.

        Where the loss is not finite every gradient becomes NaN: so all ranks learn of it from the norm of the whole
        gradient, and it cannot reach the weights through a gradient that happens to be finite.
        """
        terms = self.loss(self.model, batch, tier)
        loss_sum = terms.loss_sum
        factor = torch.where(loss_sum.detach().isfinite(), weight * self.loss_scale.factor(tier), float("nan"))
        (loss_sum * factor).backward()  # type: ignore[no-untyped-call]
        return terms

    @property
    def progress(self) -> float:
        """Part of the trial that is done, 0 to 1."""
        return self.cursor.position / (self._order.samples_per_report * self._order.max_reports)

    def probe_batch(self, num_samples: int) -> tuple[Tensor, ...]:
        """The next `num_samples` of this rank, which are not used up."""
        indices, _ = self.cursor.take(num_samples * self._ranks.world_size)
        mine = rank_slice(indices, self._ranks.rank, self._ranks.world_size)
        return self.job.batch(mine.tolist(), self._ranks.device)

    def mean_gradient(self, batch: tuple[Tensor, ...], tier: Tier) -> float:
        """Add the gradient of the mean loss of `batch` in `tier`; the model is left in its own. Returns that loss."""
        set_tier(self.model, tier)
        fsdp.set_gradient_sync(self.model, True)
        try:
            terms = self.backward(batch, tier, 1 / self.job.num_elements(len(batch[0])))
            self.loss_scale.unscale(tier, fsdp.local_grads(self._params))
        finally:
            set_tier(self.model, self.settings.tier)
        return float(terms.loss_sum.detach()) / terms.num_elements

    def add_gradient(self, batch: tuple[Tensor, ...], tier: Tier) -> None:
        """Do what `mean_gradient` does without reading anything back, as a recorded step does."""
        set_tier(self.model, tier)
        try:
            terms = self.loss(self.model, batch, tier)
            (terms.loss_sum * (1 / terms.num_elements)).backward()  # type: ignore[no-untyped-call]
        finally:
            set_tier(self.model, self.settings.tier)

    @property
    def may_replay(self) -> bool:
        """Whether its steps may be replayed from a graph."""
        return self._modes.refusal is None and self._ranks.step_mode is not StepMode.EAGER

    def position(self) -> dict[str, Any]:
        """What beside model and optimizer a step changes."""
        return {
            "step": self.step_index,
            "cursor": self.cursor,
            "rate": self._rate.state(),
            "loss_scale": self.loss_scale.state(),
        }

    def go_back(self, position: dict[str, Any]) -> None:
        """The inverse of `position`; the batch may have changed since, and stays."""
        self.step_index, self.cursor = int(position["step"]), position["cursor"]
        self._rate = LearningRate.restored(self._rate.schedule, position["rate"]).with_batch(
            self.settings.global_batch, self.cursor.position, self._noise.scale
        )
        self.loss_scale = LossScale.restored(position["loss_scale"])
        self._noise.reset()

    def evaluate(self) -> dict[str, float]:
        """Validation metrics, in the tier the trial runs with."""
        self.model.eval()
        try:
            with lowered(self.settings.tier, self._ranks.device):
                return self.job.evaluate(self.model, self._ranks.device)
        finally:
            self.model.train()

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
                "rate": self._rate.state(),
                "noise": self._noise.state(),
                "loss_scale": self.loss_scale.state(),
            },
            rank=self._ranks.rank,
            world_size=self._ranks.world_size,
            group=self._ranks.group,
        )

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
        self._rate = LearningRate.restored(self._rate.schedule, extra["rate"])
        self.loss_scale = LossScale.restored(extra.get("loss_scale"))
        self._replay = None  # what was recorded reads the optimizer state of before
        if "noise" in extra:
            self._noise.restore(extra["noise"])
        return extra

    @property
    def _dials(self) -> tuple[object, ...]:
        """What fixes how long a step takes, apart from the share."""
        return self.settings.micro_batch, self.settings.grad_accum, self.settings.tier

    def loss(self, model: nn.Module, batch: tuple[Tensor, ...], tier: Tier) -> LossTerms:
        """The forward pass, with what is no linear layer lowered as the tier says."""
        with lowered(tier, self._ranks.device):
            return self.job.loss(model, batch)

    def compiled_loss(self, model: nn.Module, batch: tuple[Tensor, ...], tier: Tier) -> LossTerms:
        """What `loss` does, by kernels that torch.compile made."""
        with lowered(tier, self._ranks.device):
            return self._compilation.loss(model, batch)

    def _settle_modes(self) -> bool:
        """Compile if that is worth it, and let go of a mode that was found slower; whether a step came back skipped."""
        kernels = self.settings.micro_batch, self.settings.tier
        loser = self._modes.take_loser(self._dials)
        step_s, batch = self._modes.may_compile(self._dials), self.settings.global_batch
        is_due = step_s is not None and self._compilation.is_due(kernels, step_s / batch, self.cursor.position)
        if loser is None and not is_due:
            return False
        self._unsaid += self.settle()
        if loser is not None and self._replay is not None:
            self._compilation.saves(kernels, loser[1])
            self._replay.captured.drop((self.settings.tier, loser[0]))
        is_skipped = any(result.is_skipped for result in self._unsaid)
        if is_due and not is_skipped:
            indices, _ = take(self.job, self.cursor, self.settings, self._ranks)
            parts = micro_batches(indices, self.settings.micro_batch)
            first = self.job.batch(parts[0].tolist(), CPU)
            if self._prepared(first, len(parts), StepMode.COMPILED) is not None:
                self._modes.race(self._dials)
        self._compilation.end_turn()
        return is_skipped

    def _launch(self, mode: StepMode) -> list[StepResult] | None:
        """One step that is replayed; None where it cannot be recorded, and nothing was done."""
        settings = self.settings
        indices, cursor = take(self.job, self.cursor, settings, self._ranks)
        began_s = time.monotonic()
        batches = [self.job.batch(part.tolist(), CPU) for part in micro_batches(indices, settings.micro_batch)]
        data_s = time.monotonic() - began_s
        replay = self._prepared(batches[0], len(batches), mode)
        if replay is None:
            return None
        rate = self._rate.at(self.cursor.position, self._noise.scale)
        apply(self.optimizer, rate)
        step = Launched(
            step=self.step_index,
            cursor=self.cursor,
            num_samples=len(indices),
            learning_rate=rate,
            data_s=data_s,
            mode=mode,
            pair_part=self._noise.begin_replayed(self.step_index),
        )
        replay.launch(step, batches, 1 / self.job.num_elements(len(indices)))
        self.cursor, self.step_index = cursor, self.step_index + 1
        return self._results(replay.collect())

    def _prepared(self, batch: tuple[Tensor, ...], num_parts: int, mode: StepMode) -> Replay | None:
        """The replay with a recording for such batches, or None: then the trial does without the mode, and says why."""
        if self._replay is None:
            make = self._ranks.recorder
            recorder = CudaRecorder() if make is None else make(self.model, self.optimizer)
            self._replay = open_replay(cast(Job, self._lowered), self.model, self.optimizer, recorder, MAX_GRAD_NORM)
        self._lowered.is_compiled = mode is StepMode.COMPILED
        kernels = self.settings.micro_batch, self.settings.tier
        compiling = self._compilation.measured(kernels) if self._lowered.is_compiled else None
        try:
            self._replay.captured.prepare((self.settings.tier, mode), batch, num_parts, compiling)
        except Exception as error:  # whatever a model does that a graph cannot hold
            self._replay.captured.forget()
            reason = f"({type(error).__name__}: {error})".splitlines()[0]
            if self._lowered.is_compiled:
                self._modes.not_compiled(self._dials, reason)
            else:
                self._modes.refuse(f"its step cannot be captured {reason}")
            logger.warning("step mode: %s", self.mode_words)
            return None
        return self._replay

    def _results(self, returned: list[Returned]) -> list[StepResult]:
        """What came back, as results; after a skipped step the trial stands where that step began."""
        results = []
        for each in returned:
            launched = each.launched
            if each.interval_s is not None:
                self._modes.note(self._dials, launched.mode, each.interval_s)
            if each.is_skipped:
                self.cursor, self.step_index = launched.cursor, launched.step
                self._noise.reset()
            else:
                self._noise.keep(each.noise)
            results.append(result_of(each))
        return results
