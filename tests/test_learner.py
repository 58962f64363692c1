"""MetaLearner: what it adds to .grad, what it reports, what it leaves untouched, and what it says when it cannot."""

from __future__ import annotations

import math
import pickle
import re
import warnings
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader

import metanudge as mn
from naive import gradient_descent
from problems import PROBLEMS, Problem, distance, flat_gradient, single_tasks, slope, squared_error

EXECUTIONS = ["vectorized", "in_place"]
SOLVER = mn.GradientDescent(4, lr=0.1)


def learner_of(made: Problem, **settings: object) -> mn.MetaLearner:
    settings = {"prox": made.prox, "solver": SOLVER, "estimator": mn.FOBMAML(nu=0.1), **settings}
    return mn.MetaLearner(made.make(), made.loss, **settings)


def adapted(made: Problem, i: int, steps: int = 4) -> list[Tensor]:
    """phi_0, ..., phi_K of a task by a plain loop."""
    task = made.plain[i]
    return gradient_descent(
        lambda phi: slope(task.support, phi) + made.prox * (phi - made.theta), made.theta, steps=steps, lr=0.1
    )


# backward.


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_backward_accumulates_as_loss_backward_does(execution: str) -> None:
    learner = learner_of(PROBLEMS["mlp"](), execution=execution)
    learner.backward(PROBLEMS["mlp"]().tasks)
    once = flat_gradient(learner.model)
    learner.backward(PROBLEMS["mlp"]().tasks)
    assert torch.equal(flat_gradient(learner.model), 2 * once)
    for parameter in learner.model.parameters():
        parameter.grad = torch.full_like(parameter, 7.0)
    learner.backward(PROBLEMS["mlp"]().tasks)
    torch.testing.assert_close(flat_gradient(learner.model), 7 + once, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_a_step_reports_means_over_tasks(execution: str) -> None:
    made = PROBLEMS["logistic"]()
    learner = learner_of(made, execution=execution)
    step = learner.backward(made.tasks)
    ends = [adapted(made, i)[-1] for i in range(len(made.plain))]
    mean = lambda values: float(sum(values)) / len(made.plain)  # noqa: E731
    assert step.query_loss == pytest.approx(mean(t.query(phi) for t, phi in zip(made.plain, ends, strict=True)))
    assert step.support_loss == pytest.approx(mean(t.support(phi) for t, phi in zip(made.plain, ends, strict=True)))
    assert step.gradient_norm == pytest.approx(float(flat_gradient(learner.model).norm()))
    assert step.nu == pytest.approx(0.1)
    assert step.dropped_tasks == 0
    assert step.query_losses == pytest.approx([float(t.query(phi)) for t, phi in zip(made.plain, ends, strict=True)])
    assert all(isinstance(value, float | int) for value in (*step[:-1], *step.query_losses))
    assert re.fullmatch(r"MetaStep\(query_loss=\S+, .*, dropped_tasks=0, gradient_evaluations=\d+\)", repr(step))


def test_nu_is_zero_for_estimators_without_one() -> None:
    made = PROBLEMS["ridge"]()
    for estimator in (mn.MAML(), mn.FOMAML(), mn.Reptile(), mn.IMAML(), mn.Tangent(), mn.HFMAML()):
        assert learner_of(made, estimator=estimator).backward(made.tasks).nu == 0


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_a_list_of_single_tasks_is_their_stack(execution: str) -> None:
    made = PROBLEMS["logistic"]()
    stacked, listed = learner_of(made, execution=execution), learner_of(made, execution=execution)
    a, b = stacked.backward(made.tasks), listed.backward(single_tasks(made.tasks))
    assert distance(flat_gradient(listed.model), flat_gradient(stacked.model)) < 1e-14
    assert a[:-1] == pytest.approx(b[:-1], rel=1e-13)
    assert a.query_losses == pytest.approx(b.query_losses, rel=1e-13)


def ragged(made: Problem) -> list[mn.Tasks]:
    """Tasks of three sizes, not in order of size."""
    cut = [slice(0, 5), slice(0, 8), slice(2, 7), slice(0, 8), slice(1, 4)]
    singles = single_tasks(made.tasks)
    return [
        mn.Tasks(
            mn.Batch(singles[i % 3].support.inputs[part], singles[i % 3].support.targets[part]), singles[i % 3].query
        )
        for i, part in enumerate(cut)
    ]


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_a_ragged_list_is_the_mean_of_its_tasks(execution: str) -> None:
    made = PROBLEMS["logistic"]()
    together = learner_of(made, execution=execution)
    step = together.backward(ragged(made))
    gradients, losses = [], []
    for task in ragged(made):
        alone = learner_of(made, execution=execution)
        losses.append(alone.backward([task]).query_loss)
        gradients.append(flat_gradient(alone.model))
    assert distance(flat_gradient(together.model), torch.stack(gradients).mean(0)) < 1e-13
    assert step.query_loss == pytest.approx(sum(losses) / len(losses))


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_separate_query_loss(execution: str) -> None:
    """Adapted on one loss, judged by another: FOMAML shows which gradient is whose."""
    made = PROBLEMS["ridge"]()

    def absolute(model: nn.Module, batch: mn.Batch) -> Tensor:
        return (model(batch.inputs) - batch.targets).abs().mean()

    learner = learner_of(made, estimator=mn.FOMAML(), execution=execution, query_loss=absolute)
    step = learner.backward(made.tasks)
    gradients, losses = [], []
    for i in range(len(made.plain)):
        inputs, targets = made.tasks.query.inputs[i], made.tasks.query.targets[i][:, 0]
        phi = adapted(made, i)[-1]
        gradients.append(slope(lambda p, x=inputs, y=targets: (x @ p - y).abs().mean(), phi))
        losses.append(float((inputs @ phi - targets).abs().mean()))
    assert distance(flat_gradient(learner.model), torch.stack(gradients).mean(0)) < 1e-13
    assert step.query_loss == pytest.approx(sum(losses) / len(losses))


def test_reproducible_under_a_seed() -> None:
    """Dropout in train mode: bitwise the same after the same seed, another step after another."""
    made = PROBLEMS["logistic"]()

    def run(seed: int, execution: str) -> Tensor:
        model = nn.Sequential(nn.Dropout(0.5), made.make())
        torch.manual_seed(seed)
        mn.MetaLearner(model, made.loss, solver=SOLVER, execution=execution).backward(made.tasks)
        return flat_gradient(model)

    for execution in EXECUTIONS:
        assert torch.equal(run(1, execution), run(1, execution))
        assert not torch.equal(run(1, execution), run(2, execution))


@pytest.mark.filterwarnings("ignore:the model is in train mode")
@pytest.mark.parametrize("execution", EXECUTIONS)
def test_steps_differ_and_cost_the_generator_one_draw(execution: str) -> None:
    """The policy: a step takes one number from the global generator, whatever the model draws."""
    made = PROBLEMS["logistic"]()
    model = nn.Sequential(nn.Dropout(0.5), made.make())
    learner = mn.MetaLearner(model, made.loss, solver=SOLVER, execution=execution)
    for use in (
        lambda: learner.backward(made.tasks),
        lambda: learner.adapt(single_tasks(made.tasks)[0].support),
        lambda: learner.evaluate(made.tasks),
    ):
        torch.manual_seed(5)
        torch.randint(2**62, ())
        expected = torch.get_rng_state()
        torch.manual_seed(5)
        use()
        assert torch.equal(torch.get_rng_state(), expected)
    model.zero_grad()
    learner.backward(made.tasks)
    first = flat_gradient(model)
    model.zero_grad()
    learner.backward(made.tasks)
    assert not torch.equal(first, flat_gradient(model))


# What is not finite.


def poisoned(made: Problem, *bad: int) -> mn.Tasks:
    inputs = made.tasks.support.inputs.clone()
    inputs[list(bad)] = float("nan")
    return mn.Tasks(mn.Batch(inputs, made.tasks.support.targets), made.tasks.query)


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("estimator", [mn.FOBMAML(), mn.HFMAML(), mn.FOMAML()], ids=str)
def test_tasks_that_are_not_finite_are_left_out(estimator: object, execution: str) -> None:
    """The mean of the rest, exactly; one warning, and a count on every step."""
    made = PROBLEMS["logistic"]()
    settings = {"estimator": estimator, "execution": execution, "solver": mn.Nesterov(5, tol=1e-3)}
    learner, rest = learner_of(made, **settings), learner_of(made, **settings)
    with pytest.warns(mn.NonFiniteWarning, match=r"1 of 3 tasks.*task 1: support inputs.*mend") as caught:
        step = learner.backward(poisoned(made, 1))
    assert len(caught) == 1
    singles = single_tasks(made.tasks)
    clean = rest.backward([singles[0], singles[2]])
    assert step.dropped_tasks == 1
    assert distance(flat_gradient(learner.model), flat_gradient(rest.model)) < 1e-9
    assert step.query_loss == pytest.approx(clean.query_loss)
    assert step.residual == pytest.approx(clean.residual)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert learner.backward(poisoned(made, 0, 1)).dropped_tasks == 2


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_a_diverging_task_is_left_out(execution: str) -> None:
    """Not NaN in the data but a solve that explodes."""
    made = PROBLEMS["ridge"]()
    inputs = made.tasks.support.inputs.clone()
    inputs[2] *= 1e80
    tasks = mn.Tasks(mn.Batch(inputs, made.tasks.support.targets), made.tasks.query)
    learner = learner_of(made, execution=execution)
    with pytest.warns(mn.NonFiniteWarning):
        step = learner.backward(tasks)
    assert step.dropped_tasks == 1
    assert math.isfinite(step.query_loss)
    assert flat_gradient(learner.model).isfinite().all()


@pytest.mark.parametrize(
    ("solver", "words"),
    [
        (mn.Nesterov(5), r'a larger prox than .*, or give Nesterov a small lr of your own in the place of "auto"'),
        (mn.GradientDescent(5, lr=0.1), r"smaller steps \(lr, now 0\.1\)"),
    ],
    ids=["auto", "lr"],
)
def test_who_is_lost_and_why(solver: object, words: str) -> None:
    """One task with NaN in its data, one whose solve explodes: each has its own cure, and the solver's own words."""
    made = PROBLEMS["ridge"]()
    singles = single_tasks(poisoned(made, 0))
    singles[2] = mn.Tasks(mn.Batch(singles[2].support.inputs * 1e140, singles[2].support.targets), singles[2].query)
    ragged = mn.Tasks(*(mn.Batch(*(leaf[:-1] for leaf in part)) for part in singles[0]))  # a stack of its own
    learner = learner_of(made, solver=solver)
    with pytest.warns(mn.NonFiniteWarning) as caught:
        learner.backward([singles[1], ragged, singles[2], singles[1]])
    told = str(caught[0].message)
    assert "1 of 4 tasks hold NaN or infinite numbers in their data (task 1: support inputs" in told
    assert "1 of 4 tasks diverged, or had no finite loss or meta-gradient (task 2;" in told
    assert re.search(words, told)


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_when_no_task_is_finite_nothing_changes(execution: str) -> None:
    made = PROBLEMS["logistic"]()
    learner = learner_of(made, execution=execution)
    before = Snapshot(learner.model)
    with pytest.raises(mn.NonFiniteError, match=r"none of the 3 tasks.*task 0: support inputs"):
        learner.backward(poisoned(made, 0, 1, 2))
    before.check()
    with pytest.raises(mn.NonFiniteError, match=r"non-finite parameters: there are NaN.*in the support inputs"):
        learner.adapt(mn.Batch(*(x[0] for x in poisoned(made, 0).support)))
    before.check()


# adapt.


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_adapt_returns_another_module(execution: str) -> None:
    made = PROBLEMS["mlp"]()
    learner = learner_of(made, execution=execution)
    learner.backward(made.tasks)  # so that there are gradients
    learner.model.eval()
    before = Snapshot(learner.model)
    support = single_tasks(made.tasks)[1].support
    found = learner.adapt(support)
    before.check()
    assert type(found) is type(learner.model)
    vector = nn.utils.parameters_to_vector(found.parameters()).detach()
    assert distance(vector, adapted(made, 1)[-1]) < 1e-13
    assert not found.training
    assert all(parameter.grad is None and parameter.requires_grad for parameter in found.parameters())
    # and it is a module of its own
    squared_error(found, support).backward()
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.zero_()
    before.check()


def test_adapt_needs_a_batch_of_one_task() -> None:
    made = PROBLEMS["ridge"]()
    with pytest.raises(mn.TasksError, match=r"mn\.Batch\(inputs, targets\) of one task, got Tasks"):
        learner_of(made).adapt(made.tasks)


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_adapt_refuses_an_empty_support_set(execution: str) -> None:
    """As its docstring says; the model would come back unadapted, or NaN."""
    made = PROBLEMS["ridge"]()
    with pytest.raises(mn.TasksError):
        learner_of(made, execution=execution).adapt(mn.Batch(torch.zeros(0, 4).double(), torch.zeros(0, 1).double()))


# evaluate.


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_evaluate(execution: str) -> None:
    """Mean, 95 % interval and curve over the steps of adaptation, against a plain loop."""
    made = PROBLEMS["logistic"]()
    learner = learner_of(made, execution=execution)
    before = Snapshot(learner.model)
    found = learner.evaluate(made.tasks)
    before.check()
    exact = torch.stack([torch.stack([t.query(phi) for phi in adapted(made, i)]) for i, t in enumerate(made.plain)])
    torch.testing.assert_close(found.values, exact, rtol=1e-13, atol=0)
    torch.testing.assert_close(found.curve, exact.mean(0), rtol=1e-13, atol=0)
    half = 1.96 * exact.std(0, unbiased=True) / math.sqrt(len(exact))
    torch.testing.assert_close(found.curve_ci95, half, rtol=1e-12, atol=0)
    assert found.mean == pytest.approx(float(exact[:, -1].mean()), rel=1e-13)
    assert found.ci95 == pytest.approx(float(half[-1]), rel=1e-12)


def test_evaluate_another_metric() -> None:
    made = PROBLEMS["logistic"]()

    def accuracy(model: nn.Module, batch: mn.Batch) -> Tensor:
        return ((model(batch.inputs) > 0) == (batch.targets > 0.5)).double().mean()

    found = learner_of(made).evaluate(made.tasks, metric=accuracy)
    for i in range(len(made.plain)):
        phi = adapted(made, i)[-1]
        hits = ((made.tasks.query.inputs[i] @ phi[:3] + phi[3]) > 0) == (made.tasks.query.targets[i][:, 0] > 0.5)
        assert float(found.values[i, -1]) == pytest.approx(float(hits.double().mean()))


def test_evaluate_takes_stacks_lists_and_loaders() -> None:
    made = PROBLEMS["ridge"]()
    learner = learner_of(made)
    whole = learner.evaluate(made.tasks).values
    singles = single_tasks(made.tasks)
    loader = DataLoader(singles, batch_size=2)  # its default collation stacks named tuples
    for given in (singles, tuple(singles), loader, (task for task in [made.tasks])):
        torch.testing.assert_close(learner.evaluate(given).values, whole, rtol=1e-13, atol=0)


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_evaluate_keeps_the_order_of_a_ragged_list(execution: str) -> None:
    """``values`` holds "the metric of every task": row i must be the i-th task's."""
    made = PROBLEMS["ridge"]()
    learner = learner_of(made, execution=execution)
    tasks = ragged(made)
    found = learner.evaluate(tasks).values
    for row, task in zip(found, tasks, strict=True):
        torch.testing.assert_close(row, learner.evaluate([task]).values[0], rtol=1e-12, atol=0)


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_evaluate_a_solver_that_stopped_early(execution: str) -> None:
    """Its curve goes on at the last value."""
    made = PROBLEMS["ridge"]()
    learner = learner_of(made, solver=mn.Nesterov(60, tol=1e-2), execution=execution)
    found = learner.evaluate(made.tasks)
    assert found.values.shape == (3, 61)
    assert torch.equal(found.curve[-1], found.curve[-20])
    assert not torch.equal(found.curve[0], found.curve[-1])


def test_evaluate_one_task_has_no_interval() -> None:
    made = PROBLEMS["ridge"]()
    found = learner_of(made).evaluate(single_tasks(made.tasks)[:1])
    assert math.isfinite(found.mean)
    assert math.isnan(found.ci95)


def test_evaluate_nothing() -> None:
    made = PROBLEMS["ridge"]()
    for nothing in ([], iter([])):
        with pytest.raises(mn.TasksError, match="empty"):
            learner_of(made).evaluate(nothing)


# What is left as it was.


class Snapshot:
    """All that a step must not touch."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.parameters = dict(model.named_parameters())
        self.values = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.gradients = {name: p.grad for name, p in self.parameters.items()}
        self.gradient_values = {n: None if g is None else g.clone() for n, g in self.gradients.items()}
        self.flags = {name: p.requires_grad for name, p in self.parameters.items()}
        self.buffers = dict(model.named_buffers())
        self.buffer_values = {name: b.clone() for name, b in self.buffers.items()}
        self.modes = [module.training for module in model.modules()]

    def check(self) -> None:
        now = dict(self.model.named_parameters())
        for name, parameter in self.parameters.items():
            assert now[name] is parameter
            assert torch.equal(parameter.detach(), self.values[name])
            assert parameter.grad is self.gradients[name]
            assert parameter.grad is None or torch.equal(parameter.grad, self.gradient_values[name])
            assert parameter.requires_grad == self.flags[name]
        buffers = dict(self.model.named_buffers())
        assert buffers.keys() == self.buffers.keys()
        for name, buffer in self.buffers.items():
            assert buffers[name] is buffer
            assert torch.equal(buffer, self.buffer_values[name])
        assert [module.training for module in self.model.modules()] == self.modes


def busy_model() -> nn.Module:
    """Parameters with and without gradients, one frozen, buffers that forward passes write, submodules in two modes."""
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.3), nn.Tanh(), nn.Linear(4, 1)).double()
    model[0].weight.requires_grad_(False)
    model[4].weight.grad = torch.randn(1, 4).double()
    model[2].eval()
    return model


class BoomError(Exception):
    """Raised inside the user's loss."""


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("call", [1, 2, 6, 11])
def test_everything_is_restored_after_an_exception(call: int, execution: str) -> None:
    """The user's loss raises at its n-th call: in the free solve, at its end, in a nudged one."""
    made, calls = PROBLEMS["logistic"](), []

    def loss(model: nn.Module, batch: mn.Batch) -> Tensor:
        calls.append(None)
        value = made.loss(model, batch)
        if len(calls) == call:
            raise BoomError
        return value

    model = busy_model()
    learner = mn.MetaLearner(
        model, loss, solver=mn.GradientDescent(4, lr=0.1), execution=execution, batch_norm="transductive"
    )
    for use in (
        lambda: learner.backward(made.tasks),
        lambda: learner.evaluate(made.tasks),
        lambda: learner.adapt(single_tasks(made.tasks)[0].support),
    ):
        calls.clear()
        before = Snapshot(model)
        torch.manual_seed(5)
        torch.randint(2**62, ())
        state = torch.get_rng_state()
        torch.manual_seed(5)
        try:
            use()
        except BoomError:
            before.check()
        else:
            assert len(calls) < call  # adapt makes few calls
        assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_a_step_leaves_all_but_grad_as_it_was(execution: str) -> None:
    made = PROBLEMS["logistic"]()
    model = busy_model()
    before = Snapshot(model)
    settings = {"solver": mn.Nesterov(3), "execution": execution, "batch_norm": "transductive"}
    mn.MetaLearner(model, made.loss, **settings).backward(made.tasks)
    assert model[0].weight.grad is None
    assert model[0].bias.grad is not None
    for parameter, gradient in before.gradients.items():
        before.parameters[parameter].grad = gradient
        if gradient is not None:
            gradient.copy_(before.gradient_values[parameter])  # it was added to in place
    before.check()


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_a_mode_set_by_the_loss_does_not_last(execution: str) -> None:
    """A loss may well say ``model.eval()``; the model is given back in the mode it was in."""
    made = PROBLEMS["logistic"]()

    def loss(model: nn.Module, batch: mn.Batch) -> Tensor:
        model.eval()
        return made.loss(model, batch)

    model = busy_model()
    before = Snapshot(model)
    settings = {"solver": SOLVER, "execution": execution, "batch_norm": "transductive"}
    mn.MetaLearner(model, loss, **settings).evaluate(made.tasks)
    before.check()


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_a_model_can_still_be_pickled_and_trained_after_a_step(execution: str) -> None:
    made = PROBLEMS["mlp"]()
    learner = learner_of(made, execution=execution)
    learner.backward(made.tasks)
    copy = pickle.loads(pickle.dumps(learner.model))
    assert torch.equal(
        nn.utils.parameters_to_vector(copy.parameters()), nn.utils.parameters_to_vector(learner.model.parameters())
    )
    learner.model.zero_grad()
    squared_error(learner.model, single_tasks(made.tasks)[0].support).backward()
    assert flat_gradient(learner.model).norm() > 0


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_steps_under_no_grad_are_the_same(execution: str) -> None:
    made = PROBLEMS["logistic"]()
    plain, within = learner_of(made, execution=execution), learner_of(made, execution=execution)
    plain.backward(made.tasks)
    with torch.no_grad():
        within.backward(made.tasks)
    assert torch.equal(flat_gradient(plain.model), flat_gradient(within.model))


def test_a_learner_follows_its_model() -> None:
    """Changed after the learner was made: values, precision, and what is frozen."""
    made = PROBLEMS["ridge"]()
    exact = made.meta_gradient()
    for execution in EXECUTIONS:
        model = made.make().float()
        settings = {"prox": made.prox, "solver": mn.Nesterov(75), "execution": execution}
        learner = mn.MetaLearner(model, made.loss, estimator=mn.FOBMAML("fourth_order"), **settings)
        model.double()
        with torch.no_grad():
            nn.utils.vector_to_parameters(made.theta.clone(), model.parameters())
        learner.backward(made.tasks)
        assert distance(flat_gradient(model), exact) < 1e-9


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_a_parameter_frozen_after_the_learner_was_made_gets_no_gradient(execution: str) -> None:
    made = PROBLEMS["logistic"]()
    learner = learner_of(made, execution=execution)
    learner.model.bias.requires_grad_(False)
    learner.backward(made.tasks)
    assert learner.model.bias.grad is None
    assert learner.model.weight.grad is not None


# Errors.


OTHER = PROBLEMS["ridge"]().make()


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (lambda m, b: (m(b.inputs) - b.targets).square(), r"one number per task.*shape.*\.mean\(\)"),
        (lambda m, b: (m(b.inputs) - b.targets).square().mean().reshape(1), r"shape \(1,\)"),
        (lambda m, b: 1.5, "must return a scalar tensor, but returned float"),
        (lambda m, b: None, "returned NoneType"),
        (lambda m, b: (m(b.inputs) > 0).sum(), r"floating-point.*int64"),
        (lambda m, b: (m(b.inputs) - b.targets).square().mean().detach(), r"no gradient reaches.*\.detach\(\)"),
        (lambda m, b: b.targets.square().mean(), "does not depend on the adapted parameters"),
        (
            lambda m, b: (OTHER(b.inputs) - b.targets).square().mean(),
            "none of the model .*another module",
        ),
    ],
    ids=["vector", "one entry", "float", "None", "integer", "detached", "constant", "of another module"],
)
def test_bad_losses(loss: object, words: str, execution: str) -> None:
    made = PROBLEMS["ridge"]()
    model = made.make()
    before = Snapshot(model)
    learner = mn.MetaLearner(model, loss, solver=SOLVER, execution=execution)
    with pytest.raises(mn.LossError, match=words):
        learner.backward(made.tasks)
    before.check()


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_bad_query_losses(execution: str) -> None:
    made = PROBLEMS["ridge"]()
    learner = learner_of(made, query_loss=lambda m, b: made.loss(m, b).detach(), execution=execution)
    with pytest.raises(mn.LossError, match="no gradient reaches"):
        learner.backward(made.tasks)
    with pytest.raises(mn.LossError, match="floating-point"):
        learner.evaluate(made.tasks, metric=lambda m, b: (m(b.inputs) > 0).sum())


