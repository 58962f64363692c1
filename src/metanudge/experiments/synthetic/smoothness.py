r"""Smoothness of the meta-objective: the spectral norm of Hess F against the norm of the meta-gradient.

With :math:`A_i = \nabla^2 \hat f_i(\phi_i) + \lambda I`, :math:`d \phi_i / d \theta = \lambda A_i^{-1}` and the third
derivative :math:`T_i = \nabla^3 \hat f_i(\phi_i)`, differentiation of :math:`\nabla F_i = \lambda A_i^{-1} \nabla f_i`:

.. math::
    \nabla^2 F_i = A_i^{-1} \big( \lambda^2 \, \nabla^2 f_i - \lambda \, T_i[\nabla F_i] \big) A_i^{-1}, \qquad
    \|\nabla^2 F_i\| \le \frac{\lambda^2 \|\nabla^2 f_i\| + \rho_i \lambda \|\nabla F_i\|}{(\lambda + \mu)^2}
                     = L_{0,i} + L_{1,i} \|\nabla F_i\|,

ρ the Lipschitz constant of Hess f̂, μ its lowest curvature (0 here: convex). The mean over tasks obeys
:math:`\|\nabla^2 F\| \le \mathrm{mean}_i (L_{0,i} + L_{1,i} \|\nabla F_i\|)`, with the norms of the *tasks'* gradients;
a bound in ||∇F|| alone needs one on mean ||∇F_i - ∇F||. So the check is made for every task, and for the mean with the
tasks' norms. Only A_i at φ_i enters: with ||A_i^-1|| for 1 / (λ + μ) the bound is *local*, tighter, and checked too.

The tasks: linear regression, support loss the pseudo-Huber :math:`h(r) = \sqrt{1 + r^2} - 1`, query loss the squared
error. As :math:`|h'''| = 3 |r| (1 + r^2)^{-5/2} \le 48 / (25 \sqrt 5)`, its value at |r| = 1/2,
:math:`\rho_i \le 48 / (25 \sqrt 5) \cdot \max_j \|x_j\| \cdot \| \mathrm{mean}_j \, x_j x_j^\top \|`.
From gradients alone :math:`L_k = \|\nabla F(x_{mid}) - \nabla F(x_k)\| / \|x_{mid} - x_k\|`, x_mid the middle of step k
(Zhang et al., arXiv:1905.11881).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from metanudge.experiments.study import Advance, Claim, Study
from metanudge.experiments.synthetic.smoothness_figures import constants, scatter
from metanudge.experiments.synthetic.smoothness_measurements import SmoothnessSettings, control, measure

SUMMARY = """Exact meta-gradients and Hessians of linear regressions with a pseudo-Huber support loss and a squared \
query loss, along normalised descents from starts at distances {s.nearest:g} to {s.farthest:g}, in {s.draws} draws of \
the tasks. The spectral norm of Hess F rises with the norm of the meta-gradient, the more so the smaller λ: from its \
smallest to its largest value {first[norm_ratio]:.2g}-fold at λ = {first[prox]:g}, {last[norm_ratio]:.2g}-fold at \
λ = {last[prox]:g}. The reason: near the tasks' solutions the support loss is curved, the adapted parameters hardly \
follow θ, and F is flat; far away it is not, they follow θ, and F takes over the curvature of the query loss. There \
the norm levels off: a straight line is fitted to a curve that rises and saturates, hence r2 well below 1 at large λ. \
In single draws L1 grows with every decrease of λ in {monotone} of {s.draws}.

The bound holds at every point, for every task and for their mean. For the mean its right-hand side has the tasks' \
gradient norms: one in ||∇F|| alone follows only where the tasks' gradients differ by a bounded amount. With μ = 0 it \
is far from reached at small λ: no point has more than {last[largest_share_of_bound]:.2g} of it at λ = {last[prox]:g}, \
and the fitted L1 grows far slower than ρ / λ. With the inner Hessian at the point in place of λ, {local:.2g} of it is \
attained.

The midpoint formula sees the direction of the step only, so it mostly stays below the spectral norm. On the \
quadratic control, where Hess F is constant, it finds a slope of {quadratic[L1_midpoint]:.1g} for that reason; the \
exact norm finds none. The growth of L1 with falling λ ends where no start is far any more: at λ = {beyond[prox]:g} \
all of them are within reach of the inner solve, no meta-gradient exceeds {beyond[largest_gradient]:.2g}, and L1 is \
{beyond[L1]:.2g}."""

SCATTER_CAPTION = (
    "Local smoothness of F against the norm of the meta-gradient, at all points of all draws. The fitted line is "
    "curved on logarithmic axes; least squares weigh the large values, so it lies above the small ones."
)
CONSTANTS_CAPTION = (
    "Fitted L1 against λ, all draws together (bars: smallest and largest of single draws), and the bound ρ / λ."
)


def run(settings: SmoothnessSettings, advance: Advance) -> Study:
    """Measure for every λ, then beyond the range, then the control."""
    shares, clouds, metrics = len(settings.prox) + 2, {}, dict[str, Any]()
    for index, prox in enumerate(settings.prox):
        clouds[prox], metrics[f"{prox:g}"] = measure(settings, prox)
        advance((index + 1) / shares)
    _, beyond = measure(settings, settings.beyond_prox)
    advance(1 - 1 / shares)
    quadratic = control(settings)
    advance(1.0)
    found = [metrics[f"{prox:g}"] for prox in settings.prox]
    monotone = sum(increasing(slopes) for slopes in zip(*(one["L1_of_draws"] for one in found), strict=True))
    local = max(one["largest_share_of_local_bound"] for one in found)
    summary = SUMMARY.format(
        s=settings, first=found[0], last=found[-1], monotone=monotone, local=local, quadratic=quadratic, beyond=beyond
    )
    results = {"by_lambda": metrics, "quadratic": quadratic, "beyond": beyond, "monotone_draws": monotone}
    figures = {
        "smoothness": (scatter(clouds, metrics), SCATTER_CAPTION),
        "smoothness_constants": (constants(settings, found), CONSTANTS_CAPTION),
    }
    return Study("smoothness", "Smoothness of the meta-objective", summary, claims(found, quadratic), results, figures)


def increasing(values: Sequence[float]) -> bool:
    """Whether every value exceeds the one before."""
    return all(before < after for before, after in pairwise(values))


def claims(found: list[dict[str, Any]], quadratic: dict[str, float]) -> list[Claim]:
    """Hold the metrics, λ falling, against the paper."""
    slopes = [one["L1"] for one in found]
    violations = sum(one["bound_violations"] + one["local_bound_violations"] for one in found)
    growth = Claim(
        "The smoothness of the MAML objective grows with the norm of the meta-gradient",
        "L1 > 0, growing as λ falls",
        "L1 = " + ", ".join(f"{slope:.2g}" for slope in slopes),
        min(slopes) > 0 and increasing(slopes),
    )
    bound = Claim(
        "||Hess F|| <= L0 + L1 ||∇F|| with L1 <= ρλ / (λ + μ)^2, every task and the mean, constant and local",
        "no point above",
        f"{violations} of {sum(one['points'] for one in found)} points above",
        violations == 0,
    )
    flat = Claim(
        "A quadratic support loss cannot show the effect",
        "|L1| <= 1e-6",
        f"|L1| = {abs(quadratic['L1']):.1g}",
        abs(quadratic["L1"]) <= 1e-6,
    )
    return [growth, bound, flat]
