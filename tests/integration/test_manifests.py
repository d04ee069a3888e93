from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hsmn_dist.config.load import load_run_config
from tests.support import manifests
from tests.support.manifests import CLUSTER, ROOT, container, documents, kind, rendered, variables, worker

KUBERAY = CLUSTER / "kuberay"
OVERLAYS = {  # what each one makes, and nothing else: a job and a standing cluster are never made together
    "dev/platform": {"PersistentVolumeClaim", "Deployment", "StatefulSet", "Service", "NetworkPolicy"},
    "dev/cluster": {"RayCluster"},
    "dev/job": {"RayJob"},
    "gpu/platform": {"PersistentVolumeClaim", "Deployment", "StatefulSet", "Service", "NetworkPolicy"},
    "gpu/cluster": {"RayCluster"},
    "gpu/job": {"RayJob"},
}
ENVIRONMENTS = sorted(path.name for path in CLUSTER.glob("*.env"))
SHELL = [
    *sorted(CLUSTER.rglob("*.sh")),
    *sorted((CLUSTER / "slurm").glob("*.sbatch")),
    *sorted((ROOT / "jobs").glob("*.sh")),
]
DOCKERFILES = sorted(CLUSTER.rglob("Dockerfile"))
AUTOSCALERS = sorted((CLUSTER / "autoscaler").glob("*.yaml"))
Break = Callable[[dict[str, Any]], None]


