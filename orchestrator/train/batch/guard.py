"""Running out of memory is foreseen where it can be, and survived where it cannot.

Before a larger micro-batch or another tier every rank checks whether it has room, and all take what all can hold. When
a step runs out of memory all the same, one rank does it again at once, with a smaller micro-batch and more
accumulation: the same samples in the same order, the same global batch. Several ranks leave together and begin again
from the last commit, because a half-done collective cannot be taken back. Called by the loop around every step.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from orchestrator.errors import OutOfMemoryError
from orchestrator.policies.learn.memory import largest_micro_batch, largest_split
from orchestrator.policies.plan import Settings
from orchestrator.train.batch.memory import MemoryMeter
from orchestrator.train.groups import Ranks
from orchestrator.train.step_result import StepResult
from orchestrator.train.stepper import Stepper

logger = logging.getLogger(__name__)

MAX_ATTEMPTS = 3
"""Times that one step is tried before the trial fails by name."""

_SIGNS = ("out of memory", "can't allocate memory", "ALLOC_FAILED", "not enough memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on a GPU or in the process."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """What the guard did: it left `instead_of` for the settings the trial has now."""

    instead_of: Settings
    reason: str


class MemoryGuard:
    """Watches over the memory of one trial on one rank."""

    def __init__(self, stepper: Stepper, ranks: Ranks, meter: MemoryMeter, name: str) -> None:
        self._stepper, self._ranks, self._meter, self._name = stepper, ranks, meter, name
        self._largest_done = 0

    def prepare(self, asked: Settings) -> Settings:
        """The settings nearest to `asked` that all ranks have room for; called by all ranks at one boundary."""
        now = self._stepper.settings
        if asked.micro_batch <= now.micro_batch and asked.tier is now.tier:
            return asked
        if self._agree(self._meter.has_room(asked)):
            return asked
        return self._nearest(asked, now)

    def advance(self) -> tuple[list[StepResult], Move | None]:
        """One more step, tried up to `MAX_ATTEMPTS` times; says if it had to move to a smaller micro-batch.

        Raises:
            OutOfMemoryError: it is to be begun again from the last commit, or given up (`is_final`).
        """
        asked = self._stepper.settings
        for attempt in range(1, MAX_ATTEMPTS + 1):
            failure = self._try_step()
            if isinstance(failure, list):
                return failure, self._done(asked, attempt)
            self._stepper.release_memory()
            smaller = self._smaller(attempt)
            logger.warning("out of memory at step %d, attempt %d: %s", self._stepper.step_index, attempt, failure)
            if self._ranks.world_size > 1 or self._stepper.is_torn:
                raise OutOfMemoryError(f"{self._name} ran out of memory: {failure}", settings=smaller)
            if attempt < MAX_ATTEMPTS:
                self._stepper.turn(smaller)
        last = self._stepper.settings
        raise OutOfMemoryError(
            f"{self._name} ran out of memory {MAX_ATTEMPTS} times at step {self._stepper.step_index}, the last time"
            f" with micro-batch {last.micro_batch} in {last.tier}: {failure}; lower dials.batch.max_micro or the size"
            " of the model",
            settings=last,
            is_final=True,
        )

    def _done(self, asked: Settings, attempt: int) -> Move | None:
        """Remember what has fitted, and say what was moved."""
        now = self._stepper.settings
        if attempt == 1:
            self._largest_done = max(self._largest_done, now.micro_batch)
            return None
        self._largest_done = now.micro_batch
        step = self._stepper.step_index - 1
        reason = f"out of memory at step {step} with micro-batch {asked.micro_batch} in {asked.tier}"
        return Move(instead_of=asked, reason=f"{reason}: goes on with {now.micro_batch} x {now.grad_accum}")

    def _try_step(self) -> list[StepResult] | str:
        """The result, or what ran out: outside of the handler the exception is gone, and with it what it held."""
        try:
            return self._stepper.advance()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return str(error).splitlines()[0][:200] or type(error).__name__

    def _smaller(self, attempt: int) -> Settings:
        """The next to try: what the line says fits, at most three quarters; at last what is known to have fitted."""
        now = self._stepper.settings
        per_rank = now.micro_batch * now.grad_accum
        line = self._meter.line(now)
        bound = max(1, now.micro_batch * 3 // 4)
        if line is not None:
            free_bytes = line.needed_bytes(now.micro_batch) * 0.9
            bound = min(bound, max(1, largest_micro_batch(line, free_bytes, now.micro_batch)))
        if attempt > 1:
            bound = min(bound, now.micro_batch // 2 or 1, self._largest_done or now.micro_batch)
        micro_batch = largest_split(per_rank, bound)
        return replace(now, micro_batch=micro_batch, grad_accum=per_rank // micro_batch)

    def _nearest(self, asked: Settings, now: Settings) -> Settings:
        """The largest micro-batch that all ranks have room for, by bisection over those that keep the global batch."""
        per_rank = asked.micro_batch * asked.grad_accum
        sizes = [size for size in range(1, asked.micro_batch) if per_rank % size == 0]
        found = _last(
            sizes,
            lambda size: self._agree(self._meter.has_room(_split(asked, size))),
            trusted=self._trusted(asked, now),
        )
        if found is not None:
            return _split(asked, found)
        stay = largest_split(per_rank, now.micro_batch)
        return replace(_split(asked, stay), tier=now.tier)

    def _trusted(self, asked: Settings, now: Settings) -> int:
        """The micro-batch that is running now needs no check, as long as the tier stays."""
        return now.micro_batch if asked.tier is now.tier else 0

    def _agree(self, has_room: bool) -> bool:
        """Whether every rank has room."""
        if self._ranks.world_size == 1:
            return has_room
        answer = torch.tensor([int(has_room)], dtype=torch.int64)
        dist.all_reduce(answer, op=dist.ReduceOp.MIN, group=self._ranks.group)
        return bool(answer.item())


def _split(settings: Settings, micro_batch: int) -> Settings:
    per_rank = settings.micro_batch * settings.grad_accum
    return replace(settings, micro_batch=micro_batch, grad_accum=per_rank // micro_batch)


def _last(sizes: list[int], holds: Callable[[int], bool], trusted: int) -> int | None:
    """The last of ascending sizes for which `holds`, given that it holds for all up to `trusted`; None if for none."""
    low = sum(size <= trusted for size in sizes) - 1
    high = len(sizes) - 1
    while low < high:
        middle = (low + high + 1) // 2
        if holds(sizes[middle]):
            low = middle
        else:
            high = middle - 1
    return sizes[low] if low >= 0 else None
