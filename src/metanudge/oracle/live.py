"""Losses of one task, by the live module and ``.backward()`` alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from metanudge import tree
from metanudge.oracle.batch_norm import BatchNorm
from metanudge.oracle.common import RandomState, Tally, require_graph, scalar_loss, sum_of
from metanudge.types import HessianProduct, LossFunction, Params, Role, Tasks, Weights


@dataclass(frozen=True)
class LiveModule:
    """The user's module, lent out: what was there when it was taken, and how to put it back."""

    model: nn.Module
    parameters: dict[str, nn.Parameter]
    values: Params
    gradients: dict[str, Tensor | None]
    trainable: dict[str, bool]
    buffers: list[tuple[nn.Module, str, Tensor | None, Tensor | None]]

    @classmethod
    def take(cls, model: nn.Module) -> LiveModule:
        """Remember parameters, gradients, flags and buffers."""
        parameters = dict(model.named_parameters())
        return cls(
            model,
            parameters,
            {name: parameter.detach().clone() for name, parameter in parameters.items() if parameter.requires_grad},
            {name: parameter.grad for name, parameter in parameters.items()},
            {name: parameter.requires_grad for name, parameter in parameters.items()},
            [
                (module, name, buffer, None if buffer is None else buffer.clone())
                for module in model.modules()
                for name, buffer in module._buffers.items()
            ],
        )

    def load(self, params: Mapping[str, Tensor]) -> None:
        """Write ``params`` into the module; those that already are its parameters stay."""
        with torch.no_grad():
            for name, value in params.items():
                if value is not self.parameters[name]:
                    self.parameters[name].copy_(value)

    def watch(self, wanted: Sequence[str]) -> None:
        """Let ``.backward()`` fill the gradients of ``wanted`` and of nothing else."""
        for name, parameter in self.parameters.items():
            parameter.grad = None
            parameter.requires_grad_(name in wanted)

    def reset_buffers(self, *, copies: bool = False) -> None:
        """Undo what forward passes wrote into buffers; or lay out copies, and leave those of a living graph alone."""
        for module, name, buffer, saved in self.buffers:
            module._buffers[name] = saved.clone() if copies and saved is not None else buffer
            if not copies and buffer is not None and saved is not None:
                with torch.no_grad():
                    buffer.copy_(saved)

    def give_back(self) -> None:
        """Put everything back."""
        self.load(self.values)
        self.reset_buffers()
        for name, parameter in self.parameters.items():
            parameter.grad = self.gradients[name]
            parameter.requires_grad_(self.trainable[name])


@dataclass(frozen=True)
class LiveLosses:
    """One task on the live module; ``.backward()`` only. No lane axes.

    Attributes:
        live: The module, lent out.
        losses: The user's support and query loss.
        shared_names: Trainable parameters that are not adapted.
        task: The task, without a task axis.
        index: Its index in the whole step, for the random state.
        random: Seeds.
        tally: Counter.
        norm: What BatchNorm layers normalise by.
    """

    live: LiveModule
    losses: Mapping[Role, LossFunction]
    shared_names: tuple[str, ...]
    task: Tasks
    index: int
    random: RandomState
    tally: Tally
    norm: BatchNorm
    shared: Params = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "shared", {name: self.live.values[name] for name in self.shared_names})

    def gradient(self, weights: Weights, phi: Params, step: int) -> Params:  # noqa: D102
        return self._differentiate(weights, phi, tuple(phi), step)[1]

    def value_and_gradient(self, role: Role, phi: Params, step: int) -> tuple[Tensor, Params]:  # noqa: D102
        return self._differentiate({role: 1.0}, phi, tuple(phi), step)

    def value_and_all_gradients(self, role: Role, phi: Params, step: int) -> tuple[Tensor, Params]:  # noqa: D102
        return self._differentiate({role: 1.0}, phi, (*phi, *self.shared_names), step)

    def value(self, function: LossFunction, role: Role, phi: Params) -> Tensor:  # noqa: D102
        with torch.no_grad():
            return self._evaluate(function, role, phi, 0)

    def loss(self, role: Role, phi: Params) -> Tensor:  # noqa: D102
        return self.value(self.losses[role], role, phi)

    def hessian_product(self, phi: Params, step: int) -> HessianProduct:  # noqa: D102
        raise NotImplementedError("the live module is never differentiated twice")

    def unrolled(self, shared: Params) -> LiveLosses:  # noqa: D102
        raise NotImplementedError("the live module is never differentiated twice")

    def spread(self, params: Params) -> Params:  # noqa: D102
        return params

    def inner(self, a: Params, b: Params) -> Tensor:  # noqa: D102
        return torch.stack([(a[name] * b[name]).sum() for name in a]).sum()

    def stencil_sums(  # noqa: D102
        self,
        nodes: tuple[float, ...],
        rows: tuple[tuple[float, ...], ...],
        term: Callable[[Tensor], tuple[Params, ...]],
    ) -> list[tuple[Params, ...]]:
        like = next(iter(self.live.values.values()))
        totals: list[tuple[Params, ...]] = []
        for node, *weights in zip(nodes, *rows, strict=True):
            terms = term(like.new_tensor(node))
            if not totals:
                totals = [tuple(tree.zeros(one) for one in terms) for _ in rows]
            totals = [
                tuple(tree.axpy(weight, one, total) for one, total in zip(terms, sums, strict=True))
                for weight, sums in zip(weights, totals, strict=True)
            ]
        return totals

    def steppable(self, start: Params) -> Params:  # noqa: D102
        self.live.load(start)
        return {name: self.live.parameters[name] for name in start}

    def count(self, gradients: int) -> None:  # noqa: D102
        self.tally.gradients += gradients

    def _differentiate(
        self, weights: Weights, phi: Params, wanted: tuple[str, ...], step: int
    ) -> tuple[Tensor, Params]:
        """One ``.backward()`` a loss, so that one loss's activations are alive at a time; ``.grad`` adds them up."""
        self.live.watch(wanted)
        losses = {}
        for role, weight in weights.items():
            with torch.enable_grad():
                loss = self._evaluate(self.losses[role], role, phi, step)
                require_graph(loss)
                (weight * loss).backward()  # type: ignore[no-untyped-call]
            losses[role] = loss.detach()
        self.tally.gradients += len(losses)
        return sum_of(weights, losses), {name: self._taken(name) for name in wanted}

    def _evaluate(self, function: LossFunction, role: Role, phi: Params, step: int) -> Tensor:
        self.live.load(phi)

        def at(read: Role, function: LossFunction) -> Tensor:
            self.live.reset_buffers(copies=read is not role)
            self.random.enter(self.index, read, step)
            return scalar_loss(function, self.live.model, self.task[read.value])

        return self.norm.evaluate(role, function, self.losses[Role.SUPPORT], at)

    def _taken(self, name: str) -> Tensor:
        """The gradient ``.backward()`` left; the module forgets it, so that the next one can not write into it."""
        parameter = self.live.parameters[name]
        gradient, parameter.grad = parameter.grad, None
        return torch.zeros_like(parameter) if gradient is None else gradient
