"""The step size of the last secant."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from metanudge import tree
from metanudge.energy import Energy
from metanudge.experiments.solves.alternatives.common import Alternative, safe_lr
from metanudge.types import Params


class Secant(NamedTuple):
    """An iterate, and the one before with its gradient (None before the first step)."""

    phi: Params
    before: Params | None
    slope: Params | None


@dataclass(frozen=True)
class BarzilaiBorwein(Alternative):
    r"""Gradient descent whose step is the inverse of the curvature along the last step.

    .. math::
        s = \phi_k - \phi_{k-1}, \quad y = g_k - g_{k-1}, \qquad
        a = \frac{\langle s, s \rangle}{\langle s, y \rangle} \text{ (long)}, \qquad
        a = \frac{\langle s, y \rangle}{\langle y, y \rangle} \text{ (short)}

    Safeguards: \|s\| / \|y\| where <s, y> is not positive, and a at most 1 / λ.

    Source: Barzilai & Borwein, IMA J. Numer. Anal. 8 (1988); no line search, as there.
    """

    kind: Literal["long", "short"] = "long"

    def init(self, energy: Energy, start: Params, plan: Tensor) -> Secant:
        """The first step is the safe one."""
        return Secant(start, None, None)

    def step(self, energy: Energy, plan: Tensor, state: Secant, index: int, decision: None) -> tuple[Secant, None]:
        """One step; its size is no part of a graph, as in the library."""
        gradient = energy.gradient(state.phi, index)
        lr = safe_lr(energy, plan)
        if state.before is not None and state.slope is not None:
            with torch.no_grad():
                s, y = tree.subtract(state.phi, state.before), tree.subtract(gradient, state.slope)
                ss, sy, yy = (energy.losses.inner(*pair) for pair in ((s, s), (s, y), (y, y)))
                ratio = ss / sy if self.kind == "long" else sy / yy
                ratio = torch.where(sy > 0, ratio, (ss / yy).sqrt())
                lr = torch.where((ss > 0) & (yy > 0), ratio.clamp_max(1 / energy.prox), lr)
        return Secant(tree.axpy(-lr, gradient, state.phi), state.phi, gradient), None
