"""What new users of the README ran into."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import MethodType

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import metanudge as mn


def words(number: int = 2) -> mn.Tasks:
    g = torch.Generator().manual_seed(1)
    return mn.Tasks(
        *(
            mn.Batch(torch.randint(6, (number, 5), generator=g), torch.randint(3, (number, 5), generator=g))
            for _ in range(2)
        )
    )


def table(**settings: object) -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(nn.Embedding(6, 4, **settings), nn.Linear(4, 3))


@pytest.mark.parametrize("settings", [{"sparse": True}, {"max_norm": 1.0}], ids=str)
def test_embeddings_that_vmap_can_not_run_go_in_place(settings: dict[str, object]) -> None:
    learner = mn.MetaLearner(table(**settings), mn.metrics.cross_entropy, solver=mn.GradientDescent(3, lr=0.1))
    assert learner.execution.name == "in_place"
    assert learner.backward(words()).dropped_tasks == 0
    assert mn.MetaLearner(table(), mn.metrics.cross_entropy).execution.name == "vectorized"


def test_sparse_gradients_in_a_stack_are_told() -> None:
    learner = mn.MetaLearner(table(sparse=True), mn.metrics.cross_entropy, execution="vectorized")
    with pytest.raises(mn.LossError, match=r'sparse=True.*execution="in_place"'):
        learner.backward(words())


def test_a_sparse_gradient_that_is_there_is_added_to() -> None:
    found = []
    for before in (True, False):
        model = table(sparse=True)
        if before:
            mn.metrics.cross_entropy(model, mn.Batch(*(leaf[0] for leaf in words().support))).backward()
        first = [torch.zeros(1) if p.grad is None else p.grad.to_dense().clone() for p in model.parameters()]
        learner = mn.MetaLearner(model, mn.metrics.cross_entropy, solver=mn.GradientDescent(3, lr=0.1))
        torch.manual_seed(3)
        learner.backward(words())
        found.append([p.grad - more for p, more in zip(model.parameters(), first, strict=True)])
    for added, alone in zip(*found, strict=True):
        torch.testing.assert_close(added, alone, rtol=1e-4, atol=1e-6)


def test_tasks_and_batches_move() -> None:
    tasks = mn.Tasks(mn.Batch({"ids": torch.ones(2, 3)}, torch.zeros(2, 3)), mn.Batch(torch.ones(2, 3), None))
    moved = tasks.to("meta")
    assert isinstance(moved, mn.Tasks)
    assert isinstance(moved.support, mn.Batch)
    assert moved.support.inputs["ids"].device.type == moved.query.inputs.device.type == "meta"
    assert tasks.query.inputs.device.type == "cpu"
    assert tasks.query.to(torch.device("meta")).targets is None
    with pytest.raises(mn.TasksError, match=r'tasks\.to\("cpu"\)'):
        mn.MetaLearner(nn.Linear(3, 1), mn.metrics.squared_error).backward(moved)


def test_tasks_are_shown_without_their_numbers() -> None:
    tasks = mn.Tasks(mn.Batch({"ids": torch.ones(2, 3)}, torch.zeros(2, 3)), mn.Batch(torch.ones(2).long(), 7))
    assert repr(tasks) == (
        "Tasks(support=Batch(inputs={'ids': float32 [2, 3]}, targets=float32 [2, 3]), "
        "query=Batch(inputs=int64 [2], targets=7))"
    )
    assert "on meta" in repr(tasks.to("meta"))


def test_minibatches_of_pairs_are_told_how() -> None:
    x, y = torch.randn(8, 3), torch.randn(8, 1)
    loader = DataLoader(TensorDataset(x, y), batch_size=4)
    learner = mn.MetaLearner(
        nn.Linear(3, 1), mn.metrics.squared_error, solver=mn.GradientDescent(3, lr=0.1), execution="in_place"
    )
    query = mn.Batch(x, y)
    with pytest.raises(mn.TasksError, match=r"mn\.Batch\(x, y\) for x, y in loader"):
        learner.backward([mn.Tasks(mn.Minibatches(loader), query)])
    support = mn.Minibatches(mn.Batch(x, y) for x, y in loader)
    assert learner.backward([mn.Tasks(support, query)]).dropped_tasks == 0
    with pytest.raises(mn.TasksError, match=r"mn\.Minibatches"):
        learner.backward([mn.Tasks(loader, query)])


def test_a_dict_of_tasks_is_told_what_to_give() -> None:
    learner = mn.MetaLearner(nn.Linear(3, 1), mn.metrics.squared_error)
    with pytest.raises(mn.TasksError, match=r"got dict; give mn\.Tasks\(support="):
        learner.backward({"support": 1, "query": 2})


def test_labels_that_are_words_are_told() -> None:
    animals = [(torch.randn(3), "cat" if place % 2 else "dog") for place in range(16)]
    with pytest.raises(mn.SettingsError, match="got strings; number them"):
        mn.tasks.few_shot(animals, ways=2, shots=2, queries=2)


def value(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # torch._inductor imports torch.jit
@pytest.mark.parametrize("compiled", [True, False])
def test_a_compiled_model_is_saved_for_a_plain_one_and_back(compiled: bool, tmp_path: Path) -> None:
    one, other = table(), torch.compile(table())
    saved, loaded = (other, one) if compiled else (one, other)
    with torch.no_grad():
        for parameter in saved.parameters():
            parameter.add_(1)
    assert not torch.equal(value(saved), value(loaded))
    mn.MetaLearner(saved, mn.metrics.cross_entropy, adapt_only="1").save_pretrained(tmp_path)
    again = mn.load_pretrained(tmp_path, loaded, mn.metrics.cross_entropy)
    assert torch.equal(value(saved), value(again.model))


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_names_in_a_compiled_model_are_those_of_the_model() -> None:
    learner = mn.MetaLearner(torch.compile(table()), mn.metrics.cross_entropy, adapt_only="1")
    assert learner._selection().adapted == ("_orig_mod.1.weight", "_orig_mod.1.bias")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_an_optimizer_that_would_step_narrow_parameters_is_told(dtype: torch.dtype) -> None:
    solver = mn.TorchOptimizer(lambda parameters: torch.optim.SGD(parameters, lr=0.1), 2)
    model = nn.Linear(3, 1).to(dtype)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        mn.MetaLearner(model, mn.metrics.squared_error, solver=solver)
        mn.MetaLearner(model, mn.metrics.squared_error, solver=mn.Nesterov(2))
    assert len(told) == (dtype == torch.bfloat16)
    assert all("torch.autocast" in str(one.message) for one in told)


# Threads.


def line() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1))


def sinusoids(number: int) -> list[mn.Tasks]:
    return mn.tasks.episodes(mn.tasks.sinusoid).take(number)


@pytest.mark.parametrize("execution", ["vectorized", "in_place"])
def test_threads_take_turns(execution: str) -> None:
    learner = mn.MetaLearner(line(), mn.metrics.squared_error, execution=execution, solver=mn.Nesterov(4))
    supports = [task.support for task in sinusoids(6)]
    alone = [value(learner.adapt(support)) for support in supports]
    with ThreadPoolExecutor(3) as threads:
        together = [value(adapted) for adapted in threads.map(learner.adapt, supports)]
    assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))
    assert type(learner.model[0].weight) is nn.Parameter
    assert all(parameter.requires_grad for parameter in learner.model.parameters())


# Nudged solves that go astray, and losses that are not finite.


def test_a_nudged_solve_that_goes_astray_is_left_out() -> None:
    """The support loss is -h/2 φ² at θ = 0, where the free solve stays; a nudged one leaves it for good if h > λ."""

    def loss(model: nn.Module, batch: mn.Batch) -> Tensor:
        (phi,) = model(torch.eye(1, dtype=torch.float64))[0]
        bend, push = batch.targets[0]
        return bend / 2 * phi.square() + push * phi

    model = nn.Linear(1, 1, bias=False).double()
    nn.init.zeros_(model.weight)
    bends = torch.tensor([[[1.0, 0.0]], [[-3.0, 0.0]]], dtype=torch.float64)
    pushes = torch.tensor([[[0.0, 1.0]], [[0.0, 1.0]]], dtype=torch.float64)
    tasks = mn.Tasks(*(mn.Batch(torch.zeros(2, 1, 1), targets) for targets in (bends, pushes)))
    estimator = mn.FOBMAML(steps=80, certify=False)
    learner = mn.MetaLearner(model, loss, solver=mn.GradientDescent(80, lr=0.2), estimator=estimator)
    with pytest.warns(mn.NonFiniteWarning, match=r"1 of 2 tasks diverged.*task 1;"):
        step = learner.backward(tasks)
    assert step.dropped_tasks == 1
    assert float(model.weight.grad) == pytest.approx(1 / (1 + 1.0), rel=1e-6)  # λ (h + λ)⁻¹ q of the other


def masked(model: nn.Module, batch: mn.Batch) -> Tensor:
    valid = batch.targets["valid"]
    return ((model(batch.inputs) - batch.targets["y"]).square() * valid).sum() / valid.sum()


def padded(valid: Tensor) -> mn.Tasks:
    (task,) = sinusoids(1)
    return mn.Tasks(*(mn.Batch(batch.inputs, {"y": batch.targets, "valid": valid}) for batch in task))


def test_a_loss_that_is_nan_from_the_start_is_told_as_that() -> None:
    learner, nothing = mn.MetaLearner(line(), masked), padded(torch.zeros(10, 1))
    with pytest.raises(mn.NonFiniteError, match=r"task 0;.*at the initialisation already"):
        learner.backward([nothing])
    with pytest.raises(mn.NonFiniteError, match="at the initialisation already"):
        learner.adapt(nothing.support)


@pytest.mark.parametrize("execution", ["vectorized", "in_place"])
def test_adapt_tells_of_a_loss_that_it_raised(execution: str) -> None:
    (task,) = sinusoids(1)
    solver = mn.GradientDescent(steps=5, lr=3.0)
    learner = mn.MetaLearner(line(), mn.metrics.squared_error, solver=solver, execution=execution)
    with pytest.warns(UserWarning, match=r"adaptation raised the support loss from .*smaller steps \(lr, now 3\)"):
        learner.adapt(task.support)
    mn.MetaLearner(line(), mn.metrics.squared_error, execution=execution).adapt(task.support)  # and here of nothing


def test_evaluate_names_tasks_without_a_score() -> None:
    stack = mn.tasks.sinusoid(4)
    stack.support.inputs[2, 0] = float("nan")
    learner = mn.MetaLearner(line(), mn.metrics.squared_error)
    with pytest.warns(mn.NonFiniteWarning, match=r"query loss of 1 of 4 tasks \(task 2;"):
        found = learner.evaluate(stack)
    assert found.values[:, -1].isfinite().tolist() == [True, True, False, True]
    learner.evaluate(stack)  # once is enough


# microbatch.


def half_valid() -> Tensor:
    return torch.tensor([[1.0]] * 6 + [[0.0]] * 4)


def test_microbatch_warns_of_a_masked_mean() -> None:
    learner = mn.MetaLearner(line(), masked, execution="in_place", microbatch=5, solver=mn.GradientDescent(2, lr=0.1))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(2):
            learner.backward([padded(half_valid())])
    said = [str(one.message) for one in told if "no mean over the examples" in str(one.message)]
    assert [text.split()[1] for text in said] == ["support", "query"]


def test_microbatch_takes_a_masked_mean_of_equal_weights() -> None:
    learner = mn.MetaLearner(line(), masked, execution="in_place", microbatch=4, solver=mn.Nesterov(8))
    learner.backward([padded(torch.full((10, 1), 0.5))])


# fit.


def hits(model: nn.Module, batch: mn.Batch) -> Tensor:
    return ((model(batch.inputs) - batch.targets).abs() < 1).float().mean()


def trained(**more: object) -> mn.Fit:
    model = line()
    learner = mn.MetaLearner(model, mn.metrics.squared_error, solver=mn.Nesterov(4))
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    given = {"tasks": mn.tasks.episodes(mn.tasks.sinusoid), "steps": 1, "tasks_per_step": 2, "progress": False} | more
    return mn.fit(learner, optimizer, **given)


def test_which_is_better_has_to_be_said_of_a_metric_of_ones_own() -> None:
    validation = mn.tasks.sinusoid(2, seed=1)
    with pytest.raises(mn.SettingsError, match=r'of hits, a metric of your own.*better="larger"'):
        trained(validation=validation, metric=hits)
    assert trained(validation=validation, metric=hits, better="larger").best_step == 1
    assert trained(validation=validation, metric=mn.metrics.squared_error).best_step == 1


def test_a_scheduler_of_another_optimizer_is_refused() -> None:
    other = torch.optim.Adam(line().parameters(), 1e-3)
    with pytest.raises(mn.SettingsError, match=r"StepLR, was made for another optimizer.*an? Adam"):
        trained(scheduler=torch.optim.lr_scheduler.StepLR(other, 1))


def test_a_dataset_of_images_is_no_dataset_of_tasks() -> None:
    images = TensorDataset(torch.randn(20, 1), torch.randint(2, (20,)))
    with pytest.raises(mn.TasksError, match=r"first item of this TensorDataset is tuple.*few_shot"):
        trained(tasks=images)


# Messages.


def test_an_empty_task_of_a_list_is_named() -> None:
    tasks = sinusoids(3)
    tasks[1] = tasks[1]._replace(support=mn.Batch(torch.zeros(0, 1), torch.zeros(0, 1)))
    with pytest.raises(mn.TasksError, match=r"support batch of task 1 .* its shape is \(0, 1\)"):
        mn.MetaLearner(line(), mn.metrics.squared_error).backward(tasks)


@pytest.mark.parametrize("kind", [torch.uint8, torch.float64])
@pytest.mark.parametrize("execution", ["vectorized", "in_place"])
def test_images_of_another_dtype_are_told(kind: torch.dtype, execution: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(2 * 36, 2))
    batch = mn.Batch(torch.zeros(4, 1, 8, 8, dtype=kind), torch.tensor([0, 1, 0, 1]))
    learner = mn.MetaLearner(model, mn.metrics.cross_entropy, execution=execution)
    with pytest.raises(RuntimeError) as told:
        learner.backward([mn.Tasks(batch, batch)])
    assert f"inputs {str(kind).removeprefix('torch.')} [4, 1, 8, 8]" in told.value.__notes__[0]


def test_outputs_that_are_no_tensor_are_told() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = line()

        def forward(self, x: Tensor) -> tuple[Tensor, None]:
            return self.body(x), None

    with pytest.raises(mn.LossError, match=r"the model gave tuple.*one of your own"):
        mn.MetaLearner(Two(), mn.metrics.squared_error).backward(sinusoids(2))


def test_a_batch_is_no_task() -> None:
    (task,) = sinusoids(1)
    with pytest.raises(mn.TasksError, match=r"got Batch, one set of examples"):
        mn.MetaLearner(line(), mn.metrics.squared_error).backward(task.support)


def test_slices_of_episodes_are_refused() -> None:
    with pytest.raises(TypeError, match="take"):
        mn.tasks.episodes(mn.tasks.sinusoid)[0:4]


@pytest.mark.parametrize("changed", [True, False])
def test_a_folder_of_another_model_is_told(changed: bool, tmp_path: Path) -> None:
    """A loop over seeds with one folder would give one training several times."""

    def fitted(model: nn.Module, steps: int) -> mn.Fit:
        learner = mn.MetaLearner(model, mn.metrics.squared_error, solver=mn.Nesterov(4))
        optimizer = torch.optim.Adam(model.parameters(), 1e-3)
        tasks = mn.tasks.episodes(mn.tasks.sinusoid)
        return mn.fit(learner, optimizer, tasks, steps=steps, tasks_per_step=2, out=tmp_path, progress=False)

    first = line()
    fitted(first, 1)
    fitted(first, 2)  # as it ended
    again = line()
    if changed:
        nn.init.zeros_(again[0].bias)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert len(fitted(again, 3).history) == 3
    assert ["began with other parameters" in str(one.message) for one in told] == [True] * changed


# adapt.


def calls_itself(model: nn.Sequential) -> None:
    forward = model[2].forward
    model[2].forward = lambda x: forward(x)


def wraps_itself(model: nn.Sequential) -> None:
    forward = model[2].forward
    model[2].forward = MethodType(lambda _, x: forward(x), model[2])


def compiles_its_forward(model: nn.Sequential) -> None:
    model.forward = torch.compile(model.forward, backend="eager")


def points() -> mn.Batch:
    x = torch.linspace(-1, 1, 10).reshape(5, 2)
    return mn.Batch(x, x.sum(1, keepdim=True))


def perceptron() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1))


def hides_itself(model: nn.Sequential) -> None:
    holder = [partial(nn.Linear.forward, model[2])]
    model[2].forward = lambda x: holder[0](x)


@pytest.mark.parametrize("change", [calls_itself, wraps_itself, hides_itself, compiles_its_forward])
def test_a_copy_that_would_call_the_model_is_refused(change: Callable[[nn.Module], None]) -> None:
    model = perceptron()
    change(model)
    learner = mn.MetaLearner(model, mn.metrics.squared_error, prox=0.01)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(mn.SettingsError, match=r"the copy goes on using .* of the original"):
        learner.adapt(points())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert learner.evaluate([mn.Tasks(points(), points())]).mean < 0.1  # which makes no copy


def partly(model: nn.Sequential) -> None:
    model[2].forward = partial(nn.Linear.forward, model[2])


def reads_a_scale(model: nn.Sequential) -> None:
    model.scale = 2.0
    model[2].forward = MethodType(lambda self, x, owner=model: owner.scale * nn.Linear.forward(self, x), model[2])


def of_no_module(model: nn.Sequential) -> None:
    model[1].forward = lambda x: x.tanh()


def with_a_method(model: nn.Sequential) -> None:
    model[2].forward = MethodType(lambda self, x: nn.Linear.forward(self, x), model[2])


@pytest.mark.parametrize(
    "change", [partly, reads_a_scale, of_no_module, with_a_method, lambda m: m.compile(backend="eager")]
)
def test_other_changes_of_a_forward_method_are_copied(change: Callable[[nn.Module], None]) -> None:
    model = perceptron()
    change(model)
    learner = mn.MetaLearner(model, mn.metrics.squared_error, prox=0.01)
    with torch.no_grad():
        adapted = mn.metrics.squared_error(learner.adapt(points()), points())
    assert float(adapted) == pytest.approx(learner.evaluate([mn.Tasks(points(), points())]).mean, rel=1e-5)


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_adapt_tells_what_can_not_be_copied() -> None:
    model = nn.Sequential(nn.utils.weight_norm(nn.Linear(2, 1)))
    learner = mn.MetaLearner(model, mn.metrics.squared_error)
    learner.backward([mn.Tasks(points(), points())])
    with pytest.raises(mn.SettingsError, match=r"copy\.deepcopy.*a tensor with a graph.*parametrizations"):
        learner.adapt(points())


@pytest.mark.parametrize("share", [True, False])
def test_an_adapted_module_has_frozen_parameters_of_its_own(share: bool) -> None:
    model = perceptron()
    model[0].requires_grad_(False)
    model.append(nn.Linear(1, 1)).append(model[3])  # tied
    model[3].requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    adapted = mn.MetaLearner(model, mn.metrics.squared_error).adapt(points(), share_frozen=share)
    assert (adapted[0].weight.data_ptr() == model[0].weight.data_ptr()) == share
    assert adapted[3].weight is adapted[4].weight
    assert [p.requires_grad for p in adapted.parameters()] == [p.requires_grad for p in model.parameters()]
    adapted.requires_grad_(True)
    adapted.to(torch.bfloat16)
    assert not model[0].weight.requires_grad
    if not share:
        adapted[3].weight.data.zero_()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# What is compiled.


def test_auto_sees_what_is_compiled() -> None:
    for change in (lambda model: model.compile(backend="eager"), compiles_its_forward):
        model = perceptron()
        change(model)
        assert mn.MetaLearner(model, mn.metrics.squared_error).execution.name == "in_place"
        assert mn.MetaLearner(model, mn.metrics.squared_error, estimator=mn.MAML()).execution.name == "vectorized"
    model = perceptron()
    model[1].forward = torch.compiler.disable(model[1].forward)
    assert mn.MetaLearner(model, mn.metrics.squared_error).execution.name == "vectorized"


# Losses.


def test_accuracy_leaves_padding_out() -> None:
    logits = torch.eye(4)
    targets = torch.tensor([0, 2, -100, -100])
    assert float(mn.metrics.accuracy(nn.Identity(), mn.Batch(logits, targets))) == 0.5
    assert mn.metrics.accuracy(nn.Identity(), mn.Batch(logits, torch.full((4,), -100))).isnan()
    many = torch.nn.functional.one_hot(torch.full((4,), 156), 200).float()  # which is -100 in eight bits
    assert float(mn.metrics.accuracy(nn.Identity(), mn.Batch(many, torch.full((4,), 156, dtype=torch.uint8)))) == 1.0


def test_microbatch_warns_of_a_masked_mean_where_all_examples_have_one_loss() -> None:
    """As of a language model that has learnt nothing yet, where sequences weigh by the root of their length."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(23, 16), nn.Linear(16, 23))
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0, 0.02)
    tokens = torch.randint(23, (1, 4, 16))
    whole, padded_ = tokens.roll(-1, -1), tokens.roll(-1, -1)
    for row in range(4):
        padded_[0, row, 4 * row + 4 :] = -100

    def weighed(model: nn.Module, batch: mn.Batch, power: float) -> Tensor:
        losses = nn.functional.cross_entropy(model(batch.inputs).mT, batch.targets, reduction="none")
        lengths = (batch.targets != -100).sum(1)
        return (losses.sum(1) / lengths * lengths**power).sum() / (lengths**power).sum()

    for power, targets, told in (
        (0.5, padded_, ["support", "query"]),
        (0.5, whole, []),
        (0.0, padded_, []),  # every sequence, or every token, weighs as much as any other
        (1.0, padded_, []),
    ):
        loss = partial(weighed, power=power)
        learner = mn.MetaLearner(model, loss, solver=mn.GradientDescent(2, lr=0.1), microbatch=2)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            learner.backward([mn.Tasks(*(mn.Batch(tokens[0], targets[0]),) * 2)])
        assert [str(one.message).split()[1] for one in said if "% off" in str(one.message)] == told
        model.zero_grad()


