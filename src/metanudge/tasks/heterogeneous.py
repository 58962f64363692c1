"""What the linear and the logistic family share: inputs of a scale, a spectrum and a rotation of the task's own."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from metanudge.tasks.seeding import stream


class Family(NamedTuple):
    """What the tasks are drawn from; see ``logistic``."""

    features: int
    points: int
    common: float
    difference: float
    scales: float
    anisotropy: float
    seed: int


def draw_scores(family: Family, index: int) -> tuple[Tensor, Tensor, torch.Generator]:
    """Inputs ``[n, d]``, <w + v_i, x> ``[n]``, and the generator for what is still to be drawn."""
    features = family.features
    shared = torch.randn(features, generator=stream(family.seed, 0), dtype=torch.float64, device="cpu")
    shared *= family.common / shared.norm()
    generator = stream(family.seed, index + 1)  # stream 0 is what the tasks share

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu")

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64, device="cpu")

    rotation, _ = torch.linalg.qr(normal(features, features))
    spectrum = family.scales ** (2 * uniform(1) - 1) * family.anisotropy ** (2 * uniform(features) - 1)
    inputs = normal(family.points, features) * spectrum @ rotation.T
    weights = shared + family.difference * normal(features) / features**0.5
    return inputs, inputs @ weights, generator
