"""Settings files: what is named is what is made, and what is mistyped is told with the nearest right name."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import nn

import metanudge as mn
from metanudge.command.config import read_config
from metanudge.command.families import draw
from metanudge.command.named import conform
from metanudge.command.runs import learner_of, tasks_of

SMALL = """
seeds = [4]
dtype = "float64"

[tasks]
name = "sinusoid"
shots = 3
queries = 4

[model]
name = "mlp"
inputs = 1
outputs = 1
hidden = [5]
activation = "gelu"

[learner]
loss = "squared_error"
prox = 2
adapt_only = ["head", "body.1.bias"]

[solver]
name = "gradient_descent"
steps = 3
lr = 0.1

[estimator]
name = "fobmaml"
nudge = "full"

[optimizer]
name = "adam"
lr = 1e-3
betas = [0.8, 0.99]

[scheduler]
name = "multi_step"
milestones = [4, 6]

[training]
steps = 3
tasks_per_step = 2

[evaluation]
metric = "squared_error"
"""


def written(folder: Path, text: str = SMALL) -> Path:
    path = folder / "small.toml"
    path.write_text(text)
    return path


def test_compile_is_a_setting(tmp_path: Path) -> None:
    assert not learner_of(read_config(written(tmp_path))).compile
    text = SMALL.replace("prox = 2\n", "prox = 2\ncompile = true\n")
    assert learner_of(read_config(written(tmp_path, text))).compile


def test_what_is_named_is_made(tmp_path: Path) -> None:
    config = read_config(written(tmp_path))
    learner = learner_of(config)
    assert (learner.prox, learner.solver) == (2.0, mn.GradientDescent(3, lr=0.1))
    assert learner.estimator == mn.FOBMAML(nudge="full")
    assert [tuple(p.shape) for p in learner.model.parameters()] == [(5, 1), (5,), (1, 5), (1,)]
    assert {p.dtype for p in learner.model.parameters()} == {torch.float64}
    optimizer = config.optimizer(learner.model.parameters())
    assert type(optimizer) is torch.optim.Adam
    assert (optimizer.defaults["lr"], optimizer.defaults["betas"]) == (1e-3, (0.8, 0.99))
    assert dict(config.scheduler(optimizer).milestones) == {4: 1, 6: 1}
    task = tasks_of(config, "train", seed=4)[0]
    assert task.support.inputs.shape == (3, 1)
    assert task.query.targets.dtype == torch.float64
    assert config.metric is mn.metrics.squared_error
    assert config.out == Path("runs/small")
    assert learner.backward([task]).dropped_tasks == 0
    assert learner.model.head.weight.grad is not None


def test_what_is_left_out_has_the_documented_default(tmp_path: Path) -> None:
    few = [SMALL.partition("[solver]")[0].replace("seeds = [4]", "").replace('dtype = "float64"', "")]
    config = read_config(written(tmp_path, "\n".join([*few, "[training]", "steps = 3"])))
    assert config.whole.seeds == (0, 1, 2)
    assert (config.solver, config.estimator) == (mn.Nesterov(steps=16), mn.FOBMAML())
    assert config.optimizer.func is mn.optim.NormalizedSGD
    assert config.scheduler is None
    assert config.metric is None
    assert config.testing.tasks == 600


@pytest.mark.parametrize(
    ("right", "wrong", "told"),
    [
        ("seeds = [4]", "seed = [4]", 'no setting "seed"; did you mean "seeds"'),
        ("seeds = [4]", "seeds = [4, 4]", "different numbers"),
        ("seeds = [4]", "seeds = []", "one or more"),
        ("seeds = [4]", "seeds = [-1]", "at least 0"),
        ("seeds = [4]", "seeds = [1000000]", "below 1000000"),
        ('"float64"', '"float46"', "dtype cannot be 'float46'; did you mean \"float64\""),
        ("[solver]", "[slover]", 'no setting "slover"; did you mean "solver"'),
        ('"sinusoid"', '"sinusiod"', "[tasks] knows no 'sinusiod'; did you mean \"sinusoid\""),
        ("shots = 3", "shtos = 3", '[tasks] has no setting "shtos"; did you mean "shots"'),
        ("shots = 3", "shots = 3.5", "[tasks] shots must be a whole number, got 3.5"),
        ("shots = 3", "first = 3", '[tasks] has no setting "first"'),
        ("shots = 3", "number = 0", "[tasks] number must be"),
        ('"mlp"', '"mpl"', 'did you mean "mlp"'),
        ("inputs = 1", "", '[model] needs "inputs"'),
        ("hidden = [5]", "hidden = 5", "[model] hidden must be a list, got 5"),
        ('"gelu"', '"gleu"', "[model] activation cannot be 'gleu'; did you mean \"gelu\""),
        (
            'loss = "squared_error"',
            'loss = "square_error"',
            "[learner] loss knows no 'square_error'; did you mean \"sq",
        ),
        ("prox = 2", "porx = 2", 'did you mean "prox"'),
        ("prox = 2", 'prox = "2"', "[learner] prox must be a number, got '2'"),
        ("prox = 2", "prox = true", "[learner] prox must be a number, got True"),
        ('"gradient_descent"', '"gradient_decent"', 'did you mean "gradient_descent"'),
        ("steps = 3\nlr", "steps = 0\nlr", "[solver] steps must be a whole number of at least 1"),
        ('nudge = "full"', 'nudge = "ful"', 'did you mean "full"'),
        ('name = "adam"', "", "[optimizer] needs a name"),
        ("betas", "beta", 'did you mean "betas"'),
        ("milestones = [4, 6]", "milestones = [4.5]", "milestones must be a whole number"),
        ("milestones", "last_epoch = 1\nmilestones", 'no setting "last_epoch"'),
        ("tasks_per_step", "task_per_step", 'did you mean "tasks_per_step"'),
        ('metric = "squared_error"', 'metric = "acuracy"', 'did you mean "accuracy"'),
        ('metric = "squared_error"', "tasks = 0", "[evaluation] tasks must be"),
        ("[training]", "[trainings]", 'did you mean "training"'),
        ("seeds = [4]", "seeds = [4", "cannot be read"),
        ("seeds = [4]", "model = 3\nseeds = [4]", "cannot be read"),
        ('name = "mlp"', 'name = "nothing.py:make"', "there is no file nothing.py"),
    ],
)
def test_what_is_wrong_is_told(right: str, wrong: str, told: str, tmp_path: Path) -> None:
    assert right in SMALL
    with pytest.raises(mn.SettingsError) as caught:
        read_config(written(tmp_path, SMALL.replace(right, wrong, 1)))
    assert told in str(caught.value)


def test_a_missing_file_or_table_is_told(tmp_path: Path) -> None:
    with pytest.raises(mn.SettingsError, match="cannot be read"):
        read_config(tmp_path / "nothing.toml")
    with pytest.raises(mn.SettingsError, match=r"needs a table \[training\]"):
        read_config(written(tmp_path, SMALL.replace("[training]\nsteps = 3\ntasks_per_step = 2", "")))


OWN = """
import torch
import metanudge as mn

