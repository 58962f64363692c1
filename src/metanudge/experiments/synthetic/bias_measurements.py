"""What the study of the bias measures (see bias.py): injected errors on exact solves, and matched solves."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Generator, Tensor

import metanudge as mn
from metanudge import tree
from metanudge.energy import InnerProblem
from metanudge.estimators.base import Estimator, solve_free
from metanudge.experiments.study import Advance
from metanudge.experiments.synthetic.exact_logistic import meta_gradients, nudged_solutions
from metanudge.solvers.loop import Solver, replay
from metanudge.tasks import logistic, logistic_loss, logistic_model
from metanudge.types import Estimate, Need, Tasks


class Setting(NamedTuple):
    """The problem all measurements share.

    Attributes:
        tasks: T tasks of n support and n query examples.
        theta: A generic initialisation, ``[d]``.
        prox: λ.
        exact: ∇F(θ), ``[d]``.
        largest_nudge: Nodes |n_k ν| up to here leave every nudged energy at least λ/2 of curvature.
    """

    tasks: Tasks
    theta: Tensor
    prox: float
    exact: Tensor
    largest_nudge: float

    def relative(self, gradient: Tensor) -> Tensor:
        """||g - ∇F|| / ||∇F||, ``[...]`` from ``[..., d]``."""
        error: Tensor = (gradient - self.exact).norm(dim=-1) / self.exact.norm()
        return error


def make_setting(number: int, features: int, examples: int, prox: float, seed: int) -> Setting:
    """Draw the problem, and a generic θ of norm 1, and differentiate the meta-objective exactly."""
    tasks = logistic(number, features=features, shots=examples, queries=examples, seed=seed)
    theta = torch.randn(features, generator=Generator().manual_seed(seed), dtype=torch.float64)
    theta /= theta.norm()
    exact = meta_gradients(tasks, theta[None], prox)[0]
    x = tasks.query.inputs
    curvature = float(torch.linalg.matrix_norm(x.mT @ x / examples, ord=2).max()) / 4  # σ' <= 1/4
    return Setting(tasks, theta, prox, exact, prox / (2 * curvature))


def estimates(setting: Setting, stencil: mn.Stencil, nus: Tensor, solutions: Tensor) -> Tensor:
    """(1/ν) sum_k w_k λ (θ - φ(n_k ν)), mean over tasks: ``[..., N, d]`` from solutions ``[..., T, N, nodes, d]``."""
    weights = torch.tensor(stencil.weights, dtype=nus.dtype)
    partials = setting.prox * (setting.theta - solutions)
    return torch.einsum("...tnkd,k->...nd", partials, weights) / (len(setting.tasks.support.targets) * nus[:, None])


def fit_range(setting: Setting) -> tuple[float, float]:
    """The δ a slope is fitted to, from the problem alone: neither round-off nor saturation has a say there.

    Injected errors are at least 100 times the round-off of a solution. The nudge of the fourth-order stencil is the
    largest: were it δ^(1/5), its outer nodes would lie at twice that; they keep within half of the largest nudge.
    """
    solutions = nudged_solutions(setting.tasks, setting.theta, setting.prox, torch.zeros(1, dtype=torch.float64))
    roundoff = torch.finfo(torch.float64).eps * float(solutions.norm(dim=-1).max())
    return 100 * roundoff, (setting.largest_nudge / 4) ** 5


def slope(x: Tensor, y: Tensor) -> tuple[float, float]:
    """Least-squares line log10 y = a log10 x + b: (a, b)."""
    columns = torch.stack([x.log10(), torch.ones_like(x)], 1)
    a, b = torch.linalg.lstsq(columns, y.log10().unsqueeze(1)).solution.flatten().tolist()
    return a, b


class Injection(NamedTuple):
    """Injected errors of every norm δ and what they make of one stencil: nudges and relative biases, all ``[D]``.

    Attributes:
        deltas: δ.
        tuned_nu: The best of a grid of nudges, for every δ.
        tuned: The bias there.
        rule_nu: c δ^(1/(p+1)), up to the largest nudge.
        rule: The bias there.
    """

    deltas: Tensor
    tuned_nu: Tensor
    tuned: Tensor
    rule_nu: Tensor
    rule: Tensor


def inject(
    setting: Setting, stencil: mn.Stencil, deltas: Tensor, middle: int, per_decade: int, draws: int, seed: int
) -> Injection:
    """Root-mean-square bias over ``draws`` independent errors a solve.

    Every bias is measured on errors other than those its nudge was tuned on.

    Args:
        setting: The problem.
        stencil: The scheme.
        deltas: Norms of the errors.
        middle: Index of the δ whose tuned nudge fixes the constant c of the theory's rule, once for all δ.
        per_decade: Nudges a decade in the grid, which ends where the outermost node reaches the largest nudge.
        draws: Errors to tune on, and as many to measure with.
        seed: Of the errors.
    """
    generator = Generator().manual_seed(seed)
    nodes = torch.tensor(stencil.nodes, dtype=torch.float64)
    top = math.log10(setting.largest_nudge / float(nodes.abs().max()))
    grid = torch.logspace(-8, top, round((top + 8) * per_decade) + 1, dtype=torch.float64)

    def solve(nus: Tensor) -> Tensor:
        found = nudged_solutions(setting.tasks, setting.theta, setting.prox, torch.outer(nus, nodes).flatten())
        return found.reshape(found.shape[0], len(nus), len(nodes), -1)

    def bias(solutions: Tensor, nus: Tensor, delta: Tensor) -> Tensor:
        errors = torch.randn(draws, *solutions.shape, generator=generator, dtype=torch.float64)
        errors *= delta / errors.norm(dim=-1, keepdim=True)
        return setting.relative(estimates(setting, stencil, nus, solutions + errors)).square().mean(0).sqrt()

    def biases(solutions: Tensor, nus: Tensor) -> Tensor:
        return torch.cat([bias(solutions[:, i : i + 1], nus[i : i + 1], delta) for i, delta in enumerate(deltas)])

    on_grid = solve(grid)
    best = torch.stack([bias(on_grid, grid, delta).argmin() for delta in deltas])
    rule_nu = grid[best[middle]] * (deltas / deltas[middle]) ** (1 / (stencil.order + 1))
    rule_nu = rule_nu.clamp_max(grid[-1])
    return Injection(deltas, grid[best], biases(on_grid[:, best], grid[best]), rule_nu, biases(solve(rule_nu), rule_nu))


@dataclass(frozen=True)
class UnmatchedForward:
    """The mistake: the free solution is one end of the difference, while the nudged solve goes on from it."""

    rule: ClassVar[str] = "λ (φ_K - φ(ν)_2K) / ν"
    cost: ClassVar[str] = "K + 2K'"
    memory: ClassVar[str] = "one step + 2 parameter copies"
    bias: ClassVar[str] = "contraction^K / ν"

    nu: float

    @property
    def needs(self) -> frozenset[Need]:
        """The proximal problem."""
        return frozenset({Need.PROXIMAL_TERM})

    def __call__(self, problem: InnerProblem, solver: Solver) -> Estimate:
        """Solve, go on with the nudge, subtract."""
        free = solve_free(problem, solver)
        nu = torch.full_like(free.query_loss, self.nu)
        phi = replay(solver, problem.energy(nu), free.phi, free.schedule)
        return free.estimate(problem, tree.scale(problem.prox / nu, tree.subtract(free.phi, phi)), nu)


class Comparison(NamedTuple):
    """Relative errors ``[K, N]`` of matched and unmatched forward differences."""

    steps: tuple[int, ...]
    nus: Tensor
    matched: Tensor
    unmatched: Tensor


def compare(setting: Setting, steps: Sequence[int], lr: float, nudges: int, advance: Advance) -> Comparison:
    """Both, over inner steps and ν, from the library's learner with plain gradient descent inside."""
    nus = torch.logspace(-9, 0, nudges, dtype=torch.float64)
    model = logistic_model(len(setting.theta))
    with torch.no_grad():
        model.weight.copy_(setting.theta)

    def error(estimator: Estimator, number: int) -> float:
        solver = mn.GradientDescent(number, lr)
        learner = mn.MetaLearner(model, logistic_loss, prox=setting.prox, solver=solver, estimator=estimator)
        model.zero_grad()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", mn.UnsolvedWarning)  # how far off the unmatched are is what is measured
            learner.backward(setting.tasks)
        assert model.weight.grad is not None
        return float(setting.relative(model.weight.grad.flatten()))

    matched, unmatched = [], []
    for index, number in enumerate(steps):
        matched.append([error(mn.FOBMAML("forward", nudge="full", nu=float(nu)), number) for nu in nus])
        unmatched.append([error(UnmatchedForward(float(nu)), number) for nu in nus])
        advance(sum(steps[: index + 1]) / sum(steps))
    matched_errors, unmatched_errors = (torch.tensor(one, dtype=nus.dtype) for one in (matched, unmatched))
    return Comparison(tuple(steps), nus, matched_errors, unmatched_errors)
