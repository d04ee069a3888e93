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
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass
class ReadInputs:
    """One call of `decayed_reads`.

    Attributes:
        query, key: [B, H, T, K].
        value: [B, H, T, J].
        gains: [B, H, T, M] read weight of each module.
        decays: [M] in [0, 1].
        scales: [M] write weight of each module.
        segments: [B, T] integers that never fall; memory is cleared where they change. Segment 0 continues the carried
            memory. None: one segment.
        valid: [B, T] bool; tokens that are not valid neither write nor age the memory. They may stand at the right end
            only. None: all valid.
        reads_after_write: o_t sees token t's own write; False reads the memory as token t - 1 left it.
        reaches: `reaches(decays, dtype)`, as plain integers; None treats every module as slow.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    gains: Tensor
    decays: Tensor
    scales: Tensor
    segments: Tensor | None = None
    valid: Tensor | None = None
    reads_after_write: bool = True
    reaches: tuple[int, ...] | None = None


def decayed_reads(
    inputs: ReadInputs, memory: Tensor | None, chunk_size: int, returns_memory: bool
) -> tuple[Tensor, Tensor | None]:
    """Reads [B, H, T, J] of every token, and the memory [B, H, M, K, J] (fp32 or wider) after the last one.

    `memory` None starts from zero. With `returns_memory` False the second result is None and its cost is saved.
    """
    tokens = inputs.query.shape[2]
    size = min(chunk_size, tokens)
    num_chunks = -(-tokens // size)
    query, key, value, gains = (
        _chunked(t, num_chunks, size) for t in (inputs.query, inputs.key, inputs.value, inputs.gains)
    )
    layout = _layout(inputs, num_chunks, size)
    powers = _powers(inputs.decays, size)  # [M, C + 1]
    reads = _inner_reads(query, key, value, gains, inputs, layout, powers)
    if memory is None and not returns_memory and num_chunks > 1:
        return _training_reads(query, key, value, gains, inputs, layout, powers, reads)[:, :, :tokens], None
    if memory is not None or num_chunks > 1 or returns_memory:
        carried, memory = _carry(key, value, inputs, memory, layout, powers, returns_memory)
        if carried is not None:
            reads = reads + _outer_reads(query, gains, carried, inputs, layout, powers)
    return reads.flatten(2, 3)[:, :, :tokens], memory


def _training_reads(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gains: Tensor,
    inputs: ReadInputs,
    layout: _Layout,
    powers: Tensor,
    reads: Tensor,
) -> Tensor:
    """Reads of all chunks [B, H, T, J] when no memory comes or goes: only slow modules are carried as states.

    A fast module has lost a write, to the last bit, after its reach; where that fits into a chunk, the few tokens it can
    still see of the chunk before are read directly, and K x J states are kept for the slow modules alone.
    """
    size = query.shape[-2]
    is_fast, window = _fast_modules(inputs.reaches or (2**31,) * len(inputs.decays), size)
    fast, slow = ([m for m, is_one in enumerate(is_fast) if is_one is wanted] for wanted in (True, False))
    near, far = _divided(gains, fast, slow)
    # Padding and whole products, not slices: the backward pass of a slice fills the full tensor with zeros.
    if window:
        seen = _window_reads(query, key, value, near, inputs, powers[fast], inputs.scales[fast], window)
        reads = reads + torch.nn.functional.pad(seen, (0, 0, 0, size - window, 1, 0))
    if slow:
        some = replace(inputs, decays=inputs.decays[slow], scales=inputs.scales[slow])
        carried, _ = _carry(key, value, some, None, layout, powers[slow], False)
        assert carried is not None
        reads = reads + _outer_reads(query, far, carried, some, layout, powers[slow])
    return reads.flatten(2, 3)


def _divided(gains: Tensor, fast: list[int], slow: list[int]) -> tuple[Tensor, Tensor]:
    """Gains of the fast and of the slow modules; cut once where the fast ones come first, which is cheaper than picking."""
    if [*fast, *slow] == list(range(gains.shape[-1])):
        near, far = gains.split([len(fast), len(slow)], -1)
        return near, far
    return gains[..., fast], gains[..., slow]


def _fast_modules(reaches: tuple[int, ...], size: int) -> tuple[list[bool], int]:
    """Which modules reach less than a chunk back, and the farthest reach among them."""
    is_fast = [reach < size for reach in reaches]
    return is_fast, max([0, *(reach for reach in reaches if reach < size)])


def _window_reads(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gains: Tensor,
    inputs: ReadInputs,
    powers: Tensor,
    scales: Tensor,
    window: int,
) -> Tensor:
    """Reads by the first `window` tokens of each chunk but the first, of the last `window` tokens of the chunk before."""
    steps = torch.arange(window, device=query.device)
    distance = steps[:, None] + window - steps[None, :] - (0 if inputs.reads_after_write else 1)
    table = powers[:, distance.clamp(max=powers.shape[1] - 1)] * (distance < powers.shape[1]).to(powers.dtype)
    table = table * scales[:, None, None]
    mix = torch.einsum("bhnim,mij->bhnij", gains[:, :, 1:, :window], table.to(gains.dtype))
    if inputs.segments is not None:
        numbers = _chunk_numbers(inputs.segments, query.shape[2], query.shape[3])
        mix = mix * (numbers[:, 1:, :window, None] == numbers[:, :-1, None, -window:])[:, None].to(mix.dtype)
    scores = query[:, :, 1:, :window] @ key[:, :, :-1, -window:].mT
    return (scores * mix.to(scores.dtype)) @ value[:, :, :-1, -window:]


def _chunk_numbers(segments: Tensor, num_chunks: int, size: int) -> Tensor:
    """Segment numbers by chunk [B, n, C]; the last one goes on at the ragged end."""
    missing = num_chunks * size - segments.shape[1]
    return torch.cat([segments, segments[:, -1:].expand(-1, missing)], 1).reshape(-1, num_chunks, size)


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
    """How tokens sit in chunks: [b, n, C] with b = B, or 1 when all rows agree."""

    ages: Tensor  # [b, n, C] valid tokens of the chunk after this one
    counts: Tensor  # [b, n] valid tokens of the chunk
    is_written: Tensor | None  # [b, n, C] float: the write survives to the chunk's end
    is_same: Tensor | None  # [B, n, C, C] float: both tokens of one segment
    is_continued: Tensor | None  # [B, n, C] float: the carried memory is still this token's segment
    survives: Tensor | None  # [B, n] float: the carried memory outlives the chunk


def _chunked(tensor: Tensor, num_chunks: int, size: int) -> Tensor:
    """[B, H, T, X] -> [B, H, n, C, X], zeros at the ragged end."""
    batch, heads, tokens, width = tensor.shape
    missing = num_chunks * size - tokens
    if missing:
        tensor = torch.nn.functional.pad(tensor, (0, 0, 0, missing))
    # One copy here: every product would make its own otherwise.
    return tensor.contiguous().reshape(batch, heads, num_chunks, size, width)


def _layout(inputs: ReadInputs, num_chunks: int, size: int) -> _Layout:
    device, tokens = inputs.query.device, inputs.query.shape[2]
    dtype = inputs.gains.dtype
    shape = (num_chunks, size)
    missing = num_chunks * size - tokens
    if inputs.valid is None:
        flat = torch.arange(num_chunks * size, device=device)[None] < tokens
    else:
        flat = torch.nn.functional.pad(inputs.valid, (0, missing))
    valid = flat.reshape(-1, *shape)
    seen = valid.cumsum(-1)
    counts = seen[..., -1]
    layout = _Layout(counts[..., None] - seen, counts, None, None, None, None)
    if inputs.valid is not None or missing:
        layout.is_written = valid.to(dtype)
    if inputs.segments is not None:
        ids = _chunk_numbers(inputs.segments, num_chunks, size)
        # The last valid token's segment is what the chunk leaves behind; padding at the right end changes nothing.
        last = torch.where(valid, ids, torch.zeros_like(ids)).amax(-1).cummax(-1).values
        before = torch.cat([torch.zeros_like(last[:, :1]), last[:, :-1]], 1)
        layout.is_same = (ids[..., :, None] == ids[..., None, :]).to(dtype)
        layout.is_continued = (ids == before[..., None]).to(dtype)
        layout.survives = (last == before).to(dtype)
        layout.is_written = ((ids == last[..., None]) & valid).to(dtype)
    return layout


def _powers(decays: Tensor, size: int) -> Tensor:
    """decay^0 ... decay^C: [M, C + 1]."""
    return decays[:, None] ** torch.arange(size + 1, device=decays.device, dtype=decays.dtype)


def _inner_reads(
    query: Tensor, key: Tensor, value: Tensor, gains: Tensor, inputs: ReadInputs, layout: _Layout, powers: Tensor
) -> Tensor:
    """Reads of what was written inside the same chunk: [B, H, n, C, J]."""
    size = query.shape[-2]
    offset = 0 if inputs.reads_after_write else 1
    steps = torch.arange(size, device=query.device)
    distance = steps[:, None] - steps[None, :] - offset
    table = powers[:, distance.clamp(min=0)] * (distance >= 0).to(powers.dtype)  # [M, C, C]
    table = table * inputs.scales[:, None, None]
    scores = query @ key.mT
    if len(table) == 1:
        # One module: its gain scales rows of the result, and no matrix of weights is needed.
        mix = table[0] if layout.is_same is None else table[0] * layout.is_same[:, None]
        return (scores * mix.to(scores.dtype)) @ value * gains.to(value.dtype)
    mix = torch.einsum("bhnim,mij->bhnij", gains, table.to(gains.dtype))
    if layout.is_same is not None:
        mix = mix * layout.is_same[:, None]
    return (scores * mix.to(scores.dtype)) @ value


def _carry(
    key: Tensor,
    value: Tensor,
    inputs: ReadInputs,
    memory: Tensor | None,
    layout: _Layout,
    powers: Tensor,
    returns_memory: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Memory at the start of every chunk [B, H, n, M, K, J] (None when all are zero) and after the last one."""
    batch, heads, num_chunks, _, width = key.shape
    modules = powers.shape[0]
    last = num_chunks if returns_memory else num_chunks - 1
    weights = powers.t()[layout.ages] * inputs.scales  # [b, n, C, M]
    if layout.is_written is not None:
        weights = weights * layout.is_written[..., None]
    fading = powers.t()[layout.counts]  # [b, n, M]
    if layout.survives is not None:
        fading = fading * layout.survives[..., None]
    starts = [memory]
    if last:
        count = num_chunks if num_chunks >= 8 else last  # one write too many costs less than two slices
        keys, values = (key, value) if count == num_chunks else (key[:, :, :count], value[:, :, :count])
        scaled = keys[..., None, :] * weights[:, None, :count, :, :, None].to(key.dtype)
        writes = scaled.flatten(-2).mT @ values  # [B, H, n, M * K, J]
        writes = writes.reshape(batch, heads, count, modules, width, -1).to(_wide(writes.dtype))
        for chunk, written in enumerate(writes.unbind(2)[:last]):  # one backward step, where indexing takes n
            before = starts[-1]
            kept = None if before is None else before * fading[:, None, chunk, :, None, None].to(before.dtype)
            starts.append(written if kept is None else kept + written)
    after = starts.pop() if returns_memory else None
    if memory is None:
        if num_chunks == 1:
            return None, after
        first = starts[1] if len(starts) > 1 else after
        assert first is not None
        starts[0] = torch.zeros_like(first)
    return torch.stack([s for s in starts if s is not None], 2), after


def _outer_reads(
    query: Tensor, gains: Tensor, carried: Tensor, inputs: ReadInputs, layout: _Layout, powers: Tensor
) -> Tensor:
    """Reads of what earlier chunks left: [B, H, n, C, J]."""
    size = query.shape[-2]
    fade = powers[:, 1:] if inputs.reads_after_write else powers[:, :size]
    weights = gains * fade.t().to(gains.dtype)  # [B, H, n, C, M]
    if layout.is_continued is not None:
        weights = weights * layout.is_continued[:, None, :, :, None]
    scaled = query[..., None, :] * weights[..., None].to(query.dtype)
    return scaled.flatten(-2) @ carried.flatten(-3, -2).to(query.dtype)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """States are carried in fp32 at least: half precision would lose slow modules."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
