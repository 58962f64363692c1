"""Nothing depends on a unit: of the losses, of the parameters, of what is idle, of the leaves' precision.

Factors are powers of two, so that floating point numbers scale exactly.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

import metanudge as mn
from metanudge.energy import Energy
from metanudge.losses import InnerGradients
from metanudge.tasks import logistic, logistic_loss

TASKS = logistic(3, features=4, shots=12, queries=12)
EXECUTIONS = ["vectorized", "in_place"]
FACTORS = [2.0**-30, 2.0**30]


class Scaled(nn.Module):
    """A linear model whose parameters are ``unit`` times as large, with an idle one of any size, but for a ``leak``."""

    def __init__(self, unit: float = 1.0, idle: float | None = None, start: float = 0.7, leak: float = 0.0) -> None:
        super().__init__()
        self.unit, self.leak = unit, leak
        self.weight = nn.Parameter(unit * torch.linspace(-start, start, 4, dtype=torch.float64))
        if idle is not None:
            self.idle = nn.Parameter(torch.tensor(idle, dtype=torch.float64))

    def forward(self, inputs: Tensor) -> Tensor:
        outputs = (inputs @ (self.weight / self.unit)).unsqueeze(-1)
        return outputs + self.leak * self.idle if self.leak else outputs


def times(factor: float) -> object:
    return lambda model, batch: factor * logistic_loss(model, batch)


def step_on(
    model: nn.Module, prox: float, support: object = logistic_loss, query: object = None, **settings: object
) -> tuple[mn.MetaStep, Tensor]:
    settings = {"solver": mn.Nesterov(8)} | settings
    step = mn.MetaLearner(model, support, query_loss=query or support, prox=prox, **settings).backward(TASKS)
    return step, model.weight.grad


def same(step: mn.MetaStep, other: mn.MetaStep) -> None:
    assert other.residual == pytest.approx(step.residual, rel=1e-6)
    assert other.error_bound == pytest.approx(step.error_bound, rel=1e-6)
    assert (other.amplified_tasks, other.dropped_tasks) == (step.amplified_tasks, step.dropped_tasks) == (0, 0)


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("factor", FACTORS)
def test_the_unit_of_both_losses(factor: float, execution: str) -> None:
    step, gradient = step_on(Scaled(), 0.5, execution=execution)
    other, scaled = step_on(Scaled(), 0.5 * factor, times(factor), execution=execution)
    torch.testing.assert_close(scaled / factor, gradient, rtol=1e-9, atol=0)
    assert other.nu == pytest.approx(step.nu, rel=1e-9)
    same(step, other)


@pytest.mark.parametrize("factor", FACTORS)
def test_the_unit_of_the_query_loss(factor: float) -> None:
    step, gradient = step_on(Scaled(), 0.5)
    other, scaled = step_on(Scaled(), 0.5, query=times(factor))
    torch.testing.assert_close(scaled / factor, gradient, rtol=1e-9, atol=0)
    assert other.nu * factor == pytest.approx(step.nu, rel=1e-9)
    same(step, other)


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("unit", FACTORS)
def test_the_unit_of_the_parameters(unit: float, execution: str) -> None:
    """Curvatures and λ go with 1 / unit²; the probe of the step size has to follow."""
    step, gradient = step_on(Scaled(), 0.5, execution=execution)
    other, scaled = step_on(Scaled(unit), 0.5 / unit**2, execution=execution)
    torch.testing.assert_close(scaled * unit, gradient, rtol=1e-9, atol=0)
    assert other.nu == pytest.approx(step.nu, rel=1e-9)
    same(step, other)


DIFFERENCES = [
    mn.HFMAML(),
    mn.HFMAML(displacement=0.1),
    mn.IMAML(products="two_gradient", displacement=0.1),
    mn.Tangent(products="two_gradient", displacement=0.1),
]
"""Those that look along two-gradient products; at 0.1 the displacement is seen in what they find."""


def of(
    estimator: object, prox: float, execution: str, *, factor: float = 1.0, unit: float = 1.0
) -> tuple[float, Tensor]:
    """Residual and gradient, with losses ``factor`` and parameters ``unit`` times as large, in the units of 1."""
    model = Scaled(unit)
    step, gradient = step_on(model, prox * factor / unit**2, times(factor), estimator=estimator, execution=execution)
    return step.residual, gradient * unit / factor


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("estimator", DIFFERENCES, ids=str)
def test_products_of_two_gradients_have_no_unit(estimator: object, factor: float, execution: str) -> None:
    residual, gradient = of(estimator, 0.5, execution)
    for changed in ({"unit": factor}, {"factor": factor}):
        other, scaled = of(estimator, 0.5, execution, **changed)
        torch.testing.assert_close(scaled, gradient, rtol=1e-9, atol=0)
        assert other == pytest.approx(residual, rel=1e-9)


@pytest.mark.parametrize("prox", [0.5, 0.0])
def test_an_unrolled_walk_from_zero(prox: float) -> None:
    """Where the parameters are no scale the loss is one: the products of the first step are exact to 1e-6."""
    found = []
    for estimator in (mn.MAML(), mn.HFMAML()):
        for factor in (1.0, 2.0**30):
            model = Scaled(start=0.0)
            _, gradient = step_on(model, prox * factor, times(factor), estimator=estimator)
            found.append(gradient / factor)
    exact, same, walked, scaled = found
    torch.testing.assert_close(same, exact, rtol=1e-9, atol=0)
    torch.testing.assert_close(walked, exact, rtol=1e-6, atol=0)
    torch.testing.assert_close(scaled, walked, rtol=1e-9, atol=0)


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("factor", [2.0**-83, 2.0**-133])
@pytest.mark.parametrize("prox", [0.5, 0.0])
def test_losses_far_below_any_least_value(prox: float, factor: float, execution: str) -> None:
    """1e-25 and 1e-40 of a loss, in float64, are a loss like any other: no divisor has a least value."""
    estimators = [*DIFFERENCES, mn.FOBMAML()] if prox else DIFFERENCES[:2]
    for estimator in estimators:
        residual, gradient = of(estimator, prox, execution)
        other, scaled = of(estimator, prox, execution, factor=factor)
        torch.testing.assert_close(scaled, gradient, rtol=1e-9, atol=0)
        assert other == pytest.approx(residual, rel=1e-9, nan_ok=True)


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("leak", [0.0, 1e-18])
@pytest.mark.parametrize("estimator", [mn.FOBMAML(), *DIFFERENCES[1:]], ids=str)
def test_an_idle_parameter_has_no_say(estimator: object, leak: float, execution: str) -> None:
    """Not even a large one: neither in the nudge nor in the step size; its round-off is none of the solution's.

    Nor one whose gradient is round-off, as that of a bias before a BatchNorm layer.
    """
    settings = {"estimator": estimator, "execution": execution}
    step, gradient = step_on(Scaled(idle=0.0, leak=leak), 0.5, **settings)
    other, beside = step_on(Scaled(idle=1e6, leak=leak), 0.5, **settings)
    torch.testing.assert_close(beside, gradient, rtol=1e-9, atol=0)
    assert other.nu == pytest.approx(step.nu, rel=1e-9)
    if step.nu:
        same(step, other)


def test_a_solution_of_nothing_but_round_off_is_no_scale() -> None:
    """Mirrored support data and θ = 0: φ(0) is 1e-17, and a displacement by that is round-off again."""
    inputs = torch.randn(1, 6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mirrored = mn.Batch(torch.cat([inputs, -inputs], 1), torch.ones(1, 12, dtype=torch.float64))
    tasks = mn.Tasks(mirrored, mn.Batch(*(leaf[:1] for leaf in TASKS.query)))
    model = Scaled(start=0.0)
    step = mn.MetaLearner(model, logistic_loss, prox=0.5, solver=mn.Nesterov(80)).backward(tasks)
    found, inputs = model.weight.grad, mirrored.inputs[0]
    weights = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    loss = nn.functional.binary_cross_entropy_with_logits(tasks.query.inputs[0] @ weights, tasks.query.targets[0])
    (query,) = torch.autograd.grad(loss, weights)
    curvature = inputs.T @ inputs / 12 / 4
    exact = 0.5 * torch.linalg.solve(curvature + 0.5 * torch.eye(4, dtype=torch.float64), query)
    assert float((found - exact).norm()) < 1e-6 * float(exact.norm())
    assert float((found - exact).norm()) <= step.error_bound * float(found.norm())


class Mixed(nn.Module):
    """Weights in float32, and one scale in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-0.7, 0.7, 4))
        self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.scale * (inputs @ self.weight.double()).unsqueeze(-1)


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_the_coarsest_leaf_sets_the_displacement(execution: str) -> None:
    """A displacement for float64 is round-off among float32 leaves."""
    model, exact = Mixed(), Mixed().double()
    nudges = []
    for one in (model, Mixed().float(), exact):
        learner = mn.MetaLearner(one, logistic_loss, prox=0.5, solver=mn.Nesterov(60), execution=execution)
        step = learner.backward(TASKS)
        assert step.dropped_tasks == 0
        nudges.append(step.nu)
    torch.testing.assert_close(model.weight.grad.double(), exact.weight.grad, rtol=1e-3, atol=1e-5)
    assert nudges[0] == pytest.approx(nudges[1], rel=1e-3)
    assert nudges[2] < nudges[0] / 100


