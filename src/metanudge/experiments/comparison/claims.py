"""What the comparison must show, judged from what it found."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from statistics import fmean

from metanudge.advice import ROUGH
from metanudge.experiments.comparison.benchmark import BENCHMARKS
from metanudge.experiments.comparison.figures import LABELS
from metanudge.experiments.comparison.study import Method, final_score, score_at, seconds_to
from metanudge.experiments.study import Claim

OURS = ("fobmaml", "fobmaml_light")


def told(found: Mapping[str, Method], method: str, factor: float = 1.0) -> str:
    """The mean, its interval and the seeds of a method."""
    final = found[method].final * factor
    seeds = " ".join(f"{factor * final_score(one):.3g}" for one in found[method].outcomes)
    return f"{LABELS[method]} {final.mean():.3g} ± {1.96 * final.std() / len(final) ** 0.5:.2g} ({seeds})"


OTHERS = {"maml": "second-order MAML", "hfmaml": "HF-MAML"}
"""What FO-B-MAML is compared with, in words."""


def at_equal_steps(found: Mapping[str, Method], name: str, margin: float, other: str = "maml") -> Claim:
    """FO-B-MAML is as good as another after as many meta-steps, within ``margin``."""
    higher = BENCHMARKS[name]().higher
    ours, theirs = (float(found[method].final.mean()) for method in ("fobmaml", other))
    factor = 100.0 if higher else 1.0
    most = f"test squared error at most {LABELS[other]}'s"
    shown = [method for method in (*OURS, other, "fomaml", "reptile") if method in found]
    return Claim(
        f"After {found[other].best.meta_steps} meta-steps FO-B-MAML is as good as {OTHERS[other]} ({name})",
        f"within {100 * margin:g} points of it, or above" if higher else most,
        "; ".join(told(found, method, factor) for method in shown),
        ours >= theirs - margin if higher else ours <= theirs + margin,
    )


def stays_solved(found: Mapping[str, Method], name: str) -> Claim:
    """At the end of training, inner problems are still solved as far as a warning asks."""
    residuals = {method: fmean(one.residual for one in found[method].outcomes) for method in found}
    return Claim(
        f"Inner problems of FO-B-MAML are still solved in the last tenth of the training ({name})",
        f"mean relative residual at most {ROUGH:g}",
        ", ".join(f"{LABELS[method]} {residual:.2g}" for method, residual in residuals.items()),
        all(residuals[method] <= ROUGH for method in OURS),
    )


CLOCKS: dict[str, Callable[[Method], list[float]]] = {
    "plain": lambda method: method.seconds,
    "compiled, with the time of compiling; MAML plain": lambda method: method.compiled_seconds,
}
"""Seconds at a curve's points. MAML differentiates its gradients again, which is not compiled here."""


def in_time(
    claim: Callable[[Mapping[str, Method], str, str, str], Claim], found: Mapping[str, Method], name: str
) -> list[Claim]:
    """A claim on both forms of FO-B-MAML by both clocks."""
    return [claim(found, name, ours, clock) for clock in CLOCKS for ours in OURS]


def at_equal_seconds(found: Mapping[str, Method], name: str, ours: str, clock: str) -> Claim:
    """FO-B-MAML is as good as MAML at the end of MAML's time."""
    higher, read = BENCHMARKS[name]().higher, CLOCKS[clock]
    seconds = read(found["maml"])[-1]
    scores = {method: score_at(read(found[method]), found[method].scores, seconds) for method in (ours, "maml")}
    return Claim(
        f"In equal time {LABELS[ours]} is as good as second-order MAML ({name}; {clock})",
        "test accuracy at least MAML's" if higher else "test squared error at most MAML's",
        f"after {seconds:.0f} s: " + ", ".join(f"{LABELS[method]} {score:.3g}" for method, score in scores.items()),
        scores[ours] >= scores["maml"] if higher else scores[ours] <= scores["maml"],
    )


def time_to_reach(found: Mapping[str, Method], name: str, ours: str, clock: str) -> Claim:
    """FO-B-MAML needs no more time than MAML to what MAML reaches."""
    higher, goal, read = BENCHMARKS[name]().higher, found["maml"].scores[-1], CLOCKS[clock]
    seconds = {method: seconds_to(read(found[method]), found[method].scores, goal, higher) for method in (ours, "maml")}

    def needed(value: float) -> str:
        return "never in this run" if math.isinf(value) else f"{value:.0f} s"

    return Claim(
        f"{LABELS[ours]} takes no more time than second-order MAML to what that ends at ({name}; {clock})",
        "at most MAML's seconds",
        f"to {goal:.3g}: " + ", ".join(f"{LABELS[method]} {needed(value)}" for method, value in seconds.items()),
        seconds[ours] <= seconds["maml"],
    )
