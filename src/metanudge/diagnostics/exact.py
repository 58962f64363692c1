r"""The meta-objective of a small problem, exactly: Newton's method and dense solves.

.. math::
    \nabla F_i = \lambda A_i^{-1} \nabla f_i(\phi_i), \qquad A_i = \nabla^2 \hat f_i(\phi_i) + \lambda I, \qquad
    \frac{d \phi_i}{d \theta} = \lambda A_i^{-1}, \qquad
    \nabla^2 F_i = \frac{d}{d \phi} \big[ \lambda A_i(\phi)^{-1} \nabla f_i(\phi) \big] \, \lambda A_i^{-1}
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import grad, jacrev, vmap

from metanudge.checks import check_stack
from metanudge.errors import NonFiniteError
from metanudge.oracle import Call
from metanudge.packing import Packing
from metanudge.types import Batch, LossFunction, Tasks


def _hessian(function: Callable[[Tensor, Batch], Tensor]) -> Callable[[Tensor, Batch], Tensor]:
    derivative: Callable[[Tensor, Batch], Tensor] = jacrev(grad(function))  # forward mode warns in torch 2.13
    return derivative


class ExactMetaObjective:
    """F, its gradient and its Hessian to machine precision, for the parameters of a small model as one vector.

    Cost: dense ``[T, d, d]`` Hessians; meant for d up to a few hundred. All parameters are adapted.

    Args:
        model: Its parameters, all of one dtype (float64 advised), are flattened in the order of ``parameters()``.
        loss: Support loss, twice differentiable, convex for Newton's method to be sure to converge.
        tasks: A stack of T tasks.
        prox: λ > 0.
        query_loss: None for ``loss``.

    Example:
        >>> import torch, metanudge as mn
        >>> from metanudge.diagnostics import ExactMetaObjective
        >>> model = torch.nn.Linear(2, 1, bias=False).double()
        >>> x, y = torch.randn(3, 5, 2).double(), torch.randn(3, 5, 1).double()
        >>> tasks = mn.Tasks(mn.Batch(x, y), mn.Batch(x, y))
        >>> F = ExactMetaObjective(model, mn.metrics.squared_error, tasks, prox=1.0)
        >>> F.gradient(torch.zeros(2).double()).shape
        torch.Size([2])
    """

    def __init__(
        self, model: nn.Module, loss: LossFunction, tasks: Tasks, prox: float, query_loss: LossFunction | None = None
    ) -> None:
        self.number = check_stack(tasks, next(model.parameters()).device)
        named = dict(model.named_parameters())
        packing, call = Packing.of(adapted=named), Call(model)
        (key,) = packing.slots
        self.theta0 = packing.pack("adapted", named)[key].reshape(-1)
        self.prox = prox
        self._tasks = tasks

        def flat(function: LossFunction) -> Callable[[Tensor, Batch], Tensor]:
            def value(phi: Tensor, batch: Batch) -> Tensor:
                return call.at(packing.unpack({key: phi}), function, batch)

            return value

        self._support, self._query = flat(loss), flat(query_loss or loss)

        def implicit(phi: Tensor, support: Batch, query: Batch) -> Tensor:
            """λ A(φ)⁻¹ ∇f(φ)."""
            system = _hessian(self._support)(phi, support) + prox * _eye(phi)
            found: Tensor = prox * torch.linalg.solve(system, grad(self._query)(phi, query))
            return found

        self._implicit = implicit

    def solutions(self, theta: Tensor, steps: int = 200) -> Tensor:
        """φ_i(θ) by Newton's method with backtracking, ``[T, d]``.

        Raises:
            NonFiniteError: Newton's method did not reach round-off within ``steps``.
        """
        support, eye = self._tasks.support, _eye(theta)

        def energy(phi: Tensor, batch: Batch) -> Tensor:
            return self._support(phi, batch) + self.prox / 2 * (phi - theta).square().sum()

        energies, slopes = vmap(energy), vmap(grad(energy))
        curvatures = vmap(_hessian(self._support))
        phi: Tensor = theta.expand(self.number, -1).clone()
        for _ in range(steps):
            slope = slopes(phi, support)
            move = -torch.linalg.solve(curvatures(phi, support) + self.prox * eye, slope)
            descent = (slope * move).sum(-1)
            before, size = energies(phi, support), torch.ones_like(descent)
            for _ in range(40):
                rise = energies(phi + size[:, None] * move, support) - before
                # the last digits of an energy are noise: near the solution take the full step
                short = rise > 1e-4 * size * descent + 1e-14 * (1 + before.abs())
                if not short.any():
                    break
                size = torch.where(short, size / 2, size)
            phi = phi + size[:, None] * move
            if bool((move.norm(dim=-1) <= 1e-13 * (1 + phi.norm(dim=-1))).all()):
                return phi
        raise NonFiniteError(f"Newton's method did not converge in {steps} steps; is the inner problem convex?")

    def losses(self, theta: Tensor) -> Tensor:
        """f_i(φ_i(θ)), ``[T]``."""
        values: Tensor = vmap(self._query)(self.solutions(theta), self._tasks.query)
        return values

    def gradients(self, theta: Tensor) -> Tensor:
        """∇F_i(θ), ``[T, d]``."""
        gradients: Tensor = vmap(self._implicit)(self.solutions(theta), *self._tasks)
        return gradients

    def gradient(self, theta: Tensor) -> Tensor:
        """∇F(θ), the mean over tasks, ``[d]``."""
        return self.gradients(theta).mean(0)

    def hessian(self, theta: Tensor) -> Tensor:
        """∇²F(θ), ``[d, d]``."""
        phi = self.solutions(theta)
        eye = _eye(theta)
        systems = vmap(_hessian(self._support))(phi, self._tasks.support) + self.prox * eye
        outer = vmap(jacrev(self._implicit))(phi, *self._tasks)
        products: Tensor = outer @ (self.prox * torch.linalg.inv(systems))
        return products.mean(0)


def _eye(like: Tensor) -> Tensor:
    """The identity on vectors such as ``like``."""
    return torch.eye(len(like), dtype=like.dtype, device=like.device)
