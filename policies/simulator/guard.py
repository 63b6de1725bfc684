"""Asking a policy, whoever wrote it: what it raises, returns or fails to return becomes one clear error.

The same invariants as in a live run are checked, by the same code. Called by the engine and by the replay of a journal.
"""

from __future__ import annotations

import queue
import threading
import traceback
from dataclasses import dataclass, field

from orchestrator.policies.invariants import check
from orchestrator.policies.plan import Plan
from orchestrator.policies.policy import Policy
from orchestrator.policies.snapshot import Snapshot

DEFAULT_LIMIT_S = 120.0
_MAX_VIOLATIONS = 3


class PolicyFaultError(ValueError):
    """A policy raised, returned an illegal plan or did not return. Its text says when, what and where."""


@dataclass(slots=True)
class Guard:
    """One policy under supervision.

    Decisions are made in a thread of their own, because nothing else can leave one that never ends. After that has
    happened the thread is lost, and the guard with it.

    Attributes:
        policy: whom to ask.
        name: what errors call it.
        limit_s: seconds that one decision may take.
        num_decisions: how many were made.
    """

    policy: Policy
    name: str
    limit_s: float = DEFAULT_LIMIT_S
    num_decisions: int = 0
    _questions: queue.SimpleQueue[Snapshot | None] = field(default_factory=queue.SimpleQueue)
    _answers: queue.SimpleQueue[object] = field(default_factory=queue.SimpleQueue)
    _thread: threading.Thread | None = None

    def decide(self, snapshot: Snapshot) -> Plan:
        """A legal plan.

        Raises:
            PolicyFaultError: there is none.
        """
        self.num_decisions += 1
        if self._thread is None:
            self._thread = threading.Thread(target=self._serve, name=f"policy {self.name}", daemon=True)
            self._thread.start()
        self._questions.put(snapshot)
        try:
            answer = self._answers.get(timeout=self.limit_s)
        except queue.Empty:
            raise PolicyFaultError(
                f"{self._where(snapshot)}: no plan after {self.limit_s:g} s; allowed: one within that time, from a "
                "policy that always ends"
            ) from None
        if isinstance(answer, BaseException):
            raise PolicyFaultError(
                f"{self._where(snapshot)}: raised {type(answer).__name__}: {answer}{_place(answer)}"
            ) from answer
        violations = check(snapshot, answer)
        if violations:
            texts = [violation.text for violation in violations[:_MAX_VIOLATIONS]]
            more = f" and {len(violations) - len(texts)} more" if len(violations) > len(texts) else ""
            raise PolicyFaultError(f"{self._where(snapshot)}: an illegal plan: {'; '.join(texts)}{more}")
        assert isinstance(answer, Plan)
        return answer

    def close(self) -> None:
        """Let the thread end."""
        if self._thread is not None:
            self._questions.put(None)
            self._thread = None

    def _serve(self) -> None:
        while (snapshot := self._questions.get()) is not None:
            try:
                self._answers.put(self.policy.decide(snapshot))
            except BaseException as error:
                self._answers.put(error)

    def _where(self, snapshot: Snapshot) -> str:
        return (
            f"policy {self.name!r}, decision {self.num_decisions} at {snapshot.now_s:g} s with "
            f"{len(snapshot.trials)} trials on {len(snapshot.devices)} devices"
        )


def _place(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    return f" (line {frames[-1].lineno} of {frames[-1].name})" if frames else ""
