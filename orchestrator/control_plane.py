"""The control plane of a run: its policy actor on the head node, and its slots. Who searches is not its business.

Opened by the driver of `orchestrator run`, and by `orchestrator.tune.trainable` for a search of the user's own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import logging
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError

from orchestrator.config import ResolvedRun
from orchestrator.control.events import RunBegan
from orchestrator.control.journal import has_entries, read_run
from orchestrator.control.orders import Retry, TrialOrder
from orchestrator.control.snapshots import code_version
from orchestrator.control.spec import RunSpec
from orchestrator.devices.agent import NodeReady
from orchestrator.devices.ray_agents import Agents, gpu_nodes
from orchestrator.errors import JournalError, TelemetryError, UnfitEnvironmentError, WorkerGroupError
from orchestrator.node_requests import NodeRequests
from orchestrator.node_watcher import NodeWatcher, num_slots_with_room, num_workers_with_room
from orchestrator.output import say
from orchestrator.policies.plan import TrialId
from orchestrator.policy_handle import OWN_NAME, SHARED_NAME, SHARED_NAMESPACE, RunHandle, shared_actor
from orchestrator.run_spec import gpu_part, middle_params, num_gpus_at_most, run_spec
from orchestrator.silence_watcher import SilenceWatcher
from orchestrator.supervisor import SlotSpec, Supervisor
from orchestrator.tune.admission import PIN_HEAD, require_tested_ray

logger = logging.getLogger(__name__)

_CLOSE_TIMEOUT_S = 30.0
_HURRIED_CLOSE_TIMEOUT_S = 5.0
_GRACE_S = 60.0
_POLL_S = 0.2
_BOOT_S = 600.0
_SHARED_CPUS = 0.125
"""What a rank reserves of Ray's logical CPUs where runs share a cluster: eight runs have room for a rank on a core."""


