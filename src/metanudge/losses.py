"""What mathematics asks of losses; oracle/ answers it twice."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Protocol

from torch import Tensor

from metanudge.bundles import Bundles
from metanudge.types import LossFunction, Params, PyTree, Role, Weights

NOT_LIVE = "these losses are not those of one task on the live module, whose parameters a torch optimizer steps"


class HessianProduct(Protocol):
    """``v -> d/d eps`` of the support gradient along ``phi + eps v``.

    The result has a leaf for every adapted and every shared parameter.
    """

    def __call__(self, vector: Params) -> Params:
        """Multiply ``vector`` (adapted parameters)."""
        ...


class InnerGradients(Protocol):
    """What an inner solver needs to know of the losses."""

    @property
    def sampled(self) -> bool:
        """Whether f̂ is another function at every step, as it is seen through minibatches."""
        return False

    def gradient(self, weights: Weights, phi: Mapping[str, Tensor], step: int) -> Params:
        """Gradient in ``phi`` of a weighted sum; ``step`` selects the random state, the same for every node."""
        ...

    def plus(self, gradient: Tensor, more: Tensor, alpha: float) -> Tensor:
        """``gradient + alpha * more``, of a leaf that ``gradient`` gave, which it may overwrite."""
        return gradient.add(more, alpha=alpha)

    def inner(self, a: Params, b: Params) -> Tensor:
        """Inner product over parameters, one number a lane: ``[*L]``."""
        return self.added([self.share(*given) for given in self.operands(a, b)])

    def operands(self, first: Params, *rest: Params) -> Iterator[list[Tensor]]:
        """What ``share`` is to be taken of, part by part, as an operand of every tree."""
        return ([tree[name] for tree in (first, *rest)] for name in first)

    def share(self, a: Tensor, b: Tensor) -> Tensor:
        """The inner product of a part; of a sharded one, this rank's."""
        ...

    def added(self, shares: Sequence[Tensor]) -> Tensor:
        """The inner product, from all shares, ``[*L]``."""
        ...

    def fused(self, name: Hashable, function: Callable[[InnerGradients, PyTree], PyTree], given: PyTree) -> PyTree:
        """``function(self, given)``, all of it one program where gradients are compiled; elsewhere as it is.

        Args:
            name: Of the function, and of all that it reads but tensors: equal names are equal functions.
            function: Pure, of trees of tensors (and constants); it draws no random numbers of its own.
            given: What it is of.
        """
        return function(self, given)

    def by_parameter(self, make: Callable[[Mapping[str, Tensor]], Params], like: Params) -> Params:
        """``make(like)``, which may count numbers: they come in the order of the parameters, however leaves are cut."""
        return make(like)

    def steppable(self, start: Params) -> Bundles:
        """Parameters, at ``start``, for a torch optimizer to step."""
        raise TypeError(NOT_LIVE)

    def anew(self, start: Params) -> Bundles:
        """The same parameters, at ``start``, in memory of their own: for solves in which they are not those of f̂."""
        raise TypeError(NOT_LIVE)


class LossGradients(InnerGradients, Protocol):
    """What an estimator needs to know of them."""

    @property
    def shared(self) -> Params:
        """Trainable parameters that are not adapted, broadcastable to ``[*L, *shape]``."""
        ...

    def value_and_gradient(self, role: Role, phi: Params, step: int, minibatch: int = 0) -> tuple[Tensor, Params]:
        """Loss ``[*L]`` and its gradient in ``phi``; of a set in minibatches, of that one."""
        ...

    def value_and_all_gradients(self, role: Role, phi: Params, step: int, minibatch: int = 0) -> tuple[Tensor, Params]:
        """Loss and its gradient in ``phi`` and in the shared parameters; likewise."""
        ...

    def value(self, function: LossFunction, role: Role, phi: Params) -> Tensor:
        """``function`` (a loss or a metric) on the task's batch, ``[*L]``, no gradient."""
        ...

    def loss(self, role: Role, phi: Params) -> Tensor:
        """The loss alone, ``[*L]``, no gradient."""
        ...

    def hessian_product(self, phi: Params, step: int) -> HessianProduct:
        """Exact products with the Hessian of the support loss at ``phi``, by double backward."""
        ...

    def unrolled(self, shared: Params) -> InnerGradients:
        """The same losses, whose gradients stay attached to the graph of ``phi`` and ``shared``."""
        ...

    def spread(self, params: Params) -> Params:
        """One copy a task: ``[*shape]`` to ``[*L, *shape]``, with one node."""
        ...

    def stencil_sums(
        self,
        nodes: tuple[float, ...],
        rows: tuple[tuple[float, ...], ...],
        term: Callable[[Tensor], tuple[Params, ...]],
    ) -> list[tuple[Params, ...]]:
        """``sum_k weights[k] * term(nodes[k])`` for every row of weights: at once along the node axis, or in turn.

        What ``term`` returns is emptied.
        """
        ...

    def count(self, gradients: int) -> None:
        """Add ``gradients`` evaluations per task to the tally."""
        ...
