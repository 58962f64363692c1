"""What a user meets who leaves everything at its default, and one who starves the inner solve.

The learner as it comes is meta-trained from many seeds, smooth and kinked: does any meta-gradient come out NaN? And a
setting that cannot work (4 steps, prox 0.1) is given to ``mn.check``: is it told bad, and does the advice mend it?
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import metanudge as mn
from metanudge.experiments.networks import ACTIVATIONS, sinusoid_network
from metanudge.experiments.pool import run_all
from metanudge.experiments.solves.training import Job, train
from metanudge.experiments.study import Advance, Claim, Study

SUMMARY = (
    "Meta-training on the sinusoid with the learner's defaults, 25 tasks a step, from 20 seeds: steps that raised or "
    "left a meta-gradient that is not finite, and tasks that were left out. Then mn.check on a starved setting, and "
    "once more with its advice followed."
)


@dataclass(frozen=True)
class GuardsSettings:
    """Settings of the study; float32."""

    seeds: int = 20
    meta_steps: int = 100
    starved_steps: int = 4
    starved_prox: float = 0.1
    check_tasks: int = 4
    workers: int = 2  # processes; the result does not depend on it
    seed: int = 0

    @classmethod
    def quick(cls) -> Self:
        """Fewer seeds and steps."""
        return cls(seeds=2, meta_steps=5, workers=1, check_tasks=2)


def run(settings: GuardsSettings, advance: Advance) -> Study:
    """Train from all seeds, then check."""
    jobs = [
        Job("default", activation, settings.seed + index, settings.meta_steps, 0)
        for activation in ACTIVATIONS
        for index in range(settings.seeds)
    ]
    outcomes = run_all(train, jobs, settings.workers, advance, lambda done: 0.8 * done / len(jobs))
    metrics: dict[str, Any] = {}
    for activation in ACTIVATIONS:
        mine = [outcome for job, outcome in zip(jobs, outcomes, strict=True) if job.activation == activation]
        metrics[activation] = {
            "meta_steps": settings.meta_steps * len(mine),
            "nonfinite": sum(outcome.nonfinite for outcome in mine),
            "dropped_tasks": sum(outcome.dropped for outcome in mine),
            "residual": sum(outcome.residual for outcome in mine) / len(mine),
        }
    metrics["starved"] = _starved(settings)
    advance(1.0)
    bad, mended = metrics["starved"]["relative_error"], metrics["starved"]["followed_relative_error"]
    told = ", ".join(f"{name} {metrics[name]['nonfinite']} of {metrics[name]['meta_steps']}" for name in ACTIVATIONS)
    dropped = ", ".join(f"{name} {metrics[name]['dropped_tasks']}" for name in ACTIVATIONS)
    advised = f"steps {metrics['starved']['advised_steps']}, prox {metrics['starved']['advised_prox']}"
    claims = [
        Claim(
            "Defaults never give a meta-gradient that is not finite",
            f"none over {settings.seeds} seeds, tanh and ReLU",
            f"{told}; tasks left out: {dropped}",
            all(metrics[name]["nonfinite"] == 0 for name in ACTIVATIONS),
        ),
        Claim(
            f"mn.check ranks a starved setting (K = {settings.starved_steps}, prox {settings.starved_prox}) as bad",
            "a relative error above 50 %, and the verdict says bad",
            f"an error of {bad:.2g} times the exact meta-gradient: {metrics['starved']['verdict']}",
            bad > 0.5 and metrics["starved"]["verdict"].startswith("Bad"),
        ),
        Claim(
            "and its recommendation, followed, mends it",
            "relative error below 10 %",
            f"{100 * mended:.1f} % with {advised}",
            mended < 0.1,
        ),
    ]
    return Study("guards", "Defaults that hold, and a starved solve", SUMMARY, claims, metrics, {})


def _starved(settings: GuardsSettings) -> dict[str, Any]:
    model = sinusoid_network("tanh", settings.seed)
    tasks = mn.tasks.sinusoid(settings.check_tasks, seed=settings.seed + 77)

    def found(steps: int, prox: float) -> mn.Check:
        learner = mn.MetaLearner(model, mn.metrics.squared_error, prox=prox, solver=mn.Nesterov(steps))
        return mn.check(learner, tasks, max_tasks=settings.check_tasks, compare=["fomaml", "maml", "imaml"])

    first = found(settings.starved_steps, settings.starved_prox)
    record: dict[str, Any] = {
        "relative_error": first.rows[0].relative_error,
        "verdict": first.verdict,
        "advised_steps": None,
        "advised_prox": None,
        "followed_relative_error": float("inf"),
    }
    if first.recommendation is not None:
        advised = first.recommendation
        again = found(advised.steps, advised.prox)
        record |= {
            "advised_steps": advised.steps,
            "advised_prox": advised.prox,
            "followed_relative_error": again.rows[0].relative_error,
        }
    return record
