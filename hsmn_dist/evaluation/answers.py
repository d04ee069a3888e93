r"""The final answer inside a completion, and when two answers are the same.

Strict extraction takes the form that the task's own targets have (`#### 42`, `\boxed{42}`, or the whole first line);
flexible extraction takes the last thing that looks like an answer. Both are reported, because the choice moves scores.

What the comparison of mathematics does: LaTeX spelling, units, thousands separators, fractions and decimals of the same
value. What it does not: algebra (`x+1` and `1+x` differ), intervals written in other ways, sets in another order.
"""

from __future__ import annotations

import re
import string
from fractions import Fraction
from typing import Literal

AnswerForm = Literal["hashes", "boxed", "line"]

_NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:/\d+)?|[-+]?\.\d+")
_ANSWER_PHRASE = re.compile(r"(?:answer|result|solution)\s*(?:is|=|:)\s*:?\s*([^\n]+)", re.IGNORECASE)
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_UNIT_TEXT = re.compile(r"\\(?:text|textbf|textrm|textit|mathrm|mbox)\s*\{([^{}]*)\}")
_SPACING = re.compile(r"\\[,!;:> ]|\\q?quad\b|~")
_DECORATION = re.compile(r"\\(?:left|right|displaystyle|limits|[bB]igg?[lr]?)(?![a-zA-Z])")
_DEGREES = re.compile(r"\^\{?\\circ\}?|\\degree\b")
_BARE_FRACTION = re.compile(r"\\frac\s*(\d)\s*(\d)")
_HALF_FRACTION = re.compile(r"\\frac\s*(\{[^{}]*\}|\d)\s*(\{[^{}]*\}|\d)")
_BARE_ROOT = re.compile(r"\\sqrt\s*([0-9a-zA-Z])")
_LATEX_FRACTION = re.compile(r"([-+]?)\\frac\{([-+]?\d+(?:\.\d+)?)\}\{([-+]?\d+(?:\.\d+)?)\}")
_SEPARATOR = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_TRAILING_WORDS = re.compile(r"(?<=[\d}])\s*[a-zA-Z][a-zA-Z ./^0-9-]*$")
_CHOICE_LETTER = re.compile(r"^\([a-eA-E]\)(?=.)")
_ASSIGNMENT = re.compile(r"^[a-zA-Z](?:\([a-z]\))?=")


def answer_form(target: str, gold: str) -> AnswerForm:
    """The form that a task's target shows, which is what the model was taught to write.

    A worked solution that marks its answer in no way counts as "boxed", the form that mathematics benchmarks ask for.
    """
    if "####" in target:
        return "hashes"
    if "\\boxed" in target or "\\fbox" in target:
        return "boxed"
    return "line" if is_same_answer(first_line(target), gold) else "boxed"


def strict_answer(completion: str, form: AnswerForm) -> str | None:
    """The answer in the taught form, or None where the completion does not have it."""
    if form == "hashes":
        match = re.search(r"####[ \t]*([^\n]+)", completion)
        return match.group(1).strip() if match else None
    if form == "boxed":
        return last_boxed(completion)
    return first_line(completion) or None


def flexible_answer(completion: str, gold: str) -> str | None:
    """The last box, else what follows `####` or "the answer is", else the last number, else the first line.

    `gold` only decides whether a number is looked for: an answer in words is taken from a phrase or the first line.
    """
    boxed = last_boxed(completion)
    if boxed is not None:
        return boxed
    tail = completion.rpartition("####")[2] if "####" in completion else completion
    phrases = _ANSWER_PHRASE.findall(tail)
    place = phrases[-1] if phrases else tail
    if as_number(gold) is not None:
        numbers = _NUMBER.findall(place)
        return numbers[-1] if numbers else None
    return first_line(place).rstrip(".") or None


def first_line(text: str) -> str:
    """The first line that is not blank, stripped; "" when there is none."""
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


