"""The README's example runs, and its table is the registry's."""

import json
import re
import tomllib
from pathlib import Path

import pytest
import torch

import metanudge as mn
from metanudge.cli import main
from metanudge.command import config
from metanudge.command.runs import learner_of, tasks_of

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_example_runs_and_gives_the_numbers_it_tells():
    code, _ = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    before, after = map(float, re.findall(r"squared error (.*) before, about (.*) half", code)[0])
    found = {}
    exec(code.replace("range(200)", "range(0)"), found)
    assert round(found["scores"].mean, 1) == before
    exec(code, found)
    assert found["step"].dropped_tasks == 0
    # 200 meta-steps amplify the last bit, in which machines differ
    assert abs(found["scores"].mean - after) < found["scores"].ci95


def test_training_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, code = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    before, after = map(float, re.findall(r"never seen: (.*) before, (.*) after 40", code)[0])
    found = {}
    exec(code, found)
    assert len(found["found"].history) == 40
    assert abs(found["found"].best - after) < found["found"].validation.ci95  # the last bit differs between machines
    again = {}
    exec(code[: code.index("found = ")], again)  # the same program in another process: the same data
    assert torch.equal(again["inputs"], found["inputs"])
    untrained = mn.MetaLearner(again["model"], again["loss"]).evaluate(again["unseen"].take(50), mn.metrics.accuracy)
    assert round(untrained.mean, 2) == before
    assert (tmp_path / "runs" / "first" / "log.csv").exists()
    assert found["learner"].model is found["model"]


def test_settings_file_trains_and_is_evaluated(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (text,) = re.findall(r"```toml\n(.*?)```", (ROOT / "docs" / "settings.md").read_text(), re.DOTALL)
    shown, kept = tomllib.loads(text), tomllib.loads((ROOT / "examples" / "sinusoid.toml").read_text())
    for name, value in shown.items():
        assert kept[name] == value if name == "seeds" else value.items() <= kept[name].items()
    (tmp_path / "sinusoid.toml").write_text(text.replace("steps = 1000", "steps = 2"))
    assert main(["train", "sinusoid.toml", "--quiet"]) == 0
    assert main(["evaluate", "runs/sinusoid", "--tasks", "4"]) == 0
    assert list(json.loads(Path("runs/sinusoid/evaluation-4-tasks.json").read_text())["seeds"]) == ["0", "1", "2"]


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.toml")), ids=lambda path: path.stem)
def test_example_settings_work(path):
    read = config.read_config(path)
    learner = learner_of(read)
    assert learner.backward([tasks_of(read, "train")[0]]).dropped_tasks == 0
    assert learner.evaluate([tasks_of(read, "test")[0]], read.metric).mean >= 0


def test_settings_are_told():
    """The page on settings files names every table, every registry and every key."""
    page = (ROOT / "docs" / "settings.md").read_text()
    kinds = (config.Whole, config.Learner, config.Training, config.Validation, config.Testing)
    keys = {key for kind in kinds for key in kind.__dataclass_fields__}
    for word in keys | {f"[{table}]" for table in config.TABLES}:
        assert f"`{word}" in page, word


def test_table_is_made_from_the_registry():
    rows = [
        f"| `{kind.__name__}` | {kind.rule} | {kind.cost} | {kind.memory} | {kind.bias} |"
        for kind in mn.ESTIMATORS.values()
    ]
    for row in rows:
        assert row in README, row
