"""What is learnt of a user's losses by looking at them once."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from torch import Tensor, nn

from metanudge.errors import LossError
from metanudge.oracle.averages import Weighing
from metanudge.oracle.common import leaves_of
from metanudge.types import LossFunction, Role
from metanudge.warned import warn

LOOKS = 3
"""At a loss that tells no mean from a sum, as with dropout."""


@dataclass
class Known:
    """What has been seen of a learner's losses and metrics; copies of a learner begin without it.

    Attributes:
        looks: How many more looks at a loss to take, to see whether it is a mean over the examples.
        weighing: What a loss is a mean over; of those that were given, in pieces, sets of which more targets count in
            some examples than in others.
        strangers: By loss that was looked at, tensors outside the model that ask for a gradient and that it depends on.
        backward: Losses that call ``.backward()`` themselves.
        writes: Whether forward passes write into buffers what differs between the tasks of a stack.
        differentiating: The last functions that took derivatives themselves, whose values need a graph.
    """

    looks: dict[Role, int] = field(default_factory=lambda: dict.fromkeys(Role, LOOKS))
    weighing: dict[Role, Weighing] = field(default_factory=dict)
    strangers: dict[Role, list[Tensor]] = field(default_factory=dict)
    backward: set[Role] = field(default_factory=set)
    writes: bool = False
    differentiating: deque[LossFunction] = field(default_factory=lambda: deque(maxlen=4))

    def meet(self, role: Role, strangers: list[Tensor]) -> None:
        """Take down what a loss was seen to depend on, which will get no meta-gradient.

        Raises:
            LossError: Parameters are among it, as of another module.

        Warns:
            UserWarning: Other tensors are.
        """
        shape = next((tuple(leaf.shape) for leaf in strangers if isinstance(leaf, nn.Parameter)), None)
        if shape is not None:
            raise LossError(
                f"the loss depends on a trainable parameter of shape {shape} that is none of the model it was given "
                "(is it one of another module?), and so would get no meta-gradient. To learn it, make it a parameter "
                "of the model, all in one module (adapt_only says which are adapted); if it belongs to what stays as "
                "it is, such as a teacher, use it under torch.no_grad(), with .detach(), or with requires_grad=False"
            )
        self.strangers[role] = strangers
        if strangers:
            warn(
                f"the loss depends on a tensor of shape {tuple(strangers[0].shape)} that asks for a gradient and is no "
                "parameter of the model, so it gets no meta-gradient. To learn it, make it a torch.nn.Parameter of the "
                "model; if the loss takes a derivative by it, nothing is wrong (with .detach().requires_grad_() inside "
                "the loss this is not said)",
                UserWarning,
            )

    def __reduce__(self) -> tuple[type[Known], tuple[()]]:
        """For copies."""
        return Known, ()


Losses: TypeAlias = Mapping[Role, Tensor]


def strangers(
    losses: Losses, own: Sequence[Tensor], again: Callable[[], Losses], kind: type[Tensor] = Tensor
) -> dict[Role, list[Tensor]]:
    """The tensors of a ``kind``, but for its ``own``, that each loss depends on.

    Where there seem to be some, the losses are evaluated ``again``: what a loss makes itself is another tensor then.
    """
    known = set(map(id, own))

    def met(loss: Tensor) -> list[Tensor]:
        return [leaf for leaf in leaves_of(loss) if isinstance(leaf, kind) and id(leaf) not in known]

    found = {role: met(loss) for role, loss in losses.items()}
    if any(found.values()):
        new = {role: met(loss) for role, loss in again().items()}
        found = {role: [leaf for leaf in some if any(leaf is one for one in new[role])] for role, some in found.items()}
    return found


@contextmanager
def gradients_aside(leaves: Iterable[Tensor]) -> Iterator[None]:
    """A block in which ``.grad`` is empty at first, and after which it is as it was before."""
    before = [(leaf, leaf.grad) for leaf in leaves]
    try:
        for leaf, _ in before:
            leaf.grad = None
        yield
    finally:
        for leaf, gradient in before:
            leaf.grad = gradient


@contextmanager
def added_to(parameters: Iterable[nn.Parameter]) -> Iterator[list[Tensor]]:
    """A block, and those of ``parameters`` to whose ``.grad`` something was added in it."""
    written: list[Tensor] = []
    handles: list[Any] = [
        parameter.register_post_accumulate_grad_hook(written.append)  # type: ignore[no-untyped-call]
        for parameter in parameters
        if parameter.requires_grad
    ]
    try:
        yield written
    finally:
        for handle in handles:
            handle.remove()
