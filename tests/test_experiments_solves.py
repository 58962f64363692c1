"""The study of inner solvers: every alternative against a closed form, its problems, its counts, and its quick form."""

from __future__ import annotations

import copy
import random
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

import metanudge as mn
from metanudge.estimators.base import solve_free
from metanudge.experiments.networks import seeded
from metanudge.experiments.solves import convergence as study
from metanudge.experiments.solves import problems
from metanudge.experiments.solves.alternatives import LBFGS, GaussNewton, gauss_newton_products
from metanudge.experiments.solves.convergence_measurements import (
    CANDIDATES,
    candidates,
    course,
    errors,
    implicit_gradient,
    lent,
)
from metanudge.experiments.solves.problems import PROBLEMS, Inner, ridge_tasks
from metanudge.oracle import Tally
from metanudge.solvers.loop import solve
from metanudge.tasks.mnist1d import signals

ALTERNATIVES = [name for name in CANDIDATES if name not in ("nesterov", "nesterov_no_restart", "adam")]


def small_ridge(number: int = 3) -> Inner:
    """Ridge regressions of condition 10 in 6 parameters."""
    model = seeded(lambda: torch.nn.Linear(6, 1, bias=False, dtype=torch.float64), 1)
    return Inner(model, mn.metrics.squared_error, ridge_tasks(number, seed=0, features=6, condition=10), 1.0, True)


def tanh_network(number: int) -> Inner:
    """Sinusoids on a network in float64."""
    inner = problems.sinusoid("tanh", number, seed=3)
    tasks = mn.tasks.sinusoid(number, seed=3, dtype=torch.float64)
    return inner._replace(model=copy.deepcopy(inner.model).double(), tasks=tasks)


def hessians(inner: Inner) -> Tensor:
    x = inner.tasks.support.inputs
    return 2 / x.shape[1] * x.mT @ x


def closed_form(inner: Inner) -> Tensor:
    """(H + λ)^-1 (2/n Xᵀy + λ θ), ``[T, d]``."""
    x, y = inner.tasks.support
    theta = next(inner.model.parameters()).detach().flatten()
    right = 2 / x.shape[1] * (x.mT @ y)[..., 0] + inner.prox * theta
    return torch.linalg.solve(hessians(inner) + inner.prox * torch.eye(x.shape[-1], dtype=x.dtype), right)


def solution(inner: Inner, name: str, steps: int) -> Tensor:
    """Where a solver ends, ``[T, P]``."""
    with lent(inner, Tally()) as (problem, losses):
        found = solve(CANDIDATES[name](steps, losses), problem.energy(), losses.spread(problem.theta))
        (leaf,) = found.params.values()
        return leaf[:, 0]


@pytest.mark.parametrize("name", ALTERNATIVES)
def test_alternatives_find_the_ridge_solution(name):
    inner = small_ridge()
    torch.testing.assert_close(solution(inner, name, 150), closed_form(inner), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ALTERNATIVES)
def test_lanes_do_not_see_each_other(name):
    """A task alone and in a stack: the same steps, on a problem where all decisions differ."""
    together = tanh_network(3)
    stacked = solution(together, name, 8)
    for index in range(3):
        one = mn.Tasks(*(mn.Batch(*(leaf[index : index + 1] for leaf in batch)) for batch in together.tasks))
        torch.testing.assert_close(solution(together._replace(tasks=one), name, 8)[0], stacked[index])


@pytest.mark.parametrize(
    ("name", "cost"), [("lbfgs", 6 + 5), ("anderson", 6 + 5), ("gauss_newton_4", 5 * (1 + 2 * 4)), ("adam", 5)]
)
def test_every_gradient_is_counted(name, cost):
    inner, tally = small_ridge(), Tally()
    with lent(inner, tally) as (problem, losses):
        solve(CANDIDATES[name](5, losses), problem.energy(), losses.spread(problem.theta))
    assert tally.gradients == 3 * cost