@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("prox", [0.5, 0.0])
def test_divergence_is_seen_in_any_unit(factor: float, prox: float) -> None:
    settings = {"estimator": mn.FOMAML() if prox == 0 else mn.FOBMAML()}

    def loss(model: nn.Module, batch: mn.Batch) -> Tensor:
        return factor * (model(batch.inputs).squeeze(-1) - batch.targets).square().mean()

    with pytest.raises(mn.NonFiniteError):
        step_on(Scaled(), prox * factor, loss, solver=mn.GradientDescent(9, lr=10 / factor), **settings)
    step, _ = step_on(Scaled(), prox * factor, loss, solver=mn.GradientDescent(9, lr=0.01 / factor), **settings)
    assert step.dropped_tasks == 0


@pytest.mark.parametrize("prox", [1e4, 1e7])
def test_the_alarm_is_not_set_off_by_round_off(prox: float) -> None:
    """Held that closely, the meta-gradient is the query gradient: in float32 a little longer or shorter."""
    model = Scaled().float()
    tasks = mn.Tasks(*(mn.Batch(batch.inputs.float(), batch.targets.float()) for batch in TASKS))
    step = mn.MetaLearner(model, logistic_loss, prox=prox, solver=mn.Nesterov(4)).backward(tasks)
    assert step.amplified_tasks == 0


