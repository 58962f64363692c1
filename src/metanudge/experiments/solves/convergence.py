r"""Which solver gets furthest per gradient, and which of them can serve.

An inner problem is solved in some tens of gradients, by a solver that nobody tunes; then its solution is
differentiated. So a default has to be judged by three things: how far it gets, whether it ever diverges, and what its
steps do to meta-gradients, nudged (the same steps on two slightly different problems) and unrolled (the derivative of
its steps).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor

import metanudge as mn
from metanudge.experiments.solves.alternatives import LBFGS
from metanudge.experiments.solves.convergence_figures import LABELS, courses
from metanudge.experiments.solves.convergence_measurements import CANDIDATES, candidates, course, errors
from metanudge.experiments.solves.problems import PROBLEMS
from metanudge.experiments.study import Advance, Claim, Study

SUMMARY = """\
Twelve solvers, none of them tuned to a problem, solve five inner problems; the relative inner residual (0 solved, 1 \
not begun) is shown against all the gradients a task has cost, those for the curvature included. Then the \
meta-gradients that their solutions give are compared with the implicit gradient (I + H/λ)⁻¹ ∇f at the point where \
the solve ended, for the tasks where H + λ is positive definite there: nudged (symmetric differences of two further \
solves) and unrolled (the derivative of the steps).

On smooth problems guarded L-BFGS, Anderson mixing and short Barzilai-Borwein steps all get further than Nesterov, \
L-BFGS by orders of magnitude on logistic tasks and tanh networks. With ReLU nothing helps: no solver gets below a \
residual of some hundredths (CNN) or a tenth (MLP), and Nesterov is as good as any. Adam, with one step size for all \
problems, is behind Nesterov on every one of them. Gauss-Newton pays 2 gradients a product: best on the \
ill-conditioned quadratic, where it is conjugate gradients, and late on networks.

What it means for the default. It must never diverge, be replayable in matched nudged solves, differentiable, and \
flat in memory. Nesterov with L following the curvature on the way is the only one that has all four; its restarts \
matter on the ill-conditioned problem alone. Gradient descent, heavy ball and Nesterov with L from the start rely on \
a curvature that the way exceeds, and diverge for single tasks, as do long Barzilai-Borwein steps. Adam's first steps \
have a length of their own, which throws nudged solves off. Gauss-Newton needs residuals, which a loss does not show, \
so its meta-gradients are not measured. Short Barzilai-Borwein steps, Anderson and L-BFGS decide by what they meet, so \
that the nudged solves take other steps than each other. Where they converge that does no harm, as converged solves \
need no matching: on logistic tasks and in the median on the tanh network their nudged meta-gradients are nearer than \
Nesterov's, L-BFGS's most of all. Where they do not converge (ridge) they end further from the meta-gradient than zero \
is, by up to tens of its length, while Nesterov's matched ones stay below it: an unfinished solve then shortens the \
step, and does not turn it.

