"""Saves that are killed, damaged, overtaken or cut short: the last complete checkpoint is there, and nothing half written."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch

from hsmn_dist.distributed.world import World
from hsmn_dist.foundation.errors import StageFailed
from hsmn_dist.training import shard_files
from hsmn_dist.training.checkpoint import MANIFEST, SAVE_POINTS, Checkpointer, TrainState
from hsmn_dist.training.engine import Engine
from tests.support.stages import one_rank_engine, train_a_step


def in_a_process_that_dies(work: Callable[[], None]) -> int:
    """Fork, work, and the signal or status that ended the child."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


def test_a_kill_at_any_point_of_a_save_leaves_the_last_complete_checkpoint(tmp_path: Path) -> None:
    engine = one_rank_engine(tmp_path)
    reached: set[str] = set()
    for point in SAVE_POINTS:
        folder = tmp_path / point
        train_a_step(engine, 1)
        Checkpointer(folder, World()).save(engine, TrainState(step=1))
        # The same step again, so that a complete one is replaced; then the next one.
        for step in (1, 2):
            before = engine.state_dict()
            train_a_step(engine, 2)
            after = engine.state_dict()

            def die(at: str, point: str = point) -> None:
                if at == point:
                    os.kill(os.getpid(), signal.SIGKILL)

            def save(step: int = step, folder: Path = folder, die: Callable[[str], None] = die) -> None:
                Checkpointer(folder, World(), keep_last=1, at_point=die).save(engine, TrainState(step=step))

            ended_by = in_a_process_that_dies(save)
            if ended_by == signal.SIGKILL:
                reached.add(point)
            other = one_rank_engine(tmp_path)
            state = Checkpointer(folder, World()).restore(other)
            assert state is not None, "also while the only checkpoint was being replaced by one of the same step"
            is_new = point in ("renamed", "pruned") or ended_by == 0
            assert state.step == (step if is_new else 1)
            wanted = after if is_new else before
            assert all(torch.equal(value, wanted[name]) for name, value in other.state_dict().items())
            # What the dead writer left never blocks the next save.
            Checkpointer(folder, World()).save(engine, TrainState(step=step))
            assert not list(folder.glob(".*"))
    assert reached == set(SAVE_POINTS)


class KilledAt:
    """An audit hook (PEP 578) that sees every opening, making, renaming and removing of a file, and kills at the n-th."""

    EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree", "os.scandir", "os.listdir")

    def __init__(self, folder: Path, number: int) -> None:
        self.folder, self.number, self.seen = str(folder), number, 0

    def __call__(self, event: str, arguments: tuple[object, ...]) -> None:
        # Inside a removal, names are relative to a descriptor: those count too, once a name of the folder was seen.
        if event in self.EVENTS and (self.seen or any(self.folder in str(part) for part in arguments)):
            if self.seen == self.number:
                os.kill(os.getpid(), signal.SIGKILL)
            self.seen += 1


def save_and_count(folder: Path, engine: Engine, state: TrainState, number: int, in_background: bool) -> int | None:
    """Save in a child that dies at its `number`-th dealing with a file; None when it died, else how many there were."""
    reader, writer = os.pipe()

    def work() -> None:
        hook = KilledAt(folder, number)
        sys.addaudithook(hook)
        keeper = Checkpointer(folder, World(), keep_last=1)
        if state.best_step == state.step:
            keeper.save_best(engine, state, in_background)
        keeper.save(engine, state, in_background)
        keeper.wait()
        os.write(writer, str(hook.seen).encode())

    ended_by = in_a_process_that_dies(work)
    os.close(writer)
    text = os.read(reader, 99)
    os.close(reader)
    assert ended_by in (0, signal.SIGKILL)
    return int(text) if text else None


@pytest.mark.parametrize(
    ("step", "in_background"),
    [
        pytest.param(1, True, id="the same step again, in the background"),
        pytest.param(2, False, id="the next step"),
        pytest.param(1, False, id="the same step again", marks=pytest.mark.slow),
        pytest.param(2, True, id="the next step, in the background", marks=pytest.mark.slow),
    ],
)
def test_a_kill_at_any_touch_of_a_file_leaves_the_last_complete_checkpoint(
    tmp_path: Path, step: int, in_background: bool
) -> None:
    engine, other = one_rank_engine(tmp_path), one_rank_engine(tmp_path)
    train_a_step(engine, 1)
    first, kept = tmp_path / "first", engine.state_dict()
    Checkpointer(first, World()).save_best(engine, TrainState(step=1, best_step=1))
    Checkpointer(first, World()).save(engine, TrainState(step=1, best_step=1))
    train_a_step(engine, 2)
    new = engine.state_dict()
    state = TrainState(step=step, best_step=step)
    outcomes = []
    for number in range(1000):
        folder = tmp_path / f"at_{number}"
        shutil.copytree(first, folder)
        count = save_and_count(folder, engine, state, number, in_background)
        keeper = Checkpointer(folder, World())
        found = keeper.restore(other)
        assert found is not None, f"nothing to load after a kill at file event {number}"
        weights = other.state_dict()
        is_new = all(torch.equal(weights[name], new[name]) for name in new)
        assert is_new or all(torch.equal(weights[name], kept[name]) for name in kept)
        assert found.step == (step if is_new else 1)
        assert keeper.restore_best(other, found), "the best weights that the checkpoint speaks of are there"
        outcomes.append(is_new)
        keeper.save(engine, state)  # what the dead writer left never blocks the next save
        assert not list(folder.glob(".*"))
        shutil.rmtree(folder)
        if count is not None:
            break
    assert count == len(outcomes) - 1 > 20
    assert outcomes == sorted(outcomes) and outcomes[-1], "once the new one is there it stays"
    assert not outcomes[0]


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def step_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("step_*"))


