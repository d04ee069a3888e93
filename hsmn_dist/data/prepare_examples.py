"""First half of preparation: raw rows -> examples with their split, in parts of a fixed number of examples.

A part is a file of JSON lines, `{"split": ..., "example": {...}}`. Which example stands in which part depends on the rows
alone, so any number of processes can make shards of the parts afterwards and the bytes are the same.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from hsmn_dist.config.data import DataConfig, DatasetConfig
from hsmn_dist.data.builtin import preprocessor_of
from hsmn_dist.data.dedup import DedupSettings, deduplicated
from hsmn_dist.data.example import Example
from hsmn_dist.data.preprocessors.base import SkipCounter, require_usable
from hsmn_dist.data.raw_reader import read_rows
from hsmn_dist.data.shards.writer import disk_errors_as_data_errors
from hsmn_dist.data.sources import known_source
from hsmn_dist.data.split import split_of
from hsmn_dist.foundation.errors import DataError
from hsmn_dist.foundation.files import atomic_path, read_json, write_json

MANIFEST = "examples.json"
PROGRESS_EVERY = 500


@dataclass(frozen=True)
class ExamplesTask:
    """Read one dataset into `work_folder`."""

    dataset: DatasetConfig
    data: DataConfig
    work_folder: str


def part_path(work_folder: Path, part: int) -> Path:
    """The file of one part's examples."""
    return work_folder / f"examples-{part:05d}.jsonl"


def run_examples_task(task: ExamplesTask, report: Callable[[int], None] | None = None) -> str:
    """Write all parts of a dataset and then their manifest; gives the dataset's name. Nothing to do when it is there.

    `report` is told the number of examples so far.
    """
    work = Path(task.work_folder)
    if (work / MANIFEST).is_file():
        return task.dataset.name
    skipped = SkipCounter()
    examples = preprocessor_of(task.dataset.name)(read_rows(task.dataset), skipped)
    settings = DedupSettings(task.data.deduplicate, task.data.near_duplicate_overlap)
    examples = deduplicated(examples, settings, skipped)
    if task.dataset.num_examples:
        examples = islice(examples, task.dataset.num_examples)
    source = known_source(task.dataset.name)
    only_test = source is not None and source.is_evaluation_only
    counts = {"train": 0, "validation": 0, "test": 0}
    with disk_errors_as_data_errors(work), _PartWriter(work, task.data.part_examples) as writer:
        for example in examples:
            split = "test" if only_test else split_of(example.group, task.data.split, task.data.split_seed)
            try:
                line = json.dumps({"split": split, "example": vars(example)}, ensure_ascii=False)
                line.encode("utf-8")
            except UnicodeEncodeError:
                skipped.count("text that is no Unicode (a lone surrogate)", example.id)
                continue
            writer.write(line)
            counts[split] += 1
            if report is not None and writer.num_examples % PROGRESS_EVERY == 0:
                report(writer.num_examples)
    require_usable(task.dataset.name, writer.num_examples, skipped)
    if not only_test:
        _require_training_examples(task, counts)
    write_json(
        work / MANIFEST,
        {"num_parts": writer.num_parts, "counts": counts, "skipped": skipped.to_json()},
    )
    return task.dataset.name


def read_manifest(work_folder: Path) -> dict[str, Any]:
    """What `run_examples_task` wrote last."""
    value: dict[str, Any] = read_json(work_folder / MANIFEST)
    return value


def iter_part(work_folder: Path, part: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """(split, example as JSON value) of a part."""
    with part_path(work_folder, part).open(encoding="utf-8") as stream:
        for line in stream:
            value = json.loads(line)
            yield value["split"], value["example"]


def iter_examples(work_folder: Path, split: str) -> Iterator[Example]:
    """The examples of one split, in order."""
    for part in range(read_manifest(work_folder)["num_parts"]):
        for found, example in iter_part(work_folder, part):
            if found == split:
                yield Example(**example)


def iter_training_texts(work_folders: list[Path], max_characters: int) -> Iterator[str]:
    """Contexts and targets of the training split, at most `max_characters` in all, dealt evenly over the datasets."""
    share = max_characters // max(1, len(work_folders))
    for work in work_folders:
        left = share
        for example in iter_examples(work, "train"):
            for text in (example.context, example.target):
                left -= len(text)
                yield text
            if left <= 0:
                break


def _require_training_examples(task: ExamplesTask, counts: dict[str, int]) -> None:
    if counts["train"] == 0:
        total = sum(counts.values())
        raise DataError(
            f"dataset {task.dataset.name!r}: none of its {total} examples fell into the training split (groups stay whole)",
            allowed="at least one group in the training split",
            action="give more documents or rows, or change data.split_seed",
        )


class _PartWriter:
    """Lines into files of a fixed number of lines, each renamed into place when whole."""

    def __init__(self, folder: Path, part_examples: int) -> None:
        self._folder = folder
        self._part_examples = part_examples
        self._stack = ExitStack()
        self._stream: TextIO | None = None
        self.num_examples = 0
        self.num_parts = 0

    def write(self, line: str) -> None:
        """Append one line."""
        if self.num_examples % self._part_examples == 0:
            self._finish()
            aside = self._stack.enter_context(atomic_path(part_path(self._folder, self.num_parts)))
            self._stream = self._stack.enter_context(aside.open("w", encoding="utf-8"))
            self.num_parts += 1
        assert self._stream is not None
        self._stream.write(line + "\n")
        self.num_examples += 1

    def _finish(self) -> None:
        self._stream = None
        self._stack.close()
        self._stack = ExitStack()

    def __enter__(self) -> _PartWriter:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is not None:
            with suppress(OSError):  # a full disk refuses the buffered rest once more
                self._stack.__exit__(kind, error, trace)
        else:
            self._finish()