def test_gauss_newton_products_are_those_of_the_hessian_of_a_linear_model():
    inner = small_ridge()
    vector = torch.randn(3, 1, 6, dtype=torch.float64)
    with lent(inner, Tally()) as (problem, losses):
        theta = losses.spread(problem.theta)
        (key,) = theta
        found = gauss_newton_products(losses)(theta)({key: vector})[key]
    torch.testing.assert_close(found[:, 0], (hessians(inner) @ vector[:, 0, :, None])[..., 0])


def test_one_exact_gauss_newton_step_solves_a_quadratic():
    inner = small_ridge()
    with lent(inner, Tally()) as (problem, losses):
        solver = GaussNewton(1, gauss_newton_products(losses), inner_steps=6)
        found = solve(solver, problem.energy(), losses.spread(problem.theta)).params
    torch.testing.assert_close(next(iter(found.values()))[:, 0], closed_form(inner))


def test_the_memory_of_lbfgs_obeys_the_last_secant():
    """H⁻¹ y = s for the newest pair, whatever the older ones say."""
    with lent(small_ridge(), Tally()) as (problem, losses):
        energy, solver, start = problem.energy(), LBFGS(4, memory=3), losses.spread(problem.theta)
        plan = solver.plan(energy, start)
        state = solver.init(energy, start, plan)
        for index in range(4):
            state, _ = solver.step(energy, plan, state, index, None)
        newest = state.memory.pairs[-1]
        assert len(state.memory.pairs) == 3
        (found,), (s,) = state.memory.times(energy, newest.y).values(), newest.s.values()
    torch.testing.assert_close(found, s)


def test_lbfgs_takes_back_a_step_after_which_the_gradient_doubled():
    with lent(small_ridge(), Tally()) as (problem, losses):
        energy, solver, start = problem.energy(), LBFGS(4), losses.spread(problem.theta)
        plan = solver.plan(energy, start)
        state, _ = solver.step(energy, plan, solver.init(energy, start, plan), 0, None)
        far = {key: leaf + 100 for key, leaf in state.phi.items()}
        after, _ = solver.step(energy, plan, state._replace(phi=far), 1, None)
        assert all(torch.equal(after.anchor[key], start[key]) for key in start)
        (moved,), (way,) = after.phi.values(), far.values()
        (begin,) = start.values()
    assert bool(((moved - begin).norm(dim=-1) <= (way - begin).norm(dim=-1) / 4 * (1 + 1e-12)).all())


def test_the_reference_is_the_implicit_gradient():
    inner = small_ridge()
    with lent(inner, Tally()) as (problem, losses):
        free = solve_free(problem, mn.Nesterov(5))
        found, there = implicit_gradient(losses, free, inner.prox)
        (v,), (slope,) = found.values(), free.slope.values()
    system = torch.eye(6, dtype=torch.float64) + hessians(inner) / inner.prox
    torch.testing.assert_close(v[:, 0], torch.linalg.solve(system, slope[:, 0]), rtol=1e-5, atol=1e-8)
    assert bool(there.all())


def test_meta_gradients_of_converged_solves_have_no_error():
    found = errors(small_ridge(), CANDIDATES["lbfgs"], {"nudged": mn.FOBMAML(), "unrolled": mn.MAML()}, 60)
    assert float(found["nudged"].max()) < 1e-5
    found = errors(small_ridge(), CANDIDATES["nesterov"], {"unrolled": mn.MAML()}, 200)
    assert float(found["unrolled"].max()) < 1e-5


def test_a_course_begins_at_one_and_spends_no_more_than_its_marks():
    """Before the curvature is known nothing has moved; then the residual is that of the point after the steps paid."""
    inner = small_ridge()
    went = course(inner, CANDIDATES["gradient_descent"], (3, 6, 9))
    torch.testing.assert_close(went.residual[:2], torch.ones(2, 3, dtype=torch.float64))
    phi = solution(inner, "gradient_descent", 3)
    theta = next(inner.model.parameters()).detach()
    x, y = inner.tasks.support
    pull = 2 / x.shape[1] * (x.mT @ (x @ phi[..., None] - y))[..., 0]
    push = inner.prox * (phi - theta)
    torch.testing.assert_close(went.residual[2], (pull + push).norm(dim=-1) / (pull.norm(dim=-1) + push.norm(dim=-1)))


