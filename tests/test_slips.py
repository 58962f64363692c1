"""Slips of a new user: what does not fit is told with its shapes, dtypes and lines, and with a cure that works."""

from __future__ import annotations

import contextlib
import functools
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metanudge as mn
from metanudge.cli import main
from metanudge.files import load_state, save_state

EXECUTIONS = ["vectorized", "in_place"]
SOLVER = mn.GradientDescent(2, lr=0.1)
X, Y = torch.linspace(-1, 1, 30).reshape(2, 5, 3), torch.linspace(0, 1, 10).reshape(2, 5, 1)


def both(inputs: object, targets: Tensor = Y) -> mn.Tasks:
    return mn.Tasks(*(mn.Batch(inputs, targets),) * 2)


def cross_entropy(model: nn.Module, batch: mn.Batch) -> Tensor:
    return F.cross_entropy(model(batch.inputs), batch.targets)


LABELS = torch.zeros(2, 5, dtype=torch.int64)


def note_of(error: BaseException) -> str:
    """The note of an error that says what the loss was given."""
    (note,) = (note for note in error.__notes__ if note.startswith("metanudge called this"))
    return note


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize(
    ("tasks", "loss", "words"),
    [
        (
            both(X.double()),
            mn.metrics.squared_error,
            r"float64 \[5, 3\].*float32 \[4, 3\].*tasks\.to\(torch\.float32\)",
        ),
        (both(X.long()), mn.metrics.squared_error, r"inputs int64 \[5, 3\].*floats in the dtype of the model"),
        (both(X[..., :2]), mn.metrics.squared_error, r"inputs float32 \[5, 2\].*0\.weight, float32 \[4, 3\]"),
        (mn.Tasks(mn.Batch(X, Y), mn.Batch(X[..., :2], Y)), mn.metrics.squared_error, "the query set of one task"),
        (
            both({"x": X, "y": Y}),
            mn.metrics.squared_error,
            r"inputs \{x: float32 \[5, 3\], y: float32 \[5, 1\]\}, targets",
        ),
        (both(X, LABELS.float()), cross_entropy, r"targets float32 \[5\].*indices of classes.*torch\.int64"),
        (both(X, LABELS + 9), cross_entropy, r"targets int64 \[5\].*from 0 on"),
        (both(X, LABELS.unsqueeze(-1)), cross_entropy, r"targets int64 \[5, 1\]"),
        (both(X), lambda out, targets: out - targets, "called this as loss.model, batch.*of one task, mn.Batch"),
        (both(X), lambda out, targets: F.mse_loss(out, targets), "called this as loss.model, batch"),
        (both(X), lambda model, batch: model(batch), "inputs float32"),
        (both(X), lambda model, batch: model(batch.inputs) - batch.target, "inputs float32"),
        (both(X), lambda model, batch: model(batch.inputs).mean(batch), "inputs float32"),
    ],
    ids=[
        "double",
        "integers",
        "width",
        "query",
        "dict",
        "float labels",
        "labels out of range",
        "labels with an axis",
        "difference of outputs",
        "loss of outputs",
        "the batch for inputs",
        "no such field",
        "the batch for an axis",
    ],
)
def test_what_a_loss_was_given_is_noted(tasks: mn.Tasks, loss: object, words: str, execution: str) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1 if loss is not cross_entropy else 4))
    learner = mn.MetaLearner(model, loss, solver=SOLVER, execution=execution)
    for use in (learner.backward, learner.evaluate):
        with pytest.raises((RuntimeError, IndexError, ValueError, TypeError, AttributeError, AssertionError)) as told:
            use(tasks)
        assert re.search(words, note_of(told.value))
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_adapt_notes_what_the_loss_was_given(execution: str) -> None:
    learner = mn.MetaLearner(nn.Linear(3, 1), mn.metrics.squared_error, solver=SOLVER, execution=execution)
    with pytest.raises(RuntimeError) as told:
        learner.adapt(mn.Batch(X[0, :, :2], Y[0]))
    assert re.search(r"support set.*inputs float32 \[5, 2\].*weight, float32 \[1, 3\]", note_of(told.value))


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize(
    "error", [RuntimeError("my own"), KeyError("shape"), ValueError("stale"), torch.OutOfMemoryError("out of memory")]
)
def test_errors_of_ones_own_pass_as_they_are(error: Exception, execution: str) -> None:
    def fails(model: nn.Module, batch: mn.Batch) -> Tensor:
        raise error

    with pytest.raises(type(error)) as told:
        mn.MetaLearner(nn.Linear(3, 1), fails, solver=SOLVER, execution=execution).backward(both(X))
    assert told.value is error


