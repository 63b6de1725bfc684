"""One trial in a bundle: what it brings to the next steps, and where it stands behind them. It is its own stepper.

Everything that a trial alone asks before a step (samples, learning rates, whether the noise is measured) is asked here
for several steps ahead, so that nothing has to be known between them. A step that the device left out because its
gradient was not finite puts the trial back to where that step began, as it does alone.
"""

from __future__ import annotations

import contextlib
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from orchestrator.jobs.data import Indices, SampleCursor
from orchestrator.train.batch.meter import PairPart
from orchestrator.train.batch.noise import NoiseEstimate, RecordedPair
from orchestrator.train.groups import Ranks
from orchestrator.train.read_ahead import take
from orchestrator.train.step_mode.choice import StepMode
from orchestrator.train.step_result import StepResult
from orchestrator.train.stepper import Stepper

Numbers = Callable[[dict[str, Any]], list[float]]
"""The numbers of a group of the optimizer that its update needs."""


@dataclass(slots=True, kw_only=True)
class Ahead:
    """The next steps of a trial.

    Attributes:
        first, cursor: the step and the place where they begin.
        samples: of all of them.
        numbers: (steps, groups, numbers) of the optimizer.
        rates: the learning rate that each step tells.
        pairs: what single steps do for the noise scale.
        schedules: the state of the learning rates before each step, where they follow a schedule.
    """

    first: int
    cursor: SampleCursor
    samples: Indices
    numbers: Tensor
    rates: list[float]
    pairs: dict[int, PairPart] = field(default_factory=dict)
    schedules: list[dict[str, Any]] = field(default_factory=list)


@dataclass(slots=True, kw_only=True)
class Outcomes:
    """What the device left of one trial's steps: losses and gradient norms, how many were done before one was left out,
    and the products of gradients of two steps.
    """

    losses: Sequence[float]
    norms: Sequence[float]
    num_done: int
    products: Sequence[Sequence[float]]


