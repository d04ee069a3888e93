"""jobs/runtime_env.yaml against pyproject.toml and constraints.txt."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from ray.runtime_env import RuntimeEnv

tomllib = pytest.importorskip("tomllib")  # Python 3.11
ROOT = Path(__file__).resolve().parents[3]


def by_name(line: str) -> tuple[str, str]:
    """A requirement's name, as an index writes it, and its version."""
    name, version = [*re.split(r"[=<>]=", line, maxsplit=1), ""][:2]
    return re.sub(r"[-_.]+", "-", name.split("[")[0].strip()).lower(), version


def test_the_packages_of_a_bare_node_are_the_projects_with_the_versions_that_were_run_together() -> None:
    text = (ROOT / "jobs" / "runtime_env.yaml").read_text(encoding="utf-8")
    assert set(yaml.safe_load(text)) == {"excludes", "env_vars"}
    begin = text.index("# pip:")
    bare = yaml.safe_load(text[:begin] + re.sub(r"^# ", "", text[begin:], flags=re.MULTILINE))
    listed = {by_name(line): line for line in bare["pip"]["packages"]}
    pinned = dict(by_name(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    with (ROOT / "pyproject.toml").open("rb") as stream:
        wanted = tomllib.load(stream)["project"]["dependencies"]
    names = [by_name(line)[0] for line in wanted]
    assert dict(listed.keys()) == {name: pinned[name] for name in names}
    extras = {line.split("]")[0] + "]" for line in wanted if "[" in line}
    assert all(any(line.startswith(extra) for line in listed.values()) for extra in extras)
    assert RuntimeEnv(**bare)["pip"]["packages"] == bare["pip"]["packages"]
