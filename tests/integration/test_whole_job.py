"""The whole job, for real: rows to scorecard under Ray and under torchrun, killed and resumed, and refused for bad input."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.numpy import load_file

from hsmn_dist.cli.drive import drive
from hsmn_dist.config.load import load_run_config
from hsmn_dist.foundation.errors import Preempted
from hsmn_dist.foundation.files import read_json
from hsmn_dist.orchestration.curriculum import Run, create_run, reopen_run
from hsmn_dist.orchestration.heartbeat import Beat, Heart, has_ended, read_beats
from hsmn_dist.orchestration.journal import read_events, run_status
from hsmn_dist.orchestration.launcher import descendants
from hsmn_dist.orchestration.run_folder import RunFolder
from tests.support.chaos_services import ObjectStore
from tests.support.ray_cluster import free_ports
from tests.support.whole_job import (
    DEMO,
    command_line,
    environment,
    final_weights,
    losses,
    one_stage,
    only_run,
    run_command,
    scorecard,
    settings,
)

BYTES = ("tokenizer.kind=bytes", "tokenizer.vocab_size=300", "model.vocab_size=300")


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all runs of this file: prepared shards are shared, as they are for users."""
    return tmp_path_factory.mktemp("job")


@pytest.fixture(scope="session")
def local_run(workplace: Path) -> RunFolder:
    """The undisturbed run under torchrun, two ranks, ZeRO-2."""
    done = run_command("run", str(DEMO["hsmn"]), "--launcher", "local", *settings("name=undisturbed"), folder=workplace)
    assert done.status == 0, done.errors
    return only_run(workplace / "runs")


def test_a_run_leaves_every_stage_complete_and_a_scorecard(local_run: RunFolder) -> None:
    assert run_status(read_events(local_run.journal)) == "complete"
    card = scorecard(local_run)
    stages = sorted((local_run.path / "stages").iterdir())
    assert [stage.name for stage in stages] == ["00_word_problems", "01_stdlib_code", "02_passkey"]
    for stage in stages:
        assert (stage / "COMPLETE").is_file()
        assert (stage / "metrics.jsonl").is_file()
    for suffix in (".json", ".md", ".png"):
        assert local_run.scorecard.with_suffix(suffix).stat().st_size > 0
    assert "word_problems" in json.dumps(card)


def test_training_loss_falls_in_every_stage(local_run: RunFolder) -> None:
    for stage, points in losses(local_run).items():
        values = [value for _, value in points]
        assert values[-1] < values[0], f"{stage}: {values}"


@pytest.mark.ray
def test_ray_and_torchrun_give_the_same_losses_and_weights_bit_for_bit(workplace: Path, local_run: RunFolder) -> None:
    root = workplace / "ray_runs"
    words = settings("name=under_ray", f"run_root={root}", "tracking.backend=mlflow")
    done = run_command("run", str(DEMO["hsmn"]), "--launcher", "ray", *words, folder=workplace)
    assert done.status == 0, done.errors
    folder = only_run(root)
    assert losses(folder) == losses(local_run)
    assert final_weights(folder) == final_weights(local_run)
    assert "mlflow ui" in done.output
    check_mlflow(root, folder.run_id)


def check_mlflow(root: Path, run_id: str) -> None:
    """One parent and three children, each with metrics and figures."""
    mlflow = pytest.importorskip("mlflow")
    client = mlflow.MlflowClient(f"sqlite:///{root / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("hsmn_dist")
    runs = client.search_runs([experiment.experiment_id])
    parents = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    assert [run.info.run_name for run in parents] == [run_id]
    children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parents[0].info.run_id]
    assert len(children) == 3
    for run in [*parents, *children]:
        assert run.info.status == "FINISHED"
        assert run.data.metrics
        assert client.list_artifacts(run.info.run_id, "figures")
    assert all("train/loss_nats" in run.data.metrics for run in children)
    history = client.get_metric_history(parents[0].info.run_id, "transfer/average_accuracy")
    assert [point.step for point in history] == [0, 1, 2], "the transfer numbers after every stage, each once"


def wait_for(condition: object, seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.1)


