"""Many leaves as one operand of a formula: one call of torch's foreach kernels where a GPU would wait for one a leaf.

A formula of plain arithmetic is written once, of tensors. Leaf by leaf it is given tensors; where launching a kernel
takes longer than running it, leaves come together, as an operand that knows the same arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor

from metanudge.bundles import plain
from metanudge.types import Params

TOGETHER = {"cuda"}
"""Kinds of devices on which leaves come together; on others, where a kernel is launched in no time, one by one."""
PARTS = 4
"""Leaves come together in about so many parts, one after the other: a formula may have three of that size alive."""


class Together:
    """Leaves that compute as if they were one tensor; what the formulas ask for, and no more.

    Attributes:
        leaves: Of one dtype.
    """

    def __init__(self, leaves: Sequence[Tensor]) -> None:
        self.leaves = list(leaves)

    @property
    def dtype(self) -> torch.dtype:
        """Of all leaves."""
        return self.leaves[0].dtype

    @property
    def ndim(self) -> int:
        """Of every leaf: only stacks, which all have the same axes, are asked for it."""
        (found,) = {leaf.ndim for leaf in self.leaves}
        return found

    def to(self, dtype: torch.dtype) -> Together:
        """In another precision."""
        return self if dtype == self.dtype else Together([leaf.to(dtype) for leaf in self.leaves])

    def __add__(self, other: Together) -> Together:
        return Together(torch._foreach_add(self.leaves, other.leaves))

    def __sub__(self, other: Together) -> Together:
        return Together(torch._foreach_sub(self.leaves, other.leaves))

    def __mul__(self, other: Together | Tensor | float) -> Together:
        if isinstance(other, Tensor) and other.ndim:  # one number a lane
            return Together(torch._foreach_mul(self.leaves, [other] * len(self.leaves)))
        return Together(torch._foreach_mul(self.leaves, other.leaves if isinstance(other, Together) else other))

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> Together:
        return Together(torch._foreach_div(self.leaves, divisor))

    def __neg__(self) -> Together:
        return Together(torch._foreach_neg(self.leaves))

    def add(self, other: Together, *, alpha: float = 1) -> Together:
        """``self + alpha * other``."""
        return Together(torch._foreach_add(self.leaves, other.leaves, alpha=alpha))

    def addcmul(self, factor: Tensor, other: Together) -> Together:
        """``self + factor * other``."""
        return self + other.to(torch.promote_types(self.dtype, other.dtype)) * factor

    def add_(self, other: Together, *, alpha: float = 1) -> Together:
        """The same in place of the leaves."""
        torch._foreach_add_(self.leaves, other.leaves, alpha=alpha)
        return self

    def mul_(self, factor: float) -> Together:
        """``factor * self``, in place of the leaves."""
        torch._foreach_mul_(self.leaves, factor)
        return self

    def div_(self, divisor: float) -> Together:
        """``self / divisor``, in place of the leaves."""
        torch._foreach_div_(self.leaves, divisor)
        return self

    def abs(self) -> Together:
        """Magnitudes."""
        return Together(torch._foreach_abs(self.leaves))

    def __le__(self, most: Tensor) -> Together:
        return Together([leaf <= most for leaf in self.leaves])

    def masked_fill(self, masks: Together, value: float) -> Together:
        """``value`` where ``masks`` holds."""
        pairs = zip(self.leaves, masks.leaves, strict=True)
        return Together([leaf.masked_fill(mask, value) for leaf, mask in pairs])

    def sum(self) -> Tensor:
        """Over all numbers."""
        return torch.stack([leaf.sum() for leaf in self.leaves]).sum()

    def square_sum(self) -> Tensor:
        """Of their squares, which are not kept."""
        return torch.stack(torch._foreach_norm(self.leaves)).square().sum()


def operands(first: Mapping[str, Tensor], *rest: Mapping[str, Tensor]) -> Iterator[tuple[list[str], list[Tensor]]]:
    """What a formula is given, part by part: the names of the leaves that it is of, and of every tree the operand.

    Which leaves come together is decided by those of ``first``; not within ``torch.func`` transforms, which foreach
    kernels do not know.
    """
    squared = bool(rest) and all(tree is first for tree in rest)  # nothing of its size is made for a norm
    for names in groups(first, 1 if squared else PARTS):
        one = gathered(first, names)
        yield names, [one, *(one if tree is first else gathered(tree, names) for tree in rest)]


def groups(leaves: Mapping[str, Tensor], parts: int = PARTS) -> Iterator[list[str]]:
    """Names of what comes together, in order: of about as many ``parts``."""
    if not leaves or next(iter(leaves.values())).device.type not in TOGETHER:
        yield from ([name] for name in leaves)
        return
    most = sum(leaf.numel() for leaf in leaves.values()) // parts
    group: list[str] = []
    kind: torch.dtype | None = None
    room = 0
    for name, leaf in leaves.items():
        fits = _plain(leaf) and leaf.dtype == kind and leaf.numel() <= room
        if group and not fits:
            yield group
            group = []
        if not group:
            kind, room = leaf.dtype if _plain(leaf) else None, most
        group.append(name)
        room -= leaf.numel()
    if group:
        yield group


def gathered(tree: Mapping[str, Tensor], names: Sequence[str]) -> Tensor:
    """The leaves of ``names`` as one operand, which passes for a tensor in a formula of arithmetic."""
    if len(names) == 1:
        return tree[names[0]]
    return cast(Tensor, Together([tree[name] for name in names]))


def parted(names: Sequence[str], found: Tensor) -> Params:
    """And back: what a formula gave, by name."""
    given: object = found
    return dict(zip(names, given.leaves if isinstance(given, Together) else [found], strict=True))


def product(a: Tensor, b: Tensor, *, square: bool) -> Tensor:
    """The inner product of two operands; ``square`` if they are one."""
    given: object = a
    return given.square_sum() if square and isinstance(given, Together) else (a * b).sum()


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two operands are the same leaves, and not only equal ones."""
    one, other = cast(object, a), cast(object, b)
    if isinstance(one, Together) and isinstance(other, Together):
        return all(x is y for x, y in zip(one.leaves, other.leaves, strict=True))
    return a is b


def _plain(leaf: Tensor) -> bool:
    """And not part of a graph."""
    return plain(leaf) and not leaf.requires_grad
