"""The study of the bias: its exact quantities, its fits, and its quick form."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor

import metanudge as mn
from metanudge.diagnostics import ExactMetaObjective
from metanudge.experiments.synthetic import bias
from metanudge.experiments.synthetic.bias_measurements import (
    Setting,
    UnmatchedForward,
    compare,
    estimates,
    fit_range,
    inject,
    make_setting,
    slope,
)
from metanudge.experiments.synthetic.exact_logistic import meta_gradients, nudged_solutions
from metanudge.tasks import logistic, logistic_loss, logistic_model

NUS = torch.tensor([-0.1, 0.0, 0.3], dtype=torch.float64)


@pytest.fixture(scope="module")
def setting() -> Setting:
    return make_setting(number=3, features=4, examples=12, prox=1.5, seed=3)


def test_nudged_solutions_are_stationary(setting):
    """The gradient of the nudged energy, by automatic differentiation of the library's loss, vanishes there."""
    solutions = nudged_solutions(setting.tasks, setting.theta, setting.prox, NUS)
    assert solutions.shape == (3, 3, 4)
    for i, task in enumerate(zip(*setting.tasks.support, *setting.tasks.query, strict=True)):
        for k, nu in enumerate(NUS):
            phi = solutions[i, k].clone().requires_grad_()

            def loss(x: Tensor, y: Tensor, phi: Tensor = phi) -> Tensor:
                return torch.nn.functional.binary_cross_entropy_with_logits(x @ phi, y)

            energy = loss(*task[:2]) + nu * loss(*task[2:]) + setting.prox / 2 * (phi - setting.theta).square().sum()
            (gradient,) = torch.autograd.grad(energy, phi)
            assert float(gradient.norm()) < 1e-14


def test_closed_form_meta_gradients_equal_dense_implicit_differentiation():
    tasks, prox = logistic(4, features=3, seed=5), 0.7
    exact = ExactMetaObjective(logistic_model(3), logistic_loss, tasks, prox)
    thetas = torch.randn(5, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = torch.stack([exact.gradient(theta) for theta in thetas])
    torch.testing.assert_close(meta_gradients(tasks, thetas, prox), expected, rtol=1e-12, atol=1e-14)


def test_newtons_method_that_can_not_converge_is_told(setting):
    with pytest.raises(mn.NonFiniteError, match="nudges too large"):
        nudged_solutions(setting.tasks, setting.theta, 1e-6, torch.tensor([-50.0], dtype=torch.float64))


@pytest.mark.parametrize("scheme", mn.STENCILS)
def test_estimates_from_exact_solutions_are_the_learners(setting, scheme):
    """The study's own weighted sum is what the library computes from converged solves."""
    stencil, nu = mn.STENCILS[scheme], 0.05
    nodes = nu * torch.tensor(stencil.nodes, dtype=torch.float64)
    solutions = nudged_solutions(setting.tasks, setting.theta, setting.prox, nodes)
    found = estimates(setting, stencil, torch.tensor([nu], dtype=torch.float64), solutions[:, None])[0]
    model = logistic_model(4)
    with torch.no_grad():
        model.weight.copy_(setting.theta)
    estimator = mn.FOBMAML(scheme, nudge="full", nu=nu)
    mn.MetaLearner(model, logistic_loss, prox=1.5, solver=mn.Nesterov(150), estimator=estimator).backward(setting.tasks)
    torch.testing.assert_close(found, model.weight.grad[0], rtol=1e-11, atol=1e-12)


def test_slope_of_a_power_law():
    x = torch.logspace(-3, 0, 7, dtype=torch.float64)
    assert slope(x, 5 * x**0.75) == pytest.approx((0.75, torch.tensor(5.0).log10().item()))


def test_injected_errors_obey_the_tradeoff(setting):
    """At the tuned nudge the bias is below what a nudge ten times off would leave: the grid was searched."""
    deltas = torch.tensor([1e-10, 1e-8, 1e-6], dtype=torch.float64)
    found = inject(setting, mn.STENCILS["symmetric"], deltas, 1, per_decade=6, draws=8, seed=0)
    assert bool((found.tuned.diff() > 0).all())
    assert found.tuned_nu == pytest.approx(found.rule_nu, rel=1.5)
    generator = torch.Generator().manual_seed(9)
    for factor in (0.1, 10.0):
        nu = found.tuned_nu[1:2] * factor
        nodes = torch.tensor(mn.STENCILS["symmetric"].nodes, dtype=torch.float64)
        solutions = nudged_solutions(setting.tasks, setting.theta, setting.prox, (nu[:, None] * nodes).flatten())
        errors = torch.randn(64, *solutions.shape, generator=generator, dtype=torch.float64)
        errors *= deltas[1] / errors.norm(dim=-1, keepdim=True)
        off = estimates(setting, mn.STENCILS["symmetric"], nu, (solutions + errors)[:, :, None])
        assert float(setting.relative(off).square().mean().sqrt()) > 2 * float(found.tuned[1])


def test_unmatched_solves_pay_with_the_inverse_nudge(setting):
    """Their error falls in proportion to nu as nu rises, while that of matched ones stays."""
    found = compare(setting, (6,), lr=0.2, nudges=10, advance=lambda share: None)
    small = found.nus < 1e-3
    assert slope(found.nus[small], found.unmatched[0, small])[0] == pytest.approx(-1, abs=0.01)
    assert float(found.matched[0, small].max() / found.matched[0, small].min()) < 1.01
    assert UnmatchedForward(0.1).needs == mn.FOBMAML().needs


def test_bias_study():
    shares: list[float] = []
    study = bias.run(bias.BiasSettings.quick(), shares.append)
    for way in ("slope", "slope_theory_rule"):
        slopes = study.metrics[way]
        assert slopes == pytest.approx({"forward": 1 / 2, "symmetric": 2 / 3, "fourth_order": 4 / 5}, abs=0.05)
    low, high = study.metrics["fit_range"].values()
    assert high / low >= 10**6
    assert study.metrics["matching"]["unmatched_error"] > 100 * study.metrics["matching"]["matched_error"]
    assert all(claim.holds for claim in study.claims)
    assert set(study.figures) == {"bias", "matching"}
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1)


def test_the_range_of_the_fit_spans_six_decades():
    settings = bias.BiasSettings()
    problem = make_setting(settings.tasks, settings.features, settings.examples, settings.prox, settings.seed)
    low, high = fit_range(problem)
    assert high / low > 10**6
    assert settings.tasks >= 8
    assert settings.features >= 20


def test_claims_can_fail():
    """The words follow the numbers."""
    metrics = {
        "slope": {"forward": 0.5, "symmetric": 0.5, "fourth_order": 0.8},
        "slope_theory_rule": {"forward": 0.5, "symmetric": 0.66, "fourth_order": 0.7},
        "matching": {"matched_error": 0.1, "unmatched_error": 5.0},
    }
    assert [claim.holds for claim in bias.claims(json.loads(json.dumps(metrics)))] == [True, False, False, False]
