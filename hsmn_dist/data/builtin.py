"""Datasets that need no network: word_problems, stdlib_code, passkey, pair_recall, list_sorting, and `text` for own documents.

The first two have the columns of gsm8k and code_search_net and go through those preprocessors. `passkey` hides a fact in
filler and asks for it (Mohtashami and Jaggi 2023, arXiv 2305.16300, section 4.3); `pair_recall` shows pairs and asks for one
(Arora et al. 2023, arXiv 2312.04927); `text` cuts documents into a context and its continuation. What is unusual: row i is
decided by (name or label, i) alone, so more examples never change the earlier ones, and the Python version enters only
`stdlib_code`.
"""

from __future__ import annotations

import ast
import hashlib
import platform
import random
import sysconfig
import warnings
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from string import ascii_lowercase
from typing import Any

from hsmn_dist.config.data import DatasetConfig
from hsmn_dist.data.example import Example
from hsmn_dist.data.preprocessors.all import get_preprocessor, preprocessor_names
from hsmn_dist.data.preprocessors.base import Preprocessor, Row, SkipCounter, column, digest, row_id, text, wrong_type
from hsmn_dist.foundation.errors import ConfigError
from hsmn_dist.foundation.registry import near_name

DEFAULT_EXAMPLES = 2000
TEXT_NAME = "text"
CONTEXT_WORDS, TARGET_WORDS = 96, 32
MAX_CODE_LINES = 16
RECALL_PAIRS, RECALL_DISTANCE = 8, 3
MAX_FUNCTIONS_PER_FILE = 16  # a file is a group, and large groups make uneven splits
MAX_DOCUMENTATION_CHARACTERS = 240

_NAMES = ("Anna", "Ben", "Carla", "David", "Emma", "Felix", "Grace", "Hugo", "Iris", "Jonas", "Kira", "Leo")
_ITEMS = ("apples", "books", "coins", "eggs", "marbles", "pencils", "shells", "stamps", "stickers", "tickets")
_FILLER = (
    "The grass is green and the sky is blue.",
    "The river runs slowly past the old mill.",
    "A cold wind came down from the hills.",
    "The baker opened the shop before sunrise.",
    "Nobody had walked along that road for years.",
    "The children played under the tall trees.",
    "A small boat crossed the quiet lake.",
    "The clock in the hall struck four.",
    "Snow covered the roofs of the village.",
    "The train was late again that evening.",
    "An old dog slept beside the warm stove.",
    "The market was full of fruit and flowers.",
)
_LEFT_OUT = (
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "site-packages",
    "__pycache__",
    "turtledemo",
    "encodings",
    "pydoc_data",
)


def _random(name: str, number: int) -> random.Random:
    # A string seed is hashed by SHA-512, the same on every machine.
    return random.Random(f"{name}:{number}")


def _add(a: int, b: int, c: int, who: str, item: str) -> tuple[str, str, int]:
    question = f"{who} has {a} {item} and buys {b} more. How many {item} does {who} have now?"
    return question, f"{who} has {a} + {b} = {a + b} {item}.", a + b


def _subtract(a: int, b: int, c: int, who: str, item: str) -> tuple[str, str, int]:
    question = f"{who} has {a + b} {item} and gives away {b}. How many {item} are left?"
    return question, f"There are {a + b} - {b} = {a} {item} left.", a


def _multiply(a: int, b: int, c: int, who: str, item: str) -> tuple[str, str, int]:
    question = f"{who} has {a} boxes with {b} {item} in each box. How many {item} does {who} have?"
    return question, f"{who} has {a} * {b} = {a * b} {item}.", a * b


def _share(a: int, b: int, c: int, who: str, item: str) -> tuple[str, str, int]:
    question = f"{who} shares {a * b} {item} equally among {a} friends. How many {item} does each friend get?"
    return question, f"Each friend gets {a * b} / {a} = {b} {item}.", b


def _add_then_subtract(a: int, b: int, c: int, who: str, item: str) -> tuple[str, str, int]:
    total = a + b
    lost = min(c, total)
    question = f"{who} has {a} {item}, finds {b} more and then loses {lost}. How many {item} are left?"
    return question, f"First {a} + {b} = {total}.\nThen {total} - {lost} = {total - lost}.", total - lost


def _multiply_then_add(a: int, b: int, c: int, who: str, item: str) -> tuple[str, str, int]:
    question = f"{who} buys {a} bags of {b} {item} and gets {c} more as a gift. How many {item} does {who} have?"
    return question, f"The bags hold {a} * {b} = {a * b}.\nWith the gift {a * b} + {c} = {a * b + c}.", a * b + c


