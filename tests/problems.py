"""Small meta-learning problems with known answers, by dense linear algebra on flat vectors.

Nothing here uses the library but its data types: a task is a pair of plain functions of one vector phi, and every
answer is a linear solve. float64 throughout.

    phi(theta, nu) = argmin_phi  fhat(phi) + nu f(phi) + prox/2 ||phi - theta||^2
    grad F         = mean_i prox (H_i + prox I)^-1 grad f_i(phi_i), H_i the Hessian of fhat_i at phi_i = phi_i(theta, 0)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metanudge as mn

DTYPE = torch.float64
Function = Callable[[Tensor], Tensor]


class Task(NamedTuple):
    """Support and query loss as functions of one flat vector."""

    support: Function
    query: Function


@dataclass(frozen=True, eq=False)
class Problem:
    """A model, its loss and a stack of tasks, and the same thing as functions of a flat vector.

    Attributes:
        make: Makes the model, its parameters at ``theta``.
        loss: For the library.
        tasks: For the library, ``[T, n, ...]``.
        prox: The proximal weight.
        theta: The initialisation, ``[P]``, in the order of ``model.parameters()``.
        plain: The tasks as functions of phi, ``[P]``.
        minimiser: ``(i, theta, nu) -> phi_i(theta, nu)``.
        quadratic: Whether both losses are.
    """

    name: str
    make: Callable[[], nn.Module]
    loss: Callable[[nn.Module, mn.Batch], Tensor]
    tasks: mn.Tasks
    prox: float
    theta: Tensor
    plain: tuple[Task, ...]
    minimiser: Callable[[int, Tensor, float], Tensor]
    quadratic: bool

    def solutions(self, theta: Tensor | None = None, nu: float = 0.0) -> list[Tensor]:
        """phi_i(theta, nu) of every task."""
        if theta is None and nu == 0:
            return self.free_solutions
        theta = self.theta if theta is None else theta
        return [self.minimiser(i, theta, nu) for i in range(len(self.plain))]

    @cached_property
    def free_solutions(self) -> list[Tensor]:
        """phi_i(theta, 0) at this problem's theta."""
        return [self.minimiser(i, self.theta, 0.0) for i in range(len(self.plain))]

    def meta_gradient(self, theta: Tensor | None = None) -> Tensor:
        """grad F(theta)."""
        found = [
            self.prox * torch.linalg.solve(curvature(task.support, phi, self.prox), slope(task.query, phi))
            for task, phi in zip(self.plain, self.solutions(theta), strict=True)
        ]
        return torch.stack(found).mean(0)

    def fomaml(self, theta: Tensor | None = None) -> Tensor:
        """What FOMAML converges to: mean grad f(phi)."""
        solved = zip(self.plain, self.solutions(theta), strict=True)
        return torch.stack([slope(task.query, phi) for task, phi in solved]).mean(0)

    def reptile(self, theta: Tensor | None = None) -> Tensor:
        """What Reptile converges to: mean (theta - phi)."""
        theta = self.theta if theta is None else theta
        return torch.stack([theta - phi for phi in self.solutions(theta)]).mean(0)

    def finite_difference(self, nodes: tuple[float, ...], weights: tuple[float, ...], nu: float) -> Tensor:
        """The full-nudge stencil applied to exact solutions: what FO-B-MAML returns when its solves are perfect."""
        total = torch.zeros_like(self.theta)
        for node, weight in zip(nodes, weights, strict=True):
            for phi in self.solutions(nu=node * nu):
                total += weight * self.prox * (self.theta - phi) / nu
        return total / len(self.plain)


def slope(function: Function, phi: Tensor) -> Tensor:
    """The gradient."""
    phi = phi.detach().requires_grad_()
    return torch.autograd.grad(function(phi), phi)[0]


def hessian(function: Function, phi: Tensor) -> Tensor:
    """The dense Hessian, ``[P, P]``."""
    return torch.autograd.functional.hessian(function, phi.detach())


def curvature(support: Function, phi: Tensor, prox: float) -> Tensor:
    """H + prox I."""
    return hessian(support, phi) + prox * torch.eye(len(phi), dtype=phi.dtype)


