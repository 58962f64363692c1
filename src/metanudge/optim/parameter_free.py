"""The schedule of normalised descent that needs no constant of the problem."""

from __future__ import annotations

from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from metanudge.errors import SettingsError
from metanudge.optim.normalized import NormalizedSGD
from metanudge.settings import check_positive


class ParameterFree(LRScheduler):
    r"""Step lengths and momentum of ``NormalizedSGD`` by the number t = 1, 2, ... of the step alone.

    .. math::
        \eta_t = s \, t^{-3/4}, \qquad \beta_t = 1 - t^{-1/2}

    Converges on (L0, L1)-smooth objectives, as that of MAML is, at the best rate in t without knowing L0, L1 or the
    noise.

    Args:
        optimizer: A ``NormalizedSGD``; its own lr and momentum are replaced.
        scale: s > 0, the length of the first step in units of the parameters.
        last_epoch: Steps already taken, less one; -1 to begin. ``load_state_dict`` sets it.

    Raises:
        SettingsError: Another optimizer, or a scale out of its range.

    Source: Hübler, Yang, Li & He, Parameter-Agnostic Optimization under Relaxed Smoothness, AISTATS 2024.

    Example:
        >>> import torch, metanudge as mn
        >>> optimizer = mn.optim.NormalizedSGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        >>> schedule = mn.optim.ParameterFree(optimizer)
        >>> for _ in range(15):
        ...     optimizer.step(); schedule.step()
        >>> round(optimizer.param_groups[0]["lr"], 6), optimizer.param_groups[0]["momentum"]
        (0.017857, 0.75)
    """

    def __init__(self, optimizer: NormalizedSGD, scale: float = 1 / 7, last_epoch: int = -1) -> None:
        if not isinstance(optimizer, NormalizedSGD):
            raise SettingsError(f"ParameterFree schedules a NormalizedSGD, got {type(optimizer).__name__}")
        check_positive(scale=scale)
        self.scale = scale
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float | Tensor]:
        """η_t for every parameter group."""
        return [self.scale * (self.last_epoch + 1) ** -0.75 for _ in self.optimizer.param_groups]

    def step(self, epoch: int | None = None) -> None:
        """Move on to the next step."""
        super().step(epoch)
        for group in self.optimizer.param_groups:
            group["momentum"] = 1 - (self.last_epoch + 1) ** -0.5
