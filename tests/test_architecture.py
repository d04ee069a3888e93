"""The import law, the gates, size caps, docstrings, and "no torch under config": to change the house, change these tables."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "hsmn_dist"

FLOOR_0 = {"foundation", "config"}
FLOORS_0_1 = FLOOR_0 | {"models", "optim", "data", "tracking"}
FLOORS_0_2 = FLOORS_0_1 | {"distributed", "continual"}
FLOORS_0_3 = FLOORS_0_2 | {"training", "evaluation", "planner"}
MAY_IMPORT = {
    "foundation": set(),
    "config": {"foundation"},
    "models": FLOOR_0,
    "optim": FLOOR_0,
    "data": FLOOR_0,
    "tracking": FLOOR_0,
    "distributed": {"foundation"},
    "continual": {"distributed", "foundation", "config", "models"},
    "training": FLOORS_0_2,
    "evaluation": FLOORS_0_2,
    "planner": FLOORS_0_1,
    "orchestration": FLOORS_0_3,
    "cli": FLOORS_0_3 | {"orchestration"},
}
GATES = {
    "deepspeed": ["training/deepspeed_engine.py", "training/zero_shards.py"],
    "ray": [
        "orchestration/ray_launcher.py",
        "orchestration/ray_executor.py",
        "orchestration/ray_jobs.py",
        "orchestration/private_ray.py",
    ],
    "mlflow": ["tracking/mlflow_tracker.py", "tracking/mlflow_model.py"],
    "lm_eval": ["evaluation/lm_eval_adapter.py"],
    "webdataset": ["data/shards/writer.py", "data/shards/reader.py"],
    "transformers": ["data/tokenizer.py", "models/transformers_wrapper.py"],
    "datasets": ["data/raw_reader.py"],
}
ENVIRONMENT_FILES = {
    "distributed/world.py",
    "orchestration/ray_launcher.py",
    "orchestration/launcher.py",
    "orchestration/private_ray.py",
    "foundation/process_memory.py",  # one switch of torch, before its first tensor: docs/decisions/0086
    "foundation/redact.py",  # only to know which values to hide: docs/decisions/0083
}
MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 60
STDLIB = set(sys.stdlib_module_names)
STDLIB_ONLY_ROOMS = {"foundation", "tracking"}
FILES = sorted(PACKAGE.rglob("*.py"))


def relative(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def imports(path: Path) -> list[tuple[str, int, bool]]:
    """(module, line, at module scope) of every import that is not for type checking alone."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found: list[tuple[str, int, bool]] = []

    def visit(node: ast.AST, module_scope: bool) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            if isinstance(child, ast.Import):
                found.extend((alias.name, child.lineno, module_scope) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                found.append((child.module or "", child.lineno, module_scope))
            inner = module_scope and not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            visit(child, inner)

    visit(tree, True)
    return found


def test_imports_only_go_down_the_floors() -> None:
    breaches = []
    for path in FILES:
        parts = path.relative_to(PACKAGE).parts
        if len(parts) == 1:
            continue
        room = parts[0]
        for module, line, _ in imports(path):
            words = module.split(".")
            if words[0] == "hsmn_dist" and len(words) > 1 and words[1] != room and words[1] not in MAY_IMPORT[room]:
                breaches.append(f"{relative(path)}:{line} imports {module}")
    assert not breaches, "\n".join(breaches)


def test_every_room_is_in_the_law() -> None:
    rooms = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert rooms == set(MAY_IMPORT)


@pytest.mark.parametrize("giant", sorted(GATES))
def test_third_party_giants_stay_behind_their_gates(giant: str) -> None:
    breaches = [
        f"{relative(path)}:{line}"
        for path in FILES
        for module, line, _ in imports(path)
        if module.split(".")[0] == giant and relative(path) not in GATES[giant]
    ]
    assert not breaches, f"{giant} is imported outside its gate: {breaches}"


def test_gate_files_are_never_imported_at_module_scope() -> None:
    gates = {f"hsmn_dist.{file[:-3].replace('/', '.')}": file for files in GATES.values() for file in files}
    shards = {name for name in gates if ".data." in name}  # webdataset, datasets and transformers load lazily inside
    breaches = [
        f"{relative(path)}:{line} imports {module}"
        for path in FILES
        for module, line, module_scope in imports(path)
        if module_scope and module in gates and module not in shards and relative(path) not in gates.values()
    ]
    assert not breaches, "\n".join(breaches)


def test_no_cycles_between_files() -> None:
    names = {f"hsmn_dist.{relative(path)[:-3].replace('/', '.')}".removesuffix(".__init__"): path for path in FILES}
    edges = {
        name: [module for module, _, scope in imports(path) if scope and module in names and module != name]
        for name, path in names.items()
    }
    state: dict[str, int] = {}

    def walk(name: str, trail: list[str]) -> None:
        assert state.get(name) != 1, f"import cycle: {' -> '.join([*trail, name])}"
        if name in state:
            return
        state[name] = 1
        for other in edges[name]:
            walk(other, [*trail, name])
        state[name] = 2

    for name in names:
        walk(name, [])


def test_the_environment_is_touched_only_in_named_files() -> None:
    breaches = [
        relative(path)
        for path in FILES
        if relative(path) not in ENVIRONMENT_FILES
        and any(
            (isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv", "putenv"))
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        )
    ]
    assert not breaches, f"os.environ outside {sorted(ENVIRONMENT_FILES)}: {breaches}"


def test_models_and_optim_never_import_torch_distributed() -> None:
    breaches = [
        f"{relative(path)}:{line}"
        for path in FILES
        if relative(path).split("/")[0] in ("models", "optim")
        for module, line, _ in imports(path)
        if module.startswith("torch.distributed")
    ]
    assert not breaches, "\n".join(breaches)


def test_floor_zero_uses_only_the_standard_library_and_pydantic() -> None:
    allowed = {"foundation": STDLIB, "config": STDLIB | {"pydantic", "yaml"}}
    breaches = [
        f"{relative(path)}:{line} imports {module}"
        for room, permitted in allowed.items()
        for path in sorted((PACKAGE / room).rglob("*.py"))
        for module, line, _ in imports(path)
        if module.split(".")[0] not in permitted | {"hsmn_dist"}
    ]
    assert not breaches, "\n".join(breaches)


@pytest.mark.parametrize("module", ["hsmn_dist.config.load", "hsmn_dist.foundation.files", "hsmn_dist.cli.main"])
def test_importing_the_front_of_the_house_does_not_import_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=120).returncode == 0


def test_files_and_functions_stay_small() -> None:
    breaches = []
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        if (lines := text.count("\n")) > MAX_FILE_LINES:
            breaches.append(f"{relative(path)}: {lines} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > MAX_FUNCTION_LINES:
                    breaches.append(f"{relative(path)}:{node.lineno} {node.name}: {length} lines")
    assert not breaches, "\n".join(breaches)


def test_every_module_opens_with_a_docstring_and_is_ascii() -> None:
    breaches = []
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        if not ast.get_docstring(ast.parse(text)):
            breaches.append(f"{relative(path)}: no docstring")
        if not text.isascii():
            breaches.append(f"{relative(path)}: not ASCII")
    assert not breaches, "\n".join(breaches)


def test_room_files_hold_no_code_in_init() -> None:
    for path in PACKAGE.glob("*/**/__init__.py"):
        assert len(ast.parse(path.read_text(encoding="utf-8")).body) == 1, (
            f"{relative(path)} holds more than its docstring"
        )


def test_no_file_has_a_catch_all_name() -> None:
    refused = {"utils", "util", "common", "helpers", "misc"}
    assert not [relative(path) for path in FILES if path.stem in refused]
