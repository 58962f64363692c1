"""The bound on an estimate's error, the alarm, the guard against diverged solves, and what the user is told."""

from __future__ import annotations

import dataclasses
import math
import re
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

import metanudge as mn
from metanudge import advice
from metanudge.accumulation import Numbers
from metanudge.deposit import Told
from metanudge.experiments.solves.random_problems import random_problems, steep_problems
from metanudge.probe import Needed
from problems import PROBLEMS, Problem, distance, hessian, slope

EXECUTIONS = ["vectorized", "in_place"]


def step_on(made: Problem, solver: object, task: int | None = None, **settings: object) -> tuple[mn.MetaStep, Tensor]:
    model = made.make()
    tasks = made.tasks
    if task is not None:
        tasks = mn.Tasks(*(mn.Batch(*(x[task : task + 1] for x in batch)) for batch in tasks))
    step = mn.MetaLearner(model, made.loss, prox=made.prox, solver=solver, **settings).backward(tasks)
    return step, torch.cat([p.grad.reshape(-1) for p in model.parameters()])


def test_the_bound_holds_on_random_convex_problems() -> None:
    """The study ``solves`` runs 600; here are 24 others, with as many steps as they happen to have."""
    ratios = []
    for problem in random_problems(24, seed=7):
        error, size, bound = problem.measure(mn.FOBMAML())
        assert error <= bound * size
        ratios.append(bound * size / error)
    assert sum(ratio < 10 for ratio in ratios) >= 12


def test_the_bound_sees_steep_pieces_that_no_point_has_met() -> None:
    """Softplus pieces up to 200 times as steep as the way to them is long; the linear query loss does not notice."""
    close = 0
    for problem in steep_problems(30, seed=9):
        try:
            error, size, bound = problem.measure(mn.FOBMAML())
        except mn.NonFiniteError:  # a step over an edge: left out, and told
            continue
        assert error <= bound * size
        close += bound * size < 10 * error
    assert close >= 10


@pytest.mark.parametrize("scheme", ["symmetric", "forward", "fourth_order"])
@pytest.mark.parametrize("steps", [4, 12, 40])
@pytest.mark.parametrize("problem", ["ridge", "logistic"])
def test_the_bound_holds_task_by_task(problem: str, steps: int, scheme: str) -> None:
    made = PROBLEMS[problem]()
    for i, (task, phi) in enumerate(zip(made.plain, made.solutions(), strict=True)):
        eye = torch.eye(len(phi), dtype=phi.dtype)
        exact = made.prox * torch.linalg.solve(hessian(task.support, phi) + made.prox * eye, slope(task.query, phi))
        step, found = step_on(made, mn.Nesterov(steps), i, estimator=mn.FOBMAML(scheme))
        assert float((found - exact).norm()) <= step.error_bound * float(found.norm())
        assert step.error_bound < 100


def test_the_bound_is_its_formula() -> None:
    """Naive: the same terms by dense linear algebra on a quadratic, where all but two of them are exact."""
    made = PROBLEMS["ridge"]()
    steps, lr, nu = 4, 0.1, 0.1
    task, theta, prox = made.plain[0], made.theta, made.prox

    def descend(start: Tensor, count: int, pull: Tensor | float = 0.0) -> Tensor:
        phi = start
        for _ in range(count):
            phi = phi - lr * (slope(task.support, phi) + pull + prox * (phi - theta))
        return phi

    phi0 = descend(theta, steps)
    g = slope(task.query, phi0)
    ends = {sign: descend(phi0, 2 * steps, sign * nu * g) for sign in (-1, 1)}
    u = (ends[1] - ends[-1]) / (2 * nu)
    force = {s: slope(task.support, ends[s]) + s * nu * g + prox * (ends[s] - theta) for s in ends}
    r = (force[1] - force[-1]) / (2 * nu)
    middle = (ends[1] + ends[-1]) / 2
    change = (slope(task.query, middle) - g).norm()
    left = (slope(task.support, middle) + prox * (middle - theta)).norm() / prox / (middle - phi0).norm()
    displacement = nu * g.norm() / (prox * phi0.norm())
    seen = r.norm() + (1 + left) * change + displacement**2 / 4 * g.norm()
    forces = slope(task.support, middle), prox * (middle - theta)
    rho = (forces[0] + forces[1]).norm() / (forces[0].norm() + forces[1].norm())
    whole = (prox * u + g / 2).norm() + g.norm() / 2
    noise = torch.finfo(torch.float64).eps / (2 * displacement) * g.norm()
    bound = torch.minimum(seen + 36 * rho**2 * whole, whole + (1 + left) * change) + noise
    step, found = step_on(made, mn.GradientDescent(steps, lr=lr), 0, estimator=mn.FOBMAML(nu=nu))
    assert distance(found, -prox * u) < 1e-12
    assert step.error_bound == pytest.approx(float(bound / found.norm()), rel=1e-9)


