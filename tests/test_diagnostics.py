"""The exact meta-objective, against differences of its values and against dense linear algebra."""

from __future__ import annotations

import pytest
import torch

import metanudge as mn
from metanudge.diagnostics import ExactMetaObjective
from metanudge.tasks import logistic, logistic_loss, logistic_model
from problems import PROBLEMS

EYE = torch.eye(4, dtype=torch.float64)


@pytest.fixture(scope="module")
def exact() -> ExactMetaObjective:
    return ExactMetaObjective(logistic_model(4), logistic_loss, logistic(3, features=4), prox=0.3)


def theta() -> torch.Tensor:
    return torch.randn(4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_gradient_is_the_difference_of_values(exact):
    h = 1e-5
    slopes = [(exact.losses(theta() + h * e) - exact.losses(theta() - h * e)).mean() / (2 * h) for e in EYE]
    torch.testing.assert_close(exact.gradient(theta()), torch.stack(slopes), rtol=1e-7, atol=1e-9)


def test_hessian_is_the_difference_of_gradients(exact):
    h = 1e-5
    rows = [(exact.gradient(theta() + h * e) - exact.gradient(theta() - h * e)) / (2 * h) for e in EYE]
    torch.testing.assert_close(exact.hessian(theta()), torch.stack(rows), rtol=1e-6, atol=1e-8)


def test_solutions_are_stationary(exact):
    tasks = logistic(3, features=4)
    for i, phi in enumerate(exact.solutions(theta())):
        point = phi.clone().requires_grad_()
        x, y = (leaf[i] for leaf in tasks.support)
        energy = torch.nn.functional.binary_cross_entropy_with_logits(x @ point, y)
        energy = energy + 0.15 * (point - theta()).square().sum()
        (gradient,) = torch.autograd.grad(energy, point)
        assert float(gradient.norm()) < 1e-14


@pytest.mark.parametrize("name", ["ridge", "logistic"])
def test_equals_the_answers_of_the_known_problems(name):
    made = PROBLEMS[name]()
    found = ExactMetaObjective(made.make(), made.loss, made.tasks, made.prox)
    torch.testing.assert_close(found.theta0, made.theta)
    torch.testing.assert_close(found.gradient(made.theta), made.meta_gradient(), rtol=1e-11, atol=1e-13)


def test_an_inner_problem_without_minimum_is_told():
    model = torch.nn.Linear(1, 1, bias=False, dtype=torch.float64)
    x = torch.ones(1, 2, 1, dtype=torch.float64)
    unbounded = ExactMetaObjective(
        model, lambda m, b: -m(b.inputs).pow(4).mean(), mn.Tasks(mn.Batch(x, x), mn.Batch(x, x)), prox=1.0
    )
    with pytest.raises(mn.NonFiniteError, match="convex"):
        unbounded.gradient(torch.full((1,), 5.0, dtype=torch.float64))
