"""What a new user gave fit and evaluate: datasets, other settings, NaN, optimizers of nothing."""

from __future__ import annotations

import functools
import math
import runpy
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as schedules
from torch.utils.data import BatchSampler, DataLoader, Dataset, Subset, TensorDataset

import metanudge as mn
from metanudge.files import load_state, save_state
from metanudge.oracle import compiled
from metanudge.training.checkpoint import LAST
from metanudge.training.divergence import length, rose
from metanudge.training.identity import code_of, qualified_name
from metanudge.training.order import first_digest
from metanudge.training.validation import improves

DATA = TensorDataset(torch.randn(60, 3, generator=torch.Generator().manual_seed(0)), torch.arange(60) % 6)
SQUARE = {"ways": 3, "shots": 3, "queries": 3}  # support and query of one shape: what a stack looks like
ENDLESS = mn.tasks.episodes(mn.tasks.sinusoid, shots=4, queries=4)
COMMON: dict[str, Any] = {"tasks_per_step": 2, "every": 2, "progress": False}


def loss(model: nn.Module, batch: mn.Batch) -> torch.Tensor:
    return nn.functional.cross_entropy(model(batch.inputs), batch.targets)


def classifier() -> mn.MetaLearner:
    torch.manual_seed(0)
    return mn.MetaLearner(nn.Linear(3, 3), loss, solver=mn.GradientDescent(2, lr=0.1))


def begun(**settings: Any) -> tuple[mn.MetaLearner, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1))
    common = {"loss": mn.metrics.squared_error, "prox": 2.0, "solver": mn.Nesterov(2)}
    learner = mn.MetaLearner(model, **(common | settings))
    return learner, torch.optim.SGD(model.parameters(), lr=0.1)


def vector(learner: mn.MetaLearner) -> torch.Tensor:
    return nn.utils.parameters_to_vector(learner.model.parameters()).detach().clone()


class Plain:
    """A map-style dataset that is none of torch's."""

    def __init__(self, tasks: list[mn.Tasks]) -> None:
        self.tasks = tasks

    def __len__(self) -> int:
        return len(self.tasks)

    def __getitem__(self, index: int) -> mn.Tasks:
        return self.tasks[index]


@pytest.mark.usefixtures("short_search")
def test_a_dataset_of_tasks_is_the_list_of_its_tasks():
    learner, endless = classifier(), mn.tasks.few_shot(DATA, **SQUARE)
    listed = endless.take(5)
    expected = learner.evaluate(listed, mn.metrics.accuracy).values
    finite = mn.tasks.few_shot(DATA, number=5, **SQUARE)
    for dataset in (finite, Subset(endless, range(5)), Plain(listed)):
        assert torch.equal(learner.evaluate(dataset, mn.metrics.accuracy).values, expected)
    errors = [
        [row.relative_error for row in mn.check(learner, tasks, max_tasks=2, reference_steps=40, compare=[]).rows]
        for tasks in (finite, listed)
    ]
    assert errors[0] == errors[1]
    assert torch.equal(
        mn.smoothness(learner, finite, steps=2).smoothness, mn.smoothness(learner, listed, steps=2).smoothness
    )


def test_a_loader_of_single_tasks_is_refused_with_the_cure():
    """Support and query of one size: its examples, nine, could be taken for nine tasks."""
    learner, dataset = classifier(), mn.tasks.few_shot(DATA, number=4, **SQUARE)
    whole = learner.evaluate(dataset, mn.metrics.accuracy).values
    single: list[tuple[DataLoader, str]] = [
        (DataLoader(dataset, batch_size=None), "got a DataLoader with batch_size=None.*collate_fn=mn.tasks.collate"),
        (DataLoader([dataset[i] for i in range(4)], batch_size=None), "got a DataLoader with batch_size=None"),
        (DataLoader(dataset, collate_fn=lambda tasks: tasks[0]), "at most 1 tasks.*collate_fn gave leading axes of 9"),
    ]
    for loader, told in single:
        for use in (learner.evaluate, partial(mn.check, learner), partial(mn.smoothness, learner)):
            with pytest.raises(mn.TasksError, match=told):
                use(loader)
    with pytest.raises(mn.TasksError, match="batch_size=None"):  # and is not told to loop over it
        learner.backward(single[0][0])
    stacks = mn.tasks.collate([dataset[i] for i in range(4)])
    for right in (
        DataLoader(dataset, batch_size=3, collate_fn=mn.tasks.collate),
        DataLoader(dataset, batch_size=3),  # torch's own stacks as well
        DataLoader(Several(dataset), sampler=BatchSampler(range(4), 3, drop_last=False), batch_size=None),
        (tasks for tasks in DataLoader([stacks], batch_size=None)),
    ):
        torch.testing.assert_close(learner.evaluate(right, mn.metrics.accuracy).values, whole)


