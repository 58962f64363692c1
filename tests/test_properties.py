"""What holds for all inputs: hypothesis looks for the exception."""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

import metanudge as mn
from metanudge import tree
from metanudge.packing import Packing
from problems import PROBLEMS, distance, estimate, flat_gradient, single_tasks

CHEAP = settings(max_examples=40, deadline=None)
COSTLY = settings(max_examples=8, deadline=None)

shapes = st.lists(st.lists(st.integers(1, 3), max_size=3).map(tuple), min_size=1, max_size=4)
numbers = st.floats(-3, 3, allow_nan=False)


def random_tree(shape_list: list[tuple[int, ...]], seed: int, *lanes: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {
        f"p{i}": torch.randn((*lanes, *shape), generator=g, dtype=torch.float64) for i, shape in enumerate(shape_list)
    }


def close(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-12, atol=1e-12)


# Tree algebra: a vector space, lane by lane.


@CHEAP
@given(shapes, numbers, numbers)
def test_trees_are_a_vector_space(shape_list: list, a: float, b: float) -> None:
    x, y, z = (random_tree(shape_list, seed) for seed in range(3))
    close(tree.add(x, y), tree.add(y, x))
    close(tree.add(x, tree.add(y, z)), tree.add(tree.add(x, y), z))
    close(tree.subtract(tree.add(x, y), y), x)
    close(tree.scale(a, tree.add(x, y)), tree.add(tree.scale(a, x), tree.scale(a, y)))
    close(tree.axpy(a, x, y), {name: a * x[name] + y[name] for name in x})
    close(tree.axpy(a, x, tree.scale(b, x)), tree.scale(a + b, x))
    close(tree.zeros(x), tree.scale(0.0, x))


@CHEAP
@given(shapes, st.integers(1, 3), st.integers(1, 3))
def test_lane_coefficients_act_lane_by_lane(shape_list: list, tasks: int, nodes: int) -> None:
    """[T, N] against [T, N, *shape]: the same as a loop over the lanes."""
    x, y = (random_tree(shape_list, seed, tasks, nodes) for seed in range(2))
    coefficient = random_tree([()], 5, tasks, nodes)["p0"]
    scaled, summed = tree.scale(coefficient, x), tree.axpy(coefficient, x, y)
    chosen = tree.select(coefficient > 0, x, y)
    for t in range(tasks):
        for n in range(nodes):
            c = float(coefficient[t, n])
            for name in x:
                torch.testing.assert_close(scaled[name][t, n], c * x[name][t, n])
                torch.testing.assert_close(summed[name][t, n], c * x[name][t, n] + y[name][t, n])
                assert torch.equal(chosen[name][t, n], (x if c > 0 else y)[name][t, n])


def test_clones_and_detached_copies() -> None:
    x = {"p": torch.ones(2, requires_grad=True)}
    assert not tree.detach(x)["p"].requires_grad
    copy = tree.clone(tree.detach(x))
    copy["p"] += 1
    assert torch.equal(x["p"], torch.ones(2))


# Packing.


@CHEAP
@given(shapes, st.lists(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]), min_size=4, max_size=4))
def test_packing_round_trip(shape_list: list, dtypes: list) -> None:
    """Values, shapes, dtypes; two kinds, several dtypes."""
    named = random_tree(shape_list, 3)
    typed = {name: tensor.to(dtype) for (name, tensor), dtype in zip(named.items(), dtypes, strict=False)}
    other = {"w": torch.arange(3.0, dtype=torch.float64)}
    packing = Packing.of(adapted=typed, shared=other)
    for kind, original in (("adapted", typed), ("shared", other)):
        packed = packing.pack(kind, original)
        assert all(leaf.shape[:2] == (1, 1) and leaf.ndim == 3 for leaf in packed.values())
        found = packing.unpack({key: leaf.reshape(-1) for key, leaf in packed.items()})
        assert found.keys() == original.keys()
        for name, tensor in original.items():
            assert found[name].dtype == tensor.dtype
            assert torch.equal(found[name], tensor)


def test_packing_copies() -> None:
    named = {"p": torch.ones(3)}
    packed = Packing.of(adapted=named).pack("adapted", named)
    next(iter(packed.values())).zero_()
    assert torch.equal(named["p"], torch.ones(3))


# Stencils.

node_lists = st.lists(st.integers(-6, 6), min_size=2, max_size=5, unique=True)