_PROBLEMS: tuple[Callable[[int, int, int, str, str], tuple[str, str, int]], ...] = (
    _add,
    _subtract,
    _multiply,
    _share,
    _add_then_subtract,
    _multiply_then_add,
)


def word_problems(dataset: DatasetConfig) -> Iterator[Row]:
    """Rows {question, answer}: one or two steps with numbers from 2 to 9, worked out, then '#### N'."""
    for number in range(dataset.num_examples or DEFAULT_EXAMPLES):
        draw = _random(dataset.key, number)
        problem = draw.choice(_PROBLEMS)
        a, b, c = (draw.randint(2, 9) for _ in range(3))
        question, steps, answer = problem(a, b, c, draw.choice(_NAMES), draw.choice(_ITEMS))
        yield Row(f"word_problems row {number}", {"question": question, "answer": f"{steps}\n#### {answer}"})


def passkey(dataset: DatasetConfig) -> Iterator[Row]:
    """Rows {context, question, answer}: a key of `passkey_digits` somewhere in about `passkey_tokens` words of filler."""
    smallest = 10 ** (dataset.passkey_digits - 1)
    for number in range(dataset.num_examples or DEFAULT_EXAMPLES):
        draw = _random(dataset.key, number)
        key = str(draw.randint(smallest, 10 * smallest - 1))
        sentences: list[str] = []
        num_words = 0
        while num_words < dataset.passkey_tokens:
            sentences.append(draw.choice(_FILLER))
            num_words += len(sentences[-1].split())
        sentences.insert(draw.randint(0, len(sentences)), f"The pass key is {key}. Remember {key}.")
        value = {"context": " ".join(sentences), "question": "What is the pass key?", "answer": key}
        yield Row(f"passkey row {number}", value)


def pair_recall(dataset: DatasetConfig) -> Iterator[Row]:
    """Rows {context, question, answer}: eight letters with a digit each, drawn anew, and one of the first five letters.

    Which digit belongs to a letter is in the context alone, and at least 10 characters before the question: what answers it
    is attention or a memory, never weights or a short convolution.
    """
    for number in range(dataset.num_examples or DEFAULT_EXAMPLES):
        draw = _random(dataset.key, number)
        letters = draw.sample(ascii_lowercase, RECALL_PAIRS)
        digits = [str(draw.randint(0, 9)) for _ in letters]
        asked = draw.randrange(RECALL_PAIRS - RECALL_DISTANCE)
        pairs = " ".join(letter + digit for letter, digit in zip(letters, digits, strict=True))
        yield Row(f"pair_recall row {number}", {"context": pairs, "question": letters[asked], "answer": digits[asked]})


def list_sorting(dataset: DatasetConfig) -> Iterator[Row]:
    """Rows {context, question, answer}: four to six different one-digit numbers, to be put in order."""
    for number in range(dataset.num_examples or DEFAULT_EXAMPLES):
        draw = _random(dataset.key, number)
        digits = draw.sample(range(10), draw.randint(4, 6))
        value = {
            "context": f"Numbers: {' '.join(map(str, digits))}.",
            "question": "In rising order?",
            "answer": " ".join(map(str, sorted(digits))),
        }
        yield Row(f"list_sorting row {number}", value)


def _functions(tree: ast.AST, prefix: str = "") -> Iterator[tuple[str, ast.FunctionDef]]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef):
            yield prefix + node.name, node
        elif isinstance(node, ast.ClassDef):
            yield from _functions(node, f"{prefix}{node.name}.")


def _code_rows(path: Path, relative: str) -> Iterator[dict[str, Any]]:
    source = path.read_text(encoding="utf-8", errors="strict")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tree = ast.parse(source)
    lines = source.split("\n")
    for name, node in _functions(tree):
        documentation = (ast.get_docstring(node) or "").split("\n\n")[0].strip()
        num_lines = (node.end_lineno or node.lineno) - node.lineno + 1
        if not documentation or len(documentation) > MAX_DOCUMENTATION_CHARACTERS or num_lines > MAX_CODE_LINES:
            continue
        if not documentation.isascii() or len(node.body) < 2:
            continue
        code = "\n".join(lines[node.lineno - 1 : node.end_lineno])
        code = "\n".join(
            line[node.col_offset :] if not line[: node.col_offset].strip() else line for line in code.split("\n")
        )
        yield {
            "repository_name": "python/cpython",
            "func_path_in_repository": f"Lib/{relative}",
            "func_name": name,
            "whole_func_string": code,
            "language": "python",
            "func_code_string": code,
            "func_documentation_string": documentation,
        }


