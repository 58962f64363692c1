"""Stochastic normalised gradient descent with momentum."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, overload

import torch
from torch.optim.optimizer import ParamsT

from metanudge.optim.common import Length, call
from metanudge.settings import check_fraction, check_positive


class NormalizedSGD(torch.optim.Optimizer):
    r"""Steps of fixed length along the momentum ("SNGDM").

    .. math::
        m \leftarrow \beta m + (1 - \beta) g, \qquad \theta \leftarrow \theta - \eta \, m / \|m\|

    The norm is taken over all parameters together. Where the smoothness of the objective grows with its gradient, as
    that of MAML does, this step needs no knowledge of it; the momentum averages the noise before it is normalised.
    (Not "SNGM", Zhao et al., arXiv:2007.13985, which accumulates g / ||g||.)

    Args:
        params: Parameters or groups, as for any torch optimizer.
        lr: Length η > 0 of a step, in units of the parameters; decrease it by a scheduler to converge.
        momentum: β in [0, 1).

    Raises:
        SettingsError: A value out of its range.

    Source: Cutkosky & Mehta, ICML 2020 (arXiv:2002.03305).

    Example:
        >>> import torch, metanudge as mn
        >>> w = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> optimizer = mn.optim.NormalizedSGD([w], lr=1.0, momentum=0.0)
        >>> w.grad = torch.tensor([300.0, 400.0])
        >>> optimizer.step()
        >>> [round(x, 3) for x in w.tolist()]
        [2.4, 3.2]
    """

    def __init__(self, params: ParamsT, lr: float, momentum: float = 0.9) -> None:
        check_positive(lr=lr)
        check_fraction(momentum=momentum)
        super().__init__(params, {"lr": lr, "momentum": momentum})
        for group in self.param_groups:
            check_positive(lr=group["lr"])
            check_fraction(momentum=group["momentum"])

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step; parameters without a gradient stay. A zero momentum moves nothing.

        Args:
            closure: Re-evaluates the model and returns the loss, optional.

        Returns:
            What the closure returned.
        """
        loss = call(closure)
        moved: list[tuple[torch.Tensor, torch.Tensor, dict[str, Any]]] = []
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(parameter)
                momentum = state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
                moved.append((parameter, momentum, group))
        if moved:
            length = Length.of(momentum for _, momentum, _ in moved)
            inverse = torch.where(length.ratio > 0, 1 / length.ratio, torch.zeros_like(length.ratio))
            for parameter, momentum, group in moved:
                length.moved(parameter, momentum, group["lr"] * inverse)
        return loss
