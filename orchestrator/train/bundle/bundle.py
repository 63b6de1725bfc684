"""Several trials of one kind, stepped as one: the losses and weights of each are those of the trial alone.

A bundle is made of steppers between two steps and ended between two steps; who enters or leaves ends it, and another
one begins with those that are there. It does many short steps in a row without the host: their samples and rates are
brought to the device before, losses and norms read behind them. A row whose gradient is not finite stops by itself.
Called by whoever steps several trials in one process.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from orchestrator.errors import OrchestratorError
from orchestrator.policies.tier import Tier
from orchestrator.train.batch.meter import PairPart
from orchestrator.train.bundle.draws import Draws
from orchestrator.train.bundle.forward import Batch, Forward, without_gradients_of
from orchestrator.train.bundle.kind import numbers_now
from orchestrator.train.bundle.member import Ahead, Member, Outcomes
from orchestrator.train.bundle.pairs import Pairs
from orchestrator.train.bundle.stacked import Stacked, uneven_steps
from orchestrator.train.bundle.update import Clip, Update
from orchestrator.train.step_mode.choice import StepMode
from orchestrator.train.step_result import StepResult

MAX_STEPS = 512
"""Steps in a row at most."""
_FIRST_STEPS = 8
"""The same before it is known how long one takes, and how much its samples are."""
_MAX_BYTES = {"cpu": 64 << 20, "cuda": 2 << 30}
_MAX_PART = 64
"""Samples of the steps in a row, on the device; of a GPU one part in so many of its memory at most."""
_TOLERANCE = {Tier.FP32: 1e-3, Tier.TF32: 2e-2, Tier.BF16: 1e-1}
"""How far the gradient of a member may be from that of the trial alone, relative to its norm, when it enters: far above
what the order of sums makes, far below what another loss makes."""


NOT_COMPILED = "not compiled"
"""How the text of a `StackingError` begins where the same trials can be stepped as one without compiling."""
_NOTHING = Outcomes(losses=[0.0], norms=[0.0], num_done=0, products=[])


class Recorder(Protocol):
    """Records work on the device and replays it; see `step_mode.recorder`."""

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """What replays it; nothing is executed."""
        ...

    def rehearse(self, work: Callable[[], None], *, may_wait: bool = False) -> None:
        """Execute it once as if it were recorded."""
        ...


class StackingError(OrchestratorError):
    """Trials cannot be stepped as one.

    Attributes:
        row: the member that the others can do without; None where it is none of them in particular.
    """

    def __init__(self, text: str, row: int | None = None) -> None:
        super().__init__(text)
        self.row = row

    def __reduce__(self) -> tuple[Any, ...]:
        """Both arguments survive pickling."""
        return type(self), (str(self), self.row)


class Bundle:
    """Trials of one kind from now until `close`.

    Args:
        members: the trials; none of them is on its way through a step.
        forward: their stacked forward pass, kept by whoever makes bundles of this kind again.
        num_rows: rows of the stacked tensors, those of the members first.
        recorder: records steps; None to execute them.
        compile: compiles the update, where that is wished for.
        first_new: members before this one were in a bundle of this kind and are not compared again.

    Raises:
        StackingError: they cannot be stepped as one; they are as they were.
    """

    def __init__(
        self,
        members: Sequence[Member],
        forward: Forward,
        *,
        num_rows: int | None = None,
        recorder: Recorder | None = None,
        compile: Callable[[Any], Any] | None = None,
        first_new: int = 0,
    ) -> None:
        self.members = tuple(members)
        steppers = [member.stepper for member in members]
        first = steppers[0]
        self._forward, self._recorder = forward, recorder
        self._device = next(first.model.parameters()).device
        self._num_parts, self._tier = first.settings.grad_accum, first.settings.tier
        self._num_rows = num_rows or len(members)
        self._check_alike()
        forward.set_rates([each.model for each in steppers], self._num_rows)
        optimizers = [each.optimizers.one for each in steppers]
        counts = [each.step_index for each in steppers]
        self._stacked = Stacked([each.model for each in steppers], optimizers, counts, self._num_rows)
        self._is_open = True
        device, num_rows = self._device, self._num_rows
        spare = [None] * (num_rows - len(members))
        clip = Clip.of(
            [*(each.job.clip_norm for each in steppers), *spare],
            [*(each.job.clip_value for each in steppers), *spare],
            device,
        )
        self._update = Update(self._stacked, optimizers[0], clip, compile or (lambda function: function))
        self._values = {column.name: column.of(self._stacked.values) for column in self._stacked.columns}
        seeds = torch.tensor([each.cursor.seed + 1 for each in steppers] + [0] * len(spare), device=device)
        self._draws = Draws([member.generator for member in members], seeds, self._stacked.steps)
        self._grads = torch.zeros(num_rows, self._stacked.num_columns, device=device)
        self._pairs = Pairs(self._stacked, self._grads, optimizers, MAX_STEPS)
        self._loss = torch.zeros(num_rows, device=device)
        self._halted = torch.zeros(num_rows, dtype=torch.bool, device=device)
        self._place, self._part = (torch.zeros(1, dtype=torch.int64, device=device) for _ in range(2))
        self._told = torch.zeros(MAX_STEPS, 3, num_rows, device=device)
        self._numbers: Tensor | None = None
        self._batches: tuple[Tensor, ...] = ()
        self._weight = 1.0
        self._replays: dict[str, Callable[[], None]] = {}
        self._step_s: float | None = None
        self._step_bytes, self._max_bytes = 0, _MAX_BYTES[device.type]
        self._reader: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._reader = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            self._max_bytes = min(self._max_bytes, torch.cuda.get_device_properties(device).total_memory // _MAX_PART)
        try:
            self._compare(first_new)
        except StackingError:
            self.close()
            raise

    @property
    def step_s(self) -> float | None:
        """Seconds of one step of all members as last measured; None before."""
        return self._step_s

    def close(self) -> None:
        """Every member is a trial of its own again, as far as it has come."""
        if self._is_open:
            self._is_open = False
            self._stacked.release()
            for member in self.members:
                member.stepper.noise.reset()
            self._replays.clear()

    def advance(
        self, max_steps: int = 1, target_s: float = 0.0, active: Collection[int] | None = None
    ) -> list[list[StepResult]]:
        """Step members, as often as it takes to fill `target_s`, at least once and at most `max_steps` times.

        Args:
            max_steps: most steps in a row.
            target_s: seconds that they shall fill.
            active: rows of those that are stepped; the others stay as they are. None for all.

        Returns:
            For each member what its steps did: all that were done in one result, and one that was left out behind it.

        Raises:
            StackingError: a step cannot be recorded, or its samples cannot be stacked; nothing was done.
        """
        num_steps = self._num_steps(max_steps, target_s)
        rows = range(len(self.members)) if active is None else sorted(active)
        plans = {row: self.members[row].plan(num_steps, self._update.numbers_of) for row in rows}
        try:
            data_s = self._bring(plans)
            self._record(_paired(plans))
        except Exception as error:
            for row, plan in plans.items():
                self.members[row].settle(plan, _NOTHING, StepMode.EAGER, 0.0)
            if isinstance(error, StackingError):
                raise
            text = f"their steps cannot be done as one ({type(error).__name__}: {error})"
            raise StackingError(text.splitlines()[0]) from error
        began_s = time.monotonic()
        self._launch(num_steps, _paired(plans))
        if self._reader is not None and num_steps < max_steps:
            with torch.cuda.stream(self._reader):  # to wait there for a copy is not to wait for the steps
                for row in rows:
                    self.members[row].read_ahead(num_steps)
        told = self._told[:num_steps].cpu()
        products = self._pairs.found[:num_steps].cpu() if any(plan.pairs for plan in plans.values()) else None
        self._step_s = (time.monotonic() - began_s) / num_steps
        mode = StepMode.EAGER if self._recorder is None else StepMode.GRAPH
        results: list[list[StepResult]] = [[] for _ in self.members]
        for row, plan in plans.items():
            losses, norms, halted = told[:, :, row].unbind(1)
            outcomes = Outcomes(
                losses=losses.tolist(),
                norms=norms.tolist(),
                num_done=num_steps - int(halted.sum()),
                products=[] if products is None else products[:, row].tolist(),
            )
            results[row] = self.members[row].settle(plan, outcomes, mode, data_s / len(plans))
        return results

    def _check_alike(self) -> None:
        """Buffers and frozen parameters are those of the first member for all; updates are counted once a row."""
        first = self.members[0].stepper.model
        held = dict(first.named_buffers()) | {n: p for n, p in first.named_parameters() if not p.requires_grad}
        for row, member in enumerate(self.members):
            model = member.stepper.model
            own = dict(model.named_buffers()) | {n: p for n, p in model.named_parameters() if not p.requires_grad}
            differing = [name for name in held if not torch.equal(held[name], own[name])]
            if differing:
                raise StackingError(f"buffer or frozen parameter {differing[0]!r} differs between them", row)
            if uneven_steps(member.stepper.optimizers.one):
                raise StackingError("its parameters were not updated equally often", row)

    def _compare(self, first_new: int) -> None:
        """Loss and gradient of every newcomer against those of the trial alone, on its next samples."""
        size = self.members[0].stepper.settings.micro_batch
        looked = [member.look_at(size, self._device) for member in self.members]
        try:
            batch = self._stack([tuple(each) for each in looked])
            before = self._forward.versions()
            losses, grads = self._forward.pass_over(self._values, batch, self._draws, is_dry=True)
        except Exception as error:  # whatever the user's code does that vmap does not know
            text = f"{type(error).__name__}: {error}".splitlines()[0]
            raise StackingError(f"their forward pass cannot be stacked ({text})") from error
        if self._forward.is_compiled:
            self._compare_compiled(batch, losses)
        if self._forward.versions() != before:
            raise StackingError("their forward pass changes buffers, such as running means")
        tolerance = _TOLERANCE[self._tier]
        for row in range(first_new, len(self.members)):
            stepper = self.members[row].stepper
            params, numbers = dict(stepper.model.named_parameters()), numbers_now(stepper)
            with without_gradients_of(stepper.model):
                loss = self._forward.alone(stepper.job, stepper.model, tuple(looked[row]))
                alone = torch.autograd.grad(loss, [params[name] for name in self._values], allow_unused=True)
            if numbers_now(stepper) != numbers:
                raise StackingError("its loss changes attributes of the training or of a layer", row)
            if any(grad is None for grad in alone):
                raise StackingError("not all of its parameters have a gradient", row)
            loss = loss.detach()
            pairs = zip(alone, self._stacked.columns, strict=True)
            apart = sum((a - column.of(grads)[row]).float().square().sum() for a, column in pairs)
            norm = sum(a.float().square().sum() for a in alone)
            is_same = torch.isfinite(losses[row]) & (abs(losses[row] - loss) <= tolerance * abs(loss) + 1e-6)
            if not bool(is_same & (apart <= (tolerance**2) * norm + 1e-12)):
                text = f"loss {float(loss):.6g} alone and {float(losses[row]):.6g} in the bundle, on the same samples"
                raise StackingError(
                    f"its loss or gradient differs from what the others' training computes: {text}", row
                )
        self._weight = self._pairs.weight = self._weight_of(size)

    def _compare_compiled(self, batch: Batch, losses: Tensor) -> None:
        """The loss by compiled kernels against that without."""
        try:
            found, _ = self._forward.pass_over(self._values, batch, self._draws)
        except Exception as error:  # whatever the compiler says
            raise StackingError(f"{NOT_COMPILED} ({type(error).__name__}: {error})".splitlines()[0]) from error
        if bool(((found - losses).abs() > _TOLERANCE[self._tier] / 50 * losses.abs() + 1e-6).any()):
            raise StackingError(f"{NOT_COMPILED}: losses differ from those of uncompiled steps")

    def _weight_of(self, micro_batch: int) -> float:
        """What the loss sums of micro-batches are multiplied by, so that they add up to the mean of the step."""
        if self._forward.is_mean:
            return 1.0 / self._num_parts
        known = self.members[0].stepper.job.num_elements(micro_batch * self._num_parts)
        return 1.0 / (known or max(1, self._forward.num_elements * self._num_parts))

    def _num_steps(self, max_steps: int, target_s: float) -> int:
        wanted = 1 if self._step_s is None else max(1, round(target_s / max(self._step_s, 1e-7)))
        most = self._max_bytes // self._step_bytes if self._step_bytes else _FIRST_STEPS
        return max(1, min(wanted, max_steps, most, MAX_STEPS))

    def _stack(self, batches: Sequence[Batch]) -> Batch:
        """(K, B, ...) of one micro-batch of each member; further rows take the first member's."""
        rows = [*batches, *[batches[0]] * (self._num_rows - len(batches))]
        return tuple(torch.stack(parts) for parts in zip(*rows, strict=True))

    def _bring(self, plans: Mapping[int, Ahead]) -> float:
        """Samples and numbers of the steps to the device, for other rows those of the first; seconds of reading."""
        data_s, read = 0.0, {}
        for row, plan in plans.items():
            read[row], seconds = self.members[row].batches(plan)
            data_s += seconds
        first = next(iter(plans))
        sources = [row if row in plans else first for row in range(self._num_rows)]
        numbers = torch.stack([plans[row].numbers for row in sources], dim=-1)
        self._make_room(read[first], numbers)
        assert self._numbers is not None
        self._numbers[: len(numbers)].copy_(numbers)
        if self._reader is not None:
            torch.cuda.current_stream().wait_stream(self._reader)
            for part in (part for batches in read.values() for part in batches):
                part.record_stream(torch.cuda.current_stream())
        for row, source in enumerate(sources):
            for held, part in zip(self._batches, read[source], strict=True):
                held[: len(part), row].copy_(part)
        self._pairs.bring({row: plan.pairs for row, plan in plans.items()}, self._num_rows)
        self._halted.copy_(torch.tensor([row not in plans for row in range(self._num_rows)]))
        self._place.zero_()
        self._part.zero_()
        return data_s

    def _make_room(self, batches: Batch, numbers: Tensor) -> None:
        """Tensors that stay where they are, for as many steps as fit; larger ones where these do not."""
        is_room = self._numbers is not None and all(
            held.shape[2:] == part.shape[1:] and held.dtype == part.dtype and len(held) >= len(part)
            for held, part in zip(self._batches, batches, strict=True)
        )
        if is_room:
            return
        self._step_bytes = self._num_rows * self._num_parts * sum(part[0].nbytes for part in batches)
        room = max(len(numbers), min(MAX_STEPS, self._max_bytes // max(1, self._step_bytes))) * self._num_parts
        self._batches = tuple(
            torch.zeros(room, self._num_rows, *part.shape[1:], dtype=part.dtype, device=self._device)
            for part in batches
        )
        self._numbers = torch.zeros(MAX_STEPS, *numbers.shape[1:], device=self._device)
        self._replays.clear()

    def _record(self, paired: Mapping[int, set[PairPart]]) -> None:
        """Record what the steps to come are made of, as far as it was not; nothing changes meanwhile."""
        if self._recorder is None:
            return
        if not self._replays:
            held = self._halted.clone()
            self._halted.fill_(True)
            for is_last in (False, True):
                self._recorder.rehearse(self._whole, may_wait=not is_last)
                self._place.zero_()
                self._part.zero_()
            self._halted.copy_(held)
        works = self._works()
        names = {"whole"} if self._num_parts == 1 else {"first", "further", "finish"}
        if paired:
            names |= {"first", "finish", *(part.value for parts in paired.values() for part in parts)}
        for name in sorted(names - self._replays.keys()):
            self._replays[name] = self._recorder.record(works[name])

    def _launch(self, num_steps: int, paired: Mapping[int, set[PairPart]]) -> None:
        """Execute the steps; the host waits for none of them."""
        works = self._replays if self._recorder is not None else self._works()
        for step in range(num_steps):
            if self._num_parts == 1 and step not in paired:
                works["whole"]()
                continue
            works["first"]()
            for _ in range(self._num_parts - 1):
                works["further"]()
            for each in (PairPart.COMPARE, PairPart.HOLD):  # what one member keeps, another may compare before
                if each in paired.get(step, ()):
                    works[each.value]()
            works["finish"]()

    def _works(self) -> dict[str, Callable[[], None]]:
        pairs = {part.value: work for part, work in self._pairs.works(self._place).items()}
        return {"first": self._first, "further": self._further, "finish": self._finish, "whole": self._whole, **pairs}

    def _whole(self) -> None:
        self._first()
        self._finish()

    def _first(self) -> None:
        losses, grads = self._pass_over()
        self._grads.copy_(grads)
        self._loss.copy_(losses)

    def _further(self) -> None:
        losses, grads = self._pass_over()
        self._grads.add_(grads)
        self._loss.add_(losses)

    def _pass_over(self) -> tuple[Tensor, Tensor]:
        batch = tuple(part.index_select(0, self._part)[0] for part in self._batches)
        self._draws.begin(self._part - self._place * self._num_parts)
        self._part.add_(1)
        return self._forward.pass_over(self._values, batch, self._draws)

    def _finish(self) -> None:
        """Norms, clipping, update; a row whose loss or gradient is not finite is left as it is from here on."""
        assert self._numbers is not None
        if self._weight != 1.0:
            self._loss.mul_(self._weight)
        norms = self._update.norms(self._grads, self._weight)
        self._halted.logical_or_(~(norms + self._loss).isfinite())
        alive = (~self._halted).float()
        told = torch.stack([self._loss, norms, self._halted.float()])
        self._told.index_copy_(0, self._place, told[None])
        numbers = self._numbers.index_select(0, self._place)[0]
        self._update.apply(self._grads, self._weight, norms, alive, numbers)
        self._place.add_(1)


def _paired(plans: Mapping[int, Ahead]) -> dict[int, set[PairPart]]:
    """What some member does for its noise scale, by step."""
    found: dict[int, set[PairPart]] = {}
    for plan in plans.values():
        for step, part in plan.pairs.items():
            found.setdefault(step, set()).add(part)
    return found