def weights_of(nodes: list[float]) -> list[float]:
    """Solve the Vandermonde system: sum w n^j = [j = 1], j = 0 ... len - 1. Exact to that many powers."""
    powers = torch.tensor([[float(n) ** j for n in nodes] for j in range(len(nodes))], dtype=torch.float64)
    right = torch.zeros(len(nodes), dtype=torch.float64)
    right[1] = 1
    return torch.linalg.solve(powers, right).tolist()


@CHEAP
@given(node_lists)
def test_vandermonde_stencils_are_accepted_and_differentiate_polynomials(nodes: list[int]) -> None:
    weights, order = weights_of(nodes), len(nodes) - 1
    stencil = mn.Stencil(tuple(nodes), tuple(weights), order)
    for degree in range(order + 1):  # exact on polynomials of degree up to the order
        value = sum(w * (0.5 * n) ** degree for n, w in zip(stencil.nodes, stencil.weights, strict=True)) / 0.5
        assert value == pytest.approx(float(degree == 1), abs=1e-8)


@CHEAP
@given(node_lists, st.integers(0, 4), st.sampled_from([1e-3, -1e-3, 0.5]))
def test_perturbed_stencils_are_refused(nodes: list[int], which: int, by: float) -> None:
    weights = weights_of(nodes)
    weights[which % len(weights)] += by  # the sum of the weights is no longer zero
    with pytest.raises(mn.SettingsError, match="do not make a stencil of order"):
        mn.Stencil(tuple(nodes), tuple(weights), len(nodes) - 1)


@CHEAP
@given(node_lists)
def test_an_order_too_high_is_refused(nodes: list[int]) -> None:
    """len + 1 powers can be right by symmetry, but len + 2 cannot."""
    weights = weights_of(nodes)
    with pytest.raises(mn.SettingsError, match="do not make a stencil of order"):
        mn.Stencil(tuple(nodes), tuple(weights), len(nodes) + 2)


@pytest.mark.parametrize(
    ("nodes", "weights", "order"),
    [
        ((1,), (1,), 1),
        ((1, 1), (0.5, 0.5), 1),
        ((-1, 1), (-0.5, 0.5, 0.0), 1),
        ((-1, 1), (-0.5, 0.5), 0),
        ((-1, 1), (math.nan, math.nan), 1),
        ((-1, 1), (-0.5, math.nan), 1),
        ((-1, math.nan), (-0.5, 0.5), 1),
        ((-1, math.inf), (-0.5, 0.5), 1),
        ((-1, 1), (-math.inf, math.inf), 1),
        ((-1, 1), (-0.5, 0.5), 1.5),
    ],
    ids=str,
)
def test_what_is_no_stencil_is_refused(nodes: tuple, weights: tuple, order: float) -> None:
    with pytest.raises(mn.SettingsError):
        mn.Stencil(nodes, weights, order)


def test_stencils_made_of_lists_are_hashable() -> None:
    assert mn.Stencil([-1, 1], [-0.5, 0.5], 2) == mn.STENCILS["symmetric"]
    assert hash(mn.FOBMAML(mn.Stencil([-1, 1], [-0.5, 0.5], 2))) is not None


# Meta-gradients.

LINEAR_IN_THE_QUERY_LOSS = {
    "symmetric": mn.FOBMAML(nudge="full"),
    "forward": mn.FOBMAML("forward", nudge="full"),
    "linear": mn.FOBMAML(),
    "maml": mn.MAML(),
    "fomaml": mn.FOMAML(),
    "imaml": mn.IMAML(),
    "hfmaml": mn.HFMAML(),
    "tangent": mn.Tangent(),
}


@cache
def unscaled(name: str) -> Tensor:
    return estimate(PROBLEMS["logistic"](), LINEAR_IN_THE_QUERY_LOSS[name], mn.Nesterov(45))


@pytest.mark.parametrize("name", LINEAR_IN_THE_QUERY_LOSS)
@COSTLY
@given(st.floats(1e-3, 1e3), st.sampled_from([-1.0, 1.0]))
def test_meta_gradients_are_linear_in_the_query_loss(name: str, size: float, sign: float) -> None:
    """c f has c times the meta-gradient of f; converged, so that the truncation of the full nudge is out of the way."""
    made, factor = PROBLEMS["logistic"](), sign * size
    estimator = LINEAR_IN_THE_QUERY_LOSS[name]
    scaled = estimate(made, estimator, mn.Nesterov(45), query_loss=lambda m, b: factor * made.loss(m, b))
    assert distance(scaled / factor, unscaled(name)) < 2e-5


