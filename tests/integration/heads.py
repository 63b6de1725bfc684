"""A Ray head of a test's own, as `ray start` makes it: own ports, own directory, token authentication on."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

START_S = 90.0


@dataclass(frozen=True)
class Head:
    """A running head: address of its GCS and of its dashboard, and its temporary directory."""

    address: str
    dashboard: str
    directory: Path


def free_ports(count: int) -> list[int]:
    opened = [socket.socket() for _ in range(count)]
    try:
        for each in opened:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in opened]
    finally:
        for each in opened:
            each.close()


@contextlib.contextmanager
def ray_head(num_cpus: int) -> Iterator[Head]:
    """Start a head, wait until it answers, and end its processes afterwards. Never `ray stop`: that ends all others."""
    directory = Path(tempfile.mkdtemp(prefix="rh", dir="/tmp"))
    port, dashboard, agent, grpc, metrics, runtime, client, node, objects = free_ports(9)
    environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_TMPDIR": str(directory)}
    options = {
        "port": port,
        "dashboard-port": dashboard,
        "dashboard-agent-listen-port": agent,
        "dashboard-agent-grpc-port": grpc,
        "metrics-export-port": metrics,
        "runtime-env-agent-port": runtime,
        "ray-client-server-port": client,
        "node-manager-port": node,
        "object-manager-port": objects,
        "num-cpus": num_cpus,
        "object-store-memory": 100 * 1024**2,
        "temp-dir": str(directory),
        "node-ip-address": "127.0.0.1",
        "dashboard-host": "127.0.0.1",
    }
    words = [f"--{name}={value}" for name, value in options.items()]
    command = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", "--disable-usage-stats", *words]
    log = directory / "start.log"
    with log.open("wb") as out:
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=out, start_new_session=True)
    try:
        deadline_s = time.monotonic() + START_S
        while not (answers(port) and answers(dashboard)):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline_s, log.read_text()
            time.sleep(0.2)
        yield Head(f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard}", directory)
    finally:
        tree = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
        process.send_signal(signal.SIGTERM)
        _, alive = psutil.wait_procs(tree, timeout=15.0)
        for each in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
        psutil.wait_procs(alive, timeout=5.0)
        process.wait()
        shutil.rmtree(directory, ignore_errors=True)


def answers(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(0.5)
        return probe.connect_ex(("127.0.0.1", port)) == 0
