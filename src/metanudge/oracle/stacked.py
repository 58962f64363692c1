"""Gradients of the losses of a stack of tasks.

The derivative is taken outside the vmap by ordinary autograd, which runs no functorch code and needs one level less.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce

import torch
from torch import Tensor

from metanudge import tree
from metanudge.losses import HessianProduct, InnerGradients
from metanudge.oracle.call import explained
from metanudge.oracle.common import (
    Tally,
    require_gradient,
    require_graph,
    require_second_derivative,
    times,
)
from metanudge.oracle.compiled import Bound
from metanudge.oracle.stacked_forward import StackedForward, node_count
from metanudge.types import LossFunction, Params, PyTree, Role, Weights


@dataclass(frozen=True)
class StackedLosses(InnerGradients):
    """A stack of tasks under vmap. Parameters travel packed, lanes are ``[T, N]`` (types.py).

    Attributes:
        forward: Evaluates the losses.
        shared: Shared parameters, packed, ``[1 or T, 1, Q]``.
        tally: Counter.
        attached: Keep gradients in the graph (unrolled differentiation).
        compiled: Gradients as programs, where they are not attached; None to run the model as it is.
    """

    forward: StackedForward
    shared: Params
    tally: Tally
    attached: bool = False
    compiled: Bound | None = None

    def gradient(self, weights: Weights, phi: Mapping[str, Tensor], step: int) -> Params:  # noqa: D102
        nodes = max(node_count(phi), *(weight.shape[1] for weight in weights.values() if isinstance(weight, Tensor)), 1)
        return self._differentiate(weights, self._leaves(self.forward.lanes(phi, nodes)), self.shared, step)[1]

    def value_and_gradient(  # noqa: D102
        self, role: Role, phi: Params, step: int, minibatch: int = 0
    ) -> tuple[Tensor, Params]:
        return self._differentiate({role: 1.0}, self._leaves(phi), self.shared, step)

    def value_and_all_gradients(  # noqa: D102
        self, role: Role, phi: Params, step: int, minibatch: int = 0
    ) -> tuple[Tensor, Params]:
        everything = phi | self.forward.lanes(self.shared, node_count(phi))
        return self._differentiate({role: 1.0}, self._leaves(everything), {}, step)

    def value(self, function: LossFunction, role: Role, phi: Params) -> Tensor:  # noqa: D102
        with torch.no_grad():
            return self.forward.values({role: function}, phi | self.shared, 0)[role]

    def loss(self, role: Role, phi: Params) -> Tensor:  # noqa: D102
        return self.value(self.forward.losses[role], role, phi)

    def hessian_product(self, phi: Params, step: int) -> HessianProduct:  # noqa: D102
        phi = self._leaves(phi)
        everything = phi | self._leaves(self.forward.lanes(self.shared, 1))
        _, slope = replace(self, attached=True)._differentiate({Role.SUPPORT: 1.0}, phi, everything, step)
        require_second_derivative([*slope.values()], phi.values())

        def product(vector: Params) -> Params:
            self.count(2)
            if not any(leaf.requires_grad for leaf in slope.values()):  # a loss linear in phi
                return tree.zeros(everything)
            found = torch.autograd.grad(
                list(slope.values()),
                list(everything.values()),
                grad_outputs=[vector[name].expand_as(leaf) for name, leaf in slope.items()],
                retain_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )
            return dict(zip(everything, found, strict=True))

        return product

    def unrolled(self, shared: Params) -> StackedLosses:  # noqa: D102
        return replace(self, attached=True, shared=shared)

    def spread(self, params: Params) -> Params:  # noqa: D102
        return self.forward.lanes(params, 1)

    def share(self, a: Tensor, b: Tensor) -> Tensor:  # noqa: D102
        return (a * b).sum(-1)

    def added(self, shares: Sequence[Tensor]) -> Tensor:  # noqa: D102
        return torch.stack([*shares]).sum(0) if len(shares) > 1 else shares[0]

    def stencil_sums(  # noqa: D102
        self,
        nodes: tuple[float, ...],
        rows: tuple[tuple[float, ...], ...],
        term: Callable[[Tensor], tuple[Params, ...]],
    ) -> list[tuple[Params, ...]]:
        like = self.forward.packing.reference
        terms = term(like.new_tensor(nodes).unsqueeze(0))

        def weighted(row: tuple[float, ...], leaf: Tensor) -> Tensor:
            return (leaf.new_tensor(row).reshape(1, -1, 1) * leaf).sum(1, keepdim=True)

        return [tuple(tree.tree_map(partial(weighted, row), one) for one in terms) for row in rows]

    def fused(  # noqa: D102
        self, name: Hashable, function: Callable[[InnerGradients, PyTree], PyTree], given: PyTree
    ) -> PyTree:
        programs = self._programs
        if programs is None:
            return function(self, given)

        def with_losses(tensors: PyTree, own: PyTree) -> tuple[PyTree, int]:
            inside, shared = tensors
            lone = self._inside(own, shared)
            return function(lone, inside), lone.tally.gradients

        found, gradients = programs(name, with_losses, (given, self.shared))
        self.tally.gradients += gradients
        return found

    @property
    def _programs(self) -> Bound | None:
        """Where gradients are compiled, their programs."""
        return None if self.attached else self.compiled

    def _inside(self, own: PyTree, shared: Params) -> StackedLosses:
        """The same losses while they are traced, of the tensors there."""
        tasks, *held = own
        forward = replace(self.forward, tasks=tasks, call=self.forward.call.holding(*held))
        return StackedLosses(forward, shared, Tally())

    def count(self, gradients: int) -> None:  # noqa: D102
        self.tally.gradients += gradients * self.forward.number

    def _leaves(self, params: Params) -> Params:
        lanes = self.forward.lanes(params, node_count(params))
        return lanes if self.attached else tree.tree_map(lambda leaf: leaf.detach().requires_grad_(), lanes)

    def _differentiate(self, weights: Weights, wanted: Params, rest: Params, step: int) -> tuple[Tensor, Params]:
        self.count(len(weights) * node_count(wanted))
        programs = self._programs
        if programs is None:
            return self._derivative(weights, wanted, rest, step)
        fixed = {role: weight for role, weight in weights.items() if not isinstance(weight, Tensor)}
        moving = {role: weight for role, weight in weights.items() if isinstance(weight, Tensor)}

        def derivative(tensors: PyTree, own: PyTree) -> tuple[Tensor, Params]:
            given, packed, others = tensors
            lone = self._inside(own, self.shared)
            return lone._derivative({**fixed, **given}, lone._leaves(packed), others, step)

        name = ("gradient", tuple(weights), *fixed.items())
        found: tuple[Tensor, Params] = programs(name, derivative, (moving, wanted, rest))
        return found

    def _derivative(self, weights: Weights, wanted: Params, rest: Params, step: int) -> tuple[Tensor, Params]:
        with torch.enable_grad():
            losses = self.forward.values({role: self.forward.losses[role] for role in weights}, rest | wanted, step)
            for loss in losses.values():
                require_graph(loss)
            if not self.attached or step == 0:  # later on the graph holds all steps
                self.forward.look(losses, rest | wanted, step, attached=self.attached)
            weighted = reduce(torch.add, (times(weights[role], loss) for role, loss in losses.items()))
            total = weighted.sum()  # lanes do not mix, so its gradient is every lane's own
        with explained():
            found = torch.autograd.grad(total, list(wanted.values()), create_graph=self.attached, allow_unused=True)
        require_gradient(found)
        gradients = [
            torch.zeros_like(leaf) if gradient is None else gradient
            for gradient, leaf in zip(found, wanted.values(), strict=True)
        ]
        if self.attached and step == 0:  # later on the graph holds all steps
            require_second_derivative(gradients, wanted.values())
        return weighted.detach(), dict(zip(wanted, gradients, strict=True))
