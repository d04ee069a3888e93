"""train(): one stage on one rank, the step readable as prose.

Unusual: everything that decides the course (weights, moments, stream position, random states, early stopping) is in the checkpoint,
so a stage that was interrupted and resumed ends with the same bits as one that was not (fp32, CPU, same ranks). Ranks agree on
tokens and on a wish to stop by one small CPU reduction a step, before the forward pass; losses and the gradient norm are global
numbers, so every rank takes the same decisions without asking.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from hsmn_dist.config.training import TrainingConfig
from hsmn_dist.distributed.collectives import all_reduce_sum
from hsmn_dist.distributed.shards import ParamShard
from hsmn_dist.distributed.world import World
from hsmn_dist.foundation.errors import Preempted
from hsmn_dist.foundation.log import logger
from hsmn_dist.models.contract import ModelInput
from hsmn_dist.models.hope.memory_health import dead_levels
from hsmn_dist.tracking import metric_names as names
from hsmn_dist.training.checkpoint import Checkpointer, TrainState
from hsmn_dist.training.engine import Engine, StepStats
from hsmn_dist.training.meters import StepMeter
from hsmn_dist.training.stragglers import report_straggler
from hsmn_dist.training.trouble import Verdict, check_budget, judge

log = logger(__name__)

Batch = Mapping[str, Tensor]
HEALTH_POINTS = 64
"""Logged steps that are looked at for memory levels that never learn."""


class Stream(Protocol):
    """What the loop sees of a loader: one list of micro-batches per optimizer step, and where it stands."""

    def __iter__(self) -> Iterator[list[Any]]:
        """Micro-batches of each step, for this rank."""
        ...

    def cursor(self) -> Any:
        """Position after the batches handed out; `.to_json()` gives plain values."""
        ...


class Penalty(Protocol):
    """What keeps earlier stages; `continual.ewc.EwcPenalty` is one."""

    def add_gradients(self, shards: Sequence[ParamShard]) -> None:
        """Add to the accumulated gradients, before clipping."""
        ...

    def after_step(self, shards: Sequence[ParamShard], learning_rate: float) -> bool:
        """Edit the weights after the step; True when it did."""
        ...

    def local_value(self, shards: Sequence[ParamShard]) -> Tensor:
        """This rank's part of the value; the sum over ranks is the penalty."""
        ...


class WeightMask(Protocol):
    """What holds weights at zero (`sparsity.PruningMask`)."""

    def after_step(self, shards: Sequence[ParamShard], step: int) -> bool:
        """Apply after optimizer step `step`; True when values were edited."""
        ...

    def read(self, shards: Sequence[ParamShard], step: int) -> None:
        """Take up the masks of a checkpoint after `step` steps from the weights that it brought back."""
        ...

    def metrics(self) -> dict[str, float]:
        """Named numbers for the tracker."""
        ...


class MetricSink(Protocol):
    """The part of a tracker that the loop uses."""

    def log_metrics(self, values: Mapping[str, float], step: int) -> None:
        """Record numbers at a step."""
        ...

    def rewind(self, step: int) -> None:
        """Forget the numbers at a step and beyond: it will be taken again."""
        ...


def _no_beat(step: int, loss: float | None, tokens_per_second: float | None) -> None:
    return None


def _never() -> bool:
    return False


@dataclass
class TrainParts:
    """Everything that a stage trains with.

    Attributes:
        engine: the model in training, with the weights that the stage starts from.
        world: this rank.
        training: batches, cadence, patience.
        num_steps: optimizer steps of the stage.
        learning_rate: rate of a step (0-based).
        open_stream: gives the training stream at a stored position, or at its start for None.
        validation_batches: gives the validation micro-batches of this rank, the same ones and as many on every rank.
        checkpointer: where checkpoints go.
        tracker: where numbers go (a null tracker on ranks above 0).
        penalty: what keeps earlier stages, if anything.
        mask: pruning, if any.
        on_step: called after each step with the steps done, the loss and tokens per second (heartbeat).
        should_stop: true when the machine asked this rank to leave; the ranks agree on it.
        record_examples: called on every rank after each step with its number and this rank's example indexes, if anybody asks.
    """

    engine: Engine
    world: World
    training: TrainingConfig
    num_steps: int
    learning_rate: Callable[[int], float]
    open_stream: Callable[[dict[str, Any] | None], Stream]
    validation_batches: Callable[[], Iterable[Batch]]
    checkpointer: Checkpointer
    tracker: MetricSink
    penalty: Penalty | None = None
    mask: WeightMask | None = None
    on_step: Callable[[int, float | None, float | None], None] = _no_beat
    should_stop: Callable[[], bool] = _never
    record_examples: Callable[[int, list[int]], None] | None = None


