"""Keeps the slots open: one thread per `TorchTrainer.fit()`, opened again with back-off when it ends unasked.

Lives in the driver. Ray Train restarts a worker group whose processes die; this restarts what Ray Train does not: a
slot whose controller died. It also closes slots that have been idle for long, and all of them at the end.
"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError

logger = logging.getLogger(__name__)

_FIRST_BACK_OFF_S = 1.0
_LONGEST_BACK_OFF_S = 30.0
_MAX_FAST_FAILURES = 5
_WANTED_PERIOD_S = 1.0


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
    """

    num_workers: int
    cpus_per_worker: float
    gpus_per_worker: float
    environment: dict[str, str]
    loop_config: dict[str, Any]
    storage_path: str

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
        for slot_id in self._threads:
            self._tell(self._policy.close_slot, slot_id)
        for thread in self._threads.values():
            thread.join(max(0.0, deadline_s - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads.values())

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
                self._tell(self._policy.expect_slot, slot_id)
                error = self._run_once(slot_id)
            finally:
                self._give_room()
            if error is None:
                self._tell(self._policy.slot_closed, slot_id)
                self._wait_until_wanted()
                continue
            if self._is_closing.is_set():
                return
            logger.warning("%s ended: %s", slot_id, error)
            self._tell(self._policy.lose_slot, slot_id, error)
            is_fast = time.monotonic() - began_s < 2 * _LONGEST_BACK_OFF_S
            num_fast_failures = num_fast_failures + 1 if is_fast else 0
            if num_fast_failures >= _MAX_FAST_FAILURES:
                self.gave_up = f"{slot_id} failed {num_fast_failures} times in a row, last with: {error}"
                return
            self._is_closing.wait(back_off_s)
            back_off_s = min(2 * back_off_s, _LONGEST_BACK_OFF_S) if is_fast else _FIRST_BACK_OFF_S

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

    def _run_once(self, slot_id: str) -> str | None:
        """One life of the slot; why it ended unasked, or None when its loop returned."""
        from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer

        from orchestrator.train.slot import slot_loop

        trainer = TorchTrainer(
            slot_loop,
            train_loop_config={**self._spec.loop_config, "slot_id": slot_id},
            # One rank has nobody to talk to: NCCL would only take memory of the GPU.
            torch_config=TorchConfig(backend="gloo" if self._spec.num_workers == 1 else None),
            scaling_config=ScalingConfig(
                num_workers=self._spec.num_workers,
                use_gpu=bool(self._spec.gpus_per_worker),
                resources_per_worker=self._spec.resources,
            ),
            run_config=RunConfig(
                # Ray Train resumes a run of the same name; a slot has nothing to resume.
                name=f"{slot_id}-{time.time_ns()}",
                storage_path=self._spec.storage_path,
                failure_config=FailureConfig(max_failures=-1, controller_failure_limit=2),
                checkpoint_config=CheckpointConfig(num_to_keep=1),
                worker_runtime_env={"env_vars": self._spec.environment} if self._spec.environment else None,
            ),
        )
        try:
            trainer.fit()
        except Exception as error:
            return f"{type(error).__name__}: {str(error).strip().splitlines()[-1] if str(error).strip() else 'no text'}"
        return None

    def _tell(self, method: Any, *arguments: str) -> Any:
        """Call the policy actor once; it may be restarting, and then the call is retried by Ray itself."""
        if self._is_abandoned:
            return None
        try:
            return ray.get(method.remote(*arguments), timeout=30.0)
        except RayError as error:
            logger.warning("the policy actor did not answer: %s", error)
            return None