@pytest.mark.parametrize("keep_last", [1, 2])
@pytest.mark.parametrize("is_restored", [True, False])
def test_a_damaged_newest_checkpoint_never_costs_a_sound_one(tmp_path: Path, keep_last: int, is_restored: bool) -> None:
    engine, folder = one_rank_engine(tmp_path), tmp_path / "c"
    for step in (10, 20):
        Checkpointer(folder, World(), keep_last=3).save(engine, TrainState(step=step))
    damage(folder / "step_00000020" / "rank_00000.safetensors")
    keeper = Checkpointer(folder, World(), keep_last)
    if is_restored:
        assert keeper.restore(engine) == TrainState(step=10)
        assert (folder / ".damaged-step_00000020").is_dir(), "it is there to be looked at"
    keeper.save(engine, TrainState(step=15))
    if is_restored:
        assert step_names(folder) == ["step_00000010", "step_00000015"][-keep_last:]
    assert Checkpointer(folder, World()).restore(engine) == TrainState(step=15)
    for step in (20, 25):
        keeper.save(engine, TrainState(step=step))
    keeper.save(engine, TrainState(step=30))
    assert sorted(path.name for path in folder.iterdir()) == [f"step_{step:08d}" for step in (25, 30)[-keep_last:]], (
        "the damaged one goes with those of its age"
    )


def test_a_damaged_checkpoint_does_not_outlive_the_start_of_a_stage_anew(tmp_path: Path) -> None:
    engine, folder = one_rank_engine(tmp_path), tmp_path / "c"
    Checkpointer(folder, World()).save(engine, TrainState(step=20))
    damage(folder / "step_00000020" / "state.json")
    keeper = Checkpointer(folder, World(), keep_last=1)
    assert keeper.restore(engine) is None
    keeper.save(engine, TrainState(step=5))
    assert Checkpointer(folder, World(), keep_last=1).restore(engine) == TrainState(step=5)


@pytest.mark.parametrize("content", ["[", '{"best_step": "x"}', "[]"])
def test_an_unreadable_old_state_does_not_fail_the_saves_after_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, content: str
) -> None:
    engine, folder = one_rank_engine(tmp_path), tmp_path / "c"
    keeper = Checkpointer(folder, World(), keep_last=2)
    keeper.save_best(engine, TrainState(step=1, best_step=1))
    keeper.save(engine, TrainState(step=1, best_step=1))
    (folder / "step_00000001" / "state.json").write_text(content)
    keeper.save(engine, TrainState(step=2, best_step=2))
    assert "were not removed" in caplog.text
    assert (folder / "best_00000001").is_dir(), "who knows which weights the unreadable one speaks of"
    for step in (3, 4):
        keeper.save(engine, TrainState(step=step, best_step=2))
    assert step_names(folder) == ["step_00000003", "step_00000004"] and not (folder / "best_00000001").exists()


def test_a_folder_that_cannot_be_removed_does_not_fail_the_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine, keeper = one_rank_engine(tmp_path), Checkpointer(tmp_path / "c", World(), keep_last=1)
    keeper.save(engine, TrainState(step=1))
    real = shutil.rmtree

    def busy(path: Path, ignore_errors: bool = False) -> None:
        if "step_00000001" not in str(path):
            real(path, ignore_errors)
        elif not ignore_errors:
            raise OSError(errno.ENOTEMPTY, "Directory not empty")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", busy)
        keeper.save(engine, TrainState(step=2))
    assert "was not removed" in caplog.text
    keeper.save(engine, TrainState(step=3))
    assert [path.name for path in (tmp_path / "c").iterdir()] == ["step_00000003"]