X, Y = torch.zeros(3, 5, 4).double(), torch.zeros(3, 5, 1).double()
GOOD = mn.Batch(X, Y)


@pytest.mark.parametrize(
    ("tasks", "words"),
    [
        (mn.Tasks(mn.Batch(X[:0], Y[:0]), mn.Batch(X[:0], Y[:0])), r"empty \(leading axis 0\); give at least one"),
        ([], "the list of tasks is empty; give at least one task"),
        (mn.Tasks(GOOD, mn.Batch(X[:2], Y[:2])), r"leading axis.*query 2, support 3.*give a list of mn\.Tasks"),
        (mn.Tasks(mn.Batch(X, Y[:1]), GOOD), "leading axis.*support 1, support 3"),
        (mn.Tasks(mn.Batch(X, torch.tensor(1.0)), GOOD), "support batch has no axis"),
        (mn.Tasks(mn.Batch(X, [0, 1, 2]), GOOD), "tensors or pytrees of tensors, but found int"),
        (mn.Tasks(mn.Batch((), ()), GOOD), "the support batch holds no tensor"),
        ((X, Y), "expected a list of mn.Tasks, found Tensor"),
        ([mn.Tasks(mn.Batch(X[0], Y[0]), mn.Batch(X[0], Y[0])), GOOD], "expected a list of mn.Tasks, found Batch"),
        (X, "expected mn.Tasks or a list of mn.Tasks, got Tensor"),
        (mn.Tasks((X, Y), GOOD), r"the support of mn.Tasks must be mn.Batch\(inputs, targets\), got tuple"),
        ([mn.Tasks(mn.Batch(X[0], Y[0]), (X[0], Y[0]))], "the query of mn.Tasks must be mn.Batch.*got tuple"),
        (mn.Tasks(mn.Batch(X.to("meta"), Y), GOOD), "a tensor of the tasks on meta; move it: tasks.to"),
    ],
    ids=[
        "empty stack",
        "empty list",
        "unequal parts",
        "unequal tensors",
        "no axis",
        "no tensor",
        "nothing",
        "pair",
        "batch in list",
        "tensor",
        "plain pair",
        "plain pair in list",
        "device",
    ],
)
def test_bad_tasks(tasks: object, words: str) -> None:
    made = PROBLEMS["ridge"]()
    learner = learner_of(made)
    with pytest.raises(mn.TasksError, match=words):
        learner.backward(tasks)
    assert learner.model.weight.grad is None


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"prox": -1.0}, "prox must be a finite number of at least 0"),
        ({"prox": float("inf")}, "prox must be"),
        ({"prox": float("nan")}, "prox must be"),
        ({"prox": "large"}, "prox must be"),
        ({"prox": True}, "prox must be"),
        ({"query_loss": 3}, r"query_loss must be a function loss\(model, batch\)"),
    ],
)
def test_bad_settings(settings: dict, words: str) -> None:
    with pytest.raises(mn.SettingsError, match=words):
        learner_of(PROBLEMS["ridge"](), **settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"estimator": "maml"},
        {"estimator": mn.MAML},
        {"solver": "nesterov"},
        {"solver": mn.Nesterov},
        {"solver": 16},
        {"solver": torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)},
        {"solver": mn.MAML()},
        {"estimator": mn.Nesterov(4)},
        {"query_loss": nn.CrossEntropyLoss},
        {"query_loss": nn.CrossEntropyLoss()},
        {"adapt_only": nn.Linear},
        {"adapt_only": 3},
        {"solver": None, "query_loss": 3},
        {"adapt_only": [nn.Parameter(torch.zeros(1))]},
        {"warm_start": mn.WarmStart},
        {"warm_start": True},
        {"warm_start": False},
        {"warm_start": "folder"},
    ],
    ids=str,
)
def test_the_wrong_kind_of_thing_is_a_settings_error(settings: dict) -> None:
    """A name or a class where an object belongs is a likely slip; it is told when the learner is built."""
    with pytest.raises(mn.SettingsError):
        learner_of(PROBLEMS["ridge"](), **settings)


