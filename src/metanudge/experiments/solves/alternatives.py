r"""The inner solvers that were considered and are not in the library, each as a ``solvers.loop.Solver``.

All of them take every problem's own curvature for a scale, so that nothing is tuned by hand: L from the library's
``lipschitz_constant`` at the start (6 gradients, as ``Nesterov``), and the proximal weight λ, which bounds the
curvature of a convex problem from below. Below, g = ∇E(φ) and L' = 1.2 L + λ. Decisions are not replayed: a nudged
solve decides anew, which is part of what the study shows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor
from torch.func import functional_call, vjp, vmap

from metanudge import tree
from metanudge.curvature import lipschitz_constant
from metanudge.energy import Energy
from metanudge.oracle import StackedLosses
from metanudge.settings import check_steps
from metanudge.solvers import Nesterov
from metanudge.solvers.nesterov import Decision
from metanudge.solvers.nesterov import State as NesterovState
from metanudge.types import Need, Params, PyTree, Schedule


@dataclass(frozen=True)
class Alternative:
    """What they share: L measured at the start, all steps taken, every state has its iterate under ``phi``."""

    differentiable: ClassVar[bool] = True
    needs: ClassVar[frozenset[Need]] = frozenset({Need.PROXIMAL_TERM})

    steps: int

    def __post_init__(self) -> None:
        check_steps(self.steps)

    def plan(self, energy: Energy, start: Params) -> Tensor:
        """L, ``[*L]``."""
        with torch.no_grad():
            return lipschitz_constant(energy, tree.detach(start), 5, step=0)

    def settle(self, schedule: Schedule, steps: int) -> Schedule:
        """Nudged solves decide for themselves."""
        return schedule._replace(decisions=[None] * steps)

    def point(self, state: Any) -> Params:
        """The iterate."""
        phi: Params = state.phi
        return phi

    def finished(self, state: Any) -> bool:
        """All steps are always taken."""
        return False


def safe_lr(energy: Energy, constant: Tensor) -> Tensor:
    """1 / L'."""
    return 1 / (1.2 * constant + energy.prox)


class Point(NamedTuple):
    """An iterate alone."""

    phi: Params


@dataclass(frozen=True)
class SafeGradientDescent(Alternative):
    r"""Gradient descent with a = 1 / L'. Source: Cauchy, Comptes rendus (1847)."""

    def init(self, energy: Energy, start: Params, plan: Tensor) -> Point:
        """Begin."""
        return Point(start)

    def step(self, energy: Energy, plan: Tensor, state: Point, index: int, decision: None) -> tuple[Point, None]:
        """One step downhill."""
        return Point(tree.axpy(-safe_lr(energy, plan), energy.gradient(state.phi, index), state.phi)), None


class Moving(NamedTuple):
    """An iterate and the one before."""

    phi: Params
    before: Params


@dataclass(frozen=True)
class HeavyBall(Alternative):
    r"""Polyak's momentum, at its optimum for a quadratic with curvature in [λ, L'].

    .. math::
        \phi_{k+1} = \phi_k - a g_k + \beta (\phi_k - \phi_{k-1}), \qquad
        a = \frac{4}{(\sqrt{L'} + \sqrt\lambda)^2}, \quad
        \beta = \Bigl(\frac{\sqrt{L'} - \sqrt\lambda}{\sqrt{L'} + \sqrt\lambda}\Bigr)^2

    Source: Polyak, USSR Comput. Math. Math. Phys. 4 (1964).
    """

    def init(self, energy: Energy, start: Params, plan: Tensor) -> Moving:
        """Begin at rest."""
        return Moving(start, start)

    def step(self, energy: Energy, plan: Tensor, state: Moving, index: int, decision: None) -> tuple[Moving, None]:
        """One step."""
        high, low = (1.2 * plan + energy.prox).sqrt(), energy.prox**0.5
        lr, momentum = 4 / (high + low) ** 2, ((high - low) / (high + low)) ** 2
        phi = tree.axpy(-lr, energy.gradient(state.phi, index), state.phi)
        return Moving(tree.axpy(momentum, tree.subtract(state.phi, state.before), phi), state.phi), None


class Secant(NamedTuple):
    """An iterate, and the one before with its gradient (None before the first step)."""

    phi: Params
    before: Params | None
    slope: Params | None


