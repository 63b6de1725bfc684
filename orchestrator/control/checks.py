"""Whether the shares in force are real: looks at every running trial once a second, and says what deviates.

Compares what the ledger granted and the mechanism claims with what telemetry shows (`share.verification` judges). Takes
only what is there already, so nothing here waits and training notices nothing. A verdict goes into the journal once per
allocation; the status shows the newest of each kind. Changes no decision.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

from orchestrator.control.events import Event, ShareChecked
from orchestrator.control.grants import Account
from orchestrator.control.memory import CONTEXT_BYTES
from orchestrator.control.orders import Grant, SlotHello
from orchestrator.control.signals import CheckMade
from orchestrator.control.world import Run, Trial, World
from orchestrator.policies.plan import DeviceId, Generation, TrialId
from orchestrator.policies.snapshot import DeviceKind
from orchestrator.share.contention import Contention
from orchestrator.share.verification import (
    MIN_STEPS,
    Check,
    Subject,
    Verdict,
    judge_cpu,
    judge_memory,
    unobservable,
)

logger = logging.getLogger(__name__)

SETTLE_S = 1.0
"""Seconds after a neighbour came or went that are left out."""

MEASURED_S = 2.0
"""Seconds of steps that a step time is taken over, so that one commit or capture next door is no verdict."""


class ShareChecks:
    """The checks of one run."""

    def __init__(self, world: World, run: Run) -> None:
        self._world, self._run = world, run
        self._processes: dict[DeviceId, dict[int, int] | None] = {}
        self._contention: dict[TrialId, Contention] = {}
        self._beside: dict[TrialId, tuple[frozenset[str], float]] = {}
        self._said: set[tuple[TrialId, int, Subject, Verdict]] = set()
        self._computing: dict[TrialId, frozenset[DeviceId]] = {}

    def take_samples(self, samples: Iterable[Mapping[str, Any]]) -> None:
        """Remember what each process holds of the GPUs that an agent looked at."""
        for sample in samples:
            found = sample.get("processes")
            self._processes[sample["device_id"]] = None if found is None else {int(pid): used for pid, used in found}

    def observe(self, now_s: float) -> list[Event]:
        """Check the share of every trial that runs with its newest grant; what was seen."""
        running = {trial.trial_id: trial for trial in self._run.running()}
        for gone in self._beside.keys() - running.keys():
            del self._beside[gone]
            self._contention.pop(gone, None)
        self._said = {said for said in self._said if said[0] in running}
        self._computing = self._who_computes(now_s)
        found: list[Event] = []
        for trial in running.values():
            slot, account = self._world.slot_of(trial), trial.account
            if slot is None or slot.hello is None or account is None or account.applied is None or account.offers:
                continue
            if account.applied.settings.share <= 0:
                continue
            for check in self._checks(trial, slot.hello, account, account.applied, now_s):
                found += self._noted(trial.trial_id, account.applied.generation, check)
        return found

    def _checks(self, trial: Trial, hello: SlotHello, account: Account, grant: Grant, now_s: float) -> list[Check]:
        devices = [self._world.devices[each] for each in account.placement if each in self._world.devices]
        if devices and all(device.kind is DeviceKind.CPU for device in devices):
            usage = None if trial.window is None else trial.window.usage()
            is_current = usage is not None and abs(usage.cores - grant.amount) < 1e-3
            return [judge_cpu(grant.amount, usage if is_current else None)]
        found = []
        if "compute" in hello.enforces:
            found.append(self._neighbours(trial, account, grant, now_s))
        if "memory" in hello.enforces and hello.memory_cap_bytes:
            found.append(self._memory(trial, hello, hello.memory_cap_bytes, now_s))
        return found

    def _memory(self, trial: Trial, hello: SlotHello, cap_bytes: int, now_s: float) -> Check:
        """NVML's count of whole processes where it shows them, else what the ranks' own allocators say."""
        used = [
            (self._processes.get(device_id) or {}).get(pid)
            for device_id, pid in zip(hello.placement, hello.pids, strict=False)
        ]
        seen = [each for each in used if each is not None]
        if seen:
            return judge_memory(cap_bytes + CONTEXT_BYTES, max(seen), "the fullest rank with its context, by NVML")
        own = None if trial.window is None else trial.window.view(now_s).memory_bytes
        if own is not None:
            return judge_memory(cap_bytes, own, "the ranks' own peak: NVML shows none of their processes")
        return judge_memory(cap_bytes, None, "NVML shows none of its processes, and no step has told its peak")

    def _neighbours(self, trial: Trial, account: Account, grant: Grant, now_s: float) -> Check:
        trial_id, own = trial.trial_id, set(account.placement)
        neighbours = frozenset(key for key, devices in self._computing.items() if key != trial_id and devices & own)
        crowd, since_s = self._beside.get(trial_id, (None, 0.0))
        if crowd != neighbours:
            since_s = now_s
            self._beside[trial_id] = neighbours, since_s
        stretch = None if trial.window is None else trial.window.stretch(since_s + SETTLE_S)
        is_enough = stretch is not None and stretch.num_steps >= MIN_STEPS and stretch.seconds >= MEASURED_S
        if stretch is None or not is_enough or stretch.generation != grant.generation:
            return unobservable(Subject.NEIGHBOURS, "times", "too few steps since its share or its neighbours changed")
        settings = account.settings or grant.settings
        key = (grant.amount, settings.micro_batch, settings.grad_accum, settings.tier, stretch.is_replayed)
        step_s = stretch.seconds / stretch.num_steps
        return self._contention.setdefault(trial_id, Contention()).note(key, neighbours, step_s)

    def _who_computes(self, now_s: float) -> dict[TrialId, frozenset[DeviceId]]:
        """The devices of every trial that computes now; none where cores alone are shared, which nobody asks about."""
        if all(device.kind is DeviceKind.CPU for device in self._world.devices.values()):
            return {}
        return {
            trial.trial_id: frozenset(trial.account.placement)
            for trial in self._run.trials.values()
            if trial.account is not None
            and trial.account.held_share() > 0
            and trial.window is not None
            and trial.window.stretch(now_s - 2 * SETTLE_S) is not None
        }

    def _noted(self, trial_id: TrialId, generation: int, check: Check) -> list[Event]:
        """The newest check of its kind; an entry of the journal once per allocation and verdict."""
        made = CheckMade(trial_id=trial_id, check=check)
        said = (trial_id, generation, check.what, check.verdict)
        if check.verdict is Verdict.NOT_OBSERVABLE or said in self._said:
            return [made]
        self._said.add(said)
        if check.verdict is Verdict.NOT_HELD:
            logger.warning("share.not_held trial=%s plan=%d %s", trial_id, generation, check.reason)
        entry = ShareChecked(
            generation=Generation(generation),
            trial_id=trial_id,
            what=check.what.value,
            expected=check.expected,
            observed=check.observed,
            unit=check.unit,
            verdict=check.verdict.value,
            reason=check.reason,
        )
        return [made, entry]
