"""metrics.jsonl: each point once, whatever kills and resumes the run."""

from __future__ import annotations

import json
import logging
import math
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hsmn_dist.foundation.errors import DataError
from hsmn_dist.tracking.jsonl_tracker import JsonlTracker, parse_metric_line, read_metric_lines, read_series
from hsmn_dist.tracking.tracker import CompositeTracker


def points_of(path, stage):
    return [(stage, name, line.step) for line in read_metric_lines(path) if line.stage == stage for name in line.values]


def test_a_line_holds_id_time_stage_step_and_values(tmp_path):
    tracker = JsonlTracker(tmp_path, "00_math", clock=lambda: 1700000000.1239)
    tracker.log_metrics({"train/loss_nats": 1.5, "train/learning_rate": 1e-4}, step=3)
    tracker.finish()
    record = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert record == {
        "id": 0,
        "time": 1700000000.124,
        "stage": "00_math",
        "step": 3,
        "values": {"train/loss_nats": 1.5, "train/learning_rate": 1e-4},
    }


def test_values_that_json_cannot_hold_come_back_as_they_were(tmp_path):
    tracker = JsonlTracker(tmp_path, "s")
    tracker.log_metrics({"a": math.nan, "b": math.inf, "c": -math.inf, "d": 0.1}, step=0)

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    values = next(iter(read_metric_lines(tmp_path / "metrics.jsonl"))).values
    assert math.isnan(values["a"])
    assert (values["b"], values["c"], values["d"]) == (math.inf, -math.inf, 0.1)


def test_resume_cuts_the_points_that_its_checkpoint_does_not_hold(tmp_path):
    tracker = JsonlTracker(tmp_path, "00_a")
    for step in range(10):
        tracker.log_metrics({"train/loss_nats": float(step)}, step)
    # No finish: the process was killed.
    resumed = JsonlTracker(tmp_path, "00_a", first_step=6)
    for step in range(6, 12):
        resumed.log_metrics({"train/loss_nats": 100.0 + step}, step)
    series = read_series(tmp_path / "metrics.jsonl")["train/loss_nats"]
    assert series == [(s, float(s)) for s in range(6)] + [(s, 100.0 + s) for s in range(6, 12)]
    ids = [line.id for line in read_metric_lines(tmp_path / "metrics.jsonl")]
    assert len(set(ids)) == len(ids)
    assert ids == sorted(ids)
    assert min(ids[6:]) == 10, "ids of cut lines are not used again"


def test_resume_leaves_other_stages_of_the_file_alone(tmp_path):
    first = JsonlTracker(tmp_path, "00_a")
    first.log_metrics({"x": 1.0}, 5)
    first.finish()
    JsonlTracker(tmp_path, "01_b", first_step=0).log_metrics({"x": 2.0}, 0)
    assert read_series(tmp_path / "metrics.jsonl", "00_a") == {"x": [(5, 1.0)]}
    assert read_series(tmp_path / "metrics.jsonl", "01_b") == {"x": [(0, 2.0)]}
    assert read_series(tmp_path / "metrics.jsonl") == {"x": [(5, 1.0), (0, 2.0)]}


def test_a_point_that_exists_is_not_written_again(tmp_path):
    tracker = JsonlTracker(tmp_path, "s")
    tracker.log_metrics({"x": 1.0}, 4)
    tracker.log_metrics({"x": 2.0, "y": 3.0}, 4)
    tracker.log_metrics({"x": 2.0}, 3)
    assert read_series(tmp_path / "metrics.jsonl") == {"x": [(4, 1.0)], "y": [(4, 3.0)]}


def test_going_back_cuts_the_points_since_and_the_later_ones_take_their_place(tmp_path):
    other = JsonlTracker(tmp_path, "01_b")
    tracker = JsonlTracker(tmp_path, "00_a", None)
    other.log_metrics({"train/loss_nats": 0.5}, 9)
    for step in range(5):
        tracker.log_metrics({"train/loss_nats": float(step)}, step)
    tracker.rewind(3)
    assert points_of(tmp_path / "metrics.jsonl", "00_a") == [("00_a", "train/loss_nats", step) for step in range(3)]
    for step in (3, 4, 5):
        tracker.log_metrics({"train/loss_nats": 10.0 + step}, step)
    tracker.finish()
    tracker.rewind(0)
    lines = list(read_metric_lines(tmp_path / "metrics.jsonl"))
    assert [(line.step, line.values["train/loss_nats"]) for line in lines if line.stage == "00_a"] == [
        (0, 0.0),
        (1, 1.0),
        (2, 2.0),
        (3, 13.0),
        (4, 14.0),
        (5, 15.0),
    ]
    assert [line.step for line in lines if line.stage == "01_b"] == [9]
    own = [line.id for line in lines if line.stage == "00_a"]
    assert own == sorted(set(own)) and own[3] > 4, "no id is used twice, those of the lost points neither"


