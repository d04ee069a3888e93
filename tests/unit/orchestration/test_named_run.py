from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

from hsmn_dist.config.load import load_run_config
from hsmn_dist.config.run import RunConfig
from hsmn_dist.foundation.errors import ConfigError, Preempted, StageFailed
from hsmn_dist.orchestration.curriculum import Run
from hsmn_dist.orchestration.journal import append_event
from hsmn_dist.orchestration.lease import Watcher, held_lease, read_holder, release, renew, try_acquire
from hsmn_dist.orchestration.named_run import NamedRun, ensure_run

DEMO = Path(__file__).resolve().parents[3] / "configs" / "runs" / "hsmn_debug_demo_cpu.yaml"


def demo(root: Path, *changes: str) -> RunConfig:
    return load_run_config(DEMO, [f"run_root={root}", *changes])


def finish(run: Run) -> None:
    append_event(run.folder.journal, "run_completed", attempt=run.attempt)


def silent(_: str) -> None:
    return None


def test_a_lease_has_one_holder_and_can_be_given_back(tmp_path: Path) -> None:
    path = tmp_path / "names" / "a.lease"
    holder = try_acquire(path)
    assert holder is not None and read_holder(path) == holder
    assert try_acquire(path) is None
    assert renew(path, holder)
    release(path, holder)
    assert try_acquire(path) is not None
    assert not renew(path, holder)


def test_of_many_takers_one_gets_the_lease(tmp_path: Path) -> None:
    path = tmp_path / "a.lease"
    got: list[object] = []
    barrier = threading.Barrier(8)

    def take() -> None:
        barrier.wait()
        got.append(try_acquire(path))

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(holder is not None for holder in got) == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.lease"]


def test_a_silent_lease_becomes_stale_and_one_watcher_clears_it(tmp_path: Path) -> None:
    path = tmp_path / "a.lease"
    assert try_acquire(path) is not None
    watchers = [Watcher(path, 0.2) for _ in range(4)]
    assert not any(watcher.is_stale() for watcher in watchers)
    time.sleep(0.3)
    assert all(watcher.is_stale() for watcher in watchers)
    assert sum(watcher.clear() for watcher in watchers) == 1
    assert not path.exists()


def test_a_renewed_lease_is_never_stale_even_when_the_clocks_differ(tmp_path: Path) -> None:
    path = tmp_path / "a.lease"
    holder = try_acquire(path)
    assert holder is not None
    os.utime(path, (1.0, 1.0))  # as written by a machine whose clock is decades behind
    watcher = Watcher(path, 0.4)
    with held_lease(path, holder, renew_seconds=0.1) as is_ours:
        for _ in range(12):
            assert not watcher.is_stale()
            time.sleep(0.05)
        assert is_ours()
    assert not path.exists()


def test_a_process_that_lost_its_lease_learns_it(tmp_path: Path) -> None:
    path = tmp_path / "a.lease"
    holder = try_acquire(path)
    assert holder is not None
    with held_lease(path, holder, renew_seconds=0.05) as is_ours:
        path.unlink()
        other = try_acquire(path)
        time.sleep(0.3)
        assert not is_ours()
    assert read_holder(path) == other  # the loser did not take the new owner's lease away


def test_the_same_command_twice_trains_once(tmp_path: Path) -> None:
    named, config = NamedRun(tmp_path, "demo"), demo(tmp_path)
    driven: list[str] = []

    def drive(run: Run) -> None:
        driven.append(run.folder.run_id)
        finish(run)

    first = ensure_run(named, config, drive, silent)
    second = ensure_run(named, config, drive, silent)
    assert first.run_id == second.run_id
    assert driven == [first.run_id]
    assert named.status() == "complete"


def test_a_preempted_run_is_resumed_under_the_same_id(tmp_path: Path) -> None:
    named, config = NamedRun(tmp_path, "demo"), demo(tmp_path)

    def leave(run: Run) -> None:
        append_event(run.folder.journal, "run_preempted", attempt=run.attempt)
        raise Preempted("asked to leave", allowed="again", action="again")

    with pytest.raises(Preempted):
        ensure_run(named, config, leave, silent)
    assert not named.lease.exists()
    before = named.folder()
    said: list[str] = []
    after = ensure_run(named, config, finish, said.append)
    assert before is not None and before.run_id == after.run_id
    assert any("resuming" in line for line in said)


def test_two_at_once_train_once_and_both_end_well(tmp_path: Path) -> None:
    named, config = NamedRun(tmp_path, "demo"), demo(tmp_path)
    running = threading.Semaphore(1)
    driven: list[str] = []
    results: list[str] = []

    def drive(run: Run) -> None:
        assert running.acquire(blocking=False), "two drivers at once"
        time.sleep(0.5)
        driven.append(run.folder.run_id)
        finish(run)
        running.release()

    def ensure() -> None:
        results.append(ensure_run(named, config, drive, silent, stale_seconds=5.0).run_id)

    threads = [threading.Thread(target=ensure) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert len(driven) == 1
    assert results == driven * 3


def test_a_follower_takes_over_when_the_driver_falls_silent(tmp_path: Path) -> None:
    named, config = NamedRun(tmp_path, "demo"), demo(tmp_path)
    assert try_acquire(named.lease) is not None  # a driver that died without a word
    said: list[str] = []
    ensure_run(named, config, finish, said.append, stale_seconds=0.5)
    assert named.status() == "complete"
    assert any("taking over" in line for line in said)


def test_a_follower_learns_that_the_run_failed(tmp_path: Path) -> None:
    named, config = NamedRun(tmp_path, "demo"), demo(tmp_path)

    def fail(run: Run) -> None:
        append_event(run.folder.journal, "run_failed", attempt=run.attempt, found="x", action="y")
        time.sleep(1.0)
        raise StageFailed("a rank failed")

    errors: list[BaseException] = []

    def ensure() -> None:
        try:
            ensure_run(named, config, fail, silent, stale_seconds=10.0)
        except StageFailed as error:
            errors.append(error)

    thread = threading.Thread(target=ensure)
    thread.start()
    while not named.lease.exists():
        time.sleep(0.01)
    time.sleep(0.1)
    with pytest.raises(StageFailed, match="failed while it was followed"):
        ensure_run(named, config, lambda run: pytest.fail("it must follow"), silent, stale_seconds=10.0)
    thread.join()
    assert len(errors) == 1


def test_a_name_with_other_settings_is_refused(tmp_path: Path) -> None:
    named = NamedRun(tmp_path, "demo")
    ensure_run(named, demo(tmp_path), finish, silent)
    with pytest.raises(ConfigError, match="other settings"):
        ensure_run(named, demo(tmp_path, "seed=7"), finish, silent)
