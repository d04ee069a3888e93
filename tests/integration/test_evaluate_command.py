"""`hsmn-dist evaluate` as a user calls it: tiny weights, the real rows of every dataset in one command."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from hsmn_dist.data.preprocessors.all import PREPROCESSORS
from hsmn_dist.data.tokenizer import TOKENIZER_NAME, ByteTokenizer
from hsmn_dist.training.export import save_weights
from tests.support.byte_models import byte_config, byte_text_model
from tests.support.shared import shared_data

CODE_DATASETS = {"apps", "codecontests", "human_eval", "mbpp"}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    save_weights(byte_text_model("hope").model.state_dict(), byte_config("hope"), folder, {})
    ByteTokenizer().save(folder / TOKENIZER_NAME)
    return folder


def evaluate(weights, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "hsmn_dist", "evaluate", str(weights), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)


def test_every_dataset_with_rows_here_is_scored_by_one_command(weights):
    files = {}
    for name in PREPROCESSORS.names():
        folder = shared_data("gsm8k").parent / name
        found = [folder / file for file in ("rows.jsonl", "invented.jsonl") if (folder / file).is_file()]
        files |= {name: found[0]} if found else {}
    assert len(files) >= 30
    named = [part for name, file in files.items() for part in ("--dataset", f"{name}={file}")]
    result = evaluate(weights, *named, "--num-examples", "2", "--max-new-tokens", "4", "--json")
    assert result.returncode == 0, result.stderr[-2000:]
    scores = {entry["task"]: entry for entry in json.loads(result.stdout)}
    assert set(scores) == set(files)
    for name, entry in scores.items():
        if name in CODE_DATASETS:
            assert entry["status"] == "not measured" and "--run-model-code" in entry["reason"]
        else:
            assert 0.0 <= entry["score"] <= 1.0, name
        assert entry["num_loss_examples"] >= 1 and entry["nll_per_token"] > 0.5
        assert {"seed", "temperature", "max_new_tokens", "shots"} <= set(entry["conditions"])


def test_shots_come_from_rows_that_are_not_scored(weights, tmp_path):
    rows = tmp_path / "gsm8k.jsonl"
    lines = [{"question": f"What is {n} plus {n}?", "answer": f"It is {2 * n}.\n#### {2 * n}"} for n in range(6)]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    arguments = ("--dataset", f"gsm8k={rows}", "--num-examples", "3", "--max-new-tokens", "4", "--json")
    (result,) = json.loads(evaluate(weights, *arguments, "--num-shots", "2").stdout)
    assert result["conditions"]["shots"] == 2 and result["num_examples"] == 3
    assert not set(result["conditions"]["shot_ids"]) & set(result["example_ids"])


def test_a_source_for_two_datasets_is_refused(weights):
    result = evaluate(weights, "--dataset", "gsm8k", "--dataset", "sciq", "--source", "rows.jsonl")
    assert result.returncode != 0
    assert "--dataset gsm8k=a.jsonl" in result.stderr and "Traceback" not in result.stderr
