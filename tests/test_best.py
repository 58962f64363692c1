"""What of a training was best on the validation: going back to it, and ending where nothing better comes."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import metanudge as mn
from metanudge.cli import main

TASKS = mn.tasks.episodes(mn.tasks.sinusoid, shots=4, queries=4)
HELD = mn.tasks.sinusoid(6, seed=1)


def fit(steps: int, out: Path | None = None, **settings: Any) -> tuple[mn.Fit, mn.MetaLearner, nn.Module]:
    """A training whose squared error falls, and the same ended by hand at its first validation.

    Larger being called better, the first validation is the best.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1))
    model.register_buffer("steps", torch.zeros(()))
    learner = mn.MetaLearner(model, mn.metrics.squared_error, prox=2.0, solver=mn.Nesterov(2))
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
    again, _, same = fit(40, tmp_path, patience=4)
    assert len(again.history) == 6
    assert torch.equal(vector(model), vector(same))
    more, _, _ = fit(40, tmp_path, patience=7)  # as any number of steps, it may be another one
    assert len(more.history) == 10


def test_patience_begins_anew_with_every_better_validation() -> None:
    found, _, _ = fit(8, patience=2, better="smaller")
    assert found.best_step > 2
    assert len(found.history) == 8


@pytest.mark.parametrize("settings", [{"patience": 4}, {"restore_best": True}], ids=str)
def test_without_a_validation_there_is_nothing_to_go_by(settings: dict[str, Any]) -> None:
    with pytest.raises(mn.SettingsError, match="goes by the validation, and there is none"):
        fit(2, validation=None, metric=None, better="auto", **settings)


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
    assert main(["train", str(config), "--quiet", "--out", out]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "seed 0: 6 steps of 40, no better validation came" in told
    assert "best" in told
    assert main(["evaluate", out]) == 0
    assert (tmp_path / "out" / "evaluation.json").is_file()
    config.write_text(SETTINGS.replace("patience = 4", "patience = 8"))  # and goes on where there is more of it
    assert main(["train", str(config), "--quiet", "--out", out]) == 0
    assert "seed 0: 10 steps of 40" in " ".join(capsys.readouterr().out.split())
