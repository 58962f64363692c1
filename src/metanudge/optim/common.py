"""What the optimizers share: the closure, and the norm over all parameters, whole or sharded."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


def total_norm(tensors: Iterable[Tensor]) -> Tensor:
    """Norm of all entries, as a plain 0-d tensor; sharded tensors (DTensor, FSDP2) are summed over their ranks."""
    norm: Tensor = torch.nn.utils.get_total_norm(list(tensors))
    full = getattr(norm, "full_tensor", None)
    return norm if full is None else full()


def call(closure: Callable[[], float] | None) -> float | None:
    """Evaluate the closure of ``Optimizer.step``, if there is one."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()
