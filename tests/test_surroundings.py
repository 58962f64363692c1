"""What is around a model: other random generators and trainable tensors, hooks, buffers, derivatives, devices."""

from __future__ import annotations

import copy
import pickle
import random
import re
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

import metanudge as mn
from metanudge.training.order import moved
from problems import PROBLEMS, distance, flat_gradient

SPLITS = ("train", "validation", "test")
EXECUTIONS = ("vectorized", "in_place")
SOLVER = mn.GradientDescent(steps=6, lr=0.05)
TASKS = mn.tasks.sinusoid(3, shots=5, queries=5, dtype=torch.float64)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(1, 6), nn.Tanh(), nn.Linear(6, 1)).double()


def learner_of(loss: Any = mn.metrics.squared_error, model: nn.Module | None = None, **settings: Any) -> mn.MetaLearner:
    settings = {"solver": SOLVER} | settings
    return mn.MetaLearner(network() if model is None else model, loss, **settings)


# Random generators.


DRAWS = {"numpy": lambda: float(np.random.randn()), "random": lambda: random.gauss(0, 1)}


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("generator", DRAWS)
def test_noise_of_any_default_generator_is_the_same_for_every_nudge(generator: str, execution: str) -> None:
    """The noise is a force at every step. Where the support loss is quadratic and the query loss linear, it moves all
    solutions alike, and so not their differences."""
    made, draw = PROBLEMS["ridge"](), DRAWS[generator]
    drawn: list[float] = []

    def noisy(model: nn.Module, batch: mn.Batch) -> Tensor:
        drawn.append(draw())
        return made.loss(model, batch) + drawn[-1] * sum(leaf.sum() for leaf in model.parameters())

    def linear(model: nn.Module, batch: mn.Batch) -> Tensor:
        return model(batch.inputs).mean()

    def found(loss: Any) -> Tensor:
        random.seed(1)
        np.random.seed(2)
        before = random.getstate(), np.random.get_state()[1].tolist()
        solver = mn.GradientDescent(9, 0.1)
        learner = learner_of(loss, made.make(), query_loss=linear, execution=execution, solver=solver, prox=made.prox)
        learner.backward(made.tasks)
        assert before == (random.getstate(), np.random.get_state()[1].tolist())
        return flat_gradient(learner.model)

    assert distance(found(noisy), found(made.loss)) < 1e-9
    assert len(set(drawn)) > 9


# Trainable tensors that are not the model's.


OUTSIDE: dict[str, Callable[[], Tensor]] = {
    "parameter": lambda: nn.Parameter(torch.tensor(0.1, dtype=torch.float64)),
    "of a module": lambda: nn.Linear(1, 1).double().weight,
}
WAYS: dict[str, dict[str, Any]] = {
    "vectorized": {"execution": "vectorized"},
    "in place": {"execution": "in_place"},
    "FOMAML": {"execution": "in_place", "estimator": mn.FOMAML()},
    "MAML": {"estimator": mn.MAML()},
    "compiled": {"compile": True},
}


def scaled_by(outside: Tensor) -> Any:
    def loss(model: nn.Module, batch: mn.Batch) -> Tensor:
        return mn.metrics.squared_error(model, batch) + (outside * model(batch.inputs)).square().mean()

    return loss


@pytest.mark.parametrize("where", ["loss", "query_loss"])
@pytest.mark.parametrize("held", [None, 3.0], ids=["empty", "filled"])
@pytest.mark.parametrize("kind", OUTSIDE)
@pytest.mark.parametrize("way", WAYS)
def test_a_parameter_outside_the_model_is_refused(
    way: str, kind: str, held: float | None, where: str, traced: None
) -> None:
    outside = OUTSIDE[kind]()
    outside.grad = None if held is None else torch.full_like(outside, held)
    losses = {"loss": mn.metrics.squared_error, where: scaled_by(outside)}
    learner = learner_of(losses.pop("loss"), **losses, **WAYS[way])
    for _ in range(2):
        with pytest.raises(mn.LossError, match=r"trainable parameter of shape .* none of the model"):
            learner.backward(TASKS)
        assert all(leaf.grad is None for leaf in learner.model.parameters())
        assert outside.grad is None if held is None else (outside.grad == held).all()


