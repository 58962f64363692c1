"""FO-B-MAML: the meta-gradient as a finite difference of nudged solutions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from metanudge import tree
from metanudge.energy import Energy, InnerProblem
from metanudge.errors import SettingsError
from metanudge.estimators.base import FreeSolve, solve_free
from metanudge.estimators.stencil import STENCILS, Stencil
from metanudge.settings import check_positive, check_steps
from metanudge.solvers.loop import Solver, replay
from metanudge.types import Estimate, Need, Params


@dataclass(frozen=True)
class FOBMAML:
    r"""FO-B-MAML: first derivatives only, memory flat in the inner steps, asymptotically exact.

    .. math::
        \nabla_\omega F \approx \frac{1}{\nu} \sum_k w_k \,
            \frac{\partial E}{\partial \omega}(\phi(n_k \nu); \omega, n_k \nu), \qquad
        \frac{\partial E}{\partial \theta} = \lambda (\theta - \phi)

    with the nodes n_k and weights w_k of a stencil; "symmetric" gives λ (φ(-ν) - φ(+ν)) / (2ν). The nudged solves are
    matched: same start, steps, step sizes, restarts, random state.

    The nudge. With "full", ν multiplies the query loss (the paper's form); with "linear" only its gradient at φ(0):
    one query gradient in all, and no truncation error where the support loss is quadratic.

    ν by default. Round-off contributes about ε s / ν and truncation (ν / s)^p (how far the solution is displaced) and,
    with the full nudge, ν^p (how much the query loss bends the energy), where s = λ ||φ(0)|| / ||∇f(φ(0))|| is the
    nudge that would displace φ by its own norm and ε the unit round-off. Hence, per task,
    ν = ε^(1/(p+1)) min(s, s^(1/(p+1))), and without the second term for the linear nudge.

    Cost per task, K inner and K' nudged steps: K + 2 + 4 K' gradients (symmetric, full; K' = K by default), forward
    K + 2 + 3 K', or 2 K' less one K' each with the linear nudge. Memory: that of one gradient, and three copies of the
    adapted parameters (in place); nothing grows with K.

    Args:
        scheme: A name in ``STENCILS`` ("forward", "symmetric", "fourth_order") or a ``Stencil``.
        nudge: "full" or "linear".
        nu: The nudge ν > 0, or "auto".
        steps: Steps of a nudged solve, at most those of the solver; None for as many.
        start: Where nudged solves begin: at the free "solution", or at the "initialization" θ, where the free solve
            serves as the node 0.

    Raises:
        SettingsError: A value out of its range; or a learner with prox = 0.

    Source: Chayti & Jaggi, arXiv:2409.03682. The rule for two solutions is the contrastive one of Zucchet et al.,
    arXiv:2104.01677.

    Example:
        >>> import metanudge as mn
        >>> mn.FOBMAML(scheme="fourth_order", nudge="linear").stencil.order
        4
    """

    rule: ClassVar[str] = "λ (φ(-ν) - φ(+ν)) / 2ν"
    cost: ClassVar[str] = "K + 2 + 4K' (linear nudge: K + 2 + 2K')"
    memory: ClassVar[str] = "one step + 3 parameter copies"
    bias: ClassVar[str] = "→ 0: δ^(p/(p+1)) at worst, contraction^K' + ν^p when matched"

    scheme: str | Stencil = "symmetric"
    nudge: Literal["full", "linear"] = "full"
    nu: float | Literal["auto"] = "auto"
    steps: int | None = None
    start: Literal["solution", "initialization"] = "solution"

    def __post_init__(self) -> None:
        if isinstance(self.scheme, str) and self.scheme not in STENCILS:
            raise SettingsError(f"scheme must be a mn.Stencil or one of {', '.join(STENCILS)}, got {self.scheme!r}")
        if self.nudge not in ("full", "linear"):
            raise SettingsError(f'nudge must be "full" or "linear", got {self.nudge!r}')
        if self.start not in ("solution", "initialization"):
            raise SettingsError(f'start must be "solution" or "initialization", got {self.start!r}')
        if self.nu != "auto":
            check_positive(nu=self.nu)
        if self.steps is not None:
            check_steps(self.steps)
            if self.start == "initialization":
                raise SettingsError('nudged solves from the "initialization" repeat all steps; leave steps=None')

    @property
    def needs(self) -> frozenset[Need]:
        """The proximal problem."""
        return frozenset({Need.PROXIMAL_TERM})

    @property
    def stencil(self) -> Stencil:
        """The row of the table."""
        return STENCILS[self.scheme] if isinstance(self.scheme, str) else self.scheme

    def __call__(self, problem: InnerProblem, solver: Solver) -> Estimate:
        """Solve the free problem, then one matched problem a node."""
        free = solve_free(problem, solver)
        nu = self._nudge_size(problem, free)
        slope = free.slope if self.nudge == "linear" else None
        at_solution = self.start == "solution"
        start = free.phi if at_solution else problem.losses.spread(problem.theta)
        schedule = solver.settle(free.schedule) if at_solution else free.schedule

        def partial_at(energy: Energy) -> Params:
            solved = energy.nu is None and not at_solution
            phi = free.phi if solved else replay(solver, energy, start, schedule, self.steps)
            return problem.meta_partial(energy, phi, free.step)

        rows = dict(zip(self.stencil.nodes, self.stencil.weights, strict=True))
        # node 0 is the free problem and needs no query gradient
        weight_at_zero = rows.pop(0, None)
        total = problem.losses.stencil_sum(
            tuple(rows), tuple(rows.values()), lambda node: partial_at(problem.energy(nu * node, slope))
        )
        if weight_at_zero is not None:
            total = tree.axpy(weight_at_zero, partial_at(problem.energy()), total)
        gradient = tree.scale(1 / nu, total)
        if self.nudge == "linear":
            gradient |= {name: gradient[name] + leaf for name, leaf in free.direct(problem).items()}
        return free.estimate(gradient, nu)

    def _nudge_size(self, problem: InnerProblem, free: FreeSolve) -> Tensor:
        energy = problem.energy()
        norm = energy.norm(free.phi)
        if self.nu != "auto":
            return torch.full_like(norm, self.nu)
        power = 1 / (self.stencil.order + 1)
        size = torch.where(norm > 0, norm, torch.ones_like(norm))
        largest = 1e6  # keeps ν finite where the query gradient vanishes
        s = (size * problem.prox / energy.norm(free.slope).clamp_min(1e-30)).clamp_max(largest)
        relative = s if self.nudge == "linear" else torch.minimum(s, s**power)
        nu: Tensor = relative * torch.finfo(norm.dtype).eps ** power
        return nu
