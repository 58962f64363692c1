"""Meta-training: what it does is the loop of the README, and killing it anywhere changes nothing."""

from __future__ import annotations

import csv
import json
import math
import random
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_flatten
from torch.utils.data import DataLoader, Dataset, TensorDataset

import metanudge as mn
from metanudge.training.checkpoint import LAST
from metanudge.training.order import Order
from problems import ESTIMATORS, SOLVERS


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(1, 6), nn.Tanh(), nn.Dropout(0.2), nn.Linear(6, 1))


def parts(model: nn.Module, **settings):
    learner = mn.MetaLearner(model, mn.metrics.squared_error, prox=2.0, solver=mn.Nesterov(4), **settings)
    optimizer = mn.optim.NormalizedSGD(model.parameters(), lr=0.1)
    return learner, optimizer, mn.optim.ParameterFree(optimizer)


ENDLESS = mn.tasks.episodes(mn.tasks.sinusoid, shots=4, queries=4)
FINITE = mn.tasks.episodes(mn.tasks.sinusoid, shots=4, queries=4, number=11)
COMMON = {"tasks_per_step": 3, "every": 3, "progress": False}


def vector(model: nn.Module) -> torch.Tensor:
    return nn.utils.parameters_to_vector(model.parameters()).detach().clone()


def test_it_is_the_loop_of_the_readme():
    model = network()
    learner, optimizer, schedule = parts(model)
    torch.manual_seed(7)
    found = mn.fit(learner, optimizer, ENDLESS, steps=5, scheduler=schedule, max_norm=0.5, **COMMON)
    expected = network()
    learner, optimizer, schedule = parts(expected)
    torch.manual_seed(7)
    for step in range(5):
        optimizer.zero_grad()
        done = learner.backward(mn.tasks.sinusoid(3, shots=4, queries=4, first=3 * step))
        nn.utils.clip_grad_norm_(expected.parameters(), 0.5)
        optimizer.step()
        schedule.step()
        assert found.history[step].query_loss == done.query_loss
        assert found.history[step].gradient_norm == done.gradient_norm
    assert torch.equal(vector(model), vector(expected))
    assert found.validation is None
    assert math.isnan(found.best)
    assert found.history[-1].gradient_evaluations == 5 * done.gradient_evaluations
    assert found.history[2].lr == pytest.approx(3**-0.75 / 7)


class Stops(Dataset):
    """Tasks of ``of``, until one is asked for that kills the training."""

    def __init__(self, of, at: int | None) -> None:
        self.of, self.at = of, at

    def __getitem__(self, index):
        if index == self.at:
            raise KeyboardInterrupt
        return self.of[index]


@pytest.mark.parametrize("kind", ["endless", "warm", "adam"])
def test_a_training_killed_at_a_random_step_goes_on_bit_for_bit(kind, tmp_path):
    stop = random.Random(kind).randrange(1, 29)
    validation = mn.tasks.sinusoid(5, seed=9)

    def train(folder: Path, tasks, seed: int):
        model = network()
        learner, optimizer, schedule = parts(model, **({"warm_start": mn.WarmStart()} if kind == "warm" else {}))
        if kind == "adam":
            optimizer, schedule = torch.optim.Adam(model.parameters()), None
        torch.manual_seed(seed)
        settings = COMMON | {"scheduler": schedule, "validation": validation, "out": folder}
        return model, mn.fit(learner, optimizer, tasks, steps=10, **settings)

    whole, first = train(tmp_path / "whole", ENDLESS, 3)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "killed", Stops(ENDLESS, stop), 3)
    resumed, second = train(tmp_path / "killed", ENDLESS, 4)  # the seed is that of the checkpoint, if there is one
    if stop >= 9:  # three tasks a step, a checkpoint every three steps
        assert torch.equal(vector(whole), vector(resumed))
        for a, b in zip(first.history, second.history, strict=True):
            assert [str(x) for x in a._replace(seconds=0.0)] == [str(x) for x in b._replace(seconds=0.0)]
        assert torch.equal(first.validation.values, second.validation.values)
        assert (first.best, first.best_step) == (second.best, second.best_step)
    rows = list(csv.reader((tmp_path / "killed" / "log.csv").read_text().splitlines()))
    assert [row[0] for row in rows] == ["step", *(str(step) for step in range(1, 11))]
    objects = [json.loads(line) for line in (tmp_path / "killed" / "log.jsonl").read_text().splitlines()]
    told = [tuple(math.nan if value is None else value for value in record.values()) for record in objects]
    assert [str(record) for record in told] == [str(tuple(record)) for record in second.history]


