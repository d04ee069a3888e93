"""Code: code_search_net, human_eval, mbpp, apps, codecontests, code_alpaca.

What is unusual: blanks that are code are never stripped, tests are kept ready to run, and a docstring is cut out of the
code that it describes. `meta["tests"]` is a list of texts in one of two forms, named by `meta["test_format"]`:

- "python": each text is Python that is put after prompt + completion and raises when the completion is wrong;
- "stdin": each text is JSON {"input": ..., "output": ...} for a program that reads standard input.

Sources: Husain et al. 2019 (arXiv 1909.09436), Chen et al. 2021 (2107.03374), Austin et al. 2021 (2108.07732),
Hendrycks et al. 2021 (2105.09938), Li et al. 2022 (2203.07814).
"""

from __future__ import annotations

import ast
import json
import re
import warnings
from typing import Any

from hsmn_dist.data.example import Example
from hsmn_dist.data.preprocessors.base import (
    Row,
    UnusableRow,
    column,
    digest,
    list_in,
    mapping,
    maybe_text,
    optional,
    row_id,
    row_preprocessor,
    text,
    text_list,
)
from hsmn_dist.data.preprocessors.wording import FUNCTION_REQUEST, PROGRAM_REQUEST, TESTS_REQUEST, instruction_context

PYTHON_3 = 3  # deepmind/code_contests: 0 unknown, 1 Python 2, 2 C++, 3 Python 3, 4 Java


def parse_python(source: str) -> ast.Module | None:
    """The syntax tree, or None for what is not Python 3 (Python 2 is common in old repositories)."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return None


def cut_docstring(code: str) -> str:
    """Python code of one function without its docstring; unchanged when it has none.

    Raises:
        UnusableRow: the code does not parse, so nobody knows what to cut.
    """
    tree = parse_python(code)
    if tree is None or not tree.body or not isinstance(tree.body[0], ast.FunctionDef | ast.AsyncFunctionDef):
        raise UnusableRow("code is not one Python 3 function")
    function = tree.body[0]
    first = function.body[0]
    if ast.get_docstring(function, clean=False) is None or first.end_lineno is None:
        return code
    if len(function.body) == 1:
        raise UnusableRow("nothing but a docstring")
    lines = code.split("\n")
    following = function.body[1]
    start = _cut(lines[first.lineno - 1], first.col_offset)
    if following.lineno == first.end_lineno:  # `"doc"; return x`: what follows stays on its line
        end = _cut(lines[following.lineno - 1], following.col_offset, after=True)
        return "\n".join([*lines[: first.lineno - 1], start + end, *lines[following.lineno :]])
    trailing = _cut(lines[first.end_lineno - 1], first.end_col_offset or 0, after=True).strip().lstrip(";").strip()
    kept = [start + trailing] if (start + trailing).strip() else []
    return "\n".join([*lines[: first.lineno - 1], *kept, *lines[first.end_lineno :]])


def _cut(line: str, byte_offset: int, after: bool = False) -> str:
    # ast counts columns in UTF-8 bytes, not in characters.
    raw = line.encode("utf-8")
    return (raw[byte_offset:] if after else raw[:byte_offset]).decode("utf-8")


@row_preprocessor("code_search_net")
def code_search_net(row: Row) -> Example:
    """func_documentation_string to func_code_string, with the docstring cut out of Python code."""
    documentation = text(row, "func_documentation_string").strip()
    code = text(row, "func_code_string").replace("\r\n", "\n")
    language = text(row, "language").strip().lower()
    if language == "python":
        code = cut_docstring(code)
    repository = str(optional(row, "repository_name") or "")
    name = text(row, "func_name")
    path = str(optional(row, "func_path_in_repository") or "")
    return Example(
        context=f"Write the {language} function {name}:\n{documentation}\nCode:\n",
        target=code.strip("\n"),
        task="code",
        id=row_id(row),
        group=f"{repository}/{path}" if repository or path else digest(documentation),
        kind="free_text",
        meta={"language": language, "name": name, "repository": repository, "path": path},
    )


@row_preprocessor("human_eval")
def human_eval(row: Row) -> Example:
    """prompt, canonical_solution, test, entry_point: prompt + target runs as it stands. Evaluation only."""
    entry_point = text(row, "entry_point").strip()
    prompt = text(row, "prompt")
    task_id = text(row, "task_id")
    return Example(
        context=prompt,
        target=text(row, "canonical_solution"),
        task="code",
        id=task_id,
        group=task_id,
        kind="code",
        meta={
            "tests": [f"{text(row, 'test')}\n\ncheck({entry_point})\n"],
            "test_format": "python",
            "entry_point": entry_point,
            "prompt": prompt,
            "language": "python",
            "setup": "",
        },
    )


def tested_function(code: str, tests: list[str]) -> str | None:
    """The function of `code` that the first test calls; it stands nowhere else in mbpp."""
    defined = set(re.findall(r"^(?:async\s+)?def\s+(\w+)", code, re.MULTILINE))
    for test in tests:
        called = re.findall(r"\b([A-Za-z_]\w*)\s*\(", test)
        for name in called:
            if name in defined:
                return str(name)
    return None


@row_preprocessor("mbpp")
def mbpp(row: Row) -> Example:
    """text, code, test_list ...: the tests stand in the context, or the function's name could not be known."""
    instruction = optional(row, "text") if "text" in row.value else optional(row, "prompt")  # "prompt" when sanitized
    instruction = instruction if isinstance(instruction, str) and instruction.strip() else text(row, "text")
    code = text(row, "code").replace("\r\n", "\n").strip("\n")
    tests = [test.replace("\r\n", "\n") for test in text_list(row, "test_list")]
    if not tests:
        raise UnusableRow("no tests")
    setup = maybe_text(row, "test_setup_code") if "test_setup_code" in row.value else ""
    task_id = str(column(row, "task_id"))
    shown = "\n".join(tests)
    return Example(
        context=f"{instruction.strip()}\n{TESTS_REQUEST}\n{shown}\nCode:\n",
        target=code,
        task="code",
        id=task_id,
        group=task_id,
        kind="code",
        meta={
            "tests": tests,
            "test_format": "python",
            "entry_point": tested_function(code, tests),
            "prompt": "",
            "language": "python",
            "setup": setup.replace("\r\n", "\n"),
            "challenge_tests": optional(row, "challenge_test_list") or [],
        },
    )


