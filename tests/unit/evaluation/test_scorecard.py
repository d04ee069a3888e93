"""The scorecard: numbers by hand, "not measured" everywhere it belongs, pages that stand alone."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from hsmn_dist.evaluation.figures import gradient_figure, loss_figure, matrix_figure
from hsmn_dist.evaluation.scorecard import Scorecard, StageLine, build_scorecard
from hsmn_dist.evaluation.scorecard_files import read_scorecard, write_scorecard
from hsmn_dist.evaluation.scorecard_html import scorecard_html
from hsmn_dist.evaluation.scorecard_markdown import scorecard_markdown
from hsmn_dist.evaluation.scorecard_text import transfer_rows
from hsmn_dist.evaluation.task_result import TaskResult
from hsmn_dist.foundation.errors import DataError
from tests.support.scorecards import BASELINE, LOSSES, SCORES, TASKS, result, rows, sample_scorecard


def test_matrices_and_transfer_numbers_are_those_worked_out_by_hand():
    card = sample_scorecard(bootstrap_samples=0)
    assert card.tasks == list(TASKS)
    assert card.score_matrix == SCORES
    assert card.loss_matrix == LOSSES
    scores, losses = card.transfer_scores, card.transfer_losses
    assert scores["average_accuracy"] == pytest.approx((0.25 + 0.5 + 1.0) / 3)
    assert scores["backward_transfer"] == pytest.approx(((0.25 - 0.5) + (0.5 - 0.75)) / 2)
    assert scores["forward_transfer"] == pytest.approx(((0.0 - 0.0) + (0.25 - 0.25)) / 2)
    assert scores["forgetting"] == pytest.approx(((0.5 - 0.25) + (0.75 - 0.5)) / 2)
    assert losses["backward_transfer"] == pytest.approx((-(2.0 - 1.0) - (2.5 - 2.0)) / 2), "a higher loss is backward"
    assert losses["forward_transfer"] == pytest.approx(((5.5 - 4.0) + (5.5 - 3.0)) / 2)
    assert card.average_of_all_tasks == pytest.approx(1.75 / 3)
    assert card.cost == {
        "target_tokens": 150_000,
        "wall_hours": pytest.approx(0.05),
        "device_hours": pytest.approx(0.1),
        "device": "cpu",
        "world_size": 2,
    }


def test_losses_are_shown_as_losses_and_differences_as_gains():
    shown = {name: by_loss for name, _, by_loss in transfer_rows(sample_scorecard(bootstrap_samples=0))}
    assert shown["Average over the tasks learned (ACC)"] == "1.667"
    assert shown["Backward transfer (BWT)"] == "-0.750"
    assert shown["Forward transfer (FWT)"] == "+2.000"


def test_transfer_has_intervals_only_where_all_stages_scored_the_same_examples():
    card = sample_scorecard()
    low, high = card.transfer_scores["intervals"]["average_accuracy"]
    assert low <= card.transfer_scores["average_accuracy"] <= high
    other = rows()
    other[1]["passkey"] = result("passkey", 0.5, 3.0, num_examples=8)
    assert sample_scorecard(results=other).transfer_scores["intervals"] == {}


def with_losses(rows_of_results, num_examples: int = 6):
    """The same results with the loss of each example: the last one, of one token, makes up for what the others differ."""
    changed = []
    for row in rows_of_results:
        changed.append({})
        for task, one in row.items():
            tokens = [3] * (num_examples - 1) + [1]
            values = [one.nll_per_token + 0.1 * index for index in range(num_examples - 1)]
            last = one.nll_per_token * sum(tokens) - sum(3 * value for value in values)
            ids = [f"{task}-{index}" for index in range(num_examples)]
            changed[-1][task] = replace(one, loss_ids=ids, loss_values=[*values, last], loss_tokens=tokens)
    return changed


def test_losses_have_intervals_too_where_every_example_has_its_loss():
    baseline = with_losses(rows([BASELINE[0]], [BASELINE[1]]))[0]
    card = sample_scorecard(results=with_losses(rows()), baseline=baseline)
    plain = sample_scorecard(bootstrap_samples=0)
    for name, value in plain.transfer_losses.items():
        if isinstance(value, float):
            assert card.transfer_losses[name] == pytest.approx(value)
            low, high = card.transfer_losses["intervals"][name]
            assert low - 1e-9 <= value <= high + 1e-9
    low, high = card.transfer_losses["intervals"]["average_accuracy"]
    assert low < high
    assert plain.transfer_losses["intervals"] == {}
    other = with_losses(rows())
    other[1] = with_losses(rows(), num_examples=5)[1]
    assert sample_scorecard(results=other, baseline=baseline).transfer_losses["intervals"] == {}
    assert "loss_values" not in card.results[0][0]


def test_not_measured_is_never_a_zero():
    scores = [list(row) for row in SCORES]
    for row in scores:
        row[1] = None
    card = sample_scorecard(results=rows(scores), baseline=None)
    assert [row[1] for row in card.score_matrix] == [None, None, None]
    assert card.average_of_all_tasks == pytest.approx((0.25 + 1.0) / 2), "the mean is over what was measured"
    text = scorecard_markdown(card)
    line = next(line for line in text.splitlines() if line.startswith("| stdlib_code | exact_match"))
    assert "not measured: model-written code is not run" in line
    assert "| 0.0 |" not in line
    assert "not measured" in scorecard_html(card)
    assert card.transfer_scores["forward_transfer"] is None, "no baseline was measured"
    assert card.contamination["passkey"] == {"status": "not measured"}


def test_a_task_that_was_never_evaluated_after_a_stage_is_not_measured_there():
    incomplete = rows()
    del incomplete[0]["passkey"]
    card = sample_scorecard(results=incomplete)
    assert card.results[0][2] is None
    assert card.score_matrix[0][2] is None
    assert card.final("passkey")["score"] == 1.0
    scorecard_html(card), scorecard_markdown(card)


def test_one_joint_stage_has_an_average_over_all_tasks():
    card = sample_scorecard(results=rows()[-1:], stages=[StageLine("joint")], baseline=None)
    assert card.average_of_all_tasks == pytest.approx(1.75 / 3)
    scorecard_html(card)


def test_json_is_versioned_and_comes_back_equal(tmp_path):
    card = sample_scorecard()
    paths = write_scorecard(card, tmp_path)
    assert set(paths) == {"json", "md", "html", "png"}
    value = json.loads(paths["json"].read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert value["schema_version"] == 1
    assert read_scorecard(tmp_path).to_json() == json.loads(json.dumps(card.to_json()))
    assert "example_scores" not in value["results"][0][0], "they stay in results.json"
    assert paths["png"].read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    value["schema_version"] = 99
    with pytest.raises(DataError, match="schema version 99"):
        Scorecard.from_json(value)
    with pytest.raises(DataError, match="no scorecard"):
        read_scorecard(tmp_path / "nowhere")


def test_only_references_of_the_tasks_datasets_are_shown_with_source_date_and_status():
    card = sample_scorecard()
    assert [row["benchmark"] for row in card.references] == ["gsm8k"]
    for page in (scorecard_markdown(card), scorecard_html(card)):
        assert "unverified; https://example.org; 2024-01-01" in page
        assert "5 shots" in page
        assert "57.1" in page
        assert page.index("this run") < page.index("A model"), "our own score stands first"


def test_scorecards_without_results_or_with_a_row_too_many_are_refused():
    with pytest.raises(DataError, match="0 rows"):
        sample_scorecard(results=[])
    with pytest.raises(DataError, match="1 rows"):
        sample_scorecard(results=rows()[:1])


class PageReader(HTMLParser):
    VOID = ("meta", "br", "rect", "line", "circle")

    def __init__(self):
        super().__init__()
        self.open, self.links, self.tags = [], [], set()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.links += [value for name, value in attrs if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        self.tags.add(tag)


def test_the_html_page_stands_alone_is_well_formed_and_escapes_what_it_shows():
    page = scorecard_html(sample_scorecard())
    reader = PageReader()
    reader.feed(page)
    assert reader.open == []
    assert reader.links == []
    assert "script" not in reader.tags
    assert "svg" in reader.tags
    assert "<b>&" not in page
    assert "20260101-demo &lt;b&gt;&amp;" in page
    for heading in ("Forgetting", "Transfer", "Cost", "How to get these numbers again", "Software"):
        assert f"<h2>{heading}</h2>" in page
    assert len(re.findall(r'class="number own"', page)) == 6, "each task's own stage is framed in both heat maps"


def test_a_task_result_refuses_a_score_without_its_status():
    with pytest.raises(ValueError, match="status"):
        TaskResult("t", "k", "m", "not measured", 0.0, None, None, 0, 0, {})
    with pytest.raises(ValueError, match="not in"):
        TaskResult("t", "k", "m", "measured", 1.5, None, None, 1, 0, {})
    value = result("t", 0.25, float("nan"))
    assert value.to_json()["nll_per_token"] is None
    assert TaskResult.from_json(json.loads(json.dumps(result("t", 0.5, 1.0).to_json()))) == result("t", 0.5, 1.0)


def test_figures_draw_every_case(tmp_path):
    scores = [[None, None, None], *SCORES[1:]]
    card = sample_scorecard(results=rows(scores), baseline=None)
    paths = [matrix_figure(card, tmp_path / "matrix.png")]
    series = {
        "train/loss_nats": [(step, 3.0 / (step + 1)) for step in range(20)] + [(20, float("nan"))],
        "validation/loss_nats": [(0, 3.0), (10, 1.0)],
        "train/gradient_norm": [(0, 1.0), (1, 0.0), (2, 0.5)],
        "train/gradient_norm/memory_tree": [(0, 0.1), (2, 0.2)],
    }
    paths.append(loss_figure({"a": series, "b": series, "empty": {}}, tmp_path / "loss.png"))
    paths.append(gradient_figure(series, tmp_path / "gradient.png"))
    paths.append(gradient_figure({}, tmp_path / "none.png"))
    for path in paths:
        assert path.read_bytes()[:4] == b"\x89PNG"


def test_building_needs_no_bootstrap_and_no_matplotlib(tmp_path):
    import subprocess
    import sys

    code = "import sys, hsmn_dist.evaluation.scorecard_html; print('matplotlib' in sys.modules, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_build_scorecard_takes_plain_results():
    card = build_scorecard({}, [StageLine("a")], [{"a": result("a", 1.0, None)}])
    assert card.loss_matrix == [[None]]
    assert card.transfer_losses["average_accuracy"] is None