def test_ridge_has_the_condition_it_says():
    inner = problems.ridge(2, seed=0)
    values = torch.linalg.eigvalsh(hessians(inner)) + inner.prox
    torch.testing.assert_close(
        values[:, -1] / values[:, 0], torch.full((2,), 1e4, dtype=torch.float64), rtol=1e-6, atol=0
    )


def test_mnist1d_tasks_permute_labels_and_leave_the_generators_alone():
    pytest.importorskip("mnist1d")
    signals.cache_clear()
    kept = random.getstate(), np.random.get_state()[1].copy()
    tasks = problems.mnist1d_tasks(2, seed=1, shots=3, samples=200)
    assert kept[0] == random.getstate()
    assert np.array_equal(kept[1], np.random.get_state()[1])
    assert tasks.support.inputs.shape == tasks.query.inputs.shape == (2, 30, 1, 40)
    for batch in tasks:
        assert all(torch.equal(row.bincount(), torch.full((10,), 3)) for row in batch.targets)
    assert not torch.equal(tasks.support.targets[0], tasks.support.targets[1])
    again = problems.mnist1d_tasks(1, seed=1, shots=3, samples=200)
    assert torch.equal(again.query.inputs[0], tasks.query.inputs[0])


def test_a_missing_package_is_told_with_its_cure(monkeypatch):
    signals.cache_clear()
    monkeypatch.setitem(sys.modules, "mnist1d.data", None)
    with pytest.raises(mn.SettingsError, match=r"\.\[mnist1d\]"):
        study.convergence(replace(study.ConvergenceSettings.quick(), problems=("mnist1d",)), lambda share: None)


def test_convergence_study():
    pytest.importorskip("mnist1d")
    shares: list[float] = []
    settings = replace(study.ConvergenceSettings.quick(), tasks=6, convolutional_tasks=1, marks=(7, 16, 32, 48))
    found = study.convergence(settings, shares.append)
    assert set(found.metrics) == set(PROBLEMS)
    for name, solvers in found.metrics.items():
        assert set(solvers) == set(candidates(PROBLEMS[name](1, 0)))
        for run in solvers.values():
            assert run["gradients"] == list(settings.marks)
            assert all(0 <= a <= b <= 1 for a, b in zip(run["median"], run["q90"], strict=True))
    assert found.metrics["logistic"]["nesterov"]["median"][-1] < 1e-5
    assert len(found.claims) == 9
    assert found.claims[0].holds
    assert set(found.figures) == {"convergence"}
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1)


def test_claims_can_fail():
    """The words follow the numbers."""

    def run(median: float, diverged: int, error: float) -> dict[str, object]:
        off = {way: {"16": {"median": error, "q90": error, "worst": error}} for way in ("nudged", "unrolled")}
        off["nudged_frozen"] = off["nudged"]
        common = {"gradients": [48], "median": [median], "tasks": 4, "largest_force": 1.0}
        return common | {"diverged": diverged, "meta_gradient_error": off}

    solvers = {"nesterov": run(0.1, 1, 1.0), "nesterov_fixed": run(0.1, 1, 1.0), "lbfgs": run(0.2, 0, 2.0)}
    metrics = {name: dict(solvers) for name in PROBLEMS}
    assert [claim.holds for claim in study.claims(metrics)] == [False, False, False, True] + 5 * [False]
    metrics["mnist1d"]["lbfgs"] = run(0.01, 0, 2.0)
    assert not study.claims(metrics)[3].holds


def test_quantiles_of_what_may_be_infinite():
    values = torch.tensor([3.0, float("inf"), 1.0, 2.0])
    assert [study.quantile(values, share) for share in (0.25, 0.5, 0.75, 0.9)] == [1, 2, 3, float("inf")]
    assert study.summary_of(values[:0])["tasks"] == 0
