"""The clusters in `deploy/`: launcher files against Ray's own schema, KubeRay manifests against the operator's fields.

The fields below were taken from the operator's types (`ray-operator/apis/ray/v1`, RayCluster and RayJob; `authOptions`
from the API reference of KubeRay 1.6), the parts of a pod that the manifests use from Kubernetes' API reference. Not
checked: other fields of pods, what a cluster's admission hooks refuse, and whether images and claims exist.
"""

from __future__ import annotations

import importlib
import shlex
import subprocess
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import pytest
import yaml

from orchestrator import cli
from orchestrator.submit import STOP_WAIT_S
from tests.unit.test_cluster_yaml import SECRET, all_commands, start_command

ROOT = Path(__file__).parents[2]
LAUNCHER = [ROOT / "deploy" / "cluster-gcp.yaml", ROOT / "deploy" / "cluster-own.yaml"]
KUBERAY = [ROOT / "deploy" / "raycluster.yaml", ROOT / "deploy" / "rayjob.yaml"]


def strict(**properties: Any) -> dict[str, Any]:
    """An object with these fields and no others; a name that ends in an underscore must be there."""
    fields = {name.rstrip("_"): value for name, value in properties.items()}
    required = [name.rstrip("_") for name in properties if name.endswith("_")]
    return {"type": "object", "properties": fields, "required": required, "additionalProperties": False}


def named(**properties: Any) -> dict[str, Any]:
    return strict(name_=TEXT, **properties)


TEXT, COUNT, FLAG = {"type": "string"}, {"type": "integer", "minimum": 0}, {"type": "boolean"}
WORDS = {"type": "object", "additionalProperties": TEXT}
ENV = named(value=TEXT, valueFrom=strict(secretKeyRef=named(key_=TEXT)))
RESOURCES = strict(limits=WORDS, requests=WORDS)
CONTAINER = named(
    image_=TEXT,
    resources=RESOURCES,
    env={"type": "array", "items": ENV},
    volumeMounts={"type": "array", "items": named(mountPath_=TEXT)},
)
VOLUME = named(persistentVolumeClaim=strict(claimName_=TEXT), emptyDir=strict(medium=TEXT, sizeLimit=TEXT))
POD = strict(
    metadata={"type": "object"},
    spec_=strict(
        containers_={"type": "array", "minItems": 1, "items": CONTAINER},
        volumes={"type": "array", "items": VOLUME},
        terminationGracePeriodSeconds=COUNT,
    ),
)
HEAD_GROUP = strict(
    serviceType=TEXT, headService={"type": "object"}, enableIngress=FLAG, rayStartParams_=WORDS, template_=POD
)
WORKER_GROUP = strict(
    groupName_=TEXT,
    replicas=COUNT,
    minReplicas_=COUNT,
    maxReplicas_=COUNT,
    numOfHosts=COUNT,
    rayStartParams_=WORDS,
    template_=POD,
    scaleStrategy={"type": "object"},
)
AUTOSCALER = strict(
    resources=RESOURCES,
    image=TEXT,
    env={"type": "array", "items": ENV},
    idleTimeoutSeconds=COUNT,
    upscalingMode={"enum": ["Default", "Aggressive", "Conservative"]},
)
CLUSTER = strict(
    headGroupSpec_=HEAD_GROUP,
    workerGroupSpecs={"type": "array", "items": WORKER_GROUP},
    rayVersion=TEXT,
    enableInTreeAutoscaling=FLAG,
    autoscalerOptions=AUTOSCALER,
    headServiceAnnotations=WORDS,
    suspend=FLAG,
    authOptions=strict(mode={"enum": ["disabled", "token"]}, secretName=TEXT, enableK8sTokenAuth=FLAG),
)
JOB = strict(
    entrypoint=TEXT,
    runtimeEnvYAML=TEXT,
    jobId=TEXT,
    metadata=WORDS,
    clusterSelector=WORDS,
    submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode"]},
    activeDeadlineSeconds=COUNT,
    backoffLimit=COUNT,
    shutdownAfterJobFinishes=FLAG,
    ttlSecondsAfterFinished=COUNT,
    suspend=FLAG,
    rayClusterSpec=CLUSTER,
)
KINDS = {"RayCluster": CLUSTER, "RayJob": JOB}


