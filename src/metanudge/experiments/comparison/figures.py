"""Curves against meta-steps, seconds and gradient evaluations, adaptation step by step, and adapted functions."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import metanudge as mn
from metanudge.experiments.comparison.benchmark import BENCHMARKS
from metanudge.experiments.comparison.study import Method
from metanudge.experiments.study import figure

COLOURS = {
    "fobmaml": "#0072b2",
    "fobmaml_light": "#56b4e9",
    "maml": "#222222",
    "imaml": "#009e73",
    "hfmaml": "#8fbc3f",
    "tangent": "#7f7f7f",
    "fomaml": "#d55e00",
    "reptile": "#cc79a7",
}
LABELS = {
    "fobmaml": "FO-B-MAML",
    "fobmaml_light": "FO-B-MAML, 8 nudged steps",
    "maml": "MAML",
    "imaml": "iMAML",
    "hfmaml": "HF-MAML",
    "tangent": "Tangent",
    "fomaml": "FOMAML",
    "reptile": "Reptile",
}


def curves(name: str, found: Mapping[str, Method]) -> Figure:
    """The metric against meta-steps, processor time and gradient evaluations: kept parameters, and thin the latest."""
    benchmark = BENCHMARKS[name]()
    made, axes = figure(columns=3, width=3.9)
    for method, one in found.items():
        steps, gradients = one.outcomes[0].steps, one.outcomes[0].gradients
        spent = [step * gradients for step in steps]
        for axis, x in zip(axes, ([float(step) for step in steps], one.seconds, spent), strict=True):
            axis.plot(x, one.scores, color=COLOURS[method], label=LABELS[method])
            axis.plot(x, one.latest, color=COLOURS[method], linewidth=0.6, alpha=0.6)
    for axis, label in zip(axes, ("meta-steps", "seconds of meta-training", "gradient evaluations"), strict=True):
        axis.set(xlabel=label)
        if not benchmark.higher:
            axis.set(yscale="log")
    for axis in axes[1:]:
        axis.set(xscale="log")
    axes[0].set(ylabel=benchmark.unit)
    axes[0].legend(fontsize=7)
    return made


def adaptation(name: str, found: Mapping[str, Method]) -> Figure:
    """The metric after every adaptation step, at the end of meta-training."""
    benchmark = BENCHMARKS[name]()
    made, (axis,) = figure(width=5.2)
    for method, one in found.items():
        curve = torch.cat([outcome.values for outcome in one.outcomes]).mean(0)
        axis.plot(range(len(curve)), curve, color=COLOURS[method], label=LABELS[method], marker=".", markersize=4)
    axis.set(xlabel="adaptation steps", ylabel=benchmark.unit)
    if not benchmark.higher:
        axis.set(yscale="log")
    axis.legend(fontsize=7)
    return made


def functions(found: Mapping[str, Method], methods: tuple[str, ...] = ("fobmaml", "maml", "fomaml")) -> Figure:
    """What the first seed's networks become on two test tasks."""
    made, axes = figure(columns=len(methods), width=3.9)
    for axis, method in zip(axes, methods, strict=True):
        _draw_adapted(axis, found[method])
        axis.set(title=LABELS[method], xlabel="x")
    axes[0].legend(fontsize=7)
    return made


def _draw_adapted(axis: Axes, method: Method) -> None:
    job = method.best
    learner = job.learner()
    learner.model.load_state_dict(method.outcomes[0].parameters)
    x = torch.linspace(-5, 5, 201).unsqueeze(1)
    stack = BENCHMARKS[job.benchmark]().test(2)
    assert isinstance(stack, mn.Tasks)
    for place, style in enumerate(("-", "--")):
        support = mn.Batch(stack.support.inputs[place], stack.support.targets[place])
        adapted = learner.adapt(support)
        with torch.no_grad():
            line = adapted(x)[:, 0]
        axis.plot(x[:, 0], line, style, color=COLOURS[job.method], label=f"adapted to task {place + 1}")
        axis.plot(
            support.inputs[:, 0], support.targets[:, 0], "o" if place == 0 else "s", color="#444444", markersize=4
        )
    with torch.no_grad():
        axis.plot(x[:, 0], learner.model(x)[:, 0], color="#bbbbbb", linewidth=1, label="before")
