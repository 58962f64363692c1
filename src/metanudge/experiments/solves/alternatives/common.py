"""What the alternatives share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from metanudge import tree
from metanudge.curvature import lipschitz_constant
from metanudge.energy import Energy
from metanudge.settings import check_steps
from metanudge.solvers.loop import FixedSteps
from metanudge.types import Need, Params


@dataclass(frozen=True)
class Alternative(FixedSteps):
    """L is measured at the start, a state has its iterate under ``phi``, nudged solves decide for themselves."""

    differentiable: ClassVar[bool] = True
    needs: ClassVar[frozenset[Need]] = frozenset({Need.PROXIMAL_TERM})

    steps: int

    def __post_init__(self) -> None:
        check_steps(self.steps)

    def plan(self, energy: Energy, start: Params) -> Tensor:
        """L, ``[*L]``."""
        with torch.no_grad():
            return lipschitz_constant(energy, tree.detach(start), 5, step=0).constant

    def point(self, state: Any) -> Params:
        """The iterate."""
        phi: Params = state.phi
        return phi


def safe_lr(energy: Energy, constant: Tensor) -> Tensor:
    """1 / L'."""
    return 1 / (1.2 * constant + energy.prox)
