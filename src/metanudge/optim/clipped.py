"""Stochastic gradient descent with a bound on the length of a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, overload

import torch
from torch.optim.optimizer import ParamsT

from metanudge.optim.common import Length, call
from metanudge.settings import check_positive


class ClippedSGD(torch.optim.Optimizer):
    r"""Gradient steps no longer than ``max_step``.

    .. math::
        \theta \leftarrow \theta - \min(\eta, \gamma / \|g\|) \, g

    The norm is taken over all parameters together. On an objective with ||Hess F|| <= L0 + L1 ||∇F||, theory suggests
    η of order 1 / L0 and γ of order 1 / L1.

    Args:
        params: Parameters or groups, as for any torch optimizer.
        lr: Step size η > 0.
        max_step: Longest step γ > 0, in units of the parameters.

    Raises:
        SettingsError: A value out of its range.

    Source: Zhang, He, Sra & Jadbabaie, ICLR 2020 (arXiv:1905.11881).

    Example:
        >>> import torch, metanudge as mn
        >>> w = torch.nn.Parameter(torch.zeros(1))
        >>> optimizer = mn.optim.ClippedSGD([w], lr=0.1, max_step=0.5)
        >>> w.grad = torch.tensor([100.0])
        >>> optimizer.step()
        >>> w.item()
        -0.5
    """

    def __init__(self, params: ParamsT, lr: float, max_step: float) -> None:
        check_positive(lr=lr, max_step=max_step)
        super().__init__(params, {"lr": lr, "max_step": max_step})
        for group in self.param_groups:
            check_positive(lr=group["lr"], max_step=group["max_step"])

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step; parameters without a gradient stay.

        Args:
            closure: Re-evaluates the model and returns the loss, optional.

        Returns:
            What the closure returned.
        """
        loss = call(closure)
        moved: list[tuple[torch.Tensor, torch.Tensor, dict[str, Any]]] = [
            (parameter, parameter.grad, group)
            for group in self.param_groups
            for parameter in group["params"]
            if parameter.grad is not None
        ]
        if moved:
            length = Length.of(gradient for _, gradient, _ in moved)
            for parameter, gradient, group in moved:
                longest = group["max_step"] / length.ratio  # infinite where all is zero
                length.moved(parameter, gradient, longest.minimum(group["lr"] * length.peak))
        return loss
