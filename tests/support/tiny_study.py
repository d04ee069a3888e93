"""A study of two runs that take seconds: what tests of arrays share."""

from __future__ import annotations

from pathlib import Path

import yaml

from tests.support.whole_job import ROOT

OVERRIDES = [
    "training.max_steps=2",
    "training.validate_every_steps=2",
    "training.num_validation_examples=4",
    "continual.fisher.num_fisher_examples=8",
    "evaluation.num_loss_examples=2",
    "curriculum.stages=[{name: sums, datasets: [{name: word_problems, num_examples: 60}]},"
    " {name: keys, datasets: [{name: passkey, num_examples: 60, passkey_tokens: 32}]}]",
]


def write_tiny_study(folder: Path) -> Path:
    """Its file: two variants, one seed, one rank in the driver's own process."""
    data = {
        "name": "tiny",
        "base": str(ROOT / "configs" / "studies" / "forgetting_base.yaml"),
        "overrides": OVERRIDES,
        "seeds": [0],
        "reference": "none",
        "variants": {"none": ["continual.method=none"], "ewc": ["continual.method=ewc"]},
    }
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(data, sort_keys=False), encoding="utf-8")
    return path
