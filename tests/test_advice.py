"""The words of the warning about unsolved inner problems: what is known, and what is a guess."""

from __future__ import annotations

import re

import pytest
import torch

import metanudge as mn
from metanudge import advice

EXECUTIONS = ["vectorized", "in_place"]


def test_who_follows_a_guess_is_not_led_on() -> None:
    """3 steps, then 30, then 300, then 600: no residual fell, and every time the next number was a cure."""
    assert [advice.guess(0.9, steps) for steps in (3, 30, 100)] == [30, 128, 128]
    told = advice.unsolved(0.9, 3.0, mn.Nesterov(128), 0.1, None)
    assert "take more steps than 128 (none were tried here; mn.check tries)" in told
    assert "perhaps" not in told


def test_a_step_size_of_the_user_comes_before_steps_that_were_not_tried() -> None:
    sgd = mn.TorchOptimizer(lambda parameters: torch.optim.SGD(parameters, lr=1e-3), steps=3)
    for solver, first in ((sgd, "look at the step size of TorchOptimizer"), (mn.GradientDescent(3, 0.1), "look at lr")):
        told = advice.unsolved(0.8, 3.0, solver, 0.5, None)
        assert re.search(f"rough: {first}.*; or raise steps from 3 to perhaps 30", told)
    assert "look at the step size of TorchOptimizer (leave out weight_decay" in advice.unsolved(0.8, 3, sgd, 0.5, None)
    assert advice.calmer(sgd, 0.5) == (
        "let the inner solver (TorchOptimizer) take smaller steps (the lr of its optimizer; and no weight_decay)"
    )


class Dropped(torch.nn.Sequential):
    """A linear model of inputs that are dropped at random."""

    def __init__(self, rate: float) -> None:
        super().__init__(torch.nn.Dropout(rate), torch.nn.Linear(3, 1))


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_dropout_is_named_and_no_steps_are_advised(execution: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 8, 3)
    tasks = mn.Tasks(*(mn.Batch(x, x.sum(-1, keepdim=True)) for _ in range(2)))
    for model, random in ((Dropped(0.5), True), (Dropped(0.0), False), (Dropped(0.5).eval(), False)):
        learner = mn.MetaLearner(
            model, mn.metrics.squared_error, prox=0.05, solver=mn.GradientDescent(3, 0.02), execution=execution
        )
        with pytest.warns(mn.UnsolvedWarning) as caught:
            learner.backward(tasks)
        told = str(caught[0].message)
        assert ("the support loss is random from step to step (dropout in train mode)" in told) == random
        assert ("raise steps" in told or "look at lr" in told) != random


def test_minibatches_are_named() -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 3)
    batch = mn.Batch(x, x.sum(-1, keepdim=True))
    halves = mn.Minibatches([mn.Batch(x[:4], batch.targets[:4]), mn.Batch(x[4:], batch.targets[4:])])
    solver = mn.GradientDescent(3, 0.02)
    learner = mn.MetaLearner(
        torch.nn.Linear(3, 1), mn.metrics.squared_error, prox=0.05, solver=solver, execution="in_place"
    )
    with pytest.warns(mn.UnsolvedWarning, match=r"random from step to step \(minibatches\).*cannot fall below"):
        learner.backward([mn.Tasks(halves, batch)])


def test_what_drops_at_random() -> None:
    layers: list[tuple[torch.nn.Module, bool]] = [
        (torch.nn.LSTM(2, 2, num_layers=2, dropout=0.1), True),
        (torch.nn.LSTM(2, 2, num_layers=2), False),
        (torch.nn.MultiheadAttention(2, 1, dropout=0.1), True),
        (torch.nn.MultiheadAttention(2, 1), False),
        (torch.nn.Dropout2d(0.1), True),
    ]
    for layer, drops in layers:
        assert bool(advice.noise(torch.nn.Sequential(layer), False)) == drops
    assert advice.noise(torch.nn.Dropout(0.1), True) == "minibatches and dropout in train mode"


@pytest.mark.usefixtures("short_search")
def test_check_says_that_a_random_loss_can_not_be_compared() -> None:
    torch.manual_seed(0)
    x, heard = torch.randn(1, 8, 3), []
    tasks = mn.Tasks(*(mn.Batch(x, x.sum(-1, keepdim=True)) for _ in range(2)))
    learner = mn.MetaLearner(Dropped(0.5), mn.metrics.squared_error, solver=mn.Nesterov(2))
    for random in (True, False):
        found = mn.check(learner, tasks, compare=[], reference_steps=10, progress=heard.append)
        assert (
            found.verdict.startswith("The support loss is random from step to step (dropout in train mode)") == random
        )
        learner.model.eval()
    assert heard[:2] == ["the exact meta-gradient", "FOBMAML()"]
