"""Warm starts: fewer steps track the solution; the store forgets, resumes and refuses as it says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import metanudge as mn
from problems import PROBLEMS, distance

EXECUTIONS = ["vectorized", "in_place"]


def learner_of(store: mn.WarmStart | None, steps: int = 3, **settings: object) -> tuple[mn.MetaLearner, mn.Tasks]:
    made = PROBLEMS["logistic"]()
    settings = {"prox": made.prox, "solver": mn.Nesterov(steps), "warm_start": store, **settings}
    return mn.MetaLearner(made.make(), made.loss, **settings), made.tasks


def gradient(learner: mn.MetaLearner) -> Tensor:
    return torch.cat([parameter.grad.reshape(-1) for parameter in learner.model.parameters()])


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_a_few_steps_track_the_solution(execution: str) -> None:
    """Descend with 3 steps a visit: cold, the residual stays; warm, the estimate becomes exact as theta settles."""
    residuals, errors = {}, {}
    for name, store in {"warm": mn.WarmStart(), "cold": None}.items():
        learner, tasks = learner_of(store, execution=execution)
        extra = {} if store is None else {"indices": [5, 3, 9]}
        for _ in range(12):
            learner.model.zero_grad()
            step = learner.backward(tasks, **extra)
            with torch.no_grad():
                for parameter in learner.model.parameters():
                    parameter -= 0.02 * parameter.grad
        residuals[name] = step.residual
        learner.model.zero_grad()
        learner.backward(tasks, **extra)
        found = gradient(learner)
        theta = torch.cat([parameter.detach().reshape(-1) for parameter in learner.model.parameters()])
        errors[name] = distance(found, PROBLEMS["logistic"]().meta_gradient(theta))
    assert residuals["warm"] < 0.05 * residuals["cold"]
    assert errors["warm"] < 0.5 * errors["cold"]  # what is left is the nudged solves', which begin at this solution


def test_every_task_gets_its_own_solution_whatever_the_order_and_the_chunks() -> None:
    """Ragged tasks, chunks of one: what is kept under an index is that task's solution."""
    made = PROBLEMS["logistic"]()
    tasks = [mn.Tasks(*(mn.Batch(*(x[i] for x in b)) for b in made.tasks)) for i in range(3)]
    short = mn.Tasks(*(mn.Batch(*(x[:-2] for x in b)) for b in tasks[1]))
    given, indices = [tasks[0], short, tasks[2]], [7, 1, 4]
    store = mn.WarmStart()
    learner, _ = learner_of(store, steps=60, chunk_size=1)
    learner.backward(given, indices=indices)
    for task, index in zip(given, indices, strict=True):
        adapted = learner.adapt(task.support)
        expected = torch.cat([parameter.detach().reshape(-1) for parameter in adapted.parameters()])
        kept = store.get([index], torch.zeros(1, len(expected)).double())[0]
        assert distance(kept, expected) < 1e-8


def test_a_worse_start_is_not_taken() -> None:
    store = mn.WarmStart()
    learner, tasks = learner_of(store, steps=4)
    cold, _ = learner_of(None, steps=4)
    width = sum(parameter.numel() for parameter in learner.model.parameters())
    store.put([0, 1, 2], torch.full((3, width), 1e3).double())
    learner.backward(tasks, indices=[0, 1, 2])
    cold.backward(tasks)
    assert distance(gradient(learner), gradient(cold)) < 1e-12


def test_both_executions_agree() -> None:
    found = []
    for execution in EXECUTIONS:
        learner, tasks = learner_of(mn.WarmStart(), execution=execution)
        for _ in range(3):
            learner.model.zero_grad()
            learner.backward(tasks, indices=[0, 1, 2])
        found.append(gradient(learner))
    assert distance(*found) < 1e-9


def test_the_least_recently_used_is_forgotten() -> None:
    row = torch.arange(4.0).double()
    store = mn.WarmStart(limit_bytes=3 * 32)
    store.put([1, 2, 3], torch.stack([row, row + 1, row + 2]))
    store.get([1], torch.zeros(1, 4).double())
    store.put([4], (row + 3).unsqueeze(0))
    assert [index in store for index in (1, 2, 3, 4)] == [True, False, True, True]
    assert len(store) == 3
    default = torch.full((1, 4), -1.0).double()
    torch.testing.assert_close(store.get([4], default)[0], row + 3)
    torch.testing.assert_close(store.get([2], default), default)
    store.put([3], torch.full((1, 4), float("nan")).double())
    assert 3 not in store
    store.put([8], (row + 8).unsqueeze(0))
    torch.testing.assert_close(store.get([8, 1, 4], default.expand(3, -1)), torch.stack([row + 8, row, row + 3]))


