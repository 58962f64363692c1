"""Arithmetic on ``dict[str, Tensor]``; coefficients are numbers, or one a lane: ``[*L]`` against ``[*L, *shape]``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cache

import torch
from torch import Tensor, finfo, ones_like, where, zeros_like

from metanudge.together import gathered, groups, operands, parted
from metanudge.types import Params

Scalar = float | Tensor


def over(coefficient: Tensor, leaf: Tensor) -> Tensor:
    """Give a per-lane coefficient the trailing axes, and the precision, it needs to multiply ``leaf``."""
    if coefficient.is_floating_point():
        coefficient = coefficient.to(leaf.dtype)
    if coefficient.ndim == 0:  # which a sharded leaf takes too
        return coefficient
    return coefficient.reshape(coefficient.shape + (1,) * (leaf.ndim - coefficient.ndim))


def or_one(divisor: Tensor) -> Tensor:
    """``divisor`` with zeros replaced by one; the numerator is zero there too. An epsilon would have a unit."""
    return where(divisor == 0, ones_like(divisor), divisor)


def tree_map(function: Callable[..., Tensor], first: Mapping[str, Tensor], *rest: Mapping[str, Tensor]) -> Params:
    """Apply ``function`` leaf by leaf."""
    return {name: function(leaf, *(tree[name] for tree in rest)) for name, leaf in first.items()}


def compute(formula: Callable[..., Tensor], first: Mapping[str, Tensor], *rest: Mapping[str, Tensor]) -> Params:
    """Apply a formula of plain arithmetic, to leaves one by one or together (``Together``)."""
    found: Params = {}
    for names, given in operands(first, *rest):
        found |= parted(names, formula(*given))
    return found


def spend(formula: Callable[..., Tensor], first: Params, *rest: Mapping[str, Tensor]) -> Params:
    """``compute`` that empties ``first``: leaves are let go when they have been used, so that both never exist."""
    found: Params = {}
    for names, one in emptied(first):
        found |= parted(names, formula(one, *(gathered(tree, names) for tree in rest)))
    return found


def emptied(leaves: Params) -> Iterator[tuple[list[str], Tensor]]:
    """Operands of ``leaves`` and their names; each is taken away when it is given."""
    for names in list(groups(leaves)):
        yield names, gathered({name: leaves.pop(name) for name in names}, names)


@cache
def accumulator(dtype: torch.dtype) -> torch.dtype:
    """What sums over tensors of ``dtype`` are kept in: float32 for those of less precision."""
    return torch.promote_types(dtype, torch.float32)


def accumulate(sums: Params, names: list[str], part: Tensor, weight: float | None = None) -> None:
    """Add the operand of ``names`` to sums in place; without a ``weight`` a sum begins in the operand's own memory."""
    if names[0] in sums:
        gathered(sums, names).add_(part, alpha=1.0 if weight is None else weight)
        return
    wide = part.to(accumulator(part.dtype))
    sums |= parted(names, wide if weight is None else weight * wide)


def add(a: Params, b: Params) -> Params:
    """Return a + b."""
    return compute(lambda x, y: x + y, a, b)


def subtract(a: Params, b: Params) -> Params:
    """Return a - b."""
    return compute(lambda x, y: x - y, a, b)


def scale(coefficient: Scalar, a: Params) -> Params:
    """Return c a."""
    if isinstance(coefficient, Tensor):
        return compute(lambda x: over(coefficient, x) * x, a)
    return compute(lambda x: coefficient * x, a)


def axpy(coefficient: Scalar, x: Params, y: Params) -> Params:
    """Return c x + y."""
    if isinstance(coefficient, Tensor):
        return compute(lambda u, v: v.addcmul(over(coefficient, u), u), x, y)
    return compute(lambda u, v: v.add(u, alpha=coefficient), x, y)


def select(mask: Tensor, a: Params, b: Params) -> Params:
    """``a`` in the lanes where ``mask`` holds, ``b`` elsewhere."""
    return tree_map(lambda x, y: where(over(mask, x), x, y), a, b)


def touched(a: Tensor, by: Tensor, least: Tensor) -> Tensor:
    """``a`` with zeros where |by| <= least: idle parameters do not count towards a length."""
    return a.masked_fill(by.abs() <= over(least, by), 0.0)


def round_off(a: Params) -> float:
    """Unit of round-off of the coarsest leaf."""
    return max(finfo(leaf.dtype).eps for leaf in a.values())


def zeros(a: Params) -> Params:
    """Return zeros in the shape of ``a``."""
    return tree_map(zeros_like, a)


def detach(a: Params) -> Params:
    """Cut every leaf from the graph."""
    return tree_map(lambda x: x.detach(), a)


def clone(a: Params) -> Params:
    """Copy every leaf."""
    return tree_map(lambda x: x.clone(), a)
