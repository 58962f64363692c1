"""The losses of a stack of tasks, on every lane, by a functional call of the model under vmap."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.utils._pytree import tree_map

from metanudge import tree
from metanudge.errors import LossError, UnmappableError
from metanudge.oracle.batch_norm import BatchNorm
from metanudge.oracle.call import Call, explained
from metanudge.oracle.drawing import UnfusedDrawing
from metanudge.oracle.known import Known, strangers
from metanudge.oracle.notes import noted
from metanudge.packing import Packing
from metanudge.random_state import RandomState
from metanudge.types import Batch, LossFunction, Params, PyTree, Role, Tasks

Buffers = dict[str, Tensor]


class OneLane(Protocol):
    """What is mapped."""

    def __call__(self, packed: Params, buffers: dict[Role, Buffers], data: dict[Role, Batch], /) -> dict[Role, Tensor]:
        """Functions of one lane."""
        ...


@dataclass(frozen=True)
class StackedForward:
    """Evaluates functions of the model on the sets of a stack of tasks. Parameters travel packed, lanes are ``[T, N]``.

    Attributes:
        call: The model, wrapped.
        losses: The user's support and query loss.
        packing: From packed leaves to names.
        tasks: The stack.
        number: How many they are.
        first_task: Index of its first task in the whole step, for the random state.
        random: Seeds.
        norm: What BatchNorm layers normalise by.
        known: What was seen of the losses before.
    """

    call: Call
    losses: Mapping[Role, LossFunction]
    packing: Packing
    tasks: Tasks
    number: int
    first_task: int
    random: RandomState
    norm: BatchNorm
    known: Known

    def lanes(self, params: Mapping[str, Tensor], nodes: int) -> Params:
        """``[T, nodes, ...]`` of what can be broadcast to it."""
        return tree.tree_map(lambda leaf: leaf.expand(self.number, nodes, -1), params)

    def values(self, functions: Mapping[Role, LossFunction], packed: Params, step: int) -> dict[Role, Tensor]:
        """Every function on every lane, ``[T, N]`` each.

        Nodes of one task see the same data and the same random draws, different tasks different ones.
        """
        with explained(), self.call.layers():
            if self.known.writes or not self.call.own_buffers:
                return self._values(functions, packed, step, apart=self.known.writes)
            try:
                return self._values(functions, packed, step, apart=False)
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, LossError):  # as of a write into what all lanes share
                pass
            found = self._values(functions, packed, step, apart=True)
            self.known.writes = True  # else it was for another reason
            return found

    def look(self, losses: Mapping[Role, Tensor], packed: Params, step: int, *, attached: bool) -> None:
        """See which tensors outside the model the losses depend on, once; evaluated again, if on any.

        Raises:
            UnmappableError: A parameter of the model is among them, which no lane can put another in the place of.
            LossError: One of another module is.
        """
        new = {role: loss for role, loss in losses.items() if role not in self.known.strangers}
        if not new:
            return
        found = strangers(
            new,
            list(packed.values()),
            lambda: self.values({role: self.losses[role] for role in new}, packed, step),
            nn.Parameter if attached else Tensor,  # what parameters were made of asks for gradients too
        )
        held = set(map(id, self.call.model.parameters()))
        if any(id(leaf) in held for some in found.values() for leaf in some):
            raise UnmappableError(
                "the model or the loss reads a parameter of the model by another way than its name, as from a list, "
                'where a stack cannot put another in its place. Give the MetaLearner execution="in_place", which '
                "does, or read it by its name (torch.nn.ParameterList holds several)"
            )
        for role, some in found.items():
            self.known.meet(role, some)

    def _values(
        self, functions: Mapping[Role, LossFunction], packed: Params, step: int, *, apart: bool
    ) -> dict[Role, Tensor]:
        """``values``; with buffers ``apart``, a copy for every lane, forward passes may write to them."""
        nodes = node_count(packed)
        read = [Role.SUPPORT, *functions] if self.norm.policy == "support" else functions
        data = {role: self.tasks[role.value] for role in read}

        def one(packed: Params, buffers: dict[Role, Buffers], data: dict[Role, Batch], /) -> dict[Role, Tensor]:
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

        return self._mapped(one, self.lanes(packed, nodes), self._buffers(functions, nodes) if apart else {}, data)

    def _mapped(
        self, one: OneLane, lanes: Params, buffers: dict[Role, Buffers], data: dict[Role, Batch]
    ) -> dict[Role, Tensor]:
        """``one`` of every lane.

        Where nothing is drawn, tasks and nodes are one mapped axis; else the nodes are mapped inside, which costs a
        sixth more.
        """
        nodes = node_count(lanes)
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

    def _buffers(self, roles: Iterable[Role], nodes: int) -> dict[Role, Buffers]:
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


def node_count(params: Mapping[str, Tensor]) -> int:
    """Length of the node axis."""
    return max((leaf.shape[1] for leaf in params.values()), default=1)


def _one_axis(lanes: PyTree) -> PyTree:
    """Lanes ``[T, N, ...]`` as ``[T N, ...]``."""
    return tree_map(lambda leaf: leaf.flatten(0, 1), lanes)
