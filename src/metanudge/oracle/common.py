"""What both oracles share: the count, the random state, and the checks of a user's loss."""

from __future__ import annotations

import random
import re
import traceback
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from metanudge.errors import LossError
from metanudge.types import Batch, LossFunction, Role


@dataclass
class Tally:
    """How many gradients of one loss of one task were evaluated."""

    gradients: int = 0


LOOKS = 3
"""At a loss that tells no mean from a sum, as with dropout."""


@dataclass
class Known:
    """What has been seen of a learner's losses and metrics, for good.

    Attributes:
        looks: How many more looks at a loss to take, to see whether it is a mean over the examples.
        outside: Of a loss that was looked at, the tensors that ask for a gradient and are not the model's, with what
            was in ``.grad``: what is the same one at the next look was not made by the loss. Empty once nothing is left
            to be looked at.
        writes: Whether forward passes may write into buffers what differs between the tasks of a stack.
        differentiating: Functions that take derivatives themselves, for which a graph is needed even for their value.
    """

    looks: dict[Role, int] = field(default_factory=lambda: dict.fromkeys(Role, LOOKS))
    outside: dict[Role, list[tuple[Tensor, Tensor | None]]] = field(default_factory=dict)
    writes: bool = False
    differentiating: list[LossFunction] = field(default_factory=list)

    def check(self, role: Role, loss: Tensor, own: Iterable[Tensor]) -> None:
        """Refuse a loss that depends on trainable tensors other than ``own``: no meta-gradient would reach them.

        Those that the loss makes itself, to take a derivative by them, differ between two looks at its graph.

        Raises:
            LossError: It does.
        """
        before = self.outside.get(role)
        if before is not None and not before:
            return
        known = set(map(id, own))
        leaves = (getattr(node, "variable", None) for node in nodes_of([loss.grad_fn]))
        found = [leaf for leaf in leaves if isinstance(leaf, Tensor) and id(leaf) not in known]
        again = [(leaf, held) for leaf, held in before or () if any(leaf is one for one in found)]
        for leaf, held in again:
            leaf.grad = held
        kept = [leaf for leaf, _ in again] + [leaf for leaf in found if isinstance(leaf, nn.Parameter)]
        if kept:
            raise LossError(
                f"the loss depends on a trainable tensor of shape {tuple(kept[0].shape)} that is no parameter of the "
                "model it was given (is it one of another module?), and so would get no meta-gradient. To learn it, "
                "make it a parameter of the model, all in one module (adapt_only says which are adapted); if it "
                "belongs to what stays as it is, such as a teacher, use it under torch.no_grad(), with .detach(), or "
                "with requires_grad=False"
            )
        first = before is None
        self.outside[role] = [(leaf, None if leaf.grad is None else leaf.grad.clone()) for leaf in found if first]


@dataclass(frozen=True)
class RandomState:
    """Common random numbers: an evaluation's random state is a function of its task, loss and step alone.

    Attributes:
        seed: Of the meta-step.
        device: Of the model.
        first: Tasks of the meta-step that other processes have, before those of this one.
    """

    seed: int
    device: torch.device
    first: int = 0

    def enter(self, task: int, role: Role, step: int) -> None:
        """Seed the generators that a model on ``device``, or its loss, draws from."""
        seed = (self.seed + 1_000_003 * (self.first + task) + 2 * step + role.value) % 2**63
        seed_generators(seed, self.device)

    def state(self) -> list[bytes]:
        """Of the generators, to see whether something was drawn."""
        found = [torch.default_generator.get_state()]
        if self.device.type == "cuda":
            found.append(torch.cuda.default_generators[self.device.index].get_state())
        others = repr(random.getstate()), repr(np.random.get_state(legacy=False))
        return [*(bytes(one.numpy()) for one in found), *map(str.encode, others)]

    def aside(self) -> AbstractContextManager[None]:
        """A context whose draws leave the state as it was."""
        return forked(self.device)


def device_of(model: nn.Module) -> torch.device:
    """Of the first parameter: a model is on one device."""
    return next(model.parameters()).device


def seed_generators(seed: int, device: torch.device) -> None:
    """Seed what a model on ``device``, or its loss, draws from, and no other device, whichever is the current one."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index].manual_seed(seed)


@contextmanager
def forked(device: torch.device) -> Iterator[None]:
    """A context after which the random state is as before: torch's for a model on ``device``, Python's and numpy's."""
    of_python, of_numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)


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


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 or the like holds parameters as DTensors."""
    return any(hasattr(parameter, "device_mesh") for parameter in model.parameters())


def whole(tensor: Tensor) -> Tensor:
    """The plain tensor of which the ranks hold parts."""
    found: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return found


def sharded_like(tensor: Tensor, like: Any) -> Tensor:
    """A tensor that every rank has whole, cut as ``like`` is."""
    if not hasattr(like, "device_mesh"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


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
