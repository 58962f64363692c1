"""Whether a loss is the mean over its examples, as taking it piece by piece supposes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from enum import Enum
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

CLEAR = 4.0
"""How many times as far off other means have to be than the one that a loss is taken to be, to be sure of it."""

LEAST = 1e-5
"""Length of a gradient, times the loss, below which it may be round-off alone, as that of a bias that has no effect."""


class Look(NamedTuple):
    """What a batch gives: the loss, and some of its gradient, which may be ``[0.]``."""

    loss: float
    gradient: Tensor


class Weighing(Enum):
    """What a mean loss is over: of how many of its targets count, what an example weighs. The likelier come first."""

    COUNTS = "targets that count"
    ANY = "examples of which any target counts"
    EXAMPLES = "examples"

    def weights(self, counts: Sequence[int]) -> list[int]:
        """Of every example."""
        if self is Weighing.COUNTS:
            return list(counts)
        return [int(self is Weighing.EXAMPLES or count > 0) for count in counts]


class Together(NamedTuple):
    """Some examples of a set, in two parts.

    Attributes:
        rows: Of each part.
        counts: How many targets of each of its examples count.
    """

    rows: tuple[list[int], list[int]]
    counts: tuple[list[int], list[int]]

    @property
    def tells(self) -> bool:
        """Whether something counts in both."""
        return all(map(any, self.counts))

    def batches(self, batch: Batch) -> Iterator[Batch]:
        """Both parts at once, then each."""
        first, second = self.rows
        for rows in (first + second, first, second):
            yield tree_map(lambda leaf, rows=rows: leaf[rows] if leaf.ndim else leaf, batch)


def together(counts: Sequence[int], size: int) -> list[Together]:
    """Which examples to look at a loss of, at once and apart, to see what it is a mean over.

    Half a piece of those of which least counts, and of those of which most does: where all count alike, the first and
    the last. And the latter with as many of which nothing counts.
    """
    order = sorted((row for row, count in enumerate(counts) if count), key=counts.__getitem__)
    most = max(size // 2, 1)
    half = min(most, len(order) // 2)
    empty = [row for row, count in enumerate(counts) if not count][:most]
    last = order[-max(half, 1) :]
    pairs = [(order[:half], last), (last, empty)]
    return [
        Together((one, two), ([counts[row] for row in one], [counts[row] for row in two]))
        for one, two in pairs
        if one and two
    ]


class Seen(NamedTuple):
    """A loss of some examples at once, and of their parts."""

    examples: Together
    whole: Look
    first: Look
    second: Look

    @property
    def finite(self) -> bool:
        """Whether the loss is, but of examples of which nothing counts."""
        parts = zip(self.examples.counts, (self.first, self.second), strict=True)
        return all(math.isfinite(look.loss) for look in (self.whole, *(look for counts, look in parts if any(counts))))

    def shares(self, weighing: Weighing) -> list[float]:
        """Of the parts, in a mean of both."""
        weights = [sum(weighing.weights(counts)) for counts in self.examples.counts]
        return [weight / sum(weights) for weight in weights]

    def mean(self, weighing: Weighing) -> Look:
        """Of the parts; one without weight, which may be NaN, is left out."""
        shares = self.shares(weighing)
        kept = [(share, look) for share, look in zip(shares, (self.first, self.second), strict=True) if share]
        slopes = torch.stack([share * look.gradient for share, look in kept])
        return Look(sum(share * look.loss for share, look in kept), slopes.sum(0))

    def off(self, weighing: Weighing) -> float:
        """Relative difference from the mean; infinite where that is not finite."""
        mean, (loss, slope) = self.mean(weighing), self.whole
        off = abs(loss - mean.loss) / max(abs(loss), 1e-300)
        turned = float((slope - mean.gradient).norm() / slope.norm().clamp_min(torch.finfo(slope.dtype).tiny))
        return max(off, turned) if math.isfinite(off + turned) else math.inf


def weighing_of(seen: Sequence[Seen]) -> tuple[Weighing, bool]:
    """What a loss is a mean over, and whether that is for good.

    It is where the others are something else, and far off; and where none is near, of which ``settled`` tells.
    """
    off = {weighing: max(one.off(weighing) for one in seen) for weighing in Weighing}
    best = min(Weighing, key=off.__getitem__)
    others = [weighing for weighing in Weighing if any(one.shares(weighing) != one.shares(best) for one in seen)]
    if any(off[other] <= CLEAR * off[best] for other in others):
        return Weighing.COUNTS, off[best] > FAR
    return best, len(others) == len(Weighing) - 1


def settled(role: Role, seen: Seen, weighing: Weighing, is_random: bool, round_off: float) -> bool:
    """Compare the loss of some examples with the mean of those of both parts; False where it is too random to tell.

    And its gradient: where all examples have one loss, as in a model that has learnt nothing yet, any weights make the
    mean.

    Args:
        role: Of the loss.
        seen: The losses.
        weighing: What the mean is taken to be over.
        is_random: Whether the loss has drawn random numbers, as with dropout.
        round_off: Relative, of gradients.

    Raises:
        LossError: It is their sum.

    Warns:
        UserWarning: It is neither: what is added up over pieces is another loss then.
    """
    (whole, slope), (first, left), (second, right) = seen.whole, seen.first, seen.second
    mean, mean_slope = seen.mean(weighing)
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
