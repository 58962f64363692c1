"""Second-order knowledge from first derivatives: differences of two gradients."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple, cast

import torch
from torch import Tensor

from metanudge import tree
from metanudge.energy import Energy, InnerProblem
from metanudge.losses import HessianProduct, InnerGradients, LossGradients
from metanudge.sharding import sharded_like
from metanudge.types import Params, Role, Weights


def displacement_of(problem: InnerProblem, given: float | None) -> float:
    """How far, relative to what is far, a central difference looks: the cube root of round-off, if not ``given``.

    Truncation grows as the square of the displacement and round-off as its inverse; both are then equally large.
    """
    return float(problem.unit(problem.theta) ** (1 / 3)) if given is None else given


def far(energy: Energy, phi: Params, value: Tensor, gradient: Params) -> Tensor:
    """``Energy.length`` from the support loss at ``phi`` and its gradient there."""
    norm = energy.norm(gradient)
    reach = norm / energy.prox if energy.prox > 0 else value.abs() / tree.or_one(norm)
    return energy.length(phi, gradient, norm, reach, value)


def two_gradient_product(
    losses: LossGradients, phi: Params, step: int, length: Tensor, displacement: float, minibatch: int = 0
) -> HessianProduct:
    r"""Products with the Hessian of the support loss, and with its mixed derivative in the shared parameters.

    .. math::
        H v = \frac{\nabla \hat f(\phi + \epsilon v) - \nabla \hat f(\phi - \epsilon v)}{2 \epsilon} + O(\epsilon^2),
        \qquad \epsilon \|v\| = \text{displacement} \cdot \text{length}

    Cost: 2 gradients a product; no graph is kept. Source: Pearlmutter, Neural Computation 6 (1994), which also tells
    why the exact product is preferable where double backward exists.

    Args:
        losses: Where gradients come from.
        phi: The point.
        step: Selects the random state, the same for both gradients.
        length: What is far, ``[*L]``: ``Energy.length``.
        displacement: Of the difference, relative to that.
        minibatch: Of a support set in minibatches, which.
    """

    def gradient(at: Params) -> Params:
        return losses.value_and_all_gradients(Role.SUPPORT, at, step, minibatch)[1]

    def product(vector: Params) -> Params:
        norm = losses.inner(vector, vector).sqrt()
        epsilon = displacement * length / tree.or_one(norm)
        ahead, behind = gradient(tree.axpy(epsilon, vector, phi)), gradient(tree.axpy(-epsilon, vector, phi))
        return tree.scale(1 / (2 * epsilon), tree.subtract(ahead, behind))

    return product


class Curvature(NamedTuple):
    """What step sizes rest on, ``[*L]`` each.

    Attributes:
        constant: Lipschitz constant of ∇f̂.
        length: What is far, ``Energy.length`` at the point of the measurement.
    """

    constant: Tensor
    length: Tensor


def lipschitz_constant(energy: Energy, phi: Params, iterations: int, step: int) -> Curvature:
    """Estimate the Lipschitz constant of the support gradient at ``phi``: power iteration on two-gradient products.

    A lower bound that grows to the spectral norm of the Hessian with the iterations. It starts along the gradient,
    where the first steps of the solver will go, and along a direction of no particular meaning: what the nudged solves
    follow, and round-off, may be steep where the support gradient has no part. Cost: ``iterations + 1`` gradients.
    """
    free: Weights = {Role.SUPPORT: 1.0}
    value, gradient = cast(LossGradients, energy.losses).value_and_gradient(Role.SUPPORT, phi, step)
    # far enough that round-off is nothing, and near enough for an estimate that is only to set a step size
    whole = far(energy, phi, value, gradient)
    length = 1e-2 * whole
    along, across = _unit(energy, gradient), _unit(energy, _generic(energy.losses, gradient, length.ndim))
    across = tree.scale(torch.where(energy.losses.inner(along, across) < 0, -1.0, 1.0).to(length), across)
    direction = _unit(energy, tree.add(along, across))  # never zero: with few parameters the two may be opposite
    constant = torch.zeros_like(length)
    for _ in range(iterations):
        ahead = energy.losses.gradient(free, tree.axpy(length, direction, phi), step)
        image = tree.scale(1 / length, tree.subtract(ahead, gradient))
        constant = torch.maximum(constant, energy.norm(image))
        direction = _unit(energy, image)
    return Curvature(constant, whole)


def _unit(energy: Energy, a: Params) -> Params:
    """``a / ||a||``; zero where ``a`` is."""
    return tree.scale(1 / tree.or_one(energy.norm(a)), a)


def _generic(losses: InnerGradients, like: Params, lanes: int) -> Params:
    """Numbers that look like noise, the same in every lane and in both executions: cos(i²) for number i of a dtype.

    Drawn numbers would depend on how the parameters are cut into leaves.
    """

    def numbers(like: Mapping[str, Tensor]) -> Params:
        begun: Counter[torch.dtype] = Counter()
        found = {}
        for name, leaf in like.items():
            shape = leaf.shape[lanes:]
            index = torch.arange(shape.numel(), dtype=torch.float64, device=leaf.device) + (1 + begun[leaf.dtype])
            begun[leaf.dtype] += shape.numel()
            found[name] = sharded_like(index.square().cos().to(leaf.dtype).reshape(shape).expand(leaf.shape), leaf)
        return found

    return losses.by_parameter(numbers, like)