@COSTLY
@given(st.floats(0.01, 100), st.sampled_from([-1.0, 1.0]))
def test_reptile_does_not_know_the_query_loss(size: float, sign: float) -> None:
    made, solver = PROBLEMS["logistic"](), mn.GradientDescent(5, lr=0.1)
    scaled = estimate(made, mn.Reptile(), solver, query_loss=lambda m, b: sign * size * made.loss(m, b))
    assert torch.equal(scaled, estimate(made, mn.Reptile(), solver))


@pytest.mark.parametrize("name", [*LINEAR_IN_THE_QUERY_LOSS, "reptile"])
@COSTLY
@given(st.permutations(range(3)))
def test_the_order_of_tasks_does_not_matter(name: str, order: list[int]) -> None:
    made = PROBLEMS["ridge"]()
    estimator = LINEAR_IN_THE_QUERY_LOSS.get(name, mn.Reptile())
    if isinstance(estimator, mn.FOBMAML | mn.HFMAML):  # wide differences: see test_executions.py
        wide = {"nu": 0.1} if isinstance(estimator, mn.FOBMAML) else {"displacement": 0.1}
        estimator = type(estimator)(**{**estimator.__dict__, **wide})
    permuted = mn.Tasks(*(mn.Batch(*(x[list(order)] for x in batch)) for batch in made.tasks))
    found = []
    for tasks in (made.tasks, permuted):
        model = made.make()
        learner = mn.MetaLearner(
            model, made.loss, prox=made.prox, solver=mn.GradientDescent(5, lr=0.1), estimator=estimator
        )
        learner.backward(tasks)
        found.append(flat_gradient(model))
    assert distance(*found) < 1e-12


@COSTLY
@given(st.lists(st.integers(0, 2), min_size=1, max_size=6))
def test_a_step_is_the_mean_over_its_tasks(which: list[int]) -> None:
    """However often each comes."""
    made = PROBLEMS["logistic"]()
    singles, solver = single_tasks(made.tasks), mn.GradientDescent(4, lr=0.1)

    def of(tasks: list[mn.Tasks]) -> Tensor:
        model = made.make()
        mn.MetaLearner(model, made.loss, solver=solver, estimator=mn.MAML()).backward(tasks)
        return flat_gradient(model)

    each = [of([task]) for task in singles]
    assert distance(of([singles[i] for i in which]), torch.stack([each[i] for i in which]).mean(0)) < 1e-12


@pytest.mark.filterwarnings("ignore::metanudge.errors.NonFiniteWarning")  # the largest steps diverge for single tasks
@CHEAP
@given(st.integers(1, 12), st.floats(1e-3, 0.6), st.floats(1e-3, 1e3), st.floats(0.0, 0.95))
def test_the_relative_residual_is_a_fraction(steps: int, lr: float, prox: float, momentum: float) -> None:
    """||p + q|| / (||p|| + ||q||): within [0, 1], whatever the solver did; theta itself has residual 1."""
    made = PROBLEMS["ridge"]()
    model = made.make()
    solver = mn.GradientDescent(steps, lr=lr / (1 + prox), momentum=momentum)
    learner = mn.MetaLearner(model, made.loss, prox=prox, solver=solver, estimator=mn.FOMAML())
    try:
        residual = learner.backward(made.tasks).residual
    except mn.NonFiniteError:  # all of them diverged
        assume(False)
    assert 0 <= residual <= 1 + 1e-12


@COSTLY
@given(st.floats(0.05, 20.0))
def test_two_solvers_agree_on_the_answer_at_any_prox(prox: float) -> None:
    """Whatever the proximal weight, solved is solved."""
    made = PROBLEMS["ridge"]()
    exact = [
        torch.linalg.solve(
            torch.autograd.functional.hessian(task.support, made.theta) + prox * torch.eye(4, dtype=torch.float64),
            prox * made.theta - torch.autograd.functional.jacobian(task.support, torch.zeros_like(made.theta)),
        )
        for task in made.plain
    ]
    learner = mn.MetaLearner(made.make(), made.loss, prox=prox, solver=mn.Nesterov(400, tol=1e-13))
    for task, phi in zip(single_tasks(made.tasks), exact, strict=True):
        found = torch.nn.utils.parameters_to_vector(learner.adapt(task.support).parameters()).detach()
        assume(phi.norm() > 1e-3)
        assert distance(found, phi) < 1e-9
