"""Running text: kjv_bible, owasp.

What is unusual: verses only make sense together, so adjacent rows of a chapter are read as one text and the chapter is
the group. Sources: the King James text of 1611; OWASP Top 10 for LLM Applications 2025.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from itertools import groupby

from hsmn_dist.data.example import Example
from hsmn_dist.data.preprocessors.base import (
    Row,
    SkipCounter,
    column,
    digest,
    maybe_text,
    optional,
    preprocessor,
    row_id,
    row_preprocessor,
    text,
)
from hsmn_dist.data.preprocessors.wording import question_context

NUM_VERSES_BEFORE = 3


@preprocessor("kjv_bible", adjacent_by=("Book", "Chapter"))
def kjv_bible(rows: Iterable[Row], skipped: SkipCounter) -> Iterator[Example]:
    """Book, Chapter, Verse (may be absent), Text: each verse after its chapter's name and up to three verses before it.

    The first verse of a chapter follows its name alone, so no verse is lost. Holds three verses at a time.
    """
    for (book, chapter), members in groupby(
        rows, key=lambda row: (str(column(row, "Book")), str(column(row, "Chapter")))
    ):
        heading = f"{book} {chapter}"
        before: deque[str] = deque(maxlen=NUM_VERSES_BEFORE)
        for index, row in enumerate(members):
            verse = maybe_text(row, "Text").strip()
            if not verse:
                skipped.count("empty Text", row.origin)
                continue
            number = str(optional(row, "Verse") or index + 1)
            yield Example(
                context="\n".join([heading, *before]) + "\n",
                target=verse,
                task="chat",
                id=f"{heading}:{number}",
                group=heading,
                kind="free_text",
                meta={"book": book},
            )
            before.append(verse)


@row_preprocessor("owasp")
def owasp(row: Row) -> Example:
    """question, answer; or context, target, which is what the original's own builder writes."""
    own_builder = "question" not in row.value and "context" in row.value
    question = text(row, "context" if own_builder else "question")
    answer = text(row, "target" if own_builder else "answer")
    return Example(
        context=question_context(question),
        target=answer.strip(),
        task="chat",
        id=row_id(row),
        group=digest(question),
        kind="free_text",
        meta={},
    )