class Attempts:
    """Who may commit, as `attempt.json` would say it."""

    def __init__(self) -> None:
        self.owner = "old"

    def check(self, name: str) -> Callable[[], None]:
        def may_commit() -> None:
            if self.owner != name:
                raise StageFailed(f"{name} was replaced", kind="fenced")

        return may_commit

    def keeper(self, folder: Path, name: str, at_point: Callable[[str], None] = lambda _: None) -> Checkpointer:
        return Checkpointer(folder, World(), 2, self.check(name), at_point, owner=name)


@pytest.mark.parametrize("point", SAVE_POINTS[:-1])
def test_a_fenced_attempt_that_saves_leaves_the_save_of_the_live_one_alone(tmp_path: Path, point: str) -> None:
    engine, attempts, folder = one_rank_engine(tmp_path), Attempts(), tmp_path / "c"
    old = attempts.keeper(folder, "old")
    old.save(engine, TrainState(step=1))
    attempts.owner = "new"
    refused = []

    def interfere(at: str) -> None:
        if at == point:
            for step in (1, 2):
                with pytest.raises(StageFailed, match="old was replaced"):
                    old.save(engine, TrainState(step=step, num_tokens=7))
                refused.append(step)

    new = attempts.keeper(folder, "new", interfere)
    for step in (1, 2):  # the first one replaces that of the old attempt
        new.save(engine, TrainState(step=step))
        assert Checkpointer(folder, World()).restore(engine) == TrainState(step=step)
    assert set(refused) == {1, 2}
    assert sorted(path.name for path in folder.iterdir()) == ["step_00000001", "step_00000002"]


@pytest.mark.parametrize("point", SAVE_POINTS[:5])
def test_a_save_that_is_overtaken_by_a_new_attempt_ends_refused_and_changes_nothing(tmp_path: Path, point: str) -> None:
    engine, attempts, folder = one_rank_engine(tmp_path), Attempts(), tmp_path / "c"

    def overtake(at: str) -> None:
        if at == point and attempts.owner == "old":
            attempts.owner = "new"
            attempts.keeper(folder, "new").save(engine, TrainState(step=2, num_tokens=5))

    old = attempts.keeper(folder, "old", overtake)
    with pytest.raises((StageFailed, OSError)):
        old.save(engine, TrainState(step=2))
    assert Checkpointer(folder, World()).restore(engine) == TrainState(step=2, num_tokens=5)
    attempts.keeper(folder, "new").save(engine, TrainState(step=3))
    assert sorted(path.name for path in folder.iterdir()) == ["step_00000002", "step_00000003"], "nothing is left aside"


def test_a_process_that_was_cut_off_between_its_right_and_its_clean_up_removes_nothing_of_its_successor(
    tmp_path: Path,
) -> None:
    engine, folder = one_rank_engine(tmp_path), tmp_path / "c"
    successor = Checkpointer(folder, World(), owner="new")
    has_begun = []

    def frozen_after_it_was_allowed() -> None:
        if not has_begun:
            has_begun.append(True)
            successor._names.begin("step_00000002")

    Checkpointer(folder, World(), may_commit=frozen_after_it_was_allowed, owner="old").save(engine, TrainState(step=1))
    assert successor._names.aside("step_00000002").is_dir()


def test_the_newest_damaged_checkpoint_is_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    engine, keeper = one_rank_engine(tmp_path), Checkpointer(tmp_path / "c", World(), keep_last=3)
    for step in (1, 2, 3):
        train_a_step(engine, step)
        keeper.save(engine, TrainState(step=step))
    newest = tmp_path / "c" / "step_00000003" / "rank_00000.safetensors"
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    newest.write_bytes(data)
    (tmp_path / "c" / "step_00000002" / MANIFEST).unlink()
    state = Checkpointer(tmp_path / "c", World()).restore(one_rank_engine(tmp_path))
    assert state is not None and state.step == 1
    assert "step_00000003" in caplog.text and "damaged" in caplog.text


def test_old_checkpoints_go_and_the_best_weights_stay_while_a_checkpoint_speaks_of_them(tmp_path: Path) -> None:
    engine, keeper = one_rank_engine(tmp_path), Checkpointer(tmp_path / "c", World(), keep_last=2)
    state = TrainState()
    for step in range(1, 6):
        train_a_step(engine, step)
        state.step = step
        if step in (1, 4):
            state.best_step, state.best_loss = step, 1.0 / step
            keeper.save_best(engine, state)
        keeper.save(engine, state)
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == [
        "best_00000004",
        "step_00000004",
        "step_00000005",
    ]


def test_best_weights_come_back_alone(tmp_path: Path) -> None:
    engine, keeper = one_rank_engine(tmp_path), Checkpointer(tmp_path / "c", World())
    train_a_step(engine, 1)
    keeper.save_best(engine, TrainState(best_step=1))
    best = engine.state_dict()
    train_a_step(engine, 2)
    assert keeper.restore_best(engine, TrainState(best_step=1))
    assert all(torch.equal(value, best[name]) for name, value in engine.state_dict().items())
    assert not keeper.restore_best(engine, TrainState(best_step=7))


