"""What an installation puts on a user's import path: one name, and everything below it."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

from setuptools import find_packages

from orchestrator import jobs, policies

ROOT = Path(__file__).parents[2]


def test_an_installation_has_one_importable_name() -> None:
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())
    found = find_packages(str(ROOT), include=config["tool"]["setuptools"]["packages"]["find"]["include"])
    assert {name.partition(".")[0] for name in found} == {"orchestrator"}
    assert {"orchestrator.jobs", "orchestrator.policies", "orchestrator.policies.simulator"} <= set(found)


def test_the_links_lead_to_the_top_level_folders() -> None:
    for package, name in ((jobs, "jobs"), (policies, "policies")):
        assert (ROOT / "orchestrator" / name).is_symlink()
        assert Path(package.__path__[0]).resolve() == ROOT / name


def test_a_projects_own_folder_named_jobs_is_its_own(tmp_path: Path) -> None:
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "__init__.py").write_text("MINE = True\n")
    code = "import jobs, orchestrator.jobs; assert jobs.MINE; print(sorted(orchestrator.jobs.JOB_INFO)[0])"
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert result.stdout == "genome\n"