@pytest.mark.parametrize("problem", ["ridge", "logistic", "mlp"])
def test_both_executions_certify_the_same(problem: str) -> None:
    made = PROBLEMS[problem]()
    bounds = [step_on(made, mn.Nesterov(8), execution=execution)[0].error_bound for execution in EXECUTIONS]
    assert bounds[0] == pytest.approx(bounds[1], rel=1e-6)


def test_the_bound_shrinks_as_the_solve_converges() -> None:
    made = PROBLEMS["logistic"]()
    bounds = [step_on(made, mn.Nesterov(steps))[0].error_bound for steps in (4, 16, 64)]
    assert bounds[0] > 10 * bounds[1] > 100 * bounds[2]


@pytest.mark.parametrize(
    "estimator", [mn.MAML(), mn.FOMAML(), mn.FOBMAML(nudge="full"), mn.FOBMAML(start="initialization")], ids=str
)
def test_who_has_no_bound_says_so(estimator: object) -> None:
    assert math.isnan(step_on(PROBLEMS["logistic"](), mn.Nesterov(8), estimator=estimator)[0].error_bound)


class Saddle(torch.nn.Module):
    """Two parameters, one of them with negative curvature in the support loss."""

    def __init__(self) -> None:
        super().__init__()
        self.phi = torch.nn.Parameter(torch.tensor([1.0, 1.0], dtype=torch.float64))


def saddle_loss(model: Saddle, batch: mn.Batch) -> Tensor:
    return (batch.inputs * model.phi.square()).sum() / 2 + (batch.targets * model.phi).sum()


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_the_alarm(execution: str) -> None:
    """Curvatures (1, -0.8), prox 1: λ / (H + λ) is (1/2, 5): the second task's query gradient is amplified fivefold."""
    curvatures = torch.tensor([[1.0, 0.0], [1.0, -0.8]]).double()
    pulls = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).double()
    tasks = mn.Tasks(mn.Batch(curvatures, torch.zeros(2, 2).double()), mn.Batch(torch.zeros(2, 2).double(), pulls))
    model = Saddle()
    learner = mn.MetaLearner(model, saddle_loss, prox=1.0, solver=mn.Nesterov(100), execution=execution)
    step = learner.backward(tasks)
    torch.testing.assert_close(model.phi.grad, torch.tensor([0.25, 2.5]).double(), rtol=1e-6, atol=1e-9)
    assert step.amplified_tasks == 1
    with pytest.warns(mn.UnsolvedWarning, match="1 of 1 tasks.*raise prox to about 3"):
        learner.backward(mn.Tasks(*(mn.Batch(*(x[1:] for x in batch)) for batch in tasks)))


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("estimator", [mn.FOBMAML(), mn.MAML(), mn.FOMAML()], ids=str)
def test_a_solve_that_ends_above_its_start_is_left_out(estimator: object, execution: str) -> None:
    """Finite, but exploded: not a meta-gradient."""
    if isinstance(estimator, mn.MAML) and execution == "in_place":
        pytest.skip("unrolls")
    made = PROBLEMS["ridge"]()
    inputs = made.tasks.support.inputs.clone()
    inputs[2] *= 30
    tasks = mn.Tasks(mn.Batch(inputs, made.tasks.support.targets), made.tasks.query)
    settings = {"prox": made.prox, "solver": mn.GradientDescent(4, lr=0.1), "estimator": estimator}
    learner, rest = (mn.MetaLearner(made.make(), made.loss, execution=execution, **settings) for _ in range(2))
    with pytest.warns(mn.NonFiniteWarning, match="1 of 3 tasks diverged"):
        step = learner.backward(tasks)
    rest.backward(mn.Tasks(*(mn.Batch(*(x[:2] for x in batch)) for batch in made.tasks)))
    assert step.dropped_tasks == 1
    for one, other in zip(learner.model.parameters(), rest.model.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-9, atol=1e-12)


def test_a_task_that_is_solved_where_it_begins_has_not_diverged() -> None:
    made = PROBLEMS["ridge"]()
    solved = mn.Batch(made.tasks.support.inputs, made.tasks.support.inputs @ made.theta.reshape(-1, 1).squeeze(-1))
    model = made.make()
    learner = mn.MetaLearner(model, made.loss, prox=made.prox, estimator=mn.FOMAML())
    assert learner.backward(mn.Tasks(solved, made.tasks.query)).dropped_tasks == 0


