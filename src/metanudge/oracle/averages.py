"""Whether a loss is the mean over its examples, as taking it piece by piece supposes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from metanudge.errors import LossError
from metanudge.types import Batch, Role
from metanudge.warned import warn

NEAR = 1e-3
"""Relative difference up to which two losses are the same."""
FAR = 2e-2
"""And from which on they differ, in bfloat16 too; gradients as well, in float32."""

LEAST = 1e-5
"""Length of a gradient, times the loss, below which it may be round-off alone, as that of a bias that has no effect."""


class Look(NamedTuple):
    """What a batch gives: the loss, and some of its gradient, which may be ``[0.]``."""

    loss: float
    gradient: Tensor


def ends(batch: Batch, size: int) -> Batch:
    """The first examples of a batch and the last, which may be padding: ``size`` // 2 of each."""
    half = size // 2
    halves = [
        tree_map(lambda leaf, part=part: leaf[part] if leaf.ndim else leaf, batch)
        for part in (slice(half), slice(-half, None))
    ]
    both: Batch = tree_map(lambda *two: torch.cat(two) if two[0].ndim else two[0], *halves)
    return both


def settled(role: Role, piece: Look, halves: Sequence[tuple[Look, float]], is_random: bool, round_off: float) -> bool:
    """Compare the loss of a piece with the mean of those of its halves; False where it is too random to tell.

    And its gradient: where all examples have one loss, as in a model that has learnt nothing yet, any weights make the
    mean.

    Args:
        role: Of the loss.
        piece: What it gives.
        halves: What both halves give, and their shares in the mean.
        is_random: Whether the loss has drawn random numbers, as with dropout.
        round_off: Relative, of gradients.

    Raises:
        LossError: It is their sum.

    Warns:
        UserWarning: It is neither: what is added up over pieces is another loss then.
    """
    (whole, slope), ((first, left), share), ((second, right), rest) = piece, *halves
    size, mean = abs(whole), share * first + rest * second
    longest = float(torch.stack([one.norm() for one in (slope, left, right)]).max())
    off = float((slope - share * left - rest * right).norm()) / longest if longest > LEAST * abs(whole) else 0.0
    turned = off > max(FAR, 256 * round_off)
    if abs(whole - mean) < NEAR * size and not turned:
        return True
    if abs(whole - first - second) < NEAR * size and min(abs(first), abs(second)) > 0.1 * size:
        raise LossError(
            f"the {role.name.lower()} loss adds up over the examples (it is {whole:.4g}, and of the two halves "
            f"{first:.4g} and {second:.4g}), while microbatch takes the mean over pieces: reduce it with .mean() "
            '(reduction="mean"), or leave microbatch out'
        )
    if is_random:
        return False
    far = not abs(whole - mean) <= FAR * max(size, abs(mean))  # NaN of a half is far as well
    if math.isfinite(whole) and (far or turned):
        warn(
            f"the {role.name.lower()} loss is no mean over the examples: of a piece it is {whole:.4g}, "
            f"and of the two halves {first:.4g} and {second:.4g}; its gradient is {100 * off:.2g} % off the mean of "
            "theirs. microbatch takes the mean over pieces, weighed by their targets that count, which is another loss "
            "then: mark targets that do not count by -100, or NaN, in the place of a mask; or weigh the examples of "
            "the whole task beforehand, and take their plain mean; or leave microbatch out",
            UserWarning,
        )
    return True