def perturbed(model: nn.Module, batch: mn.Batch, slope: Tensor) -> Tensor:
    return mn.metrics.squared_error(model, batch._replace(inputs=batch.inputs + 0.3 * slope.sign()))


def adversarial(model: nn.Module, batch: mn.Batch) -> Tensor:
    inputs = batch.inputs.detach().clone().requires_grad_()
    mn.metrics.squared_error(model, batch._replace(inputs=inputs)).backward()
    model.zero_grad()
    return perturbed(model, batch, inputs.grad)


def adversarial_by_grad(model: nn.Module, batch: mn.Batch) -> Tensor:
    inputs = batch.inputs.detach().clone().requires_grad_()
    (slope,) = torch.autograd.grad(mn.metrics.squared_error(model, batch._replace(inputs=inputs)), inputs)
    return perturbed(model, batch, slope)


def twice(model: nn.Module, batch: mn.Batch) -> Tensor:
    value = mn.metrics.squared_error(model, batch)
    value.backward(retain_graph=True)
    return value


@pytest.mark.parametrize("microbatch", [None, 5])
@pytest.mark.parametrize("nudge", ["linear", "full"])
@pytest.mark.parametrize(
    ("loss", "plain"),
    [(adversarial, adversarial_by_grad), (twice, mn.metrics.squared_error)],
    ids=["adversarial", "twice"],
)
def test_what_a_loss_adds_to_gradients_itself_is_put_aside(
    loss: object, plain: object, nudge: str, microbatch: int | None
) -> None:
    found = []
    for function in (loss, plain):
        model = perceptron().double()
        data = mn.Tasks(
            *(mn.Batch(torch.sin(torch.arange(20.0).double()).reshape(10, 2), points().targets[[0] * 10]),) * 2
        )
        data = mn.Tasks(*(batch._replace(targets=batch.targets.double()) for batch in data))
        learner = mn.MetaLearner(
            model,
            function,
            execution="in_place",
            microbatch=microbatch,
            estimator=mn.FOBMAML(nudge=nudge, nu=0.01),
            solver=mn.GradientDescent(4, lr=0.1),
        )
        for _ in range(2):  # the second one knows the loss
            step = learner.backward([data])
        found.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    assert step.dropped_tasks == 0
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)


