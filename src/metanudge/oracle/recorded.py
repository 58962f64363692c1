"""Forward and backward passes recorded once, and repeated without Python, which a GPU would wait for."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from metanudge.bundles import copy_into, plain
from metanudge.checks import leaves
from metanudge.errors import LossError
from metanudge.oracle.known import gradients_aside
from metanudge.random_state import RandomState
from metanudge.types import Batch, LossFunction

MOST = 8
"""Forms of batches that are recorded; each keeps a gradient. Further ones, as of tasks that are all ragged, are not."""
BEHIND = 0.1
"""Part of its time by which a device has to be behind Python not to be held up by it."""


class Found(NamedTuple):
    """What a pass leaves, in memory that every repetition writes to anew.

    Attributes:
        loss: Its value.
        gradients: By parameter; None where the loss does not depend on it.
    """

    loss: Tensor
    gradients: list[Tensor | None]


class Recorder(Protocol):
    """Where passes can be recorded.

    Attributes:
        pays: By form, whether it does: whether the device was found waiting for Python, and has room for it.
    """

    pays: dict[Hashable, bool]

    def __call__(self, work: Callable[[], Found], device: torch.device) -> tuple[Found, Callable[[], None]]:
        """What ``work`` gives, once what is returned beside it has been called: that does it, as often as it is called.

        Raises:
            LossError: It cannot be recorded.
            torch.OutOfMemoryError: There is no room for it.
        """
        ...

    def wait(self, device: torch.device) -> float:
        """Until the device has done what it was given; the seconds that it took."""
        ...


_DRAWN = (
    "with cuda_graphs=True neither the model nor the loss may draw from the generators of Python, numpy or torch on "
    "the CPU: the GPU would repeat one draw; draw with device='cuda', or leave cuda_graphs out"
)


class Recording(NamedTuple):
    """A pass that was recorded.

    Attributes:
        given: The tensors of the batch that it reads.
        factor: By which its gradient is multiplied.
        found: What it leaves.
        parameters: Of its gradients.
        again: Does it.
    """

    given: list[Tensor]
    factor: Tensor
    found: Found
    parameters: Sequence[nn.Parameter]
    again: Callable[[], None]

    def repeat(self, batch: Batch, factor: float | Tensor) -> Tensor:
        """The loss of a batch, where the next one is written too; its gradient times a factor is put into ``.grad``."""
        copy_into(list(zip(self.given, leaves(batch), strict=True)))
        if isinstance(factor, Tensor):
            self.factor.copy_(factor)
        else:
            self.factor.fill_(factor)
        self.again()
        pairs = [(p, g) for p, g in zip(self.parameters, self.found.gradients, strict=True) if g is not None]
        own = [torch.empty_like(gradient) for _, gradient in pairs]
        copy_into([(copy, gradient) for copy, (_, gradient) in zip(own, pairs, strict=True)])
        for parameter in self.parameters:
            parameter.grad = None
        for copy, (parameter, _) in zip(own, pairs, strict=True):
            parameter.grad = copy
        return self.found.loss


@dataclass(eq=False)
class Recordings:
    """The recorded passes of one lent module, by the loss and the form of what it was given.

    The first time that a form comes it is run as it is, as many come once only, and timed until it comes again, unless
    it was before: where the device is still busy then, it does not wait for Python, and recording would gain nothing.
    Recordings live for one call of the learner's: between two, what a loss reads may become another tensor, or go.

    Attributes:
        record: Records.
        random: Seeds.
    """

    record: Recorder
    random: RandomState
    _begun: dict[Hashable, float] = field(default_factory=dict)
    _made: dict[Hashable, Recording] = field(default_factory=dict)
    _places: list[int] = field(default_factory=list)
    _stopped: bool = False

    def at(self, places: list[int]) -> None:
        """Where what passes read lies now; once it has moved, as a parameter that is rebound, nothing is recorded."""
        self._stopped = self._stopped or places != (self._places or places)
        self._places = places

    def of(
        self,
        function: LossFunction,
        parameters: Sequence[nn.Parameter],
        batch: Batch,
        loss: Callable[[Batch], Tensor],
        strangers: Sequence[Tensor],
    ) -> Recording | None:
        """The recorded pass for such a batch; None where there is none yet, or none to be.

        Args:
            function: The user's; the same one for support and query sets of a form is recorded once.
            parameters: What it is differentiated by.
            batch: The examples.
            loss: It, evaluated on a batch, with its graph.
            strangers: Further tensors that it depends on.

        Raises:
            LossError: It cannot be recorded.
        """
        given, structure = tree_flatten(batch)
        if self._stopped or any(leaf.device != self.random.device or leaf.requires_grad for leaf in given):
            return None
        if not all(map(plain, given)):  # a sparse one has other memory with every batch
            return None
        forms = [(leaf.shape, leaf.stride(), leaf.dtype) for leaf in given]
        key = (id(function), str(structure), *forms, *map(id, parameters))
        if key not in self._made:
            if len(self._made) == MOST or not self._pays(key):
                return None
            try:
                self._made[key] = self._recorded(parameters, batch, loss, strangers)
            except torch.OutOfMemoryError:
                self.record.pays[key] = False
                self._made.clear()  # there is not the room for more, nor perhaps for these beside plain passes
                self._stopped = True
                return None
        return self._made[key]

    def _pays(self, key: Hashable) -> bool:
        """Whether it comes again, and the device waits for Python."""
        pays, first = self.record.pays, key not in self._begun
        waited = 0.0 if key in pays else self.record.wait(self.random.device)
        now = time.perf_counter()
        begun = self._begun.setdefault(key, now)
        if first:
            return False
        return pays.setdefault(key, waited < BEHIND * (now - begun))

    def _recorded(
        self,
        parameters: Sequence[nn.Parameter],
        batch: Batch,
        loss: Callable[[Batch], Tensor],
        strangers: Sequence[Tensor],
    ) -> Recording:
        own: Batch = tree_map(lambda leaf: leaf.detach().clone(), batch)
        factor = torch.ones((), dtype=torch.float64, device=self.random.device)  # exact, whatever the loss comes in

        def work() -> Found:
            torch.clear_autocast_cache()  # what is cast before is not cast again when this is repeated
            try:
                with torch.enable_grad():
                    value = loss(own)
                    with gradients_aside(strangers):
                        (factor * value).backward()  # type: ignore[no-untyped-call]
            finally:
                torch.clear_autocast_cache()
            return Found(value.detach(), [parameter.grad for parameter in parameters])

        for parameter in parameters:
            parameter.grad = None
        with self.random.aside():
            before = self.random.elsewhere()
            try:
                found, again = self.record(work, self.random.device)
            finally:
                for parameter in parameters:  # also where a backward pass failed half-way
                    parameter.grad = None
            if self.random.elsewhere() != before:
                raise LossError(_DRAWN)
        return Recording(leaves(own), factor, found, parameters, again)
