"""Whether a loss is the mean over its examples, as taking it piece by piece supposes."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch.utils._pytree import tree_map

from metanudge.errors import LossError
from metanudge.types import Batch, Role
from metanudge.warned import warn

NEAR = 1e-3
"""Relative difference up to which two losses are the same."""
FAR = 2e-2
"""And from which on they differ, in bfloat16 too."""


def settled(
    role: Role, loss: Callable[[Batch], float], batch: Batch, microbatch: int, is_random: Callable[[], bool]
) -> bool:
    """Compare the loss of a piece with the mean of those of its halves; False where the loss is too random to tell.

    The piece holds the first examples and the last, which may be padding. Cost: a piece, and its two halves, forward.

    Args:
        role: Of the loss.
        loss: Of a batch.
        batch: To take the piece from.
        microbatch: Size of the piece.
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
    whole, first, second = map(loss, (piece, *halves))
    size, mean = abs(whole), (first + second) / 2
    if abs(whole - mean) < NEAR * size:
        return True
    if abs(whole - first - second) < NEAR * size and min(abs(first), abs(second)) > 0.1 * size:
        raise LossError(
            f"the {role.name.lower()} loss adds up over the examples (it is {whole:.4g}, and of the two halves "
            f"{first:.4g} and {second:.4g}), while microbatch takes the mean over pieces: reduce it with .mean() "
            '(reduction="mean"), or leave microbatch out'
        )
    if is_random():
        return False
    if math.isfinite(whole) and not abs(whole - mean) <= FAR * max(size, abs(mean)):  # NaN of a half is far as well
        warn(
            f"the {role.name.lower()} loss is no mean over the examples: of a piece of {microbatch} it is {whole:.4g}, "
            f"and of the two halves {first:.4g} and {second:.4g}. microbatch takes the mean over pieces, which is "
            "another loss then: of a masked mean, weigh the examples of the whole task beforehand, and take their "
            "plain mean; or leave microbatch out",
            UserWarning,
        )
    return True