def test_writing_into_what_tasks_share_is_told() -> None:
    def loss(model: nn.Module, batch: mn.Batch) -> Tensor:
        return torch.zeros(5, 1).index_add_(0, torch.arange(5), model(batch.inputs)).square().mean()

    with pytest.raises(mn.LossError, match=r"a tensor that they share.*index_add.*new_zeros"):
        mn.MetaLearner(nn.Linear(2, 1), loss, execution="vectorized").backward([mn.Tasks(points(), points())])


def test_an_embedding_with_a_largest_norm_is_not_for_stacks() -> None:
    with pytest.raises(mn.SettingsError, match=r"max_norm.*execution='in_place'"):
        mn.MetaLearner(table(max_norm=1.0), mn.metrics.cross_entropy, execution="vectorized")


def test_names_in_a_batch_are_told() -> None:
    batch = mn.Batch({"x": points().inputs, "language": "fr"}, points().targets)
    with pytest.raises(mn.TasksError, match="found str: 'fr'; keep names beside the tasks"):
        mn.MetaLearner(line(), mn.metrics.squared_error).backward([mn.Tasks(batch, batch)])


# Weight normalisation, of which torch has a wrong second derivative.


class Compiled(nn.Module):
    """A method of it is compiled as it is made."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.norm = perceptron(), nn.BatchNorm1d(1)
        self._run = torch.compile(self.run, backend="eager")

    def run(self, x: Tensor) -> Tensor:
        return self.norm(self.body(x))

    def forward(self, x: Tensor) -> Tensor:
        return self._run(x)


def test_a_method_that_is_compiled_is_bound_to_the_original() -> None:
    model = Compiled()
    learner = mn.MetaLearner(
        model, mn.metrics.squared_error, prox=0.01, batch_norm="transductive", execution="in_place"
    )
    with pytest.raises(mn.SettingsError, match="a method that was compiled"):
        learner.adapt(points())
    assert model.norm.num_batches_tracked == 0


class Normed(nn.Linear):
    """The parametrization by hand."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__(3, 4)
        scale, direction = layer.parametrizations.weight.original0, layer.parametrizations.weight.original1
        del self.weight
        self.scale, self.direction = nn.Parameter(scale.detach().clone()), nn.Parameter(direction.detach().clone())
        self.bias = nn.Parameter(layer.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        weight = self.scale * self.direction / self.direction.norm(dim=1, keepdim=True)
        return nn.functional.linear(x, weight, self.bias)


def test_weight_norm_in_a_layer_that_is_not_adapted_is_no_matter() -> None:
    found = []
    for body in normed()[:2]:
        torch.manual_seed(3)
        model = nn.Sequential(*body, nn.Linear(4, 4).double())
        settings = {"prox": 3.0, "solver": mn.Nesterov(5), "estimator": mn.MAML(), "adapt_only": "2"}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "There is a performance drop")
            mn.MetaLearner(model, mn.metrics.squared_error, **settings).backward(normed()[2])
        found.append({name: gradient for name, gradient in gradients(model).items() if gradient is not None})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], rtol=1e-9, atol=1e-12)


