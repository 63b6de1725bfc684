"""The control plane of a run: its policy actor on the head node, and its slots. Who searches is not its business.

Opened by the driver of `orchestrator run`, and by `orchestrator.tune.trainable` for a search of the user's own.
"""

from __future__ import annotations

import contextlib
import logging
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError

from orchestrator.config import ResolvedRun
from orchestrator.control.orders import TrialOrder
from orchestrator.devices.agent import NodeReady
from orchestrator.devices.ray_agents import Agents, gpu_part
from orchestrator.errors import UnfitEnvironmentError, WorkerGroupError
from orchestrator.node_watcher import NodeWatcher, num_slots_with_room, num_workers_with_room
from orchestrator.run_spec import middle_params, run_spec
from orchestrator.supervisor import SlotSpec, Supervisor
from orchestrator.tune.admission import PIN_HEAD, require_tested_ray
from policies.plan import TrialId

logger = logging.getLogger(__name__)

ACTOR_NAME = "policy"
_CLOSE_TIMEOUT_S = 30.0
_HURRIED_CLOSE_TIMEOUT_S = 5.0
_GRACE_S = 60.0
_POLL_S = 0.2


class ControlPlane:
    """Policy actor and slots of one start of a run, in the cluster this process is connected to.

    Attributes:
        spec: the controller's view of the run.
        namespace: of the policy actor, different for every start.
        policy: handle of the actor, once open.
    """

    def __init__(self, resolved: ResolvedRun, run_dir: Path) -> None:
        self._config, self._run_dir = resolved.config, run_dir
        self.spec = run_spec(resolved)
        self.namespace = f"orchestrator-{self._config.name}-{uuid.uuid4().hex[:8]}"
        self.policy: Any = None
        self._supervisor: Supervisor | None = None
        self._watcher: NodeWatcher | None = None
        self._agents: Agents | None = None
        self._ready: NodeReady | None = None
        self._give_up_s = float("inf")

    def open(self) -> None:
        """Start the policy actor and begin to open the slots.

        Raises:
            UnfitEnvironmentError: this is a Ray that was not tested, or the cluster has no room for a single slot.
        """
        require_tested_ray()
        self._agents = self._gpu_agents()
        self._ready = None if self._agents is None else self._agents.open()
        slot_spec = self.slot_spec()
        if not self._config.cluster.autoscale:
            require_room(slot_spec)
        self.policy = start_actor(self.spec, self.namespace)
        self._supervisor = Supervisor(slot_spec, self.policy)
        num_slots = self._config.search.num_slots
        num_allowed = min(num_slots, num_slots_with_room(slot_spec, alive_resources()))
        self._supervisor.open(num_slots, num_allowed)  # first: they take longest
        ray.get(self.policy.ready.remote())
        if self._agents is not None:
            self._agents.watch(ACTOR_NAME, self.namespace)
        self._watcher = NodeWatcher(
            self.policy,
            self._supervisor,
            slot_spec,
            num_slots,
            max_cores=self._config.cluster.num_cpus,
            is_scaling=self._config.cluster.autoscale,
            is_resizing=self._config.dials.workers.enabled,
        )
        self._watcher.start()
        self._give_up_s = time.monotonic() + self._config.slots.open_timeout_s

    def require_slots(self) -> None:
        """Look whether slots open; called from time to time.

        Raises:
            WorkerGroupError: they fail again and again.
            UnfitEnvironmentError: none opened in time. Stock Ray Train retries for ever what can never be met.
        """
        if self._supervisor is not None and self._supervisor.gave_up is not None:
            raise WorkerGroupError(f"slots cannot be opened: {self._supervisor.gave_up}")
        if time.monotonic() < self._give_up_s:
            return
        self._give_up_s = float("inf")
        if any(slot["epoch"] for slot in ray.get(self.policy.status.remote())["slots"]):
            return
        slots, trial = self._config.slots, self._config.trial
        raise UnfitEnvironmentError(
            f"no slot opened within {slots.open_timeout_s:g} s; each needs {trial.num_workers} workers with"
            f" {self.slot_spec().cpus_per_worker:g} CPUs each, and the cluster has {ray.cluster_resources()} of which"
            f" {ray.available_resources()} are free; free some, lower search.max_concurrent or trial.num_workers, or"
            " raise slots.open_timeout_s"
        )

    def interrupt(self, is_cancelled: Callable[[], bool]) -> None:
        """Let every running trial commit and leave its slot; returns when they have, or when that is called off."""
        ray.get(self.policy.set_state.remote("stopping"))
        ray.get(self.policy.interrupt.remote())
        deadline_s = time.monotonic() + _GRACE_S
        while time.monotonic() < deadline_s and not is_cancelled():
            slots = ray.get(self.policy.status.remote())["slots"]
            if not any(slot["trial_id"] for slot in slots):
                return
            time.sleep(_POLL_S)

    def close(self, state: str, *, is_hurried: bool = False) -> None:
        """Close the slots (within seconds when hurried), tell the actor how the run ended, and end it."""
        if self._watcher is not None:
            self._watcher.stop()
        try:
            self._end_actor(state, is_hurried=is_hurried)
        finally:
            if self._agents is not None:
                self._agents.close()  # last: MPS must outlive the ranks it serves
                self._agents = None

    def _end_actor(self, state: str, *, is_hurried: bool) -> None:
        if self.policy is None:
            return
        with contextlib.suppress(RayError):
            ray.get(self.policy.set_state.remote("stopping"), timeout=5.0)
        if self._supervisor is not None:
            # Also in a hurry a slot that is idle may end by itself: a thread that still waits for one when Ray is shut
            # down can take the whole process with it before the run's last word is written.
            timeout_s = _HURRIED_CLOSE_TIMEOUT_S if is_hurried else _CLOSE_TIMEOUT_S
            if not self._supervisor.close(timeout_s):
                logger.warning("not all slots closed within %g s; their processes are ended", timeout_s)
            self._supervisor.abandon()
        with contextlib.suppress(RayError):
            ray.get(self.policy.end_run.remote(state), timeout=10.0)
        ray.kill(self.policy)
        self.policy = None

    def _gpu_agents(self) -> Agents | None:
        """Device agents, where trials compute on GPUs."""
        devices = self._config.devices
        has_gpus = ray.cluster_resources().get("GPU", 0) > 0
        if devices.use == "cpu" or (devices.use == "auto" and not has_gpus):
            return None
        turns_shares = self._config.dials.share.enabled and self._config.search.num_slots > 1
        return Agents(devices.gpu_share, turns_shares=turns_shares, token=self.namespace[-8:])

    def _cpus_per_worker(self, cpus: float, num_ranks: int) -> float:
        """Equal parts of an own cluster; a core on one that may grow, so that slots spread over the nodes to come."""
        if self._config.cluster.address != "local":
            return 1.0
        return max(0.01, int(100 * min(1.0, cpus / num_ranks)) / 100)

    def slot_spec(self) -> SlotSpec:
        """What every slot of the run is made of, on the cluster this process is connected to."""
        config, ready = self._config, self._ready
        cpus = float(ray.cluster_resources().get("CPU", 1.0))
        num_ranks = config.num_ranks
        warm_up = TrialOrder(
            trial_id=TrialId("warm-up"),
            attempt=0,
            seed=config.seed,
            job=config.job.name,
            params=dict(middle_params(config)),
            start=self.spec.start,
            limits=self.spec.limits,
            samples_per_report=1,
            max_reports=1,
            directory=str(self._run_dir / "trials" / "warm-up"),
            resume_from=None,
            num_reports_done=0,
        )
        return SlotSpec(
            num_workers=config.trial.num_workers,
            cpus_per_worker=self._cpus_per_worker(cpus, num_ranks),
            gpus_per_worker=0.0 if ready is None else gpu_part(ray.cluster_resources().get("GPU", 1), num_ranks),
            environment={} if ready is None else ready.environment,
            loop_config={
                "actor": ACTOR_NAME,
                "namespace": self.namespace,
                "send_period_s": config.telemetry.send_period_s,
                "max_units": config.cluster.num_cpus,
                "warm_up": warm_up,
                "log_level": self.spec.log_level,
                "num_slots": config.search.num_slots,
                "gpu_share": "" if ready is None else ready.share.value,
                "gpu_words": "" if ready is None else ready.words,
                "memory_fraction": config.devices.memory_fraction,
                "step_mode": config.devices.step_mode,
            },
            storage_path=str(self._run_dir / "slots"),
        )


