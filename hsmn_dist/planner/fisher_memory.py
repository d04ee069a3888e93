"""Bytes of a rank while the Fisher of a stage is measured: a pass of its own, with its own micro-batch and sums.

Unusual: contexts are not divided here, whatever `training.context_parallel` says, because the square of an example's gradient
needs all of it on one rank. Where weights are whole (ZeRO 0 to 2), so are the sums, in fp32. Products are formed from fp32 copies
of a layer's input and output gradient; rows that belong to examples by a table (chunks) are sorted into copies besides.
Source: our `continual/fisher.py`, `shard_sums.py` and `square_sums.py`, tensor by tensor; a test measures real passes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from hsmn_dist.config.models import HsmnConfig, ModelConfig
from hsmn_dist.config.run import RunConfig
from hsmn_dist.planner.activations import Activations, Storage, activations
from hsmn_dist.planner.flops import Lengths, encoded_chunks
from hsmn_dist.planner.parameters import ParameterCount

if TYPE_CHECKING:
    from hsmn_dist.planner.memory import Layout

FP32 = 4
REDUCED_ELEMENTS = 1 << 24
"""Elements that are reduced together (`shard_sums.py`)."""
CHECKED_ELEMENTS = 1 << 28
"""Elements whose gradients are taken together where weights are partitioned (`fisher_reference.py`)."""
PRODUCT_ELEMENTS = 1 << 26
"""Entries of a block of examples' gradients on a GPU (`square_sums.py`); on a CPU it stays in the cache."""


@dataclass(frozen=True)
class FisherNeeds:
    """Bytes at one moment of the pass, beside weights, optimizer and EWC.

    Attributes:
        sums: squared gradients so far: this rank's part, and whole ones where weights are whole.
        gradients: whole ones of one example, or ZeRO 3's buffer, which stays.
        activations, logits: of the Fisher's own micro-batch.
        buffers: products, and DeepSpeed's bucket under ZeRO 3.
    """

    sums: float
    gradients: float
    activations: float
    logits: float
    buffers: float


def measures_fisher(config: RunConfig) -> bool:
    """Whether stages of this run end with a Fisher pass."""
    return config.continual.method in ("ewc", "ewc+replay")


def fisher_needs(
    config: RunConfig, parameters: ParameterCount, layout: Layout, lengths: Lengths
) -> tuple[FisherNeeds, ...]:
    """The pass over micro-batches, and the check of its first one, an example at a time; nothing for methods without a Fisher."""
    if not measures_fisher(config):
        return ()
    fisher, total = config.continual.fisher, parameters.total
    is_partitioned = layout.is_deepspeed and layout.zero_stage == 3
    largest = max(parameters.sizes, default=0)
    share = -(-total // layout.world_size) if layout.is_sharded else total
    own = FP32 * float(share) * (2 if fisher.estimator in ("sampled_sum", "signed_sum") else 1)
    if layout.offloads_optimizer or layout.offloads_parameters:
        own = 0.0  # beside the fp32 values, in host memory
    standing = bucket = 0.0
    if is_partitioned:
        standing = 0.0 if own == 0.0 else FP32 * parameters.padded(layout.world_size) / layout.world_size
        bucket = layout.element * float(layout.bucket_elements if layout.is_gpu else min(total, layout.bucket_elements))
        whole = (
            2.0 * FP32 * min(total, REDUCED_ELEMENTS + largest)
        )  # until its turn to be reduced, and the reduced copy
    else:
        whole = FP32 * float(total)
    examples = fisher.micro_batch_examples
    kept = activations(_without_dropout(config.model), lengths, Storage(layout.element, layout.is_gpu))
    tapped = _tapped(kept, config.model, lengths, layout)
    peak = tapped.peak(layout.activation_checkpointing, examples) + _waiting_uses(
        config.model, lengths, layout, examples
    )
    logits = min(kept.logits * examples, peak)
    products = FP32 * float(min(examples * largest, PRODUCT_ELEMENTS)) if layout.is_gpu else 0.0
    needs = FisherNeeds(own + whole, standing, peak - logits, logits, products + bucket)
    if not fisher.checks_fast_path:
        return (needs,)
    taken = min(total, CHECKED_ELEMENTS + largest) if is_partitioned else total
    alone = kept.peak(layout.activation_checkpointing, 1)
    head = min(kept.logits, alone)
    squares = 2.0 * 8 * largest  # in float64
    check = FisherNeeds(own, standing + layout.element * float(taken), alone - head, head, squares + bucket)
    return needs, check


def _without_dropout(config: ModelConfig) -> ModelConfig:
    if isinstance(config, HsmnConfig):
        return config.model_copy(update={"encoder_dropout": 0.0, "decoder_dropout": 0.0})
    return config.model_copy(update={"dropout": 0.0})


def _tapped(kept: Activations, config: ModelConfig, lengths: Lengths, layout: Layout) -> Activations:
    """Workings of a backward pass in which a block's widest map is copied to fp32 when its output's gradient is there.

    A working holds rows x (2 f + 2 d) elements; at that map they are the gradients, rows x (f + 2 d), and copies of rows x (f + d).
    """
    d, f, element = config.d_model, config.d_feed_forward, layout.element
    widened = FP32 if element < FP32 else 0
    num_encoder_layers = config.num_encoder_layers if isinstance(config, HsmnConfig) else 0
    workings = []
    for index, working in enumerate(kept.workings):
        copied = widened + (element if index < num_encoder_layers else 0)
        rows = working / (2 * (f + d) * element)
        workings.append(max(working, rows * ((f + 2 * d) * element + (f + d) * copied)))
    return replace(kept, workings=tuple(workings))


def _waiting_uses(config: ModelConfig, lengths: Lengths, layout: Layout, examples: int) -> float:
    """Inputs and output gradients of the encoder's maps: in groups, each waits for those of the other groups."""
    if not isinstance(config, HsmnConfig) or not config.encoder_group_chunks:
        return 0.0
    chunks = encoded_chunks(config, lengths.context_tokens)
    if config.encoder_group_chunks >= chunks * examples:
        return 0.0
    d, f, rows = config.d_model, config.d_feed_forward, config.chunk_size + 1
    layers = (config.num_encoder_layers - 1) * rows * (12 * d + 2 * f) + 12 * d + 2 * f + rows * 6 * d
    return float(examples * chunks * layers * layout.element)
