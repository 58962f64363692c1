r"""The bias of the finite differences, and why nudged solves must be matched.

Inner solves that err *independently* by δ put an error of order λδ/ν into the difference quotient, beside the stencil's
own C ν^p. The best nudge and the bias it leaves are then

.. math::
    \nu \sim \delta^{1/(p+1)}, \qquad \|g - \nabla F\| \sim \delta^{p/(p+1)}: \qquad
    \tfrac12 \text{ forward}, \quad \tfrac23 \text{ symmetric}, \quad \tfrac45 \text{ fourth order.}

Here the solves are exact (Newton), and errors of norm δ in random directions are added to them. Matched solves do not
err independently: the second part shows what that is worth, without injection, with the library's own learner.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

import metanudge as mn
from metanudge.experiments.study import COLOURS, LABELS, Advance, Claim, Study, figure
from metanudge.experiments.synthetic.bias_measurements import (
    Comparison,
    Injection,
    compare,
    fit_range,
    inject,
    make_setting,
    slope,
)

EXPECTED = {"forward": 1 / 2, "symmetric": 2 / 3, "fourth_order": 4 / 5}
FRACTIONS = {"forward": "1/2", "symmetric": "2/3", "fourth_order": "4/5"}
BLUES = ("#9ecae1", "#56a0d0", "#0072b2", "#00416b", "#001f33")


SUMMARY = """The inner problems of heterogeneous logistic tasks are solved exactly for every nudge, and independent \
random errors of norm δ are added to the solutions before the finite difference is taken; its error is measured \
against the exact meta-gradient and averaged (root mean square) over the draws. The nudge is either the best of a fine \
grid for every δ, judged on fresh errors, or follows the theory's rule with one constant. The range of the fit was \
fixed from the problem alone: δ at least 100 times the round-off of a solution, and the largest nudge at most half of \
the one up to which every nudged problem keeps half of its proximal curvature. No grid goes beyond that nudge, the \
reason why all curves bend upwards at the right end.

