"""The signature of a preprocessor: raw rows in, examples out, and every row that cannot be used counted by reason.

A preprocessor is a generator over one pass of rows, so a dataset of any size needs the memory of one row (or of one
group of adjacent rows: a chapter, a conversation tree, a question). Two kinds of bad input are told apart. A column that
is not there, or holds another type, means that the file is not the dataset it is said to be: `DataError`, at once, with
file, row and the columns found. A row that is of the right shape and cannot be learned from (an empty answer, a hidden
label) is counted under a reason and passed over; `require_usable` turns a dataset without a single usable row into an
error.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from hsmn_dist.data.example import Example
from hsmn_dist.foundation.errors import DataError
from hsmn_dist.foundation.registry import Registry

MAX_FIRST_ORIGINS = 3


@dataclass(frozen=True)
class Row:
    """One raw row and where it stands ("gsm8k/train.jsonl:17"), for messages and ids."""

    origin: str
    value: dict[str, Any]


class SkipCounter:
    """How many rows could not be used, by reason, with the first places where each reason was met."""

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}
        self._first_origins: dict[str, list[str]] = {}

    def count(self, reason: str, origin: str) -> None:
        """Count one row under `reason`."""
        self._counts[reason] = self._counts.get(reason, 0) + 1
        origins = self._first_origins.setdefault(reason, [])
        if len(origins) < MAX_FIRST_ORIGINS:
            origins.append(origin)

    @property
    def total(self) -> int:
        """Rows counted under any reason."""
        return sum(self._counts.values())

    @property
    def counts(self) -> dict[str, int]:
        """Rows by reason, sorted by reason."""
        return dict(sorted(self._counts.items()))

    @property
    def first_origins(self) -> dict[str, list[str]]:
        """The first `MAX_FIRST_ORIGINS` places of each reason."""
        return {reason: list(origins) for reason, origins in sorted(self._first_origins.items())}

    def merge(self, other: SkipCounter) -> None:
        """Add the counts of another counter, as of a later part of the same dataset."""
        for reason, number in other.counts.items():
            self._counts[reason] = self._counts.get(reason, 0) + number
            origins = self._first_origins.setdefault(reason, [])
            origins.extend(other.first_origins[reason][: MAX_FIRST_ORIGINS - len(origins)])

    def to_json(self) -> dict[str, Any]:
        """Counts and first places, for an index."""
        return {"counts": self.counts, "first_origins": self.first_origins}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> SkipCounter:
        """The counter that `to_json` wrote."""
        counter = cls()
        counter._counts = {str(reason): int(number) for reason, number in value["counts"].items()}
        counter._first_origins = {str(reason): list(origins) for reason, origins in value["first_origins"].items()}
        return counter


class UnusableRow(Exception):
    """Says why a row of the right shape yields no example. Caught and counted by `row_preprocessor`."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


Preprocessor = Callable[[Iterable[Row], SkipCounter], Iterator[Example]]
RowFunction = Callable[[Row], "Example | list[Example]"]

PREPROCESSORS: Registry[Preprocessor] = Registry("dataset")
_ADJACENT_BY: dict[str, tuple[str, ...]] = {}


def preprocessor(*names: str, adjacent_by: tuple[str, ...] = ()) -> Callable[[Preprocessor], Preprocessor]:
    """Register a preprocessor of a stream of rows.

    `adjacent_by` names the columns whose equal values, in adjacent rows, make up one group (a chapter, a tree, a
    question): whoever deals rows to several processes must not cut inside such a group.
    """

    def register(function: Preprocessor) -> Preprocessor:
        for name in names:
            PREPROCESSORS.register(name)(function)
            if adjacent_by:
                _ADJACENT_BY[name] = adjacent_by
        return function

    return register


def row_preprocessor(*names: str) -> Callable[[RowFunction], Preprocessor]:
    """Register a function of one row; an `UnusableRow` that it raises is counted and the next row is read."""

    def register(function: RowFunction) -> Preprocessor:
        def run(rows: Iterable[Row], skipped: SkipCounter) -> Iterator[Example]:
            for row in rows:
                try:
                    made = function(row)
                except UnusableRow as unusable:
                    skipped.count(unusable.reason, row.origin)
                    continue
                if isinstance(made, Example):
                    yield made
                else:
                    yield from made

        run.__doc__ = function.__doc__
        run.__name__ = function.__name__
        return preprocessor(*names)(run)

    return register


def adjacent_columns(name: str) -> tuple[str, ...]:
    """The columns by which adjacent rows of a dataset belong together; empty when each row stands alone."""
    return _ADJACENT_BY.get(name, ())


def column(row: Row, name: str) -> Any:
    """The value of a column, null included.

    Raises:
        DataError: the row has no such column; file, row and the columns found are named.
    """
    if name not in row.value:
        raise DataError(
            f"{row.origin}: no column {name!r}; the columns found are {', '.join(map(repr, row.value)) or '(none)'}",
            allowed=f"rows that have the column {name!r}",
            action="check that the dataset name fits the file, or rename the column (`hsmn-dist data show NAME`)",
        )
    return row.value[name]


