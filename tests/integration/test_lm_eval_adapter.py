"""Our models in lm-evaluation-harness, offline: local YAML tasks, and the same scores as our own runner."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

pytest.importorskip("lm_eval")

from hsmn_dist.config.evaluation import EvaluationConfig
from hsmn_dist.data.example import Example
from hsmn_dist.evaluation.lm_eval_adapter import HarnessModel, run_harness, split_text
from hsmn_dist.evaluation.runner import evaluate_task
from hsmn_dist.foundation.errors import ConfigError
from tests.support.byte_models import byte_text_model
from tests.support.text_models import OracleTextModel, UniformTextModel

NUM_ROWS = 24

CHOICE_TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
    train: {train}
test_split: test
{shots}output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{gold}}}}"
target_delimiter: ""
metric_list:
  - metric: acc
  - metric: acc_norm
metadata:
  version: 1.0
"""

SHOTS = """fewshot_split: train
fewshot_config:
  sampler: first_n
"""

ANSWER_TASK = """
task: local_answers
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: generate_until
doc_to_text: "{{{{context}}}}"
doc_to_target: "{{{{target}}}}"
target_delimiter: ""
generation_kwargs:
  until: ["\\n"]
  max_gen_toks: 12
  do_sample: false
metric_list:
  - metric: exact_match
metadata:
  version: 1.0
"""

TEXT_TASK = """
task: local_text
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - metric: bits_per_byte
  - metric: byte_perplexity
metadata:
  version: 1.0
"""

WORDS = (
    "time",
    "year",
    "people",
    "way",
    "day",
    "man",
    "thing",
    "woman",
    "life",
    "child",
    "world",
    "school",
    "state",
    "family",
)


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    rows = []
    for index in range(NUM_ROWS):
        choices = [WORDS[(index * 3 + k * 5) % len(WORDS)] + "s" * (k % 2) for k in range(4)]
        meta = {"choices": choices, "gold": index % 4}
        context = f"Question: which word is number {index}?\nAnswer: "
        rows.append(Example(context, choices[index % 4], "chat", str(index), str(index), "multiple_choice", meta))
    return rows


@pytest.fixture(scope="module")
def tasks(tmp_path_factory, examples):
    folder = tmp_path_factory.mktemp("tasks")
    records = [{"context": e.context, "target": e.target, "text": e.context + e.target, **e.meta} for e in examples]
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    train = folder / "train.jsonl"
    train.write_text(json.dumps(records[0]) + "\n" + json.dumps(records[1]) + "\n")
    for name, shots in (("local_choices", ""), ("local_choices_shown", SHOTS)):
        (folder / f"{name}.yaml").write_text(CHOICE_TASK.format(name=name, data=data, train=train, shots=shots))
    for name, text in (("answers", ANSWER_TASK), ("text", TEXT_TASK)):
        (folder / f"{name}.yaml").write_text(text.format(data=data))
    return folder


@pytest.mark.parametrize("family", ["hsmn", "hope"])
def test_the_harness_and_our_runner_give_the_same_accuracy(family, tasks, examples):
    model = byte_text_model(family)
    ours = evaluate_task(model, "t", examples, EvaluationConfig(num_examples=NUM_ROWS, num_loss_examples=NUM_ROWS))
    theirs = run_harness(model, ["local_choices", "local_text"], include_path=tasks)["results"]
    assert theirs["local_choices"]["acc_norm,none"] == pytest.approx(ours.score)
    assert theirs["local_choices"]["acc,none"] == pytest.approx(ours.extra["accuracy"])
    assert 0.0 < ours.score < 1.0, "a score of 0 or 1 would agree by chance"
    whole = model.loglikelihood([("", example.context + example.target) for example in examples[:3]])
    assert math.isfinite(theirs["local_text"]["bits_per_byte,none"])
    assert all(result.num_tokens > 0 for result in whole)


