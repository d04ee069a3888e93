"""Example: the one thing that every dataset becomes, and that training, evaluation and replay share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from hsmn_dist.foundation.errors import DataError

Task = Literal["chat", "code"]
Kind = Literal[
    "multiple_choice", "exact_answer", "open_question", "code", "preference", "dialogue", "ranking", "free_text"
]

REQUIRED_META: dict[str, tuple[str, ...]] = {
    "multiple_choice": ("choices", "gold"),
    "exact_answer": ("answer",),
    "open_question": ("answers",),
    "code": ("tests", "entry_point"),
    "preference": ("chosen", "rejected"),
    "dialogue": ("turns",),
    "ranking": ("candidates", "labels"),
    "free_text": (),
}


@dataclass(frozen=True)
class Example:
    """A context, the target to be learned after it, and what scoring needs beside the pair.

    Attributes:
        context: what the model reads.
        target: what it learns to write; never empty.
        task: "chat" or "code", as the original's pairs have it.
        id: unique and stable inside a dataset.
        group: examples of one group never cross a split (chapter, conversation, question).
        kind: decides how it is scored and which `meta` keys it must have:
            multiple_choice: choices (list of str), gold (int); exact_answer: answer (str);
            open_question: answers (list of str); code: tests (list of str), entry_point (str or None) and optionally
            prompt (code before the completion), language, setup; preference: chosen, rejected (str);
            dialogue: turns (list of {"role", "text"}); ranking: candidates (list of str), labels (list of int).
        meta: JSON values only.
    """

    context: str
    target: str
    task: Task
    id: str
    group: str
    kind: Kind
    meta: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        missing = [key for key in REQUIRED_META[self.kind] if key not in self.meta]
        if missing or not self.target:
            problem = f"no meta {', '.join(missing)}" if missing else "an empty target"
            raise DataError(
                f"example {self.id!r} of kind {self.kind!r} has {problem}",
                allowed=f"a non-empty target and meta {', '.join(REQUIRED_META[self.kind]) or '(none)'}",
                action="mend the preprocessor that made it, or count the row as unusable",
            )
