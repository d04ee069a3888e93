"""Mathematics: gsm8k, math, mathqa, aqua_rat, open_r1_math.

What is unusual: the worked solution is the target and the final answer stands apart in `meta`, so a model learns to
reason and is scored on the answer alone. Sources: Cobbe et al. 2021 (arXiv 2110.14168), Hendrycks et al. 2021
(arXiv 2103.03874), Amini et al. 2019 (arXiv 1905.13319), Ling et al. 2017 (arXiv 1705.04146), Open R1.
"""

from __future__ import annotations

import ast
import re

from hsmn_dist.data.example import Example
from hsmn_dist.data.preprocessors.base import (
    Row,
    UnusableRow,
    column,
    digest,
    list_column,
    optional,
    row_id,
    row_preprocessor,
    text,
    text_list,
    wrong_type,
)
from hsmn_dist.data.preprocessors.wording import problem_context, question_context

_CALCULATOR_MARK = re.compile(r"<<[^<>]*>>")
_MATHQA_ITEM = re.compile(r"^(?:[a-e]\s*\)\s*)+")
_AQUA_ITEM = re.compile(r"^\s*([A-E])\s*\)\s*")


def gsm8k_answer(solution: str) -> str:
    """The number after the last "####", without thousands separators ("1,000" and "1000" are one answer); "" if none."""
    _, found, tail = solution.rpartition("####")
    return tail.strip().replace(",", "").lstrip("$") if found else ""


def last_boxed(solution: str) -> str:
    r"""What stands in the last `\boxed{...}` (braces may nest; `\boxed 5` and `\fbox{}` too), "" if there is none."""
    best = max(solution.rfind(r"\boxed"), solution.rfind(r"\fbox"))
    if best < 0:
        return ""
    start = best + len(r"\boxed" if solution.startswith(r"\boxed", best) else r"\fbox")
    rest = solution[start:]
    if not rest.lstrip().startswith("{"):
        bare = re.match(r"\s*([^\s$.,;]+)", rest)
        return bare.group(1) if bare else ""
    depth = 0
    for index, letter in enumerate(rest):
        escaped = index > 0 and rest[index - 1] == "\\"
        if letter == "{" and not escaped:
            depth += 1
        elif letter == "}" and not escaped:
            depth -= 1
            if depth == 0:
                return rest[rest.index("{") + 1 : index].strip()
    return ""


@row_preprocessor("gsm8k")
def gsm8k(row: Row) -> Example:
    """question, answer: the target is the whole worked solution up to "#### number"; calculator marks are taken out."""
    question, answer = text(row, "question"), text(row, "answer")
    number = gsm8k_answer(answer)
    if not number:
        raise UnusableRow("no answer after ####")
    return Example(
        context=problem_context(question),
        target=_CALCULATOR_MARK.sub("", answer).strip(),
        task="chat",
        id=row_id(row),
        group=digest(question),
        kind="exact_answer",
        meta={"answer": number},
    )


@row_preprocessor("math")
def math(row: Row) -> Example:
    """problem, level, type, solution: the answer is what stands in the last box."""
    problem, solution = text(row, "problem"), text(row, "solution")
    answer = last_boxed(solution)
    if not answer:
        raise UnusableRow("no boxed answer")
    meta = {"answer": answer, "level": column(row, "level") or "", "type": column(row, "type") or ""}
    return Example(
        context=problem_context(problem),
        target=solution.strip(),
        task="chat",
        id=row_id(row),
        group=digest(problem),
        kind="exact_answer",
        meta=meta,
    )


def verified_trace(row: Row) -> str:
    """The first complete generation that a verifier found right, "" when the row has none."""
    traces = text_list(row, "generations")
    complete = list_column(row, "is_reasoning_complete", required=False)
    verdicts = [list_column(row, name, required=False) for name in ("correctness_math_verify", "correctness_llama")]
    for index, trace in enumerate(traces):
        right = any(index < len(verdict) and verdict[index] is True for verdict in verdicts)
        whole = index >= len(complete) or complete[index] is not False
        if right and whole and trace.strip():
            return trace.strip()
    return ""