def kill_everything(process: subprocess.Popen[bytes]) -> None:
    for member in [*descendants(process.pid), process.pid]:
        try:
            os.kill(member, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.wait()


def start_run(workplace: Path, root: str) -> subprocess.Popen[bytes]:
    """The undisturbed run's twin, in the background, in a run root of its own."""
    words = settings("name=undisturbed", f"run_root={root}")
    return subprocess.Popen(
        command_line("run", str(DEMO["hsmn"]), "--launcher", "local", *words),
        cwd=workplace,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def resume(workplace: Path, root: Path) -> RunFolder:
    """Take up the newest run of a root and wait for its end."""
    done = run_command("run", "--resume", "latest", "--launcher", "local", "--run-root", str(root), folder=workplace)
    assert done.status == 0, done.errors
    return only_run(root)


def test_a_run_killed_in_stage_two_resumes_to_the_same_weights(workplace: Path, local_run: RunFolder) -> None:
    process, root = start_run(workplace, "killed_runs"), workplace / "killed_runs"
    try:
        wait_for(lambda: list(root.glob("*/stages/01_stdlib_code/checkpoints/step_*")), 200, "a checkpoint of stage 2")
    finally:
        kill_everything(process)
    assert not only_run(root).stage(1, "stdlib_code").is_complete, "the kill came too late to test anything"
    folder = resume(workplace, root)
    assert final_weights(folder) == final_weights(local_run)
    assert losses(folder) == losses(local_run)


def test_killed_ranks_are_replaced_twice_and_the_run_ends_with_the_same_weights(
    workplace: Path, local_run: RunFolder
) -> None:
    """In the second round of a launch the ranks must find each other, not the addresses of the dead ones."""
    process, root = start_run(workplace, "replaced_runs"), workplace / "replaced_runs"

    def training_beat() -> list[Beat]:
        beats = [beat for folder in root.glob("*/heartbeats") for beat in read_beats(folder)]
        return [beat for beat in beats if beat.phase == "train" and beat.step >= 2 and not has_ended(beat)]

    try:
        for rank in (1, 0):
            wait_for(lambda rank=rank: [b for b in training_beat() if b.rank == rank], 200, "two steps of training")
            victim = next(beat for beat in training_beat() if beat.rank == rank)
            os.kill(victim.pid, signal.SIGKILL)
            wait_for(lambda victim=victim: has_ended(victim), 20, "the death of the rank")
        _, errors = process.communicate(timeout=300)
    finally:
        kill_everything(process)
    assert process.returncode == 0, errors.decode()
    folder = only_run(root)
    events = [event["event"] for event in read_events(folder.journal)]
    assert "run_resumed" not in events, "the launcher replaced the ranks by itself"
    assert final_weights(folder) == final_weights(local_run)
    assert losses(folder) == losses(local_run)


def test_a_terminated_run_leaves_with_code_75_and_resumes(workplace: Path, local_run: RunFolder) -> None:
    process, root = start_run(workplace, "preempted_runs"), workplace / "preempted_runs"
    try:
        wait_for(lambda: list(root.glob("*/stages/00_word_problems/metrics.jsonl")), 200, "the first step")
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=100)
    finally:
        kill_everything(process)
    assert process.returncode == 75, errors.decode()
    assert run_status(read_events(only_run(root).journal)) == "preempted"
    assert final_weights(resume(workplace, root)) == final_weights(local_run)


Strike = Callable[[dict[str, Any]], bool]


def once_in(phase: str, step: int) -> Strike:
    """True at the first beat of a phase that has come to `step`."""
    return lambda fields: fields["phase"] == phase and fields["step"] >= step


PLACES: dict[str, Strike] = {
    "baseline": once_in("baseline", 0),
    "train": once_in("train", 5),
    "fisher": once_in("fisher", 4),
    "evaluate": once_in("evaluate", 0),
}


def inline(run: Run) -> None:
    drive(run, "inline", quiet=True, prints=False)


@pytest.fixture(scope="session")
def inline_config(workplace: Path) -> Path:
    place = workplace / "inline"
    place.mkdir()
    return one_stage(place, *BYTES, "training.engine=local", "cluster.ranks_per_node=1", "training.max_steps=7")


@pytest.fixture(scope="session")
def inline_run(inline_config: Path) -> RunFolder:
    """The undisturbed run of one rank in this process."""
    run = create_run(load_run_config(inline_config, [f"run_root={inline_config.parent / 'undisturbed'}"]))
    inline(run)
    return run.folder


def tensors_of(path: Path) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in load_file(path).items()}


