"""How far the default nudge displaces solutions, and whether another one would have come nearer.

The error of the estimate against the nudge, in multiples of the mean one that ``nu="auto"`` takes: below it round-off
grows, above it truncation. On a transformer, whose embeddings make its parameters long and its loss no less bent, and
on the network of the sinusoid; smooth and kinked; in float32 and under autocast to bfloat16.
"""

from __future__ import annotations

import copy
import math
import warnings
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Self

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map

import metanudge as mn
from metanudge.estimators.base import Estimator
from metanudge.experiments.networks import seeded, sinusoid_network
from metanudge.experiments.study import COLOURS, Advance, Claim, Study, figure
from metanudge.types import LossFunction

SUMMARY = (
    "nu = auto takes the loss to bend over four times the way on which the support loss drove the parameters, or over "
    "their own length where that is shorter. On the sinusoid's networks the two are about the same. A transformer is "
    "long by its embeddings alone; what it is like when measured by its length, is told in docs/results.md. (The four "
    "was chosen on such networks.) Under autocast to bfloat16 round-off asks for larger nudges. With ReLU a larger one "
    "averages over kinks, of which the exact derivative sees none. The default is one a task; the curves are of one "
    "for all tasks, in multiples of the default's mean. The exact meta-gradient is that of a solve whose residual is "
    "in the metrics; where it stays above 1 %, kinks keep it from its solution."
)
CAPTION = (
    "Relative error of the mean meta-gradient, 16 inner steps, against the nudge in multiples of the default's mean; "
    "points: the default itself. The horizontal lines are FOMAML's."
)
FACTORS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
NUDGES: dict[Literal["linear", "full"], str] = {"linear": "fobmaml_symmetric", "full": "fobmaml_forward"}
"""With the colours of their curves."""
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Problem(NamedTuple):
    """A network at some point of its training, and tasks."""

    model: nn.Module
    loss: LossFunction
    tasks: mn.Tasks
    prox: float


@dataclass(frozen=True)
class DisplacementSettings:
    """Settings of the study."""

    networks: tuple[str, ...] = ("transformer_gelu", "transformer_relu", "sinusoid_tanh", "sinusoid_relu")
    transformer_prox: float = 1.0
    sinusoid_prox: float = 2.0
    tasks: int = 4
    steps: int = 16
    reference_steps: int = 400
    training_steps: int = 300  # of the sinusoid's networks
    seed: int = 0

    @classmethod
    def quick(cls) -> Self:
        """One network of each kind, hardly trained."""
        return cls(networks=("transformer_gelu", "sinusoid_tanh"), tasks=2, reference_steps=100, training_steps=20)


class Tokens(nn.Module):
    """A transformer encoder of width 32, with embeddings as torch draws them."""

    def __init__(self, activation: str) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 64, 0.0, activation, batch_first=True)
        self.embedding, self.head = nn.Embedding(50, 32), nn.Linear(32, 5)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """``[n, length]`` to ``[n, 5]``."""
        logits: Tensor = self.head(self.encoder(self.embedding(tokens)).mean(1))
        return logits


def classified(model: nn.Module, batch: mn.Batch) -> Tensor:
    """Cross entropy, with attention that can be differentiated twice, for the reference."""
    with sdpa_kernel(SDPBackend.MATH):
        return F.cross_entropy(model(batch.inputs), batch.targets)


def problem(name: str, settings: DisplacementSettings) -> Problem:
    """Of a network's name: its kind and its activation."""
    kind, activation = name.split("_")
    if kind == "transformer":
        g = torch.Generator().manual_seed(settings.seed)
        tokens, classes = (torch.randint(top, (2, settings.tasks, 16, 8), generator=g) for top in (50, 5))
        batches = (mn.Batch(*both) for both in zip(tokens, classes[..., 0], strict=True))
        model = seeded(lambda: Tokens(activation), settings.seed)
        return Problem(model, classified, mn.Tasks(*batches), settings.transformer_prox)
    model = sinusoid_network(activation, settings.seed)
    learner = mn.MetaLearner(model, mn.metrics.squared_error, prox=settings.sinusoid_prox)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for step in range(settings.training_steps):
        optimizer.zero_grad()
        learner.backward(mn.tasks.sinusoid(25, seed=settings.seed + 1, first=25 * step))
        nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
    tasks = mn.tasks.sinusoid(settings.tasks, seed=settings.seed + 2)
    return Problem(model, mn.metrics.squared_error, tasks, settings.sinusoid_prox)