def test_a_finite_set_is_gone_through_in_epochs():
    order = Order(11, 3, seed=5)
    for epoch in range(3):
        indices = [index for step in range(3 * epoch, 3 * epoch + 3) for index in order.at(step)]
        assert len(set(indices)) == 9
    assert order.at(0) != order.at(3)
    assert Order(11, 3, seed=6).at(0) != order.at(0)
    with pytest.raises(mn.SettingsError, match="takes 12 different tasks, but there are 11"):
        Order(11, 12, seed=0)


def test_workers_make_no_difference():
    """The tasks of a step, and so the training, with 0, 1 and 2 processes that draw them."""
    data = TensorDataset(torch.randn(60, 1, generator=torch.Generator().manual_seed(0)), torch.arange(60) % 5)
    tasks = mn.tasks.few_shot(data, ways=(2, 3), shots=2, queries=3, number=8)
    drawn, histories = [], []
    for workers in (0, 1, 2):
        batches = Order(8, 3, seed=0).batches(tasks, 0, 4, workers, torch.device("cpu"))
        drawn.append([(indices, tree_flatten(batch)[0]) for indices, batch in batches])
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 3))
        learner = mn.MetaLearner(model, mn.metrics.cross_entropy)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        found = mn.fit(learner, optimizer, tasks, steps=4, workers=workers, **COMMON)
        histories.append([str(record._replace(seconds=0.0)) for record in found.history])
    for other in drawn[1:]:
        for (indices, leaves), (again, found) in zip(drawn[0], other, strict=True):
            assert indices == again
            assert all(torch.equal(a, b) for a, b in zip(leaves, found, strict=True))
    assert histories[0] == histories[1] == histories[2]


def test_chunks_average_to_the_same_meta_gradient():
    steps, vectors = [], []
    for size in (None, 2, 3, 5):
        model = network().eval().double()
        learner, optimizer, _ = parts(model, chunk_size=size)
        tasks = mn.tasks.episodes(mn.tasks.sinusoid, shots=4, queries=4, dtype=torch.float64)
        found = mn.fit(learner, optimizer, tasks, steps=2, tasks_per_step=5, progress=False)
        steps.append(found.history[-1])
        vectors.append(vector(model))
    for step, moved in zip(steps[1:], vectors[1:], strict=True):
        torch.testing.assert_close(moved, vectors[0], rtol=1e-9, atol=1e-11)
        assert step.query_loss == pytest.approx(steps[0].query_loss, rel=1e-9)
        assert step.gradient_norm == pytest.approx(steps[0].gradient_norm, rel=1e-8)
        assert step.gradient_evaluations == steps[0].gradient_evaluations


def test_the_error_bound_of_a_step_is_that_of_its_parts():
    """Of eight tasks whole, in fours, in twos and singly: the ratio of two means, not the mean of ratios."""
    bounds = []
    for size in (None, 4, 2, 1):
        learner, optimizer, _ = parts(network().eval().double(), chunk_size=size)
        tasks = mn.tasks.episodes(mn.tasks.sinusoid, shots=4, queries=4, dtype=torch.float64)
        found = mn.fit(learner, optimizer, tasks, steps=1, tasks_per_step=8, progress=False)
        bounds.append(found.history[0].error_bound)
    assert bounds[0] > 0
    assert bounds[1:] == [pytest.approx(bounds[0], rel=1e-9)] * 3


