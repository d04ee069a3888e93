"""HSMN as the paper writes it: one chunk, one node, one target position at a time. Slow; for parity tests and readers.

Unusual: attention is a loop over queries with a written-out softmax, the tree is recursive, the target has no cache, and no
example ever meets another one. Dropout is off. Differentiable, so gradients can be compared as well.
Source: HSMN paper, sections on StreamingChunker, ChunkEncoder, Aggregator and ReasoningModule; hsmn.md section 5.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hsmn_dist.models.contract import BOS_ID
from hsmn_dist.models.hsmn.chunk_encoder import EncoderLayer
from hsmn_dist.models.hsmn.memory_codes import LONGEST_PERIOD_CHUNKS, NUM_FREQUENCIES
from hsmn_dist.models.hsmn.model import HsmnModel
from hsmn_dist.models.hsmn.reasoning_decoder import ReasoningBlock
from hsmn_dist.models.layers.attention import Attention


@dataclass
class Node:
    """A memory node: value z [k], level, span [first, last) in leaves, and whether the span touches a real token."""

    value: Tensor
    level: int
    first: int
    last: int
    is_valid: bool


def chunks_of(tokens: list[int], chunk_size: int, stride: int, min_chunks: int) -> list[list[int]]:
    """Chunks: n = max(min_chunks, ceil((L - c) / s) + 1) chunks; each holds its real tokens only."""
    count = 1
    while chunk_size + (count - 1) * stride < len(tokens):
        count += 1
    return [tokens[index * stride : index * stride + chunk_size] for index in range(max(count, min_chunks))]


def attention(attention: Attention, queries: list[Tensor], sources: list[Tensor]) -> list[Tensor]:
    """softmax(q K^T / sqrt(d)) V, head by head and query by query; nothing to read gives the output map of zeros."""
    heads, width = attention.num_heads, attention.head_dim
    keys = [attention.key(source).view(heads, width) for source in sources]
    values = [attention.value(source).view(heads, width) for source in sources]
    results = []
    for x in queries:
        query = attention.query(x).view(heads, width)
        read = [torch.zeros(width, dtype=x.dtype) for _ in range(heads)]
        for head in range(heads):
            if not sources:
                break
            scores = torch.stack([(query[head] * key[head]).sum() / width**0.5 for key in keys])
            weights = (scores - scores.max()).exp()
            weights = weights / weights.sum()
            read[head] = sum((w * value[head] for w, value in zip(weights, values, strict=True)), read[head])
        results.append(attention.output(torch.cat(read)))
    return results


def encoder_layer(layer: EncoderLayer, xs: list[Tensor]) -> list[Tensor]:
    """All positions of one chunk through one layer (pre-norm or post-norm)."""
    if layer.is_pre_norm:
        normed = [layer.attention_norm(x) for x in xs]
        xs = [x + read for x, read in zip(xs, attention(layer.attention, normed, normed), strict=True)]
        return [x + layer.feed_forward(layer.feed_forward_norm(x)) for x in xs]
    xs = [layer.attention_norm(x + read) for x, read in zip(xs, attention(layer.attention, xs, xs), strict=True)]
    return [layer.feed_forward_norm(x + layer.feed_forward(x)) for x in xs]


def encode_chunk(model: HsmnModel, tokens: list[int]) -> Tensor:
    """z_i = W_c CLS(Enc(chunk_i)); the CLS token is row 0 of the position table."""
    position = model.encoder.position_embedding.weight
    xs = [position[0]]
    xs += [model.context_embedding.weight[token] + position[index + 1] for index, token in enumerate(tokens)]
    for layer in model.encoder.layers:
        assert isinstance(layer, EncoderLayer)
        xs = encoder_layer(layer, xs)
    return model.compressor(model.encoder.final_norm(xs[0]))


def low_rank(map: nn.Module, x: Tensor) -> Tensor:
    """Low rank: y = x (U V) + b, with the product written out."""
    product = map.second.weight @ map.first.weight  # type: ignore[union-attr, operator]
    return product @ x + map.second.bias  # type: ignore[union-attr, operator]


def parent_of(model: HsmnModel, left: Node, right: Node) -> Node:
    """Node f([z_l ; z_r]), f = LowRank(inner -> k) o relu o LowRank(2k -> inner); span = union of the children's."""
    aggregator = model.tree.aggregator
    hidden = low_rank(aggregator.inner, torch.cat([left.value, right.value])).clamp(min=0)
    level = max(left.level, right.level) + 1
    return Node(low_rank(aggregator.outer, hidden), level, left.first, right.last, left.is_valid or right.is_valid)