class Member:
    """A trial in a bundle.

    Args:
        stepper: the trial; on one rank.
        generator: what its dropout draws from on a CPU, as its own process would.

    Attributes:
        device: where it is.
    """

    def __init__(self, stepper: Stepper, generator: torch.Generator) -> None:
        self.stepper, self.generator = stepper, generator
        self.device = next(stepper.model.parameters()).device
        self._ranks = Ranks(rank=0, world_size=1, device=self.device)
        self._read_ahead: tuple[tuple[int, int], tuple[Tensor, ...]] = ((0, 0), ())

    @property
    def batch_size(self) -> int:
        """Samples per step."""
        return self.stepper.settings.global_batch

    def look_at(self, count: int, device: torch.device) -> Any:  # noqa: ANN401 - the user's
        """The next samples, which are not used up."""
        stepper = self.stepper
        indices, _ = stepper.cursor.take(count)
        return stepper.job.batch(indices.tolist(), device)

    def plan(self, num_steps: int, numbers: Numbers) -> Ahead:
        """Take the samples and rates of the next steps; the trial stands behind them from here on."""
        stepper, optimizers = self.stepper, self.stepper.optimizers
        first, begin = stepper.step_index, stepper.cursor
        groups = optimizers.one.param_groups
        ahead = Ahead(first=first, cursor=begin, samples=np.empty(0, dtype=np.int64), numbers=torch.empty(0), rates=[])
        ahead.pairs = stepper.noise.pairs_ahead(first, num_steps)
        samples, found = [], []
        if not optimizers.has_schedulers and self._is_steady:
            ahead.rates = [stepper.apply_rates()] * num_steps
            found = [[numbers(group) for group in groups]]
            samples.append(self._take(num_steps))
        else:
            for _ in range(num_steps):
                if optimizers.has_schedulers:
                    ahead.schedules.append(optimizers.state(with_members=False))
                ahead.rates.append(stepper.apply_rates())
                found.append([numbers(group) for group in groups])
                samples.append(self._take(1))
                with _quiet_about_order():
                    optimizers.advance(stepper.cursor.position)
        ahead.samples = np.concatenate(samples)
        ahead.numbers = torch.tensor(found).expand(num_steps, -1, -1)
        stepper.step_index += num_steps
        return ahead

    def batches(self, ahead: Ahead) -> tuple[tuple[Tensor, ...], float]:
        """The micro-batches of these steps in order, (steps * parts, B, ...) each, and the seconds that took."""
        began_s = time.monotonic()
        place, read = self._read_ahead
        self._read_ahead = ((0, 0), ())
        if place != (ahead.cursor.position, len(ahead.samples)):
            read = self._read(ahead.samples)
        return read, time.monotonic() - began_s

    def read_ahead(self, num_steps: int) -> None:
        """Begin to read what as many further steps will ask for, while the device is busy with these."""
        samples, _ = self.stepper.cursor.take(num_steps * self.batch_size)
        self._read_ahead = ((self.stepper.cursor.position, len(samples)), self._read(samples))

    def _read(self, samples: Indices) -> tuple[Tensor, ...]:
        training, size = self.stepper.job, self.stepper.settings.micro_batch
        if hasattr(training.own, "batch"):  # samples in memory: a batch is one gather, and so are many
            whole = training.batch(samples, self.device)
            if _is_of(whole, len(samples)):
                return tuple(part.reshape(-1, size, *part.shape[1:]) for part in whole)
        parts = [training.batch(samples[i : i + size].tolist(), self.device) for i in range(0, len(samples), size)]
        if not all(_is_of(part, None) for part in parts):
            raise TypeError("its batches are no tuples of tensors")
        return tuple(torch.stack(same) for same in zip(*parts, strict=True))

    def settle(self, ahead: Ahead, found: Outcomes, mode: StepMode, data_s: float) -> list[StepResult]:
        """What came of the steps; the trial stands behind those that were done."""
        stepper, num_done, num_steps = self.stepper, found.num_done, len(ahead.rates)
        results, size = [], self.batch_size
        draws = self._draws(ahead, found)
        if num_done:
            results.append(
                StepResult(
                    step=ahead.first,
                    position=ahead.cursor.position,
                    mode=mode,
                    is_skipped=False,
                    num_samples=num_done * size,
                    loss=sum(found.losses[:num_done]) / num_done,
                    grad_norm=found.norms[num_done - 1],
                    learning_rate=ahead.rates[num_done - 1],
                    noise=_mean(draws),
                    data_s=data_s,
                    num_steps=num_done,
                )
            )
        for draw in draws:
            stepper.noise.keep(draw)
        if num_done < num_steps:
            self._go_back(ahead, num_done)
            loss = found.losses[num_done]
            results.append(
                StepResult(
                    step=ahead.first + num_done,
                    position=stepper.cursor.position,
                    mode=mode,
                    is_skipped=True,
                    num_samples=0,
                    loss=loss,
                    grad_norm=found.norms[num_done],
                    learning_rate=ahead.rates[num_done],
                    noise=None,
                    data_s=0.0,
                    is_loss_finite=math.isfinite(loss),
                )
            )
        return results

    @property
    def _is_steady(self) -> bool:
        """Whether the rate is the same in all steps to come, as far as the batch and the warm-up go."""
        stepper = self.stepper
        position, rate = stepper.cursor.position, stepper.rate
        return position >= rate.schedule.warmup_samples and not rate.is_ramping(position, stepper.noise.scale)

    def _take(self, num_steps: int) -> Indices:
        """The samples of so many steps, used up; who reads them meanwhile is told."""
        stepper, settings = self.stepper, self.stepper.settings
        many = settings if num_steps == 1 else replace(settings, grad_accum=settings.grad_accum * num_steps)
        samples, stepper.cursor = take(stepper.job, stepper.cursor, many, self._ranks)
        return samples

    def _go_back(self, ahead: Ahead, num_done: int) -> None:
        stepper = self.stepper
        position = ahead.cursor.position + num_done * self.batch_size
        stepper.cursor = replace(ahead.cursor, position=position)
        stepper.step_index = ahead.first + num_done
        if ahead.schedules:
            stepper.optimizers.load(ahead.schedules[num_done])
        stepper.noise.reset()

    def _draws(self, ahead: Ahead, found: Outcomes) -> list[NoiseEstimate]:
        compared = [step for step, part in ahead.pairs.items() if part is PairPart.COMPARE and step < found.num_done]
        estimates = [
            RecordedPair.estimate((found.products[step][0], found.products[step][1]), self.batch_size)
            for step in compared
        ]
        return [each for each in estimates if each is not None]


@contextlib.contextmanager
def _quiet_about_order() -> Iterator[None]:
    """A scheduler warns where its optimizer has not stepped before it: in a bundle another one does its work."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
        yield


def _is_of(batch: Any, size: int | None) -> bool:  # noqa: ANN401 - the user's
    """Whether a batch is a tuple of tensors, with so many samples each."""
    is_tuple = type(batch) in {tuple, list} and all(isinstance(part, Tensor) for part in batch)
    return is_tuple and (size is None or all(part.ndim and len(part) == size for part in batch))


def _mean(draws: Sequence[NoiseEstimate]) -> NoiseEstimate | None:
    if not draws:
        return None
    return NoiseEstimate(
        noise_trace=sum(draw.noise_trace for draw in draws) / len(draws),
        grad_sq=sum(draw.grad_sq for draw in draws) / len(draws),
    )
