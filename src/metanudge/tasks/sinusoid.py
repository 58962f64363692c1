"""The sinusoid regression of Finn, Abbeel & Levine, ICML 2017."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from metanudge.settings import check_steps
from metanudge.tasks.seeding import stream
from metanudge.types import Batch, Tasks


def sinusoid(
    number: int,
    *,
    shots: int = 10,
    queries: int = 10,
    seed: int = 0,
    first: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Tasks:
    r"""Draw a stack of sinusoid tasks.

    .. math::
        y = a \sin(x - b), \qquad a \sim U[0.1, 5], \quad b \sim U[0, \pi], \quad x \sim U[-5, 5]

    Task i is a pure function of (seed, i): any process draws the same one, in any order.

    Args:
        number: Tasks T, with indices first .. first + T - 1.
        shots: Support examples of a task.
        queries: Query examples of a task.
        seed: Of the family.
        first: Index of the first task.
        dtype: Of inputs and targets, each ``[T, n, 1]``.

    Example:
        >>> import torch
        >>> from metanudge.tasks import sinusoid
        >>> tasks = sinusoid(3, shots=5)
        >>> tasks.support.inputs.shape
        torch.Size([3, 5, 1])
        >>> again = sinusoid(1, shots=5, first=2)
        >>> torch.equal(again.query.targets[0], tasks.query.targets[2])
        True
    """
    for name, size in (("number", number), ("shots", shots), ("queries", queries)):
        check_steps(size, name)

    def draw(index: int) -> tuple[Tensor, Tensor]:
        uniform = torch.rand(2 + shots + queries, 1, generator=stream(seed, index), dtype=torch.float64, device="cpu")
        amplitude, phase, x = 0.1 + 4.9 * uniform[0], math.pi * uniform[1], 10 * uniform[2:] - 5
        return x, amplitude * torch.sin(x - phase)

    drawn = [draw(index) for index in range(first, first + number)]
    x, y = (torch.stack(same).to(dtype) for same in zip(*drawn, strict=True))
    return Tasks(Batch(x[:, :shots], y[:, :shots]), Batch(x[:, shots:], y[:, shots:]))
