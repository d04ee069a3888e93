"""The cheapest layout that fits, and how a run scales to thousands of GPUs.

Unusual: the sweep keeps the global batch, because it changes what is learned; the scaling table keeps it as long as every rank
has an example, and then lets it grow, and says so. Layouts whose costs differ by less than the plan can tell apart count as tied.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from hsmn_dist.config.run import RunConfig
from hsmn_dist.foundation.errors import PlanError
from hsmn_dist.planner.flops import Lengths
from hsmn_dist.planner.parameters import ParameterCount, count_parameters
from hsmn_dist.planner.plan import Plan, on_nodes, plan, with_layout
from hsmn_dist.planner.throughput import Machines

POLICIES = ("none", "every_second_block", "every_block")
MAX_SCALED_GPUS = 4096
TIE_SHARE = 0.01
"""Costs that differ by less are tied: the assumptions behind them are no better than that."""


@dataclass(frozen=True)
class Question:
    """What stays the same over a sweep."""

    config: RunConfig
    machines: Machines
    price_per_gpu_hour: float | None = None
    mean: Lengths | None = None

    def answer(self, config: RunConfig, machines: Machines, parameters: ParameterCount) -> Plan:
        """The plan of one variant."""
        return plan(config, machines, self.price_per_gpu_hour, self.mean, parameters)


def sweep(question: Question) -> list[Plan]:
    """Every layout that fits, the cheapest first by GPU hours.

    ZeRO stage, micro-batch and accumulation, activation checkpointing, and nodes up to those asked for. Of those tied with the
    cheapest the first is the one with the most nodes, then the lowest ZeRO stage, then the largest micro-batch.

    Raises:
        PlanError: none fits, or the global batch can be dealt to no number of ranks.
    """
    parameters = count_parameters(question.config.model)
    plans: list[Plan] = []
    refused: list[Plan] = []
    for config, machines in _candidates(question):
        candidate = question.answer(config, machines, parameters)
        (plans if candidate.fits else refused).append(candidate)
    if not plans and not refused:
        raise _undealable(question)
    if not plans:
        raise min(refused, key=lambda p: p.memory.total).refusal()
    limit = min(p.gpu_hours for p in plans) * (1 + TIE_SHARE)
    tied = [p for p in plans if p.gpu_hours <= limit]
    others = [p for p in plans if p.gpu_hours > limit]
    tied.sort(key=lambda p: (-p.num_nodes, p.layout.zero_stage, -p.layout.micro_batch_examples, p.gpu_hours))
    return tied + sorted(others, key=lambda p: (p.gpu_hours, p.memory.total))


def _undealable(question: Question) -> PlanError:
    training, machines = question.config.training, question.machines
    shared = training.context_parallel
    worlds = [num_nodes * machines.gpus_per_node for num_nodes in _doubling(machines.num_nodes)]
    if all(world % shared for world in worlds):
        return PlanError(
            f"training.context_parallel {shared} on {_listed(worlds)} ranks",
            allowed=f"a number of ranks that is a multiple of {shared}",
            action="change training.context_parallel, --nodes or --gpus-per-node",
        )
    parts = training.data_ranks(worlds[-1])
    near = max(1, round(training.global_batch_examples / parts)) * parts
    return PlanError(
        f"training.global_batch_examples {training.global_batch_examples} on {_listed(worlds)} ranks"
        + (f", {shared} of which share each context" if shared > 1 else ""),
        allowed="a number of examples that the ranks divide evenly",
        action=f"for example --set training.global_batch_examples={near}, or another --gpus-per-node",
    )


def _listed(worlds: list[int]) -> str:
    return " or ".join(str(world) for world in worlds)


def _candidates(question: Question) -> Iterable[tuple[RunConfig, Machines]]:
    training = question.config.training
    is_deepspeed = training.engine == "deepspeed"
    stages = [0] if not is_deepspeed else [1, 2, 3] if training.precision == "bf16" else [0, 1, 2, 3]
    for num_nodes in _doubling(question.machines.num_nodes):
        machines = on_nodes(question.machines, num_nodes)
        if machines.world_size % training.context_parallel:
            continue
        per_rank, rest = divmod(training.global_batch_examples, training.data_ranks(machines.world_size))
        if rest:
            continue
        for stage in stages:
            for micro in (size for size in range(1, per_rank + 1) if per_rank % size == 0):
                for policy in POLICIES:
                    changes = {
                        "zero_stage": stage,
                        "micro_batch_examples": micro,
                        "activation_checkpointing": policy,
                    }
                    yield with_layout(question.config, **changes), machines


def scaling(question: Question, max_gpus: int = MAX_SCALED_GPUS) -> list[Plan]:
    """The configured layout on 1, 2, 4, ... nodes up to `max_gpus`.

    The global batch grows where there are more ranks than examples, and to the next multiple of the ranks; a micro-batch that does
    not fit is halved. Rows of fewer ranks than share a context, or of a number that they do not divide, are left out.

    Raises:
        PlanError: it fits nowhere.
    """
    parameters = count_parameters(question.config.model)
    plans: list[Plan] = []
    training, refusal = question.config.training, _undealable(question)
    for num_nodes in _doubling(max(1, max_gpus // question.machines.gpus_per_node)):
        machines = on_nodes(question.machines, num_nodes)
        if machines.world_size % training.context_parallel:
            continue
        parts = training.data_ranks(machines.world_size)
        batch = -(-max(training.global_batch_examples, parts) // parts) * parts
        config = with_layout(question.config, global_batch_examples=batch)
        micro = config.training.micro_batch_examples
        while True:
            candidate = question.answer(with_layout(config, micro_batch_examples=micro), machines, parameters)
            if candidate.fits or micro == 1:
                break
            micro //= 2
        if candidate.fits:
            plans.append(candidate)
        else:
            refusal = candidate.refusal()
    if not plans:
        raise refusal
    return plans


def scaling_efficiency(plans: list[Plan]) -> list[float]:
    """Tokens per second and GPU of each plan, as a share of the first one's."""
    rates = [p.tokens_per_second / (p.num_nodes * p.gpus_per_node) for p in plans]
    return [rate / rates[0] for rate in rates]


def _doubling(last: int) -> list[int]:
    """1, 2, 4, ... and `last`."""
    counts = []
    count = 1
    while count < last:
        counts.append(count)
        count *= 2
    return [*counts, last]
