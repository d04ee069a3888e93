"""Matrix FLOPs of a forward pass by part, from the configuration and the lengths of one example.

Unusual: counted as torch's own counter counts (two for a multiply-add, softmax attention in full, elementwise work not at all),
so a test can hold the formulas to the counter exactly. Backward is twice the forward; recomputed blocks add their forward once.
Source: Kaplan et al. 2020, arXiv 2001.08361, section 2.1, term by term for our layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hsmn_dist.config.models import HopeConfig, HsmnConfig, HsmnHopeConfig, ModelConfig
from hsmn_dist.models.hope.continuum_memory import retentions
from hsmn_dist.models.hope.decayed_reads import reaches
from hsmn_dist.planner.traced_parts import chain_cost, mixer_cost


@dataclass(frozen=True)
class Lengths:
    """Tokens of one example, as trained on."""

    context_tokens: int
    target_tokens: int

    @property
    def tokens(self) -> int:
        """Context and target together."""
        return self.context_tokens + self.target_tokens


@dataclass(frozen=True)
class ForwardFlops:
    """FLOPs of one example's forward pass.

    Attributes:
        blocks: in each block that activation checkpointing may recompute, in forward order.
        last_maps: the last product of each block, which no backward pass needs and so is not recomputed.
        outside: everything else (tree, head).
        num_divided: leading blocks whose work ranks of a context group share (the encoder's).
    """

    blocks: tuple[float, ...]
    last_maps: tuple[float, ...]
    outside: float
    num_divided: int = 0

    def per_rank(self, context_parallel: int) -> ForwardFlops:
        """What one of `context_parallel` ranks does of it."""
        shares = [1.0 / context_parallel if index < self.num_divided else 1.0 for index in range(len(self.blocks))]
        blocks = tuple(size * share for size, share in zip(self.blocks, shares, strict=True))
        last_maps = tuple(size * share for size, share in zip(self.last_maps, shares, strict=True))
        return ForwardFlops(blocks, last_maps, self.outside, self.num_divided)

    @property
    def total(self) -> float:
        """All of them."""
        return sum(self.blocks) + self.outside

    def training(self, activation_checkpointing: str) -> float:
        """Forward, backward and recomputation of one example."""
        return 3 * self.total + self.recomputed(activation_checkpointing)

    def recomputed(self, activation_checkpointing: str) -> float:
        """FLOPs spent twice to save memory."""
        step = {"none": 0, "every_block": 1, "every_second_block": 2}[activation_checkpointing]
        return sum(self.blocks[::step]) - sum(self.last_maps[::step]) if step else 0.0


def num_chunks(config: HsmnConfig, context_tokens: int) -> int:
    """Chunks (tree leaves) of a context."""
    return max(config.min_chunks, -(-(context_tokens - config.chunk_size) // config.chunk_stride) + 1)


def encoded_chunks(config: HsmnConfig, context_tokens: int) -> int:
    """Chunks with a real token; at least one is encoded."""
    return max(1, min(num_chunks(config, context_tokens), -(-context_tokens // config.chunk_stride)))


def forward_flops(config: ModelConfig, lengths: Lengths) -> ForwardFlops:
    """FLOPs of one example's forward pass."""
    if isinstance(config, HsmnConfig):
        return _hsmn(config, lengths)
    assert isinstance(config, HopeConfig)
    return _hope(config, lengths)


def _hsmn(config: HsmnConfig, lengths: Lengths) -> ForwardFlops:
    d, f, k = config.d_model, config.d_feed_forward, config.d_compressed
    rows = config.chunk_size + 1
    chunks, leaves = encoded_chunks(config, lengths.context_tokens), num_chunks(config, lengths.context_tokens)
    nodes, target = 2 * leaves - 1, lengths.target_tokens

    whole_layer = float(chunks * (8 * rows * d * d + 4 * rows * rows * d + 4 * rows * d * f))
    # The CLS row alone reads the chunk's rows themselves: key and value maps are those of one row for each head.
    cls_layer = float(chunks * ((4 + 4 * config.num_heads) * d * d + 4 * config.num_heads * rows * d + 4 * d * f))
    encoder = [whole_layer] * (config.num_encoder_layers - 1) + [cls_layer]
    self_attention = 8 * target * d * d + 4 * target * target * d
    cross_attention = 4 * target * d * d + 4 * nodes * d * d + 4 * target * nodes * d
    # A hybrid is an HSMN, and its reasoning blocks pay for their memory of the target besides.
    is_hybrid = isinstance(config, HsmnHopeConfig)
    decoder = [
        float(self_attention + cross_attention + 4 * target * d * f)
        + (_continuum(config, index, target) if is_hybrid else 0.0)  # type: ignore[arg-type]
        for index in range(config.num_decoder_layers)
    ]
    rank, inner = config.aggregator_rank, config.d_aggregator
    pair = 2 * (2 * k * rank + rank * inner + inner * rank + rank * k)
    codes = 2 * 2 * 16 * d * nodes if config.uses_level_embedding else 0
    outside = chunks * 2 * d * k + (leaves - 1) * pair + nodes * 2 * k * d + codes + 2 * target * d * config.vocab_size
    last_maps = [2.0 * chunks * rows * d * f] * (config.num_encoder_layers - 1) + [2.0 * chunks * d * f]
    last_maps += [2.0 * target * d * f] * config.num_decoder_layers
    return ForwardFlops((*encoder, *decoder), tuple(last_maps), float(outside), len(encoder))


def _hope(config: HopeConfig, lengths: Lengths) -> ForwardFlops:
    d, tokens = config.d_model, lengths.tokens  # <bos> in front, the last target is never read
    block = 0.0
    if config.mixer == "attention":
        block += 8 * tokens * d * d + 4 * tokens * tokens * d
    elif config.mixer == "linear":
        size = min(config.chunk_tokens, tokens)
        sums = 2 * -(-tokens // size) * size * size * d  # the normaliser: sums inside blocks, by products
        block += 8 * tokens * d * d + sums + _decayed_reads(config, tokens, (2**31,))
    else:
        block += mixer_cost(config, tokens, 4).flops
    if config.uses_mlp:
        block += 4 * tokens * d * config.d_feed_forward
    last_map = 2.0 * tokens * d * (config.d_feed_forward if config.uses_mlp else d)
    layers = config.num_layers
    blocks = [block + (_continuum(config, index, tokens) if config.uses_cms else 0.0) for index in range(layers)]
    head = 2.0 * lengths.target_tokens * d * config.vocab_size
    return ForwardFlops(tuple(blocks), (last_map,) * layers, head)


def _continuum(config: HopeConfig | HsmnHopeConfig, index: int, tokens: int) -> float:
    """The CMS of block `index` over a row of tokens."""
    if config.cms.form != "decay":
        return chain_cost(config, index, tokens, 4).flops
    d, modules, cms = config.d_model, config.num_memory_modules, config.cms
    taus = tuple(retentions(modules, cms.fastest_retention, cms.slowest_retention))
    maps = 8 * tokens * d * d + 2 * tokens * d * config.num_heads * modules
    return maps + _decayed_reads(config, tokens, reaches(taus, torch.float32))


def _decayed_reads(config: HopeConfig | HsmnHopeConfig, tokens: int, found_reaches: tuple[int, ...]) -> float:
    """Chunk-parallel reads of memories [K, K] in every head: `models/hope/chunked_reads.py`, product by product.

    `found_reaches` are the tokens that each module sees back: those within a chunk are read directly, the others carry states.
    """
    size = min(config.chunk_tokens, tokens)
    chunks, heads, width = -(-tokens // size), config.num_heads, config.d_model // config.num_heads
    padded, modules = chunks * size, len(found_reaches)
    mix = 2 * padded * modules * size if modules > 1 else 0  # with one module it is elementwise
    inner = 4 * padded * size * width
    if chunks == 1:
        return float(heads * (mix + inner))
    fast = [reach for reach in found_reaches if reach < size]
    window = max(fast, default=0)
    weighting = 2 * len(fast) if len(fast) > 1 else 0
    seen = (chunks - 1) * window * window * (weighting + 4 * width)
    memory = (modules - len(fast)) * width * width
    return float(heads * (mix + inner + seen + 4 * (chunks - 1) * size * memory))
