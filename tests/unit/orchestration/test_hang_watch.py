"""Who is called hung: not a rank that is gone, not one that waits for the others, and never because the storage stumbles."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from hsmn_dist.config.load import load_run_config
from hsmn_dist.distributed.world import World
from hsmn_dist.foundation.errors import Preempted
from hsmn_dist.orchestration import hang_watch as watch_module
from hsmn_dist.orchestration import stage_evaluation
from hsmn_dist.orchestration.hang_watch import hang_watch
from hsmn_dist.orchestration.heartbeat import JOINING, Beat, Heart, of_newest_group, read_beats, silent_rank
from hsmn_dist.orchestration.run_folder import RunFolder
from hsmn_dist.orchestration.stage_evaluation import Watchers, evaluate_tasks

DEMO = Path(__file__).resolve().parents[3] / "configs" / "runs" / "hsmn_debug_demo_cpu.yaml"
NOW = 1_000_000.0


def beat(rank: int, **changes: Any) -> Beat:
    values = {
        "rank": rank,
        "host": "elsewhere",
        "stage": "math",
        "stage_index": 0,
        "phase": "train",
        "step": 7,
        "num_steps": 9,
        "loss": None,
        "tokens_per_second": None,
        "time": NOW,
        "alive": NOW,
        "pid": 1,
        "begun": NOW - 1000,
        "attempt": "a",
        "group": 1,
        "world_size": 2,
    }
    return Beat(**{**values, **changes})


def verdict(beats: list[Beat]) -> int | None:
    found = silent_rank(of_newest_group(beats, "a"), 60, NOW)
    return None if found is None else found.rank


LOST = {"time": NOW - 500, "alive": NOW - 500}


def test_a_rank_that_a_smaller_group_left_behind_is_not_called_hung() -> None:
    lost = beat(1, **LOST)
    smaller = beat(0, group=2, world_size=1, begun=NOW - 100)
    assert verdict([smaller, lost]) is None
    joining = beat(0, group=JOINING, world_size=1, begun=NOW - 100)
    assert verdict([joining, lost]) is None, "before the smaller group has its number"
    never_met = beat(1, group=JOINING, begun=NOW - 500, **LOST)
    assert verdict([smaller, never_met]) is None, "a rank of a larger group that never met"


def test_a_rank_of_the_present_group_that_is_lost_or_never_comes_is_called_hung() -> None:
    assert verdict([beat(0), beat(1, **LOST)]) == 1
    joins = beat(0, group=JOINING, time=NOW - 100, begun=NOW - 100)
    assert verdict([joins, beat(1, **LOST)]) == 0, "it waits for a rank that never came"


def test_beats_of_another_attempt_do_not_count() -> None:
    assert verdict([beat(0), beat(1, attempt="older", **LOST)]) is None


def test_a_rank_that_waits_is_not_blamed_while_another_works() -> None:
    waiting = beat(0, time=NOW - 500, waits=True)
    assert verdict([waiting, beat(1)]) is None
    assert verdict([waiting, beat(1, time=NOW - 100)]) == 1, "the one it waits for stands still"
    assert verdict([beat(0, waits=True, **LOST), beat(1)]) == 0, "one that does not even breathe is not waiting"
    both = [waiting, beat(1, step=6, time=NOW - 400, waits=True)]
    assert verdict(both) == 1, "all wait: the one furthest behind"


def test_a_heart_says_group_and_waiting_until_its_next_beat(tmp_path: Path) -> None:
    heart = Heart(tmp_path, 1, world_size=2, attempt="a")
    heart.beat(phase="join")
    assert read_beats(tmp_path)[0].group == JOINING
    heart.meet(3)
    heart.wait()
    (waiting,) = read_beats(tmp_path)
    assert (waiting.group, waiting.world_size, waiting.attempt, waiting.waits) == (3, 2, "a", True)
    heart.beat(step=1)
    assert not read_beats(tmp_path)[0].waits


def test_a_storage_that_stumbles_does_not_end_the_watch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[int] = []

    def read(folder: Path) -> list[Beat]:
        looks.append(1)
        if len(looks) < 3:
            raise OSError("stale file handle")
        return [beat(0, world_size=1)]  # of long ago

    monkeypatch.setattr(watch_module, "WATCH_SECONDS", 0.01)
    monkeypatch.setattr(watch_module, "read_beats", read)
    ended = threading.Event()
    with hang_watch(RunFolder(tmp_path), "a", 60, ended.set) as hung:
        assert ended.wait(10)
    assert hung[0].rank == 0


class Task:
    """Stands for a task that takes long: many forward passes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, forwards: int) -> None:
        self.model = torch.nn.Sequential(torch.nn.Embedding(4, 2))
        self.model.max_target_tokens = None  # type: ignore[assignment]
        self.forwards = forwards
        monkeypatch.setattr(stage_evaluation, "LOOK_SECONDS", 0.0)
        monkeypatch.setattr(stage_evaluation, "load_tokenizer", lambda path: None)
        monkeypatch.setattr(stage_evaluation, "test_examples", lambda *_: [])
        monkeypatch.setattr(stage_evaluation, "training_shots", lambda *_: [])
        monkeypatch.setattr(stage_evaluation, "evaluate_task", self.evaluate)

    def evaluate(self, *_: Any, **__: Any) -> Any:
        for _ in range(self.forwards):
            self.model(torch.zeros(1, dtype=torch.int64))
        return type("Result", (), {"to_json": lambda self: {"score": 1}})()

    def run(self, watchers: Watchers) -> dict[str, Any]:
        config = load_run_config(DEMO, [])
        folders = {dataset.key: "x" for stage in config.curriculum.stages for dataset in stage.datasets}
        return evaluate_tasks(self.model, config, {"tokenizer": "t", "folders": folders}, World(), watchers)  # type: ignore[arg-type]


def test_an_evaluation_gives_signs_of_life_from_within_a_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    signs: list[str] = []
    watchers = Watchers(
        lambda done, total: signs.append("task"), lambda: signs.append("alive"), lambda: signs.append("waits")
    )
    task = Task(monkeypatch, tmp_path, 5)
    assert len(task.run(watchers)) == 3
    assert signs == [*["alive"] * 5, "task"] * 3 + ["waits"]
    task.model(torch.zeros(1, dtype=torch.int64))
    assert signs[-1] == "waits", "the model is left as it was"


def test_a_rank_asked_to_leave_in_an_evaluation_tells_the_others_before_it_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    met: list[Any] = []

    def asked() -> None:
        raise Preempted("asked", allowed="", action="")

    def gather(value: Any) -> list[Any]:
        met.append(value)
        return [({}, None), value]

    monkeypatch.setattr(stage_evaluation, "all_gather_objects", gather)
    with pytest.raises(Preempted):
        Task(monkeypatch, tmp_path, 1).run(Watchers(lambda *_: None, asked, lambda: None))
    assert len(met) == 1