def stdlib_code(dataset: DatasetConfig) -> Iterator[Row]:
    """Rows with the columns of code_search_net: short documented functions of the installed standard library.

    Files come in a hashed order, so the first rows are a mix of the whole library.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [path for path in root.rglob("*.py") if not set(path.relative_to(root).parts[:-1]) & set(_LEFT_OUT)]
    by_hash = sorted(files, key=lambda path: hashlib.sha256(path.relative_to(root).as_posix().encode()).digest())
    limit = dataset.num_examples or DEFAULT_EXAMPLES
    number = 0
    for path in by_hash:
        relative = path.relative_to(root).as_posix()
        try:
            rows = list(islice(_code_rows(path, relative), MAX_FUNCTIONS_PER_FILE))
        except (SyntaxError, ValueError, OSError):  # files that are broken on purpose, such as test data
            continue
        for value in rows:
            if number == limit:
                return
            yield Row(f"Lib/{relative} row {number}", value)
            number += 1


def passkey_examples(rows: Iterable[Row], skipped: SkipCounter) -> Iterator[Example]:
    """context, question, answer -> the text with the question behind it, the key alone as target."""
    return _asked(rows, "{context}\nQuestion: {question}\nAnswer: ")


def pair_recall_examples(rows: Iterable[Row], skipped: SkipCounter) -> Iterator[Example]:
    """context, question, answer -> the pairs, the letter in question last of all, its digit as target."""
    return _asked(rows, "{context}\n{question}")


def _asked(rows: Iterable[Row], layout: str) -> Iterator[Example]:
    for row in rows:
        answer = text(row, "answer")
        yield Example(
            context=layout.format(context=text(row, "context"), question=text(row, "question")),
            target=answer,
            task="chat",
            id=row_id(row),
            group=row_id(row),
            kind="exact_answer",
            meta={"answer": answer},
        )


def text_examples(rows: Iterable[Row], skipped: SkipCounter) -> Iterator[Example]:
    """Text (one document a row): consecutive pieces of 96 words of context and the 32 words that follow.

    White space is kept. The group is the document, so no document stands on both sides of a split.
    """
    for row in rows:
        document = column(row, "text")
        if not isinstance(document, str):
            raise wrong_type(row, "text", "text", document)
        words = _words_with_blanks(document)
        if len(words) < 2:
            skipped.count("fewer than two words", row.origin)
            continue
        group = digest(document)
        file = str(row.value.get("file", ""))
        step = CONTEXT_WORDS + TARGET_WORDS
        for start in range(0, len(words), step):
            piece = words[start : start + step]
            cut = min(CONTEXT_WORDS, len(piece) - 1) if len(piece) < step else CONTEXT_WORDS
            if cut < 1:
                skipped.count("a last piece of one word", row.origin)
                continue
            context, target = "".join(piece[:cut]), "".join(piece[cut:])
            yield Example(context, target, "chat", f"{digest(file, document)}:{start}", group, "free_text")


def _words_with_blanks(document: str) -> list[str]:
    # Words, each with the blanks behind it: joining them gives the document back.
    words: list[str] = []
    start = 0
    for index in range(1, len(document)):
        if document[index - 1].isspace() and not document[index].isspace():
            words.append(document[start:index])
            start = index
    if document[start:].strip():
        words.append(document[start:])
    return words


GENERATORS: dict[str, Callable[[DatasetConfig], Iterator[Row]]] = {
    "word_problems": word_problems,
    "stdlib_code": stdlib_code,
    "passkey": passkey,
    "pair_recall": pair_recall,
    "list_sorting": list_sorting,
}


def builtin_identity(dataset: DatasetConfig) -> dict[str, Any]:
    """What decides the rows of a built-in dataset beside its configuration."""
    return {"rows": 1, "python": platform.python_version() if dataset.name == "stdlib_code" else ""}


def dataset_names() -> list[str]:
    """Every name that a configuration may use."""
    return sorted({*GENERATORS, TEXT_NAME, *preprocessor_names()})


def preprocessor_of(name: str) -> Preprocessor:
    """The preprocessor of a built-in or known dataset.

    Raises:
        ConfigError: no dataset has that name; the nearest is suggested.
    """
    own: dict[str, Preprocessor] = {
        "passkey": passkey_examples,
        "pair_recall": pair_recall_examples,
        "list_sorting": passkey_examples,
        TEXT_NAME: text_examples,
    }
    if name in own:
        return own[name]
    if name in GENERATORS:
        return get_preprocessor({"word_problems": "gsm8k", "stdlib_code": "code_search_net"}[name])
    if name not in preprocessor_names():
        near = near_name(name, dataset_names())
        raise ConfigError(
            f"unknown dataset {name!r}",
            allowed=", ".join(dataset_names()),
            action=f"did you mean {near!r}?" if near else "choose one of the dataset names above",
        )
    return get_preprocessor(name)
