"""The study of smoothness: the exact quantities it rests on, and its quick form."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
import torch
from torch import Tensor

import metanudge as mn
from metanudge.diagnostics import ExactMetaObjective
from metanudge.experiments.synthetic.linear_tasks import (
    LARGEST_CHANGE,
    LinearFamily,
    LinearTasks,
    pseudo_huber,
    square,
)
from metanudge.experiments.synthetic.smoothness import increasing, run
from metanudge.experiments.synthetic.smoothness_measurements import SmoothnessSettings, fit, shares_of_bounds

SMALL = LinearFamily(tasks=3, points=6, dimension=3)


def normal(seed: int, *size: int) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def problem(prox: float, seed: int = 0, penalty=pseudo_huber) -> LinearTasks:
    return LinearTasks.draw(SMALL, prox, torch.Generator().manual_seed(seed), penalty=penalty)


@pytest.mark.parametrize("distance", [1.0, 10.0])
def test_hessian_of_the_exact_objective_is_the_difference_of_its_gradients(distance):
    exact: ExactMetaObjective = problem(0.1).differentiated()
    theta, step = distance * normal(1, 3), 1e-4
    columns = [(exact.gradient(theta + step * e) - exact.gradient(theta - step * e)) / (2 * step) for e in torch.eye(3)]
    hessian = exact.hessian(theta)
    torch.testing.assert_close(hessian, torch.stack(columns, 1), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(hessian, hessian.mT, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("penalty", [pseudo_huber, square])
@pytest.mark.parametrize("prox", [1.0, 0.01])
def test_closed_form_equals_automatic_differentiation(prox, penalty):
    linear = problem(prox, penalty=penalty)
    exact = linear.differentiated()
    theta = normal(2, 4, 3) * torch.tensor([[0.1], [1.0], [10.0], [100.0]], dtype=torch.float64)
    phi = linear.solve(theta)
    for k, one in enumerate(theta):
        torch.testing.assert_close(phi[:, k], exact.solutions(one), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(linear.gradients(phi)[:, k], exact.gradients(one), rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(linear.hessians(phi)[:, k].mean(0), exact.hessian(one), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("penalty", [pseudo_huber, square])
def test_derivatives_of_the_penalties(penalty):
    r = torch.linspace(-5, 5, 2001, dtype=torch.float64, requires_grad=True)
    found = penalty(r)
    for function, derivative in pairwise(found[:4]):
        if function.requires_grad:  # the derivatives of a square end as constants
            (slope,) = torch.autograd.grad(function.sum(), r, retain_graph=True)
            torch.testing.assert_close(derivative, slope, rtol=1e-10, atol=1e-12)
    assert bool((found.majorant >= found.curvature).all())
    largest = float(found.change.detach().abs().max())
    assert largest == pytest.approx(LARGEST_CHANGE[penalty], rel=1e-4)
    assert largest <= LARGEST_CHANGE[penalty] * (1 + 1e-12)


def test_rho_is_a_lipschitz_constant_of_the_support_hessian():
    linear = problem(1.0)
    shares = []
    for scale in (0.03, 0.3, 3.0):
        one, other = normal(3, 3, 500, 3), scale * normal(4, 3, 500, 3)
        difference = torch.linalg.matrix_norm(linear.systems(one + other) - linear.systems(one), 2)
        shares.append(difference / (linear.rho[:, None] * other.norm(dim=-1)))
    assert float(torch.stack(shares).max()) <= 1
    assert float(torch.stack(shares).max()) > 0.2  # not an empty bound


def test_factor_of_the_bound_is_attained_in_one_dimension():
    """One point, residual 1/2: the second term of Hess F is ρλ / (λ + h'')^2 |∇F|, with equality."""
    x, y, prox = 1.7, 0.3, 0.2
    batch = mn.Batch(*(torch.full((1, 1, 1), value, dtype=torch.float64) for value in (x, y)))
    query = mn.Batch(batch.inputs, batch.targets - 2)
    linear = LinearTasks(mn.Tasks(batch, query), prox)
    penalty = pseudo_huber(torch.tensor(0.5, dtype=torch.float64))
    theta = (y + 0.5) / x + penalty.slope * x / prox
    phi = linear.solve(theta.reshape(1, 1))
    assert float(phi) == pytest.approx((y + 0.5) / x, rel=1e-12)
    system, gradient = float(linear.systems(phi)), float(linear.gradients(phi))
    second = float(linear.hessians(phi)) - prox**2 * float(linear.query_hessian) / system**2
    assert abs(second) == pytest.approx(float(linear.rho) * prox / system**2 * abs(gradient), rel=1e-10)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("prox", [3.0, 0.3, 0.01])
def test_bound_holds_on_random_problems(prox, seed):
    linear = problem(prox, seed)
    theta = normal(seed + 10, 200, 3) * torch.logspace(-1, 2.5, 200, dtype=torch.float64)[:, None]
    constant, local = shares_of_bounds(linear, linear.solve(theta))
    assert float(local.max()) <= 1 + 1e-9
    assert bool((constant <= local * (1 + 1e-9)).all())  # μ = 0 is the weaker bound
    assert float(local.max()) > 0.3  # not an empty bound


def test_fit_finds_a_line():
    x = torch.linspace(0, 9, 10, dtype=torch.float64)
    assert fit(x, 2 + 3 * x) == pytest.approx({"L0": 2.0, "L1": 3.0, "r2": 1.0})


def test_smoothness_study():
    shares: list[float] = []
    study = run(SmoothnessSettings.quick(), shares.append)
    by_lambda = study.metrics["by_lambda"]
    assert study.name == "smoothness"
    assert list(by_lambda) == ["1", "0.3", "0.1", "0.03", "0.01"]
    assert {"L0", "L1", "r2", "bound_violations"} <= by_lambda["0.01"].keys()
    assert by_lambda["1"]["L1"] > 0
    assert increasing([one["L1"] for one in by_lambda.values()])
    assert all(one["bound_violations"] == one["local_bound_violations"] == 0 for one in by_lambda.values())
    assert all(one["closed_form_error"] < 1e-10 for one in by_lambda.values())
    assert abs(study.metrics["quadratic"]["L1"]) < 1e-6
    assert all(claim.holds for claim in study.claims)
    assert shares == sorted(shares)
    assert shares[-1] == 1
    json.dumps(study.metrics, allow_nan=False)
