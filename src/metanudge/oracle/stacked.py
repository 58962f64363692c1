"""Losses of a stack of tasks, by a functional call of the model under vmap.

The derivative is taken outside the vmap by ordinary autograd, which runs no functorch code and needs one level less.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce

import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.utils._pytree import tree_map

from metanudge import tree
from metanudge.errors import LossError, UnmappableError
from metanudge.losses import HessianProduct, InnerGradients
from metanudge.oracle.batch_norm import BatchNorm
from metanudge.oracle.call import Call, explained
from metanudge.oracle.common import (
    Tally,
    require_gradient,
    require_graph,
    require_second_derivative,
    times,
)
from metanudge.oracle.compiled import Bound
from metanudge.oracle.drawing import UnfusedDrawing
from metanudge.oracle.known import Known, strangers
from metanudge.oracle.notes import noted
from metanudge.packing import Packing
from metanudge.random_state import RandomState
from metanudge.types import Batch, LossFunction, Params, PyTree, Role, Tasks, Weights


@dataclass(frozen=True)
class StackedLosses(InnerGradients):
    """A stack of tasks under vmap. Parameters travel packed, lanes are ``[T, N]`` (types.py).

    Attributes:
        call: The model, wrapped.
        losses: The user's support and query loss.
        packing: From packed leaves to names.
        shared: Shared parameters, packed, ``[1 or T, 1, Q]``.
        tasks: The stack.
        first_task: Index of its first task in the whole step, for the random state.
        random: Seeds.
        tally: Counter.
        norm: What BatchNorm layers normalise by.
        known: What was seen of the losses before.
        attached: Keep gradients in the graph (unrolled differentiation).
        compiled: Gradients as programs, where they are not attached; None to run the model as it is.
    """

    call: Call
    losses: Mapping[Role, LossFunction]
    packing: Packing
    shared: Params
    tasks: Tasks
    number: int
    first_task: int
    random: RandomState
    tally: Tally
    norm: BatchNorm
    known: Known
    attached: bool = False
    compiled: Bound | None = None

    def gradient(self, weights: Weights, phi: Mapping[str, Tensor], step: int) -> Params:  # noqa: D102
        nodes = max(_nodes(phi), *(weight.shape[1] for weight in weights.values() if isinstance(weight, Tensor)), 1)
        return self._differentiate(weights, self._leaves(self._lanes(phi, nodes)), self.shared, step)[1]

    def value_and_gradient(self, role: Role, phi: Params, step: int) -> tuple[Tensor, Params]:  # noqa: D102
        return self._differentiate({role: 1.0}, self._leaves(phi), self.shared, step)

    def value_and_all_gradients(self, role: Role, phi: Params, step: int) -> tuple[Tensor, Params]:  # noqa: D102
        everything = phi | self._lanes(self.shared, _nodes(phi))
        return self._differentiate({role: 1.0}, self._leaves(everything), {}, step)

    def value(self, function: LossFunction, role: Role, phi: Params) -> Tensor:  # noqa: D102
        with torch.no_grad():
            return self._evaluate({role: function}, phi | self.shared, 0)[role]

    def loss(self, role: Role, phi: Params) -> Tensor:  # noqa: D102
        return self.value(self.losses[role], role, phi)

    def hessian_product(self, phi: Params, step: int) -> HessianProduct:  # noqa: D102
        phi = self._leaves(phi)
        everything = phi | self._leaves(self._lanes(self.shared, 1))
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
        return self._lanes(params, 1)

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
        like = self.packing.reference
        terms = term(like.new_tensor(nodes).unsqueeze(0))

        def weighted(weights: Tensor, leaf: Tensor) -> Tensor:
            return (weights.to(leaf.dtype).reshape(1, -1, 1) * leaf).sum(1, keepdim=True)

        return [tuple(tree.tree_map(partial(weighted, like.new_tensor(row)), one) for one in terms) for row in rows]

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
        return replace(self, tasks=tasks, call=self.call.holding(*held), shared=shared, tally=Tally(), compiled=None)

    def count(self, gradients: int) -> None:  # noqa: D102
        self.tally.gradients += gradients * self.number

    def _lanes(self, params: Mapping[str, Tensor], nodes: int) -> Params:
        return tree.tree_map(lambda leaf: leaf.expand(self.number, nodes, -1), params)

    def _leaves(self, params: Params) -> Params:
        lanes = self._lanes(params, _nodes(params))
        return lanes if self.attached else tree.tree_map(lambda leaf: leaf.detach().requires_grad_(), lanes)

    def _differentiate(self, weights: Weights, wanted: Params, rest: Params, step: int) -> tuple[Tensor, Params]:
        self.count(len(weights) * _nodes(wanted))
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
            losses = self._evaluate({role: self.losses[role] for role in weights}, rest | wanted, step)
            for loss in losses.values():
                require_graph(loss)
            if not self.attached or step == 0:  # later on the graph holds all steps
                self._look(losses, rest | wanted, step)
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

    def _look(self, losses: Mapping[Role, Tensor], packed: Params, step: int) -> None:
        """See which tensors outside the model the losses depend on, once; evaluated again, if on any."""
        new = {role: loss for role, loss in losses.items() if role not in self.known.strangers}
        if not new:
            return
        found = strangers(
            new,
            list(packed.values()),
            lambda: self._evaluate({role: self.losses[role] for role in new}, packed, step),
            nn.Parameter if self.attached else Tensor,  # what parameters were made of asks for gradients too
        )
        held = set(map(id, self.call.model.parameters()))
        if any(id(leaf) in held for some in found.values() for leaf in some):
            raise UnmappableError(
                "the model or the loss reads a parameter of the model by another way than its name, as from a list, "
                'where a stack can not put another in its place. Give the MetaLearner execution="in_place", which '
                "does, or read it by its name (torch.nn.ParameterList holds several)"
            )
        for role, some in found.items():
            self.known.meet(role, some)

    def _evaluate(self, functions: Mapping[Role, LossFunction], packed: Params, step: int) -> dict[Role, Tensor]:
        """Every function on every lane, ``[T, N]`` each.

        Nodes of one task see the same data and the same random draws, different tasks different ones. Where nothing is
        drawn, tasks and nodes are one mapped axis; else the nodes are mapped inside, which costs a sixth more.
        """
        nodes = _nodes(packed)
        lanes = self._lanes(packed, nodes)
        read = [Role.SUPPORT, *functions] if self.norm.policy == "support" else functions
        data = {role: self.tasks[role.value] for role in read}

        apart = self.known.writes

        def one(packed: Params, buffers: dict[Role, dict[str, Tensor]], data: dict[Role, Batch]) -> dict[Role, Tensor]:
            named = self.packing.unpack(packed)

            def of(asked: Role) -> Tensor:
                def at(role: Role, function: LossFunction) -> Tensor:
                    self.random.enter(self.first_task, role, step)
                    own = buffers[asked] if apart else self.call.own_buffers
                    own = own if apart and role is asked else tree.clone(own)  # what is written there is thrown away
                    before = self.random.others() if self.call.steady else None
                    with noted(self.call.model, role, data[role]):
                        value = self.call.at(named | own, function, data[role])
                    if before is not None and self.random.others() != before:
                        raise LossError(_DRAWS)
                    return value

                return self.norm.evaluate(asked, functions[asked], self.losses[Role.SUPPORT], at)

            return {role: of(role) for role in functions}

        with explained(), self.call.layers():
            if apart or not self.call.own_buffers:
                return self._mapped(one, lanes, self._buffers(functions, nodes), data)
            try:
                return self._mapped(one, lanes, {}, data)
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, LossError):  # as of a write into what all lanes share
                pass
        self.known.writes = True
        try:
            return self._evaluate(functions, packed, step)
        except Exception:  # for another reason, then
            self.known.writes = False
            raise

    def _mapped(
        self,
        one: Callable[[Params, dict[Role, dict[str, Tensor]], dict[Role, Batch]], dict[Role, Tensor]],
        lanes: Params,
        buffers: dict[Role, dict[str, Tensor]],
        data: dict[Role, Batch],
    ) -> dict[Role, Tensor]:
        """``one`` of every lane."""
        nodes = _nodes(lanes)
        if nodes == 1 or not self.call.draws:
            repeated = data if nodes == 1 else tree_map(lambda leaf: leaf.repeat_interleave(nodes, 0), data)
            chance = "different" if nodes == 1 and not self.call.steady else "error"
            try:
                values = vmap(one, randomness=chance)(_one_axis(lanes), _one_axis(buffers), repeated)
                return {role: value.reshape(self.number, nodes) for role, value in values.items()}
            except RuntimeError as error:
                if "randomness" not in str(error) or (nodes == 1 and not self.call.steady):
                    raise
                if self.call.steady:
                    raise LossError(_DRAWS) from error
                self.call.draws = True
        # the data of every node too: losses of torch do not run where one vmap alone maps the targets
        repeated = tree_map(lambda leaf: leaf.unsqueeze(1).repeat(1, nodes, *[1] * (leaf.ndim - 1)), data)
        over_nodes = vmap(one, randomness="same")
        with UnfusedDrawing():
            return vmap(over_nodes, randomness="different")(lanes, buffers, repeated)

    def _buffers(self, roles: Iterable[Role], nodes: int) -> dict[Role, dict[str, Tensor]]:
        """A copy of every buffer a lane, so that what a forward pass writes there is its own and is thrown away."""
        own = self.call.own_buffers
        lanes = (self.number, nodes)
        return {
            role: {name: buffer.expand(*lanes, *buffer.shape).clone() for name, buffer in own.items()} for role in roles
        }


_DRAWS = (
    "the model or the loss draws random numbers (dropout, noise), which a compiled program would not draw again for "
    "every nudge; leave compile out, or call model.eval()"
)


def _nodes(params: Mapping[str, Tensor]) -> int:
    return max((leaf.shape[1] for leaf in params.values()), default=1)


def _one_axis(lanes: PyTree) -> PyTree:
    """Lanes ``[T, N, ...]`` as ``[T N, ...]``."""
    return tree_map(lambda leaf: leaf.flatten(0, 1), lanes)
