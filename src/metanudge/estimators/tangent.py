"""Tangent: the limit of vanishing nudge, solved as a linear problem of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from metanudge import tree
from metanudge.bundles import Bundles
from metanudge.energy import Energy, InnerProblem
from metanudge.estimators.base import solve_free
from metanudge.estimators.products import Products, check_products, hessian_product, needs_of, with_shared
from metanudge.losses import HessianProduct, InnerGradients, LossGradients
from metanudge.settings import check_steps
from metanudge.solvers.loop import Solver, replay
from metanudge.types import Estimate, Need, Params, Weights


@dataclass(frozen=True)
class Linearized(InnerGradients):
    """The losses of the tangent problem: z -> <z, Hz>/2 + <∇f, z>, whose gradient is Hz + ∇f."""

    losses: LossGradients
    product: HessianProduct
    slope: Params

    def gradient(self, weights: Weights, phi: Mapping[str, Tensor], step: int) -> Params:
        """Hz + ∇f."""
        image = self.product(dict(phi))
        return {name: image[name] + self.slope[name] for name in phi}

    def operands(self, first: Params, *rest: Params) -> Iterator[list[Tensor]]:  # noqa: D102
        return self.losses.operands(first, *rest)

    def share(self, a: Tensor, b: Tensor) -> Tensor:  # noqa: D102
        return self.losses.share(a, b)

    def added(self, shares: Sequence[Tensor]) -> Tensor:  # noqa: D102
        return self.losses.added(shares)

    def steppable(self, start: Params) -> Bundles:  # noqa: D102
        return self.losses.anew(start)


@dataclass(frozen=True)
class Tangent:
    r"""The derivative z = dφ/dν at ν = 0, by the solver itself.

    .. math::
        z = \arg\min_z \tfrac12 \langle z, H z \rangle + \langle \nabla f(\phi_K), z \rangle
            + \tfrac{\lambda}{2} \|z\|^2, \qquad
        \nabla_\theta F = -\lambda z, \qquad
        \nabla_w F = \partial_w f + \partial_w \partial_\phi \hat f \; z

    The solver runs on this quadratic from z = 0, by the schedule that nudged solves have, so that there is no ν to
    choose: for gradient descent and Nesterov ``Tangent(steps=2 * K)`` is exactly the limit ν → 0 of ``FOBMAML()``,
    whose nudged solves take 2 K steps, where f̂ is quadratic or the free solve is done (a nudged solve from an
    unfinished one moves on, and H with it). With a converged solve it is the exact meta-gradient.
    Cost per task: K + 2 + 2 K' gradients (one more for exact products, two with shared parameters). Memory: two
    activations ("exact") or one step.

    Args:
        products: "exact" Hessian products by double backward, or "two_gradient" ones.
        displacement: Relative displacement of two-gradient products; None for the cube root of the unit round-off.
        steps: Steps K' on the quadratic; None for as many as the solver's.

    Raises:
        SettingsError: A value out of its range; exact products in place; or a learner with prox = 0.

    Source: the implicit function theorem; as an iteration, Lorraine, Vicol & Duvenaud, AISTATS 2020 (Neumann series).

    Example:
        >>> import metanudge as mn
        >>> mn.Tangent().needs == mn.IMAML().needs
        True
    """

    rule: ClassVar[str] = "z ← z - a [(H + λ) z + ∇f], -λ z"
    cost: ClassVar[str] = "K + 3 + 2K'"
    memory: ClassVar[str] = "two activations"
    bias: ClassVar[str] = "→ 0: δ + contraction^K'"

    products: Products = "exact"
    displacement: float | None = None
    steps: int | None = None

    def __post_init__(self) -> None:
        if self.steps is not None:
            check_steps(self.steps)
        check_products(self.products, self.displacement)

    @property
    def needs(self) -> frozenset[Need]:
        """The proximal problem and, for exact products, double backward."""
        return needs_of(self.products)

    def __call__(self, problem: InnerProblem, solver: Solver) -> Estimate:
        """Solve the free problem, then the tangent one."""
        free = solve_free(problem, solver)
        product = hessian_product(problem, free, self.products, self.displacement)
        origin = tree.zeros(free.phi)
        energy = Energy(Linearized(problem.losses, product, free.slope), origin, problem.prox)
        steps = solver.steps if self.steps is None else self.steps
        z = replay(solver, energy, origin, solver.settle(free.schedule, steps))
        return free.estimate(problem, with_shared(problem, free, product, tree.scale(-problem.prox, z)))
