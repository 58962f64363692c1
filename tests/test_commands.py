"""metanudge train and metanudge evaluate, as a user calls them."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from PIL import Image

import metanudge as mn
from metanudge import cli
from metanudge.accumulation import summarize
from metanudge.cli import main
from metanudge.command import runs
from metanudge.command.config import read_config
from metanudge.command.runs import learner_of, tasks_of
from metanudge.files import load_state
from metanudge.training.checkpoint import LAST

CONFIG = """
seeds = [0, 1, 2]

[tasks]
name = "sinusoid"
shots = 4
queries = 4

[model]
name = "mlp"
inputs = 1
outputs = 1
hidden = [6]
activation = "tanh"
dropout = 0.2

[learner]
loss = "squared_error"
prox = 2.0

[solver]
name = "nesterov"
steps = 3

[optimizer]
name = "normalized_sgd"
lr = 0.1

[scheduler]
name = "parameter_free"

[training]
steps = 12
tasks_per_step = 4
max_norm = 1.0
every = 4

[validation]
tasks = 5

[evaluation]
tasks = 8
"""
CLASSES = """
seeds = [3]
[tasks]
name = "TASKS"
[model]
name = "mlp"
inputs = 2
outputs = 3
hidden = [4]
[learner]
loss = "cross_entropy"
[solver]
name = "gradient_descent"
steps = 2
lr = 0.5
[training]
steps = 2
tasks_per_step = 2
[evaluation]
tasks = 6
"""
OWN = """
import torch, metanudge as mn
from torch.utils.data import TensorDataset

def tasks(split):
    data = TensorDataset(torch.randn(60, 2, generator=torch.Generator().manual_seed(0)), torch.arange(60) % 6)
    return mn.tasks.few_shot(data, ways=3, shots=2, queries=3, seed=["train", "validation", "test"].index(split))
"""


def written(folder: Path, text: str = CONFIG, **changes: str) -> str:
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    path = folder / "small.toml"
    path.write_text(text)
    return str(path)


def state(folder: Path) -> dict:
    """A checkpoint, without what time does to it."""
    found = load_state(folder / LAST)
    found["numbers"].pop("seconds")
    names = list(mn.Record._fields)
    found["history"] = [
        str(row[: names.index("seconds")] + row[names.index("seconds") + 1 :]) for row in found["history"]
    ]
    return found


def same(one: object, other: object) -> bool:
    """Bit for bit."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def test_train_and_evaluate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.chdir(tmp_path)
    config = written(tmp_path)
    assert main(["train", config, "--quiet"]) == 0
    out = Path("runs/small")
    for seed in (0, 1, 2):
        left = {path.name for path in (out / f"seed-{seed}").iterdir()}
        assert left == {"last.pt", "best", "log.csv", "log.jsonl"}
        assert len((out / f"seed-{seed}" / "log.jsonl").read_text().splitlines()) == 12
    beginnings = {(out / f"seed-{seed}" / "log.csv").read_text().splitlines()[1].split(",")[1] for seed in (0, 1, 2)}
    assert len(beginnings) == 3
    assert "best" in capsys.readouterr().out

    assert main(["evaluate", "runs/small"]) == 0
    told = capsys.readouterr().out
    record = json.loads((out / "evaluation.json").read_text())
    assert "seed 2" in told
    assert "Only 8 tasks; report at least 600" in told
    assert list(record["seeds"]) == ["0", "1", "2"]
    assert record["tasks"] == 8
    assert len(record["curve"]) == 4
    # against the library: the best weights, dropout off, the test tasks
    settings = read_config(Path(config))
    tasks = [tasks_of(settings, "test")[index] for index in range(8)]
    values = []
    for seed in (0, 1, 2):
        learner = learner_of(settings)
        learner = mn.load_pretrained(out / f"seed-{seed}" / "best", learner.model, mn.metrics.squared_error)
        learner.model.eval()
        found = learner.evaluate(tasks)
        values.append(found.values)
        assert record["seeds"][str(seed)]["mean"] == pytest.approx(found.mean, rel=1e-5)
        assert record["seeds"][str(seed)]["scores"] == pytest.approx(found.values[:, -1].tolist(), rel=1e-5)
        assert record["seeds"][str(seed)]["curve"] == pytest.approx(found.curve.tolist(), rel=1e-5)
        assert record["seeds"][str(seed)]["ci95"] == pytest.approx(found.ci95, rel=1e-4)
    whole = summarize(torch.stack(values).mean(0))
    assert record["mean"] == pytest.approx(whole.mean, rel=1e-5)
    assert record["ci95"] == pytest.approx(whole.ci95, rel=1e-4)
    means = torch.tensor([each["mean"] for each in record["seeds"].values()])
    assert record["std_over_seeds"] == pytest.approx(float(means.std()), rel=1e-4)

    other = Path("other.toml")
    other.write_text('out = "runs/small"\n' + Path(config).read_text().replace("shots = ", "shots = 1"))
    assert main(["evaluate", str(other), "--tasks", "3"]) == 2
    assert "holds a training with tasks.shots" in (said := capsys.readouterr().err)
    assert "metanudge evaluate runs/small" in said
    assert json.loads((out / "evaluation.json").read_text()) == record

    assert main(["evaluate", config, "--tasks", "3", "--weights", "last"]) == 0
    last = json.loads((out / "evaluation-3-tasks-last.json").read_text())
    assert json.loads((out / "evaluation.json").read_text()) == record  # the larger one is kept
    learner = learner_of(settings)
    learner.model.load_state_dict(load_state(out / "seed-1" / LAST)["model"])
    learner.model.eval()
    assert last["seeds"]["1"]["mean"] == pytest.approx(learner.evaluate(tasks[:3]).mean, rel=1e-5)
    assert (last["weights"], last["tasks"]) == ("last", 3)