Such slopes are the worst case. A library that solves its nudged problems alike (same start, steps, step sizes) does \
not err independently: the second figure, without any injection, shows the error of a forward difference whose ends \
are both solved for K steps from the free solution, beside one that takes the free solution itself as an end. Matched, \
the error is that of the truncated solve plus that of the stencil, and ν may be tiny; unmatched, what the free solve \
still had to go is divided by ν."""
SLOPES_CAPTION = "Relative bias of the meta-gradient under injected solve errors. Lines are fitted in the shaded range."
MATCHING_CAPTION = (
    "Relative error of a forward difference against the nudge, without injected errors, by inner gradient steps."
)


@dataclass(frozen=True)
class BiasSettings:
    """Settings of the study; all of it is float64."""

    tasks: int = 8  # enough for their Hessians to differ, few enough for a dense solve at every node
    features: int = 20  # large enough that a random direction is not special
    examples: int = 40  # a task's support examples, and as many query examples: twice the dimension
    prox: float = 2.0  # about the largest curvature of the losses: inner problems of condition 2 to 3
    deltas_per_decade: int = 2  # 1e-16 to 1e-2 is shown; the range of the fit is computed, see ``fit_range``
    nus_per_decade: int = 12  # of the grid a tuned nudge is taken from: within 10 % of the best
    draws: int = 32  # injected errors to tune the nudge on, and as many fresh ones to report
    steps: tuple[int, ...] = (5, 10, 20, 40, 80)  # inner steps of the matched comparison; 20 is named in the claim
    lr: float = 0.1  # plain gradient descent there, with a hand-set step that suits the stiffest task
    nudges: int = 10  # nudges there, 1e-9 to 1; 1e-3 is named in the claim
    seed: int = 0  # of tasks, θ and injected errors

    @classmethod
    def quick(cls) -> Self:
        """The same ranges, coarser; nothing is expected to come out weaker."""
        return cls(deltas_per_decade=1, nus_per_decade=6, draws=16, steps=(5, 20, 80), nudges=4)


def run(settings: BiasSettings, advance: Advance) -> Study:
    """Inject errors for every scheme, fit the slopes, then compare matched with unmatched solves."""
    setting = make_setting(settings.tasks, settings.features, settings.examples, settings.prox, settings.seed)
    low, high = fit_range(setting)
    deltas = torch.logspace(-16, -2, 14 * settings.deltas_per_decade + 1, dtype=torch.float64)
    fitted = (deltas >= low) & (deltas <= high)
    middle = int(fitted.nonzero().median())
    injected = {}
    for index, scheme in enumerate(EXPECTED):
        injected[scheme] = inject(
            setting, mn.STENCILS[scheme], deltas, middle, settings.nus_per_decade, settings.draws, settings.seed + 1
        )
        advance(0.15 * (index + 1))
    comparison = compare(
        setting, settings.steps, settings.lr, settings.nudges, lambda share: advance(0.45 + 0.55 * share)
    )
    metrics = {
        "slope": {name: slope(deltas[fitted], found.tuned[fitted])[0] for name, found in injected.items()},
        "slope_theory_rule": {name: slope(deltas[fitted], found.rule[fitted])[0] for name, found in injected.items()},
        "slope_tuned_nu": {name: slope(deltas[fitted], found.tuned_nu[fitted])[0] for name, found in injected.items()},
        "fit_range": {"from": float(deltas[fitted][0]), "to": float(deltas[fitted][-1])},
        "largest_nudge": setting.largest_nudge,
        "exact_gradient_norm": float(setting.exact.norm()),
        "injected": {name: found._asdict() for name, found in injected.items()},
        "matching": comparison._asdict() | at_a_usual_choice(comparison),
    }
    figures = {
        "bias": (slopes_figure(injected, fitted), SLOPES_CAPTION),
        "matching": (matching_figure(comparison), MATCHING_CAPTION),
    }
    return Study("bias", "Bias of the finite differences", SUMMARY, claims(metrics), metrics, figures)


def at_a_usual_choice(comparison: Comparison) -> dict[str, float]:
    """Both errors at K = 20, ν = 1e-3."""
    row, column = comparison.steps.index(20), int((comparison.nus / 1e-3).log().abs().argmin())
    return {
        "matched_error": float(comparison.matched[row, column]),
        "unmatched_error": float(comparison.unmatched[row, column]),
    }


def claims(metrics: dict[str, Any]) -> list[Claim]:
    """Slopes within .05 of theory, both ways of choosing ν; and the price of unmatched solves."""
    found = []
    ways = {"slope": "ν tuned for every δ", "slope_theory_rule": "ν = c δ^(1/(p+1)), c chosen once"}
    for scheme, expected in EXPECTED.items():
        found.append(
            Claim(
                f"{LABELS[f'fobmaml_{scheme}']}: independent solve errors δ leave a bias of δ^({FRACTIONS[scheme]})",
                f"log-log slope {expected:.3f} ± 0.05, with {' and with '.join(ways.values())}",
                " and ".join(f"{metrics[way][scheme]:.3f}" for way in ways),
                all(abs(metrics[way][scheme] - expected) <= 0.05 for way in ways),
            )
        )
    matched, unmatched = (metrics["matching"][f"{kind}_error"] for kind in ("matched", "unmatched"))
    found.append(
        Claim(
            "Matched nudged solves cancel their errors; a free solution reused as the base does not",
            "at 20 inner steps and ν = 1e-3, relative error at least 100 times larger unmatched",
            f"{matched:.1e} matched, {unmatched:.1e} unmatched",
            unmatched >= 100 * matched,
        )
    )
    return found


def slopes_figure(injected: dict[str, Injection], fitted: Tensor) -> Figure:
    """Bias against δ with both nudges, and the fitted lines."""
    made, axes = figure(2, width=4.2, height=3.6)
    titles = ("ν tuned for every δ", "ν = c δ$^{1/(p+1)}$, c chosen once")
    for panel, title, way in zip(axes, titles, ("tuned", "rule"), strict=True):
        for (scheme, found), marker in zip(injected.items(), "os^", strict=True):
            draw_slope(panel, scheme, marker, found.deltas, getattr(found, way), fitted)
        panel.axvspan(*injected["forward"].deltas[fitted][[0, -1]].tolist(), color="#f4f4f4", zorder=0)
        panel.set(xscale="log", yscale="log", xlim=(5e-17, 2e-2), ylim=(1e-13, 2))
        panel.set_title(title, fontsize=9.5)
        panel.set_xlabel("norm δ of the injected solve errors")
        panel.legend(title="fitted slope (theory)", loc="lower right", frameon=False, fontsize=8.5, title_fontsize=8.5)
    axes[0].set_ylabel("bias  $\\|g - \\nabla F\\| \\,/\\, \\|\\nabla F\\|$")
    axes[1].tick_params(labelleft=False)
    return made


def draw_slope(panel: Axes, scheme: str, marker: str, deltas: Tensor, bias: Tensor, fitted: Tensor) -> None:
    """Points of one scheme, and the line fitted to those in range."""
    colour = COLOURS[f"fobmaml_{scheme}"]
    a, b = slope(deltas[fitted], bias[fitted])
    ends = deltas[fitted][[0, -1]]
    label = f"{scheme.replace('_', ' ')}  {a:.3f}  ({FRACTIONS[scheme]})"
    panel.plot(deltas, bias, marker, markersize=3.5, color=colour, markerfacecolor="white", label=label)
    panel.plot(ends, 10**b * ends**a, color=colour, linewidth=1.6)


def matching_figure(comparison: Comparison) -> Figure:
    """Error against ν, a line for every number of inner steps."""
    made, axes = figure(2, width=4.2, height=3.6)
    for panel, errors, title in zip(
        axes,
        (comparison.matched, comparison.unmatched),
        ("matched: both ends solved alike", "unmatched: free solution reused, nudged one goes on"),
        strict=True,
    ):
        panel.set_title(title, fontsize=9.5)
        panel.axhline(1, color="#888888", linewidth=0.8, linestyle=(0, (4, 3)))
        for colour, steps, line in zip(BLUES, comparison.steps, errors, strict=False):
            panel.plot(comparison.nus, line, "o-", color=colour, markersize=3.5, label=f"{steps}")
        panel.set(xscale="log", yscale="log", ylim=(5e-9, 1e9), xlabel="nudge ν")
    axes[0].set_ylabel("error  $\\|g - \\nabla F\\| \\,/\\, \\|\\nabla F\\|$")
    axes[0].text(1e-9, 2, "as large as the meta-gradient itself", fontsize=7.5, color="#666666")
    axes[0].legend(title="inner steps", loc="upper right", ncols=2, frameon=False)
    axes[1].tick_params(labelleft=False)
    return made
