"""Warm starts: fewer steps track the solution; the store forgets, resumes and refuses as it says."""

from __future__ import annotations

import shutil
from collections import OrderedDict
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


def test_an_empty_one_is_there() -> None:
    """``if learner.warm_start`` asks whether there is one, not whether it holds something."""
    store = mn.WarmStart()
    assert len(store) == 0
    assert store


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


def test_a_store_that_refuses_leaves_the_gradients(tmp_path: Path) -> None:
    store = mn.WarmStart(limit_bytes=8)  # which only shows with the first solutions
    learner, tasks = learner_of(store)
    with pytest.raises(mn.SettingsError, match="does not hold one solution"):
        learner.backward(tasks, indices=[0, 1, 2])
    assert all(parameter.grad is None for parameter in learner.model.parameters())
    for parameter in learner.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    with pytest.raises(mn.SettingsError, match="does not hold one solution"):
        learner.backward(tasks, indices=[0, 1, 2])
    assert all(bool((parameter.grad == 1).all()) for parameter in learner.model.parameters())


ROW = torch.arange(4.0).double()
NONE = torch.full((1, 4), -1.0).double()


def numbered(*numbers: float) -> Tensor:
    return torch.stack([ROW + number for number in numbers])


def held(store: mn.WarmStart, indices: range) -> list[float]:
    """What is kept under each index, by its first number; -1 for nothing."""
    return [float(store.get([index], NONE)[0, 0]) for index in indices]


def test_a_folder_survives_a_crash_with_what_was_saved(tmp_path: Path) -> None:
    """Newer solutions, tasks forgotten and rows taken over after the save: none of it is seen by who comes next."""
    limits = {"limit_bytes": 3 * 32, "folder": tmp_path / "kept"}
    store = mn.WarmStart(**limits)
    store.put([0, 1, 2], numbered(10, 11, 12))
    store.save()
    store.put([0, 1], torch.stack([ROW + 20, ROW * float("nan")]))
    store.put([3, 4, 5], numbered(13, 14, 15))
    assert held(store, range(6)) == [-1, -1, -1, 13, 14, 15]
    assert held(mn.WarmStart(**limits), range(6)) == [10, 11, 12, -1, -1, -1]  # nobody had saved
    store.save()
    assert held(mn.WarmStart(**limits), range(6)) == [-1, -1, -1, 13, 14, 15]


def test_a_checkpoint_finds_its_state_in_the_folder(tmp_path: Path) -> None:
    """Killed after the folder was brought up to date and before the checkpoint was written: one state back."""
    limits = {"limit_bytes": 3 * 32, "folder": tmp_path / "kept"}
    store, states = mn.WarmStart(**limits), []
    for number in (10, 20, 30):
        store.put([0, 1, 2], numbered(number, number + 1, number + 2))
        states.append(store.state_dict())
        assert store.state_dict() == states[-1]  # nothing new: no state is used up
    store.put([0, 3], numbered(40, 43))
    for state, expected in ((states[2], [30, 31, 32, -1]), (states[1], [20, 21, 22, -1])):
        again = mn.WarmStart(**limits)
        again.load_state_dict(state)
        assert held(again, range(4)) == expected
    again.put([1, 3], numbered(51, 53))  # from the state gone back to, which a later crash must find again
    again.save()
    assert held(mn.WarmStart(**limits), range(4)) == [-1, 51, 22, 53]
    back = mn.WarmStart(**limits)
    back.load_state_dict(states[1])
    assert held(back, range(4)) == [20, 21, 22, -1]
    for state in (states[0], states[2]):
        with pytest.raises(mn.SettingsError, match="does not hold it"):
            back.load_state_dict(state)
        assert held(back, range(4)) == [20, 21, 22, -1]
    with pytest.raises(mn.SettingsError, match="give the folder"):
        mn.WarmStart().load_state_dict(states[1])


def test_a_training_killed_with_a_folder_goes_on_bit_for_bit(tmp_path: Path) -> None:
    straight, tasks = learner_of(mn.WarmStart())
    for _ in range(4):
        straight.model.zero_grad()
        straight.backward(tasks, indices=[0, 1, 2])
    first, _ = learner_of(mn.WarmStart(folder=tmp_path))
    for _ in range(2):
        first.backward(tasks, indices=[0, 1, 2])
    state = first.warm_start.state_dict()
    for _ in range(3):
        first.backward(tasks, indices=[0, 1, 2])  # lost
    store = mn.WarmStart(folder=tmp_path)
    store.load_state_dict(state)
    second, _ = learner_of(store)
    for _ in range(2):
        second.model.zero_grad()
        second.backward(tasks, indices=[0, 1, 2])
    assert torch.equal(gradient(second), gradient(straight))


