r"""The inner problem and its partial derivatives, equation by equation. No loops.

.. math::
    E(\phi; \theta, w, \nu) = \hat f(\phi, w) + \nu f(\phi, w) + \tfrac{\lambda}{2} \|\phi - \theta\|^2

support loss f̂, query loss f, initialisation θ, adapted parameters φ, other trainable (shared) parameters w, proximal
weight λ, nudge ν. With φ(ν) = argmin E, the meta-objective is F = f(φ(0), w), and by the envelope theorem and the
symmetry of mixed derivatives its gradient in any meta-parameter ω = (θ, w) is

.. math::
    \nabla_\omega F = \frac{d}{d\nu} \frac{\partial E}{\partial \omega} (\phi(\nu); \omega, \nu) \Big|_{\nu = 0}

The *linear* nudge replaces ν f(φ, w) by ν <∇f(φ₀), φ>, φ₀ = φ(0): the same first-order solution φ(ν), one query
gradient in all, and exact at any ν when f̂ is quadratic. Its energy no longer holds f's own dependence on w, which is
added once as ∂f/∂w(φ₀).

Source: Chayti & Jaggi, arXiv:2409.03682; linear nudge: Domke, AISTATS 2010 (there for unrolled inference).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from torch import Tensor, where

from metanudge import tree
from metanudge.losses import InnerGradients, LossGradients
from metanudge.together import same
from metanudge.types import Params, PyTree, Role


class Balance(NamedTuple):
    """How near φ is to a solution.

    Attributes:
        residual: ||p + q|| / (||p|| + ||q||) in [0, 1], ``[*L]``: 0 solved, 1 not begun. NaN without a proximal term:
            there is then nothing to balance the losses' force, and no scale to compare it to.
        pull: Norm of the losses' force, ``[*L]``.
        way: ||φ - θ||, ``[*L]``.
    """

    residual: Tensor
    pull: Tensor
    way: Tensor


@dataclass(frozen=True)
class Energy:
    """What an inner solver minimises: E(·; θ, ν) of one task, or of a stack of them.

    Attributes:
        losses: Gradients of f̂ and f.
        theta: The proximal centre, ``[*L, *shape]`` up to broadcasting.
        prox: λ >= 0.
        nu: None for the free problem, otherwise the nudge ``[*L]``.
        slope: None for the full nudge ν f, otherwise ∇f(φ₀) of the linear one.
    """

    losses: InnerGradients
    theta: Params
    prox: float
    nu: Tensor | None = None
    slope: Params | None = None

    def fused(self, name: Hashable, function: Callable[..., Any], *given: PyTree) -> Any:
        """``function(energy, *given)``, as one program where gradients are compiled (``InnerGradients.fused``)."""

        def at(losses: InnerGradients, tensors: PyTree) -> PyTree:
            (theta, nu, slope), own = tensors
            return function(replace(self, losses=losses, theta=theta, nu=nu, slope=slope), *own)

        return self.losses.fused((name, self.prox), at, ((self.theta, self.nu, self.slope), given))

    def lanes(self, phi: Params) -> Params:
        """``phi`` with a copy for every node of the nudge."""
        nu = self.nu
        if nu is None or nu.ndim == 0:
            return phi
        return tree.tree_map(lambda leaf: leaf.expand(*nu.shape, *leaf.shape[nu.ndim :]), phi)

    def pull(self, phi: Mapping[str, Tensor], step: int) -> Params:
        """∇f̂ + ν ∇f."""
        weights: dict[Role, float | Tensor] = {Role.SUPPORT: 1.0}
        if self.nu is not None and self.slope is None:
            weights[Role.QUERY] = self.nu
        pull = self.losses.gradient(weights, phi, step)
        if self.nu is not None and self.slope is not None:
            nu = self.nu
            pull = tree.spend(lambda force, slope: force.addcmul(tree.over(nu, slope), slope), pull, self.slope)
        return pull

    def push(self, phi: Params) -> Params:
        """λ (φ - θ)."""
        return tree.compute(self._spring, phi, self.theta)

    def spend_push(self, phi: Params) -> Params:
        """-λ (φ - θ), part by part in the place of φ, which is emptied: of a large model there is no room for both."""
        return tree.spend(lambda p, t: self._spring(t, p), phi, self.theta)

    def _spring(self, end: Tensor, centre: Tensor) -> Tensor:
        return (end - centre).mul_(self.prox)

    def gradient(self, phi: Mapping[str, Tensor], step: int) -> Params:
        """∂E/∂φ = ∇f̂ + ν ∇f + λ (φ - θ)."""
        return self._total(self.pull(phi, step), phi, self.losses.plus)

    def total(self, pull: Params, phi: Params) -> Params:
        """∂E/∂φ from ∇f̂ + ν ∇f, which stays as it is, and is what is returned where φ is θ itself."""
        return self._total(dict(pull), phi, lambda force, way, alpha: force.add(way, alpha=alpha))

    def _total(self, pull: Params, phi: Mapping[str, Tensor], plus: Callable[..., Tensor]) -> Params:
        """The sum, and ``pull`` is emptied. Where φ is θ itself, as solves begin, the spring is slack."""

        def of(force: Tensor, p: Tensor, t: Tensor) -> Tensor:
            return force if same(p, t) else plus(force, p - t, alpha=self.prox)

        return tree.spend(of, pull, phi, self.theta)

    def balance(self, pull: Params, phi: Params) -> Balance:
        """How far the two parts of ∂E/∂φ, p of the losses and q of the spring, are from balance.

        Part by part: no copy of the parameters is made.
        """

        def squares(force: Tensor, p: Tensor, t: Tensor) -> list[Tensor]:
            way = p - t
            rest = force.add(way, alpha=self.prox)
            return [self.losses.share(leaf, leaf) for leaf in (rest, force, way)]

        rows = [squares(*given) for given in self.losses.operands(pull, phi, self.theta)]
        rest, forward, way = (self.losses.added(column).sqrt() for column in zip(*rows, strict=True))
        forces = forward + self.prox * way
        return Balance(rest / tree.or_one(forces) if self.prox > 0 else rest * math.nan, forward, way)

    def touched(self, a: Params, by: Params, norm: Tensor) -> Tensor:
        """Norm of ``a`` in the parameters that the gradient ``by``, of this ``norm``, touches, ``[*L]``.

        Far below its root mean square a gradient is round-off, as that of a bias before a BatchNorm layer, where it is
        not zero by chance. (That of θ: what is computed in narrow precision may be added up in a wider one.) Part by
        part, so that no copy is made.
        """
        number = sum(leaf.numel() for leaf in by.values()) / norm.numel()
        least = tree.round_off(self.theta) ** (2 / 3) / number**0.5 * norm

        def square(leaf: Tensor, gradient: Tensor) -> Tensor:
            part = tree.touched(leaf, gradient, least)
            return self.losses.share(part, part)

        both = {name: a[name] for name in by if name in a}
        return self.losses.added([square(*given) for given in self.losses.operands(both, by)]).sqrt()

    def length(self, phi: Params, gradient: Params, norm: Tensor, reach: Tensor, start_loss: Tensor) -> Tensor:
        r"""Reference length for φ, ``[*L]``: displacements are fractions of it.

        The norm of the parameters that ``gradient``, of this ``norm``, touches, but at least ε^(1/4) times the way
        ``reach`` that the support loss drives φ from θ, so that a φ of nothing but round-off is no scale. Where
        neither is there, at a stationary φ = 0, the loss ``start_loss``, f̂(θ), has to give it: a tenth of
        \sqrt{2 |f̂(θ)| / λ}, as far as a solution can lie from θ where f̂ >= 0.
        """
        unit = tree.round_off(self.theta)
        length = self.touched(phi, gradient, norm).maximum(unit**0.25 * reach)
        if self.prox > 0:
            other = (2 * start_loss.abs() / self.prox).sqrt() / 10
            length = where(length > unit**0.75 * other, length, other)
        return tree.or_one(length)  # no scale whatever

    def norm(self, a: Params) -> Tensor:
        """Euclidean norm, ``[*L]``."""
        return self.losses.inner(a, a).sqrt()

    def distance(self, a: Params, b: Params) -> Tensor:
        """||a - b||, ``[*L]``, part by part: no copy of the difference is made."""
        ways = (one - other for one, other in self.losses.operands(a, b))
        return self.losses.added([self.losses.share(way, way) for way in ways]).sqrt()


@dataclass(frozen=True)
class InnerProblem:
    """A task, or a stack of them, as an estimator sees it.

    Attributes:
        losses: Gradients of f̂ and f in all parameters.
        theta: The initialisation, ``[*L, *shape]`` up to broadcasting.
        prox: λ >= 0.
        tasks: How many tasks the lanes hold.
        start: Where the free solve begins, a lane a task; None for θ.
        round_off: Relative round-off of gradients, where it is above that of the numbers they come in.
        radius: How far from the solution the query gradient is taken, relative to the solution's way from θ.
    """

    losses: LossGradients
    theta: Params
    prox: float
    tasks: int = 1
    start: Params | None = None
    round_off: float = 0.0
    radius: float = 0.0

    @property
    def initial(self) -> Params:
        """θ on every lane, where solves begin."""
        return self.losses.spread(self.theta)

    @property
    def sampled(self) -> bool:
        """Whether f̂ is seen through minibatches, so that nothing can be certified."""
        return self.losses.sampled

    def energy(self, nu: Tensor | None = None, slope: Params | None = None) -> Energy:
        """E(·; θ, ν); free without ``nu``, linearly nudged with ``slope``."""
        return Energy(self.losses, self.theta, self.prox, nu, slope)

    def unit(self, phi: Params) -> float:
        """Unit of round-off of a solution and of the gradients there."""
        return max(tree.round_off(phi), self.round_off)

    def meta_partial(self, energy: Energy, phi: Params, step: int) -> Params:
        """∂E/∂ω: ∂E/∂θ = λ (θ - φ) and, where parameters are shared, ∂E/∂w = ∂f̂/∂w + ν ∂f/∂w (linear nudge: ∂f̂/∂w).

        It empties ``phi``.
        """
        shared = self.losses.shared
        pull = self._pull_on_all(energy, phi, step) if shared else {}
        return energy.spend_push(phi) | {name: pull[name] for name in shared}

    def partials(self, energy: Energy, phi: Params, step: int) -> tuple[Params, Params]:
        """∂E/∂ω, and ∂E/∂φ, from one gradient of each loss."""
        pull = self._pull_on_all(energy, phi, step)
        push = energy.push(phi)
        force = tree.add(push, pull)
        if energy.nu is not None and energy.slope is not None:
            force = tree.axpy(energy.nu, energy.slope, force)
        return tree.scale(-1.0, push) | {name: pull[name] for name in self.losses.shared}, force

    def _pull_on_all(self, energy: Energy, phi: Params, step: int) -> Params:
        """∇f̂ and, with the full nudge, ν ∇f in adapted and shared parameters."""
        _, pull = self.losses.value_and_all_gradients(Role.SUPPORT, phi, step)
        if energy.nu is not None and energy.slope is None:
            _, query = self.losses.value_and_all_gradients(Role.QUERY, phi, step)
            nu = energy.nu
            pull = tree.spend(lambda support, query: support + tree.over(nu, query) * query, pull, query)
        return pull