# Stacks.


@pytest.mark.parametrize("seen", ["backward", "evaluate"])
def test_adapt_refuses_a_stack(seen: str) -> None:
    """A linear layer would take it, as one task of more examples."""
    learner = mn.MetaLearner(nn.Linear(3, 1), mn.metrics.squared_error, solver=SOLVER)
    getattr(learner, seen)(both(X))
    with pytest.raises(mn.TasksError, match=r"stack of 2.*\(2, 5, 3\) and \(2, 5, 1\).*tasks\.unstack\(\)\[i\]"):
        learner.adapt(mn.Batch(X, Y))
    with pytest.raises(mn.TasksError, match=r"got Tasks; give the support set of one task, task\.support"):
        learner.adapt(both(X))
    assert isinstance(learner.adapt(mn.Batch(X[0], Y[0])), nn.Linear)


@pytest.mark.parametrize("use", ["backward", "evaluate"])
def test_a_list_of_stacks_is_refused_once_their_tasks_are_known(use: str) -> None:
    """A linear layer would take each as one task of more examples."""
    learner = mn.MetaLearner(nn.Linear(3, 1), mn.metrics.squared_error, solver=SOLVER)
    learner.backward(both(X))
    learner.model.zero_grad()
    with pytest.raises(
        mn.TasksError, match=r"looks like a stack of 2.*\(2, 5, 3\) and \(2, 5, 1\).*stack\.unstack\(\)"
    ):
        getattr(learner, use)([both(X), both(X)])
    assert learner.model.weight.grad is None
    getattr(learner, use)([*both(X).unstack(), *both(X).unstack()])


def test_adapt_takes_a_task_of_sequences() -> None:
    """Five sequences of seven where five vectors were seen: no stack of tasks that were seen has this shape."""
    learner = mn.MetaLearner(nn.Linear(3, 1), mn.metrics.squared_error, solver=SOLVER)
    learner.backward(both(X))
    for inputs, targets in (((5, 7, 3), (5, 7, 1)), ((5, 5, 4), (5, 5, 1)), ((5, 5, 3), (5, 5, 2))):
        batch = mn.Batch(torch.ones(inputs), torch.ones(targets))
        with contextlib.suppress(RuntimeError, mn.LossError):  # of a width that the model does not take
            learner.adapt(batch)


def test_adapt_takes_whatever_form_its_tasks_had() -> None:
    """Tasks of matrices and of stacks of matrices, both seen: none of them is a stack of tasks."""
    learner = mn.MetaLearner(nn.Linear(3, 1), mn.metrics.squared_error, solver=SOLVER)
    learner.backward([both(X), both(X[0], Y[0])])
    for batch in (mn.Batch(X, Y), mn.Batch(X[0], Y[0])):
        assert isinstance(learner.adapt(batch), nn.Linear)


# What vmap cannot run: the advice is followed to its end.


def looked_at(model: nn.Module, batch: mn.Batch) -> Tensor:
    value = mn.metrics.squared_error(model, batch)
    return value if value.item() > 0 else 2 * value


def as_array(model: nn.Module, batch: mn.Batch) -> Tensor:
    value = mn.metrics.squared_error(model, batch)
    return value * (1 + 0 * float(value.detach().numpy()))


