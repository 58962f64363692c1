"""Small parameters of the live module as one leaf: the layout, and that only the number of operations changes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import metanudge as mn
from metanudge import bundles
from metanudge.accumulation import FiniteMean
from metanudge.bundles import Bundles
from metanudge.estimators.base import Estimator
from problems import (
    DTYPE,
    ESTIMATORS,
    PROBLEMS,
    SOLVERS,
    coarse,
    distance,
    estimate,
    flat_gradient,
    normal,
    refused_in_place,
    squared_error,
)

SIZES = st.lists(st.sampled_from([(), (0,), (3,), (2, 5), (65, 64), (200, 100)]), min_size=1, max_size=12)


@settings(deadline=None)  # timing is never asserted
@given(shapes=SIZES, narrow=st.sets(st.integers(0, 11)), turned=st.sets(st.integers(0, 11)))
def test_every_parameter_is_in_one_leaf(shapes: list[tuple[int, ...]], narrow: set[int], turned: set[int]) -> None:
    named = {}
    for place, shape in enumerate(shapes):
        values = torch.randn(shape, dtype=torch.bfloat16 if place in narrow else torch.float32)
        named[f"layer.{place}"] = nn.Parameter(values.mT if place in turned and len(shape) == 2 else values)
    laid = Bundles.of(named)
    assert sorted(name for key in laid for name in laid.names(key)) == sorted(named)
    assert len(laid) == len({*laid})
    for key in laid:
        held = [named[name] for name in laid.names(key)]
        assert laid.alone(key) is (len(held) == 1)
        if laid.alone(key):
            assert [key] == list(laid.names(key))
            assert laid[key].data_ptr() == held[0].data_ptr()
            continue
        assert key not in named
        assert len({parameter.dtype for parameter in held}) == 1
        assert laid[key].shape == (sum(parameter.numel() for parameter in held),)
        assert laid[key].numel() <= bundles.FULL["cpu"]
        assert all(parameter.is_contiguous() and 0 < parameter.numel() <= 2**12 for parameter in held)
    found = laid.by_name(dict(laid))
    assert {name: tensor.shape for name, tensor in found.items()} == {name: p.shape for name, p in named.items()}
    assert all(torch.equal(found[name], parameter) for name, parameter in named.items())
    again = laid.joined(found)
    assert all(torch.equal(again[key], laid[key]) for key in laid)


def test_a_bundle_is_filled_in_order() -> None:
    laid = Bundles.of({str(place): nn.Parameter(torch.full((2**12,), float(place))) for place in range(20)})
    assert [len(laid.names(key)) for key in laid] == [8, 8, 4]
    assert [name for key in laid for name in laid.names(key)] == [str(place) for place in range(20)]


def test_parameters_are_known_to_hold_what_was_written_to_them() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(200, 100))
    laid = Bundles.of(dict(model.named_parameters()))
    values = laid.copied(lambda kind: kind)
    other = {key: leaf + 1 for key, leaf in values.items()}
    assert laid.holds(values)
    assert not laid.holds(other)
    assert not laid.holds({key: leaf.clone() for key, leaf in values.items()})  # equal, which nobody knows
    laid.load(other)
    assert laid.holds(other)
    assert laid.holds(dict(other))
    assert not laid.holds(values)
    key, *_ = other
    assert not laid.holds({key: other[key]})
    other[key].add_(1)
    assert not laid.holds(other)


@pytest.mark.parametrize("fused", [False, True])
def test_an_optimizer_step_is_no_longer_what_was_written(fused: bool) -> None:
    """Not even by fused optimizers, whose writing autograd does not count."""
    model = nn.Linear(3, 2)
    laid = Bundles.of(dict(model.named_parameters()))
    values = laid.copied(lambda kind: kind)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, fused=fused)
    laid.give({key: leaf.clone() for key, leaf in values.items()})
    optimizer.step()
    assert not laid.holds(values)
    copies = laid.copied(lambda kind: kind)
    assert laid.holds(copies)
    assert all(not copy.any() for copy in copies.values())
    with torch.no_grad():
        model.weight.add_(1)
    assert not laid.holds(copies)


def test_what_the_module_holds_is_not_written_to_it_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the lean form, the initialisation for two nudged solves, what the free one ended in for its query loss, as the
    support loss may have written there, and the initialisation at the end; not for the support loss itself.
    """
    written, load = [], Bundles.load

    def counted(self: Bundles, leaves: dict[str, Tensor]) -> None:
        written.append(leaves)
        load(self, leaves)

    monkeypatch.setattr(Bundles, "load", counted)
    lean = mn.FOBMAML(nudge="full", start="initialization", nu=0.1, certify=False)
    in_place(lean, mn.TorchOptimizer(lambda parameters: torch.optim.SGD(parameters, lr=0.1), steps=3))
    tasks = mixed_tasks().support.inputs.shape[0]
    assert len(written) == 4 * tasks