def json_column(row: Row, name: str) -> Any:
    """The value of a column that holds JSON text.

    Raises:
        UnusableRow: the text is empty or no JSON (a number of many thousand digits counts as none).
    """
    try:
        return json.loads(text(row, name))
    except ValueError as error:
        raise UnusableRow(f"{name} is not JSON") from error


def function_test(name: str, arguments: list[Any], expected: Any) -> str:
    """A Python test of one call. Tuples count as lists, and a lone expected value may stand in a list, as in APPS."""
    allowed = [expected]
    if isinstance(expected, list) and len(expected) == 1:
        allowed.append(expected[0])
    return (
        "import json as _json\n"
        f"_call = getattr(Solution(), {name!r}) if 'Solution' in globals() else {name}\n"
        f"_got = _json.loads(_json.dumps(_call(*_json.loads({json.dumps(arguments)!r}))))\n"
        f"assert _got in _json.loads({json.dumps(allowed)!r}), _got\n"
    )


def stdin_tests(inputs: list[Any], outputs: list[Any]) -> list[str]:
    """One JSON text per pair; a list of lines becomes one text."""
    return [
        json.dumps({"input": _lines(given), "output": _lines(wanted)})
        for given, wanted in zip(inputs, outputs, strict=False)
    ]


def _lines(value: Any) -> str:
    return "\n".join(map(str, value)) if isinstance(value, list) else str(value)