def optional(row: Row, name: str) -> Any:
    """The value of a column that some releases of the dataset lack, or None."""
    return row.value.get(name)


def wrong_type(row: Row, name: str, expected: str, value: object) -> DataError:
    """The error for a column that holds another type than the dataset's."""
    return DataError(
        f"{row.origin}: column {name!r} holds {type(value).__name__} {str(value)[:60]!r}",
        allowed=f"{expected} in column {name!r}",
        action="check that the dataset name fits the file (`hsmn-dist data show NAME` lists columns and types)",
    )


def maybe_text(row: Row, name: str) -> str:
    """The text of a column, "" when it is null. The column itself must be there."""
    value = column(row, name)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise wrong_type(row, name, "text", value)
    return value


def text(row: Row, name: str) -> str:
    """The text of a column, as it stands (blanks at the ends kept).

    Raises:
        UnusableRow: it is null, empty or blank.
    """
    value = maybe_text(row, name)
    if not value.strip():
        raise UnusableRow(f"empty {name}")
    return value


def text_list(row: Row, name: str) -> list[str]:
    """A column that holds a list of texts; null counts as an empty list."""
    value = column(row, name)
    if value is None:
        return []
    if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
        raise wrong_type(row, name, "a list of texts", value)
    return list(value)


def list_column(row: Row, name: str, required: bool = True) -> list[Any]:
    """A column that holds a list of anything; null counts as an empty list, and so does a missing one if not required."""
    value = column(row, name) if required else optional(row, name)
    if value is None:
        return []
    if not isinstance(value, list | tuple):
        raise wrong_type(row, name, "a list", value)
    return list(value)


def struct_list(row: Row, name: str) -> list[dict[str, Any]]:
    """A column that holds a list of structs; null counts as an empty list."""
    value = list_column(row, name)
    if not all(isinstance(item, dict) for item in value):
        raise wrong_type(row, name, "a list of structs", value)
    return value


def list_in(row: Row, name: str, struct: dict[str, Any], key: str) -> list[Any]:
    """The list under a key of a struct that stands in column `name`; null or absent counts as an empty list."""
    value = struct.get(key)
    if value is None:
        return []
    if not isinstance(value, list | tuple):
        raise wrong_type(row, f"{name}.{key}", "a list", value)
    return list(value)


def integer(row: Row, name: str) -> int:
    """A column that holds a whole number.

    Raises:
        UnusableRow: it is null.
    """
    value = column(row, name)
    if value is None:
        raise UnusableRow(f"empty {name}")
    if isinstance(value, bool) or not isinstance(value, int):
        raise wrong_type(row, name, "a whole number", value)
    return value


def as_struct(value: Any) -> dict[str, Any] | None:
    """A struct as it is; a list of structs as one struct of parallel lists; None for anything else.

    Readers of one and the same file differ in which of the two they give ({text: [..], label: [..]} or
    [{text, label}, ..]).
    """
    if isinstance(value, dict):
        return value
    if isinstance(value, list | tuple) and value and all(isinstance(item, dict) for item in value):
        keys = dict.fromkeys(key for item in value for key in item)
        return {key: [item.get(key) for item in value] for key in keys}
    return None


def mapping(row: Row, name: str) -> dict[str, Any]:
    """A column that holds a struct (in the hub's files, often one of parallel lists), or a list of structs."""
    value = column(row, name)
    struct = as_struct(value)
    if struct is None:
        raise wrong_type(row, name, "a struct", value)
    return struct


def digest(*parts: str) -> str:
    """16 hex digits that depend on the parts alone; blanks at the ends do not count."""
    joined = "\x1f".join(part.strip() for part in parts)
    return hashlib.sha256(joined.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def row_id(row: Row) -> str:
    """An id for rows that bring none: from the row's content and its place inside its file.

    The folder does not enter, so the same file at another place gives the same ids.
    """
    content = json.dumps(row.value, sort_keys=True, default=str)
    return digest(row.origin.rsplit("/", 1)[-1], content)


def require_usable(name: str, num_examples: int, skipped: SkipCounter) -> None:
    """Refuse a dataset that gave no example at all. Call it after the last row.

    Raises:
        DataError: `num_examples` is 0; the reasons with their first places are named.
    """
    if num_examples > 0:
        return
    reasons = "; ".join(
        f"{number} x {reason} (first: {', '.join(skipped.first_origins[reason])})"
        for reason, number in skipped.counts.items()
    )
    raise DataError(
        f"dataset {name!r} gave no usable example: {reasons or 'it has no rows'}",
        allowed="at least one usable row",
        action="check that the dataset name and the split fit the file; hidden answers are usual in test splits",
    )
