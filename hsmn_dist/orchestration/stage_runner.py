"""run_stages: what every rank executes, whoever started it. Builds each stage's parts in a fixed order; knows no Ray.

Order of a stage: seeds, engine and weights of the stage before, stream, penalty, tracker, training, Fisher, export, scores, manifest.
State crosses from stage to stage through the run folder alone. An exception is written down with rank and step before it leaves, so
the launcher can say which rank failed and whether starting again would help.
"""

from __future__ import annotations

import platform
import time
import traceback
from collections.abc import Sequence
from typing import Any

import torch

from hsmn_dist.distributed.collectives import barrier, broadcast_object
from hsmn_dist.distributed.determinism import seed_everything
from hsmn_dist.distributed.world import World
from hsmn_dist.foundation.errors import HsmnError
from hsmn_dist.foundation.files import read_json, write_json, write_manifest
from hsmn_dist.foundation.log import configure_logging, logger
from hsmn_dist.foundation.process_memory import ask_for_huge_pages, give_back_freed_memory, keep_freed_blocks
from hsmn_dist.models.build import build_model
from hsmn_dist.models.contract import LanguageModel
from hsmn_dist.orchestration.adjustments import adjusted
from hsmn_dist.orchestration.attempt import claim
from hsmn_dist.orchestration.curriculum import load_stored_config
from hsmn_dist.orchestration.failures import (
    FailureKind,
    FailureRecord,
    classify,
    must_stop,
    read_failures,
    reserve_failure,
    write_failure,
)
from hsmn_dist.orchestration.heartbeat import Heart
from hsmn_dist.orchestration.launcher import was_started_by_driver
from hsmn_dist.orchestration.rank_context import RankContext
from hsmn_dist.orchestration.run_folder import RunFolder
from hsmn_dist.orchestration.stage import StageSpec
from hsmn_dist.orchestration.stage_evaluation import Watchers, evaluate_tasks
from hsmn_dist.orchestration.stage_training import StageTraining
from hsmn_dist.training.export import load_exported

log = logger(__name__)


def run_stages(specs: Sequence[StageSpec], has_driver: bool | None = None) -> None:
    """Run stages in order on this rank. Collective over the ranks that the environment describes.

    A rank that meets an error records it and raises; a rank asked to leave records that and returns. One that a bare shell started
    (`has_driver` False; None asks the environment) has nobody who clears what an earlier try left, or who reads why it left: it does
    the one and raises the other.

    Raises:
        Preempted: asked to leave, and there is no driver.
    """
    folder, attempt = specs[0].folder, specs[0].attempt
    has_driver = was_started_by_driver() if has_driver is None else has_driver
    if has_driver and must_stop(read_failures(folder.path / "failures", attempt)):
        return  # the group was started again after an error that will not go away
    config = adjusted(load_stored_config(folder), folder)
    torch.set_num_threads(config.cluster.threads_per_rank)
    world = World.place(config.cluster.device)
    if world.device.type == "cpu":
        keep_freed_blocks()
        ask_for_huge_pages()
    configure_logging(world.rank)
    # The first beat comes before the ranks meet: one that waits there for a rank that never comes is found like any other.
    heart = Heart(folder.path / "heartbeats", world.rank, world.world_size, attempt).start()
    heart.beat(stage=specs[0].name, stage_index=specs[0].index, phase="join")
    try:
        if not has_driver:
            _forget_earlier_try(folder, world)
        reserve_failure(folder.failure(world.rank))
        if world.world_size > 1:
            world.join(timeout_seconds=max(60.0, config.cluster.stall_seconds))
        fence = broadcast_object(claim(folder, attempt) if world.is_first else None)
        assert fence is not None
        heart.meet(fence.group)
        context = RankContext(config, folder, world, fence, heart, read_json(folder.prepared))
        for spec in specs:
            if not folder.stage(spec.index, spec.name).is_complete:
                _run_stage(context, spec)
            heart.wait()
            barrier()
        heart.beat(phase="done")
    except Exception as error:
        # The process boundary: whatever went wrong is written down with its rank before the launcher hears of it.
        kind = _record(error, folder, world.rank, attempt)
        if kind is not FailureKind.PREEMPTED or not has_driver:
            raise
        heart.beat(phase="done")
    finally:
        heart.stop()


def _forget_earlier_try(folder: RunFolder, world: World) -> None:
    """What made the try before leave would make this one leave at once. Before the ranks meet, so that all see it gone."""
    folder.failure(world.rank).unlink(missing_ok=True)
    if world.is_first:
        folder.stop_request.unlink(missing_ok=True)


def _record(error: Exception, folder: RunFolder, rank: int, attempt: str) -> FailureKind:
    kind = classify(error)
    parts = (error.found, error.allowed, error.action) if isinstance(error, HsmnError) else (str(error), "", "")
    text = "".join(traceback.format_exception(error))
    message = parts[0] or repr(error)
    path = folder.failure(rank)
    if kind is FailureKind.FENCED:
        # The record of a rank belongs to the group that goes on; this one is said beside it.
        path = path.with_name(f"fenced_{rank:05d}_{platform.node()}.json")
        log.error("%s", message)
    write_failure(path, FailureRecord(kind, rank, platform.node(), message, text, attempt, *parts))
    return kind


def _run_stage(context: RankContext, spec: StageSpec) -> None:
    stage_folder = context.folder.stage(spec.index, spec.name)
    stage_folder.path.mkdir(parents=True, exist_ok=True)
    context.heart.beat(stage=spec.name, stage_index=spec.index, phase="prepare", step=0, num_steps=0, loss=None)
    context.note("stage_started", stage=spec.index, name=spec.name)
    if spec.index == 0:
        _score_untrained(context)
    started = time.monotonic()
    summary = StageTraining(context, spec).run()
    context.heart.beat(phase="evaluate")
    give_back_freed_memory()
    tasks = _score(context, load_exported(stage_folder.weights))
    if context.world.is_first:
        context.fence.check()
        results = {
            "stage": spec.name,
            "index": spec.index,
            "seconds": time.monotonic() - started,
            "training": summary,
            "tasks": tasks,
        }
        write_json(stage_folder.results, results)
        write_manifest(stage_folder.path, "COMPLETE", ["results.json"], {"attempt": spec.attempt, "stage": spec.name})
        context.note("stage_completed", stage=spec.index, name=spec.name)
    context.heart.wait()
    barrier()


def _score_untrained(context: RankContext) -> None:
    """Scores of every task before any training (b[j] of the transfer numbers). Written once per run."""
    if broadcast_object(context.folder.baseline.is_file()):
        return
    context.heart.beat(phase="baseline")
    seed_everything(context.config.seed)
    tasks = _score(context, build_model(context.config.model))
    if context.world.is_first:
        context.fence.check()
        write_json(context.folder.baseline, {"tasks": tasks})


def _score(context: RankContext, model: LanguageModel) -> dict[str, Any]:
    def progress(done: int, total: int) -> None:
        context.heart.beat(force=True, step=done, num_steps=total)

    def alive() -> None:
        context.heart.beat()
        context.leave_if_asked()

    return evaluate_tasks(
        model, context.config, context.prepared, context.world, Watchers(progress, alive, context.heart.wait)
    )
