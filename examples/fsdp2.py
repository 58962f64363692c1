"""Meta-learning a model whose parameters are sharded over processes by FSDP2.

All ranks learn the same tasks together: each holds its part of every parameter, and takes its part of every task's
examples. FSDP2 averages their gradients, and norms and losses are taken over all of them, so that every rank makes the
same decisions.

torchrun --standalone --nproc-per-node 2 examples/fsdp2.py [steps]
"""

import os
import sys

import torch
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard

import metanudge as mn


def sharded(device: torch.device) -> nn.Module:
    """Every layer is gathered on its own, when it is needed; the same initialisation on every rank."""
    torch.manual_seed(0)
    layers = [nn.Linear(1, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1)]
    model = nn.Sequential(*layers).to(device)
    for layer in layers:
        if isinstance(layer, nn.Linear):
            fully_shard(layer)
    return fully_shard(model)


def of_this_rank(tasks: mn.Tasks, device: torch.device) -> mn.Tasks:
    """Every ``world_size``-th example; all ranks have as many."""
    part = slice(distributed.get_rank(), None, distributed.get_world_size())
    return mn.Tasks(*(mn.Batch(*(leaf[:, part].to(device) for leaf in batch)) for batch in tasks))


def main(steps: int = 30) -> tuple[float, float]:
    """Train, and return the squared error on new tasks before and after."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    model = sharded(device)
    learner = mn.MetaLearner(
        model,
        mn.metrics.squared_error,
        prox=5.0,
        solver=mn.TorchOptimizer(lambda parameters: torch.optim.SGD(parameters, lr=0.02, momentum=0.9), steps=5),
        estimator=mn.FOBMAML(nudge="full", start="initialization", certify=False),
    )
    optimizer = mn.optim.NormalizedSGD(model.parameters(), lr=0.1)  # whose norm is that of all ranks
    new = of_this_rank(mn.tasks.sinusoid(10, seed=1), device)
    before = learner.evaluate(new).mean
    for step in range(steps):
        optimizer.zero_grad()
        learner.backward(of_this_rank(mn.tasks.sinusoid(2, first=2 * step), device))
        optimizer.step()
    after = learner.evaluate(new).mean
    if distributed.get_rank() == 0:
        print(f"squared error after 5 steps on a new task: {before:.3f} before meta-learning, {after:.3f} after")
    distributed.destroy_process_group()
    return before, after


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
