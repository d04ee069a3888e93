"""Probes: the key lies where it is said to lie, and known models get the maps that they must get."""

from __future__ import annotations

import math
import re

import pytest

from hsmn_dist.evaluation.figures import recall_figure
from hsmn_dist.evaluation.probes import (
    RecallSettings,
    filler_sentences,
    recall_question,
    run_adaptation_probe,
    run_recall_probe,
)
from hsmn_dist.foundation.errors import ConfigError
from hsmn_dist.models.text_model import LogLikelihood
from tests.support.byte_models import byte_text_model
from tests.support.text_models import UniformTextModel

SMALL = RecallSettings(lengths=(40, 200), depths=(0.0, 0.5, 1.0), num_trials=4)


class ReadingModel:
    """Reads the last `window` words of the context and answers from them; knows nothing else."""

    def __init__(self, window: int) -> None:
        self.window = window

    def visible(self, context: str) -> str:
        text, _, question = context.rpartition("\nQuestion: ")
        door = re.search(r"the (\w+) door", question)
        asked = f"key of the {door.group(1)} door is" if door else "pass key is"
        seen = " ".join(text.split()[-self.window :])
        found = re.search(rf"{asked} (\d+)", seen)
        return found.group(1) if found else ""

    def generate(self, prompts, settings):
        return [f" {self.visible(prompt)}." for prompt in prompts]

    def loglikelihood(self, pairs):
        return [
            LogLikelihood(0.1 if target == self.visible(context) else 5.0, 1, len(target.encode()), False)
            for context, target in pairs
        ]


@pytest.mark.parametrize("kind", ["passkey", "multi_key"])
def test_a_reader_of_everything_recalls_every_cell(kind):
    result = run_recall_probe(ReadingModel(10**6), RecallSettings(kind=kind, lengths=(40, 200), num_trials=3))
    assert all(value == 1.0 for row in result.recalled + result.chosen for value in row)


def test_a_reader_of_the_last_words_sees_only_the_end_of_long_texts():
    result = run_recall_probe(ReadingModel(60), SMALL)
    assert [row[0] for row in result.recalled] == [1.0, 1.0, 1.0], "40 words fit into the window"
    assert [row[1] for row in result.recalled] == [0.0, 0.0, 1.0], "of 200 words only the end does"


def test_a_model_that_knows_nothing_chooses_at_chance():
    result = run_recall_probe(UniformTextModel(), SMALL)
    assert all(value == 0.25 for row in result.chosen for value in row)
    assert all(value == 0.0 for row in result.recalled for value in row)


@pytest.mark.parametrize("depth", [0.0, 0.3, 0.5, 1.0])
def test_the_key_lies_at_its_depth_and_the_filler_is_the_same_at_every_depth(depth):
    question = recall_question(SMALL, 300, depth, trial=2)
    text = question.context.split("\nQuestion: ")[0]
    start = text.index(f"The pass key is {question.key}")
    assert start / len(text) == pytest.approx(depth, abs=0.06)
    filler = text.replace(f"The pass key is {question.key}. Remember {question.key}.", "").split()
    assert filler == " ".join(filler_sentences(300, 2)).split()
    assert 290 <= len(filler) <= 330
    assert question.key not in question.wrong_keys
    assert len(set(question.wrong_keys)) == 3


def test_keys_of_other_doors_are_in_the_text_and_among_the_wrong_answers():
    question = recall_question(RecallSettings(kind="multi_key", num_keys=4), 200, 0.5, 0)
    assert len(re.findall(r"The pass key of the \w+ door is \d+", question.context)) == 4
    assert all(key in question.context for key in question.wrong_keys)


def test_questions_depend_on_the_seed_and_the_trial_alone():
    first = recall_question(SMALL, 100, 0.5, 1)
    assert recall_question(SMALL, 100, 0.5, 1) == first
    assert recall_question(SMALL, 100, 0.5, 2).key != first.key


@pytest.mark.parametrize("change", [{"depths": (1.5,)}, {"lengths": ()}, {"num_keys": 99}, {"num_choices": 1}])
def test_settings_that_make_no_sense_are_refused(change):
    with pytest.raises(ConfigError, match="recall probe"):
        RecallSettings(**change)


@pytest.mark.parametrize("family", ["hsmn", "hope"])
def test_both_families_can_be_probed_and_the_map_drawn(family, tmp_path):
    model = byte_text_model(family, max_context_tokens=128)
    settings = RecallSettings(lengths=(20, 200), depths=(0.0, 1.0), num_trials=2, max_new_tokens=6)
    result = run_recall_probe(model, settings)
    assert result.is_longer_than_limit == [False, True]
    assert all(0.0 <= value <= 1.0 for row in result.chosen for value in row)
    path = recall_figure(result, tmp_path / "map.png")
    assert path.stat().st_size > 1000


class CountingModel:
    """Its loss falls with every time that the pair is in the context."""

    def loglikelihood(self, pairs):
        results = []
        for context, target in pairs:
            seen = context.count(f"{context.split()[-3]} goes with {target}.")
            size = len(target.encode())
            results.append(LogLikelihood(size * 2.0 / (1 + seen), size, size, False))
        return results


def test_adaptation_counts_how_often_a_pair_was_seen():
    result = run_adaptation_probe(CountingModel(), repeats=(0, 1, 3), num_trials=5)
    assert result.nats_per_byte == pytest.approx([2.0, 1.0, 0.5])
    flat = run_adaptation_probe(UniformTextModel(), num_trials=3)
    assert flat.nats_per_byte == pytest.approx([math.log(256)] * 5)
