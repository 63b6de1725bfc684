"""What the surroundings allow: a container's CPU quota, a short directory, ways around a proxy."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from orchestrator.cli import main
from orchestrator.host import MAX_TEMPORARY_BYTES, cpu_quota, make_temporary, num_usable_cores, without_proxy


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.mark.parametrize(
    ("text", "quota"),
    [("max 100000", None), ("150000 100000", 1.5), ("50000 100000\n", 0.5), ("", None), ("x y", None)],
)
def test_the_quota_of_a_container_is_read_from_version_2(tmp_path: Path, text: str, quota: float | None) -> None:
    write(tmp_path / "cpu.max", text)
    assert cpu_quota(tmp_path, tmp_path / "none") == quota


@pytest.mark.parametrize(("text", "quota"), [("-1", None), ("200000", 2.0)])
@pytest.mark.parametrize("name", ["cpu", "cpu,cpuacct"])
def test_the_quota_of_a_container_is_read_from_version_1(
    tmp_path: Path, name: str, text: str, quota: float | None
) -> None:
    write(tmp_path / name / "cpu.cfs_quota_us", text)
    write(tmp_path / name / "cpu.cfs_period_us", "100000")
    assert cpu_quota(tmp_path, tmp_path / "none") == quota


@pytest.mark.parametrize(
    ("own", "place", "file"),
    [
        ("0::/a/b\n", "a", "cpu.max"),
        ("0::/a/b\n", "a/b", "cpu.max"),
        ("4:memory:/x\n3:cpu,cpuacct:/a/b\n0::/\n", "cpu,cpuacct/a", "cpu.cfs_quota_us"),
    ],
)
def test_a_limit_of_a_group_holds_for_those_in_it(tmp_path: Path, own: str, place: str, file: str) -> None:
    write(tmp_path / "own", own)
    write(tmp_path / "root" / place / file, "300000 100000" if file == "cpu.max" else "300000")
    write(tmp_path / "root" / place / "cpu.cfs_period_us", "100000")
    assert cpu_quota(tmp_path / "root", tmp_path / "own") == 3.0


def test_a_group_outside_of_the_mount_is_not_read(tmp_path: Path) -> None:
    write(tmp_path / "own", "0::/../../etc\n")
    write(tmp_path / "root" / "cpu.max", "max 100000")
    assert cpu_quota(tmp_path / "root", tmp_path / "own") is None


def test_cores_are_no_more_than_the_quota_and_at_least_one(tmp_path: Path) -> None:
    assert num_usable_cores(tmp_path, tmp_path / "none") == len(os.sched_getaffinity(0))
    for text, cores in (("100000 100000", 1), ("30000 100000", 1), ("99999999 100000", len(os.sched_getaffinity(0)))):
        write(tmp_path / "cpu.max", text)
        assert num_usable_cores(tmp_path, tmp_path / "none") == cores


def test_a_temporary_directory_is_where_it_can_be_and_short(tmp_path: Path) -> None:
    long = tmp_path / ("x" * MAX_TEMPORARY_BYTES)
    long.mkdir()
    missing = Path("/none")
    made = make_temporary("orch-", [long, missing, Path("/tmp")])
    try:
        assert made.parent == Path("/tmp")
        assert made.stat().st_mode & 0o777 == 0o700
        assert len(str(made)) <= MAX_TEMPORARY_BYTES
    finally:
        made.rmdir()
    with pytest.raises(OSError, match=r"its path is too long by .*; /none: No such file") as caught:
        make_temporary("orch-", [long, missing])
    assert str(long) in str(caught.value)


@pytest.mark.parametrize("name", ["http_proxy", "HTTPS_PROXY", "all_proxy"])
def test_with_a_proxy_the_own_host_is_spoken_to_directly(name: str) -> None:
    assert without_proxy({}) == {}
    assert without_proxy({name: ""}) == {}
    found = without_proxy({name: "http://proxy:3128", "no_proxy": "intern.example, 127.0.0.1"})
    assert found == dict.fromkeys(("no_proxy", "NO_PROXY"), "intern.example,127.0.0.1,localhost,::1")
    assert without_proxy({name: "http://proxy:3128", "NO_PROXY": "*"}) == {}


@pytest.mark.parametrize(
    ("platform", "name", "way"), [("darwin", "macOS", "a Linux machine"), ("win32", "Windows", "WSL 2")]
)
@pytest.mark.parametrize("arguments", [["run", "r.yaml"], ["resume", "r"], ["doctor"], ["clean"], ["stop", "r"]])
def test_elsewhere_than_on_linux_a_command_that_needs_it_says_so_at_once(
    platform: str,
    name: str,
    way: str,
    arguments: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.delattr(os, "sched_getaffinity")
    assert main(arguments) == 3
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith(f"error: this is {name}, and a run needs Linux")
    assert f"allowed: {way}" in said


def test_elsewhere_help_check_and_what_only_reads_still_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.delattr(os, "sched_getaffinity")
    assert main(["run", "--help"]) == 0
    assert main(["list"]) == 0
    assert main(["init", "r.yaml", "--job", "mlp"]) == 0
    capsys.readouterr()
    assert main(["check", "r.yaml"]) == 2
    captured = capsys.readouterr()
    assert "name: r" in captured.out
    assert "error: this is macOS, and a run needs Linux" in captured.err
