"""plan(): does a run fit, what is the largest term, how long, how dear; before any GPU is taken.

Unusual: memory is planned for the longest examples that the configuration allows, time for the mean lengths that the caller
names (the longest ones when it names none). Scoring by generation is not in the hours.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from hsmn_dist.config.models import HsmnConfig
from hsmn_dist.config.optim import AdamConfig
from hsmn_dist.config.run import RunConfig
from hsmn_dist.foundation.errors import PlanError
from hsmn_dist.planner.communication import StepTraffic, Traffic, context_traffic, step_traffic
from hsmn_dist.planner.fisher_memory import measures_fisher
from hsmn_dist.planner.flops import Lengths, encoded_chunks, forward_flops
from hsmn_dist.planner.memory import FISHER_PASS, Layout, Memory, memory_per_rank
from hsmn_dist.planner.optimizer_states import optimizer_load
from hsmn_dist.planner.parameters import ParameterCount, count_parameters
from hsmn_dist.planner.throughput import (
    Machines,
    StepTime,
    kernels_per_micro_batch,
    model_flops_utilization,
    step_time,
)

RESERVE_SHARE = 0.08
"""Assumption: share of a device's memory for the driver's context, NCCL and fragmentation."""
FP32 = 4
CHECKPOINT_SHARE = 0.05
"""A checkpoint should take no more than this share of the time between two checkpoints."""
SHARD_BYTES_PER_TOKEN = 8
"""Assumption: about 4 bytes of token id and 4 of text per token in a tar shard."""


@dataclass(frozen=True)
class Plan:
    """The answer.

    Attributes:
        name: the run's name.
        parameters: elements of the model.
        layout: ranks, ZeRO stage, micro-batch, checkpointing.
        global_batch_examples, micro_batches: examples per optimizer step; micro-batches per rank in it.
        memory: bytes per rank by kind; `usable_bytes` is what the device has for them.
        flops_per_token: model FLOPs of training, per token of context or target.
        step: seconds of a step and its parts.
        tokens_per_second, mfu: over all ranks.
        hours, gpu_hours, cost: of the whole curriculum; cost is None without a price.
        communication_bytes: buffers that one rank hands to collectives in a step.
        checkpoint_bytes, checkpoint_bytes_per_second: one checkpoint of all ranks, and the rate its storage needs.
        shard_bytes_per_second: what all ranks read.
        notes: what was changed or assumed.
    """

    name: str
    parameters: int
    layout: Layout
    num_nodes: int
    gpus_per_node: int
    device: str
    network: str
    global_batch_examples: int
    micro_batches: int
    memory: Memory
    usable_bytes: float
    flops_per_token: float
    step: StepTime
    tokens_per_second: float
    mfu: float
    hours: float
    gpu_hours: float
    cost: float | None
    communication_bytes: float
    checkpoint_bytes: float
    checkpoint_bytes_per_second: float
    shard_bytes_per_second: float
    notes: tuple[str, ...]

    @property
    def fits(self) -> bool:
        """Whether each rank's bytes fit its device."""
        return self.memory.total <= self.usable_bytes

    @property
    def cost_per_billion_tokens(self) -> float | None:
        """Price of training on 1e9 tokens; None without a price."""
        if self.cost is None:
            return None
        return self.cost / (self.hours * 3600 * self.tokens_per_second) * 1e9

    def to_json(self) -> dict[str, Any]:
        """Plain values for `--json`."""
        data = {key: value for key, value in asdict(self).items() if key != "memory"}
        kinds = {name: round(value) for name, value in self.memory.kinds.items()}
        memory = {"kinds": kinds, "total": round(self.memory.total), "host": round(self.memory.host)}
        return {
            **data,
            "memory": {**memory, "largest": self.memory.largest, "moment": self.memory.fullest.name},
            "step": {**asdict(self.step), "total": self.step.total},
            "fits": self.fits,
            "cost_per_billion_tokens": self.cost_per_billion_tokens,
        }

    def refusal(self) -> PlanError:
        """The error of a plan that does not fit."""
        from hsmn_dist.foundation.units import format_bytes

        kind, moment = self.memory.largest, self.memory.fullest.name
        advice = {**ADVICE, **FISHER_ADVICE} if moment == FISHER_PASS else ADVICE
        return PlanError(
            f"{self.name}: a rank needs {format_bytes(self.memory.total)} in the {moment} and {self.device} has "
            f"{format_bytes(self.usable_bytes)} for it; the largest term is {kind}, "
            f"{format_bytes(self.memory.kinds[kind])}",
            allowed=f"at most {format_bytes(self.usable_bytes)} a rank",
            action=advice[kind],
        )


