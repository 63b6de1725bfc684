"""What to do: pure policies that turn a snapshot of the world into a plan. Standard library and numpy only.

The names below are the public surface. `POLICIES` lists the policies of this package; `build_policy` makes one, also
from a user's own `module:Class`.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import cast

from orchestrator.policies.codec import dumps, plan_from, settings_from, snapshot_from, to_jsonable
from orchestrator.policies.decide.baselines.fifo import Fifo
from orchestrator.policies.decide.baselines.fluid import Fluid
from orchestrator.policies.decide.baselines.optimus import Optimus
from orchestrator.policies.decide.baselines.pollux import Pollux
from orchestrator.policies.decide.baselines.sia import Sia
from orchestrator.policies.decide.baselines.tiresias import Tiresias
from orchestrator.policies.decide.fair_share import FairShare
from orchestrator.policies.decide.goodput import Goodput
from orchestrator.policies.decide.goodput_joint import GoodputJoint
from orchestrator.policies.decide.static import Static
from orchestrator.policies.invariants import Violation, check
from orchestrator.policies.learn.efficiency import efficiency, gain
from orchestrator.policies.learn.fit import (
    NOTHING_FITTED,
    Observation,
    TrialFit,
    inherit,
    missing,
    noise_scale,
    pool,
    predict_step_s,
    protect,
    update,
)
from orchestrator.policies.learn.known import known_fit
from orchestrator.policies.learn.speed import KnownLine, KnownSpeed, Prediction
from orchestrator.policies.plan import (
    EMPTY_PLAN,
    Allocation,
    Alternative,
    DeviceId,
    Effect,
    Generation,
    NodeWish,
    Plan,
    Settings,
    TrialId,
    changed_dials,
    diff,
    effect_of,
    is_same,
)
from orchestrator.policies.policy import Policy
from orchestrator.policies.snapshot import (
    DeviceKind,
    DeviceView,
    DialLimits,
    NodeType,
    Override,
    Quota,
    Snapshot,
    TrialView,
)
from orchestrator.policies.tier import NAMED_TIERS, TIER_FACTS, Tier, TierFacts, is_cheaper, tier_facts

POLICIES: dict[str, type] = {
    "static": Static,
    "fair_share": FairShare,
    "goodput": Goodput,
    "goodput_joint": GoodputJoint,
    "fifo": Fifo,
    "fluid": Fluid,
    "tiresias": Tiresias,
    "optimus": Optimus,
    "pollux": Pollux,
    "sia": Sia,
}

__all__ = [
    "EMPTY_PLAN",
    "NAMED_TIERS",
    "NOTHING_FITTED",
    "POLICIES",
    "TIER_FACTS",
    "Allocation",
    "Alternative",
    "DeviceId",
    "DeviceKind",
    "DeviceView",
    "DialLimits",
    "Effect",
    "FairShare",
    "Fifo",
    "Fluid",
    "Generation",
    "Goodput",
    "GoodputJoint",
    "KnownLine",
    "KnownSpeed",
    "NodeType",
    "NodeWish",
    "Observation",
    "Optimus",
    "Override",
    "Plan",
    "Policy",
    "Pollux",
    "Prediction",
    "Quota",
    "Settings",
    "Sia",
    "Snapshot",
    "Static",
    "Tier",
    "TierFacts",
    "Tiresias",
    "TrialFit",
    "TrialId",
    "TrialView",
    "Violation",
    "build_policy",
    "changed_dials",
    "check",
    "diff",
    "dumps",
    "effect_of",
    "efficiency",
    "gain",
    "inherit",
    "is_cheaper",
    "is_same",
    "known_fit",
    "missing",
    "noise_scale",
    "plan_from",
    "pool",
    "predict_step_s",
    "protect",
    "settings_from",
    "snapshot_from",
    "tier_facts",
    "to_jsonable",
    "update",
]


def build_policy(name: str, params: Mapping[str, object] | None = None) -> Policy:
    """The policy of that name with those parameters; `my.module:MyPolicy` imports a user's own.

    Raises:
        ValueError: no such policy, module or class, an unknown parameter, or a value it refuses.

    >>> build_policy("goodput", {"min_gain": 0.1}).min_gain
    0.1
    """
    factory = _user_class(name) if ":" in name else POLICIES.get(name)
    if factory is None:
        allowed = f"{', '.join(POLICIES)} or module:Class"
        raise ValueError(f"there is no policy {name!r}; allowed: {allowed}{_did_you_mean(name, POLICIES)}")
    if isinstance(factory, type) and not callable(getattr(factory, "decide", None)):
        raise ValueError(f"policy {name!r} has no method decide(snapshot); see policies/README.md")
    given = dict(params or {})
    known = _parameters(factory)
    for key in given:
        if known is not None and key not in known:
            allowed = ", ".join(known) or "none"
            raise ValueError(f"policy {name!r} has no parameter {key!r}; allowed: {allowed}{_did_you_mean(key, known)}")
    try:
        policy = factory(**given)
    except (TypeError, ValueError) as error:
        raise ValueError(f"policy {name!r} cannot be built from {given}: {error}") from error
    if not callable(getattr(policy, "decide", None)):
        raise ValueError(f"policy {name!r} has no method decide(snapshot); see policies/README.md")
    return cast("Policy", policy)


def _user_class(name: str) -> Callable[..., object]:
    module_name, _, class_name = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except (ImportError, ValueError) as error:
        raise ValueError(
            f"policy {name!r}: cannot import module {module_name!r} ({error}); allowed: a module on the Python path"
        ) from error
    found = getattr(module, class_name, None)
    if not callable(found):
        names = [key for key, value in vars(module).items() if isinstance(value, type)]
        raise ValueError(
            f"policy {name!r}: module {module_name!r} has no class {class_name!r}{_did_you_mean(class_name, names)}"
        )
    return cast("Callable[..., object]", found)


def _parameters(factory: Callable[..., object]) -> tuple[str, ...] | None:
    """Names of the parameters, None where any are taken or nobody can tell."""
    try:
        parameters = inspect.signature(factory).parameters.values()
    except (TypeError, ValueError):
        return None
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
        return None
    return tuple(p.name for p in parameters)


def _did_you_mean(word: str, known: Mapping[str, object] | list[str] | tuple[str, ...]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