def test_a_learner_keeps_its_model() -> None:
    made = PROBLEMS["ridge"]()
    learner = learner_of(made)
    model = learner.model
    with pytest.raises(mn.SettingsError, match="make a new MetaLearner"):
        learner.model = made.make()
    assert learner.model is model


@pytest.mark.parametrize(
    "name", ["loss", "query_loss", "batch_norm", "chunk_size", "microbatch", "compile", "cuda_graphs", "execution"]
)
def test_settings_that_would_be_set_in_vain_are_refused(name: str) -> None:
    """An attribute of that name would change nothing; prox, solver and the like are read at every step."""
    learner = learner_of(PROBLEMS["ridge"]())
    before = dict(vars(learner))
    with pytest.raises(mn.SettingsError, match=f"keeps the {name} that it was made with"):
        setattr(learner, name, "in_place")
    assert vars(learner) == before


def test_a_slip_of_the_pen_is_not_set() -> None:
    learner = learner_of(PROBLEMS["ridge"]())
    with pytest.raises(mn.SettingsError, match='no sharpnes_radius that could be set; did you mean "sharpness_radius"'):
        learner.sharpnes_radius = 0.1
    learner.sharpness_radius = 0.1
    learner.evaluate = None  # what is there may be replaced, as by a test's double

    class Named(mn.MetaLearner):
        pass

    named = Named(learner.model, mn.metrics.squared_error)
    named.title = "of a subclass's own"