def test_it_is_fit(tmp_path: Path) -> None:
    """The command trains as the library does, called with the same settings."""
    config = written(tmp_path)
    assert main(["train", config, "--quiet", "--out", str(tmp_path / "out"), "--seeds", "1"]) == 0
    torch.manual_seed(1)
    model = mn.MODELS["mlp"](1, 1, hidden=(6,), activation="tanh", dropout=0.2)
    learner = mn.MetaLearner(model, mn.metrics.squared_error, prox=2.0, solver=mn.Nesterov(3))
    optimizer = mn.optim.NormalizedSGD(model.parameters(), lr=0.1)
    tasks = mn.tasks.Episodes(lambda i: mn.tasks.episodes(mn.tasks.sinusoid, shots=4, queries=4)[10**9 + i])
    mn.fit(
        learner,
        optimizer,
        tasks,
        steps=12,
        tasks_per_step=4,
        max_norm=1.0,
        scheduler=mn.optim.ParameterFree(optimizer),
        progress=False,
    )
    found = load_state(tmp_path / "out" / "seed-1" / LAST)["model"]
    assert same(found, dict(model.state_dict()))


def test_warnings_of_the_program_itself_come_without_a_line_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["__main__"], "__file__", "program.py", raising=False)
    as_ever = warnings.formatwarning
    with cli._short_warnings():
        assert warnings.formatwarning("mend it", UserWarning, "program.py", 3) == "metanudge: UserWarning: mend it\n"
        assert warnings.formatwarning("mend it", UserWarning, "mine.py", 3) == "mine.py:3: UserWarning: mend it\n"
    assert warnings.formatwarning is as_ever