@pytest.mark.parametrize("idle", [1e2, 1e4])
@pytest.mark.parametrize("prox", [0.5, 0.0])
def test_an_idle_parameter_hides_no_divergence(idle: float, prox: float) -> None:
    def loss(model: nn.Module, batch: mn.Batch) -> Tensor:
        return (model(batch.inputs).squeeze(-1) - batch.targets).square().mean()

    settings = {"estimator": mn.FOMAML() if prox == 0 else mn.FOBMAML()}
    with pytest.raises(mn.NonFiniteError):
        step_on(Scaled(idle=idle), prox, loss, solver=mn.GradientDescent(6, lr=2.0), **settings)


def test_a_constant_in_the_support_loss_changes_nothing() -> None:
    """A sum of negative log-likelihoods has any; it is no scale for the parameters."""
    step, gradient = step_on(Scaled(), 0.05, query=logistic_loss)
    other, beside = step_on(Scaled(), 0.05, lambda model, batch: 1024 + logistic_loss(model, batch), logistic_loss)
    torch.testing.assert_close(beside, gradient, rtol=1e-7, atol=0)
    assert other.nu == pytest.approx(step.nu, rel=1e-7)
    same(step, other)


@pytest.mark.parametrize("prox", [1.0, 30.0, 300.0])
def test_the_bound_knows_the_round_off_of_bfloat16(prox: float) -> None:
    exact, narrow = Scaled(), Scaled().bfloat16()
    with torch.no_grad():
        exact.weight.copy_(narrow.weight)
    for i in range(3):
        rounded = mn.Tasks(*(mn.Batch(b.inputs[i : i + 1].bfloat16(), b.targets[i : i + 1]) for b in TASKS))
        tasks = mn.Tasks(*(mn.Batch(batch.inputs.double(), batch.targets) for batch in rounded))
        narrow_tasks = mn.Tasks(*(mn.Batch(batch.inputs, batch.targets.bfloat16()) for batch in rounded))
        for model, given in ((exact, tasks), (narrow, narrow_tasks)):
            model.zero_grad()
            learner = mn.MetaLearner(model, logistic_loss, prox=prox, solver=mn.Nesterov(60), execution="in_place")
            step = learner.backward(given)
        error = (narrow.weight.grad.double() - exact.weight.grad).norm()
        assert float(error) <= step.error_bound * float(narrow.weight.grad.double().norm())


