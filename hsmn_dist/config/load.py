"""YAML + includes + `--set a.b=c` -> RunConfig, with errors that name file, line, key path and the nearest name."""

from __future__ import annotations

import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from hsmn_dist.config.run import RunConfig
from hsmn_dist.config.section import Section
from hsmn_dist.config.validate import check_run
from hsmn_dist.config.yaml_source import KeyPath, SourceTree, read_yaml, set_value
from hsmn_dist.foundation.errors import ConfigError
from hsmn_dist.foundation.files import sha256_of_json, write_text
from hsmn_dist.foundation.redact import redact_value
from hsmn_dist.foundation.registry import near_name


def load_run_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read and check one run.

    Args:
        path: YAML file.
        overrides: assignments `a.b=c`, applied in order over the file.

    Raises:
        ConfigError: an unknown key, a wrong value, or settings that contradict each other.
    """
    tree = read_yaml(path)
    for assignment in overrides:
        set_value(tree, assignment)
    try:
        config = RunConfig.model_validate(tree.data)
    except ValidationError as error:
        raise _explain(error, tree) from None
    check_run(config, tree.where)
    return config


def run_config_from_mapping(data: dict[str, Any]) -> RunConfig:
    """A RunConfig from plain data, such as the resolved copy of an earlier run."""
    tree = SourceTree(data)
    try:
        config = RunConfig.model_validate(data)
    except ValidationError as error:
        raise _explain(error, tree) from None
    check_run(config, tree.where)
    return config


def config_digest(config: RunConfig) -> str:
    """SHA-256 of the resolved configuration."""
    return sha256_of_json(config.model_dump(mode="json"))


def write_resolved(config: RunConfig, path: Path) -> None:
    """Write the resolved copy, defaults included, so that the run can be read and repeated."""
    # A file cannot hold secrets (validate.py); a caller's object might.
    plain = redact_value(config.model_dump(mode="json"))
    write_text(path, yaml.safe_dump(plain, sort_keys=False, width=120))


def _explain(error: ValidationError, tree: SourceTree) -> ConfigError:
    founds, alloweds, actions = [], [], []
    problems = error.errors(include_url=False)
    for problem in problems:
        if any(_is_inside(other["loc"], problem["loc"]) for other in problems):
            continue  # a list whose only element is wrong is also reported as too short
        path, owner = _resolve(tuple(str(part) for part in problem["loc"]), tree.data)
        where, dotted = tree.where(path), ".".join(path)
        if problem["type"] == "extra_forbidden":
            known = sorted(owner.model_fields) if owner else []
            near = near_name(path[-1], known)
            founds.append(f"{where}: unknown key {dotted!r}")
            alloweds.append(f"in {'.'.join(path[:-1]) or 'the run'}: {', '.join(known)}")
            actions.append(f"did you mean {near!r}?" if near else "remove the key")
        elif problem["type"] == "missing":
            founds.append(f"{where}: {dotted!r} is missing")
            alloweds.append(_description(owner, path[-1]))
            actions.append(f"add {dotted!r}")
        else:
            founds.append(f"{where}: {dotted} = {problem.get('input')!r}: {problem['msg']}")
            alloweds.append(_description(owner, path[-1]) if path else "a valid value")
            actions.append(f"change {dotted}")
    return ConfigError(
        "; ".join(founds), allowed="; ".join(dict.fromkeys(alloweds)), action="; ".join(dict.fromkeys(actions))
    )


def _is_inside(inner: tuple[int | str, ...], outer: tuple[int | str, ...]) -> bool:
    return len(inner) > len(outer) and inner[: len(outer)] == outer


def _description(owner: type[Section] | None, name: str) -> str:
    if owner is not None and name in owner.model_fields:
        return f"{name}: {owner.model_fields[name].description or owner.model_fields[name].annotation}"
    return "a value of the documented type"


def _resolve(location: tuple[str, ...], data: Any) -> tuple[KeyPath, type[Section] | None]:
    """Key path without the union tags that pydantic puts into it, and the section that owns its last key."""
    path: list[str] = []
    owner: Any = RunConfig
    node = data
    for position, part in enumerate(location):
        candidates = _sections(owner)
        tagged = [kind for kind in candidates if _has_tag(kind, part)]
        is_key = isinstance(node, dict) and part in node
        if tagged and not is_key and len(candidates) > 1:
            owner = tagged[0]
            continue
        path.append(part)
        if position == len(location) - 1:
            break
        fields = {name: info for kind in candidates for name, info in kind.model_fields.items()}
        if part in fields:
            owner = fields[part].annotation
        node = node.get(part) if isinstance(node, dict) else _item(node, part)
    sections = _sections(owner)
    return tuple(path), sections[0] if sections else None


def _item(node: Any, part: str) -> Any:
    return node[int(part)] if isinstance(node, list | tuple) and part.isdigit() and int(part) < len(node) else None


def _has_tag(kind: type[Section], tag: str) -> bool:
    return any(tag in typing.get_args(info.annotation) for info in kind.model_fields.values() if info.default == tag)


def _sections(annotation: Any) -> list[type[Section]]:
    """Section classes inside an annotation: itself, the members of a union, or the elements of a tuple."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is not None:
        return [kind for argument in typing.get_args(annotation) for kind in _sections(argument)]
    return []
