"""Contamination: against the slow and obvious way, and on cases told by hand."""

from __future__ import annotations

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hsmn_dist.data.contamination import ContaminationReport, measure_contamination, words_of
from hsmn_dist.data.example import Example
from hsmn_dist.data.preprocessors.all import get_preprocessor
from hsmn_dist.data.preprocessors.base import Row, SkipCounter
from hsmn_dist.foundation.errors import ConfigError
from tests.support.golden_rows import golden
from tests.support.shared import shared_data

LONG = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen"


def example(identity: str, context: str, target: str = "end") -> Example:
    return Example(context, target, "chat", identity, identity, "free_text")


def only(benchmark: list[Example], training: list[Example], **options: int) -> ContaminationReport:
    (report,) = measure_contamination({"bench": benchmark}, {"train": training}, **options)
    return report


def slow_ids(items: list[Example], training: list[Example], ngram_words: int, min_words: int) -> list[str]:
    """Every run of every item looked for in every training example by comparing lists of words."""
    found = []
    texts = [words_of(other) for other in training]
    for item in items:
        words = words_of(item)
        if len(words) < min_words:
            continue
        length = min(ngram_words, len(words))
        runs = [words[start : start + length] for start in range(len(words) - length + 1)]
        if any(
            run == text[start : start + length]
            for run in runs
            for text in texts
            for start in range(len(text) - length + 1)
        ):
            found.append(item.id)
    return found


SENTENCES = st.lists(st.sampled_from(["a", "b", "c", "d"]), max_size=12).map(" ".join)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(SENTENCES, min_size=1, max_size=5),
    st.lists(SENTENCES, max_size=5),
    st.integers(1, 6).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n))),
)
def test_contaminated_items_are_those_that_comparing_everything_finds(items, training, lengths):
    bench = [example(f"i{number}", text) for number, text in enumerate(items)]
    train = [example(f"t{number}", text) for number, text in enumerate(training)]
    report = only(bench, train, ngram_words=lengths[0], min_words=lengths[1])
    assert report.contaminated_ids == slow_ids(bench, train, *lengths)
    assert report.num_contaminated == len(report.contaminated_ids)
    assert report.num_not_judged == sum(len(words_of(item)) < lengths[1] for item in bench)


def test_thirteen_words_in_a_row_are_a_finding_and_twelve_are_none():
    words = LONG.split()
    item = example("i", LONG)
    assert only([item], [example("t", "x " + " ".join(words[:13]) + " y")]).contaminated_ids == ["i"]
    assert only([item], [example("t", "x " + " ".join(words[:12]) + " y")]).contaminated_ids == []


def test_case_and_punctuation_do_not_hide_a_copy():
    copy = LONG.upper().replace(" ", ", ")
    assert only([example("i", LONG)], [example("t", copy)]).num_contaminated == 1


def test_a_short_item_is_looked_for_whole():
    short = example("i", "which river runs through the old town of", "Bath")  # 9 words with its answer
    whole = example("t", "Tell me which river runs through the old town of Bath please")
    part = example("u", "Tell me which river runs through the old town of York please")
    assert only([short], [whole]).contaminated_ids == ["i"]
    assert only([short], [part]).contaminated_ids == []


def test_an_item_of_fewer_words_is_not_judged_and_that_is_said():
    report = only([example("i", "two plus two", "four")], [example("t", "two plus two", "four")])
    assert (report.num_items, report.num_not_judged, report.num_contaminated) == (1, 1, 0)
    assert "not measured" in report.sentence()


def test_labels_and_fixed_sentences_of_the_wording_are_no_overlap():
    def program(identity: str, text: str) -> Example:
        value = dict(golden("codecontests")["own"]["rows"][0], name=identity, description=text)
        (made,) = get_preprocessor("codecontests")([Row(identity, value)], SkipCounter())
        return Example(**{**made.__dict__, "target": f"pass {identity}"})

    report = only(
        [program("i", "Sort the apples by weight and print all of them in that order today.")],
        [program("t", "Count the pears.")],
        ngram_words=8,
    )
    assert report.num_contaminated == 0
    assert words_of(program("i", "Sort."))[:2] == ["sort", "pass"]


