"""The meta-gradient of a smooth problem to round-off, and how far from that it stayed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from metanudge import tree
from metanudge.energy import InnerProblem
from metanudge.estimators.base import judge
from metanudge.estimators.imaml import conjugate_gradients
from metanudge.estimators.products import implicit_system, needs_of, with_shared
from metanudge.losses import HessianProduct
from metanudge.solvers.loop import Solver, solve
from metanudge.types import Estimate, Need, Params

LENGTHS = (30, 100, 300, 1000, 3000)
"""Of conjugate gradients, one after the other: most problems need the first two, ill-conditioned ones the last."""


@dataclass(frozen=True)
class Implicit:
    r"""What iMAML aims at: Newton's method after the solver, then conjugate gradients until nothing is left to do.

    .. math::
        (I + H / \lambda) \, v = \nabla f(\phi^*), \qquad \nabla_\theta F = v

    ``Estimate.error`` is the norm of what is left of this system: a bound of the error where H is not negative.
    """

    rule: ClassVar[str] = "solve (I + H/λ) v = ∇f(φ*)"
    cost: ClassVar[str] = "as it needs"
    memory: ClassVar[str] = "two activations"
    bias: ClassVar[str] = "0"

    @property
    def needs(self) -> frozenset[Need]:
        """The proximal problem and double backward."""
        return needs_of("exact")

    def __call__(self, problem: InnerProblem, solver: Solver) -> Estimate:
        """Solve the free problem, then the linear system."""
        phi, schedule = solve(solver, problem.energy(), problem.initial)
        free = judge(problem, newton(problem, phi, solver.steps), schedule, solver.steps)
        product = problem.losses.hessian_product(free.phi, free.step)
        v, left = linear(problem, product, free.slope, 1e-8)
        return free.estimate(problem, with_shared(problem, free, product, v), error=left)


def newton(problem: InnerProblem, phi: Params, step: int, most: int = 10) -> Params:
    """Go on from ``phi`` by Newton's steps, each shortened until ||∇E|| falls, while it does and is above round-off."""
    energy = problem.energy()
    for _ in range(most):
        pull = energy.pull(phi, step)
        force, residual = energy.total(pull, phi), energy.balance(pull, phi).residual
        if not bool((residual > 1e3 * torch.finfo(residual.dtype).eps).any()):
            break
        solved, _ = linear(problem, problem.losses.hessian_product(phi, step), force, 1e-2)
        norm, start, moved = energy.norm(force), phi, torch.zeros_like(residual, dtype=torch.bool)
        for size in (1.0, 0.25, 0.0625):
            trial = tree.axpy(-size / problem.prox, solved, start)
            better = ~moved & (energy.norm(energy.gradient(trial, step)) < norm)
            phi, moved = tree.select(better, trial, phi), moved | better
        if not bool(moved.any()):
            break
    return phi


def linear(problem: InnerProblem, product: HessianProduct, right: Params, tol: float) -> tuple[Params, Tensor]:
    """Solve (I + H/λ) x = ``right`` in every lane, until what is left of it is below ``tol`` ||x||.

    By conjugate gradients, begun again on what is left, as long as that helps. Returns x, and the norm of what is left.
    """
    norm, system = problem.energy().norm, implicit_system(problem, product)
    x, rest = tree.zeros(right), right
    tol = max(tol, 1e4 * torch.finfo(norm(right).dtype).eps)
    for length in LENGTHS:
        more = conjugate_gradients(problem.losses, system, rest, length, tol**1.5, until_done=True)
        trial = tree.add(x, more)
        left = tree.subtract(right, system(trial))
        better = norm(left) < norm(rest)
        x, rest = tree.select(better, trial, x), tree.select(better, left, rest)
        done = norm(rest) <= tol * norm(x)
        if bool(done.all()) or (length >= 1000 and not bool((better & ~done).any())):
            break
    return x, norm(rest)