@pytest.mark.parametrize("inner", EXECUTIONS)
@pytest.mark.parametrize("fused", [False, True])
def test_gradients_are_laid_out_as_their_parameters(fused: bool, inner: str) -> None:
    """Fused optimizers walk through memory, whatever axes mean there."""
    moved = []
    for layout in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(16, 2)).double()
        model.to(memory_format=layout)
        turned = torch.randn(2, 16, dtype=torch.float64).mT.contiguous().mT  # as a transposed one
        model[2].weight = torch.nn.Parameter(turned if layout is torch.channels_last else turned.contiguous())
        images, classes = torch.randn(2, 5, 3, 4, 4, dtype=torch.float64), torch.randint(2, (2, 5))
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1, fused=fused)
        learner = mn.MetaLearner(model, mn.metrics.cross_entropy, execution=inner)
        for _ in range(3):
            optimizer.zero_grad()
            learner.backward(mn.Tasks(*(mn.Batch(images, classes) for _ in range(2))))
            assert all(leaf.grad.stride() == leaf.stride() for leaf in model.parameters())
            optimizer.step()
        moved.append(torch.cat([leaf.detach().flatten() for leaf in model.parameters()]))
    torch.testing.assert_close(*moved, rtol=1e-6, atol=1e-8)


def test_a_scale_far_from_one_is_told_of() -> None:
    made = PROBLEMS["ridge"]()
    wide = torch.utils._pytree.tree_map(lambda leaf: 1000 * leaf, made.tasks)
    learner = mn.MetaLearner(made.make(), made.loss, solver=mn.Nesterov(2))
    with pytest.warns(mn.UnsolvedWarning, match="bring inputs and targets to a scale of about one"):
        learner.backward(wide)


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("register", ["register_hook", "register_post_accumulate_grad_hook"])
@pytest.mark.parametrize("name", ["0.weight", "2.bias"])
def test_hooks_on_trainable_parameters_are_refused_while_they_are_there(
    name: str, register: str, execution: str
) -> None:
    """An adapted one and a shared one, hooked after the learner was made; nothing is called."""
    made, calls = PROBLEMS["mlp"](), []
    model = made.make()
    learner = mn.MetaLearner(model, made.loss, solver=SOLVER, adapt_only="2", execution=execution)
    frozen = model.get_parameter("0.bias")
    getattr(frozen, register)(lambda _: calls.append(None))
    frozen.requires_grad_(False)
    handle = getattr(model.get_parameter(name), register)(lambda _: calls.append(None))
    for use in (
        lambda: learner.backward(made.tasks),
        lambda: learner.evaluate(made.tasks),
        lambda: learner.adapt(single_tasks(made.tasks)[0].support),
        lambda: mn.MetaLearner(model, made.loss),
    ):
        with pytest.raises(mn.SettingsError, match=rf"{name} has a hook.*handle.remove\(\)"):
            use()
    handle.remove()
    learner.backward(made.tasks)
    assert not calls


