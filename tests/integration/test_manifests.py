from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import manifests
from tests.support.manifests import CLUSTER, ROOT, documents

OVERLAYS = ("dev", "gpu")
SHELL = [
    *sorted(CLUSTER.rglob("*.sh")),
    *sorted((CLUSTER / "slurm").glob("*.sbatch")),
    *sorted((ROOT / "jobs").glob("*.sh")),
]
DOCKERFILES = sorted(CLUSTER.rglob("Dockerfile"))
AUTOSCALERS = sorted((CLUSTER / "autoscaler").glob("*.yaml"))
Break = Callable[[dict[str, Any]], None]


def base(name: str) -> dict[str, Any]:
    return documents(CLUSTER / "kuberay" / "base" / f"{name}.yaml")[0]


def walk(value: Any) -> Iterator[dict[str, Any]]:
    """Every mapping inside a document."""
    if isinstance(value, dict):
        yield value
        for inner in value.values():
            yield from walk(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from walk(inner)


@pytest.mark.parametrize("name", ["raycluster", "rayjob"])
def test_ray_manifests_obey_the_operators_schemas(name: str) -> None:
    assert manifests.ray_errors(base(name), manifests.ray_schemas()) == []


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_overlays_render_and_validate(overlay: str, tmp_path: Path) -> None:
    rendered = manifests.rendered(overlay)
    schemas = manifests.ray_schemas()
    kinds = [document["kind"] for document in rendered]
    assert kinds.count("RayCluster") == kinds.count("RayJob") == 1
    for document in rendered:
        if document["apiVersion"].startswith("ray.io/"):
            assert manifests.ray_errors(document, schemas) == []
    assert manifests.core_errors(rendered, tmp_path) == ""


def _worker(document: dict[str, Any]) -> dict[str, Any]:
    spec = document["spec"].get("rayClusterSpec", document["spec"])
    worker: dict[str, Any] = spec["workerGroupSpecs"][0]
    return worker


BROKEN_RAY: dict[str, Break] = {
    "unknown field": lambda d: _worker(d).update(replica=3),
    "wrong type": lambda d: _worker(d).update(replicas="three"),
    "bad quantity type": lambda d: _worker(d)["template"]["spec"]["containers"][0]["resources"].update(limits=[1]),
    "wrong version": lambda d: d.update(apiVersion="ray.io/v2"),
    "unknown authentication": lambda d: d["spec"].get("rayClusterSpec", d["spec"]).update(authOptions={"mode": "open"}),
    "more replicas than allowed": lambda d: _worker(d).update(replicas=9, maxReplicas=8),
    "unknown submission mode": lambda d: d["spec"].update(submissionMode="Magic"),
    "no cluster": lambda d: d["spec"].pop("rayClusterSpec"),
}


@pytest.mark.parametrize("what", sorted(BROKEN_RAY))
def test_broken_copies_of_the_job_are_refused(what: str) -> None:
    broken = copy.deepcopy(base("rayjob"))
    BROKEN_RAY[what](broken)
    assert manifests.ray_errors(broken, manifests.ray_schemas())


BROKEN_CORE: dict[str, Break] = {
    "unknown field": lambda d: d["spec"].update(replica=2),
    "wrong type": lambda d: d["spec"].update(replicas="one"),
    "no selector": lambda d: d["spec"].pop("selector"),
}


@pytest.mark.parametrize("what", sorted(BROKEN_CORE))
def test_broken_copies_of_core_objects_are_refused(what: str, tmp_path: Path) -> None:
    broken = copy.deepcopy(base("mlflow"))
    assert manifests.core_errors([broken], tmp_path) == ""
    BROKEN_CORE[what](broken)
    assert manifests.core_errors([broken], tmp_path)


def test_the_jobs_cluster_is_the_standing_cluster() -> None:
    assert base("rayjob")["spec"]["rayClusterSpec"] == base("raycluster")["spec"]


@pytest.mark.parametrize("name", ["raycluster", "rayjob", "mlflow"])
def test_pods_are_not_root_bounded_and_carry_no_secret(name: str) -> None:
    pods = 0
    for document in documents(CLUSTER / "kuberay" / "base" / f"{name}.yaml"):
        assert document["kind"] != "Secret"
        for mapping in walk(document):
            containers = mapping.get("containers")
            if isinstance(containers, list):
                pods += 1
                assert mapping["securityContext"]["runAsNonRoot"] is True
                for container in containers:
                    assert container["resources"]["limits"].keys() >= {"cpu", "memory"}
                    assert container["securityContext"]["allowPrivilegeEscalation"] is False
                    assert not container["image"].endswith(":latest")
            if {"name", "value"} <= mapping.keys():
                assert not any(word in str(mapping["name"]) for word in ("PASSWORD", "SECRET", "TOKEN")) or str(
                    mapping["name"]
                ).endswith("_FILE"), mapping
    assert pods >= 2


def test_every_ray_cluster_asks_for_a_token_and_the_network_is_closed_by_default() -> None:
    assert base("raycluster")["spec"]["authOptions"] == {"mode": "token"}
    policies = documents(CLUSTER / "kuberay" / "base" / "networkpolicy.yaml")
    assert any(policy["spec"]["podSelector"] == {} and "ingress" not in policy["spec"] for policy in policies)


@pytest.mark.parametrize("path", AUTOSCALERS, ids=lambda path: path.stem)
def test_autoscaler_files_pass_rays_own_validator(path: Path) -> None:
    assert manifests.autoscaler_errors(documents(path)[0]) == ""


BROKEN_AUTOSCALER: dict[str, Break] = {
    "unknown key": lambda d: d.update(idle_minutes=3),
    "wrong type": lambda d: d.update(max_workers="many"),
    "unknown head type": lambda d: d.update(head_node_type="tail"),
    "no provider": lambda d: d.pop("provider"),
}


@pytest.mark.parametrize("what", sorted(BROKEN_AUTOSCALER))
def test_broken_copies_of_the_autoscaler_file_are_refused(what: str) -> None:
    broken = documents(CLUSTER / "autoscaler" / "cloud_aws.yaml")[0]
    BROKEN_AUTOSCALER[what](broken)
    assert manifests.autoscaler_errors(broken)


@pytest.mark.parametrize("path", SHELL, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_shell_scripts_pass_shellcheck(path: Path) -> None:
    assert manifests.shell_errors(path) == ""
    assert "set -euo pipefail" in path.read_text(encoding="utf-8")


def test_a_broken_shell_script_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "broken.sh"
    text = (CLUSTER / "slurm" / "one_node.sbatch").read_text(encoding="utf-8")
    path.write_text(text.replace('wait "$1" || code=$?', "wait $1 || code=$?", 1), encoding="utf-8")
    assert "SC2086" in manifests.shell_errors(path)


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_dockerfiles_pass_hadolint_and_end_as_a_user(path: Path) -> None:
    assert manifests.dockerfile_errors(path) == ""
    lines = path.read_text(encoding="utf-8").splitlines()
    users = [line for line in lines if line.startswith("USER ")]
    assert users and users[-1].split()[1] not in ("root", "0")
    assert any(line.startswith("HEALTHCHECK") for line in lines)
    assert any(line.startswith("ARG BASE") for line in lines)


@pytest.mark.parametrize(
    "change", [("FROM ${BASE}", "FROM python:latest"), ("EXPOSE 5000", "EXPOSE 80000"), ("USER 1000", "USER root")]
)
def test_broken_dockerfiles_are_refused(change: tuple[str, str], tmp_path: Path) -> None:
    text = (CLUSTER / "mlflow" / "Dockerfile").read_text(encoding="utf-8")
    assert change[0] in text
    path = tmp_path / "Dockerfile"
    path.write_text(text.replace(*change), encoding="utf-8")
    assert manifests.dockerfile_errors(path)


def test_jobs_are_short_and_described() -> None:
    table = (ROOT / "jobs" / "README.md").read_text(encoding="utf-8")
    for path in sorted((ROOT / "jobs").glob("*.sh")):
        assert path.read_text(encoding="utf-8").count("\n") <= 30
        assert path.name in table


@pytest.mark.parametrize("name", ["nccl.env", "ray.env"])
def test_every_variable_has_its_reason(name: str) -> None:
    lines = (CLUSTER / name).read_text(encoding="utf-8").splitlines()
    for index, line in enumerate(lines):
        if "=" in line and not line.startswith("# ") and line:
            assert lines[index - 1].startswith("# ") or "=" in lines[index - 1], line


def test_every_head_is_started_with_the_shipped_health_checks() -> None:
    lines = (CLUSTER / "ray.env").read_text(encoding="utf-8").splitlines()
    health = dict(line.split("=") for line in lines if line.startswith("RAY_health_check_"))
    assert len(health) == 4
    containers = base("raycluster")["spec"]["headGroupSpec"]["template"]["spec"]["containers"]
    given = {entry["name"]: entry.get("value") for entry in containers[0]["env"]}
    assert health.items() <= given.items()
    for path in AUTOSCALERS:
        command = next(line for line in documents(path)[0]["head_start_ray_commands"] if "--head" in line)
        assert all(f"{name}={value} " in command for name, value in health.items())
    for path in (CLUSTER / "slurm").glob("*.sbatch"):
        assert "cluster/ray.env" in path.read_text(encoding="utf-8")
