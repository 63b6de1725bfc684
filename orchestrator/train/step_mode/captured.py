"""One trial's optimizer step as graphs: recorded once per shape, replayed without the host.

Three recordings per key: the first micro-batch of a step (its gradients overwrite), a further one (its gradients add
up), and the end (norm, clipping, update); and two more for the few steps in which the gradient noise is measured, done
between the two halves, where gradients are complete and not clipped. Losses stay on the device and come back some steps
later. A gradient that is not finite stops the device by itself: that step
and all behind it change nothing until `clear`, so the host may be late and nothing is lost.
Knows no cursor, telemetry or plan; called by the stepper, on one rank.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from orchestrator.jobs.job import Forward
from orchestrator.train.batch.meter import PairPart
from orchestrator.train.batch.noise import RecordedPair
from orchestrator.train.step_mode.readout import Readout, Staging
from orchestrator.train.step_mode.recorder import Recorder

MAX_RECORDINGS = 8
"""Keys (micro-batch, tier, lane ...) whose recordings are kept; each holds a copy of the gradients."""

MAX_FLYING = 2
"""Steps the host may be ahead of the device: enough to hide its own work, few enough to be at a boundary soon."""

Batch = tuple[Tensor, ...]
Clip = Callable[[], Tensor]
"""Clips the model's gradients and returns their norm before, on the device."""

Replay = Callable[[], None]


@dataclass(slots=True)
class _Recording:
    """What was recorded for one key, with the memory it reads and writes."""

    batch: Batch
    staging: Staging
    first: Replay
    finish: Replay
    num_elements: int
    grads: list[tuple[nn.Parameter, Tensor | None]]
    pair: dict[PairPart, Replay]
    following: Replay | None = None


@dataclass(frozen=True, slots=True)
class Values:
    """What a step leaves: its sum of losses, its gradient norm, whether the device stopped, and the two products of a
    pair of steps, which mean something only where they were asked for.
    """

    loss_sum: float
    grad_norm: float
    is_halted: bool
    products: tuple[float, float]


