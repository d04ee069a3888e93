"""Learning, not only running: shipped configurations reach the score that they state, in the time that they state.

`pytest -m slow -s tests/integration/test_learning.py` prints the scores and times. One core each; together about 50 minutes.
"""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest

from hsmn_dist.config.load import load_run_config
from hsmn_dist.config.study import load_study
from hsmn_dist.data.builtin import GENERATORS, preprocessor_of
from hsmn_dist.data.preprocessors.base import SkipCounter
from hsmn_dist.data.shards.reader import read_examples
from hsmn_dist.data.tokenizer import load_tokenizer
from hsmn_dist.orchestration.run_folder import RunFolder
from hsmn_dist.orchestration.study import study_runs
from tests.support.whole_job import ROOT, only_run, run_command, scorecard

RUNS = ROOT / "configs" / "runs"
SPAN_TOKENS = 32
TIME_LIMIT_SECONDS = 600
MARGINS = {"study_memory_cpu": 0.3, "study_memory_cms_cpu": 0.6}
"""Study of a memory on and off -> by how much exact match is higher with it, at every seed."""


def scores(folder: RunFolder) -> dict[str, float]:
    """Task -> exact match after the last stage."""
    card = scorecard(folder)
    return dict(zip(card["tasks"], card["score_matrix"][-1], strict=True))


def test_the_contexts_are_at_least_four_chunk_spans_long() -> None:
    for family in ("hsmn", "hope"):
        config = load_run_config(RUNS / f"passkey_{family}_cpu.yaml")
        spans = {getattr(config.model, "chunk_size", None), getattr(config.model, "chunk_tokens", None)} - {None}
        assert spans == {SPAN_TOKENS}
        assert config.evaluation.temperature == 0.0 and config.cluster.ranks_per_node == 1
        (dataset,) = config.curriculum.stages[-1].datasets
        (example, *_) = preprocessor_of("passkey")(GENERATORS["passkey"](dataset), SkipCounter())
        # Words, full stops and the digits of both copies are tokens of their own; the run's own tokenizer counts in the slow test.
        assert len(re.findall(r"[a-zA-Z]+|[0-9]|[.?:]", example.context)) >= 4 * SPAN_TOKENS


@pytest.mark.slow
@pytest.mark.timeout(1600)
@pytest.mark.parametrize("family", ["hsmn", "hope"])
def test_a_small_model_recalls_a_pass_key_from_contexts_of_many_chunks(family: str, tmp_path: Path) -> None:
    start = time.monotonic()
    done = run_command("run", str(RUNS / f"passkey_{family}_cpu.yaml"), "--quiet", folder=tmp_path, timeout=1500)
    seconds = time.monotonic() - start
    assert done.status == 0, done.errors
    folder = only_run(tmp_path / "runs")
    found = scores(folder)["passkey_long"]
    print(f"{family}: {found:.3f} exact match on held-out contexts, {seconds:.0f} s from rows to scorecard")
    prepared = json.loads(folder.prepared.read_text())
    tokenizer = load_tokenizer(Path(prepared["tokenizer"]))
    held_out = list(read_examples(Path(prepared["folders"]["passkey_long"]), "test", 200))
    assert min(len(tokenizer.encode(example.context)) for example in held_out) >= 4 * SPAN_TOKENS
    assert found >= 0.95
    assert seconds < TIME_LIMIT_SECONDS


def _write_rates(model: Any) -> list[float]:
    """Takes the rates of what a study switches out of the model's settings."""
    if model["uses_cms"]:
        return [level.pop("learning_rate") for level in model["cms"]["levels"]]
    return [model["self_modifying"].pop("largest_rate")]


@pytest.mark.parametrize("name", MARGINS)
def test_the_memory_that_is_off_differs_in_its_write_rate_alone(name: str, tmp_path: Path) -> None:
    path = RUNS / f"{name}.yaml"
    runs = study_runs(path, load_study(path), tmp_path)
    on, off = (run.config.model.model_dump() for run in (runs[0], runs[-1]))
    assert len(runs) == 6
    for rate_on, rate_off in zip(_write_rates(on), _write_rates(off), strict=True):
        assert rate_off < 1e-9 < rate_on
    assert on == off


@pytest.mark.slow
@pytest.mark.timeout(4000)
@pytest.mark.parametrize("name", MARGINS)
def test_recall_needs_the_memory_that_writes_in_context(name: str, tmp_path: Path) -> None:
    path = RUNS / f"{name}.yaml"
    done = run_command("study", str(path), folder=tmp_path, timeout=3900)
    assert done.status == 0, done.errors
    study = load_study(path)
    table: dict[str, dict[int, float]] = {variant: {} for variant in study.variants}
    for place in sorted((tmp_path / "runs" / study.name).glob("*/scorecard.json")):
        folder = RunFolder(place.parent)
        variant, seed = next(
            (variant, seed)
            for variant in study.variants
            for seed in study.seeds
            if f"{study.name}-{variant}-seed{seed}" in folder.run_id
        )
        table[variant][seed] = scores(folder)["pair_recall"]
    print(json.dumps(table, indent=1))
    for seed in study.seeds:
        assert table["memory_on"][seed] >= table["memory_off"][seed] + MARGINS[name], table
        assert table["memory_off"][seed] <= 0.2, "chance is 0.1: the task can be answered without the memory"
