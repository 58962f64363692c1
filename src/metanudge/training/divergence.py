"""Whether a meta-training diverges: told while it goes on, and ended where no later step can mend it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from metanudge.errors import NonFiniteError
from metanudge.optim import NormalizedSGD
from metanudge.sharding import whole
from metanudge.training.checkpoint import Run
from metanudge.tree import accumulator
from metanudge.types import MetaStep
from metanudge.warned import warn

RISE = 1e3
"""How many times its usual size a query loss has to be before a user is told."""
USUAL = 100
"""Steps, the first ones, of which the middle one tells what is usual: a first step that is small by chance does not."""
FAR = 10
"""How many times their first length, or 1, parameters that are far from where they began are long."""
FEW = 10
"""Fewer steps have no middle worth the name: the largest tells."""
PATIENCE = 10
"""Meta-steps in a row without one finite task after which a training gives up."""


class Watch:
    """Looks at every step of a training.

    Args:
        run: The training; its history is of the steps before.
        max_norm: As of ``fit``.
        every: As of ``fit``.
        kept: Places of its last checkpoint and its best weights; None where nothing is kept.
    """

    def __init__(self, run: Run, max_norm: float | None, every: int, kept: tuple[Path, Path] | None) -> None:
        self.run, self.max_norm, self.every, self.kept = run, max_norm, every, kept
        self._resumed = len(run.history)
        self._first = next((r.query_loss for r in run.history if math.isfinite(r.query_loss)), math.nan)
        self._rises, self._told = 0, False
        held = [parameter for group in run.optimizer.param_groups for parameter in group["params"]]
        self._watched = [parameter for parameter in held if parameter.requires_grad and _finite([parameter])]
        self._length = length(self._watched)

    @property
    def _high(self) -> bool:
        """Whether the query loss has risen, and not in one step alone, whose tasks may be odd ones."""
        return self._rises > 1

    def moved(self, step: MetaStep) -> None:
        """Look at a step that was taken.

        Raises:
            NonFiniteError: The parameters are not finite.
        """
        if math.isnan(self._first):
            self._first = step.query_loss
        if not _finite(self._watched):
            raise NonFiniteError(self._diverged("the model's parameters are not finite any more"))
        self._rises = self._rises + 1 if self._rose(step.query_loss) else 0
        if self._high and not self._told:
            self._told = True
            warn(
                f"the query loss rose to {step.query_loss:.3g} at meta-step {len(self.run.history) + 1}, from "
                f"{self._first:.3g} at first: the meta-training may be diverging, and then {self._cure()}",
                UserWarning,
            )

    def lost(self, error: NonFiniteError) -> None:
        """Look at a step without one finite task, ``error``.

        Raises:
            NonFiniteError: The query loss had risen before, or it was the tenth in a row.
        """
        if self._high:
            raise NonFiniteError(
                self._diverged("the query loss had risen, and now no task has a finite one")
            ) from error
        if self.run.in_a_row < PATIENCE:
            return
        if self.run.evaluations == 0:
            raise error
        raise NonFiniteError(
            f"{error}. So it was in {PATIENCE} meta-steps in a row, though not in earlier ones: where the data are "
            f"good, the meta-training has diverged, and {self._cure()}"
        ) from error

    def _rose(self, now: float) -> bool:
        """Whether the query loss is far above what is usual, or above the first one with parameters that are too."""
        if rose(self._first, [record.query_loss for record in self.run.history[:USUAL]], now):
            return True  # the early ones tell nothing of a training that explodes at once
        return rose(self._first, [], now) and length(self._watched) > FAR * max(self._length, 1.0)

    def _diverged(self, how: str) -> str:
        step = len(self.run.history) + 1
        return f"the meta-training diverged at meta-step {step}: {how}; {self._cure()}{self._places()}"

    def _cure(self) -> str:
        optimizer = self.run.optimizer
        lr, name = float(optimizer.param_groups[0]["lr"]), type(optimizer).__name__
        ways = ["give a smaller one"]
        if self.max_norm is None:
            ways.append("clip the meta-gradient (max_norm=1.0, say)")
        if not isinstance(optimizer, NormalizedSGD):
            ways.append("take mn.optim.NormalizedSGD")
        return f"lr = {lr:g} of the optimizer, {name}, is too large: {', or '.join(ways)}"

    def _places(self) -> str:
        """Where the last checkpoint is, and the best of validation."""
        done = len(self.run.history)
        last = max(self._resumed, done // self.every * self.every)
        if self.kept is None or last == 0:
            return ""
        best = f"; the best by validation, of step {self.run.best_step}, is {self.kept[1]}"
        return f". The last checkpoint, of step {last}, is {self.kept[0]}{best if self.run.best_step else ''}"


def rose(first: float, early: Sequence[float], now: float) -> bool:
    """Whether a query loss is far above the first one, and what is usual of the early ones."""
    if not now > RISE * abs(first):
        return False
    sizes = [abs(loss) for loss in early if math.isfinite(loss)] or [abs(first)]
    usual = max(sizes) if len(sizes) < FEW else statistics.median_low(sizes)
    return now > RISE * max(abs(first), usual) > 0


def _finite(parameters: Sequence[Tensor]) -> bool:
    sums = [whole(parameter.detach().sum(dtype=torch.float64)) for parameter in parameters]  # NaN, inf pass through
    return not sums or bool(torch.stack([one.to(sums[0].device) for one in sums]).isfinite().all())


def length(parameters: Sequence[Tensor]) -> float:
    """Euclidean norm."""
    wide = [accumulator(parameter.dtype) for parameter in parameters]
    norms = [
        torch.linalg.vector_norm(parameter.detach(), dtype=kind)
        for parameter, kind in zip(parameters, wide, strict=True)
    ]
    return math.hypot(*(float(whole(norm)) for norm in norms))