def branches(model: nn.Module, batch: mn.Batch) -> Tensor:
    value = mn.metrics.squared_error(model, batch)
    return value if value > 0 else 2 * value


def through_a_number(model: nn.Module, batch: mn.Batch) -> Tensor:
    return torch.tensor(mn.metrics.squared_error(model, batch).item())


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (looked_at, r"calls \.item\(\).*only looked at.*execution=\"in_place\""),
        (as_array, r"calls \.numpy\(\).*execution=\"in_place\", and \.detach\(\) before \.numpy\(\)"),
        (branches, r"branches on the value.*torch\.where.*execution=\"in_place\""),
    ],
)
def test_what_is_only_looked_at_runs_in_place(loss: object, words: str) -> None:
    with pytest.raises(mn.LossError, match=words):
        mn.MetaLearner(nn.Linear(3, 1), loss, solver=SOLVER, execution="vectorized").backward(both(X))
    learner = mn.MetaLearner(nn.Linear(3, 1), loss, solver=SOLVER, execution="in_place")
    assert learner.backward(both(X)).dropped_tasks == 0


def test_what_goes_through_a_number_is_not_sent_in_place() -> None:
    """Where it would fail again; both say that the tensor has to be returned."""
    with pytest.raises(mn.LossError, match=r"return the tensor itself: through a number no gradient reaches.*either"):
        mn.MetaLearner(nn.Linear(3, 1), through_a_number, solver=SOLVER, execution="vectorized").backward(both(X))
    with pytest.raises(mn.LossError, match="no gradient reaches"):
        mn.MetaLearner(nn.Linear(3, 1), through_a_number, solver=SOLVER, execution="in_place").backward(both(X))


# The command line.


