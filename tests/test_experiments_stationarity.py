"""The study of stationarity: its exact judge, its runs, and a small form of it."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice

import pytest
import torch

import metanudge as mn
from metanudge.diagnostics import ExactMetaObjective
from metanudge.experiments.report import plain
from metanudge.experiments.synthetic import stationarity
from metanudge.experiments.synthetic.noise import choose, last_quarter
from metanudge.experiments.synthetic.stationarity import StationaritySettings
from metanudge.experiments.synthetic.stationarity_runs import (
    Noise,
    Problem,
    curve_of,
    descend,
    full_batch,
    noisy_norms,
)
from metanudge.tasks import logistic, logistic_loss, logistic_model

SMALL = replace(
    StationaritySettings.quick(),
    tasks=6,
    features=4,
    examples=12,
    inner_steps=16,
    step_sizes=(4.0, 8.0),
    budget=2000,
    noisy_steps=8,
    noisy_step_sizes=(0.25, 1.0),
)


@pytest.fixture(scope="module")
def problem() -> Problem:
    return Problem(logistic(6, features=4, shots=12, queries=12, seed=2), prox=4.0)


def test_the_judge_is_the_exact_meta_gradient(problem):
    exact = ExactMetaObjective(logistic_model(4), logistic_loss, problem.tasks, problem.prox)
    thetas = [scale * torch.ones(4, dtype=torch.float64) for scale in (0.0, 1.0, 5.0)]
    expected = [float(exact.gradient(theta).norm()) for theta in thetas]
    assert problem.gradient_norms(thetas).tolist() == pytest.approx(expected, rel=1e-10)


def test_a_descent_is_plain_descent_along_the_learners_gradient(problem):
    """By hand, with the learner's own gradient; evaluations are counted per task."""
    points = list(islice(full_batch(problem, mn.FOMAML(), 5, 0.5), 3))
    learner = problem.learner(mn.FOMAML(), 5)
    for point in points:
        theta = learner.model.weight.detach().flatten().clone()
        torch.testing.assert_close(point.theta, theta, rtol=0, atol=0)
        learner.model.zero_grad()
        step = learner.backward(problem.tasks)
        with torch.no_grad():
            learner.model.weight -= 0.5 * learner.model.weight.grad
    assert points[2].evaluations == 2 * step.gradient_evaluations / 6


def test_choose_finds_the_best_and_knows_the_edge():
    choice = choose((1.0, 2.0, 4.0), lambda size: abs(size - 2.5))
    assert (choice.step_size, choice.at_edge) == (2.0, False)
    assert choose((1.0, 2.0), lambda size: -size).at_edge


def test_noise_is_shared_by_the_methods(problem):
    one, other = (Noise.draw(problem, 3.0, 2, 4, seed=7) for _ in range(2))
    assert float(one.start.norm()) == pytest.approx(3.0)
    assert torch.equal(one.start, other.start)
    for a, b in zip(one.minibatches, other.minibatches, strict=True):
        assert a.support.inputs.shape == (2, 12, 4)
        assert torch.equal(a.query.targets, b.query.targets)


def test_noisy_step_sizes_fall_linearly(problem):
    noise = Noise.draw(problem, 1.0, 6, 4, seed=0)
    steps: list[float] = []

    class Recorder(torch.optim.SGD):
        def step(self, closure=None):
            steps.append(self.param_groups[0]["lr"])
            return super().step(closure)

    norms = noisy_norms(problem, lambda parameters, lr: Recorder(parameters, lr=lr), noise, 4, 0.8)
    assert len(norms) == 5
    assert steps == pytest.approx([0.8, 0.6, 0.4, 0.2])


def test_descend_starts_where_the_model_is(problem):
    learner = problem.learner(mn.Reptile(), 3, start=torch.full((4,), 2.0, dtype=torch.float64))
    (first,) = descend(learner, torch.optim.SGD(learner.model.parameters(), lr=1.0), [])
    assert (first.evaluations, first.theta.tolist()) == (0.0, [2.0] * 4)
    assert len(curve_of(problem, [first]).norms) == 1


def test_last_quarter():
    assert last_quarter(torch.arange(8.0)).item() == 6.5


def test_stationarity_study():
    shares: list[float] = []
    study = stationarity.run(SMALL, shares.append)
    final = study.metrics["final_gradient_norm"]
    names = {"fobmaml_symmetric", "fobmaml_forward", "fobmaml_fourth_order"} | set(mn.ESTIMATORS) - {"fobmaml"}
    assert set(final) == names
    assert max(final["fobmaml_symmetric"], final["fobmaml_forward"]) < 1e-6
    assert max(final[name] for name in ("maml", "imaml", "hfmaml", "tangent")) < 1e-6
    assert min(final["fomaml"], final["reptile"]) > 1000 * max(final["fobmaml_symmetric"], final["fobmaml_forward"])
    for curve in study.metrics["curve"].values():
        assert curve["evaluations"][-1] <= SMALL.budget
    assert set(study.metrics["stochastic"]["gradient_norm"]) == {"sgd", "clipped", "normalized_momentum"}
    assert [claim.holds for claim in study.claims[:2]] == [True, True]
    assert set(study.figures) == {"stationarity", "stationarity_stochastic"}
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1)
    plain(study.metrics)
