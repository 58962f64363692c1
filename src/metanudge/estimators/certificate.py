"""How far an estimate by nudged solves can be from the meta-gradient, from what the solves leave behind."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from metanudge import tree
from metanudge.energy import InnerProblem
from metanudge.estimators.base import FreeSolve
from metanudge.types import Params, Role


class Nudged(NamedTuple):
    """What the nudged solves gave, interpolated over their nodes.

    Attributes:
        nu: ν, ``[*L]``.
        displacement: Relative displacement of the solution, ``[*L]``.
        derivative: u = dφ/dν.
        force: r, what is left of the forces: dν-derivative of ∂E/∂φ at the nudged points; 0 for perfect solves.
        middle: φ̄, the points' value at ν = 0.
        middle_force: Mean of the forces at the points, their value at ν = 0.
    """

    nu: Tensor
    displacement: Tensor
    derivative: Params
    force: Params
    middle: Params
    middle_force: Params

    @classmethod
    def of(
        cls,
        problem: InnerProblem,
        nu: Tensor,
        displacement: Tensor,
        derivative: tuple[Params, ...],
        middle: tuple[Params, ...],
    ) -> Nudged:
        """From ∂E/∂ω and ∂E/∂φ at the nudged points: their derivative times ν, and their value, at ν = 0."""
        theta = problem.losses.spread(problem.theta)

        def moved(partial: Params) -> Params:
            """φ - θ, or its derivative, from ∂E/∂θ."""
            return {name: -partial[name] / problem.prox for name in theta}

        u, force = moved(tree.scale(1 / nu, derivative[0])), tree.scale(1 / nu, derivative[1])
        return cls(nu, displacement, u, force, tree.add(moved(middle[0]), theta), middle[1])


def error_bound(problem: InnerProblem, free: FreeSolve, nudged: Nudged, order: int) -> Tensor:
    r"""Bound on ||g - ∇F|| in the adapted parameters, ``[*L]``, where the support loss is convex; linear nudge.

    With g = -λ u and (H̄ + λ) u = r - ∇f(φ₀), H̄ the mean Hessian between the nudged points, and with A⁻¹ <= 1/λ,

    .. math::
        \|g - \nabla F\| \le \|r\| + \|\nabla f(\phi_0) - \nabla f(\phi^*)\| + \|(\bar H - H^*) z\|

    The nudged solves go on where the free one ended, so φ̄ is nearer to φ* than φ₀ is: at most t = ||∇E(φ̄)|| / λ over
    ||φ̄ - φ₀|| of their distance is left. What changed from φ₀ to φ̄ is measured, in the query gradient and in the
    Hessian along u; what is left to change is at most as much, times t; the Hessian's change between the points, whose
    linear part a symmetric stencil cancels, enters by its square; and truncation and round-off have their share.
    H u at φ₀ is a difference over half the distance of the nudged points, which sees 3/4 of what the curvature does
    between them, hence the 4/3:

    .. math::
        \|r\| + (1 + t) \|\Delta \nabla f\| + \tfrac43 \|\Delta H u\|
            + \frac{\|\text{even part of } \nabla \hat f / \nu\|^2}{\|\nabla f\|}
            + \Big( \frac{d^p}{4} + \frac{\epsilon}{2 d} \Big) \|\nabla f\|

    with d the relative displacement. The first term and the slope's change up to φ̄ are exact; the others are estimates
    to first order, and the constants 1/4 and 1/2 are what 800 random problems needed (results/solves).
    Cost: 4 gradients.
    """
    losses, energy, norm = problem.losses, problem.energy(), problem.energy().norm
    nu, u, slope = nudged.nu, nudged.derivative, norm(free.slope)

    def pull(phi: Params) -> Params:
        return losses.value_and_gradient(Role.SUPPORT, phi, free.step)[1]

    _, query = losses.value_and_gradient(Role.QUERY, nudged.middle, free.step)
    change_of_slope = norm(tree.subtract(query, free.slope))
    middle_force = tree.add(pull(nudged.middle), energy.push(nudged.middle))
    even = norm(tree.subtract(nudged.middle_force, middle_force)) / nu

    curvature = tree.subtract(tree.axpy(-problem.prox, u, nudged.force), free.slope)  # H̄ u = r - λ u - ∇f
    # half as far apart as the nudged points, so that what lies between them, the truncation, is seen as well
    (found,) = losses.stencil_sums((-1 / 2, 1 / 2), ((-1, 1),), lambda node: (pull(tree.axpy(nu * node, u, free.phi)),))
    curvature_at_free = tree.scale(1 / nu, found[0])
    change_of_curvature = 4 / 3 * norm(tree.subtract(curvature, curvature_at_free))

    tiny = torch.finfo(slope.dtype).tiny
    gone = norm(tree.subtract(nudged.middle, free.phi))
    left = (norm(middle_force) / problem.prox / gone.clamp_min(tiny)).clamp_max(1e6)
    floor = nudged.displacement**order / 4 + torch.finfo(slope.dtype).eps / (2 * nudged.displacement)
    return (
        norm(nudged.force)
        + (1 + left) * change_of_slope
        + change_of_curvature
        + even**2 / slope.clamp_min(tiny)
        + floor * slope
    )
