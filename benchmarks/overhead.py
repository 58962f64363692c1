"""Time of a meta-gradient in place over that of the gradients it takes: what the library itself costs.

The same number of forward and backward passes, by hand in a plain loop without an optimizer, is 1. A transformer of two
layers, 8 x 64 tokens of width 128. Run: ``python benchmarks/overhead.py``.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

import metanudge as mn

WIDTH, LENGTH, SIZE, CLASSES = 128, 64, 8, 16
STEPS, REPEATS = 5, 9


def transformer() -> nn.Module:
    torch.manual_seed(0)
    block = nn.TransformerEncoderLayer(WIDTH, nhead=4, dim_feedforward=4 * WIDTH, dropout=0.0, batch_first=True)
    return nn.Sequential(nn.TransformerEncoder(block, num_layers=2), nn.Linear(WIDTH, CLASSES))


def loss(model: nn.Module, batch: mn.Batch) -> Tensor:
    return nn.functional.cross_entropy(model(batch.inputs).flatten(0, 1), batch.targets.flatten())


def tasks() -> mn.Tasks:
    def batch() -> mn.Batch:
        return mn.Batch(torch.randn(1, SIZE, LENGTH, WIDTH), torch.randint(CLASSES, (1, SIZE, LENGTH)))

    return mn.Tasks(batch(), batch())


def seconds(work: Callable[[], object]) -> float:
    begin = time.process_time()  # one thread: what others make it wait for does not count
    work()
    return time.process_time() - begin


def ratio(solver: object, estimator: object) -> tuple[int, float]:
    """Gradients taken, and the ratio of the shortest times; both ways are timed in turn."""
    model, data = transformer(), tasks()
    learner = mn.MetaLearner(model, loss, solver=solver, estimator=estimator, execution="in_place")
    gradients = learner.backward(data).gradient_evaluations
    batch = mn.Batch(data.support.inputs[0], data.support.targets[0])

    def plain() -> None:
        for _ in range(gradients):
            model.zero_grad()
            loss(model, batch).backward()

    times = [(seconds(lambda: learner.backward(data)), seconds(plain)) for _ in range(REPEATS)]
    ours, plainly = (min(column) for column in zip(*times, strict=True))
    return gradients, ours / plainly


CASES = {
    "lean, SGD": (
        mn.TorchOptimizer(lambda p: torch.optim.SGD(p, lr=1e-2), STEPS),
        mn.FOBMAML(nudge="full", start="initialization", certify=False),
    ),
    "lean, AdamW": (
        mn.TorchOptimizer(lambda p: torch.optim.AdamW(p, lr=1e-4), STEPS),
        mn.FOBMAML(nudge="full", start="initialization", certify=False),
    ),
    "lean, GradientDescent": (
        mn.GradientDescent(STEPS, lr=1e-2),
        mn.FOBMAML(nudge="full", start="initialization", certify=False),
    ),
    "linear nudge, SGD": (mn.TorchOptimizer(lambda p: torch.optim.SGD(p, lr=1e-2), STEPS), mn.FOBMAML(certify=False)),
    "default, Nesterov": (mn.Nesterov(STEPS), mn.FOBMAML()),
}


def main() -> None:
    torch.set_num_threads(1)
    for name, (solver, estimator) in CASES.items():
        gradients, found = ratio(solver, estimator)
        print(f"{name:24}{gradients:4} gradients, {found:.3f} times a plain loop of as many")


if __name__ == "__main__":
    main()
