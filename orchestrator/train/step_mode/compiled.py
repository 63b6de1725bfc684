"""Whether the steps of a trial are worth compiling, and their loss as kernels that torch.compile makes.

A replayed step of a small model is bound by its many small kernels, also beside others on the same GPU; compiled,
norms, activations, casts and losses become a few. That costs seconds, in which the trial's neighbours have the GPU to
themselves; a first compilation on a node costs more than later ones, because torch keeps its result on disk. So one
trial of a kind compiles, the others go on replaying and follow when it is done; and none does whose remaining steps
would not win the time back, or whose first report it would put off for long. A slot serves trials in turn, and
one of a kind it knows compiles nothing. Called by the stepper, between two steps.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from types import FunctionType
from typing import IO, Any

import torch
from torch import Tensor, nn

from orchestrator.control.orders import TrialOrder
from orchestrator.jobs.job import LossTerms, NamedForward
from orchestrator.names import write_atomically
from orchestrator.policies.tier import Tier
from orchestrator.train.isolation import restore_environment

logger = logging.getLogger(__name__)

EXPECTED_SAVING = 0.25
"""Part of a replayed step that compiling saves, until it was measured: of four 7 M language models side by side on an
H200 a step took 3.65 ms replayed and 2.83 to 2.90 compiled."""

FIRST_S = 15.0
"""What a first compilation takes, until it was measured: 15 s of a 7 M language model beside three that train."""

AGAIN_PART = 0.2
"""Part of that which a compilation takes of what another process has compiled, until it was measured: 3 s where the
first took 16 (7 M) and 28 (34 M)."""

OWN_S = 0.5
"""What it takes a process that has compiled for a trial of the kind before, until it was measured: torch finds it
done, and the step is recorded anew."""

REPORT_PART = 0.25
"""Part of the time to a trial's first report by which compiling may put it off. Otherwise it is done behind that
report: there most searches compare the trial with those that began with it, and stop some of them. Where none does, a
quarter of what one report takes is lost."""

STEADY_PART = 0.2
"""Part of what compiling takes for which dials must have stayed: a tier or batch may be left again at once."""

_LOOK_AGAIN_S = 0.2
_MAX_FUNCTIONS = 16
_MAX_PROCESSES = 8
"""In which torch compiles kernels. In one, beside three others that trained, it held a 7 M language model up so long
that its first thousand steps took 31 s; a thousand take 3."""

_BATCH_BOUND = "triton.mix_order_reduction"
"""An option of torch.compile that, where it is on, has kernels depend on whether a tensor has 5 Mi elements: those of a
34 M language model, compiled for any batch, held up to 31 samples only."""

CACHE = "TORCHINDUCTOR_CACHE_DIR"
"""torch's own variable: where it keeps what it compiled."""

Dials = tuple[int, Tier]
"""Micro-batch and tier."""

_own_s: dict[str, float] = {}
"""What the next trial of each kind is expected to take, of kinds that this process has compiled for."""

_num_processes: dict[str, int] = {}
"""In how many each kind is compiled, from its first time in this process on: torch compiles anew for another number."""

_savings: dict[tuple[str, int], float] = {}
"""Part of a step that each kind has saved by it at a micro-batch, where this process has measured that."""

_refused: set[str] = set()
"""Kinds that could not be compiled."""


def _loss(job: NamedForward, model: nn.Module, batch: tuple[Tensor, ...]) -> tuple[Tensor, int]:
    terms = job.loss(model, batch)
    return terms.loss_sum, terms.num_elements


@lru_cache(maxsize=_MAX_FUNCTIONS)
def _function(
    kind: str, num_processes: int, is_for_any_batch: bool
) -> Callable[[NamedForward, nn.Module, tuple[Tensor, ...]], tuple[Tensor, int]]:
    """The compiled loss of one kind of trial, which must be traceable as a whole.

    torch keeps what it compiled per code object, and gives up on one with too many variants: each kind has its own.
    """
    code = _loss.__code__.replace(co_name=f"loss_{kind}")
    options: dict[str, Any] = {"compile_threads": num_processes}
    if is_for_any_batch and _BATCH_BOUND in torch._inductor.list_options():
        options[_BATCH_BOUND] = False
    compiled: Any = torch.compile(FunctionType(code, globals()), fullgraph=True, options=options)
    return compiled  # type: ignore[no-any-return]


@dataclass(frozen=True, slots=True)
class Ahead:
    """What a trial has ahead of it when it begins.

    Attributes:
        samples_per_report: samples between two of its reports.
        max_reports: reports it makes if nobody stops it.
        num_trials: trials of its kind that its process is expected to serve, this one included.
        turns_batch: whether its micro-batch may change. Then it is compiled for any, so that it need not be done anew.
    """

    samples_per_report: int
    max_reports: int
    num_trials: float = 1.0
    turns_batch: bool = False