def test_a_state_survives_json(tmp_path: Path) -> None:
    engine, keeper = one_rank_engine(tmp_path), Checkpointer(tmp_path / "c", World())
    state = TrainState(
        3, {"samples_seen": 4}, 0.1 + 0.2, 2, 1, [(0, 3.5), (2, 0.30000000000000004)], 10, 20, 1, 1, [1.5]
    )
    keeper.save(engine, state)
    torch.manual_seed(99)
    assert Checkpointer(tmp_path / "c", World()).restore(engine) == state


def test_random_generators_go_on_where_they_were(tmp_path: Path) -> None:
    engine, keeper = one_rank_engine(tmp_path), Checkpointer(tmp_path / "c", World())
    keeper.save(engine, TrainState(step=1))
    drawn = torch.rand(3)
    torch.manual_seed(99)
    keeper.restore(engine)
    assert torch.equal(torch.rand(3), drawn)


def test_an_attempt_that_was_replaced_may_not_commit(tmp_path: Path) -> None:
    engine = one_rank_engine(tmp_path)
    Checkpointer(tmp_path / "c", World()).save(engine, TrainState(step=1))

    def fenced() -> None:
        raise StageFailed("this attempt was replaced", kind="fenced")

    with pytest.raises(StageFailed, match="replaced"):
        Checkpointer(tmp_path / "c", World(), may_commit=fenced).save(engine, TrainState(step=2))
    state = Checkpointer(tmp_path / "c", World()).restore(engine)
    assert state is not None and state.step == 1


def test_the_manifest_lists_every_file_with_its_hash(tmp_path: Path) -> None:
    engine = one_rank_engine(tmp_path)
    path = Checkpointer(tmp_path / "c", World()).save(engine, TrainState(step=1))
    manifest = json.loads((path / MANIFEST).read_text())
    assert sorted(manifest["files"]) == sorted(file.name for file in path.iterdir() if file.name != MANIFEST)
    assert manifest["world_size"] == 1


def test_a_save_in_the_background_holds_the_state_of_its_moment(tmp_path: Path) -> None:
    engine, may_write = one_rank_engine(tmp_path), threading.Event()
    keeper = Checkpointer(tmp_path / "c", World(), at_point=lambda _: may_write.wait(30))
    train_a_step(engine, 1)
    wanted, state = engine.state_dict(), TrainState(step=1, recent_losses=[1.0])
    keeper.save(engine, state, in_background=True)
    train_a_step(engine, 2)
    state.step, state.recent_losses[0] = 2, 9.0
    assert Checkpointer(tmp_path / "c", World()).newest() is None, "nothing is there before it is whole"
    may_write.set()
    keeper.wait()
    other = one_rank_engine(tmp_path)
    assert Checkpointer(tmp_path / "c", World()).restore(other) == TrainState(step=1, recent_losses=[1.0])
    assert all(torch.equal(value, wanted[name]) for name, value in other.state_dict().items())


def test_a_background_save_that_failed_is_reported_by_the_next_one(tmp_path: Path) -> None:
    engine = one_rank_engine(tmp_path)

    def full(point: str) -> None:
        if point == "hashes_exchanged":
            raise OSError(28, "No space left on device")

    keeper = Checkpointer(tmp_path / "c", World(), at_point=full)
    keeper.save(engine, TrainState(step=1), in_background=True)
    with pytest.raises(OSError, match="No space left"):
        keeper.save(engine, TrainState(step=2), in_background=True)


def test_a_full_disk_is_an_operating_system_error_and_leaves_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, keeper = one_rank_engine(tmp_path), Checkpointer(tmp_path / "c", World())
    keeper.save(engine, TrainState(step=1))

    def full(*_: object, **__: object) -> None:
        raise safetensors.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr(shard_files, "save_file", full)
        with pytest.raises(OSError) as caught:
            keeper.save(engine, TrainState(step=2))
    assert caught.value.errno == 28
    keeper.save(engine, TrainState(step=3))
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["step_00000001", "step_00000003"]


def test_a_file_that_cannot_be_written_to_its_end_is_an_operating_system_error(tmp_path: Path) -> None:
    engine = one_rank_engine(tmp_path)
    report = tmp_path / "report"

    def save_with_little_room() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        try:
            (tmp_path / "saved").mkdir()
            tensors, header = engine.snapshot()
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
            shard_files.write_snapshot(tmp_path / "saved", 0, tensors, header)
        except OSError as error:
            report.write_text(f"{error.errno}")

    in_a_process_that_dies(save_with_little_room)
    assert int(report.read_text()) == errno.EFBIG
