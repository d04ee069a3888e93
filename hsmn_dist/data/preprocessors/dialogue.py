"""Conversations: daily_dialog, personachat, open_assistant.

What is unusual: each turn says who speaks, a context is never cut at its newest end, and the group of an example is its
whole conversation or tree. `meta["turns"]` is the conversation up to and including the reply, whose speaker is always
"assistant". Blanks at the ends of an utterance are layout of the source files and are dropped. Sources: Li et al. 2017
(arXiv 1710.03957), Zhang et al. 2018 (1801.07243), Koepf et al. 2023 (2304.07327).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import Any

from hsmn_dist.data.example import Example
from hsmn_dist.data.preprocessors.base import (
    Row,
    SkipCounter,
    UnusableRow,
    column,
    digest,
    integer,
    list_column,
    maybe_text,
    optional,
    preprocessor,
    row_id,
    row_preprocessor,
    text,
    text_list,
)
from hsmn_dist.data.preprocessors.wording import dialogue_context, turns_of

ROLES = {"prompter": "user", "assistant": "assistant"}


@row_preprocessor("daily_dialog")
def daily_dialog(row: Row) -> list[Example]:
    """dialog, act, emotion: one example for every utterance but the first; the dialogue is the group."""
    utterances = [utterance.strip() for utterance in text_list(row, "dialog")]
    if len(utterances) < 2:
        raise UnusableRow("fewer than two utterances")
    if not all(utterances):
        raise UnusableRow("an empty utterance")
    acts, emotions = (list_column(row, name, required=False) for name in ("act", "emotion"))
    identity, group = row_id(row), digest(*utterances)
    examples = []
    for last in range(1, len(utterances)):
        turns = turns_of(utterances[: last + 1])
        meta: dict[str, Any] = {"turns": turns}
        if len(acts) == len(utterances) == len(emotions):
            meta |= {"act": acts[last], "emotion": emotions[last]}
        examples.append(
            Example(
                context=dialogue_context(turns[:-1]),
                target=utterances[last],
                task="chat",
                id=f"{identity}-{last}",
                group=group,
                kind="dialogue",
                meta=meta,
            )
        )
    return examples


@row_preprocessor("personachat")
def personachat(row: Row) -> Example:
    """personality, candidates (the last is the true reply), history, conv_id, utterance_idx: the persona opens the context."""
    persona = [line.strip() for line in text_list(row, "personality") if line.strip()]
    candidates = [candidate.strip() for candidate in text_list(row, "candidates")]
    history = [utterance.strip() for utterance in text_list(row, "history")]
    if not candidates or not candidates[-1]:
        raise UnusableRow("no true reply")
    if not history:
        raise UnusableRow("no history")
    conversation, position = integer(row, "conv_id"), integer(row, "utterance_idx")
    turns = turns_of([*history, candidates[-1]])
    return Example(
        context=dialogue_context(turns[:-1], header=f"Persona: {' '.join(persona)}"),
        target=candidates[-1],
        task="chat",
        id=f"{conversation}-{position}-{digest(*history)}",
        group=str(conversation),
        kind="dialogue",
        meta={"turns": turns, "persona": persona, "candidates": candidates, "gold": len(candidates) - 1},
    )


@preprocessor("open_assistant", adjacent_by=("message_tree_id",))
def open_assistant(rows: Iterable[Row], skipped: SkipCounter) -> Iterator[Example]:
    """Messages of trees: every kept assistant message with all turns above it; adjacent rows of one tree are held together.

    Deleted messages, messages that reviewers rejected and what hangs below them are counted and left out. All replies of
    a turn are kept; `meta` has the rank (0 is the best, None unranked) and the language, so a mixture can choose.
    """
    for tree, members in groupby(rows, key=lambda row: maybe_text(row, "message_tree_id")):
        messages: dict[str, Row] = {}
        for row in members:
            identity = maybe_text(row, "message_id")
            if not tree or not identity or identity in messages:
                skipped.count("no message_id or tree, or one that was there before", row.origin)
            else:
                messages[identity] = row
        for row in messages.values():
            try:
                example = assistant_reply(row, messages, tree)
            except UnusableRow as unusable:
                skipped.count(unusable.reason, row.origin)
                continue
            if example is not None:
                yield example


def assistant_reply(row: Row, messages: dict[str, Row], tree: str) -> Example | None:
    """The example of one message; None for a prompter's message, which is a context and no failure.

    Raises:
        UnusableRow: the message or one above it was deleted, rejected, empty or is missing.
    """
    if text(row, "role") != "assistant":
        return None
    path = [row]
    while parent := maybe_text(path[-1], "parent_id"):
        if parent not in messages or len(path) > len(messages):
            raise UnusableRow("a message above it is missing")
        path.append(messages[parent])
    path.reverse()
    for message in path:
        where = "the message" if message is row else "a message above it"
        if column(message, "deleted"):
            raise UnusableRow(f"{where} was deleted")
        if optional(message, "review_result") is False:
            raise UnusableRow(f"{where} was rejected by reviewers")
        if not maybe_text(message, "text").strip():
            raise UnusableRow(f"{where} is empty")
    if len(path) < 2:
        raise UnusableRow("a reply without a question")
    turns = [{"role": ROLES.get(text(m, "role"), "user"), "text": text(m, "text").strip()} for m in path]
    return Example(
        context=dialogue_context(turns[:-1]),
        target=turns[-1]["text"],
        task="chat",
        id=text(row, "message_id"),
        group=tree,
        kind="dialogue",
        meta={"turns": turns, "lang": optional(row, "lang") or "", "rank": optional(row, "rank")},
    )
