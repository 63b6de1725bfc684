"""One agent per GPU node: sees to MPS, looks at the GPUs once or twice a second, and leaves nothing behind.

A plain class; `devices.ray_agents` makes it an actor pinned to its node. What it starts (MPS) ends with its process,
however that ends: a guardian outside of it sees to that. Readings that hang are given up after a second, so no method
takes longer. It never changes a setting of a card.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from orchestrator.devices.choice import Choice, GpuFacts, GpuShare, choose, gpu_facts
from orchestrator.errors import ShareError
from orchestrator.share.mps import MpsFound, OwnMps
from orchestrator.telemetry.sampler import Samplers, open_gpu_samplers

logger = logging.getLogger(__name__)

SAMPLE_PERIOD_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeReady:
    """What an agent found and did on its node.

    Attributes:
        share: the mechanism for its GPUs.
        words: the same for people, with what a better one lacks.
        environment: what every rank there must have before it touches CUDA.
        is_under_mps: whether ranks run side by side.
    """

    share: GpuShare
    words: str
    environment: dict[str, str]
    is_under_mps: bool


class _Mps(Protocol):
    """What the agent needs of an own MPS."""

    def start(self) -> MpsFound: ...
    def stop(self) -> None: ...


class DeviceAgent:
    """Looks after the GPUs of the node it runs on.

    Args:
        wish: how GPUs shall be shared.
        turns_shares: whether shares differ or change in the run.
        token: a few characters that no other run has; names the directory of an own MPS.
        own_mps: makes the daemon, for tests.
        ask: asks the node, for tests.
        open_gpus: opens samplers, for tests.
    """

    def __init__(
        self,
        wish: str,
        *,
        turns_shares: bool,
        token: str,
        own_mps: Callable[[Path], _Mps] = OwnMps,
        ask: Callable[[], GpuFacts] = gpu_facts,
        open_gpus: Callable[[], Samplers] = open_gpu_samplers,
    ) -> None:
        self._wish, self._turns_shares = GpuShare(wish), turns_shares
        self._directory = Path("/tmp") / f"mps-{token}"
        self._make_mps, self._ask = own_mps, ask
        self._open_gpus = open_gpus
        self._mps: _Mps | None = None
        self._ready: NodeReady | None = None
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def prepare(self) -> NodeReady:
        """Choose the mechanism and start what it needs; the same answer when asked again."""
        if self._ready is not None:
            return self._ready
        facts = self._ask()
        choice = choose(self._wish, facts, turns_shares=self._turns_shares)
        found: MpsFound | None = None
        if choice.share is not GpuShare.TIME_SLICE:
            found, choice = self._serve(facts, choice)
        words = choice.words
        if found is not None and found.limits:
            words += f"; the MPS that runs here limits each process to {found.limits}"
        environment = {} if found is None else found.environment
        self._ready = NodeReady(
            share=choice.share, words=words, environment=environment, is_under_mps=found is not None
        )
        logger.info("devices.ready %s", words)
        return self._ready

    def watch(self, tell: Callable[[list[dict[str, Any]]], object]) -> list[str]:
        """Begin to sample the node's GPUs and tell what was seen; returns what cannot be read."""
        samplers = self._open_gpus()
        problems = [str(problem) for problem in samplers.problems]
        if self._thread is None and samplers.available:
            self._thread = threading.Thread(target=self._watch, args=(samplers, tell), daemon=True, name="gpu-watch")
            self._thread.start()
        return problems

    def stop(self) -> None:
        """Stop sampling and let MPS end; harmless when called again."""
        self._stopping.set()
        if self._mps is not None:
            self._mps.stop()
            self._mps = None

    def _serve(self, facts: GpuFacts, choice: Choice) -> tuple[MpsFound | None, Choice]:
        """A daemon that runs already or one of our own; where that fails, processes take turns."""
        if facts.running_mps is not None:
            return facts.running_mps, choice
        mps = self._make_mps(self._directory)
        try:
            found = mps.start()
        except ShareError as error:
            missing = {GpuShare.SM_GROUPS: str(error), GpuShare.MPS: str(error)}
            return None, Choice(share=GpuShare.TIME_SLICE, missing=missing)
        self._mps = mps
        return found, choice

    def _watch(self, samplers: Samplers, tell: Callable[[list[dict[str, Any]]], object]) -> None:
        try:
            while not self._stopping.wait(SAMPLE_PERIOD_S):
                tell([asdict(sample) for sample in samplers.sample()])
        except Exception:  # a thread that dies silently would look like a GPU that says nothing
            logger.exception("GPUs are no longer watched")
        finally:
            samplers.close()