def tasks(split, amplitude=1.0):
    family = mn.tasks.episodes(mn.tasks.sinusoid, shots=2, queries=2)
    return mn.tasks.Episodes(lambda i: scaled(family[i], amplitude), number=7)

def scaled(task, amplitude):
    return mn.Tasks(*(batch._replace(targets=amplitude * batch.targets) for batch in task))

def model(width):
    return torch.nn.Sequential(torch.nn.Linear(1, width), torch.nn.Tanh(), torch.nn.Linear(width, 1))

def loss(model, batch):
    return (model(batch.inputs) - batch.targets).abs().mean()

def inner(parameters):
    return torch.optim.SGD(parameters, lr=0.1)
"""


def test_functions_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "own.py"
    path.write_text(OWN)
    text = f"""
    [tasks]
    name = "{path}:tasks"
    amplitude = 3.0
    [model]
    name = "{path}:model"
    width = 4
    [learner]
    loss = "{path}:loss"
    [solver]
    name = "torch_optimizer"
    factory = "{path}:inner"
    steps = 2
    [training]
    steps = 1
    """
    config = read_config(written(tmp_path, text))
    learner = learner_of(config)
    tasks = tasks_of(config, "train", seed=3)
    assert len(tasks) == 7
    expected = 3 * mn.tasks.episodes(mn.tasks.sinusoid, shots=2, queries=2)[6].query.targets
    assert torch.equal(tasks[6].query.targets, expected)
    assert learner.model[0].out_features == 4
    assert learner.execution.name == "in_place"
    assert learner.backward([tasks[0]]).query_loss > 0
    with pytest.raises(mn.SettingsError, match='did you mean "amplitude"'):
        read_config(written(tmp_path, text.replace("amplitude", "amplitud")))


def test_values_take_the_type_of_their_setting() -> None:
    assert conform(3, float, "x") == 3.0
    assert isinstance(conform(3, float, "x"), float)
    assert conform([1, 2], tuple[int, ...], "x") == (1, 2)
    assert conform([1, 2], int | tuple[int, int], "x") == (1, 2)
    stencil = conform({"nodes": [0, 1], "weights": [-1, 1], "order": 1}, mn.Stencil | str, "x")
    assert stencil == mn.Stencil((0.0, 1.0), (-1.0, 1.0), 1)
    for value, hint in ((True, int), ([1], tuple[int, int]), (1, None.__class__), ("a", torch.Tensor)):
        with pytest.raises(mn.SettingsError):
            conform(value, hint, "x")


# Families and models.


@pytest.mark.parametrize("name", ["sinusoid", "harmonic", "linear", "logistic"])
def test_splits_and_seeds_never_share_a_task(name: str) -> None:
    family = mn.FAMILIES[name]
    first = [draw(family, "train", seed, torch.float32)[0] for seed in range(3)]
    first += [draw(family, split, 0, torch.float32)[0] for split in ("validation", "test")]
    assert len({float(task.support.inputs.sum()) for task in first}) == 5
    for split in ("validation", "test"):
        one, other = (draw(family, split, seed, torch.float32)[3] for seed in (0, 1))
        assert torch.equal(one.query.inputs, other.query.inputs)
    assert first[0].support.inputs.dtype == torch.float32
    assert len(draw(family, "train", 0, torch.float32, number=9)) == 9


def test_a_family_keeps_what_its_tasks_share_over_splits() -> None:
    """The linear family draws common weights from its seed: without differences and noise, all tasks have the same."""
    settings = {"difference": 0.0, "noise": 0.0, "features": 3, "shots": 5}
    found = []
    for split in ("train", "validation", "test"):
        task = draw(lambda split: mn.FAMILIES["linear"](split, **settings), split, 2, torch.float64)[1]
        found.append(torch.linalg.lstsq(task.support.inputs, task.support.targets).solution)
    torch.testing.assert_close(found[0], found[1])
    torch.testing.assert_close(found[0], found[2])


def test_mnist1d_by_name() -> None:
    pytest.importorskip("mnist1d")
    task = draw(lambda split: mn.FAMILIES["mnist1d"](split, protocol="new_classes", shots=2), "test", 0, torch.float32)[
        0
    ]
    assert task.support.inputs.shape == (6, 1, 40)
    model = mn.MODELS["cnn1d"](3)
    assert model(task.support.inputs).shape == (6, 3)


@pytest.mark.parametrize("norm", ["batch", "group", "none"])
@pytest.mark.parametrize(("inputs", "size"), [(1, 28), (3, 84)])
def test_conv4(inputs: int, size: int, norm: str) -> None:
    model = mn.MODELS["conv4"](5, inputs=inputs, channels=6, size=size, norm=norm)
    assert model(torch.zeros(2, inputs, size, size)).shape == (2, 5)
    assert any(isinstance(module, nn.BatchNorm2d) for module in model.modules()) == (norm == "batch")
    assert {name.split(".")[0] for name, _ in model.named_parameters()} == {"body", "head"}


def test_models_refuse_what_can_not_be() -> None:
    for make, settings in (
        ("mlp", {"inputs": 0, "outputs": 1}),
        ("mlp", {"inputs": 1, "outputs": 1, "activation": "sin"}),
        ("cnn1d", {"outputs": 2, "length": 2}),
        ("conv4", {"outputs": 2, "size": 8}),
        ("conv4", {"outputs": 2, "norm": "layer"}),
    ):
        with pytest.raises(mn.SettingsError):
            mn.MODELS[make](**settings)


def test_settings_can_not_be_changed(tmp_path: Path) -> None:
    config = read_config(written(tmp_path))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.training.steps = 4
