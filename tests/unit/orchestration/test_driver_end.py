"""How a driver ends: replaced by another one, told to go at any place, or by an error that nobody planned for."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from hsmn_dist.config.load import load_run_config
from hsmn_dist.foundation.errors import Preempted, StageFailed
from hsmn_dist.orchestration import attempt as attempt_module
from hsmn_dist.orchestration.attempt import claim, new_attempt
from hsmn_dist.orchestration.curriculum import Run, create_run, reopen_run, run_curriculum
from hsmn_dist.orchestration.failures import FailureKind, FailureRecord, write_failure
from hsmn_dist.orchestration.journal import read_events, run_status
from hsmn_dist.orchestration.launcher import LocalLauncher, clear_failures, raise_for_records
from hsmn_dist.orchestration.report import open_parent_tracker
from hsmn_dist.orchestration.run_folder import RunFolder
from hsmn_dist.orchestration.stage import StageSpec, stage_specs

DEMO = Path(__file__).resolve().parents[3] / "configs" / "runs" / "hsmn_debug_demo_cpu.yaml"


class ScriptedLauncher:
    """Runs `act` in place of ranks; every stage is complete where it returns."""

    def __init__(self, act: Callable[[], None] = lambda: None) -> None:
        self.act = act
        self.stopped = threading.Event()

    def launch(self, specs: Sequence[StageSpec]) -> None:
        self.act()
        for spec in specs:
            place = spec.folder.stage(spec.index, spec.name).complete
            place.parent.mkdir(parents=True, exist_ok=True)
            place.touch()

    def stop(self) -> None:
        self.stopped.set()


def nothing(_: Run) -> None:
    return


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return create_run(load_run_config(DEMO, [f"run_root={tmp_path}", "cluster.grace_seconds=20"]))


def names(run: Run) -> list[str]:
    return [event["event"] for event in read_events(run.folder.journal)]


def signal_self(number: signal.Signals = signal.SIGTERM) -> None:
    os.kill(os.getpid(), number)
    time.sleep(5)  # a signal that interrupts nothing lets this pass


def succeed(run: Run) -> None:
    reopen_run(RunFolder(run.folder.path))


@pytest.mark.parametrize("place", ["prepare", "ranks", "lost ranks", "retry", "finish"])
def test_a_driver_that_was_replaced_writes_nothing_more(run: Run, place: str) -> None:
    def act() -> None:
        if place in ("ranks", "lost ranks", "retry"):
            succeed(run)
        if place == "lost ranks":
            raise StageFailed("a rank died", kind="worker_lost")
        if place == "retry":
            raise StageFailed("no memory", kind="out_of_memory")

    def finish(_: Run) -> None:
        assert place == "finish", "a scorecard is the business of the attempt that owns the run"
        succeed(run)

    with pytest.raises(StageFailed, match="was replaced by attempt"):
        run_curriculum(run, ScriptedLauncher(act), lambda _: succeed(run) if place == "prepare" else None, finish)
    assert names(run) == ["run_started", "run_resumed"]
    assert run_status(read_events(run.folder.journal)) == "running"
    assert not run.folder.adjustments.exists()


def test_records_and_numbers_of_the_newer_attempt_are_left_alone(run: Run) -> None:
    tracker = open_parent_tracker(run.config, run.folder)
    newer = reopen_run(RunFolder(run.folder.path))
    write_failure(run.folder.failure(0), FailureRecord(FailureKind.UNKNOWN, 0, "h", "m", "", newer.attempt))
    with pytest.raises(StageFailed, match="was replaced"):
        clear_failures(run.folder, run.attempt)
    assert run.folder.failure(0).is_file()
    with pytest.raises(StageFailed, match="was replaced"):
        tracker.log_metrics({"transfer/forgetting": 1.0}, 0)
    tracker.finish("failed")


def test_a_group_that_was_stopped_while_it_claimed_does_not_take_the_run_back(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, is_looking, may_write = attempt_module.write_json, threading.Event(), threading.Event()

    def slow_write(path: Path, value: dict[str, object]) -> None:
        if value["group"] == 1:
            is_looking.set()
            may_write.wait(10)
        write(path, value)

    monkeypatch.setattr(attempt_module, "write_json", slow_write)
    old = threading.Thread(target=lambda: claim(run.folder, run.attempt))
    old.start()
    assert is_looking.wait(10)
    newer: list[str] = []
    taker = threading.Thread(target=lambda: newer.append(new_attempt(run.folder)))
    taker.start()
    time.sleep(0.2)
    may_write.set()
    old.join(10)
    taker.join(10)
    assert attempt_module.present_attempt(run.folder) == newer[0]
    claim(run.folder, newer[0]).check()


def test_many_groups_that_claim_at_once_get_a_number_each(run: Run) -> None:
    groups: list[int] = []
    threads = [threading.Thread(target=lambda: groups.append(claim(run.folder, run.attempt).group)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert sorted(groups) == list(range(1, 9))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
@pytest.mark.parametrize("place", ["prepare", "finish"])
def test_a_signal_without_ranks_ends_as_preempted_at_once(run: Run, place: str, number: signal.Signals) -> None:
    def swallows(_: Run) -> None:
        try:
            signal_self(number)
        except Exception:  # as a tracker does whose server is away
            pytest.fail("the wish to stop was taken for an error")

    steps = {"prepare": (swallows, nothing), "finish": (nothing, swallows)}[place]
    before, started = signal.getsignal(number), time.monotonic()
    with pytest.raises(Preempted):
        run_curriculum(run, ScriptedLauncher(), *steps)
    assert time.monotonic() - started < 4
    assert names(run)[-1] == "run_preempted"
    assert signal.getsignal(number) is before
    assert not run.folder.stop_request.exists(), "left behind, it would end the next ranks at once"


def test_a_signal_just_before_the_ranks_start_is_not_lost(run: Run) -> None:
    with pytest.raises(Preempted):
        run_curriculum(run, ScriptedLauncher(), lambda run: run.folder.stop_request.touch(), nothing)
    assert names(run) == ["run_started", "run_preempted"]


def test_a_stop_request_of_an_earlier_driver_does_not_stop_this_one(run: Run) -> None:
    run.folder.stop_request.touch()
    run_curriculum(run, ScriptedLauncher(), nothing, nothing)
    assert names(run)[-1] == "run_completed"


def test_a_replaced_driver_that_is_told_to_go_does_not_stop_its_successor(run: Run) -> None:
    launcher = ScriptedLauncher()

    def act() -> None:
        succeed(run)
        os.kill(os.getpid(), signal.SIGTERM)
        assert launcher.stopped.wait(5), "its own ranks are ended"
        raise StageFailed("a rank died", kind="worker_lost")

    launcher.act = act
    with pytest.raises(StageFailed, match="was replaced"):
        run_curriculum(run, launcher, nothing, nothing)
    assert not run.folder.stop_request.exists()


@pytest.mark.parametrize("kind", ["worker_lost", "hung", "out_of_memory"])
def test_ranks_that_are_lost_after_a_stop_request_are_preempted_and_no_retry_is_spent(run: Run, kind: str) -> None:
    def act() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        raise StageFailed("killed when the grace time was over", kind=kind)

    with pytest.raises(Preempted):
        run_curriculum(run, ScriptedLauncher(act), nothing, nothing)
    assert names(run) == ["run_started", "run_preempted"]


def test_an_overrun_is_worded_by_what_is_on_the_disk(run: Run) -> None:
    specs = stage_specs(run.config, run.folder, run.attempt)
    run.folder.stop_request.touch()
    write_failure(run.folder.failure(1), FailureRecord(FailureKind.WORKER_LOST, 1, "h", "m", "", run.attempt))
    folder = run.folder.stage(0, specs[0].name)
    folder.path.mkdir(parents=True)
    with pytest.raises(Preempted, match="has no checkpoint yet"):
        raise_for_records(specs, "status 1")
    kept = folder.checkpoints / "step_00000004"
    kept.mkdir(parents=True)
    (kept / "manifest.json").touch()
    with pytest.raises(Preempted, match="checkpoint of step 4 of stage 00_") as asked:
        raise_for_records(specs, "status 1")
    assert f"--run-root {run.folder.root}" in asked.value.action


def test_a_second_interrupt_does_not_wait_for_a_checkpoint(run: Run) -> None:
    def act() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)
        assert run.folder.stop_request.exists()
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)

    with pytest.raises(KeyboardInterrupt):
        run_curriculum(run, ScriptedLauncher(act), nothing, nothing)
    assert names(run)[-1] == "run_preempted"


def test_interrupts_while_the_end_is_written_down_change_nothing(run: Run) -> None:
    class Interrupted(ScriptedLauncher):
        def stop(self) -> None:
            for _ in range(3):
                os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(StageFailed, match="a loss"):
        run_curriculum(run, Interrupted(lambda: fail("a loss")), nothing, nothing)
    assert names(run)[-1] == "run_failed"


def fail(found: str) -> None:
    raise StageFailed(found, kind="non_finite")


def test_a_full_disk_in_the_driver_is_journalled_and_told_in_three_parts(run: Run) -> None:
    def full(_: Run) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(StageFailed) as failed:
        run_curriculum(run, ScriptedLauncher(), full, nothing)
    assert failed.value.kind == "disk_full" and "free space" in failed.value.action
    assert read_events(run.folder.journal)[-1]["kind"] == "disk_full"


def test_a_defect_in_the_driver_is_journalled_and_raised_as_it_is(run: Run) -> None:
    with pytest.raises(ZeroDivisionError):
        run_curriculum(run, ScriptedLauncher(), lambda _: 1 / 0, nothing)
    event = read_events(run.folder.journal)[-1]
    assert (event["event"], event["kind"]) == ("run_failed", "unknown") and "ZeroDivisionError" in event["found"]


def test_what_ignores_the_grace_time_is_ended_with_code_75(tmp_path: Path) -> None:
    """Ranks inside this very process have nobody else who could end them."""
    code = f"""
        import os, signal, sys, threading, time
        from pathlib import Path
        from hsmn_dist.config.load import load_run_config
        from hsmn_dist.orchestration import stop_signals
        from hsmn_dist.orchestration.curriculum import create_run, run_curriculum
        stop_signals.LEAVE_SECONDS = 0.2
        class Deaf:
            def launch(self, specs):
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(60)
            def stop(self): pass
        run = create_run(load_run_config(Path({str(DEMO)!r}), ["run_root={tmp_path}", "cluster.grace_seconds=0.2"]))
        run_curriculum(run, Deaf(), lambda run: None, lambda run: None)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], timeout=50, check=False)
    assert done.returncode == 75
    folder = next(path for path in tmp_path.iterdir() if path.is_dir())
    assert run_status(read_events(folder / "journal.jsonl")) == "preempted"


def test_a_process_group_that_is_gone_is_no_error_of_stop(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    launcher = LocalLauncher(run.config.cluster)

    class Gone:
        pid = 2**22 + 12345  # above the largest process number

        def poll(self) -> None:
            return None

        def wait(self, seconds: float) -> int:
            return 0

    monkeypatch.setattr(launcher, "_process", Gone())
    launcher.stop()
