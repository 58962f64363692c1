"""The networks of the experiments, at PyTorch's default draw for a seed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

KINDS: dict[str, type[nn.Module]] = {"tanh": nn.Tanh, "relu": nn.ReLU, "gelu": nn.GELU}
ACTIVATIONS = ("tanh", "relu")
"""Of the sinusoid's studies: a smooth one and the kinked one."""


def seeded(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    """A model from its default draw; the caller's generator is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


def sinusoid_network(activation: str, seed: int) -> nn.Module:
    """1-40-40-1, of Finn et al., ICML 2017 (there with ReLU)."""
    kind = KINDS[activation]

    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(1, 40), kind(), nn.Linear(40, 40), kind(), nn.Linear(40, 1))

    return seeded(make, seed)


def mnist1d_network(ways: int, activation: str, seed: int) -> nn.Module:
    """Three convolutions of 25 channels, of Greydanus & Kobak, ICML 2024 (there with ReLU)."""

    def make() -> nn.Module:
        layers: list[nn.Module] = []
        for channels, kernel in ((1, 5), (25, 3), (25, 3)):
            layers += [nn.Conv1d(channels, 25, kernel, stride=2, padding=1), KINDS[activation]()]
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(25 * 5, ways))

    return seeded(make, seed)
