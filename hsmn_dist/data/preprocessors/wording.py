"""How contexts are worded: one layout for questions, instructions and conversations, so that 33 datasets read alike.

Every context ends in a label ("Answer: ", "Response: ", "Assistant: ") or in a line break, and the target follows it
without a blank of its own. Whatever the model has to choose from stands in the context; the two exceptions (hellaswag,
truthfulqa) are told in docs/decisions/0040-choices-in-the-context.md.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from hsmn_dist.data.example import Task

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
PROGRAM_REQUEST = "Write a Python program that reads standard input and writes standard output."
FUNCTION_REQUEST = "Complete this function:"
TESTS_REQUEST = "Your code should pass these tests:"
NO_PICTURE = "[a picture that is not shown]"

_LABEL = re.compile(
    r"^(?:Subject|Passage|Question|Answer|Problem|Solution|Instruction|Input|Response|Code|Persona|User|Assistant|[A-Z]\.)"
    r"(?:: |:$|(?<=\.) )",
    re.MULTILINE,
)

_LANGUAGE = r"(?:python|java|javascript|typescript|c\+\+|c#|sql|html|css|php|ruby|rust|golang|bash|perl|kotlin|matlab)"
_CODE_WORDS = re.compile(
    r"```"
    rf"|\b(?:in|using|use|into) {_LANGUAGE}(?![\w+#])"
    rf"|(?<!\w){_LANGUAGE} (?:code|program|script|function|class|method|query|snippet|regex|list|dictionary)"
    r"|\b(?:source|pseudo) ?code\b|\bcode (?:snippet|block|example)|\b(?:regular expression|regex|sql query|unit test)\b"
    r"|\b(?:write|create|implement|debug|fix|refactor|optimi[sz]e)\b[^.?!\n]{0,40}"
    r"\b(?:program|algorithm|script|subroutine|function|code)\b"
    r"|\b(?:html|css|sql|mysql|javascript|xpath)\b",
    re.IGNORECASE,
)
_NOT_CODE = re.compile(
    r"\b(?:bar|zip|area|dress|morse|postal|penal|qr|promo|building|discount|secret|colou?r) ?codes?\b", re.IGNORECASE
)


def without_wording(context: str) -> str:
    """A context without the labels and fixed sentences of this file, so that what is left is the dataset's own text."""
    for sentence in (PROGRAM_REQUEST, FUNCTION_REQUEST, TESTS_REQUEST, NO_PICTURE):
        context = context.replace(sentence, "")
    return _LABEL.sub("", context).strip()


def question_context(question: str, choices: Sequence[str] = (), passage: str = "", subject: str = "") -> str:
    """A question with its choices lettered below it, and a passage or subject above it when there is one."""
    lines = []
    if subject:
        lines.append(f"Subject: {subject}")
    if passage.strip():
        lines.append(f"Passage: {passage.strip()}")
    lines.append(f"Question: {question.strip()}")
    lines += [f"{LETTERS[index]}. {choice}" for index, choice in enumerate(choices)]
    lines.append("Answer: ")
    return "\n".join(lines)


def problem_context(problem: str) -> str:
    """A mathematical problem whose solution is to be written out."""
    return f"Problem: {problem.strip()}\nSolution: "


def instruction_context(instruction: str, given: str = "") -> str:
    """An instruction and, apart from it, what it is to be applied to."""
    if given.strip():
        return f"Instruction: {instruction.strip()}\nInput: {given.strip()}\nResponse: "
    return f"Instruction: {instruction.strip()}\nResponse: "


def instruction_task(instruction: str, given: str = "") -> Task:
    """Whether an instruction asks for a program; words such as "zip code" or "barcode" do not count."""
    words = _NOT_CODE.sub(" ", f"{instruction}\n{given}")
    return "code" if _CODE_WORDS.search(words) else "chat"


def turns_of(utterances: Sequence[str]) -> list[dict[str, str]]:
    """Two speakers in turn, the last of them called "assistant" because the last utterance is the one to learn."""
    last = len(utterances) - 1
    return [
        {"role": "assistant" if (last - index) % 2 == 0 else "user", "text": utterance}
        for index, utterance in enumerate(utterances)
    ]


def dialogue_context(turns: Sequence[dict[str, str]], header: str = "") -> str:
    """The turns before the reply, oldest first, each with its speaker; nothing is cut."""
    lines = [header] if header else []
    lines += [f"{turn['role'].capitalize()}: {turn['text']}" for turn in turns]
    lines.append("Assistant: ")
    return "\n".join(lines)
