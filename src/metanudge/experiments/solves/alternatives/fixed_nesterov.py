"""Nesterov's method without the curvature seen on the way."""

from __future__ import annotations

from dataclasses import dataclass

from metanudge.curvature import Curvature
from metanudge.energy import Energy
from metanudge.solvers import Nesterov
from metanudge.solvers.nesterov import Decision
from metanudge.solvers.nesterov import State as NesterovState


@dataclass(frozen=True)
class FixedNesterov(Nesterov):
    """The library's solver with L as measured at the start: nothing is learnt on the way."""

    def step(
        self, energy: Energy, plan: Curvature | None, state: NesterovState, index: int, decision: Decision | None
    ) -> tuple[NesterovState, Decision]:
        """Forget the last secant."""
        return super().step(energy, plan, state._replace(secant=None), index, decision)
