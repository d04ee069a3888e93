"""One stage on one rank: engine, stream, penalty and tracker are built in this order, then training, Fisher, export."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hsmn_dist.config.curriculum import StageConfig
from hsmn_dist.continual.ewc import EwcMemory, EwcPenalty
from hsmn_dist.continual.fisher import fisher_record
from hsmn_dist.continual.store import load_store, save_store
from hsmn_dist.data.stream.cursor import Cursor
from hsmn_dist.data.stream.loader import Batch, StreamLoader, build_loader, iter_split
from hsmn_dist.data.stream.plan import StreamSettings, StreamSource
from hsmn_dist.data.tokenizer import TOKENIZER_NAME
from hsmn_dist.distributed.collectives import all_gather_objects, barrier, broadcast_object
from hsmn_dist.distributed.determinism import derived_seed, seed_everything
from hsmn_dist.foundation.errors import Preempted
from hsmn_dist.foundation.process_memory import give_back_freed_memory
from hsmn_dist.models.build import build_model
from hsmn_dist.optim.schedules import learning_rate
from hsmn_dist.orchestration.journal import append_event, read_events
from hsmn_dist.orchestration.rank_context import RankContext
from hsmn_dist.orchestration.report import run_tags
from hsmn_dist.orchestration.run_folder import StageFolder
from hsmn_dist.orchestration.stage import StageSpec, training_stages
from hsmn_dist.tracking import metric_names
from hsmn_dist.tracking.build import TrackedRun, build_tracker
from hsmn_dist.tracking.jsonl_tracker import read_series
from hsmn_dist.tracking.tracker import FencedTracker, FinishStatus, Tracker
from hsmn_dist.training.build import build_engine
from hsmn_dist.training.checkpoint import Checkpointer
from hsmn_dist.training.context_parallel import data_place, undivided
from hsmn_dist.training.engine import Engine
from hsmn_dist.training.export import export_weights, load_weights
from hsmn_dist.training.fisher_pass import run_fisher
from hsmn_dist.training.loop import TrainParts, TrainResult, train
from hsmn_dist.training.remote_checkpoints import STAGING, RemoteCheckpoints
from hsmn_dist.training.sparsity import PruningMask

PROTECTING = ("ewc", "ewc+replay", "l2")
REPLAYING = ("replay", "ewc+replay")


class StageTraining:
    """Trains one stage; every rank makes one and calls `run`."""

    def __init__(self, context: RankContext, spec: StageSpec) -> None:
        self._context = context
        self._spec = spec
        self._config = context.config
        self._stages = training_stages(context.config)
        self._stage: StageConfig = self._stages[spec.index]
        self._folder: StageFolder = context.folder.stage(spec.index, spec.name)
        self._num_steps = self._stage.max_steps or self._config.training.max_steps
        self._first_step = 0
        self._checkpointer = Checkpointer(
            self._folder.checkpoints,
            context.world,
            self._config.training.keep_last_checkpoints,
            context.fence.check,
            remote=self._remote_checkpoints(),
            owner=f"{context.fence.attempt}-{context.fence.group}",
        )

    def run(self) -> dict[str, Any]:
        """Train, take the Fisher, export the weights; returns the summary that goes into `results.json`."""
        engine = self._build_engine()
        memory = self._earlier_tasks(engine)
        newest = self._checkpointer.newest()
        first_step = self._first_step = int(newest.name.rsplit("_", 1)[1]) if newest is not None else 0
        tracker = self._open_tracker(first_step)
        status: FinishStatus = "failed"
        try:
            result = self._train(engine, memory, tracker)
            summary = self._summary(engine, result)
            summary["fisher"] = self._remember(engine, memory, tracker)
            self._export(engine, result)
            self._draw(tracker)
            summary["checkpoint_uploads"] = self._finish_uploads()
            status = "finished"
        except Preempted:
            status = "preempted"
            self._finish_uploads()
            raise
        finally:
            # Ranks that a grace time ended fail in many ways; a stage that came to its end in spite of it is finished.
            was_asked = status == "failed" and self._context.wants_to_stop()
            tracker.finish("preempted" if was_asked else status)
            engine.close()
        return summary

    def _remote_checkpoints(self) -> RemoteCheckpoints | None:
        training, folder = self._config.training, self._context.folder
        if not training.checkpoint_uri:
            return None
        uri = f"{training.checkpoint_uri.rstrip('/')}/{folder.run_id}/{self._folder.path.name}"
        staging = self._folder.checkpoints / STAGING
        return RemoteCheckpoints(uri, staging, training.keep_last_checkpoints, self._context.fence.check)

    def _finish_uploads(self) -> dict[str, Any] | None:
        """Give an upload that is on its way some time, less of it when the machine goes away."""
        seconds = self._config.training.checkpoint_upload_wait_seconds
        if self._context.wants_to_stop():
            seconds = min(seconds, self._config.cluster.grace_seconds / 2)
        report = self._checkpointer.finish_uploads(seconds)
        return None if report is None else dataclasses.asdict(report)

    def _build_engine(self) -> Engine:
        """Weights are drawn from the run's seed, or are those to start from; later stages take over the stage before's."""
        config = self._config
        seed_everything(config.seed)
        engine = build_engine(config.training, self._optim(), lambda: build_model(config.model), self._context.world)
        before, start = self._stage_before(), config.continual.start.weights
        if before is not None or start:
            engine.load_weights(load_weights(Path(start) if before is None else before.weights))
        seed_everything(derived_seed(config.seed, "stage", self._spec.index), self._context.world.rank)
        return engine

    def _stage_before(self) -> StageFolder | None:
        index = self._spec.index - 1
        return None if index < 0 else self._context.folder.stage(index, self._stages[index].name)

    def _mask(self, engine: Engine) -> PruningMask | None:
        pruning = getattr(self._config.model, "pruning", None)
        prunable = getattr(engine.module, "prunable_parameters", None)
        if pruning is None or pruning.schedule == "none" or prunable is None:
            return None
        return PruningMask(pruning, prunable(), engine.num_shard_copies)

    def _optim(self) -> Any:
        optim = self._config.optim
        if self._stage.learning_rate is None:
            return optim
        optimizer = optim.optimizer.model_copy(update={"learning_rate": self._stage.learning_rate})
        return optim.model_copy(update={"optimizer": optimizer})

    def _earlier_tasks(self, engine: Engine) -> EwcMemory:
        """What came before asks to be kept: the merged store of the stage before, or that of the weights to start from."""
        if self._config.continual.method not in PROTECTING:
            return EwcMemory([])  # nothing is kept: no buffers beside the shards
        shards = engine.param_shards(with_gradients=False)
        before, start = self._stage_before(), self._config.continual.start.fisher
        if before is None and not start:
            return EwcMemory.empty(shards)
        memory = load_store(Path(start) if before is None else before.ewc, shards)
        if self._config.continual.method != "l2":  # refused now, not after hours of training
            memory.check_record(fisher_record(self._spec.name, self._config.continual.fisher, 1))
        return memory

    def _open_tracker(self, first_step: int) -> Tracker:
        folder, config = self._context.folder, self._config
        tracked = TrackedRun(
            folder.root, folder.path, folder.run_id, self._folder.path.name, first_step, run_tags(config, folder)
        )
        tracker = build_tracker(config.tracking, tracked, self._context.world.rank)
        tracker.log_params(self._stage.model_dump(mode="json"))
        return FencedTracker(tracker, self._context.fence.check) if self._context.world.is_first else tracker

    def _train(self, engine: Engine, memory: EwcMemory, tracker: Tracker) -> TrainResult:
        config, heart = self._config, self._context.heart
        schedule, peak = config.optim.schedule, self._optim().optimizer.learning_rate
        heart.beat(phase="train", step=self._first_step, num_steps=self._num_steps)

        def on_step(step: int, loss: float | None, rate: float | None) -> None:
            heart.beat(step=step, num_steps=self._num_steps, loss=loss, tokens_per_second=rate)

        return train(
            TrainParts(
                engine=engine,
                world=self._context.world,
                training=config.training,
                num_steps=self._num_steps,
                learning_rate=lambda step: learning_rate(schedule, peak, step, self._num_steps),
                open_stream=self._open_stream,
                validation_batches=self._validation_batches,
                checkpointer=self._checkpointer,
                tracker=tracker,
                penalty=self._penalty(engine, memory),
                mask=self._mask(engine),
                on_step=on_step,
                should_stop=self._context.wants_to_stop,
                record_examples=self._record_examples if config.training.records_examples else None,
            )
        )

    def _record_examples(self, step: int, own: list[int]) -> None:
        """The global batch of a step, rank by rank. Of a step that was done again after a resume, the last line counts."""
        ranks = all_gather_objects(own)
        if self._context.world.is_first:
            self._context.fence.check()
            append_event(self._folder.examples, "examples", step=step, examples=ranks)

    def _penalty(self, engine: Engine, memory: EwcMemory) -> EwcPenalty | None:
        continual = self._config.continual
        if not memory.tasks:
            return None
        strength = continual.strength if self._stage.strength is None else self._stage.strength
        return EwcPenalty(
            memory, strength, continual.application, continual.component_strength, engine.num_shard_copies
        )

    def _sources(self, stage: StageConfig) -> list[StreamSource]:
        folders = self._context.prepared["folders"]
        return [StreamSource(Path(folders[dataset.key]), dataset.weight) for dataset in stage.datasets]

    def _stream_settings(self) -> StreamSettings:
        config = self._config
        earlier = self._stages[: self._spec.index] if config.continual.method in REPLAYING else ()
        return StreamSettings.from_config(
            config.data,
            global_batch_examples=config.training.global_batch_examples,
            micro_batch_examples=config.training.micro_batch_examples,
            seed=derived_seed(config.seed, "stream", self._spec.index) % 2**31,
            replay=[source for stage in earlier for source in self._sources(stage)],
            replay_fraction=config.continual.replay_fraction,
        )

    def _open_stream(self, cursor: dict[str, Any] | None) -> StreamLoader:
        config, world = self._config, self._context.world
        settings = self._stream_settings()
        start = None if cursor is None else Cursor.from_json(cursor)
        place = data_place(config.training, world)
        return build_loader(self._sources(self._stage), "train", settings, *place, start)

    def _split_batches(
        self, split: str, micro_batch: int, num_examples: int, seed: int | None, place: tuple[int, int]
    ) -> Iterator[Batch]:
        """`num_examples` of a split, an equal part from each dataset of the stage, for rank `place[0]` of `place[1]`."""
        sources, settings = self._sources(self._stage), self._stream_settings()
        share = -(-num_examples // len(sources))
        for source in sources:
            yield from iter_split(
                source.folder, split, micro_batch, *place, share, shuffle_seed=seed, settings=settings
            )

    def _validation_batches(self) -> Iterator[Batch]:
        training = self._config.training
        place = data_place(training, self._context.world)
        size, count = training.micro_batch_examples, training.num_validation_examples
        for batch in self._split_batches("validation", size, count, None, place):
            self._context.heart.beat()
            yield batch
        self._context.heart.wait()  # for the sum over the ranks

    def _remember(self, engine: Engine, memory: EwcMemory, tracker: Tracker) -> dict[str, Any] | None:
        """Measure what this stage needs kept and write it, merged with the stages before, to the stage's store."""
        continual, world = self._config.continual, self._context.world
        if continual.method not in PROTECTING:
            return None
        shards = engine.param_shards(with_gradients=False)
        if continual.method == "l2":
            memory.replace_by_l2(shards, self._spec.name)
        else:
            fisher, record = self._fisher(engine, tracker)
            memory.add_task(shards, fisher, record, continual.online_decay)
        self._context.check_together()
        save_store(self._folder.ewc, memory, world, engine.num_shard_copies)
        return dataclasses.asdict(memory.tasks[-1])

    def _fisher(self, engine: Engine, tracker: Tracker) -> tuple[Any, Any]:
        config, world = self._config.continual.fisher, self._context.world
        batches = lambda: self._split_batches(  # noqa: E731
            "train",
            config.micro_batch_examples,
            config.num_fisher_examples,
            config.seed,
            (world.rank, world.world_size),
        )
        total = sum(self._counts())
        heart = self._context.heart
        heart.beat(phase="fisher", step=0, num_steps=total)
        give_back_freed_memory()

        def progress(done: int, of: int) -> None:
            heart.beat(step=done, num_steps=of)
            self._context.leave_together()

        unfinished = self._folder.fisher_unfinished
        with undivided(engine.module):  # squares of gradients need each example's whole gradient on one rank
            fisher = run_fisher(engine, batches(), config, world, total, progress, unfinished)
        tracker.log_metrics({metric_names.FISHER_EXAMPLES: float(total)}, self._num_steps)
        return fisher, fisher_record(self._spec.name, config, total)

    def _counts(self) -> Iterator[int]:
        """Examples that the Fisher uses from each dataset, over all ranks."""
        from hsmn_dist.data.stream.loader import open_split

        sources = self._sources(self._stage)
        share = -(-self._config.continual.fisher.num_fisher_examples // len(sources))
        for source in sources:
            reader = open_split(source.folder, "train", self._stream_settings())
            yield min(len(reader), share)
            reader.close()

    def _export(self, engine: Engine, result: TrainResult) -> None:
        self._context.heart.beat(phase="export")
        self._context.check_together()
        facts = {"stage": self._spec.name, "run_id": self._context.folder.run_id, "step": result.best_step}
        export_weights(engine, self._config.model, self._folder.weights, facts)
        if self._context.world.is_first:
            shutil.copyfile(self._context.prepared["tokenizer"], self._folder.weights / TOKENIZER_NAME)
        self._context.heart.wait()
        barrier()

    def _draw(self, tracker: Tracker) -> None:
        """Losses and gradient norms of the stage, as pictures beside its metrics. Rank 0 alone."""
        if not self._context.world.is_first:
            return
        from hsmn_dist.evaluation.figures import gradient_figure, loss_figure  # matplotlib takes a second to import

        series, folder = read_series(self._folder.metrics), self._folder.path / "figures"
        folder.mkdir(exist_ok=True)
        for picture in (
            loss_figure({self._spec.name: series}, folder / "losses.png"),
            gradient_figure(series, folder / "gradient_norms.png"),
        ):
            tracker.log_figure(picture)

    def _summary(self, engine: Engine, result: TrainResult) -> dict[str, Any]:
        shapes = {shard.name: shard.shape for shard in engine.param_shards(with_gradients=False)}
        num_parameters = sum(_num_elements(shape) for shape in shapes.values())
        return broadcast_object(
            {
                "steps": result.num_steps,
                "target_tokens": result.num_tokens,
                "seconds": result.seconds,
                "first_validation_loss": result.first_loss,
                "best_validation_loss": result.best_loss,
                "last_validation_loss": result.last_loss,
                "best_step": result.best_step,
                "stopped_early": result.stopped_early,
                "lost_best_step": result.lost_best_step,
                "skipped_steps": result.num_skipped_steps,
                "rollbacks": result.num_rollbacks,
                "num_examples": result.num_examples,
                "num_parameters": num_parameters,
            }
        )


def recorded_examples(path: Path) -> dict[int, list[list[int]]]:
    """Step -> example indexes of each rank, from a stage's `examples.jsonl`, in the order of the steps."""
    lines = {int(event["step"]): event["examples"] for event in read_events(path)}
    return dict(sorted(lines.items()))


def _num_elements(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
