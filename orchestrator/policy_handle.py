"""The policy actor as a worker group, a stand-in and a driver call it: one of their own, or one that many runs share.

An address is the actor's name, and for a shared one `name#run`: then each call goes to that run. A handle is used like
Ray's own: `handle.method.remote(arguments)`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ray

OWN_NAME = "policy"
"""Of the actor that a run starts for itself, in a namespace of its own."""
SHARED_NAME, SHARED_NAMESPACE = "policy", "orchestrator-cluster"
"""Of the actor that `orchestrator up` starts."""


@dataclass(frozen=True, slots=True)
class _Method:
    actor: Any
    run: str
    name: str

    def remote(self, *arguments: Any) -> Any:
        """Call it for the run."""
        return self.actor.call.remote(self.run, self.name, *arguments)


@dataclass(frozen=True)
class RunHandle:
    """One run of a shared policy actor."""

    actor: Any
    run: str

    def __getattr__(self, name: str) -> _Method:
        if name.startswith("_"):  # asked for by pickle and copy
            raise AttributeError(name)
        return _Method(self.actor, self.run, name)


def policy_at(address: str, namespace: str) -> Any:
    """The policy actor at an address.

    Raises:
        ValueError: there is none.
    """
    name, _, run = address.partition("#")
    actor = ray.get_actor(name, namespace=namespace)
    return RunHandle(actor, run) if run else actor


def shared_actor() -> Any | None:
    """The policy actor that runs of this cluster share; None where nobody started one."""
    try:
        return ray.get_actor(SHARED_NAME, namespace=SHARED_NAMESPACE)
    except ValueError:
        return None
