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

from dataclasses import dataclass

from torch import Tensor

from metanudge import tree
from metanudge.types import InnerGradients, LossGradients, Params, Role


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

    def forces(self, phi: Params, step: int) -> tuple[Params, Params]:
        """The two parts of ∂E/∂φ, which balance at the solution: ∇f̂ + ν ∇f, and λ (φ - θ)."""
        weights: dict[Role, float | Tensor] = {Role.SUPPORT: 1.0}
        if self.nu is not None and self.slope is None:
            weights[Role.QUERY] = self.nu
        pull = self.losses.gradient(weights, phi, step)
        if self.nu is not None and self.slope is not None:
            pull = tree.axpy(self.nu, self.slope, pull)
        return pull, self.push(phi)

    def push(self, phi: Params) -> Params:
        """λ (φ - θ)."""
        return tree.scale(self.prox, tree.subtract(phi, self.theta))

    def gradient(self, phi: Params, step: int) -> Params:
        """∂E/∂φ = ∇f̂ + ν ∇f + λ (φ - θ)."""
        return tree.add(*self.forces(phi, step))

    def relative_residual(self, pull: Params, push: Params) -> Tensor:
        """How far the two forces are from balance: ||p + q|| / (||p|| + ||q||) in [0, 1]; 0 solved, 1 not begun.

        NaN without a proximal term: there is then nothing to balance the losses' force, and no scale to compare it to.
        """
        if self.prox == 0:
            return self.norm(pull) * float("nan")
        total = self.norm(pull) + self.norm(push)
        return self.norm(tree.add(pull, push)) / total.clamp_min(1e-30)

    def norm(self, a: Params) -> Tensor:
        """Euclidean norm, ``[*L]``."""
        return self.losses.inner(a, a).sqrt()


@dataclass(frozen=True)
class InnerProblem:
    """A task, or a stack of them, as an estimator sees it.

    Attributes:
        losses: Gradients of f̂ and f in all parameters.
        theta: The initialisation, ``[*L, *shape]`` up to broadcasting.
        prox: λ >= 0.
        tasks: How many tasks the lanes hold.
        start: Where the free solve begins, a lane a task; None for θ.
    """

    losses: LossGradients
    theta: Params
    prox: float
    tasks: int = 1
    start: Params | None = None

    def energy(self, nu: Tensor | None = None, slope: Params | None = None) -> Energy:
        """E(·; θ, ν); free without ``nu``, linearly nudged with ``slope``."""
        return Energy(self.losses, self.theta, self.prox, nu, slope)

    def meta_partial(self, energy: Energy, phi: Params, step: int) -> Params:
        """∂E/∂ω: ∂E/∂θ = λ (θ - φ) and, where parameters are shared, ∂E/∂w = ∂f̂/∂w + ν ∂f/∂w (linear nudge: ∂f̂/∂w)."""
        if not self.losses.shared:
            return tree.scale(-1.0, energy.push(phi))
        return self.partials(energy, phi, step)[0]

    def partials(self, energy: Energy, phi: Params, step: int) -> tuple[Params, Params]:
        """∂E/∂ω, and ∂E/∂φ, from one gradient of each loss."""
        _, pull = self.losses.value_and_all_gradients(Role.SUPPORT, phi, step)
        if energy.nu is not None and energy.slope is None:
            _, query = self.losses.value_and_all_gradients(Role.QUERY, phi, step)
            pull = tree.axpy(energy.nu, query, pull)
        push = energy.push(phi)
        force = {name: pull[name] + push[name] for name in phi}
        if energy.nu is not None and energy.slope is not None:
            force = tree.axpy(energy.nu, energy.slope, force)
        return tree.scale(-1.0, push) | {name: pull[name] for name in self.losses.shared}, force
