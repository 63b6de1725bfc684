"""Each check of the doctor says ok, warn or fail, and what to do unless it is ok."""

from __future__ import annotations

import py_compile
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator import doctor
from orchestrator.doctor import PACKAGE_RANGES, PYTHON_RANGE, Status, check_package, parse_version

ROOT = Path(__file__).parents[3]


def _wanted(low: tuple[int, ...], high: tuple[int, ...] | None) -> str:
    below = "" if high is None else ",<" + ".".join(map(str, high))
    return ">=" + ".".join(map(str, low)) + below


def test_the_tested_ranges_are_those_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = {}
    for requirement in project["dependencies"]:
        name, _, bounds = requirement.partition(">=")
        declared[name.partition("[")[0]] = ">=" + bounds
    assert {name: _wanted(*bounds) for name, bounds in PACKAGE_RANGES.items()} == declared
    assert project["requires-python"] == _wanted(*PYTHON_RANGE)


@pytest.mark.parametrize(
    ("version", "numbers"),
    [("2.13.0+cpu", (2, 13, 0)), ("2.11", (2, 11)), ("2.60.0rc1", (2, 60, 0)), ("3.0a1", (3, 0)), ("", ()), ("x", ())],
)
def test_a_version_is_read_up_to_its_first_word(version: str, numbers: tuple[int, ...]) -> None:
    assert parse_version(version) == numbers


@pytest.mark.parametrize(
    ("version", "status"),
    [
        ("2.13.0+cpu", "ok"),
        ("2.11.0", "ok"),
        ("2.14.1", "warn"),
        ("2.12.0", "warn"),
        ("2.15.0", "warn"),
        ("2.16.0", "warn"),
        ("2.10.9", "fail"),
        ("", "fail"),
        (None, "fail"),
    ],
)
def test_a_package_outside_the_tested_range_is_not_ok(version: str | None, status: str) -> None:
    check = check_package("torch", version)
    assert check.status == status
    assert (check.remedy == "") == (status == "ok")


def test_an_untested_python_fails() -> None:
    assert doctor.check_python((3, 10, 1)).status is Status.FAIL
    assert doctor.check_python((3, 13, 0)).status is Status.FAIL
    assert doctor.check_python((3, 12, 4)).status is Status.OK


def test_a_missing_ray_extra_fails_and_names_it() -> None:
    check = doctor.check_modules("state api", "ray[default]", ("json", "no_such_module"))
    assert (check.status, check.detail) == (Status.FAIL, "missing: no_such_module")
    assert "ray[default]" in check.remedy


def test_modules_that_every_process_compiles_anew_are_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "slow_to_compile.py").write_text("A = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    modules = ("slow_to_compile", "not_there_at_all")
    monkeypatch.setattr("sys.dont_write_bytecode", True)
    check = doctor.check_bytecode(modules)
    assert (check.status, check.name) == (Status.WARN, "bytecode")
    assert "slow_to_compile" in check.detail
    assert str(tmp_path) in check.remedy
    monkeypatch.setattr("sys.dont_write_bytecode", False)
    assert doctor.check_bytecode(modules).status == Status.OK, "the first run writes it"
    py_compile.compile(str(tmp_path / "slow_to_compile.py"))
    monkeypatch.setattr("sys.dont_write_bytecode", True)
    assert doctor.check_bytecode(modules).status == Status.OK


def test_one_core_is_a_warning() -> None:
    assert doctor.check_cores(1, 8).status is Status.WARN
    assert doctor.check_cores(2, 8).status is Status.OK


def test_nvml_matters_only_where_there_is_a_gpu() -> None:
    def broken() -> None:
        raise OSError("libnvidia-ml.so.1: cannot open shared object file")

    assert doctor.check_nvml(0, broken).status is Status.OK
    assert doctor.check_nvml(1, broken).status is Status.WARN
    assert doctor.check_nvml(1, lambda: None).status is Status.OK


def test_no_free_port_fails() -> None:
    def none_left(count: int) -> Iterator[int]:
        yield from range(count - 1)
        raise OSError("address already in use")

    assert doctor.check_ports(none_left).status is Status.FAIL
    assert doctor.check_ports().status is Status.OK


def test_a_storage_that_cannot_be_written_fails(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    assert doctor.check_disk(tmp_path / "file" / "runs").status is Status.FAIL
    assert doctor.check_disk(tmp_path / "not" / "yet").status is not Status.FAIL
    assert not (tmp_path / "not").exists()


def test_missing_shared_memory_is_a_warning(tmp_path: Path) -> None:
    assert doctor.check_shared_memory(tmp_path / "shm").status is Status.WARN


def test_everything_is_examined_and_every_problem_has_a_remedy(tmp_path: Path) -> None:
    checks = doctor.examine(tmp_path)
    names = [check.name for check in checks]
    assert len(set(names)) == len(names)
    assert {"python", "torch", "ray", "state api", "devices", "nvml", "ports", "disk", "shared memory", "cores"} < set(
        names
    )
    assert all(bool(check.remedy) == (check.status is not Status.OK) for check in checks)


def test_a_quota_of_a_container_is_said_and_half_a_core_warns() -> None:
    assert doctor.check_cores(2, 64, 2.0).detail == "2 of 64 usable, by a container's quota of 2"
    half = doctor.check_cores(1, 64, 0.5)
    assert half.status is Status.WARN
    assert "50%" in half.remedy


def test_a_proxy_is_no_problem_because_a_run_goes_around_it() -> None:
    assert doctor.check_proxy({}).detail == "none in the way"
    check = doctor.check_proxy({"http_proxy": "http://proxy:3128"})
    assert check.status is Status.OK
    assert "no_proxy" in check.detail


def test_without_a_place_for_sockets_no_run_can_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere(_prefix: str) -> Path:
        raise OSError("/tmp: Read-only file system")

    check = doctor.check_temporary(nowhere)
    assert check.status is Status.FAIL
    assert "Read-only" in check.detail
    monkeypatch.setenv("TMPDIR", str(tmp_path / ("x" * 80)))
    check = doctor.check_temporary()
    assert check.status is Status.OK
    assert "TMPDIR is too long" in check.detail


def test_a_home_that_cannot_be_written_costs_downloads_and_no_run(tmp_path: Path) -> None:
    assert doctor.check_home(tmp_path).status is Status.OK
    assert doctor.check_home(tmp_path / "missing").status is Status.WARN


def test_a_token_for_all_clusters_of_the_user_is_named_and_never_removed(tmp_path: Path) -> None:
    token = tmp_path / "auth_token"
    assert doctor.check_token(token).status is Status.OK
    token.write_text("secret")
    token.chmod(0o644)
    check = doctor.check_token(token)
    assert check.status is Status.WARN
    assert "others can read it" in check.detail
    assert "secret" not in check.detail + check.remedy
    token.chmod(0o600)
    assert "others" not in doctor.check_token(token).detail
    assert token.exists()
