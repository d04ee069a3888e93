"""Whether a forward pass runs as it is written, or is being recorded by torch.compile or torch.func."""

from __future__ import annotations

import torch
from torch import Tensor


def is_traced() -> bool:
    """Autograd then has to see plain operations: a function with gradients of its own would break the graph or be refused."""
    if torch.compiler.is_compiling():
        return True
    return bool(torch._C._are_functorch_transforms_active())


def may_look(tensor: Tensor) -> bool:
    """Whether Python may ask for values, which makes a GPU wait, breaks a compiled graph and is refused under torch.func."""
    return tensor.device.type == "cpu" and not is_traced() and type(tensor) in (Tensor, torch.nn.Parameter)