class ControlPlane:
    """Policy actor and slots of one start of a run, in the cluster this process is connected to.

    `is_foreign` says that the search is the user's own: what the run file says of a scheduler is nothing to it.
    `retries_all` says that every trial that failed is tried again, not those alone that failed for reasons outside.

    Attributes:
        spec: the controller's view of the run.
        namespace: different for every start; of the policy actor that the run has for itself.
        address: where worker groups and stand-ins find the policy actor: its name and its namespace.
        policy: handle of the actor, once open.
        is_cancelled: whether somebody asked for the end of the run.
    """

    def __init__(
        self, resolved: ResolvedRun, run_dir: Path, *, is_foreign: bool = False, retries_all: bool = False
    ) -> None:
        self._config, self._run_dir = resolved.config, run_dir
        self.spec = run_spec(resolved)
        # A trial that the user's own search does not ask for would hold a slot for nobody.
        self._retry = Retry.NONE if is_foreign else Retry.ALL if retries_all else Retry.OUTSIDE
        if is_foreign:
            self.spec = dataclasses.replace(self.spec, stop_rule=None)
        self.namespace = f"orchestrator-{self._config.name}-{uuid.uuid4().hex[:8]}"
        self.address = (OWN_NAME, self.namespace)
        self.policy: Any = None
        self.is_cancelled: Callable[[], bool] = lambda: False
        self._slots: tuple[Supervisor, SlotSpec, int] | None = None
        self._watcher: NodeWatcher | None = None
        self._silence: SilenceWatcher | None = None
        self._agents: Agents | None = None
        self._ready: NodeReady | None = None
        self._give_up_s = float("inf")
        self._node_types = {name: dict(each.resources) for name, each in self._config.cluster.node_types.items()}
        self._requests = NodeRequests(self._node_types) if self._node_types else None

    def open(self) -> None:
        """Start the policy actor and begin to open the slots.

        Raises:
            UnfitEnvironmentError: this is a Ray that was not tested, or the cluster has no room for a single slot.
        """
        require_tested_ray()
        self._join()
        self._agents = self._gpu_agents()
        is_waiting = self._agents is not None and self._awaits_gpus()
        if self._agents is not None and not is_waiting:
            self._ready = self._agents.open()
        slot_spec = self.slot_spec()
        if not self._config.cluster.autoscale:
            require_room(slot_spec, self._nodes_to_come())
        if self.policy is None:
            self.policy = start_actor(self.spec, self.namespace, self._retry)
        if is_waiting:
            importlib.import_module("ray.train.torch")  # two threads importing it at once break it
        else:
            self._open_slots(slot_spec)
        ray.get(self.policy.ready.remote())
        self._watcher = NodeWatcher(
            self.policy,
            lambda: self._slots,
            max_cores=self._config.cluster.num_cpus,
            is_scaling=self._config.cluster.autoscale,
            is_resizing=self._config.dials.workers.enabled,
            requests=self._requests,
            unfit=None if self._agents is None else self._unfit_nodes,
        )
        self._watcher.start()
        self._silence = SilenceWatcher(self.policy, self._run_dir, self._config.trial.hang_timeout_s)
        self._silence.start()
        self._give_up_s = time.monotonic() + self._open_timeout_s

    def _join(self) -> None:
        """Take part in the policy actor that the runs of this cluster share, where somebody started one.

        Raises:
            UnfitEnvironmentError: it does not take this run in.
        """
        actor = None if self._config.cluster.address == "local" else shared_actor()
        if actor is None:
            self.spec = as_begun(self.spec)
            return
        why = "this cluster's runs share a policy actor (orchestrator up)"
        if self._config.devices.use != "cpu" and ray.cluster_resources().get("GPU", 0) > 0:
            raise UnfitEnvironmentError(f"{why}, and such runs compute on cores only; allowed: devices.use: cpu")
        if self._config.cluster.autoscale:
            raise UnfitEnvironmentError(f"{why}, and such runs ask for no nodes; allowed: cluster.autoscale: false")
        policy = ray.get(actor.ready.remote())
        if policy["places"] and sum(node.get("CPU", 0) >= 1 for node in alive_resources()) > 1:
            text = f"{why} whose policy {policy['policy']} chooses devices, which works on one node only so far"
            raise UnfitEnvironmentError(f"{text}; allowed: another policy in the file for `orchestrator up`")
        joining = actor.join.remote(self.spec, self.namespace, code_version(), self._retry)
        found = ray.get(joining)
        if "error" in found:
            raise UnfitEnvironmentError(f"{why}, and this run cannot join: {found['error']}")
        self.policy, self.address = RunHandle(actor, found["run"]), (f"{SHARED_NAME}#{found['run']}", SHARED_NAMESPACE)

    def _open_slots(self, slot_spec: SlotSpec) -> None:
        """Begin to open the slots; they take longest of all."""
        supervisor = Supervisor(slot_spec, self.policy)
        num_processes = self._config.num_processes
        num_allowed = min(num_processes, num_slots_with_room(slot_spec, alive_resources()))
        supervisor.open(num_processes, num_allowed)
        self._slots = (supervisor, slot_spec, num_processes)

    @property
    def _supervisor(self) -> Supervisor | None:
        """Who opens the slots, once anybody does."""
        return None if self._slots is None else self._slots[0]

    def _unfit_nodes(self, nodes: list[dict[str, Any]]) -> frozenset[str]:
        """Look after the agents of the GPU nodes; returns those whose agent is not ready, or offers something else."""
        assert self._agents is not None
        serving = self._agents.follow(nodes)
        if self._supervisor is None and serving:
            self._ready = self._agents.settle()
            self._open_slots(self.slot_spec())
        return frozenset(gpu_nodes(nodes)) - serving

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
        trial = self._config.trial
        raise UnfitEnvironmentError(
            f"no slot opened within {self._open_timeout_s:g} s; each needs {trial.num_workers} workers with"
            f" {self.slot_spec().cpus_per_worker:g} CPUs each, and the cluster has {ray.cluster_resources()} of which"
            f" {ray.available_resources()} are free; free some, lower search.max_concurrent or trial.num_workers, or"
            " raise slots.open_timeout_s"
        )

    def has_asked_for_trials(self) -> bool:
        """Whether trials go on that somebody added beside the search."""
        trials = ray.get(self.policy.status.remote())["trials"]
        return any(trial["is_asked_for"] and trial["state"] in {"queued", "running"} for trial in trials)

    def interrupt(self, is_cancelled: Callable[[], bool]) -> None:
        """Let every running trial commit and leave its slot; returns when they have, or when that is called off."""
        if self._requests is not None:
            self._requests.release()  # nothing more is launched; nodes in use stay while they are
        ray.get(self.policy.set_state.remote("stopping"))
        self._emptied(lambda: ray.get(self.policy.interrupt.remote()), is_cancelled)

    def put_aside(self, trial_ids: Sequence[str]) -> None:
        """Let these trials commit and leave their slots; the search may take them up again."""
        self._emptied(lambda: ray.get([self.policy.pause.remote(trial_id) for trial_id in trial_ids]), lambda: False)

    def _emptied(self, tell: Callable[[], object], is_cancelled: Callable[[], bool]) -> None:
        """Tell the actor, and wait until no slot holds a trial."""
        deadline_s, is_told = time.monotonic() + _GRACE_S, False
        while time.monotonic() < deadline_s and not is_cancelled():
            if not is_told:
                with contextlib.suppress(JournalError):  # a full disk: there may be room in a moment
                    tell()
                    is_told = True
            slots = ray.get(self.policy.status.remote())["slots"]
            if not any(slot["trial_id"] for slot in slots):
                return
            time.sleep(_POLL_S)

    def close(self, state: str, *, is_hurried: bool = False) -> bool:
        """Close the slots (within seconds when hurried), tell the actor how the run ended, and end it.

        Returns:
            Whether all slots have closed; threads of the others still wait for Ray.
        """
        for watcher in (self._silence, self._watcher):
            if watcher is not None:
                watcher.stop()
        if self._requests is not None:
            self._requests.release()
        try:
            return self._end_actor(state, is_hurried=is_hurried)
        finally:
            if self._agents is not None:
                self._agents.close()  # last: MPS must outlive the ranks it serves
                self._agents = None

    def _end_actor(self, state: str, *, is_hurried: bool) -> bool:
        if self.policy is None:
            return True
        have_closed = True
        with contextlib.suppress(RayError):
            ray.get(self.policy.set_state.remote("stopping"), timeout=5.0)
        if self._supervisor is not None:
            # Also in a hurry a slot that is idle may end by itself: a thread that still waits for one when Ray is shut
            # down can take the whole process with it before the run's last word is written.
            timeout_s = _HURRIED_CLOSE_TIMEOUT_S if is_hurried else _CLOSE_TIMEOUT_S
            have_closed = self._supervisor.close(timeout_s)
            if not have_closed:
                logger.warning("not all slots closed within %g s; their processes are ended", timeout_s)
            self._supervisor.abandon()
        self._end_run(state, is_hurried=is_hurried)
        self.end_actor()
        self.policy = None
        return have_closed

    def end_actor(self) -> None:
        """End the policy actor, or leave the one that others share."""
        with contextlib.suppress(RayError):
            if isinstance(self.policy, RunHandle):
                ray.get(self.policy.actor.leave.remote(self.policy.run), timeout=10.0)
            else:
                ray.kill(self.policy)

    def _end_run(self, state: str, *, is_hurried: bool) -> None:
        """Let the actor write what waits; where the disk is full, once there is room, unless it has to be quick."""
        is_said = False
        while True:
            try:
                ray.get(self.policy.end_run.remote(state), timeout=10.0)
            except RayError as error:
                if is_hurried or self.is_cancelled() or not isinstance(error, JournalError | TelemetryError):
                    return
                if not is_said:
                    say(f"the run has ended, and its last entries wait: {error.__cause__ or error}")
                is_said = True
                time.sleep(_POLL_S)
            else:
                return

    @property
    def _open_timeout_s(self) -> float:
        """How long the first slot may take; where nodes come on demand, the time that one needs to boot as well."""
        may_grow = self._config.cluster.autoscale or bool(self._node_types)
        return self._config.slots.open_timeout_s + (_BOOT_S if may_grow else 0.0)

    def _nodes_to_come(self) -> list[dict[str, float]]:
        """The resources of every node that the policy may ask for."""
        types = self._config.cluster.node_types.values()
        return [dict(each.resources) for each in types for _ in range(each.max_nodes)]

    def _gpu_agents(self) -> Agents | None:
        """Device agents, where trials compute on GPUs."""
        devices = self._config.devices
        has_gpus = ray.cluster_resources().get("GPU", 0) > 0 or num_gpus_at_most(self._config) > 0
        if devices.use == "cpu" or (devices.use == "auto" and not has_gpus):
            return None
        turns_shares = self._config.dials.share.enabled and self._config.search.num_slots > 1
        policy = (OWN_NAME, self.namespace)
        return Agents(devices.gpu_share, turns_shares=turns_shares, token=self.namespace[-8:], policy=policy)

    def _awaits_gpus(self) -> bool:
        """Whether no node has a GPU yet and the policy may ask for one that has."""
        return num_gpus_at_most(self._config) > 0 and not gpu_nodes(ray.nodes())

    def _cpus_per_worker(self, cpus: float, num_ranks: int) -> float:
        """Equal parts of an own cluster; a core on one that may grow, so that slots spread over the nodes to come."""
        if isinstance(self.policy, RunHandle):
            return _SHARED_CPUS  # the policy actor has the accounts of cores; Ray's must not keep other runs out
        if self._config.cluster.address != "local":
            return 1.0
        return max(0.01, int(100 * min(1.0, cpus / num_ranks)) / 100)

    def slot_spec(self) -> SlotSpec:
        """What every slot of the run is made of, on the cluster this process is connected to."""
        config, ready = self._config, self._ready
        cpus = float(ray.cluster_resources().get("CPU", 1.0))
        num_ranks = config.num_ranks
        num_gpus = max(ray.cluster_resources().get("GPU", 1), num_gpus_at_most(config))
        warm_up = TrialOrder(
            trial_id=TrialId("warm-up"),
            attempt=0,
            seed=config.seed,
            job=config.job.key,
            params=dict(middle_params(config)),
            start=self.spec.start,
            limits=self.spec.limits,
            samples_per_report=1,
            max_reports=1,
            directory=str(self._run_dir / "trials" / "warm-up"),
            resume_from=None,
            num_reports_done=0,
            import_paths=self.spec.import_paths,
        )
        return SlotSpec(
            num_workers=config.trial.num_workers,
            cpus_per_worker=self._cpus_per_worker(cpus, num_ranks),
            gpus_per_worker=0.0 if ready is None else gpu_part(num_gpus, num_ranks),
            environment={} if ready is None else ready.environment,
            loop_config={
                "actor": self.address[0],
                "namespace": self.address[1],
                "send_period_s": config.telemetry.send_period_s,
                "max_units": config.cluster.num_cpus,
                "warm_up": warm_up,
                "log_level": self.spec.log_level,
                "num_slots": config.num_processes,
                "gpu_share": "" if ready is None else ready.share.value,
                "gpu_words": "" if ready is None else ready.words,
                "memory_fraction": config.devices.memory_fraction,
                "step_mode": config.devices.step_mode,
                "trials_per_slot": max(1.0, config.search.num_trials / config.search.num_slots),
            },
            storage_path=str(self._run_dir / "slots"),
            num_lanes=config.slots.lanes,
            num_slots=config.search.num_slots,
        )