def loaded(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(path.read_text(encoding="ascii"))
    return content


def problems(manifest: dict[str, Any]) -> list[str]:
    """What is wrong with a manifest, one sentence each."""
    schema = strict(
        apiVersion_={"const": "ray.io/v1"},
        kind_={"enum": list(KINDS)},
        metadata_=named(namespace=TEXT, labels=WORDS),
        spec_=KINDS[manifest["kind"]],
    )
    return [error.message for error in jsonschema.Draft202012Validator(schema).iter_errors(manifest)]


def cluster_of(manifest: dict[str, Any]) -> dict[str, Any]:
    spec = manifest["spec"]
    found: dict[str, Any] = spec.get("rayClusterSpec", spec)
    return found


# The launcher's files.


@pytest.mark.parametrize("path", LAUNCHER, ids=lambda path: path.name)
def test_ray_takes_a_launcher_file(path: Path) -> None:
    try:
        launcher = importlib.import_module("ray.autoscaler._private.util")
        prepare, validate = launcher.prepare_config, launcher.validate_config
    except (ImportError, AttributeError) as error:
        pytest.skip(f"this Ray keeps the launcher's validation elsewhere: {error}")
    validate(prepare(loaded(path)))
    with pytest.raises(Exception, match="max_worker_count"):
        validate(prepare({**loaded(path), "max_worker_count": 1}))


@pytest.mark.parametrize("path", LAUNCHER, ids=lambda path: path.name)
def test_a_launcher_file_is_as_closed_as_the_one_for_aws(path: Path) -> None:
    cluster = loaded(path)
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        assert "RAY_AUTH_MODE=token" in start_command(cluster, key)
    assert "--dashboard-host=127.0.0.1" in start_command(cluster, "head_start_ray_commands")
    assert any("chmod 600 ~/.ray/auth_token" in command for command in cluster["setup_commands"])
    assert not SECRET.findall(path.read_text())


@pytest.mark.parametrize("path", LAUNCHER, ids=lambda path: path.name)
def test_the_commands_of_a_launcher_file_parse(path: Path) -> None:
    for command in all_commands(loaded(path)):
        parsed = subprocess.run(["bash", "-n", "-c", command], capture_output=True, text=True, check=False)
        assert parsed.returncode == 0, f"{command}: {parsed.stderr}"
    assert any("nvidia-cuda-mps-control" in command for command in loaded(path)["worker_setup_commands"])


def test_the_workers_on_google_cloud_are_spot_and_none_is_kept() -> None:
    cluster = loaded(LAUNCHER[0])
    workers = cluster["available_node_types"]["spot_gpu"]
    assert workers["min_workers"] == 0
    assert workers["node_config"]["scheduling"]["provisioningModel"] == "SPOT"
    assert cluster["available_node_types"]["head"]["resources"] == {"CPU": 0}


# KubeRay.


@pytest.mark.parametrize("path", KUBERAY, ids=lambda path: path.name)
def test_a_manifest_has_only_fields_the_operator_knows(path: Path) -> None:
    assert problems(loaded(path)) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [({"rayVersoin": "2.60.0"}, "rayVersoin"), ({"autoscalerOptions": {"upscalingMode": "Fast"}}, "'Fast'")],
)
def test_a_field_that_is_wrong_would_be_found(change: dict[str, Any], message: str) -> None:
    manifest = loaded(KUBERAY[0])
    assert any(message in text for text in problems({**manifest, "spec": {**manifest["spec"], **change}}))


@pytest.mark.parametrize("path", KUBERAY, ids=lambda path: path.name)
def test_a_manifest_trains_on_workers_that_come_and_go_behind_a_token(path: Path) -> None:
    cluster = cluster_of(loaded(path))
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["headGroupSpec"].get("serviceType", "ClusterIP") == "ClusterIP"
    (group,) = cluster["workerGroupSpecs"]
    assert group["minReplicas"] == 0
    assert not SECRET.findall(path.read_text())


def test_the_job_runs_a_command_there_is_and_has_time_for_checkpoints() -> None:
    spec = loaded(KUBERAY[1])["spec"]
    words = shlex.split(spec["entrypoint"])
    assert words[:3] == ["python", "-m", "orchestrator"]
    command = cli.orchestrator.get_command(None, words[3])  # type: ignore[arg-type]
    assert command is not None
    command.make_context(words[3], words[4:])
    assert yaml.safe_load(spec["runtimeEnvYAML"])["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"] == str(STOP_WAIT_S)