def newton(energy: Function, start: Tensor) -> Tensor:
    """The minimiser of a strongly convex function, to round-off."""
    phi = start
    for _ in range(50):
        move = torch.linalg.solve(hessian(energy, phi), slope(energy, phi))
        phi = phi - move
        if move.norm() < 1e-14 * (1 + phi.norm()):
            assert torch.linalg.eigvalsh(hessian(energy, phi)).min() > 0, "the problem must be well posed"
            return phi
    raise AssertionError("Newton's method must converge on a test problem")


def by_newton(plain: tuple[Task, ...], prox: float) -> Callable[[int, Tensor, float], Tensor]:
    """phi_i(theta, nu) where there is no formula."""

    def minimiser(i: int, theta: Tensor, nu: float) -> Tensor:
        def energy(phi: Tensor) -> Tensor:
            nudged = plain[i].support(phi) + nu * plain[i].query(phi)
            return nudged + prox / 2 * (phi - theta).square().sum()

        return newton(energy, theta)

    return minimiser


def loaded(model: nn.Module, theta: Tensor) -> nn.Module:
    """``model`` in double precision with its parameters at ``theta``."""
    model = model.to(DTYPE)
    with torch.no_grad():
        nn.utils.vector_to_parameters(theta.clone(), model.parameters())
    return model


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    """Standard normal numbers."""
    return torch.randn(*shape, generator=generator, dtype=DTYPE)


def squared_error(model: nn.Module, batch: mn.Batch) -> Tensor:
    """Mean squared error."""
    return (model(batch.inputs) - batch.targets).square().mean()


@cache
def ridge() -> Problem:
    """Linear regression, mean squared error. H_i = 2 X'X / n; everything is a linear system.

    phi_i(theta, nu) = (H + nu H' + prox I)^-1 (b + nu b' + prox theta),   b = 2 X'y / n
    """
    tasks, support_size, query_size, width, prox = 3, 8, 12, 4, 0.7
    g = torch.Generator().manual_seed(1)
    truth = normal(g, tasks, width, 1)
    x, x_query = normal(g, tasks, support_size, width), normal(g, tasks, query_size, width)
    y = x @ truth + 0.3 * normal(g, tasks, support_size, 1)
    y_query = x_query @ truth + 0.3 * normal(g, tasks, query_size, 1)
    theta = normal(g, width)

    def loss_on(inputs: Tensor, targets: Tensor) -> Function:
        return lambda phi: (inputs @ phi - targets[:, 0]).square().mean()

    def minimiser(i: int, theta: Tensor, nu: float) -> Tensor:
        system, right = prox * torch.eye(width, dtype=DTYPE), prox * theta
        for weight, inputs, targets in ((1.0, x[i], y[i]), (nu, x_query[i], y_query[i])):
            system = system + weight * 2 * inputs.T @ inputs / len(inputs)
            right = right + weight * 2 * inputs.T @ targets[:, 0] / len(inputs)
        return torch.linalg.solve(system, right)

    return Problem(
        name="ridge",
        make=lambda: loaded(nn.Linear(width, 1, bias=False), theta),
        loss=squared_error,
        tasks=mn.Tasks(mn.Batch(x, y), mn.Batch(x_query, y_query)),
        prox=prox,
        theta=theta,
        plain=tuple(Task(loss_on(x[i], y[i]), loss_on(x_query[i], y_query[i])) for i in range(tasks)),
        minimiser=minimiser,
        quadratic=True,
    )