class Broken(Dataset):
    """Tasks of which some, by index, hold a NaN."""

    def __init__(self, broken) -> None:
        self.broken = broken

    def __getitem__(self, index):
        task = ENDLESS[index]
        if index in self.broken:
            task.support.inputs[0] = math.nan
        return task


@pytest.mark.filterwarnings("ignore::metanudge.errors.NonFiniteWarning")
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_dropped_tasks_are_counted_and_lost_steps_skipped(chunk_size):
    model = network()
    learner, optimizer, _ = parts(model, chunk_size=chunk_size)
    broken = {0, 1, 3, 4, 5}
    found = mn.fit(learner, optimizer, Broken(broken), steps=3, **COMMON)
    assert [record.dropped_tasks for record in found.history] == [2, 0, 0]
    assert found.skipped_steps == 1
    assert math.isnan(found.history[1].query_loss)
    with pytest.raises(mn.NonFiniteError):
        mn.fit(learner, optimizer, Broken(range(1000)), steps=12, **COMMON)


def test_parts_count_by_the_tasks_that_were_kept():
    """Of a part with one good task and one with three: the mean of the four."""
    gradients = []
    for size in (None, 4):
        model = network().eval()
        learner, _, _ = parts(model, chunk_size=size)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        with pytest.warns(mn.NonFiniteWarning):
            mn.fit(learner, optimizer, Broken({0, 2, 3, 6}), steps=1, tasks_per_step=8)
        gradients.append(vector(model))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-5, atol=1e-7)


def test_a_task_of_a_part_is_told_by_its_place_in_the_step():
    learner, optimizer, _ = parts(network(), chunk_size=4)
    with pytest.warns(mn.NonFiniteWarning, match=r"task 5: support inputs"):
        mn.fit(learner, optimizer, Broken({5}), steps=1, tasks_per_step=8, progress=False)


def test_best_is_kept_and_can_be_loaded(tmp_path):
    model = network()
    learner, optimizer, _ = parts(model)
    validation = mn.tasks.sinusoid(6, seed=2)
    found = mn.fit(learner, optimizer, ENDLESS, steps=9, validation=validation, out=tmp_path, **COMMON)
    values = [record.validation for record in found.history]
    assert [not math.isnan(value) for value in values] == [False, False, True] * 3
    assert found.best == min(values[2::3])
    assert values[found.best_step - 1] == found.best
    best = mn.load_pretrained(tmp_path / "best", network(), mn.metrics.squared_error)
    best.model.eval()
    assert best.evaluate(validation).mean == pytest.approx(found.best, rel=1e-6)
    assert best.solver == learner.solver


def test_larger_is_better_for_accuracy(tmp_path):
    data = TensorDataset(torch.randn(60, 2), torch.arange(60) % 5)
    tasks = mn.tasks.few_shot(data, ways=3, shots=2, queries=3)
    model = nn.Linear(2, 3)
    learner = mn.MetaLearner(model, lambda m, b: nn.functional.cross_entropy(m(b.inputs), b.targets))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    settings = {"validation": tasks.take(4, first=100), "metric": mn.metrics.accuracy, "every": 1}
    found = mn.fit(learner, optimizer, tasks, steps=4, tasks_per_step=2, progress=False, **settings)
    assert found.best == max(record.validation for record in found.history)


def test_validation_does_not_touch_the_training():
    vectors = []
    for settings in ({}, {"validation": mn.tasks.sinusoid(4, seed=3)}):
        model = network()
        learner, optimizer, _ = parts(model)
        torch.manual_seed(1)
        mn.fit(learner, optimizer, ENDLESS, steps=6, **COMMON, **settings)
        assert model.training
        vectors.append(vector(model))
    assert torch.equal(*vectors)


