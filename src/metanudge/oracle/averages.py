"""Whether a loss is the mean over its examples, as taking it piece by piece supposes."""

from __future__ import annotations

from collections.abc import Callable

from metanudge.batching import pieces
from metanudge.errors import LossError
from metanudge.types import Batch, Role


def is_mean(role: Role, loss: Callable[[Batch], float], batch: Batch, microbatch: int) -> bool:
    """Whether the loss of a piece is the mean of those of its halves; of a random loss, as with dropout, it is not.

    Cost: a piece, and its two halves, forward.

    Raises:
        LossError: It is their sum.
    """
    piece, _ = next(pieces(batch, microbatch - microbatch % 2))
    halves = [half for half, _ in pieces(piece, microbatch // 2)]
    whole, first, second = loss(piece), *map(loss, halves)
    near = 1e-3 * abs(whole)
    if abs(whole - (first + second) / 2) < near:
        return True
    if abs(whole - first - second) < near and min(abs(first), abs(second)) > 0.1 * abs(whole):
        raise LossError(
            f"the {role.name.lower()} loss adds up over the examples (it is {whole:.4g}, and of the two halves "
            f"{first:.4g} and {second:.4g}), while microbatch takes the mean over pieces: reduce it with .mean() "
            '(reduction="mean"), or leave microbatch out'
        )
    return False