@row_preprocessor("open_r1_math")
def open_r1_math(row: Row) -> Example:
    """problem, solution, answer, generations ...: a verified reasoning trace is the target, else the solution.

    A target without a box gets one with the answer in its last line: it is what the model is asked for and scored by.
    """
    problem = text(row, "problem")
    trace = verified_trace(row)
    solution = column(row, "solution") or ""
    target = trace or str(solution).strip()
    if not target:
        raise UnusableRow("neither a verified trace nor a solution")
    answer = str(column(row, "answer") or "").strip() or last_boxed(target)
    if not answer:
        raise UnusableRow("empty answer")
    if not last_boxed(target):
        target += f"\n\\boxed{{{answer}}}"
    return Example(
        context=problem_context(problem),
        target=target,
        task="chat",
        id=str(optional(row, "uuid") or row_id(row)),
        group=digest(problem),
        kind="exact_answer",
        meta={"answer": answer, "is_verified_trace": bool(trace), "problem_type": optional(row, "problem_type") or ""},
    )


def mathqa_options(options: str) -> list[str]:
    """The five option texts of "a ) 38 , b ) 27.675 , ... , e ) none" or of a printed Python list of such items.

    Option texts may hold commas, so the letters are looked for in their order. Empty when the text is neither.
    """
    if options.lstrip().startswith("["):
        try:
            items = ast.literal_eval(options.strip())
        except (ValueError, SyntaxError):
            return []
    else:
        starts, position = [], 0
        for letter in "abcde":
            found = re.compile(rf"(?:^|,)\s*{letter} \) ?").search(options, position)
            if found is None:
                break
            starts.append((found.start(), found.end()))
            position = found.end()
        ends = [start for start, _ in starts[1:]] + [len(options)] * bool(starts)
        items = [options[begin:end] for (_, begin), end in zip(starts, ends, strict=True)]
    return [_MATHQA_ITEM.sub("", str(item).strip()).strip(" ,") for item in items]


@row_preprocessor("mathqa")
def mathqa(row: Row) -> Example:
    """Problem, Rationale, options (one string), correct (a letter): the options are taken apart and put into the context."""
    problem = text(row, "Problem")
    options = mathqa_options(text(row, "options"))
    gold = "abcde".find(text(row, "correct").strip().lower()[:1])
    if not 0 <= gold < len(options):
        raise UnusableRow("the options have no such letter")
    if not all(options):
        raise UnusableRow("an option is empty")
    meta = {
        "choices": options,
        "gold": gold,
        "rationale": column(row, "Rationale") or "",
        "formula": optional(row, "annotated_formula") or "",
        "category": optional(row, "category") or "",
    }
    return Example(
        context=question_context(problem, options),
        target=options[gold],
        task="chat",
        id=row_id(row),
        group=digest(problem),
        kind="multiple_choice",
        meta=meta,
    )


@row_preprocessor("aqua_rat")
def aqua_rat(row: Row) -> Example:
    """question, options, rationale, correct: the rationale names the answer, so it stays out of the context."""
    question = text(row, "question")
    raw = text_list(row, "options")
    letters, choices = [], []
    for item in raw:
        marked = _AQUA_ITEM.match(item)
        if marked is None:
            raise wrong_type(row, "options", 'a list of texts such as "A)21"', raw)
        letters.append(marked.group(1))
        choices.append(item[marked.end() :].strip())
    correct = text(row, "correct").strip().upper()
    if correct not in letters:
        raise UnusableRow("the options have no such letter")
    if not all(choices):
        raise UnusableRow("an option is empty")
    gold = letters.index(correct)
    return Example(
        context=question_context(question, choices),
        target=choices[gold],
        task="chat",
        id=row_id(row),
        group=digest(question),
        kind="multiple_choice",
        meta={"choices": choices, "gold": gold, "rationale": column(row, "rationale") or ""},
    )
