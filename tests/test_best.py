"""What of a training was best on the validation: going back to it, and ending where nothing better comes."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import metanudge as mn
from metanudge.accumulation import summarize
from metanudge.cli import main
from metanudge.command.config import read_config
from metanudge.command.runs import learner_of
from metanudge.files import load_state, save_state
from metanudge.training import validation

TASKS = mn.tasks.episodes(mn.tasks.sinusoid, shots=4, queries=4)
HELD = mn.tasks.sinusoid(6, seed=1)


def fit(
    steps: int, out: Path | None = None, radius: float = 0.0, **settings: Any
) -> tuple[mn.Fit, mn.MetaLearner, nn.Module]:
    """A training whose squared error falls, and the same ended by hand at its first validation.

    Larger being called better, the first validation is the best.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1))
    model.register_buffer("steps", torch.zeros(()))
    learner = mn.MetaLearner(model, mn.metrics.squared_error, prox=2.0, solver=mn.Nesterov(2), sharpness_radius=radius)
    common: dict[str, Any] = {
        "tasks_per_step": 3,
        "validation": HELD,
        "metric": mn.metrics.squared_error,
        "better": "larger",
        "every": 2,
        "progress": False,
    }
    optimizer = mn.optim.NormalizedSGD(model.parameters(), lr=0.1)
    found = mn.fit(learner, optimizer, TASKS, steps=steps, out=out, **(common | settings))
    return found, learner, model


def vector(model: nn.Module) -> torch.Tensor:
    return nn.utils.parameters_to_vector(model.parameters()).detach()


@pytest.mark.parametrize("kept", ["on disk", "in memory"])
def test_the_model_ends_with_the_best_weights_where_it_is_asked_to(kept: str, tmp_path: Path) -> None:
    out = tmp_path if kept == "on disk" else None
    _, _, first = fit(2)
    last, learner, model = fit(6)
    assert not torch.equal(vector(model), vector(first))
    found, learner, restored = fit(6, out, restore_best=True)
    assert found.best_step == 2
    assert torch.equal(vector(restored), vector(first))
    assert learner.evaluate(HELD).mean == pytest.approx(found.best)
    assert found.validation.mean == last.validation.mean < found.best  # of the last step


def test_it_goes_on_from_the_last_step_all_the_same_and_does_not_take_the_best_for_another_model(
    tmp_path: Path,
) -> None:
    _, _, whole = fit(6)
    _, learner, model = fit(4, tmp_path, restore_best=True)
    optimizer = mn.optim.NormalizedSGD(model.parameters(), lr=0.1)
    common: dict[str, Any] = {"tasks_per_step": 3, "validation": HELD, "metric": mn.metrics.squared_error}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mn.fit(learner, optimizer, TASKS, steps=6, every=2, better="larger", progress=False, out=tmp_path, **common)
    assert torch.equal(vector(model), vector(whole))


def test_it_ends_where_patience_does_and_stays_ended(tmp_path: Path) -> None:
    found, _, model = fit(40, tmp_path, patience=4)
    assert len(found.history) == 6  # the best at 2, and none at 4 and 6
    assert found.ended_early
    assert "steps=6, ended early" in repr(found)
    again, _, same = fit(40, tmp_path, patience=4)
    assert len(again.history) == 6
    assert torch.equal(vector(model), vector(same))
    more, _, _ = fit(40, tmp_path, patience=7)  # as any number of steps, it may be another one
    assert len(more.history) == 10


def test_patience_begins_anew_with_every_better_validation() -> None:
    found, _, _ = fit(8, patience=2, better="smaller")
    assert found.best_step > 2
    assert len(found.history) == 8
    assert not found.ended_early


