"""A study runs every variant with every seed, goes on where it was cut off, and writes one report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from hsmn_dist.config.study import load_study
from hsmn_dist.foundation.errors import ConfigError
from hsmn_dist.orchestration.study import study_runs
from tests.support.whole_job import ROOT, run_command

SHIPPED = ROOT / "configs" / "runs" / "study_forgetting_cpu.yaml"
TINY = {
    "name": "tiny",
    "base": str(ROOT / "configs" / "studies" / "forgetting_base.yaml"),
    "overrides": [
        "training.max_steps=2",
        "training.validate_every_steps=2",
        "training.num_validation_examples=4",
        "continual.fisher.num_fisher_examples=8",
        "evaluation.num_loss_examples=2",
        *(f"curriculum.stages.{stage}.datasets.0.num_examples=60" for stage in range(4)),
    ],
    "seeds": [0],
    "reference": "none",
    "variants": {
        "none": ["continual.method=none"],
        "ewc": ["continual.method=ewc"],
        "l2": ["continual.method=l2", "continual.strength=1.0"],
        "replay": ["continual.method=replay"],
        "ewc+replay": [
            "continual.method=ewc+replay",
            "continual.application=proximal",
            "continual.component_strength.encoder=2.0",
            "curriculum.stages.1.strength=10.0",
        ],
        "joint": ["continual.method=joint"],
    },
}


def test_every_shipped_study_run_passes_validation(tmp_path: Path) -> None:
    study = load_study(SHIPPED)
    runs = study_runs(SHIPPED, study, tmp_path)
    assert len(runs) == 9 * 3
    assert {run.config.continual.fisher.estimator for run in runs} >= {"empirical", "sampled", "logit_reversal"}
    assert {run.config.continual.method for run in runs} == {"none", "l2", "replay", "ewc", "ewc+replay", "joint"}
    assert len({run.config.name for run in runs}) == len(runs)


def test_a_reference_that_is_no_variant_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump({**TINY, "reference": "nothing"}))
    with pytest.raises(ConfigError, match="is not a variant"):
        load_study(path)


def test_a_study_goes_on_where_it_was_cut_off_and_reports_every_method(tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(TINY, sort_keys=False))
    first = run_command("study", str(path), "--only", "none", folder=tmp_path)
    assert first.status == 0, first.errors
    second = run_command("study", str(path), folder=tmp_path)
    assert second.status == 0, second.errors
    assert len(list((tmp_path / "runs" / "tiny").glob("*/scorecard.json"))) == len(TINY["variants"]), (
        "the finished run was run again"
    )
    report = json.loads((tmp_path / "runs" / "tiny" / "study.json").read_text())
    assert [line["variant"] for line in report["variants"]] == list(TINY["variants"])
    by_name = {line["variant"]: line for line in report["variants"]}
    assert by_name["joint"]["forgetting"] is None
    # Every method did something of its own to the later stages.
    assert len({line["end_loss"][0] for line in report["variants"]}) == len(TINY["variants"])
    assert all(len(line["end_loss"]) == 1 for line in report["variants"])
    assert "the reference" in second.output
    assert (tmp_path / "runs" / "tiny" / "study.png").stat().st_size > 0
