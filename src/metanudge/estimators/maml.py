"""MAML: backpropagation through the inner solve."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from metanudge.energy import InnerProblem
from metanudge.estimators.unrolled import unroll
from metanudge.settings import check_flag
from metanudge.solvers.loop import Solver
from metanudge.types import Estimate, Need


@dataclass(frozen=True)
class MAML:
    r"""Second-order MAML: the exact gradient of f(φ_K(θ)), φ_K the K-th iterate of the solver.

    .. math::
        \nabla_\theta F_K = \Big( \frac{d \phi_K}{d \theta} \Big)^{\!\top} \nabla f(\phi_K)

    With prox = 0 the original algorithm, otherwise unrolled through the proximal problem; its limit K → ∞ is ∇F.
    Vectorised execution only: it differentiates the loss twice. Cost per task: 3 K + 2 gradients (K more with
    checkpointing). Memory: K activations; with checkpointing about 2 sqrt(K).

    Args:
        checkpoint: Keep sqrt(K) iterates and recompute the steps between them in the backward pass.

    Raises:
        SettingsError: In place, or with a solver that autograd cannot follow.

    Source: Finn, Abbeel & Levine, ICML 2017; checkpointing: Chen et al., arXiv:1604.06174.

    Example:
        >>> import metanudge as mn
        >>> mn.MAML(checkpoint=True).memory
        'K activations (checkpointed: √K)'
    """

    rule: ClassVar[str] = "backpropagate through the K steps"
    cost: ClassVar[str] = "3K + 2 (checkpointed: up to 4K + 2)"
    memory: ClassVar[str] = "K activations (checkpointed: √K)"
    bias: ClassVar[str] = "0 for F_K; → 0 for F as contraction^K"

    checkpoint: bool = False

    def __post_init__(self) -> None:
        check_flag(checkpoint=self.checkpoint)

    @property
    def needs(self) -> frozenset[Need]:
        """Double backward, through the solver."""
        return frozenset({Need.DOUBLE_BACKWARD, Need.DIFFERENTIABLE_SOLVER, Need.START_AT_THETA})

    def __call__(self, problem: InnerProblem, solver: Solver) -> Estimate:
        """Unroll and pull back."""
        segments = math.isqrt(solver.steps) if self.checkpoint else 1
        return unroll(problem, solver, problem.losses.unrolled, segments, backward=2)