ADVICE = {
    "weights": "training.zero_stage 3, more ranks, or training.precision bf16",
    "gradients": "training.zero_stage 2 or 3, or more ranks",
    "optimizer": "training.zero_stage 1 or higher, more ranks, or training.offload.optimizer cpu",
    "ewc": "training.zero_stage 1 or higher, or more ranks (EWC's two buffers are cut as the optimizer is)",
    "activations": "a smaller training.micro_batch_examples, or training.activation_checkpointing every_block",
    "logits": "a smaller training.micro_batch_examples, or shorter data.max_target_tokens",
    "buffers": "more ranks, or a device with more memory (DeepSpeed's buckets have a fixed size)",
    "fisher": "training.zero_stage 3, which sums layer by layer, or a device with more memory",
}
FISHER_ADVICE = {
    "activations": "a smaller continual.fisher.micro_batch_examples, or training.activation_checkpointing every_block",
    "logits": "a smaller continual.fisher.micro_batch_examples, or shorter data.max_target_tokens",
}


def plan(
    config: RunConfig,
    machines: Machines,
    price_per_gpu_hour: float | None = None,
    mean: Lengths | None = None,
    parameters: ParameterCount | None = None,
) -> Plan:
    """Plan a run.

    `machines` take the place of the configuration's; `mean` are the mean tokens of an example, the longest ones when None;
    `parameters` the model's counts, when the caller has them already.

    Raises:
        PlanError: the batch cannot be dealt to so many ranks, or the planner has no formula for the model.
    """
    parameters = parameters or count_parameters(config.model)
    longest = Lengths(config.data.max_context_tokens, config.data.max_target_tokens)
    layout, micro_batches, notes = _layout(config, machines)
    memory = memory_per_rank(config, parameters, layout, longest)
    lengths = mean or longest
    if mean is None:
        notes.append(f"time: every example as long as allowed ({longest.tokens} tokens)")
    flops = forward_flops(config.model, lengths)
    load = optimizer_load(config.optim.optimizer, parameters, layout.world_size, layout.is_sharded)
    sent = step_traffic(parameters, layout, micro_batches, load.exchanged_bytes(layout.world_size))
    sent = StepTraffic(sent.beside, sent.waiting + _exchange(config, layout, lengths, micro_batches))
    kernels = kernels_per_micro_batch(config.model, parameters.num_blocks, layout.activation_checkpointing)
    divided = flops.per_rank(layout.context_parallel)
    step = step_time(divided, parameters, layout, sent, machines, micro_batches, load, kernels)
    examples = config.training.global_batch_examples
    tokens_per_second = examples * lengths.tokens / step.total
    seconds = _run_seconds(config, step.total, flops.total, machines, layout.element)
    gpu_hours = seconds / 3600 * machines.world_size
    checkpoint_bytes = FP32 * parameters.total + load.state_bytes  # values and state (training/shard_files.py)
    interval = config.training.checkpoint_every_steps * step.total
    return Plan(
        name=config.name,
        parameters=parameters.total,
        layout=layout,
        num_nodes=machines.num_nodes,
        gpus_per_node=machines.gpus_per_node,
        device=machines.device.name,
        network=machines.network.name,
        global_batch_examples=examples,
        micro_batches=micro_batches,
        memory=memory,
        usable_bytes=machines.device.memory_bytes * (1 - RESERVE_SHARE),
        flops_per_token=3 * flops.total / lengths.tokens,
        step=step,
        tokens_per_second=tokens_per_second,
        mfu=model_flops_utilization(flops, step.total, examples, machines, layout.element),
        hours=seconds / 3600,
        gpu_hours=gpu_hours,
        cost=None if price_per_gpu_hour is None else gpu_hours * price_per_gpu_hour,
        communication_bytes=sent.all.total,
        checkpoint_bytes=checkpoint_bytes,
        checkpoint_bytes_per_second=checkpoint_bytes / (CHECKPOINT_SHARE * interval),
        shard_bytes_per_second=tokens_per_second * SHARD_BYTES_PER_TOKEN,
        notes=tuple(notes),
    )