def ahead_of(order: TrialOrder, num_trials: float) -> Ahead:
    """What a trial of that order has ahead of it."""
    limits = order.limits
    return Ahead(
        samples_per_report=order.samples_per_report,
        max_reports=order.max_reports,
        num_trials=num_trials,
        turns_batch=limits.min_global_batch < limits.max_global_batch,
    )


class Compilation:
    """Decides when the steps of one trial are compiled, and measures what that takes.

    Args:
        job, model: of the trial.
        ahead: what it would be done for.
        clock: seconds.
    """

    def __init__(
        self, job: NamedForward, model: nn.Module, ahead: Ahead, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._job, self._model, self._ahead, self._clock = job, model, ahead, clock
        self._look_s = 0.0
        self._dials: Dials | None = None
        self._since_s = 0.0
        self._turn: tuple[str, IO[str]] | None = None

    def loss(self, model: nn.Module, batch: tuple[Tensor, ...]) -> LossTerms:
        """The loss of the job, compiled; the first call for a model's shapes compiles.

        Raises:
            Exception: whatever torch says against it.
        """
        kind = self._kind(model)
        if self._ahead.turns_batch:
            for part in batch:
                _with_any_length(part)
        num_processes = _num_processes.setdefault(kind, 1)
        loss_sum, num_elements = _function(kind, num_processes, self._ahead.turns_batch)(self._job, model, batch)
        return LossTerms(loss_sum=loss_sum, num_elements=num_elements)

    def is_due(self, dials: Dials, sample_s: float, position: int) -> bool:
        """Whether to compile now.

        Args:
            dials: micro-batch and tier, which change the kernels of a forward and backward pass.
            sample_s: seconds per sample, replayed as it is.
            position: samples that the trial has seen.
        """
        now_s = self._clock()
        if dials != self._dials:
            self._dials, self._since_s, self._look_s = dials, now_s, now_s
        if now_s < self._look_s:
            return False
        self._look_s = now_s + _LOOK_AGAIN_S
        name = self._name(dials)
        cost_s, ahead = self._cost_s(name), self._ahead
        is_compared = position < ahead.samples_per_report and ahead.max_reports > 1
        if is_compared and cost_s > REPORT_PART * ahead.samples_per_report * sample_s:
            return False
        left_s = ahead.num_trials * (ahead.samples_per_report * ahead.max_reports - position) * sample_s
        is_worth = name not in _refused and left_s * _savings.get((name, dials[0]), EXPECTED_SAVING) > cost_s
        return is_worth and now_s - self._since_s >= STEADY_PART * cost_s and self._is_my_turn(name)

    @contextlib.contextmanager
    def measured(self, dials: Dials) -> Iterator[None]:
        """Compile within; others of this node that are about to do the same see it, and what it took."""
        name, began_s = self._name(dials), self._clock()
        known, is_own = self._known(name), name in _own_s
        if not known and not is_own:
            # Starting them takes as long as reading what others have compiled.
            num_processes = min(_MAX_PROCESSES, len(os.sched_getaffinity(0)))
            _num_processes.setdefault(self._kind(self._model), num_processes)
        _refused.add(name)  # if this raises, later trials of this process need not try again
        try:
            with _as_it_was():
                yield
            _refused.discard(name)
            seconds = self._clock() - began_s
            _own_s[name] = seconds if is_own else OWN_S
            if not is_own:
                self._tell(name, is_first=not known, seconds=seconds)
        finally:
            self.end_turn()  # behind the note: whoever gets the next one finds it
            _stop_compilers()

    def _tell(self, name: str, *, is_first: bool, seconds: float) -> None:
        """Note for the other processes of this node what it took."""
        known = self._known(name)
        known["first_s" if is_first and "first_s" not in known else "again_s"] = seconds
        with contextlib.suppress(OSError):  # then others take it for the first time; the disk may be full
            write_atomically(self._path(name, "json"), json.dumps(known))

    def saves(self, dials: Dials, part: float) -> None:
        """What was measured: by which part steps with these dials are shorter, compiled."""
        _savings[self._name(dials), dials[0]] = part

    def _cost_s(self, name: str) -> float:
        """What compiling would take this process."""
        if name in _own_s:
            return _own_s[name]
        known = self._known(name)
        return known.get("again_s", AGAIN_PART * known.get("first_s", 0.0)) if known else FIRST_S

    def _known(self, name: str) -> dict[str, float]:
        """What processes of this node have noted."""
        try:
            found = json.loads(self._path(name, "json").read_text())
        except (OSError, ValueError):
            return {}
        pairs = found.items() if isinstance(found, dict) else ()
        return {key: float(value) for key, value in pairs if isinstance(value, int | float)}

    def _is_my_turn(self, name: str) -> bool:
        """Whether nobody else of this node is doing it for the first time; then this process is, and others wait."""
        if self._turn is not None and self._turn[0] != name:
            self.end_turn()
        if self._turn is not None or name in _own_s or self._known(name):
            return True
        try:
            self._turn = name, self._path(name, "lock").open("a")
            fcntl.flock(self._turn[1], fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel lets go when the process dies
        except BlockingIOError:
            self.end_turn()
            return False
        except OSError as error:  # then each does it for itself
            logger.info("compiling without telling others: %s", error)
        if self._known(name):  # somebody has ended just before; at the next look it is known what it costs
            self.end_turn()
            return False
        return True

    def end_turn(self) -> None:
        """Let others compile; call it where `is_due` said yes and nothing was compiled after all."""
        if self._turn is not None:
            self._turn[1].close()
            self._turn = None

    def _path(self, name: str, kind: str) -> Path:
        """Beside what torch keeps: both go together."""
        directory = Path(os.environ.get(CACHE, tempfile.gettempdir())) / f"compiled-{os.getuid()}"
        with contextlib.suppress(OSError):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        return directory / f"{name}.{kind}"

    def _name(self, dials: Dials) -> str:
        """Of what is compiled at once. torch compiles anew for a micro-batch of one sample, whatever it was told."""
        micro_batch, tier = dials
        what = (micro_batch == 1, tier) if self._ahead.turns_batch else dials
        return f"{self._kind(self._model)}-{_digest(str(what))}"

    def _kind(self, model: nn.Module) -> str:
        return _kind_of(self._job, model) + ("n" if self._ahead.turns_batch else "")


def _with_any_length(part: Tensor) -> None:
    """Have torch compile for any first dimension of a tensor, if the model lets it; otherwise it does so at the second.

    The public way, `torch.compile(dynamic=True)`, leaves no dimension fixed, which some models here are compiled twice
    for; this function is in torch's guide to dynamic shapes (2.11 to 2.13), and where it is missing nothing is lost but
    a second compilation.
    """
    mark = getattr(getattr(torch, "_dynamo", None), "maybe_mark_dynamic", None)
    if mark is not None and part.dim():
        mark(part, 0)


def set_up(directory: Path) -> None:
    """Let torch keep what it compiles there, where the user says nothing else, and start no compilers by itself."""
    given = Path(os.environ.get(CACHE, ""))
    # Importing torch's compiler sets the variable, to such a directory: that is no wish of the user's.
    is_torchs_own = given.parent == Path(tempfile.gettempdir()) and given.name.startswith("torchinductor_")
    if is_torchs_own or not given.name:
        os.environ[CACHE] = str(directory)
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")


def _stop_compilers() -> None:
    """End the processes and threads in which torch compiles: a trial leaves none behind, or its slot starts afresh.

    torch has no public way to do so. These names are those of torch 2.11 to 2.13; where one is missing the slot opens
    again after the trial.
    """
    module: Any = sys.modules.get("torch._inductor.async_compile")
    stop = getattr(module, "shutdown_compile_workers", None)
    if stop is not None:
        stop()
    threads = getattr(getattr(module, "AsyncCompile", None), "pool", None)
    if threads is not None and hasattr(threads, "cache_info") and threads.cache_info().currsize:
        threads().shutdown()
        threads.cache_clear()


@contextlib.contextmanager
def _as_it_was() -> Iterator[None]:
    """Put back what torch changes in the process when it compiles, and keep its hints to itself."""
    environment, path, limit = dict(os.environ), list(sys.path), sys.getrecursionlimit()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        sys.path[:] = path
        sys.setrecursionlimit(limit)
        restore_environment(environment)


def _kind_of(job: NamedForward, model: nn.Module) -> str:
    """What the kernels depend on: torch, the device, the job, every parameter's shape, and hooks."""
    params = list(model.named_parameters())
    device = params[0][1].device if params else torch.device("cpu")
    shapes = [(name, tuple(param.shape), str(param.dtype)) for name, param in params]
    # torch takes what it compiled for a model with the same layers also for one with other hooks. There is no public
    # way to list them; a module without these tables has none that could be told apart.
    hooks = [
        (name, getattr(hook, "__qualname__", type(hook).__qualname__))
        for name, module in model.named_modules()
        for table in ("_forward_pre_hooks", "_forward_hooks")
        for hook in getattr(module, table, {}).values()
    ]
    return _digest(f"{torch.__version__} {_name_of(device)} {job.name} {shapes} {hooks}")


@cache
def _name_of(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
