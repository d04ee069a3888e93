"""Reasoning: hellaswag, bbh (which the original also calls bigbench_hard), strategyqa.

What is unusual: hellaswag's endings continue its context, so they stand beside it and not in it; bbh never trains (its
files carry a canary against that). Sources: Zellers et al. 2019 (arXiv 1905.07830), Suzgun et al. 2022 (2210.09261),
Geva et al. 2021 (2101.02235).
"""

from __future__ import annotations

import re

from hsmn_dist.data.example import Example
from hsmn_dist.data.preprocessors.base import (
    Row,
    UnusableRow,
    column,
    digest,
    maybe_text,
    optional,
    row_id,
    row_preprocessor,
    text,
    text_list,
    wrong_type,
)
from hsmn_dist.data.preprocessors.wording import question_context

_MARK = re.compile(r"\[[^\]]*\]")


def without_marks(words: str) -> str:
    """WikiHow text without "[title]", "[step]", "[header]", "[substeps]", as the usual evaluation has it."""
    words = words.strip().replace(" [title]", ". ")
    return re.sub(r" {2,}", " ", _MARK.sub("", words)).strip()


@row_preprocessor("hellaswag")
def hellaswag(row: Row) -> Example:
    """activity_label, ctx_a, ctx_b, ctx, endings, label (a text, "" in the test split) ..."""
    endings = [without_marks(ending) for ending in text_list(row, "endings")]
    label = maybe_text(row, "label").strip()
    if not label:
        raise UnusableRow("hidden label")
    if not label.isdigit() or int(label) >= len(endings):
        raise UnusableRow("the label is none of the endings")
    gold = int(label)
    if not endings[gold]:
        raise UnusableRow("the right ending is empty")
    start = text(row, "ctx_a").strip()
    ctx_b = maybe_text(row, "ctx_b").strip()
    whole = f"{start} {ctx_b[:1].upper()}{ctx_b[1:]}" if ctx_b else start
    activity = maybe_text(row, "activity_label").strip()
    source = str(optional(row, "source_id") or "") or digest(start)
    return Example(
        context=without_marks(f"{activity}: {whole}") + " ",
        target=endings[gold],
        task="chat",
        id=row_id(row),
        group=source,
        kind="multiple_choice",
        meta={"choices": endings, "gold": gold, "activity": activity},
    )


@row_preprocessor("bbh", "bigbench_hard")
def bbh(row: Row) -> Example:
    """input, target; the task's name is the configuration and reaches us, where the reader knows it, as column `task`."""
    question = text(row, "input")
    target = text(row, "target").strip()
    return Example(
        context=question_context(question),
        target=target,
        task="chat",
        id=row_id(row),
        group=digest(question),
        kind="exact_answer",
        meta={"answer": target, "task": str(optional(row, "task") or "")},
    )


@row_preprocessor("strategyqa")
def strategyqa(row: Row) -> Example:
    """qid, question, answer (a bool), facts, decomposition ...: yes or no; the steps that lead there are kept in `meta`."""
    question = text(row, "question")
    answer = column(row, "answer")
    if answer is None:
        raise UnusableRow("hidden answer")
    if not isinstance(answer, bool):
        raise wrong_type(row, "answer", "true or false", answer)
    choices = ["yes", "no"]
    gold = 0 if answer else 1
    qid = str(optional(row, "qid") or row_id(row))
    return Example(
        context=question_context(question, choices),
        target=choices[gold],
        task="chat",
        id=qid,
        group=qid,
        kind="multiple_choice",
        meta={
            "choices": choices,
            "gold": gold,
            "facts": optional(row, "facts") or [],
            "decomposition": optional(row, "decomposition") or [],
        },
    )