@dataclass
class TrainResult:
    """How a stage ended; JSON-able by `dataclasses.asdict`.

    Attributes:
        num_steps: optimizer steps done.
        stopped_early: patience ran out before the last step.
        first_loss, best_loss, last_loss: validation losses in nats per token (before training, best, last).
        best_step: step of the best loss, whose weights the engine now holds.
        lost_best_step: step of a better loss whose weights could not be had again; `best_step` and `best_loss` are then
            those of the last step, as the engine's weights are. None where nothing was lost.
        validations: (step, loss) of each validation.
        num_tokens, num_examples: trained on, all ranks together.
        num_skipped_steps, num_rollbacks: see `training.on_non_finite`.
        seconds: of this process, since it began or resumed.
        dead_memory_levels: memory levels that the last logged steps never saw learning (rank 0's batches).
    """

    num_steps: int
    stopped_early: bool
    first_loss: float
    best_loss: float
    last_loss: float
    best_step: int
    num_tokens: int
    num_examples: int
    num_skipped_steps: int
    num_rollbacks: int
    seconds: float
    validations: list[tuple[int, float]] = field(default_factory=list)
    dead_memory_levels: list[str] = field(default_factory=list)
    lost_best_step: int | None = None


def train(parts: TrainParts) -> TrainResult:
    """Train a stage from its start or from its newest checkpoint; the engine ends with the best weights.

    Raises:
        Preempted: `should_stop` was true on a rank; a checkpoint was written.
        StageFailed: kind "non_finite", by `training.on_non_finite`.
    """
    return _Stage(parts).run()


@dataclass(frozen=True)
class _Counts:
    """Global facts of a batch, summed over ranks before the forward pass.

    `num_scored` counts a target once for each rank that scores it: more often than `num_targets` where ranks share rows.
    """

    num_scored: int
    num_targets: int
    num_tokens: int
    num_examples: int
    asks_to_stop: bool


