"""Inner solvers on energies of their own: trajectories against torch.optim, step sizes, stopping, matched replays."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import metanudge as mn
from metanudge.bundles import Bundles
from metanudge.curvature import lipschitz_constant
from metanudge.energy import Energy
from metanudge.solvers.loop import replay, solve
from metanudge.types import Params, Role
from problems import PROBLEMS, SOLVERS, distance, estimate, normal, single_tasks

Function = Callable[[Tensor], Tensor]


@dataclass
class Plain:
    """Losses of a stack of tasks with parameters ``phi [T, 1, P]``, as plain functions; records the points asked."""

    support: list[Function]
    query: list[Function] | None = None
    asked: list[Tensor] = field(default_factory=list)
    sampled: ClassVar[bool] = False

    def gradient(self, weights: dict[Role, float | Tensor], phi: Params, step: int) -> Params:
        with torch.enable_grad():
            points = phi["phi"].detach().requires_grad_()
            self.asked.append(points.detach()[:, 0])
            total = 0.0
            for role, weight in weights.items():
                functions = self.support if role is Role.SUPPORT else self.query
                values = torch.stack([f(points[i, 0]) for i, f in enumerate(functions)]).unsqueeze(1)
                total = total + (weight * values).sum()
            return {"phi": torch.autograd.grad(total, points)[0]}

    def value_and_gradient(self, role: Role, phi: Params, step: int) -> tuple[Tensor, Params]:
        value = torch.stack([f(phi["phi"][i, 0]) for i, f in enumerate(self.support)]).unsqueeze(1)
        return value.detach(), self.gradient({role: 1.0}, phi, step)

    def plus(self, gradient: Tensor, more: Tensor, alpha: float) -> Tensor:
        return gradient.add(more, alpha=alpha)

    def inner(self, a: Params, b: Params) -> Tensor:
        return self.share(a["phi"], b["phi"])

    def operands(self, *trees: Params) -> list[list[Tensor]]:
        return [[one["phi"] for one in trees]]

    def share(self, a: Tensor, b: Tensor) -> Tensor:
        return (a * b).sum(-1)

    def added(self, shares: list[Tensor]) -> Tensor:
        return shares[0]

    def fused(self, name: object, function: Callable[..., Any], given: object) -> Any:
        return function(self, given)

    def steppable(self, start: Params) -> Bundles:
        return Bundles({"phi": nn.Parameter(start["phi"].clone())}, {"phi": ["phi"]})

    def by_parameter(self, make: Callable[[Params], Params], like: Params) -> Params:
        return make(like)


def quadratics(*eigenvalues: list[float]) -> Plain:
    """<A phi, phi> / 2 - <b, phi> a task, A dense with these eigenvalues."""
    g = torch.Generator().manual_seed(7)
    functions = []
    for values in eigenvalues:
        basis, _ = torch.linalg.qr(normal(g, len(values), len(values)))
        matrix = basis @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ basis.T
        offset = normal(g, len(values))
        functions.append(lambda p, a=matrix, b=offset: (p @ a @ p) / 2 - b @ p)
    return Plain(functions)


def lanes(*rows: Tensor) -> Params:
    return {"phi": torch.stack(rows).unsqueeze(1)}


def curved(p: Tensor) -> Tensor:
    """Smooth, convex, not quadratic."""
    scale = torch.arange(1, len(p) + 1, dtype=p.dtype)
    return torch.log(torch.cosh(scale * p - 1)).sum()


START, CENTRE, PROX = normal(torch.Generator().manual_seed(8), 2, 4).unbind()[0], torch.zeros(4).double(), 0.6


def energy_of(losses: Plain, theta: Tensor | None = None, prox: float = PROX, **nudge: object) -> Energy:
    centre = torch.zeros(len(losses.support), 4).double() if theta is None else theta
    return Energy(losses, lanes(*centre), prox, **nudge)


def trajectory(solver: object, energy: Energy, start: Params) -> Tensor:
    """phi_0, ..., phi_K: ``[K + 1, T, P]``."""
    seen: list[Tensor] = []
    solve(solver, energy, start, lambda _, phi: seen.append(phi["phi"][:, 0].clone()))
    return torch.stack(seen)


# Against torch.optim.


def torch_trajectory(make: Callable[[list[nn.Parameter]], torch.optim.Optimizer], steps: int) -> Tensor:
    """The same energy by torch's own optimizer and autograd."""
    phi = nn.Parameter(START.clone())
    optimizer, seen = make([phi]), [START.clone()]
    for _ in range(steps):
        optimizer.zero_grad()
        (curved(phi) + PROX / 2 * (phi - CENTRE).square().sum()).backward()
        optimizer.step()
        seen.append(phi.detach().clone())
    return torch.stack(seen)


