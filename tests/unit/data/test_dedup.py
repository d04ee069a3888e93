"""Duplicates: exact and near, against the slow and obvious way."""

from __future__ import annotations

import json
import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hsmn_dist.data.dedup import DedupSettings, NearDuplicates, deduplicated, exact_key, jaccard, shingles
from hsmn_dist.data.example import Example
from hsmn_dist.data.preprocessors.all import get_preprocessor
from hsmn_dist.data.preprocessors.base import Row, SkipCounter
from hsmn_dist.foundation.errors import ConfigError
from tests.support.shared import shared_data


def example(number: int, context: str, target: str = "t", group: str | None = None) -> Example:
    return Example(context, target, "chat", f"e{number}", group or f"g{number}", "free_text")


def kept(examples: list[Example], **options: object) -> tuple[list[str], SkipCounter]:
    skipped = SkipCounter()
    return [e.id for e in deduplicated(examples, DedupSettings(**options), skipped)], skipped  # type: ignore[arg-type]


def reference_shingles(text: str, num_words: int) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text.casefold())
    if len(words) < num_words:
        return {tuple(words)}
    return {tuple(words[start : start + num_words]) for start in range(len(words) - num_words + 1)}


def reference_near(texts: list[str], num_words: int, threshold: float) -> list[int]:
    """Every pair compared in full: what is kept when each text is held against all kept before it."""
    found: list[tuple[int, set[tuple[str, ...]]]] = []
    for number, text in enumerate(texts):
        runs = reference_shingles(text, num_words)
        if not any(len(runs & other) / len(runs | other) >= threshold for _, other in found):
            found.append((number, runs))
    return [number for number, _ in found]


def corpus(seed: int, num_texts: int) -> list[str]:
    """Texts of 40 to 80 words, half of them made from an earlier one by changing 0 to 12 words."""
    draw = random.Random(seed)
    words = [f"w{number}" for number in range(400)]
    texts: list[str] = []
    for _ in range(num_texts):
        if texts and draw.random() < 0.5:
            text = draw.choice(texts).split()
            for _ in range(draw.choice([0, 1, 1, 2, 12])):
                text[draw.randrange(len(text))] = draw.choice(words)
        else:
            text = [draw.choice(words) for _ in range(draw.randint(40, 80))]
        texts.append(" ".join(text))
    return texts


def test_exact_duplicates_are_dropped_and_the_first_is_kept_with_its_place():
    examples = [example(0, "a  b"), example(1, "a b"), example(2, "a b", "other"), example(3, "a\nb ")]
    ids, skipped = kept(examples, method="exact")
    assert ids == ["e0", "e2"]
    assert skipped.counts == {"an exact duplicate": 2}
    assert skipped.first_origins == {"an exact duplicate": ["e1 (as e0)", "e3 (as e0)"]}


def test_composed_and_decomposed_letters_are_equal_and_case_is_not():
    assert exact_key(example(0, "caf\u00e9")) == exact_key(example(1, "cafe\u0301"))
    assert exact_key(example(0, "Polish")) != exact_key(example(1, "polish"))


def test_context_and_target_do_not_run_into_each_other():
    assert exact_key(example(0, "a b", "c")) != exact_key(example(1, "a", "b c"))


def test_method_none_keeps_everything():
    assert kept([example(0, "a"), example(1, "a")], method="none")[0] == ["e0", "e1"]


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="ab .,\n", max_size=40), st.text(alphabet="ab .,\n", max_size=40), st.integers(1, 4))
def test_shingle_overlap_equals_the_slow_way(one, other, num_words):
    first, second = reference_shingles(one, num_words), reference_shingles(other, num_words)
    slow = len(first & second) / len(first | second)
    assert jaccard(shingles(one, num_words), shingles(other, num_words)) == pytest.approx(slow)


def test_near_duplicates_are_those_that_comparing_all_pairs_finds():
    wrong = missed = found = 0
    for seed in range(6):
        texts = corpus(seed, 120)
        slow = reference_near(texts, 5, 0.8)
        near = NearDuplicates(DedupSettings(method="near"))
        fast = [number for number, text in enumerate(texts) if near.find_or_add(text, str(number), str(number)) is None]
        wrong += len(set(slow) - set(fast))
        missed += len(set(fast) - set(slow))
        found += len(texts) - len(slow)
    assert wrong == 0  # a candidate is checked against its real shingles
    assert found > 100
    assert missed <= 0.01 * found


def test_the_result_is_the_same_every_time():
    examples = [example(number, text) for number, text in enumerate(corpus(7, 80))]
    assert kept(examples, method="near")[0] == kept(examples, method="near")[0]


def test_overlap_inside_a_group_is_no_duplicate():
    long = " ".join(f"word{number}" for number in range(100))
    inside = [example(0, long, group="g"), example(1, long + " more", group="g")]
    assert kept(inside, method="near")[0] == ["e0", "e1"]
    outside = [example(0, long), example(1, long + " more")]
    ids, skipped = kept(outside, method="near")
    assert ids == ["e0"]
    assert skipped.counts == {"a near-duplicate (overlap >= 0.8)": 1}


def test_the_wording_that_all_examples_share_does_not_make_them_alike():
    examples = [
        example(number, f"Question: {word}\nA. {word}x\nB. {word}y\nAnswer: ", f"{word}z")
        for number, word in enumerate(["fir", "elm"])
    ]
    assert kept(examples, method="near", threshold=0.3)[0] == ["e0", "e1"]


@pytest.mark.parametrize("options", [{"threshold": 0.0}, {"threshold": 1.5}, {"shingle_words": 0}])
def test_settings_that_make_no_sense_are_refused(options):
    with pytest.raises(ConfigError, match="near-duplicate settings"):
        DedupSettings(**options)


def test_it_is_lazy():
    taken = []

    def stream():
        for number in range(100):
            taken.append(number)
            yield example(number, f"text number {number}")

    first = next(deduplicated(stream(), DedupSettings(method="near"), SkipCounter()))
    assert (first.id, taken) == ("e0", [0])


def test_real_dialogues_lose_nothing_to_their_own_overlap():
    lines = (shared_data("daily_dialog") / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [Row(f"d:{number}", json.loads(line)) for number, line in enumerate(lines[:60])]
    examples = list(get_preprocessor("daily_dialog")(rows, SkipCounter()))
    assert len(kept(examples, method="near")[0]) == len(examples)
    assert len(kept(examples + examples, method="near")[0]) == len(examples)
