"""A stage that changes its number of ranks on the way: the same global batches, and the losses of the undisturbed stage."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hsmn_dist.config.load import load_run_config
from hsmn_dist.distributed.world import World
from hsmn_dist.orchestration.curriculum import create_run, record_prepared
from hsmn_dist.orchestration.journal import read_events
from hsmn_dist.orchestration.launcher import clear_failures, descendants
from hsmn_dist.orchestration.run_folder import RunFolder, list_runs
from hsmn_dist.orchestration.stage import stage_specs
from hsmn_dist.tracking.jsonl_tracker import read_series
from tests.support.chaos import SITE, settings, undisturbed_run
from tests.support.chaos_checks import GLOBAL_BATCH, examples_of
from tests.support.chaos_services import ROOT, RayCluster, environment
from tests.support.distributed import run_distributed
from tests.support.ray_cluster import free_ports
from tests.support.whole_job import DEMO, command_line

ROUTE = (2, 1, 4, 2)
LEG_STEPS = 3
NUM_STEPS = LEG_STEPS * len(ROUTE)
LOSS = "train/loss_nats"


def losses(run: RunFolder, stage: str = "00_word_problems") -> dict[int, float]:
    return dict(read_series(run.path / "stages" / stage / "metrics.jsonl")[LOSS])


def new_run(root: Path, zero_stage: int, family: str = "hsmn", num_steps: int = NUM_STEPS, **more: Any) -> RunFolder:
    from hsmn_dist.data.prepare import prepare_curriculum

    changes = {
        "tracking.backend": "none",
        "training.micro_batch_examples": 2,
        "training.zero_stage": zero_stage,
        **more,
    }
    words = [word for word in settings(num_steps, **changes) if word != "--set"]
    if family != "hsmn":
        words = [word for word in words if not word.startswith("model.")]
        words += ["model.vocab_size=300", "model.d_model=16", "model.num_heads=2", "model.d_feed_forward=24"]
    run = create_run(load_run_config(DEMO[family], [*words, f"run_root={root}"]))
    datasets = [dataset for stage in run.config.curriculum.stages for dataset in stage.datasets]
    prepared = prepare_curriculum(datasets, run.config.data, run.config.tokenizer, root.parent / "prepared")
    record_prepared(run.folder, prepared.tokenizer_path, prepared.folders)
    return run.folder


def walk(world: World, folder: str, attempt: str, stop_at: int) -> None:
    """The first stage on these ranks, asked to leave before step `stop_at`."""
    from hsmn_dist.orchestration import rank_context, stage_runner
    from hsmn_dist.orchestration.curriculum import load_stored_config

    run = RunFolder(Path(folder))
    done = run.stage(0, "word_problems").examples

    def wants_to_stop(_: Any) -> bool:
        steps = {event["step"] for event in read_events(done)}
        return len(steps) >= stop_at

    rank_context.RankContext.wants_to_stop = wants_to_stop  # type: ignore[assignment, method-assign]
    stage_runner.run_stages(stage_specs(load_stored_config(run), run, attempt)[:1], has_driver=True)


def token(run: RunFolder) -> str:
    return str(json.loads(run.attempt.read_text())["token"])


@pytest.mark.parametrize(
    ("family", "data"), [("hsmn", {}), ("hope", {"data.packs_examples": True, "data.max_context_tokens": 256})]
)
def test_three_ranks_and_packed_rows_do_not_divide_the_batch_and_see_it_whole(
    tmp_path: Path, family: str, data: dict[str, Any]
) -> None:
    """8 examples are 3, 3 and 2 on three ranks, in micro-batches of 2: two each, the last ones filled up. Packed, the batch has
    fewer rows, another number in each step."""
    one, three = (new_run(tmp_path / name, 2, family, 4, **data) for name in ("one", "three"))
    for run, world_size in ((one, 1), (three, 3)):
        run_distributed(walk, world_size, str(run.path), token(run), 10**6, timeout=300)
    if not data:
        assert examples_of(three, 0) == examples_of(one, 0)
        dealt = [
            [len(of_rank) for of_rank in event["examples"]]
            for event in read_events(three.stage(0, "word_problems").examples)
        ]
        assert [sorted(sizes) for sizes in dealt] == [[2, 3, 3]] * 4
    ours, theirs = losses(three), losses(one)
    assert sorted(ours) == sorted(theirs) == list(range(4))
    assert max(abs(ours[step] - theirs[step]) for step in theirs) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_two_one_four_and_two_ranks_see_the_same_batches_and_losses(tmp_path: Path, zero_stage: int) -> None:
    undisturbed = new_run(tmp_path / "a", zero_stage)
    run_distributed(walk, 2, str(undisturbed.path), token(undisturbed), 10**6, timeout=300)
    run = new_run(tmp_path / "b", zero_stage)
    for leg, world_size in enumerate(ROUTE, 1):
        clear_failures(run, token(run))
        stop_at = leg * LEG_STEPS if leg < len(ROUTE) else 10**6
        run_distributed(walk, world_size, str(run.path), token(run), stop_at, timeout=300)
    sizes = [len(event["examples"]) for event in read_events(run.stage(0, "word_problems").examples)]
    assert sizes == [size for size in ROUTE for _ in range(LEG_STEPS)]
    assert examples_of(run, 0) == examples_of(undisturbed, 0)
    ours, theirs = losses(run), losses(undisturbed)
    assert sorted(ours) == sorted(theirs) == list(range(NUM_STEPS))
    difference = max(abs(ours[step] - theirs[step]) for step in theirs)
    print(f"ZeRO {zero_stage}: ranks {ROUTE}, largest difference of a loss {difference:.2e}")
    assert difference < 1e-4


def wait_for(condition: Callable[[], Any], seconds: float, what: str, process: subprocess.Popen[bytes]) -> Any:
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert process.poll() is None, f"the run ended (exit {process.returncode}) while it was waited for {what}"
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.2)
    return value


@contextlib.contextmanager
def slow_run(folder: Path, cluster: RayCluster, num_steps: int) -> Iterator[subprocess.Popen[bytes]]:
    """A run of two tenths of a second a step, so that nodes can come and go within a stage."""
    site = folder / "site"
    site.mkdir()
    (folder / "plan.json").write_text(json.dumps({"faults": [], "seconds_per_step": 0.2}))
    (site / "sitecustomize.py").write_text(SITE.format(root=str(ROOT), folder=str(folder)))
    changes = {
        "tracking.backend": "none",
        "cluster.ray_address": cluster.address,
        "cluster.num_workers": "[1, 2]",
        "cluster.resize_seconds": 2,
        "optim.schedule.kind": "constant",
    }
    words = ["run", str(DEMO["hsmn"]), *settings(num_steps, **changes), "--set", f"run_root={folder / 'runs'}"]
    with (folder / "driver.log").open("wb") as log:
        process = subprocess.Popen(
            command_line(*words, "--launcher", "ray"), cwd=folder, env=environment(site), stdout=log, stderr=log
        )
    try:
        yield process
    finally:
        for pid in [*descendants(process.pid), process.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()


@pytest.mark.slow
@pytest.mark.ray
def test_a_stage_grows_when_a_node_joins_and_shrinks_when_it_is_lost(tmp_path: Path) -> None:
    num_steps = 400
    (port,) = free_ports(1)
    cluster = RayCluster(None, port, num_nodes=0)
    try:
        cluster.add_node(0, num_cpus=1)
        with slow_run(tmp_path, cluster, num_steps) as process:

            def sizes() -> list[tuple[int, int]]:
                """(step, ranks) of every line of the first stage, in the order of writing."""
                runs = list_runs(tmp_path / "runs")
                path = runs[-1].stage(0, "word_problems").examples if runs else tmp_path / "none"
                return [(event["step"], len(event["examples"])) for event in read_events(path)]

            wait_for(lambda: len(sizes()) >= 5, 180, "five steps on one rank", process)
            joined = time.monotonic()
            node = cluster.add_node(1, num_cpus=1)
            wait_for(lambda: sum(size == 2 for _, size in sizes()) >= 6, 180, "six steps on two ranks", process)
            grown = time.monotonic() - joined
            lost = time.monotonic()
            before = len(sizes())
            cluster.remove(node)
            wait_for(lambda: [size for _, size in sizes()[before + 1 :]].count(1) >= 6, 180, "one rank again", process)
            shrunk = time.monotonic() - lost
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=120) == 75, (tmp_path / "driver.log").read_text()[-3000:]
        run = list_runs(tmp_path / "runs")[-1]
        order = [size for _, size in sizes()]
        assert [size for index, size in enumerate(order) if index == 0 or order[index - 1] != size] == [1, 2, 1]
    finally:
        cluster.close()
    reached = max(losses(run))
    # The rate is constant, so that the undisturbed run needs no more steps than were reached.
    same = settings(reached + 1, **{"tracking.backend": "none", "optim.schedule.kind": "constant"})
    undisturbed = undisturbed_run(tmp_path, same)
    wanted, theirs = examples_of(undisturbed, 0), losses(undisturbed)
    found, ours = examples_of(run, 0), losses(run)
    assert all(len(batch) == GLOBAL_BATCH and batch == wanted[step] for step, batch in found.items() if step <= reached)
    difference = max(abs(ours[step] - theirs[step]) for step in ours)
    print(
        f"1 -> 2 ranks {grown:.1f} s after the node joined, 2 -> 1 {shrunk:.1f} s after it was lost; {reached + 1} steps, "
        f"largest difference of a loss {difference:.2e}"
    )
    assert difference < 1e-4
