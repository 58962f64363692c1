"""Tensors of which every rank of FSDP2 holds a part."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 or the like holds parameters as DTensors."""
    return any(hasattr(parameter, "device_mesh") for parameter in model.parameters())


def whole(tensor: Tensor) -> Tensor:
    """The plain tensor of which the ranks hold parts."""
    found: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return found


def sharded_like(tensor: Tensor, like: Any) -> Tensor:
    """A tensor that every rank has whole, cut as ``like`` is."""
    if not hasattr(like, "device_mesh"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)