class CapturedStep:
    """The step of one model and optimizer, recorded.

    Args:
        job, model, optimizer: of the trial; every parameter with a gradient has optimizer state already.
        device: where they are.
        clip: clips the gradients.
        recorder: records.
    """

    def __init__(
        self,
        job: Forward,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        device: torch.device,
        clip: Clip,
        recorder: Recorder,
    ) -> None:
        self._job, self._model, self._optimizer = job, model, optimizer
        self._device, self._clip, self._recorder = device, clip, recorder
        self._recordings: dict[tuple[int, object, object], _Recording] = {}
        self._scale = torch.zeros((), device=device)
        self._scale_held = 0.0
        # What a graph writes must live as long as the graph, which knows addresses only; hence members, no locals. What
        # a step leaves is written where it is read from: every kernel that only moves a number costs as long as others.
        self._values = torch.zeros(5, device=device)
        self._loss, self._norm, self._halted = self._values[0], self._values[1], self._values[2]
        self._products = self._values[3:]
        self._pair = RecordedPair(list(model.parameters()), optimizer)
        self._readout = Readout(5, MAX_FLYING + 1, device)

    @property
    def memory_bytes(self) -> int:
        """Device memory of all recordings."""
        return self._recorder.memory_bytes

    @property
    def num_recordings(self) -> int:
        """Keys recorded and kept."""
        return len(self._recordings)

    @property
    def num_flying(self) -> int:
        """Steps launched whose values have not been read."""
        return len(self._readout)

    def prepare(
        self,
        key: object,
        batch: Batch,
        num_parts: int,
        compiling: contextlib.AbstractContextManager[object] | None = None,
    ) -> None:
        """Record what `launch` needs for that key, unless it was; the state of the trial does not change.

        Args:
            key: the dials and the mode that change what is executed.
            batch: a batch as `launch` will bring, on the host.
            num_parts: micro-batches per step.
            compiling: surrounds what is done the first time if that compiles, and so waits for the device; else None.

        Raises:
            Exception: whatever the device or the model says against it; nothing is kept.
        """
        full = (self._recorder.place, key, tuple((part.shape, part.dtype) for part in batch))
        recording = self._recordings.pop(full, None)
        if recording is None:
            with _kept_buffers(self._model):
                recording = self._record(batch, compiling)
        if num_parts > 1 and recording.following is None:
            self._bind(recording)
            recording.following = self._recorder.record(partial(self._following, recording.batch))
            self._model.zero_grad()  # an eager step would add to the gradients that the graphs write
        self._recordings[full] = recording  # the newest last
        while len(self._recordings) > MAX_RECORDINGS:
            del self._recordings[next(iter(self._recordings))]

    def launch(self, batches: Sequence[Batch], scale: float, pair_part: PairPart | None = None) -> int:
        """Start one step with the newest recording; returns the loss elements in it.

        Args:
            batches: its micro-batches, on the host, of the shape that was prepared.
            scale: what the sum of losses is multiplied with.
            pair_part: what the step does for the noise scale.
        """
        recording = next(reversed(self._recordings.values()))
        if scale != self._scale_held:
            self._scale.fill_(scale)
            self._scale_held = scale
        for number, batch in enumerate(batches):
            recording.staging.bring(batch, recording.batch)
            if number == 0:
                recording.first()
            else:
                assert recording.following is not None
                recording.following()
        if pair_part is not None:
            recording.pair[pair_part]()
        recording.finish()
        self._readout.push(self._values)
        return recording.num_elements * len(batches)

    def read(self) -> Values:
        """What the oldest step leaves; waits for it."""
        loss_sum, norm, halted, *products = self._readout.pop()
        return Values(loss_sum, norm, bool(halted), (products[0], products[1]))

    def clear(self) -> None:
        """Let the device go on after a gradient that was not finite; what was launched since did nothing."""
        while len(self._readout):
            self._readout.pop()
        self._halted.zero_()

    def drop(self, key: object) -> None:
        """Let go of what was recorded for that key, on any stream and of any shape; no step may be on its way."""
        for known in [known for known in self._recordings if known[1] == key]:
            del self._recordings[known]

    def forget(self) -> None:
        """Drop all recordings, and the gradients in them."""
        self._recordings.clear()
        self._pair.drop()
        self._model.zero_grad()

    def _record(self, batch: Batch, compiling: contextlib.AbstractContextManager[object] | None) -> _Recording:
        static = tuple(torch.empty_like(part, device=self._device).copy_(part) for part in batch)
        counted: list[int] = []
        if compiling is not None:
            with compiling:
                self._recorder.rehearse(lambda: counted.append(self._micro(static, is_first=True)), may_wait=True)
        self._recorder.rehearse(lambda: counted.append(self._micro(static, is_first=True)))
        self._model.zero_grad()
        first = self._recorder.record(lambda: counted.append(self._micro(static, is_first=True)))
        grads = [(param, param.grad) for param in self._model.parameters()]
        finish = self._recorder.record(self._finish)
        # With the step, not when it is first asked for: a later step of known dials must not wait for a recording.
        self._pair.make_room()
        pair = {
            PairPart.HOLD: self._recorder.record(self._pair.hold),
            PairPart.COMPARE: self._recorder.record(partial(self._pair.compare, self._products)),
        }
        self._model.zero_grad()
        return _Recording(
            batch=static,
            staging=Staging(batch, MAX_FLYING + 1, self._device),
            first=first,
            finish=finish,
            num_elements=counted[0],
            grads=grads,
            pair=pair,
        )

    def _micro(self, batch: Batch, *, is_first: bool) -> int:
        """Forward and backward of one micro-batch; returns its loss elements."""
        if is_first:
            self._model.zero_grad()  # so that the backward pass writes gradients instead of adding to them
        terms = self._job.loss(self._model, batch)
        (terms.loss_sum * self._scale).backward()  # type: ignore[no-untyped-call]
        loss_sum = terms.loss_sum.detach()
        if is_first:
            self._loss.copy_(loss_sum)
        else:
            self._loss.add_(loss_sum)
        return terms.num_elements

    def _following(self, batch: Batch) -> None:
        self._micro(batch, is_first=False)

    def _finish(self) -> None:
        """Norm, clipping, update; nothing is updated where the norm is not finite, now or since `clear`."""
        norm = self._clip()
        self._norm.copy_(norm)
        self._halted.logical_or_(norm - norm)  # zero, and NaN of what is not finite, which counts as true
        with _skips_where(self._optimizer, self._halted, is_captured=self._device.type == "cuda"):
            self._optimizer.step()

    def _bind(self, recording: _Recording) -> None:
        """Make the recording's gradients those of the model, for whoever reads them."""
        for param, grad in recording.grads:
            param.grad = grad


@contextlib.contextmanager
def _kept_buffers(model: nn.Module) -> Iterator[None]:
    """Put buffers back afterwards, such as the running means of batch norms, which a rehearsal moves."""
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    yield
    for buffer, value in before:
        buffer.copy_(value)


@contextlib.contextmanager
def _skips_where(optimizer: torch.optim.Optimizer, found: Tensor, *, is_captured: bool) -> Iterator[None]:
    """Let a fused optimizer read on the device whether to update, and allow it to be captured."""
    optimizer.found_inf = found  # type: ignore[attr-defined]
    for group in optimizer.param_groups:
        group["capturable"] = is_captured
    try:
        yield
    finally:
        del optimizer.found_inf  # type: ignore[attr-defined]
        for group in optimizer.param_groups:
            group["capturable"] = False
