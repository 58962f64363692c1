"""HF-MAML: walk the trajectory back with Hessian products from two gradients."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from metanudge.curvature import displacement_of, far, two_gradient_product
from metanudge.energy import Energy, InnerProblem
from metanudge.estimators.unrolled import unroll
from metanudge.losses import InnerGradients, LossGradients
from metanudge.settings import check_positive
from metanudge.solvers.loop import Solver
from metanudge.types import Estimate, Need, Params, Role, Weights


class _TwoGradientBackward(torch.autograd.Function):
    """∇f̂(φ, w) as a function of φ and w whose backward pass needs no second derivative, only two more gradients."""

    @staticmethod
    def forward(
        ctx: Any, energy: Energy, displacement: float, step: int, names: tuple[str, ...], *leaves: Tensor
    ) -> tuple[Tensor, ...]:
        losses, phi = cast(LossGradients, energy.losses), dict(zip(names, leaves, strict=False))
        value, gradient = losses.value_and_gradient(Role.SUPPORT, phi, step, minibatch=step)
        ctx.settings = losses, far(energy, phi, value, gradient), displacement, step, names
        ctx.save_for_backward(*leaves[: len(names)])
        return tuple(gradient[name] for name in names)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        losses, length, displacement, step, names = ctx.settings
        phi: Params = dict(zip(names, ctx.saved_tensors, strict=True))
        with torch.no_grad():
            product = two_gradient_product(losses, phi, step, length, displacement, minibatch=step)
            image = product(dict(zip(names, cotangents, strict=True)))
        return None, None, None, None, *(image[name] for name in (*names, *losses.shared))


@dataclass(frozen=True)
class TwoGradientLosses(InnerGradients):
    """Losses whose gradients can be differentiated without double backward.

    Attributes:
        energy: The free problem, of which they are.
        displacement: Relative displacement of a product.
        shared: Leaves w.
    """

    energy: Energy
    displacement: float
    shared: Params

    @property
    def sampled(self) -> bool:
        """As the free problem."""
        return self.energy.losses.sampled

    def gradient(self, weights: Weights, phi: Mapping[str, Tensor], step: int) -> Params:
        """∇f̂: unrolled problems are never nudged."""
        names = tuple(phi)
        gradient = _TwoGradientBackward.apply(  # type: ignore[no-untyped-call]
            self.energy, self.displacement, step, names, *phi.values(), *self.shared.values()
        )
        return dict(zip(names, gradient, strict=True))

    def operands(self, first: Params, *rest: Params) -> Iterator[list[Tensor]]:  # noqa: D102
        return self.energy.losses.operands(first, *rest)

    def share(self, a: Tensor, b: Tensor) -> Tensor:  # noqa: D102
        return self.energy.losses.share(a, b)

    def added(self, shares: Sequence[Tensor]) -> Tensor:  # noqa: D102
        return self.energy.losses.added(shares)


@dataclass(frozen=True)
class HFMAML:
    r"""Hessian-free MAML over several steps: no double backward, the trajectory stored instead of the activations.

    .. math::
        \nabla_\theta F_K = \Big( \prod_k (I - a H_k) \Big) \nabla f(\phi_K), \qquad
        H_k v \approx \frac{\nabla \hat f(\phi_k + \epsilon v) - \nabla \hat f(\phi_k - \epsilon v)}{2 \epsilon}

    (written for plain gradient descent; any solver whose steps autograd can follow is walked back the same way).
    Cost per task: 3 K + 2 gradients. Memory: K parameter copies, one activation.

    Args:
        displacement: Of the difference, relative to the parameters; None for the cube root of the unit round-off, which
            is for smooth models: two gradients so near each other differ by chance where there are kinks between them
            (ReLU, max pooling), for which take 0.1.

    Raises:
        SettingsError: A displacement that is not positive, or a solver that autograd cannot follow.

    Source: Fallah, Mokhtari & Ozdaglar, AISTATS 2020; multi-step: Ji, Yang & Liang, JMLR 23 (2022).

    Example:
        >>> import metanudge as mn
        >>> mn.HFMAML().cost
        '3K + 2'
    """

    rule: ClassVar[str] = "walk the stored trajectory back, Hv from two gradients"
    cost: ClassVar[str] = "3K + 2"
    memory: ClassVar[str] = "K parameter copies"
    bias: ClassVar[str] = "finite-difference error, for F_K; chance at kinks"

    displacement: float | None = None

    def __post_init__(self) -> None:
        if self.displacement is not None:
            check_positive(displacement=self.displacement)

    @property
    def needs(self) -> frozenset[Need]:
        """A solver that autograd can follow."""
        return frozenset({Need.DIFFERENTIABLE_SOLVER, Need.START_AT_THETA})

    def __call__(self, problem: InnerProblem, solver: Solver) -> Estimate:
        """Unroll and pull back."""
        displacement = displacement_of(problem, self.displacement)
        return unroll(problem, solver, partial(TwoGradientLosses, problem.energy(), displacement))
