"""YAML files with includes, read by the safe loader, with the file and line of every key kept for error messages.

`include: FILE` (or a list of files) may stand in any mapping; paths are relative to the file that names them. Included keys come
first and the file's own keys win; mappings are merged, everything else is replaced.
"""

from __future__ import annotations

import re
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from hsmn_dist.foundation.errors import ConfigError

KeyPath = tuple[str, ...]
MAX_FILE_BYTES = 4 << 20
MAX_NODES = 100_000
MAX_DEPTH = 50
"""Bounds far above any real configuration: aliases of aliases would otherwise grow without end."""
_BRACKETS = re.compile(r"[\[\]{}]")


@dataclass
class SourceTree:
    """Plain data, and where each key path was last set ("configs/x.yaml:12")."""

    data: dict[str, Any] = field(default_factory=dict)
    positions: dict[KeyPath, str] = field(default_factory=dict)

    def where(self, path: KeyPath) -> str:
        """Position of the nearest key path that is known, "the defaults" when nothing is."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.positions:
                return self.positions[path[:length]]
        return "the defaults"


def read_yaml(path: Path) -> SourceTree:
    """Read a configuration file and everything it includes.

    Raises:
        ConfigError: the file is absent or not YAML, a key stands twice, or files include each other.
    """
    tree = _read_file(path, ())
    if not isinstance(tree.data, dict):
        raise ConfigError(f"{path}: not a mapping", allowed="keys with values", action="see configs/runs for examples")
    return tree


def set_value(tree: SourceTree, assignment: str) -> None:
    """Apply `a.b=c` (the value is YAML; `a.0.b` reaches into lists). Changes `tree` in place."""
    name, sign, text = assignment.partition("=")
    path = tuple(name.split("."))
    if not sign or not all(path):
        raise ConfigError(
            f"--set {assignment!r}: no key or no '='",
            allowed="--set section.key=value",
            action="for example: --set training.max_steps=20",
        )
    node: Any = tree.data
    for key in path[:-1]:
        node = _child(node, key, assignment)
    value = _parse(text, f"--set {name}")
    if isinstance(node, list):
        node[_index(node, path[-1], assignment)] = value
    else:
        node[path[-1]] = value
    tree.positions[path] = f"--set {name}"


def _parse(text: str, where: str) -> Any:
    try:
        node = _compose(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: {error}", allowed="a YAML value", action="quote the value") from error
    if node is None:
        return None
    _check_size(node, where)
    return _value(node, where)


def _index(values: list[Any], key: str, assignment: str) -> int:
    if not key.isdigit() or int(key) >= len(values):
        raise ConfigError(
            f"--set {assignment!r}: {key!r} is not an element of a list of {len(values)}",
            allowed=f"0 to {len(values) - 1}",
            action="count from 0",
        )
    return int(key)


def _child(node: Any, key: str, assignment: str) -> Any:
    if isinstance(node, list):
        return node[_index(node, key, assignment)]
    child = node.setdefault(key, {})
    if not isinstance(child, dict | list):
        raise ConfigError(
            f"--set {assignment!r}: {key!r} holds {child!r}, not a section",
            allowed="the path of a single setting",
            action="shorten the path",
        )
    return child


def _read_file(path: Path, parents: tuple[Path, ...]) -> SourceTree:
    try:
        here = path.resolve()
        text = "" if here in parents else _read_text(path)
    except (OSError, ValueError) as error:
        source = f" (included by {parents[-1]})" if parents else ""
        raise ConfigError(
            f"{path}: cannot be read{source}: {error}",
            allowed="a readable UTF-8 YAML file",
            action="check the path; shipped configurations are in configs/runs",
        ) from error
    if here in parents:
        chain = " -> ".join(str(parent) for parent in (*parents, here))
        raise ConfigError(f"{path}: includes itself ({chain})", allowed="includes without a cycle", action="drop one")
    try:
        node = _compose(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not YAML: {error}", allowed="a YAML mapping", action="mend the line") from error
    tree = SourceTree()
    if node is None:
        return tree
    _check_size(node, str(path))
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(
            f"{path}:1: not a mapping", allowed="keys with values", action="see configs/runs for examples"
        )
    _fill(tree, node, path, (), (*parents, here))
    return tree


def _read_text(path: Path) -> str:
    """A configuration file's text; what is no plain file of a sensible size (a device, a pipe) is never opened."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("not a plain file")
    if status.st_size > MAX_FILE_BYTES:
        raise ValueError(f"{status.st_size} bytes are more than {MAX_FILE_BYTES}")
    return path.read_text(encoding="utf-8")


