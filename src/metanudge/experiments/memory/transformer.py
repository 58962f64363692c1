"""Peak memory and time against the depth of a transformer and the length of its sequences."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import metanudge as mn
from metanudge.experiments.memory.candidates import EVERYWHERE, EXECUTIONS, SECOND_ORDER, Inner
from metanudge.experiments.memory.claims import memory_claim, time_claim
from metanudge.experiments.memory.figures import draw
from metanudge.experiments.memory.measuring import QUICK, Job, Measuring, measure
from metanudge.experiments.study import Advance, Study


@dataclass(frozen=True)
class TransformerSettings:
    """Settings of the study.

    Attributes:
        depths: Layers, at the first of ``lengths``.
        lengths: Tokens a sequence, at the first of ``depths``.
        width: Of the residual stream.
        sequences: Of support and of query.
        vocabulary: Tokens there are.
        inner_steps: Of every estimator.
    """

    depths: tuple[int, ...] = (2, 4, 8, 16)
    lengths: tuple[int, ...] = (64, 128, 256, 512)
    width: int = 128
    heads: int = 4
    sequences: int = 8
    vocabulary: int = 64
    inner_steps: int = 3
    measuring: Measuring = field(default_factory=Measuring)
    seed: int = 0

    @classmethod
    def quick(cls) -> Self:
        """Two depths, two lengths, fewer sequences, one inner step."""
        return cls(depths=(1, 2), lengths=(64, 256), sequences=4, inner_steps=1, measuring=QUICK)


class Transformer(nn.Module):
    """An encoder that tells every token's class."""

    def __init__(self, settings: TransformerSettings, depth: int, length: int) -> None:
        super().__init__()
        width = settings.width
        self.embedding = nn.Embedding(settings.vocabulary, width)
        self.position = nn.Parameter(0.02 * torch.randn(length, width))
        self.layers = nn.Sequential(
            *(
                nn.TransformerEncoderLayer(
                    width, settings.heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
                )
                for _ in range(depth)
            )
        )
        self.head = nn.Linear(width, settings.vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        """``[n, length]`` to ``[n, length, vocabulary]``."""
        logits: Tensor = self.head(self.layers(self.embedding(tokens) + self.position))
        return logits


def fused(model: nn.Module, batch: mn.Batch) -> Tensor:
    """Cross entropy, with whatever attention kernel torch chooses."""
    return F.cross_entropy(model(batch.inputs).flatten(0, 1), batch.targets.flatten())


def unfused(model: nn.Module, batch: mn.Batch) -> Tensor:
    """The same with attention out of plain operations, which can be differentiated twice."""
    with sdpa_kernel(SDPBackend.MATH):
        return fused(model, batch)


def network(settings: TransformerSettings, second_order: bool, depth: int, length: int) -> Inner:
    """Tokens of noise; what they say changes neither memory nor time."""
    torch.manual_seed(settings.seed)
    model = Transformer(settings, depth, length)

    def batch() -> mn.Batch:
        tokens = torch.randint(settings.vocabulary, (2, 1, settings.sequences, length))
        return mn.Batch(*tokens)

    return Inner(model, unfused if second_order else fused, mn.Tasks(batch(), batch()))


SUMMARY = (
    "A transformer encoder as torch has it. First-order estimators run the fused attention kernel, as training does; "
    "it has no second derivative, so that iMAML and MAML have to compute attention by plain operations, whose memory "
    "grows with the square of the length."
)
CAPTION = (
    f"Peak memory beyond the idle process, and time, of one meta-gradient, against layers and tokens. {EXECUTIONS}"
)


def run(settings: TransformerSettings, advance: Advance) -> Study:
    """Measure every estimator at every depth and every length."""
    shapes = {f"depth_{depth}": (depth, settings.lengths[0]) for depth in settings.depths}
    shapes |= {f"length_{length}": (settings.depths[0], length) for length in settings.lengths}
    jobs = [
        Job(name, x, partial(network, settings, name in SECOND_ORDER, *shape), settings.inner_steps)
        for name in EVERYWHERE
        for x, shape in shapes.items()
    ]
    metrics = measure(jobs, settings.measuring, advance)
    deepest, longest = settings.depths[-1], settings.lengths[-1]
    claims = [
        check(metrics, x, place)
        for x, place in ((f"depth_{deepest}", f"{deepest} layers"), (f"length_{longest}", f"{longest} tokens"))
        for check in (memory_claim, time_claim)
    ]
    panels = {
        f"layers ({settings.lengths[0]} tokens)": {f"depth_{depth}": depth for depth in settings.depths},
        f"tokens ({settings.depths[0]} layers)": {f"length_{length}": length for length in settings.lengths},
    }
    figures = {"transformer": (draw(metrics, panels), CAPTION)}
    return Study("transformer", "A transformer, against depth and length", SUMMARY, claims, metrics, figures)
