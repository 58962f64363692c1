"""A support set that does not fit, or need not come, at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch

from metanudge.errors import SettingsError, TasksError
from metanudge.types import Batch, Tasks


class Minibatches:
    """The support set of one task as minibatches: step k of every solve sees minibatch k.

    Free and nudged solves of a task then differ in the nudge alone, as they must (docs/theory.md, matched solves).
    What is reported of the support loss (``MetaStep.support_loss``, ``residual``), and what FOBMAML takes of it for
    parameters that are shared, is of minibatch 0, and ``error_bound`` is NaN: a bound would not know how far one
    minibatch is from another. In-place execution only, and not for ``IMAML`` and ``Tangent``. The task goes in a list,
    as all single tasks do.

    Args:
        source: A function of the step, ``k -> mn.Batch``, called again for every solve: it has to return the same batch
            for the same k. What it draws from the default generators of torch, numpy and ``random`` is the same for
            every solve by itself. Or a list of batches, begun again at its end. Or any other iterable of batches, which
            is read as far as needed, once, and kept: of a DataLoader of pairs,
            ``(mn.Batch(x, y) for x, y in loader)``.

    Raises:
        SettingsError: Neither a function nor an iterable; a batch, or a task, alone.
        TasksError: (when used) No minibatch, or something that is none.

    Example:
        >>> import torch, metanudge as mn
        >>> x = torch.randn(32, 1)
        >>> support = mn.Minibatches([mn.Batch(x[i : i + 8], 3 * x[i : i + 8]) for i in range(0, 32, 8)])
        >>> task = mn.Tasks(support=support, query=mn.Batch(x, 3 * x))
        >>> solver = mn.GradientDescent(steps=4, lr=0.1)
        >>> learner = mn.MetaLearner(torch.nn.Linear(1, 1), mn.metrics.squared_error, solver=solver, microbatch=8)
        >>> learner.backward([task]).dropped_tasks
        0
    """

    def __init__(self, source: Callable[[int], Batch] | Iterable[Batch]) -> None:
        if isinstance(source, Batch | Tasks) or not (callable(source) or isinstance(source, Iterable)):
            raise SettingsError(
                "Minibatches expects a function k -> mn.Batch, a list of mn.Batch or an iterable such as a DataLoader, "
                f"got {type(source).__name__}"
            )
        self._function = source if callable(source) else None
        self._kept: list[Batch] = list(source) if isinstance(source, list | tuple) else []
        self._rest: Iterator[Batch] = iter(()) if callable(source) or self._kept else iter(source)

    __iter__ = None  # a list of them would never end

    def __getitem__(self, step: int) -> Batch:
        """Minibatch number ``step``."""
        batch: object = self._read(step) if self._function is None else self._function(step)
        if not isinstance(batch, Batch):
            pair = isinstance(batch, tuple | list) and len(batch) == 2
            wrap = "; of pairs make batches: mn.Minibatches(mn.Batch(x, y) for x, y in loader)" if pair else ""
            raise TasksError(f"minibatch {step} must be mn.Batch(inputs, targets), got {type(batch).__name__}{wrap}")
        return batch

    def to(self, to: torch.device | str | torch.dtype) -> Minibatches:
        """The same on a device, or of a dtype, as ``Batch.to``; each moved when it is asked for."""
        return Minibatches(lambda step: self[step].to(to))

    def _read(self, step: int) -> Batch:
        while step >= len(self._kept):
            try:
                self._kept.append(next(self._rest))
            except StopIteration:
                break
        if not self._kept:
            raise TasksError("there are no minibatches; the iterable was empty")
        return self._kept[step % len(self._kept)]


def as_minibatches(batch: object) -> Minibatches | None:
    """``batch`` where it is minibatches."""
    return batch if isinstance(batch, Minibatches) else None
