"""The certificate against the truth: 200 random convex problems, and as a stress badly conditioned and steep ones.

A bound has two ways to fail: it is exceeded, or it is so wide that it says nothing. Both are counted, for the estimate
as it comes, with solves that are done and solves that are not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Self

from matplotlib.figure import Figure

import metanudge as mn
from metanudge.experiments.solves.random_problems import RandomProblem, random_problems, steep_problems
from metanudge.experiments.study import Advance, Claim, Study, figure

CAPTION = (
    "Certified bound against true relative error, one dot a random problem. On the line the bound is exact, between "
    "the lines within a factor 10; below it would be violated."
)
SUMMARY = (
    "MetaStep.error_bound against the true error, from Newton's method and dense solves, of FO-B-MAML as it comes. "
    "Moderate problems have prox 0.1 to 10, inputs of size 0.3 to 3 and 4 to 40 inner steps; hard ones prox 0.01 to "
    "10, inputs of size 0.1 to 16 (condition numbers up to 1e5) and 2 to 50 steps; steep ones softplus pieces 5 to 200 "
    "times as steep as their inputs, a linear query loss and 1 to 40 steps, so that solves miss pieces of the loss. "
    "Where the solve overshoots over such a piece the task is left out, as the library does.\n\n"
    "Where the bound is wide the solve is far from done: 1/λ bounds the inverse of H + λ, and what is left undone lies "
    "mostly in directions where the curvature is much larger than λ. Where the solve is done to round-off, errors of "
    "1e-11 are bounded by ten times as much now and then."
)


@dataclass(frozen=True)
class CertificateSettings:
    """Settings of the study; float64."""

    problems: int = 200
    hard_prox: tuple[float, float] = (0.01, 10.0)
    hard_scale: tuple[float, float] = (0.1, 16.0)
    hard_steps: tuple[int, int] = (2, 50)
    seed: int = 0

    @classmethod
    def quick(cls) -> Self:
        """Fewer problems."""
        return cls(problems=40)


class Measured(NamedTuple):
    """One problem: error and bound relative to the estimate's norm, and relative error to the truth's norm."""

    error: float
    bound: float
    true_relative_error: float
    condition: float
    steps: int


def run(settings: CertificateSettings, advance: Advance) -> Study:
    """Measure every family."""
    number, seed = settings.problems, settings.seed
    drawn = {
        "moderate": random_problems(number, seed),
        "hard": random_problems(number, seed, settings.hard_prox, settings.hard_scale, settings.hard_steps),
        "steep": steep_problems(number, seed),
    }
    families: dict[str, list[Measured]] = {}
    for place, (name, problems) in enumerate(drawn.items()):
        families[name] = []
        for done, problem in enumerate(problems, 1):
            families[name] += _measure(problem)
            advance((place + done / number) / len(drawn))
    metrics: dict[str, Any] = {
        name: {
            "violations": sum(one.error > one.bound for one in found),
            "violations_relative_to_the_truth": sum(one.true_relative_error > one.bound for one in found),
            "within_a_factor_10": sum(one.error <= one.bound <= 10 * one.error for one in found) / len(found),
            "left_out": number - len(found),
            "problems": [one._asdict() for one in found],
        }
        for name, found in families.items()
    }
    moderate = metrics["moderate"]
    claims = [
        Claim(
            "The true relative error never exceeds the certified bound where the problem is convex",
            f"0 of {number} random problems",
            f"{moderate['violations']} of {number} ({moderate['violations_relative_to_the_truth']} where "
            "the error is taken relative to the exact meta-gradient)",
            moderate["violations"] == moderate["violations_relative_to_the_truth"] == 0,
        ),
        Claim(
            "and the bound is not idle",
            "within a factor 10 of the error for at least 80 %",
            f"{100 * moderate['within_a_factor_10']:.0f} %",
            moderate["within_a_factor_10"] >= 0.8,
        ),
        _stress("It holds on badly conditioned problems as well, where it is wider", metrics["hard"], number),
        _stress("and on losses with steep pieces that the solves may have missed", metrics["steep"], number),
    ]
    figures = {"certificate": (_figure(families), CAPTION)}
    return Study("certificate", "The certificate against the truth", SUMMARY, claims, metrics, figures)


def _measure(problem: RandomProblem) -> list[Measured]:
    """Nothing where the task is left out."""
    try:
        error, size, bound = problem.measure(mn.FOBMAML())
    except mn.NonFiniteError:
        return []
    relative = error / float(problem.exact.norm())
    return [Measured(error / size, bound, relative, problem.condition, problem.steps)]


def _stress(words: str, found: dict[str, Any], number: int) -> Claim:
    kept = number - found["left_out"]
    return Claim(
        words,
        f"0 of {kept} exceeded",
        f"{found['violations']} exceeded; {100 * found['within_a_factor_10']:.0f} % within a factor 10",
        found["violations"] == 0,
    )


def _figure(families: dict[str, list[Measured]]) -> Figure:
    made, axes = figure(columns=len(families))
    for axis, (name, found) in zip(axes, families.items(), strict=True):
        errors = [max(one.error, 1e-14) for one in found]
        axis.plot(errors, [one.bound for one in found], ".", color="#0072b2", markersize=4)
        ends = [1e-13, 10.0]
        axis.plot(ends, ends, color="#222222", linewidth=0.8)
        axis.plot(ends, [10 * end for end in ends], color="#999999", linewidth=0.8, linestyle="--")
        axis.set(xscale="log", yscale="log", xlabel="true relative error", ylabel="certified bound", title=name)
    return made