SAME = {
    "sgd": (mn.GradientDescent(12, lr=0.05), lambda p: torch.optim.SGD(p, lr=0.05)),
    "momentum": (mn.GradientDescent(12, lr=0.05, momentum=0.8), lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.8)),
    "adam": (mn.Adam(12, lr=0.1), lambda p: torch.optim.Adam(p, lr=0.1)),
    "adam_betas": (
        mn.Adam(12, lr=0.1, betas=(0.5, 0.6), eps=1e-2),
        lambda p: torch.optim.Adam(p, lr=0.1, betas=(0.5, 0.6), eps=1e-2),
    ),
    "torch_optimizer": (
        mn.TorchOptimizer(lambda p: torch.optim.RMSprop(p, lr=0.02), 12),
        lambda p: torch.optim.RMSprop(p, lr=0.02),
    ),
}


@pytest.mark.parametrize("name", SAME)
def test_trajectory_of_torch_optim(name: str) -> None:
    solver, make = SAME[name]
    found = trajectory(solver, energy_of(Plain([curved])), lanes(START))[:, 0]
    torch.testing.assert_close(found, torch_trajectory(make, 12), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_nesterov_visits_the_points_of_torch_sgd_nesterov(momentum: float) -> None:
    """torch keeps the extrapolated point y as its iterate, so it is the points where gradients are asked that agree."""
    solver = mn.Nesterov(12, lr=0.05, momentum=momentum, restart=False)
    losses = Plain([curved])
    path = trajectory(solver, energy_of(losses), lanes(START))[:, 0]
    if momentum == 0:
        expected = torch_trajectory(lambda p: torch.optim.SGD(p, lr=0.05), 12)
        torch.testing.assert_close(path, expected, rtol=1e-12, atol=1e-13)
    else:
        expected = torch_trajectory(lambda p: torch.optim.SGD(p, lr=0.05, momentum=momentum, nesterov=True), 12)
    torch.testing.assert_close(torch.cat(losses.asked), expected[:12], rtol=1e-12, atol=1e-13)


def test_nesterov_without_proximal_term_takes_the_classical_momentum() -> None:
    """k / (k + 3), no restarts: x_{k+1} = y_k - a g(y_k), y_{k+1} = x_{k+1} + k/(k+3) (x_{k+1} - x_k)."""
    path = trajectory(mn.Nesterov(9, lr=0.05, restart=False), energy_of(Plain([curved]), prox=0.0), lanes(START))
    x = y = START
    for k in range(9):
        y = y.detach().requires_grad_()
        fresh = (y - 0.05 * torch.autograd.grad(curved(y), y)[0]).detach()
        x, y = fresh, fresh + k / (k + 3) * (fresh - x)
        torch.testing.assert_close(path[k + 1, 0], x, rtol=1e-12, atol=1e-13)


def test_a_solve_observes_its_start_and_every_step() -> None:
    seen = []
    begun = lanes(START)
    end, _ = solve(mn.GradientDescent(3, lr=0.1), energy_of(Plain([curved])), begun, lambda k, phi: seen.append(k))
    assert seen == [0, 1, 2, 3]
    assert torch.equal(begun["phi"][0, 0], START)  # the start is not written to
    assert not torch.equal(end["phi"], begun["phi"])


# Step sizes and speed.


@pytest.mark.parametrize("iterations", [1, 5, 60])
def test_lipschitz_estimate_against_the_spectral_norm(iterations: int) -> None:
    """A lower bound, that reaches the largest eigenvalue; negative curvature counts by its size."""
    losses = quadratics([0.1, 0.5, 1.0, 3.0], [5.0, 4.0, 0.01, 0.02], [-2.0, 0.3, 0.1, 0.2])
    phi = lanes(*normal(torch.Generator().manual_seed(9), 3, 4))
    energy = energy_of(losses)
    found = lipschitz_constant(energy, phi, iterations, step=0).constant[:, 0]
    exact = torch.stack(
        [
            torch.linalg.matrix_norm(torch.autograd.functional.hessian(f, phi["phi"][i, 0]), 2)
            for i, f in enumerate(losses.support)
        ]
    )
    assert (found <= exact * (1 + 1e-8)).all()
    if iterations >= 5:
        assert (found >= 0.8 * exact).all()
    if iterations == 60:
        torch.testing.assert_close(found, exact, rtol=1e-6, atol=0)


def test_automatic_step_size_and_momentum() -> None:
    """a = 1 / (1.2 L + prox), beta = (sqrt(kappa) - 1) / (sqrt(kappa) + 1), kappa = 1 / (a prox); two steps by hand."""
    losses = quadratics([2.0] * 4, [8.0] * 4)  # multiples of the identity: one power iteration finds L
    path = trajectory(mn.Nesterov(2, power_iterations=1), energy_of(losses), lanes(START, START))
    theta = energy_of(losses).theta["phi"].expand(2, 1, -1)[:, 0]
    for i, constant in enumerate((2.0, 8.0)):
        a = 1 / (1.2 * constant + PROX)
        kappa = 1 / (a * PROX)
        beta = (kappa**0.5 - 1) / (kappa**0.5 + 1)
        (slope,) = (torch.func.grad(losses.support[i]),)

        def gradient(phi: Tensor, slope=slope, i=i) -> Tensor:
            return slope(phi) + PROX * (phi - theta[i])

        first = START - a * gradient(START)
        y = first + beta * (first - START)
        torch.testing.assert_close(path[1, i], first, rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(path[2, i], y - a * gradient(y), rtol=1e-8, atol=1e-10)


def test_the_step_shrinks_where_the_way_shows_more_curvature() -> None:
    """Flat at the start, steep beyond: one step, and the secant tells; the nudged solves take the last step size."""

    def bowl(phi: Tensor) -> Tensor:
        return (phi - 3).clamp_min(0).square().sum() * 20 - phi.sum() * 20  # curvature 0, then 40

    solver, losses = mn.Nesterov(40, power_iterations=1), Plain([bowl])
    energy = energy_of(losses)
    free = solve(solver, energy, lanes(torch.zeros_like(START)))
    sizes = torch.stack([one.lr for one in free.schedule.decisions]).flatten()
    assert float(sizes[0]) > 10 * float(sizes[-1])
    assert bool((sizes.diff() <= 0).all())
    assert float(sizes[-1]) == pytest.approx(1 / (1.2 * 40 + PROX), rel=0.3)
    settled = solver.settle(free.schedule, 50).decisions
    assert len(settled) == 50
    assert {float(one.lr) for one in settled} == {float(sizes[-1])}
    assert float(energy.balance(energy.pull(free.params, 0), free.params).residual) < 1e-3


def test_a_task_solved_at_once_has_a_meta_gradient_all_the_same() -> None:
    """With a tolerance the free solve may stop where it begins; its nudged solves must not."""
    made = PROBLEMS["ridge"]()
    found = estimate(made, mn.FOBMAML(nudge="full"), mn.Nesterov(150, tol=0.9))
    assert distance(found, made.meta_gradient()) < 1e-7


def test_automatic_step_size_of_a_flat_loss_is_finite() -> None:
    """No curvature and no proximal term: no scale at all; the step must still be a number."""
    flat = Plain([lambda p: p.sum() * 1e-3])
    path = trajectory(mn.Nesterov(3), energy_of(flat, prox=0.0), lanes(START))
    assert path.isfinite().all()


def test_nesterov_beats_gradient_descent_on_an_ill_conditioned_quadratic() -> None:
    """kappa = 500: 300 steps leave gradient descent, at its best fixed step, far behind."""
    values = [100.0, 30.0, 1.0, 0.0]
    losses = quadratics(values)
    prox = 0.2
    matrix = torch.autograd.functional.hessian(losses.support[0], START)
    offset = -torch.autograd.functional.jacobian(losses.support[0], torch.zeros(4).double())
    solution = torch.linalg.solve(matrix + prox * torch.eye(4).double(), offset)
    steps = 300
    energy = energy_of(losses, prox=prox)
    fast = trajectory(mn.Nesterov(steps), energy, lanes(START))[-1, 0]
    slow = trajectory(mn.GradientDescent(steps, lr=2 / (100.2 + 0.2)), energy, lanes(START))[-1, 0]
    assert distance(fast, solution) < 1e-2 * distance(slow, solution)


def test_restarts_help_where_the_momentum_is_too_large() -> None:
    energy = energy_of(quadratics([5.0, 4.0, 3.0, 2.0]))
    settings = {"lr": 0.15, "momentum": 0.98}
    with_restart, without = (
        trajectory(mn.Nesterov(40, restart=restart, **settings), energy, lanes(START))[-1, 0]
        for restart in (True, False)
    )
    solution = trajectory(mn.Nesterov(400), energy, lanes(START))[-1, 0]
    assert distance(with_restart, solution) < 1e-2 * distance(without, solution)


# Stopping.


def residual_at(losses: Plain, i: int, phi: Tensor, prox: float = PROX) -> float:
    """||p + q|| / (||p|| + ||q||), p = grad fhat, q = prox (phi - 0)."""
    pull, push = torch.autograd.functional.jacobian(losses.support[i], phi), prox * phi
    return float((pull + push).norm() / (pull.norm() + push.norm()))


def test_tol_stops_each_task_on_its_own_and_leaves_it_as_it_is() -> None:
    easy, hard = [1.0, 1.0, 1.0, 1.0], [60.0, 10.0, 1.0, 0.1]
    losses, tol = quadratics(easy, hard), 1e-4
    path = trajectory(mn.Nesterov(200, tol=tol), energy_of(losses), lanes(START, START))
    steps = len(path) - 1
    assert steps < 200
    moved = (path[1:] != path[:-1]).any(-1)  # [steps, T]
    for i in range(2):
        last = int(moved[:, i].nonzero().max())
        assert not moved[last + 1 :, i].any()
        assert residual_at(losses, i, path[-1, i]) < 10 * tol
    assert int(moved[:, 0].sum()) < int(moved[:, 1].sum())
    # each goes exactly as it would alone
    for i, values in enumerate((easy, hard)):
        alone = Plain([losses.support[i]])
        own = trajectory(mn.Nesterov(200, tol=tol), energy_of(alone), lanes(START))
        assert torch.equal(own[-1, 0], path[-1, i]), values


def test_tol_measures_the_residual_the_step_reports() -> None:
    """MetaStep.residual of a stopped solve is of the size of tol, and 0.5 stops far earlier than 1e-6."""
    made = PROBLEMS["logistic"]()

    def step(tol: float | None) -> mn.MetaStep:
        learner = mn.MetaLearner(
            made.make(), made.loss, prox=made.prox, solver=mn.Nesterov(100, tol=tol), estimator=mn.FOMAML()
        )
        return learner.backward(made.tasks)

    loose, tight = step(0.3), step(1e-6)
    assert tight.residual < 1e-5 < loose.residual < 0.5
    assert loose.gradient_evaluations < tight.gradient_evaluations < step(None).gradient_evaluations


def test_tol_needs_a_proximal_term() -> None:
    """Without one there is no balance of forces to measure: refused, rather than run to the last step."""
    made = PROBLEMS["ridge"]()
    with pytest.raises(mn.SettingsError, match=r"Nesterov cannot run here: .*prox is 0.*without tol"):
        mn.MetaLearner(made.make(), made.loss, prox=0.0, solver=mn.Nesterov(30, tol=1e-3), estimator=mn.MAML())


@pytest.mark.parametrize("execution", ["vectorized", "in_place"])
@pytest.mark.parametrize("estimator", [mn.FOMAML(), mn.Reptile(), mn.HFMAML()], ids=str)
def test_without_a_proximal_term_there_is_no_residual_to_report(estimator: object, execution: str) -> None:
    """NaN says so; the other numbers are numbers."""
    made = PROBLEMS["ridge"]()
    step = mn.MetaLearner(
        made.make(), made.loss, prox=0.0, solver=mn.Nesterov(3), estimator=estimator, execution=execution
    ).backward(made.tasks)
    assert math.isnan(step.residual)
    assert step.nu == 0
    assert step.dropped_tasks == 0
    assert all(math.isfinite(value) for value in (step.query_loss, step.support_loss, step.gradient_norm))


@pytest.mark.parametrize("name", ["ridge", "logistic"])
def test_residual_of_a_step(name: str) -> None:
    """MetaStep.residual is the mean of ||p + q|| / (||p|| + ||q||) at phi_K."""
    made = PROBLEMS[name]()
    learner = mn.MetaLearner(
        made.make(), made.loss, prox=made.prox, solver=mn.GradientDescent(3, lr=0.1), estimator=mn.FOMAML()
    )
    expected = []
    for task in made.plain:
        phi = made.theta
        for _ in range(3):
            phi = phi - 0.1 * (torch.autograd.functional.jacobian(task.support, phi) + made.prox * (phi - made.theta))
        pull, push = torch.autograd.functional.jacobian(task.support, phi), made.prox * (phi - made.theta)
        expected.append(float((pull + push).norm() / (pull.norm() + push.norm())))
    assert learner.backward(made.tasks).residual == pytest.approx(sum(expected) / len(expected), rel=1e-10)


# Matched solves.

REPLAYED = {name: solver for name, solver in SOLVERS.items() if name != "torch_optimizer"} | {
    "restarting": mn.Nesterov(25, lr=0.15, momentum=0.95)
}


@pytest.mark.parametrize("solver", REPLAYED)
def test_a_nudged_solve_with_nu_zero_is_the_free_solve(solver: str) -> None:
    """Same start, steps, step sizes, restarts and stops; bitwise."""
    losses = quadratics([3.0, 2.0, 1.0, 0.5], [0.3, 9.0, 0.1, 0.2])
    losses.query = [curved, curved]
    start = lanes(START, -START)
    free, schedule = solve(REPLAYED[solver], energy_of(losses), start)
    zero = torch.zeros(2, 1).double()
    again = replay(REPLAYED[solver], energy_of(losses, nu=zero, slope=lanes(START, START)), start, schedule)
    assert torch.equal(again["phi"], free["phi"])
    full = replay(REPLAYED[solver], energy_of(losses, nu=zero), start, schedule)
    assert torch.equal(full["phi"], free["phi"])


@pytest.mark.parametrize("solver", REPLAYED)
def test_a_nudged_solve_repeats_decisions_and_does_not_make_its_own(solver: str) -> None:
    """So it is a smooth function of nu: the same schedule, and nothing measured again on the nudged energy."""
    losses = quadratics([3.0, 2.0, 1.0, 0.5], [0.3, 9.0, 0.1, 0.2])
    losses.query = [curved, curved]
    free, schedule = solve(REPLAYED[solver], energy_of(losses), lanes(START, -START))
    decisions = list(schedule.decisions)
    losses.asked.clear()
    replay(REPLAYED[solver], energy_of(losses, nu=torch.full((2, 1), 5.0).double()), free, schedule)
    assert len(losses.asked) == len(decisions)  # one gradient a step, no measuring
    assert len(schedule.decisions) == len(decisions)
    for before, after in zip(decisions, schedule.decisions, strict=True):
        assert before is after


@pytest.mark.parametrize("solver", [mn.Nesterov(25, lr=0.15, momentum=0.95), mn.Nesterov(60, tol=1e-3)])
def test_a_nudged_solve_follows_the_decisions_of_the_free_one(solver: mn.Nesterov) -> None:
    """A fixed schedule of gradient steps on a quadratic is affine in the nudge; with restarts of its own not."""
    losses = quadratics([3.0, 2.0, 1.0, 0.5], [0.3, 9.0, 0.1, 0.2])
    start, slope = lanes(START, -START), lanes(torch.linspace(3, -8, 4).double(), START)
    free, schedule = solve(solver, energy_of(losses), start)
    nus = [torch.full((2, 1), size).double() for size in (4.0, 8.0)]
    energies = [energy_of(losses, nu=nu, slope=slope) for nu in nus]
    once, twice = (replay(solver, energy, start, schedule)["phi"] - free["phi"] for energy in energies)
    torch.testing.assert_close(twice, 2 * once, rtol=1e-11, atol=1e-11)
    own = solve(solver, energies[1], start).schedule.decisions

    def marks(decisions: list) -> list:
        return [(one.active.tolist(), one.restart.tolist()) for one in decisions]

    assert marks(own) != marks(schedule.decisions)


def test_every_solve_starts_from_a_fresh_state() -> None:
    """Momentum and Adam's means do not leak from one solve into the next."""
    for solver in (SAME["momentum"][0], SAME["adam"][0], SAME["torch_optimizer"][0]):
        first, second = (trajectory(solver, energy_of(Plain([curved])), lanes(START)) for _ in range(2))
        assert torch.equal(first, second)


class Noisy(nn.Module):
    """A linear model whose forward pass draws from the generator, and tells what it drew."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 1).double()
        self.held: tuple[list[float]] = ([],)  # lists of the module's own are emptied again

    def forward(self, x: Tensor) -> Tensor:
        noise = torch.rand((), dtype=x.dtype)
        self.drawn.append(float(noise))
        return self.linear(x) + noise

    @property
    def drawn(self) -> list[float]:
        """In order."""
        return self.held[0]


@pytest.mark.parametrize("scheme", ["forward", "symmetric", "fourth_order"])
def test_random_state_is_equal_across_nodes(scheme: str) -> None:
    """Every node's solve draws the same numbers, in the same order; the free solve's support draws are the same."""
    model, steps = Noisy(), 5
    made = PROBLEMS["logistic"]()
    learner = mn.MetaLearner(
        model,
        made.loss,
        solver=mn.GradientDescent(steps, lr=0.1),
        estimator=mn.FOBMAML(scheme, nu=0.1, steps=steps),
        execution="in_place",
    )
    learner.backward(single_tasks(made.tasks)[:1])
    nodes = len(mn.STENCILS[scheme].nodes)
    free, judged = model.drawn[:steps], model.drawn[steps : steps + 2]
    nudged, bound = model.drawn[steps + 2 : -4], model.drawn[-4:]
    assert len(set(free + judged)) == steps + 2  # different from step to step, and support from query
    support, query = judged
    assert nudged == [*free, support] * nodes
    assert bound == [support, query, support, support]


@pytest.mark.parametrize("execution", ["vectorized", "in_place"])
def test_noise_cancels_in_the_difference(execution: str) -> None:
    """An additive noise on the logits moves the solution, not the meta-gradient's finite difference: no noise / nu."""
    made = PROBLEMS["logistic"]()

    def at(nu: float) -> Tensor:
        torch.manual_seed(3)
        model = Dropped(made.theta)
        settings = {"solver": mn.GradientDescent(15, lr=0.3), "execution": execution}
        mn.MetaLearner(model, made.loss, estimator=mn.FOBMAML(nu=nu), **settings).backward(made.tasks)
        return torch.cat([p.grad.reshape(-1) for p in model.parameters()])

    assert distance(at(1e-3), at(5e-4)) < 1e-4


class Dropped(nn.Module):
    """Logistic regression with dropout on its inputs."""

    def __init__(self, theta: Tensor) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 1).double()
        self.dropout = nn.Dropout(0.4)
        with torch.no_grad():
            nn.utils.vector_to_parameters(theta.clone(), self.linear.parameters())

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.dropout(x))