def test_what_is_read_is_where_the_module_stands() -> None:
    model = nn.Linear(3, 2)
    laid = Bundles.of(dict(model.named_parameters()))
    (key,) = laid
    before = laid.copied(lambda kind: kind)
    laid.load({key: torch.arange(8.0)})
    assert torch.equal(model.weight, torch.arange(6.0).view(2, 3))
    assert torch.equal(laid[key], torch.arange(8.0))
    laid.give({key: torch.ones(8)})
    assert torch.equal(model.bias.grad, torch.ones(2))
    assert not torch.equal(before[key], laid[key])
    assert not laid[key].requires_grad


# The same numbers.


def apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on every parameter is a leaf of its own, as a large one is."""
    monkeypatch.setattr(bundles, "SMALL", {})


def both(monkeypatch: pytest.MonkeyPatch, find: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
    bundled = find()
    apart(monkeypatch)
    return bundled, find()


class Mixed(nn.Module):
    """Parameters of all kinds: tied, frozen, unused, turned, in another precision."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.inner, self.outer, self.frozen = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.tied = nn.Linear(4, 4)
        self.tied.weight = self.inner.weight
        self.unused = nn.Parameter(torch.ones(3))
        self.turned = nn.Parameter(torch.randn(4, 4).mT)
        self.double()
        self.scale = nn.Parameter(torch.ones(4))
        self.frozen.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.frozen(self.tied(torch.tanh(self.inner(x)))))
        return self.outer(hidden @ self.turned) * self.scale


def mixed_tasks(number: int = 2) -> mn.Tasks:
    g = torch.Generator().manual_seed(2)
    return mn.Tasks(*(mn.Batch(normal(g, number, 6, 4), normal(g, number, 6, 4)) for _ in range(2)))


def in_place(estimator: Estimator, solver: object, make: Callable[[], nn.Module] = Mixed, **settings: object) -> Tensor:
    model = make()
    torch.manual_seed(3)
    learner = mn.MetaLearner(
        model, squared_error, prox=2.0, solver=solver, estimator=estimator, execution="in_place", **settings
    )
    before = {name: value.clone() for name, value in model.state_dict().items()}
    learner.backward(mixed_tasks())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    return flat_gradient(model)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", [name for name, one in ESTIMATORS.items() if not refused_in_place(one)])
def test_estimates_are_those_of_single_parameters(name: str, solver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    estimator = coarse(ESTIMATORS[name])
    if isinstance(estimator, mn.HFMAML) and solver == "torch_optimizer":
        pytest.skip("its steps cannot be followed")

    def find() -> Tensor:
        return estimate(PROBLEMS["mlp"](), estimator, SOLVERS[solver], execution="in_place")

    bundled, single = both(monkeypatch, find)
    assert distance(bundled, single) < 1e-12


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.5),
    "foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("nudge", ["full", "linear"])