def tree_of(model: HsmnModel, leaves: list[Node]) -> list[Node]:
    """All unique nodes, level by level; an odd last node moves up as itself. `level` is counted in rounds of pairing."""
    stored, row, height = list(leaves), list(leaves), 0
    while len(row) > 1:
        height += 1
        above = []
        for index in range(0, len(row) - 1, 2):
            node = parent_of(model, row[index], row[index + 1])
            node.level = height
            above.append(node)
        stored += above
        row = above + ([row[-1]] if len(row) % 2 else [])
    return stored


def memory_of(model: HsmnModel, tokens: list[int]) -> list[Tensor]:
    """W_d z + level code + span code of every node whose span touches a real token."""
    config = model.config
    chunks = chunks_of(tokens, config.chunk_size, config.chunk_stride, config.min_chunks)
    empty = torch.zeros(config.d_compressed, dtype=model.compressor.weight.dtype)
    leaves = [
        Node(encode_chunk(model, chunk) if chunk else empty, 0, index, index + 1, bool(chunk))
        for index, chunk in enumerate(chunks)
    ]
    return [decompressed(model, node) for node in tree_of(model, leaves) if node.is_valid]


def decompressed(model: HsmnModel, node: Node) -> Tensor:
    """One memory row as the decoder sees it."""
    row = model.decompressor(node.value)
    if model.memory_codes is None:
        return row
    centre = (node.first + node.last - 1) / 2
    angles = [centre * LONGEST_PERIOD_CHUNKS ** -(f / (NUM_FREQUENCIES - 1)) for f in range(NUM_FREQUENCIES)]
    angle = torch.tensor(angles, dtype=torch.float64)
    features = torch.cat([angle.sin(), angle.cos()]).to(row.dtype)
    return row + model.memory_codes.level_embedding.weight[node.level] + model.memory_codes.span_map(features)


def decoder_block(block: ReasoningBlock, xs: list[Tensor], memory: list[Tensor]) -> list[Tensor]:
    """All target positions through one block: position t attends to positions 0..t and to the whole memory."""
    if block.is_pre_norm:
        normed = [block.self_norm(x) for x in xs]
        xs = [x + causal(block, normed, index) for index, x in enumerate(xs)]
        xs = [x + attention(block.cross_attention, [block.cross_norm(x)], memory)[0] for x in xs]
        return [x + block.feed_forward(block.feed_forward_norm(x)) for x in xs]
    xs = [block.self_norm(x + causal(block, xs, index)) for index, x in enumerate(xs)]
    xs = [block.cross_norm(x + attention(block.cross_attention, [x], memory)[0]) for x in xs]
    return [block.feed_forward_norm(x + block.feed_forward(x)) for x in xs]


def causal(block: ReasoningBlock, xs: list[Tensor], index: int) -> Tensor:
    """Self-attention of position `index` over what it may see."""
    first = max(0, index - block.span + 1) if block.span else 0
    return attention(block.self_attention, [xs[index]], xs[first : index + 1])[0]


def logits_of(model: HsmnModel, context: list[int], target: list[int]) -> Tensor:
    """Logits [T, V] of one example; position t is predicted from the context and target[:t]."""
    memory = memory_of(model, context)
    table, position = model.target_embedding.weight, model.decoder.position_embedding.weight
    shifted = [BOS_ID, *target[:-1]]
    xs = [table[token] * model.embedding_scale + position[index] for index, token in enumerate(shifted)]
    for block in model.decoder.stack:
        xs = decoder_block(block, xs, memory)
    head = table if model.head is None else model.head.weight
    return torch.stack([head @ model.decoder.final_norm(x) for x in xs])
