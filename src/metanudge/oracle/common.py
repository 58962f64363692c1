"""What both oracles share: the count, what is known of a user's losses, and the checks of them."""

from __future__ import annotations

import re
import traceback
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from metanudge.errors import LossError
from metanudge.types import Batch, LossFunction, Role
from metanudge.warned import warn


@dataclass
class Tally:
    """How many gradients of one loss of one task were evaluated."""

    gradients: int = 0


LOOKS = 3
"""At a loss that tells no mean from a sum, as with dropout."""


@dataclass
class Known:
    """What has been seen of a learner's losses and metrics; copies of a learner begin without it.

    Attributes:
        looks: How many more looks at a loss to take, to see whether it is a mean over the examples.
        strangers: By loss that was looked at, tensors outside the model that ask for a gradient and that it depends on.
        writes: Whether forward passes write into buffers what differs between the tasks of a stack.
        differentiating: The last functions that took derivatives themselves, whose values need a graph.
    """

    looks: dict[Role, int] = field(default_factory=lambda: dict.fromkeys(Role, LOOKS))
    strangers: dict[Role, list[Tensor]] = field(default_factory=dict)
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

    @contextmanager
    def undisturbed(self, role: Role) -> Iterator[None]:
        """A block whose ``.backward()`` leaves nothing in ``.grad`` of strangers."""
        before = [(leaf, leaf.grad) for leaf in self.strangers.get(role, ())]
        try:
            for leaf, _ in before:
                leaf.grad = None
            yield
        finally:
            for leaf, gradient in before:
                leaf.grad = gradient

    def __reduce__(self) -> tuple[type[Known], tuple[()]]:
        """For copies."""
        return Known, ()


def outside(loss: Tensor, own: Iterable[Tensor]) -> list[Tensor]:
    """The leaves that a loss leads to, but for its ``own``."""
    known = set(map(id, own))
    leaves = (getattr(node, "variable", None) for node in nodes_of([loss.grad_fn]))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and id(leaf) not in known]


def common(first: list[Tensor], second: list[Tensor]) -> list[Tensor]:
    """The same ones in both: what a loss makes itself is another tensor at every evaluation."""
    return [leaf for leaf in first if any(leaf is one for one in second)]


def device_of(model: nn.Module) -> torch.device:
    """Of the first parameter: a model is on one device."""
    return next(model.parameters()).device


@contextmanager
def same_modes(model: nn.Module) -> Iterator[None]:
    """A block after which every module is in train or eval mode as before."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def round_off(parameters: Collection[Tensor]) -> float:
    """Relative round-off of gradients in these parameters: by their precision, or that of an autocast around the step.

    The errors of many parameters are random and average out: a sixteenth of the spacing of their numbers is left in a
    gradient (measured on networks in bfloat16).
    """
    kinds, device = {parameter.dtype for parameter in parameters}, next(iter(parameters)).device.type
    if torch.is_autocast_enabled(device):
        kinds.add(torch.get_autocast_dtype(device))
    return max(torch.finfo(kind).eps for kind in kinds) / 16


def scalar_loss(function: LossFunction, model: nn.Module, batch: Batch) -> Tensor:
    """Evaluate a user's loss or metric.

    Raises:
        LossError: It did not return a floating-point scalar tensor, or took the model or the batch for a tensor.
    """
    try:
        loss: object = function(model, batch)
    except (AttributeError, TypeError) as error:
        if not _took_for_tensors(error, model):
            raise
        raise LossError(
            "the loss (or metric) is called as loss(model, batch), with a module and mn.Batch(inputs, targets), and "
            "takes one of them for a tensor: begin it with model(batch.inputs), and compare that with batch.targets. "
            f"Python said: {error}"
        ) from error
    if not isinstance(loss, Tensor):
        hint = "; leave out .item()" if isinstance(loss, int | float) else ""
        raise LossError(f"the loss (or metric) must return a scalar tensor, but returned {type(loss).__name__}{hint}")
    if loss.ndim != 0:
        raise LossError(
            f"the loss (or metric) must return one number per task, but returned a tensor of shape "
            f"{tuple(loss.shape)}; reduce it over the examples with .mean()"
        )
    if not loss.is_floating_point():
        raise LossError(f"the loss (or metric) must be a floating-point number, but has dtype {loss.dtype}")
    return loss


def _took_for_tensors(error: Exception, model: nn.Module) -> bool:
    """Whether the loss itself treated the model or its batch as a tensor.

    An attribute may be missing within the model as well, and modules are asked for a device or a dtype by mistake.
    """
    said, kind = str(error), rf"'?\b({re.escape(type(model).__name__)}|Batch)\b'?"
    if (lacking := re.search(rf"{kind} object has no attribute '(\w+)'", said)) is not None:
        within = any(frame.name == "_call_impl" for frame in traceback.extract_tb(error.__traceback__))
        return hasattr(Tensor, lacking[2]) and lacking[2] not in ("device", "dtype") and not within
    return bool(re.search(rf"(unsupported operand|must be Tensor).*{kind}", said))


def require_graph(loss: Tensor) -> None:
    """Raise a LossError when no gradient can reach the adapted parameters."""
    if not loss.requires_grad:
        raise LossError(_INDEPENDENT)


def require_gradient(gradients: Iterable[Tensor | None]) -> None:
    """The same, once a loss that depends on something has been differentiated."""
    if all(gradient is None for gradient in gradients):
        raise LossError(f"{_INDEPENDENT}; or for another module than the one that the loss was given")


_INDEPENDENT = (
    "the loss does not depend on the adapted parameters: no gradient reaches them. Look for .detach(), .item(), "
    "torch.no_grad() or parameters read before the call in the loss or the model, for a wrong adapt_only, or for "
    "torch.inference_mode() around the call"
)


def require_second_derivative(gradients: Sequence[Tensor]) -> None:
    """Raise a LossError where a backward pass may be taken once only (``once_differentiable``).

    Such a pass ends the graph of its gradients in a node that raises when it is reached. But ``torch.autograd.grad``
    does not visit what does not lead to its inputs: it would leave the second derivative out and say nothing.
    """
    if any(node.name() == "torch::autograd::Error" for node in nodes_of(gradient.grad_fn for gradient in gradients)):
        raise LossError(
            "the model or the loss holds a function that can be differentiated once only "
            "(torch.autograd.function.once_differentiable)"
        )


def nodes_of(ends: Iterable[Any]) -> Iterator[Any]:
    """Every node of the graphs that end in ``ends``, once."""
    ahead = [end for end in ends if end is not None]
    seen = set(ahead)
    while ahead:
        node = ahead.pop()
        yield node
        new = {following for following, _ in node.next_functions if following is not None} - seen
        seen |= new
        ahead += new


def times(weight: float | Tensor, loss: Tensor) -> Tensor:
    """Their product, for which no kernel is launched where there is nothing to be done."""
    return loss if isinstance(weight, float) and weight == 1.0 else weight * loss
