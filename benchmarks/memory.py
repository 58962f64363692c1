"""Tensor bytes alive at the peak of one meta-gradient, against the number of inner steps.

Counted, not sampled: a dispatch mode sees every tensor an operation makes, and a finaliser the end of its storage,
whoever held it last (what autograd saves is held by autograd). Deterministic.
Run: ``make bench``; the committed result is results/benchmarks/memory.json.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

import metanudge as mn
from metanudge.diagnostics.memory import LiveBytes
from metanudge.experiments.report import versions

TASKS = 4  # in place, one of them is alive at a time


def peak_bytes(estimator: Any, solver: Any, execution: str) -> int:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 128), nn.Tanh(), nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 1))
    learner = mn.MetaLearner(
        model, mn.metrics.squared_error, prox=10.0, solver=solver, estimator=estimator, execution=execution
    )
    tasks = mn.tasks.sinusoid(TASKS, shots=64, queries=64)
    with LiveBytes() as live:
        learner.backward(tasks)
    return live.peak


CASES = {
    "fobmaml_vectorized": (mn.FOBMAML(nudge="full"), "vectorized"),
    "fobmaml_linear_vectorized": (mn.FOBMAML(), "vectorized"),
    "fobmaml_in_place": (mn.FOBMAML(), "in_place"),
    "fomaml": (mn.FOMAML(), "vectorized"),
    "reptile": (mn.Reptile(), "vectorized"),
    "imaml": (mn.IMAML(), "vectorized"),
    "tangent": (mn.Tangent(), "vectorized"),
    "hfmaml": (mn.HFMAML(), "vectorized"),
    "maml_checkpointed": (mn.MAML(checkpoint=True), "vectorized"),
    "maml": (mn.MAML(), "vectorized"),
}
SOLVERS = {"gradient_descent": lambda steps: mn.GradientDescent(steps, lr=0.001), "nesterov": mn.Nesterov}


def main() -> None:
    torch.set_num_threads(1)  # bytes do not depend on it, and small operations run faster
    table: dict[str, dict[str, dict[str, int]]] = {}
    for solver_name, solver in SOLVERS.items():
        for name, (estimator, execution) in CASES.items():
            grows = name in ("maml", "hfmaml", "maml_checkpointed")
            counts = (10, 100, 400) if grows else (10, 100, 1000)
            row = {str(steps): peak_bytes(estimator, solver(steps), execution) for steps in counts}
            table.setdefault(solver_name, {})[name] = row
            ratio = row[str(counts[-1])] / row["10"]
            told = "  ".join(f"{steps:>4} steps {size / 2**20:8.2f} MiB" for steps, size in row.items())
            print(f"{solver_name:17}{name:27}{told}   x {ratio:.4f}")
    fobmaml = {
        f"{solver}.{name}": row["1000"] / row["10"]
        for solver, rows in table.items()
        for name, row in rows.items()
        if name.startswith("fobmaml")
    }
    result = {
        "command": "python benchmarks/memory.py",
        "peak_bytes": table,
        "fobmaml_peak_at_1000_steps_over_10": fobmaml,
        "versions": versions(),
    }
    out = Path("results/benchmarks")
    out.mkdir(parents=True, exist_ok=True)
    (out / "memory.json").write_text(json.dumps(result, indent=1) + "\n")
    worst = max(fobmaml.values())
    print(f"FO-B-MAML, peak at 1,000 steps over peak at 10: at most {worst:.4f}")
    if worst > 1.01:
        raise SystemExit("FO-B-MAML's memory grows with the inner steps")


if __name__ == "__main__":
    main()
