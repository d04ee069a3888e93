"""Continual work on a pretrained model: its Fisher by command, then a run that starts from its weights and keeps what it knows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from hsmn_dist.tracking.jsonl_tracker import read_series
from tests.support.whole_job import one_stage, only_run, run_command

PLAIN = ("training.engine=local", "cluster.launcher=inline", "cluster.ranks_per_node=1", "continual.method=none")


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stage folder of a run on word problems."""
    folder = tmp_path_factory.mktemp("pretrained")
    done = run_command("run", str(one_stage(folder, *PLAIN)), "--quiet", folder=folder)
    assert done.status == 0, done.errors
    (stage,) = (only_run(folder / "runs").path / "stages").iterdir()
    return stage


def continued(folder: Path, pretrained: Path, *assignments: str) -> Path:
    """A configuration of one stage, list sorting, with the pretrained model's tokenizer and weights."""
    data = yaml.safe_load(one_stage(folder, *PLAIN[:3], "continual.method=ewc").read_text())
    data["curriculum"]["stages"] = [
        {"name": "list_sorting", "datasets": [{"name": "list_sorting", "num_examples": 80}]}
    ]
    data["tokenizer"] = {"kind": "file", "path": str(pretrained / "weights" / "tokenizer.json")}
    data["continual"]["start"] = {"weights": str(pretrained / "weights")}
    for assignment in assignments:
        key, value = assignment.split("=", 1)
        data["continual"]["start"][key] = value
    path = folder / "continued.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


def test_a_run_goes_on_from_weights_and_keeps_what_their_fisher_says(pretrained: Path, tmp_path: Path) -> None:
    run = pretrained.parents[1]
    prepared = Path(json.loads((run / "prepared.json").read_text())["folders"]["word_problems"])
    store = tmp_path / "fisher"
    words = ["--data", str(prepared), "--num-examples", "16", "--out"]
    done = run_command(
        "fisher", str(pretrained / "weights"), *words, str(store), "--estimator", "empirical", folder=tmp_path
    )
    assert done.status == 0, done.errors
    facts = json.loads(done.output)
    assert facts["task"]["num_examples"] == 16 and facts["fisher_sum"] > 0

    path = continued(tmp_path, pretrained, f"fisher={store}")
    done = run_command("run", str(path), "--quiet", folder=tmp_path)
    assert done.status == 0, done.errors
    (stage,) = (only_run(tmp_path / "runs").path / "stages").iterdir()
    series = read_series(stage / "metrics.jsonl")
    penalties = [value for _, value in series["train/penalty_nats"]]
    assert penalties[0] == 0.0  # the first step starts at the anchor
    assert penalties[-1] > 0.0
    manifest = json.loads((stage / "ewc" / "manifest.json").read_text())
    assert [task["stage"] for task in manifest["tasks"]] == ["pretrained", "list_sorting"]

    fresh = one_stage(tmp_path, *PLAIN)  # the same seed without weights to start from
    done = run_command("run", str(fresh), "--quiet", "--set", "training.max_steps=1", folder=tmp_path)
    assert done.status == 0, done.errors
    (other,) = (only_run(tmp_path / "runs").path / "stages").iterdir()
    first = read_series(other / "metrics.jsonl")["train/loss_nats"][0][1]
    assert series["train/loss_nats"][0][1] < first - 0.1  # it had learned something of text


def test_a_store_that_was_never_finished_is_refused(pretrained: Path, tmp_path: Path) -> None:
    path = continued(tmp_path, pretrained, f"fisher={tmp_path / 'nothing'}")
    done = run_command("run", str(path), "--quiet", folder=tmp_path)
    assert done.status == 2 and "nothing: no manifest.json" in done.errors and "Traceback" not in done.errors
