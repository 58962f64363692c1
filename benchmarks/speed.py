"""Meta-gradients a second on the sinusoid workload, against the usual Python loop over tasks with ``higher``.

MLP 1-40-40-1 with ReLU, 25 tasks of 10 + 10 examples, 10 inner steps of plain gradient descent, eager, float32.
``higher`` unrolls MAML task by task; FO-B-MAML solves 10 free and 10 + 10 nudged steps, all tasks at once. Only ratios
within one run mean anything. Run: ``make bench``; the committed result is results/benchmarks/speed.json.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import higher
import torch
import torch.nn.functional as F
from torch import nn

import metanudge as mn
from metanudge.experiments.report import versions

TASKS, STEPS, LR, PROX, REPEATS = 25, 10, 0.01, 2.0, 30


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1))


def higher_loop(tasks: mn.Tasks) -> Callable[[], None]:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    (x, y), (x_query, y_query) = tasks

    def step() -> None:
        for i in range(TASKS):
            with higher.innerloop_ctx(model, optimizer, copy_initial_weights=False) as (functional, inner):
                for _ in range(STEPS):
                    inner.step(F.mse_loss(functional(x[i]), y[i]))
                (F.mse_loss(functional(x_query[i]), y_query[i]) / TASKS).backward()

    return step


def library(tasks: mn.Tasks, estimator: object) -> Callable[[], None]:
    solver = mn.GradientDescent(STEPS, lr=LR)
    learner = mn.MetaLearner(network(), mn.metrics.squared_error, prox=PROX, solver=solver, estimator=estimator)
    return lambda: learner.backward(tasks) and None


def main() -> None:
    tasks = mn.tasks.sinusoid(TASKS)
    contenders = {
        "higher_maml_loop": higher_loop(tasks),
        "fobmaml_symmetric_full": library(tasks, mn.FOBMAML(nudge="full")),
        "fobmaml_symmetric_linear": library(tasks, mn.FOBMAML(steps=STEPS)),
        "fobmaml_default": library(tasks, mn.FOBMAML()),
        "maml": library(tasks, mn.MAML()),
        "fomaml": library(tasks, mn.FOMAML()),
        "imaml": library(tasks, mn.IMAML()),
        "hfmaml": library(tasks, mn.HFMAML()),
    }
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for step in contenders.values():
        step()
    for _ in range(REPEATS):  # in turn, so that a busy moment of the machine meets all of them
        for name, step in contenders.items():
            begun = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - begun)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    result = {
        "command": "python benchmarks/speed.py",
        "milliseconds": {name: round(1e3 * value, 2) for name, value in medians.items()},
        "times_faster_than_higher": {
            name: round(medians["higher_maml_loop"] / value, 2) for name, value in medians.items()
        },
        "settings": {"tasks": TASKS, "inner_steps": STEPS, "lr": LR, "prox": PROX, "repeats": REPEATS},
        "versions": versions() | {"higher": "0.2.1"},
    }
    print(json.dumps(result, indent=1))
    out = Path("results/benchmarks")
    out.mkdir(parents=True, exist_ok=True)
    (out / "speed.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