class _Stage:
    def __init__(self, parts: TrainParts) -> None:
        self._parts = parts
        self._engine = parts.engine
        self._training = parts.training
        self._meter = StepMeter(parts.world.device)
        self._started = time.monotonic()
        self._health: list[dict[str, float]] = []
        restored = parts.checkpointer.restore(parts.engine)
        self._state = restored or TrainState()
        if parts.mask is not None:
            parts.mask.read(parts.engine.param_shards(with_gradients=False), self._state.step)
        if restored is not None:
            log.info("resumed at step %d of %d", restored.step, parts.num_steps)

    def run(self) -> TrainResult:
        stream = self._parts.open_stream(self._state.cursor)
        try:
            return self._run(stream)
        except Exception:
            self._parts.checkpointer.abandon()
            raise
        finally:
            close = getattr(stream, "close", None)
            if close is not None:
                close()

    def _run(self, stream: Stream) -> TrainResult:
        batches = iter(stream)
        if not self._state.validations:
            self._validate()
        while self._state.step < self._parts.num_steps and not self._is_out_of_patience():
            with self._meter.part("data"):
                handed_out = next(batches)
                batch = [_as_model_input(micro) for micro in handed_out]
                counts = self._count(batch)
            if counts.asks_to_stop:
                self._leave()
            cursor = stream.cursor().to_json()
            has_advanced = self._step(batch, counts)
            self._state.cursor = cursor
            if has_advanced:
                if self._parts.record_examples is not None:
                    self._parts.record_examples(self._state.step - 1, _example_indexes(handed_out))
                self._keep_up()
            else:
                self._save()
        return self._finish()

    def _step(self, batch: list[ModelInput], counts: _Counts) -> bool:
        """One optimizer step; False when training went back to a checkpoint instead."""
        parts, meter, step = self._parts, self._meter, self._state.step
        rate = parts.learning_rate(step)
        is_logged = (step + 1) % self._training.log_every_steps == 0 or step + 1 == parts.num_steps
        with meter.part("forward_backward"):
            nll = self._forward_backward(batch, counts)
        with meter.part("penalty"):
            penalty = self._add_penalties(is_logged)
        with meter.part("optimizer"):
            stats, loss, verdict = self._optimize(step, nll, counts, rate)
        if verdict == "rollback" and self._roll_back():
            return False
        meter.end_step(counts.num_tokens)
        self._state.step += 1
        self._state.num_tokens += counts.num_targets
        self._state.num_examples += counts.num_examples
        if is_logged:
            self._log(step, loss, penalty, stats)
        parts.on_step(self._state.step, loss, meter.tokens_per_second)
        return True

    def _count(self, batch: list[ModelInput]) -> _Counts:
        targets = sum(int(micro.loss_mask.sum()) for micro in batch)
        contexts = sum(int(micro.context_mask.sum()) for micro in batch)
        examples = sum(int(micro.loss_mask.any(1).sum()) for micro in batch)
        facts = torch.tensor([targets, targets + contexts, examples, int(self._parts.should_stop())])
        total = [int(value) for value in all_reduce_sum(facts)]
        copies = self._training.context_parallel
        return _Counts(total[0], total[0] // copies, total[1] // copies, total[2] // copies, total[3] > 0)

    def _forward_backward(self, batch: list[ModelInput], counts: _Counts) -> Tensor:
        """This rank's sum of losses, left on the device: nothing waits for it here."""
        total = torch.zeros((), device=self._parts.world.device)
        self._engine.begin_step(len(batch))
        for micro in batch:
            total += self._engine.forward_backward(micro, max(counts.num_scored, 1))
        return total

    def _add_penalties(self, is_logged: bool) -> float:
        penalty, l2, value = self._parts.penalty, self._training.l2, 0.0
        if penalty is None and l2 == 0:
            return value
        shards = self._engine.param_shards()
        if penalty is not None:
            penalty.add_gradients(shards)
            if is_logged:
                value = float(all_reduce_sum(penalty.local_value(shards)))
        if l2:
            for shard in shards:
                assert shard.gradient is not None
                shard.gradient.add_(shard.value.to(shard.gradient.dtype), alpha=2 * l2)
        return value

    def _optimize(self, step: int, nll: Tensor, counts: _Counts, rate: float) -> tuple[StepStats, float, Verdict]:
        """The update, unless the step's loss or gradient norm is to be skipped; also the loss in nats per target token."""
        state, training = self._state, self._training
        verdict: Verdict = "go_on"

        def accepts(nll_sum: float, gradient_norm: float) -> bool:
            nonlocal verdict
            verdict = judge(training, step, nll_sum / max(counts.num_scored, 1), gradient_norm, state.recent_losses)
            return verdict == "go_on"

        stats = self._engine.step(rate, nll, accepts)
        loss = stats.nll / max(counts.num_scored, 1)
        if verdict == "go_on":
            state.recent_losses = [*state.recent_losses, loss][-training.spike_window_steps :]
            self._edit_weights(step, rate)
        else:
            log.warning("step %d: loss %g, gradient norm %g: %s", step, loss, stats.gradient_norm, verdict)
            state.num_skipped_steps += 1
            is_finite = math.isfinite(loss) and math.isfinite(stats.gradient_norm)
            check_budget(training, step, state.num_skipped_steps, is_finite)
        return stats, loss, verdict

    def _edit_weights(self, step: int, rate: float) -> None:
        parts = self._parts
        if parts.penalty is None and parts.mask is None:
            return
        shards = self._engine.param_shards(with_gradients=False)
        was_edited = parts.penalty is not None and parts.penalty.after_step(shards, rate)
        if parts.mask is not None:
            was_edited = parts.mask.after_step(shards, step) or was_edited
        if was_edited:
            self._engine.refresh()

    def _roll_back(self) -> bool:
        """Weights, moments and counters of the last checkpoint; the stream goes on behind the batch that failed."""
        now, parts = self._state, self._parts
        before = parts.checkpointer.restore(self._engine)
        if before is None:
            log.warning("there is no checkpoint to go back to: the batch is left out instead")
            return False
        before.num_skipped_steps, before.num_rollbacks = now.num_skipped_steps, now.num_rollbacks + 1
        self._state = before
        parts.tracker.rewind(before.step)  # the steps since then were other ones than those that come
        if parts.mask is not None:
            parts.mask.read(self._engine.param_shards(with_gradients=False), before.step)
        return True

    def _keep_up(self) -> None:
        """Validation, then a checkpoint, where they are due."""
        step, training = self._state.step, self._training
        is_last = step >= self._parts.num_steps
        if step % training.validate_every_steps == 0 or is_last:
            self._validate()
        if step % training.checkpoint_every_steps == 0 or is_last:
            self._save()

    def _save(self) -> None:
        with self._meter.part("checkpoint"):
            self._parts.checkpointer.save(self._engine, self._state, self._training.saves_in_background)

    def _validate(self) -> None:
        state, started = self._state, time.perf_counter()
        sums = torch.zeros(2, dtype=torch.float64)
        for batch in self._parts.validation_batches():
            nll, num_tokens = self._engine.evaluate(_as_model_input(batch))
            sums += torch.tensor([float(nll), float(num_tokens)], dtype=torch.float64)
        nll_sum, num_tokens_sum = all_reduce_sum(sums).tolist()
        loss = nll_sum / max(num_tokens_sum, 1.0)
        state.validations.append((state.step, loss))
        best = state.best_loss
        if best is None or (math.isfinite(loss) and not loss >= best):
            state.best_loss, state.best_step, state.num_bad_validations = loss, state.step, 0
            self._parts.checkpointer.save_best(self._engine, state, self._training.saves_in_background)
        else:
            state.num_bad_validations += 1
        values = {
            names.VALIDATION_LOSS: loss,
            names.VALIDATION_BEST_LOSS: loss if best is None else min(loss, best),
            names.VALIDATION_PERPLEXITY: math.exp(min(loss, 700.0)),
            names.VALIDATION_TOKENS: num_tokens_sum / self._training.context_parallel,
            names.VALIDATION_SECONDS: time.perf_counter() - started,
        }
        self._parts.tracker.log_metrics(values, max(state.step - 1, 0))

    def _is_out_of_patience(self) -> bool:
        return self._state.num_bad_validations >= self._training.patience

    def _log(self, step: int, loss: float, penalty: float, stats: StepStats) -> None:
        state = self._state
        values = {
            names.TRAIN_LOSS: loss,
            names.TRAIN_PENALTY: penalty,
            names.TRAIN_GRADIENT_NORM: stats.gradient_norm,
            names.TRAIN_CLIP_FACTOR: stats.clip_factor,
            names.TRAIN_LEARNING_RATE: stats.learning_rate,
            names.TRAIN_TOKENS: float(state.num_tokens),
            names.TRAIN_EXAMPLES: float(state.num_examples),
            names.TRAIN_SKIPPED_STEPS: float(state.num_skipped_steps),
        }
        values |= {names.gradient_norm_of(part): norm for part, norm in stats.component_norms.items()}
        values |= self._parts.mask.metrics() if self._parts.mask is not None else {}
        straggler = report_straggler(self._engine.forward_timer.take(), step)
        values |= {names.PERF_SLOWEST_RANK: float(straggler.rank), names.PERF_STRAGGLER_RATIO: straggler.ratio}
        health = self._engine.model_health()
        self._health = [*self._health, health][-HEALTH_POINTS:]
        values |= health
        self._parts.tracker.log_metrics({**values, **self._meter.take()}, step)

    def _leave(self) -> None:
        self._save()
        self._parts.checkpointer.wait()
        raise Preempted(
            f"asked to leave before step {self._state.step}; a checkpoint was written",
            allowed="starting the same command again",
            action="resume the run",
        )

    def _finish(self) -> TrainResult:
        state = self._state
        if dead := dead_levels(self._health):
            log.warning("memory levels that never learned in the last %d logged steps: %s", len(self._health), dead)
        self._parts.checkpointer.wait()
        assert state.best_loss is not None
        best_loss, best_step, lost = state.best_loss, state.best_step, None
        if state.best_step != state.step and not self._parts.checkpointer.restore_best(self._engine, state):
            # What is reported is what is exported: a loss beside weights that never had it would be a wrong label.
            (best_step, best_loss), lost = (state.step, state.validations[-1][1]), state.best_step
            log.warning(
                "the weights of best step %d (loss %g) are gone: those of step %d (loss %g) stay and are reported",
                state.best_step,
                state.best_loss,
                best_step,
                best_loss,
            )
        return TrainResult(
            num_steps=state.step,
            stopped_early=state.step < self._parts.num_steps,
            first_loss=state.validations[0][1],
            best_loss=best_loss,
            last_loss=state.validations[-1][1],
            best_step=best_step,
            num_tokens=state.num_tokens,
            num_examples=state.num_examples,
            num_skipped_steps=state.num_skipped_steps,
            num_rollbacks=state.num_rollbacks,
            seconds=time.monotonic() - self._started,
            validations=list(state.validations),
            dead_memory_levels=dead,
            lost_best_step=lost,
        )


_FIELDS = tuple(entry.name for entry in dataclasses.fields(ModelInput))


def _example_indexes(micro_batches: Iterable[Any]) -> list[int]:
    """Indexes of the examples in a rank's micro-batches; rows that only fill up have index -1."""
    return [index for micro in micro_batches for index in micro["example_index"].tolist() if index >= 0]


def _as_model_input(batch: Batch | ModelInput) -> ModelInput:
    if isinstance(batch, ModelInput):
        return batch
    return ModelInput(**{name: batch[name] for name in _FIELDS if name in batch})
