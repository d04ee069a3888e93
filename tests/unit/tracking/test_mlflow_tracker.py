"""The uploader against a server that loses requests and answers at random: every point once, in every order of trouble."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from types import SimpleNamespace

import pytest

pytest.importorskip("mlflow")

from hsmn_dist.tracking.jsonl_tracker import JsonlTracker
from hsmn_dist.tracking.mlflow_tracker import FolderUploader, MlflowPlace, MlflowWriter, flat_params

PLACE = MlflowPlace("http://nowhere", "e", "", "r1", {"family": "hsmn"})


class FlakyServer:
    """Stores what a client sends; a request or its answer is lost with the given probability."""

    def __init__(self, seed: int, loss: float) -> None:
        self.draw, self.loss = random.Random(seed), loss
        self.runs: dict[str, dict] = {}
        self.points: list[tuple[str, str, int, float]] = []
        self.applied: list[str] = []
        self.ids = itertools.count()

    def call(self, effect):
        fate = self.draw.random()
        if fate < self.loss / 2:
            raise ConnectionError("the request was lost")
        result = effect()
        if fate < self.loss:
            raise ConnectionError("the answer was lost")
        return result

    def search_runs(self, experiments, filter_string, order_by=None):
        found = [
            SimpleNamespace(info=SimpleNamespace(run_id=key), data=SimpleNamespace(tags=tags))
            for key, tags in self.runs.items()
            if all(f"'{tags[name]}'" in filter_string for name in ("hsmn_dist.run_id", "hsmn_dist.stage"))
        ]
        return self.call(lambda: found)

    def create_run(self, experiment, tags, run_name):
        def make():
            key = f"run{next(self.ids)}"
            self.runs[key] = dict(tags)
            return SimpleNamespace(info=SimpleNamespace(run_id=key))

        return self.call(make)

    def get_run(self, run):
        return self.call(lambda: SimpleNamespace(data=SimpleNamespace(tags=dict(self.runs[run]))))

    def get_metric_history(self, run, name):
        return self.call(lambda: [SimpleNamespace(step=p[2]) for p in self.points if p[:2] == (run, name)])

    def log_batch(self, run, metrics=(), params=(), tags=()):
        def store():
            self.points.extend((run, point.key, point.step, point.value) for point in metrics)
            self.applied.extend(f"param {param.key}" for param in params)
            self.applied.extend(f"tag {tag.key}" for tag in tags)

        return self.call(store)

    def set_tag(self, run, key, value):
        return self.call(lambda: self.runs[run].__setitem__(key, value))

    def update_run(self, run, status):
        return self.call(lambda: self.applied.append(f"status {status}"))

    def set_terminated(self, run, status):
        return self.call(lambda: self.applied.append(f"status {status}"))


@pytest.fixture
def connected(monkeypatch):
    """Writers that talk to a given server."""

    def use(server):
        def connect(self):
            self._client, self._experiment_id = server, "1"

        monkeypatch.setattr(MlflowWriter, "connect", connect)
        return MlflowWriter(PLACE)

    return use


def upload_until_done(writer, uploader, limit=2000) -> int:
    for attempt in range(limit):
        try:
            uploader.upload()
            return attempt
        except ConnectionError:
            writer.forget()
    raise AssertionError("never done")


@pytest.mark.parametrize("seed", range(12))
def test_every_point_arrives_once_whatever_is_lost(connected, tmp_path, seed):
    server = FlakyServer(seed, loss=0.4)
    writer = connected(server)
    tracker = JsonlTracker(tmp_path, "00_a")
    tracker.log_params({"seed": 1})
    uploader = FolderUploader(writer, tmp_path)
    expected = []
    for step in range(30):
        tracker.log_metrics({"train/loss_nats": float(step), "train/learning_rate": 0.1}, step)
        expected += [("train/loss_nats", step), ("train/learning_rate", step)]
        if step % 7 == 0:
            try:
                uploader.upload()
            except ConnectionError:
                writer.forget()
    tracker.finish("finished")
    upload_until_done(writer, uploader)
    assert Counter(point[1:3] for point in server.points) == Counter(expected)
    assert len(server.runs) <= 2 + 0, "the stage's run and its parent, each made once"
    assert server.applied[-1] == "status FINISHED"
    # A later sync from the beginning, by another process, sends nothing.
    again = FolderUploader(connected(server), tmp_path)
    server.loss = 0.0
    again.upload()
    assert again.sent == 0
    assert Counter(point[1:3] for point in server.points) == Counter(expected)


@pytest.mark.parametrize("seen", range(12))
@pytest.mark.parametrize("back_to", [0, 3, 6])
def test_points_of_steps_that_are_taken_again_arrive_once(connected, tmp_path, seen, back_to):
    server = FlakyServer(seen, loss=0.2)
    writer = connected(server)
    tracker, uploader = JsonlTracker(tmp_path, "00_a"), FolderUploader(writer, tmp_path)
    for step in range(12):
        if step == 8:
            tracker.rewind(back_to)
            for again in range(back_to, 8):
                tracker.log_metrics({"train/loss_nats": 100.0 + again, "train/learning_rate": 0.1}, again)
        tracker.log_metrics({"train/loss_nats": float(step), "train/learning_rate": 0.1}, step)
        if step == seen:
            upload_until_done(writer, uploader)
    tracker.finish()
    upload_until_done(writer, uploader)
    losses = {step: value for _, name, step, value in server.points if name == "train/loss_nats"}
    assert Counter(point[1:3] for point in server.points) == Counter(
        (name, step) for name in ("train/loss_nats", "train/learning_rate") for step in range(12)
    )
    for step in range(back_to, 8):  # what was sent before stays there, what was not is the later value
        assert losses[step] == (step if step <= seen < 8 else 100.0 + step)


def test_a_finish_is_applied_after_the_metrics_before_it(connected, tmp_path):
    server = FlakyServer(0, loss=0.0)
    tracker = JsonlTracker(tmp_path, "00_a")
    order: list[str] = []
    original = server.log_batch
    server.log_batch = lambda *args, **kwargs: (order.append("points"), original(*args, **kwargs))[1]
    server.set_terminated = lambda run, status: order.append(status)
    tracker.log_metrics({"x": 1.0}, 0)
    tracker.finish("failed")
    FolderUploader(connected(server), tmp_path).upload()
    assert order == ["points", "FAILED"]


def test_more_points_than_a_batch_holds_arrive_in_order(connected, tmp_path):
    server = FlakyServer(0, loss=0.0)
    tracker = JsonlTracker(tmp_path, "00_a")
    for step in range(1300):
        tracker.log_metrics({"a": float(step), "b": 0.0}, step)
    FolderUploader(connected(server), tmp_path).upload()
    assert [point[2] for point in server.points if point[1] == "a"] == list(range(1300))


def test_an_upload_that_was_given_up_sends_nothing_more(connected, tmp_path):
    server = FlakyServer(0, loss=0.0)
    JsonlTracker(tmp_path, "00_a").log_metrics({"a": 1.0}, 0)
    uploader = FolderUploader(connected(server), tmp_path, is_cancelled=lambda: True)
    with pytest.raises(ConnectionAbortedError):
        uploader.upload()
    assert (server.points, server.applied) == ([], [])


def test_a_line_that_is_being_written_is_taken_up_when_it_is_whole(connected, tmp_path):
    server = FlakyServer(0, loss=0.0)
    JsonlTracker(tmp_path, "00_a").log_metrics({"a": 1.0}, 0)
    uploader = FolderUploader(connected(server), tmp_path)
    path = tmp_path / "metrics.jsonl"
    with path.open("a") as stream:
        stream.write('{"id":1,"time":1.0,"stage":"00_a","step":1,')
        stream.flush()
        uploader.upload()
        assert len(server.points) == 1
        stream.write('"values":{"a":2.0}}\n')
    uploader.upload()
    assert [point[2:] for point in server.points] == [(0, 1.0), (1, 2.0)]


def test_a_damaged_line_is_passed_over_and_the_rest_arrives(connected, tmp_path):
    server = FlakyServer(0, loss=0.0)
    tracker = JsonlTracker(tmp_path, "00_a")
    tracker.log_metrics({"a": 1.0}, 0)
    for name in ("metrics.jsonl", "events.jsonl"):
        with (tmp_path / name).open("a") as stream:
            stream.write("damaged\n")
    tracker.log_metrics({"a": 2.0}, 1)
    tracker.finish("preempted")
    FolderUploader(connected(server), tmp_path).upload()
    assert [point[2] for point in server.points] == [0, 1]
    assert server.applied[-1] == "status KILLED"


def test_settings_become_dotted_names():
    assert flat_params({"model": {"d_model": 8, "sizes": [1, 2]}, "name": "x", "flag": True}) == [
        ("model.d_model", "8"),
        ("model.sizes", "[1, 2]"),
        ("name", "x"),
        ("flag", "true"),
    ]
