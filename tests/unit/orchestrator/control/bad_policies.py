"""Policies as users might write them on a bad day."""

from __future__ import annotations

import threading
from dataclasses import dataclass

from orchestrator.policies.plan import Plan
from orchestrator.policies.snapshot import Snapshot

release = threading.Event()


@dataclass(frozen=True)
class Raising:
    def decide(self, snapshot: Snapshot) -> Plan:
        raise ZeroDivisionError("on a bad day")


@dataclass(frozen=True)
class Never:
    def decide(self, snapshot: Snapshot) -> Plan:
        release.wait()
        raise AssertionError("nobody waits for this any more")


@dataclass(frozen=True)
class Empty:
    def decide(self, snapshot: Snapshot) -> Plan:
        return Plan(generation=snapshot.plan.generation, allocations=(), reason="")


@dataclass(frozen=True)
class Nonsense:
    def decide(self, snapshot: Snapshot) -> Plan:
        return "more for everybody"  # type: ignore[return-value]