def test_patience_counts_from_the_last_better_validation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores 3, 3, 4, 4, 4: at 4 no better one for 2 steps, at 6 a better one, at 10 none for 4."""
    scores = iter([3.0, 3.0, 4.0, 4.0, 4.0, 5.0])

    def scripted(*_: object) -> mn.Evaluation:
        return summarize(torch.full((6, 3), next(scores), dtype=torch.float64), "scripted")

    monkeypatch.setattr(validation.Validation, "_scores", scripted)
    found, _, _ = fit(40, patience=4)
    assert (found.best, found.best_step, len(found.history)) == (4.0, 6, 10)


def test_scores_that_are_nan_are_no_best_to_go_back_to(monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = summarize(torch.full((6, 3), float("nan"), dtype=torch.float64), "nothing")
    monkeypatch.setattr(validation.Validation, "_scores", lambda *_: nothing)
    monkeypatch.setattr(validation, "_tell_not_finite", lambda *_: None)
    found, _, model = fit(40, patience=4, restore_best=True)
    assert len(found.history) == 6
    _, _, last = fit(6)
    assert torch.equal(vector(model), vector(last))


class Diverging:
    """A dataset after whose first four steps the targets are so large that parameters overflow."""

    def __getitem__(self, index: int) -> mn.Tasks:
        task = TASKS[index]
        scale = 1e30 if index >= 12 else 1.0
        return mn.Tasks(*(mn.Batch(batch.inputs, scale * batch.targets) for batch in task))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kept", ["on disk", "in memory"])
def test_a_training_that_diverges_leaves_the_best_weights(kept: str, tmp_path: Path) -> None:
    _, _, first = fit(2)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1))
    learner = mn.MetaLearner(model, mn.metrics.squared_error, prox=2.0, solver=mn.Nesterov(2))
    optimizer = mn.optim.NormalizedSGD(model.parameters(), lr=0.1)
    with pytest.raises(mn.NonFiniteError):
        mn.fit(
            learner,
            optimizer,
            Diverging(),
            steps=40,
            tasks_per_step=3,
            validation=HELD,
            metric=mn.metrics.squared_error,
            better="larger",
            every=2,
            restore_best=True,
            out=tmp_path if kept == "on disk" else None,
            progress=False,
        )
    assert torch.equal(vector(model), vector(first))


class Told(nn.Linear):
    """A layer with state that is no tensor."""

    def get_extra_state(self) -> dict[str, int]:
        return {"version": 3}

    def set_extra_state(self, state: dict[str, int]) -> None:
        assert state == {"version": 3}


def test_state_that_is_no_tensor_is_gone_back_to_as_well() -> None:
    torch.manual_seed(0)
    model = Told(1, 1)
    learner = mn.MetaLearner(model, mn.metrics.squared_error, solver=mn.Nesterov(2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    common: dict[str, Any] = {"tasks_per_step": 2, "validation": HELD, "every": 1, "progress": False}
    found = mn.fit(learner, optimizer, TASKS, steps=3, restore_best=True, **common)
    assert learner.evaluate(HELD).mean == pytest.approx(found.best)


def test_where_the_best_is_gone_after_the_last_step_that_step_is_the_best(tmp_path: Path) -> None:
    _, _, last = fit(4, tmp_path)
    shutil.rmtree(tmp_path / "best")
    with pytest.warns(UserWarning, match="they are lost"):
        found, _, model = fit(4, tmp_path, restore_best=True)
    assert (found.best, found.best_step) == (found.validation.mean, 4)
    assert torch.equal(vector(model), vector(last))
    again, _, _ = fit(4, tmp_path, restore_best=True)
    assert again.best_step == 4


def test_best_weights_that_can_not_be_read_are_told_of(tmp_path: Path) -> None:
    fit(4, tmp_path)
    weights = tmp_path / "best" / "model.safetensors"
    weights.write_bytes(b"junk")
    with pytest.raises(mn.SettingsError, match=r"model\.safetensors holds no weights that can be read"):
        fit(4, tmp_path, restore_best=True)


@pytest.mark.parametrize("lost", ["removed", "another step"])
def test_where_the_best_is_gone_the_next_validation_is_the_first(lost: str, tmp_path: Path) -> None:
    fit(4, tmp_path)
    record = tmp_path / "best" / "metanudge.json"
    if lost == "removed":
        shutil.rmtree(tmp_path / "best")
    else:
        record.write_text(record.read_text().replace('"step": 2', '"step": 4'))
    with pytest.warns(UserWarning, match="does not hold the weights of step 2"):
        found, _, _ = fit(8, tmp_path, restore_best=True)
    assert found.best_step == 6
    assert '"step": 6' in record.read_text()


def test_a_stop_between_the_best_and_the_checkpoint_loses_nothing(tmp_path: Path) -> None:
    """What is better is written first, and the steps up to it are taken again."""
    whole, _, _ = fit(6, better="smaller")
    fit(4, tmp_path, better="smaller")
    checkpoint = (tmp_path / "last.pt").read_bytes()
    fit(6, tmp_path, better="smaller")
    best = (tmp_path / "best" / "model.safetensors").read_bytes()
    (tmp_path / "last.pt").write_bytes(checkpoint)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found, _, _ = fit(6, tmp_path, better="smaller")
    assert (found.best, found.best_step) == (whole.best, whole.best_step) == (found.validation.mean, 6)
    assert (tmp_path / "best" / "model.safetensors").read_bytes() == best


def test_a_checkpoint_of_an_older_version_is_gone_on_with_and_had_no_sharpness_radius(tmp_path: Path) -> None:
    fit(4, tmp_path, restore_best=True)
    state = load_state(tmp_path / "last.pt")
    del state["kept"], state["settings"]["sharpness_radius"]
    save_state(tmp_path / "last.pt", state)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(6, tmp_path)
    state = load_state(tmp_path / "last.pt")
    del state["settings"]["sharpness_radius"]
    save_state(tmp_path / "last.pt", state)
    with pytest.raises(mn.SettingsError, match=r"sharpness_radius = 0\.0, this one has 0\.3"):
        fit(8, tmp_path, radius=0.3)


@pytest.mark.parametrize("settings", [{"patience": 4}, {"restore_best": True}], ids=str)
def test_without_a_validation_there_is_nothing_to_go_by(settings: dict[str, Any]) -> None:
    with pytest.raises(mn.SettingsError, match="can only go by the validation, and there is none"):
        fit(2, validation=None, metric=None, better="auto", **settings)


def test_patience_that_ends_before_a_second_validation_is_refused() -> None:
    with pytest.raises(mn.SettingsError, match=r"patience is 1 meta-steps, .* one every 2; give 2 or more"):
        fit(2, patience=1)
    fit(2, patience=2)


@pytest.mark.parametrize("settings", [{"patience": 0}, {"patience": 1.5}, {"restore_best": 1}], ids=str)
def test_what_can_not_be_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(mn.SettingsError, match=r"patience must be a whole number|restore_best must be True or False"):
        fit(2, **settings)


SETTINGS = """
seeds = [0]
[tasks]
name = "sinusoid"
shots = 4
queries = 4
[model]
name = "mlp"
inputs = 1
outputs = 1
hidden = [8]
[learner]
loss = "squared_error"
prox = 2.0
sharpness_radius = 0.3
[solver]
name = "nesterov"
steps = 2
[training]
steps = 40
tasks_per_step = 3
every = 2
patience = 4
[validation]
tasks = 4
better = "larger"
[evaluation]
tasks = 5
"""


def test_a_training_that_ended_early_is_complete(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    config, out = tmp_path / "early.toml", str(tmp_path / "out")
    config.write_text(SETTINGS)
    assert learner_of(read_config(config)).sharpness_radius == 0.3
    assert main(["train", str(config), "--quiet", "--out", out]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "seed 0: 6 steps of 40, no better validation came" in told
    assert "best" in told
    assert main(["evaluate", out]) == 0
    assert (tmp_path / "out" / "evaluation.json").is_file()
    (tmp_path / "out" / "seed-0" / "best").rename(tmp_path / "elsewhere")
    assert main(["evaluate", out]) == 2
    assert "--weights last" in capsys.readouterr().err
    assert main(["evaluate", out, "--weights", "last"]) == 0
    (tmp_path / "elsewhere").rename(tmp_path / "out" / "seed-0" / "best")
    config.write_text(SETTINGS.replace("patience = 4", "patience = 8"))  # and goes on where there is more of it
    assert main(["train", str(config), "--quiet", "--out", out]) == 0
    assert "seed 0: 10 steps of 40" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("option", [[], ["--fresh"]], ids=str)
def test_patience_with_nothing_to_go_by_is_refused_before_anything_is_changed(
    option: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    config, out = tmp_path / "early.toml", tmp_path / "out"
    config.write_text(SETTINGS.replace("patience = 4\n", "").replace("tasks = 4", "tasks = 0").replace("40", "2"))
    assert main(["train", str(config), "--quiet", "--out", str(out)]) == 0
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    for wrong in ("patience = 4", "patience = 0"):
        config.write_text(SETTINGS.replace("patience = 4", wrong).replace("tasks = 4", "tasks = 0").replace("40", "2"))
        assert main(["train", str(config), "--quiet", "--out", str(out), *option]) == 2
        assert "patience" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
