"""What both oracles share: the count, and the checks of a user's losses."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from metanudge.errors import LossError
from metanudge.types import Batch, LossFunction


@dataclass
class Tally:
    """How many gradients of one loss of one task were evaluated."""

    gradients: int = 0


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
        LossError: It did not return a floating-point scalar tensor.
    """
    loss: object = function(model, batch)
    if not isinstance(loss, Tensor):
        hint = "; leave out .item()" if type(loss) in (int, float) else ""
        if isinstance(loss, np.generic | np.ndarray):
            hint = "; a metric can return torch.as_tensor(...) of it, a loss has to be computed by torch"
        raise LossError(f"the loss (or metric) must return a scalar tensor, but returned {type(loss).__name__}{hint}")
    if loss.ndim != 0:
        raise LossError(
            f"the loss (or metric) must return one number per task, but returned a tensor of shape "
            f"{tuple(loss.shape)}; reduce it over the examples with .mean()"
        )
    if not loss.is_floating_point():
        raise LossError(f"the loss (or metric) must be a floating-point number, but has dtype {loss.dtype}")
    return loss


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
    "torch.no_grad() or parameters read before the call in the loss or the model, or for a wrong adapt_only"
)


def require_second_derivative(gradients: Sequence[Tensor], leaves: Iterable[Tensor]) -> None:
    """Raise a LossError where the ``gradients`` in ``leaves`` have no second derivative, or torch has a wrong one.

    A pass that is ``once_differentiable`` ends the graph of its gradients in a node that raises when it is reached. But
    ``torch.autograd.grad`` does not visit what does not lead to its inputs: it would leave the second derivative out
    and say nothing.
    """
    nodes = list(nodes_of(gradient.grad_fn for gradient in gradients))
    if any(node.name() == "torch::autograd::Error" for node in nodes):
        raise LossError(
            "the model or the loss holds a function that can be differentiated once only "
            "(torch.autograd.function.once_differentiable)"
        )
    normed = set(nodes_of(node for node in nodes if node.name() == "WeightNormInterfaceBackward0"))
    adapted = {get_gradient_edge(leaf).node for leaf in leaves}
    if normed & adapted and not _weight_norm_is_right(gradients[0].device.type):
        raise LossError(
            "an adapted layer uses weight_norm, of which this version of torch computes a wrong second derivative here "
            "(torch.autograd.gradgradcheck of torch._weight_norm fails)"
        )


@cache
def _weight_norm_is_right(device: str) -> bool:
    """Whether the fused kernel has the second derivative of g v / ||v||."""
    v = torch.linspace(1, 2, 6, dtype=torch.float64, device=device).reshape(3, 2).requires_grad_()
    g = torch.ones(3, 1, dtype=torch.float64, device=device, requires_grad=True)

    def second(weight: Tensor) -> Tensor:
        (slope,) = torch.autograd.grad(weight.pow(3).sum(), v, create_graph=True)
        return torch.autograd.grad(slope.square().sum(), v)[0]

    with torch.enable_grad():
        plain = second(g * v / v.norm(dim=1, keepdim=True))
        return torch.allclose(second(torch._weight_norm(v, g, 0)), plain, rtol=1e-9)


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


def leaves_of(value: Tensor) -> Iterator[Tensor]:
    """The tensors that ask for a gradient and that ``value`` depends on."""
    variables = (getattr(node, "variable", None) for node in nodes_of([value.grad_fn]))
    return (variable for variable in variables if variable is not None)


def times(weight: float | Tensor, loss: Tensor) -> Tensor:
    """Their product, for which no kernel is launched where there is nothing to be done."""
    return loss if isinstance(weight, float) and weight == 1.0 else weight * loss
