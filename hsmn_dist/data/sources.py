"""The table of the 33 datasets: where each comes from, what may train, how it is scored, and under what licence.

The records stand in `source_questions.py` and `source_texts.py`. `may_train` is the one place that decides whether rows
of a hub split may be learned from: a benchmark's test split never may, and a benchmark that has a single split is for
evaluation only.
`docs/datasets.md` is `datasets_page()`.
"""

from __future__ import annotations

from hsmn_dist.data.source_questions import QUESTION_SOURCES
from hsmn_dist.data.source_record import DatasetSource
from hsmn_dist.data.source_texts import TEXT_SOURCES
from hsmn_dist.foundation.errors import ConfigError
from hsmn_dist.foundation.registry import near_name

SOURCES: dict[str, DatasetSource] = {source.name: source for source in (*QUESTION_SOURCES, *TEXT_SOURCES)}


def may_train(source: DatasetSource, split: str) -> bool:
    """Whether rows of a hub split may be learned from.

    `split` "" means that the split is not known (a local file): such rows may train unless the dataset is for evaluation
    only, and then the preparation holds out a part of them by group. A hub slice ("train[:100]") counts as its split.
    """
    if source.is_evaluation_only:
        return False
    return split == "" or split.split("[")[0] in source.train_splits


def require_may_train(source: DatasetSource, split: str) -> None:
    """Refuse to train on rows that are scored.

    Raises:
        ConfigError: `may_train` is false; the splits that may are named.
    """
    if may_train(source, split):
        return
    if source.is_evaluation_only:
        allowed, action = "evaluation only: it is a benchmark without a training split", "take it out of the stage"
    else:
        allowed = f"the splits {', '.join(source.train_splits)}"
        action = f"train on {source.train_splits[0]!r} and leave {split!r} for evaluation"
    raise ConfigError(f"split {split!r} of {source.name!r} as training data", allowed=allowed, action=action)


def get_source(name: str) -> DatasetSource:
    """The record of a dataset.

    Raises:
        ConfigError: no dataset has that name; the nearest name is suggested.
    """
    if name not in SOURCES:
        near = near_name(name, SOURCES)
        raise ConfigError(
            f"unknown dataset {name!r}",
            allowed=", ".join(sorted(SOURCES)),
            action=f"did you mean {near!r}?" if near else "choose one of the dataset names above",
        )
    return SOURCES[name]


def known_source(name: str) -> DatasetSource | None:
    """The record of a dataset, or None for a name that is no known dataset (a built-in source)."""
    return SOURCES.get(name)


def all_sources() -> tuple[DatasetSource, ...]:
    """Every record, sorted by name."""
    return tuple(SOURCES[name] for name in sorted(SOURCES))


_LAYOUT = (
    "## How an example reads",
    "",
    "Every dataset becomes `Example`s (`hsmn_dist/data/example.py`): a context that ends in a label or a line break, the",
    "target that follows it, and in `meta` what scoring needs.",
    "",
    "| kind | context | target | meta |",
    "| --- | --- | --- | --- |",
    "| multiple choice | `Question: ...`, `A. ...`, `B. ...`, `Answer: ` (hellaswag, truthfulqa: without the choices) "
    "| text of the right choice | choices, gold |",
    "| exact answer | `Problem: ...`, `Solution: ` | the whole worked solution | answer |",
    "| open question | `Passage: ...` if there is one, `Question: ...`, `Answer: ` | first right answer | answers |",
    "| code | the task, its tests or signature, `Code:` (human_eval: the prompt as it stands) | the program "
    "| tests, test_format, entry_point, prompt, setup |",
    "| dialogue | `User: ...`, `Assistant: ...`, and so on, `Assistant: ` | the reply | turns, the reply included |",
    "| preference | as dialogue | the chosen reply | chosen, rejected, both scores |",
    "| ranking | `Subject: ...`, `Question: ...`, `Answer: ` | the first right sentence | candidates, labels |",
    "| free text | `Instruction: ...`, `Input: ...` if there is one, `Response: `; verses; a docstring | the response |  |",
    "",
    "Rows that cannot be used are counted by reason (`empty answer`, `hidden label`, ...) with the first places where each",
    "was met; a column that is missing or of another type stops the preparation with file, row and the columns found.",
)


def split_words(source: DatasetSource) -> str:
    """Splits with their numbers of rows, those that may train in bold, for the page."""
    words = []
    for split, number in source.splits.items():
        shown = f"{split} {number:,}" if number else split
        words.append(f"**{shown}**" if split in source.train_splits else shown)
    return ", ".join(words) or "-"


def datasets_page() -> str:
    """The text of `docs/datasets.md`."""
    lines = [
        "# Datasets",
        "",
        "Generated from `hsmn_dist/data/source_*.py` by `hsmn_dist.data.sources.datasets_page`; a test keeps it fresh.",
        "",
        "Splits in **bold** may train. A benchmark's test split never does; a dataset without a bold split is for evaluation",
        "only. Where no evaluation split is named, a part of the training rows is held out, by group. Row counts come from",
        "the hub's own records where they were at hand; a split without a number was not counted.",
        "",
        "| name | hub id (configuration) | splits | scored on | kind | metric | benchmark | licence |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for source in all_sources():
        where = source.hub_id or "not on the hub"
        if source.configurations:
            more = len(source.configurations) - 1
            where += f" ({source.default_configuration}{f' and {more} more' if more else ''})"
        scored = source.evaluation_split or "held-out part"
        licence = (
            source.licence
            + {
                "permissive": "",
                "share-alike": "",
                "non-commercial": " **(non-commercial)**",
                "unclear": " **(unclear)**",
            }[source.licence_class]
        )
        cells = [
            f"[{source.name}](#{source.name})",
            where,
            split_words(source),
            scored,
            source.kind.replace("_", " "),
            source.metric,
            "yes" if source.is_benchmark else "no",
            licence,
        ]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", *_LAYOUT]
    for source in all_sources():
        lines += ["", *_section(source)]
    return "\n".join(lines) + "\n"


def _section(source: DatasetSource) -> list[str]:
    rows = {
        "many": "real rows",
        "few": "a handful of real rows",
        "none": "rows made up after the published schema only; no real row was at hand",
    }[source.real_rows]
    lines = [
        f"## {source.name}",
        "",
        f"- Source: {source.paper}",
        f"- Columns: {', '.join(f'`{name}` {kind}' for name, kind in source.columns.items())}",
        f"- Never crosses a split: {source.group}",
        f"- Preprocessor tested on: {rows}",
    ]
    if source.note:
        lines.append(f"- {source.note}")
    return lines
