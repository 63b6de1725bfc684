"""The steps of one trial that are recorded and replayed: when they are, and where the trial stands meanwhile.

Between the stepper, which has the trial, and `replay`, which launches recordings: chooses the mode of the next step,
records what it needs, and puts the trial back where a step began that turns out to be skipped. Called by the stepper.
"""

from __future__ import annotations

import logging
import time
from typing import Any, Protocol

from torch import Tensor, nn

from orchestrator.control.orders import TrialOrder
from orchestrator.jobs.data import SampleCursor, micro_batches
from orchestrator.jobs.job import LossTerms
from orchestrator.jobs.training import Training
from orchestrator.policies.plan import Settings
from orchestrator.policies.snapshot import StepModeView
from orchestrator.policies.tier import Tier
from orchestrator.train.batch.meter import NoiseMeter
from orchestrator.train.groups import Ranks
from orchestrator.train.optimizers import Optimizers
from orchestrator.train.precision.tiers import lowered
from orchestrator.train.read_ahead import take
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


class Stepping(Protocol):
    """The trial: the stepper, as far as it matters here."""

    job: Training
    model: nn.Module
    optimizers: Optimizers
    settings: Settings
    cursor: SampleCursor
    step_index: int

    def loss(self, model: nn.Module, batch: Any, tier: Tier) -> LossTerms:  # noqa: ANN401
        """The forward pass in a tier."""
        ...

    def apply_rates(self) -> float:
        """Set every group's learning rate for the next step; returns that of the first."""
        ...

    def clip_and_norm(self) -> Tensor:
        """Clip the gradients; returns their norm before, on the device."""
        ...


