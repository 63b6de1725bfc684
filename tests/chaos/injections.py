"""Faults of whole runs: each strikes at a named moment and returns what it hit; one that hit nothing raises."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from tests.integration.runs import Started

Injection = Callable[[Started, random.Random], str]


class NotFiredError(AssertionError):
    """A fault struck nothing: its schedule proves nothing."""


def rank_pids(run: Started) -> dict[str, int]:
    """Process of rank 0 of each slot that is open, by its newest hello."""
    found: dict[str, int] = {}
    for entry in run.of("slot"):
        if entry.get("hello"):
            found[entry["slot_id"]] = entry["hello"]["pids"][0]
        else:
            found.pop(entry["slot_id"], None)
    return {slot: pid for slot, pid in found.items() if psutil.pid_exists(pid)}


def reach(run: Started, step: int) -> str:
    """Wait until a trial is at that step or beyond; its name."""
    found: list[str] = []

    def is_there() -> bool:
        trials = run.status.get("trials", [])
        found[:] = [each["trial_id"] for each in trials if each["state"] == "running" and each["step"] >= step]
        return bool(found)

    run.wait_until(is_there, f"step {step}")
    return found[0]


def slot_of(run: Started, trial_id: str) -> str:
    return next(str(each["slot_id"]) for each in run.status["trials"] if each["trial_id"] == trial_id)


def kill_rank(run: Started, draw: random.Random) -> str:
    """SIGKILL of the process of a rank, at a step."""
    step = draw.randrange(100, 3000)
    trial = reach(run, step)
    pid = rank_pids(run)[slot_of(run, trial)]
    before = len(run.of("trial_requeued"))
    os.kill(pid, signal.SIGKILL)
    run.wait_until(lambda: len(run.of("trial_requeued")) > before, "the trial goes back to the queue")
    return f"SIGKILL of rank 0 of {trial} at step {step} or later"


def stop_rank(run: Started, draw: random.Random) -> str:
    """SIGSTOP of the process of a rank, at a step, for ever."""
    step = draw.randrange(100, 3000)
    trial = reach(run, step)
    pid = rank_pids(run)[slot_of(run, trial)]
    before = {kind: len(run.of(kind)) for kind in ("rank_silent", "trial_requeued")}
    os.kill(pid, signal.SIGSTOP)
    began_s = time.monotonic()
    run.wait_until(lambda: len(run.of("rank_silent")) > before["rank_silent"], "the silence is found")
    found_s = time.monotonic() - began_s
    run.wait_until(lambda: len(run.of("trial_requeued")) > before["trial_requeued"], "the trial is queued again")
    return f"SIGSTOP of rank 0 of {trial} at step {step} or later, found after {found_s:.1f} s"


def kill_actor(run: Started, draw: random.Random) -> str:
    """SIGKILL of the policy actor."""
    reach(run, draw.randrange(100, 3000))
    pid, before = int(run.status["actor_pid"]), len(run.of("recovered"))
    os.kill(pid, signal.SIGKILL)
    run.wait_until(lambda: len(run.of("recovered")) > before, "the actor is back")
    return f"SIGKILL of the actor {pid}"


def stop_actor(run: Started, draw: random.Random) -> str:
    """SIGSTOP of the policy actor, for ever: it has to be replaced."""
    reach(run, draw.randrange(100, 3000))
    pid, before = int(run.status["actor_pid"]), len(run.of("recovered"))
    began_s = time.monotonic()
    os.kill(pid, signal.SIGSTOP)
    run.wait_until(lambda: len(run.of("recovered")) > before, "another actor is there")
    return f"SIGSTOP of the actor {pid}, replaced after {time.monotonic() - began_s:.1f} s"


def pause_actor(run: Started, draw: random.Random) -> str:
    """SIGSTOP of the policy actor for some seconds, then SIGCONT: nobody may be taken for silent because of it."""
    reach(run, draw.randrange(100, 3000))
    pid, held_s = int(run.status["actor_pid"]), draw.uniform(2.0, 6.0)
    os.kill(pid, signal.SIGSTOP)
    time.sleep(held_s)
    os.kill(pid, signal.SIGCONT)
    return f"SIGSTOP of the actor {pid} for {held_s:.1f} s"


def fill_disk(run: Started, draw: random.Random) -> str:
    """A full disk for some seconds."""
    return _full(run, draw, kills_actor=False)


def fill_disk_and_kill_actor(run: Started, draw: random.Random) -> str:
    """A full disk for some seconds, in which the actor dies: the next one must wait as well."""
    return _full(run, draw, kills_actor=True)


def _full(run: Started, draw: random.Random, *, kills_actor: bool) -> str:
    step, held_s = draw.randrange(100, 2500), draw.uniform(8.0, 14.0)
    reach(run, step)
    pid = int(run.status["actor_pid"])
    num_reports, num_recovered = len(run.of("result")), len(run.of("recovered"))
    with filled(run.run_dir) as num_bytes:
        run.wait_until(lambda: _alarm(run), "an alarm of the full disk")
        alarm = _alarm(run)
        if kills_actor:
            os.kill(pid, signal.SIGKILL)
        time.sleep(held_s)
        if len(run.of("result")) > num_reports:
            raise NotFiredError("reports came through a full disk")
    if kills_actor:
        run.wait_until(lambda: len(run.of("recovered")) > num_recovered, "another actor is there")
    killed = ", with SIGKILL of the actor" if kills_actor else ""
    return f"disk full ({num_bytes} bytes of ballast) for {held_s:.1f} s{killed}: {alarm}"


def _alarm(run: Started) -> str:
    status = run.status
    notes = [note for trial in status.get("trials", []) for note in trial["notes"]]
    texts = [str(text) for text in (status.get("trouble"), *status.get("alarms", []), *notes) if text]
    return next((text for text in texts if "no room" in text and "free" in text), "")


@contextmanager
def filled(directory: Path) -> Iterator[int]:
    """The file system of a directory is full; yields how many bytes that took."""
    ballast, size = directory.parent / "ballast", 0
    try:
        with ballast.open("wb", buffering=0) as file:
            while True:  # what others free meanwhile is taken too
                try:
                    size += file.write(bytes(4096))
                except OSError:
                    break
        yield size
    finally:
        ballast.unlink()


INJECTIONS: dict[str, Injection] = {
    "rank killed": kill_rank,
    "rank stopped": stop_rank,
    "actor killed": kill_actor,
    "actor stopped": stop_actor,
    "actor paused": pause_actor,
    "disk full": fill_disk,
    "disk full, actor killed": fill_disk_and_kill_actor,
}
"""Every kind of real fault."""

ON_A_SMALL_DISK = frozenset({"disk full", "disk full, actor killed"})


@contextmanager
def small_disk(directory: Path, num_mib: int = 24) -> Iterator[Path]:
    """A file system of that size; raises `PermissionError` where mounting is not allowed."""
    directory.mkdir(parents=True, exist_ok=True)
    options = f"size={num_mib}m"
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(directory)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise PermissionError(f"no file system can be mounted here: {done.stderr.strip()}")
    try:
        yield directory
    finally:
        subprocess.run(["umount", "--lazy", str(directory)], check=False)
