"""evaluate_task: the main score of each kind by hand, the conditions, and what is not measured."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

import pytest

from hsmn_dist.config.evaluation import EvaluationConfig
from hsmn_dist.data.example import Example
from hsmn_dist.evaluation.runner import evaluate_task, spread
from hsmn_dist.evaluation.task_result import TaskResult
from hsmn_dist.foundation.errors import DataError
from hsmn_dist.models.generation import GenerationSettings
from hsmn_dist.models.text_model import LogLikelihood
from tests.support.text_models import OracleTextModel, UniformTextModel

SETTINGS = EvaluationConfig(num_examples=8, num_loss_examples=8, bootstrap_samples=50)


class TableModel:
    """Nats per continuation and a text per prompt, both from a table."""

    def __init__(self, nats: dict[str, float] | None = None, texts: dict[str, str] | None = None) -> None:
        self.nats, self.texts = nats or {}, texts or {}
        self.settings: list[GenerationSettings] = []

    def loglikelihood(self, pairs: Sequence[tuple[str, str]]) -> list[LogLikelihood]:
        return [
            LogLikelihood(self.nats.get(target, 1.0), max(1, len(target.split())), len(target.encode()), False)
            for _, target in pairs
        ]

    def generate(self, prompts: Sequence[str], settings: GenerationSettings) -> list[str]:
        self.settings.append(settings)
        return [self.texts[prompt] for prompt in prompts]


def example(kind: str, index: int = 0, **fields) -> Example:
    meta = fields.pop("meta", {})
    fields = {"context": f"context {index}", "target": "target", "task": "chat", "id": f"{kind}-{index}", **fields}
    return Example(group=fields["id"], kind=kind, meta=meta, **fields)


def test_multiple_choice_is_scored_per_byte_and_by_the_plain_sum():
    # Per byte: long 3.0/6 = 0.5, "ab" 2.0/2 = 1.0 -> long wins; by the sum "ab" wins.
    question = example("multiple_choice", meta={"choices": ["longer", "ab"], "gold": 0})
    result = evaluate_task(TableModel({"longer": 3.0, "ab": 2.0}), "t", [question], SETTINGS)
    assert (result.metric, result.score, result.extra) == ("acc_norm", 1.0, {"accuracy": 0.0})


def test_lettered_choices_are_also_scored_by_their_letter():
    shown = "Question: q\nA. red\nB. green\nAnswer: "
    questions = [
        example("multiple_choice", 0, context=shown, meta={"choices": ["red", "green"], "gold": 1}),
        example("multiple_choice", 1, meta={"choices": ["red", "green"], "gold": 0}),
    ]
    result = evaluate_task(TableModel({"red": 0.1, "green": 9.0, "A": 2.0, "B": 1.0}), "t", questions, SETTINGS)
    assert (result.score, result.extra) == (0.5, {"accuracy": 0.5, "accuracy_letter": 1.0}), "of the first one alone"


def test_exact_answers_are_taken_strictly_and_flexibly():
    problems = [
        example("exact_answer", 0, target="2+2=4\n#### 4", meta={"answer": "4"}),
        example("exact_answer", 1, target="1+2=3\n#### 3", meta={"answer": "3"}),
        example("exact_answer", 2, target="five is $\\boxed{5}$", meta={"answer": "5"}),
    ]
    texts = {"context 0": "so\n#### 4.0", "context 1": "the answer is 3", "context 2": "\\boxed{6}"}
    model = TableModel(texts=texts)
    result = evaluate_task(model, "t", problems, SETTINGS)
    assert result.score == pytest.approx(1 / 3)
    assert result.extra["exact_match_flexible"] == pytest.approx(2 / 3)
    assert result.example_scores == [1.0, 0.0, 0.0]
    assert result.conditions["extraction"] == "strict: boxed, hashes"
    assert model.settings[0].temperature == 0.0


def test_open_questions_take_any_right_answer_of_the_first_line():
    questions = [example("open_question", i, meta={"answers": ["Bob Dylan", "Dylan"]}) for i in range(2)]
    result = evaluate_task(
        TableModel(texts={"context 0": "the Dylan\nignored", "context 1": "Bob Marley"}), "t", questions, SETTINGS
    )
    assert result.score == 0.5
    assert result.extra["f1"] == pytest.approx((1.0 + 0.5) / 2)


def test_preference_is_the_share_of_chosen_replies_that_are_likelier_per_byte():
    pairs = [
        example("preference", 0, target="a long good reply", meta={"chosen": "a long good reply", "rejected": "bad"}),
        example("preference", 1, target="ok", meta={"chosen": "ok", "rejected": "no"}),
    ]
    result = evaluate_task(
        TableModel({"a long good reply": 4.0, "bad": 3.0, "ok": 2.0, "no": 1.0}), "t", pairs, SETTINGS
    )
    assert (result.metric, result.score, result.extra["accuracy"]) == ("accuracy_norm", 0.5, 0.0)


def test_ranking_gives_map_and_mrr():
    question = example("ranking", target="b", meta={"candidates": ["a", "b", "c"], "labels": [0, 1, 1]})
    result = evaluate_task(TableModel({"a": 0.1, "b": 0.2, "c": 0.3}), "t", [question], SETTINGS)
    assert result.score == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert result.extra["mrr"] == pytest.approx(1 / 2)


def test_free_text_and_dialogue_are_scored_by_overlap_and_candidates():
    reply = example("dialogue", 0, target="I am fine", meta={"turns": [], "candidates": ["no", "I am fine"], "gold": 1})
    text = example("free_text", 1, target="Some words here")
    model = TableModel({"no": 9.0, "I am fine": 0.1}, {"context 0": "I am fine", "context 1": "qqq"})
    dialogue = evaluate_task(model, "t", [reply], SETTINGS)
    assert dialogue.score == pytest.approx(1.0)
    assert dialogue.extra == pytest.approx({"rouge_l": 1.0, "f1": 1.0, "hits_at_1": 1.0})
    assert evaluate_task(model, "t", [text], SETTINGS).score == 0.0


def test_code_is_not_measured_unless_it_may_be_run():
    problem = example("code", target="return 1", meta={"tests": ["assert f() == 1"], "entry_point": "f"})
    result = evaluate_task(UniformTextModel(), "t", [problem], SETTINGS)
    assert (result.status, result.score, result.num_examples) == ("not measured", None, 0)
    assert "runs_model_code" in result.reason
    assert result.nll_per_token == pytest.approx(math.log(256)), "the loss is measured all the same"


def test_the_loss_is_per_token_over_all_targets_and_bits_are_per_byte():
    questions = [
        example("open_question", 0, target="one two", meta={"answers": ["x"]}),
        example("open_question", 1, target="abc", meta={"answers": ["x"]}),
    ]
    model = TableModel({"one two": 4.0, "abc": 2.0}, {"context 0": "x", "context 1": "x"})
    result = evaluate_task(model, "t", questions, SETTINGS)
    assert result.nll_per_token == pytest.approx(6.0 / 3)
    assert result.bits_per_byte == pytest.approx(6.0 / math.log(2) / 10)


def test_a_task_of_several_kinds_has_the_mean_over_examples_and_each_part_named():
    mixed = [
        example("multiple_choice", 0, meta={"choices": ["a", "b"], "gold": 0}),
        example("open_question", 1, meta={"answers": ["x"]}),
        example("multiple_choice", 2, meta={"choices": ["a", "b"], "gold": 1}),
        example("code", 3, meta={"tests": ["assert True"], "entry_point": None}),
    ]
    result = evaluate_task(TableModel({"a": 0.1}, {"context 1": "x"}), "t", mixed, SETTINGS)
    assert (result.kind, result.metric, result.status) == ("mixed", "mean_of_kinds", "measured")
    assert result.score == pytest.approx(2 / 3)
    assert result.extra["multiple_choice.acc_norm"] == 0.5
    assert result.extra["open_question.exact_match"] == 1.0
    assert "code: " in result.reason
    assert result.example_ids == ["multiple_choice-0", "open_question-1", "multiple_choice-2"]


def test_scored_examples_are_spread_over_those_given():
    examples = [example("free_text", index) for index in range(10)]
    assert [one.id for one in spread(examples, 4)] == ["free_text-0", "free_text-2", "free_text-5", "free_text-7"]
    assert spread(examples, 99) == examples


def test_every_condition_of_a_score_is_written_down():
    settings = EvaluationConfig(num_examples=2, temperature=0.7, seed=5, max_new_tokens=9, bootstrap_samples=0)
    questions = [example("open_question", i, meta={"answers": ["x"]}) for i in range(4)]
    model = TableModel(texts={f"context {i}": "x" for i in range(4)})
    result = evaluate_task(model, "t", questions, settings, split="validation")
    assert result.conditions == {
        "split": "validation",
        "shots": 0,
        "prompt_version": "1",
        "selection": "spread evenly over the first 4 examples of the split",
        "temperature": 0.7,
        "max_new_tokens": 9,
        "seed": 5,
        "extraction": "first line, words normalised",
    }
    assert result.interval is None
    assert (model.settings[0].temperature, model.settings[0].seed, model.settings[0].max_new_tokens) == (0.7, 5, 9)
    assert TaskResult.from_json(json.loads(json.dumps(result.to_json()))) == result


def test_intervals_are_wilson_for_right_or_wrong_and_bootstrap_for_fractions():
    questions = [example("open_question", i, meta={"answers": ["x"]}) for i in range(8)]
    none_right = evaluate_task(TableModel(texts={f"context {i}": "y" for i in range(8)}), "t", questions, SETTINGS)
    assert none_right.interval_method == "wilson"
    assert none_right.interval[0] == 0.0
    assert none_right.interval[1] > 0.2, "0 of 8 does not prove 0"
    texts = [example("free_text", i, target="some words") for i in range(3)]
    unlike = evaluate_task(TableModel(texts={f"context {i}": "qqq" for i in range(3)}), "t", texts, SETTINGS)
    assert (unlike.score, unlike.interval_method, unlike.interval) == (0.0, "bootstrap", (0.0, 0.0))
    choices = [
        example("multiple_choice", i, meta={"choices": ["ab", "cd"] + ["ef"] * (i % 2), "gold": 0}) for i in range(8)
    ]
    assert evaluate_task(UniformTextModel(), "t", choices, SETTINGS).interval_method == "bootstrap"


def test_no_examples_is_an_error_that_names_the_task_and_split():
    with pytest.raises(DataError, match=r"'gsm8k': no examples in its test split"):
        evaluate_task(UniformTextModel(), "gsm8k", [], SETTINGS)


def test_the_same_inputs_give_the_same_result():
    questions = [example("free_text", i, target=f"text {i}") for i in range(6)]
    oracle = OracleTextModel(questions)
    assert evaluate_task(oracle, "t", questions, SETTINGS) == evaluate_task(oracle, "t", questions, SETTINGS)


def test_shots_stand_solved_before_every_question():
    shots = [example("open_question", index, id=f"s{index}", meta={"answers": ["x"]}) for index in (7, 8, 9)]
    question = example("open_question", 1, meta={"answers": ["yes"]})
    prompt = "context 7target\n\ncontext 8target\n\ncontext 1"
    settings = SETTINGS.model_copy(update={"num_shots": 2})
    result = evaluate_task(TableModel(texts={prompt: "yes"}), "t", [question], settings, shots=shots)
    assert result.score == 1.0
    assert (result.conditions["shots"], result.conditions["shot_ids"]) == (2, ["s7", "s8"])


@pytest.mark.parametrize(
    ("shot_ids", "message"), [(["a"], "1 shots where evaluation.num_shots asks for 2"), (["a", "q"], "'q' is a shot")]
)
def test_too_few_shots_and_shots_that_are_scored_are_refused(shot_ids, message):
    shots = [example("free_text", id=name) for name in shot_ids]
    settings = SETTINGS.model_copy(update={"num_shots": 2})
    with pytest.raises(DataError, match=message):
        evaluate_task(TableModel(), "t", [example("free_text", id="q")], settings, shots=shots)
