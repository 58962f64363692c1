"""Damped Gauss-Newton steps, for squared errors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.func import functional_call, vjp, vmap

from metanudge import tree
from metanudge.energy import Energy
from metanudge.experiments.solves.alternatives.common import Alternative
from metanudge.oracle import StackedLosses
from metanudge.types import Params, PyTree

Products = Callable[[Params], Callable[[Params], Params]]
"""From a point to products with the Gauss-Newton matrix there."""


def gauss_newton_products(losses: StackedLosses) -> Products:
    r"""Products with 2/n JᵀJ, J the Jacobian of the n predictions, for ``metrics.squared_error``.

    By reverse mode twice; counted as 2 gradients, as every product in the library.
    """
    model = losses.forward.call.model

    def one(packed: Params, vector: Params, inputs: PyTree) -> Params:
        def predict(packed: Params) -> Tensor:
            prediction: Tensor = functional_call(model, losses.forward.packing.unpack(packed), (inputs,))
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
            found: Params = vmap(over_nodes)(here, vector, losses.forward.tasks.support.inputs)
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