class Vector(nn.Module):
    """A bare vector of parameters."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.phi = nn.Parameter(torch.zeros(width))


def weighted_distance(model: nn.Module, batch: mn.Batch) -> Tensor:
    """<h, (phi - c)^2> / 2, inputs h and targets c."""
    return (batch.inputs * (model.phi - batch.targets).square()).sum() / 2


@cache
def diagonal() -> Problem:
    """fhat = <h, (phi - c)^2> / 2 and f likewise with h', c': every answer is a formula, coordinate by coordinate.

    phi(theta, nu) = (h c + nu h' c' + prox theta) / (h + nu h' + prox)
    """
    tasks, width, prox = 2, 5, 0.5
    g = torch.Generator().manual_seed(2)
    h, h_query = 0.2 + 2 * normal(g, tasks, width).abs(), 0.2 + normal(g, tasks, width).abs()
    c, c_query, theta = normal(g, tasks, width), normal(g, tasks, width), normal(g, width)

    def loss_on(weights: Tensor, centre: Tensor) -> Function:
        return lambda phi: (weights * (phi - centre).square()).sum() / 2

    def minimiser(i: int, theta: Tensor, nu: float) -> Tensor:
        pull = h[i] * c[i] + nu * h_query[i] * c_query[i] + prox * theta
        return pull / (h[i] + nu * h_query[i] + prox)

    return Problem(
        name="diagonal",
        make=lambda: loaded(Vector(width), theta),
        loss=weighted_distance,
        tasks=mn.Tasks(mn.Batch(h, c), mn.Batch(h_query, c_query)),
        prox=prox,
        theta=theta,
        plain=tuple(Task(loss_on(h[i], c[i]), loss_on(h_query[i], c_query[i])) for i in range(tasks)),
        minimiser=minimiser,
        quadratic=True,
    )


def cross_entropy(model: nn.Module, batch: mn.Batch) -> Tensor:
    """Binary cross-entropy of logits."""
    return F.binary_cross_entropy_with_logits(model(batch.inputs), batch.targets)


@cache
def logistic() -> Problem:
    """Logistic regression with a bias: convex, not quadratic; solved by Newton's method on dense Hessians."""
    tasks, size, width, prox = 3, 10, 3, 0.3
    g = torch.Generator().manual_seed(3)
    x, x_query = 1.5 * normal(g, tasks, size, width), 1.5 * normal(g, tasks, size, width)
    truth = 2 * normal(g, tasks, width, 1)
    y, y_query = ((inputs @ truth + normal(g, tasks, size, 1) > 0).to(DTYPE) for inputs in (x, x_query))
    theta = normal(g, width + 1)

    def loss_on(inputs: Tensor, targets: Tensor) -> Function:
        def value(phi: Tensor) -> Tensor:
            logits = inputs @ phi[:width] + phi[width]
            # -log sigmoid(z) for a positive, -log sigmoid(-z) for a negative example
            return torch.log1p(torch.exp(-(2 * targets[:, 0] - 1) * logits)).mean()

        return value

    plain = tuple(Task(loss_on(x[i], y[i]), loss_on(x_query[i], y_query[i])) for i in range(tasks))
    return Problem(
        name="logistic",
        make=lambda: loaded(nn.Linear(width, 1), theta),
        loss=cross_entropy,
        tasks=mn.Tasks(mn.Batch(x, y), mn.Batch(x_query, y_query)),
        prox=prox,
        theta=theta,
        plain=plain,
        minimiser=by_newton(plain, prox),
        quadratic=False,
    )


@cache
def mlp() -> Problem:
    """A tanh network with one hidden layer on a regression: not convex, held well-posed by the proximal term."""
    tasks, size, width, hidden, prox = 2, 7, 2, 4, 3.0
    g = torch.Generator().manual_seed(4)
    x, x_query = normal(g, tasks, size, width), normal(g, tasks, size, width)
    phase = normal(g, tasks, 1, 1)
    y, y_query = (torch.sin(2 * inputs.sum(-1, keepdim=True) + phase) for inputs in (x, x_query))
    theta = 0.5 * normal(g, hidden * width + hidden + hidden + 1)

    def loss_on(inputs: Tensor, targets: Tensor) -> Function:
        def value(phi: Tensor) -> Tensor:
            first, bias, last, offset = torch.split(phi, [hidden * width, hidden, hidden, 1])
            features = torch.tanh(inputs @ first.reshape(hidden, width).T + bias)
            return (features @ last + offset - targets[:, 0]).square().mean()

        return value

    plain = tuple(Task(loss_on(x[i], y[i]), loss_on(x_query[i], y_query[i])) for i in range(tasks))
    return Problem(
        name="mlp",
        make=lambda: loaded(nn.Sequential(nn.Linear(width, hidden), nn.Tanh(), nn.Linear(hidden, 1)), theta),
        loss=squared_error,
        tasks=mn.Tasks(mn.Batch(x, y), mn.Batch(x_query, y_query)),
        prox=prox,
        theta=theta,
        plain=plain,
        minimiser=by_newton(plain, prox),
        quadratic=False,
    )


PROBLEMS: dict[str, Callable[[], Problem]] = {
    "ridge": ridge,
    "diagonal": diagonal,
    "logistic": logistic,
    "mlp": mlp,
}


# Asking the library, and comparing.


def flat_gradient(model: nn.Module) -> Tensor:
    """``.grad`` of all parameters as one vector; zero where there is none."""
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    return torch.cat([part.reshape(-1) for part in parts])


def estimate(problem: Problem, estimator: object, solver: object, **settings: object) -> Tensor:
    """The library's mean meta-gradient at ``problem.theta``, as one vector."""
    model = problem.make()
    settings = {"prox": problem.prox, **settings}
    learner = mn.MetaLearner(model, problem.loss, estimator=estimator, solver=solver, **settings)
    learner.backward(problem.tasks)
    return flat_gradient(model)


def distance(found: Tensor, expected: Tensor) -> float:
    """Relative error."""
    error = (found - expected).norm()
    return float(error / expected.norm()) if error > 0 else 0.0


def single_tasks(tasks: mn.Tasks) -> list[mn.Tasks]:
    """The tasks of a stack of ``Batch(tensor, tensor)``, one by one."""
    number = len(tasks.support.inputs)
    return [mn.Tasks(*(mn.Batch(batch.inputs[i], batch.targets[i]) for batch in tasks)) for i in range(number)]


# What the registries offer, in the variants worth telling apart. A new row of a registry needs one here (tests insist).

ONE_SIDED = mn.Stencil(nodes=(0, 1, 2), weights=(-3 / 2, 2, -1 / 2), order=2)

ESTIMATORS: dict[str, object] = {
    "symmetric": mn.FOBMAML(nudge="full"),
    "forward": mn.FOBMAML("forward", nudge="full"),
    "fourth_order": mn.FOBMAML("fourth_order", nudge="full"),
    "one_sided": mn.FOBMAML(ONE_SIDED, nudge="full"),
    "linear": mn.FOBMAML(),
    "linear_forward": mn.FOBMAML("forward"),
    "linear_fourth_order": mn.FOBMAML("fourth_order"),
    "from_theta": mn.FOBMAML(nudge="full", start="initialization"),
    "from_theta_forward": mn.FOBMAML("forward", nudge="full", start="initialization"),
    "maml": mn.MAML(),
    "maml_checkpointed": mn.MAML(checkpoint=True),
    "fomaml": mn.FOMAML(),
    "reptile": mn.Reptile(),
    "imaml": mn.IMAML(cg_steps=20),
    "imaml_two_gradient": mn.IMAML(cg_steps=20, products="two_gradient"),
    "hfmaml": mn.HFMAML(),
    "tangent": mn.Tangent(),
    "tangent_two_gradient": mn.Tangent(products="two_gradient"),
}

SOLVERS: dict[str, object] = {
    "gradient_descent": mn.GradientDescent(steps=6, lr=0.1),
    "momentum": mn.GradientDescent(steps=6, lr=0.1, momentum=0.7),
    "nesterov": mn.Nesterov(steps=6),
    "nesterov_tol": mn.Nesterov(steps=12, tol=3e-2),
    "nesterov_fixed": mn.Nesterov(steps=6, lr=0.1, momentum=0.8),
    "adam": mn.Adam(steps=6, lr=0.05),
    "torch_optimizer": mn.TorchOptimizer(lambda parameters: torch.optim.SGD(parameters, lr=0.1), steps=6),
}


def coarse(estimator: object) -> object:
    """The estimator with wide finite differences.

    A difference quotient divides round-off by its width: at the default nu (or displacement) of 1e-5 two summation
    orders that differ by 1e-16 give estimates that differ by 1e-11. At 1e-1 they must agree to 1e-12.
    """
    if isinstance(estimator, mn.FOBMAML):
        return dataclasses.replace(estimator, nu=0.1)
    if getattr(estimator, "products", None) == "two_gradient" or isinstance(estimator, mn.HFMAML):
        return dataclasses.replace(estimator, displacement=0.1)
    return estimator


def refused_in_place(estimator: object) -> bool:
    return isinstance(estimator, mn.MAML) or getattr(estimator, "products", None) == "exact"