def test_the_adapted_model_is_where_the_solver_ends() -> None:
    made = PROBLEMS["logistic"]()
    solver = mn.Nesterov(150)
    learner = mn.MetaLearner(made.make(), made.loss, prox=made.prox, solver=solver)
    for i, phi in enumerate(made.solutions()):
        found = nn.utils.parameters_to_vector(learner.adapt(single_tasks(made.tasks)[i].support).parameters())
        assert distance(found.detach(), phi) < 1e-12


def test_reptile_of_a_solver_without_steps_taken() -> None:
    """tol met at the start: theta already is the solution, so nothing moves."""
    made = PROBLEMS["ridge"]()
    easy = estimate(made, mn.Reptile(), mn.Nesterov(10, tol=1.0))
    assert torch.equal(easy, torch.zeros_like(easy))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: mn.GradientDescent(0, lr=0.1), "steps must be"),
        (lambda: mn.GradientDescent(2.0, lr=0.1), "steps must be"),
        (lambda: mn.GradientDescent(True, lr=0.1), "steps must be"),
        (lambda: mn.GradientDescent(2, lr=0.0), "lr must be"),
        (lambda: mn.GradientDescent(2, lr=float("inf")), "lr must be"),
        (lambda: mn.GradientDescent(2, lr=0.1, momentum=1.0), "momentum must be"),
        (lambda: mn.Adam(2, lr=-0.1), "lr must be"),
        (lambda: mn.Adam(2, lr=0.1, betas=(0.9, 1.0)), "beta2 must be"),
        (lambda: mn.Adam(2, lr=0.1, eps=0.0), "eps must be"),
        (lambda: mn.Nesterov(2, tol=0.0), "tol must be"),
        (lambda: mn.Nesterov(2, lr="fast"), 'lr must be a number or "auto"'),
        (lambda: mn.Nesterov(2, momentum="high"), 'momentum must be a number or "auto"'),
        (lambda: mn.Nesterov(2, momentum=-0.1), "momentum must be"),
        (lambda: mn.Nesterov(2, power_iterations=0), "power_iterations must be"),
        (lambda: mn.TorchOptimizer(lambda p: torch.optim.SGD(p), steps=-1), "steps must be"),
    ],
)
def test_bad_settings_are_refused(make: object, words: str) -> None:
    with pytest.raises(mn.SettingsError, match=words):
        make()


