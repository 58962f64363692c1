r"""Smoothness of the meta-objective: the spectral norm of Hess F against the norm of the meta-gradient.

With :math:`A_i = \nabla^2 \hat f_i(\phi_i) + \lambda I`, :math:`d \phi_i / d \theta = \lambda A_i^{-1}` and the third
derivative :math:`T_i = \nabla^3 \hat f_i(\phi_i)`, differentiation of :math:`\nabla F_i = \lambda A_i^{-1} \nabla f_i`:

.. math::
    \nabla^2 F_i = A_i^{-1} \big( \lambda^2 \, \nabla^2 f_i - \lambda \, T_i[\nabla F_i] \big) A_i^{-1}, \qquad
    \|\nabla^2 F_i\| \le \frac{\lambda^2 \|\nabla^2 f_i\| + \rho_i \lambda \|\nabla F_i\|}{(\lambda + \mu)^2}
                     = L_{0,i} + L_{1,i} \|\nabla F_i\|,

ρ the Lipschitz constant of Hess f̂, μ its lowest curvature (0 here: convex). The mean over tasks obeys
:math:`\|\nabla^2 F\| \le \mathrm{mean}_i (L_{0,i} + L_{1,i} \|\nabla F_i\|)`, with the norms of the *tasks'* gradients;
a bound in ||∇F|| alone needs one on mean ||∇F_i - ∇F||. So the check is made for every task, and for the mean with the
tasks' norms. Only A_i at φ_i enters: with ||A_i^-1|| for 1 / (λ + μ) the bound is *local*, tighter, and checked too.

The tasks: linear regression, support loss the pseudo-Huber :math:`h(r) = \sqrt{1 + r^2} - 1`, query loss the squared
error. As :math:`|h'''| = 3 |r| (1 + r^2)^{-5/2} \le 48 / (25 \sqrt 5)`, its value at |r| = 1/2,
:math:`\rho_i \le 48 / (25 \sqrt 5) \cdot \max_j \|x_j\| \cdot \| \mathrm{mean}_j \, x_j x_j^\top \|`.
From gradients alone :math:`L_k = \|\nabla F(x_{mid}) - \nabla F(x_k)\| / \|x_{mid} - x_k\|`, x_mid the middle of step k
(Zhang et al., arXiv:1905.11881).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Generator, Tensor, nn

from metanudge.diagnostics import ExactMetaObjective
from metanudge.errors import NonFiniteError
from metanudge.experiments.study import Advance, Claim, Study, figure
from metanudge.metrics import squared_error
from metanudge.types import Batch, Tasks


@dataclass(frozen=True)
class SmoothnessSettings:
    """Settings of the study of smoothness."""

    prox: tuple[float, ...] = (3.0, 1.0, 0.3, 0.1, 0.03, 0.01)  # λ, half a decade apart: the bound on L1 grows 300-fold
    beyond_prox: float = 0.003  # for the text: every start is within reach of the inner solve, no gradient is large
    control_prox: float = 0.1  # of the control with a quadratic support loss, in the middle of the range
    draws: int = 6  # of the tasks: the fit pools them, their spread tells what one draw may give
    tasks: int = 8  # in the meta-objective: enough that their gradients differ
    points: int = 20  # support points, as many query points: four a parameter, so that f̂ has curvature everywhere
    dimension: int = 5  # parameters of a task: dense Hessians stay cheap
    noise: float = 0.1  # of the targets: small against 1, the residual at which the pseudo-Huber loss bends
    starts: int = 24  # trajectories of a draw
    nearest: float = 2.0  # distance of the nearest start: about the spread of the tasks' solutions
    farthest: float = 80.0  # distance of the farthest start: residuals far beyond the bend of the loss
    steps: int = 12  # normalised steps of a trajectory
    step_share: float = 0.1  # length of a step over the distance of the start: ten steps may lead to the solutions
    checked: int = 8  # points of each λ where the closed form is held against automatic differentiation
    seed: int = 0  # of tasks and directions

    @classmethod
    def quick(cls) -> SmoothnessSettings:
        """Return a form that takes a few seconds: fewer draws, starts and λ."""
        return cls(prox=(1.0, 0.3, 0.1, 0.03, 0.01), draws=2, starts=12, checked=2)


class Penalty(NamedTuple):
    """A loss of one residual r: its value, three derivatives, and h'(r) / r >= h''(r), a majorant's curvature."""

    value: Tensor
    slope: Tensor
    curvature: Tensor
    change: Tensor
    majorant: Tensor


def pseudo_huber(r: Tensor) -> Penalty:
    """Evaluate sqrt(1 + r^2) - 1: a square near 0, an absolute value far away."""
    root = (1 + r.square()).sqrt()
    s = 1 / root
    cube = s * s * s
    return Penalty(root - 1, r * s, cube, -3 * r * cube * s * s, s)


def square(r: Tensor) -> Penalty:
    """Evaluate r^2 / 2, whose third derivative is 0."""
    return Penalty(r.square() / 2, r, torch.ones_like(r), torch.zeros_like(r), torch.ones_like(r))


LARGEST_CHANGE: dict[Callable[[Tensor], Penalty], float] = {
    pseudo_huber: 48 / (25 * math.sqrt(5)),
    square: 0.0,
}  # max |h'''|


class LinearTasks:
    """T linear regressions at P meta-parameters at once: θ is ``[P, d]``, φ ``[T, P, d]``; closed forms, given φ."""

    def __init__(self, tasks: Tasks, prox: float, penalty: Callable[[Tensor], Penalty] = pseudo_huber) -> None:
        self.tasks, self.prox, self._penalty = tasks, prox, penalty
        (self._x, self._y), (self._xq, self._yq) = ((part.inputs, part.targets.mT) for part in tasks)
        _, self._points, dimension = self._x.shape
        self._eye = torch.eye(dimension, dtype=self._x.dtype)
        self._outer = (self._x[..., None] * self._x[..., None, :]).flatten(2) / self._points
        self.query_hessian = 2 * self._xq.mT @ self._xq / self._points  # [T, d, d]
        moment = torch.linalg.matrix_norm(self._outer.sum(1).unflatten(-1, self._eye.shape), 2)
        self.rho = LARGEST_CHANGE[penalty] * self._x.norm(dim=-1).amax(1) * moment  # [T]

    @classmethod
    def draw(cls, settings: SmoothnessSettings, prox: float, generator: Generator, **options: Any) -> LinearTasks:
        """Draw inputs and solutions of unit variance, targets with noise."""

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        def batch() -> Batch:
            inputs = normal(settings.tasks, settings.points, settings.dimension)
            return Batch(inputs, inputs @ solution + settings.noise * normal(settings.tasks, settings.points, 1))

        solution = normal(settings.tasks, settings.dimension, 1)
        return cls(Tasks(batch(), batch()), prox, **options)

    def _support(self, phi: Tensor) -> Penalty:
        return self._penalty(phi @ self._x.mT - self._y)

    def _mean_outer(self, weights: Tensor) -> Tensor:
        """mean_j weights_j x_j x_j^T, ``[T, P, d, d]``."""
        found: Tensor = (weights @ self._outer).unflatten(-1, self._eye.shape)
        return found

    def solve(self, theta: Tensor, start: Tensor | None = None, tolerance: float = 1e-13) -> Tensor:
        """φ_i(θ): Newton steps; where one does not descend, a step on the majorant, which always does."""

        def energy(value: Tensor, phi: Tensor) -> Tensor:
            return value.mean(-1) + self.prox / 2 * (phi - theta).square().sum(-1)

        def step(weights: Tensor) -> Tensor:
            move: Tensor = torch.linalg.solve(self._mean_outer(weights) + self.prox * self._eye, -slope)
            return move

        phi = theta.expand(len(self._x), -1, -1) if start is None else start
        support = self._support(phi)
        for _ in range(500):
            slope = support.slope @ self._x / self._points + self.prox * (phi - theta)
            move, before = step(support.curvature), energy(support.value, phi)
            enough = before + 1e-4 * (slope * move).sum(-1) + 1e-14 * (1 + before)  # differences within round-off pass
            trial = self._support(phi + move)
            short = energy(trial.value, phi + move) > enough
            if bool(short.any()):
                move = torch.where(short[..., None], step(support.majorant), move)
                trial = self._support(phi + move)
            phi, support = phi + move, trial
            if bool((move.norm(dim=-1) <= tolerance * (1 + phi.norm(dim=-1))).all()):
                return phi
        raise NonFiniteError("the inner problems were not solved in 500 steps")

    def systems(self, phi: Tensor) -> Tensor:
        """A_i, ``[T, P, d, d]``."""
        return self._mean_outer(self._support(phi).curvature) + self.prox * self._eye

    def gradients(self, phi: Tensor) -> Tensor:
        """∇F_i, ``[T, P, d]``."""
        query = 2 * (phi @ self._xq.mT - self._yq) @ self._xq / self._points
        found: Tensor = self.prox * torch.linalg.solve(self.systems(phi), query)
        return found

    def hessians(self, phi: Tensor) -> Tensor:
        """∇²F_i, ``[T, P, d, d]``."""
        third = self._mean_outer(self._support(phi).change * (self.gradients(phi) @ self._x.mT))
        inverse = torch.linalg.inv(self.systems(phi))
        found: Tensor = inverse @ (self.prox**2 * self.query_hessian[:, None] - self.prox * third) @ inverse
        return found

    def differentiated(self) -> ExactMetaObjective:
        """Return the same problem for automatic differentiation, at one θ at a time."""

        def loss(model: nn.Module, batch: Batch) -> Tensor:
            return self._penalty(model(batch.inputs) - batch.targets).value.mean()

        model = nn.Linear(len(self._eye), 1, bias=False, dtype=self._x.dtype)
        return ExactMetaObjective(model, loss, self.tasks, self.prox, query_loss=squared_error)


class Points(NamedTuple):
    """Points of trajectories, flattened: θ ``[N, d]``, ||∇F||, ||Hess F||, the midpoint estimate, and their checks."""

    theta: Tensor
    gradient: Tensor
    exact: Tensor
    midpoint: Tensor
    bound: Tensor  # largest share of its bound that Hess F or a task's Hess F_i has at the point
    local_bound: Tensor  # the same with ||A_i^-1|| for 1 / (λ + μ)


def follow(problem: LinearTasks, settings: SmoothnessSettings, generator: Generator) -> Points:
    """Walk down from starts in random directions with normalised steps, and measure at every point."""
    shape = (settings.starts, settings.dimension)
    directions = nn.functional.normalize(torch.randn(shape, generator=generator, dtype=torch.float64))
    near, far = math.log10(settings.nearest), math.log10(settings.farthest)
    distance = torch.logspace(near, far, settings.starts, dtype=torch.float64)[:, None]
    theta, found = distance * directions, []
    for _ in range(settings.steps):
        phi = problem.solve(theta)
        gradient = problem.gradients(phi).mean(0)
        move = -settings.step_share * distance * nn.functional.normalize(gradient)
        change = problem.gradients(problem.solve(theta + move / 2)).mean(0) - gradient
        midpoint = change.norm(dim=-1) / (move / 2).norm(dim=-1)
        exact = torch.linalg.matrix_norm(problem.hessians(phi).mean(0), 2)
        found.append(Points(theta, gradient.norm(dim=-1), exact, midpoint, *shares_of_bounds(problem, phi)))
        theta = theta + move
    return Points(*map(torch.cat, zip(*found, strict=True)))


def shares_of_bounds(problem: LinearTasks, phi: Tensor) -> tuple[Tensor, Tensor]:
    """||Hess|| over its bound, the largest among the tasks and their mean, ``[P]``; second with the local bound."""
    hessians, gradients = problem.hessians(phi), problem.gradients(phi).norm(dim=-1)
    inner = problem.prox**2 * torch.linalg.matrix_norm(problem.query_hessian, 2)[:, None]
    inner = inner + problem.prox * problem.rho[:, None] * gradients

    def shares(bounds: Tensor) -> Tensor:
        mean = torch.linalg.matrix_norm(hessians.mean(0), 2) / bounds.mean(0)
        return torch.maximum((torch.linalg.matrix_norm(hessians, 2) / bounds).amax(0), mean)

    local = torch.linalg.matrix_norm(torch.linalg.inv(problem.systems(phi)), 2)
    return shares(inner / problem.prox**2), shares(inner * local**2)


def fit(gradient: Tensor, smoothness: Tensor) -> dict[str, float]:
    """Least squares for smoothness = L0 + L1 ||∇F||."""
    columns = torch.stack([torch.ones_like(gradient), gradient], 1)
    line = torch.linalg.lstsq(columns, smoothness[:, None]).solution[:, 0]
    unexplained = (smoothness - columns @ line).square().sum() / (smoothness - smoothness.mean()).square().sum()
    return {"L0": float(line[0]), "L1": float(line[1]), "r2": 1 - float(unexplained)}


def measure(settings: SmoothnessSettings, prox: float) -> tuple[Points, dict[str, Any]]:
    """All draws at one λ: the points, and the metrics."""
    parts, slopes, limits, error = [], [], [], 0.0
    for draw in range(settings.draws):
        generator = Generator().manual_seed(1000 * settings.seed + draw)  # the same tasks and starts for every λ
        problem = LinearTasks.draw(settings, prox, generator)
        parts.append(follow(problem, settings, generator))
        slopes.append(fit(parts[-1].gradient, parts[-1].exact)["L1"])
        limits.append(float(problem.rho.max()) / prox)
        if draw == 0:
            chosen, norms = differentiated(problem, parts[0], settings.checked)
            error = float(((parts[0].exact[chosen] - norms).abs() / norms).max())
    points = Points(*map(torch.cat, zip(*parts, strict=True)))
    return points, fit(points.gradient, points.exact) | {
        "prox": prox,
        "bound_violations": int((points.bound > 1 + 1e-9).sum()),
        "local_bound_violations": int((points.local_bound > 1 + 1e-9).sum()),
        "largest_share_of_bound": float(points.bound.max()),
        "largest_share_of_local_bound": float(points.local_bound.max()),
        "points": len(points.gradient),
        "midpoint": fit(points.gradient, points.midpoint),
        "L1_of_draws": slopes,
        "L1_bound": max(limits),
        "norm_ratio": float(points.exact.max() / points.exact.min()),
        "largest_gradient": float(points.gradient.max()),
        "closed_form_error": error,
    }


def differentiated(problem: LinearTasks, points: Points, number: int) -> tuple[Tensor, Tensor]:
    """Some of the points, evenly taken: their indices, and ||Hess F|| there by automatic differentiation."""
    chosen = torch.linspace(0, len(points.theta) - 1, number).long()
    objective = problem.differentiated()
    return chosen, torch.stack([torch.linalg.matrix_norm(objective.hessian(points.theta[k]), 2) for k in chosen])


def control(settings: SmoothnessSettings) -> dict[str, float]:
    """Fit a quadratic support loss, with automatic differentiation, as the closed form could only answer 0."""
    generator = Generator().manual_seed(1000 * settings.seed)
    problem = LinearTasks.draw(settings, settings.control_prox, generator, penalty=square)
    points = follow(problem, settings, generator)
    chosen, norms = differentiated(problem, points, 6 * settings.checked)
    return {"L1": fit(points.gradient[chosen], norms)["L1"], "L1_midpoint": fit(points.gradient, points.midpoint)["L1"]}


SUMMARY = """Exact meta-gradients and Hessians of linear regressions with a pseudo-Huber support loss and a squared \
query loss, along normalised descents from starts at distances {s.nearest:g} to {s.farthest:g}, in {s.draws} draws of \
the tasks. The spectral norm of Hess F rises with the norm of the meta-gradient, the more so the smaller λ: from its \
smallest to its largest value {first[norm_ratio]:.2g}-fold at λ = {first[prox]:g}, {last[norm_ratio]:.2g}-fold at \
λ = {last[prox]:g}. The reason: near the tasks' solutions the support loss is curved, the adapted parameters hardly \
follow θ, and F is flat; far away it is not, they follow θ, and F takes over the curvature of the query loss. There \
the norm levels off: a straight line is fitted to a curve that rises and saturates, hence r2 well below 1 at large λ. \
In single draws L1 grows with every decrease of λ in {monotone} of {s.draws}.

