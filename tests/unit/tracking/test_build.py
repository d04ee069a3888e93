"""build_tracker and sync_run, as far as they go without a server."""

from __future__ import annotations

import socket
import subprocess
import sys
import time

import pytest

from hsmn_dist.config.tracking import TrackingConfig
from hsmn_dist.foundation.errors import ConfigError
from hsmn_dist.foundation.files import read_json
from hsmn_dist.tracking.build import TrackedRun, artifact_root, build_tracker, default_uri, sync_run
from hsmn_dist.tracking.jsonl_tracker import JsonlTracker, read_series
from hsmn_dist.tracking.tracker import NullTracker


def test_only_rank_0_tracks(tmp_path):
    run = TrackedRun(tmp_path, tmp_path / "r1", "r1")
    assert type(build_tracker(TrackingConfig(), run, rank=1)) is NullTracker
    assert not (tmp_path / "r1").exists()


def test_backend_none_writes_the_files_alone(tmp_path):
    run = TrackedRun(tmp_path, tmp_path / "r1", "r1", stage="00_math", first_step=2)
    tracker = build_tracker(TrackingConfig(backend="none"), run)
    assert [type(part) for part in tracker.trackers] == [JsonlTracker]
    tracker.log_metrics({"train/loss_nats": 1.0}, step=2)
    tracker.finish()
    assert read_series(tmp_path / "r1" / "stages" / "00_math" / "metrics.jsonl") == {"train/loss_nats": [(2, 1.0)]}


def test_training_goes_on_when_the_server_cannot_be_reached(tmp_path):
    run = TrackedRun(tmp_path, tmp_path / "r1", "r1", tags={"family": "hsmn"})
    config = TrackingConfig(uri="http://127.0.0.1:9", flush_seconds=0.05, finish_timeout_seconds=0.3)
    tracker = build_tracker(config, run)
    for step in range(20):
        tracker.log_metrics({"run/tokens_count": float(step)}, step)
    tracker.finish("finished")
    assert len(read_series(tmp_path / "r1" / "metrics.jsonl")["run/tokens_count"]) == 20
    record = read_json(tmp_path / "r1" / "tracking.json")
    assert record == {
        "run_id": "r1",
        "uri": "http://127.0.0.1:9",
        "experiment": "hsmn_dist",
        "tags": {"family": "hsmn"},
    }


def test_a_server_that_accepts_and_never_answers_costs_the_time_out_of_finish_alone(tmp_path):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        run = TrackedRun(tmp_path, tmp_path / "r1", "r1")
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        tracker = build_tracker(TrackingConfig(uri=uri, flush_seconds=0.05, finish_timeout_seconds=0.5), run)
        began = time.perf_counter()
        for step in range(200):
            tracker.log_metrics({"run/tokens_count": float(step)}, step)
        logged = time.perf_counter()
        tracker.finish("finished")
        assert time.perf_counter() - logged < 5.0
    # 200 lines take milliseconds; the bound leaves room for a busy machine and none for one network time-out of 3 s.
    assert logged - began < 2.5
    assert len(read_series(tmp_path / "r1" / "metrics.jsonl")["run/tokens_count"]) == 200


def test_default_places_are_in_the_run_root(tmp_path):
    assert default_uri(tmp_path) == f"sqlite:///{tmp_path}/mlflow.db"
    assert artifact_root(tmp_path, default_uri(tmp_path)) == f"file://{tmp_path}/mlartifacts"
    assert artifact_root(tmp_path, "http://localhost:5000") == ""


def test_sync_refuses_a_folder_that_is_no_run(tmp_path):
    with pytest.raises(ConfigError, match=r"no metrics\.jsonl"):
        sync_run(tmp_path)


def test_sync_says_what_to_do_when_the_server_is_away(tmp_path):
    JsonlTracker(tmp_path / "r1").log_metrics({"x": 1.0}, 0)
    with pytest.raises(ConfigError) as caught:
        sync_run(tmp_path / "r1", "http://127.0.0.1:9")
    assert "nothing is lost" in caught.value.action


def test_building_a_tracker_module_imports_neither_mlflow_nor_torch():
    code = (
        "import sys, hsmn_dist.tracking.build, hsmn_dist.tracking.mlflow_tracker; "
        "print([name for name in ('mlflow', 'torch') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
