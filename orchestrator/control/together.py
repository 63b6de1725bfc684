"""Runs that are decided together: one snapshot of all their trials, one plan, and each run's part in its own journal.

Each run keeps its controller, with its world and its journal; here they are made neighbours, so that no device is
over-committed between them. No Ray, no clock, no files. What it holds is made anew when runs join again.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from orchestrator.control import events as ev
from orchestrator.control.controller import Controller
from orchestrator.control.events import SPARE_REASON
from orchestrator.control.joint import joined, parts_of
from orchestrator.errors import JournalError
from orchestrator.policies.decide.fair_share import FairShare
from orchestrator.policies.invariants import check
from orchestrator.policies.plan import Plan
from orchestrator.policies.snapshot import Quota, Snapshot

logger = logging.getLogger(__name__)


class Cluster(Protocol):
    """Who decides where several runs share a policy."""

    async def decide(self, *, is_urgent: bool) -> None:
        """Decide for all of them; not again so soon where nothing is urgent."""
        ...

    async def offer(self) -> None:
        """Something was given back: offer it to whoever waits for it, in whichever run."""
        ...


@dataclass(frozen=True, slots=True)
class Scene:
    """What a policy decides on: what each run sees, by prefix, and all of it in one."""

    parts: Mapping[str, Snapshot]
    snapshot: Snapshot


class Together:
    """The runs under one policy.

    Attributes:
        controllers: one per run, by the prefix of its trials.
        quotas: those of the cluster, for users as snapshots call them.
    """

    def __init__(self) -> None:
        self.controllers: dict[str, Controller] = {}
        self.quotas: tuple[Quota, ...] = ()
        self._last_refusal = ""
        self._gone: dict[str, Plan] = {}

    def join(self, controller: Controller) -> None:
        """One more run."""
        prefix = controller.run.spec.prefix
        assert prefix, "a run that shares a policy has a prefix"
        for other_prefix, other in self.controllers.items():
            other.world.neighbours[prefix] = controller.world
            controller.world.neighbours[other_prefix] = other.world
        self.controllers[prefix] = controller

    def leave(self, prefix: str) -> None:
        """A run has ended, or its driver is gone; what it held is free."""
        gone = self.controllers.pop(prefix, None)
        if gone is None:
            return
        gone.world.neighbours.clear()
        self._gone[prefix] = gone.run.plan  # until the next plan: the policy shall see that its trials have gone
        for other in self.controllers.values():
            other.world.neighbours.pop(prefix, None)

    def scene(self) -> Scene | None:
        """The world as a policy sees it, with what was learned since the last time; None without a trial."""
        parts: dict[str, Snapshot] = {}
        for prefix, controller in self.controllers.items():
            controller.learn()
            seen = controller.snapshot()
            if seen is not None:
                parts[prefix] = seen
        if not parts:
            return None
        plans = {prefix: controller.run.plan for prefix, controller in self.controllers.items()}
        return Scene(parts, joined(parts, {**self._gone, **plans}, self.quotas))

    def accept(self, scene: Scene, plan: Plan) -> bool:
        """Take a plan that breaks no invariant: each run journals it, and makes its part the target."""
        violations = check(scene.snapshot, plan)
        if violations:
            self.refuse(scene, "the plan breaks invariants", tuple(violation.text for violation in violations))
            return False
        self._last_refusal, self._gone = "", {}
        shared = ev.PlanCommitted.of(scene.snapshot, plan)
        for prefix, seen in scene.parts.items():
            controller = self.controllers.get(prefix)
            if controller is None:
                continue
            entry = replace(shared, prefix=prefix, decoded=parts_of(scene.snapshot, plan, prefix))
            try:
                controller.take_part(seen, entry)
            except JournalError as error:  # its disk is full: the others go on
                logger.warning("%s stays at its plan: %s", prefix, error)
        return True

    def refuse(self, scene: Scene, reason: str, violations: tuple[str, ...] = ()) -> None:
        """Note in every run why a decision was not taken, once per reason, and serve trials without an allocation."""
        story = f"{reason}: {'; '.join(violations)}"
        if story != self._last_refusal:
            self._last_refusal = story
            logger.warning("plan.refused %s; the plans in force stay", story)
            for prefix in scene.parts:
                if (controller := self.controllers.get(prefix)) is not None:
                    in_force = controller.run.plan.generation
                    refusal = ev.PlanRefused(generation=in_force, reason=reason, violations=violations)
                    with contextlib.suppress(JournalError):
                        controller.engine.emit(refusal)
        if all(scene.snapshot.plan.allocation(trial.trial_id) is not None for trial in scene.snapshot.trials):
            return
        spare = replace(FairShare().decide(scene.snapshot), reason=f"{SPARE_REASON} ({reason})")
        if not check(scene.snapshot, spare):
            self.accept(scene, spare)

    def offer(self) -> None:
        """Offer what can be granted now, in all runs: what one gave back another may get."""
        for prefix, controller in self.controllers.items():
            try:
                controller.offer()
            except JournalError as error:
                logger.warning("%s is offered nothing: %s", prefix, error)