def test_pairs(io: Any) -> tuple[list[Any], list[Any], str]:
    """Inputs, outputs and the function's name ("" for programs that read standard input) of an APPS `input_output`.

    Raises:
        UnusableRow: there are none, or not as many outputs as inputs.
    """
    inputs, outputs = (io.get("inputs"), io.get("outputs")) if isinstance(io, dict) else (None, None)
    if not isinstance(inputs, list) or not isinstance(outputs, list) or not inputs:
        raise UnusableRow("no tests")
    if len(inputs) != len(outputs):
        raise UnusableRow("not as many outputs as inputs")
    name = io.get("fn_name") or ""
    if name and (not isinstance(name, str) or not all(isinstance(given, list) for given in inputs)):
        raise UnusableRow("tests that call no function")
    return inputs, outputs, name


@row_preprocessor("apps")
def apps(row: Row) -> Example:
    """question, solutions and input_output (JSON text), starter_code: the first solution, all tests."""
    question = text(row, "question")
    starter = maybe_text(row, "starter_code")
    solutions = json_column(row, "solutions")
    if not solutions or not isinstance(solutions, list):
        raise UnusableRow("no solution")
    io = json_column(row, "input_output")
    inputs, outputs, entry_point = test_pairs(io)
    if entry_point:
        tests = [function_test(entry_point, list(given), wanted) for given, wanted in zip(inputs, outputs, strict=True)]
        how = FUNCTION_REQUEST
    else:
        tests = stdin_tests(inputs, outputs)
        how = PROGRAM_REQUEST
    asked = f"{how}\n{starter.rstrip()}\n" if starter.strip() else f"{how}\n"
    problem_id = str(column(row, "problem_id"))
    return Example(
        context=f"{question.strip()}\n\n{asked}Code:\n",
        target=str(solutions[0]).replace("\r\n", "\n").strip("\n"),
        task="code",
        id=problem_id,
        group=problem_id,
        kind="code",
        meta={
            "tests": tests,
            "test_format": "python" if entry_point else "stdin",
            "entry_point": entry_point or None,
            "prompt": "",
            "language": "python",
            "setup": "",
            "difficulty": optional(row, "difficulty") or "",
        },
    )


def contest_tests(row: Row, name: str) -> list[str]:
    """One of the three test groups of code_contests: a struct of two parallel lists."""
    group = mapping(row, name)
    return stdin_tests(list_in(row, name, group, "input"), list_in(row, name, group, "output"))


@row_preprocessor("codecontests")
def codecontests(row: Row) -> Example:
    """name, description, three groups of tests, solutions {language, solution}: the first Python 3 solution, all tests."""
    description, name = text(row, "description"), text(row, "name")
    solutions = mapping(row, "solutions")
    languages, sources = (list_in(row, "solutions", solutions, key) for key in ("language", "solution"))
    written = zip(languages, sources, strict=False)
    python = [str(source) for language, source in written if language == PYTHON_3 and str(source or "").strip()]
    if not python:
        raise UnusableRow("no Python 3 solution")
    groups = [contest_tests(row, f"{group}_tests") for group in ("public", "private", "generated")]
    if not any(groups):
        raise UnusableRow("no tests")
    return Example(
        context=(f"{description.strip()}\n\n{PROGRAM_REQUEST}\nCode:\n"),
        target=python[0].replace("\r\n", "\n").strip("\n"),
        task="code",
        id=digest(name, description),
        group=name,
        kind="code",
        meta={
            "tests": [test for group in groups for test in group],
            "test_format": "stdin",
            "entry_point": None,
            "prompt": "",
            "language": "python",
            "setup": "",
            "num_public_tests": len(groups[0]),
        },
    )


@row_preprocessor("code_alpaca")
def code_alpaca(row: Row) -> Example:
    """output, instruction, input: every row is a code row, whatever words it uses."""
    instruction, given = text(row, "instruction"), maybe_text(row, "input")
    return Example(
        context=instruction_context(instruction, given),
        target=text(row, "output").strip("\n"),
        task="code",
        id=row_id(row),
        group=digest(instruction, given),
        kind="free_text",
        meta={},
    )