@pytest.mark.parametrize("held", [None, 3.0], ids=["empty", "filled"])
@pytest.mark.parametrize("way", [way for way in WAYS if way != "MAML"])
def test_another_tensor_outside_the_model_is_told_of_and_left_alone(way: str, held: float | None, traced: None) -> None:
    outside = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    outside.grad = None if held is None else torch.full_like(outside, held)
    learner = learner_of(scaled_by(outside), **WAYS[way])
    constant = learner_of(scaled_by(torch.tensor(0.1, dtype=torch.float64)), **WAYS[way])
    with pytest.warns(UserWarning, match=r"tensor of shape \(\) that asks for a gradient.*torch\.nn\.Parameter"):
        learner.backward(TASKS)
    constant.backward(TASKS)
    assert torch.equal(flat_gradient(learner.model), flat_gradient(constant.model))
    learner.evaluate(TASKS)  # and not again
    assert outside.grad is None if held is None else (outside.grad == held).all()
    for copied in (copy.deepcopy(learner.execution), pickle.loads(pickle.dumps(learner.execution.known))):
        assert not getattr(copied, "known", copied).strangers


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_what_stays_as_it_is_may_be_outside_the_model(execution: str) -> None:
    teacher = network()

    def loss(model: nn.Module, batch: mn.Batch) -> Tensor:
        with torch.no_grad():
            wanted = teacher(batch.inputs)
        return (model(batch.inputs) - wanted - teacher[0].bias.detach().sum()).square().mean()

    assert learner_of(loss, execution=execution).backward(TASKS).dropped_tasks == 0
    assert all(leaf.grad is None for leaf in teacher.parameters())


def test_a_buffer_that_asks_for_a_gradient_is_refused() -> None:
    model = network()
    model.register_buffer("scale", torch.ones((), requires_grad=True))
    with pytest.raises(mn.SettingsError, match=r"the buffer scale asks for a gradient.*make it a parameter"):
        learner_of(model=model)


# Losses that take derivatives: of u(x), that solves u' = k u, u(0) = 1.


