"""The sinusoid of Finn et al. with a small smooth network.

metanudge check examples/sinusoid.py:make
metanudge smoothness examples/sinusoid.py:make
"""

import torch

import metanudge as mn


def make() -> tuple[mn.MetaLearner, mn.Tasks, torch.optim.Optimizer]:
    """A learner, tasks to look at, and the optimizer it is trained with."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(1, 40), torch.nn.Tanh(), torch.nn.Linear(40, 1))
    learner = mn.MetaLearner(model, mn.metrics.squared_error, prox=1.0)
    return learner, mn.tasks.sinusoid(8), mn.optim.NormalizedSGD(model.parameters(), lr=0.1)


def starved() -> tuple[mn.MetaLearner, mn.Tasks]:
    """The same with too few steps and too small a prox: what ``metanudge check`` is for."""
    learner, tasks, _ = make()
    return mn.MetaLearner(learner.model, mn.metrics.squared_error, prox=0.1, solver=mn.Nesterov(steps=4)), tasks
