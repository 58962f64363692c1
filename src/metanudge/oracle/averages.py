"""Whether a loss is the mean over its examples, as taking it piece by piece supposes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
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


class Together(NamedTuple):
    """Some examples of a set, in two parts.

    Attributes:
        rows: Of each part.
        counts: How many targets count in each.
    """

    rows: tuple[list[int], list[int]]
    counts: tuple[int, int]

    def batches(self, batch: Batch) -> Iterator[Batch]:
        """Both parts at once, then each."""
        first, second = self.rows
        for rows in (first + second, first, second):
            yield tree_map(lambda leaf, rows=rows: leaf[rows] if leaf.ndim else leaf, batch)


def together(counts: Sequence[int], size: int) -> list[Together]:
    """Which examples to look at a loss of, at once and apart, to see what it is a mean over.

    Half a piece of those of which least counts, and of those of which most does: where all count alike, the first and
    the last. And where nothing counts of an example, the latter and it.
    """
    order = sorted((row for row, count in enumerate(counts) if count), key=counts.__getitem__)
    half = min(max(size // 2, 1), len(order) // 2)
    most, empty = order[-max(half, 1) :], [row for row, count in enumerate(counts) if not count][:1]
    pairs = [(order[:half], most), (most, empty)]
    return [Together(pair, (_sum(counts, pair[0]), _sum(counts, pair[1]))) for pair in pairs if all(pair)]


def _sum(counts: Sequence[int], rows: list[int]) -> int:
    return sum(counts[row] for row in rows)


class Seen(NamedTuple):
    """A loss of some examples at once, and of their parts."""

    examples: Together
    whole: Look
    first: Look
    second: Look

    def mean(self, over_counts: bool) -> Look:
        """Of the parts, weighed by what counts or by their examples; one without weight, maybe NaN, is left out."""
        weights = self.examples.counts if over_counts else tuple(map(len, self.examples.rows))
        shares = [weight / sum(weights) for weight in weights]
        kept = [(share, look) for share, look in zip(shares, (self.first, self.second), strict=True) if share]
        slopes = torch.stack([share * look.gradient for share, look in kept])
        return Look(sum(share * look.loss for share, look in kept), slopes.sum(0))

    def over_counts(self, is_random: bool) -> bool:
        """Whether it is a mean over what counts, as those of torch are, rather than over the examples; not if NaN.

        Where the loss is random it is taken to be, and where round-off leaves both as likely.
        """
        if is_random or not math.isfinite(self.whole.loss):
            return math.isfinite(self.whole.loss)
        return self._off(over_counts=True) <= 2 * self._off(over_counts=False)

    def _off(self, *, over_counts: bool) -> float:
        """Relative difference from the mean; infinite where that is not finite."""
        mean, (loss, slope) = self.mean(over_counts), self.whole
        off = abs(loss - mean.loss) / max(abs(loss), 1e-300)
        turned = float((slope - mean.gradient).norm() / slope.norm().clamp_min(torch.finfo(slope.dtype).tiny))
        return max(off, turned) if math.isfinite(off + turned) else math.inf


def settled(role: Role, seen: Seen, over_counts: bool, is_random: bool, round_off: float) -> bool:
    """Compare the loss of some examples with the mean of those of both parts; False where it is too random to tell.

    And its gradient: where all examples have one loss, as in a model that has learnt nothing yet, any weights make the
    mean.

    Args:
        role: Of the loss.
        seen: The losses.
        over_counts: What the mean is over: what counts, or the examples.
        is_random: Whether the loss has drawn random numbers, as with dropout.
        round_off: Relative, of gradients.

    Raises:
        LossError: It is their sum.

    Warns:
        UserWarning: It is neither: what is added up over pieces is another loss then.
    """
    (whole, slope), (first, left), (second, right) = seen.whole, seen.first, seen.second
    mean, mean_slope = seen.mean(over_counts)
    size = abs(whole)
    longest = float(torch.stack([one.norm() for one in (slope, left, right)]).max())
    off = float((slope - mean_slope).norm()) / longest if longest > LEAST * abs(whole) else 0.0
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
            "theirs. microbatch takes the mean over pieces, which is another loss then. Take a plain mean over the "
            "examples, with weights that are those of the whole task; or one over the targets that count, the others "
            "being -100, or NaN, in the place of a mask; or leave microbatch out",
            UserWarning,
        )
    return True
