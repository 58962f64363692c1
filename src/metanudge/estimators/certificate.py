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
        nu: ν of the nudged point nearest to 0, ``[*L]``.
        bent: Displacement of the solution there, relative to the distance over which f̂ bends, ``[*L]``.
        noise: What round-off of the solutions may add to ||λ u||, ``[*L]``.
        derivative: u = dφ/dν.
        force: r, what is left of the forces: dν-derivative of ∂E/∂φ at the nudged points; 0 for perfect solves.
        middle: φ̄, the points' value at ν = 0.
        middle_force: Mean of the forces at the points, their value at ν = 0.
    """

    nu: Tensor
    bent: Tensor
    noise: Tensor
    derivative: Params
    force: Params
    middle: Params
    middle_force: Params

    @classmethod
    def of(
        cls,
        problem: InnerProblem,
        nu: Tensor,
        nearest: float,
        bent: Tensor,
        noise: Tensor,
        derivative: tuple[Params, ...],
        middle: tuple[Params, ...],
    ) -> Nudged:
        """From ∂E/∂ω and ∂E/∂φ at the nudged points: their derivative times ν, and their value, at ν = 0.

        ``nearest`` is the stencil's node that is nearest to 0.
        """
        theta = problem.initial

        def moved(partial: Params) -> Params:
            """φ - θ, or its derivative, from ∂E/∂θ."""
            return tree.compute(lambda leaf: -leaf / problem.prox, {name: partial[name] for name in theta})

        u, force = moved(tree.scale(1 / nu, derivative[0])), tree.scale(1 / nu, derivative[1])
        return cls(nearest * nu, bent, noise, u, force, tree.add(moved(middle[0]), theta), middle[1])


class Parts(NamedTuple):
    """What the bound of :func:`measure` is made of, ``[*L]`` each.

    Attributes:
        seen: What the points have seen.
        whole: The ball's bound, with the query gradient where it was measured.
        change: What is to be added to ``whole`` for the query gradient's change.
        residual: ρ, relative, at φ̄.
        noise: Round-off.
    """

    seen: Tensor
    whole: Tensor
    change: Tensor
    residual: Tensor
    noise: Tensor

    def bound(self, constant: float = 36.0) -> Tensor:
        """The smaller of what is seen, with what unfinished solves may have missed, and of the whole."""
        missed = constant * self.residual**2 * self.whole
        return torch.minimum(self.seen + missed, self.whole + self.change) + self.noise


def measure(problem: InnerProblem, free: FreeSolve, nudged: Nudged, order: int) -> Parts:
    r"""Measure the parts of a bound on ||g - ∇F|| in the adapted parameters, where the support loss is convex.

    Of the linear nudge.

    With g = -λ u and (H̄ + λ) u = r - ∇f(φ₀), H̄ the mean Hessian between the nudged points, and with A⁻¹ <= 1/λ,

    .. math::
        \|g - \nabla F\| \le \|r\| + \|\nabla f(\phi_0) - \nabla f(\phi^*)\| + \|(\bar H - H^*) z\|

    The nudged solves go on where the free one ended, so φ̄ is nearer to φ* than φ₀ is: at most t = ||∇E(φ̄)|| / λ over
    ||φ̄ - φ₀|| of their distance is left. What changed from φ₀ to φ̄ is measured, in the query gradient and in the
    Hessian along u; what is left to change is at most as much, times t; the Hessian's change between the points, whose
    linear part a symmetric stencil cancels, enters by its square; and truncation and round-off have their share.
    H u at φ₀ is a difference over half the distance of the nudged points, which sees 3/4 of what the curvature does
    between them, hence the 4/3. What is *seen* so is

    .. math::
        \|r\| + (1 + t) \|\Delta \nabla f\| + \tfrac43 \|\Delta H u\|
            + \frac{\|\text{even part of } \nabla \hat f / \nu\|^2}{\|\nabla f\|} + \frac{d^p}{4} \|\nabla f\|

    with d the displacement relative to the distance over which the loss bends (that of ``FOBMAML``). A steep piece of
    the loss that no point has met is not seen. Yet λ (H + λ)⁻¹ maps q = ∇f(φ*) into the ball that has q as a diameter,
    so that the error is never more than the *whole*

    .. math::
        \|g - q / 2\| + \|q\| / 2, \qquad \|q - \nabla f(\phi_0)\| \le (1 + t) \|\Delta \nabla f\|

    and the bound is the smaller of that and of what is seen plus 36 ρ² of it, ρ the relative residual at φ̄: unfinished
    solves may have missed something. Round-off of the nudged points is added, and the query gradient is taken a unit
    of round-off aside, so that its own is seen.

    Only ||r||, the measured changes and the ball are exact. That ∇f changes on the rest of the way at most as on the
    measured one, the terms of first order, and the constants 1/4 and 36 are assumptions that all but a few of
    thousands of random problems bore out, and others break: a query loss that is flat where the solve overshot, a piece
    of the loss that the flat directions have yet to meet while a stiff one rules the residual (docs/theory.md).
    Cost: 4 gradients.
    """
    losses, energy, norm = problem.losses, problem.energy(), problem.energy().norm
    slope = free.slope_norm
    tiny = torch.finfo(slope.dtype).tiny

    size = energy.touched(nudged.middle, free.slope, slope)
    unit = problem.unit(free.phi)
    # a way shorter than round-off is none: what it did to the query gradient is no rate
    gone = norm(tree.subtract(nudged.middle, free.phi)).maximum(unit * size)
    pull = losses.value_and_gradient(Role.SUPPORT, nudged.middle, free.step)[1]
    residual = energy.balance(pull, nudged.middle).residual
    force = tree.add(pull, energy.push(nudged.middle))
    del pull
    left = (norm(force) / problem.prox / gone.clamp_min(tiny)).clamp_max(1e6)
    even = norm(tree.subtract(nudged.middle_force, force)) / nudged.nu
    del force

    nearby = unit * size / slope.clamp_min(tiny)
    point = tree.axpy(nearby, free.slope, nudged.middle)
    if free.aside:
        point = tree.add(point, free.aside)
    query = losses.value_and_gradient(Role.QUERY, point, free.step)[1]
    change_of_slope = (1 + left) * norm(tree.subtract(query, free.slope))
    del query, point

    seen = (
        norm(nudged.force)
        + change_of_slope
        + 4 / 3 * norm(_change_of_curvature(problem, free, nudged))
        + even**2 / slope.clamp_min(tiny)
        + nudged.bent**order / 4 * slope
    )
    whole = norm(tree.axpy(problem.prox, nudged.derivative, tree.scale(0.5, free.slope))) + slope / 2
    return Parts(seen, whole, change_of_slope, residual, nudged.noise)


def _change_of_curvature(problem: InnerProblem, free: FreeSolve, nudged: Nudged) -> Params:
    """(H̄ - H(φ₀)) u, the latter by a difference.

    Over half the distance of the nudged points: what lies between them, the truncation, is then seen as well.
    """

    def pull(node: Tensor) -> tuple[Params, ...]:
        phi = tree.axpy(nudged.nu * node, nudged.derivative, free.phi)
        return (problem.losses.value_and_gradient(Role.SUPPORT, phi, free.step)[1],)

    ((at_free,),) = problem.losses.stencil_sums((-1 / 2, 1 / 2), ((-1, 1),), pull)
    # H̄ u = r - λ u - ∇f
    mean = tree.subtract(tree.axpy(-problem.prox, nudged.derivative, nudged.force), free.slope)
    return tree.axpy(-1 / nudged.nu, at_free, mean)