@pytest.mark.parametrize("kind", [nn.DataParallel, nn.parallel.DistributedDataParallel, FullyShardedDataParallel])
@pytest.mark.parametrize("within", [False, True])
def test_wrappers_of_many_processes_are_refused(kind: type[nn.Module], within: bool) -> None:
    wrapped = kind.__new__(kind)  # without the processes
    nn.Module.__init__(wrapped)
    wrapped._modules["_fsdp_wrapped_module"] = PROBLEMS["ridge"]().make()
    model = nn.Sequential(wrapped) if within else wrapped
    with pytest.raises(mn.SettingsError, match=rf"{kind.__name__}.*ddp.module.*process_group.*fully_shard"):
        mn.MetaLearner(model, squared_error)


def test_what_is_no_model_or_no_loss() -> None:
    made = PROBLEMS["ridge"]()
    with pytest.raises(mn.SettingsError, match=r"model must be a torch\.nn\.Module, got function"):
        mn.MetaLearner(squared_error, squared_error)
    with pytest.raises(mn.SettingsError, match="loss must be a function"):
        mn.MetaLearner(made.make(), "mse")


def test_a_metric_by_name_is_refused() -> None:
    made = PROBLEMS["ridge"]()
    with pytest.raises(mn.SettingsError, match=r"metric must be a function.*got 'accuracy'"):
        learner_of(made).evaluate(made.tasks, metric="accuracy")


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_everything_runs_in_inference_mode(execution: str) -> None:
    """With tensors made there, too; what adapt returns is an ordinary module, and gradients are ordinary tensors."""
    made = PROBLEMS["ridge"]()
    learner = learner_of(made, execution=execution)
    learner.backward(made.tasks)
    gradients = [parameter.grad.clone() for parameter in learner.model.parameters()]
    learner.model.zero_grad()
    wanted, phi = learner.evaluate(made.tasks), learner.adapt(single_tasks(made.tasks)[0].support)
    with torch.inference_mode():
        inside: mn.Tasks = tree_map(torch.clone, made.tasks)
        for tasks in (made.tasks, inside, single_tasks(inside)):
            assert torch.equal(learner.evaluate(tasks).values, wanted.values)
        adapted = learner.adapt(single_tasks(inside)[0].support)
        learner.backward(made.tasks)
    for parameter, gradient in zip(learner.model.parameters(), gradients, strict=True):
        assert not parameter.grad.is_inference()
        assert torch.equal(parameter.grad, gradient)
    for leaf, same in zip(adapted.parameters(), phi.parameters(), strict=True):
        assert not leaf.is_inference()
        assert leaf.requires_grad
        assert torch.equal(leaf, same)


