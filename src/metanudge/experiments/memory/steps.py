"""Peak memory and time against the number of inner steps."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any, Self

import torch
from torch import nn

import metanudge as mn
from metanudge.experiments.memory.candidates import CANDIDATES, Inner
from metanudge.experiments.memory.claims import graphs_claims, lacking, peaks, time_claim
from metanudge.experiments.memory.measuring import BRIEF, QUICK, Job, Measuring
from metanudge.experiments.memory.places import Device, check, finished, measure, those_of
from metanudge.experiments.study import Advance, Claim, Study

SUMMARY = (
    "One meta-gradient of one task, on a deep narrow network whose memory is almost all activations. FO-B-MAML stands "
    'here, and in the studies below, for FOBMAML(nudge="full", start="initialization") with torch.optim.SGD as the '
    "inner solver, the configuration with the fewest copies; its default nudge, FOMAML and Reptile run with the same "
    "optimizer. The others need steps that can be differentiated or walked back, and take the same ones by "
    "GradientDescent. Everything at its default, that is vectorised with Nesterov, is shown as well."
)
ON_A_CPU = (
    "Every number is from a process of its own, on one thread. Memory is what the process holds at its peak beyond "
    "what it held before (imports, the model, the data, and what a first estimate of one step left behind: "
    "baseline_bytes in the metrics), with an allocator that returns freed blocks at once; beside it stand the bytes of "
    "the tensors alive, which are counted and exact. Time is processor time, with an allocator that keeps freed blocks."
)
FLAT, RATIO = 0.01, 10
COUNTED = 2**18
"""Bytes by which the kernel's count of resident pages may be off: it is kept in batches a processor."""


@dataclass(frozen=True)
class StepsSettings:
    """Settings of the study.

    Attributes:
        steps: Inner steps.
        limits: Largest number of steps of what grows with them, for the sake of memory and time.
        compared: Where second-order MAML is compared.
        width: Of a layer.
        depth: Hidden layers.
        examples: Of support and of query.
    """

    steps: tuple[int, ...] = (1, 5, 20, 50, 200, 1000)
    limits: dict[str, int] = field(
        default_factory=lambda: dict.fromkeys(
            ("maml", "maml_checkpointed", "hfmaml", "fobmaml_default", "fobmaml_vectorised"), 50
        )
    )
    compared: int = 20
    width: int = 32
    depth: int = 10
    examples: int = 16384
    measuring: Measuring = field(default_factory=Measuring)
    device: Device = "cpu"
    seed: int = 0

    def __post_init__(self) -> None:
        check(self.device)

    @classmethod
    def quick(cls) -> Self:
        """Fewer examples; up to 100 steps, and 20 for what takes longer."""
        slow = ("fobmaml_default", "fobmaml_vectorised", "hfmaml", "imaml", "maml_checkpointed", "maml")
        return cls(
            steps=(1, 20, 100),
            limits=dict.fromkeys(slow, 20),
            examples=4096,
            measuring=QUICK,
        )


@dataclass(frozen=True)
class OnGpu(StepsSettings):
    """Wider, with more examples."""

    limits: dict[str, int] = field(
        default_factory=lambda: (
            dict.fromkeys(("maml", "maml_checkpointed", "hfmaml", "imaml", "fobmaml_default", "fobmaml_vectorised"), 50)
            | dict.fromkeys(("fomaml", "reptile"), 200)
        )
    )
    width: int = 128
    examples: int = 2**15
    measuring: Measuring = BRIEF
    device: Device = "cuda"


