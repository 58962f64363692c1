"""How a step runs: an oracle, and the map over tasks. What is mapped (estimators, solvers) is the same for both."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from metanudge import tree
from metanudge.batching import single, split
from metanudge.energy import InnerProblem
from metanudge.oracle import (
    BatchNorm,
    Call,
    LiveForward,
    LiveLosses,
    LiveModule,
    Programs,
    Recorder,
    Recordings,
    StackedForward,
    StackedLosses,
    Tally,
)
from metanudge.oracle.common import device_of, round_off, same_modes
from metanudge.oracle.compiled import Bound, plain_attributes
from metanudge.oracle.known import Known
from metanudge.packing import Packing
from metanudge.random_state import RandomState, forked
from metanudge.selection import Selection
from metanudge.types import LossFunction, Named, Need, Params, Role, Tasks


class Use(NamedTuple):
    """What a step needs a model for.

    Attributes:
        selection: Parameters by what becomes of them.
        stacks: The tasks.
        prox: λ.
        tally: Counts.
        first: Tasks of the same step that ranks before this one have, for the random state.
        repeated: Whether many such steps will follow, so that compiling pays.
        radius: Of ``InnerProblem``.
    """

    selection: Selection
    stacks: list[Tasks]
    prox: float
    tally: Tally
    first: int = 0
    repeated: bool = False
    radius: float = 0.0


class Lent(NamedTuple):
    """A model lent out for a step.

    Attributes:
        problems: The inner problems, in order.
        summed: Sum over the lanes of one problem.
        named: Views of such a sum by parameter name.
        rows: Adapted parameters of the lanes of one problem as ``[T, P]``.
        lanes: And back.
    """

    problems: Iterator[InnerProblem]
    summed: Callable[[Params], Params]
    named: Named
    rows: Callable[[Params], Tensor]
    lanes: Callable[[Tensor], Params]


class Execution(Protocol):
    """What the learner asks of either execution."""

    name: ClassVar[str]
    tries: ClassVar[bool]
    """Whether a solve may go on for the sake of advice. In place it may not: a step may be dear, its copies too many,
    minibatches would be read on, and ranks that do not all warn would wait for each other."""

    @property
    def lacks(self) -> frozenset[Need]:
        """What estimators and solvers cannot have here."""
        ...

    def lend(self, use: Use) -> AbstractContextManager[Lent]:
        """Lend the model out for a step. On leaving it is as before, and so is the random state, but for one draw."""
        ...


@contextmanager
def _kept(model: nn.Module, norm: BatchNorm, first: int) -> Iterator[RandomState]:
    """Keep modes and random state; BatchNorm layers follow their policy.

    One draw is taken from the user's generator, so that steps differ and ``torch.manual_seed`` decides them all.
    """
    device = device_of(model)
    seed = int(torch.randint(2**62, (), device="cpu").item())
    with same_modes(model), forked(device), norm.lent():
        yield RandomState(seed, device, first)


@dataclass(frozen=True)
class Vectorized:
    """All tasks of a chunk, and all nodes, at once: a functional call of the model under vmap.

    Attributes:
        model: Never written to.
        losses: The user's support and query loss.
        norm: What BatchNorm layers normalise by.
        chunk_size: Tasks at once; None for all.
        programs: Compiled gradients; None to compile nothing.
        known: What was seen of the losses.
    """

    name: ClassVar[str] = "vectorized"
    tries: ClassVar[bool] = True

    model: nn.Module
    losses: Mapping[Role, LossFunction]
    norm: BatchNorm
    chunk_size: int | None = None
    programs: Programs | None = None
    known: Known = field(default_factory=Known)

    @property
    def lacks(self) -> frozenset[Need]:
        """What estimators and solvers cannot have here."""
        return frozenset({Need.LIVE_MODULE} if self.programs is None else {Need.LIVE_MODULE, Need.DOUBLE_BACKWARD})

    @contextmanager
    def lend(self, use: Use) -> Iterator[Lent]:  # noqa: D102
        with _kept(self.model, self.norm, use.first) as random:
            yield self._lent(use, random)

    def _lent(self, use: Use, random: RandomState) -> Lent:
        selection, tally = use.selection, use.tally
        parameters = dict(self.model.named_parameters())
        parts = {kind: {name: parameters[name] for name in names} for kind, names in selection._asdict().items()}
        packing, call = Packing.of(**parts), Call(self.model)
        theta, shared = (packing.pack(kind, parts[kind]) for kind in parts)
        spacing = round_off(parts["adapted"].values())
        programs = self.programs if use.repeated else None
        bind = None if programs is None else self._binding(programs, selection, packing, call)

        def problems() -> Iterator[InnerProblem]:
            first = 0
            for stack in use.stacks:
                for chunk, number in split(stack, self.chunk_size):
                    forward = StackedForward(
                        call, self.losses, packing, chunk, number, first, random, self.norm, self.known
                    )
                    losses = StackedLosses(forward, shared, tally, compiled=None if bind is None else bind(chunk))
                    yield InnerProblem(losses, theta, use.prox, number, round_off=spacing, radius=use.radius)
                    first += number

        def summed(params: Params) -> Params:
            return tree.tree_map(lambda leaf: leaf.sum((0, 1)), params)

        def rows(params: Params) -> Tensor:
            return torch.cat([leaf.squeeze(1) for leaf in params.values()], dim=1)

        def lanes(found: Tensor) -> Params:
            parts = torch.split(found, [leaf.shape[-1] for leaf in theta.values()], dim=1)
            return {key: part.unsqueeze(1).to(theta[key]) for key, part in zip(theta, parts, strict=True)}

        return Lent(problems(), summed, packing.unpack, rows, lanes)

    def _binding(
        self, programs: Programs, selection: Selection, packing: Packing, call: Call
    ) -> Callable[[Tasks], Bound]:
        """What gives the programs for a chunk, told apart by all that a gradient of it reads."""
        moved = {name for names in selection for name in names}
        frozen = {name: value.detach() for name, value in self.model.named_parameters() if name not in moved}
        modules = tuple((weakref.ref(module), plain_attributes(module)) for module in self.model.modules())
        state = (modules, packing.layout, tuple(map(tuple, call.names.values())))
        return lambda chunk: programs.bind((chunk, call.own_buffers, frozen), state)


@dataclass(frozen=True)
class InPlace:
    """The live module, one task after the other, one node after the other; real ``.backward()``.

    Attributes:
        model: Lent out during a step and put back on every exit.
        losses: The user's support and query loss.
        norm: What BatchNorm layers normalise by.
        microbatch: Most examples in a forward pass; None for all.
        record: Records forward and backward passes; None to run each.
        known: What was seen of the losses.
    """

    name: ClassVar[str] = "in_place"
    lacks: ClassVar[frozenset[Need]] = frozenset({Need.DOUBLE_BACKWARD})
    tries: ClassVar[bool] = False

    model: nn.Module
    losses: Mapping[Role, LossFunction]
    norm: BatchNorm
    microbatch: int | None = None
    record: Recorder | None = None
    known: Known = field(default_factory=Known)

    @contextmanager
    def lend(self, use: Use) -> Iterator[Lent]:  # noqa: D102
        with _kept(self.model, self.norm, use.first) as random:
            live = LiveModule.take(self.model, use.selection.adapted)
            try:
                yield self._lent(live, use, random)
            finally:
                live.give_back()

    def _lent(self, live: LiveModule, use: Use, random: RandomState) -> Lent:
        selection, tally = use.selection, use.tally
        theta, bundles = live.values, live.bundles
        spacing = round_off([live.parameters[name] for name in selection.adapted])
        recordings = None if self.record is None else Recordings(self.record, random)

        def problems() -> Iterator[InnerProblem]:
            for index, task in enumerate(task for stack in use.stacks for task in single(stack)):
                live.check_parts(task)
                forward = LiveForward(live, self.losses, task, index, random, self.norm, self.known, recordings)
                losses = LiveLosses(forward, selection.shared, self.microbatch, tally)
                yield InnerProblem(losses, theta, use.prox, round_off=spacing, radius=use.radius)

        def rows(params: Params) -> Tensor:
            named = bundles.by_name(params)
            return torch.cat([named[name].reshape(1, -1) for name in selection.adapted], dim=1)

        def lanes(found: Tensor) -> Params:
            chosen = {name: live.parameters[name] for name in selection.adapted}
            parts = torch.split(found[0], [parameter.numel() for parameter in chosen.values()])
            named = {name: part.view(chosen[name].shape) for name, part in zip(chosen, parts, strict=True)}
            leaves = bundles.joined(named)
            return {key: leaf.to(theta[key]) for key, leaf in leaves.items()}

        return Lent(problems(), dict, bundles.by_name, rows, lanes)