class Several(Dataset):
    """Takes a list of indices, and gives a stack."""

    def __init__(self, tasks):
        self.tasks = tasks

    def __getitem__(self, indices):
        return mn.tasks.collate([self.tasks[index] for index in indices])


class Unending(Dataset):
    def __getitem__(self, index):
        return ENDLESS[index]


def test_a_dataset_without_an_end_is_refused_with_the_cure():
    learner, optimizer = begun()
    for refused in (learner.evaluate, lambda t: mn.check(learner, t), lambda t: mn.smoothness(learner, t)):
        with pytest.raises(mn.TasksError, match=r"Episodes of tasks has no end; use \.take\(n\)"):
            refused(ENDLESS)
    with pytest.raises(mn.TasksError, match=r"no end; use \[dataset\[i\] for i in range\(n\)\]"):
        learner.evaluate(Unending())
    with pytest.raises(mn.TasksError, match=r"no end; use \.take\(n\)"):
        mn.fit(learner, optimizer, ENDLESS, steps=2, validation=ENDLESS, **COMMON)
    with pytest.raises(mn.TasksError, match="validation must be a stack"):
        mn.fit(learner, optimizer, ENDLESS, steps=2, validation=iter(ENDLESS.take(2)), **COMMON)
    with pytest.raises(mn.TasksError, match=r"a dataset of single tasks; give some as a list: \.take\(n\)"):
        learner.backward(ENDLESS)


def test_fit_takes_lists_of_tasks_and_validates_on_datasets():
    found = []
    for tasks, validation in (
        (ENDLESS.take(6), mn.tasks.episodes(mn.tasks.sinusoid, shots=4, queries=4, number=3)),
        (mn.tasks.episodes(mn.tasks.sinusoid, shots=4, queries=4, number=6), ENDLESS.take(3)),
    ):
        learner, optimizer = begun()
        done = mn.fit(learner, optimizer, tasks, steps=4, validation=validation, **COMMON)
        found.append((vector(learner), done.validation.values))
    assert all(map(torch.equal, *found))
    with pytest.raises(mn.SettingsError, match="takes 2 different tasks, but there are 0"):
        mn.fit(*begun(), [], steps=1, **COMMON)
    with pytest.raises(mn.TasksError, match="found Tensor in it"):
        mn.fit(*begun(), [torch.zeros(2), torch.zeros(2)], steps=1, **COMMON)
    with pytest.raises(mn.TasksError, match=r"map-style dataset of tasks.*got Batch"):
        mn.fit(*begun(), mn.Batch(torch.zeros(2), torch.zeros(2)), steps=1, **COMMON)


@pytest.mark.parametrize(
    ("settings", "lr", "told"),
    [
        ({"prox": 3.0}, 0.1, "prox = 2.0, this one has 3.0"),
        ({"solver": mn.Nesterov(3)}, 0.1, r"solver = Nesterov\(steps=2.*Nesterov\(steps=3"),
        ({"estimator": mn.FOMAML()}, 0.1, "estimator = FOBMAML.*FOMAML"),
        ({"adapt_only": "2"}, 0.1, r"adapt_only = None, this one has \['2'\]"),
        ({}, 0.2, "optimizer's lr = 0.1, this one has 0.2"),
    ],
)
def test_other_settings_do_not_go_on(settings: dict[str, Any], lr: float, told: str, tmp_path: Path):
    mn.fit(*begun(), ENDLESS, steps=2, out=tmp_path, **COMMON)
    learner, optimizer = begun(**settings)
    optimizer = torch.optim.SGD(learner.model.parameters(), lr=lr)
    before, log = vector(learner), (tmp_path / "log.csv").read_text()
    with pytest.raises(mn.SettingsError, match=told):
        mn.fit(learner, optimizer, ENDLESS, steps=4, out=tmp_path, **COMMON)
    assert torch.equal(vector(learner), before)
    assert (tmp_path / "log.csv").read_text() == log
    assert optimizer.param_groups[0]["lr"] == lr