The bound holds at every point, for every task and for their mean. For the mean its right-hand side has the tasks' \
gradient norms: one in ||∇F|| alone follows only where the tasks' gradients differ by a bounded amount. With μ = 0 it \
is far from reached at small λ: no point has more than {last[largest_share_of_bound]:.2g} of it at λ = {last[prox]:g}, \
and the fitted L1 grows far slower than ρ / λ. With the inner Hessian at the point in place of λ, {local:.2g} of it is \
attained.

The midpoint formula sees the direction of the step only, so it mostly stays below the spectral norm. On the \
quadratic control, where Hess F is constant, it finds a slope of {quadratic[L1_midpoint]:.1g} for that reason; the \
exact norm finds none. The growth of L1 with falling λ ends where no start is far any more: at λ = {beyond[prox]:g} \
all of them are within reach of the inner solve, no meta-gradient exceeds {beyond[largest_gradient]:.2g}, and L1 is \
{beyond[L1]:.2g}."""


def run(settings: SmoothnessSettings, advance: Advance) -> Study:
    """Measure for every λ, then beyond the range, then the control."""
    shares, clouds, metrics = len(settings.prox) + 2, {}, dict[str, Any]()
    for index, prox in enumerate(settings.prox):
        clouds[prox], metrics[f"{prox:g}"] = measure(settings, prox)
        advance((index + 1) / shares)
    _, beyond = measure(settings, settings.beyond_prox)
    advance(1 - 1 / shares)
    quadratic = control(settings)
    advance(1.0)
    found = [metrics[f"{prox:g}"] for prox in settings.prox]
    monotone = sum(increasing(slopes) for slopes in zip(*(one["L1_of_draws"] for one in found), strict=True))
    local = max(one["largest_share_of_local_bound"] for one in found)
    summary = SUMMARY.format(
        s=settings, first=found[0], last=found[-1], monotone=monotone, local=local, quadratic=quadratic, beyond=beyond
    )
    results = {"by_lambda": metrics, "quadratic": quadratic, "beyond": beyond, "monotone_draws": monotone}
    figures = {
        "smoothness": (scatter(clouds, metrics), SCATTER_CAPTION),
        "smoothness_constants": (constants(settings, found), CONSTANTS_CAPTION),
    }
    return Study("smoothness", "Smoothness of the meta-objective", summary, claims(found, quadratic), results, figures)


def increasing(values: Sequence[float]) -> bool:
    """Whether every value exceeds the one before."""
    return all(before < after for before, after in pairwise(values))


def claims(found: list[dict[str, Any]], quadratic: dict[str, float]) -> list[Claim]:
    """Hold the metrics, λ falling, against the paper."""
    slopes = [one["L1"] for one in found]
    violations = sum(one["bound_violations"] + one["local_bound_violations"] for one in found)
    growth = Claim(
        "The smoothness of the MAML objective grows with the norm of the meta-gradient",
        "L1 > 0, growing as λ falls",
        "L1 = " + ", ".join(f"{slope:.2g}" for slope in slopes),
        min(slopes) > 0 and increasing(slopes),
    )
    bound = Claim(
        "||Hess F|| <= L0 + L1 ||∇F|| with L1 <= ρλ / (λ + μ)^2, every task and the mean, constant and local",
        "no point above",
        f"{violations} of {sum(one['points'] for one in found)} points above",
        violations == 0,
    )
    flat = Claim(
        "A quadratic support loss can not show the effect",
        "|L1| <= 1e-6",
        f"|L1| = {abs(quadratic['L1']):.1g}",
        abs(quadratic["L1"]) <= 1e-6,
    )
    return [growth, bound, flat]


SCATTER_CAPTION = (
    "Local smoothness of F against the norm of the meta-gradient, at all points of all draws. The fitted line is "
    "curved on logarithmic axes; least squares weigh the large values, so it lies above the small ones."
)
CONSTANTS_CAPTION = (
    "Fitted L1 against λ, all draws together (bars: smallest and largest of single draws), and the bound ρ / λ."
)


def scatter(clouds: dict[float, Points], metrics: dict[str, Any]) -> Figure:
    """One panel for each λ, all on the same vertical scale."""
    made, axes = figure(len(clouds), width=1.9, height=2.9)
    dots: dict[str, Any] = {"marker": ".", "ls": "", "ms": 3, "mew": 0, "alpha": 0.5, "rasterized": True}
    for axis, (prox, points) in zip(axes, clouds.items(), strict=True):
        line = metrics[f"{prox:g}"]
        axis.plot(points.gradient, points.exact, color="#0072b2", label="exact ‖Hess F‖", **dots)
        axis.plot(points.gradient, points.midpoint, color="#e69f00", label="midpoint estimate", **dots)
        grid = torch.logspace(float(points.gradient.min().log10()), float(points.gradient.max().log10()), 100)
        axis.plot(grid, line["L0"] + line["L1"] * grid, color="#222222", lw=1.2, label="L0 + L1 ‖∇F‖, fitted to exact")
        axis.set(xscale="log", yscale="log", ylim=(1e-4, 300), xlabel="‖∇F‖")
        axis.set_title(f"λ = {prox:g}", fontsize=10)
        axis.text(0.03, 0.84, f"L1 = {line['L1']:.2g}\nr² = {line['r2']:.2f}", transform=axis.transAxes)
        axis.tick_params(which="minor", bottom=False)
        axis.tick_params(labelleft=axis is axes[0])
    axes[0].set_ylabel("local smoothness of F")
    handles, labels = axes[0].get_legend_handles_labels()
    made.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False, markerscale=4)
    return made


def constants(settings: SmoothnessSettings, found: list[dict[str, Any]]) -> Figure:
    """L1 against λ."""
    made, (axis,) = figure()
    axis.plot(settings.prox, [one["L1_bound"] for one in found], color="#7f7f7f", label="bound ρ / λ")
    fitted, draws = [one["L1"] for one in found], [one["L1_of_draws"] for one in found]
    spread = [
        [a - min(b) for a, b in zip(fitted, draws, strict=True)],
        [max(b) - a for a, b in zip(fitted, draws, strict=True)],
    ]
    axis.errorbar(settings.prox, fitted, spread, fmt="o-", ms=4, color="#0072b2", capsize=3, label="fitted to exact")
    midpoint = [one["midpoint"]["L1"] for one in found]
    axis.plot(settings.prox, midpoint, "s--", ms=4, color="#e69f00", label="fitted to midpoint estimates")
    axis.set(xscale="log", yscale="log", xlabel="proximal weight λ", ylabel="L1")
    axis.legend(frameon=False)
    return made