def network(width: int, depth: int, examples: int, seed: int) -> Inner:
    """A sinusoid and a deep narrow network: almost all of its memory is activations."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = [nn.Linear(1, width), nn.ReLU()]
    for _ in range(depth - 1):
        layers += [nn.Linear(width, width), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(width, 1))
    return Inner(model, mn.metrics.squared_error, mn.tasks.sinusoid(1, shots=examples, queries=examples, seed=seed))


def run(settings: StepsSettings, advance: Advance) -> Study:
    """Measure every estimator at every number of steps it goes to."""
    make = partial(network, settings.width, settings.depth, settings.examples, settings.seed)
    jobs = [
        Job(name, str(steps), make, steps)
        for name in those_of(settings.device, CANDIDATES)
        for steps in settings.steps
        if steps <= settings.limits.get(name, steps)
    ]
    metrics = measure(settings.device, jobs, settings.measuring, advance)
    panels = {"inner steps": {str(steps): steps for steps in settings.steps}}
    summary = SUMMARY if settings.device == "cuda" else f"{SUMMARY}\n\n{ON_A_CPU}"
    return finished(
        settings.device,
        "steps",
        "Against inner steps",
        summary,
        claims(metrics, settings),
        metrics,
        panels,
        _limits(settings),
    )


def _limits(settings: StepsSettings) -> str:
    """What is not measured at all numbers of steps, and how far it is."""
    groups: dict[int, list[str]] = {}
    for name, limit in settings.limits.items():
        groups.setdefault(limit, []).append(CANDIDATES[name].label)
    told = "; ".join(f"to {limit} steps {', '.join(labels)}" for limit, labels in groups.items())
    return f"As far as memory and time go: {told}"


def claims(metrics: dict[str, Any], settings: StepsSettings) -> list[Claim]:
    """Whether the peak is flat, how much more MAML needs, and what the estimate costs."""
    first, last, compared = (str(steps) for steps in (settings.steps[0], settings.steps[-1], settings.compared))
    return [
        flat_claim(metrics, first, last),
        maml_claim(metrics, compared),
        time_claim(metrics, compared, f"{compared} inner steps"),
        *graphs_claims(metrics, {str(steps): f"{steps} steps" for steps in settings.steps}),
    ]


def flat_claim(metrics: dict[str, Any], first: str, last: str) -> Claim:
    """The peak does not grow."""
    statement = "FO-B-MAML's memory does not depend on the inner steps"
    if lacking(metrics, first, "fobmaml") or lacking(metrics, last, "fobmaml"):
        return Claim(statement, "room for it", "no room", False)
    kinds = peaks(metrics)
    growth = {word: table["fobmaml"][last] - table["fobmaml"][first] for word, table in kinds.items()}
    allowed = {word: FLAT * table["fobmaml"][first] for word, table in kinds.items()}
    grain = ""
    if "resident" in kinds:
        allowed["resident"], grain = max(allowed["resident"], COUNTED), " (or 0.25 MiB, the kernel's grain)"
    return Claim(
        statement,
        f"peak at {last} inner steps within 1 % of that at {first}{grain}",
        "; ".join(
            f"{word} {grown / 2**20:+.3f} MiB of {kinds[word]['fobmaml'][first] / 2**20:.1f}"
            for word, grown in growth.items()
        ),
        all(abs(grown) <= allowed[word] for word, grown in growth.items()),
    )


def maml_claim(metrics: dict[str, Any], compared: str) -> Claim:
    """MAML's peak is many times as high; where it has no room, higher than what there is."""
    statement = f"Second-order MAML at {compared} inner steps needs many times as much"
    expected = f"at least {RATIO} times FO-B-MAML's peak, almost all of which is activations"
    if lacking(metrics, compared, "fobmaml"):
        return Claim(statement, expected, "no room for FO-B-MAML", False)
    if lacking(metrics, compared, "maml"):
        least = metrics["out_of_memory"]["maml"][compared] / max(metrics["peak_bytes"]["fobmaml"][compared], 1)
        return Claim(statement, expected, f"more than the {least:.1f} times that there is room for", least >= RATIO)
    kinds = peaks(metrics)
    ratio = {word: table["maml"][compared] / max(table["fobmaml"][compared], 1) for word, table in kinds.items()}
    return Claim(
        statement,
        expected,
        "; ".join(f"{word} {value:.1f} times" for word, value in ratio.items()),
        all(value >= RATIO for value in ratio.values()),
    )