@pytest.mark.parametrize(
    ("settings", "given", "told"),
    [
        ({}, {"max_norm": 1.0}, "max_norm = None, this one has 1.0"),
        ({}, {"metric": loss, "better": "smaller"}, "metric = query loss, this one has loss"),
        ({"loss": loss}, {}, "loss = squared_error, this one has loss"),
        ({"query_loss": lambda model, batch: loss(model, batch)}, {}, "query_loss = squared_error.*<lambda>"),
        ({"adapt_only": lambda name, _: "2" in name}, {}, "adapt_only = None.*<lambda>"),
    ],
)
def test_whatever_changes_the_mathematics_does_not_go_on(
    settings: dict[str, Any], given: dict[str, Any], told: str, tmp_path: Path
):
    held = {"validation": ENDLESS.take(2), "out": tmp_path}
    mn.fit(*begun(), ENDLESS, steps=2, **held, **COMMON)
    learner, optimizer = begun(**settings)
    before = vector(learner)
    with pytest.raises(mn.SettingsError, match=told):
        mn.fit(learner, optimizer, ENDLESS, steps=4, **held, **given, **COMMON)
    assert torch.equal(vector(learner), before)
    done = mn.fit(*begun(), ENDLESS, steps=4, **held, **COMMON)
    assert len(done.history) == 4


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"chunk_size": 1}, "chunk_size = 1 where it had None"),
        ({"execution": "in_place", "microbatch": 2}, "execution = in_place where it had vectorized"),
        ({"compile": True, "chunk_size": 1}, "compile = True where it had False, chunk_size = 1 where it had None"),
    ],
)
def test_what_changes_round_off_alone_goes_on_with_a_warning(
    settings: dict[str, Any], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(compiled, "build", lambda graph, tensors: graph)
    with_settings, without = begun(**settings), begun()
    mn.fit(*without, ENDLESS, steps=4, **COMMON)
    mn.fit(*begun(), ENDLESS, steps=2, out=tmp_path, **COMMON)
    with pytest.warns(
        UserWarning, match=f"goes on with {told}: the same mathematics, but not bit for bit.*dropout"
    ) as warned:
        done = mn.fit(*with_settings, ENDLESS, steps=4, out=tmp_path, **COMMON)
    assert [Path(one.filename) for one in warned] == [Path(__file__)]
    assert len(done.history) == 4
    torch.testing.assert_close(vector(with_settings[0]), vector(without[0]), rtol=1e-4, atol=1e-5)
    mn.fit(*begun(**settings), ENDLESS, steps=5, out=tmp_path, **COMMON)  # nothing is told of the same again


class Redrawn:
    """Tasks that are drawn anew at every look."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> mn.Tasks:
        return mn.Tasks(*(mn.Batch(torch.randn(4, 1), torch.randn(4, 1)) for _ in range(2)))


def test_other_tasks_do_not_go_on(tmp_path: Path):
    mn.fit(*begun(), ENDLESS, steps=2, out=tmp_path, **COMMON)
    others = mn.tasks.episodes(mn.tasks.sinusoid, shots=4, queries=4, seed=9)
    with pytest.raises(mn.SettingsError, match=r"digest of the first task = .*, this one has"):
        mn.fit(*begun(), others, steps=4, out=tmp_path, **COMMON)
    assert len(mn.fit(*begun(), ENDLESS, steps=4, out=tmp_path, **COMMON).history) == 4


Made = Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler]
SCHEDULERS: list[tuple[Made, Made, str]] = [
    (lambda o: schedules.StepLR(o, 3, 0.5), lambda o: schedules.StepLR(o, 3, 0.9), "gamma = 0.5, this one has 0.9"),
    (lambda o: schedules.StepLR(o, 3), lambda o: schedules.ExponentialLR(o, 0.1), "scheduler = StepLR.* ExponentialLR"),
    (
        lambda o: schedules.CosineAnnealingLR(o, 2),
        lambda o: schedules.CosineAnnealingLR(o, 4),
        r"scheduler's T_max = 2\.0, this one has 4\.0",
    ),
    (
        lambda o: schedules.MultiStepLR(o, [1, 3]),
        lambda o: schedules.MultiStepLR(o, [1, 1, 3]),
        r"milestones = \[1\.0, 3\.0\], this one has \[1\.0, 1\.0, 3\.0\]",
    ),
    (
        lambda o: schedules.CosineAnnealingWarmRestarts(o, 1, 2),  # T_i and T_cur move on, and are no settings
        lambda o: schedules.CosineAnnealingWarmRestarts(o, 1, 3),
        r"T_mult = 2\.0, this one has 3\.0",
    ),
    (
        lambda o: schedules.SequentialLR(o, [schedules.LinearLR(o), schedules.ExponentialLR(o, 0.9)], [1]),
        lambda o: schedules.SequentialLR(o, [schedules.LinearLR(o), schedules.ExponentialLR(o, 0.8)], [1]),
        r"scheduler 1's gamma = 0\.9, this one has 0\.8",
    ),
]


@pytest.mark.parametrize(("made", "other", "told"), SCHEDULERS)
def test_another_schedule_does_not_go_on(made: Made, other: Made, told: str, tmp_path: Path):
    learner, optimizer = begun()
    mn.fit(learner, optimizer, ENDLESS, steps=2, out=tmp_path, scheduler=made(optimizer), **COMMON)
    learner, optimizer = begun()
    before, state = vector(learner), optimizer.state_dict()
    with pytest.raises(mn.SettingsError, match=told):
        mn.fit(learner, optimizer, ENDLESS, steps=4, out=tmp_path, scheduler=other(optimizer), **COMMON)
    assert torch.equal(vector(learner), before)
    learner, optimizer = begun()
    done = mn.fit(learner, optimizer, ENDLESS, steps=4, out=tmp_path, scheduler=made(optimizer), **COMMON)
    assert len(done.history) == 4
    assert state["state"] == {}


def test_a_schedule_that_waits_for_a_score_is_refused(tmp_path: Path):
    learner, optimizer = begun()
    plateau: Any = schedules.ReduceLROnPlateau(optimizer)
    with pytest.raises(mn.SettingsError, match=r"ReduceLROnPlateau steps by a validation score.*CosineAnnealingLR"):
        mn.fit(learner, optimizer, ENDLESS, steps=2, scheduler=plateau, out=tmp_path / "out", **COMMON)
    wrong: Any = schedules.StepLR
    with pytest.raises(mn.SettingsError, match=r"scheduler must be an object such as .*got the class StepLR"):
        mn.fit(learner, optimizer, ENDLESS, steps=2, scheduler=wrong, out=tmp_path / "out", **COMMON)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("other", "told"),
    [
        ({"better": "larger"}, "better = smaller, this one has larger"),
        ({"validation": ENDLESS.take(3)}, "digest of the validation tasks = .*, this one has"),
        ({"validation": [*ENDLESS.take(1), *ENDLESS.take(1, first=5)]}, "digest of the validation tasks"),
    ],
)
def test_another_judge_of_the_best_does_not_go_on(other: dict[str, Any], told: str, tmp_path: Path):
    held = {"validation": ENDLESS.take(2), "out": tmp_path}
    mn.fit(*begun(), ENDLESS, steps=2, **held, **COMMON)
    with pytest.raises(mn.SettingsError, match=told):
        mn.fit(*begun(), ENDLESS, steps=4, **(held | other), **COMMON)
    state = load_state(tmp_path / LAST)
    new = {"better", "digest of the validation tasks"}
    assert new <= state["settings"].keys()
    state["settings"] = {name: value for name, value in state["settings"].items() if name not in new}
    save_state(tmp_path / LAST, state)  # of an older version, which knew nothing of them
    assert len(mn.fit(*begun(), ENDLESS, steps=4, **(held | other), **COMMON).history) == 4


def test_validation_tasks_drawn_anew_go_on(tmp_path: Path):
    for steps in (2, 4):
        done = mn.fit(*begun(), ENDLESS, steps=steps, validation=Redrawn(), out=tmp_path, **COMMON)
    assert len(done.history) == 4


def test_tasks_drawn_anew_go_on_and_looking_at_them_draws_nothing(tmp_path: Path):
    state = torch.get_rng_state()
    assert first_digest(Redrawn()) is None
    assert torch.equal(torch.get_rng_state(), state)
    for steps in (2, 4):
        done = mn.fit(*begun(), Redrawn(), steps=steps, out=tmp_path, **COMMON)
    assert len(done.history) == 4


def test_going_on_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for steps, told in ((2, ""), (4, "going on from step 2"), (4, "was finished before")):
        mn.fit(*begun(), ENDLESS, steps=steps, out=tmp_path, **{**COMMON, "progress": True})
        said = capsys.readouterr().err
        assert told in said
        assert ("going on" in said) == (told.startswith("going on"))


def test_functions_are_known_by_their_names():
    named = {loss: "loss", partial(partial(loss)): "loss", nn.Linear(1, 1): "Linear"}
    assert {function: qualified_name(function) for function in named} == named


def test_other_optimizers_fewer_steps_and_old_checkpoints(tmp_path: Path):
    learner, optimizer = begun()
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    mn.fit(learner, optimizer, ENDLESS, steps=2, out=tmp_path, scheduler=schedule, **COMMON)
    assert len(mn.fit(learner, optimizer, ENDLESS, steps=3, out=tmp_path, scheduler=schedule, **COMMON).history) == 3
    learner, optimizer = begun()
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)  # a later process, whose rate begins anew
    assert len(mn.fit(learner, optimizer, ENDLESS, steps=4, out=tmp_path, scheduler=schedule, **COMMON).history) == 4
    after = vector(learner)
    with pytest.raises(mn.SettingsError, match=r"has done 4 steps, more than the 3 asked for.*resume=False"):
        mn.fit(learner, optimizer, ENDLESS, steps=3, out=tmp_path, scheduler=schedule, **COMMON)
    momentum = torch.optim.SGD(learner.model.parameters(), lr=0.1, momentum=0.9)
    again = torch.optim.lr_scheduler.StepLR(momentum, 1)
    with pytest.raises(mn.SettingsError, match=r"optimizer's momentum = 0\.0, this one has 0\.9"):
        mn.fit(learner, momentum, ENDLESS, steps=5, out=tmp_path, scheduler=again, **COMMON)
    assert torch.equal(vector(learner), after)
    state = load_state(tmp_path / LAST)
    del state["settings"]  # of an older version
    save_state(tmp_path / LAST, state)
    learner, optimizer = begun(prox=3.0)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    assert len(mn.fit(learner, optimizer, ENDLESS, steps=6, out=tmp_path, scheduler=schedule, **COMMON).history) == 6


def test_nan_is_worse_than_any_number():
    for sign in (1.0, -1.0):
        assert improves(3.0, math.nan, sign)
        assert not improves(math.nan, 3.0, sign)
        assert not improves(math.nan, math.nan, sign)
        assert improves(sign * 2.0, sign * 3.0, sign)
        assert not improves(sign * 3.0, sign * 2.0, sign)


def masked(model: nn.Module, batch: mn.Batch) -> torch.Tensor:
    """The squared error, with what the test puts in the place of NaN: nothing to begin with."""
    return mn.metrics.squared_error(model, batch).nan_to_num(getattr(masked, "replacement", math.nan))


def test_a_task_of_nan_is_told_once_and_does_not_freeze_the_best(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    validation = ENDLESS.take(4)
    validation[2].query.inputs[0] = math.nan
    held = {"validation": validation, "metric": masked, "better": "smaller", "out": tmp_path}
    with pytest.warns(mn.NonFiniteWarning, match=r"meta-step 2 is NaN.*task 2 holds NaN.*query inputs") as told:
        mn.fit(*begun(), ENDLESS, steps=6, **held, **COMMON)
    assert [Path(one.filename) for one in told] == [Path(__file__)]
    monkeypatch.setattr(masked, "replacement", 0.0, raising=False)
    done = mn.fit(*begun(), ENDLESS, steps=8, **held, **COMMON)
    assert math.isfinite(done.best)
    assert done.best_step == 8
    monkeypatch.undo()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", mn.NonFiniteWarning)
        worse = mn.fit(*begun(), ENDLESS, steps=10, **held, **COMMON)
    assert (worse.best, worse.best_step) == (done.best, 8)


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_warnings_are_located_where_the_library_was_called(chunk_size: int | None):
    tasks, common = ENDLESS.take(4), COMMON | {"tasks_per_step": 4}
    tasks[0].query.inputs[0] = math.nan
    for call in (
        lambda: mn.fit(*begun(chunk_size=chunk_size), tasks, steps=1, **common),
        lambda: begun()[0].backward(tasks),
        lambda: begun()[0].evaluate(tasks),
    ):
        with pytest.warns(mn.NonFiniteWarning) as told:
            call()
        assert {Path(one.filename) for one in told} == {Path(__file__)}
    learner, _ = begun(solver=mn.GradientDescent(3, lr=50.0))
    with pytest.warns(UserWarning, match="adaptation raised the support loss") as told:
        learner.adapt(ENDLESS[1].support)
    assert {Path(one.filename) for one in told} == {Path(__file__)}


def test_the_best_with_settings_that_can_not_be_written(tmp_path: Path):
    solver = mn.TorchOptimizer(lambda parameters: torch.optim.SGD(parameters, lr=0.1), steps=2)

    def adapted(name: str, parameter: nn.Parameter) -> bool:
        return name.startswith("2") and parameter.requires_grad

    learner, optimizer = begun(solver=solver, adapt_only=adapted)
    mn.fit(learner, optimizer, ENDLESS, steps=2, validation=ENDLESS.take(2), out=tmp_path, **COMMON)
    given: dict[str, Any] = {}
    for name, value in (("solver", solver), ("adapt_only", adapted)):
        with pytest.raises(
            mn.SettingsError, match=f"the {name} of this learner could not be written down; give {name}="
        ):
            mn.load_pretrained(tmp_path / "best", begun()[0].model, mn.metrics.squared_error, **given)
        given[name] = value
    again = mn.load_pretrained(tmp_path / "best", begun()[0].model, mn.metrics.squared_error, **given)
    assert again.prox == 2.0
    assert again.estimator == learner.estimator
    assert torch.equal(vector(again), vector(learner))
    # steps of the solver are known of both, its function is not
    other = mn.TorchOptimizer(lambda parameters: torch.optim.SGD(parameters, lr=0.1), steps=3)
    learner, optimizer = begun(solver=other, adapt_only=adapted)
    with pytest.raises(mn.SettingsError, match=r"solver = TorchOptimizer\(steps=2\).*TorchOptimizer\(steps=3\)"):
        mn.fit(learner, optimizer, ENDLESS, steps=4, validation=ENDLESS.take(2), out=tmp_path, **COMMON)


def test_what_is_no_optimizer_of_the_model_is_refused(tmp_path: Path):
    learner, optimizer = begun()
    strange = torch.optim.SGD(begun()[0].model.parameters(), lr=0.1)
    for given, told in (
        (None, "optimizer must be an object such as torch.optim.Adam.*got None"),
        (torch.optim.Adam, "got the class Adam"),
        (strange, "a SGD of 4 parameters, holds none of the trainable parameters of learner.model"),
    ):
        with pytest.raises(mn.SettingsError, match=told):
            mn.fit(learner, given, ENDLESS, steps=2, out=tmp_path / "out", **COMMON)
    assert not (tmp_path / "out").exists()
    mn.fit(learner, optimizer, ENDLESS, steps=1, **COMMON)


class Bursts(torch.optim.SGD):
    """Of which the fifth step is without end."""

    taken = 0

    def step(self) -> None:
        super().step()
        self.taken += 1
        if self.taken == 5:
            with torch.no_grad():
                self.param_groups[0]["params"][-1].fill_(math.inf)


@pytest.mark.parametrize("max_norm", [None, 1.0])
def test_a_training_whose_parameters_are_not_finite_is_ended(max_norm: float | None, tmp_path: Path):
    learner, _ = begun()
    settings = COMMON | {"validation": ENDLESS.take(3), "out": tmp_path, "max_norm": max_norm}
    with pytest.raises(mn.NonFiniteError) as told:
        mn.fit(learner, Bursts(learner.model.parameters(), lr=0.25), ENDLESS, steps=9, **settings)
    said = str(told.value)
    assert "diverged at meta-step 5: the model's parameters are not finite" in said
    assert "lr = 0.25 of the optimizer, Bursts, is too large: give a smaller one, or " in said
    assert ("max_norm=" in said) == (max_norm is None)
    assert "mn.optim.NormalizedSGD" in said
    assert "prox" not in said
    assert f"last checkpoint, of step 4, is {tmp_path / LAST}; the best by validation, of step " in said
    assert str(tmp_path / "best") in said
    kept = load_state(tmp_path / LAST)
    assert len(kept["history"]) == 4
    assert all(bool(leaf.isfinite().all()) for leaf in kept["model"].values())


def test_a_training_that_diverges_before_its_first_checkpoint_names_none(tmp_path: Path):
    learner, _ = begun()
    settings = COMMON | {"every": 9, "out": tmp_path}
    with pytest.raises(mn.NonFiniteError, match=r"diverged at meta-step 5.*NormalizedSGD$"):
        mn.fit(learner, Bursts(learner.model.parameters(), lr=0.1), ENDLESS, steps=9, **settings)
    assert not (tmp_path / LAST).exists()


def test_a_query_loss_that_explodes_is_told_once_and_ended():
    learner, _ = begun()
    learner.model.double()
    tasks = [mn.Tasks(*(mn.Batch(*(leaf.double() for leaf in batch)) for batch in task)) for task in ENDLESS.take(6)]
    optimizer = torch.optim.SGD(learner.model.parameters(), lr=1e4)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with pytest.raises(mn.NonFiniteError, match="lr = 10000") as ended:
            mn.fit(learner, optimizer, tasks, steps=200, **COMMON)
    assert "prox" not in str(ended.value)
    (rise,) = [str(one.message) for one in told if "query loss rose" in str(one.message)]
    assert "at meta-step 3" in rise  # in one step alone the tasks may be odd ones
    assert "lr = 10000 of the optimizer, SGD" in rise
    assert "prox" not in rise


@pytest.mark.parametrize("value", [300.0, 1e-4])
def test_half_precision_has_a_length(value: float):
    """Its squares overflow, or vanish."""
    assert length([torch.full((16,), value).half()]) == pytest.approx(4 * value, rel=1e-2)


def test_what_a_rise_is():
    """A thousand times the first loss, and the largest of few early ones, or the middle one of many."""
    assert rose(0.5, [0.5], 501.0)
    assert not rose(0.5, [0.5], 499.0)
    assert not rose(0.5, [0.5], -1e9)
    assert not rose(1e-6, [1e-6, 0.9, 1.1, 1.0], 1100.0)  # began small by chance
    assert rose(1e-6, [1e-6, 0.9, 1.1, 1.0], 1101.0)
    assert not rose(1e-6, [1e-6, *[0.9] * 9, 50.0], 900.0)
    assert rose(1e-6, [1e-6, *[0.9] * 9, 50.0], 901.0)
    assert rose(-2.0, [-2.0, math.nan], 2001.0)
    assert not rose(0.0, [0.0], 1.0)  # of nothing there is no thousandfold
    assert not rose(math.nan, [], 1.0)


def test_ten_steps_without_a_finite_task_after_good_ones_name_data_and_lr():
    tasks = ENDLESS.take(40)
    for place in range(4, 24):
        tasks[place].support.inputs[0] = math.nan
    with pytest.raises(
        mn.NonFiniteError, match=r"task 0: support inputs.*10 meta-steps in a row, though not in earlier.*lr = 0\.1 of"
    ):
        mn.fit(*begun(), Ordered(tasks), steps=14, **COMMON)


class Ordered(Dataset):
    """Tasks without an end, so that steps take them in their order."""

    def __init__(self, tasks: list[mn.Tasks]) -> None:
        self.tasks = tasks

    def __getitem__(self, index: int) -> mn.Tasks:
        return self.tasks[index]


def test_a_stack_is_the_list_of_its_tasks():
    vectors = []
    for tasks in (ENDLESS.take(6), mn.tasks.collate(ENDLESS.take(6))):
        learner, optimizer = begun()
        mn.fit(learner, optimizer, tasks, steps=4, **COMMON)
        vectors.append(vector(learner))
    assert torch.equal(*vectors)


def test_lines_are_shown_where_there_is_no_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    clock = iter(range(0, 1000, 12))  # twelve seconds a step: a line at the third one, though `every` is five
    monkeypatch.setattr("metanudge.training.progress.monotonic", lambda: next(clock))
    given = COMMON | {"every": 5, "progress": True, "validation": ENDLESS.take(2)}
    done = mn.fit(*begun(), ENDLESS, steps=7, **given)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in lines] == ["step 3/7", "step 5/7", "step 7/7"]
    for line, step in zip(lines, (3, 5, 7), strict=True):
        record = done.history[step - 1]
        assert f": query loss {record.query_loss:.4g}, residual {record.residual:.2g}, dropped 0" in line
    assert "validation" not in lines[0]
    assert f", validation query loss {done.history[4].validation:.4g} ± " in lines[1]
    mn.fit(*begun(), ENDLESS, steps=7, **(given | {"progress": False}))
    assert capsys.readouterr().err == ""


def test_beginning_again_for_want_of_a_checkpoint_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    told = "no checkpoint yet (one is written every 2 steps): beginning at step 1"
    given = COMMON | {"progress": True, "out": tmp_path}
    tasks = ENDLESS.take(3)
    with pytest.raises(IndexError):  # killed in its second step
        mn.fit(*begun(), Ordered(tasks), steps=4, **given)
    assert told not in capsys.readouterr().err
    mn.fit(*begun(), Ordered(ENDLESS.take(8)), steps=4, **given)
    assert told in capsys.readouterr().err
    mn.fit(*begun(), Ordered(ENDLESS.take(8)), steps=4, **given)
    assert told not in capsys.readouterr().err


def test_a_small_first_loss_and_a_bad_batch_end_no_training():
    tasks = ENDLESS.take(6)
    for batch in tasks[0]:
        batch.targets.mul_(1e-3)
    tasks[2].query.targets[:] = math.nan
    learner, optimizer = begun()
    for parameter in learner.model.parameters():
        torch.nn.init.zeros_(parameter)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", mn.UnsolvedWarning)
        found = mn.fit(learner, optimizer, Ordered(tasks), steps=6, **{**COMMON, "tasks_per_step": 1})
    assert found.skipped_steps == 1


def test_what_can_not_take_a_step_costs_no_weights(tmp_path):
    learner, optimizer = begun()
    mn.fit(learner, optimizer, ENDLESS, steps=2, validation=ENDLESS.take(2), out=tmp_path, **COMMON)
    before = (tmp_path / "last.pt").read_bytes()

    def broken(model, batch):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        mn.fit(
            mn.MetaLearner(learner.model, broken, prox=2.0),
            optimizer,
            ENDLESS,
            steps=2,
            out=tmp_path,
            resume=False,
            **COMMON,
        )
    assert (tmp_path / "last.pt").read_bytes() == before
    assert (tmp_path / "best" / "metanudge.json").is_file()


def test_a_training_that_explodes_at_once_is_told():
    """Its early losses are all those of the explosion, and tell nothing of what is usual."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    batches = [mn.Batch(torch.randn(8, 5, 4), torch.randint(3, (8, 5))) for _ in range(2)]
    learner = mn.MetaLearner(model, mn.metrics.cross_entropy)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e5)
    with pytest.warns(UserWarning, match="query loss rose to .* at meta-step 3, from 1"):
        mn.fit(learner, optimizer, mn.Tasks(*batches), steps=20, tasks_per_step=4, progress=False)


