"""What the README files say, held against the code: trees, commands, links, fields, numbers."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from orchestrator import cli
from orchestrator.config import load_config
from orchestrator.config.cluster_file import load_cluster_file
from orchestrator.control.entries import EVENTS
from orchestrator.control.events import IN_JOURNAL, LEFT_OUT
from orchestrator.control.world import SlotState, TrialState
from orchestrator.errors import (
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_SOME_FAILED,
    EXIT_TERMINATED,
    ConfigError,
    OrchestratorError,
    UnfitEnvironmentError,
)
from orchestrator.jobs import job_info
from orchestrator.policies import POLICIES
from orchestrator.policies.plan import TrialId
from orchestrator.share import SHARES
from orchestrator.telemetry.load import RunTables
from tests.unit.orchestrator.control.worlds import SPOT, World

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
INSIDE = ROOT / "orchestrator" / "README.md"
ALL = (
    README,
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *sorted(ROOT.glob("*/README.md")),
    *sorted(ROOT.glob("*/*/README.md")),
)
IN_README_OF_THEIR_OWN = ("jobs", "policies")
"""Folders that are one line of the tree, because their README has a table of their files."""


def text_of(path: Path) -> str:
    return path.read_text(encoding="ascii")


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def section(path: Path, heading: str) -> str:
    """The text below a heading, up to the next one of any level."""
    found = re.search(rf"^#+ {re.escape(heading)}\n(.*?)(?=^#+ |\Z)", text_of(path), re.MULTILINE | re.DOTALL)
    assert found, f"{name_of(path)} has no section '{heading}'"
    return found.group(1)


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text_of(path), re.MULTILINE | re.DOTALL)


def rows(table: str) -> list[list[str]]:
    """The cells of a Markdown table, without its head."""
    lines = [line for line in table.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def names(cell: str) -> list[str]:
    return [name.strip() for name in cell.split(",") if name.strip()]


# The tree.


def repository_files() -> list[str]:
    """Files of the repository, tracked or about to be."""
    command = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this copy has no git history to tell its files from build leftovers")
    return [path for path in listed if (ROOT / path).is_file()]


def tree() -> dict[str, str]:
    """What the tree in the README shows: path (folders end in a slash) and its comment."""
    (block,) = re.findall(r"^```\n(.*?)^```$", section(README, "What is where"), re.MULTILINE | re.DOTALL)
    shown: dict[str, str] = {}
    folder = ""
    for line in block.splitlines():
        path, _, comment = line.strip().partition("  ")
        if line.startswith("  "):
            path = folder + path
        elif path.endswith("/"):
            folder = path
        shown[path] = comment.strip()
    return shown


def expected_tree() -> set[str]:
    found = set()
    for path in repository_files():
        parts = path.split("/")
        if len(parts) == 1 or path == ".gitignore" or parts[0].startswith("."):
            found.add(path)
        else:
            found.add(f"{parts[0]}/")
            if parts[0] not in IN_README_OF_THEIR_OWN:
                found.add(f"{parts[0]}/{parts[1]}" + ("/" if len(parts) > 2 else ""))
    return found - {".gitignore"}


def test_the_tree_is_the_real_one() -> None:
    assert set(tree()) == expected_tree()


def test_every_line_of_the_tree_says_what_it_is() -> None:
    assert not [path for path, comment in tree().items() if not comment]


@pytest.mark.parametrize("folder", IN_README_OF_THEIR_OWN)
def test_a_folder_without_lines_in_the_tree_lists_its_files_itself(folder: str) -> None:
    listed = set(re.findall(r"`(\w+\.py)`", text_of(ROOT / folder / "README.md")))
    present = {Path(path).name for path in repository_files() if re.fullmatch(rf"{folder}/\w+\.py", path)}
    assert listed >= present - {"__init__.py"}


# Commands.


def command_lines(text: str) -> Iterator[list[str]]:
    """Arguments of every `orchestrator ...` in code, without what the shell takes for itself."""
    code = re.findall(r"^```(?:bash)?\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL))
    for line in [*"\n".join(code).splitlines(), *spans]:
        found = re.match(r"(?:eval \"\$\()?(?:\S*/)?orchestrator +([a-z].*)", line)
        if found:
            yield shlex.split(found.group(1).partition(" > ")[0].removesuffix(')"'), comments=True)


def command_of(arguments: list[str]) -> click.Command:
    command = cli.orchestrator.get_command(click.Context(cli.orchestrator), arguments[0])
    assert command is not None, f"no command {arguments[0]}"
    return command


@pytest.mark.parametrize("path", ALL, ids=name_of)
def test_every_command_shown_is_one_that_click_takes(path: Path) -> None:
    for arguments in command_lines(text_of(path)):
        command = command_of(arguments)
        if arguments[1:]:  # a name alone speaks of the command
            command.make_context(arguments[0], arguments[1:])


def test_the_table_shows_every_command_with_an_example_of_it() -> None:
    table = rows(section(README, "Commands").partition("Ctrl-C")[0])
    assert [row[0].strip("`") for row in table] == list(cli.COMMANDS)
    for name, example, _ in table:
        assert next(command_lines(example))[0] == name.strip("`")


def test_the_table_names_only_options_that_exist_and_none_is_missing() -> None:
    for name, *cells in rows(section(README, "Commands").partition("Ctrl-C")[0]):
        command = command_of([name.strip("`")])
        has = {option for param in command.params for option in param.opts if option.startswith("--")}
        shown = set(re.findall(r"--[a-z][a-z-]*", " ".join(cells)))
        assert shown <= has
        assert has - shown <= {"--storage", "--set"}, f"{name} has an option the README does not show"


def test_the_exit_codes_are_those_of_the_code() -> None:
    table = section(README, "Commands").partition("| exit code")[2]
    shown = {int(code) for code in re.findall(r"^\| (\d+) \|", table, re.MULTILINE)}
    errors = {OrchestratorError.exit_code, ConfigError.exit_code, UnfitEnvironmentError.exit_code}
    ends = {EXIT_DONE, EXIT_FAILED, EXIT_SOME_FAILED, EXIT_INTERRUPTED, EXIT_TERMINATED}
    assert shown == ends | errors
    assert {int(code) for code in re.findall(r"\b(\d+) [a-z]", cli.EPILOG.partition("Exit codes:")[2])} == shown


# Make.


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z]+):.*?## ", text_of(ROOT / "Makefile"), re.MULTILINE))


@pytest.mark.parametrize("path", ALL, ids=name_of)
def test_every_make_target_named_exists(path: Path) -> None:
    text = text_of(path)
    spans = [*re.findall(r"`(make [^`]+)`", text), *re.findall(r"^make .*$", text, re.MULTILINE)]
    words = [shlex.split(span, comments=True)[1:] for span in spans]
    named = {word for line in words for word in line if "=" not in word and not word.startswith("-")}
    assert named <= make_targets()


def test_contributing_says_truly_which_folders_hold_tests() -> None:
    files = repository_files()
    for folder, what, _ in rows(section(ROOT / "CONTRIBUTING.md", "Tests")):
        has_tests = any(path.startswith(folder.strip("`")) and path.endswith(".py") for path in files)
        assert has_tests == ("none yet" not in what), folder


# Links and code.


def anchor(heading: str) -> str:
    return re.sub(r"[^a-z0-9 _-]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("path", ALL, ids=name_of)
def test_every_link_leads_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", text_of(path)):
        if target.startswith("https://"):
            continue
        file, _, fragment = target.partition("#")
        there = (path.parent / file).resolve() if file else path
        assert there.exists(), target
        if fragment:
            assert fragment in {anchor(h) for h in re.findall(r"^#+ (.*)$", text_of(there), re.MULTILINE)}


@pytest.mark.parametrize("path", ALL, ids=name_of)
def test_python_in_a_readme_compiles(path: Path) -> None:
    for number, code in enumerate(blocks(path, "python")):
        compile(code, f"{name_of(path)} block {number}", "exec")


@pytest.mark.parametrize("path", ALL, ids=name_of)
def test_a_readme_is_plain_ascii(path: Path) -> None:
    text = path.read_bytes().decode("ascii")
    assert "\t" not in text
    assert not [line for line in text.splitlines() if line != line.rstrip()]


def test_the_run_files_of_the_readme_are_good_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package" / "my_module.py").write_text("def train(lr, width): ...\n")
    own, ours, cluster = blocks(README, "yaml")
    for text, is_function in ((own, True), (ours, False)):
        file = tmp_path / "search.yaml"
        file.write_text(text)
        resolved = load_config(file, [f"storage={tmp_path}"])
        assert resolved.config.name == yaml.safe_load(text)["name"]
        assert job_info(resolved.config.job.name).is_function is is_function
    file = tmp_path / "policy.yaml"
    file.write_text(cluster)
    assert load_cluster_file(file).quotas == {"anna": 4.0, "bert": 2.0}


def test_the_tables_and_policies_named_are_those_there_are() -> None:
    text = text_of(README)
    assert all(f"`{name}`" in text for name in POLICIES)
    code = next(block for block in blocks(README, "python") if "load_run" in block)
    used = {node.attr for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Attribute)}
    assert {"state", "steps", "notes", "to_pandas"} <= used & set(dir(RunTables))
    comment = re.findall(r"# (steps, .*) are Arrow tables", code)
    assert names(comment[0]) == ["steps", "devices", "results", "trials", "plans"]


# Environment variables.


def environment_names() -> set[str]:
    """Constant names of environment variables that our code reads or sets."""
    found = set()
    for package in ("orchestrator", "jobs", "policies"):
        for path in (ROOT / package).rglob("*.py"):
            found |= set(re.findall(r"(?:environ(?:\.\w+)?|getenv)[\[(]\s*\"(\w+)\"", path.read_text()))
    return found


def test_no_environment_variable_of_our_own_is_read() -> None:
    assert "has none of its own" in section(README, "Commands")
    assert {name for name in environment_names() if not name.startswith(("RAY_", "TORCHINDUCTOR_"))} <= {
        "TERM",
        "TMPDIR",
    }


# The journal.


JOURNAL_HEAD = {"kind", "seq", "t_s", "wall_s"}


def test_every_kind_of_journal_entry_is_listed_with_its_fields() -> None:
    shown = {row[0].strip("`"): set(names(row[1])) for row in rows(section(INSIDE, "The journal"))}
    written = {
        kind: {each.name for each in fields(event) if each.metadata.get(IN_JOURNAL) != LEFT_OUT} | {"kind"}
        for kind, event in EVENTS.items()
    }
    assert shown == {kind: found - JOURNAL_HEAD for kind, found in written.items()}


def test_what_every_entry_has_is_said() -> None:
    assert all(f"`{name}`" in section(INSIDE, "The journal") for name in JOURNAL_HEAD)


# The status.


def keys_by_part(status: dict[str, Any]) -> dict[str, list[str]]:
    trial = next(each for each in status["trials"] if each["decision"])
    return {
        "run": list(status),
        "`dials.NAME`": list(status["dials"]["share"]),
        "`devices[]`": list(status["devices"][0]),
        **({"`nodes[]`": list(status["nodes"][0])} if status["nodes"] else {}),
        "`slots[]`": list(status["slots"][0]),
        "`trials[]`": list(trial),
        "`trials[].decision`": list(trial["decision"]),
    }


@pytest.fixture
def status(tmp_path: Path) -> dict[str, Any]:
    """The status of a run in which one trial runs under a plan."""
    world = World(tmp_path, node_types=(SPOT,))
    world.controller.submit(TrialId("trial-00000"), {})
    world.attach("slot-0")
    world.decide()
    return world.status().now()


def test_every_key_of_the_status_is_listed(status: dict[str, Any]) -> None:
    shown = {row[0]: sorted(names(row[1])) for row in rows(section(INSIDE, "status.json"))}
    assert shown == {part: sorted(keys) for part, keys in keys_by_part(status).items()}


def test_every_state_is_drawn() -> None:
    drawn = section(INSIDE, "The states of slots and trials")
    assert all(re.search(rf"\b{state.value}\b", drawn) for state in (*SlotState, *TrialState))


# Shares and numbers.


def test_the_table_of_shares_says_what_each_mechanism_says_of_itself() -> None:
    words = {True: "enforced", False: "not enforced"}
    shown = {row[0].strip("`"): (row[1], row[2]) for row in rows(text_of(ROOT / "orchestrator/share/README.md"))}
    real = {name: share().enforcement for name, share in SHARES.items()}
    assert shown == {name: (words[each.compute], words[each.memory]) for name, each in real.items()}


def constant(path: str, name: str) -> object:
    """The value of a module's constant, read and not imported."""
    for node in ast.parse((ROOT / path).read_text()).body:
        target = (
            node.targets[0]
            if isinstance(node, ast.Assign)
            else node.target
            if isinstance(node, ast.AnnAssign)
            else None
        )
        if isinstance(target, ast.Name) and target.id == name and isinstance(node, ast.Assign | ast.AnnAssign):
            assert node.value is not None
            return eval(compile(ast.Expression(node.value), path, "eval"), {})
    raise AssertionError(f"{path} has no {name}")


