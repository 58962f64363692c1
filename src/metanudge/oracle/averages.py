"""Whether a loss is the mean over its examples, as taking it piece by piece supposes."""

from __future__ import annotations

import math
from collections.abc import Callable
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


def settled(
    role: Role,
    look: Callable[[Batch], Look],
    batch: Batch,
    microbatch: int,
    round_off: float,
    is_random: Callable[[], bool],
) -> bool:
    """Compare the loss of a piece with the mean of those of its halves; False where the loss is too random to tell.

    And its gradient: where all examples have one loss, as in a model that has learnt nothing yet, any weights make the
    mean. The piece holds the first examples and the last, which may be padding. Cost: a gradient of a piece, and of its
    two halves.

    Args:
        role: Of the loss.
        look: At a batch.
        batch: To take the piece from.
        microbatch: Size of the piece.
        round_off: Relative, of gradients.
        is_random: Whether the loss has drawn random numbers, as with dropout.

    Raises:
        LossError: It is their sum.

    Warns:
        UserWarning: It is neither: what is added up over pieces is another loss then.
    """
    half = microbatch // 2
    halves = [
        tree_map(lambda leaf, part=part: leaf[part] if leaf.ndim else leaf, batch)
        for part in (slice(half), slice(-half, None))
    ]
    piece = tree_map(lambda *two: torch.cat(two) if two[0].ndim else two[0], *halves)
    (whole, slope), (first, left), (second, right) = map(look, (piece, *halves))
    size, mean = abs(whole), (first + second) / 2
    longest = float(torch.stack([one.norm() for one in (slope, left, right)]).max())
    off = float((slope - (left + right) / 2).norm()) / longest if longest > LEAST * abs(whole) else 0.0
    turned = off > max(FAR, 256 * round_off)
    if abs(whole - mean) < NEAR * size and not turned:
        return True
    if abs(whole - first - second) < NEAR * size and min(abs(first), abs(second)) > 0.1 * size:
        raise LossError(
            f"the {role.name.lower()} loss adds up over the examples (it is {whole:.4g}, and of the two halves "
            f"{first:.4g} and {second:.4g}), while microbatch takes the mean over pieces: reduce it with .mean() "
            '(reduction="mean"), or leave microbatch out'
        )
    if is_random():
        return False
    far = not abs(whole - mean) <= FAR * max(size, abs(mean))  # NaN of a half is far as well
    if math.isfinite(whole) and (far or turned):
        warn(
            f"the {role.name.lower()} loss is no mean over the examples: of a piece of {microbatch} it is {whole:.4g}, "
            f"and of the two halves {first:.4g} and {second:.4g}; its gradient is {100 * off:.2g} % off the mean of "
            "theirs. microbatch takes the mean over pieces, which is another loss then: of a masked mean (as over the "
            "labels that are not -100), weigh the examples of the whole task beforehand, and take their plain mean; or "
            "leave microbatch out",
            UserWarning,
        )
    return True
