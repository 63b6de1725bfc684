"""Keeps the slots open: one thread per `TorchTrainer.fit()`, opened again with back-off when it ends unasked.

Lives in the driver. Ray Train restarts a worker group whose processes die; this restarts what Ray Train does not: a
slot whose controller died. It also closes slots that have been idle for long, and all of them at the end.
"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError

from orchestrator.control.orders import TrialOrder
from orchestrator.errors import JournalError
from orchestrator.policies.plan import can_split, on_ranks
from orchestrator.room import POLL_S, has_room, words

logger = logging.getLogger(__name__)

_FIRST_BACK_OFF_S = 1.0
_LONGEST_BACK_OFF_S = 30.0
_MAX_FAST_FAILURES = 5
_WANTED_PERIOD_S = 1.0
_MAX_FAILURES_BESIDE = 3
"""Times that Ray Train restarts a group that was opened beside the others: one that cannot work shall not go on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotSpec:
    """What every slot of a run is made of.

    Attributes:
        num_workers: ranks of its worker group.
        cpus_per_worker: logical CPUs each rank reserves from Ray, may be a fraction.
        gpus_per_worker: the same for GPUs.
        environment: what ranks must have before they touch CUDA.
        loop_config: what `slot_loop` gets, without its slot id.
        storage_path: where Ray Train may write its own files.
        num_lanes: trials that one worker group serves side by side.
        num_slots: trials that run at a time in all.
    """

    num_workers: int
    cpus_per_worker: float
    gpus_per_worker: float
    environment: dict[str, str]
    loop_config: dict[str, Any]
    storage_path: str
    num_lanes: int = 1
    num_slots: int = 0

    def lanes_of(self, slot_id: str) -> tuple[str, ...]:
        """What the control plane calls the slots of a worker group: itself, or one for each lane."""
        if self.num_lanes == 1:
            return (slot_id,)
        first = int(slot_id.rpartition("-")[2]) * self.num_lanes
        return tuple(f"{slot_id}.{number}" for number in range(min(self.num_lanes, self.num_slots - first)))

    def of(self, num_workers: int) -> SlotSpec:
        """The same with another number of ranks."""
        warm_up: TrialOrder = self.loop_config["warm_up"]
        start, most = warm_up.start, warm_up.limits.max_micro_batch
        start = on_ranks(start, num_workers, most) if can_split(start, num_workers) else start
        config = {**self.loop_config, "warm_up": replace(warm_up, start=start)}
        return replace(self, num_workers=num_workers, loop_config=config)

    @property
    def resources(self) -> dict[str, float]:
        """What each rank reserves from Ray."""
        return {"CPU": self.cpus_per_worker, **({"GPU": self.gpus_per_worker} if self.gpus_per_worker else {})}