def _compose(text: str) -> Any:
    """The safe loader's nodes. Brackets within brackets cost it the square of their number, so they are counted before."""
    depth = 0
    for found in _BRACKETS.finditer(text):
        depth += 1 if found.group() in "[{" else -1
        if depth > 2 * MAX_DEPTH:
            raise ValueError(f"more than {2 * MAX_DEPTH} brackets within each other")
    return yaml.compose(text, Loader=yaml.SafeLoader)


def _check_size(root: yaml.Node, where: str) -> None:
    """Refuse documents that are huge, very deep, or contain themselves, counted with every alias written out."""
    waiting, count = [(root, 1)], 0
    while waiting:
        node, depth = waiting.pop()
        count += 1
        if count > MAX_NODES or depth > MAX_DEPTH:
            raise ConfigError(
                f"{where}: more than {MAX_NODES} values or {MAX_DEPTH} levels (an alias that contains itself?)",
                allowed="a configuration of ordinary size",
                action="write the values out in place of the alias",
            )
        if isinstance(node, yaml.MappingNode):
            waiting.extend((part, depth + 1) for pair in node.value for part in pair)
        elif isinstance(node, yaml.SequenceNode):
            waiting.extend((part, depth + 1) for part in node.value)


def _fill(tree: SourceTree, node: yaml.MappingNode, path: Path, prefix: KeyPath, parents: tuple[Path, ...]) -> None:
    """Merge a mapping node into `tree` at `prefix`: its includes first, then its own keys."""
    seen: set[str] = set()
    pairs = []
    for key_node, value_node in node.value:
        key = str(key_node.value)
        line = f"{path}:{key_node.start_mark.line + 1}"
        if key in seen or not isinstance(key_node, yaml.ScalarNode):
            raise ConfigError(f"{line}: key {key!r} stands twice", allowed="each key once", action="remove one of them")
        seen.add(key)
        if key == "include":
            for name in _include_names(value_node, line):
                _graft(tree, _read_file(path.parent / name, parents), prefix)
        else:
            pairs.append((key, value_node, line))
    for key, value_node, line in pairs:
        here = (*prefix, key)
        tree.positions[here] = line
        if isinstance(value_node, yaml.MappingNode):
            _section(tree.data, here)
            _fill(tree, value_node, path, here, parents)
        else:
            _section(tree.data, prefix)[key] = _value(value_node, line)
            _note_lines(tree, value_node, path, here)


def _value(node: yaml.Node, line: str) -> Any:
    loader = yaml.SafeLoader("")
    try:
        return loader.construct_document(node)
    except Exception as error:  # a tag on a value that it does not fit fails in many ways (`!!bool x`, `!!timestamp x`)
        raise ConfigError(f"{line}: {error}", allowed="plain YAML values", action="remove the tag") from error
    finally:
        loader.dispose()


def _note_lines(tree: SourceTree, node: yaml.Node, path: Path, prefix: KeyPath) -> None:
    """Remember the lines of mappings inside lists (curriculum stages)."""
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            tree.positions[(*prefix, str(index))] = f"{path}:{item.start_mark.line + 1}"
            _note_lines(tree, item, path, (*prefix, str(index)))
    elif isinstance(node, yaml.MappingNode):
        for key_node, value_node in node.value:
            tree.positions[(*prefix, str(key_node.value))] = f"{path}:{key_node.start_mark.line + 1}"
            _note_lines(tree, value_node, path, (*prefix, str(key_node.value)))


def _include_names(node: yaml.Node, line: str) -> list[str]:
    items = node.value if isinstance(node, yaml.SequenceNode) else [node]
    if not all(isinstance(item, yaml.ScalarNode) for item in items):
        raise ConfigError(f"{line}: include is not a file name", allowed="a file or a list of files", action="mend it")
    return [str(item.value) for item in items]


def _section(data: dict[str, Any], path: KeyPath) -> dict[str, Any]:
    node = data
    for key in path:
        if not isinstance(node.get(key), dict):
            node[key] = {}
        node = node[key]
    return node


def _graft(tree: SourceTree, included: SourceTree, prefix: KeyPath) -> None:
    _merge(_section(tree.data, prefix), included.data)
    tree.positions.update({(*prefix, *path): where for path, where in included.positions.items()})


def _merge(target: dict[str, Any], source: dict[str, Any]) -> None:
    for key, value in source.items():
        if isinstance(value, dict) and isinstance(target.get(key), dict):
            _merge(target[key], value)
        else:
            target[key] = value
