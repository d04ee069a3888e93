"""The trackers that need nothing, and the metric names."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest

from hsmn_dist.foundation.errors import StageFailed
from hsmn_dist.tracking import metric_names
from hsmn_dist.tracking.tracker import CompositeTracker, FencedTracker, InMemoryTracker, NullTracker, Tracker


class BrokenTracker(NullTracker):
    def log_metrics(self, values, step):
        raise OSError("the disk is full")


def use_everything(tracker: Tracker) -> None:
    tracker.log_params({"d_model": 64})
    tracker.log_metrics({"train/loss_nats": 2.0, "train/learning_rate": 1e-3}, step=0)
    tracker.log_metrics({"train/loss_nats": 1.0}, step=1)
    tracker.log_artifact(Path("config.yaml"), "config")
    tracker.log_figure(Path("loss.png"))
    tracker.log_dataset("gsm8k", "ab12", "openai/gsm8k")
    tracker.set_tags({"family": "hsmn"})
    tracker.finish("failed")
    tracker.finish()


def test_in_memory_tracker_keeps_everything_in_order():
    tracker = InMemoryTracker()
    use_everything(tracker)
    assert tracker.params == {"d_model": 64}
    assert tracker.series("train/loss_nats") == [(0, 2.0), (1, 1.0)]
    assert tracker.artifacts == [(Path("config.yaml"), "config")]
    assert tracker.figures == [Path("loss.png")]
    assert tracker.datasets == [("gsm8k", "ab12", "openai/gsm8k", "training")]
    assert tracker.tags == {"family": "hsmn"}
    assert tracker.status == "failed", "the first finish decides"


def test_going_back_reaches_every_tracker_behind_a_fence():
    first, last = InMemoryTracker(), InMemoryTracker()
    tracker = FencedTracker(CompositeTracker([first, NullTracker(), last]), lambda: None)
    for step in range(4):
        tracker.log_metrics({"train/loss_nats": float(step)}, step)
    tracker.rewind(2)
    assert first.series("train/loss_nats") == last.series("train/loss_nats") == [(0, 0.0), (1, 1.0)]


def test_null_tracker_takes_every_call():
    use_everything(NullTracker())


def test_composite_passes_everything_on_and_survives_a_broken_tracker(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("hsmn_dist"), "propagate", True)
    first, last = InMemoryTracker(), InMemoryTracker()
    with caplog.at_level(logging.WARNING, logger="hsmn_dist"):
        use_everything(CompositeTracker([first, BrokenTracker(), last]))
    assert first == last
    assert last.series("train/loss_nats") == [(0, 2.0), (1, 1.0)]
    warnings = [record for record in caplog.records if "BrokenTracker.log_metrics" in record.message]
    assert len(warnings) == 1, "said once, not once a step"
    assert "the disk is full" in warnings[0].message


def test_metric_names_follow_the_form_room_slash_quantity_and_are_unique():
    names = metric_names.all_names()
    assert len(names) > 40
    assert len(set(names.values())) == len(names)
    for name in names.values():
        assert re.fullmatch(r"[a-z]+/[a-z][a-z0-9_]*", name), name


@pytest.mark.parametrize("name", [metric_names.gradient_norm_of("memory_tree"), metric_names.task_loss("mmlu")])
def test_composed_names_begin_with_their_prefix(name):
    assert name.startswith((metric_names.GRADIENT_NORM_PREFIX, metric_names.TASK_PREFIX))
    assert metric_names.task_score("mmlu", "accuracy") == "task/mmlu/accuracy"


def test_a_process_that_was_replaced_adds_nothing() -> None:
    is_replaced = False

    def check() -> None:
        if is_replaced:
            raise StageFailed("attempt a was replaced", kind="fenced")

    inner = InMemoryTracker()
    tracker: Tracker = FencedTracker(CompositeTracker([inner]), check)
    tracker.log_metrics({"train/loss_nats": 2.0}, step=0)
    is_replaced = True
    for call in (
        lambda: tracker.log_metrics({"train/loss_nats": 1.0}, step=1),
        lambda: tracker.log_params({"a": 1}),
        lambda: tracker.set_tags({"a": "b"}),
        lambda: tracker.log_figure(Path("a.png")),
        lambda: tracker.log_artifact(Path("a.txt")),
        lambda: tracker.log_dataset("a", "b", "c"),
    ):
        with pytest.raises(StageFailed, match="was replaced"):
            call()
    tracker.finish("failed")
    assert inner.points == [("train/loss_nats", 0, 2.0)]
    assert inner.status is None and not inner.params and not inner.tags


def test_a_fenced_tracker_passes_everything_on_while_it_may() -> None:
    fenced, plain = InMemoryTracker(), InMemoryTracker()
    use_everything(FencedTracker(fenced, lambda: None))
    use_everything(plain)
    assert fenced == plain
