"""Instructions: alpaca, dolly, wizardlm, ultrafeedback.

What is unusual: an instruction and what it is applied to are two labelled parts, "code" is decided by what is asked for
and not by the letters c-o-d-e, and ultrafeedback keeps the rejected reply with both scores. Sources: Taori et al. 2023,
Conover et al. 2023, Xu et al. 2023 (arXiv 2304.12244), Cui et al. 2023 (2310.01377).
"""

from __future__ import annotations

import re
from typing import Any

from hsmn_dist.data.example import Example
from hsmn_dist.data.preprocessors.base import (
    Row,
    UnusableRow,
    digest,
    maybe_text,
    optional,
    row_id,
    row_preprocessor,
    struct_list,
    text,
)
from hsmn_dist.data.preprocessors.wording import dialogue_context, instruction_context, instruction_task

_REFERENCE_MARK = re.compile(r"\[\d+\]")


def instruction_example(row: Row, instruction: str, given: str, response: str, meta: dict[str, Any]) -> Example:
    """The example that all instruction sets share."""
    return Example(
        context=instruction_context(instruction, given),
        target=response.strip(),
        task=instruction_task(instruction, given),
        id=row_id(row),
        group=digest(given or instruction),
        kind="free_text",
        meta=meta,
    )


@row_preprocessor("alpaca")
def alpaca(row: Row) -> Example:
    """instruction, input (often empty), output, text; `text` holds the answer and is not read."""
    instruction, given = text(row, "instruction"), maybe_text(row, "input")
    return instruction_example(row, instruction, given, text(row, "output"), {})


@row_preprocessor("dolly")
def dolly(row: Row) -> Example:
    """instruction, context (often empty, with reference marks such as [12]), response, category (may be null)."""
    instruction = text(row, "instruction")
    given = _REFERENCE_MARK.sub("", maybe_text(row, "context"))
    return instruction_example(
        row, instruction, given, text(row, "response"), {"category": optional(row, "category") or ""}
    )


@row_preprocessor("wizardlm")
def wizardlm(row: Row) -> Example:
    """instruction, output (the 70k release) or conversations [{from, value}] (the 196k release, first exchange)."""
    if "conversations" in row.value:
        said = struct_list(row, "conversations")
        if len(said) < 2 or said[0].get("from") != "human" or said[1].get("from") != "gpt":
            raise UnusableRow("no question with an answer")
        instruction, response = str(said[0].get("value") or ""), str(said[1].get("value") or "")
        if not instruction.strip() or not response.strip():
            raise UnusableRow("an empty turn")
        return instruction_example(row, instruction, "", response, {})
    return instruction_example(row, text(row, "instruction"), "", text(row, "output"), {})


def messages_of(row: Row, name: str) -> list[dict[str, str]]:
    """A column of messages as turns {role, text}.

    Raises:
        UnusableRow: it is empty, or does not end with a reply of the assistant.
    """
    turns = [
        {"role": str(message.get("role")), "text": str(message.get("content") or "").strip()}
        for message in struct_list(row, name)
    ]
    if len(turns) < 2 or turns[-1]["role"] != "assistant" or not turns[-1]["text"]:
        raise UnusableRow(f"{name} does not end with a reply")
    return turns


@row_preprocessor("ultrafeedback")
def ultrafeedback(row: Row) -> Example:
    """prompt, prompt_id, chosen and rejected [{content, role}], scores: the last reply of `chosen` is the target."""
    chosen, rejected = messages_of(row, "chosen"), messages_of(row, "rejected")
    better, worse = chosen[-1]["text"], rejected[-1]["text"]
    if better == worse:
        raise UnusableRow("chosen and rejected are equal")
    prompt = text(row, "prompt")
    return Example(
        context=dialogue_context(chosen[:-1]),
        target=better,
        task=instruction_task(prompt),
        id=text(row, "prompt_id"),
        group=digest(prompt),
        kind="preference",
        meta={
            "chosen": better,
            "rejected": worse,
            "score_chosen": optional(row, "score_chosen"),
            "score_rejected": optional(row, "score_rejected"),
        },
    )
