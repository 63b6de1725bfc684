"""The policy actor that the runs of a cluster share: a thin Ray shell. Each run has its part, all are decided together.

Named and detached, restarted by Ray when its process dies: which runs there are is in a file of its own, everything
else in their journals. Imports neither torch nor ray.train nor ray.tune.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import json
import logging
import time
import uuid
from pathlib import Path
from typing import Any

from orchestrator.control.actor import PolicyActor
from orchestrator.control.cluster_spec import ClusterSpec
from orchestrator.control.events import RunBegan
from orchestrator.control.grants import held
from orchestrator.control.journal import has_entries, read_run
from orchestrator.control.orders import Retry
from orchestrator.control.spec import RunSpec
from orchestrator.control.together import Together
from orchestrator.control.world import Run, TrialState, World
from orchestrator.errors import JournalError, OrchestratorError
from orchestrator.names import write_atomically
from orchestrator.policies import build_policy
from orchestrator.policies.snapshot import Quota
from orchestrator.run_dirs import is_driver_gone

logger = logging.getLogger(__name__)

REGISTRY = "cluster.json"
_LOOK_S = 2.0
_SILENT_S = 90.0
"""Without a call for so long a run is nobody's: its driver, slots and search each call every 20 s at least."""


class ClusterActor:
    """What drivers, worker groups, searches and people call. Made a Ray actor by `orchestrator up`."""

    def __init__(self, spec: ClusterSpec) -> None:
        logging.basicConfig(level="INFO", format="%(asctime)s %(levelname)s %(name)s: %(message)s")
        Path(spec.storage).mkdir(parents=True, exist_ok=True)
        log = logging.FileHandler(Path(spec.storage) / "cluster.log")
        log.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        logging.getLogger("orchestrator").addHandler(log)
        self._together = Together()
        self._runs: dict[str, PolicyActor] = {}
        self._called_s: dict[str, float] = {}
        self._registry: dict[str, dict[str, Any]] = {}
        self._pool = concurrent.futures.ThreadPoolExecutor(max_workers=1, thread_name_prefix="policy")
        self._deciding: asyncio.Task[None] | None = None
        self._answering: asyncio.Future[Any] | None = None
        self._looking: asyncio.Task[None] | None = None
        self._busy_s, self._decided_s, self._is_late = time.monotonic(), 0.0, False
        self._configure(spec)
        self._recover()

    async def ready(self) -> dict[str, Any]:
        """What the actor is for; starts to look after its runs."""
        self._ensure_looking()
        return dataclasses.asdict(self._spec)

    async def change(self, spec: ClusterSpec) -> str:
        """Take other quotas, another idle time-out or, while there is no run, another policy; why not, if not."""
        old = self._spec
        is_other = (spec.policy, spec.policy_params, spec.places) != (old.policy, old.policy_params, old.places)
        if spec.version != old.version:
            return self._other_version(spec.version)
        if is_other and self._runs:
            text = f"{len(self._runs)} runs are decided by {old.policy}, as {old.owner} has set it"
            return f"{text}; allowed: the same policy, or another one once they have ended"
        self._configure(dataclasses.replace(spec, storage=old.storage))
        self._save()
        return ""

    async def join(self, spec: RunSpec, start_id: str, version: str, retry: Retry = Retry.OUTSIDE) -> dict[str, str]:
        """Take a run in; its `run` is what calls for it begin with, or `error` says why not."""
        if version != self._spec.version:
            return {"error": self._other_version(version)}
        try:
            joined = self._as_joined(spec)
            if isinstance(joined, str):
                return {"error": joined}
            self._begin(joined, start_id, retry)
        except (OrchestratorError, OSError) as error:
            return {"error": str(error)}
        self._save()
        return {"run": joined.prefix.rstrip("/")}

    async def leave(self, run: str) -> None:
        """A run has ended."""
        self._drop(run)

    async def call(self, run: str, method: str, *arguments: Any) -> Any:
        """Call a method of a run's part.

        Raises:
            OrchestratorError: the run has ended, or never joined.
        """
        self._ensure_looking()
        part = self._runs.get(run)
        if part is None or method.startswith("_"):
            raise OrchestratorError(f"run {run} is not one of this policy actor's")
        self._called_s[run] = time.monotonic()
        return await getattr(part, method)(*arguments)

    async def queue(self) -> dict[str, Any]:
        """The runs, what each holds and what its trials wait for."""
        rows = []
        for run, part in self._runs.items():
            controller = part.controller
            rows.append({"run": run, **_row_of(controller.world, controller.run)})
        spec = self._spec
        shown = {"policy": spec.policy, "owner": spec.owner, "version": spec.version, "quotas": dict(spec.quotas)}
        return {**shown, "runs": sorted(rows, key=lambda row: (-row["priority"], row["name"]))}

    async def decide(self, *, is_urgent: bool = True) -> None:
        """Decide for all runs; who asks while a decision is on its way waits for that one."""
        if not is_urgent and time.monotonic() < self._decided_s + self._spec.period_s:
            return  # each run asks every period
        if self._deciding is None or self._deciding.done():
            self._deciding = asyncio.get_running_loop().create_task(self._decide_until_settled())
        else:
            self._is_late = self._is_late or is_urgent  # what happened may not be in the snapshot of that decision
        await asyncio.shield(self._deciding)

    async def offer(self) -> None:
        """A run gave something back: offer it to whoever waits for it."""
        self._together.offer()
        await self._commit()

    # Inside.

    def _ensure_looking(self) -> None:
        if self._looking is None:
            self._looking = asyncio.get_running_loop().create_task(self._look_for_ever())

    def _configure(self, spec: ClusterSpec) -> None:
        self._spec = spec
        self._policy = build_policy(spec.policy, spec.policy_params)
        hidden = RunSpec.hidden_name
        self._together.quotas = tuple(Quota(user=hidden(user), max_devices=most) for user, most in spec.quotas.items())

    def _as_joined(self, spec: RunSpec) -> RunSpec | str:
        """A run's view of itself among others; why it cannot join, if it cannot."""
        prefix, ours = f"r{uuid.uuid4().hex[:8]}/", self._spec
        if has_entries(Path(spec.run_dir)):
            head = next((event for event in read_run(Path(spec.run_dir)) if isinstance(event, RunBegan)), None)
            began = None if head is None else RunSpec.from_jsonable(dict(head.spec))
            if began is None or not began.prefix:
                return "it began alone, and its decisions were for it alone; allowed: `orchestrator down` first"
            if (began.policy, dict(began.policy_params)) != (ours.policy, dict(ours.policy_params)):
                return f"it began under policy {began.policy}, and here all are decided by {ours.policy}"
            prefix = began.prefix
        return ours.joined(spec, prefix)

    def _begin(self, spec: RunSpec, start_id: str, retry: Retry = Retry.OUTSIDE) -> None:
        run = spec.prefix.rstrip("/")
        for known in [key for key, entry in self._registry.items() if entry["spec"]["run_dir"] == spec.run_dir]:
            self._drop(known)  # its driver was started anew
        part = PolicyActor(spec, start_id, retry, self)
        self._runs[run], self._called_s[run] = part, time.monotonic()
        self._together.join(part.controller)
        self._registry[run] = {"start_id": start_id, "spec": spec.to_jsonable()}
        self._busy_s = time.monotonic()
        logger.info("run.joined %s", run)

    def _drop(self, run: str) -> None:
        part = self._runs.pop(run, None)
        self._registry.pop(run, None)
        self._called_s.pop(run, None)
        if part is not None:
            self._together.leave(f"{run}/")
            part.abandon()
            self._busy_s = time.monotonic()
            self._save()
            logger.info("run.left %s", run)

    def _recover(self) -> None:
        """Take up the runs that an earlier process of this actor had."""
        try:
            found = json.loads((Path(self._spec.storage) / REGISTRY).read_text())
            known, self._registry = dict(found["runs"]), {}
            if found["version"] != self._spec.version:
                return
        except (OSError, ValueError, KeyError, TypeError):
            return
        for run, entry in known.items():
            try:
                self._begin(RunSpec.from_jsonable(dict(entry["spec"])), str(entry["start_id"]))
            except (OrchestratorError, OSError, KeyError, TypeError) as error:
                logger.error("run %s cannot be taken up: %s", run, error)

    def _save(self) -> None:
        with contextlib.suppress(OSError):
            text = json.dumps({"version": self._spec.version, "runs": self._registry})
            write_atomically(Path(self._spec.storage) / REGISTRY, text)

    def _other_version(self, version: str) -> str:
        return (
            f"this is version {version} of the orchestrator, and the cluster's policy actor is of version"
            f" {self._spec.version}; allowed: that version, or `orchestrator down` once its runs have ended"
        )

    async def _decide_until_settled(self) -> None:
        """Decide, and once more for whoever came too late for it."""
        self._is_late = True
        while self._is_late:
            self._is_late = False
            await self._decide()

    async def _decide(self) -> None:
        """One decision: snapshot of all runs, policy in its own thread with a deadline, plan."""
        self._decided_s = time.monotonic()
        scene = self._together.scene()
        if scene is None:
            return
        if self._answering is not None and not self._answering.done():
            self._together.refuse(scene, "the policy still has not returned from an earlier decision")
        else:
            loop, limit_s = asyncio.get_running_loop(), self._spec.deadline_s
            self._answering = loop.run_in_executor(self._pool, self._policy.decide, scene.snapshot)
            try:
                plan = await asyncio.wait_for(asyncio.shield(self._answering), limit_s)
            except TimeoutError:
                self._together.refuse(scene, f"the policy took longer than its deadline of {limit_s:g} s")
            except Exception as error:  # a user's policy may raise anything
                logger.exception("the policy raised")
                self._together.refuse(scene, f"the policy raised {type(error).__name__}: {error}")
            else:
                self._together.accept(scene, plan)
        self._together.offer()
        await self._commit()

    async def _commit(self) -> None:
        for part in list(self._runs.values()):
            with contextlib.suppress(JournalError):  # a full disk of one run: its own ticks say so
                await part.commit()

    async def _look_for_ever(self) -> None:
        """Let go of runs whose drivers are gone, and end when there has been no run for long."""
        while True:
            await asyncio.sleep(_LOOK_S)
            for run, part in list(self._runs.items()):
                is_silent = time.monotonic() - self._called_s[run] > _SILENT_S
                if is_silent or is_driver_gone(Path(part.controller.run.spec.run_dir)):
                    logger.warning("run.lost %s: its driver is gone", run)
                    self._drop(run)
                    await self.decide()
            if not self._runs and time.monotonic() - self._busy_s > self._spec.idle_timeout_s:
                import ray

                ray.get_runtime_context().current_actor.down.remote()  # only a call of the actor's can end it for good

    async def down(self) -> None:
        """End; Ray does not start the actor again."""
        import ray

        for run in list(self._runs):
            self._drop(run)
        ray.actor.exit_actor()


def _row_of(world: World, run: Run) -> dict[str, Any]:
    """What a run holds, and what its trials wait for."""
    waiting = run.waiting()
    accounts = run.accounts()
    rows = [row for trial in waiting if (row := run.plan.allocation(trial.trial_id)) is not None]
    reason = rows[0].reason if rows else "a slot" if waiting else ""
    return {
        "name": run.spec.run_id,
        "user": run.terms.user,
        "priority": run.terms.priority,
        "weight": run.terms.weight,
        "num_running": len(run.running()),
        "num_waiting": len(waiting),
        "num_ended": sum(trial.state.is_final for trial in run.trials.values()),
        "num_paused": sum(trial.state is TrialState.PAUSED for trial in run.trials.values()),
        "devices": round(sum(held(accounts, device_id) for device_id in world.devices), 6),
        "waits_for": reason,
    }
