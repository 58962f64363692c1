"""Means over tasks: of a step's meta-gradients, and of an evaluation's metric."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from metanudge import tree
from metanudge.energy import InnerProblem
from metanudge.ranks import Ranks
from metanudge.together import gathered, groups, parted
from metanudge.types import Estimate, Evaluation, Named, Params


class Numbers(NamedTuple):
    """What ``MetaStep`` says of the kept tasks."""

    query_loss: float
    support_loss: float
    residual: float
    error_bound: float
    amplified_tasks: int
    nu: float


class FiniteMean:
    """Running sums over the tasks whose solves did not diverge and whose losses and meta-gradient are finite.

    Attributes:
        total: Tasks seen.
    """

    def __init__(self) -> None:
        self.total = 0
        self._kept = torch.zeros((), device="cpu")
        self._numbers = torch.zeros(8, device="cpu")
        self._gradient: Params = {}

    @property
    def kept(self) -> int:
        """Tasks that have a part in the mean."""
        return int(self._kept)

    def add(self, problem: InnerProblem, estimate: Estimate, summed: Callable[[Params], Params]) -> Tensor:
        """Add the tasks of one problem; ``summed`` adds up its lanes. Nothing is copied to the host.

        Returns which of them were kept, ``[T]``.
        """
        square = problem.losses.inner(estimate.gradient, estimate.gradient)
        finite = square.isfinite() & estimate.query_loss.isfinite() & estimate.support_loss.isfinite()
        lost = estimate.diverged | ~finite
        found = summed(tree.tree_map(lambda leaf: leaf.masked_fill(tree.over(lost, leaf), 0.0), estimate.gradient))
        for names in groups(found):
            tree.accumulate(self._gradient, names, gathered(found, names))
        amplified = (estimate.size > (1 + 1e-6) * estimate.slope + estimate.noise).to(estimate.size.dtype)
        numbers = torch.stack(
            [
                estimate.query_loss,
                estimate.support_loss,
                estimate.residual,
                estimate.nu,
                estimate.error,
                estimate.size,
                amplified,
                estimate.slope,
            ]
        )
        numbers, kept = numbers.reshape(len(numbers), -1).double(), ~lost.reshape(-1)
        self.total += kept.numel()
        self._kept = self._kept.to(kept.device) + kept.sum()
        self._numbers = self._numbers.to(numbers) + numbers.where(kept, 0.0).sum(1)
        return kept

    def over(self, ranks: Ranks, total: int, named: Named) -> None:
        """Take in the sums of the other ranks, which have seen ``total`` tasks with this one; ``named`` cuts leaves."""
        if ranks.size == 1:
            return
        self.total = total
        self._gradient = {key: leaf.contiguous() for key, leaf in self._gradient.items()}
        parts = named(self._gradient)  # how leaves are cut, and so their order, is a rank's own
        ranks.sum([self._kept, self._numbers, *(parts[name] for name in sorted(parts))])

    def spend(self) -> Iterator[Params]:
        """The mean meta-gradient, part by part; each is let go when it has been used."""
        kept = self.kept
        for names, part in tree.emptied(self._gradient):
            yield parted(names, part.div_(kept))

    @property
    def gain(self) -> float:
        """Mean length of the kept tasks' meta-gradients, over that of their query gradients."""
        *_, size, _, slope = self._numbers.tolist()
        return size / slope if slope else math.nan

    def numbers(self) -> Numbers:
        """Means over the kept tasks; of the error bound the ratio of two, ||error|| to ||g||."""
        query_loss, support_loss, residual, nu, error, size, amplified, _ = (self._numbers / self.kept).tolist()
        bound = error / size if size else error * math.inf if error else 0.0
        return Numbers(query_loss, support_loss, residual, bound, round(amplified * self.kept), nu)


def summarize(values: Tensor, metric: str = "query loss") -> Evaluation:
    """Mean and 95 % confidence interval over tasks, of a metric's ``values`` ``[T, K + 1]``; of one task, NaN."""
    number, mean = values.shape[0], values.mean(0)
    spread = values.std(0) if number > 1 else torch.full_like(mean, float("nan"))
    half = 1.96 * spread / number**0.5
    return Evaluation(float(mean[-1]), float(half[-1]), mean, half, values, metric)