def test_an_evaluation_is_shown_on_one_line() -> None:
    made = PROBLEMS["ridge"]()
    shown = repr(learner_of(made, solver=mn.Nesterov(3)).evaluate(made.tasks))
    assert re.fullmatch(r"Evaluation\(query loss \S+ ± \S+, tasks=\d+, steps=3\)", shown)


def test_the_wrong_part_is_named() -> None:
    with pytest.raises(mn.SettingsError, match=r"solver must be an object such as mn\.Nesterov\(steps=16\), got MAML"):
        learner_of(PROBLEMS["ridge"](), solver=mn.MAML())


def test_a_learner_shows_its_settings() -> None:
    shown = repr(mn.MetaLearner(nn.Linear(1, 1), squared_error, prox=0.5, execution="in_place"))
    for part in ("Linear", "prox=0.5", "Nesterov(steps=16", "FOBMAML(scheme='symmetric'", "'in_place')"):
        assert part in shown
    model = nn.Sequential(nn.Linear(1, 2), nn.BatchNorm1d(2))
    shown = repr(mn.MetaLearner(model, squared_error, adapt_only="0", batch_norm="frozen", warm_start=mn.WarmStart()))
    assert "'vectorized', adapt_only='0', batch_norm='frozen', warm_start=WarmStart(" in shown


