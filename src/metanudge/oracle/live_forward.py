"""The losses of one task where the live module stands; looked at, the first time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from metanudge.batching import counts_of, examples, ordinary, pieces
from metanudge.checks import check_device, leaves
from metanudge.minibatches import as_minibatches
from metanudge.oracle.averages import Weighing
from metanudge.oracle.batch_norm import BatchNorm
from metanudge.oracle.common import require_graph, scalar_loss
from metanudge.oracle.known import Known, added_to, gradients_aside, strangers
from metanudge.oracle.module import LiveModule
from metanudge.oracle.notes import noted
from metanudge.oracle.recorded import Recording, Recordings
from metanudge.random_state import RandomState
from metanudge.types import Batch, LossFunction, Role, Tasks


class Draw(NamedTuple):
    """Which examples and random numbers an evaluation sees, the same for every nudge.

    Attributes:
        role: Support or query set.
        step: Of the solve, for the random state.
        minibatch: Of a set that comes in minibatches.
    """

    role: Role
    step: int = 0
    minibatch: int = 0


@dataclass(frozen=True, eq=False)
class LiveForward:
    """Evaluates functions of the live module on the sets of one task.

    Attributes:
        live: The module, lent out.
        losses: The user's support and query loss.
        task: The task, without a task axis.
        index: Its index in the whole step, for the random state.
        random: Seeds.
        norm: What BatchNorm layers normalise by.
        known: What was seen of the losses before.
        recordings: Of passes, where they are recorded.
        counted: How many targets of every example count, as far as it was needed.
        weighing: What the losses are means over, where it was looked at on this task.
    """

    live: LiveModule
    losses: Mapping[Role, LossFunction]
    task: Tasks
    index: int
    random: RandomState
    norm: BatchNorm
    known: Known
    recordings: Recordings | None = None
    counted: dict[Role, list[int]] = field(default_factory=dict)
    weighing: dict[Role, Weighing] = field(default_factory=dict)

    def enter(self, draw: Draw) -> None:
        """The random state of an evaluation."""
        self.random.enter(self.index, draw.role, draw.step)

    def batch(self, draw: Draw) -> Batch:
        """The examples of an evaluation, and its random state."""
        self.enter(draw)
        batch = self.task[draw.role.value]
        source = as_minibatches(batch)
        if source is not None:
            batch = ordinary(source[draw.minibatch])  # whatever it draws, it draws for every solve
            check_device(leaves(batch), self.random.device)
            self.enter(draw)
        if self.known.backward:  # a loss of its own may write into the inputs' .grad, and is to find none there
            batch = ordinary(batch)
        return batch

    def in_pieces(
        self, draw: Draw, microbatch: int | None, batch: Batch | None = None
    ) -> Iterator[tuple[Batch, float]]:
        """The examples of an evaluation in batches of at most ``microbatch``, each with its share in their mean.

        ``batch`` is those examples where they have been read already.
        """
        if batch is None:
            batch = self.batch(draw)
        else:
            self.enter(draw)
        if microbatch is None:
            return iter([(batch, 1.0)])
        known = self.weighing.get(draw.role) or self.known.weighing.get(draw.role, Weighing.COUNTS)
        weights = known.weights(self.counts(draw, batch))
        return ((piece.of(batch), piece.share) for piece in pieces(weights, microbatch))

    def counts(self, draw: Draw, batch: Batch) -> list[int]:
        """How many targets of every example count; of FSDP2's ranks, which all take as many pieces, one of each."""
        if self.live.sharded:
            return [1] * examples(batch)
        if as_minibatches(self.task[draw.role.value]) is not None:
            return counts_of(batch)
        if draw.role not in self.counted:  # once, as a GPU has to be waited for
            self.counted[draw.role] = counts_of(batch)
        return self.counted[draw.role]

    def value(self, function: LossFunction, role: Role, microbatch: int | None) -> Tensor:
        """A loss or metric, without its graph; over all ranks."""
        differentiates = any(one is function for one in self.known.differentiating)
        try:
            found = self._parts(function, role, microbatch, graph=differentiates)
        except RuntimeError as error:
            if differentiates or "does not require grad" not in str(error):
                raise
            self.live.renew()
            found = self._parts(function, role, microbatch, graph=True)
            self.known.differentiating.append(function)
        return self.live.over_ranks(torch.stack(found).sum())

    def loss(self, draw: Draw, batch: Batch) -> Tensor:
        """A loss with its graph.

        What it adds to ``.grad`` itself, by a ``.backward()`` of its own, as for adversarial examples, is thrown away.
        """
        role = draw.role
        seen = role in self.known.strangers
        if seen and role not in self.known.backward:
            return self._graph(draw, batch)
        parameters = list(self.live.parameters.values())
        with gradients_aside(parameters):
            if seen:
                return self._graph(draw, batch)
            with added_to(parameters) as written:
                loss = self._looked_at(self._graph(draw, batch), draw, batch)
        if written:
            self.known.backward.add(role)
        return loss

    def recorded(self, draw: Draw, batch: Batch, parameters: Sequence[nn.Parameter]) -> Recording | None:
        """The recorded pass of a loss and its gradient, if there is one; it is as when this evaluates it.

        A loss is looked at before; one that calls ``.backward()`` itself is never recorded.
        """
        role, strangers = draw.role, self.known.strangers
        if self.recordings is None or role in self.known.backward or role not in strangers:
            return None
        self.recordings.at(self.live.places())
        loss = partial(self._graph, draw)
        found = self.recordings.of(self.losses[role], parameters, batch, loss, strangers[role])
        if found is not None:
            self.live.bundles.forget()  # as after any forward pass
        return found

    def _parts(self, function: LossFunction, role: Role, microbatch: int | None, *, graph: bool) -> list[Tensor]:
        draw = Draw(role)
        with torch.set_grad_enabled(graph):
            return [
                share * self._evaluate(function, draw, batch).detach()
                for batch, share in self.in_pieces(draw, microbatch)
            ]

    def _graph(self, draw: Draw, batch: Batch) -> Tensor:
        loss = self._evaluate(self.losses[draw.role], draw, batch)
        require_graph(loss)
        return loss

    def _looked_at(self, loss: Tensor, draw: Draw, batch: Batch) -> Tensor:
        """The loss, once it is known which tensors outside the model it depends on; evaluated again, if on any."""
        role = draw.role
        if self.live.sharded:  # FSDP2 puts others in the place of the model's own
            self.known.meet(role, [])
            return loss
        own = [*self.live.parameters.values(), *leaves(batch)]
        own += [leaf for part in self.task if as_minibatches(part) is None for leaf in leaves(part)]

        def again() -> dict[Role, Tensor]:
            nonlocal loss
            self.batch(draw)  # and so the same random state
            loss = self._evaluate(self.losses[role], draw, batch)
            return {role: loss}

        self.known.meet(role, strangers({role: loss}, own, again)[role])
        return loss

    def _evaluate(self, function: LossFunction, draw: Draw, batch: Batch) -> Tensor:
        """A function of a batch, and of the support set before it where BatchNorm layers look at that."""

        def at(read: Role, function: LossFunction) -> Tensor:
            self.live.reset_buffers(copies=read is not draw.role)
            if read is draw.role:
                return called(batch, read, function)
            with self.random.aside():
                return called(self.batch(draw._replace(role=read)), read, function)

        def called(given: Batch, read: Role, function: LossFunction) -> Tensor:
            try:
                with noted(self.live.model, read, given):
                    return scalar_loss(function, self.live.model, given)
            finally:
                self.live.bundles.forget()  # it may have written to parameters by .data, which nothing counts

        return self.norm.evaluate(draw.role, function, self.losses[Role.SUPPORT], at)
