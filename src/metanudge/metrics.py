"""Metrics for ``MetaLearner.evaluate``: functions of an adapted model and a batch, like losses.

Inputs that are a dict are given to the model as keyword arguments; of an output that has ``logits`` these are taken:
so they work for Hugging Face's models.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metanudge.errors import LossError
from metanudge.tree import accumulator
from metanudge.types import Batch, LossFunction

IGNORED = -100
"""The class index of what does not count, as everywhere in torch."""


def counted(targets: Tensor) -> Tensor:
    """Which class indices count; where there are no negative ones (uint8), all."""
    return targets != IGNORED if targets.dtype.is_signed else torch.ones_like(targets, dtype=torch.bool)


def metric_name(metric: LossFunction | None) -> str:
    """A metric in words; None is the query loss."""
    return "query loss" if metric is None else (getattr(metric, "__name__", None) or "metric").replace("_", " ")


def _same_shape(first: str, a: Tensor, second: str, b: Tensor) -> None:
    """Refuse what would broadcast, and give a wrong number without a word."""
    if a.shape != b.shape:
        raise LossError(
            f"{first} have the shape {tuple(a.shape)} of one task, but {second} {tuple(b.shape)}; they must be equal"
        )


def _predicted(model: nn.Module, inputs: Any) -> Tensor:
    found = _called(model, inputs)
    predictions: object = getattr(found, "logits", found)
    if not isinstance(predictions, Tensor):
        raise LossError(
            f"the model gave {type(predictions).__name__}, and the losses and metrics of mn.metrics take a tensor, or "
            "what has .logits; write one of your own: def loss(model, batch): take what you need of "
            "model(batch.inputs), and return a scalar"
        )
    return predictions


def _called(model: nn.Module, inputs: Any) -> object:
    """What the model makes of inputs; of a dict by its names, where it has arguments of these and not one for all."""
    if not isinstance(inputs, Mapping):
        return model(inputs)
    try:
        inspect.signature(model.forward).bind(**inputs)
    except TypeError as error:
        unfit = str(error)
    else:
        return model(**inputs)
    try:
        return model(inputs)
    except Exception as error:
        error.add_note(
            "The inputs are a dict, and were given to the model as one argument, as its forward() does not take "
            f"{', '.join(map(str, inputs))}: {unfit}."
        )
        raise


def accuracy(model: nn.Module, batch: Batch) -> Tensor:
    """Share of examples whose largest logit is the target's; those of target -100, padding, do not count.

    Args:
        model: Maps inputs ``[n, ...]`` to logits ``[n, classes]``.
        batch: Targets are class indices ``[n]``.

    Raises:
        LossError: Shapes that do not fit.

    Example:
        >>> import torch, metanudge as mn
        >>> batch = mn.Batch(torch.eye(3), torch.tensor([0, 1, 0]))
        >>> round(float(mn.metrics.accuracy(torch.nn.Identity(), batch)), 3)
        0.667
    """
    logits: Tensor = _predicted(model, batch.inputs)
    if logits.ndim == 0 or logits.shape[-1] < 2:
        raise LossError(
            f"accuracy needs a logit for each of at least two classes, [n, classes], but the model gave "
            f"{tuple(logits.shape)}; for one logit compare its sign with the targets in a metric of your own"
        )
    _same_shape("logits without their last axis", logits[..., 0], "class indices as targets", batch.targets)
    counts = counted(batch.targets)
    hits: Tensor = (logits.argmax(-1) == batch.targets) & counts
    kind = accumulator(logits.dtype)  # bfloat16 has no room for tenths of a per cent
    share: Tensor = hits.to(kind).sum() / counts.to(kind).sum()
    return share


def squared_error(model: nn.Module, batch: Batch) -> Tensor:
    """Mean squared error of a regression, over targets other than NaN, which are missing, or padding; a loss.

    Args:
        model: Maps inputs ``[n, ...]`` to predictions in the shape of the targets.
        batch: Targets ``[n, ...]``, floats.

    Raises:
        LossError: Predictions of another shape; targets that are no floats.

    Example:
        >>> import torch, metanudge as mn
        >>> batch = mn.Batch(torch.ones(4, 1), torch.zeros(4, 1))
        >>> float(mn.metrics.squared_error(torch.nn.Identity(), batch))
        1.0
    """
    predictions: Tensor = _predicted(model, batch.inputs)
    _same_shape("predictions", predictions, "targets", batch.targets)
    if not batch.targets.is_floating_point():
        cure = (
            "take torch.view_as_real of both in a loss of your own"
            if batch.targets.is_complex()
            else "give targets.float()"
        )
        raise LossError(f"squared_error takes targets that are floats, got {batch.targets.dtype}; {cure}")
    missing = batch.targets.isnan()
    error: Tensor = (predictions - batch.targets).masked_fill(missing, 0.0)  # where() would copy the number to a GPU
    mean: Tensor = error.square().sum(dtype=accumulator(error.dtype)) / (~missing).sum()
    return mean


def cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross entropy of a classifier, over targets other than -100, padding; a loss.

    Args:
        model: Maps inputs ``[n, ...]`` to logits ``[n, classes]``.
        batch: Targets are class indices ``[n]``.

    Raises:
        LossError: Shapes that do not fit.

    Example:
        >>> import torch, metanudge as mn
        >>> batch = mn.Batch(torch.zeros(3, 4), torch.tensor([0, 1, 3]))
        >>> round(float(mn.metrics.cross_entropy(torch.nn.Identity(), batch).exp()), 3)
        4.0
    """
    logits: Tensor = _predicted(model, batch.inputs)
    _same_shape("logits without their last axis", logits[..., 0], "class indices as targets", batch.targets)
    return F.cross_entropy(logits.flatten(0, -2), batch.targets.flatten(), ignore_index=IGNORED)
