"""What a person asks of the data room: which datasets there are, what one is, and whether shards are whole.

Plain values for the command line to print; nothing here reads the network.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hsmn_dist.config.data import DatasetConfig
from hsmn_dist.data.builtin import GENERATORS, TEXT_NAME, dataset_names, preprocessor_of
from hsmn_dist.data.shards.index import load_index
from hsmn_dist.data.shards.reader import folder_problems
from hsmn_dist.data.sources import known_source
from hsmn_dist.foundation.errors import DataError

_BUILTIN_NOTES = {
    "word_problems": "seeded arithmetic word problems, worked out; columns of gsm8k",
    "stdlib_code": "documented functions of the installed Python standard library; columns of code_search_net",
    "passkey": "a five-digit key hidden in filler text, then asked for",
    "pair_recall": "eight letters with a digit each; the digit of one of them",
    "list_sorting": "one-digit numbers to be put in order; columns of passkey",
    TEXT_NAME: "your own documents: a folder of .txt, .md or .rst files, or rows with a column `text`",
}


@dataclass(frozen=True)
class DatasetLine:
    """One row of `hsmn-dist data list`."""

    name: str
    origin: str
    kind: str
    metric: str
    licence: str
    may_train: bool


@dataclass(frozen=True)
class FolderReport:
    """What `hsmn-dist data check` found: counts from the index, and every problem (none: all bytes are right)."""

    folder: str
    problems: list[str]
    dataset: str = ""
    num_samples: dict[str, int] | None = None
    num_target_tokens: dict[str, int] | None = None
    num_shards: int = 0
    skipped: dict[str, int] | None = None
    truncated: dict[str, int] | None = None

    @property
    def is_whole(self) -> bool:
        """No problem was found."""
        return not self.problems


def list_datasets() -> list[DatasetLine]:
    """Every dataset name a configuration may use, sorted."""
    lines = []
    for name in dataset_names():
        source = known_source(name)
        if source is None:
            origin = "your files" if name == TEXT_NAME else "built in"
            kind = "free_text" if name in (TEXT_NAME, "stdlib_code") else "exact_answer"
            lines.append(DatasetLine(name, origin, kind, "", "-", True))
        else:
            lines.append(
                DatasetLine(
                    name,
                    source.hub_id or "local file",
                    source.kind,
                    source.metric,
                    source.licence,
                    not source.is_evaluation_only,
                )
            )
    return lines


def show_dataset(name: str) -> dict[str, Any]:
    """Everything that is known of one dataset, as JSON values.

    Raises:
        ConfigError: no dataset has that name; the nearest is suggested.
    """
    preprocessor = preprocessor_of(name)
    source = known_source(name)
    value: dict[str, Any] = {"name": name, "reads": (preprocessor.__doc__ or "").strip()}
    if source is not None:
        return {**value, **asdict(source), "is_evaluation_only": source.is_evaluation_only}
    value["note"] = _BUILTIN_NOTES[name]
    if name in GENERATORS:
        row = next(iter(GENERATORS[name](DatasetConfig(name=name, num_examples=1))))
        value["columns"] = {column: type(cell).__name__ for column, cell in row.value.items()}
    else:
        value["columns"] = {"text": "str"}
    return value


def check_folder(folder: Path) -> FolderReport:
    """Read every byte of a prepared folder and compare it with its index."""
    problems = folder_problems(folder)
    try:
        index = load_index(folder)
    except DataError:  # already among the problems, in words
        return FolderReport(str(folder), problems)
    return FolderReport(
        folder=str(folder),
        problems=problems,
        dataset=index.dataset,
        num_samples={name: split.num_samples for name, split in index.splits.items()},
        num_target_tokens={name: split.num_target_tokens for name, split in index.splits.items()},
        num_shards=sum(len(split.shards) for split in index.splits.values()),
        skipped=index.skipped.get("counts", {}),
        truncated=index.truncated,
    )
