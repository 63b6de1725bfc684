"""How many stand-ins Ray Tune starts, and which Ray it is: what is settled before a search begins.

A stand-in reserves a sliver of the head node and no compute, cut so that as many fit as there are slots and one waits
ready behind them. A trial beyond that is a line in Tune's list: it has no process, and a scheduler that pauses trials
(HyperBand, population based training) sees it pending, which a limit on concurrent trials would hide from it. Public
Tune API only: the resources of a trainable.
"""

from __future__ import annotations

import math
from importlib import metadata
from typing import Any

from orchestrator.doctor import PACKAGE_RANGES, parse_version
from orchestrator.errors import ConfigError, UnfitEnvironmentError

HEAD = "node:__internal_head__"
"""A resource of one unit that the head node of every cluster has."""

PIN_HEAD = {HEAD: 0.001}
"""Keeps an actor on the head node, at next to none of its unit."""

_SMALLEST = 0.0001
"""Ray counts resources in ten-thousandths."""

_NUM_READY = 1
"""Stand-ins that wait behind those with a slot, so that freed room is taken before Tune has noticed."""


def sliver(num_slots: int, free: float) -> float:
    """The part of the head node's unit each stand-in reserves.

    Raises:
        UnfitEnvironmentError: other searches on this cluster have taken too much of it.
    """
    part = math.floor(10_000 * min(free, 0.99) / (num_slots + _NUM_READY)) / 10_000
    if part < _SMALLEST or free < 0.5:
        raise UnfitEnvironmentError(
            f"{free:g} of the head node's unit {HEAD} is free; a search that may pause trials needs half of it, because"
            " it is what limits the stand-ins of trials; wait until the other search on this cluster has ended, or use"
            " a cluster of its own (cluster.address: local)"
        )
    return part


def require_tested_ray(version: str | None = None) -> None:
    """Refuse a Ray whose Tune and Train were not tested with this.

    Raises:
        UnfitEnvironmentError: it is older or newer.
    """
    found = version or metadata.version("ray")
    low, high = PACKAGE_RANGES["ray"]
    if low <= parse_version(found) and (high is None or parse_version(found) < high):
        return
    wanted = f"ray>={_dotted(low)}" + (f",<{_dotted(high)}" if high else "")
    raise UnfitEnvironmentError(
        f"Ray {found} is installed; trials in slots are tested with {wanted} only, because Ray Tune and Ray Train"
        f" change their inside between minor versions; pip install '{wanted}'"
    )


def require_untouched(resources: Any) -> None:
    """Refuse a scheduler that changes the resources of a trial.

    Raises:
        ConfigError: the stand-in was started with more than its part of the head node.
    """
    more = {} if resources is None else {k: v for k, v in resources.required_resources.items() if v and k != HEAD}
    if not more:
        return
    raise ConfigError(
        f"the scheduler has given the stand-in of this trial {more}; it needs none of that:"
        " ResourceChangingScheduler cannot work with trials in slots: it restarts a trial to resize its stand-in, which"
        " holds no compute. Use its base scheduler alone, and let the policy change the trial's share while it runs"
        " (dials.share, policy.name: goodput or fair_share)"
    )


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(str(number) for number in version)