@pytest.mark.parametrize("theta", [-4.0, 0.0, 2.5, 6.0])
@pytest.mark.parametrize("execution", ["vectorized", "in_place"])
def test_one_adapted_number_has_a_curvature(theta, execution):
    """Gradient and generic direction may be opposite; their sum must not be taken for a direction then."""
    model = nn.Linear(1, 1, bias=False, dtype=torch.float64)
    nn.init.constant_(model.weight, theta)
    x = torch.ones(1, 1, dtype=torch.float64)
    learner = mn.MetaLearner(
        model, lambda m, b: 5 * (m(b.inputs) - 3).square().mean(), prox=0.1, solver=mn.Nesterov(1), execution=execution
    )
    solution = (30 + 0.1 * theta) / 10.1
    assert abs(float(learner.adapt(mn.Batch(x, x)).weight.detach()) - solution) < 0.2 * abs(theta - solution) + 1e-12


def test_only_steps_of_nesterov_come_without_their_name():
    """The second argument of other solvers is lr, of this one it would be tol."""
    with pytest.raises(TypeError):
        mn.Nesterov(16, 0.1)


@pytest.mark.parametrize(
    "make",
    [
        lambda: mn.Nesterov(steps=np.int64(4)),
        lambda: mn.GradientDescent(steps=3, lr=np.float32(0.1)),
        lambda: mn.GradientDescent(steps=3, lr=0.1, momentum=torch.tensor(0.5)),
        lambda: mn.MetaLearner(torch.nn.Linear(1, 1), mn.metrics.squared_error, prox=np.float32(1)),
        lambda: mn.MetaLearner(torch.nn.Linear(1, 1), mn.metrics.squared_error, chunk_size=np.int32(2)),
    ],
)
def test_numbers_of_other_libraries_are_told_as_that(make):
    with pytest.raises(mn.SettingsError, match=r"a (int64|float32|Tensor|int32): take its \.item\(\)"):
        make()


@pytest.mark.parametrize("lr", [np.float32(-1), float("nan"), torch.tensor(-0.1), 10**400, True, "0.1"])
def test_numbers_that_no_cure_mends_are_told_without_one(lr):
    with pytest.raises(mn.SettingsError, match="lr must be a finite number above 0, got ") as told:
        mn.GradientDescent(steps=3, lr=lr)
    assert "item" not in str(told.value)
