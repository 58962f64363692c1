"""Reptile: move the initialisation towards the adapted parameters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from metanudge import tree
from metanudge.energy import InnerProblem
from metanudge.estimators.base import solve_free
from metanudge.solvers.loop import Solver
from metanudge.types import Estimate, Need


@dataclass(frozen=True)
class Reptile:
    r"""Reptile: the displacement of the adaptation as a descent direction.

    .. math::
        g = \theta - \phi_K

    With a converged φ it is the gradient of mean min_φ [f̂ + λ/2 ||φ - θ||²] / λ: an objective without query losses.
    Defines nothing for shared parameters. Cost per task: K + 2 gradients (2 for the report). Memory: one step.

    Source: Nichol, Achiam & Schulman, arXiv:1803.02999.

    Raises:
        SettingsError: A learner with trainable parameters that are not adapted.

    Example:
        >>> import metanudge as mn
        >>> mn.Reptile().rule
        'θ - φ_K'
    """

    rule: ClassVar[str] = "θ - φ_K"
    cost: ClassVar[str] = "K + 2"
    memory: ClassVar[str] = "one step + four parameter copies"
    bias: ClassVar[str] = "irreducible: ignores the query loss"

    @property
    def needs(self) -> frozenset[Need]:
        """All trainable parameters are adapted; query losses are ignored."""
        return frozenset({Need.NO_SHARED_PARAMETERS, Need.QUERY_LOSS_AS_IT_IS})

    def __call__(self, problem: InnerProblem, solver: Solver) -> Estimate:
        """Solve and point back."""
        free = solve_free(problem, solver)
        return free.estimate(problem, tree.subtract(problem.initial, free.phi))