def test_torch_optimizers_of_all_kinds_of_parameters(
    optimizer: str, nudge: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some look at the shape of a gradient, or want its layout to be that of the parameter."""
    solver = mn.TorchOptimizer(OPTIMIZERS[optimizer], 3)
    bundled, single = both(monkeypatch, lambda: in_place(mn.FOBMAML(nudge=nudge, nu=0.1), solver))
    torch.testing.assert_close(bundled, single, rtol=1e-6, atol=1e-7)  # one parameter is in float32


@pytest.mark.parametrize("optimizer", ["adafactor", "sgd"])
def test_the_tangent_problem_has_parameters_of_the_same_shapes(optimizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    solver = mn.TorchOptimizer(OPTIMIZERS[optimizer], 3)
    tangent = mn.Tangent(products="two_gradient", displacement=0.1)
    bundled, single = both(monkeypatch, lambda: in_place(tangent, solver))
    torch.testing.assert_close(bundled, single, rtol=1e-6, atol=1e-7)


class Alternating(nn.Module):
    """Large and small parameters by turns."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.second, self.third = nn.Linear(4, 100), nn.Linear(100, 100), nn.Linear(100, 4)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.third(torch.tanh(self.second(torch.tanh(self.first(x)))))


def test_a_factory_gets_the_parameters_in_the_order_of_the_model() -> None:
    """By which it may tell them apart, in every problem that is solved."""
    given: list[list[torch.Size]] = []

    def factory(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        given.append([parameter.shape for parameter in parameters])
        return torch.optim.SGD(parameters, lr=0.01)

    in_place(mn.Tangent(products="two_gradient"), mn.TorchOptimizer(factory, 2), Alternating)
    assert len(given) == 2 * 2
    assert all(shapes == [parameter.shape for parameter in Alternating().parameters()] for shapes in given)


@pytest.mark.parametrize("solver", [mn.Nesterov(6), mn.Nesterov(4, power_iterations=2)], ids=str)
def test_step_sizes_do_not_depend_on_what_is_bundled(solver: object) -> None:
    """The direction that they are measured along is the same numbers of the same parameters."""
    live = in_place(mn.FOMAML(), solver, Alternating)
    model = Alternating()
    torch.manual_seed(3)
    learner = mn.MetaLearner(model, squared_error, prox=2.0, solver=solver, estimator=mn.FOMAML())
    learner.backward(mixed_tasks())
    assert distance(live, flat_gradient(model)) < 1e-12


@pytest.mark.parametrize("execution", ["in_place", "vectorized"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_gradient_that_is_left_has_memory_of_its_own(dtype: torch.dtype, execution: str) -> None:
    """So that one may be kept, saved or written to without the others."""
    model = Alternating().to(dtype)
    tasks = mn.Tasks(*(mn.Batch(*(leaf.to(dtype) for leaf in batch)) for batch in mixed_tasks()))
    learner = mn.MetaLearner(model, squared_error, solver=mn.GradientDescent(2, lr=0.1), execution=execution)
    learner.backward(tasks)
    gradients = [parameter.grad for parameter in model.parameters()]
    assert all(gradient.untyped_storage().nbytes() == gradient.nbytes for gradient in gradients)
    assert not any(gradient._is_view() for gradient in gradients)


def test_sums_over_ranks_are_of_parameters() -> None:
    """In one order. How a rank's parameters lie in memory decides what it bundles, and another's may lie otherwise."""
    summed: list[torch.Size] = []

    class Pair:
        size = 2

        def sum(self, tensors: list[Tensor]) -> None:
            summed.extend(tensor.shape for tensor in tensors)
            for tensor in tensors:
                tensor.mul_(2)  # as if the other had found the same

    orders = []
    for turned in (False, True):
        model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 4, bias=False), nn.Linear(4, 1))
        if turned:
            model[1].weight = nn.Parameter(torch.randn(2, 4).mT)
        laid = Bundles.of(dict(model.named_parameters()))
        assert len(laid) == 1 + turned
        mean = FiniteMean()
        mean._gradient, mean._kept = laid.copied(lambda kind: kind), torch.ones(())
        mean.over(Pair(), 2, laid.by_name)
        orders.append(summed[2:])
        summed.clear()
        found = {name: part for one in mean.spend() for name, part in laid.by_name(one).items()}
        assert all(torch.equal(found[name], parameter) for name, parameter in model.named_parameters())
    assert orders[0] == orders[1]
    assert sorted(orders[0]) == sorted(parameter.shape for parameter in model.parameters())


@pytest.mark.parametrize("settings", [{"microbatch": 4}, {"adapt_only": ["inner", "scale"]}], ids=["pieces", "shared"])
@pytest.mark.parametrize("estimator", [mn.FOBMAML(nudge="full", nu=0.1), mn.FOBMAML(nu=0.1)], ids=["full", "linear"])
def test_pieces_and_shared_parameters(
    estimator: Estimator, settings: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    solver = mn.GradientDescent(3, lr=0.1)
    bundled, single = both(monkeypatch, lambda: in_place(estimator, solver, **settings))
    torch.testing.assert_close(bundled, single, rtol=1e-6, atol=1e-7)


def test_a_warm_start_goes_on_where_parameters_were_not_bundled(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it holds is in the order of the parameters."""
    found = []
    for first in (False, True):
        with monkeypatch.context() as patched:
            if first:
                apart(patched)
            model, warm = Mixed(), mn.WarmStart()
            learner = mn.MetaLearner(
                model, squared_error, solver=mn.GradientDescent(3, lr=0.1), warm_start=warm, execution="in_place"
            )
            learner.backward(mixed_tasks(), indices=[0, 1])
        model.zero_grad()
        learner.backward(mixed_tasks(), indices=[0, 1])
        found.append(flat_gradient(model))
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("solver", ["gradient_descent", "torch_optimizer"])
@pytest.mark.parametrize("small", [True, False])
def test_sparse_gradients(small: bool, solver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What pulls φ to θ reaches every row, so they are made dense."""
    if not small:
        apart(monkeypatch)
    data = torch.randint(6, (2, 5), generator=torch.Generator().manual_seed(1))
    tasks = mn.Tasks(*(mn.Batch(data, torch.ones(2, 5, 2).double()) for _ in range(2)))
    found = []
    for sparse in (True, False):
        torch.manual_seed(2)
        model = nn.Sequential(nn.Embedding(6, 3, sparse=sparse), nn.Linear(3, 2)).double()
        learner = mn.MetaLearner(model, squared_error, solver=SOLVERS[solver], execution="in_place")
        learner.backward(tasks)
        found.append(flat_gradient(model))
    assert distance(*found) < 1e-12


# Fewer operations.


class Operations(TorchDispatchMode):
    """Counts what is computed; views are not."""

    def __init__(self) -> None:
        super().__init__()
        self.number: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not function.is_view and "detach" not in str(function):
            self.number[str(function)] += 1
        return function(*args, **(kwargs or {}))


def extra_operations(estimator: Estimator) -> float:
    """Of an estimate, a gradient and parameter, beyond those of an ordinary loop without an optimizer."""
    model = nn.Sequential(*(layer for _ in range(40) for layer in (nn.Linear(6, 6), nn.Tanh()))).to(DTYPE)
    g = torch.Generator().manual_seed(2)
    tasks = mn.Tasks(*(mn.Batch(normal(g, 1, 6, 6), normal(g, 1, 6, 6)) for _ in range(2)))
    solver = mn.TorchOptimizer(lambda p: torch.optim.SGD(p, lr=0.1, foreach=True), 5)
    learner = mn.MetaLearner(model, squared_error, solver=solver, estimator=estimator, execution="in_place")
    with Operations() as counted:
        gradients = learner.backward(tasks).gradient_evaluations
    model.zero_grad()
    with Operations() as ordinary:
        squared_error(model, mn.Batch(*(leaf[0] for leaf in tasks.support))).backward()
    extra = counted.number.total() - gradients * ordinary.number.total()
    return extra / gradients / len(list(model.parameters()))


@pytest.mark.parametrize("estimator", [mn.FOBMAML(), mn.FOMAML(), mn.FOBMAML(nudge="full", start="initialization")])
def test_operations_a_gradient(estimator: Estimator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer than one a parameter, and that autograd's, where it adds the query's gradient to the support's: bundles are
    few, and the optimizer takes its parameters as a list."""
    assert extra_operations(estimator) < 0.7
    apart(monkeypatch)
    assert extra_operations(estimator) > 2.5


class Decays(nn.Module):
    """Writes to its weights by ``.data``, which autograd does not count, in every forward pass."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        self.layer.weight.data.mul_(0.9)
        return self.layer(x)


def test_solves_begin_where_they_should_though_a_forward_pass_writes_to_parameters() -> None:
    """The nudged solves are matched, so that their difference is no larger for a smaller nudge."""
    found = []
    torch.manual_seed(1)
    batch = mn.Batch(torch.randn(2, 5, 3), torch.randn(2, 5, 1))
    for nu in (1e-2, 1e-1):
        model = Decays()
        solver = mn.TorchOptimizer(lambda p: torch.optim.SGD(p, lr=0.1), 3)
        estimator = mn.FOBMAML(nudge="full", nu=nu)
        learner = mn.MetaLearner(model, squared_error, solver=solver, estimator=estimator, execution="in_place")
        learner.backward(mn.Tasks(batch, batch))
        found.append(flat_gradient(model))
    assert distance(*found) < 0.05
