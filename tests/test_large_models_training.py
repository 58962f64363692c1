"""What large models are trained with, inside the inner solve: optimizers, compiled models, dropout."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import metanudge as mn
from problems import DTYPE, distance, flat_gradient, normal, single_tasks, squared_error

STEPS, PROX, NU = 4, 2.0, 0.05
LEAN = mn.FOBMAML(nudge="full", nu=NU, start="initialization", certify=False)


def network(middle: nn.Module | None = None) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), middle or nn.Identity(), nn.Linear(8, 1)).to(DTYPE)


def tasks() -> mn.Tasks:
    g = torch.Generator().manual_seed(2)

    def batch() -> mn.Batch:
        x = normal(g, 2, 6, 4)
        y = x.sum(-1, keepdim=True).sin() + 0.1 * normal(g, 2, 6, 1)
        return mn.Batch(x, y)

    return mn.Tasks(batch(), batch())


def gradient(model: nn.Module, data: mn.Tasks | None = None, **settings: object) -> Tensor:
    model.zero_grad()
    torch.manual_seed(3)
    given = {"prox": PROX, "solver": mn.GradientDescent(STEPS, lr=0.1), "estimator": LEAN, "execution": "in_place"}
    mn.MetaLearner(model, squared_error, **(given | settings)).backward(tasks() if data is None else data)
    return flat_gradient(model)


# Any torch.optim optimizer.

OPTIMIZERS: dict[str, Callable] = {
    "sgd_momentum_foreach": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, foreach=True),
    "sgd_fused": lambda p: torch.optim.SGD(p, lr=0.1, fused=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.03, eps=1e-3, weight_decay=0.1),
    "adamw_foreach": lambda p: torch.optim.AdamW(p, lr=0.03, eps=1e-3, foreach=True),
    "adamw_fused": lambda p: torch.optim.AdamW(p, lr=0.03, eps=1e-3, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.02, eps=1e-2),
    "two_groups": lambda p: torch.optim.SGD([{"params": p[:2], "lr": 0.05}, {"params": p[2:]}], lr=0.1),
}


def by_hand(model: nn.Module, factory: Callable) -> Tensor:
    """prox (phi(-nu) - phi(+nu)) / 2 nu, each phi by an ordinary training loop on a copy of the model."""
    total = 0.0
    theta = nn.utils.parameters_to_vector(model.parameters()).detach()
    for task in single_tasks(tasks()):
        ends = {}
        for nu in (-NU, NU):
            trained = copy.deepcopy(model)
            optimizer = factory(list(trained.parameters()))
            for _ in range(STEPS):
                optimizer.zero_grad()
                phi = torch.cat([parameter.reshape(-1) for parameter in trained.parameters()])
                nudged = squared_error(trained, task.support) + nu * squared_error(trained, task.query)
                (nudged + PROX / 2 * (phi - theta).square().sum()).backward()
                optimizer.step()
            ends[nu] = nn.utils.parameters_to_vector(trained.parameters()).detach()
        total = total + PROX * (ends[-NU] - ends[NU]) / (2 * NU)
    return total / 2


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_inside_the_inner_solve(name: str) -> None:
    model = network()
    expected = by_hand(model, OPTIMIZERS[name])
    found = gradient(model, solver=mn.TorchOptimizer(OPTIMIZERS[name], steps=STEPS))
    assert expected.norm() > 1e-2
    assert distance(found, expected) < 1e-10


def test_dropout_with_an_optimizer() -> None:
    """The masks of a step are those of every solve: else a nudge of 1e-4 would divide what they differ by."""
    solver = mn.TorchOptimizer(OPTIMIZERS["sgd_momentum_foreach"], steps=STEPS)
    small, large = (
        gradient(network(nn.Dropout(0.5)), solver=solver, estimator=mn.FOBMAML(nudge="full", nu=nu))
        for nu in (1e-4, 1e-3)
    )
    assert distance(small, large) < 1e-5


# A compiled model.


def twice(loss: Tensor, model: nn.Module) -> None:
    """Differentiate a function of the gradient, as MAML does."""
    parameters = list(model.parameters())
    slopes = torch.autograd.grad(loss, parameters, create_graph=True)
    torch.autograd.grad(sum(slope.square().sum() for slope in slopes), parameters)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # torch._inductor imports torch.jit
def test_a_compiled_model() -> None:
    """The same as eager; compiled twice, with gradients and without, and not again at every step."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = network()
    compiled = torch.compile(model)
    solver = mn.TorchOptimizer(OPTIMIZERS["sgd_fused"], steps=STEPS)
    eager = gradient(model, solver=solver)
    assert distance(gradient(compiled, solver=solver, execution="auto"), eager) < 1e-9
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2
    with pytest.raises(mn.SettingsError, match=r"MAML cannot run here.*Use FOBMAML"):
        mn.MetaLearner(compiled, squared_error, estimator=mn.MAML())
    task = single_tasks(tasks())[0]
    with pytest.raises(RuntimeError, match=r"create_graph=False|double backward"):
        twice(squared_error(compiled, task.support), model)
    adapted = mn.MetaLearner(compiled, squared_error, solver=solver).adapt(task.support)
    with torch.no_grad():
        assert squared_error(adapted, task.support) < squared_error(compiled, task.support)