def test_wrong_settings_are_told_before_anything_is_done(tmp_path):
    model = network()
    learner, optimizer, schedule = parts(model)
    before = vector(model)
    for settings, told in (
        ({"steps": 0}, "steps must be"),
        ({"better": "more"}, "better must be"),
        ({"seed": -1}, "seed must be"),
        ({"max_norm": 0.0}, "max_norm must be"),
        ({"tensorboard": True}, "needs a folder"),
        ({"workers": -1}, "workers must be"),
        ({"metric": "accuracy"}, "metric must be a function"),
        ({"validation": []}, "validation holds no tasks"),
        ({"metric": mn.metrics.squared_error}, "metric is of the validation, and there is none"),
        ({"tasks": mn.tasks.sinusoid(2)}, "takes 3 different tasks, but there are 2; give tasks_per_step=2 or fewer"),
        ({"tasks_per_step": 12, "tasks": FINITE}, "there are 11"),
    ):
        arguments = {"steps": 1, "tasks": ENDLESS} | settings
        tasks = arguments.pop("tasks")
        with pytest.raises(mn.SettingsError, match=told):
            mn.fit(learner, optimizer, tasks, **(COMMON | arguments))
    with pytest.raises(mn.TasksError, match="map-style dataset of tasks"):
        mn.fit(learner, optimizer, iter(ENDLESS), steps=1)
    with pytest.raises(mn.TasksError, match=r"fit makes its own batches.*give its dataset.*loader\.dataset"):
        mn.fit(learner, optimizer, DataLoader(FINITE, batch_size=3, collate_fn=mn.tasks.collate), steps=1)
    mn.fit(learner, optimizer, ENDLESS, steps=3, out=tmp_path, **COMMON)
    assert not torch.equal(before, vector(model))
    after = vector(model)
    for other, told in (
        ({"tasks_per_step": 4}, "tasks_per_step"),
        ({"scheduler": schedule}, "without a scheduler"),
    ):
        with pytest.raises(mn.SettingsError, match=told):
            mn.fit(learner, optimizer, ENDLESS, steps=4, out=tmp_path, **(COMMON | other))
    wide = nn.Linear(1, 1)
    learner, optimizer, _ = parts(wide)
    with pytest.raises(mn.SettingsError, match=r"another model|no checkpoint of this"):
        mn.fit(learner, optimizer, ENDLESS, steps=4, out=tmp_path, **COMMON)
    for content in (b"junk", b""):
        (tmp_path / LAST).write_bytes(content)
        with pytest.raises(mn.SettingsError, match="no checkpoint that can be read"):
            mn.fit(learner, optimizer, ENDLESS, steps=4, out=tmp_path, **COMMON)
    assert torch.equal(after, vector(model))


def test_resume_false_begins_anew(tmp_path):
    model = network()
    learner, optimizer, _ = parts(model)
    mn.fit(learner, optimizer, ENDLESS, steps=6, out=tmp_path, **COMMON)
    assert len(mn.fit(learner, optimizer, ENDLESS, steps=6, out=tmp_path, **COMMON).history) == 6
    found = mn.fit(learner, optimizer, ENDLESS, steps=3, out=tmp_path, resume=False, **COMMON)
    assert len(found.history) == 3
    assert len((tmp_path / "log.csv").read_text().splitlines()) == 4