def by_autograd(model: nn.Module, batch: mn.Batch) -> Tensor:
    x = batch.inputs.detach().clone().requires_grad_()
    u = model(x)
    (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    return _misfit(model, u, slope, batch)


def by_autograd_of_the_batch(model: nn.Module, batch: mn.Batch) -> Tensor:
    """The leaf is the same one at every evaluation, and none that is learned."""
    u = model(batch.inputs.requires_grad_())
    (slope,) = torch.autograd.grad(u.sum(), batch.inputs, create_graph=True)
    return _misfit(model, u, slope, batch)


def by_functions(model: nn.Module, batch: mn.Batch) -> Tensor:
    slope = torch.func.grad(lambda x: model(x).sum())(batch.inputs)
    return _misfit(model, model(batch.inputs), slope, batch)


def _misfit(model: nn.Module, u: Tensor, slope: Tensor, batch: mn.Batch) -> Tensor:
    return (slope - batch.targets * u).square().mean() + (model(torch.zeros_like(u)) - 1).square().mean()


@pytest.fixture
def equations() -> mn.Tasks:
    torch.manual_seed(1)
    x, k = torch.rand(3, 6, 1).double(), torch.rand(3, 1, 1).double().expand(3, 6, 1).contiguous()
    return mn.Tasks(mn.Batch(x, k), mn.Batch(x.flip(1), k))


@pytest.mark.parametrize("loss", [by_autograd, by_autograd_of_the_batch], ids=lambda loss: loss.__name__)
@pytest.mark.parametrize("estimator", ["fobmaml", "hfmaml"])
def test_a_loss_that_differentiates_goes_in_place_by_itself(loss: Any, estimator: str, equations: mn.Tasks) -> None:
    made = mn.ESTIMATORS[estimator]()
    wanted = learner_of(by_functions, execution="vectorized", estimator=made)
    step, evaluation = wanted.backward(equations), wanted.evaluate(equations)

    learner = learner_of(loss, estimator=made)
    with pytest.warns(UserWarning, match=r'"auto" goes in place from here on.*takes a derivative itself'):
        found = learner.backward(equations)
    assert found.query_loss == pytest.approx(step.query_loss, rel=1e-12)
    assert distance(flat_gradient(learner.model), flat_gradient(wanted.model)) < 1e-8  # two displacements, both tiny
    assert torch.allclose(learner.evaluate(equations).values, evaluation.values, rtol=1e-10)  # without a word
    support = equations.unstack()[0].support
    for leaf, same in zip(learner.adapt(support).parameters(), wanted.adapt(support).parameters(), strict=True):
        assert torch.allclose(leaf, same, rtol=1e-10)
    optimizer = mn.optim.NormalizedSGD(learner.model.parameters(), lr=0.1)
    mn.fit(learner, optimizer, equations, steps=1, tasks_per_step=3, validation=equations, progress=False)


def test_only_the_first_value_of_a_loss_that_differentiates_is_tried_without_a_graph(equations: mn.Tasks) -> None:
    calls = 0

    def loss(model: nn.Module, batch: mn.Batch) -> Tensor:
        nonlocal calls
        calls += 1
        return by_autograd(model, batch)

    learner = learner_of(loss, execution="in_place")
    learner.evaluate(equations)
    first, calls = calls, 0
    learner.evaluate(equations)
    assert first == calls + 2  # once more to see that the points are others at every evaluation


def test_vectorized_is_refused_with_what_to_do(equations: mn.Tasks) -> None:
    learner = learner_of(by_autograd, execution="vectorized")
    with pytest.raises(mn.LossError, match=r'derivative itself.*execution="in_place".*torch\.func\.grad'):
        learner.backward(equations)


@pytest.mark.parametrize("settings", [{"estimator": mn.MAML()}, {"compile": True}], ids=["MAML", "compile"])
def test_auto_stays_where_the_settings_allow_no_other_execution(settings: Any, equations: mn.Tasks) -> None:
    learner = learner_of(by_autograd, **settings)
    with pytest.raises(mn.LossError, match='execution="in_place"'):
        learner.backward(equations)
    assert learner.execution.name == "vectorized"


def fixed_points(model: nn.Module, batch: mn.Batch) -> Tensor:
    u = model(POINTS)
    (slope,) = torch.autograd.grad(u.sum(), POINTS, create_graph=True)
    return mn.metrics.squared_error(model, batch) + (slope - u).square().mean()


POINTS = torch.linspace(0, 1, 4, dtype=torch.float64)[:, None].requires_grad_()


def test_points_that_are_the_same_at_every_evaluation_may_be_differentiated_by() -> None:
    learner = learner_of(fixed_points, execution="in_place")
    with pytest.warns(UserWarning, match=r"if the loss takes a derivative by it, nothing is wrong"):
        assert learner.backward(TASKS).dropped_tasks == 0
    assert POINTS.grad is None


class Normalised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.norm = network(), nn.BatchNorm1d(1).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.body(x))


@pytest.mark.parametrize("loss", [by_autograd, by_autograd_of_the_batch], ids=lambda loss: loss.__name__)
def test_batch_norm_by_the_support_set_with_a_loss_that_differentiates(loss: Any, equations: mn.Tasks) -> None:
    learner = learner_of(loss, Normalised(), execution="in_place", batch_norm="support")
    assert learner.backward(equations).dropped_tasks == 0
    adapted = learner.adapt(equations.unstack()[0].support)
    assert not adapted.norm.running_mean.requires_grad
    assert all(leaf.grad is None for leaf in adapted.parameters())


