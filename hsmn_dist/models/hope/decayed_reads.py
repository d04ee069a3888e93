"""Linear memories with exponential decay, chunk-parallel; the core of the decay-form CMS and of the linear mixer.

    S_m[t] = decay_m S_m[t-1] + scale_m k_t v_t^T          (per sequence, head and module m)
    o_t    = sum_m gain_m[t] S_m[t]^T q_t

Unusual: modules share q, k and v, so inside a chunk of C tokens all of them together are one C x C matrix
M[i, j] = sum_m gain_m[i] scale_m decay_m^(i-j), and the carried states are read and written by one matrix product over
the stacked modules. Powers only have exponents >= 0, so nothing overflows. Source: models.md 2.2; the chunk form is that
of retention (Sun et al. 2023, arXiv 2307.08621, section 2.3).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hsmn_dist.models.hope.chunked_reads import ReadPlan, chunked_reads
from hsmn_dist.models.layers.rotary import RotaryTable, rotate
from hsmn_dist.models.precision import wide_type


@dataclass
class ReadInputs:
    """One call of `decayed_reads`.

    Attributes:
        query, key: [B, H, T, K], before rotary positions if `rotary` is given.
        value: [B, H, T, J].
        gains: [B, H, T, M] read weight of each module; None: all are 1.
        decays: [M] in [0, 1]; None, as are the scales then: one module that keeps everything.
        scales: [M] write weight of each module.
        segments: [B, T] integers that never fall; memory is cleared where they change. Segment 0 continues the carried
            memory. None: one segment.
        valid: [B, T] bool; tokens that are not valid neither write nor age the memory. They may stand at the right end
            only. None: all valid.
        reads_after_write: o_t sees token t's own write; False reads the memory as token t - 1 left it.
        reaches: `reaches(decays, dtype)`, as plain integers; None treats every module as slow.
        rotary: table by which queries and keys are rotated on their way into chunks, which saves a copy of both.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    gains: Tensor | None = None
    decays: Tensor | None = None
    scales: Tensor | None = None
    segments: Tensor | None = None
    valid: Tensor | None = None
    reads_after_write: bool = True
    reaches: tuple[int, ...] | None = None
    rotary: RotaryTable | None = None