def estimate(
    given: Problem, steps: int, estimator: Estimator, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, mn.MetaStep]:
    """The mean meta-gradient, and what is told of it: in float64 or float32; for bfloat16 under autocast."""
    wide, cast = (torch.float32, True) if dtype == torch.bfloat16 else (dtype, False)
    model = copy.deepcopy(given.model).to(wide)
    tasks = tree_map(lambda leaf: leaf.to(wide) if leaf.is_floating_point() else leaf, given.tasks)
    learner = mn.MetaLearner(
        model,
        given.loss,
        prox=given.prox,
        solver=mn.Nesterov(steps),
        estimator=estimator,
        execution="in_place" if cast else "vectorized",
    )
    with torch.autocast("cpu", torch.bfloat16, enabled=cast):
        step = learner.backward(tasks)
    return torch.cat([leaf.grad.flatten().double() for leaf in model.parameters() if leaf.grad is not None]), step


def errors(given: Problem, settings: DisplacementSettings, exact: Tensor, dtype: torch.dtype) -> dict[str, Any]:
    """Of FOMAML, and of either nudge by the multiple of the default."""

    def of(estimator: Estimator) -> tuple[float, float]:
        found, step = estimate(given, settings.steps, estimator, dtype)
        error = float((found - exact).norm() / exact.norm())
        return math.inf if step.dropped_tasks or not math.isfinite(error) else error, step.nu

    record: dict[str, Any] = {"fomaml": of(mn.FOMAML())[0]}
    for nudge in NUDGES:
        default, nu = of(mn.FOBMAML(nudge=nudge))
        by_factor = {f"{factor:g}": of(mn.FOBMAML(nudge=nudge, nu=factor * nu))[0] for factor in FACTORS}
        record[nudge] = {"default": default, "nu": nu, "by_factor": by_factor}
    return record


def run(settings: DisplacementSettings, advance: Advance) -> Study:
    """Every network, precision, nudge and multiple of the default."""
    metrics: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", mn.UnsolvedWarning)
        warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)  # attention under vmap
        for place, name in enumerate(settings.networks):
            given = problem(name, settings)
            exact, solved = estimate(given, settings.reference_steps, mn.Tangent(), torch.float64)
            metrics[name] = {"reference": {"residual": solved.residual}}
            for half, (precision, dtype) in enumerate(PRECISIONS.items(), 1):
                metrics[name][precision] = errors(given, settings, exact, dtype)
                advance((place + half / 2) / len(settings.networks))
    figures = {"displacement": (_draw(metrics), CAPTION)}
    return Study("displacement", "How far to nudge", SUMMARY, _claims(metrics), metrics, figures)


def _claims(metrics: dict[str, Any]) -> list[Claim]:
    smooth = {name: found["float32"]["linear"] for name, found in metrics.items() if not name.endswith("relu")}
    unsolved = [name for name in smooth if metrics[name]["reference"]["residual"] > 1e-2]
    worst = max(found["default"] / min(found["default"], *found["by_factor"].values()) for found in smooth.values())
    beaten = [
        f"{name} in {precision}, {nudge} ({record[nudge]['default']:.2f}, FOMAML {record['fomaml']:.2f})"
        for name, found in metrics.items()
        for precision in PRECISIONS
        for record in [found[precision]]
        for nudge in NUDGES
        if not record[nudge]["default"] < record["fomaml"]
    ]
    shown = ", ".join(f"{name} {found['default']:.3f}" for name, found in smooth.items())
    return [
        Claim(
            "The default nudge is nearly the best one (linear, smooth networks, float32)",
            "its error is at most 1.5 times the least",
            f"{worst:.2f} times at most; errors {shown}"
            if not unsolved
            else f"no exact gradient: {', '.join(unsolved)}",
            not unsolved and worst <= 1.5,
        ),
        Claim(
            "In either precision, smooth or not, the default is nearer to the meta-gradient than FOMAML",
            "in every case",
            f"not so: {'; '.join(beaten)}" if beaten else "in every case",
            not beaten,
        ),
    ]


def _draw(metrics: dict[str, Any]) -> Figure:
    drawn, axes = figure(len(metrics), width=3.2)
    for ax, (name, found) in zip(axes, metrics.items(), strict=True):
        for precision, line in (("float32", "-"), ("bfloat16", "--")):
            record = found[precision]
            for nudge, colour in NUDGES.items():
                curve = record[nudge]["by_factor"]
                ax.plot([float(key) for key in curve], list(curve.values()), line, color=COLOURS[colour])
                ax.plot(1.0, record[nudge]["default"], "o", color=COLOURS[colour], markersize=5)
            ax.axhline(record["fomaml"], linestyle=line, color=COLOURS["fomaml"], linewidth=0.8)
        ax.set(xscale="log", yscale="log", title=name.replace("_", ", "), xlabel="nudge / default")
        ax.set_ylim(top=5)
    axes[0].set_ylabel("relative error")
    for nudge, colour in NUDGES.items():
        axes[0].plot([], [], color=COLOURS[colour], label=nudge)
    axes[0].plot([], [], "--", color="#666666", label="bfloat16")
    axes[0].legend(fontsize=7)
    return drawn