@pytest.mark.parametrize("metric", [mn.metrics.accuracy, mn.metrics.squared_error])
def test_metrics_do_not_broadcast(metric: object) -> None:
    """Predictions [n, 1] against targets [n] would average over n x n pairs; class indices [n, 1] over n x n, too."""
    x = torch.zeros(2, 5, 1)
    tasks = mn.Tasks(*(mn.Batch(x, x[..., 0] if metric is mn.metrics.squared_error else x),) * 2)
    outputs = 1 if metric is mn.metrics.squared_error else 2
    learner = mn.MetaLearner(nn.Linear(1, outputs), lambda m, b: m(b.inputs).square().mean())
    with pytest.raises(mn.LossError, match="must be equal"):
        learner.evaluate(tasks, metric)


class Answer(NamedTuple):
    """What a Hugging Face model returns."""

    loss: None
    logits: Tensor


class Words(nn.Module):
    """A classifier called as theirs are."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(5, 4), nn.Linear(4, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Answer:
        mask = attention_mask.unsqueeze(-1)
        return Answer(None, self.head((self.embedding(input_ids) * mask).sum(-2) / mask.sum(-2)))


@pytest.mark.parametrize("execution", ["vectorized", "in_place"])
def test_inputs_by_keyword_and_outputs_with_logits(execution: str) -> None:
    torch.manual_seed(0)
    model = Words()
    inputs = {"input_ids": torch.randint(5, (2, 6, 3)), "attention_mask": torch.ones(2, 6, 3)}
    batch = mn.Batch(inputs, torch.randint(3, (2, 6)))
    learner = mn.MetaLearner(model, mn.metrics.cross_entropy, execution=execution)
    learner.backward(mn.Tasks(batch, batch))
    found = learner.evaluate(mn.Tasks(batch, batch), mn.metrics.accuracy)
    logits = model(**{name: leaf[0] for name, leaf in inputs.items()}).logits
    torch.testing.assert_close(found.values[0, 0], (logits.argmax(-1) == batch.targets[0]).double().mean())


def test_a_dict_may_be_one_argument() -> None:
    class Whole(nn.Linear):
        def forward(self, given: dict[str, Tensor]) -> Tensor:
            return super().forward(given["x"])

    batch = mn.Batch({"x": torch.randn(2, 6, 3)}, torch.randint(2, (2, 6)))
    mn.MetaLearner(Whole(3, 2), mn.metrics.cross_entropy).evaluate(mn.Tasks(batch, batch), mn.metrics.accuracy)


@pytest.mark.parametrize(
    ("model", "shape"),
    [(nn.Linear(8, 5), (10, 8)), (nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(0), nn.Linear(18, 5)), (10, 1, 5, 5))],
)
def test_a_missing_task_axis_is_told(model: nn.Module, shape: tuple[int, ...]) -> None:
    batch = mn.Batch(torch.randn(shape), torch.randn(10, 5))
    learner = mn.MetaLearner(model, squared_error, prox=2.0)
    with pytest.warns(UserWarning, match="each of 10 tasks has one input of shape .* is the task axis missing"):
        learner.backward(mn.Tasks(batch, batch))
    learner.backward(mn.Tasks(batch, batch))  # once


def test_examples_in_a_row_are_no_missing_axis() -> None:
    """Scalars that the model gives an axis of their own."""

    class Scalars(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.unsqueeze(-1)).squeeze(-1)

    batch = mn.Batch(torch.randn(3, 10), torch.randn(3, 10))
    mn.MetaLearner(Scalars(1, 1), squared_error, prox=2.0).backward(mn.Tasks(batch, batch))


def test_float16_is_for_the_live_module() -> None:
    model = nn.Linear(2, 1).half()
    assert "'in_place'" in repr(mn.MetaLearner(model, squared_error))
    with pytest.raises(mn.SettingsError, match="float16"):
        mn.MetaLearner(model, squared_error, execution="vectorized")


@pytest.mark.parametrize(
    ("model", "told"),
    [(nn.LazyLinear(2), "call the model on a batch once"), (nn.Linear(2, 1, dtype=torch.complex64), "is complex")],
)
def test_parameters_without_shape_or_order_are_refused(model: nn.Module, told: str) -> None:
    with pytest.raises(mn.SettingsError, match=told):
        mn.MetaLearner(model, squared_error)


def test_errors_are_of_one_family() -> None:
    for kind in (mn.SettingsError, mn.TasksError, mn.LossError, mn.NonFiniteError):
        assert issubclass(kind, mn.MetanudgeError)


def module_as_pattern() -> object:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1))
    return mn.MetaLearner(model, mn.metrics.squared_error, adapt_only=model[1])


def with_loss(loss: object) -> object:
    return mn.MetaLearner(torch.nn.Linear(1, 1), loss, execution="in_place").backward(mn.tasks.sinusoid(2))


def foreign_optimizer() -> object:
    elsewhere = torch.nn.Linear(1, 1)
    solver = mn.TorchOptimizer(lambda _: torch.optim.SGD(elsewhere.parameters(), lr=0.1), 2)
    return mn.MetaLearner(torch.nn.Linear(1, 1), mn.metrics.squared_error, solver=solver).backward(mn.tasks.sinusoid(2))


@pytest.mark.parametrize(
    ("slip", "kind", "words"),
    [
        (lambda: mn.Nesterov(4, power_iterations="a"), mn.SettingsError, "power_iterations must be a whole number"),
        (lambda: mn.Nesterov(4, power_iterations=2.5), mn.SettingsError, "power_iterations must be a whole number"),
        (lambda: mn.Nesterov(4, restart="no"), mn.SettingsError, "restart must be True or False"),
        (lambda: mn.MAML(checkpoint="x"), mn.SettingsError, "checkpoint must be True or False"),
        (lambda: mn.Adam(4, lr=0.1, betas=0.9), mn.SettingsError, "betas must be two numbers"),
        (lambda: mn.Stencil(nodes=1, weights=(1,), order=1), mn.SettingsError, "nodes must be a tuple"),
        (lambda: mn.FOBMAML(scheme=3), mn.SettingsError, "scheme must be a mn.Stencil"),
        (lambda: mn.IMAML(cg_steps=0), mn.SettingsError, "cg_steps must be a whole number"),
        (lambda: mn.tasks.sinusoid(0), mn.SettingsError, "number must be a whole number of at least 1"),
        (lambda: mn.tasks.logistic(2, flips=0.7), mn.SettingsError, "flips is a share"),
        (
            lambda: mn.optim.ClippedSGD([{"params": [torch.nn.Parameter(torch.ones(1))], "lr": -1.0}], 0.1, 1.0),
            mn.SettingsError,
            "lr must be a finite number above 0",
        ),
        (
            lambda: mn.optim.NormalizedSGD([{"params": [torch.nn.Parameter(torch.ones(1))], "lr": -1.0}], 0.1),
            mn.SettingsError,
            "lr must be a finite number above 0",
        ),
        (
            lambda: mn.MetaLearner(torch.nn.Linear(1, 1), mn.metrics.squared_error, chunk_size=True),
            mn.SettingsError,
            "chunk_size must be a whole number",
        ),
        (module_as_pattern, mn.SettingsError, "give the module's name"),
        (lambda: with_loss(torch.nn.functional.mse_loss), mn.SettingsError, "calls the model and then the loss"),
        (lambda: with_loss(lambda m, b: mn.metrics.squared_error(m, b).item()), mn.LossError, r"leave out \.item\(\)"),
        (foreign_optimizer, mn.SettingsError, "the parameters it is given, and no others"),
        (
            lambda: mn.MetaLearner(torch.nn.Linear(1, 1), mn.metrics.squared_error, solver=mn.Nesterov),
            mn.SettingsError,
            "got the class Nesterov",
        ),
        (
            lambda: mn.MetaLearner(torch.nn.Linear(1, 1), mn.metrics.squared_error, estimator=mn.Nesterov(3)),
            mn.SettingsError,
            "without '__call__'",
        ),
        (
            lambda: mn.MetaLearner(torch.nn.Linear(1, 1), mn.metrics.squared_error).backward(
                torch.utils.data.DataLoader([1, 2])
            ),
            mn.TasksError,
            r"loop over it: for tasks in loader: learner\.backward\(tasks\)",
        ),
        (
            lambda: mn.MetaLearner(torch.nn.Linear(1, 1), mn.metrics.squared_error).evaluate(3),
            mn.TasksError,
            "a list of them or a loader, got int",
        ),
        (
            lambda: mn.metrics.accuracy(torch.nn.Linear(2, 1), mn.Batch(torch.zeros(4, 2), torch.zeros(4).long())),
            mn.LossError,
            "at least two classes",
        ),
    ],
)
def test_slips_are_told_in_words(slip: object, kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        slip()


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_gradients_are_added_to_the_tensor_that_is_there(execution: str) -> None:
    """As loss.backward() does: whoever holds .grad sees the sum."""
    made = PROBLEMS["ridge"]()
    learner = learner_of(made, execution=execution)
    learner.backward(made.tasks)
    held = [parameter.grad for parameter in learner.model.parameters()]
    once = flat_gradient(learner.model).clone()
    learner.backward(made.tasks)
    assert all(parameter.grad is grad for parameter, grad in zip(learner.model.parameters(), held, strict=True))
    assert distance(flat_gradient(learner.model), 2 * once) < 1e-12


def test_a_cycle_of_ragged_tasks_comes_back_in_order() -> None:
    """Shapes a, b, a, c, b: stacked as (0, 2), (1, 4), (3), which is no swap of pairs."""
    tasks = [mn.tasks.sinusoid(1, shots=shots, first=i) for i, shots in enumerate((4, 6, 4, 5, 6))]
    singles = [mn.Tasks(*(mn.Batch(*(x[0] for x in batch)) for batch in task)) for task in tasks]
    torch.manual_seed(0)
    learner = mn.MetaLearner(torch.nn.Linear(1, 1), mn.metrics.squared_error, prox=1.0, solver=mn.Nesterov(3))
    together = learner.evaluate(singles).values
    alone = torch.cat([learner.evaluate(task).values for task in tasks])
    torch.testing.assert_close(together, alone)


def test_many_parameters_are_solved_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    made = PROBLEMS["ridge"]()
    assert learner_of(made).execution.name == "vectorized"
    number = sum(parameter.numel() for parameter in made.make().parameters())
    monkeypatch.setattr("metanudge.choosing.LARGE", number - 1)
    assert learner_of(made).execution.name == "in_place"
    monkeypatch.setattr("metanudge.choosing.LARGE", number)
    assert learner_of(made).execution.name == "vectorized"


class HalfStep:
    """A user's solver: plain descent, no dataclass, not registered."""

    steps, needs, differentiable = 3, frozenset(), True

    def plan(self, energy: object, start: dict) -> None: ...

    def init(self, energy: object, start: dict, plan: None) -> dict:
        return start

    def step(self, energy: object, plan: None, state: dict, index: int, decision: None) -> tuple:
        gradient = energy.gradient(state, index)
        return {name: leaf - 0.05 * gradient[name] for name, leaf in state.items()}, None

    def settle(self, schedule: object, steps: int) -> object:
        return schedule._replace(decisions=[None] * steps)

    def point(self, state: dict) -> dict:
        return state

    def finished(self, state: dict) -> bool:
        return False