class Supervisor:
    """Opens, re-opens and closes the slots of one run."""

    def __init__(self, spec: SlotSpec, policy: Any) -> None:
        self._spec, self._policy = spec, policy
        self._threads: dict[str, threading.Thread] = {}
        self._is_closing = threading.Event()
        self._is_abandoned = False
        self._room = threading.Condition()
        self._num_allowed, self._num_open = 0, 0
        self._num_extra_ranks, self._num_extra = 0, 0
        self._avoided: frozenset[str] = frozenset()
        self.gave_up: str | None = None

    def open(self, num_slots: int, num_allowed: int | None = None) -> None:
        """Begin to open up to so many slots, as far as they are allowed; returns once the first modules are loaded."""
        import ray.train.torch  # noqa: F401 - two threads importing it at once break it

        self.allow(num_slots if num_allowed is None else num_allowed)
        for number in range(num_slots):
            slot_id = f"slot-{number}"
            thread = threading.Thread(target=self._keep_open, args=(slot_id,), name=slot_id, daemon=True)
            self._threads[slot_id] = thread
            thread.start()

    def allow(self, num_slots: int) -> None:
        """How many slots may be open from here on; those that are open stay."""
        with self._room:
            self._num_allowed = num_slots
            self._room.notify_all()

    def open_beside(self, sizes: tuple[int, ...], num_ranks: int) -> None:
        """Begin to open further slots of these sizes, for trials that change theirs, as far as the nodes have room.

        Each serves until it is closed, as one that has been idle for long is; who wants another asks again.

        Args:
            sizes: ranks of each.
            num_ranks: ranks that all nodes can hold, those of the slots that are open included.
        """
        for size in sizes:
            with self._room:
                taken = self._num_open * self._spec.num_workers + self._num_extra_ranks
                if self._is_closing.is_set() or taken + size > num_ranks:
                    continue
                self._num_extra_ranks += size
            slot_id = f"slot-x{self._num_extra}"
            self._num_extra += 1
            self._tell(self._policy.expect_slot, slot_id, size)  # first: it must not be asked for again
            thread = threading.Thread(target=self._serve_once, args=(slot_id, size), name=slot_id, daemon=True)
            self._threads[slot_id] = thread
            thread.start()

    def avoid(self, node_ids: frozenset[str]) -> None:
        """Nodes on which no slot shall be opened from here on: they are about to go."""
        self._avoided = node_ids

    def abandon(self) -> None:
        """The run ends now: leave the slots to Ray's shutdown, and call Ray no more, which would start it again."""
        self._is_abandoned = True
        self._is_closing.set()
        self.allow(0)

    def close(self, timeout_s: float) -> bool:
        """Tell every slot to end and wait for it; False when one did not in time."""
        self._is_closing.set()
        self.allow(0)
        deadline_s = time.monotonic() + timeout_s
        threads = {slot_id: thread for slot_id, thread in self._threads.copy().items() if thread.is_alive()}
        for slot_id in threads:
            self._tell_of(self._policy.close_slot, slot_id)
        for thread in threads.values():
            thread.join(max(0.0, deadline_s - time.monotonic()))
        return not any(thread.is_alive() for thread in threads.values())

    def _keep_open(self, slot_id: str) -> None:
        """A slot's thread; a mistake of ours in it ends the run instead of leaving it without slots."""
        try:
            self._serve(slot_id)
        except Exception as error:
            logger.exception("the thread of %s failed", slot_id)
            self.gave_up = f"{slot_id}: {type(error).__name__}: {error}"

    def _serve(self, slot_id: str) -> None:
        """Run the slot's worker group; open it again while the run needs it."""
        back_off_s, num_fast_failures = _FIRST_BACK_OFF_S, 0
        while self._take_room():
            began_s = time.monotonic()
            try:
                self._tell_of(self._policy.expect_slot, slot_id)
                error = self._run_once(slot_id, self._spec.num_workers)
            finally:
                self._give_room()
            if error is None:
                self._tell_of(self._policy.slot_closed, slot_id)
                self._wait_until_wanted()
                continue
            if self._is_closing.is_set():
                return
            logger.warning("%s ended: %s", slot_id, error)
            self._tell_of(self._policy.lose_slot, slot_id, error)
            if not has_room(Path(self._spec.storage_path)):  # Ray Train writes there before it opens a worker group
                logger.warning(
                    "%s is opened again when there is room: %s", slot_id, words(Path(self._spec.storage_path))
                )
                self._wait_for_room()
                continue
            is_fast = time.monotonic() - began_s < 2 * _LONGEST_BACK_OFF_S
            num_fast_failures = num_fast_failures + 1 if is_fast else 0
            if num_fast_failures >= _MAX_FAST_FAILURES:
                self.gave_up = f"{slot_id} failed {num_fast_failures} times in a row, last with: {error}"
                return
            self._is_closing.wait(back_off_s)
            back_off_s = min(2 * back_off_s, _LONGEST_BACK_OFF_S) if is_fast else _FIRST_BACK_OFF_S

    def _wait_for_room(self) -> None:
        """Return when the disk has room, or the run ends."""
        while not has_room(Path(self._spec.storage_path)):
            if self._is_closing.wait(POLL_S):
                return

    def _serve_once(self, slot_id: str, num_workers: int) -> None:
        """A further slot's thread, for one life of it: who needs another asks for it."""
        try:
            error = self._run_once(slot_id, num_workers, _MAX_FAILURES_BESIDE)
        finally:
            with self._room:
                self._num_extra_ranks -= num_workers
        if error is None:
            self._tell(self._policy.slot_closed, slot_id)
        elif not self._is_closing.is_set():
            logger.warning("%s with %d ranks ended: %s", slot_id, num_workers, error)
            self._tell(self._policy.lose_slot, slot_id, error)

    def _take_room(self) -> bool:
        """Wait until one more slot may be open; False when the run ends first."""
        with self._room:
            self._room.wait_for(lambda: self._is_closing.is_set() or self._num_open < self._num_allowed)
            if self._is_closing.is_set():
                return False
            self._num_open += 1
            return True

    def _give_room(self) -> None:
        with self._room:
            self._num_open -= 1
            self._room.notify_all()

    def _wait_until_wanted(self) -> None:
        """A slot that closed because it was idle is opened again when trials wait for one."""
        while not self._is_closing.wait(_WANTED_PERIOD_S):
            if self._tell(self._policy.wants_slot):
                return

    def _run_once(self, slot_id: str, num_workers: int, max_failures: int = -1) -> str | None:
        """One life of the slot, restarted at most so often; why it ended unasked, or None when its loop returned."""
        spec = self._spec if num_workers == self._spec.num_workers else self._spec.of(num_workers)
        from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer

        from orchestrator.train.slot import slot_loop

        trainer = TorchTrainer(
            slot_loop,
            train_loop_config={**spec.loop_config, "slot_id": slot_id, "lanes": spec.lanes_of(slot_id)},
            torch_config=_backend_config(spec),
            scaling_config=ScalingConfig(
                num_workers=spec.num_workers,
                use_gpu=bool(spec.gpus_per_worker),
                resources_per_worker=spec.resources,
                label_selector=away_from(self._avoided),
            ),
            run_config=RunConfig(
                # Ray Train resumes a run of the same name; a slot has nothing to resume.
                name=f"{slot_id}-{time.time_ns()}",
                storage_path=spec.storage_path,
                failure_config=FailureConfig(max_failures=max_failures, controller_failure_limit=2),
                checkpoint_config=CheckpointConfig(num_to_keep=1),
                worker_runtime_env={"env_vars": spec.environment} if spec.environment else None,
            ),
        )
        try:
            trainer.fit()
        except Exception as error:
            return f"{type(error).__name__}: {str(error).strip().splitlines()[-1] if str(error).strip() else 'no text'}"
        return None

    def _tell_of(self, method: Any, slot_id: str, *arguments: str | int) -> None:
        """Tell the policy actor something of all lanes of a worker group."""
        for lane_id in self._spec.lanes_of(slot_id):
            self._tell(method, lane_id, *arguments)

    def _tell(self, method: Any, *arguments: str | int) -> Any:
        """Call the policy actor, again while it cannot write; Ray itself retries while it restarts."""
        while not self._is_abandoned:
            try:
                return ray.get(method.remote(*arguments), timeout=30.0)
            except RayError as error:
                logger.warning("the policy actor did not answer: %s", error)
                if not isinstance(error, JournalError) or self._is_closing.wait(_FIRST_BACK_OFF_S):
                    return None
        return None


def _backend_config(spec: SlotSpec) -> Any:
    """How ranks find each other: over NCCL where there are several, each with a GPU, else over gloo; one needs not."""
    if spec.num_workers == 1:
        from orchestrator.devices.ray_alone import Alone

        return Alone()
    if not spec.gpus_per_worker:
        from ray.train.torch import TorchConfig

        return TorchConfig(backend="gloo")
    from orchestrator.devices.ray_cards import OwnCards

    return OwnCards()


def away_from(node_ids: frozenset[str]) -> dict[str, str] | None:
    """The label selector of a worker group that shall be on none of these nodes."""
    return {"ray.io/node-id": f"!in({','.join(sorted(node_ids))})"} if node_ids else None
