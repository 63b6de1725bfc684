"""Recording GPU work once and replaying it: CUDA graphs on the current stream, in one memory pool.

Knows no model. Called by `captured.CapturedStep`; a recorder for tests replays by calling the function again.
"""

from __future__ import annotations

import contextlib
import gc
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch


class Recorder(Protocol):
    """Something that can record work on a device and replay it."""

    @property
    def place(self) -> int:
        """What recorded work belongs to besides its shapes: it must be recorded again elsewhere (another stream)."""
        ...

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """Record `work`, which is not executed; returns what replays it on the current stream.

        Raises:
            Exception: whatever the device says against recording it.
        """
        ...

    def rehearse(self, work: Callable[[], None], *, may_wait: bool = False) -> None:
        """Execute `work` once as if it were recorded, so that what cannot be recorded fails here and harms nothing.

        Args:
            work: what will be recorded.
            may_wait: whether it may wait for the device this once.

        Raises:
            Exception: it waits for the device and may not.
        """
        ...

    @property
    def memory_bytes(self) -> int:
        """Device memory that all recordings hold."""
        ...


class CudaRecorder:
    """CUDA graphs of this process's device.

    All graphs share one pool: a step is over before the next begins, so what one needs in between the other may reuse.
    A pool dies with its last graph, and torch takes no capture into a dead one; then a new pool begins.
    """

    def __init__(self) -> None:
        self._pool: Any = torch.cuda.graph_pool_handle()
        self._graphs: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()
        self._side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._memory_bytes = 0

    @property
    def place(self) -> int:
        """The current stream; in a lane of SM groups, that lane."""
        return int(torch.cuda.current_stream().cuda_stream)

    @property
    def memory_bytes(self) -> int:
        """What the allocator reserved while recording; an upper bound of what the graphs hold."""
        return self._memory_bytes

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """Record on the current stream, or beside the default one, on which nothing can be recorded."""
        before_bytes = torch.cuda.memory_reserved()
        current = torch.cuda.current_stream()
        stream = self._side if current == torch.cuda.default_stream() else current
        stream.wait_stream(current)
        # Not `torch.cuda.graph`: it also empties the allocator's cache, which costs more than the capture.
        graph = torch.cuda.CUDAGraph()
        if not self._graphs:
            self._pool = torch.cuda.graph_pool_handle()
        torch.cuda.synchronize()
        with torch.cuda.stream(stream), _without_collection():
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                work()
            except BaseException:
                with contextlib.suppress(Exception):  # the first error says more than that the capture is void
                    graph.capture_end()
                self._repair(stream)
                raise
            graph.capture_end()
        current.wait_stream(stream)
        self._graphs.add(graph)
        self._memory_bytes += max(0, torch.cuda.memory_reserved() - before_bytes)
        replay: Callable[[], None] = graph.replay
        return replay

    def rehearse(self, work: Callable[[], None], *, may_wait: bool = False) -> None:
        """Also loads the kernels and workspaces that a capture must not load."""
        state = torch.cuda.get_rng_state()
        before = torch.cuda.get_sync_debug_mode()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # torch says that it does not find every wait
                torch.cuda.set_sync_debug_mode("default" if may_wait else "error")
            work()
        finally:
            torch.cuda.set_sync_debug_mode(before)
            torch.cuda.set_rng_state(state)

    def _repair(self, stream: torch.cuda.Stream) -> None:
        """A capture that failed leaves the generator believing that it goes on; one that succeeds ends that."""
        with contextlib.suppress(Exception), torch.cuda.stream(stream):
            graph = torch.cuda.CUDAGraph()
            graph.capture_begin(capture_error_mode="thread_local")
            torch.zeros((), device="cuda")
            graph.capture_end()


@contextlib.contextmanager
def _without_collection() -> Iterator[None]:
    """Keep Python from freeing device memory in the middle of a capture."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
