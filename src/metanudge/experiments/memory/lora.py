"""Peak memory and time of adapting LoRA adapters on a frozen transformer, against the width of the transformer."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metanudge as mn
from metanudge.errors import SettingsError
from metanudge.experiments.memory.candidates import EVERYWHERE, SECOND_ORDER, Inner
from metanudge.experiments.memory.claims import graphs_claims, memory_claim, time_claim
from metanudge.experiments.memory.measuring import BRIEF, QUICK, Job, Measuring
from metanudge.experiments.memory.places import Device, check, finished, measure, those_of
from metanudge.experiments.study import Advance, Claim, Study

PACKAGES = ("transformers", "peft")


@dataclass(frozen=True)
class LoraSettings:
    """Settings of the study.

    Attributes:
        widths: Of the frozen base's residual stream.
        layers: Of the base.
        rank: Of the adapters, on the query and value projections.
        sequences: Of support and of query.
        length: Tokens a sequence.
        vocabulary: Tokens there are.
        inner_steps: Of every estimator.
    """

    widths: tuple[int, ...] = (64, 128, 256, 512)
    layers: int = 4
    heads: int = 4
    rank: int = 8
    sequences: int = 4
    length: int = 64
    vocabulary: int = 256
    inner_steps: int = 3
    measuring: Measuring = field(default_factory=Measuring)
    device: Device = "cpu"
    seed: int = 0

    def __post_init__(self) -> None:
        check(self.device)
        missing = [name for name in PACKAGES if find_spec(name) is None]
        if missing:
            raise SettingsError(
                f"the study lora needs {' and '.join(missing)}, which is not installed; pip install 'metanudge[peft]', "
                "or leave it out: --only steps channels transformer"
            )

    @classmethod
    def quick(cls) -> Self:
        """Two widths, fewer layers, one inner step."""
        return cls(widths=(64, 256), layers=2, inner_steps=1, measuring=QUICK)


@dataclass(frozen=True)
class OnGpu(LoraSettings):
    """Up to the width of a model of a billion parameters, with fewer layers, on pages of text."""

    widths: tuple[int, ...] = (256, 512, 1024, 2048)
    heads: int = 16
    length: int = 512
    vocabulary: int = 8192
    measuring: Measuring = BRIEF
    device: Device = "cuda"


def next_token(model: nn.Module, batch: mn.Batch) -> Tensor:
    """Cross entropy of the next token."""
    return F.cross_entropy(model(input_ids=batch.inputs).logits.flatten(0, 1), batch.targets.flatten())


def adapters(settings: LoraSettings, second_order: bool, width: int) -> Inner:
    """A Llama of random weights, frozen, with LoRA adapters to learn."""
    transformers, peft = (import_module(name) for name in PACKAGES)
    torch.manual_seed(settings.seed)
    base = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=settings.vocabulary,
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=settings.layers,
            num_attention_heads=settings.heads,
            num_key_value_heads=settings.heads,
            max_position_embeddings=settings.length,
            use_cache=False,
            attn_implementation="eager" if second_order else "sdpa",
        )
    )
    lora = peft.LoraConfig(r=settings.rank, lora_alpha=2 * settings.rank, target_modules=["q_proj", "v_proj"])

    def batch() -> mn.Batch:
        tokens = torch.randint(settings.vocabulary, (1, settings.sequences, settings.length + 1))
        return mn.Batch(tokens[..., :-1].contiguous(), tokens[..., 1:].contiguous())

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of the one package about the other
        model = peft.get_peft_model(base, lora)
    return Inner(model, next_token, mn.Tasks(batch(), batch()))


SUMMARY = (
    "LoRA through PEFT on a frozen Llama of random weights. What is adapted is small, so copies of it are nothing, and "
    "the frozen base is never copied: a meta-gradient has the peak of a training step. iMAML and MAML run with eager "
    "attention, the only one that can be differentiated twice."
)


def run(settings: LoraSettings, advance: Advance) -> Study:
    """Measure every estimator on every base."""
    jobs = [
        Job(name, str(width), partial(adapters, settings, name in SECOND_ORDER, width), settings.inner_steps)
        for name in those_of(settings.device, EVERYWHERE)
        for width in settings.widths
    ]
    preload = ("transformers.models.llama.modeling_llama", "peft")
    metrics = measure(settings.device, jobs, settings.measuring, advance, preload)
    widest = str(settings.widths[-1])
    place = f"width {widest}"
    claims: list[Claim] = [judge(metrics, widest, place) for judge in (memory_claim, time_claim)]
    claims += graphs_claims(metrics, {str(width): f"width {width}" for width in settings.widths})
    panels = {"width of the frozen base": {str(width): width for width in settings.widths}}
    return finished(settings.device, "lora", "LoRA on a frozen transformer", SUMMARY, claims, metrics, panels)