def as_begun(spec: RunSpec) -> RunSpec:
    """A run that goes on alone under the policy, and with the names, with which it began among others."""
    run_dir = Path(spec.run_dir)
    head = (
        next((each for each in read_run(run_dir) if isinstance(each, RunBegan)), None) if has_entries(run_dir) else None
    )
    began = None if head is None else RunSpec.from_jsonable(dict(head.spec))
    if began is None or not began.prefix:
        return spec
    kept = {name: getattr(began, name) for name in ("policy", "policy_params", "prefix", "places", "start", "limits")}
    return dataclasses.replace(spec, **kept)


def start_actor(spec: Any, namespace: str, retry: Retry = Retry.OUTSIDE) -> Any:
    """The policy actor of a run."""
    from orchestrator.control.actor import PolicyActor

    return on_head(PolicyActor, OWN_NAME, namespace).remote(spec, namespace, retry)


def on_head(actor: type, name: str, namespace: str) -> Any:
    """An actor class of Ray's: named, detached, restarted when it dies, on the head node where its journal is."""
    return ray.remote(actor).options(
        name=name,
        namespace=namespace,
        lifetime="detached",
        num_cpus=0,
        resources=PIN_HEAD,
        max_restarts=-1,
        max_task_retries=-1,
        max_concurrency=1000,
    )


def require_room(slot: SlotSpec, to_come: Sequence[dict[str, float]] = ()) -> None:
    """Say at once when not even one slot fits the cluster, whatever is running on it now.

    Args:
        slot: what it needs.
        to_come: resources of nodes that may be asked for.

    Raises:
        UnfitEnvironmentError: it does not.
    """
    nodes = [*alive_resources(), *to_come]
    num_workers = num_workers_with_room(slot, nodes)
    if num_workers < slot.num_workers:
        words = ", ".join(f"{amount:g} {name}" for name, amount in slot.resources.items())
        raise UnfitEnvironmentError(
            f"the cluster has no room for a single trial: it needs {slot.num_workers} workers with {words} each, and"
            f" its {len(nodes)} nodes, those of cluster.node_types among them, hold {num_workers} such workers; add"
            " nodes, lower trial.num_workers, or set cluster.autoscale where nodes come on demand"
        )


def alive_resources() -> list[dict[str, float]]:
    """The resources of every node that is there."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]