def walk(value: Any) -> Iterator[dict[str, Any]]:
    """Every mapping inside a document."""
    if isinstance(value, dict):
        yield value
        for inner in value.values():
            yield from walk(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from walk(inner)


@pytest.mark.parametrize("overlay", sorted(OVERLAYS))
def test_overlays_render_and_validate(overlay: str, tmp_path: Path) -> None:
    found = rendered(overlay)
    assert {document["kind"] for document in found} == OVERLAYS[overlay]
    for document in found:
        assert document["metadata"]["namespace"] == {"dev": "hsmn-dev", "gpu": "hsmn"}[overlay.split("/")[0]]
        if document["apiVersion"].startswith("ray.io/"):
            assert manifests.ray_errors(document, manifests.ray_schemas()) == []
    assert manifests.core_errors(found, tmp_path) == ""


def test_the_overlays_are_all_tested() -> None:
    found = {
        path.parent.relative_to(KUBERAY / "overlays").as_posix()
        for path in KUBERAY.rglob("kustomization.yaml")
        if "overlays" in path.parts and documents(path)[0]["kind"] == "Kustomization"
    }
    assert found == set(OVERLAYS)


BROKEN_RAY: dict[str, Break] = {
    "unknown field": lambda d: worker(d).update(replica=3),
    "wrong type": lambda d: worker(d).update(replicas="three"),
    "bad quantity type": lambda d: container(worker(d)["template"])["resources"].update(limits=[1]),
    "wrong version": lambda d: d.update(apiVersion="ray.io/v2"),
    "unknown authentication": lambda d: manifests.cluster_spec(d).update(authOptions={"mode": "open"}),
    "more replicas than allowed": lambda d: worker(d).update(replicas=9, maxReplicas=8),
    "fewer replicas than allowed": lambda d: worker(d).update(replicas=1, minReplicas=2, maxReplicas=8),
    "no head": lambda d: manifests.cluster_spec(d).pop("headGroupSpec"),
    "no containers": lambda d: worker(d)["template"]["spec"].pop("containers"),
}
BROKEN_JOB: dict[str, Break] = {
    "unknown submission mode": lambda d: d["spec"].update(submissionMode="Magic"),
    "no cluster": lambda d: d["spec"].pop("rayClusterSpec"),
    "no entrypoint": lambda d: d["spec"].pop("entrypoint"),
}


@pytest.mark.parametrize("what", sorted(BROKEN_RAY))
@pytest.mark.parametrize("overlay", ["dev/cluster", "gpu/job"])
def test_broken_copies_of_ray_objects_are_refused(overlay: str, what: str) -> None:
    broken = rendered(overlay)[0]
    BROKEN_RAY[what](broken)
    assert manifests.ray_errors(broken, manifests.ray_schemas())


@pytest.mark.parametrize("what", sorted(BROKEN_JOB))
def test_broken_copies_of_the_job_are_refused(what: str) -> None:
    broken = rendered("dev/job")[0]
    BROKEN_JOB[what](broken)
    assert manifests.ray_errors(broken, manifests.ray_schemas())


BROKEN_CORE: dict[str, tuple[str, Break]] = {
    "deployment, unknown field": ("Deployment", lambda d: d["spec"].update(replica=2)),
    "deployment, wrong type": ("Deployment", lambda d: d["spec"].update(replicas="one")),
    "deployment, no selector": ("Deployment", lambda d: d["spec"].pop("selector")),
    "database, unknown probe": ("StatefulSet", lambda d: container(d["spec"]["template"]).update(aliveProbe={})),
    "policy, unknown field": ("NetworkPolicy", lambda d: d["spec"].update(podSelect={})),
    "policy, ports are no list": ("NetworkPolicy", lambda d: d["spec"].update(ingress=[{"ports": {"port": 1}}])),
    "policy, no list of types": ("NetworkPolicy", lambda d: d["spec"].update(policyTypes="Ingress")),
    "volume, unknown field": ("PersistentVolumeClaim", lambda d: d["spec"].update(accessMode="ReadWriteMany")),
    "volume, modes are no list": ("PersistentVolumeClaim", lambda d: d["spec"].update(accessModes="ReadWriteMany")),
    "volume, size is no quantity": ("PersistentVolumeClaim", lambda d: d["spec"]["resources"].update(requests=["1Ti"])),
}


@pytest.mark.parametrize("what", sorted(BROKEN_CORE))
def test_broken_copies_of_core_objects_are_refused(what: str, tmp_path: Path) -> None:
    name, breaks = BROKEN_CORE[what]
    broken = copy.deepcopy(next(document for document in rendered("gpu/platform") if document["kind"] == name))
    assert manifests.core_errors([broken], tmp_path) == ""
    breaks(broken)
    assert manifests.core_errors([broken], tmp_path)


@pytest.mark.parametrize("scale", ["dev", "gpu"])
def test_the_jobs_cluster_is_the_standing_cluster(scale: str) -> None:
    job, cluster = rendered(f"{scale}/job")[0], rendered(f"{scale}/cluster")[0]
    for size in ("replicas", "minReplicas"):  # the job is elastic; a standing cluster of GPUs holds them all
        assert worker(job)[size] <= worker(cluster)[size]
        worker(job)[size] = worker(cluster)[size]
    assert job["spec"]["rayClusterSpec"] == cluster["spec"]


@pytest.mark.parametrize("overlay", sorted(OVERLAYS))
def test_pods_are_not_root_bounded_and_carry_no_secret(overlay: str) -> None:
    pods = 0
    for document in rendered(overlay):
        assert document["kind"] != "Secret"
        for mapping in walk(document):
            containers = mapping.get("containers")
            if isinstance(containers, list):
                pods += 1
                check_pod(mapping)
            if {"name", "value"} <= mapping.keys():
                name = str(mapping["name"])
                assert name.endswith("_FILE") or not any(word in name for word in ("PASSWORD", "SECRET", "TOKEN")), name
    assert pods >= 2


def check_pod(pod: dict[str, Any]) -> None:
    """What every pod promises."""
    context = pod["securityContext"]
    assert context["runAsNonRoot"] is True and context["seccompProfile"] == {"type": "RuntimeDefault"}
    names = [container["name"] for container in pod["containers"]]
    # The head alone, whose autoscaler asks Kubernetes for workers.
    assert pod["automountServiceAccountToken"] is (names == ["ray-head"])
    for container_ in pod["containers"]:
        assert container_["resources"]["limits"].keys() >= {"cpu", "memory"}
        assert container_["securityContext"]["allowPrivilegeEscalation"] is False
        assert container_["securityContext"]["capabilities"]["drop"] == ["ALL"]
        assert set(container_["securityContext"]["capabilities"].get("add", [])) <= {"IPC_LOCK"}
        assert ":" in container_["image"] and not container_["image"].endswith(":latest")
        assert names == ["ray-job-submitter"] or names[0].startswith("ray-") or "livenessProbe" in container_
    for volume in pod.get("volumes", []):
        assert "emptyDir" not in volume or volume["emptyDir"]["sizeLimit"], volume["name"]


def test_every_ray_cluster_asks_for_a_token_and_the_network_is_closed_by_default() -> None:
    for overlay in ("dev/cluster", "dev/job", "gpu/cluster", "gpu/job"):
        spec = manifests.cluster_spec(rendered(overlay)[0])
        assert spec["authOptions"] == {"mode": "token"}
        for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
            assert group["rayStartParams"]["object-spilling-directory"].startswith("/tmp/")
            mounts = {mount["mountPath"]: mount["name"] for mount in container(group["template"])["volumeMounts"]}
            assert mounts["/tmp"] == "scratch" and mounts["/shared"] == "shared"
    for overlay in ("dev/platform", "gpu/platform"):
        policies = [document for document in rendered(overlay) if document["kind"] == "NetworkPolicy"]
        assert any(policy["spec"]["podSelector"] == {} and "ingress" not in policy["spec"] for policy in policies)
        assert "kubernetes.io/metadata.name" not in str(policies), "the operator may run in any namespace"
        assert kind(rendered(overlay), "PersistentVolumeClaim")["spec"]["accessModes"] == ["ReadWriteMany"]


@pytest.mark.parametrize("scale", ["dev", "gpu"])
def test_the_job_has_the_ranks_that_its_run_may_ask_for(scale: str) -> None:
    job = rendered(f"{scale}/job")[0]
    path, changes = manifests.entrypoint_config(job)
    config = load_run_config(path, changes)
    sizes, group = config.cluster.world_sizes, worker(job)
    limits = container(group["template"])["resources"]["limits"]
    per_worker = int(limits.get("nvidia.com/gpu", int(limits["cpu"]) // config.cluster.cpus_per_rank))
    assert int(limits["cpu"]) >= per_worker * config.cluster.cpus_per_rank
    assert (sizes[0], sizes[-1]) == (group["minReplicas"] * per_worker, group["maxReplicas"] * per_worker)
    assert group["template"]["spec"]["terminationGracePeriodSeconds"] >= config.cluster.grace_seconds + 30
    assert (config.cluster.device == "gpu") is ("nvidia.com/gpu" in limits)


@pytest.mark.parametrize("scale", ["dev", "gpu"])
def test_the_job_is_elastic_and_a_standing_cluster_has_room_for_its_largest_size(scale: str) -> None:
    group, standing = worker(rendered(f"{scale}/job")[0]), worker(rendered(f"{scale}/cluster")[0])
    assert group["minReplicas"] < group["maxReplicas"] == standing["maxReplicas"]


@pytest.mark.parametrize("scale", ["dev", "gpu"])
def test_the_head_has_room_for_the_processes_that_prepare_the_data(scale: str) -> None:
    job = rendered(f"{scale}/job")[0]
    path, changes = manifests.entrypoint_config(job)
    workers = load_run_config(path, changes).data.prepare_workers
    limits = container(job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"])["resources"]["limits"]
    assert int(limits["cpu"]) > workers and manifests.gibibytes(limits["memory"]) >= 2 * workers + 4


@pytest.mark.parametrize("network", ["infiniband", "ethernet"])
@pytest.mark.parametrize("overlay", ["gpu/cluster", "gpu/job"])
def test_gpu_workers_have_the_variables_of_their_network(network: str, overlay: str, tmp_path: Path) -> None:
    tree = Path(shutil.copytree(KUBERAY, tmp_path / "kuberay"))
    choice = tree / "overlays" / "gpu" / "network" / "kustomization.yaml"
    text = choice.read_text(encoding="utf-8")
    line = "  - ../../../components/infiniband\n"
    assert line in text
    choice.write_text(text.replace(line, line.replace("infiniband", network)), encoding="utf-8")
    document = rendered(overlay, tree)[0]
    assert manifests.ray_errors(document, manifests.ray_schemas()) == []
    template = worker(document)["template"]
    health = manifests.live_variables("ray.env")
    wanted = manifests.live_variables("nccl.env", f"nccl_{network}.env")
    assert {name: value for name, value in variables(template).items() if name not in health} == wanted
    rdma = {"rdma/hca_shared_devices_a": 8}
    resources, security = container(template)["resources"], container(template)["securityContext"]
    for side in ("requests", "limits"):
        assert (resources[side].items() >= rdma.items()) is (network == "infiniband")
    assert security["capabilities"].get("add", []) == (["IPC_LOCK"] if network == "infiniband" else [])


@pytest.mark.parametrize("path", AUTOSCALERS, ids=lambda path: path.stem)
def test_autoscaler_files_pass_rays_own_validator(path: Path) -> None:
    assert manifests.autoscaler_errors(documents(path)[0]) == ""


BROKEN_AUTOSCALER: dict[str, Break] = {
    "unknown key": lambda d: d.update(idle_minutes=3),
    "wrong type": lambda d: d.update(max_workers="many"),
    "unknown head type": lambda d: d.update(head_node_type="tail"),
    "no provider": lambda d: d.pop("provider"),
}


BROKEN_HOSTS: dict[str, Break] = {
    "unknown key": lambda d: d.update(hosts=[]),
    "wrong type": lambda d: d.update(max_workers="all"),
    "unknown provider": lambda d: d["provider"].update(type="basement"),
    "mounts are no mapping": lambda d: d.update(file_mounts=["cluster"]),
    "commands are no list": lambda d: d.update(head_start_ray_commands="ray start"),
}


@pytest.mark.parametrize("what", sorted(BROKEN_AUTOSCALER))
def test_broken_copies_of_the_cloud_file_are_refused(what: str) -> None:
    broken = documents(CLUSTER / "autoscaler" / "cloud_aws.yaml")[0]
    BROKEN_AUTOSCALER[what](broken)
    assert manifests.autoscaler_errors(broken)


@pytest.mark.parametrize("what", sorted(BROKEN_HOSTS))
def test_broken_copies_of_the_hosts_file_are_refused(what: str) -> None:
    broken = documents(CLUSTER / "autoscaler" / "on_premise.yaml")[0]
    BROKEN_HOSTS[what](broken)
    assert manifests.autoscaler_errors(broken)


@pytest.mark.parametrize("path", AUTOSCALERS, ids=lambda path: path.stem)
def test_autoscaled_ranks_have_the_variables_of_their_network(path: Path) -> None:
    config = documents(path)[0]
    starts = [line for line in config["worker_start_ray_commands"] if "ray start" in line]
    assert starts
    for line in starts:
        sourced = [word.rstrip(";").rsplit("/", 1)[1] for word in line.split() if word.rstrip(";").endswith(".env")]
        assert sourced[0] == "nccl.env" and sourced[1].startswith("nccl_") and (CLUSTER / sourced[1]).is_file()
        assert line.index("set -a;") < line.index("nccl.env") < line.index("set +a;") < line.index("ray start")


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


BROKEN_DOCKERFILE = {
    "no version": ("FROM ${BASE}", "FROM python:latest"),
    "relative folder": ("WORKDIR /home/", "WORKDIR home/"),
    "ends as root": ("USER 1000", "USER root"),
    "unknown word": ("HEALTHCHECK ", "HEALTHCHEK "),
    "port beyond all": ("USER 1000", "EXPOSE 80000"),
}


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.relative_to(ROOT).as_posix())
@pytest.mark.parametrize("what", sorted(BROKEN_DOCKERFILE))
def test_broken_dockerfiles_are_refused(path: Path, what: str, tmp_path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    old, new = BROKEN_DOCKERFILE[what]
    assert old in text
    broken = tmp_path / "Dockerfile"
    broken.write_text(text.replace(old, new), encoding="utf-8")
    assert manifests.dockerfile_errors(broken)


def test_images_and_manifests_mean_the_same_user() -> None:
    assert all("--uid 1000" in path.read_text(encoding="utf-8") for path in DOCKERFILES)
    users = {str(m["runAsUser"]) for o in OVERLAYS for d in rendered(o) for m in walk(d) if "runAsUser" in m}
    assert users == {"1000", "999"}, "999 is the user of the image postgres"


def test_jobs_are_short_and_described() -> None:
    table = (ROOT / "jobs" / "README.md").read_text(encoding="utf-8")
    for path in sorted((ROOT / "jobs").glob("*.sh")):
        assert path.read_text(encoding="utf-8").count("\n") <= 30
        assert path.name in table


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_every_variable_has_its_reason(name: str) -> None:
    text = (CLUSTER / name).read_text(encoding="utf-8")
    assert manifests.live_variables(name)
    assert manifests.without_reason(text) == []
    # The check itself sees live and commented-out variables, and takes neither another variable nor a heading for a reason.
    for line in ("NCCL_NEW=1", "# NCCL_NEW=1"):
        for above in ("", "# --- network ---", "NCCL_OLD=1", "# NCCL_OLD=1"):
            assert line in manifests.without_reason(f"{text}\n# Why.\nNCCL_FIRST=1\n{above}\n{line}\n")


def test_every_head_is_started_with_the_shipped_health_checks() -> None:
    health = manifests.live_variables("ray.env")
    assert len(health) == 4
    for overlay in ("dev/cluster", "dev/job", "gpu/cluster", "gpu/job"):
        given = variables(manifests.cluster_spec(rendered(overlay)[0])["headGroupSpec"]["template"])
        assert health.items() <= given.items()
    for path in AUTOSCALERS:
        command = next(line for line in documents(path)[0]["head_start_ray_commands"] if "--head" in line)
        assert all(f"{name}={value} " in command for name, value in health.items())
    for path in (CLUSTER / "slurm").glob("*.sbatch"):
        assert "cluster/ray.env" in path.read_text(encoding="utf-8")
