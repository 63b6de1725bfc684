"""The example for the Ray cluster launcher: valid for Ray's own schema, closed to the outside, and without secrets."""

from __future__ import annotations

import importlib
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator import cli
from orchestrator.config import load_config

ROOT = Path(__file__).parents[2]
FILE = ROOT / "cluster.yaml"
TEXT = FILE.read_text(encoding="ascii")

SECRET = re.compile(
    r"AKIA[0-9A-Z]{16}|-----BEGIN|gh[pousr]_\w{20,}|eyJ[\w-]{20,}|(?:secret|password|passwd|access_key)\w*\s*[:=]"
    r"|RAY_AUTH_TOKEN\s*[:=]|\b[0-9a-f]{32,}\b|[A-Za-z0-9+/]{40,}={0,2}(?![\w.])",
    re.IGNORECASE,
)


@pytest.fixture
def cluster() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(TEXT)
    return loaded


def all_commands(cluster: dict[str, Any]) -> list[str]:
    return [command for key, value in cluster.items() if key.endswith("_commands") for command in value]


def start_command(cluster: dict[str, Any], key: str) -> list[str]:
    """Words of the command that starts Ray on a node."""
    (command,) = [command for command in cluster[key] if "ray start" in command]
    return shlex.split(command)


def test_ray_takes_it(cluster: dict[str, Any]) -> None:
    try:
        launcher = importlib.import_module("ray.autoscaler._private.util")
        prepare, validate = launcher.prepare_config, launcher.validate_config
    except (ImportError, AttributeError) as error:
        pytest.skip(f"this Ray keeps the launcher's validation elsewhere: {error}")
    prepared = prepare(cluster)
    validate(prepared)
    assert prepared["available_node_types"]["head"]["max_workers"] == 0


def test_rays_validation_would_notice_a_wrong_key(cluster: dict[str, Any]) -> None:
    try:
        launcher = importlib.import_module("ray.autoscaler._private.util")
        prepare, validate = launcher.prepare_config, launcher.validate_config
    except (ImportError, AttributeError) as error:
        pytest.skip(f"this Ray keeps the launcher's validation elsewhere: {error}")
    with pytest.raises(Exception, match="head_nod_type"):
        validate(prepare({**cluster, "head_nod_type": "head"}))


def test_the_head_is_on_demand_and_trains_nothing(cluster: dict[str, Any]) -> None:
    head = cluster["available_node_types"][cluster["head_node_type"]]
    assert "InstanceMarketOptions" not in head["node_config"]
    assert head["resources"] == {"CPU": 0}


def test_workers_are_spot_and_none_is_kept_for_nothing(cluster: dict[str, Any]) -> None:
    workers = [kind for name, kind in cluster["available_node_types"].items() if name != cluster["head_node_type"]]
    assert workers
    for kind in workers:
        assert kind["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
        assert kind["min_workers"] == 0
        assert 0 < kind["max_workers"] <= cluster["max_workers"]


@pytest.mark.parametrize("key", ["head_start_ray_commands", "worker_start_ray_commands"])
def test_every_node_asks_for_the_token_and_finds_it_in_a_file(cluster: dict[str, Any], key: str) -> None:
    words = start_command(cluster, key)
    assert "RAY_AUTH_MODE=token" in words
    (path,) = [word.partition("=")[2] for word in words if word.startswith("RAY_AUTH_TOKEN_PATH=")]
    home = f"/home/{cluster['auth']['ssh_user']}"
    assert path.replace("$HOME", home) in cluster["file_mounts"]


def test_only_its_owner_can_read_the_token(cluster: dict[str, Any]) -> None:
    assert any("chmod 600 ~/.ray/auth_token" in command for command in cluster["setup_commands"])


def test_drivers_and_tools_on_the_nodes_use_the_token_too(cluster: dict[str, Any]) -> None:
    assert any("export RAY_AUTH_MODE=token" in command for command in cluster["initialization_commands"])


def test_the_dashboard_listens_on_loopback_only(cluster: dict[str, Any]) -> None:
    assert "--dashboard-host=127.0.0.1" in start_command(cluster, "head_start_ray_commands")
    assert not any("0.0.0.0" in command for command in all_commands(cluster))


def test_there_is_no_secret_in_it() -> None:
    assert not SECRET.findall(TEXT)


@pytest.mark.parametrize(
    "line",
    [
        "RAY_AUTH_TOKEN=abc",
        "aws_secret_access_key: x",
        "key: AKIAABCDEFGHIJKLMNOP",
        "password: hunter2",
        "token: 0123456789abcdef0123456789abcdef",
    ],
)
def test_a_secret_would_be_found(line: str) -> None:
    assert SECRET.search(f"{TEXT}\n{line}")


def test_its_shell_commands_parse(cluster: dict[str, Any]) -> None:
    for command in all_commands(cluster):
        parsed = subprocess.run(["bash", "-n", "-c", command], capture_output=True, text=True, check=False)
        assert parsed.returncode == 0, f"{command}: {parsed.stderr}"


def test_the_package_is_installed_from_the_working_directory(cluster: dict[str, Any]) -> None:
    home = f"/home/{cluster['auth']['ssh_user']}"
    assert cluster["file_mounts"][f"{home}/orchestrator"] == "."
    assert any("cd ~/orchestrator" in command and "pip install" in command for command in cluster["setup_commands"])
    assert {".git/", ".venv/", "runs/"} <= set(cluster["rsync_exclude"])


def test_nodes_wait_for_workers_longer_than_a_node_takes_to_boot(cluster: dict[str, Any]) -> None:
    found = re.search(r"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S=(\d+)", " ".join(all_commands(cluster)))
    assert found
    assert int(found.group(1)) >= 300


def test_the_file_system_is_in_the_region_of_the_nodes(cluster: dict[str, Any]) -> None:
    regions = set(re.findall(r"\.efs\.([a-z0-9-]+)\.amazonaws", TEXT))
    assert regions == {cluster["provider"]["region"]}
    assert cluster["provider"]["availability_zone"].startswith(cluster["provider"]["region"])


def test_the_run_command_in_its_comment_is_a_good_one(tmp_path: Path) -> None:
    (line,) = re.findall(r"^#\s+orchestrator (run .*)$", TEXT, re.MULTILINE)
    name, file, *options = shlex.split(line)
    assert name in cli.COMMANDS
    overrides = options[1::2]
    assert set(options[::2]) == {"--set"}
    storage = [f"storage={tmp_path}" if value.startswith("storage=/mnt/runs") else value for value in overrides]
    assert load_config(ROOT / file, storage).config.cluster.address == "auto"


def test_what_is_to_be_set_says_so() -> None:
    assert len(re.findall(r"CHANGE-ME", TEXT.partition("cluster_name:")[2])) == 2
