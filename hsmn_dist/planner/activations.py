"""Bytes that a forward pass keeps for its backward pass, by part, from the configuration and the padded lengths of an example.

Unusual: counted tensor by tensor as our layers save them (a test compares with autograd's saved storages), with fused attention
(no T x T table); recomputed blocks keep their input alone, and one block at a time is whole again in the backward pass.
A dropout mask takes a byte for each element. In half precision on a CPU torch takes RMSNorm apart; on a GPU it is fused.
Source: the method of Korthikanti et al. 2022, arXiv 2205.05198, section 4, applied to our layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch

from hsmn_dist.config.models import HopeConfig, HsmnConfig, HsmnHopeConfig, ModelConfig
from hsmn_dist.models.hope.continuum_memory import retentions
from hsmn_dist.models.hope.decayed_reads import reaches
from hsmn_dist.planner.flops import Lengths, encoded_chunks, num_chunks
from hsmn_dist.planner.traced_parts import chain_cost, mixer_cost

FP32 = 4


@dataclass(frozen=True)
class Storage:
    """How tensors are kept: `element` bytes of an activation (2 under bf16, else 4), what depends on the device, and how many
    ranks share the chunks of a context.
    """

    element: int
    is_gpu: bool
    context_parallel: int = 1

    @property
    def rms_norm(self) -> int:
        """Bytes per element that an RMSNorm keeps: its input and its output; in half precision on a CPU the scaled input in fp32 too."""
        return 2 * self.element if self.is_gpu or self.element == FP32 else self.element + 2 * FP32


@dataclass(frozen=True)
class Activations:
    """Bytes per example, and a few per micro-batch.

    Attributes:
        blocks: kept by each block, in forward order.
        block_inputs: kept by each block when it is recomputed.
        outside: kept outside the blocks (embedding, tree).
        logits: most that head and loss hold at once (probabilities, and the logits or their gradient).
        workings: short-lived tensors of each block's backward pass.
        shared: kept by each block once for the whole micro-batch.
    """

    blocks: tuple[float, ...]
    block_inputs: tuple[float, ...]
    outside: float
    logits: float
    workings: tuple[float, ...]
    shared: float = 0.0

    @property
    def working(self) -> float:
        """The largest of the workings."""
        return max(self.workings)

    def peak(self, activation_checkpointing: str, examples: int) -> float:
        """Most bytes that a micro-batch holds at one moment."""
        step = {"none": 0, "every_block": 1, "every_second_block": 2}[activation_checkpointing]
        blocks = [examples * size + self.shared for size in self.blocks]
        workings = [examples * size for size in self.workings]
        logits, outside = examples * self.logits, examples * self.outside
        if not step:  # when a block's turn comes in the backward pass, those behind it are gone
            held = accumulate(blocks)
            return outside + max(
                sum(blocks) + logits, *(size + extra for size, extra in zip(held, workings, strict=True))
            )
        chosen = range(0, len(blocks), step)
        plain = sum(size for index, size in enumerate(blocks) if index not in chosen)
        inputs = examples * sum(self.block_inputs[index] for index in chosen)
        recomputed = max(blocks[index] + workings[index] for index in chosen)
        return plain + inputs + outside + max(logits, recomputed)


def activations(config: ModelConfig, lengths: Lengths, storage: Storage) -> Activations:
    """Bytes that one example's forward pass keeps.

    Raises:
        PlanError: a variant that the planner has no formula for.
    """
    if isinstance(config, HsmnConfig):
        return _hsmn(config, lengths, storage)
    assert isinstance(config, HopeConfig)
    return _hope(config, lengths, storage)


def logits_bytes(num_tokens: int, vocab_size: int, storage: Storage) -> float:
    """Probabilities in fp32, and the logits or their gradient."""
    return float(num_tokens * vocab_size * (FP32 + storage.element))


def _feed_forward(tokens: int, f: int, storage: Storage, is_gelu: bool) -> float:
    """Kept behind the norm: the inner activation (twice for gelu and silu)."""
    return float(tokens * f * (2 if is_gelu else 1) * storage.element)


def _hsmn(config: HsmnConfig, lengths: Lengths, storage: Storage) -> Activations:
    d, f, heads, size = config.d_model, config.d_feed_forward, config.num_heads, storage.element
    rows = config.chunk_size + 1
    chunks = -(-encoded_chunks(config, lengths.context_tokens) // storage.context_parallel)
    leaves = num_chunks(config, lengths.context_tokens)
    nodes, target = 2 * leaves - 1, lengths.target_tokens
    is_gelu = config.activation != "relu"

    group = min(config.encoder_group_chunks or chunks, chunks)
    recompute = config.encoder_recompute if config.encoder_group_chunks else "none"

    def encoder_layer(queries: int) -> float:
        masks = 2 * queries * d if config.encoder_dropout > 0 else 0
        norms = rows * 2 * d * size + queries * 2 * d * size
        # The CLS row alone reads rows, not keys and values (`Attention.read_once`).
        attended = 3 * heads + 2 if queries == 1 else 5 * rows
        attention = attended * d * size + queries * heads * FP32
        inner = _feed_forward(queries, f, storage, is_gelu)
        if recompute == "attention":  # one group at a time has its norm's output, queries, keys, values and reads
            return chunks * (norms - rows * d * size + masks + inner)
        if recompute == "sublayers":  # one group at a time has the rest
            return chunks * (rows * d * size + queries * d * size + masks)
        return chunks * (norms + attention + masks + inner)

    masks = 3 * d if config.decoder_dropout > 0 else 0
    decoder: float = target * (13 * d * size + masks + 2 * heads * FP32) + 2 * nodes * d * size
    decoder += _feed_forward(target, f, storage, is_gelu)
    memories, shared = [0.0] * config.num_decoder_layers, 0.0
    if isinstance(config, HsmnHopeConfig):  # its reasoning blocks carry a memory of the target besides
        norm = d if config.decoder_dropout > 0 else 0
        decoder += target * (2 * d * size + norm)
        memories = [_continuum(config, index, target, storage) for index in range(config.num_decoder_layers)]
        shared = _decay_table(config, target)
    encoder = [encoder_layer(rows)] * (config.num_encoder_layers - 1) + [encoder_layer(1)]
    inputs = [float(chunks * rows * d * size)] * config.num_encoder_layers
    embedded = 0
    if group < chunks and recompute == "all":  # what stays is the looked-up tokens, and one group at a time is whole
        encoder = [layer * group / chunks for layer in encoder]
        inputs = [0.0] * config.num_encoder_layers
        embedded = min(lengths.context_tokens, config.vocab_size) * d * size
    inputs += [float(target * d * size)] * config.num_decoder_layers
    k, inner_width, rank = config.d_compressed, config.d_aggregator, config.aggregator_rank
    tree = (leaves - 1) * (2 * k + 2 * rank + inner_width) * size + nodes * k * size
    dropout = chunks * rows * d if config.encoder_dropout > 0 else 0
    dropout += target * d if config.decoder_dropout > 0 else 0
    outside = chunks * 2 * d * size + tree + nodes * d * size + 2 * target * d * size + embedded + dropout
    logits = logits_bytes(target, config.vocab_size, storage)
    wide = (2 * f + 2 * d) * size  # the gradients on both sides of the activation function, and two of the stream
    workings = [float(group * rows * wide)] * (config.num_encoder_layers - 1) + [
        float(group * (wide + rows * 4 * d * size))
    ]
    workings += [float(target * wide)] * config.num_decoder_layers
    blocks = (*encoder, *(float(decoder) + memory for memory in memories))
    return Activations(blocks, tuple(inputs), float(outside), logits, tuple(workings), shared)


def _hope(config: HopeConfig, lengths: Lengths, storage: Storage) -> Activations:
    d, tokens, size = config.d_model, lengths.tokens, storage.element
    dropout = d if config.dropout > 0 else 0
    block: float = tokens * (d * storage.rms_norm + dropout)
    if config.mixer == "attention":
        rotated = 2 * d * size if config.positions == "rotary" else 0
        tables = 2 * (d // config.num_heads) * size if config.positions == "rotary" and size < FP32 else 0
        block += tokens * (5 * d * size + rotated + tables + config.num_heads * FP32)
    else:
        block += mixer_cost(config, tokens, size, storage.is_gpu).kept
    if config.uses_cms:
        block += tokens * (d * storage.rms_norm + dropout)
    if config.uses_mlp:
        block += tokens * (d * storage.rms_norm + dropout + 2 * config.d_feed_forward * size)
    inputs = float(tokens * d * size)
    outside = tokens * (8 + dropout) + lengths.target_tokens * d * storage.rms_norm
    logits = logits_bytes(lengths.target_tokens, config.vocab_size, storage)
    workings = (float(tokens * (2 * config.d_feed_forward + 2 * d) * size),) * config.num_layers
    layers = config.num_layers
    shared = _decay_table(config, tokens) if config.uses_cms else 0.0
    memories = [_continuum(config, index, tokens, storage) if config.uses_cms else 0.0 for index in range(layers)]
    blocks = tuple(float(block) + memory for memory in memories)
    return Activations(blocks, (inputs,) * layers, float(outside), logits, workings, shared)


def _decay_table(config: HopeConfig | HsmnHopeConfig, tokens: int) -> float:
    if config.cms.form != "decay":
        return 0.0
    chunk = min(config.chunk_tokens, tokens)
    return float(config.num_memory_modules * chunk * chunk * FP32)


def _continuum(config: HopeConfig | HsmnHopeConfig, index: int, tokens: int, storage: Storage) -> float:
    """CMS of block `index`; decay form: projections, gains, the chunks' weights, scaled queries and keys, and states."""
    if config.cms.form != "decay":
        return chain_cost(config, index, tokens, storage.element, storage.is_gpu).kept
    d, heads, modules, size = config.d_model, config.num_heads, config.num_memory_modules, storage.element
    chunk, width = min(config.chunk_tokens, tokens), d // heads
    chunks = -(-tokens // chunk)
    padded = chunks * chunk
    kept = padded * (4 * d * size + 2 * heads * modules * FP32 + 3 * heads * chunk * size)
    if chunks > 1:
        taus = retentions(modules, config.cms.fastest_retention, config.cms.slowest_retention)
        far = sum(reach >= chunk for reach in reaches(taus, torch.float32))
        kept += (chunks - 1) * far * (2 * chunk * d * size + heads * width * width * FP32)
    return float(kept)
