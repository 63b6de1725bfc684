"""The direction of the arrows: who may import whom, where Ray, torch and NVML may be touched, and how big files get.

The lists below are the whole truth; a new place for one of them is a decision, taken here.
"""

from __future__ import annotations

import ast
import fnmatch
import graphlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("policies", "jobs", "orchestrator")
MAX_FILE_LINES = 450
FORBIDDEN_NAMES = ("util", "utils", "helper", "helpers", "common", "misc")

MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "policies": ("orchestrator.policies", "numpy"),
    "jobs": ("orchestrator.jobs", "numpy", "torch", "transformers"),
}
"""Modules that a folder may import besides the standard library; `orchestrator` has its own rules."""

ONLY_IN: dict[str, tuple[str, ...]] = {
    "ray": (
        "orchestrator/control/actor.py",
        "orchestrator/control/cluster_actor.py",
        "orchestrator/policy_handle.py",
        "orchestrator/shared_policy.py",
        "orchestrator/cluster.py",
        "orchestrator/control_plane.py",
        "orchestrator/node_requests.py",
        "orchestrator/node_watcher.py",
        "orchestrator/driver.py",
        "orchestrator/tune/*.py",
        "orchestrator/train/slot.py",
        "orchestrator/api.py",  # ships functions by value
        "orchestrator/train/function/reports.py",
        "orchestrator/train/ray_link.py",
        "orchestrator/submit.py",
        "orchestrator/supervisor.py",
        "orchestrator/silence_watcher.py",
        "orchestrator/devices/ray_agents.py",
        "orchestrator/devices/ray_alone.py",
        "orchestrator/devices/ray_cards.py",
        "orchestrator/doctor.py",
    ),
    "cuda": ("orchestrator/share/sm_driver.py",),
    "transformers": ("jobs/huggingface_model.py",),  # loaded for a model of that library only
    "pynvml": ("orchestrator/telemetry/sampler.py",),
    "torch": (
        "jobs/*.py",
        "orchestrator/train/*.py",
        "orchestrator/share/*.py",
        "orchestrator/telemetry/*.py",
        "orchestrator/doctor.py",
        "orchestrator/driver.py",  # ahead of time, while Ray starts
        "orchestrator/api.py",  # names of types only
        "orchestrator/training_calls.py",  # names of types only
    ),
}
"""The files that may import a module, anywhere in them. `*` also stands for folders."""

Import = tuple[str, int, bool]
"""Full dotted name as written, line, and whether it runs when the module is imported."""


def imports_of(source: str, package: str = "") -> Iterator[Import]:
    """All imports of a source text, also those inside functions; `from a import b` gives `a.b`."""
    pending: list[tuple[ast.AST, bool]] = [(ast.parse(source), True)]
    while pending:
        node, runs = pending.pop()
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno, runs) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")
            base = (
                ".".join([*parents[: len(parents) - node.level + 1], node.module or ""]) if node.level else node.module
            )
            yield from ((f"{(base or '').strip('.')}.{alias.name}", node.lineno, runs) for alias in node.names)
        is_deferred = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        is_typing = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        pending += [(child, runs and not is_deferred and not is_typing) for child in ast.iter_child_nodes(node)]


def files() -> list[Path]:
    return sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def module_name(path: Path) -> str:
    """As it is imported: the folders `jobs` and `policies` are linked into the package `orchestrator`."""
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    return name if name.startswith("orchestrator") else f"orchestrator.{name}"


def is_in(name: str, module: str) -> bool:
    """Whether a dotted name is `module` or lies in it."""
    return name == module or name.startswith(f"{module}.")


def all_imports() -> list[tuple[str, Import]]:
    """Pairs of a file's relative path and one of its imports."""
    found = []
    for path in files():
        package = module_name(path) if path.name == "__init__.py" else module_name(path.parent / "__init__.py")
        found += [(relative(path), each) for each in imports_of(path.read_text(), package)]
    return found


def longest_module(name: str, modules: set[str]) -> str | None:
    """The module that a dotted name lies in: `a.b.thing` in `a.b`."""
    while name and name not in modules:
        name = name.rpartition(".")[0]
    return name or None


def import_graph() -> dict[str, set[str]]:
    """What each module imports of ours when it is itself imported."""
    modules = {module_name(path) for path in files()}
    graph: dict[str, set[str]] = {module: set() for module in modules}
    for file, (name, _, runs) in all_imports():
        target = longest_module(name, modules)
        if runs and target:
            graph[module_name(ROOT / file)].add(target)
    return graph


@pytest.mark.parametrize("package", list(MAY_IMPORT))
def test_a_package_imports_only_what_it_may(package: str) -> None:
    wrong = [
        f"{file}:{line} imports {name}"
        for file, (name, line, _) in all_imports()
        if file.startswith(f"{package}/")
        and name.partition(".")[0] not in sys.stdlib_module_names
        and not any(is_in(name, allowed) for allowed in MAY_IMPORT[package])
    ]
    assert not wrong


@pytest.mark.parametrize("module", list(ONLY_IN))
def test_a_module_is_touched_only_in_its_named_files(module: str) -> None:
    wrong = [
        f"{file}:{line} imports {name}"
        for file, (name, line, _) in all_imports()
        if name.partition(".")[0] == module and not any(fnmatch.fnmatch(file, allowed) for allowed in ONLY_IN[module])
    ]
    assert not wrong, f"allowed only in {', '.join(ONLY_IN[module])}"


def test_there_is_no_import_cycle() -> None:
    try:
        graphlib.TopologicalSorter(import_graph()).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


def test_no_file_is_a_drawer_for_everything() -> None:
    assert not [relative(path) for path in files() if path.stem in FORBIDDEN_NAMES]


def test_no_file_grows_without_limit() -> None:
    lengths = {relative(path): len(path.read_text().splitlines()) for path in files()}
    assert not {file: lines for file, lines in lengths.items() if lines > MAX_FILE_LINES}


def test_source_is_ascii() -> None:
    assert not [relative(path) for path in files() if not path.read_bytes().isascii()]


def test_the_walk_sees_imports_wherever_they_stand() -> None:
    source = """
import a.b
from c import d
from . import e
from ..f import g
if TYPE_CHECKING:
    import h
def function():
    from i import j
class Room:
    import k
try:
    import m
except ImportError:
    pass
"""
    seen = {(name, runs) for name, _, runs in imports_of(source, "x.y")}
    assert seen == {
        ("a.b", True),
        ("c.d", True),
        ("x.y.e", True),
        ("x.f.g", True),
        ("h", False),
        ("i.j", False),
        ("k", True),
        ("m", True),
    }


def test_a_name_is_traced_to_the_module_it_lies_in() -> None:
    modules = {"policies", "orchestrator.policies.plan"}
    assert longest_module("orchestrator.policies.plan.Plan", modules) == "orchestrator.policies.plan"
    assert longest_module("policies.Plan", modules) == "policies"
    assert longest_module("numpy.random", modules) is None