def normed() -> tuple[nn.Module, nn.Module, mn.Tasks]:
    torch.manual_seed(1)
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)).double()
    data = mn.Tasks(*(mn.Batch(torch.randn(2, 5, 3).double(), torch.randn(2, 5, 4).double()) for _ in range(2)))
    return nn.Sequential(layer, nn.Tanh()), nn.Sequential(Normed(layer).double(), nn.Tanh()), data


def gradients(model: nn.Module) -> dict[str, Tensor]:
    names = {"0.parametrizations.weight.original0": "0.scale", "0.parametrizations.weight.original1": "0.direction"}
    return {names.get(name, name): parameter.grad for name, parameter in model.named_parameters()}


SLOW = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # torch's own, under vmap


@SLOW
@pytest.mark.usefixtures("yours_alone")
def test_weight_norm_has_its_meta_gradient_from_first_derivatives() -> None:
    fused, by_hand, data = normed()
    settings = {"prox": 10.0, "solver": mn.Nesterov(40)}
    mn.MetaLearner(by_hand, mn.metrics.squared_error, estimator=mn.IMAML(), **settings).backward(data)
    for estimator in (mn.FOBMAML(), mn.HFMAML(), mn.IMAML(products="two_gradient")):
        fused.zero_grad()
        mn.MetaLearner(fused, mn.metrics.squared_error, estimator=estimator, **settings).backward(data)
        for name, gradient in gradients(fused).items():
            torch.testing.assert_close(gradient, gradients(by_hand)[name], rtol=1e-6, atol=1e-8)
    found = mn.check(mn.MetaLearner(fused, mn.metrics.squared_error, **settings), data)
    assert found.verdict.startswith("Good")
    assert found.rows[0].relative_error < 1e-6


