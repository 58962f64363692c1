r"""The inner solvers that were considered and are not in the library, each as a ``solvers.loop.Solver``.

All of them take every problem's own curvature for a scale, so that nothing is tuned by hand: L from the library's
``lipschitz_constant`` at the start (6 gradients, as ``Nesterov``), and the proximal weight λ, which bounds the
curvature of a convex problem from below. Below, g = ∇E(φ) and L' = 1.2 L + λ. Decisions are not replayed: a nudged
solve decides anew, which is part of what the study shows.
"""

from metanudge.experiments.solves.alternatives.anderson import Anderson
from metanudge.experiments.solves.alternatives.barzilai_borwein import BarzilaiBorwein
from metanudge.experiments.solves.alternatives.fixed_nesterov import FixedNesterov
from metanudge.experiments.solves.alternatives.gauss_newton import GaussNewton, gauss_newton_products
from metanudge.experiments.solves.alternatives.gradient_descent import SafeGradientDescent
from metanudge.experiments.solves.alternatives.heavy_ball import HeavyBall
from metanudge.experiments.solves.alternatives.lbfgs import LBFGS

__all__ = [
    "LBFGS",
    "Anderson",
    "BarzilaiBorwein",
    "FixedNesterov",
    "GaussNewton",
    "HeavyBall",
    "SafeGradientDescent",
    "gauss_newton_products",
]
