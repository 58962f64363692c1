"""What the optimizers share: the closure, and the norm over all parameters, whole or sharded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metanudge.sharding import whole
from metanudge.tree import accumulator


class Length(NamedTuple):
    """Norm of all entries, ``peak * ratio``, in float32 at least, 0-d each: neither over- nor underflows.

    Attributes:
        peak: The largest entry; one where there is none, or where it is not finite.
        ratio: Norm of the entries over ``peak``; zero where all are.
    """

    peak: Tensor
    ratio: Tensor

    @classmethod
    def of(cls, tensors: Iterable[Tensor]) -> Length:
        """Of all entries together; sharded tensors (DTensor, FSDP2) are looked at over their ranks."""
        entries = list(tensors)
        largest = _largest(entries)
        peak = torch.where((largest > 0) & largest.isfinite(), largest, torch.ones_like(largest))
        norms = [torch.linalg.vector_norm(wide(leaf) / peak.to(leaf.device)) for leaf in entries]
        ratio = torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]))
        return cls(peak, whole(ratio).to(peak.device))

    def moved(self, parameter: Tensor, along: Tensor, size: Tensor) -> None:
        """``parameter`` by ``-size`` times ``along / peak``, in place."""
        unit = wide(along) / self.peak.to(along.device)
        parameter.sub_((unit * size.to(unit.device, unit.dtype)).to(parameter.dtype))


def _largest(entries: Sequence[Any]) -> Tensor:
    """The largest magnitude, over the ranks that hold parts of sharded tensors; a rank may hold none of some."""
    parts = [leaf.to_local() if hasattr(leaf, "to_local") else leaf for leaf in entries]
    tops = [wide(part.abs().amax()) if part.numel() else wide(part.new_zeros(())) for part in parts]
    top = torch.stack([one.to(tops[0].device) for one in tops]).amax()
    mesh = next((leaf.device_mesh for leaf in entries if hasattr(leaf, "device_mesh")), None)
    if mesh is None:
        return top
    from torch.distributed.tensor import DTensor, Partial

    return whole(DTensor.from_local(top, mesh, [Partial("max")] * mesh.ndim, run_check=False))


def wide(tensor: Tensor) -> Tensor:
    """In float32 at least."""
    return tensor.to(accumulator(tensor.dtype))


def call(closure: Callable[[], float] | None) -> float | None:
    """Evaluate the closure of ``Optimizer.step``, if there is one."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()
