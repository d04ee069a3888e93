"""The example of docs/models_hsmn.md runs as printed and does what the page says."""

from __future__ import annotations

import re
from pathlib import Path

import torch

PAGE = Path(__file__).resolve().parents[2] / "docs" / "models_hsmn.md"


def test_the_example_learns_recall_and_streams_its_context():
    codes = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    names: dict = {}
    for code in codes:
        exec(compile(code, str(PAGE), "exec"), names)
    assert len(codes) == 2 and len(names["table"]) == 7 and all(names["table"].values())
    assert names["share_right"] >= 0.95
    test, model = names["test"], names["model"]
    with torch.no_grad():
        expected, _ = model.start(test.context_ids[:1], test.context_mask[:1])
    torch.testing.assert_close(names["logits"], expected, rtol=1e-4, atol=1e-4)
