"""Bytes per rank by kind, for every ZeRO stage: weights, gradients, optimizer, EWC, activations, logits, buffers.

Unusual: follows what our engine and DeepSpeed 0.19 really hold. On a GPU, reduction buckets are allocated at their full size
(DeepSpeed's default of 5e8 elements, 1 GB in bf16) however small the model; stage 3 keeps up to 1e9 gathered elements alive.
On a CPU untouched pages of a bucket cost nothing. The Fisher pass at a stage's end counts as the moments of a step do.
Source: Rajbhandari et al. 2020, arXiv 1910.02054, section 5.
"""

from __future__ import annotations

from dataclasses import dataclass

from hsmn_dist.config.run import RunConfig
from hsmn_dist.planner.activations import Storage, activations
from hsmn_dist.planner.fisher_memory import fisher_needs
from hsmn_dist.planner.flops import Lengths
from hsmn_dist.planner.optimizer_states import MATRIX_TEMPORARIES, OptimizerLoad, optimizer_load
from hsmn_dist.planner.parameters import ParameterCount

FP32 = 4
BUCKET_ELEMENTS = 500_000_000
"""DeepSpeed's reduce_bucket_size."""
MAX_LIVE_ELEMENTS = 1_000_000_000
"""DeepSpeed's stage3_max_live_parameters and stage3_max_reuse_distance."""


@dataclass(frozen=True)
class Layout:
    """How a stage's training is laid out over ranks.

    Attributes:
        world_size: ranks.
        zero_stage: 0 to 3.
        element: bytes of a weight in forward and backward: 2 under bf16, else 4.
        micro_batch_examples: examples per forward pass and rank.
        activation_checkpointing: policy.
        is_gpu: buffers as on a GPU.
        persistent_elements: ZeRO 3 keeps smaller parameters whole.
        is_deepspeed: False for the one-process engine, which has no second copy of anything.
        offloads_optimizer, offloads_parameters: what lives in host memory instead.
        context_parallel: ranks that share the chunks of a context.
        bucket_elements: largest bucket that gradients are reduced in.
        live_elements: most gathered elements that ZeRO 3 keeps alive.
    """

    world_size: int
    zero_stage: int
    element: int
    micro_batch_examples: int
    activation_checkpointing: str
    is_gpu: bool
    persistent_elements: int = 100_000
    is_deepspeed: bool = True
    offloads_optimizer: bool = False
    offloads_parameters: bool = False
    context_parallel: int = 1
    bucket_elements: int = BUCKET_ELEMENTS
    live_elements: int = MAX_LIVE_ELEMENTS

    @property
    def is_sharded(self) -> bool:
        """Whether each rank steps its own part of the weights (ZeRO 1 to 3)."""
        return self.is_deepspeed and self.zero_stage > 0


