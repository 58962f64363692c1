"""Leaves that come together, as on a GPU: which do, that formulas give the same numbers, and how few operations."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import metanudge as mn
from metanudge import bundles, together, tree
from metanudge.together import PARTS, Together, gathered, groups, operands, parted, product, same
from problems import ESTIMATORS, PROBLEMS, SOLVERS, coarse, distance, estimate, refused_in_place
from test_bundles import extra_operations, in_place
from test_large_models_memory import copies

LEAN = mn.FOBMAML(nudge="full", start="initialization", certify=False)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU is taken for a device on which leaves come together, and every parameter is a leaf of its own."""
    monkeypatch.setattr(together, "TOGETHER", {"cpu"})
    monkeypatch.setattr(bundles, "SMALL", {})


# Which leaves.

SIZES = st.lists(st.integers(0, 40), min_size=1, max_size=12)


def leaves(sizes: list[int], narrow: set[int] = frozenset(), attached: set[int] = frozenset()) -> dict[str, Tensor]:
    kinds = [torch.float32 if place in narrow else torch.float64 for place in range(len(sizes))]
    made = {str(place): torch.randn(size, dtype=kinds[place]) for place, size in enumerate(sizes)}
    return {name: leaf.requires_grad_(int(name) in attached) for name, leaf in made.items()}


@settings(deadline=None)  # timing is never asserted
@given(sizes=SIZES, narrow=st.sets(st.integers(0, 11)), attached=st.sets(st.integers(0, 11)))
def test_every_leaf_is_in_one_group_in_order(sizes: list[int], narrow: set[int], attached: set[int]) -> None:
    params = leaves(sizes, narrow, attached)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(together, "TOGETHER", {"cpu"})
        found = list(groups(params))
    assert [name for names in found for name in names] == list(params)
    for names in found:
        if len(names) > 1:
            assert len({params[name].dtype for name in names}) == 1
            assert not any(params[name].requires_grad for name in names)
            assert sum(params[name].numel() for name in names) <= sum(sizes) // PARTS


def test_few_groups_are_made_of_many_leaves(opened: None) -> None:
    assert [len(names) for names in groups(leaves([10] * 80))] == [20] * PARTS
    assert [len(names) for names in groups(leaves([10] * 80), 1)] == [80]


def test_on_a_cpu_leaves_are_alone() -> None:
    assert list(groups(leaves([3, 3]))) == [["0"], ["1"]]
    assert list(groups({})) == []


# The same numbers.

FORMULAS: dict[str, Callable[..., Tensor]] = {
    "add": lambda x, y: x + y,
    "subtract": lambda x, y: x - y,
    "spring": lambda x, y: (x - y).mul_(0.3),
    "multiply": lambda x, y: x * y,
    "scale": lambda x, _: 2.5 * x,
    "scale_by_a_tensor": lambda x, _: torch.tensor(0.7, dtype=torch.float64) * x,
    "negate_and_divide": lambda x, _: -x / 3.0,
    "axpy": lambda x, y: x.add(y, alpha=-0.4),
    "axpy_by_a_tensor": lambda x, y: x.addcmul(torch.tensor(0.7, dtype=torch.float64), y),
    "in_place": lambda x, y: (x * 1.0).add_(y, alpha=0.2).div_(3),
    "touched": lambda x, y: tree.touched(x, y, torch.tensor(0.5, dtype=torch.float64)),
    "narrow": lambda x, _: x.to(torch.float32),
}


@pytest.mark.parametrize("formula", FORMULAS)
def test_a_formula_gives_the_same_numbers_of_leaves_together(formula: str) -> None:
    one, other = leaves([3, 0, 5]), leaves([3, 0, 5])
    names = list(one)
    found = parted(names, FORMULAS[formula](gathered(one, names), gathered(other, names)))
    for name in names:
        expected = FORMULAS[formula](one[name], other[name])
        torch.testing.assert_close(found[name], expected, rtol=1e-14, atol=1e-15)


def test_lanes_have_a_coefficient_each() -> None:
    stacks = {name: torch.randn(3, 2, size, dtype=torch.float64) for name, size in (("a", 4), ("b", 5))}
    coefficient = torch.randn(3, 2, dtype=torch.float64)
    many = gathered(stacks, ["a", "b"])
    found = parted(["a", "b"], tree.over(coefficient, many) * many)
    for name, leaf in stacks.items():
        torch.testing.assert_close(found[name], coefficient.unsqueeze(-1) * leaf)