@SLOW
@pytest.mark.parametrize("estimator", [mn.MAML(), mn.MAML(checkpoint=True), mn.IMAML(), mn.Tangent()], ids=str)
def test_a_wrong_second_derivative_of_torch_is_refused(estimator: object) -> None:
    """Only where it is wrong: a torch in which it is right is not refused, but compared."""
    fused, by_hand, data = normed()
    settings = {"prox": 3.0, "solver": mn.Nesterov(20), "estimator": estimator}
    mn.MetaLearner(by_hand, mn.metrics.squared_error, **settings).backward(data)
    learner = mn.MetaLearner(fused, mn.metrics.squared_error, **settings)
    leaves = [leaf.detach().clone().requires_grad_() for leaf in list(fused[0].parametrizations.parameters())[::-1]]
    if torch.autograd.gradgradcheck(lambda v, g: torch._weight_norm(v, g, 0), leaves, raise_exception=False):
        learner.backward(data)
        for name, gradient in gradients(fused).items():
            torch.testing.assert_close(gradient, gradients(by_hand)[name], rtol=1e-6, atol=1e-8)
        return
    with pytest.raises(mn.LossError, match=r"Use FOBMAML.*weight_norm"):
        learner.backward(data)
    assert all(parameter.grad is None for parameter in fused.parameters())