def test_the_user_is_told_once_and_what_to_do() -> None:
    made = PROBLEMS["logistic"]()
    learner = mn.MetaLearner(made.make(), made.loss, prox=0.05, solver=mn.GradientDescent(8, lr=0.05))
    with pytest.warns(mn.UnsolvedWarning) as caught:
        step = learner.backward(made.tasks)
    (told,) = (str(one.message) for one in caught)
    assert f"{100 * step.residual:.0f} % from solved" in told
    assert "raise steps from 8 to 160, which left" in told
    assert "or look at lr = 0.05 of GradientDescent, a larger one may do" in told
    assert "prox to" not in told
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        learner.backward(made.tasks)
        fomaml = mn.MetaLearner(made.make(), made.loss, prox=0.05, solver=learner.solver, estimator=mn.FOMAML())
        fomaml.backward(made.tasks)  # does not rest on the solution


@pytest.mark.parametrize(
    ("problem", "prox", "solver"),
    [
        ("logistic", 0.001, mn.Nesterov(4)),
        ("logistic", 0.05, mn.GradientDescent(8, lr=0.2)),
        ("mlp", 0.02, mn.Nesterov(8)),
        ("mlp", 0.3, mn.Adam(6, lr=0.05)),
    ],
    ids=str,
)
def test_steps_that_are_advised_do(problem: str, prox: float, solver: object) -> None:
    """Followed once, there is no other warning, and the residual is the one foretold; the advice is not counted."""
    made = PROBLEMS[problem]()

    def step_with(solver: object) -> mn.MetaStep:
        return mn.MetaLearner(made.make(), made.loss, prox=prox, solver=solver).backward(made.tasks)

    with pytest.warns(mn.UnsolvedWarning) as caught:
        starved = step_with(solver)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert step_with(solver) == starved
    steps, left = re.search(r"to (\d+), which left (\d+) %", str(caught[0].message)).groups()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step = step_with(dataclasses.replace(solver, steps=int(steps)))
    assert step.residual <= max(float(left) / 100, advice.DONE) + 0.1


class Counted:
    """A loss, and how often it was called."""

    def __init__(self, loss: object) -> None:
        self.loss, self.calls = loss, 0

    def __call__(self, model: torch.nn.Module, batch: mn.Batch) -> Tensor:
        self.calls += 1
        return self.loss(model, batch)


UNTRIED = (
    r"raise steps from 4 to perhaps \d+ \(none were tried here; mn.check tries\); or try a larger prox, such as 0.003,"
)


def test_in_place_nothing_is_tried_and_the_advice_is_cautious() -> None:
    """Ranks of one model that hear different warnings would wait for each other; minibatches would be read on."""
    made = PROBLEMS["logistic"]()
    calls = []
    for heard in ("always", "ignore"):
        loss = Counted(made.loss)
        learner = mn.MetaLearner(made.make(), loss, prox=0.001, solver=mn.Nesterov(4), execution="in_place")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter(heard)
            learner.backward(made.tasks)
        calls.append(loss.calls)
        if heard == "always":
            assert re.search(UNTRIED, str(caught[0].message))
    assert calls[0] == calls[1]