L-BFGS also has an unrolled derivative that explodes, and its last memory, frozen into a preconditioner so that nudged \
solves are matched, diverges; it keeps 16 copies of the parameters. So it cannot be the default, but deserves to be a \
choice for FO-B-MAML on smooth models. Single tasks of a random tanh network are wrong by their own length or more \
with any solver: their inner problem is nearly singular, and what comes out depends on where the solve ended."""
CAPTION = (
    "Median over tasks of the relative inner residual against gradients spent per task, by inner problem; a solve that "
    "is not finite counts as 1. Dots: the default."
)
SMOOTH = ("logistic", "ridge", "sinusoid_tanh")
KINKED = ("sinusoid_relu", "mnist1d")


@dataclass(frozen=True)
class ConvergenceSettings:
    """Settings of the study."""

    problems: tuple[str, ...] = tuple(PROBLEMS)  # mnist1d needs the extra of that name
    tasks: int = 60  # of every problem but mnist1d: enough for a 90 % quantile
    convolutional_tasks: int = 10  # of mnist1d
    marks: tuple[int, ...] = (7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 100)  # gradients a task
    steps: tuple[int, ...] = (16, 32)  # of the solves whose meta-gradients are judged: the default, and twice that
    judged: tuple[str, ...] = tuple(name for name in CANDIDATES if "gauss" not in name)  # whose meta-gradients
    seed: int = 0  # of tasks and models

    @classmethod
    def quick(cls) -> Self:
        """Fewer tasks, fewer gradients, and only the meta-gradients of which something is claimed."""
        marks = (7, 8, 10, 12, 16, 20, 24, 32, 40, 48)
        return cls(tasks=12, convolutional_tasks=2, marks=marks, steps=(16,), judged=("nesterov", "lbfgs"))


def convergence(settings: ConvergenceSettings, advance: Advance) -> Study:
    """Measure every solver on every problem."""
    inners = {}
    for name in settings.problems:  # before the long work, so that a missing package is told at once
        inners[name] = PROBLEMS[name](
            settings.convolutional_tasks if name == "mnist1d" else settings.tasks, settings.seed
        )
    metrics: dict[str, Any] = {}
    for done, (name, inner) in enumerate(inners.items()):
        metrics[name] = {}
        chosen = candidates(inner)
        for index, (solver, make) in enumerate(chosen.items()):
            went = course(inner, make, settings.marks)
            metrics[name][solver] = {
                "gradients": list(settings.marks),
                "median": [quantile(row, 0.5) for row in went.residual],
                "q90": [quantile(row, 0.9) for row in went.residual],
                "tasks": went.residual.shape[1],
                "diverged": int((~(went.force[-1] <= 1)).sum()),
                "largest_force": float(went.force.nan_to_num(math.inf).max()),
            }
            off: dict[str, Any] = {}
            metrics[name][solver]["meta_gradient_error"] = off
            for steps in settings.steps if solver in settings.judged else ():
                found = errors(inner, make, {"nudged": mn.FOBMAML(), "unrolled": mn.MAML()}, steps)
                if solver == "lbfgs":
                    frozen = errors(inner, lambda k, _: LBFGS(k, frozen=True), {"frozen": mn.FOBMAML()}, steps)
                    found["nudged_frozen"] = frozen["frozen"]
                for way, values in found.items():
                    off.setdefault(way, {})[str(steps)] = summary_of(values)
            advance((done + (index + 1) / len(chosen)) / len(inners))
    figures = {"convergence": (courses(metrics), CAPTION)}
    return Study("convergence", "Inner solvers", SUMMARY, claims(metrics), metrics, figures)


def quantile(values: Tensor, share: float) -> float:
    """The smallest of ``values`` that ``share`` of them do not exceed; they may be infinite."""
    return float(values.sort()[0][max(math.ceil(share * len(values)) - 1, 0)])


def summary_of(values: Tensor) -> dict[str, float]:
    """Median, 90 % quantile, largest, and how many; NaN of none."""
    if not len(values):
        return {"median": math.nan, "q90": math.nan, "worst": math.nan, "tasks": 0}
    found = {"median": quantile(values, 0.5), "q90": quantile(values, 0.9), "worst": float(values.max())}
    return found | {"tasks": len(values)}


def claims(metrics: Mapping[str, Any]) -> list[Claim]:
    """Of the problems that were run."""
    smooth = [name for name in SMOOTH if name in metrics]
    kinked = [name for name in KINKED if name in metrics]
    found = [safety(metrics)]
    if "sinusoid_tanh" in metrics:
        found.append(learning(metrics))
    if smooth:
        found += [progress(metrics, smooth)]
    if kinked:
        found.append(kinks(metrics, kinked))
    for way, problem, statement, expected, factor in PRICES:
        if problem in metrics:
            found.append(price(metrics, way, problem, statement, expected, factor))
    if "ridge" in metrics:
        found.append(unfinished(metrics))
    return found + [tame(metrics, name) for name in ("logistic", "sinusoid_tanh") if name in metrics]


def last(metrics: Mapping[str, Any], problem: str, solver: str) -> float:
    """Median residual when all gradients are spent."""
    return float(metrics[problem][solver]["median"][-1])


def safety(metrics: Mapping[str, Any]) -> Claim:
    """The default on all problems."""
    runs = [metrics[problem]["nesterov"] for problem in metrics]
    lost, tasks = (sum(run[key] for run in runs) for key in ("diverged", "tasks"))
    return Claim(
        "Nesterov, the default, never diverges",
        "no task of any problem ends non-finite, or with a larger gradient than it began with",
        f"{lost} of {tasks} tasks; on the way a gradient grew {max(r['largest_force'] for r in runs):.1f}-fold at most",
        lost == 0,
    )


def learning(metrics: Mapping[str, Any]) -> Claim:
    """What raising L on the way is for."""
    lost = {solver: metrics["sinusoid_tanh"][solver]["diverged"] for solver in ("nesterov", "nesterov_fixed")}
    return Claim(
        "That is because its L follows the curvature: with L from the start alone it diverges on networks",
        "on the tanh network at least one task with L fixed, none with L raised on the way",
        f"{lost['nesterov_fixed']} tasks with L fixed, {lost['nesterov']} with L raised",
        lost["nesterov_fixed"] > 0 == lost["nesterov"],
    )


def progress(metrics: Mapping[str, Any], smooth: list[str]) -> Claim:
    """What the default leaves on the table."""
    budget = metrics[smooth[0]]["lbfgs"]["gradients"][-1]
    pairs = {name: (last(metrics, name, "lbfgs"), last(metrics, name, "nesterov")) for name in smooth}
    return Claim(
        "On smooth problems L-BFGS gets further per gradient than Nesterov",
        f"a smaller median residual on all of {', '.join(smooth)} after {budget} gradients",
        "; ".join(f"{name} {a:.1e} against {b:.1e}" for name, (a, b) in pairs.items()),
        all(a < b for a, b in pairs.values()),
    )


def kinks(metrics: Mapping[str, Any], kinked: list[str]) -> Claim:
    """Where no solver helps."""
    told, holds = [], True
    for name in kinked:
        best = min(metrics[name], key=lambda solver, name=name: last(metrics, name, solver))  # type: ignore[misc]
        a, b = last(metrics, name, best), last(metrics, name, "nesterov")
        told.append(f"{name} {a:.1e} ({LABELS[best]}) against {b:.1e}")
        holds = holds and b <= 2 * a
    budget = metrics[kinked[0]]["nesterov"]["gradients"][-1]
    return Claim(
        "With ReLU the kinks decide, not the solver",
        f"after {budget} gradients no median residual is below half of Nesterov's",
        "; ".join(told),
        holds,
    )


PRICES = (
    (
        "unrolled",
        "sinusoid_tanh",
        "The derivative of L-BFGS's steps explodes",
        "90 % quantile of the error of the unrolled meta-gradient, tanh network, at least 5 times Nesterov's",
        5.0,
    ),
    (
        "nudged_frozen",
        "logistic",
        "The last memory of L-BFGS, frozen as the preconditioner of nudged solves, diverges",
        "largest error of the nudged meta-gradient, logistic, at least 100 times Nesterov's",
        100.0,
    ),
)
"""What L-BFGS costs: way of differentiation, problem, statement, expectation, factor."""


def price(metrics: Mapping[str, Any], way: str, problem: str, statement: str, expected: str, factor: float) -> Claim:
    """One line of the table above, at the largest number of steps."""
    key = "q90" if "quantile" in expected else "worst"
    steps = list(metrics[problem]["lbfgs"]["meta_gradient_error"][way])[-1]
    own = metrics[problem]["lbfgs"]["meta_gradient_error"][way][steps][key]
    other = metrics[problem]["nesterov"]["meta_gradient_error"][way.split("_")[0]][steps][key]
    measured = f"{own:.1e} against {other:.1e}"
    return Claim(statement, f"{expected}, after {steps} steps", measured, own >= factor * other)


def unfinished(metrics: Mapping[str, Any]) -> Claim:
    """What matching is for."""
    told, holds = [], True
    for name, statistic in (("nesterov", "worst"), ("lbfgs", "median"), ("anderson", "median")):
        if name in metrics["ridge"] and metrics["ridge"][name]["meta_gradient_error"]:
            found = list(metrics["ridge"][name]["meta_gradient_error"]["nudged"].values())[-1]
            told.append(f"{LABELS[name]} median {found['median']:.2f}, largest {found['worst']:.2f}")
            holds = holds and (found[statistic] < 1) == (name == "nesterov")
    return Claim(
        "Far from solved (ridge), matched nudged solves still point the right way, and unmatched ones do not",
        "error of the nudged meta-gradient below 1, that of no meta-gradient, with Nesterov for every task; above in "
        "the median with L-BFGS and Anderson",
        "; ".join(told),
        holds,
    )


def tame(metrics: Mapping[str, Any], problem: str) -> Claim:
    """Where L-BFGS is not erratic."""
    steps, own = list(metrics[problem]["lbfgs"]["meta_gradient_error"]["nudged"].items())[-1]
    other = metrics[problem]["nesterov"]["meta_gradient_error"]["nudged"][steps]
    return Claim(
        f"Where L-BFGS converges, nudged solves by its own steps are nearer than Nesterov's: {problem}",
        f"median error of the nudged meta-gradient below Nesterov's, after {steps} steps",
        f"median {own['median']:.1e} against {other['median']:.1e} (largest {own['worst']:.1e} against "
        f"{other['worst']:.1e})",
        bool(own["median"] < other["median"]),
    )