def test_a_solved_problem_is_certified_in_float32() -> None:
    """The free solution and the middle of the nudged ones are often the same number: no way, and no rate along it."""
    tasks = logistic(100, features=1, shots=12, queries=12, dtype=torch.float32)
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 0.3)
    step = mn.MetaLearner(model, logistic_loss, prox=0.5, solver=mn.Nesterov(40)).backward(tasks)
    assert step.error_bound < 1e-3


@pytest.mark.parametrize(
    "estimator", [mn.HFMAML(), mn.IMAML(products="two_gradient"), mn.Tangent(products="two_gradient")], ids=str
)
def test_two_gradients_of_bfloat16_added_up_in_float32(estimator: object) -> None:
    """In place a solution is held in float32, but the model looks at it in bfloat16: that sets the displacement."""
    generator = torch.Generator().manual_seed(0)
    inputs, targets = (torch.randn(2, 24, size, generator=generator).bfloat16() for size in (4, 1))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        narrow = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).bfloat16()
    exact = copy.deepcopy(narrow).double()
    found = []
    for model, kind in ((narrow, torch.bfloat16), (exact, torch.float64)):
        support, query = (mn.Batch(inputs[i : i + 1].to(kind), targets[i : i + 1].to(kind)) for i in range(2))
        learner = mn.MetaLearner(
            model,
            lambda model, batch: nn.functional.mse_loss(model(batch.inputs), batch.targets),
            prox=1.0,
            solver=mn.Nesterov(20),
            estimator=estimator,
            execution="in_place",
        )
        learner.backward(mn.Tasks(support, query))
        found.append(torch.cat([parameter.grad.double().flatten() for parameter in model.parameters()]))
    assert float((found[0] - found[1]).norm()) < 0.05 * float(found[1].norm())


def test_a_gradient_of_round_off_in_bfloat16_touches_nothing() -> None:
    """Though it was added up in float32."""

    class Losses(InnerGradients):
        def share(self, a: Tensor, b: Tensor) -> Tensor:
            return (a.float() * b.float()).sum()

        def added(self, shares: Sequence[Tensor]) -> Tensor:
            return torch.stack([*shares]).sum()

    theta = {"weight": torch.ones(100).bfloat16(), "bias": torch.full((10,), 100.0).bfloat16()}
    gradient = {"weight": torch.ones(100), "bias": torch.full((10,), 1e-3)}
    energy = Energy(Losses(), theta, 1.0)
    wide = {name: leaf.float() for name, leaf in theta.items()}
    assert float(energy.touched(wide, gradient, energy.norm(gradient))) == 10.0