def test_first_step_none_keeps_the_file_and_still_refuses_repeats(tmp_path):
    JsonlTracker(tmp_path, "").log_metrics({"transfer/forgetting": 0.1}, 1)
    again = JsonlTracker(tmp_path, "", first_step=None)
    again.log_metrics({"transfer/forgetting": 0.9}, 1)
    again.log_metrics({"transfer/forgetting": 0.2}, 2)
    assert read_series(tmp_path / "metrics.jsonl") == {"transfer/forgetting": [(1, 0.1), (2, 0.2)]}


def test_a_line_cut_off_by_a_kill_is_ignored_and_removed_on_resume(tmp_path):
    tracker = JsonlTracker(tmp_path, "s")
    tracker.log_metrics({"x": 1.0}, 0)
    for name in ("metrics.jsonl", "events.jsonl"):
        with (tmp_path / name).open("a") as stream:
            stream.write('{"id": 1, "ti')
    assert read_series(tmp_path / "metrics.jsonl") == {"x": [(0, 1.0)]}
    resumed = JsonlTracker(tmp_path, "s", first_step=1)
    resumed.log_metrics({"x": 2.0}, 1)
    resumed.finish()
    assert read_series(tmp_path / "metrics.jsonl") == {"x": [(0, 1.0), (1, 2.0)]}
    kinds = [json.loads(text)["kind"] for text in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert kinds == ["start", "start", "finish"]


def test_a_damaged_line_is_passed_over_and_named_with_file_and_number(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("hsmn_dist"), "propagate", True)
    path = tmp_path / "metrics.jsonl"
    line = '{"id":0,"time":1,"stage":"s","step":%d,"values":{"x":1.0}}\n'
    path.write_text(line % 0 + "nonsense\n" + line % 1)
    with caplog.at_level(logging.WARNING, logger="hsmn_dist"):
        assert read_series(path) == {"x": [(0, 1.0), (1, 1.0)]}
    assert "metrics.jsonl, line 2" in caplog.text
    with pytest.raises(DataError, match=r"metrics\.jsonl, line 2"):
        parse_metric_line(b"nonsense\n", path, 2)
    resumed = JsonlTracker(tmp_path, "s", first_step=1)
    resumed.log_metrics({"x": 5.0}, 1)
    assert read_series(path) == {"x": [(0, 1.0), (1, 5.0)]}


def test_a_disk_that_was_full_tears_one_line_and_not_the_next(tmp_path, monkeypatch):
    tracker = CompositeTracker([JsonlTracker(tmp_path, "s")])
    tracker.log_metrics({"x": 0.0}, 0)
    real_write = os.write

    def short_write(descriptor, data):
        return real_write(descriptor, data[:10])

    def no_write(descriptor, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", short_write)
    tracker.log_metrics({"x": 1.0}, 1)
    monkeypatch.setattr(os, "write", no_write)
    tracker.log_metrics({"x": 2.0}, 2)
    monkeypatch.setattr(os, "write", real_write)
    tracker.log_metrics({"x": 3.0}, 3)
    tracker.log_metrics({"x": 4.0}, 4)
    tracker.finish()
    assert read_series(tmp_path / "metrics.jsonl") == {"x": [(0, 0.0), (3, 3.0), (4, 4.0)]}


def test_events_record_params_tags_artifacts_datasets_and_the_status(tmp_path):
    tracker = JsonlTracker(tmp_path, "00_a", clock=lambda: 1.0)
    tracker.log_params({"model": {"d_model": 8}})
    tracker.set_tags({"family": "hope"})
    tracker.log_artifact(tmp_path / "config.yaml", "config")
    tracker.log_figure(tmp_path / "loss.png")
    tracker.log_dataset("gsm8k", "d" * 64, "openai/gsm8k")
    tracker.finish("preempted")
    tracker.finish("finished")
    tracker.log_params({"late": 1})
    events = [json.loads(text) for text in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [event["kind"] for event in events] == [
        "start",
        "params",
        "tags",
        "artifact",
        "artifact",
        "dataset",
        "finish",
    ]
    assert all(event["stage"] == "00_a" and event["time"] == 1.0 for event in events)
    assert events[1]["values"] == {"model": {"d_model": 8}}
    assert events[4]["folder"] == "figures"
    assert events[6]["status"] == "preempted"


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 12), st.integers(1, 5)), min_size=1, max_size=6), st.integers(1, 3))
def test_any_sequence_of_kills_and_resumes_leaves_each_point_once(tmp_path_factory, attempts, period):
    folder = tmp_path_factory.mktemp("run")
    done = 0
    for resume_from, count in attempts:
        start = min(resume_from, done)
        tracker = JsonlTracker(folder, "s", first_step=start)
        for step in range(start, start + count):
            tracker.log_metrics({"train/loss_nats": float(step)}, step)
            if step % period == 0:
                tracker.log_metrics({"validation/loss_nats": float(step)}, step)
        done = start + count
    points = points_of(folder / "metrics.jsonl", "s")
    assert len(points) == len(set(points))
    expected = {("s", "train/loss_nats", step) for step in range(done)}
    expected |= {("s", "validation/loss_nats", step) for step in range(0, done, period)}
    assert set(points) == expected
