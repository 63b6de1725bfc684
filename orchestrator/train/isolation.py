"""What one trial may leave behind in a process that serves trials in turn, and how it is put right.

A `ProcessState` is captured when a slot opens. After a trial `leaks()` names what it changed, and `restore(seed)` puts
everything back that can be and seeds the generators for the next trial. What cannot be undone (a thread or a child
process still alive) stays in `leaks()`, so that the slot can decide to start afresh. Knows no trial, loop or Ray.
Not looked at: patched modules, global module hooks, CPU affinity (the share's dial), and torch's print options.
"""

from __future__ import annotations

import gc
import logging
import multiprocessing
import os
import random
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

_UNREADABLE = "unreadable"
_HARMLESS = ("tqdm_monitor", "Dummy-", "InductorSubproc", "subproc_worker_timer")
"""Beginnings of the names of threads that are no trial's: tqdm's, which watches progress bars for good; those that
Python did not start, such as autograd's, once they have called it; and torch.compile's, which end soon after it."""


@dataclass(frozen=True, slots=True)
class _Setting:
    """One process-wide setting: its name, how to read it and how to write it back."""

    name: str
    read: Callable[[], Any]
    write: Callable[[Any], object]


@dataclass(frozen=True, slots=True)
class ProcessState:
    """The state of this process at one moment.

    Attributes:
        settings: value of every setting, by name.
        environment: all environment variables.
        signals: handler of every signal that Python can handle.
        threads: identifiers of the threads alive.
        children: process ids of the children started through multiprocessing.
        groups: names of the process groups.
    """

    settings: dict[str, Any]
    environment: dict[str, str]
    signals: dict[int, Any]
    threads: frozenset[int]
    children: frozenset[int]
    groups: frozenset[str]

    @classmethod
    def capture(cls) -> Self:
        """The state now. Call it when the slot's own threads and process groups exist and no trial has run."""
        return cls(
            settings={setting.name: setting.read() for setting in _SETTINGS},
            environment=dict(os.environ),
            signals=_signal_handlers(),
            threads=frozenset(_threads()),
            children=frozenset(_children()),
            groups=frozenset(_process_groups()),
        )

    def regrouped(self) -> Self:
        """The same state, with the process groups that there are now."""
        return replace(self, groups=frozenset(_process_groups()))

    def leaks(self) -> tuple[str, ...]:
        """Names of all that differs from the captured state, e.g. `torch.default_dtype`, `os.environ[HOME]`."""
        changed = [setting.name for setting in _SETTINGS if setting.read() != self.settings[setting.name]]
        names = sorted(self.environment.keys() | os.environ.keys())
        changed += [f"os.environ[{name}]" for name in names if self.environment.get(name) != os.environ.get(name)]
        now = _signal_handlers()
        changed += [f"signal[{signal.Signals(n).name}]" for n in sorted(now) if now[n] != self.signals[n]]
        changed += [f"thread[{name}]" for ident, name in _threads().items() if ident not in self.threads]
        changed += [f"child[{name}]" for pid, name in _children().items() if pid not in self.children]
        changed += [f"process_group[{name}]" for name in sorted(self.groups ^ _process_groups().keys())]
        return tuple(changed)

    def restore(self, seed: int) -> tuple[str, ...]:
        """Put back what can be, collect garbage, and seed the generators of torch, numpy and Python with `seed`.

        Returns:
            What is still different: threads and children alive, a process group that is gone, and signal handlers
            where this is not the main thread. Empty when nothing is left of the trial.
        """
        for name, group in _process_groups().items():
            if name not in self.groups:
                dist.destroy_process_group(group)
        for setting in _SETTINGS:
            if setting.read() != self.settings[setting.name]:
                setting.write(self.settings[setting.name])
        restore_environment(self.environment)
        self._restore_signals()
        gc.collect()
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        seed_generators(seed)
        return self.leaks()

    def _restore_signals(self) -> None:
        # Python sets handlers in the main thread only; elsewhere a changed handler stays in `leaks()`.
        if threading.current_thread() is not threading.main_thread():
            return
        for number, now in _signal_handlers().items():
            before = self.signals[number]
            # None is a handler that was not set from Python, which Python cannot set again.
            if now != before and before is not None:
                signal.signal(number, before)


def seed_generators(seed: int) -> None:
    """Seed every global generator of this process (torch on all devices, numpy, Python) with `seed` >= 0."""
    if seed < 0:
        raise ValueError(f"seed={seed} cannot seed all generators; allowed: >= 0")
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def _signal_handlers() -> dict[int, Any]:
    """The handler of every signal, by number."""
    return {int(number): signal.getsignal(number) for number in signal.valid_signals()}


def restore_environment(environment: Mapping[str, str]) -> None:
    """Make the environment variables those, and no others."""
    for name in os.environ.keys() - environment.keys():
        del os.environ[name]
    for name, value in environment.items():
        if os.environ.get(name) != value:
            os.environ[name] = value


def _threads() -> dict[int, str]:
    """Names of the living Python threads by identifier, without the caller's."""
    own = threading.get_ident()
    return {
        t.ident: t.name
        for t in threading.enumerate()
        if t.ident not in {None, own} and not t.name.startswith(_HARMLESS)
    }


def _children() -> dict[int, str]:
    """Names of the living children started through multiprocessing, by process id."""
    return {child.pid: child.name for child in multiprocessing.active_children() if child.pid is not None}


