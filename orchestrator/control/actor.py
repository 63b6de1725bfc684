"""The policy actor: a thin Ray shell around the controller. It waits, wakes and ticks; it decides nothing.

Named and detached, restarted by Ray when its process dies; everything it must remember is in the journal. Imports
neither torch nor ray.train nor ray.tune.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import logging
import os
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from orchestrator.clock import Reading, SystemClock, read_clock
from orchestrator.control import nodes, placement, resizing
from orchestrator.control.begin import begun, begun_at_once
from orchestrator.control.controller import Answer, Controller
from orchestrator.control.nodes import NodeOrder, NodeView
from orchestrator.control.orders import Events, Outcome, Resumption, Retry, SlotHello, SlotOrder, Status
from orchestrator.control.rendezvous import Rendezvous
from orchestrator.control.request_server import serve
from orchestrator.control.silence import Silence, Silent
from orchestrator.control.spec import RunSpec
from orchestrator.control.status import StatusWriter
from orchestrator.control.together import Cluster
from orchestrator.errors import JournalError, TelemetryError
from orchestrator.hung import Process
from orchestrator.policies import build_policy
from orchestrator.policies.plan import TrialId

logger = logging.getLogger(__name__)

POLL_S = 20.0
_LOOK_S = 1.0
"""Who waits looks so often: a report may be told after a time, without anything having happened."""
_SLOW_PERIOD_S = 1.0
_STORE_DELAY_S = 0.005
_HELD_BACK_S = 0.5
"""Between two attempts while the journal cannot be written."""


class PolicyActor:
    """The methods that worker groups, the search and the driver call. Made a Ray actor by `orchestrator.driver`."""

    def __init__(
        self, spec: RunSpec, start_id: str, retry: Retry = Retry.OUTSIDE, cluster: Cluster | None = None
    ) -> None:
        if cluster is None:  # else the log would be of other people's runs as well
            logging.basicConfig(level=spec.log_level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
            log = logging.FileHandler(Path(spec.run_dir) / "policy.log")
            log.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
            logging.getLogger("orchestrator").addHandler(log)
        self._cluster = cluster
        self._clock = SystemClock()
        begin = begun if cluster is None else begun_at_once  # to wait here would hold up the other runs
        self._controller = begin(spec, self._clock, start_id, retry)
        self._policy = build_policy(spec.policy, spec.policy_params)
        self._deadline_s, self._period_s = spec.deadline_s, spec.period_s
        self._pool = concurrent.futures.ThreadPoolExecutor(max_workers=1, thread_name_prefix="policy")
        self._disk = concurrent.futures.ThreadPoolExecutor(max_workers=1, thread_name_prefix="journal")
        self._syncing: asyncio.Task[None] | None = None
        self._deciding: asyncio.Future[Any] | None = None
        self._events: dict[str, asyncio.Event] = defaultdict(asyncio.Event)
        self._wake = asyncio.Event()
        self._rendezvous = Rendezvous()
        self._status = StatusWriter(self._controller.world, self._controller.run, self._clock)
        self._silence = Silence(self._controller.world, self._controller.run)
        self._silent: list[Silent] = []
        self._ticker: asyncio.Task[None] | None = None
        self._storing: asyncio.Task[None] | None = None
        self._serving: asyncio.Task[None] | None = None
        self._is_over = False

    @property
    def controller(self) -> Controller:
        """Messages in, events and orders out."""
        return self._controller

    async def commit(self) -> None:
        """Return once everything that happened to the run is on disk, and done."""
        await self._commit()

    def abandon(self) -> None:
        """The run is nobody's any more: end its ticks, and leave its journal as it is."""
        self._is_over = True
        for task in (self._ticker, self._serving):
            if task is not None:
                task.cancel()
        with contextlib.suppress(JournalError, OSError):
            self._controller.engine.close()

    async def ready(self) -> int:
        """Process id, once the actor runs; starts the ticks."""
        self._ensure_ticks()
        return os.getpid()

    # The search.

    async def submit(self, trial_id: TrialId, params: dict[str, Any], resumption: Resumption | None = None) -> None:
        """Queue a trial, or let a known one go on."""
        self._controller.submit(trial_id, params, resumption)
        await self._commit()

    async def pause(self, trial_id: TrialId) -> None:
        """The search puts a trial aside; it commits and leaves its slot, and may be submitted again."""
        self._controller.pause(trial_id)
        await self._commit()

    async def pin(self, trial_id: TrialId, num_reports: int) -> dict[str, Any]:
        """Keep the state behind a report; the fields of a `Resumption` that names it."""
        pointer = self._controller.pin(trial_id, num_reports)
        await self._commit()
        return pointer

    async def answer(self, trial_id: TrialId, index: int) -> Answer | None:
        """Wait for report `index` of a trial; None after some seconds without one: ask again."""
        self._controller.want(trial_id, index)
        answer = await self._poll(f"trial:{trial_id}", lambda: self._controller.answer(trial_id, index))
        result: Answer | None = answer
        return result

    async def release(self, trial_id: TrialId) -> None:
        """The search has no further use for a trial."""
        self._controller.release(trial_id)
        await self._commit()

    async def interrupt(self) -> None:
        """Let every trial commit and leave."""
        self._controller.interrupt()
        await self._commit()

    # Worker groups.

    async def expect_slot(self, slot_id: str, num_workers: int | None = None) -> None:
        """The supervisor is opening a slot."""
        self._controller.expect_slot(slot_id, num_workers)

    async def clock(self) -> Reading:
        """The clock that all times of the run are told on."""
        return read_clock()

    async def attach(self, hello: SlotHello) -> int:
        """A worker group reports for work."""
        self._rendezvous.forget(hello.slot_id)
        epoch = self._controller.attach(hello)
        await self._commit()
        return epoch

    async def watch(self, slot_id: str, epoch: int, incarnation: str, seq: int) -> SlotOrder | None:
        """Wait until the slot's order differs from the one seen; None when the epoch is over."""

        def look() -> tuple[SlotOrder | None] | None:
            order = self._controller.order(slot_id, epoch)
            is_news = order is None or (order.incarnation, order.seq) != (incarnation, seq)
            return (order,) if is_news else None

        found = await self._poll(f"slot:{slot_id}", look)
        return self._controller.order(slot_id, epoch) if found is None else found[0]

    async def tell(self, slot_id: str, epoch: int, attempt: tuple[TrialId, int], rank: int, events: Events) -> bool:
        """What a rank says happened."""
        self._ensure_ticks()
        came_s = self._clock.now_s()
        self._silence.take(attempt, rank, events.beat, came_s)
        try:
            is_current = self._controller.take_events(slot_id, epoch, attempt, rank, events)
            await self._commit()
            if events.acks and self._cluster is not None:
                await self._cluster.offer()
            if events.records or events.reports:
                await self._store()
        except TelemetryError as error:
            logger.warning("telemetry.refused slot=%s rank=%d: %s", slot_id, rank, error)
            return True
        finally:
            self._silence.taken(attempt, rank, self._clock.now_s() - came_s)
        return is_current

    async def silent(self) -> tuple[int, list[Silent]]:
        """Process id, and the ranks that give no sign of life."""
        return os.getpid(), self._silent

    async def silence_found(self, silent: Silent, found: Process, is_restarted: bool) -> None:
        """What the driver found of a silent rank, before it ends it."""
        self._controller.silence_found(silent, found, is_restarted=is_restarted)
        await self._commit()

    async def leave(
        self, slot_id: str, epoch: int, attempt: tuple[TrialId, int], rank: int, outcome: Outcome
    ) -> Outcome | None:
        """Meet the other ranks of a slot; the common outcome, or None when not all came in time."""
        world_size = self._controller.world_size(slot_id)
        meeting = f"{slot_id}:{epoch}:{attempt}"
        agreed = await self._rendezvous.meet(meeting, slot_id, rank, world_size, outcome)
        if agreed is None and outcome.status in {Status.FAILED, Status.MEMORY, Status.TIER}:
            self._controller.poison_slot(slot_id, epoch, outcome)
            await self._commit()
        return agreed

    async def finish(self, slot_id: str, epoch: int, attempt: tuple[TrialId, int], outcome: Outcome) -> None:
        """All ranks have left the trial."""
        self._controller.finish(slot_id, epoch, attempt, outcome)
        await self._commit()

    # The driver.

    async def fault(self, slot_id: str, epoch: int, reason: str) -> None:
        """A GPU failed under a slot."""
        self._controller.suspect(slot_id, epoch, reason)
        await self._commit()

    async def take_device_samples(self, samples: list[dict[str, Any]]) -> None:
        """What the agent of a GPU node saw."""
        if not self._is_over:
            self._controller.checks.take_samples(samples)
            self._controller.engine.telemetry.append_devices(self._status.take_samples(samples))

    async def lose_slot(self, slot_id: str, reason: str) -> None:
        """A slot ended without being told to."""
        self._controller.lose_slot(slot_id, reason)
        await self._commit()

    async def close_slot(self, slot_id: str) -> None:
        """Tell a slot to end when it is idle."""
        self._controller.close_slot(slot_id)
        await self._commit()

    async def slot_closed(self, slot_id: str) -> None:
        """A slot's loop returned as told."""
        self._controller.slot_closed(slot_id)
        await self._commit()

    async def nodes(self, present: tuple[NodeView, ...]) -> None:
        """The cluster's nodes, whenever they change."""
        self._controller.take_nodes(present)
        await self._commit()

    async def node_order(self) -> NodeOrder:
        """The nodes that the cluster shall be asked for, and those that are let go."""
        return nodes.order(self._controller.world, self._controller.run)

    async def num_slots_worth(self) -> int:
        """Slots that have something to do or would have at once: what a larger cluster would be paid for."""
        run = self._controller.run
        return len(run.queue) + len(run.running())

    async def status(self) -> dict[str, Any]:
        """The content of status.json, now."""
        return self._status.now()

    async def set_state(self, state: str) -> None:
        """The driver says how the run stands: starting, running, stopping."""
        self._status.run_state = state
        self._write_status()

    async def wants_slot(self) -> bool:
        """Whether a closed slot should be opened again."""
        return placement.wants_slot(self._controller.world, self._controller.run)

    async def slots_to_open(self) -> tuple[int, ...]:
        """Sizes of slots that trials wait for which change their number of ranks."""
        return resizing.slots_to_open(self._controller.world, self._controller.run)

    async def give_up(self, reason: str) -> None:
        """No slot will ever open: whoever waits for a report is told so."""
        self._controller.give_up(reason)
        await self._commit()

    async def end_run(self, state: str) -> None:
        """Close journal and tables; the actor is of no use afterwards.

        Raises:
            JournalError, TelemetryError: there is no room for what waits to be written; ask again.
        """
        if state == "done":
            self._controller.end_paused()
        await self._commit()
        if not self._controller.engine.telemetry.flush():
            raise TelemetryError(self._controller.engine.telemetry.alarm)
        for task in (self._ticker, self._serving):
            if task is not None:
                task.cancel()
        self._is_over = True
        self._status.run_state = state
        self._status.trouble, self._status.alarms = None, ()
        self._write_status()
        try:
            self._controller.engine.close()
        except TelemetryError as error:  # its segments are there, and are read as well as what they would become
            logger.warning("telemetry.kept %s", error)

    # Inside.

    def _ensure_ticks(self) -> None:
        if self._ticker is None and not self._is_over:
            self._ticker = asyncio.get_running_loop().create_task(self._tick_for_ever())
            self._serving = asyncio.get_running_loop().create_task(serve(self._controller, self._commit))

    async def _commit(self) -> None:
        """Return once everything that happened is on disk and what follows is done; messages of a moment share a sync.

        Raises:
            JournalError: it cannot be written now; the sender of the message sends it again.
        """
        self._ensure_ticks()
        while not self._controller.engine.is_durable:
            if self._syncing is None:
                self._syncing = asyncio.get_running_loop().create_task(self._sync())
            await asyncio.shield(self._syncing)
        self._controller.engine.perform()
        slots, trials = self._controller.engine.take_changes()
        for key in [*(f"slot:{slot_id}" for slot_id in slots), *(f"trial:{trial_id}" for trial_id in trials)]:
            self._events.pop(key, asyncio.Event()).set()
        if self._controller.engine.wants_decision:
            self._wake.set()

    async def _sync(self) -> None:
        try:
            await asyncio.get_running_loop().run_in_executor(self._disk, self._controller.engine.sync)
        finally:
            self._syncing = None

    async def _poll(self, key: str, look: Callable[[], Any]) -> Any:
        """What `look` finds, as soon as it is not None; None after `POLL_S`."""
        deadline_s = asyncio.get_running_loop().time() + POLL_S
        while True:
            await self._commit()
            if (found := look()) is not None:
                return found
            event = self._events[key]
            left_s = deadline_s - asyncio.get_running_loop().time()
            try:
                await asyncio.wait_for(event.wait(), max(0.0, min(left_s, _LOOK_S)))
            except TimeoutError:
                if left_s <= _LOOK_S:
                    return None
                self._controller.advance_rungs()

    async def _store(self) -> None:
        """Return once the records taken so far are in their file; messages of the same moment share one write.

        Raises:
            JournalError: the disk takes none. What is answered must survive this process: the sender sends it again.
        """
        if self._storing is None:
            self._storing = asyncio.get_running_loop().create_task(self._store_soon())
        await asyncio.shield(self._storing)
        alarm = self._controller.engine.telemetry.alarm
        if alarm is not None:
            raise JournalError(alarm)

    async def _store_soon(self) -> None:
        await asyncio.sleep(_STORE_DELAY_S)
        self._storing = None  # records that come from here on wait for the next write
        self._controller.engine.telemetry.flush()

    async def _tick_for_ever(self) -> None:
        """Decide every period and at once when trials come or go; the first of three places that catch everything."""
        loop = asyncio.get_running_loop()
        next_slow_s = loop.time()
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), self._period_s)
            try:
                await self._commit()
                self._wake.clear()
                await self._decide()
                if loop.time() >= next_slow_s:
                    next_slow_s = loop.time() + _SLOW_PERIOD_S
                    self._look_after_all()
                await self._commit()
            except JournalError as error:
                logger.warning("nothing is decided: %s", error)
                self._hold_back()
                await asyncio.sleep(_HELD_BACK_S)
            except Exception:
                logger.exception("a tick failed; the plan in force stays")

    def _look_after_all(self) -> None:
        """What is done about once a second."""
        controller = self._controller
        self._look_for_silence()
        self._status.trouble = controller.engine.trouble
        alarm = controller.engine.telemetry.alarm
        self._status.alarms = () if alarm is None else (alarm,)
        try:
            controller.look_at_trials()
            controller.close_idle_slots()
            controller.admit()
            controller.advance_rungs()
        finally:
            controller.engine.telemetry.append_devices(self._status.sample_devices())
            controller.engine.telemetry.flush()
            controller.engine.rotate()
            self._write_status()

    def _hold_back(self) -> None:
        """Say why nothing is decided; training goes on meanwhile."""
        self._look_for_silence()
        self._status.trouble = self._controller.engine.trouble
        self._write_status()

    def _look_for_silence(self) -> None:
        controller = self._controller
        engine = controller.engine
        is_held_up = engine.trouble is not None or engine.telemetry.alarm is not None
        self._silent = self._silence.look(engine.now_s, is_held_up=is_held_up)
        controller.note_silence(self._silent)

    def _write_status(self) -> None:
        with contextlib.suppress(OSError):  # a full disk: the last one stays
            self._status.write()

    async def _decide(self) -> None:
        """One decision: snapshot, policy in its own thread with a deadline, plan."""
        controller = self._controller
        is_urgent, controller.engine.wants_decision = controller.engine.wants_decision, False
        if self._cluster is not None:
            await self._cluster.decide(is_urgent=is_urgent)
            return
        controller.learn()
        snapshot = controller.snapshot()
        if snapshot is None:
            return
        if self._deciding is not None and not self._deciding.done():
            controller.refuse(snapshot, "the policy still has not returned from an earlier decision")
            controller.offer()
            return
        self._deciding = asyncio.get_running_loop().run_in_executor(self._pool, self._policy.decide, snapshot)
        try:
            plan = await asyncio.wait_for(asyncio.shield(self._deciding), self._deadline_s)
        except TimeoutError:
            controller.refuse(snapshot, f"the policy took longer than its deadline of {self._deadline_s:g} s")
        except Exception as error:  # a user's policy may raise anything
            logger.exception("the policy raised")
            controller.refuse(snapshot, f"the policy raised {type(error).__name__}: {error}")
        else:
            controller.accept(snapshot, plan)
        controller.offer()