@dataclass(frozen=True)
class BarzilaiBorwein(Alternative):
    r"""Gradient descent whose step is the inverse of the curvature along the last step.

    .. math::
        s = \phi_k - \phi_{k-1}, \quad y = g_k - g_{k-1}, \qquad
        a = \frac{\langle s, s \rangle}{\langle s, y \rangle} \text{ (long)}, \qquad
        a = \frac{\langle s, y \rangle}{\langle y, y \rangle} \text{ (short)}

    Safeguards: \|s\| / \|y\| where <s, y> is not positive, and a at most 1 / λ.

    Source: Barzilai & Borwein, IMA J. Numer. Anal. 8 (1988); no line search, as there.
    """

    kind: Literal["long", "short"] = "long"

    def init(self, energy: Energy, start: Params, plan: Tensor) -> Secant:
        """The first step is the safe one."""
        return Secant(start, None, None)

    def step(self, energy: Energy, plan: Tensor, state: Secant, index: int, decision: None) -> tuple[Secant, None]:
        """One step; its size is no part of a graph, as in the library."""
        gradient = energy.gradient(state.phi, index)
        lr = safe_lr(energy, plan)
        if state.before is not None and state.slope is not None:
            with torch.no_grad():
                s, y = tree.subtract(state.phi, state.before), tree.subtract(gradient, state.slope)
                ss, sy, yy = (energy.losses.inner(*pair) for pair in ((s, s), (s, y), (y, y)))
                ratio = ss / sy if self.kind == "long" else sy / yy
                ratio = torch.where(sy > 0, ratio, (ss / yy).sqrt())
                lr = torch.where((ss > 0) & (yy > 0), ratio.clamp_max(1 / energy.prox), lr)
        return Secant(tree.axpy(-lr, gradient, state.phi), state.phi, gradient), None


class History(NamedTuple):
    """An iterate, and the last iterates with their safe steps -g / L'."""

    phi: Params
    past: list[tuple[Params, Params]]


@dataclass(frozen=True)
class Anderson(Alternative):
    r"""Anderson's mixing of the last iterates of gradient descent, r = -g / L'.

    .. math::
        \phi_{k+1} = \phi_k + r_k - (\Delta \Phi + \Delta R) \gamma, \qquad
        \gamma = \arg\min \|r_k - \Delta R \gamma\|^2 + \rho \, \mathrm{tr}(\Delta R^\top \Delta R) \|\gamma\|^2

    ρ = 10 unit round-offs: what the Gram matrix can tell.

    Source: Anderson, J. ACM 12 (1965); Walker & Ni, SIAM J. Numer. Anal. 49 (2011).
    """

    memory: int = 5

    def init(self, energy: Energy, start: Params, plan: Tensor) -> History:
        """Nothing to mix."""
        return History(start, [])

    def step(self, energy: Energy, plan: Tensor, state: History, index: int, decision: None) -> tuple[History, None]:
        """Mix."""
        move = tree.scale(-safe_lr(energy, plan), energy.gradient(state.phi, index))
        past = [*state.past, (state.phi, move)][-self.memory - 1 :]
        phi = tree.add(state.phi, move)
        ways = [(tree.subtract(b[0], a[0]), tree.subtract(b[1], a[1])) for a, b in pairwise(past)]
        if ways:
            weights = self._weights(energy, [change for _, change in ways], move)
            for weight, (way, change) in zip(weights.unbind(-1), ways, strict=True):
                phi = tree.axpy(-weight, tree.add(way, change), phi)
        return History(phi, past), None

    def _weights(self, energy: Energy, changes: list[Params], move: Params) -> Tensor:
        """γ, ``[*L, m]``."""
        inner = energy.losses.inner
        gram = torch.stack([torch.stack([inner(a, b) for b in changes], -1) for a in changes], -2)
        right = torch.stack([inner(a, move) for a in changes], -1)
        unit = 10 * torch.finfo(gram.dtype).eps
        trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None].clamp_min(1e-30)
        matrix = (gram / trace[..., None]).double() + unit * torch.eye(len(changes), dtype=torch.float64)
        solved: Tensor = torch.linalg.solve_ex(matrix, (right / trace).double()[..., None])[0]
        return solved[..., 0]


class Pair(NamedTuple):
    """A step s, the change y of the gradient along it, and 1 / <s, y>; all zero in lanes without a useful one."""

    s: Params
    y: Params
    rho: Tensor


