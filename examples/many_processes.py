"""Meta-learning with many processes that share the tasks of every meta-step, one process a GPU, say.

Each rank holds the whole model and solves tasks of its own; the meta-gradient is the mean over the tasks of all ranks,
the same in each. The result is that of one process, whatever their number, but for round-off.

torchrun --standalone --nproc-per-node 2 examples/many_processes.py [steps]
"""

import os
import sys

import torch
from torch import distributed, nn

import metanudge as mn


def main(steps: int = 200) -> tuple[float, float]:
    """Train, and return the squared error on new tasks before and after."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    torch.manual_seed(0)  # the same initialisation on every rank
    model = nn.Sequential(nn.Linear(1, 40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 1)).to(device)
    learner = mn.MetaLearner(model, mn.metrics.squared_error, prox=2.0, process_group=distributed.group.WORLD)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    new = mn.tasks.sinusoid(100, seed=1)
    before = mn.fit(learner, optimizer, mn.tasks.episodes(mn.tasks.sinusoid), steps=1, validation=new, progress=False)
    after = mn.fit(learner, optimizer, mn.tasks.episodes(mn.tasks.sinusoid), steps=steps, validation=new, every=50)
    if distributed.get_rank() == 0:
        print(f"squared error on a new task: {before.best:.3f} after one meta-step, {after.best:.3f} after {steps}")
    distributed.destroy_process_group()
    return before.best, after.best


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
