"""Runs side by side: numbers with the right signs, "not measured", refusals, and the three files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hsmn_dist.continual.transfer import transfer_metrics
from hsmn_dist.evaluation.compare import compare_scorecards, write_comparison
from hsmn_dist.evaluation.figures import matrix_bounds
from hsmn_dist.evaluation.scorecard import Scorecard, StageLine
from hsmn_dist.foundation.errors import DataError


def card(method: str, losses: list[list[float | None]], tasks=("first", "second")) -> Scorecard:
    scores = [[None for _ in row] for row in losses]
    metrics = transfer_metrics([[None if v is None else -v for v in row] for row in losses]).to_json()
    return Scorecard(
        run={"run_id": f"run-{method}", "method": method, "estimator": "empirical", "strength": 10.0},
        tasks=list(tasks),
        stages=[StageLine(name) for name in tasks[: len(losses)]],
        baseline=[None] * len(tasks),
        results=[[None] * len(tasks) for _ in losses],
        score_matrix=scores,
        loss_matrix=losses,
        baseline_scores=[None] * len(tasks),
        baseline_losses=[None] * len(tasks),
        average_of_all_tasks=None,
        transfer_scores=None,
        transfer_losses={**metrics, "intervals": {"average_accuracy": (-3.0, -2.0)}},
    )


NONE, EWC = card("none", [[1.0, 5.0], [4.0, 2.0]]), card("ewc", [[1.0, 5.0], [2.0, 2.5]])


def test_losses_come_back_positive_and_forgetting_keeps_its_sign() -> None:
    rows = compare_scorecards([NONE, EWC], ["none", "ewc"])
    assert [row["losses"]["average_accuracy"] for row in rows] == [3.0, 2.25]
    assert [row["losses"]["learning_accuracy"] for row in rows] == [1.5, 1.75]
    assert [row["losses"]["forgetting"] for row in rows] == [3.0, 1.0]
    assert rows[0]["losses"]["intervals"]["average_accuracy"] == [2.0, 3.0]
    assert rows[0]["scores"] is None and rows[1]["method"] == "ewc"


def test_three_files_are_written_and_what_is_missing_says_so(tmp_path: Path) -> None:
    markdown = write_comparison([NONE, EWC], ["plain", "with ewc"], tmp_path / "out")
    assert "| with ewc | not measured |" in markdown
    assert "3.000 [2.000, 3.000]" in markdown
    assert (tmp_path / "out" / "comparison.md").read_text() == markdown
    assert json.loads((tmp_path / "out" / "comparison.json").read_text())["tasks"] == ["first", "second"]
    assert (tmp_path / "out" / "comparison.png").read_bytes().startswith(b"\x89PNG")


def test_heat_maps_side_by_side_share_one_scale_of_colours() -> None:
    assert matrix_bounds([NONE, EWC], is_loss=True) == (1.0, 5.0)
    assert matrix_bounds([EWC], is_loss=True)[1] == 5.0
    assert matrix_bounds([card("x", [[None, None]])], True) == (
        0.0,
        1.0,
    )


def test_runs_that_cannot_be_compared_are_refused() -> None:
    with pytest.raises(DataError, match="1 runs"):
        compare_scorecards([NONE], ["none"])
    with pytest.raises(DataError, match="other") as caught:
        compare_scorecards([NONE, card("none", [[1.0, 1.0]], ("first", "other"))], ["a", "b"])
    assert caught.value.action