def decayed_reads(
    inputs: ReadInputs, memory: Tensor | None, chunk_size: int, returns_memory: bool
) -> tuple[Tensor, Tensor | None]:
    """Reads [B, H, T, J] of every token, and the memory [B, H, M, K, J] (fp32 or wider) after the last one.

    `memory` None starts from zero. With `returns_memory` False the second result is None and its cost is saved. If no memory
    comes either, a module that has lost a write, to the last bit, within a chunk is near: the few tokens it can still see of
    the chunk before are read directly, and K x J states are kept for the far modules alone.
    """
    tokens = inputs.query.shape[2]
    size = min(chunk_size, tokens)
    num_chunks = -(-tokens // size)
    near: list[int] = []
    far = list(range(1 if inputs.decays is None else inputs.decays.shape[0]))
    if inputs.reaches is not None and memory is None and not returns_memory and num_chunks > 1:
        near, far = ([m for m in far if (inputs.reaches[m] < size) is wanted] for wanted in (True, False))
    order = [*near, *far]
    gains = inputs.gains
    if gains is not None:
        gains = _chunked(gains if order == sorted(order) else gains[..., order], num_chunks, size).mT
    query, key, value = _of_one_type(inputs.query, inputs.key, inputs.value)
    rotary = None if inputs.rotary is None else _chunked_table(inputs.rotary, num_chunks, size)
    query, key = (_chunked(t, num_chunks, size, rotary) for t in (query, key))
    value = _chunked(value, num_chunks, size)
    plan = _plan(inputs, num_chunks, size, near, far, returns_memory)
    with torch.autocast(query.device.type, enabled=False):  # states and weights keep their precision
        reads, after = chunked_reads(query, key, value, gains, None if memory is None else memory.flatten(2, 3), plan)
    # Tokens outside heads, as the map behind wants them: one copy, here and in the backward pass.
    reads = reads.permute(1, 0, 3, 2, 4).flatten(1, 2)[:, :tokens].transpose(1, 2)
    return reads, None if after is None else after.unflatten(2, (len(far), -1))


def _of_one_type(*tensors: Tensor) -> list[Tensor]:
    """In autocast's type where it is on, as products would take them."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return list(tensors)
    return [tensor.to(torch.get_autocast_dtype(device)) for tensor in tensors]


def _chunked(tensor: Tensor, num_chunks: int, size: int, rotary: RotaryTable | None = None) -> Tensor:
    """[B, H, T, X] -> [n, B, H, C, X]; contiguous, zeros at the ragged end, rotated by a table of the same layout."""
    missing = num_chunks * size - tensor.shape[2]
    if missing:
        tensor = torch.nn.functional.pad(tensor, (0, 0, 0, missing))
    # By way of [B, T, H, X], so that a gradient is copied once, to where the projection's lies.
    chunks = tensor.transpose(1, 2).unflatten(1, (num_chunks, size)).permute(1, 0, 3, 2, 4)
    return (chunks if rotary is None else rotate(chunks, rotary)).contiguous()


def _chunked_table(rotary: RotaryTable, num_chunks: int, size: int) -> RotaryTable:
    """Of positions [T] or [B, 1, T] to [n, b, 1, C]."""
    whole = (part if part.dim() == 4 else part[None, None] for part in rotary)
    return RotaryTable(*(_chunked(part, num_chunks, size) for part in whole))


def reaches(decays: list[float] | tuple[float, ...], dtype: torch.dtype) -> tuple[int, ...]:
    """Tokens after which decay^n is below the last bit of `dtype` (2^31 for a memory that never fades)."""
    smallest = math.log(torch.finfo(dtype).eps * 1e-2)
    found = []
    for decay in decays:
        slow = decay >= 1.0
        found.append(2**31 if slow else 1 if decay <= 0.0 else math.ceil(smallest / math.log(decay)) + 1)
    return tuple(found)


@dataclass
class _Layout:
    """How tokens sit in chunks: [n, b, C] with b = B, or 1 when all rows agree."""

    ages: Tensor  # [n, b, C] valid tokens of the chunk after this one
    counts: Tensor  # [n, b] valid tokens of the chunk
    is_written: Tensor | None = None  # [n, b, C] float: the write survives to the chunk's end
    segments: Tensor | None = None  # [n, B, C] of each token
    is_continued: Tensor | None = None  # [n, B, C] float: the carried memory is still this token's segment
    survives: Tensor | None = None  # [n, B] float: the carried memory outlives the chunk


def _layout(inputs: ReadInputs, dtype: torch.dtype, num_chunks: int, size: int) -> _Layout:
    device, tokens = inputs.query.device, inputs.query.shape[2]
    missing = num_chunks * size - tokens
    if inputs.valid is None:
        flat = torch.arange(num_chunks * size, device=device)[None] < tokens
    else:
        flat = torch.nn.functional.pad(inputs.valid, (0, missing))
    valid = flat.unflatten(1, (num_chunks, size)).transpose(0, 1)
    seen = valid.cumsum(-1)
    counts = seen[..., -1]
    layout = _Layout(counts[..., None] - seen, counts)
    if inputs.valid is not None or missing:
        layout.is_written = valid.to(dtype)
    if inputs.segments is not None:
        # The last segment goes on at the ragged end.
        rest = inputs.segments[:, -1:].expand(-1, missing)
        layout.segments = torch.cat([inputs.segments, rest], 1).unflatten(1, (num_chunks, size)).transpose(0, 1)
        # The last valid token's segment is what the chunk leaves behind; padding at the right end changes nothing.
        last = torch.where(valid, layout.segments, torch.zeros_like(layout.segments)).amax(-1).cummax(0).values
        before = torch.cat([torch.zeros_like(last[:1]), last[:-1]])
        layout.is_continued = (layout.segments == before[..., None]).to(dtype)
        layout.survives = (last == before).to(dtype)
        layout.is_written = ((layout.segments == last[..., None]) & valid).to(dtype)
    return layout


def _plan(
    inputs: ReadInputs, num_chunks: int, size: int, near: list[int], far: list[int], returns_memory: bool
) -> ReadPlan:
    """Everything that does not depend on queries, keys, values and gains."""
    decays, scales = (_ones(inputs.query) if t is None else t for t in (inputs.decays, inputs.scales))
    layout = _layout(inputs, decays.dtype, num_chunks, size)
    powers = decays[:, None] ** torch.arange(size + 1, device=decays.device, dtype=decays.dtype)  # [M, C + 1]
    # Numbers too small to be normal slow a processor's products tenfold.
    powers = torch.where(powers < torch.finfo(powers.dtype).tiny, torch.zeros_like(powers), powers)
    after = 0 if inputs.reads_after_write else 1
    steps = torch.arange(size, device=decays.device)
    distance = steps[:, None] - steps - after
    table = (powers[:, distance.clamp(min=0)] * (distance >= 0) * scales[:, None, None])[[*near, *far]]
    near_table, window = None, 0
    if inputs.reaches is not None and near:
        window = max(inputs.reaches[m] for m in near)
        back = distance[:window, :window] + window
        near_table = powers[near][:, back.clamp(max=size)] * (back <= size) * scales[near][:, None, None]
    num_writes = num_chunks if returns_memory else num_chunks - 1
    slow = powers[far]
    write, fading = _state_weights(slow, scales[far], layout, num_writes)
    read = slow[:, 1 - after : size + 1 - after].expand(num_chunks, 1, 1, -1, -1)
    if layout.is_continued is not None:
        read = read * layout.is_continued[:, :, None, None]
    is_same, near_is_same = _same_segment(layout.segments, window, table.dtype)
    fading = fading.repeat_interleave(inputs.key.shape[-1], -1)[:, :, None, :, None]
    # Weights that are all 1; the ragged end's keys are zeros as it is.
    reads_all = inputs.decays is None and inputs.segments is None
    writes = None if reads_all and inputs.valid is None else write[:, :, None]
    reads = None if reads_all else read
    return ReadPlan(table, is_same, near_table, near_is_same, writes, fading, reads, returns_memory)


def _ones(like: Tensor) -> Tensor:
    """One number, 1, in fp32 or wider."""
    return torch.ones(1, dtype=wide_type(like), device=like.device)


def _state_weights(powers: Tensor, scales: Tensor, layout: _Layout, num_writes: int) -> tuple[Tensor, Tensor]:
    """Weights of the writes [n', b, S, C] in the states behind their chunks, and what those keep of earlier ones [n', b, S]."""
    write = powers.t()[layout.ages[:num_writes]].mT * scales[:, None]
    fading = powers.t()[layout.counts[:num_writes]]
    if layout.is_written is not None:
        write = write * layout.is_written[:num_writes, :, None]
    if layout.survives is not None:
        fading = fading * layout.survives[:num_writes, :, None]
    return write, fading


def _same_segment(segments: Tensor | None, window: int, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """Whether two tokens [n, B, C] share a segment: inside a chunk, and of the windows of two neighbouring chunks."""
    if segments is None:
        return None, None
    inside = segments[..., :, None] == segments[..., None, :]
    near = segments[1:, :, :window, None] == segments[:-1, :, None, segments.shape[-1] - window :]
    return inside[:, :, None].to(dtype), near[:, :, None].to(dtype)