OWN = """import torch, metanudge as mn

def divide():
    return 1 / 0

def make():
    return divide()

def loss(model, batch):
    return batch.nothing

def wide(model, batch):
    return model(batch.inputs.repeat(1, 2)).mean()
"""
CONFIG = """seeds = [0, 1]
[tasks]
name = "sinusoid"
shots = 4
[model]
name = "mlp"
inputs = 1
outputs = 1
hidden = [4]
[learner]
loss = "squared_error"
[solver]
name = "gradient_descent"
steps = 2
lr = 0.1
[training]
steps = 4
tasks_per_step = 2
every = 2
[validation]
tasks = 2
[evaluation]
tasks = 3
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(OWN)
    (tmp_path / "broken.py").write_text("x = 1\ndef make(:\n")
    (tmp_path / "small.toml").write_text(CONFIG)
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "lines"),
    [
        (["check", "own.py:make"], ["ZeroDivisionError: division by zero", "own.py:7, in make", "own.py:4, in divide"]),
        (["smoothness", "own.py:make"], ["own.py:4, in divide: return 1 / 0"]),
        (["check", "broken.py:make"], ["SyntaxError", "broken.py:2"]),
        (["train", "loss.toml"], ["AttributeError", "own.py:10, in loss: return batch.nothing"]),
        (["train", "wide.toml"], ["inputs float32 [10, 1]", "own.py:13, in wide"]),
    ],
)
def test_errors_in_ones_own_file_are_told_by_its_lines(
    arguments: list[str], lines: list[str], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("loss", "wide"):
        (here / f"{name}.toml").write_text(CONFIG.replace("squared_error", f"own.py:{name}"))
    assert main(arguments) == 2
    told = capsys.readouterr().err
    assert told.startswith("metanudge: ")
    for line in lines:
        assert line in told
    assert "Traceback" not in told
    assert not (here / "runs").exists()


def test_a_mistake_of_ours_keeps_its_traceback(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("metanudge.cli.read_config", lambda *_: torch.zeros(2) @ torch.zeros(3))
    monkeypatch.setattr("metanudge.command.failures._NOT_THEIRS", ("/",))
    with pytest.raises(RuntimeError):
        main(["train", "small.toml"])


def test_a_mistake_of_ours_below_ones_own_file_keeps_its_traceback(here: Path) -> None:
    (here / "below.py").write_text("from metanudge import advice\n\ndef make():\n    return advice.rounded(0.0)\n")
    with pytest.raises(ValueError, match=r"math domain|positive"):
        main(["check", "below.py:make"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["trian", "small.toml"], "no command 'trian'; did you mean \"train\"?"),
        (["reproduce", "synthetik"], 'did you mean "synthetic"?'),
        (["reproduce", "synthetic", "--only", "bais"], "no study 'bais'; did you mean \"bias\"?"),
        (["check", "own.py:mkae"], "no function 'mkae'; did you mean \"make\"? There is divide, make, loss, wide"),
    ],
)
def test_misspelt_names_are_told_with_the_nearest(
    arguments: list[str], words: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert words in capsys.readouterr().err


def test_a_misspelt_option_is_told_with_the_nearest(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["train", "small.toml", "--sedes", "1"])
    assert exit_.value.code == 2
    assert "--seeds" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("every = 2", "every = 0", "every must be"),
        ("every = 2", "workers = -1", "workers must be"),
        ("every = 2", "max_norm = -1.0", "max_norm must be"),
        ("shots = 4", "shots = 0", "shots must be"),
        ("shots = 4", "number = 1", "takes 2 different tasks, but there are 1"),
        ("[validation]\ntasks = 2", "[validation]\ntasks = -2", "[validation] tasks must be"),
        ("inputs = 1", "inputs = 3", "with the query set of one task"),
        ("[evaluation]", '[evaluation]\nmetric = "accuracy"', "at least two classes"),
        ("[evaluation]", "[evaluation]\npermutations = 4", "label permutations need class indices"),
    ],
)
def test_nothing_is_written_before_all_settings_are_looked_at(
    old: str, new: str, words: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert old in CONFIG
    (here / "small.toml").write_text(CONFIG.replace(old, new))
    assert main(["train", "small.toml", "--quiet"]) == 2
    assert words in capsys.readouterr().err
    assert not (here / "runs").exists()


def test_an_incomplete_training_is_not_evaluated_unasked(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = here / "runs" / "small" / "evaluation.json"
    assert main(["train", "small.toml", "--quiet"]) == 0
    shutil.rmtree(here / "runs" / "small" / "seed-0")  # killed before its first checkpoint
    assert main(["evaluate", "runs/small"]) == 2
    told = capsys.readouterr().err
    assert "seed 0 is missing" in told
    assert "metanudge train runs/small/config.toml --out runs/small" in told
    assert not record.exists()
    assert main(["evaluate", "runs/small", "--partial"]) == 0
    assert "seed 0 is missing" in capsys.readouterr().out
    assert not record.exists()
    partial = json.loads((record.parent / "evaluation-partial.json").read_text())
    assert list(partial["seeds"]) == ["1"]
    assert main(["train", "runs/small/config.toml", "--out", "runs/small", "--quiet"]) == 0
    assert main(["evaluate", "runs/small", "--partial"]) == 0  # of a training that is complete
    whole = record.read_bytes()
    last = here / "runs" / "small" / "seed-1" / "last.pt"
    state = load_state(last)
    state["history"] = state["history"][:3]
    save_state(last, state)
    capsys.readouterr()
    assert main(["evaluate", "runs/small"]) == 2
    assert "seed 1 is at step 3 of 4" in capsys.readouterr().err
    assert main(["evaluate", "runs/small", "--partial"]) == 0
    assert record.read_bytes() == whole


def test_the_seeds_that_were_asked_for_are_those_that_count(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = here / "runs" / "small"
    assert main(["train", "small.toml", "--quiet", "--seeds", "5"]) == 0
    assert main(["evaluate", "runs/small"]) == 0
    assert main(["evaluate", "small.toml"]) == 0
    assert main(["train", "small.toml", "--quiet", "--seeds", "6"]) == 0
    assert json.loads((out / "seeds.json").read_text()) == [5, 6]
    shutil.rmtree(out / "seed-6")
    capsys.readouterr()
    assert main(["evaluate", "runs/small"]) == 2
    told = capsys.readouterr().err
    assert "seed 6 is missing" in told
    assert "--out runs/small --seeds 5 6, or" in told
    (out / "seeds.json").write_text("7")
    assert main(["evaluate", "runs/small"]) == 2
    assert "should hold a list of seeds" in capsys.readouterr().err
    (out / "seeds.json").unlink()  # a folder of an older version: the settings file says
    assert main(["evaluate", "runs/small"]) == 2
    assert "seed 0 is missing, seed 1 is missing" in capsys.readouterr().err
    assert main(["train", "small.toml", "--quiet", "--seeds", "5", "--fresh"]) == 0
    assert json.loads((out / "seeds.json").read_text()) == [5]


@pytest.mark.parametrize("given", [lambda batch: 0.0, lambda predictions, targets, weights: 0.0])
def test_functions_of_another_number_of_arguments_are_refused(given: object) -> None:
    model = nn.Linear(3, 1)
    for argument in ({"loss": given}, {"loss": mn.metrics.squared_error, "query_loss": given}):
        with pytest.raises(mn.SettingsError, match=rf"{list(argument)[-1]} must be a function loss\(model, batch\)"):
            mn.MetaLearner(model, **argument)
    with pytest.raises(mn.SettingsError, match="metric must be a function"):
        mn.MetaLearner(model, mn.metrics.squared_error, solver=SOLVER).evaluate(both(X), given)


def scaled(model: nn.Module, batch: mn.Batch, scale: float = 2.0) -> Tensor:
    return scale * mn.metrics.squared_error(model, batch)


def three(model: nn.Module, batch: mn.Batch, scale: float) -> Tensor:
    return scaled(model, batch, scale)


@functools.wraps(three)
def wrapped(model: nn.Module, batch: mn.Batch) -> Tensor:
    return three(model, batch, 2.0)


@pytest.mark.parametrize("loss", [scaled, wrapped, functools.partial(three, scale=2.0), lambda *given: scaled(*given)])
def test_whatever_can_be_called_with_the_two_is_a_loss(loss: object) -> None:
    assert mn.MetaLearner(nn.Linear(3, 1), loss, solver=SOLVER).backward(both(X)).dropped_tasks == 0


def test_a_number_a_task_is_no_class_label() -> None:
    """Of tasks whose examples have their axis, targets may be one integer each: which row of a table, say."""

    def loss(model: nn.Module, batch: mn.Batch) -> Tensor:
        return (model(batch.inputs) - torch.arange(4.0)[batch.targets]).square().mean()

    learner, tasks = mn.MetaLearner(nn.Linear(3, 1), loss, solver=SOLVER), both(X, torch.tensor([1, 3]))
    assert learner.backward(tasks).dropped_tasks == 0
    assert isinstance(learner.adapt(mn.Batch(X[0], tasks.support.targets[0])), nn.Linear)


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_one_task_of_labels_without_its_axis_is_not_taken_for_a_stack(execution: str) -> None:
    """Five examples of a class each would be five tasks of one label, on which a cross entropy runs all the same."""
    learner = mn.MetaLearner(nn.Linear(3, 4), cross_entropy, solver=SOLVER, execution=execution)
    one = both(X[0], LABELS[0])
    for use in (learner.backward, learner.evaluate):
        with pytest.raises(mn.TasksError, match=r"shape \(5,\).*\[mn\.Tasks\(\.\.\.\)\]"):
            use(one)
    assert len(learner.evaluate([one]).values) == 1
    stack = both(X[:1], LABELS[:1])
    assert torch.equal(learner.evaluate([one]).values, learner.evaluate(stack).values)


def test_a_training_without_validation_shows_no_best() -> None:
    model = nn.Linear(3, 1)
    learner = mn.MetaLearner(model, mn.metrics.squared_error, solver=SOLVER)
    optimizer, tasks = torch.optim.SGD(model.parameters(), lr=0.1), [mn.Tasks(*(mn.Batch(X[0], Y[0]),) * 2)]
    given = {"steps": 1, "tasks_per_step": 1, "progress": False}
    found = mn.fit(learner, optimizer, tasks, **given)
    assert repr(found) == f"Fit(steps=1, query_loss={found.history[0].query_loss:.4g}, skipped=0)"
    assert "best=" in repr(mn.fit(learner, optimizer, tasks, validation=both(X), **given))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"estimator": "maml"}, r"got 'maml'; give mn\.MAML\(\)$"),
        ({"estimator": "FOBMAML"}, r"got 'FOBMAML'; give mn\.FOBMAML\(\)$"),
        ({"solver": "nesterov"}, r"got 'nesterov'; give mn\.Nesterov\(\.\.\.\)$"),
        ({"solver": "sgd"}, r"such as mn\.Nesterov\(steps=16\), got 'sgd'$"),
    ],
)
def test_a_name_in_the_place_of_a_part_is_told_what_to_give(settings: dict[str, str], words: str) -> None:
    with pytest.raises(mn.SettingsError, match=words):
        mn.MetaLearner(nn.Linear(3, 1), mn.metrics.squared_error, **settings)


def test_numpy_arrays_are_told_without_their_numbers() -> None:
    learner = mn.MetaLearner(nn.Linear(3, 1), mn.metrics.squared_error, solver=SOLVER)
    optimizer = torch.optim.SGD(learner.model.parameters(), lr=0.1)
    arrays = mn.Batch(X.numpy(), Y.numpy())
    tasks = mn.Tasks(arrays, arrays)
    for use in (
        lambda: learner.backward(tasks),
        lambda: learner.evaluate([tasks]),
        lambda: learner.adapt(arrays),
        lambda: mn.fit(learner, optimizer, [tasks, tasks], steps=1, tasks_per_step=2, progress=False),
        lambda: mn.fit(learner, optimizer, tasks, steps=1, tasks_per_step=2, progress=False),
    ):
        with pytest.raises(
            mn.TasksError, match=r"found a numpy array of float32 \[2, 5, 3\]; make it a tensor: torch\.from_numpy"
        ):
            use()


def test_what_is_no_batch_is_told_how_to_become_one() -> None:
    learner = mn.MetaLearner(nn.Linear(3, 1), mn.metrics.squared_error, solver=SOLVER)
    with pytest.raises(mn.TasksError, match=r"got tuple; wrap it: mn\.Batch\(x, y\)"):
        learner.adapt((X[0], Y[0]))
    with pytest.raises(mn.TasksError, match=r"support of mn\.Tasks.*got tuple; wrap it: mn\.Batch\(x, y\)"):
        learner.backward(mn.Tasks((X, Y), mn.Batch(X, Y)))
    with pytest.raises(mn.TasksError, match=r"query of mn\.Tasks.*got dict.*mn\.Batch\(inputs=\{\.\.\.\}, targets="):
        learner.backward(mn.Tasks(mn.Batch(X, Y), {"inputs": X, "targets": Y}))


def test_names_in_the_place_of_numbers_and_lists_are_told() -> None:
    with pytest.raises(mn.SettingsError, match="nu must be a finite number above 0 or \"auto\", got 'aut'"):
        mn.FOBMAML(nu="aut")
    learner = mn.MetaLearner(nn.Linear(3, 1), mn.metrics.squared_error, solver=SOLVER)
    with pytest.raises(mn.SettingsError, match=r"list of names of estimators, got a string; give \['fomaml'\]"):
        mn.check(learner, both(X), compare="fomaml")


def test_objects_in_the_place_of_others_are_told_on_one_line() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
    learner, optimizer = mn.MetaLearner(model, mn.metrics.squared_error), torch.optim.SGD(model.parameters(), lr=0.1)
    for use, words in (
        (lambda: mn.fit(model, optimizer, both(X), steps=1), "fit takes a mn.MetaLearner, got Sequential; make one"),
        (lambda: mn.fit(learner, model, both(X), steps=1), "got a Sequential, without 'param_groups'"),
        (lambda: mn.TorchOptimizer(optimizer, 5), "got an already constructed SGD; give lambda p: torch.optim.SGD"),
    ):
        with pytest.raises(mn.SettingsError, match=words) as told:
            use()
        assert "\n" not in str(told.value)


@pytest.mark.parametrize("given", [(X[0], torch.arange(5)), [X[0], torch.arange(5)], X, X.numpy(), {"x": X}, [1, 2, 3]])
def test_few_shot_of_no_dataset_names_the_one_to_make(given: object) -> None:
    with pytest.raises(mn.SettingsError, match=r"torch\.utils\.data\.TensorDataset\(x, y\)"):
        mn.tasks.few_shot(given, ways=2, shots=1, queries=1)


def test_few_shot_takes_a_list_of_pairs() -> None:
    pairs = [(torch.full((3,), float(place)), place % 2) for place in range(8)]
    task = mn.tasks.few_shot(pairs, ways=2, shots=1, queries=2)[0]
    assert task.support.inputs.shape == (2, 3)


@pytest.mark.parametrize("given", ["runs/first", "runs"])
def test_a_folder_above_the_weights_is_told_the_right_one(given: str, tmp_path: Path) -> None:
    learner = mn.MetaLearner(nn.Linear(3, 1), mn.metrics.squared_error)
    learner.save_pretrained(tmp_path / "runs" / "first" / "best")
    with pytest.raises(mn.SettingsError) as told:
        mn.load_pretrained(tmp_path / given, nn.Linear(3, 1), mn.metrics.squared_error)
    assert f"Did you mean {tmp_path / 'runs' / 'first' / 'best'}?" in str(told.value)


@pytest.mark.parametrize("layer", [nn.Dropout(0.5), nn.Dropout(0.0)])
def test_dropout_in_train_mode_is_told_once_a_learner(layer: nn.Module) -> None:
    model = nn.Sequential(nn.Linear(3, 4), layer, nn.Linear(4, 1))
    learner = mn.MetaLearner(model, mn.metrics.squared_error, solver=SOLVER)
    model.eval()
    learner.evaluate(both(X))
    model.train()
    told = pytest.warns(UserWarning, match=r"dropout is on in evaluate.*call model\.eval\(\) before")
    with told if layer.p else contextlib.nullcontext():
        learner.evaluate(both(X))
    learner.evaluate(both(X))
    learner.adapt(mn.Batch(X[0], Y[0]))
    fresh = mn.MetaLearner(model, mn.metrics.squared_error, solver=SOLVER)
    with pytest.warns(UserWarning, match="dropout is on in adapt") if layer.p else contextlib.nullcontext():
        fresh.adapt(mn.Batch(X[0], Y[0]))


def test_an_evaluation_says_what_it_is_of() -> None:
    learner = mn.MetaLearner(nn.Linear(3, 4), cross_entropy, solver=SOLVER)
    tasks = both(X, LABELS)
    loss, share = learner.evaluate(tasks), learner.evaluate(tasks, mn.metrics.accuracy)
    assert (loss.metric, share.metric) == ("query loss", "accuracy")
    assert repr(loss) == f"Evaluation(query loss {loss.mean:.4g} ± {loss.ci95:.2g}, tasks=2, steps=2)"
    assert repr(share).startswith(f"Evaluation(accuracy {share.mean:.4g} ± ")


def test_train_without_validation_tasks(here: Path) -> None:
    text = CONFIG.replace("[validation]\ntasks = 2", "[validation]\ntasks = 0")
    (here / "small.toml").write_text(text.replace("[evaluation]", '[evaluation]\nmetric = "squared_error"'))
    assert main(["train", "small.toml", "--quiet", "--seeds", "0"]) == 0
    assert not (here / "runs" / "small" / "seed-0" / "best").exists()
