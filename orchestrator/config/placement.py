"""What contradicts a policy that pauses trials and chooses their devices (`dials.placement`)."""

from __future__ import annotations

from collections.abc import Iterator

from orchestrator.config.model import PLACING_POLICIES, RunConfig
from orchestrator.config.source import KeyPath
from orchestrator.config.words import seen


def check_placement(config: RunConfig) -> Iterator[tuple[KeyPath, str]]:
    """Every contradiction, with the key that it is at."""
    name, path = config.policy.name, ("dials", "placement", "enabled")
    if not config.places:
        if name in PLACING_POLICIES:
            text = f"got false, and all that policy {name} does is to pause trials and to choose their devices"
            yield path, f"{text}; allowed: null or true, or another policy.name"
        return
    why = f"while policy {name} pauses trials and chooses their devices (dials.placement)"
    if config.trial.num_workers != 1:
        text = f"got {config.trial.num_workers} {why}; allowed: 1, since a group of several ranks is on fixed devices"
        yield ("trial", "num_workers"), text
    if config.dials.workers.enabled:
        yield ("dials", "workers", "enabled"), f"got true {why}; allowed: false, or dials.placement.enabled: false"
    if config.cluster.node_types:
        yield ("cluster", "node_types"), f"got some {why}; allowed: none, or dials.placement.enabled: false"
    if config.trial.share is not None and config.trial.share != 1:
        text = f"got {config.trial.share:g} {why}; allowed: null, since a trial begins with what the policy gives it"
        yield ("trial", "share"), text
    if config.dials.share.enabled and config.dials.share.max != 1:
        text = f"got {seen(config.dials.share.max)} {why}; allowed: 1, since a policy may give it a whole device"
        yield ("dials", "share", "max"), text
