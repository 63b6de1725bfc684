"""Whole runs in processes of their own, as a user starts them, and ways to disturb them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

from orchestrator.control.journal import read

TIMEOUT_S = 300.0


def run_file(path: Path, **changes: Any) -> Path:
    """A small search of the mlp job; two slots, three trials, every trial to its end, nothing turned."""
    config: dict[str, Any] = {
        "name": "r",
        "storage": str(path.parent / "runs"),
        "seed": 1,
        "job": {"name": "mlp", "params": {"width": 64, "depth": 2}},
        "search": {
            "space": {"lr": {"loguniform": [0.002, 0.05]}},
            "num_trials": 3,
            "max_concurrent": 2,
            "scheduler": {"name": "fifo"},
        },
        "trial": {"samples_per_report": 48000, "max_reports": 3, "micro_batch": 16},
        "dials": {"share": {"enabled": False}, "batch": {"enabled": False}, "precision": {"enabled": False}},
        "policy": {"name": "static"},
    }
    path.write_text(yaml.safe_dump(config | changes))
    return path


@dataclass
class Started:
    """A run that is going on."""

    process: subprocess.Popen[str]
    run_dir: Path

    @property
    def status(self) -> dict[str, Any]:
        try:
            status: dict[str, Any] = json.loads((self.run_dir / "status.json").read_text())
        except (OSError, ValueError):
            return {}
        return status

    @property
    def entries(self) -> list[dict[str, Any]]:
        path = self.run_dir / "journal.jsonl"
        return list(read(path)) if path.exists() else []

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [entry for entry in self.entries if entry["kind"] == kind]

    def wait_until(self, is_so: Callable[[], object], what: str) -> None:
        deadline_s = time.monotonic() + TIMEOUT_S
        while not is_so():
            assert self.process.poll() is None, f"the run ended before {what}:\n{self.process.communicate()[0]}"
            assert time.monotonic() < deadline_s, f"{what} did not happen in {TIMEOUT_S:g} s"
            time.sleep(0.05)

    def interrupt(self) -> None:
        self.process.send_signal(signal.SIGINT)

    def end(self) -> tuple[int, str]:
        """Exit code and everything it printed."""
        try:
            output, _ = self.process.communicate(timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.kill()
            raise
        return self.process.returncode, output

    def kill(self) -> None:
        """End the run and all its processes the hard way."""
        tree = [self.process.pid, *(child.pid for child in psutil.Process(self.process.pid).children(recursive=True))]
        for pid in tree:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.communicate()


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "orchestrator", *arguments]


def start(*arguments: str, run_dir: Path, environment: Mapping[str, str] | None = None) -> Started:
    process = subprocess.Popen(
        command(*arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, **(environment or {})},
    )
    return Started(process, run_dir)


def call(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), capture_output=True, text=True, timeout=TIMEOUT_S, check=False)


def results(run_dir: Path) -> dict[tuple[str, int], tuple[int, int, dict[str, float]]]:
    """Every report of every trial: (trial, index) -> (step, samples, metrics)."""
    return {
        (entry["trial_id"], entry["index"]): (entry["step"], entry["num_samples"], entry["metrics"])
        for entry in read(run_dir / "journal.jsonl")
        if entry["kind"] == "result"
    }
