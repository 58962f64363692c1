"""The harmonic regression of Lacoste et al., 2018: sums of two sines, seen through a window of their own."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from metanudge.errors import SettingsError
from metanudge.settings import check_steps
from metanudge.tasks.seeding import stream
from metanudge.types import Batch, Tasks


def harmonic(
    number: int,
    *,
    shots: int = 10,
    queries: int = 10,
    noise: float = 0.0,
    seed: int = 0,
    first: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Tasks:
    r"""Draw a stack of harmonic tasks, with the ranges of torchmeta.

    .. math::
        y = a_1 \sin(\omega x + b_1) + a_2 \sin(2 \omega x + b_2) + \text{noise}, \qquad x \sim N(\mu, 1),

        a \sim N(0, 1), \quad \omega \sim U[5, 7], \quad b \sim U[0, 2 \pi], \quad \mu \sim U[-4, 4]

    Task i is a pure function of (seed, i).

    Args:
        number: Tasks T, with indices first .. first + T - 1.
        shots: Support examples of a task.
        queries: Query examples of a task.
        noise: Standard deviation of the noise, >= 0.
        seed: Of the family.
        first: Index of the first task.
        dtype: Of inputs and targets, each ``[T, n, 1]``.

    Raises:
        SettingsError: A value out of its range.

    Source: Lacoste et al., Uncertainty in Multitask Transfer Learning, arXiv:1806.07528.

    Example:
        >>> import metanudge as mn
        >>> mn.tasks.harmonic(3, shots=5).support.targets.shape
        torch.Size([3, 5, 1])
    """
    for name, size in (("number", number), ("shots", shots), ("queries", queries)):
        check_steps(size, name)
    if not 0 <= noise < math.inf:
        raise SettingsError(f"noise is a standard deviation of at least 0, got {noise!r}")

    def draw(index: int) -> tuple[Tensor, Tensor]:
        generator = stream(seed, index)
        frequency, mean, *phases = torch.rand(4, generator=generator, dtype=torch.float64, device="cpu")
        normal = torch.randn(2 + 2 * (shots + queries), generator=generator, dtype=torch.float64, device="cpu")
        amplitudes, (x, disturbance) = normal[:2], normal[2:].reshape(2, shots + queries, 1)
        x = 8 * mean - 4 + x
        y = noise * disturbance
        for multiple, (amplitude, phase) in enumerate(zip(amplitudes, phases, strict=True), start=1):
            y = y + amplitude * torch.sin(multiple * (5 + 2 * frequency) * x + 2 * math.pi * phase)
        return x, y

    drawn = [draw(index) for index in range(first, first + number)]
    x, y = (torch.stack(same).to(dtype) for same in zip(*drawn, strict=True))
    return Tasks(Batch(x[:, :shots], y[:, :shots]), Batch(x[:, shots:], y[:, shots:]))
