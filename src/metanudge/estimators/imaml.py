"""iMAML: the implicit meta-gradient by conjugate gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from metanudge import tree
from metanudge.energy import InnerProblem
from metanudge.estimators.base import solve_free
from metanudge.estimators.products import (
    Products,
    check_products,
    hessian_product,
    implicit_system,
    needs_of,
    with_shared,
)
from metanudge.losses import HessianProduct, LossGradients
from metanudge.settings import check_positive, check_steps
from metanudge.solvers.loop import Solver
from metanudge.types import Estimate, Need, Params


@dataclass(frozen=True)
class IMAML:
    r"""Implicit MAML: solve for the meta-gradient at the free solution.

    .. math::
        (I + H / \lambda) \, v = \nabla f(\phi_K), \qquad \nabla_\theta F = v, \qquad
        \nabla_w F = \partial_w f - \tfrac{1}{\lambda} \, \partial_w \partial_\phi \hat f \; v

    by conjugate gradients from v = 0, on exactly this system. A task stops at the residual ``tol`` or at negative
    curvature. Cost per task: K + 2 + 2 ``cg_steps`` gradients (one more for exact products, two with shared
    parameters). Memory: two activations ("exact") or one step ("two_gradient").

    Args:
        cg_steps: Conjugate-gradient steps >= 1, at most; as many as there are adapted parameters solve exactly.
        tol: Relative residual at which a task stops, > 0.
        products: "exact" Hessian products by double backward, or "two_gradient" ones.
        displacement: Relative displacement of two-gradient products; None for the cube root of the unit round-off.

    Raises:
        SettingsError: A value out of its range; exact products in place; or a learner with prox = 0.

    Source: Rajeswaran, Finn, Kakade & Levine, NeurIPS 2019.

    Example:
        >>> import metanudge as mn
        >>> mn.IMAML(cg_steps=5, products="two_gradient")
        IMAML(cg_steps=5, tol=1e-10, products='two_gradient', displacement=None)
    """

    rule: ClassVar[str] = "solve (I + H/λ) v = ∇f(φ_K) by CG"
    cost: ClassVar[str] = "K + 3 + 2 CG steps"
    memory: ClassVar[str] = "two activations"
    bias: ClassVar[str] = "→ 0: δ + CG residual"

    cg_steps: int = 10
    tol: float = 1e-10
    products: Products = "exact"
    displacement: float | None = None

    def __post_init__(self) -> None:
        check_steps(self.cg_steps, "cg_steps")
        check_positive(tol=self.tol)
        check_products(self.products, self.displacement)

    @property
    def needs(self) -> frozenset[Need]:
        """The proximal problem and, for exact products, double backward."""
        return needs_of(self.products)

    def __call__(self, problem: InnerProblem, solver: Solver) -> Estimate:
        """Solve the free problem, then the linear system."""
        free = solve_free(problem, solver)
        product = hessian_product(problem, free, self.products, self.displacement)
        system = implicit_system(problem, product)
        v = conjugate_gradients(problem.losses, system, free.slope, self.cg_steps, self.tol)
        return free.estimate(problem, with_shared(problem, free, product, v))


def conjugate_gradients(
    losses: LossGradients, system: HessianProduct, right: Params, steps: int, tol: float, *, until_done: bool = False
) -> Params:
    """Solve ``system(x) = right`` from x = 0 in every lane; lanes that are done, or meet p·Ap <= 0, stop.

    ``until_done`` leaves out the steps in which no lane moves any more: to ask is to wait for the device.
    """
    x, residual, direction = tree.zeros(right), right, right
    square = losses.inner(right, right)
    enough = tol**2 * square
    active = square > 0
    for _ in range(steps):
        active = active & (square > enough)
        if until_done and not bool(active.any()):
            break
        image = system(direction)
        curvature = losses.inner(direction, image)
        active = active & (curvature > 0)
        alpha = torch.where(active, square / curvature, torch.zeros_like(square))
        x = tree.axpy(alpha, direction, x)
        residual = tree.axpy(-alpha, image, residual)
        previous, square = square, losses.inner(residual, residual)
        direction = tree.axpy(square / previous.clamp_min(torch.finfo(square.dtype).tiny), direction, residual)
    return x
