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
from metanudge.experiments.memory.candidates import EVERYWHERE, SECOND_ORDER, Inner
from metanudge.experiments.memory.claims import graphs_claims, memory_claim, time_claim
from metanudge.experiments.memory.measuring import BRIEF, QUICK, Job, Measuring
from metanudge.experiments.memory.places import Device, check, finished, measure, those_of
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
    device: Device = "cpu"
    seed: int = 0

    def __post_init__(self) -> None:
        check(self.device)

    @classmethod
    def quick(cls) -> Self:
        """Two depths, two lengths, fewer sequences, one inner step."""
        return cls(depths=(1, 2), lengths=(64, 256), sequences=4, inner_steps=1, measuring=QUICK)


@dataclass(frozen=True)
class OnGpu(TransformerSettings):
    """As wide as BERT, in bfloat16 where torch's autocast takes it, which is what flash attention runs in."""

    depths: tuple[int, ...] = (3, 6, 12, 24)
    lengths: tuple[int, ...] = (512, 1024, 2048, 4096)
    width: int = 768
    heads: int = 12
    vocabulary: int = 8192
    measuring: Measuring = BRIEF
    device: Device = "cuda"


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
    """Cross entropy, with whatever attention kernel torch chooses; on a GPU, in bfloat16."""
    kind = batch.inputs.device.type
    with torch.autocast(kind, torch.bfloat16, enabled=kind == "cuda"):
        return cross_entropy(model, batch)


def unfused(model: nn.Module, batch: mn.Batch) -> Tensor:
    """With attention out of plain operations, which can be differentiated twice, though not under autocast."""
    with sdpa_kernel(SDPBackend.MATH):
        return cross_entropy(model, batch)


def cross_entropy(model: nn.Module, batch: mn.Batch) -> Tensor:
    """Of every token."""
    return F.cross_entropy(model(batch.inputs).flatten(0, 1), batch.targets.flatten())


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
    "grows with the square of the length. On a GPU the first-order ones run in bfloat16 by autocast, under which that "
    "attention cannot be differentiated twice, so that the others are in float32; and where sequences are short, it "
    "waits for kernels to be launched, of which an estimate has some more than its gradients have."
)


def run(settings: TransformerSettings, advance: Advance) -> Study:
    """Measure every estimator at every depth and every length."""
    shapes = {f"depth_{depth}": (depth, settings.lengths[0]) for depth in settings.depths}
    shapes |= {f"length_{length}": (settings.depths[0], length) for length in settings.lengths}
    jobs = [
        Job(name, x, partial(network, settings, name in SECOND_ORDER, *shape), settings.inner_steps)
        for name in those_of(settings.device, EVERYWHERE)
        for x, shape in shapes.items()
    ]
    metrics = measure(settings.device, jobs, settings.measuring, advance)
    deepest, longest = settings.depths[-1], settings.lengths[-1]
    claims = [
        judge(metrics, x, place)
        for x, place in ((f"depth_{deepest}", f"{deepest} layers"), (f"length_{longest}", f"{longest} tokens"))
        for judge in (memory_claim, time_claim)
    ]
    words = {f"depth_{depth}": f"{depth} layers" for depth in settings.depths}
    claims += graphs_claims(metrics, words | {f"length_{length}": f"{length} tokens" for length in settings.lengths})
    panels = {
        f"layers ({settings.lengths[0]} tokens)": {f"depth_{depth}": depth for depth in settings.depths},
        f"tokens ({settings.depths[0]} layers)": {f"length_{length}": length for length in settings.lengths},
    }
    return finished(
        settings.device,
        "transformer",
        "A transformer, against depth and length",
        SUMMARY,
        claims,
        metrics,
        panels,
    )