def test_a_training_that_went_in_place_is_resumed_bit_for_bit(equations: mn.Tasks, tmp_path: Path) -> None:
    """With dropout: the attempt that failed draws nothing for what follows."""

    def trained(steps: int, out: str, execution: str = "auto") -> Tensor:
        model = network().insert(1, nn.Dropout(0.3))
        learner = learner_of(by_autograd, model, execution=execution)
        optimizer = mn.optim.NormalizedSGD(model.parameters(), lr=0.1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            mn.fit(learner, optimizer, equations, steps=steps, tasks_per_step=3, out=tmp_path / out, progress=False)
        return torch.cat([leaf.detach().flatten() for leaf in model.parameters()])

    wanted = trained(4, "whole")
    trained(2, "parts")
    assert torch.equal(trained(4, "parts"), wanted)
    assert torch.equal(trained(4, "in place", "in_place"), wanted)


def test_a_metric_goes_in_place_for_itself_alone() -> None:
    def looks(model: nn.Module, batch: mn.Batch) -> Tensor:
        value = mn.metrics.squared_error(model, batch)
        return value if value.item() > 0 else -value

    learner = learner_of()
    found, same = learner.evaluate(TASKS, looks), learner.evaluate(TASKS)
    assert torch.allclose(found.values, same.values, rtol=1e-10)
    assert learner.execution.name == "vectorized"


def test_where_it_fails_in_place_too_the_learner_stays_as_it_was() -> None:
    learner = learner_of()
    with pytest.raises(mn.LossError, match="must return a scalar tensor"):
        learner.evaluate(TASKS, lambda model, batch: mn.metrics.squared_error(model, batch).item())
    assert learner.execution.name == "vectorized"


class Listed(nn.Module):
    """It holds a weight of its own by another way than its name."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1).double()
        self.held = [self.layer.weight]

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * self.held[0]


def test_a_parameter_that_is_read_from_a_list_goes_in_place() -> None:
    torch.manual_seed(0)
    model = Listed()
    with pytest.raises(mn.LossError, match=r"another way than its name.*execution=\"in_place\""):
        learner_of(model=model, execution="vectorized").backward(TASKS)
    learner, in_place = learner_of(model=model), learner_of(model=copy.deepcopy(model), execution="in_place")
    in_place.model.held = [in_place.model.layer.weight]
    with pytest.warns(UserWarning, match='"auto" goes in place from here on'):
        learner.backward(TASKS)
    in_place.backward(TASKS)
    assert torch.equal(flat_gradient(model), flat_gradient(in_place.model))


@pytest.mark.parametrize("generator", DRAWS)
def test_compiled_noise_of_other_generators_is_refused(generator: str, traced: None) -> None:
    def noisy(model: nn.Module, batch: mn.Batch) -> Tensor:
        return mn.metrics.squared_error(model, batch) * (1 + DRAWS[generator]() ** 2)

    with pytest.raises(mn.LossError, match=r"draws random numbers.*leave compile out"):
        learner_of(noisy, compile=True).backward(TASKS)


# Hooks.


@pytest.mark.parametrize("register", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_backward_hooks_of_modules_run_in_place(register: str) -> None:
    ran: list[int] = []
    model = network()
    handle = getattr(model[1], register)(lambda *given: ran.append(1))
    learner = learner_of(model=model)
    assert learner.execution.name == "in_place"
    learner.backward(TASKS)
    assert ran
    with pytest.raises(mn.SettingsError, match=r"the module 1 has a backward hook.*execution=\"in_place\""):
        learner_of(model=model, execution="vectorized")
    handle.remove()
    model.zero_grad()
    late, choosing = learner_of(model=model, execution="vectorized"), learner_of(model=model)
    getattr(model[1], register)(lambda *given: ran.append(2))
    with pytest.raises(mn.SettingsError, match="the module 1 has a backward hook"):
        late.backward(TASKS)
    assert all(leaf.grad is None for leaf in model.parameters())
    with pytest.warns(UserWarning, match='"auto" goes in place from here on.*has a backward hook'):
        choosing.backward(TASKS)
    assert ran[-1] == 2


# Buffers.


LANES: list[bool] = []
"""Of every forward pass, whether the table had a lane axis; not in the module, which forgets what is written to it."""


class Buffered(nn.Module):
    """A table that is read, a counter, and the features of the last batch, which are written to where they lie."""

    def __init__(self, writes: bool) -> None:
        super().__init__()
        self.body, self.writes = network(), writes
        self.register_buffer("table", torch.linspace(0, 1, 5, dtype=torch.float64)[:, None])
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("last", torch.zeros(1, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        """Any shape of buffers would do; the loss looks at them."""
        LANES.append(torch._C._functorch.is_batchedtensor(self.table))
        self.count += 1
        y = self.body(x) + self.table
        if self.writes:
            self.last.copy_(y.detach().mean(-2))
            y = y - self.last * self.count
        return y


@pytest.mark.parametrize("writes", [False, True], ids=["read", "written"])
@pytest.mark.parametrize("estimator", ["fobmaml", "maml", "imaml"])
def test_lanes_have_buffers_of_their_own_only_where_they_write_to_them(estimator: str, writes: bool) -> None:
    model = Buffered(writes)
    learner = learner_of(model=model, estimator=mn.ESTIMATORS[estimator](), execution="vectorized")
    learner.backward(TASKS)
    for leaf, value in (("table", torch.linspace(0, 1, 5, dtype=torch.float64)[:, None]), ("count", 0), ("last", 0)):
        assert (getattr(model, leaf) == value).all()
    if estimator == "fobmaml":
        in_place = learner_of(model=Buffered(writes), execution="in_place")
        in_place.backward(TASKS)
        assert distance(flat_gradient(model), flat_gradient(in_place.model)) < 1e-12
    LANES.clear()
    learner.backward(TASKS)
    assert set(LANES) == {writes}
    with pytest.raises(RuntimeError, match="size"):
        learner.evaluate(TASKS, lambda model, batch: model(batch.inputs.repeat(1, 2)).sum())
    assert learner.execution.known.writes == writes


# Devices, and what else there is.


@contextmanager
def default_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


FAMILIES: dict[str, Callable[[], mn.Tasks]] = {
    "sinusoid": lambda: mn.tasks.sinusoid(2),
    "harmonic": lambda: mn.tasks.harmonic(2),
    "linear": lambda: mn.tasks.linear(2),
    "logistic": lambda: mn.tasks.logistic(2),
    "few_shot": lambda: mn.tasks.few_shot(
        torch.utils.data.TensorDataset(torch.zeros(8, 1, device="cpu"), torch.arange(8, device="cpu") % 2),
        ways=2,
        shots=1,
        queries=1,
    )[0],
}


@pytest.mark.parametrize("family", FAMILIES)
def test_tasks_are_drawn_alike_whatever_the_default_device(family: str) -> None:
    wanted = FAMILIES[family]()
    with default_device("meta"):  # from which no number can be had
        found = FAMILIES[family]()
    for batch, same in zip(found, wanted, strict=True):
        for leaf, other in zip(batch, same, strict=True):
            assert torch.equal(leaf, other)


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_a_learner_runs_whatever_the_default_device(execution: str) -> None:
    def trained() -> tuple[Tensor, mn.Fit, Tensor]:
        torch.manual_seed(0)
        model = nn.Linear(1, 1, device="cpu", dtype=torch.float64)
        learner = learner_of(model=model, execution=execution, warm_start=mn.WarmStart())
        optimizer = mn.optim.NormalizedSGD(model.parameters(), lr=0.1)
        scheduler = mn.optim.ParameterFree(optimizer)
        common = {"tasks_per_step": 2, "validation": TASKS, "every": 1, "progress": False}
        found = mn.fit(learner, optimizer, TASKS, steps=2, scheduler=scheduler, **common)
        return flat_gradient(model), found, learner.adapt(TASKS.unstack()[0].support).weight.detach()

    wanted = trained()
    with default_device("meta"):
        found = trained()
    assert torch.equal(found[0], wanted[0])
    assert found[1].best == wanted[1].best
    assert torch.equal(found[2], wanted[2])


def test_a_device_without_what_is_needed_is_refused() -> None:
    with pytest.raises(mn.SettingsError, match=r"parameter 0\.weight is on meta.*runs on CPUs and CUDA"):
        learner_of(model=network().to("meta"))


def test_minibatches_are_moved_as_tasks_are() -> None:
    minibatches = mn.Minibatches([TASKS.unstack()[0].support])
    (found,) = moved([mn.Tasks(minibatches, TASKS.unstack()[0].query)], torch.device("meta"))
    assert found.support[0].inputs.device.type == found.query.inputs.device.type == "meta"


def test_spectral_normalisation_goes_in_place_in_train_mode() -> None:
    model = nn.Sequential(spectral_norm(nn.Linear(1, 4)), nn.Tanh(), nn.Linear(4, 1)).double()
    assert learner_of(model=model).execution.name == "in_place"
    assert learner_of(model=model).backward(TASKS).dropped_tasks == 0
    assert learner_of(model=model.eval()).execution.name == "vectorized"


def test_settings_that_were_changed_are_looked_at_again() -> None:
    learner = learner_of()
    with pytest.raises(mn.SettingsError, match=r"prox must be a finite number of at least 0, got -5\.0"):
        learner.prox = -5.0
    learner.solver = "adam"
    with pytest.raises(mn.SettingsError, match="solver must be an object such as"):
        learner.evaluate(TASKS)
    assert all(leaf.grad is None for leaf in learner.model.parameters())


@pytest.mark.parametrize("wrong", [{"seed": -1}, {"first": -1}, {"seed": 1.5}], ids=str)
def test_families_refuse_what_is_no_seed(wrong: dict[str, Any]) -> None:
    with pytest.raises(mn.SettingsError, match="must be a whole number of at least 0"):
        mn.tasks.sinusoid(2, **wrong)


# Stacks.


def test_a_stack_is_cut_and_cast() -> None:
    labels = torch.arange(6).reshape(3, 2)
    stack = mn.Tasks(mn.Batch({"x": torch.ones(3, 2, 1)}, labels), mn.Batch({"x": torch.zeros(3, 2, 1)}, labels))
    assert stack.take(2).query.inputs["x"].shape == (2, 2, 1)
    assert torch.equal(stack.unstack()[2].support.targets, labels[2])
    assert len(stack.unstack()) == 3
    cast = stack.to(torch.float64)
    assert cast.support.inputs["x"].dtype == torch.float64
    assert cast.support.targets.dtype == torch.int64
    with pytest.raises(mn.TasksError, match=r"found Batch in it; mn\.Tasks is a pair.*stack\.take\(n\)"):
        learner_of().backward(list(TASKS))


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        (mn.Batch(torch.ones(2, 3, 1), None), r"found None; .* empty tuple: mn\.Batch\(inputs, \(\)\)"),
        (
            mn.Batch({"x": torch.ones(2, 3, 1), "k": 1.5}, ()),
            r"float: 1\.5; make it a tensor: torch\.tensor\(1\.5\)",
        ),
    ],
    ids=["None", "float"],
)
def test_what_is_no_tensor_is_told_what_to_become(batch: mn.Batch, words: str) -> None:
    with pytest.raises(mn.TasksError, match=words):
        learner_of().backward(mn.Tasks(batch, batch))


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_losses_of_tasks_come_in_the_order_given_and_nan_where_one_is_left_out(execution: str) -> None:
    sizes = [5, 3, 5, 3]
    given = [mn.tasks.sinusoid(1, shots=n, first=i, dtype=torch.float64).unstack()[0] for i, n in enumerate(sizes)]
    wanted = [learner_of(execution=execution).backward([task]).query_loss for task in given]
    assert learner_of(execution=execution).backward(given).query_losses == pytest.approx(wanted, rel=1e-12)
    given[1] = given[1]._replace(support=given[1].support._replace(targets=given[1].support.targets * torch.inf))
    with pytest.warns(mn.NonFiniteWarning):
        step = learner_of(execution=execution).backward(given)
    assert step.query_losses == pytest.approx([wanted[0], float("nan"), *wanted[2:]], rel=1e-12, nan_ok=True)


def test_accuracy_is_averaged_in_full_precision() -> None:
    logits = torch.zeros(1000, 2, dtype=torch.bfloat16)
    logits[:977, 1] = 1
    found = mn.metrics.accuracy(nn.Identity(), mn.Batch(logits, torch.ones(1000, dtype=torch.int64)))
    assert float(found) == pytest.approx(0.977, abs=1e-6)


# Parts of one's own.


class Averaged:
    """FOMAML that forgets the shared parameters."""

    rule = cost = memory = bias = ""
    needs: frozenset[Any] = frozenset()

    def __init__(self, found: Callable[[Any, Any], Any]) -> None:
        self.found = found

    def __call__(self, problem: Any, solver: Any) -> Any:
        free = mn.extend.solve_free(problem, solver)
        return self.found(problem, free)


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize(
    ("found", "words"),
    [
        (lambda problem, free: free.estimate(problem, free.slope), r"of problem\.losses\.shared.*free\.direct"),
        (lambda problem, free: free.slope, r"Averaged must return a mn\.Estimate, got dict"),
        (lambda problem, free: free.estimate(problem, free.query_gradient | {"x": torch.ones(())}), "differs in x"),
    ],
    ids=["shared", "dict", "extra"],
)
def test_an_estimator_of_ones_own_that_leaves_something_out(found: Any, words: str, execution: str) -> None:
    learner = learner_of(estimator=Averaged(found), adapt_only="2", execution=execution)
    with pytest.raises(mn.SettingsError, match=words):
        learner.backward(TASKS)
    assert all(leaf.grad is None for leaf in learner.model.parameters())


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_an_estimator_of_ones_own_out_of_what_extend_names(execution: str) -> None:
    own = Averaged(lambda problem, free: free.estimate(problem, free.query_gradient))
    learner = learner_of(estimator=own, adapt_only="2", execution=execution)
    same = learner_of(estimator=mn.FOMAML(), adapt_only="2", execution=execution)
    learner.backward(TASKS)
    same.backward(TASKS)
    assert torch.equal(flat_gradient(learner.model), flat_gradient(same.model))


def test_a_torch_optimizer_under_maml_is_refused_for_the_reason_that_counts() -> None:
    solver = mn.TorchOptimizer(lambda p: torch.optim.SGD(p, lr=0.1), steps=2)
    for estimator in (mn.MAML(), mn.HFMAML()):
        with pytest.raises(mn.SettingsError, match=r"differentiates through the solver's steps"):
            learner_of(estimator=estimator, solver=solver)


@pytest.fixture
def code_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], dict[str, Any]]:
    """What the first program of a page defines."""

    def read(page: str) -> dict[str, Any]:
        text = (Path(__file__).parents[1] / page).read_text()
        monkeypatch.setitem(sys.modules, "page", types.ModuleType("page"))  # where dataclasses look
        defined: dict[str, Any] = {"__name__": "page"}
        exec(re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0], defined)
        return defined

    return read


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_the_estimator_of_the_guide_is_what_it_says(execution: str, code_of: Any) -> None:
    learner = learner_of(estimator=code_of("CONTRIBUTING.md")["HalfWay"](), adapt_only="2", execution=execution)
    fomaml = learner_of(estimator=mn.FOMAML(), adapt_only="2", execution=execution)
    learner.backward(TASKS)
    fomaml.backward(TASKS)
    model = network()
    losses = [mn.metrics.squared_error(model, task.query) for task in TASKS.unstack()]
    start = torch.cat([g.flatten() for g in torch.autograd.grad(sum(losses) / 3, list(model.parameters()))])
    assert distance(flat_gradient(learner.model), (start + flat_gradient(fomaml.model)) / 2) < 1e-12


def test_the_episodes_of_the_settings_page_are_disjoint(code_of: Any) -> None:
    tasks = code_of("docs/settings.md")["tasks"]
    seen = {split: {tuple(row) for i in range(20) for row in tasks(split)[i].query.inputs.tolist()} for split in SPLITS}
    assert all(seen.values())
    assert not seen["train"] & seen["validation"]
    assert not seen["train"] & seen["test"]