class Memory(NamedTuple):
    """The inverse Hessian as L-BFGS knows it: the last pairs on top of a multiple of the identity."""

    pairs: list[Pair]
    initial: Tensor

    def times(self, energy: Energy, vector: Params) -> Params:
        """The two-loop recursion."""
        inner, weights = energy.losses.inner, []
        for pair in reversed(self.pairs):
            weights.append(pair.rho * inner(pair.s, vector))
            vector = tree.axpy(-weights[-1], pair.y, vector)
        vector = tree.scale(self.initial, vector)
        for pair, weight in zip(self.pairs, reversed(weights), strict=True):
            vector = tree.axpy(weight - pair.rho * inner(pair.y, vector), pair.s, vector)
        return vector


class Trust(NamedTuple):
    """A trial point; then, None before the first step: the point it was tried from, its gradient, and what is known."""

    phi: Params
    anchor: Params | None
    slope: Params | None
    memory: Memory | None
    radius: Tensor | None


@dataclass(frozen=True)
class LBFGS(Alternative):
    r"""Limited-memory BFGS with unit steps and, for want of a line search in step with all tasks, three guards.

    A pair enters the memory where <s, y> > λ/10 ||s||^2: the curvature of a convex problem is at least λ. A step is no
    longer than ||g|| / λ, which a convex problem's distance to its solution is not. Where ||g|| more than doubles, the
    step is taken back and the next one is at most a quarter as long.

    Args:
        steps: Number of steps.
        memory: Pairs kept.
        frozen: Let nudged solves keep the free solve's last memory, as a constant preconditioner of plain steps; that
            makes them the same affine map, as matched solves have to be.

    Source: Liu & Nocedal, Math. Program. 45 (1989); the test of a pair: Li & Fukushima, SIAM J. Optim. 11 (2001).
    """

    memory: int = 8
    frozen: bool = False

    def init(self, energy: Energy, start: Params, plan: Tensor) -> Trust:
        """Know nothing."""
        return Trust(start, None, None, None, None)

    def step(
        self, energy: Energy, plan: Tensor, state: Trust, index: int, decision: Memory | None
    ) -> tuple[Trust, Memory | None]:
        """Judge the trial point, learn from it, and try the next."""
        gradient = energy.gradient(state.phi, index)
        if decision is not None:
            phi = tree.subtract(state.phi, decision.times(energy, gradient))
            return Trust(phi, None, None, None, None), decision
        anchor, slope, memory, radius = self._learn(energy, plan, state, gradient)
        direction = memory.times(energy, slope)
        longest = torch.minimum(radius, energy.norm(slope) / energy.prox)
        share = (longest / energy.norm(direction).clamp_min(1e-30)).clamp_max(1.0)
        phi = tree.axpy(-share, direction, anchor)
        return Trust(phi, anchor, slope, memory, radius), memory if self.frozen else None

    def _learn(
        self, energy: Energy, plan: Tensor, state: Trust, gradient: Params
    ) -> tuple[Params, Params, Memory, Tensor]:
        if state.anchor is None or state.slope is None or state.memory is None or state.radius is None:
            safe = safe_lr(energy, plan)
            return state.phi, gradient, Memory([], safe), torch.full_like(safe, torch.inf)
        s, y = tree.subtract(state.phi, state.anchor), tree.subtract(gradient, state.slope)
        ss, sy, yy = (energy.losses.inner(*pair) for pair in ((s, s), (s, y), (y, y)))
        told = sy > 0.1 * energy.prox * ss  # false where anything is not finite
        none, one = tree.zeros(s), torch.ones_like(sy)
        sy, yy = torch.where(told, sy, one), torch.where(told, yy, one)
        pair = Pair(tree.select(told, s, none), tree.select(told, y, none), torch.where(told, 1 / sy, 0 * one))
        memory = Memory([*state.memory.pairs, pair][-self.memory :], torch.where(told, sy / yy, state.memory.initial))
        kept = energy.norm(gradient) <= 2 * energy.norm(state.slope)
        anchor, slope = tree.select(kept, state.phi, state.anchor), tree.select(kept, gradient, state.slope)
        return anchor, slope, memory, torch.where(kept, 2 * state.radius, ss.sqrt() / 4)

    def settle(self, schedule: Schedule, steps: int) -> Schedule:
        """Frozen: the last memory in every step."""
        return schedule._replace(decisions=[schedule.decisions[-1]] * steps)


