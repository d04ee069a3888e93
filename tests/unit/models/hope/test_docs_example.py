"""The example of docs/models_hope.md runs as it is printed."""

import re
from pathlib import Path

PAGE = Path(__file__).resolve().parents[4] / "docs" / "models_hope.md"


def test_every_python_block_of_the_page_runs(capsys):
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    assert len(blocks) >= 3
    scope: dict = {}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), scope)
    assert float(scope["losses"][-1]) < float(scope["losses"][0])
    assert scope["written"].shape == (1, 24)
    assert scope["same"] is True
