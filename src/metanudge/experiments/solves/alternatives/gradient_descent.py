"""Gradient descent with the safe step size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from metanudge import tree
from metanudge.energy import Energy
from metanudge.experiments.solves.alternatives.common import Alternative, safe_lr
from metanudge.types import Params


class Point(NamedTuple):
    """An iterate alone."""

    phi: Params


@dataclass(frozen=True)
class SafeGradientDescent(Alternative):
    r"""Gradient descent with a = 1 / L'. Source: Cauchy, Comptes rendus (1847)."""

    def init(self, energy: Energy, start: Params, plan: Tensor) -> Point:
        """Begin."""
        return Point(start)

    def step(self, energy: Energy, plan: Tensor, state: Point, index: int, decision: None) -> tuple[Point, None]:
        """One step downhill."""
        return Point(tree.axpy(-safe_lr(energy, plan), energy.gradient(state.phi, index), state.phi)), None