def test_a_copied_multiple_choice_item_is_found_without_its_letters():
    value = {
        "question": "Which of these animals sleeps upside down in caves?",
        "subject": "",
        "choices": ["the bat", "the cow", "the ant", "the hen"],
        "answer": 0,
    }
    (item,) = get_preprocessor("mmlu")([Row("m:1", value)], SkipCounter())
    copy = example("t", "Which of these animals sleeps upside down in caves? the bat the cow the ant the hen")
    report = only([item], [copy])
    assert report.num_contaminated == 1


def test_a_report_counts_by_training_dataset_and_shows_the_words():
    items = [example("i", LONG), example("j", LONG.replace("two", "zwei").replace("nine", "neun"))]
    copies = {"a": [example("t", LONG)], "b": [example("u", "so " + LONG), example("v", "nothing")]}
    (report,) = measure_contamination({"bench": items}, copies)
    assert report.by_training_dataset == {"a": 1, "b": 1}
    assert report.contaminated_ids == ["i"]
    assert report.matches[0]["dataset"] == "a"
    assert report.matches[0]["words"].startswith("one two three")
    assert report.share == 0.5
    assert report.sentence() == "1 of 2 items (50.0 %) share 13 words in a row with the training data (a 1, b 1)"


def test_coverage_is_the_share_of_the_items_n_grams_that_were_found():
    item = example("i", LONG, "fifteen sixteen")  # 16 words: 4 n-grams of 13
    half = example("t", " ".join(LONG.split()), "x")  # the first two of them
    assert only([item], [half]).mean_coverage == pytest.approx(0.5)


def test_several_benchmarks_are_measured_in_one_pass_over_a_stream():
    passes = []

    def stream():
        passes.append(1)
        yield example("t", LONG)

    reports = measure_contamination({"b": [example("i", LONG)], "a": [example("j", "x " * 20)]}, {"train": stream()})
    assert [(report.benchmark, report.num_contaminated) for report in reports] == [("a", 0), ("b", 1)]
    assert passes == [1]


def test_a_report_survives_json():
    report = only([example("i", LONG)], [example("t", LONG)])
    assert ContaminationReport.from_json(json.loads(json.dumps(report.to_json()))) == report


def test_the_scorecard_gets_counts_and_a_status_and_never_a_zero_for_what_was_not_judged():
    entry = only([example("i", LONG), example("j", "two plus two")], [example("t", LONG)]).scorecard_entry()
    assert entry == {
        "status": "measured",
        "items": 1,
        "contaminated": 1,
        "share": 1.0,
        "words in a row": 13,
        "in": "train 1",
        "too short to judge": 1,
    }
    unjudged = only([example("j", "two plus two")], []).scorecard_entry()
    assert unjudged == {"status": "not measured", "items": 1, "too short to judge": 1}


def test_lengths_that_make_no_sense_are_refused():
    with pytest.raises(ConfigError, match="n-grams of 5 words"):
        only([example("i", LONG)], [], ngram_words=5, min_words=6)


def test_real_items_planted_in_training_text_are_found_and_no_others():
    lines = (shared_data("gsm8k") / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [Row(f"g:{number}", json.loads(line)) for number, line in enumerate(lines)]
    examples = list(get_preprocessor("gsm8k")(rows, SkipCounter()))
    items, training = examples[:10], examples[10:70]
    assert only(items, training).contaminated_ids == slow_ids(items, training, 13, 8)
    planted = random.Random(3).sample(items, 7)
    texts = [example(f"p{n}", f"Someone wrote: {item.context} {item.target}") for n, item in enumerate(planted)]
    found = set(only(items, training + texts).contaminated_ids) - set(only(items, training).contaminated_ids)
    assert found == {item.id for item in planted} - set(only(items, training).contaminated_ids)
    assert len(found) >= 6
