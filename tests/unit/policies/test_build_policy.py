from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest

from orchestrator import policies
from orchestrator.policies import POLICIES, FairShare, Goodput, build_policy


def test_a_policy_is_built_by_name_with_its_parameters() -> None:
    assert build_policy("goodput", {"min_gain": 0.1}) == Goodput(min_gain=0.1)
    assert build_policy("fair_share") == FairShare()


def test_a_policy_of_ones_own_is_found_by_module_and_class() -> None:
    assert build_policy("orchestrator.policies.decide.fair_share:FairShare", {"pause_s": 1.0}) == FairShare(pause_s=1.0)


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("godput", {}, r"no policy 'godput'; allowed: static, fair_share, goodput.*did you mean 'goodput'"),
        ("goodput", {"min_gian": 1}, r"no parameter 'min_gian'; allowed: guarantee.*did you mean 'min_gain'"),
        ("goodput", {"min_gain": -1}, r"min_gain=-1"),
        ("goodput", {"min_gain": "much"}, r"cannot be built from"),
        ("no.such.module:Policy", {}, r"cannot import module 'no.such.module'"),
        (":Policy", {}, r"cannot import module ''"),
        ("orchestrator.policies.decide.fair_share:FareShare", {}, r"no class 'FareShare'; did you mean 'FairShare'"),
        ("orchestrator.policies.plan:TrialId", {"x": "1"}, r"cannot be built from"),
        ("orchestrator.policies.tier:Tier", {"word": "bf16"}, r"no method decide"),
    ],
)
def test_a_mistake_is_answered_with_what_is_allowed(name: str, params: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_policy(name, params)


def test_every_listed_policy_is_a_frozen_dataclass_with_defaults() -> None:
    for policy in POLICIES.values():
        assert dataclasses.is_dataclass(policy)
        instance = policy()
        field = dataclasses.fields(policy)[0]
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(instance, field.name, 1)


def test_the_public_names_are_sorted_and_exist() -> None:
    assert all(hasattr(policies, name) for name in policies.__all__)
    assert len(set(policies.__all__)) == len(policies.__all__)


def test_modules_are_not_shadowed_by_functions_of_the_same_name() -> None:
    code = (
        "from orchestrator.policies.decide import goodput as g, static as s; "
        "from orchestrator.policies.learn import efficiency as e; print(e.efficiency(1.0, 1, 1), s.Static(), g)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.startswith("1.0 Static")


class TakesAnything:
    def __init__(self, **params: object) -> None:
        self.params = params

    def decide(self, snapshot: object) -> None:
        """Never called here."""


def test_a_class_that_takes_any_parameter_gets_them_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(POLICIES, "mine", TakesAnything)
    policy = build_policy("mine", {"x": 1})
    assert isinstance(policy, TakesAnything)
    assert policy.params == {"x": 1}