def test_inner_products_and_identity(opened: None) -> None:
    sizes = [1, 2] * (2 * PARTS)
    one, other = leaves(sizes), leaves(sizes)
    flat = [torch.cat(list(params.values())) for params in (one, other)]
    pairs = list(operands(one, other))
    assert any(isinstance(given[0], Together) for _, given in pairs)
    found = sum(product(*given, square=False) for _, given in pairs)
    torch.testing.assert_close(found, flat[0] @ flat[1])
    ((names, (a, b)),) = operands(one, one)
    assert names == list(one)
    assert a is b
    torch.testing.assert_close(product(a, b, square=True), flat[0] @ flat[0])
    assert same(gathered(one, names), gathered(dict(one), names))
    assert not same(gathered(one, names), gathered(tree.clone(one), names))


def test_what_is_spent_is_let_go(opened: None) -> None:
    one, other = leaves([10] * 8), leaves([10] * 8)
    expected = {name: leaf - other[name] for name, leaf in one.items()}
    found = tree.spend(lambda x, y: x - y, one, other)
    assert not one
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], leaf) for name, leaf in expected.items())


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", [name for name, one in ESTIMATORS.items() if not refused_in_place(one)])
def test_estimates_are_those_of_leaves_one_by_one(name: str, solver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    estimator = coarse(ESTIMATORS[name])
    if isinstance(estimator, mn.HFMAML) and solver == "torch_optimizer":
        pytest.skip("its steps cannot be followed")

    def find() -> Tensor:
        return estimate(PROBLEMS["mlp"](), estimator, SOLVERS[solver], execution="in_place")

    alone = find()
    monkeypatch.setattr(together, "TOGETHER", {"cpu"})
    monkeypatch.setattr(bundles, "SMALL", {})
    assert distance(find(), alone) < 1e-12


@pytest.mark.parametrize("settings", [{"microbatch": 4}, {"adapt_only": ["inner", "scale"]}, {}], ids=str)
@pytest.mark.parametrize("estimator", [mn.FOBMAML(nudge="full", nu=0.1), mn.FOBMAML(nu=0.1)], ids=["full", "linear"])
def test_parameters_of_all_kinds(estimator: mn.FOBMAML, settings: dict[str, object], monkeypatch) -> None:
    """Tied, frozen, unused, turned, in another precision; in pieces, and shared."""
    solver = mn.TorchOptimizer(lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.5), 3)
    alone = in_place(estimator, solver, **settings)
    monkeypatch.setattr(together, "TOGETHER", {"cpu"})
    monkeypatch.setattr(bundles, "SMALL", {})
    torch.testing.assert_close(in_place(estimator, solver, **settings), alone, rtol=1e-6, atol=1e-7)


# Few operations, and little memory for it.


@pytest.mark.parametrize("estimator", [mn.FOBMAML(), mn.FOMAML(), LEAN])
def test_operations_a_gradient(estimator: object, opened: None) -> None:
    """A few for every part, instead of some for every parameter; the lean form has autograd's sums of two losses."""
    assert extra_operations(estimator) < 1.5


@pytest.mark.parametrize(("estimator", "said"), [(LEAN, 3), (mn.FOBMAML(certify=False), 5), (mn.FOBMAML(), 13)])
def test_copies_are_those_of_the_page_and_the_parts_of_a_formula(estimator: object, said: int, opened: None) -> None:
    sgd = mn.TorchOptimizer(lambda p: torch.optim.SGD(p, lr=0.01), 3)
    assert copies(estimator, sgd, tasks=2) <= said + 3 / PARTS + 0.1


# A kernel that is not launched.


class Reused(torch.autograd.Function):
    """The same number, always in the same memory, as of a captured graph."""

    memory = torch.zeros((), dtype=torch.float64)

    @staticmethod
    def forward(ctx, loss):
        Reused.memory.copy_(loss.detach())
        return Reused.memory.detach()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


@pytest.mark.parametrize("estimator", [mn.FOBMAML(), LEAN, mn.FOMAML()])
def test_a_loss_may_use_its_memory_again(estimator: object) -> None:
    made = PROBLEMS["mlp"]()
    found = []
    for loss in (made.loss, lambda model, batch: Reused.apply(made.loss(model, batch))):
        torch.manual_seed(0)
        learner = mn.MetaLearner(made.make(), loss, prox=made.prox, estimator=estimator, execution="in_place")
        step = learner.backward(made.tasks)
        found.append((step.query_loss, step.support_loss, step.gradient_norm, step.residual))
    assert found[0] == pytest.approx(found[1], rel=1e-12)