def test_a_checkpoint_without_a_folder_goes_on_in_one(tmp_path: Path) -> None:
    memory = mn.WarmStart()
    memory.put([4, 7], numbered(4, 7))
    store = mn.WarmStart(folder=tmp_path)
    store.put([1], numbered(1))
    store.save()
    store.load_state_dict(memory.state_dict())
    assert (held(store, range(8)), len(store)) == ([-1, -1, -1, -1, 4, -1, -1, 7], 2)
    store.save()
    assert held(mn.WarmStart(folder=tmp_path), range(8)) == [-1, -1, -1, -1, 4, -1, -1, 7]
    other = mn.WarmStart()
    other.put([0], torch.zeros(1, 5).double())
    with pytest.raises(mn.SettingsError, match="another model"):
        store.load_state_dict(other.state_dict())
    assert len(store) == 2
    store.load_state_dict(mn.WarmStart().state_dict())  # of a training that had kept nothing yet
    assert len(store) == 0


@pytest.mark.parametrize("damage", ["truncated", "shorter", "gone", "rows"])
def test_a_damaged_folder_is_told(damage: str, tmp_path: Path) -> None:
    store = mn.WarmStart(folder=tmp_path)
    store.put([0, 1, 2], numbered(10, 11, 12))
    store.save()
    file = tmp_path / "solutions.bin"
    content = file.read_bytes()
    if damage == "gone":
        file.unlink()
    elif damage == "rows":
        index = tmp_path / "index.json"
        index.write_text(index.read_text().replace("[2, 2]", "[2, 1]"))
    else:
        file.write_bytes(content[: len(content) // 2 if damage == "truncated" else -1])
    before = file.read_bytes() if file.exists() else None
    with pytest.raises(mn.SettingsError, match="no readable solutions" if damage == "gone" else "damaged"):
        mn.WarmStart(folder=tmp_path)
    assert (file.read_bytes() if file.exists() else None) == before


def test_a_folder_reopened_with_another_limit_keeps_to_it(tmp_path: Path) -> None:
    store = mn.WarmStart(limit_bytes=4 * 32, folder=tmp_path / "one")
    store.put(range(4), numbered(0, 1, 2, 3))
    store.get([0], NONE)
    store.save()
    shutil.copytree(tmp_path / "one", tmp_path / "other")
    smaller = mn.WarmStart(limit_bytes=2 * 32, folder=tmp_path / "one")
    assert held(smaller, range(4)) == [0, -1, -1, 3]  # the two used last
    smaller.put([5], numbered(5))
    assert (len(smaller), 0 in smaller) == (2, False)  # looked at before 3
    larger = mn.WarmStart(limit_bytes=6 * 32, folder=tmp_path / "other")
    larger.put(range(4, 8), numbered(4, 5, 6, 7))
    assert held(larger, range(8)) == [0, -1, -1, 3, 4, 5, 6, 7]
    with pytest.raises(mn.SettingsError, match="does not hold one solution"):
        mn.WarmStart(limit_bytes=31, folder=tmp_path / "one")


@pytest.mark.parametrize("kind", ["memory", "folder"])
def test_what_is_kept_under_random_use(kind: str, tmp_path: Path) -> None:
    """Against a dictionary in order of use, over puts, looks, saves and rows that are forgotten."""
    store = mn.WarmStart(limit_bytes=5 * 32, folder=tmp_path if kind == "folder" else None)
    expected: OrderedDict[int, float] = OrderedDict()
    generator = torch.Generator().manual_seed(0)
    for number in range(300):
        indices = torch.randperm(9, generator=generator)[:3].tolist()
        act = int(torch.randint(4, (), generator=generator))
        if act == 0:
            store.save()
        elif act == 1:
            store.get(indices, NONE.expand(3, -1))
            for index in indices:
                if index in expected:
                    expected.move_to_end(index)
        else:
            rows = numbered(number, number + 0.25, number + 0.5)
            rows[act - 2] = float("nan")
            store.put(indices, rows)
            for index, row in zip(indices, rows, strict=True):
                expected.pop(index, None)
                if not row.isnan().any():
                    expected[index] = float(row[0])
                    if len(expected) > 5:
                        expected.popitem(last=False)
        assert list(store._slots) == list(expected)
        found = [float(store._rows[row, 0]) for row in store._slots.values()] if expected else []
        assert found == list(expected.values())
    if kind == "folder":
        assert (tmp_path / "solutions.bin").stat().st_size <= (3 * 5 + 3) * 32


def test_keeping_a_solution_looks_at_no_other() -> None:
    class Unread(OrderedDict):
        def refuse(self, *_: object) -> None:
            raise AssertionError("all tasks were gone through")

        __iter__ = values = items = keys = refuse

    store = mn.WarmStart(limit_bytes=8 * 32)
    store.put(range(8), numbered(*range(8)))
    store._slots = Unread(zip(range(8), range(8), strict=True))
    store.put([2, 9], numbered(20, 9))  # one that is there, and one for which another is forgotten
    store.put([3], NONE * float("nan"))
    store.put([10], numbered(10))  # into the row of the one that was not finite
    assert held(store, range(11)) == [-1, 1, 20, -1, 4, 5, 6, 7, -1, 9, 10]
