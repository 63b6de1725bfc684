"""Finds processes of a run that hang, says where they stand, and ends those that will not go on by themselves.

A thread of the driver. Ranks are those that the policy actor calls silent (`control.silence`): the worker group of one
that is ended is opened again by Ray Train, and its trial goes on from its last commit. The actor itself is silent when
it does not answer: Ray starts it again from its journal.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from orchestrator.control.silence import Silent
from orchestrator.hung import Process, end, examine, verdict
from orchestrator.room import has_room
from orchestrator.tune.admission import PIN_HEAD

logger = logging.getLogger(__name__)

PERIOD_S = 1.0
ANSWER_S = 5.0
STOPPED_S = 10.0
"""A policy actor whose process is stopped is replaced after so long without an answer."""
SILENT_S = 60.0
"""One whose process runs: it may be busy, and may wait for room on the disk."""
_REMOTE_S = 30.0


class SilenceWatcher:
    """Watches from `start` to `stop`.

    Args:
        policy: the policy actor.
        run_dir: of the run.
        hang_timeout_s: seconds without a step after which a function is ended; None for never.
        now_s: the clock.
    """

    def __init__(
        self,
        policy: Any,
        run_dir: Path,
        hang_timeout_s: float | None,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._policy, self._run_dir, self._hang_timeout_s, self._now_s = policy, run_dir, hang_timeout_s, now_s
        self._is_over = threading.Event()
        self._actor_pid, self._heard_s = 0, now_s()
        self._told: set[tuple[str, int, str, int, int]] = set()
        self._node_id = self._actor_node_id = ""
        self._thread = threading.Thread(target=self._watch, name="silence", daemon=True)

    def start(self) -> None:
        """Begin to look."""
        self._node_id = ray.get_runtime_context().get_node_id()
        heads = [
            node["NodeID"] for node in ray.nodes() if node["Alive"] and PIN_HEAD.keys() <= node["Resources"].keys()
        ]
        self._actor_node_id = heads[0] if heads else self._node_id
        self._thread.start()

    def stop(self) -> None:
        """Look no more."""
        self._is_over.set()
        if self._thread.is_alive():
            self._thread.join(ANSWER_S + 1)

    def _watch(self) -> None:
        while not self._is_over.wait(PERIOD_S):
            try:
                self._actor_pid, silent = ray.get(self._policy.silent.remote(), timeout=ANSWER_S)
            except GetTimeoutError:
                with contextlib.suppress(RayError):  # its node does not answer, either
                    self.look_at_actor()
                continue
            except RayError as error:  # it is being restarted
                logger.debug("the policy actor is away: %s", error)
                self._heard_s = self._now_s()
                continue
            self._heard_s = self._now_s()
            for each in silent:
                try:
                    self._look_at(each)
                except RayError as error:
                    logger.debug("rank %d of %s could not be looked at: %s", each.rank, each.slot_id, error)

    def look_at_actor(self) -> None:
        """The actor did not answer: end its process where that is stopped, or has been silent for long."""
        silent_s = self._now_s() - self._heard_s
        found = Process(state="unknown")
        if self._actor_pid:
            found = self._on(self._actor_node_id, examine, self._actor_pid, None)
        limit_s = STOPPED_S if found.is_stopped else SILENT_S
        if silent_s < limit_s or found.state in {"unknown", "gone"} or not has_room(self._run_dir):
            return
        logger.warning(
            "the policy actor (process %d, %s) has not answered for %.0f s and is replaced; training goes on",
            self._actor_pid,
            found.state,
            silent_s,
        )
        self._on(self._actor_node_id, end, self._actor_pid)
        self._heard_s = self._now_s()

    def _look_at(self, silent: Silent) -> None:
        """See what a silent process is about, say so, and end it if nothing else will help."""
        found: Process = self._on(silent.node_id, examine, silent.pid, self._run_dir if silent.is_over else None)
        what = verdict(silent, found, self._hang_timeout_s)
        key = (silent.slot_id, silent.epoch, silent.trial_id, silent.attempt, silent.rank)
        if what is None or (what == "warn" and key in self._told):
            return
        ray.get(self._policy.silence_found.remote(silent, found, what == "restart"), timeout=ANSWER_S)
        self._told.add(key)
        if what == "restart":
            self._on(silent.node_id, end, silent.pid)

    def _on(self, node_id: str, call: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function on a node."""
        if node_id in {"", self._node_id}:
            return call(*arguments)
        where = NodeAffinitySchedulingStrategy(node_id=node_id, soft=False)
        remote = ray.remote(num_cpus=0, scheduling_strategy=where)(call)
        return ray.get(remote.remote(*arguments), timeout=_REMOTE_S)