def start_actor(spec: Any, namespace: str) -> Any:
    """The policy actor of a run: named, detached, restarted when it dies, on the head node where the journal is."""
    from orchestrator.control.actor import PolicyActor

    return (
        ray.remote(PolicyActor)
        .options(
            name=ACTOR_NAME,
            namespace=namespace,
            lifetime="detached",
            num_cpus=0,
            resources=PIN_HEAD,
            max_restarts=-1,
            max_task_retries=-1,
            max_concurrency=1000,
        )
        .remote(spec, namespace)
    )


def require_room(slot: SlotSpec) -> None:
    """Say at once when not even one slot fits the cluster, whatever is running on it now.

    Raises:
        UnfitEnvironmentError: it does not.
    """
    nodes = alive_resources()
    num_workers = num_workers_with_room(slot, nodes)
    if num_workers < slot.num_workers:
        words = ", ".join(f"{amount:g} {name}" for name, amount in slot.resources.items())
        raise UnfitEnvironmentError(
            f"the cluster has no room for a single trial: it needs {slot.num_workers} workers with {words} each, and"
            f" its {len(nodes)} nodes hold {num_workers} such workers; add nodes, lower trial.num_workers, or set"
            " cluster.autoscale where nodes come on demand"
        )


def alive_resources() -> list[dict[str, float]]:
    """The resources of every node that is there."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]
