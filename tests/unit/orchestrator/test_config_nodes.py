"""Types of node in the run file: what is understood, and what each mistake is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.config import load_config
from orchestrator.errors import ConfigError
from orchestrator.policies.snapshot import DeviceKind
from orchestrator.run_spec import run_spec

GOOD = """\
name: priced
job: {name: mlp}
search: {max_concurrent: 8, num_trials: 8}
policy: {name: goodput_joint, params: {min_return: 0.7}}
cluster:
  address: auto
  max_cost_per_hour: 3.0
  node_types:
    spot_gpu: {resources: {CPU: 4, GPU: 1, spot_gpu: 1}, price_per_hour: 0.5, max_nodes: 4, is_spot: true}
    cores: {resources: {CPU: 16, cores: 1}, price_per_hour: 1.0, max_nodes: 2}
"""


def load(tmp_path: Path, text: str = GOOD, *overrides: str) -> object:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return load_config(path, [f"storage={tmp_path}", *overrides])


def test_types_become_what_a_policy_sees(tmp_path: Path) -> None:
    resolved = load_config(tmp_path / _written(tmp_path), [f"storage={tmp_path}"])
    spec = run_spec(resolved)
    cores, gpu = spec.node_types
    assert (spec.max_cost_per_hour, spec.max_running) == (3.0, 8)
    assert (cores.name, cores.kind, cores.num_devices, cores.units, cores.num_ranks) == (
        "cores",
        DeviceKind.CPU,
        1,
        16,
        16,
    )
    assert (gpu.name, gpu.kind, gpu.num_devices, gpu.num_ranks, gpu.is_spot) == (
        "spot_gpu",
        DeviceKind.CUDA,
        1,
        2,
        True,
    ), "eight trials on at most four GPUs"
    on_cores = run_spec(load_config(tmp_path / "run.yaml", [f"storage={tmp_path}", "devices.use=cpu"]))
    assert [each.kind for each in on_cores.node_types] == [DeviceKind.CPU, DeviceKind.CPU]


def test_the_resolved_file_reads_back_to_the_same_types(tmp_path: Path) -> None:
    resolved = load_config(tmp_path / _written(tmp_path), [f"storage={tmp_path}"])
    (tmp_path / "again.yaml").write_text(resolved.to_yaml(with_origins=True))
    assert load_config(tmp_path / "again.yaml", []).config == resolved.config


@pytest.mark.parametrize(
    ("old", "new", "key", "says"),
    [
        ("address: auto", "address: local", "cluster.node_types", "a local cluster is fixed"),
        ("address: auto", "address: auto\n  autoscale: true", "cluster.autoscale", "one of the two"),
        ("goodput_joint, params: {min_return: 0.7}", "goodput", "policy.name", "goodput_joint"),
        ("min_return: 0.7", "min_return: 2", "policy.params.min_return", "a part of the best return"),
        ("max_nodes: 2", "max_nodes: -1", "cluster.node_types.cores.max_nodes", "got -1"),
        ("max_nodes: 2", "max_node: 2", "cluster.node_types.cores.max_node", "max_nodes"),
        ("price_per_hour: 1.0", "price_per_hour: -1", "cluster.node_types.cores.price_per_hour", "got -1"),
        ("price_per_hour: 1.0", "price_per_hour: 9.0", "cluster.node_types.cores.price_per_hour", "above"),
        ("CPU: 16, cores: 1", "CPU: 16, cores: 0", "cluster.node_types.cores.resources", "above 0"),
        ("CPU: 16, cores: 1", "cores: 1", "cluster.node_types.cores.resources", "at least CPU: 1"),
        ("CPU: 16, cores: 1", "CPU: 2", "cluster.node_types.cores.resources", "spot_gpu"),
        ("    cores:", "    '-x y':", "cluster.node_types.-x y", "letters, digits"),
        ("name: priced", "name: priced\ndevices: {use: gpu}", "cluster.node_types.cores.resources", "GPU: 1"),
        (GOOD[GOOD.index("  node_types") :], "", "cluster.max_cost_per_hour", "without cluster.node_types"),
    ],
)
def test_a_mistake_is_named_with_what_is_allowed(tmp_path: Path, old: str, new: str, key: str, says: str) -> None:
    assert old in GOOD
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, GOOD.replace(old, new))
    assert key in str(caught.value)
    assert says in str(caught.value)


def _written(tmp_path: Path) -> str:
    (tmp_path / "run.yaml").write_text(GOOD)
    return "run.yaml"
