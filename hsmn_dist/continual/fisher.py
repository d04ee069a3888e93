"""Diagonal Fisher of a module by any of six named estimators, on shards, on any number of ranks.

`FisherPass` is fed micro-batches; what a micro-batch is, only the `loss` function knows. The per-example estimators run one
batched backward pass per micro-batch through taps (`example_gradients.py`), or one backward pass per example
(`fisher_reference.py`) where a parameter has no rule. The first micro-batch is computed both ways, and a difference switches
the slow way on: a model that hides which example a row belongs to must not give a wrong Fisher quietly.

Examples are counted in the order in which micro-batches are dealt to ranks (blocks of one micro-batch, rank after rank) and
padding is not counted, so that groups of the `_sum` estimators are the same examples for every number of ranks, though each
of several datasets ends with padding of its own, which depends on that number.

Source: continual.md section 3; van de Ven 2025, arXiv 2502.11756.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from hsmn_dist.config.continual import Estimator, FisherConfig
from hsmn_dist.continual.ewc import TaskRecord
from hsmn_dist.continual.example_gradients import ExampleGradients, Uncovered, UnknownRowsError
from hsmn_dist.continual.fisher_reference import CHUNK_ELEMENTS, add_squares_one_by_one, gradients, parameter_chunks
from hsmn_dist.continual.shard_sums import ShardSums
from hsmn_dist.continual.square_sums import Use, add_squares, add_sum
from hsmn_dist.distributed.collectives import all_reduce_sum, any_rank, rank_and_world_size
from hsmn_dist.distributed.shards import ParamShard
from hsmn_dist.foundation.errors import ModelError
from hsmn_dist.foundation.log import logger

Batch = Mapping[str, Any]
Loss = Callable[[Batch, Tensor], Tensor]
"""(micro-batch, weights [rows]) -> sum over rows of weight * loss of the row, a scalar; rows of padding give 0."""

GROUPED: tuple[Estimator, ...] = ("sampled_sum", "signed_sum")
RowLoss = Callable[[Batch, int], Tensor]
"""(micro-batch, row) -> the loss of that row alone, a scalar."""
_AGREEMENT, _NOISE = 5e-4, 1e-6
_HALF_AGREEMENT, _HALF_NOISE = 2.5e-2, 1e-4
_MAY_BE_ROUNDING = 8.0
_MAX_CHECKS = 3
_LOG = logger(__name__)


def group_size(config: FisherConfig, num_examples: int) -> int:
    """Examples in a group of the `_sum` estimators (the last group may be smaller)."""
    return -(-num_examples // min(config.num_groups, num_examples))


def fisher_record(stage: str, config: FisherConfig, num_examples: int) -> TaskRecord:
    """How a Fisher was measured, for the store.

    The relative error is that of a variance estimated from normal samples, sqrt(2 / samples): samples are the groups of
    the `_sum` estimators and of `microbatch`, else the examples.
    """
    num_groups = 0
    if config.estimator in GROUPED:
        num_groups = -(-num_examples // group_size(config, num_examples))
    elif config.estimator == "microbatch":
        num_groups = -(-num_examples // config.micro_batch_examples)
    return TaskRecord(
        stage=stage,
        estimator=config.estimator,
        num_examples=num_examples,
        seed=config.seed,
        example_reduction=config.example_reduction,
        num_groups=num_groups,
        relative_error=math.sqrt(2.0 / max(1, num_groups or num_examples)),
    )


class FisherPass:
    """One estimation over a stream of micro-batches. Every method is collective.

    Use: `for batch in batches: fisher.add(batch)`, then `fisher.result()`, then `close()`.
    """

    def __init__(
        self,
        module: nn.Module,
        shards: Sequence[ParamShard],
        loss: Loss,
        config: FisherConfig,
        num_examples: int,
        keeps_whole: bool = True,
        device: torch.device | None = None,
        row_loss: RowLoss | None = None,
    ) -> None:
        """Prepare a pass.

        Args:
            module: the model; in evaluation mode while a micro-batch runs.
            shards: this rank's ranges of the parameters whose Fisher is wanted.
            loss: weighted sum of the examples' losses, labels chosen by the estimator.
            config: estimator, groups, seed.
            num_examples: examples over all ranks, by which the sums are divided.
            keeps_whole: False where weights are partitioned (ZeRO-3): reduce layer by layer.
            device: where gradients are made; None: where the shards live.
            row_loss: for a `loss` that draws labels as it goes, so that a row alone is not what it is in its micro-batch;
                None: `loss` of the row alone.
        """
        self._module = module
        self._loss = loss
        self._config = config
        self._num_examples = num_examples
        self._shards = list(shards)
        by_name = dict(module.named_parameters(remove_duplicate=False))
        missing = [shard.name for shard in shards if shard.name not in by_name]
        if missing or num_examples < 1:
            raise ModelError(
                f"a Fisher over {num_examples} examples of {len(shards)} shards; not in the model: {missing[:5]}",
                allowed="at least one example, and shards of this model's parameters",
                action="pass the shards of the same engine, and a split that is not empty",
            )
        self._parameters: dict[str, nn.Parameter] = {shard.name: by_name[shard.name] for shard in shards}
        self._max_elements = None if keeps_whole else CHUNK_ELEMENTS
        self._sums = ShardSums(shards, keeps_whole, device)
        self._is_grouped = config.estimator in GROUPED
        self._squares = [torch.zeros_like(shard.value) for shard in shards] if self._is_grouped else []
        # FSDP gives the whole gradient of no example to a sharded parameter: only the batched path is right there.
        self._is_sharded = any(hasattr(parameter, "to_local") for parameter in self._parameters.values())
        is_compared = config.checks_fast_path and not self._is_sharded
        self._taps = ExampleGradients(module, self._parameters, expands_single_rows=is_compared)
        self._row_loss = row_loss or (lambda batch, row: loss(one_row(batch, row), torch.ones(1)))
        self._draws_labels = row_loss is not None
        self._is_batched = True
        self._is_doubtful = False
        self._num_checks, self._num_rows_checked = 0, 0
        self._rank, self._world_size = rank_and_world_size()
        self._num_means = torch.zeros((), dtype=torch.int64)
        self._num_placed = torch.zeros((), dtype=torch.int64)
        self.num_batches = 0

    @property
    def is_batched(self) -> bool:
        """True while per-example gradients come from one batched backward pass."""
        return self._is_batched

    def add(self, batch: Batch) -> None:
        """Add one micro-batch of this rank; all ranks call it the same number of times, with the same number of rows."""
        with _evaluating(self._module), _uncompiled(), self._taps.installed():
            if self._is_batched and self._num_rows_checked < min(2, num_rows(batch)):
                self._choose_way(batch)
            if self._is_grouped:
                self._add_groups(batch)
            elif self._config.estimator == "microbatch":
                self._add_squared_mean(batch)
            else:
                self._add_squares(batch)
        if self._is_doubtful:
            self._is_batched, self._is_doubtful = True, False
        self.num_batches += 1

    def result(self) -> list[Tensor]:
        """The Fisher of each shard, [stop - start]."""
        totals, count = self._sums.totals(), self._num_examples
        if self._is_grouped:
            # What is left in the sums is the last group, when it is not full.
            return [(squares + left * left) / count for squares, left in zip(self._squares, totals, strict=True)]
        if self._config.estimator == "microbatch":
            count = max(1, int(all_reduce_sum(self._num_means.clone())))
        return [total / count for total in totals]

    def state(self) -> dict[str, list[Tensor]]:
        """What an interrupted pass needs to go on, besides `num_batches`."""
        return {"sums": self._sums.totals(), "squares": self._squares, "counts": [self._num_means, self._num_placed]}

    def restore(self, state: Mapping[str, Sequence[Tensor]], num_batches: int) -> None:
        """Continue behind the first `num_batches` micro-batches."""
        self._sums.restore(state["sums"])
        for mine, saved in zip(self._squares, state.get("squares", []), strict=True):
            mine.copy_(saved)
        self._num_means.copy_(state["counts"][0])
        self._num_placed.copy_(state["counts"][1])
        self.num_batches = num_batches

    def close(self) -> None:
        """Free the reduction group."""
        self._sums.close()

    def _add_squares(self, batch: Batch) -> None:
        rows = num_rows(batch)
        if self._is_batched:
            weights = torch.ones(rows)
            self._run_taps(batch, weights, lambda name, uses: add_squares(uses, rows, self._sums.buffer(name)))
        else:
            for chunk in parameter_chunks(self._shards, self._parameters, self._max_elements):
                add_squares_one_by_one(lambda row: self._row_loss(batch, row), rows, chunk, self._sums.buffer)
                self._chunk_done(chunk)
        self._sums.end_pass()

    def _add_squared_mean(self, batch: Batch) -> None:
        """`microbatch`: the gradient of the micro-batch's mean loss, squared."""
        num_valid = int(valid_rows(batch).sum())
        weights = torch.full((num_rows(batch),), 1.0 / max(1, num_valid))
        self._num_means += num_valid > 0

        def add(name: str, uses: list[Use]) -> None:
            total = self._sums.buffer(name)
            gradient = torch.zeros_like(total)
            add_sum(uses, gradient)
            total.addcmul_(gradient, gradient)

        if self._is_batched:
            self._run_taps(batch, weights, add)
        else:
            for chunk in parameter_chunks(self._shards, self._parameters, self._max_elements):
                add_squares_one_by_one(lambda _: self._loss(batch, weights), 1, chunk, self._sums.buffer)
                self._chunk_done(chunk)
        self._sums.end_pass()

    def _add_groups(self, batch: Batch) -> None:
        """`_sum` estimators: the gradient of a whole group over all ranks, squared on the shards."""
        size = group_size(self._config, self._num_examples)
        first, stop, places = self._places(batch)
        for group in range(first // size, -(-stop // size)):
            self._add_sum(batch, (places // size == group).float())
            if (group + 1) * size <= stop:
                for squares, total in zip(self._squares, self._sums.totals(clears=True), strict=True):
                    squares.addcmul_(total, total)

    def _places(self, batch: Batch) -> tuple[int, int, Tensor]:
        """(first, last + 1) place of what all ranks see now, counted in examples, and this rank's places; -1: padding."""
        is_example = valid_rows(batch)
        counts = torch.zeros(self._world_size, dtype=torch.int64)
        counts[self._rank] = is_example.sum()
        all_reduce_sum(counts)
        first = int(self._num_placed)
        own = first + int(counts[: self._rank].sum()) + is_example.long().cumsum(0) - 1
        self._num_placed += counts.sum()
        return first, int(self._num_placed), own.masked_fill(~is_example, -1)

    def _add_sum(self, batch: Batch, weights: Tensor) -> None:
        if self._is_batched:
            self._run_taps(batch, weights, lambda name, uses: add_sum(uses, self._sums.buffer(name)))
        else:
            for chunk in parameter_chunks(self._shards, self._parameters, self._max_elements):
                for name, gradient in gradients(self._loss(batch, weights), chunk).items():
                    self._sums.buffer(name).add_(gradient)
                self._chunk_done(chunk)
        self._sums.end_pass()

    def _run_taps(self, batch: Batch, weights: Tensor, add: Callable[[str, list[Use]], None]) -> None:
        def finished(name: str, uses: list[Use]) -> None:
            add(name, uses)
            self._sums.done(name)

        self._taps.run(lambda: self._loss(batch, weights), num_rows(batch), finished)

    def _chunk_done(self, chunk: Mapping[str, nn.Parameter]) -> None:
        for name in chunk:
            self._sums.done(name)

    def _choose_way(self, batch: Batch) -> None:
        """Compare both ways; all ranks take the slow way when one of them must.

        What is compared is one number for each parameter, the norm of its gradients: no second copy of the model is needed,
        and rows given to a wrong example, or a use that no rule saw, change it. A difference that may be rounding is looked
        at again on the next micro-batch, and this one goes the slow way.
        """
        self._num_checks += 1
        rows = num_rows(batch)
        fast, problem = self._fast_sums(batch, rows)
        is_clear = bool(problem)
        if self._is_sharded:
            self._refuse_uncovered(problem)
        elif self._config.checks_fast_path and not any_rank(bool(problem)):
            problem, excess = _difference(fast, self._slow_sums(batch, rows), self._parameters)
            is_clear = not excess <= _MAY_BE_ROUNDING
        if not any_rank(bool(problem)):
            # Of a single row nobody can see whether rows are told apart.
            self._num_rows_checked = rows
            return
        self._is_batched = False
        self._is_doubtful = not any_rank(is_clear) and self._num_checks < _MAX_CHECKS
        again = "; this micro-batch alone, it may be rounding" if self._is_doubtful else ""
        _LOG.warning("Fisher by one backward pass per example; the batched path cannot be used: %s%s", problem, again)

    def _fast_sums(self, batch: Batch, rows: int) -> tuple[dict[str, float], str]:
        """(sum of squares by parameter, what keeps the batched path from being used)."""
        fast: dict[str, float] = {}

        def add(name: str, uses: list[Use]) -> None:
            total = self._sums.new_buffer(name)
            add_squares(uses, rows, total)
            fast[name] = float(total.sum(dtype=torch.float64))

        try:
            self._taps.run(lambda: self._loss(batch, torch.ones(rows)), rows, add)
        except Uncovered as error:
            return fast, f"no rule for {error}"
        except UnknownRowsError as error:
            return fast, str(error)
        return fast, ""

    def _slow_sums(self, batch: Batch, rows: int) -> dict[str, float]:
        sums: dict[str, float] = {}
        for row in range(rows):
            for chunk in parameter_chunks(self._shards, self._parameters, self._max_elements):
                if self._draws_labels:
                    loss = self._loss(batch, torch.eye(rows)[row])
                else:
                    loss = self._row_loss(batch, row)
                for name, gradient in gradients(loss, chunk).items():
                    sums[name] = sums.get(name, 0.0) + float(gradient.double().square().sum())
        return sums

    def _refuse_uncovered(self, problem: str) -> None:
        if any_rank(bool(problem)):
            raise ModelError(
                f"a Fisher of sharded parameters (DTensor): {problem or 'see the error of another rank'}",
                allowed="parameters of Linear, Embedding, LayerNorm, RMSNorm and Conv1D, one row an example",
                action="use EWC on a model that is not sharded by FSDP, or freeze these parameters",
            )


def num_rows(batch: Batch) -> int:
    """Examples of a micro-batch: the first dimension of its first tensor."""
    return int(next(value for value in batch.values() if isinstance(value, Tensor)).shape[0])


def valid_rows(batch: Batch) -> Tensor:
    """[rows] bool: rows that are examples and not padding (all of them without a `loss_mask`)."""
    mask = batch.get("loss_mask")
    return torch.ones(num_rows(batch), dtype=torch.bool) if mask is None else mask.any(1)


def one_row(batch: Batch, row: int) -> dict[str, Any]:
    """One example of a micro-batch as a micro-batch of its own."""
    return {key: value[row : row + 1] if isinstance(value, Tensor) else value for key, value in batch.items()}


def _difference(
    fast: Mapping[str, float], slow: Mapping[str, float], parameters: Mapping[str, nn.Parameter]
) -> tuple[str, float]:
    """The parameter on which the two ways disagree most, and by how many times what is allowed; ("", 0.0) where none does.

    Rounding is relative to what was added up on the way, which may be far more than what is left: gradients that are zero
    in exact arithmetic (keys' biases) are noise on both ways. So a small share of the model's largest norm is allowed, too.
    """
    largest = math.sqrt(max(slow.values(), default=0.0))
    worst, excess = "", 0.0
    for name, parameter in parameters.items():
        is_half = parameter.dtype in (torch.float16, torch.bfloat16)
        agreement, noise = (_HALF_AGREEMENT, _HALF_NOISE) if is_half else (_AGREEMENT, _NOISE)
        found, expected = math.sqrt(fast.get(name, 0.0)), math.sqrt(slow.get(name, 0.0))
        difference, bound = abs(found - expected), agreement * expected + noise * largest
        times = difference / bound if bound > 0 else math.inf if difference > 0 else 0.0
        if not times <= max(1.0, excess):
            worst, excess = (
                f"the gradients of {name} have norm {found:.4g} batched and {expected:.4g} one by one",
                times,
            )
    return worst, excess


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Dropout off inside; every submodule's own mode afterwards."""
    modes = [(child, child.training) for child in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for child, mode in modes:
            child.training = mode


def _uncompiled() -> AbstractContextManager[Any]:
    """Inside, compiled modules run as they are written: a compiled graph neither calls hooks nor announces rows."""
    # Nothing is compiled where dynamo was never imported, and importing it takes seconds.
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