def test_it_resumes_from_its_state(tmp_path: Path) -> None:
    straight, tasks = learner_of(mn.WarmStart())
    for _ in range(4):
        straight.model.zero_grad()
        straight.backward(tasks, indices=[0, 1, 2])
    first, _ = learner_of(mn.WarmStart())
    for _ in range(2):
        first.backward(tasks, indices=[0, 1, 2])
    torch.save(first.warm_start.state_dict(), tmp_path / "state.pt")
    store = mn.WarmStart()
    store.load_state_dict(torch.load(tmp_path / "state.pt"))
    second, _ = learner_of(store)
    for _ in range(2):
        second.model.zero_grad()
        second.backward(tasks, indices=[0, 1, 2])
    assert torch.equal(gradient(second), gradient(straight))


def test_it_lives_in_a_folder(tmp_path: Path) -> None:
    first, tasks = learner_of(mn.WarmStart(folder=tmp_path / "kept", limit_bytes=2**16))
    first.backward(tasks, indices=[0, 1, 2])
    first.warm_start.save()
    again = mn.WarmStart(folder=tmp_path / "kept")
    assert len(again) == 3
    width = sum(parameter.numel() for parameter in first.model.parameters())
    default = torch.zeros(3, width).double()
    assert torch.equal(again.get([0, 1, 2], default), first.warm_start.get([0, 1, 2], default))
    with pytest.raises(mn.SettingsError, match="another model"):
        again.get([0], torch.zeros(1, width + 1).double())
    (tmp_path / "kept" / "index.json").write_text("{")
    with pytest.raises(mn.SettingsError, match="no readable solutions"):
        mn.WarmStart(folder=tmp_path / "kept")


def test_what_it_refuses() -> None:
    learner, tasks = learner_of(mn.WarmStart())
    with pytest.raises(mn.SettingsError, match=r"give indices"):
        learner.backward(tasks)
    with pytest.raises(mn.SettingsError, match="every task once"):
        learner.backward(tasks, indices=[0, 1])
    with pytest.raises(mn.SettingsError, match="every task once"):
        learner.backward(tasks, indices=[0, 1, 1])
    assert all(parameter.grad is None for parameter in learner.model.parameters())
    plain, _ = learner_of(None)
    with pytest.raises(mn.SettingsError, match="give the learner a warm_start"):
        plain.backward(tasks, indices=[0, 1, 2])
    for estimator in (mn.MAML(), mn.HFMAML(), mn.FOBMAML(start="initialization")):
        with pytest.raises(mn.SettingsError, match="with a warm start solves begin elsewhere"):
            learner_of(mn.WarmStart(), estimator=estimator)
    for limit in (0, True, 2.5):
        with pytest.raises(mn.SettingsError, match="limit_bytes"):
            mn.WarmStart(limit_bytes=limit)
    with pytest.raises(mn.SettingsError, match="does not hold one solution"):
        mn.WarmStart(limit_bytes=8).put([0], torch.zeros(1, 4))


def test_a_failed_step_keeps_nothing() -> None:
    store = mn.WarmStart()
    learner, tasks = learner_of(store)
    broken = mn.Tasks(mn.Batch(tasks.support.inputs * float("nan"), tasks.support.targets), tasks.query)
    with pytest.raises(mn.NonFiniteError):
        learner.backward(broken, indices=[0, 1, 2])
    assert len(store) == 0


def test_indices_are_whole_numbers():
    model = torch.nn.Linear(1, 1)
    learner = mn.MetaLearner(model, mn.metrics.squared_error, warm_start=mn.WarmStart())
    with pytest.raises(mn.SettingsError, match="whole numbers"):
        learner.backward(mn.tasks.sinusoid(3), indices=[0.2, 1.9, 2.5])
    assert model.weight.grad is None