@pytest.mark.parametrize(
    ("readme", "says", "path", "name", "value"),
    [
        ("orchestrator/train/README.md", "until it holds 4 MiB", "train/fsdp.py", "DEFAULT_MIN_UNIT_BYTES", 4 << 20),
        ("orchestrator/train/README.md", "over 50 steps", "train/batch/schedule.py", "RAMP_STEPS", 50),
        ("orchestrator/train/README.md", "two of 32 steps", "train/batch/meter.py", "PERIOD_STEPS", 32),
        ("orchestrator/share/README.md", "at most 0.1 s", "share/duty_cycle.py", "BURST_S", 0.1),
        ("orchestrator/README.md", "within 10 s", "control/rendezvous.py", "LEAVE_TIMEOUT_S", 10.0),
        ("orchestrator/README.md", "up to a million rows", "telemetry/store.py", "MAX_BUFFERED_ROWS", 1_000_000),
        ("orchestrator/README.md", "waiting 1 to 30 s", "supervisor.py", "_LONGEST_BACK_OFF_S", 30.0),
        ("orchestrator/README.md", "Five quick failures", "supervisor.py", "_MAX_FAST_FAILURES", 5),
        ("README.md", "the newest two", "train/checkpoint.py", "KEEP_COMMITS", 2),
    ],
)  # fmt: skip
def test_a_number_quoted_is_the_number_in_the_code(readme: str, says: str, path: str, name: str, value: object) -> None:
    assert says in text_of(ROOT / readme)
    assert constant(f"orchestrator/{path}", name) == value


def test_the_table_of_train_names_every_file_and_folder_of_it() -> None:
    folder = ROOT / "orchestrator" / "train"
    shown = set(re.findall(r"`([\w/.]+)`", "".join(row[0] for row in rows(text_of(folder / "README.md")))))
    present = {
        path.split("/")[2] + ("/" if path.count("/") > 2 else "")
        for path in repository_files()
        if path.startswith("orchestrator/train/")
    }
    assert shown == present - {"README.md", "__init__.py"}