def _layout(config: RunConfig, machines: Machines) -> tuple[Layout, int, list[str]]:
    training, notes = config.training, list[str]()
    ranks = machines.world_size
    if ranks % training.context_parallel:
        raise PlanError(
            f"training.context_parallel {training.context_parallel} on {ranks} ranks",
            allowed=f"a divisor of {ranks}",
            action="change training.context_parallel or the number of ranks",
        )
    ranks = training.data_ranks(ranks)
    if training.global_batch_examples % ranks:
        raise PlanError(
            f"training.global_batch_examples {training.global_batch_examples} on {ranks} ranks",
            allowed=f"a multiple of {ranks}",
            action=f"for example --set training.global_batch_examples="
            f"{max(ranks, round(training.global_batch_examples / ranks) * ranks)}",
        )
    per_rank = training.global_batch_examples // ranks
    micro = max(size for size in range(1, training.micro_batch_examples + 1) if per_rank % size == 0)
    if micro != training.micro_batch_examples:
        notes.append(f"micro_batch_examples {training.micro_batch_examples} does not divide {per_rank} a rank: {micro}")
    is_deepspeed = training.engine == "deepspeed"
    kind = config.optim.optimizer.kind
    if kind != AdamConfig().kind and training.offload.optimizer != "none":
        raise PlanError(
            f"optim.optimizer.kind {kind} with training.offload.optimizer {training.offload.optimizer}",
            allowed="matrix rules without optimizer offload, or kind adam",
            action="set training.offload.optimizer to none",
        )
    layout = Layout(
        world_size=machines.world_size,
        zero_stage=training.zero_stage if is_deepspeed else 0,
        element=2 if training.precision == "bf16" else 4,
        micro_batch_examples=micro,
        activation_checkpointing=training.activation_checkpointing,
        is_gpu=machines.device.name != "cpu",
        persistent_elements=training.persistent_parameter_elements,
        is_deepspeed=is_deepspeed,
        offloads_optimizer=training.offload.optimizer != "none",
        offloads_parameters=training.offload.parameters != "none",
        context_parallel=training.context_parallel,
    )
    return layout, per_rank // micro, notes


def _exchange(config: RunConfig, layout: Layout, lengths: Lengths, micro_batches: int) -> Traffic:
    if not isinstance(config.model, HsmnConfig):
        return Traffic(0.0, 0.0, 0.0, 0)
    rows = layout.micro_batch_examples * encoded_chunks(config.model, lengths.context_tokens)
    return context_traffic(rows, config.model.d_compressed, layout, micro_batches)


def _run_seconds(config: RunConfig, step: float, forward: float, machines: Machines, element: int) -> float:
    """All stages: steps, validations, Fisher passes (a forward and backward per example)."""
    training, fisher = config.training, config.continual.fisher
    rate = machines.peak_flops(element) * machines.efficiency * machines.world_size
    total = 0.0
    for stage in config.curriculum.stages:
        steps = stage.max_steps or training.max_steps
        total += steps * step
        validations = steps // training.validate_every_steps
        total += validations * training.num_validation_examples * forward / rate
        if measures_fisher(config):
            total += fisher.num_fisher_examples * 3 * forward / rate
    return total


def with_layout(config: RunConfig, **training: Any) -> RunConfig:
    """The same run with other training settings."""
    return config.model_copy(update={"training": config.training.model_copy(update=training)})


def on_nodes(machines: Machines, num_nodes: int) -> Machines:
    """The same machines, another number of them."""
    return replace(machines, num_nodes=num_nodes)
