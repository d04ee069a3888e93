"""Every dataset with real rows here: an oracle scores 1, a model that knows nothing scores chance. Code runs elsewhere."""

from __future__ import annotations

import json
import random

import pytest

from hsmn_dist.config.evaluation import EvaluationConfig
from hsmn_dist.data.example import Example
from hsmn_dist.data.preprocessors.all import get_preprocessor
from hsmn_dist.data.preprocessors.base import Row, SkipCounter
from hsmn_dist.evaluation.metrics import average_precision
from hsmn_dist.evaluation.runner import evaluate_task
from tests.support.byte_models import byte_text_model
from tests.support.shared import shared_data
from tests.support.text_models import OracleTextModel, UniformTextModel

KIND_OF_DATASET = {
    "code_search_net": "free_text",
    "human_eval": "code",
    "mbpp": "code",
    "mmlu": "multiple_choice",
    "open_r1_math": "exact_answer",
    "sciq": "multiple_choice",
    "gsm8k": "exact_answer",
    "arc_easy": "multiple_choice",
    "arc_challenge": "multiple_choice",
    "stem": "multiple_choice",
    "daily_dialog": "dialogue",
    "personachat": "dialogue",
    "open_assistant": "dialogue",
    "code_alpaca": "free_text",
    "alpaca": "free_text",
    "dolly": "free_text",
    "truthfulqa": "multiple_choice",
    "kjv_bible": "free_text",
    "hellaswag": "multiple_choice",
    "apps": "code",
    "mathqa": "multiple_choice",
    "strategyqa": "multiple_choice",
    "codecontests": "code",
    "nq_open": "open_question",
    "natural_questions": "open_question",
    "aqua_rat": "multiple_choice",
    "ultrafeedback": "preference",
    "bbh": "exact_answer",
    "wikiqa": "ranking",
    "math": "exact_answer",
    "wizardlm": "free_text",
    "owasp": "free_text",
}
NUM_EXAMPLES = 60
SETTINGS = EvaluationConfig(num_examples=NUM_EXAMPLES, num_loss_examples=NUM_EXAMPLES, max_new_tokens=40)


def examples_of(name: str) -> list[Example]:
    folder = shared_data(name)
    files = [folder / file for file in ("rows.jsonl", "invented.jsonl") if (folder / file).is_file()]
    if not files:
        pytest.skip(f"{name} has neither real nor invented rows on this machine")
    rows = []
    for number, line in enumerate(files[0].read_text(encoding="utf-8").splitlines()):
        if number >= 400:
            break
        rows.append(Row(f"{name}:{number}", json.loads(line)))
    return list(get_preprocessor(name)(rows, SkipCounter()))[:NUM_EXAMPLES]


@pytest.mark.parametrize("name", sorted(name for name, kind in KIND_OF_DATASET.items() if kind != "code"))
def test_the_oracle_scores_one_and_a_model_that_knows_nothing_scores_chance(name):
    examples = examples_of(name)
    assert {example.kind for example in examples} == {KIND_OF_DATASET[name]}
    oracle = evaluate_task(OracleTextModel(examples), name, examples, SETTINGS)
    assert oracle.score == pytest.approx(ceiling(examples), abs=1e-9), worst(oracle)
    # Flexible extraction takes the last number, which cannot be right where the answer is no number.
    for metric, value in oracle.extra.items():
        if metric not in ("exact_match_flexible",):
            assert value >= ceiling(examples) - 1e-9, metric
    uniform = evaluate_task(UniformTextModel(), name, examples, SETTINGS)
    low, high = uniform.interval
    # Random letters share some n-grams with any text, so chrF is a little above 0.
    slack = 0.1 if KIND_OF_DATASET[name] in ("free_text", "dialogue") else 1e-9
    assert low - slack <= chance(examples) <= high + slack


@pytest.fixture(scope="module")
def tiny_model():
    return byte_text_model("hope", max_context_tokens=96, max_target_tokens=48)


@pytest.mark.parametrize("name", sorted(KIND_OF_DATASET))
def test_a_tiny_model_with_a_real_tokenizer_is_scored_on_every_dataset(name, tiny_model):
    examples = examples_of(name)[:2]
    settings = EvaluationConfig(num_examples=2, num_loss_examples=2, max_new_tokens=3, bootstrap_samples=10)
    result = evaluate_task(tiny_model, name, examples, settings)
    assert result.status == ("not measured" if KIND_OF_DATASET[name] == "code" else "measured")
    assert result.score is None or 0.0 <= result.score <= 1.0
    assert 3.0 < result.nll_per_token < 20.0, "weights that were never trained are near ln 260 = 5.6, or worse"
    assert result.conditions["max_new_tokens"] == 3


def worst(result) -> list[str]:
    return [name for name, value in zip(result.example_ids, result.example_scores, strict=True) if value < 1.0][:5]


def ceiling(examples: list[Example]) -> float:
    """1, less what rows make impossible: a gold choice whose text another choice has as well."""
    credits = []
    for example in examples:
        choices = example.meta.get("choices", [])
        same = choices.count(choices[example.meta["gold"]]) if choices else 1
        credits.append(1.0 / same)
    return sum(credits) / len(credits)


def chance(examples: list[Example]) -> float:
    """What a fair draw scores; 0 for generated answers, which random letters do not hit."""
    kind = examples[0].kind
    if kind == "multiple_choice":
        return sum(1.0 / len(example.meta["choices"]) for example in examples) / len(examples)
    if kind == "preference":
        return 0.5
    if kind == "ranking":
        draw = random.Random(1)
        values = []
        for example in examples:
            labels = example.meta["labels"]
            values += [average_precision([draw.random() for _ in labels], labels, str(trial)) for trial in range(200)]
        return sum(values) / len(values)
    return 0.0


def test_every_preprocessor_has_a_kind_with_a_scorer():
    from hsmn_dist.data.preprocessors.all import preprocessor_names
    from hsmn_dist.evaluation.scorers import SCORERS

    assert set(KIND_OF_DATASET.values()) <= set(SCORERS)
    unknown = set(preprocessor_names()) - set(KIND_OF_DATASET) - {"bigbench_hard"}
    assert not unknown, f"add these datasets to the table above: {sorted(unknown)}"