class Twice:
    """A user's estimator: two times FOMAML, not registered."""

    needs = frozenset()

    def __call__(self, problem: object, solver: object) -> object:
        estimate = mn.FOMAML()(problem, solver)
        return estimate._replace(gradient={name: 2 * leaf for name, leaf in estimate.gradient.items()})


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_parts_of_the_users_own_need_no_registration(execution: str) -> None:
    made = PROBLEMS["logistic"]()
    mine = learner_of(made, solver=HalfStep(), estimator=Twice(), execution=execution)
    mine.backward(made.tasks)
    known = learner_of(made, solver=mn.GradientDescent(3, lr=0.05), estimator=mn.FOMAML(), execution=execution)
    known.backward(made.tasks)
    assert distance(flat_gradient(mine.model), 2 * flat_gradient(known.model)) < 1e-12


def test_a_number_that_is_none_is_refused_when_it_is_set() -> None:
    learner = learner_of(PROBLEMS["ridge"]())
    for name, value in (("prox", "a"), ("prox", -1.0), ("sharpness_radius", None)):
        before = getattr(learner, name)
        with pytest.raises(mn.SettingsError, match=f"{name} must be a finite number"):
            setattr(learner, name, value)
        assert getattr(learner, name) == before
    learner.prox = 2
    assert "prox=2" in repr(learner)
