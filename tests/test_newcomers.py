"""What new users of the README ran into."""

from __future__ import annotations

import warnings
from pathlib import Path

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