def test_with_two_shots_the_harness_and_our_runner_give_the_same_accuracy(tasks, examples):
    model = byte_text_model("hope")
    settings = EvaluationConfig(num_examples=NUM_ROWS, num_loss_examples=NUM_ROWS, num_shots=2)
    shots = [replace(example, id=f"train:{example.id}") for example in examples[:2]]
    ours = evaluate_task(model, "t", examples, settings, shots=shots)
    results = run_harness(model, ["local_choices_shown"], include_path=tasks, num_shots=2)["results"]
    theirs = results["local_choices_shown"]
    assert theirs["acc_norm,none"] == pytest.approx(ours.score)
    assert theirs["acc,none"] == pytest.approx(ours.extra["accuracy"])
    without = evaluate_task(model, "t", examples, settings.model_copy(update={"num_shots": 0}))
    assert ours.nll_per_token != without.nll_per_token, "the shots were read"
    assert ours.conditions["shots"] == 2 and ours.conditions["shot_ids"] == ["train:0", "train:1"]
    assert without.conditions["shots"] == 0


def test_generation_stops_where_the_task_says_and_is_scored(tasks, examples):
    theirs = run_harness(OracleTextModel(examples), ["local_answers"], include_path=tasks)["results"]
    assert theirs["local_answers"]["exact_match,none"] == 1.0
    none = run_harness(UniformTextModel(), ["local_answers"], include_path=tasks, limit=5)["results"]
    assert none["local_answers"]["exact_match,none"] == 0.0


def test_rolling_likelihood_of_a_uniform_model_is_eight_bits_a_byte_however_it_is_cut(tasks):
    for bound in (None, 7):
        result = run_harness(UniformTextModel(), ["local_text"], include_path=tasks, max_target_tokens=bound)["results"]
        assert result["local_text"]["bits_per_byte,none"] == pytest.approx(8.0)


class Request:
    def __init__(self, *args):
        self.args = args


def test_rolling_pieces_sum_to_the_whole_for_a_model_that_sees_all_the_context():
    model = byte_text_model("hope")
    text = "The quick brown fox jumps over the lazy dog. " * 2
    whole = HarnessModel(model, max_target_tokens=1000).loglikelihood_rolling([Request(text)])[0]
    parts = HarnessModel(model, max_target_tokens=10).loglikelihood_rolling([Request(text)])[0]
    assert parts == pytest.approx(whole, rel=1e-4)


def test_generation_settings_follow_the_task():
    adapter = HarnessModel(UniformTextModel(), max_new_tokens=33, seed=4)
    settings = adapter._settings(
        {"until": ["\n", ""], "max_gen_toks": 9, "do_sample": True, "temperature": 0.5, "top_k": 3}
    )
    assert (settings.stop, settings.max_new_tokens, settings.temperature, settings.top_k) == (("\n",), 9, 0.5, 3)
    greedy = adapter._settings({"until": "stop", "temperature": 0.0})
    assert (greedy.stop, greedy.max_new_tokens, greedy.temperature, greedy.seed) == (("stop",), 33, 0.0, 4)
    assert adapter._settings({"do_sample": False, "temperature": 1.0}).temperature == 0.0


@pytest.mark.parametrize(
    "text", ["", "one", "a few words here", "nospacesatallinthislongword", "\u4f60\u597d \u4e16\u754c", "\n\n\n"]
)
@pytest.mark.parametrize("bound", [1, 2, 5, 100])
def test_pieces_join_to_the_text_and_keep_the_bound(text, bound):
    pieces = split_text(text, bound)
    assert "".join(pieces) == text
    assert all(len(piece.encode()) <= bound or len(piece) == 1 for piece in pieces)
    assert len(pieces) == 1 or all(pieces)


def test_an_unknown_task_is_refused_with_the_nearest_name(tasks):
    with pytest.raises(ConfigError) as caught:
        run_harness(UniformTextModel(), ["local_choice"], include_path=tasks)
    assert "local_choices" in caught.value.action