def test_what_is_begun_anew_leaves_nothing_of_what_was_there(tmp_path):
    held = {"out": tmp_path, "validation": mn.tasks.sinusoid(4, seed=2)}
    learner, optimizer, _ = parts(network())
    mn.fit(learner, optimizer, ENDLESS, steps=6, **held, **COMMON)
    theirs = [
        tmp_path / "notes.txt",
        tmp_path / "best" / "mine.txt",
        tmp_path / "tensorboard" / "events.out.tfevents.1",
    ]
    for file in theirs:
        file.parent.mkdir(exist_ok=True)
        file.write_text("mine")
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for wrong in ({"max_norm": 0.0}, {"better": "more"}, {"scheduler": 3}, {"tensorboard": 1}):
        with pytest.raises(mn.SettingsError):
            mn.fit(learner, optimizer, ENDLESS, steps=3, resume=False, **(held | COMMON | wrong))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == files

    learner, optimizer, _ = parts(network())
    with pytest.raises(KeyboardInterrupt):  # killed before its first checkpoint
        mn.fit(learner, optimizer, Stops(ENDLESS, 4), steps=3, out=tmp_path, resume=False, **COMMON)
    left = {path for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {*theirs, tmp_path / "log.csv", tmp_path / "log.jsonl"}
    assert len((tmp_path / "log.csv").read_text().splitlines()) == 2  # of its one step
    learner, optimizer, _ = parts(network())
    assert len(mn.fit(learner, optimizer, ENDLESS, steps=3, out=tmp_path, **COMMON).history) == 3
    assert {file.read_text() for file in theirs} == {"mine"}
    shutil.rmtree(tmp_path / "tensorboard")
    (tmp_path / "best" / "mine.txt").unlink()
    mn.fit(learner, optimizer, ENDLESS, steps=6, **held, **COMMON)
    mn.fit(learner, optimizer, ENDLESS, steps=3, out=tmp_path, resume=False, **COMMON)
    assert not (tmp_path / "best").exists()


def test_weights_that_no_training_wrote_stay(tmp_path):
    (tmp_path / "best").mkdir()
    theirs = tmp_path / "best" / "model.safetensors"  # of a library of another name, without metanudge.json
    theirs.write_text("mine")
    learner, optimizer, _ = parts(network())
    mn.fit(learner, optimizer, ENDLESS, steps=3, out=tmp_path, resume=False, **COMMON)
    assert theirs.read_text() == "mine"


def test_tensorboard_begun_anew_shows_one_training(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for steps in (6, 3):
        learner, optimizer, _ = parts(network())
        common = COMMON | {"out": tmp_path, "tensorboard": True, "resume": False}
        found = mn.fit(learner, optimizer, ENDLESS, steps=steps, **common)
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("query_loss")] == [record.step for record in found.history]


def test_tensorboard_gets_the_numbers(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    model = network()
    learner, optimizer, _ = parts(model)
    found = mn.fit(learner, optimizer, ENDLESS, steps=3, out=tmp_path, tensorboard=True, **COMMON)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    values = [event.value for event in events.Scalars("query_loss")]
    assert values == pytest.approx([record.query_loss for record in found.history], rel=1e-6)


def test_the_parameter_free_schedule_is_that_of_the_paper_and_resumes():
    weights = [nn.Parameter(torch.zeros(2))]
    optimizer = mn.optim.NormalizedSGD(weights, lr=3.0)
    schedule = mn.optim.ParameterFree(optimizer)
    seen = []
    for _ in range(6):
        seen.append((optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["momentum"]))
        optimizer.step()
        schedule.step()
    assert seen == [(pytest.approx(t**-0.75 / 7), pytest.approx(1 - t**-0.5)) for t in range(1, 7)]
    again = mn.optim.NormalizedSGD(weights, lr=3.0)
    other = mn.optim.ParameterFree(again)
    again.load_state_dict(optimizer.state_dict())
    other.load_state_dict(schedule.state_dict())
    other.step()
    assert again.param_groups[0]["momentum"] == pytest.approx(1 - 8**-0.5)
    with pytest.raises(mn.SettingsError, match="NormalizedSGD"):
        mn.optim.ParameterFree(torch.optim.SGD(weights, lr=1.0))


# Pretrained.


class Tied(nn.Module):
    """Two layers of one weight, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3, bias=False)
        self.second = nn.Linear(3, 3, bias=False)
        self.second.weight = self.first.weight
        self.register_buffer("scale", torch.ones(3))

    def forward(self, x):
        return self.second(torch.tanh(self.first(x))) * self.scale


def test_what_is_saved_is_loaded(tmp_path):
    model = Tied()
    model.scale.fill_(2.5)
    stencil = mn.Stencil((0, 1, 2), (-1.5, 2, -0.5), 2)
    learner = mn.MetaLearner(
        model,
        mn.metrics.squared_error,
        prox=0.3,
        solver=mn.GradientDescent(7, lr=0.2, momentum=0.5),
        estimator=mn.FOBMAML(stencil, nudge="full"),
        adapt_only=["first", "second"],
    )
    learner.save_pretrained(tmp_path / "new" / "folder", {"ways": 5})
    again = mn.load_pretrained(tmp_path / "new" / "folder", Tied(), mn.metrics.squared_error)
    assert (again.prox, again.solver, again.estimator) == (learner.prox, learner.solver, learner.estimator)
    assert list(again.adapt_only) == ["first", "second"]
    assert torch.equal(again.model.first.weight, model.first.weight)
    assert again.model.first.weight is again.model.second.weight
    assert torch.equal(again.model.scale, model.scale)
    other = mn.load_pretrained(tmp_path / "new" / "folder", Tied(), mn.metrics.squared_error, solver=mn.Nesterov(3))
    assert other.solver == mn.Nesterov(3)


WRITABLE = {name: solver for name, solver in SOLVERS.items() if not isinstance(solver, mn.TorchOptimizer)}


@pytest.mark.parametrize("part", [*WRITABLE.values(), mn.Adam(3, lr=0.1, betas=(0.8, 0.9)), *ESTIMATORS.values()])
def test_every_solver_and_estimator_is_read_as_it_was_written(part, tmp_path):
    """All of the registries but the solver with a factory."""
    kind = "solver" if type(part) in mn.SOLVERS.values() else "estimator"
    mn.MetaLearner(nn.Linear(1, 1), mn.metrics.squared_error, **{kind: part}).save_pretrained(tmp_path)
    again = mn.load_pretrained(tmp_path, nn.Linear(1, 1), mn.metrics.squared_error)
    assert getattr(again, kind) == part


def test_the_round_trip_leaves_no_solver_and_estimator_out():
    assert {type(part) for part in WRITABLE.values()} == set(mn.SOLVERS.values()) - {mn.TorchOptimizer}
    assert {type(part) for part in ESTIMATORS.values()} == set(mn.ESTIMATORS.values())
    for wrong in ([0.9], 0.9, "ab"):
        with pytest.raises(mn.SettingsError, match="beta"):
            mn.Adam(3, lr=0.1, betas=wrong)


def test_what_can_not_be_saved_or_loaded_is_told(tmp_path):
    def learner(**settings):
        return mn.MetaLearner(nn.Linear(2, 2), mn.metrics.squared_error, **settings)

    factory = mn.TorchOptimizer(lambda parameters: torch.optim.SGD(parameters, lr=0.1), steps=2)
    for place, settings in enumerate(({"solver": factory}, {"adapt_only": lambda n, p: True})):
        learner(**settings).save_pretrained(tmp_path / str(place))
        (name,) = settings
        with pytest.raises(mn.SettingsError, match=f"the {name} of this learner could not be written.*give {name}="):
            mn.load_pretrained(tmp_path / str(place), nn.Linear(2, 2), mn.metrics.squared_error)
        again = mn.load_pretrained(tmp_path / str(place), nn.Linear(2, 2), mn.metrics.squared_error, **settings)
        assert getattr(again, name) == settings[name]
    with pytest.raises(mn.SettingsError, match="JSON"):
        learner().save_pretrained(tmp_path / "out", {"what": object()})
    assert not (tmp_path / "out").exists()
    with pytest.raises(mn.SettingsError, match="there is no"):
        mn.load_pretrained(tmp_path / "out", nn.Linear(2, 2), mn.metrics.squared_error)
    learner().save_pretrained(tmp_path / "out")
    model = nn.Linear(3, 2)
    before = model.weight.detach().clone()
    with pytest.raises(mn.SettingsError, match=r"weight has shape \(2, 2\), the model has \(2, 3\)"):
        mn.load_pretrained(tmp_path / "out", model, mn.metrics.squared_error)
    assert torch.equal(model.weight, before)
    learner(query_loss=lambda m, b: mn.metrics.squared_error(m, b)).save_pretrained(tmp_path / "out")
    with pytest.raises(mn.SettingsError, match="query_loss="):
        mn.load_pretrained(tmp_path / "out", nn.Linear(2, 2), mn.metrics.squared_error)
    (tmp_path / "out" / "metanudge.json").write_text("{}")
    with pytest.raises(mn.SettingsError, match="cannot be understood"):
        mn.load_pretrained(tmp_path / "out", nn.Linear(2, 2), mn.metrics.squared_error)


class Wider(nn.Module):
    """``Tied`` with a second weight of its own: a name that a file of ``Tied`` holds once."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3, bias=False)
        self.second = nn.Linear(3, 3, bias=False)
        self.register_buffer("scale", torch.ones(3))


def test_weights_of_a_smaller_model_change_nothing(tmp_path):
    mn.MetaLearner(Tied(), mn.metrics.squared_error).save_pretrained(tmp_path)
    model = Wider()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(mn.SettingsError, match=r"another architecture: the model has (first|second)\.weight, of which"):
        mn.load_pretrained(tmp_path, model, mn.metrics.squared_error)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_patterns_from_any_iterable_are_kept_and_written_down(tmp_path):
    def learner(adapt_only):
        return mn.MetaLearner(Tied(), mn.metrics.squared_error, adapt_only=adapt_only)

    every = ("first", "first.weight", "second", "*.weight")
    for given in (list(every), iter(every), dict.fromkeys(every)):
        assert learner(given).adapt_only == every
    for given in (set(every), frozenset(every)):
        assert learner(given).adapt_only == tuple(sorted(every))
    drawn = learner(name for name in ("first",))
    x = torch.ones(2, 4, 3)
    drawn.backward(mn.Tasks(*(mn.Batch(x, x),) * 2))
    drawn.save_pretrained(tmp_path)
    assert mn.load_pretrained(tmp_path, Tied(), mn.metrics.squared_error).adapt_only == ("first",)


def test_a_store_that_refuses_a_checkpoint_leaves_model_and_optimizer_alone(tmp_path):
    def begun(store: str):
        model = network()
        learner = mn.MetaLearner(
            model,
            mn.metrics.squared_error,
            prox=2.0,
            solver=mn.Nesterov(4),
            warm_start=mn.WarmStart(folder=tmp_path / store),
        )
        return model, learner, torch.optim.Adam(model.parameters())

    _, learner, optimizer = begun("first")
    mn.fit(learner, optimizer, FINITE, steps=2, out=tmp_path / "run", **COMMON)
    model, learner, optimizer = begun("another")
    before = vector(model)
    with pytest.raises(mn.SettingsError, match="does not hold it"):
        mn.fit(learner, optimizer, FINITE, steps=4, out=tmp_path / "run", **COMMON)
    assert torch.equal(vector(model), before)
    assert not optimizer.state


def test_what_is_loaded_runs_as_what_was_saved(tmp_path):
    settings = {"execution": "in_place", "microbatch": 3}
    mn.MetaLearner(network(), mn.metrics.squared_error, **settings).save_pretrained(tmp_path)
    again = mn.load_pretrained(tmp_path, network(), mn.metrics.squared_error)
    assert (again.execution.name, again.execution.microbatch, again.automatic) == ("in_place", 3, False)
    stacked = mn.load_pretrained(tmp_path, network(), mn.metrics.squared_error, chunk_size=2)
    assert (stacked.execution.name, stacked.execution.chunk_size, stacked.automatic) == ("vectorized", 2, True)
    stacked.save_pretrained(tmp_path)
    again = mn.load_pretrained(tmp_path, network(), mn.metrics.squared_error)
    assert (again.execution.name, again.execution.chunk_size, again.automatic) == ("vectorized", 2, True)