def check_same(folder: RunFolder, undisturbed: RunFolder) -> None:
    """Weights, Fisher, losses and scores, bit for bit."""
    assert final_weights(folder) == final_weights(undisturbed)
    assert losses(folder) == losses(undisturbed)
    stores = [item.stage(0, "word_problems").ewc for item in (folder, undisturbed)]
    tensors = [tensors_of(next(store.glob("*.safetensors"))) for store in stores]
    assert tensors[0] and tensors[0] == tensors[1]
    results, others = (read_json(item.stage(0, "word_problems").results)["tasks"] for item in (folder, undisturbed))
    assert results == others


def leave(run: Run) -> float:
    """Drive a run that is about to be told to go; the seconds it took."""
    started = time.monotonic()
    with pytest.raises(Preempted) as left:
        inline(run)
    assert left.value.exit_code == 75
    events = [event["event"] for event in read_events(run.folder.journal)]
    assert events[-1] == "run_preempted" and "retried" not in events
    return time.monotonic() - started


@pytest.mark.parametrize("place", PLACES)
def test_term_in_any_phase_leaves_with_75_and_resumes_to_the_undisturbed_bits(
    place: str, inline_config: Path, inline_run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, struck = Heart.beat, list[float]()

    def beat(self: Heart, force: bool = False, **fields: Any) -> None:
        first(self, force, **fields)
        if not struck and PLACES[place](self._fields):
            struck.append(time.monotonic())
            os.kill(os.getpid(), signal.SIGTERM)

    root = inline_config.parent / place
    run = create_run(load_run_config(inline_config, [f"run_root={root}"]))
    with monkeypatch.context() as patched:
        patched.setattr(Heart, "beat", beat)
        leave(run)
    assert struck and time.monotonic() - struck[0] < run.config.cluster.grace_seconds
    kept = {path.name for path in run.folder.stage(0, "word_problems").checkpoints.glob("step_*")}
    if place == "train":  # checkpoints are due every 3 steps: this one was written because of the signal
        assert "step_00000005" in kept and "step_00000006" not in kept
    inline(reopen_run(run.folder))
    check_same(run.folder, inline_run)


def test_term_in_the_preparation_leaves_with_75_and_resumes_to_the_undisturbed_bits(
    inline_config: Path, inline_run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def strike(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    run = create_run(load_run_config(inline_config, [f"run_root={inline_config.parent / 'preparation'}"]))
    with monkeypatch.context() as patched:
        patched.setattr(
            "hsmn_dist.cli.drive.terminal_progress", lambda: contextlib.nullcontext(SimpleNamespace(update=strike))
        )
        leave(run)
    assert not run.folder.prepared.exists()
    inline(reopen_run(run.folder))
    check_same(run.folder, inline_run)


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["baseline", "fisher", "evaluate"])
def test_two_ranks_told_to_go_outside_the_training_leave_with_75_and_resume(
    phase: str, workplace: Path, local_run: RunFolder
) -> None:
    process, root = start_run(workplace, f"told_in_{phase}"), workplace / f"told_in_{phase}"

    def is_there() -> bool:
        beats = [beat for folder in root.glob("*/heartbeats") for beat in read_beats(folder)]
        return any(beat.phase == phase for beat in beats)

    try:
        wait_for(is_there, 200, phase)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=100)
    finally:
        kill_everything(process)
    assert process.returncode == 75, errors.decode()
    events = [event["event"] for event in read_events(only_run(root).journal)]
    assert events[-1] == "run_preempted" and "retried" not in events
    assert final_weights(resume(workplace, root)) == final_weights(local_run)


@pytest.mark.slow
def test_a_rank_of_a_bare_shell_leaves_with_75_and_is_not_stopped_by_what_was_left_behind(
    inline_config: Path, inline_run: RunFolder
) -> None:
    """`hsmn-dist stage` without a driver: the request that ended an earlier try does not end this one."""
    run = create_run(load_run_config(inline_config, [f"run_root={inline_config.parent / 'bare'}"]))
    shutil.copyfile(inline_run.prepared, run.folder.prepared)
    run.folder.stop_request.touch()
    words = command_line("stage", "--run-folder", str(run.folder.path))
    process = subprocess.Popen(words, env=environment(), stderr=subprocess.PIPE)
    try:
        wait_for(lambda: run.folder.stage(0, "word_problems").metrics.is_file(), 60, "the first step")
        assert not run.folder.stop_request.exists()
        run.folder.stop_request.touch()
        _, errors = process.communicate(timeout=60)
    finally:
        kill_everything(process)
    assert process.returncode == 75, errors.decode()
    again = subprocess.run(words, env=environment(), capture_output=True, timeout=100, check=False)
    assert again.returncode == 0, again.stderr.decode()
    assert run.folder.stage(0, "word_problems").is_complete
    assert final_weights(run.folder) == final_weights(inline_run)


def test_shards_at_a_url_train_to_the_scorecard_of_the_local_ones(workplace: Path) -> None:
    config = one_stage(workplace, *BYTES, "training.engine=local", "cluster.ranks_per_node=1")
    words = ["run", str(config), "--launcher", "inline"]
    done = run_command(*words, "--set", "run_root=near_runs", folder=workplace)
    assert done.status == 0, done.errors
    near = only_run(workplace / "near_runs")
    folder = Path(json.loads(near.prepared.read_text())["folders"]["word_problems"])
    (port,) = free_ports(1)
    store = ObjectStore(folder.parent, port)
    try:
        place = f"curriculum.stages.0.datasets.0.shards=http://127.0.0.1:{port}/{folder.name}"
        far_words = ["--set", "run_root=far_runs", "--set", place, "--set", f"data.cache_folder={workplace / 'cache'}"]
        done = run_command(*words, *far_words, folder=workplace)
        assert done.status == 0, done.errors
    finally:
        store.close()
    far = only_run(workplace / "far_runs")
    assert final_weights(far) == final_weights(near) and losses(far) == losses(near)
    assert scorecard(far)
    cached = {path.name.split("-")[1] for path in (workplace / "cache").rglob("*.tar")}
    assert {"train", "test"} <= cached, "evaluation uses the configured cache too"
    again = run_command("scorecard", far.run_id, "--run-root", "far_runs", folder=workplace)
    assert again.status == 0, "a finished run is reported though its shards are out of reach: " + again.errors


def test_hope_runs_on_one_rank_with_the_local_engine(workplace: Path) -> None:
    words = settings("run_root=hope_runs", "training.engine=local", "cluster.ranks_per_node=1", "tracking.backend=none")
    done = run_command("run", str(DEMO["hope"]), "--launcher", "local", *words, folder=workplace)
    assert done.status == 0, done.errors
    assert scorecard(only_run(workplace / "hope_runs"))


@pytest.mark.parametrize(
    ("assignments", "words"),
    [
        (["training.zero_stag=1"], ["unknown key 'training.zero_stag'", "did you mean 'zero_stage'?"]),
        (["training.precision=bf16", "training.zero_stage=0"], ["bf16 with zero_stage 0"]),
        (["curriculum.stages.1.datasets.0.source=absent.jsonl"], ["absent.jsonl"]),
        (["curriculum.stages.1.datasets.0.name=gsm8kk"], ["gsm8kk", "gsm8k"]),
    ],
)
def test_bad_input_ends_with_code_2_and_no_traceback(workplace: Path, assignments: list[str], words: list[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in (workplace / "runs").glob("*/*")}
    done = run_command("run", str(DEMO["hsmn"]), "--launcher", "local", *settings(*assignments), folder=workplace)
    assert done.status == 2, done.errors
    assert "Traceback" not in done.errors
    assert "allowed:" in done.errors
    assert "do:" in done.errors
    for word in words:
        assert word in done.errors
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