@pytest.mark.parametrize(("prox", "estimator"), [(1.0, mn.FOBMAML()), (0.0, mn.FOMAML())])
def test_a_query_set_of_padding_is_not_taken_for_divergence(prox: float, estimator: object) -> None:
    stack = mn.Tasks(*(mn.Batch(torch.randn(3, 4, 2), torch.randint(3, (3, 4))) for _ in range(2)))
    stack.query.targets[1] = -100
    learner = mn.MetaLearner(nn.Linear(2, 3), mn.metrics.cross_entropy, prox=prox, estimator=estimator)
    with pytest.warns(mn.NonFiniteWarning) as told:
        assert learner.backward(stack).dropped_tasks == 1
    (said,) = [str(one.message) for one in told]
    assert "in 1 of 3 tasks (task 1; counted from 0) the query loss alone is not finite: look for a division" in said
    assert "prox" not in said


def test_a_misspelt_input_is_told() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(2, 1)

        def forward(self, x, lengths):
            return self.head(x) / lengths

    inputs = {"x": torch.ones(3, 2), "lenghts": torch.ones(3, 1)}
    with pytest.raises(TypeError) as told:
        mn.metrics.squared_error(Counts(), mn.Batch(inputs, torch.ones(3, 1)))
    note = "as its forward() does not take x, lenghts: missing a required argument: 'lengths'."
    assert note in "".join(told.value.__notes__)