class Refusing(torch.nn.Module):
    """One parameter, and a forward pass that fails once anything, under vmap too, has been evaluated often enough."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.phi = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
        self.count = SimpleNamespace(left=most)  # which, unlike an attribute, is not undone

    def forward(self, x: Tensor) -> Tensor:
        self.count.left -= 1
        if self.count.left < 0:
            raise RuntimeError("my own guard")
        return x @ self.phi


def test_what_fails_while_it_is_tried_does_not_cost_the_step() -> None:
    made = PROBLEMS["logistic"]()
    inputs = made.tasks.support.inputs
    tasks = mn.Tasks(*(mn.Batch(inputs, inputs[..., 0]) for _ in range(2)))
    settings = {"prox": 0.001, "solver": mn.GradientDescent(4, lr=0.01)}
    quiet = Refusing(10**9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        step = mn.MetaLearner(quiet, mn.metrics.squared_error, **settings).backward(tasks)
    model = Refusing(10**9 - quiet.count.left)
    with pytest.warns(mn.UnsolvedWarning, match=r"look at lr = 0.01 of .*; or raise steps from 4 to perhaps \d+"):
        assert mn.MetaLearner(model, mn.metrics.squared_error, **settings).backward(tasks) == step
    torch.testing.assert_close(model.phi.grad, quiet.phi.grad)


@dataclasses.dataclass(frozen=True)
class Wrapped:
    """A solver without a field ``steps``."""

    inner: mn.GradientDescent
    differentiable = True

    def __getattr__(self, name: str) -> object:
        return getattr(self.inner, name)


def test_a_solver_whose_steps_can_not_be_set_is_advised_untried() -> None:
    made = PROBLEMS["logistic"]()
    solver = Wrapped(mn.GradientDescent(8, lr=0.05))
    learner = mn.MetaLearner(made.make(), made.loss, prox=0.05, solver=solver)
    with pytest.warns(mn.UnsolvedWarning, match=r"raise steps from 8 to perhaps \d+"):
        learner.backward(made.tasks)
    found = mn.check(learner, made.tasks, compare=[], reference_steps=30)
    assert {row.steps for row in found.rows} == {8}


def test_what_no_steps_solve_is_told_with_the_steps_tried() -> None:
    made = PROBLEMS["logistic"]()
    learner = mn.MetaLearner(made.make(), made.loss, prox=0.01, solver=mn.GradientDescent(4, lr=0.001))
    with pytest.warns(
        mn.UnsolvedWarning,
        match=r"up to 80 steps were tried, and left \d+ % at best; look at lr = 0.001 of GradientDescent",
    ) as told:
        learner.backward(made.tasks)
    assert "Nesterov needs none" in str(told[0].message)
    said = advice.unsolved(0.6, 3.0, mn.Nesterov(40), 0.01, Needed(200, 0.5, 400))
    assert "up to 400 steps were tried, and left 50 % at best; try a larger prox, such as 0.03, with mn.check" in said


@pytest.mark.parametrize("solver", [mn.GradientDescent(4, lr=0.2), mn.Nesterov(4, lr=0.2), mn.Adam(4, lr=0.2)], ids=str)
def test_with_a_fixed_step_no_larger_prox_is_advised(solver: object) -> None:
    """Gradient descent diverges where lr * prox > 2; the rule for prox is that of accelerated solvers."""
    for tried in (None, Needed(80, 0.04, 80), Needed(80, 0.4, 80)):
        for residual, bound in ((0.5, 3.0), (0.05, 500.0)):
            told = advice.unsolved(residual, bound, solver, 20.0, tried)
            assert re.search(r"look at lr = 0\.2 of \w+, a smaller one may do \(lr \* prox is 4,", told)
            assert "prox to" not in told
            assert "larger prox" not in told
    assert "larger prox" not in advice.calmer(solver, 20.0)
    assert "smaller steps (lr, now 0.2)" in advice.calmer(solver, 20.0)
    assert "prox to about 60, with lr below 0.02, which" in advice.amplified(2, 3, 20.0, 0.2)
    assert "prox to about 0.3, which" in advice.amplified(2, 3, 0.1, 0.2)
    assert advice.fixed_lr(mn.Nesterov(4)) is None


def test_a_loose_bound_is_told_though_the_residual_is_low() -> None:
    """Residual and bound by themselves: 4.5 % and 500 at prox .01, as on an ill-posed network."""
    told = advice.unsolved(0.045, 501.0, mn.Nesterov(100), 0.01, Needed(400, 9e-5, 400))
    assert "4 % from solved, which at prox=0.01 may leave an error of 501 times the meta-gradient" in told
    assert "raise steps from 100 to 400" in told
    assert "or try a larger prox, such as 0.03, with mn.check; it is another objective" in told
    told = advice.unsolved(0.045, 501.0, mn.Nesterov(100), 0.01, Needed(400, 0.04, 400))
    assert "up to 400 steps were tried, and left 4 % at best" in told


def test_a_single_step_that_stands_out_is_not_told() -> None:
    """Trainings that go well have a step above the thresholds now and then (README's, 400 steps: one of .33)."""
    quiet = Numbers(1.0, 1.0, 0.2, 8.0, 0, 0.1)
    told = Told()
    for numbers in (quiet, quiet._replace(residual=0.4, error_bound=1e4), quiet):
        told = told.after(numbers)
        assert told.residual < advice.ROUGH
        assert told.bound < advice.LOOSE
    for _ in range(30):
        told = told.after(quiet._replace(residual=0.4, error_bound=math.inf))
    assert told.residual > advice.ROUGH
    assert told.bound > advice.LOOSE
    told = told.after(quiet._replace(error_bound=math.nan))
    assert not told.bound > advice.LOOSE


def test_the_advice_that_can_not_be_tried_is_cautious() -> None:
    """Twice what geometric convergence would need."""
    assert advice.guess(0.4, 8) == 53
    steps = advice.guess(0.5, 10)
    assert 0.5 ** (steps / 20) <= advice.DONE < 0.5 ** ((steps - 1) / 20)
    assert advice.guess(0.99, 4) == 40
    assert advice.rounded(0.034) == pytest.approx(0.04)
    assert advice.rounded(20.0) == pytest.approx(20.0)
    told = advice.unsolved(0.4, 3.0, mn.Nesterov(8), 0.1, None)
    assert "raise steps from 8 to perhaps 53 (none were tried here; mn.check tries); or try a larger prox" in told