def test_an_optimizer_of_a_part_of_the_model_is_told():
    learner, _ = begun()
    names, parameters = zip(*learner.model.named_parameters(), strict=True)
    with pytest.warns(UserWarning, match=rf"has 1 of the model's {len(names)} trainable.*such as {names[0]}"):
        mn.fit(learner, torch.optim.SGD(parameters[-1:], lr=0.1), ENDLESS, steps=1, **COMMON)
    for parameter in parameters[:-1]:
        parameter.requires_grad_(False)
    mn.fit(learner, torch.optim.SGD(parameters[-1:], lr=0.1), ENDLESS, steps=1, **COMMON)


REWRITTEN = [
    "return 2.0 * F.mse_loss(model(batch.inputs), batch.targets)",
    "# a comment\n    return 2.0*F.mse_loss(model(batch.inputs), batch.targets)",
    "return 3.0 * F.mse_loss(model(batch.inputs), batch.targets)",
]


@pytest.mark.parametrize("decorated", ["", "@torch.no_grad()\n@torch.enable_grad()\n"])
def test_a_loss_that_was_rewritten_is_told_when_a_training_goes_on(decorated: str, tmp_path: Path):
    def go(body: str, steps: int, text: str = "") -> None:
        path = tmp_path / f"losses_{steps}.py"
        path.write_text(f"import torch\nimport torch.nn.functional as F\n\n\n{decorated}def loss(model, batch):\n")
        path.write_text(f"{path.read_text()}{text}    {body}\n")
        learner, optimizer = begun()
        found = runpy.run_path(str(path))["loss"]
        mn.fit(mn.MetaLearner(learner.model, found), optimizer, ENDLESS, steps=steps, out=tmp_path / "out", **COMMON)

    go(REWRITTEN[0], 2)
    go(REWRITTEN[1], 4, '    """Of others."""\n')
    with pytest.warns(UserWarning, match="the loss, loss, was written differently"):
        go(REWRITTEN[2], 6)
    go(REWRITTEN[2], 8)


def test_what_has_no_source_is_not_compared():
    names: dict = {}
    exec("def loss(model, batch): return batch", names)
    for one in (names["loss"], torch.add, lambda model, batch: batch, nn.MSELoss()):
        assert code_of(functools.partial(one)) == code_of(one)
    assert code_of(names["loss"]) == code_of(torch.add) == ""