def test_a_command_that_is_killed_goes_on_bit_for_bit(tmp_path: Path) -> None:
    """SIGKILL at a random moment; the continued training equals the uninterrupted one."""
    config = written(tmp_path, **{"steps = 12": "steps = 40", "[0, 1, 2]": "[0]", "every = 4": "every = 3"})
    assert main(["train", config, "--quiet", "--out", str(tmp_path / "whole")]) == 0
    script = "import sys, torch; torch.set_num_threads(1); from metanudge.cli import main; sys.exit(main())"
    command = [sys.executable, "-W", "ignore", "-c", script, "train", config, "--quiet", "--out"]
    log, wanted = tmp_path / "killed" / "seed-0" / "log.csv", random.randrange(1, 38)
    killed = subprocess.Popen([*command, str(tmp_path / "killed")], stdout=subprocess.DEVNULL)
    limit = time.monotonic() + 120
    while time.monotonic() < limit and killed.poll() is None:
        if log.exists() and len(log.read_text().splitlines()) > wanted:
            break
        time.sleep(0.002)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert main(["train", config, "--quiet", "--out", str(tmp_path / "killed")]) == 0
    assert same(state(tmp_path / "whole" / "seed-0"), state(tmp_path / "killed" / "seed-0"))
    for folder in ("whole", "killed"):
        assert len((tmp_path / folder / "seed-0" / "log.csv").read_text().splitlines()) == 41
        assert not list((tmp_path / folder / "seed-0").glob("*.part"))
    one, other = (tmp_path / folder / "seed-0" / "best" / "model.safetensors" for folder in ("whole", "killed"))
    assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize("optimizer", ['name = "adam"\nlr = 0.01', 'name = "clipped_sgd"\nlr = 0.1\nmax_step = 0.1'])
@pytest.mark.parametrize(
    "scheduler",
    ['name = "cosine"\nT_max = 8', 'name = "step"\nstep_size = 3', 'name = "multi_step"\nmilestones = [2, 5]'],
)
def test_every_schedule_goes_on_bit_for_bit(scheduler: str, optimizer: str, tmp_path: Path) -> None:
    """In two halves as in one."""
    changes = {
        "[0, 1, 2]": "[0]",
        'name = "parameter_free"': scheduler,
        'name = "normalized_sgd"\nlr = 0.1': optimizer,
        "every = 4": "every = 2",
    }
    for steps, folders in (("4", ["halves"]), ("8", ["halves", "whole"])):
        config = written(tmp_path, **changes, **{"steps = 12": f"steps = {steps}"})
        for folder in folders:
            assert main(["train", config, "--quiet", "--out", str(tmp_path / folder)]) == 0
    assert same(state(tmp_path / "whole" / "seed-0"), state(tmp_path / "halves" / "seed-0"))


def test_more_steps_go_on_and_other_settings_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    seed = {"[0, 1, 2]": "[0]"}
    assert main(["train", written(tmp_path, **seed), "--quiet"]) == 0
    assert main(["train", written(tmp_path, **seed, **{"steps = 12": "steps = 14"}), "--quiet"]) == 0
    kept = state(Path("runs/small/seed-0"))
    assert len(kept["history"]) == 14
    capsys.readouterr()
    assert main(["train", written(tmp_path, **seed), "--quiet"]) == 2
    assert "has done 14 steps, more than the 12 asked for" in " ".join(capsys.readouterr().err.split())
    for old, new, key in (
        ("prox = 2.0", "prox = 3.0", "learner.prox = 2.0"),
        ("lr = 0.1", "lr = 0.2", "optimizer.lr = 0.1"),
        ("max_norm = 1.0", "", "training.max_norm = 1.0"),
        ('name = "parameter_free"', 'name = "parameter_free"\nscale = 0.5', "scheduler.scale = left out"),
        ("tasks = 5", "tasks = 6", "validation.tasks = 5"),
        ("tasks = 5", 'tasks = 5\nbetter = "larger"', "validation.better = left out"),
        ("tasks = 8", 'tasks = 8\nmetric = "accuracy"', "evaluation.metric = left out"),
    ):
        assert main(["train", written(tmp_path, **seed, **{old: new}), "--quiet"]) == 2
        assert key in capsys.readouterr().err.replace("\n", " ")
    assert same(kept, state(Path("runs/small/seed-0")))
    assert "prox = 2.0" in Path("runs/small/config.toml").read_text()
    smaller = {"prox = 2.0": "prox = 2.0\nchunk_size = 1", "steps = 12": "steps = 15"}
    smaller |= {"tasks = 8": "tasks = 9"}  # of the evaluation, which no step knows
    with pytest.warns(UserWarning, match="goes on with chunk_size = 1 where it had None"):
        assert main(["train", written(tmp_path, **seed, **smaller), "--quiet"]) == 0
    assert len(state(Path("runs/small/seed-0"))["history"]) == 15
    assert main(["train", written(tmp_path, **seed, **{"prox = 2.0": "prox = 3.0"}), "--quiet", "--fresh"]) == 0
    assert len(state(Path("runs/small/seed-0"))["history"]) == 12