@dataclass(frozen=True)
class Moment:
    """Bytes that are held at one moment, beside weights, optimizer and EWC.

    Attributes:
        name: when.
        gradients, activations, logits, buffers: of a step, or of the Fisher pass.
        fisher: sums of squared gradients.
    """

    name: str
    gradients: float = 0.0
    activations: float = 0.0
    logits: float = 0.0
    buffers: float = 0.0
    fisher: float = 0.0

    @property
    def total(self) -> float:
        """All of them."""
        return self.gradients + self.activations + self.logits + self.buffers + self.fisher


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank's device.

    Attributes:
        weights, optimizer, ewc: held all the time.
        moments: the fullest moment inside the backward pass, the reduction at its end, the optimizer step, and the Fisher pass
            behind the last step where the method has one.
        host: what offload puts into the machine's memory for each rank.
    """

    weights: float
    optimizer: float
    ewc: float
    moments: tuple[Moment, ...]
    host: float

    @property
    def fullest(self) -> Moment:
        """The moment with the most bytes."""
        return max(self.moments, key=lambda moment: moment.total)

    @property
    def kinds(self) -> dict[str, float]:
        """Bytes by kind at the fullest moment."""
        fullest = self.fullest
        return {
            "weights": self.weights,
            "gradients": fullest.gradients,
            "optimizer": self.optimizer,
            "ewc": self.ewc,
            "activations": fullest.activations,
            "logits": fullest.logits,
            "buffers": fullest.buffers,
            "fisher": fullest.fisher,
        }

    @property
    def total(self) -> float:
        """Most bytes that are held at once."""
        return sum(self.kinds.values())

    @property
    def largest(self) -> str:
        """The kind with the most bytes."""
        kinds = self.kinds
        return max(kinds, key=lambda name: kinds[name])


FISHER_PASS = "Fisher pass"


def memory_per_rank(config: RunConfig, parameters: ParameterCount, layout: Layout, lengths: Lengths) -> Memory:
    """Bytes of one rank while a stage behind the first one trains (EWC buffers included where the method has them)."""
    load = optimizer_load(config.optim.optimizer, parameters, layout.world_size, layout.is_sharded)
    weights, gradients, optimizer, host = _state(parameters, layout, load)
    kept = activations(config.model, lengths, Storage(layout.element, layout.is_gpu, layout.context_parallel))
    examples = layout.micro_batch_examples
    peak = kept.peak(layout.activation_checkpointing, examples)
    logits = min(kept.logits * examples, peak)
    backward, reduction, step = _buffers(parameters, layout, load)
    partition = min(gradients, FP32 * float(_share(parameters, layout)))
    moments = [
        Moment("backward pass", gradients, peak - logits, logits, backward),
        Moment("reduction of gradients", gradients, buffers=reduction),
        Moment(
            "optimizer step",
            partition if layout.zero_stage == 1 and layout.is_deepspeed else gradients,
            buffers=step,
        ),
    ]
    moments += [
        Moment(FISHER_PASS, need.gradients, need.activations, need.logits, need.buffers, need.sums)
        for need in fisher_needs(config, parameters, layout, lengths)
    ]
    return Memory(weights, optimizer, _ewc(config, parameters, layout), tuple(moments), host)


def _share(parameters: ParameterCount, layout: Layout) -> int:
    return -(-parameters.total // layout.world_size)


def _state(parameters: ParameterCount, layout: Layout, load: OptimizerLoad) -> tuple[float, float, float, float]:
    """Weights, gradients and optimizer on the device, and what is in host memory."""
    total, element, ranks = parameters.total, layout.element, layout.world_size
    if not layout.is_sharded:
        master = FP32 * total if element < FP32 else 0
        return element * total, element * total, load.rank_bytes + master, 0.0
    share = -(-total // ranks)
    optimizer = FP32 * share + load.rank_bytes
    if layout.zero_stage == 1:
        weights, gradients = float(element * total), float(element * total)
    elif layout.zero_stage == 2:
        weights, gradients = float(element * total), float(FP32 * share)
    else:
        small = parameters.at_most(layout.persistent_elements)
        live = min(total - small, layout.live_elements)
        partitions = element * parameters.padded(ranks) / ranks
        weights, gradients = partitions + element * (small + live), FP32 * parameters.padded(ranks) / ranks
        if layout.offloads_parameters:
            return weights - partitions, 0.0, 0.0, partitions + optimizer + gradients
    if layout.offloads_optimizer:
        return weights, 0.0, 0.0, optimizer + gradients
    return weights, gradients, optimizer, 0.0


def _ewc(config: RunConfig, parameters: ParameterCount, layout: Layout) -> float:
    """A and mu in fp32 beside every shard, also while the first stage trains, at whose end they are filled."""
    has_memory = config.continual.method in ("ewc", "ewc+replay", "l2")
    if not has_memory or layout.offloads_optimizer:
        return 0.0
    copies = 1 if layout.is_sharded else layout.world_size
    return 2.0 * FP32 * parameters.total * copies / layout.world_size


def _buffers(parameters: ParameterCount, layout: Layout, load: OptimizerLoad) -> tuple[float, float, float]:
    """Short-lived bytes inside the backward pass, at the reduction at its end, and in the optimizer step.

    Read off the resident memory of real runs (docs/planner.md). DeepSpeed's optimizer steps on one flat tensor, so that Adam's
    temporaries are as large as this rank's partition, beside the flat copy of its gradients.
    """
    total, element, share = parameters.total, layout.element, _share(parameters, layout)
    temporaries = 1 if layout.is_gpu else 2  # sqrt, and its quotient, which is taken in place where kernels are fused
    largest = FP32 * float(max(parameters.sizes, default=0))
    masters = FP32 * float(total) if element < FP32 else 0.0
    if not layout.is_sharded:
        widest = FP32 * float(max((rows * columns for rows, columns in parameters.matrices), default=0))
        alone = max(temporaries * largest, MATRIX_TEMPORARIES * widest if load.matrix_elements else 0.0)
        if not layout.is_deepspeed:
            return 0.0, 0.0, masters + alone
        return 0.0, element * float(min(total, layout.bucket_elements)), alone
    touched = element * float(min(total, layout.bucket_elements))
    matrix_share = -(-load.matrix_elements // layout.world_size)
    step = FP32 * float(share) + load.step_bytes(share - matrix_share, matrix_share, temporaries, layout.world_size)
    bucket = element * float(layout.bucket_elements) if layout.is_gpu else touched
    if layout.zero_stage == 1:
        return (bucket if layout.is_gpu else 0.0), bucket, step
    copies = 2 if layout.is_gpu and layout.zero_stage == 2 else 1  # two buckets where communication overlaps
    scattered = element * float(share) if layout.zero_stage == 3 and layout.world_size > 1 else 0.0
    return bucket * copies, bucket * copies + touched + scattered, step
