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
from metanudge.estimators.certificate import Nudged, Parts, measure
from metanudge.estimators.stencil import STENCILS, Stencil
from metanudge.settings import check_flag, check_positive, check_steps
from metanudge.solvers.loop import Solver, replay
from metanudge.types import Estimate, Need, Params

WAYS = 4.0
"""Times the way on which the support loss drove φ: over so much it is taken to bend (docs/results.md, measured)."""
SHORT = 1e-2
"""The least part of the length of φ over which it is taken to bend: shorter nudges would drown in round-off."""

ASTRAY = 100.0
"""Times the query gradient, which λ (H + λ)⁻¹ only shortens where H >= 0, above which nudged solves went astray, if it
took them over more than a tenth of the length of φ."""


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
    one query gradient in all, no truncation error where the support loss is quadratic, and no query loss to bend the
    inner problem; which of them is ahead at equal cost depends on the problem (docs/results.md).

    ν by default, per task. Let s = λ l / ||∇f(φ(0))||, the nudge that would displace φ by its own length l, that of the
    parameters which the query gradient touches (``Energy.length``), so that d = ν / s is the relative displacement (of
    the node nearest to 0, whatever unit a stencil is written in). Round-off contributes about ε / 2d, and truncation
    (d/b)^p, b the part of l over which the support loss bends, taken to be 4 ||φ(0) - θ|| / l, four times the way on
    which it drove φ, between max(.01, ε^(1/3)) and 1. With the linear nudge d = b (ε/2pb)^(1/(p+1)), where their sum is
    least, or b (ρ/10)^(1/p) if that is larger, but of that at most b/20, ρ being the residual: truncation then stays
    far below what an unfinished solve leaves anyway, and the larger displacement averages over kinks and sharp bends of
    the loss. With the full nudge ν = d min(s, s^(1/(p+1))), which is for ν^p, how much the query loss bends the energy;
    d = ε^(1/(p+1)), but at most b/10 or b (ε/b)^(1/(p+1)), whichever is larger.

    A task whose ||g|| is above a hundred ||∇f||, over more than a tenth of l, counts as diverged.

    Cost per task, K inner and K' nudged steps, N nodes (from the "initialization", those other than 0): K + 2 + N K'
    gradients with the linear nudge, and 4 + N for the bound ``MetaStep.error_bound``; K + 2 + 2 N K' with the full one,
    which has no bound, as little as the start at the "initialization". N is 2 for "symmetric". Memory: that of one
    gradient, and a dozen copies of the adapted parameters (in place); three with the full nudge from the
    "initialization" in place (docs/large_models.md); nothing grows with K.

    Args:
        scheme: A name in ``STENCILS`` ("forward", "symmetric", "fourth_order") or a ``Stencil``.
        nudge: "linear" or "full".
        nu: The nudge ν > 0, or "auto".
        steps: Steps K' of a nudged solve; None for twice those of the solver (linear) or as many (full): equal cost.
        start: Where nudged solves begin: at the free "solution", or at the "initialization" θ, where the free solve
            serves as the node 0.
        certify: Whether to bound the error (``MetaStep.error_bound``; linear nudge from the solution); False saves its
            gradients and its memory.

    Raises:
        SettingsError: A value out of its range; or a learner with prox = 0.

    Source: Chayti & Jaggi, arXiv:2409.03682. The rule for two solutions is the contrastive one of Zucchet et al.,
    arXiv:2104.01677.

    Example:
        >>> import metanudge as mn
        >>> mn.FOBMAML(scheme="fourth_order").stencil.order
        4
    """

    rule: ClassVar[str] = "λ (φ(-ν) - φ(+ν)) / 2ν"
    cost: ClassVar[str] = "K + 8 + 2K' (full nudge: K + 2 + 4K')"
    memory: ClassVar[str] = "one step + a dozen parameter copies"
    bias: ClassVar[str] = "→ 0: δ^(p/(p+1)) at worst, contraction^K' + ν^p when matched"

    scheme: str | Stencil = "symmetric"
    nudge: Literal["linear", "full"] = "linear"
    nu: float | Literal["auto"] = "auto"
    steps: int | None = None
    start: Literal["solution", "initialization"] = "solution"
    certify: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.scheme, Stencil) and not (isinstance(self.scheme, str) and self.scheme in STENCILS):
            raise SettingsError(f"scheme must be a mn.Stencil or one of {', '.join(STENCILS)}, got {self.scheme!r}")
        if self.nudge not in ("linear", "full"):
            raise SettingsError(f'nudge must be "linear" or "full", got {self.nudge!r}')
        if self.start not in ("solution", "initialization"):
            raise SettingsError(f'start must be "solution" or "initialization", got {self.start!r}')
        if self.nu != "auto":
            given: object = self.nu
            if isinstance(given, str):
                raise SettingsError(f'nu must be a finite number above 0 or "auto", got {given!r}')
            check_positive(nu=self.nu)
        check_flag(certify=self.certify)
        if self.steps is not None:
            check_steps(self.steps)
            if self.start == "initialization":
                raise SettingsError('nudged solves from the "initialization" repeat all steps; leave steps=None')

    @property
    def needs(self) -> frozenset[Need]:
        """The proximal problem; where nudged solves repeat the free one, that it began where they do."""
        repeats = {Need.START_AT_THETA} if self.start == "initialization" else set()
        nudged = {Need.QUERY_LOSS_AS_IT_IS} if self.nudge == "full" else set()
        return frozenset({Need.PROXIMAL_TERM} | repeats | nudged)

    @property
    def stencil(self) -> Stencil:
        """The row of the table."""
        return STENCILS[self.scheme] if isinstance(self.scheme, str) else self.scheme

    def __call__(self, problem: InnerProblem, solver: Solver) -> Estimate:
        """Solve the free problem, then one matched problem a node."""
        at_solution, stencil = self.start == "solution", self.stencil
        certified = self.certify and at_solution and self.nudge == "linear" and not problem.sampled
        free = solve_free(problem, solver, keeps_aside=certified)
        nu, displacement, bent = self._nudge_size(problem, free)
        # of the solutions, and of a gradient, which in narrow precision may be off by a whole unit
        noise = (problem.unit(free.phi) / (2 * displacement) + 16 * problem.round_off) * free.slope_norm
        slope = free.slope if self.nudge == "linear" else None
        start = free.phi if at_solution else problem.initial
        schedule = solver.settle(free.schedule, self._steps(solver)) if at_solution else free.schedule
        if slope is None:
            free = free._replace(query_gradient={})
        if not at_solution and 0 not in stencil.nodes:
            free = free._replace(phi={})

        def terms_at(energy: Energy) -> tuple[Params, ...]:
            solved = energy.nu is None and not at_solution
            phi = dict(free.phi if solved else replay(solver, energy, start, schedule))
            if certified:
                return problem.partials(energy, phi, free.step)
            return (problem.meta_partial(energy, phi, free.step),)

        table = (stencil.weights, stencil.values) if certified else (stencil.weights,)
        rows = {node: row for node, *row in zip(stencil.nodes, *table, strict=True)}
        at_zero = rows.pop(0, None)  # node 0 is the free problem and needs no query gradient
        sums = problem.losses.stencil_sums(
            tuple(rows),
            tuple(zip(*rows.values(), strict=True)),
            lambda node: terms_at(problem.energy(nu * node, slope)),
        )
        if at_zero is not None:
            found = terms_at(problem.energy())
            sums = [
                tuple(tree.axpy(weight, one, total) for one, total in zip(found, both, strict=True))
                for weight, both in zip(at_zero, sums, strict=True)
            ]
        derivative = sums[0]
        error = None
        if certified:
            middle = sums[1]
            nudged = Nudged.of(problem, nu, stencil.nearest, bent, noise, derivative, middle)
            error = self.certificate(problem, free, nudged).bound()
        gradient = tree.spend(lambda leaf: tree.over(1 / nu, leaf) * leaf, derivative[0])
        if self.nudge == "linear":
            gradient |= {name: gradient[name] + leaf for name, leaf in free.direct(problem).items()}
        estimate = free.estimate(problem, gradient, nu, error, noise)
        return estimate._replace(diverged=estimate.diverged | self._astray(estimate, displacement, noise))

    def _astray(self, estimate: Estimate, displacement: Tensor, noise: Tensor) -> Tensor:
        """Whether nudged solves went where no finite difference of solutions could have sent them."""
        usual = estimate.slope + noise
        far = estimate.size * displacement > usual / 10  # where the query loss is flat at φ(0), much may be little
        return (usual > 0) & far & (estimate.size > ASTRAY * usual)

    def certificate(self, problem: InnerProblem, free: FreeSolve, nudged: Nudged) -> Parts:
        """Measure the parts of the bound."""
        return measure(problem, free, nudged, self.stencil.order)

    def _steps(self, solver: Solver) -> int:
        if self.steps is not None:
            return self.steps
        return 2 * solver.steps if self.nudge == "linear" else solver.steps

    def _nudge_size(self, problem: InnerProblem, free: FreeSolve) -> tuple[Tensor, Tensor, Tensor]:
        """ν, the relative displacement d = n ν / s of the nearest node n, and d / b."""
        order, nearest, unit = self.stencil.order, self.stencil.nearest, problem.unit(free.phi)
        length, slope = free.length(problem), free.slope_norm
        seen = slope > torch.finfo(slope.dtype).tiny ** 0.5  # any ν will do where the query gradient vanishes
        s = torch.where(seen, length * problem.prox / slope, torch.ones_like(slope))
        bend = (WAYS * free.way / length).clamp(max(SHORT, unit ** (1 / 3)), 1.0)
        least = (unit / bend).pow(1 / (order + 1))
        if self.nu != "auto":
            nu = torch.full_like(s, self.nu)
            displacement = nearest * nu / s
        elif self.nudge == "full":
            near = (bend * least.clamp_min(1 / 10)).clamp_max(unit ** (1 / (order + 1)))
            near = near * torch.minimum(s, s ** (1 / (order + 1)))
            nu, displacement = near / nearest, near / s
        else:
            least = least / (2 * order) ** (1 / (order + 1))  # the minimum of ε / (2 d) + (d/b)^p
            unfinished = (free.residual / 10).pow(1 / order).clamp_max(1 / 20)
            displacement = bend * torch.maximum(least, unfinished)
            nu = displacement * s / nearest
        return nu, displacement, displacement / bend