def test_seeds_of_other_numbers_of_steps_are_no_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", written(tmp_path), "--quiet", "--seeds", "0"]) == 0
    before = Path("runs/small/config.toml").read_text()
    fewer = written(tmp_path, **{"steps = 12": "steps = 8"})
    capsys.readouterr()
    for more in ([], ["--fresh"]):
        assert main(["train", fewer, "--quiet", "--seeds", "1", *more]) == 2
        told = " ".join(capsys.readouterr().err.split())
        assert "seed-0/last.pt is of a training that has done 12 steps, more than the 8 asked for" in told
    assert Path("runs/small/config.toml").read_text() == before
    assert main(["evaluate", fewer]) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert "seed 0 is at step 12, beyond the 8 of the settings" in told
    assert main(["evaluate", fewer, "--partial"]) == 0


def test_fresh_removes_what_was_there_of_all_its_seeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    two = {"[0, 1, 2]": "[0, 1]"}
    out = Path("runs/small")
    assert main(["train", written(tmp_path, **two), "--quiet"]) == 0
    before = [(out / f"seed-{seed}" / LAST).read_bytes() for seed in (0, 1)]

    other = written(tmp_path, **two, **{"prox = 2.0": "prox = 3.0"})
    assert main(["train", other, "--quiet", "--fresh", "--seeds", "0"]) == 2  # and 1 be evaluated as of prox 3
    told = " ".join(capsys.readouterr().err.split())
    assert "its seeds 1 would stay beside the new ones: begin all anew (--seeds 0 1)" in told
    plateau = "import torch\n\ndef make(optimizer): return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)\n"
    (tmp_path / "own.py").write_text(plateau)
    waits = {'name = "parameter_free"': 'name = "own.py:make"'}
    assert main(["train", written(tmp_path, **two, **waits), "--quiet", "--fresh"]) == 2
    assert "ReduceLROnPlateau steps by a validation score" in " ".join(capsys.readouterr().err.split())
    assert [(out / f"seed-{seed}" / LAST).read_bytes() for seed in (0, 1)] == before

    assert main(["train", written(tmp_path, **two), "--quiet", "--fresh", "--seeds", "0"]) == 0  # the same settings
    assert json.loads((out / "seeds.json").read_text()) == [0, 1]
    assert (out / "seed-1" / LAST).read_bytes() == before[1]

    def stopped(*_, **__):
        raise KeyboardInterrupt

    other = written(tmp_path, **two, **{"prox = 2.0": "prox = 3.0"})
    with monkeypatch.context() as patch:
        patch.setattr(runs, "fit", stopped)
        assert main(["train", other, "--quiet", "--fresh"]) == 130
    assert not list(out.glob("seed-*/*"))


