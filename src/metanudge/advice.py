"""What to change when the inner problems are not solved, in words."""

from __future__ import annotations

import math

ROUGH = 0.3
"""Relative residual above which a user is told."""

DONE = 0.05
"""Relative residual that the advice aims at."""


MOST = 10.0
"""Largest factor of the steps that is advised."""


def rounded(value: float) -> float:
    """One significant digit, upwards."""
    unit = 10.0 ** math.floor(math.log10(value))
    return math.ceil(value / unit - 1e-9) * unit


def cure(residual: float, steps: int, prox: float) -> tuple[int, float]:
    """The steps, or the proximal weight, that would bring the residual to about 5 %.

    If the residual falls geometrically, rho^K, the steps grow by log(0.05) / log(residual); and as an accelerated
    solver needs K ~ sqrt(L / prox) steps, the same is had by a proximal weight larger by the square of that. At most
    ten times the steps: a residual near 1 says that the solve has hardly begun, and nothing of its rate.
    """
    factor = min(math.log(DONE) / math.log(min(max(residual, 1e-3), 0.98)), MOST)
    return max(steps + 1, math.ceil(steps * factor)), rounded(prox * max(factor, 1.1) ** 2)


def unsolved(residual: float, steps: int, prox: float) -> str:
    """The warning."""
    more, closer = cure(residual, steps, prox)
    return (
        f"the inner problem is {100 * residual:.0f} % from solved, so the meta-gradient is rough: raise steps from "
        f"{steps} to about {more}, or prox from {prox:g} to about {closer:g} (mn.check shows what either does)"
    )


def amplified(tasks: int, total: int, prox: float) -> str:
    """The alarm."""
    return (
        f"in {tasks} of {total} tasks the meta-gradient is longer than the query gradient, which a convex inner "
        f"problem does not allow: prox = {prox:g} does not outweigh the negative curvature of the support loss, or "
        f"nudged solves diverge; raise prox to about {rounded(3 * prox):g}"
    )
