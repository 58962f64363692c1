"""FOMAML: the query gradient at the adapted parameters, taken for the meta-gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from metanudge.energy import InnerProblem
from metanudge.estimators.base import solve_free
from metanudge.solvers.loop import Solver
from metanudge.types import Estimate, Need


@dataclass(frozen=True)
class FOMAML:
    r"""First-order MAML: pretend that dφ/dθ is the identity.

    .. math::
        g = \nabla f(\phi_K) = (I + H / \lambda) \nabla F \quad \text{at a converged } \phi_K

    Its bias does not vanish with the steps: descent with it stops where mean ∇f(φ) = 0, not where ∇F = 0. Shared
    parameters (``adapt_only``) get ∂f/∂w alone, without the way by which they move φ.
    Cost per task: K + 2 gradients. Memory: one step.

    Source: Finn, Abbeel & Levine, ICML 2017.

    Example:
        >>> import metanudge as mn
        >>> mn.FOMAML().cost
        'K + 2'
    """

    rule: ClassVar[str] = "∇f(φ_K)"
    cost: ClassVar[str] = "K + 2"
    memory: ClassVar[str] = "one step + four parameter copies"
    bias: ClassVar[str] = "irreducible: (I + H/λ) ∇F instead of ∇F"

    @property
    def needs(self) -> frozenset[Need]:
        """Nothing."""
        return frozenset()

    def __call__(self, problem: InnerProblem, solver: Solver) -> Estimate:
        """Solve and differentiate the query loss."""
        free = solve_free(problem, solver)
        return free.estimate(problem, free.query_gradient)
