r"""Final answers: `####`, `\boxed{}`, numbers with units and commas, words."""

from __future__ import annotations

from fractions import Fraction

import pytest

from hsmn_dist.evaluation.answers import (
    answer_form,
    as_number,
    code_completion,
    flexible_answer,
    is_same_answer,
    last_boxed,
    normalised_words,
    strict_answer,
)


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("42", "42"),
        ("42.", "42"),
        ("$1,234", "1234"),
        ("1{,}234", "1,234"),
        ("18 dollars", "18"),
        ("$18.00", "18"),
        ("50\\%", "50"),
        ("50%", "50"),
        ("0.5", "1/2"),
        ("\\frac{1}{2}", "0.5"),
        ("\\dfrac12", "\\frac{1}{2}"),
        ("\\tfrac{3}{4}", "3/4"),
        ("-\\frac{1}{2}", "-0.5"),
        ("\\frac{-1}{2}", "-1/2"),
        ("x = 5", "5"),
        ("5\\text{ cm}", "5"),
        ("5 \\mathrm{ km}", "5"),
        ("\\text{Monday}", "Monday"),
        ("90^\\circ", "90"),
        ("90^{\\circ}", "90"),
        ("\\left( 3, \\frac{\\pi}{2} \\right)", "(3,\\frac{\\pi}{2})"),
        ("\\sqrt3", "\\sqrt{3}"),
        ("3\\!\\,000", "3000"),
        ("12 apples", "12 apples"),
        ("\u22123", "-3"),
        ("True", "true"),
        ("(A)", "(a)"),
        ("10,000,000", "10000000"),
        ("\\textbf{(C)}\\ 8", "8"),
    ],
)
def test_spellings_of_one_answer_are_the_same(answer, gold):
    assert is_same_answer(answer, gold)


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("42", "43"),
        ("4", "42"),
        ("-3", "3"),
        ("1/3", "0.333"),
        ("1,23", "123"),
        ("\\frac{1}{2}", "\\frac{2}{1}"),
        ("\\sqrt{3}", "3"),
        ("x+1", "x+2"),
        ("", "0"),
        (None, "0"),
        ("1/0", "0"),
        ("(1,2)", "(2,1)"),
        ("\\text{Monday}", "\\text{Tuesday}"),
        ("ab", "a"),
    ],
)
def test_different_answers_stay_different(answer, gold):
    assert not is_same_answer(answer, gold)


def test_numbers_are_exact():
    assert as_number("0.1") == Fraction(1, 10)
    assert as_number("1,000.50") == Fraction(2001, 2)
    assert as_number("\\frac{22}{7}") == Fraction(22, 7)
    assert as_number("seven") is None
    assert as_number("nan") is None
    assert as_number("inf") is None


def test_the_strict_form_is_the_one_of_the_target():
    assert answer_form("so 6.\n#### 6", "6") == "hashes"
    assert answer_form("thus $\\boxed{6}$.", "6") == "boxed"
    assert answer_form("six", "six") == "line"
    assert answer_form("2 + 4 makes six, as was to be found", "six") == "boxed", "nothing marks the answer"
    assert strict_answer("2*3 = 6\n#### 6\n\nProblem: 7", "hashes") == "6"
    assert strict_answer("the answer is 6", "hashes") is None
    assert strict_answer("no box", "boxed") is None
    assert strict_answer("\n  six \nmore", "line") == "six"
    assert strict_answer("   ", "line") is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("$\\boxed{\\frac{1}{2}}$", "\\frac{1}{2}"),
        ("\\boxed{1} and \\boxed{2}", "2"),
        ("\\fbox{3}", "3"),
        ("\\boxed 5.", "5"),
        ("\\boxed{a_{1}b}", "a_{1}b"),
        ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
        ("\\boxed{never closed", None),
        ("nothing", None),
    ],
)
def test_boxes_are_read_with_their_braces_matched(text, expected):
    assert last_boxed(text) == expected


@pytest.mark.parametrize(
    ("completion", "gold", "expected"),
    [
        ("First 3, then 4. The answer is 7 apples.", "7", "7"),
        ("3 + 4 = 7", "7", "7"),
        ("It costs $1,200.50", "5", "1,200.50"),
        ("so \\boxed{8} not 9", "8", "8"),
        ("#### 12 and more words", "12", "12"),
        ("The answer is: Paris.", "Paris", "Paris"),
        ("Paris\nand so on", "Paris", "Paris"),
        ("no number here", "7", None),
    ],
)
def test_the_flexible_answer_is_the_last_thing_that_looks_like_one(completion, gold, expected):
    assert flexible_answer(completion, gold) == expected


def test_words_lose_case_punctuation_and_articles():
    assert normalised_words("The  Quick, brown-fox!") == "quick brownfox"
    assert normalised_words("An apple a day") == "apple day"


def test_a_completion_of_a_function_ends_at_the_margin():
    body = "    return x + 1\n\ndef other():\n    pass\n"
    assert code_completion(body, "def f(x):\n") == "    return x + 1\n\n"
    assert code_completion("    return 1", "def f():\n") == "    return 1"
    assert code_completion("Here:\n```python\nx = 1\n```\nDone", "") == "x = 1\n"
    assert code_completion("x = 1\n", "") == "x = 1\n"
    assert code_completion("```\nx = 2", "") == "x = 2"
