"""Questions about the world: mmlu, arc_easy, arc_challenge, sciq, stem, natural_questions, nq_open, wikiqa, truthfulqa.

What is unusual: every choice stands in the context and in `meta`, all right answers of an open question are kept, and
wikiqa, whose rows are single sentences, is put together again by question. Sources: Hendrycks et al. 2020 (arXiv
2009.03300), Clark et al. 2018 (1803.05457), Welbl et al. 2017 (1707.06209), Shen et al. 2024 (2402.17205), Kwiatkowski
et al. 2019, Lee et al. 2019 (1906.00300), Yang et al. 2015, Lin et al. 2021 (2109.07958).
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import Any

from hsmn_dist.data.example import Example
from hsmn_dist.data.preprocessors.base import (
    Row,
    SkipCounter,
    UnusableRow,
    as_struct,
    column,
    digest,
    integer,
    list_in,
    mapping,
    maybe_text,
    optional,
    preprocessor,
    row_id,
    row_preprocessor,
    text,
    text_list,
    wrong_type,
)
from hsmn_dist.data.preprocessors.wording import NO_PICTURE, question_context


def shuffled(right: str, wrong: list[str], seed_text: str) -> tuple[list[str], int]:
    """The choices in an order drawn from the question alone, and where the right one lies."""
    choices = [right, *wrong]
    order = list(range(len(choices)))
    random.Random(digest(seed_text)).shuffle(order)
    return [choices[index] for index in order], order.index(0)


@row_preprocessor("mmlu")
def mmlu(row: Row) -> Example:
    """question, subject, choices, answer (an int). The test split is evaluation only."""
    question, choices = text(row, "question"), text_list(row, "choices")
    gold = integer(row, "answer")
    subject = maybe_text(row, "subject").replace("_", " ")
    if not 0 <= gold < len(choices):
        raise UnusableRow("the answer is none of the choices")
    if not choices[gold].strip():
        raise UnusableRow("the right choice is empty")
    return Example(
        context=question_context(question, choices, subject=subject),
        target=choices[gold],
        task="chat",
        id=row_id(row),
        group=digest(question),
        kind="multiple_choice",
        meta={"choices": choices, "gold": gold, "subject": subject},
    )


@row_preprocessor("arc_easy", "arc_challenge")
def arc(row: Row) -> Example:
    """id, question, choices {text, label}, answerKey: three to five choices, labelled by letters or by numbers."""
    question = text(row, "question")
    both = mapping(row, "choices")
    choices, labels = list_in(row, "choices", both, "text"), list_in(row, "choices", both, "label")
    key = text(row, "answerKey").strip()
    if len(choices) != len(labels) or not all(isinstance(item, str) for item in [*choices, *labels]):
        raise wrong_type(row, "choices", "two lists of texts of one length, text and label,", both)
    if key not in labels:
        raise UnusableRow("the answer is none of the choices")
    gold = labels.index(key)
    if not choices[gold].strip():
        raise UnusableRow("the right choice is empty")
    identity = text(row, "id")
    return Example(
        context=question_context(question, choices),
        target=choices[gold],
        task="chat",
        id=identity,
        group=digest(question),
        kind="multiple_choice",
        meta={"choices": choices, "gold": gold, "labels": labels},
    )


@row_preprocessor("sciq")
def sciq(row: Row) -> Example:
    """question, three distractors, correct_answer, support (often empty): four choices, shuffled by the question."""
    question, right, support = text(row, "question"), text(row, "correct_answer"), maybe_text(row, "support")
    wrong = [text(row, f"distractor{number}") for number in (1, 2, 3)]
    choices, gold = shuffled(right, wrong, question)
    return Example(
        context=question_context(question, choices, passage=support),
        target=right,
        task="chat",
        id=row_id(row),
        group=digest(support or question),
        kind="multiple_choice",
        meta={"choices": choices, "gold": gold, "has_support": bool(support.strip())},
    )


@row_preprocessor("stem")
def stem(row: Row) -> Example:
    """problem, choices or choices_pic, answer_idx ...: pictures cannot be shown, which the context and `meta` say."""
    if column(row, "pic_choice"):
        raise UnusableRow("the choices are pictures")
    problem, choices = text(row, "problem"), text_list(row, "choices")
    gold = integer(row, "answer_idx")
    if gold < 0:
        raise UnusableRow("hidden answer")
    if gold >= len(choices) or not choices[gold].strip():
        raise UnusableRow("the answer is none of the choices")
    has_picture = bool(column(row, "pic_prob"))
    shown = f"{NO_PICTURE} {problem.strip()}" if has_picture else problem
    return Example(
        context=question_context(shown, choices),
        target=choices[gold],
        task="chat",
        id=row_id(row),
        group=digest(problem, *choices),
        kind="multiple_choice",
        meta={
            "choices": choices,
            "gold": gold,
            "has_picture": has_picture,
            "subject": maybe_text(row, "subject"),
            "grade": maybe_text(row, "grade"),
            "skill": maybe_text(row, "skill"),
        },
    )


@row_preprocessor("nq_open")
def nq_open(row: Row) -> Example:
    """question, answer (a list): the first answer is the target, every answer counts as right."""
    question = text(row, "question")
    answers = [answer for answer in text_list(row, "answer") if answer.strip()]
    if not answers:
        raise UnusableRow("empty answer")
    return Example(
        context=question_context(question),
        target=answers[0],
        task="chat",
        id=row_id(row),
        group=digest(question),
        kind="open_question",
        meta={"answers": answers},
    )


def annotated_answers(row: Row, annotations: dict[str, Any]) -> list[str]:
    """One answer per annotator: the short answers joined by ", ", else yes or no. Without duplicates."""
    answers: list[str] = []
    verdicts = list_in(row, "annotations", annotations, "yes_no_answer")
    for index, short in enumerate(list_in(row, "annotations", annotations, "short_answers")):
        spans = list_in(row, "annotations.short_answers", as_struct(short) or {}, "text")
        words = [str(word).strip() for word in spans if str(word).strip()]
        verdict = verdicts[index] if index < len(verdicts) else -1
        answer = ", ".join(words) or ("no" if verdict == 0 else "yes" if verdict == 1 else "")
        if answer and answer not in answers:
            answers.append(answer)
    return answers


def long_answer(row: Row, document: dict[str, Any], annotations: dict[str, Any]) -> str:
    """The words (no HTML) of the first long answer that was marked on the page, "" when none was."""
    tokens = as_struct(document.get("tokens")) or {}
    words, is_html = (list_in(row, "document.tokens", tokens, key) for key in ("token", "is_html"))
    for span in list_in(row, "annotations", annotations, "long_answer"):
        start, end = ((as_struct(span) or {}).get(key, -1) for key in ("start_token", "end_token"))
        if isinstance(start, int) and isinstance(end, int) and start >= 0:
            pairs = zip(words[start:end], is_html[start:end], strict=False)
            return " ".join(str(word) for word, html in pairs if not html)
    return ""


@row_preprocessor("natural_questions")
def natural_questions(row: Row) -> Example:
    """id, document, question {text, tokens}, annotations: the marked paragraph is the passage, the short answer the target.

    What is lost: the rest of the page (tens of thousands of words), so this is reading, not search.
    """
    question = mapping(row, "question").get("text")
    document, annotations = mapping(row, "document"), mapping(row, "annotations")
    if question is not None and not isinstance(question, str):
        raise wrong_type(row, "question.text", "text", question)
    if not (question or "").strip():
        raise UnusableRow("empty question")
    answers = annotated_answers(row, annotations)
    if not answers:
        raise UnusableRow("no short answer and no yes or no")
    title = str(document.get("title") or "")
    return Example(
        context=question_context(str(question), passage=long_answer(row, document, annotations)),
        target=answers[0],
        task="chat",
        id=str(column(row, "id")),
        group=title or digest(str(question)),
        kind="open_question",
        meta={"answers": answers, "title": title},
    )


@preprocessor("wikiqa", adjacent_by=("question_id",))
def wikiqa(rows: Iterable[Row], skipped: SkipCounter) -> Iterator[Example]:
    """question_id, question, document_title, answer (one sentence), label: adjacent rows of a question become one example.

    Rows of a question with no right sentence are counted one by one. Holds one question at a time.
    """
    for question_id, members in groupby(rows, key=lambda row: str(column(row, "question_id"))):
        sentences = list(members)
        try:
            yield ranked_question(question_id, sentences)
        except UnusableRow as unusable:
            for row in sentences:
                skipped.count(unusable.reason, row.origin)


def ranked_question(question_id: str, sentences: list[Row]) -> Example:
    """The example of all candidate sentences of one question.

    Raises:
        UnusableRow: none of them answers it, or a label is null.
    """
    candidates = [maybe_text(row, "answer") for row in sentences]
    labels = [integer(row, "label") for row in sentences]
    if 1 not in labels or not candidates[labels.index(1)].strip():
        raise UnusableRow("the question has no right sentence")
    right = candidates[labels.index(1)]
    title = str(optional(sentences[0], "document_title") or "")
    return Example(
        context=question_context(text(sentences[0], "question"), subject=title),
        target=right,
        task="chat",
        id=question_id,
        group=question_id,
        kind="ranking",
        meta={"candidates": candidates, "labels": labels},
    )


@row_preprocessor("truthfulqa")
def truthfulqa(row: Row) -> Example:
    """question, best_answer, correct_answers, incorrect_answers ...: the best answer among the false ones. Evaluation only.

    Scored as the paper's MC1: the likelihood of each answer given the question alone, so they stand beside the context.
    """
    question, best = text(row, "question"), text(row, "best_answer")
    wrong = [answer for answer in text_list(row, "incorrect_answers") if answer.strip() and answer != best]
    if not wrong:
        raise UnusableRow("no incorrect answer")
    choices, gold = shuffled(best, wrong, question)
    return Example(
        context=question_context(question),
        target=best,
        task="chat",
        id=row_id(row),
        group=digest(question),
        kind="multiple_choice",
        meta={
            "choices": choices,
            "gold": gold,
            "correct_answers": text_list(row, "correct_answers"),
            "incorrect_answers": wrong,
            "category": maybe_text(row, "category"),
        },
    )