class RecordedSteps:
    """The recorded steps of one trial on one rank."""

    def __init__(self, trial: Stepping, order: TrialOrder, ranks: Ranks, noise: NoiseMeter) -> None:
        self._trial, self._ranks, self._noise = trial, ranks, noise
        is_possible = ranks.device.type == "cuda" or ranks.recorder is not None
        whole = refusal(ranks.world_size, trial.optimizers.one, is_possible=is_possible)
        self._modes = ModeChoice(ranks.step_mode, whole, refusal_of)
        self._compilation = Compilation(trial.job, trial.model, ahead_of(order, ranks.trials_ahead))
        self._lowered = Lowered(self)
        self._replay: Replay | None = None

    @property
    def settings(self) -> Settings:
        """The dials in force."""
        return self._trial.settings

    @property
    def is_next(self) -> bool:
        """Whether the next step is to be replayed, as far as the first one of the trial showed that it can be."""
        if not self._modes.mode(self._dials).is_replayed:
            return False
        reason = self._why_not
        if reason:
            self._modes.refuse(reason)
        return not reason

    @property
    def _why_not(self) -> str | None:
        return self._trial.job.why_not_replayed or self._trial.optimizers.why_not_replayed

    @property
    def is_possible(self) -> bool:
        """Whether steps may be replayed from a graph."""
        is_allowed = self._modes.refusal is None and not self._why_not
        return is_allowed and self._ranks.step_mode is not StepMode.EAGER

    def note_eager(self, seconds: float) -> None:
        """A step was done eagerly."""
        self._modes.note(self._dials, StepMode.EAGER, seconds)

    def drop(self) -> None:
        """Give up all recordings: the addresses in them are not those of the trial any more."""
        self._replay = None

    def forget(self) -> None:
        """Give up all recordings, and the gradients in them."""
        if self._replay is not None:
            self._replay.captured.forget()

    def rehearse(self) -> None:
        """Do two more steps in the mode that is wished for: for a warm-up."""
        for _ in range(2 if self.is_possible else 0):
            mode = self._modes.mode(self._dials)
            self.launch(mode if mode.is_replayed else StepMode.GRAPH)

    def settle(self) -> list[StepResult]:
        """Wait for every step that was begun."""
        return [] if self._replay is None else self._results(self._replay.collect(0))

    def is_settled_on(self, mode: StepMode) -> bool:
        """Whether steps with these dials are executed that way from now on."""
        return self._modes.is_settled(self._dials) and self._modes.mode(self._dials) is mode

    @property
    def measured_mode(self) -> StepModeView | None:
        """The step mode of these dials where both were measured."""
        return self._modes.measured(self._dials, self.settings)

    @property
    def words(self) -> str:
        """How steps are executed with these dials, and why; empty while that is being measured."""
        return self._modes.words(self._dials) if self._modes.is_settled(self._dials) else ""

    @property
    def _dials(self) -> tuple[object, ...]:
        """What fixes how long a step takes, apart from the share."""
        return self.settings.micro_batch, self.settings.grad_accum, self.settings.tier

    def loss(self, model: nn.Module, batch: tuple[Tensor, ...], tier: Tier) -> LossTerms:
        """The forward pass in a tier."""
        return self._trial.loss(model, batch, tier)

    def compiled_loss(self, model: nn.Module, batch: tuple[Tensor, ...], tier: Tier) -> LossTerms:
        """What `loss` does, by kernels that torch.compile made."""
        with lowered(tier, self._ranks.device):
            return self._compilation.loss(model, batch)

    def settle_modes(self) -> list[StepResult]:
        """Compile if that is worth it, and let go of a mode that was found slower; returns what came back meanwhile."""
        kernels = self.settings.micro_batch, self.settings.tier
        loser = self._modes.take_loser(self._dials)
        step_s, batch = self._modes.may_compile(self._dials), self.settings.global_batch
        is_due = step_s is not None and self._compilation.is_due(kernels, step_s / batch, self._trial.cursor.position)
        if loser is None and not is_due:
            return []
        settled = self.settle()
        if loser is not None and self._replay is not None:
            self._compilation.saves(kernels, loser[1])
            self._replay.captured.drop((self.settings.tier, loser[0]))
        is_skipped = any(result.is_skipped for result in settled)
        if is_due and not is_skipped:
            trial = self._trial
            indices, _ = take(trial.job, trial.cursor, self.settings, self._ranks)
            parts = micro_batches(indices, self.settings.micro_batch)
            first = trial.job.batch(parts[0].tolist(), CPU)
            with self._ranks.pulse.long("compiling"):
                is_prepared = self._prepared(tuple(first), len(parts), StepMode.COMPILED) is not None
            if is_prepared:
                self._modes.race(self._dials)
        self._compilation.end_turn()
        return settled

    def launch(self, mode: StepMode | None = None) -> list[StepResult] | None:
        """One step that is replayed; None where it cannot be recorded, and nothing was done."""
        trial, settings = self._trial, self.settings
        mode = mode or self._modes.mode(self._dials)
        indices, cursor = take(trial.job, trial.cursor, settings, self._ranks)
        began_s = time.monotonic()
        read = [trial.job.batch(part.tolist(), CPU) for part in micro_batches(indices, settings.micro_batch)]
        data_s = time.monotonic() - began_s
        reason = _why_not(read)
        if reason:
            self._modes.refuse(reason)
            return None
        batches = [tuple(batch) for batch in read]
        replay = self._prepared(batches[0], len(batches), mode)
        if replay is None:
            return None
        rate = trial.apply_rates()
        step = Launched(
            step=trial.step_index,
            cursor=trial.cursor,
            schedule=trial.optimizers.state(with_members=False) if trial.optimizers.has_schedulers else None,
            num_samples=len(indices),
            learning_rate=rate,
            data_s=data_s,
            mode=mode,
            pair_part=self._noise.begin_replayed(trial.step_index),
        )
        # None where the loss of a micro-batch is a mean: each is one element then, and all are equally large.
        replay.launch(step, batches, 1 / (trial.job.num_elements(len(indices)) or len(batches)))
        trial.cursor, trial.step_index = cursor, trial.step_index + 1
        trial.optimizers.advance(cursor.position)
        return self._results(replay.collect())

    def _prepared(self, batch: tuple[Tensor, ...], num_parts: int, mode: StepMode) -> Replay | None:
        """The replay with a recording for such batches, or None: then the trial does without the mode, and says why."""
        if self._replay is None:
            make = self._ranks.recorder
            model, optimizer = self._trial.model, self._trial.optimizers.one
            recorder = CudaRecorder() if make is None else make(model, optimizer)
            clip = self._trial.clip_and_norm
            self._replay = open_replay(self._lowered, model, optimizer, recorder, clip)
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
            logger.warning("step mode: %s", self.words)
            return None
        return self._replay

    def _results(self, returned: list[Returned]) -> list[StepResult]:
        """What came back, as results; after a skipped step the trial stands where that step began."""
        results, trial = [], self._trial
        for each in returned:
            launched = each.launched
            if each.interval_s is not None:
                self._modes.note(self._dials, launched.mode, each.interval_s)
            if each.is_skipped:
                trial.cursor, trial.step_index = launched.cursor, launched.step
                if launched.schedule is not None:
                    trial.optimizers.load(launched.schedule)
                self._noise.reset()
            else:
                self._noise.keep(each.noise)
            results.append(result_of(each))
        return results


def _why_not(batches: list[Any]) -> str:
    """Why batches cannot be replayed on, empty where they can: a recording reads tensors of one shape."""
    for batch in batches:
        if type(batch) not in {tuple, list} or not all(isinstance(part, Tensor) for part in batch):
            return "its batches are no tuples of tensors"
    shapes = {tuple(part.shape for part in batch) for batch in batches}
    return "its batches differ in shape" if len(shapes) > 1 else ""
