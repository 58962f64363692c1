"""Peak memory and time against the channels of a deep convolutional network."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metanudge as mn
from metanudge.experiments.memory.candidates import EVERYWHERE, Inner
from metanudge.experiments.memory.claims import graphs_claims, memory_claim, time_claim
from metanudge.experiments.memory.measuring import BRIEF, QUICK, Job, Measuring
from metanudge.experiments.memory.places import Device, check, finished, measure, those_of
from metanudge.experiments.study import Advance, Study


@dataclass(frozen=True)
class ChannelsSettings:
    """Settings of the study.

    Attributes:
        channels: Of all layers.
        blocks: Each a depthwise and a pointwise convolution, GELU, and a skip.
        size: Height and width of an image.
        ways: Classes.
        shots: Images a class, of support and of query.
        inner_steps: Of every estimator.
    """

    channels: tuple[int, ...] = (25, 50, 100, 175, 250)
    blocks: int = 8
    size: int = 16
    ways: int = 5
    shots: int = 5
    inner_steps: int = 3
    measuring: Measuring = field(default_factory=Measuring)
    device: Device = "cpu"
    seed: int = 0

    def __post_init__(self) -> None:
        check(self.device)

    @classmethod
    def quick(cls) -> Self:
        """The narrowest and the widest network, shallower, fewer images, one inner step."""
        return cls(
            channels=(25, 250),
            blocks=4,
            shots=3,
            inner_steps=1,
            measuring=QUICK,
        )


@dataclass(frozen=True)
class OnGpu(ChannelsSettings):
    """Larger images."""

    size: int = 48
    measuring: Measuring = BRIEF
    device: Device = "cuda"


class Block(nn.Module):
    """x + GELU(pointwise(depthwise(x)))."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.pointwise = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """``[n, C, H, W]`` to the same."""
        return x + F.gelu(self.pointwise(self.depthwise(x)))


def network(settings: ChannelsSettings, channels: int) -> Inner:
    """Images of noise; what they show changes neither memory nor time."""
    torch.manual_seed(settings.seed)
    model = nn.Sequential(
        nn.Conv2d(3, channels, 3, padding=1),
        *(Block(channels) for _ in range(settings.blocks)),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(channels, settings.ways),
    )

    def batch() -> mn.Batch:
        images = torch.randn(1, settings.ways * settings.shots, 3, settings.size, settings.size)
        return mn.Batch(images, torch.arange(settings.ways).repeat_interleave(settings.shots)[None])

    return Inner(model, mn.metrics.cross_entropy, mn.Tasks(batch(), batch()))


SUMMARY = (
    "Few-shot images on a deep network of depthwise-separable blocks: many activations for few parameters, which is "
    "where memory decides what can be trained."
)


def run(settings: ChannelsSettings, advance: Advance) -> Study:
    """Measure every estimator at every width."""
    jobs = [
        Job(name, str(channels), partial(network, settings, channels), settings.inner_steps)
        for name in those_of(settings.device, EVERYWHERE)
        for channels in settings.channels
    ]
    metrics = measure(settings.device, jobs, settings.measuring, advance)
    widest = str(settings.channels[-1])
    claims = [judge(metrics, widest, f"{widest} channels") for judge in (memory_claim, time_claim)]
    claims += graphs_claims(metrics, {str(channels): f"{channels} channels" for channels in settings.channels})
    panels = {"channels": {str(channels): channels for channels in settings.channels}}
    return finished(settings.device, "channels", "Against channels", SUMMARY, claims, metrics, panels)
