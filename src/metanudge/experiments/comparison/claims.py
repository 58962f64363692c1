"""What the comparison must show, judged from what it found."""

from __future__ import annotations

import math
from collections.abc import Mapping

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


def at_equal_steps(found: Mapping[str, Method], name: str, margin: float) -> Claim:
    """FO-B-MAML is as good as MAML after as many meta-steps, within ``margin``."""
    higher = BENCHMARKS[name]().higher
    ours, maml = (float(found[method].final.mean()) for method in ("fobmaml", "maml"))
    factor = 100.0 if higher else 1.0
    return Claim(
        f"After {found['maml'].best.meta_steps} meta-steps FO-B-MAML is as good as second-order MAML ({name})",
        f"within {100 * margin:g} points of it, or above" if higher else "test squared error at most MAML's",
        "; ".join(told(found, method, factor) for method in (*OURS, "maml", "fomaml", "reptile")),
        ours >= maml - margin if higher else ours <= maml + margin,
    )


def at_equal_seconds(found: Mapping[str, Method], name: str) -> Claim:
    """FO-B-MAML is as good as MAML in the time of the faster of the two."""
    higher = BENCHMARKS[name]().higher
    seconds = min(found[method].seconds[-1] for method in ("fobmaml", "maml"))
    scores = {method: score_at(found[method], seconds) for method in (*OURS, "maml")}
    return Claim(
        f"In equal time FO-B-MAML is as good as second-order MAML ({name})",
        "test accuracy at least MAML's" if higher else "test squared error at most MAML's",
        f"after {seconds:.0f} s: " + ", ".join(f"{LABELS[method]} {score:.3g}" for method, score in scores.items()),
        scores["fobmaml"] >= scores["maml"] if higher else scores["fobmaml"] <= scores["maml"],
    )


def time_to_reach(found: Mapping[str, Method], name: str) -> Claim:
    """FO-B-MAML needs no more time than MAML to what MAML reaches."""
    higher, goal = BENCHMARKS[name]().higher, found["maml"].scores[-1]
    seconds = {method: seconds_to(found[method], goal, higher) for method in (*OURS, "maml")}

    def needed(value: float) -> str:
        return "never in this run" if math.isinf(value) else f"{value:.0f} s"

    return Claim(
        f"FO-B-MAML takes no more time than second-order MAML to what that ends at ({name})",
        "at most MAML's seconds",
        f"to {goal:.3g}: " + ", ".join(f"{LABELS[method]} {needed(value)}" for method, value in seconds.items()),
        seconds["fobmaml"] <= seconds["maml"],
    )
