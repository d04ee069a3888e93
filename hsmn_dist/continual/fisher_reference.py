"""One backward pass per example: slow, obvious, and right for every module. The batched path is tested against it.

`torch.autograd.grad` instead of `backward`, so that nothing that an engine accumulates is touched. Gradients are taken for
chunks of the parameters, one backward pass each, where whole-model gradients would not fit (ZeRO-3).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from hsmn_dist.distributed.shards import ParamShard

CHUNK_ELEMENTS = 1 << 28


def parameter_chunks(
    shards: Sequence[ParamShard], parameters: Mapping[str, nn.Parameter], max_elements: int | None
) -> Iterator[dict[str, nn.Parameter]]:
    """Parameters, last one first, in chunks of about `max_elements` (None: all at once)."""
    chunk: dict[str, nn.Parameter] = {}
    num_elements = 0
    for shard in reversed(shards):
        chunk[shard.name] = parameters[shard.name]
        num_elements += torch.Size(shard.shape).numel()
        if max_elements is not None and num_elements >= max_elements:
            yield chunk
            chunk, num_elements = {}, 0
    if chunk:
        yield chunk


def gradients(loss: Tensor, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """The ordinary gradient of a scalar, by name; parameters that it does not depend on are left out."""
    if not loss.requires_grad:
        return {}
    found: Sequence[Tensor | None] = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return {name: g.detach() for name, g in zip(parameters, found, strict=True) if g is not None}


def add_squares_one_by_one(
    loss_of_row: Callable[[int], Tensor],
    num_rows: int,
    parameters: Mapping[str, nn.Parameter],
    totals: Callable[[str], Tensor],
) -> None:
    """totals(name) += square of the gradient of each row's loss, by one forward and backward pass per row.

    Args:
        loss_of_row: the scalar loss of row b alone.
        num_rows: rows of the batch.
        parameters: whose gradients are taken.
        totals: the tensor to add to, by name, in the parameter's shape.
    """
    for row in range(num_rows):
        for name, gradient in gradients(loss_of_row(row), parameters).items():
            total = totals(name)
            gradient = gradient.to(total.dtype)
            total.addcmul_(gradient, gradient)
