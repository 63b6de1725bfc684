"""One real run that is disturbed, and the one checker of what came of it."""

from __future__ import annotations

import random
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.control.journal import read
from orchestrator.view.verify import verify
from tests.chaos.injections import INJECTIONS, ON_A_SMALL_DISK, small_disk
from tests.integration.runs import results, run_file, start

Results = dict[tuple[str, int], tuple[int, int, dict[str, float]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a disturbed run came to: which faults struck, and what is wrong with the run."""

    faults: tuple[str, ...]
    violations: tuple[str, ...]
    facts: dict[str, Any]


def undisturbed(directory: Path) -> Results:
    """The results of the same run without a fault."""
    run_dir = directory / "runs" / "r"
    code, output = start("run", str(run_file(directory / "run.yaml")), "--plain", run_dir=run_dir).end()
    assert code == 0, output
    return results(run_dir)


def disturbed(directory: Path, kinds: Sequence[str], seed: int, wanted: Results) -> Outcome:
    """Run once, strike with one fault after the other, and judge.

    Raises:
        NotFiredError: the fault has hit nothing.
        PermissionError: it needs a file system of its own, and none can be mounted.
    """
    draw = random.Random(seed)
    with ExitStack() as stack:
        place = stack.enter_context(small_disk(directory)) if ON_A_SMALL_DISK & set(kinds) else directory
        place.mkdir(parents=True, exist_ok=True)
        run_dir = place / "runs" / "r"
        started = start("run", str(run_file(place / "run.yaml")), "--plain", run_dir=run_dir)
        try:
            faults = tuple(INJECTIONS[kind](started, draw) for kind in kinds)
            code, output = started.end()
        except BaseException:
            if started.process.poll() is None:
                started.kill()
            if run_dir.exists():
                shutil.copytree(run_dir, directory.parent / f"{directory.name}-kept", dirs_exist_ok=True)
            raise
        found = history_violations(run_dir, wanted)
        if code != 0:
            found.append(f"exit code {code}: {output[-2000:]}")
        facts = {"num_requeued": sum(entry["kind"] == "trial_requeued" for entry in read(run_dir / "journal.jsonl"))}
        return Outcome(faults=faults, violations=tuple(found), facts=facts)


def history_violations(run_dir: Path, wanted: Results) -> list[str]:
    """What of a run's history is not as if nothing had happened. Empty where all is well."""
    found = [str(each) for each in verify(run_dir, reads_checkpoints=True)["violations"]]
    entries = list(read(run_dir / "journal.jsonl"))
    ends: dict[str, str] = {}
    numbers: dict[str, list[int]] = {}
    for entry in entries:
        if entry["kind"] == "trial_ended":
            ends[entry["trial_id"]] = entry["state"]
        if entry["kind"] == "result":
            numbers.setdefault(entry["trial_id"], []).append(entry["index"])
    found += [f"{trial} ended as {state}" for trial, state in ends.items() if state != "done"]
    found += [f"reports {got} of {trial}" for trial, got in numbers.items() if got != list(range(len(got)))]
    got = results(run_dir)
    found += [
        f"result {key} is {got.get(key)} instead of {value}" for key, value in wanted.items() if got.get(key) != value
    ]
    last = entries[-1]
    if last["kind"] != "run_ended" or any(last["leaks"].values()):
        found.append(f"the last entry is {last}")
    return found
