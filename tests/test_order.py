"""The declared order of every finite-difference scheme, by regression of log error on log nu."""

from __future__ import annotations

import math

import pytest
import torch

import metanudge as mn
from problems import ONE_SIDED, PROBLEMS, distance, estimate

SCHEMES = {**mn.STENCILS, "one_sided": ONE_SIDED, "lopsided": mn.Stencil((-1, 0, 2), (-2 / 3, 1 / 2, 1 / 6), 2)}
SOLVER = mn.Nesterov(steps=75)


def steepness(x: list[float], y: list[float]) -> float:
    """Slope of the least-squares line of log y on log x."""
    u, v = ([math.log(value) for value in values] for values in (x, y))
    mean_u, mean_v = sum(u) / len(u), sum(v) / len(v)
    return sum((a - mean_u) * (b - mean_v) for a, b in zip(u, v, strict=True)) / sum((a - mean_u) ** 2 for a in u)


@pytest.mark.parametrize("nudge", ["full", "linear"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_declared_order(scheme: str, nudge: str) -> None:
    """Converged solves of a problem that is not quadratic: the error is the truncation error, C nu^p."""
    problem, stencil = PROBLEMS["logistic"](), SCHEMES[scheme]
    # nu so large that C nu^p stays far above round-off / nu, and small against the problem's own scale
    nus = [0.02 * 2**-k for k in range(3)] if stencil.order < 4 else [0.1 * 2 ** (-k / 2) for k in range(3)]
    exact = problem.meta_gradient()
    errors = [distance(estimate(problem, mn.FOBMAML(stencil, nudge=nudge, nu=nu), SOLVER), exact) for nu in nus]
    assert min(errors) > 1e-9, "the errors must be truncation, not round-off"
    assert steepness(nus, errors) == pytest.approx(stencil.order, abs=0.15)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_full_nudge_is_the_stencil_of_exact_solutions(scheme: str) -> None:
    """At any nu: the estimate equals the same stencil on solutions found by other means, truncation error included."""
    for name in ("diagonal", "logistic"):
        problem, stencil = PROBLEMS[name](), SCHEMES[scheme]
        expected = problem.finite_difference(stencil.nodes, stencil.weights, nu=0.05)
        assert distance(expected, problem.meta_gradient()) > 1e-7
        assert distance(estimate(problem, mn.FOBMAML(stencil, nudge="full", nu=0.05), SOLVER), expected) < 1e-10


@pytest.mark.parametrize("nu", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_linear_nudge_is_exact_at_any_nu_on_a_quadratic(scheme: str, nu: float) -> None:
    problem = PROBLEMS["ridge"]()
    found = estimate(problem, mn.FOBMAML(SCHEMES[scheme], nudge="linear", nu=nu), SOLVER)
    assert distance(found, problem.meta_gradient()) < 1e-9


@pytest.mark.parametrize("scheme", SCHEMES)
def test_full_nudge_is_not_exact_on_a_quadratic(scheme: str) -> None:
    """It bends the energy: on ridge its error is the order's, and at nu = 0.1 plain to see."""
    problem = PROBLEMS["ridge"]()
    found = estimate(problem, mn.FOBMAML(SCHEMES[scheme], nudge="full", nu=0.1), SOLVER)
    assert 1e-4 < distance(found, problem.meta_gradient()) < 1


def test_higher_order_needs_no_smaller_nudge() -> None:
    """At one and the same nu the fourth-order scheme beats the symmetric one, and that the forward one."""
    problem = PROBLEMS["logistic"]()
    exact = problem.meta_gradient()
    forward, symmetric, fourth = (
        distance(estimate(problem, mn.FOBMAML(scheme, nu=0.02), SOLVER), exact)
        for scheme in ("forward", "symmetric", "fourth_order")
    )
    assert forward > 10 * symmetric > 100 * fourth


def inexact(error: float, nu: float, scheme: str) -> float:
    """Error of a stencil of ridge solutions of which each is off by ``error`` in a direction of its own."""
    problem, stencil = PROBLEMS["ridge"](), mn.STENCILS[scheme]
    total = torch.zeros_like(problem.theta)
    generator = torch.Generator().manual_seed(5)
    for node, weight in zip(stencil.nodes, stencil.weights, strict=True):
        for phi in problem.solutions(nu=node * nu):
            noise = torch.randn(phi.shape, generator=generator, dtype=phi.dtype)
            total += weight * problem.prox * (problem.theta - phi - error * noise / noise.norm()) / nu
    return distance(total / len(problem.plain), problem.meta_gradient())


@pytest.mark.parametrize(("scheme", "order"), [("forward", 1), ("symmetric", 2), ("fourth_order", 4)])
def test_bias_in_the_inner_accuracy_at_the_best_nu(scheme: str, order: int) -> None:
    """The paper's rates, delta^(p/(p+1)) with nu ~ delta^(1/(p+1)), and they need *independent* solve errors.

    A property of the stencils' weights and nodes on exact solutions; the library's matched solves do better.
    """
    deltas = [1e-7, 1e-9, 1e-11]
    errors = [inexact(delta, delta ** (1 / (order + 1)), scheme) for delta in deltas]
    assert steepness(deltas, errors) == pytest.approx(order / (order + 1), abs=0.06)


def test_matched_solves_cancel_their_errors() -> None:
    """Few steps, tiny nu: the solve error delta does not come back as delta / nu.

    Forward, where an unmatched base would show: free solution at K steps, nudged one gone on to 2 K.
    """
    problem = PROBLEMS["logistic"]()
    solver, nu, exact = mn.GradientDescent(20, lr=0.4), 1e-5, problem.meta_gradient()
    for scheme in ("forward", "symmetric", "one_sided"):
        for start in ("solution", "initialization"):
            found = estimate(problem, mn.FOBMAML(SCHEMES[scheme], nu=nu, start=start), solver)
            assert distance(found, exact) < 0.1, (scheme, start)
