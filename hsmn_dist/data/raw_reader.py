"""Open a source and read its raw rows, one at a time, each with the place it came from.

A source is a built-in generator, a JSONL, CSV, TSV or Parquet file, a folder of such files or of text files, or a dataset of
the hub, streamed at a pinned revision. What is unusual: a row that cannot be read stops the reading with file and line (a
half-read file would train on something else than its index says); values of CSV cells get the types of the dataset's record,
since CSV has none.
"""

from __future__ import annotations

import ast
import csv
import gzip
import io
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

from hsmn_dist.config.data import DatasetConfig
from hsmn_dist.data.builtin import GENERATORS, TEXT_NAME
from hsmn_dist.data.preprocessors.base import Row
from hsmn_dist.data.sources import known_source, require_may_train
from hsmn_dist.foundation.errors import DataError
from hsmn_dist.foundation.extras import require

TEXT_SUFFIXES = (".txt", ".md", ".rst")
_COMMIT = re.compile(r"^[0-9a-f]{40}$")
PARQUET_BATCH_ROWS = 256


def read_rows(dataset: DatasetConfig) -> Iterator[Row]:
    """The raw rows of a dataset, in an order that is the same every time.

    Raises:
        DataError: no such file, a row that cannot be read, a hub that cannot be reached.
    """
    if dataset.source:
        return read_path(Path(dataset.source), dataset.name)
    if dataset.name in GENERATORS:
        return GENERATORS[dataset.name](dataset)
    return read_hub(dataset)


def source_kind(dataset: DatasetConfig) -> str:
    """Where the rows come from: "local", "builtin" or "hub"."""
    if dataset.source:
        return "local"
    return "builtin" if dataset.name in GENERATORS else "hub"


def source_files(path: Path) -> list[Path]:
    """The files of a local source, sorted: the file itself, or the readable files below a folder.

    Raises:
        DataError: the path does not exist, or nothing below it can be read.
    """
    if path.is_file():
        if _reader(path) is None:
            raise DataError(
                f"{path}: unknown kind of file",
                allowed=", ".join(sorted({*_READERS, *TEXT_SUFFIXES})) + ", each also as .gz (but Parquet)",
                action="convert it, or rename it if only its name is unusual",
            )
        return [path]
    if not path.is_dir():
        raise DataError(
            f"{path}: no such file or folder",
            allowed="a JSONL, CSV, TSV or Parquet file, or a folder of them or of text files",
            action="correct the dataset's `source`",
        )
    files = [p for p in sorted(path.rglob("*")) if p.is_file() and _reader(p) is not None and not _hidden(p, path)]
    tables = [p for p in files if _kind(p) not in TEXT_SUFFIXES]
    if not files:
        raise DataError(
            f"{path}: holds no file that can be read",
            allowed=", ".join(sorted({*_READERS, *TEXT_SUFFIXES})),
            action="correct the dataset's `source`",
        )
    return tables or files  # a README beside tables is not data


def read_path(path: Path, name: str) -> Iterator[Row]:
    """Rows of a local file or folder; text files give rows {"text", "file"}, one a file."""
    types = _column_types(name)
    for file in source_files(path):
        reader = _reader(file)
        assert reader is not None
        if _kind(file) in TEXT_SUFFIXES:
            relative = file.relative_to(path).as_posix() if path.is_dir() else file.name
            yield from _read_text(file, relative)
        elif _kind(file) in (".csv", ".tsv"):
            for row in reader(file):
                yield Row(
                    row.origin,
                    {key: _typed(value, types.get(key, "str"), row.origin, key) for key, value in row.value.items()},
                )
        else:
            yield from reader(file)


def _hidden(path: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(root).parts)


def _kind(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _open_text(path: Path) -> TextIO:
    if path.suffix.lower() == ".gz":
        return io.TextIOWrapper(gzip.open(path, "rb"), encoding="utf-8-sig", newline="")
    return path.open(encoding="utf-8-sig", newline="")


def _unreadable(where: str, problem: str) -> DataError:
    return DataError(
        f"{where}: {problem}",
        allowed="a row that can be read whole, in UTF-8",
        action="mend or remove the row; nothing was prepared from this file",
    )


def _read_text(path: Path, relative: str) -> Iterator[Row]:
    try:
        with _open_text(path) as stream:
            yield Row(f"{path} line 1", {"text": stream.read(), "file": relative})
    except (UnicodeDecodeError, OSError, EOFError) as error:
        raise _unreadable(str(path), str(error)) from error


def _read_jsonl(path: Path) -> Iterator[Row]:
    number = 0
    try:
        with _open_text(path) as stream:
            for number, line in enumerate(stream, start=1):
                if not line.strip():
                    continue
                yield Row(f"{path} line {number}", _json_object(line, f"{path} line {number}"))
    except (UnicodeDecodeError, OSError, EOFError) as error:
        raise _unreadable(f"{path} line {number + 1}", str(error)) from error


def _json_object(line: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise _unreadable(where, f"not JSON ({error})") from error
    if not isinstance(value, dict):
        raise _unreadable(where, f"a {type(value).__name__}, not an object: {line.strip()[:60]}")
    return value


def _read_json(path: Path) -> Iterator[Row]:
    """A .json file: a list of objects, or JSON lines under another name."""
    with _open_text(path) as stream:
        try:
            is_list = stream.read(4096).lstrip().startswith("[")
        except (UnicodeDecodeError, OSError, EOFError) as error:
            raise _unreadable(str(path), str(error)) from error
    if not is_list:
        yield from _read_jsonl(path)
        return
    try:
        with _open_text(path) as stream:
            values = json.load(stream)
    except (ValueError, OSError, EOFError) as error:
        raise _unreadable(str(path), f"not JSON ({error})") from error
    for number, value in enumerate(values, start=1):
        if not isinstance(value, dict):
            raise _unreadable(f"{path} item {number}", f"a {type(value).__name__}, not an object")
        yield Row(f"{path} item {number}", value)


def _read_delimited(path: Path, delimiter: str) -> Iterator[Row]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    line = 0
    try:
        with _open_text(path) as stream:
            reader = csv.DictReader(stream, delimiter=delimiter, strict=True)
            for value in reader:
                line = reader.line_num
                if None in value or None in value.values():
                    columns = reader.fieldnames or []
                    raise _unreadable(f"{path} line {line}", f"not {len(columns)} cells ({', '.join(columns)})")
                yield Row(f"{path} line {line}", dict(value))
    except (csv.Error, UnicodeDecodeError, OSError, EOFError) as error:
        raise _unreadable(f"{path} line {line + 1}", str(error)) from error


def _read_csv(path: Path) -> Iterator[Row]:
    return _read_delimited(path, ",")


def _read_tsv(path: Path) -> Iterator[Row]:
    return _read_delimited(path, "\t")


def _read_parquet(path: Path) -> Iterator[Row]:
    parquet = require("pyarrow.parquet")
    arrow = require("pyarrow")
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=PARQUET_BATCH_ROWS):
                for value in batch.to_pylist():
                    number += 1
                    yield Row(f"{path} row {number}", value)
    except (arrow.ArrowException, OSError) as error:
        raise _unreadable(f"{path} row {number + 1}", f"not readable as Parquet ({error})") from error


_READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".parquet": _read_parquet,
}