def test_failures_are_one_line_and_status_2(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = str(tmp_path / "out")
    assert main(["train", str(tmp_path / "nothing.toml")]) == 2
    assert "cannot be read" in capsys.readouterr().err
    for old, new, told in (
        ("[model]", "[mdel]", 'did you mean "model"'),
        ("seeds =", 'device = "cuda:77"\nseeds =', 'no device "cuda:77"'),
        ('"parameter_free"', '"parameter_free"\nscale = -1.0', "scale must be"),
        ("dropout = 0.2", "dropout = 0.2\nbatch_norm = 3", 'no setting "batch_norm"'),
        ("prox = 2.0", 'prox = 2.0\nbatch_norm = "suport"', 'did you mean "support"'),
    ):
        assert main(["train", written(tmp_path, **{old: new}), "--out", out]) == 2
        assert told in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()
    for target, told in ((str(tmp_path), "config.toml cannot be read"), (written(tmp_path), "no training in runs")):
        assert main(["evaluate", target]) == 2
        assert told in " ".join(capsys.readouterr().err.split())


def test_classes_are_judged_by_accuracy_over_permutations_of_their_labels(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "own.py").write_text(OWN)
    config = written(tmp_path, CLASSES, TASKS=f"{tmp_path}/own.py:tasks")
    out = str(tmp_path / "out")
    assert main(["train", config, "--quiet", "--out", out]) == 0
    assert "validation accuracy" in capsys.readouterr().out
    assert main(["evaluate", out]) == 0
    record = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert (record["metric"], record["permutations"], record["std_over_seeds"]) == ("accuracy", 4, None)
    settings = read_config(Path(config))
    learner = learner_of(settings)
    learner.model.load_state_dict(load_state(tmp_path / "out" / "seed-3" / LAST)["model"])
    tasks = [tasks_of(settings, "test")[index] for index in range(6)]
    expected = learner.evaluate(tasks, mn.metrics.accuracy, permutations=4).mean
    assert record["mean"] == pytest.approx(expected, abs=1e-6)
    shutil.rmtree(tmp_path / "out" / "seed-3")
    assert main(["evaluate", out]) == 2


IMAGES = """
seeds = [0]
[tasks]
name = "image_folders"
root = "ROOT"
ways = 2
shots = 2
queries = 1
size = 16
rotations = true
number = 6
[model]
name = "conv4"
outputs = 2
inputs = 3
channels = 4
size = 16
norm = "batch"
activation = "gelu"
[learner]
loss = "cross_entropy"
adapt_only = "head"
batch_norm = "support"
warm_start = true
[solver]
name = "gradient_descent"
steps = 2
lr = 0.5
[training]
steps = STEPS
tasks_per_step = 2
every = 2
[validation]
tasks = 2
[evaluation]
tasks = 2
"""


def test_images_batch_norm_and_a_warm_start(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Class folders, a BatchNorm policy, the head alone adapted and a finite set of tasks: in two halves as in one."""
    for split, number in (("train", 3), ("val", 2), ("test", 2)):
        for kind in range(number):
            (tmp_path / split / f"{kind}").mkdir(parents=True)
            for place in range(3):
                pixels = torch.randint(256, (16, 16, 3), generator=torch.Generator().manual_seed(9 * kind + place))
                Image.fromarray(pixels.to(torch.uint8).numpy()).save(tmp_path / split / f"{kind}" / f"{place}.png")
    for steps, folders in (("2", ["halves"]), ("4", ["halves", "whole"])):
        config = written(tmp_path, IMAGES, ROOT=str(tmp_path), STEPS=steps)
        for folder in folders:
            assert main(["train", config, "--quiet", "--out", str(tmp_path / folder)]) == 0
    assert same(state(tmp_path / "whole" / "seed-0"), state(tmp_path / "halves" / "seed-0"))
    assert main(["evaluate", str(tmp_path / "whole"), "--permutations", "2"]) == 0
    capsys.readouterr()
    text = IMAGES.replace('batch_norm = "support"', "")
    config = written(tmp_path, text, ROOT=str(tmp_path), STEPS="2")
    assert main(["train", config, "--quiet", "--out", str(tmp_path / "other")]) == 2
    assert 'batch_norm="transductive"' in capsys.readouterr().err
    assert not (tmp_path / "other").exists()
    settings = read_config(tmp_path / "halves" / "config.toml")
    train, test = tasks_of(settings, "train", 0), tasks_of(settings, "test")
    assert len(train) == 6
    assert len(train.draw.args[0].draw.dataset.classes) == 12  # three classes in four turns
    assert len(test.draw.args[0].draw.dataset.classes) == 2


# learner.evaluate(..., permutations=P)


def constant(classes: int) -> torch.nn.Module:
    """Says class 0 for everything, whatever it is adapted to: a bias that hardly moves."""
    model = torch.nn.Linear(2, classes)
    with torch.no_grad():
        model.weight.zero_()
        model.bias.copy_(torch.tensor([5.0] + [0.0] * (classes - 1)))
    return model


def episodes(ways: int, number: int) -> list[mn.Tasks]:
    g = torch.Generator().manual_seed(0)

    def batch(labels: torch.Tensor) -> mn.Batch:
        return mn.Batch(torch.randn(len(labels), 2, generator=g), labels)

    query = torch.tensor([0] * 6 + list(range(1, ways)))  # six of class 0, one of each other
    return [mn.Tasks(batch(torch.arange(ways)), batch(query)) for _ in range(number)]


def test_classes_that_mean_something_are_not_permuted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of tasks of one's own: sick and healthy are not names that any model may exchange."""
    own = OWN.replace("return mn.tasks.few_shot(", "episodes = mn.tasks.few_shot(") + "    return episodes.take(9)\n"
    (tmp_path / "own.py").write_text(own)
    config = written(tmp_path, CLASSES, TASKS=f"{tmp_path}/own.py:tasks")
    out = str(tmp_path / "out")
    assert main(["train", config, "--quiet", "--out", out]) == 0
    assert main(["evaluate", out]) == 0
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text())["permutations"] == 1
    assert "there are" not in capsys.readouterr().out  # the settings ask for 6 of the 9
    assert main(["evaluate", out, "--tasks", "900"]) == 0
    assert "900 test tasks were asked for, and there are 9" in capsys.readouterr().out


@pytest.mark.parametrize("form", ["stack", "list", "loader"])
def test_permutations_average_over_names(form: str) -> None:
    """A classifier that always says 0 is right on whatever class got that name: with prob. 1/3 the one of six."""
    learner = mn.MetaLearner(constant(3), mn.metrics.cross_entropy, prox=1e6, solver=mn.GradientDescent(1, lr=1e-6))
    single = episodes(3, 40)
    given = {"stack": mn.tasks.collate(single), "list": single, "loader": [mn.tasks.collate(single)]}[form]
    given = iter(given) if form == "loader" else given
    found = learner.evaluate(given, mn.metrics.accuracy, permutations=60).values[:, -1]
    assert learner.evaluate(single, mn.metrics.accuracy).mean == pytest.approx(6 / 8)
    # sizes of the classes 6, 1, 1 of 8, each called 0 a third of the time: 1/3
    spread = (((torch.tensor([6.0, 1.0, 1.0]) / 8 - 1 / 3) ** 2).mean() / 59).sqrt()
    assert found.mean() == pytest.approx(1 / 3, abs=float(4 * spread / 40**0.5 + 0.01))
    assert set((found * 8 * 60).round().long().tolist()) <= set(range(481))


def test_permutations_depend_on_the_place_alone() -> None:
    torch.manual_seed(3)
    learner = mn.MetaLearner(torch.nn.Linear(2, 3), mn.metrics.cross_entropy)
    single = episodes(3, 6)
    whole = learner.evaluate(mn.tasks.collate(single), mn.metrics.accuracy, permutations=3).values
    parts = iter([mn.tasks.collate(single[:4]), single[4:]])
    assert torch.allclose(learner.evaluate(parts, mn.metrics.accuracy, permutations=3).values, whole)
    assert torch.equal(learner.evaluate(single, permutations=1).values, learner.evaluate(single).values)


def test_permutations_of_an_equivariant_model_change_nothing() -> None:
    """A head that begins at zero treats all names alike; support and query are renamed together."""
    model = torch.nn.Linear(2, 3)
    torch.nn.init.zeros_(model.weight)
    torch.nn.init.zeros_(model.bias)
    learner = mn.MetaLearner(model, mn.metrics.cross_entropy, solver=mn.GradientDescent(4, lr=0.5))
    single = episodes(3, 5)
    torch.testing.assert_close(learner.evaluate(single, permutations=5).values, learner.evaluate(single).values)


def test_only_class_labels_can_be_permuted() -> None:
    learner = mn.MetaLearner(torch.nn.Linear(1, 1), mn.metrics.squared_error)
    with pytest.raises(mn.TasksError, match="label permutations need class indices"):
        learner.evaluate(mn.tasks.sinusoid(2), permutations=2)
    sampled = mn.Tasks(mn.Minibatches([mn.Batch(torch.ones(2, 2), torch.arange(2))]), episodes(3, 1)[0].query)
    with pytest.raises(mn.TasksError, match="got Minibatches"):
        learner.evaluate([sampled], permutations=2)
    with pytest.raises(mn.SettingsError, match="permutations must be"):
        learner.evaluate(mn.tasks.sinusoid(2), permutations=0)