Products = Callable[[Params], Callable[[Params], Params]]
"""From a point to products with the Gauss-Newton matrix there."""


def gauss_newton_products(losses: StackedLosses) -> Products:
    r"""Products with 2/n JᵀJ, J the Jacobian of the n predictions, for ``metrics.squared_error``.

    By reverse mode twice; counted as 2 gradients, as every product in the library.
    """
    model = losses.call.model

    def one(packed: Params, vector: Params, inputs: PyTree) -> Params:
        def predict(packed: Params) -> Tensor:
            prediction: Tensor = functional_call(model, losses.packing.unpack(packed), (inputs,))
            return prediction

        prediction, pull = vjp(predict, packed)[:2]
        # J v as the transpose of u -> Jᵀu: forward mode would compile decompositions first
        (change,) = vjp(lambda u: pull(u)[0], torch.zeros_like(prediction))[1](vector)
        (image,) = pull(2 / prediction.numel() * change)
        product: Params = image
        return product

    def at(phi: Params) -> Callable[[Params], Params]:
        def times(vector: Params) -> Params:
            losses.count(2 * next(iter(vector.values())).shape[1])
            over_nodes = vmap(one, in_dims=(0, 0, None))
            here = tree.tree_map(lambda a, b: a.expand_as(b), phi, vector)
            found: Params = vmap(over_nodes)(here, vector, losses.tasks.support.inputs)
            return found

        return times

    return at


class Damped(NamedTuple):
    """A trial point; then, None before the first step: the point it was tried from, its gradient, and the damping."""

    phi: Params
    anchor: Params | None
    slope: Params | None
    damping: Tensor | None


@dataclass(frozen=True)
class GaussNewton(Alternative):
    r"""Damped Gauss-Newton steps d, (2/n JᵀJ + λ + μ) d = -g, by conjugate gradients from zero.

    μ is 0 as long as ||g|| falls; where it rises the step is taken back and μ becomes 4 max(μ, λ), else μ / 4. The
    products know one stack of tasks and its model: seam 2 shows a solver losses, and no residuals. For squared errors.
    Cost of a step: 1 gradient and 2 a step of conjugate gradients; nothing is measured at the start.

    Source: Levenberg, Quart. Appl. Math. 2 (1944); by products: Schraudolph, Neural Computation 14 (2002).
    """

    differentiable: ClassVar[bool] = False

    products: Products
    inner_steps: int = 8

    def plan(self, energy: Energy, start: Params) -> Tensor:
        """Nothing to measure."""
        return torch.zeros(())

    def init(self, energy: Energy, start: Params, plan: Tensor) -> Damped:
        """Know nothing."""
        return Damped(start, None, None, None)

    def step(self, energy: Energy, plan: Tensor, state: Damped, index: int, decision: None) -> tuple[Damped, None]:
        """Judge the trial point, solve the linear system, and go there."""
        phi, gradient = state.phi, energy.gradient(state.phi, index)
        norm = energy.norm(gradient)
        damping = torch.zeros_like(norm)
        if state.anchor is not None and state.slope is not None and state.damping is not None:
            fell = norm <= energy.norm(state.slope)
            phi, gradient = tree.select(fell, phi, state.anchor), tree.select(fell, gradient, state.slope)
            damping = torch.where(fell, state.damping / 4, 4 * state.damping.clamp_min(energy.prox))
        inner, product = energy.losses.inner, self.products(phi)
        rest = tree.scale(-1.0, gradient)
        found, way, square = tree.zeros(rest), rest, inner(rest, rest)
        for _ in range(self.inner_steps):
            image = tree.axpy(energy.prox + damping, way, product(way))
            length = square / inner(way, image).clamp_min(1e-30)
            found, rest = tree.axpy(length, way, found), tree.axpy(-length, image, rest)
            last, square = square, inner(rest, rest)
            way = tree.axpy(square / last.clamp_min(1e-30), way, rest)
        return Damped(tree.add(phi, found), phi, gradient, damping), None


@dataclass(frozen=True)
class FixedNesterov(Nesterov):
    """The library's solver with L as measured at the start: nothing is learnt on the way."""

    def step(
        self, energy: Energy, plan: Tensor | None, state: NesterovState, index: int, decision: Decision | None
    ) -> tuple[NesterovState, Decision]:
        """Forget the last secant."""
        return super().step(energy, plan, state._replace(secant=None), index, decision)
