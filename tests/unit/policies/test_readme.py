from __future__ import annotations

import re
from pathlib import Path

from orchestrator import policies
from orchestrator.policies.invariants import check
from orchestrator.policies.plan import is_same
from orchestrator.policies.policy import Policy
from orchestrator.policies.sample_worlds import after, snapshots
from orchestrator.policies.snapshot import Snapshot

README = Path(policies.__file__).parent / "README.md"


def tutorial() -> str:
    return blocks()[0]


def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README.read_text(encoding="ascii"), re.DOTALL)


def test_the_policy_in_30_lines_is_legal_and_rests_in_generated_worlds() -> None:
    names: dict[str, object] = {"__name__": "tutorial"}
    exec(compile(tutorial(), str(README), "exec"), names)
    policy_class = names["FirstComeFirst"]
    assert isinstance(policy_class, type)
    policy: Policy = policy_class()
    num_checked = 0
    for world in snapshots(300):
        # It knows nothing of pauses, so worlds that rely on them are not for it.
        if any(trial.limits.can_pause or trial.override for trial in world.trials):
            continue
        plan = policy.decide(world)
        assert check(world, plan) == ()
        assert is_same(plan, policy.decide(after(world, plan)))
        num_checked += 1
    assert num_checked > 100


def test_every_example_runs_the_conformance_test_and_the_world_by_hand_among_them() -> None:
    names: dict[str, object] = {"__name__": "tutorial"}
    for block in blocks():
        exec(compile(block, str(README), "exec"), names)
    assert names["findings"] == ()
    assert isinstance(names["world"], Snapshot)
    assert check(names["world"], names["plan"]) == ()


def test_a_world_by_hand_takes_fifteen_lines() -> None:
    (block,) = [block for block in blocks() if "Snapshot(" in block and "@dataclass" not in block]
    assert len(block.split("\n\n", 1)[1].strip().splitlines()) <= 15


def test_the_policy_of_the_tutorial_has_about_30_lines() -> None:
    body = tutorial().split("@dataclass", 1)[1].strip().splitlines()
    assert len(body) <= 30


def test_the_table_of_files_names_every_file_of_the_package() -> None:
    named = set(re.findall(r"`(\w+\.py)`", README.read_text(encoding="ascii")))
    folders = ("", "learn", "decide", "decide/baselines")
    present = {path.name for folder in folders for path in (README.parent / folder).glob("*.py")} - {"__init__.py"}
    assert named >= present
    assert named - present == set()


def test_the_invariants_are_numbered_without_a_gap() -> None:
    text = README.read_text(encoding="ascii").split("## Invariants")[1].split("## ")[0]
    assert [int(number) for number in re.findall(r"^(\d+)\. ", text, re.MULTILINE)] == list(range(1, 18))