def last_boxed(text: str) -> str | None:
    r"""The content of the last `\boxed{...}` or `\fbox{...}` with its braces matched; also `\boxed 5`."""
    start = max(text.rfind("\\boxed"), text.rfind("\\fbox"))
    if start < 0:
        return None
    rest = text[start:].split("boxed" if text.startswith("\\boxed", start) else "fbox", 1)[1]
    if not rest.lstrip().startswith("{"):
        bare = re.match(r"\s*([^\s$]+)", rest)
        return bare.group(1).rstrip(".,") if bare else None
    rest = rest.lstrip()
    depth = 0
    for index, letter in enumerate(rest):
        if letter in "{}" and rest[index - 1 : index] != "\\":
            depth += 1 if letter == "{" else -1
            if depth == 0:
                return rest[1:index].strip()
    return None


def is_same_answer(answer: str | None, gold: str) -> bool:
    """Whether an extracted answer equals the gold one as mathematics (see the module's limits)."""
    if answer is None:
        return False
    ours, theirs = normalised_mathematics(answer), normalised_mathematics(gold)
    if _CHOICE_LETTER.match(ours) and not _CHOICE_LETTER.match(theirs):
        ours = _CHOICE_LETTER.sub("", ours)  # "(C) 8" where 8 is asked for
    if ours == theirs:
        return True
    first, second = as_number(ours), as_number(theirs)
    return first is not None and first == second


def as_number(text: str) -> Fraction | None:
    """A whole number, decimal, fraction or percentage as an exact value; None for anything else."""
    plain = normalised_mathematics(text)
    match = _LATEX_FRACTION.fullmatch(plain)
    if match:
        sign, top, bottom = match.groups()
        plain = f"{sign}{top}/{bottom}"
    top, slash, bottom = plain.partition("/")
    try:
        return Fraction(top) / Fraction(bottom) if slash else Fraction(top)
    except (ValueError, ZeroDivisionError):
        return None


def normalised_mathematics(text: str) -> str:
    r"""One spelling for the same answer: no `$`, spaces, `\left`, units or separators; `\dfrac` is `\frac`."""
    text = text.strip().rstrip(".").strip()
    text = text.replace("\\$", "").replace("$", "").replace("\\%", "").replace("%", "").replace("\\{", "{")
    text = text.replace("\\}", "}").replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac").replace("\u2212", "-")
    text = _DECORATION.sub("", _DEGREES.sub("", _SPACING.sub("", text)))
    text = _without_units(text)
    text = _SEPARATOR.sub("", text.replace("{,}", ","))
    text = re.sub(r"\s+", "", text)
    text = _ASSIGNMENT.sub("", text)
    text = _BARE_FRACTION.sub(r"\\frac{\1}{\2}", text)
    text = _HALF_FRACTION.sub(lambda match: "\\frac" + _braced(match[1]) + _braced(match[2]), text)
    text = _BARE_ROOT.sub(r"\\sqrt{\1}", text)
    return text.lower() if "\\" not in text else text


def _braced(part: str) -> str:
    return part if part.startswith("{") else f"{{{part}}}"


def _without_units(text: str) -> str:
    # "\text{...}" after a number is a unit and goes; alone it is the answer itself and stays.
    if _UNIT_TEXT.sub("", text).strip():
        text = _UNIT_TEXT.sub(lambda match: "" if re.search(r"[\d}]\s*$", text[: match.start()]) else match[1], text)
    else:
        text = _UNIT_TEXT.sub(r"\1", text)
    if "\\" not in text and re.match(r"[-+]?[\d.,/]+\s*[a-zA-Z]", text):
        text = _TRAILING_WORDS.sub("", text)
    return text


def normalised_words(text: str) -> str:
    """Lower case without punctuation, articles and extra blanks, as open-question benchmarks compare answers."""
    text = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return " ".join(_ARTICLES.sub(" ", text).split())


CODE_STOPS = ("\ndef ", "\nclass ", "\nif __name__", "\nprint(", "\nassert ", "\n```")
"""Where a completion of a function's body is over: a new statement at the left margin."""


def code_completion(completion: str, prompt: str) -> str:
    """The program part of a completion.

    With a `prompt` (the code before it) the completion is a body and ends at the first statement on the left margin;
    otherwise it is a whole program: the first fenced block where there is one, else everything.
    """
    if prompt:
        cuts = [place for stop in CODE_STOPS if (place := completion.find(stop)) >= 0]
        return completion[: min(cuts)] + "\n" if cuts else completion
    fence = re.search(r"```(?:[a-zA-Z0-9]*)\n(.*?)(?:```|\Z)", completion, re.DOTALL)
    return fence.group(1) if fence else completion
