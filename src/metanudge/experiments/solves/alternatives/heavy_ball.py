"""Polyak's momentum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from metanudge import tree
from metanudge.energy import Energy
from metanudge.experiments.solves.alternatives.common import Alternative
from metanudge.types import Params


class Moving(NamedTuple):
    """An iterate and the one before."""

    phi: Params
    before: Params


@dataclass(frozen=True)
class HeavyBall(Alternative):
    r"""Polyak's momentum, at its optimum for a quadratic with curvature in [λ, L'].

    .. math::
        \phi_{k+1} = \phi_k - a g_k + \beta (\phi_k - \phi_{k-1}), \qquad
        a = \frac{4}{(\sqrt{L'} + \sqrt\lambda)^2}, \quad
        \beta = \Bigl(\frac{\sqrt{L'} - \sqrt\lambda}{\sqrt{L'} + \sqrt\lambda}\Bigr)^2

    Source: Polyak, USSR Comput. Math. Math. Phys. 4 (1964).
    """

    def init(self, energy: Energy, start: Params, plan: Tensor) -> Moving:
        """Begin at rest."""
        return Moving(start, start)

    def step(self, energy: Energy, plan: Tensor, state: Moving, index: int, decision: None) -> tuple[Moving, None]:
        """One step."""
        high, low = (1.2 * plan + energy.prox).sqrt(), energy.prox**0.5
        lr, momentum = 4 / (high + low) ** 2, ((high - low) / (high + low)) ** 2
        phi = tree.axpy(-lr, energy.gradient(state.phi, index), state.phi)
        return Moving(tree.axpy(momentum, tree.subtract(state.phi, state.before), phi), state.phi), None
