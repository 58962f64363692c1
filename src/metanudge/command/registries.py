"""What a settings file can name, besides ``FAMILIES``, ``MODELS``, ``SOLVERS`` and ``ESTIMATORS``."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, MultiStepLR, StepLR

from metanudge import metrics, optim
from metanudge.tasks.logistic import logistic_loss
from metanudge.types import LossFunction

LOSSES: dict[str, LossFunction] = {
    "squared_error": metrics.squared_error,
    "cross_entropy": metrics.cross_entropy,
    "logistic": logistic_loss,
}
METRICS: dict[str, LossFunction] = {"accuracy": metrics.accuracy, **LOSSES}
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "normalized_sgd": optim.NormalizedSGD,
    "clipped_sgd": optim.ClippedSGD,
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
}


def _multi_step(optimizer: torch.optim.Optimizer, milestones: tuple[int, ...], gamma: float = 0.1) -> MultiStepLR:
    """Torch's own, whose annotations cannot be read."""
    return MultiStepLR(optimizer, milestones, gamma)


SCHEDULERS: dict[str, Callable[..., LRScheduler]] = {
    "parameter_free": optim.ParameterFree,
    "cosine": CosineAnnealingLR,
    "step": StepLR,
    "multi_step": _multi_step,
}