def _process_groups() -> dict[str, Any]:
    """The process groups by name. torch has no public list of them, hence this one private attribute."""
    if not dist.is_initialized():
        return {}
    groups = getattr(getattr(distributed_c10d, "_world", None), "pg_names", {})
    # The default group goes last: destroying it first would take the others with it.
    items = [(name, group) for group, name in groups.items()]
    return dict(sorted(items, key=lambda item: item[1] is dist.group.WORLD))


def _umask() -> int:
    """The umask, which can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _cwd() -> str:
    """The working directory, or a word where it was deleted."""
    try:
        return str(Path.cwd())
    except FileNotFoundError:
        return _UNREADABLE


def _matmul_precision() -> str:
    """The legacy float32 precision, or a word where old and new settings contradict each other."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return _UNREADABLE


def _deterministic() -> tuple[bool, bool]:
    """Whether algorithms must be deterministic, and whether others only warn."""
    return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()


def _write_deterministic(value: tuple[bool, bool]) -> None:
    torch.use_deterministic_algorithms(value[0], warn_only=value[1])


def _write_warnings(filters: list[Any]) -> None:
    # `resetwarnings` also forgets which warnings were shown already; assigning alone would not.
    warnings.resetwarnings()
    warnings.filters[:] = filters  # type: ignore[index]


def _write_default_device(device: torch.device) -> None:
    # An explicit "cpu" would put a function mode on every torch call; None means cpu without one.
    torch.set_default_device(None if device == torch.device("cpu") else device)


def _write_root_level(level: int) -> None:
    logging.getLogger().setLevel(level)


def _write_root_handlers(handlers: list[logging.Handler]) -> None:
    logging.getLogger().handlers[:] = handlers


def _write_numpy_errors(value: dict[str, Any]) -> None:
    np.seterr(**value)


def _autocast_settings() -> Iterator[_Setting]:
    for device in ("cpu", "cuda"):
        yield _Setting(
            f"torch.autocast[{device}]",
            partial(torch.is_autocast_enabled, device),
            partial(torch.set_autocast_enabled, device),
        )
        yield _Setting(
            f"torch.autocast_dtype[{device}]",
            partial(torch.get_autocast_dtype, device),
            partial(torch.set_autocast_dtype, device),
        )
    yield _Setting("torch.autocast_cache", torch.is_autocast_cache_enabled, torch.set_autocast_cache_enabled)


def _flag_settings() -> Iterator[_Setting]:
    """Flags of torch's backends: plain attributes. The legacy precision is written before the finer ones."""
    cudnn, cuda, mkldnn = torch.backends.cudnn, torch.backends.cuda, torch.backends.mkldnn
    for path, owner, attribute in (
        ("cuda.matmul.fp32_precision", cuda.matmul, "fp32_precision"),
        ("cudnn.conv.fp32_precision", cudnn.conv, "fp32_precision"),  # type: ignore[attr-defined]
        ("cudnn.rnn.fp32_precision", cudnn.rnn, "fp32_precision"),
        ("mkldnn.matmul.fp32_precision", mkldnn.matmul, "fp32_precision"),  # type: ignore[attr-defined]
        ("cudnn.enabled", cudnn, "enabled"),
        ("cudnn.benchmark", cudnn, "benchmark"),
        ("cudnn.deterministic", cudnn, "deterministic"),
    ):
        yield _Setting(
            f"torch.backends.{path}",
            partial(getattr, owner, attribute),
            partial(setattr, owner, attribute),
        )


_SETTINGS: tuple[_Setting, ...] = (
    _Setting("torch.default_dtype", torch.get_default_dtype, torch.set_default_dtype),
    _Setting("torch.default_device", torch.get_default_device, _write_default_device),
    _Setting("torch.num_threads", torch.get_num_threads, torch.set_num_threads),
    _Setting("torch.grad_enabled", torch.is_grad_enabled, torch.set_grad_enabled),
    _Setting("torch.anomaly_enabled", torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly),
    _Setting("torch.deterministic", _deterministic, _write_deterministic),
    _Setting("torch.float32_matmul_precision", _matmul_precision, torch.set_float32_matmul_precision),
    *_flag_settings(),
    *_autocast_settings(),
    _Setting("numpy.errors", np.geterr, _write_numpy_errors),
    _Setting("os.cwd", _cwd, os.chdir),
    _Setting("os.umask", _umask, os.umask),
    _Setting("sys.path", lambda: list(sys.path), lambda value: sys.path.__setitem__(slice(None), value)),
    _Setting("sys.recursion_limit", sys.getrecursionlimit, sys.setrecursionlimit),
    _Setting("sys.stdout", lambda: sys.stdout, lambda value: setattr(sys, "stdout", value)),
    _Setting("sys.stderr", lambda: sys.stderr, lambda value: setattr(sys, "stderr", value)),
    _Setting("warnings.filters", lambda: list(warnings.filters), _write_warnings),
    _Setting("logging.root_level", lambda: logging.getLogger().level, _write_root_level),
    _Setting("logging.root_handlers", lambda: list(logging.getLogger().handlers), _write_root_handlers),
    _Setting("logging.disabled", lambda: logging.root.manager.disable, logging.disable),
    _Setting("gc.enabled", gc.isenabled, lambda value: gc.enable() if value else gc.disable()),
    _Setting("gc.threshold", gc.get_threshold, lambda value: gc.set_threshold(*value)),
)