def _reader(path: Path) -> Callable[[Path], Iterator[Row]] | None:
    kind = _kind(path)
    if kind in TEXT_SUFFIXES:
        return _read_jsonl  # never called: text has its own reader, which needs the folder
    return _READERS.get(kind)


def _column_types(name: str) -> dict[str, str]:
    record = known_source(name)
    return dict(record.columns) if record is not None else {}


def _typed(value: str, kind: str, origin: str, column: str) -> Any:
    """A CSV cell as the dataset's record types it; lists and structs stand in cells as JSON, or as pandas prints them."""
    if kind.startswith("str"):
        return value
    if value == "":
        return None
    try:
        return json.loads(value.lower() if kind.startswith("bool") else value)
    except ValueError:
        pass
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
        raise _unreadable(f"{origin}, column {column!r}", f"{value[:60]!r} is not of type {kind}") from error


def hub_revision(dataset: DatasetConfig) -> str:
    """The commit to read: the one asked for, else the newest, so that the index can name it.

    Raises:
        DataError: the hub cannot be reached.
    """
    if _COMMIT.match(dataset.revision):
        return dataset.revision
    hub_id = _hub_id(dataset)
    hub = require("huggingface_hub")
    try:
        info = hub.HfApi().dataset_info(hub_id, revision=dataset.revision or None)
    except Exception as error:  # the client has many kinds of failure, and one meaning
        raise _unreachable(hub_id, error) from error
    return str(info.sha)


def read_hub(dataset: DatasetConfig) -> Iterator[Row]:
    """Rows of a hub dataset, streamed. `dataset.revision` must be a commit by now."""
    hub_id = _hub_id(dataset)
    datasets = require("datasets")
    split = hub_split(dataset)
    configurations = hub_configurations(dataset)
    try:
        for configuration in configurations:
            stream = datasets.load_dataset(
                hub_id,
                name=configuration or None,
                split=split,
                revision=dataset.revision or None,
                streaming=True,
            )
            place = f"{hub_id}/{configuration}/{split}" if len(configurations) > 1 else f"{hub_id}/{split}"
            for number, value in enumerate(stream, start=1):
                row = dict(value)
                if len(configurations) > 1:
                    row.setdefault("task", configuration)
                yield Row(f"{place} row {number}", row)
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise _unreachable(hub_id, error) from error


def hub_configurations(dataset: DatasetConfig) -> tuple[str, ...]:
    """The hub configurations that are read, in order: one, or all of a dataset whose configurations are its parts."""
    record = known_source(dataset.name)
    if dataset.hub_configuration or record is None:
        return (dataset.hub_configuration,)
    return record.configurations if record.is_split_by_configuration else (record.default_configuration,)


def hub_split(dataset: DatasetConfig) -> str:
    """The hub split that is read: the one asked for, else the first that may train, else the benchmark's own."""
    record = known_source(dataset.name)
    if record is None or dataset.hub_split:
        split = dataset.hub_split or "train"
        if record is not None and not record.is_evaluation_only:
            require_may_train(record, split)
        return split
    return record.train_splits[0] if record.train_splits else record.evaluation_split


def _hub_id(dataset: DatasetConfig) -> str:
    record = known_source(dataset.name)
    if record is None or not record.hub_id:
        raise DataError(
            f"dataset {dataset.name!r} is not on the hub and has no `source`",
            allowed="a local file or folder in `source`"
            + (", for example a folder of .txt files" if dataset.name == TEXT_NAME else ""),
            action="add `source: PATH` to the dataset",
        )
    return record.hub_id


def _unreachable(hub_id: str, error: Exception) -> DataError:
    first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return DataError(
        f"hub dataset {hub_id!r} cannot be read ({type(error).__name__}: {first_line[:200]})",
        allowed="a reachable hub, a dataset and a revision that exist",
        action="check the network, or give the rows as a local file in the dataset's `source`",
    )
