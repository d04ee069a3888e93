"""Built-in datasets: the same rows everywhere, right answers, and names that help when they are wrong."""

from __future__ import annotations

import ast
import re

import pytest

from hsmn_dist.config.data import DatasetConfig
from hsmn_dist.data.builtin import GENERATORS, dataset_names, preprocessor_of, text_examples
from hsmn_dist.data.example import Example
from hsmn_dist.data.preprocessors.base import Row, SkipCounter
from hsmn_dist.foundation.errors import ConfigError, DataError


def examples(name: str, num: int) -> list[Example]:
    skipped = SkipCounter()
    found = list(preprocessor_of(name)(GENERATORS[name](DatasetConfig(name=name, num_examples=num)), skipped))
    assert not skipped.total
    return found


@pytest.mark.parametrize("name", sorted(GENERATORS))
def test_rows_are_the_same_every_time_and_more_rows_change_none(name: str) -> None:
    few = list(GENERATORS[name](DatasetConfig(name=name, num_examples=20)))
    many = list(GENERATORS[name](DatasetConfig(name=name, num_examples=60)))
    assert len(few) == 20 and len(many) == 60 and many[:20] == few
    assert len({row.origin for row in many}) == 60


@pytest.mark.parametrize("name", sorted(GENERATORS))
def test_ids_are_unique_and_groups_are_many(name: str) -> None:
    found = examples(name, 200)
    assert len({example.id for example in found}) == 200
    assert len({example.group for example in found}) >= 10


def test_every_step_and_answer_of_the_word_problems_is_right() -> None:
    for example in examples("word_problems", 600):
        steps = re.findall(r"(\d+) ([-+*/]) (\d+) = (\d+)", example.target)
        assert steps
        for left, sign, right, result in steps:
            a, b = int(left), int(right)
            assert {"+": a + b, "-": a - b, "*": a * b, "/": a / b}[sign] == int(result)
        assert int(example.meta["answer"]) == int(steps[-1][3]) >= 0
        assert example.target.endswith(f"#### {example.meta['answer']}")


def test_the_passkey_stands_in_the_context_and_nowhere_else_in_the_same_place() -> None:
    places = set()
    for example in examples("passkey", 100):
        assert example.context.count(example.target) == 2 and len(example.target) == 5
        places.add(example.context.index(example.target) // 100)
    assert len(places) > 5


def test_the_passkey_filler_is_as_long_as_asked() -> None:
    short = next(iter(GENERATORS["passkey"](DatasetConfig(name="passkey", num_examples=1, passkey_tokens=16))))
    long = next(iter(GENERATORS["passkey"](DatasetConfig(name="passkey", num_examples=1, passkey_tokens=500))))
    assert 16 <= len(short.value["context"].split()) < 40 and len(long.value["context"].split()) >= 500


def test_keys_have_the_digits_asked_for_and_a_label_draws_other_rows() -> None:
    def contexts(**settings: object) -> list[str]:
        dataset = DatasetConfig.model_validate(
            {"name": "passkey", "num_examples": 30, "passkey_tokens": 16, **settings}
        )
        return [str(row.value["context"]) for row in GENERATORS["passkey"](dataset)]

    for text in contexts(passkey_digits=3):
        assert re.search(r"key is (\d{3})\. Remember \1\.", text)
    assert not set(contexts(label="short")) & set(contexts())


def test_the_answer_of_a_pair_stands_behind_its_letter_and_far_from_the_question() -> None:
    answers = set()
    for example in examples("pair_recall", 200):
        letter = example.context[-1]
        place = example.context.index(letter)
        assert example.context[place + 1] == example.target and len(example.context) - 1 - (place + 1) >= 10
        answers.add(example.target)
    assert len(answers) == 10


def test_library_code_parses_and_does_not_hold_its_documentation() -> None:
    for example in examples("stdlib_code", 200):
        ast.parse(example.target)
        documentation = example.context.split("\n", 1)[1].removesuffix("\nCode:\n")
        assert documentation not in example.target


def test_documents_become_pieces_that_join_to_the_document_again() -> None:
    document = "  ".join(f"word{i}" for i in range(300)) + "\n"
    skipped = SkipCounter()
    found = list(text_examples([Row("a.txt line 1", {"text": document, "file": "a.txt"})], skipped))
    assert "".join(example.context + example.target for example in found) == document
    assert len({example.group for example in found}) == 1 and len({example.id for example in found}) == len(found) == 3


def test_documents_that_are_too_short_are_counted() -> None:
    skipped = SkipCounter()
    rows = [Row("a", {"text": "one"}), Row("b", {"text": " "}), Row("c", {"text": "two words"})]
    assert [(e.context, e.target) for e in text_examples(rows, skipped)] == [("two ", "words")]
    assert skipped.counts == {"fewer than two words": 2}


def test_a_row_without_text_names_the_columns() -> None:
    with pytest.raises(DataError, match=r"notes\.jsonl line 3.*'body'"):
        list(text_examples([Row("notes.jsonl line 3", {"body": "x"})], SkipCounter()))


def test_an_unknown_dataset_suggests_the_nearest() -> None:
    with pytest.raises(ConfigError) as caught:
        preprocessor_of("word_problem")
    assert "word_problems" in caught.value.action
    assert {"gsm8k", "word_problems", "list_sorting", "text"} <= set(dataset_names())
    assert len(dataset_names()) == 39