def test_a_metric_of_numpys_is_told_what_to_return() -> None:
    learner = mn.MetaLearner(nn.Linear(2, 1), mn.metrics.squared_error)
    tasks = [mn.Tasks(*[mn.Batch(torch.ones(3, 2), torch.ones(3, 1))] * 2)]
    with pytest.raises(mn.LossError, match=r"returned float64; a metric can return torch\.as_tensor"):
        learner.evaluate(tasks, lambda model, batch: np.float64(1.0))


def test_a_part_of_a_name_is_led_to_the_pattern() -> None:
    model = nn.ModuleDict({"base": nn.Linear(2, 2), "lora_A": nn.Linear(2, 1)})
    model["base"].requires_grad_(False)
    with pytest.raises(
        mn.SettingsError, match=r'did you mean "\*ora_A\*"\? Its trainable parameters are lora_A'
    ) as told:
        mn.MetaLearner(model, mn.metrics.squared_error, adapt_only="ora_A")
    assert "base" not in str(told.value)


def test_evaluate_scores_a_query_set_whole_whatever_the_microbatch() -> None:
    """A score of pieces would be another one, of a masked mean."""
    seen = []

    class Counting(nn.Linear):
        def forward(self, x):
            seen.append(len(x))
            return super().forward(x)

    torch.manual_seed(0)
    support = mn.Batch(torch.randn(10, 2).double(), torch.randn(10, 1).double())
    query = mn.Batch(torch.randn(10, 2).double(), torch.randn(10, 1).double())
    query.targets[4:6] = float("nan")
    model = Counting(2, 1).double()
    learner = mn.MetaLearner(model, mn.metrics.squared_error, execution="in_place", microbatch=4)
    whole = mn.MetaLearner(model, mn.metrics.squared_error, execution="in_place")
    for metric in (None, mn.metrics.squared_error, lambda model, batch: mn.metrics.squared_error(model, batch)):
        found = learner.evaluate([mn.Tasks(support, query)], metric).values
        assert set(seen) == {2, 4, 10}
        torch.testing.assert_close(found, whole.evaluate([mn.Tasks(support, query)], metric).values)
        seen.clear()


def test_take_of_what_is_no_stack_is_refused() -> None:
    batch = mn.Batch(torch.ones(3, 2), torch.ones(3, 1))
    for one in (
        mn.Tasks(mn.Minibatches([batch]), batch),
        mn.Tasks(batch, mn.Batch(torch.ones(2, 2), torch.ones(2, 1))),
    ):
        with pytest.raises(mn.TasksError, match="only a stack"):
            one.take(2)


@pytest.mark.parametrize("part", ["support", "query"])
@pytest.mark.parametrize(("prox", "estimator"), [(1.0, mn.FOBMAML()), (0.0, mn.FOMAML())])
def test_a_target_that_is_missing_is_named_where_the_loss_reads_it(part: str, prox: float, estimator: object) -> None:
    stack = mn.Tasks(*(mn.Batch(torch.randn(3, 4, 2), torch.randn(3, 4, 1)) for _ in range(2)))
    getattr(stack, part).targets[1, 2] = float("nan")
    own = mn.MetaLearner(
        nn.Linear(2, 1), lambda m, b: (m(b.inputs) - b.targets).square().mean(), prox=prox, estimator=estimator
    )
    with pytest.warns(mn.NonFiniteWarning, match=rf"task 1: {part} targets.*a loss has to leave out, as mn\.metrics"):
        assert own.backward(stack).dropped_tasks == 1
    ready = mn.MetaLearner(nn.Linear(2, 1), mn.metrics.squared_error, prox=prox, estimator=estimator)
    assert ready.backward(stack).dropped_tasks == 0
    if part == "support":
        with pytest.raises(mn.NonFiniteError, match=r"numbers in the support targets; mend these \(targets of NaN"):
            own.adapt(stack.unstack()[1].support)


# What may be set, and when.


def test_what_is_set_later_is_taken_as_when_a_learner_is_made() -> None:
    model = nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1))
    learner = mn.MetaLearner(model, mn.metrics.squared_error)
    learner.adapt_only = (name for name in ["2"])
    for _ in range(2):  # it is read at every step
        learner.backward(mn.tasks.sinusoid(2))
    assert learner.adapt_only == ("2",)
    learner.adapt_only = {"2", "0"}
    assert learner.adapt_only == ("0", "2")
    with pytest.warns(UserWarning, match="sharpness_radius=2 takes query gradients as far"):
        learner.sharpness_radius = 2


def test_a_warning_that_is_an_error_is_one_again() -> None:
    """The step it ended was not taken, and so nobody was told of it for good."""
    stack = mn.tasks.sinusoid(4)
    stack.support.inputs[2, 0] = float("nan")
    model = line()
    learner = mn.MetaLearner(model, mn.metrics.squared_error)
    with warnings.catch_warnings():
        warnings.simplefilter("error", mn.NonFiniteWarning)
        for _ in range(2):
            with pytest.raises(mn.NonFiniteWarning, match="task 2"):
                learner.backward(stack)
            assert all(parameter.grad is None for parameter in model.parameters())
    with pytest.warns(mn.NonFiniteWarning, match="task 2"):
        assert learner.backward(stack).dropped_tasks == 1
    assert learner.backward(stack).dropped_tasks == 1


# Science: derivatives in the loss, complex numbers.


