"""What to change when the inner problems are not solved, or tasks are lost, in words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from metanudge.probe import Needed

ROUGH = 0.3
"""Relative residual above which a user is told."""

DONE = 0.05
"""Relative residual that the advice aims at."""

LOOSE = 300.0
"""Bound of the error, relative to the meta-gradient, above which a user is told. Trainings that go well
have 1 to 30, and up to 120 in single steps (measured: sinusoid, tanh and ReLU networks, prox 2)."""

MOST = 10.0
"""Largest factor of the steps that is advised without having been tried."""

FAIR = 0.2
"""Relative residual that more steps have to come below to be advised."""

ANOTHER = "is another objective (adaptation stays nearer to the initialisation), to be judged by validation"


def rounded(value: float) -> float:
    """One significant digit, upwards."""
    unit = 10.0 ** math.floor(math.log10(value))
    return math.ceil(value / unit - 1e-9) * unit


def aims(residual: float, bound: float) -> tuple[float, float]:
    """The residual to solve to, and one that would do; a bound falls in proportion, and is to become 1, or 10."""
    if residual > ROUGH:
        return DONE, FAIR
    return min(DONE, residual / bound), min(FAIR, 10 * residual / bound)


def cure(residual: float, steps: int, prox: float) -> tuple[int, float]:
    """The steps, or the proximal weight, that would bring the residual to about 5 %, where they can not be tried.

    The weight is for accelerated solvers that find their own step size.

    Were the fall geometric, the steps would grow by log(0.05) / log(residual). But the first steps take away what is
    steep, and the rest falls at about half that rate: hence twice as many. As an accelerated solver needs
    K ~ sqrt(L / prox) steps, the same is had by a proximal weight larger by the square of the factor. At most
    ten times the steps: a residual near 1 says that the solve has hardly begun, and nothing of its rate.
    """
    factor = min(2 * math.log(DONE) / math.log(min(max(residual, 1e-3), 0.98)), MOST)
    return max(steps + 1, math.ceil(steps * factor)), rounded(prox * max(factor, 1.1) ** 2)


def unsolved(residual: float, bound: float, solver: Any, prox: float, tried: Needed | None) -> str:
    """The warning; ``tried`` is what more steps did, where they were taken."""
    steps: int = solver.steps
    said = f"the inner problem is {_percent(residual)} from solved, "
    more, closer = cure(residual, steps, prox)
    if residual > ROUGH:
        said += "so the meta-gradient is rough"
    else:
        said += f"which at prox={prox:g} may leave an error of {bound:.0f} times the meta-gradient (error_bound)"
        closer = rounded(10 * prox)
    by_itself = isinstance(getattr(solver, "lr", None), str)
    if tried is not None and tried.residual > aims(residual, bound)[1]:
        said += f": {tried.most} steps do not solve it, so "
        return said + (
            f"raise prox from {prox:g} to about {closer:g}; it {ANOTHER}" if by_itself else _step_size(solver, prox)
        )
    here = f"about {more}" if tried is None else f"{tried.steps}, which left {_percent(tried.residual)} here"
    other = f"prox to about {closer:g}, which {ANOTHER}" if by_itself else _step_size(solver, prox)
    return f"{said}: raise steps from {steps} to {here}; or {other}"


def fixed_lr(solver: Any) -> float | None:
    """The step size a solver was given; None where it has none, or finds its own."""
    lr = getattr(solver, "lr", None)
    return float(lr) if isinstance(lr, int | float) else None


def _step_size(solver: Any, prox: float) -> str:
    """What to look at where a solver's step is fixed: a larger prox only asks for a shorter one."""
    lr, name = fixed_lr(solver), type(solver).__name__
    if lr is None:
        return f"look at the step size of {name}, or take Nesterov, which finds its own"
    own = 'lr="auto"' if name == "Nesterov" else "Nesterov"
    way = "a larger one may do (a smaller one where it oscillates)"
    if lr * prox >= 1:
        way = f"a smaller one may do (lr * prox is {lr * prox:g}, and gradient descent diverges above 2)"
    return f"look at lr = {lr:g} of {name}, {way}; {own} needs none"


def amplified(tasks: int, total: int, prox: float, lr: float | None = None) -> str:
    """The alarm; ``lr`` is the step size that the solver was given."""
    closer = rounded(3 * prox)
    short = f", with lr below {1 / closer:.1g}" if lr is not None and lr * closer >= 1 else ""
    return (
        f"in {tasks} of {total} tasks the meta-gradient is longer than the query gradient, which a convex inner "
        f"problem does not allow: prox = {prox:g} does not outweigh the negative curvature of the support loss, or "
        f"nudged solves diverge; raise prox to about {closer:g}{short}, which {ANOTHER}"
    )


def calmer(solver: Any, prox: float) -> str:
    """What keeps this solver from diverging: with a step of its own a larger prox, with a fixed one never."""
    lr = getattr(solver, "lr", None)
    closer = f"hold it closer (a larger prox than {prox:g})"
    if isinstance(lr, int | float):
        return f"let the inner solver take smaller steps (lr, now {lr:g})"
    if isinstance(lr, str):
        name = type(solver).__name__
        return f'{closer}, or give {name} a small lr of your own in the place of "{lr}"'
    return f"let the inner solver ({type(solver).__name__}) take smaller steps or {closer}"


def bad_data(bad: Mapping[int, str], total: int) -> str:
    """Which tasks hold what is not finite."""
    which = "; ".join(f"task {place}: {where}" for place, where in list(bad.items())[:5])
    more = f"; and {len(bad) - 5} more" if len(bad) > 5 else ""
    return f"{len(bad)} of {total} tasks hold NaN or infinite numbers in their data ({which}{more}; counted from 0)"


def diverged(places: Sequence[int], total: int) -> str:
    """Which tasks were lost though their data are finite."""
    which = ", ".join(map(str, places[:5])) + (", ..." if len(places) > 5 else "")
    return (
        f"{len(places)} of {total} tasks diverged, or had no finite loss or meta-gradient "
        f"(task {which}; counted from 0), though their data are finite"
    )


def _percent(value: float) -> str:
    return f"{100 * value:.0f} %" if value >= 0.095 else f"{100 * value:.1g} %"