@pytest.mark.parametrize("settings", [{"execution": "in_place"}, {"execution": "in_place", "microbatch": 2}], ids=str)
def test_inputs_that_ask_for_gradients_are_data(settings: dict[str, object]) -> None:
    """A residual u' + u, of inputs with requires_grad=True outside: the loss asks itself, whatever they were."""

    def residual(model: nn.Module, batch: mn.Batch) -> Tensor:
        inputs = batch.inputs.requires_grad_()
        u = model(inputs)
        (slope,) = torch.autograd.grad(u.sum(), inputs, create_graph=True)
        return (slope + u).square().mean()

    found = []
    for asks in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1))
        x = torch.linspace(0, 1, 6)[:, None].requires_grad_(asks)
        learner = mn.MetaLearner(model, residual, solver=mn.GradientDescent(3, lr=0.1), **settings)
        batch = mn.Batch(x, ())
        for _ in range(2):
            learner.backward([mn.Tasks(batch, batch)])
        assert x.grad is None
        assert x.requires_grad is asks
        found.append([*(p.grad for p in model.parameters()), *learner.adapt(batch).parameters()])
    torch.testing.assert_close(found[1], found[0])


def test_complex_targets_are_not_halved() -> None:
    batch = mn.Batch(*(torch.ones(3, 1, dtype=torch.complex64),) * 2)
    with pytest.raises(mn.LossError, match=r"got torch.complex64; take torch.view_as_real"):
        mn.metrics.squared_error(nn.Identity(), batch)


class Turned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.register_buffer("phase", torch.ones(1, dtype=torch.complex128))

    def forward(self, x: Tensor) -> Tensor:
        return (self.layer(x) * self.phase).real.float()


def test_numbers_that_can_not_be_saved_are_told_before_a_training(tmp_path: Path) -> None:
    model = Turned()
    learner = mn.MetaLearner(model, mn.metrics.squared_error, execution="in_place")
    told = r"phase is torch.complex128, which safetensors cannot hold"
    with pytest.raises(mn.SettingsError, match=told):
        learner.save_pretrained(tmp_path / "one")
    optimizer, tasks = torch.optim.Adam(model.parameters()), mn.tasks.episodes(mn.tasks.sinusoid)
    given = {"steps": 1, "tasks_per_step": 2, "progress": False, "out": tmp_path / "two"}
    with pytest.raises(mn.SettingsError, match=told):
        mn.fit(learner, optimizer, tasks, validation=mn.tasks.sinusoid(2), **given)
    assert list(tmp_path.iterdir()) == []
    mn.fit(learner, optimizer, tasks, **given)  # a checkpoint holds any
    again = Turned()
    with torch.no_grad():
        again.layer.weight.zero_()
    mn.fit(
        mn.MetaLearner(again, mn.metrics.squared_error, execution="in_place"),
        torch.optim.Adam(again.parameters()),
        tasks,
        **given | {"steps": 1},
        resume=False,
    )


def test_a_protocol_that_is_no_dict_is_told(tmp_path: Path) -> None:
    circular: dict[str, object] = {}
    circular["self"] = circular
    for wrong in ([1, 2], "x", circular):
        with pytest.raises(mn.SettingsError, match="cannot be written as JSON"):
            mn.MetaLearner(line(), mn.metrics.squared_error).save_pretrained(tmp_path, wrong)
    assert list(tmp_path.iterdir()) == []


def test_a_loader_as_validation_is_told_what_to_give() -> None:
    loader = DataLoader(mn.tasks.episodes(mn.tasks.sinusoid, number=4), collate_fn=mn.tasks.collate)
    with pytest.raises(mn.TasksError, match=r"got DataLoader; give its dataset, loader\.dataset"):
        trained(validation=loader)


def test_a_stack_is_told_from_a_task_by_a_learner_that_was_read(tmp_path: Path) -> None:
    learner, stack = mn.MetaLearner(line(), mn.metrics.squared_error), mn.tasks.sinusoid(4)
    learner.backward(stack)
    learner.save_pretrained(tmp_path)
    again = mn.load_pretrained(tmp_path, line(), mn.metrics.squared_error)
    with pytest.raises(mn.TasksError, match="looks like a stack of 4"):
        again.adapt(stack.support)
    again.adapt(stack.unstack()[0].support)


# HF-MAML.


def networks(kinks: bool) -> nn.Module:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for channels in (1, 8):
        layers.append(nn.Conv2d(channels, 8, 3, padding=1))
        layers += [nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)] if kinks else [nn.Tanh(), nn.AvgPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32, 5)).double()


@pytest.mark.parametrize(("kinks", "displacement"), [(True, None), (False, None), (True, 0.1)])
def test_differences_across_kinks_are_told_of(kinks: bool, displacement: float | None) -> None:
    targets = torch.arange(5).repeat_interleave(2).repeat(3, 1)
    tasks = mn.Tasks(*(mn.Batch(torch.randn(3, 10, 1, 8, 8).double(), targets) for _ in range(2)))
    estimator = mn.HFMAML(displacement=displacement)
    settings = {"prox": 2.0, "estimator": estimator, "batch_norm": "transductive" if kinks else None}
    learner = mn.MetaLearner(networks(kinks), mn.metrics.cross_entropy, **settings)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", mn.UnsolvedWarning)
        for _ in range(2):
            learner.backward(tasks)
    told = [str(one.message) for one in said if issubclass(one.category, mn.UnsolvedWarning)]
    assert len(told) == (kinks and displacement is None)
    assert all("With kinks on the way" in text and "HFMAML(displacement=0.1)" in text for text in told)
