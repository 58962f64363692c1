"""Reports, the runner and the command line."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest
import torch
from rich.console import Console

import metanudge as mn
from metanudge import cli
from metanudge.experiments import report
from metanudge.experiments.runner import reproduce
from metanudge.experiments.study import Claim, Entry, Experiment, Study, figure
from metanudge.experiments.synthetic import EXPERIMENT


@dataclass(frozen=True)
class Settings:
    number: int = 3
    seed: int = 0

    @classmethod
    def quick(cls) -> Settings:
        return cls(number=1)


def study(settings: Settings, advance) -> Study:
    advance(0.5)
    made, (axis,) = figure()
    axis.plot([0, settings.number])
    claims = [
        Claim("a < b & c", "[expected]", "measured", settings.number == 3),
        Claim("never", "1", f"{settings.seed}", False),
    ]
    metrics = {"value": torch.tensor([1.0, float("nan")]), "number": settings.number}
    return Study("toy", "A toy", "First.\n\nSecond <b>.", claims, metrics, {"toy_figure": (made, 'A "caption"')})


def failing(settings: Settings, advance) -> Study:
    raise mn.NonFiniteError("no figure today")


TOY = Experiment("toys", "Toys", {"toy": Entry(Settings, study), "failing": Entry(Settings, failing)})


@pytest.fixture
def threads():
    """The runner sets the number of threads; other tests keep theirs."""
    number = torch.get_num_threads()
    yield
    torch.set_num_threads(number)


@pytest.fixture
def console():
    return Console(width=60, record=True, force_terminal=False)


@pytest.mark.usefixtures("threads")
def test_reproduce_writes_everything(tmp_path, console):
    out = tmp_path / "new" / "folder"
    reproduce(TOY, out, quick=False, seed=4, only=("toy",), console=console)
    assert {path.name for path in out.iterdir()} == {
        "metrics.json",
        "report.html",
        "toy_figure.png",
        "toy_figure.svg",
    }
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["toy"] == {"value": [1.0, None], "number": 3}
    assert metrics["run"]["toy"]["settings"] == {"number": 3, "seed": 4}
    assert metrics["run"]["toy"]["command"] == "metanudge reproduce toys --seed 4 --only toy"
    assert metrics["run"]["toy"]["versions"]["torch"] == torch.__version__
    assert [claim["holds"] for claim in metrics["claims"]] == [True, False]
    page = (out / "report.html").read_text()
    assert "2 claims checked, 1 hold" in page
    assert "a &lt; b &amp; c" in page
    assert "Second &lt;b&gt;." in page
    assert 'alt="A &quot;caption&quot;"' in page
    shown = console.export_text()
    assert "[expected]" in shown
    assert "does not hold: never" in shown


@pytest.mark.usefixtures("threads")
def test_a_study_that_fails_leaves_old_results_alone(tmp_path, console):
    (tmp_path / "metrics.json").write_text("old")
    with pytest.raises(mn.NonFiniteError):
        reproduce(TOY, tmp_path, quick=True, seed=0, only=(), console=console)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


@pytest.mark.usefixtures("threads")
def test_an_extra_study_is_run_where_it_is_asked_for(tmp_path, console):
    toy = TOY.studies["toy"]
    experiment = TOY._replace(studies={"toy": toy, "more": TOY.studies["failing"]._replace(extra=True)})
    reproduce(experiment, tmp_path, quick=True, seed=0, only=(), console=console)
    assert list(json.loads((tmp_path / "metrics.json").read_text())["run"]) == ["toy"]
    with pytest.raises(mn.NonFiniteError):
        reproduce(experiment, tmp_path, quick=True, seed=0, only=("more",), console=console)


def test_an_unknown_study_is_refused_before_any_work(tmp_path, console):
    with pytest.raises(mn.SettingsError, match="no study 'other'; there is toy, failing"):
        reproduce(TOY, tmp_path / "out", quick=True, seed=0, only=("other",), console=console)
    assert not (tmp_path / "out").exists()


def test_a_file_in_the_place_of_the_folder_is_told_before_any_work(tmp_path, console):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(mn.SettingsError, match="is a file"):
        reproduce(TOY, tmp_path / "file", quick=True, seed=0, only=("failing",), console=console)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_that_may_not_be_written_to_is_told_before_any_work(tmp_path, console, monkeypatch):
    monkeypatch.setattr("os.access", lambda place, mode: place != tmp_path)  # root may write anywhere
    with pytest.raises(mn.SettingsError, match="may not be written to"):
        reproduce(TOY, tmp_path / "a" / "b", quick=True, seed=0, only=("failing",), console=console)
    assert list(tmp_path.iterdir()) == []


def test_a_seed_below_zero_is_told_before_any_work(tmp_path, console):
    with pytest.raises(mn.SettingsError, match="at least 0, got -1"):
        reproduce(TOY, tmp_path / "out", quick=True, seed=-1, only=("failing",), console=console)


@pytest.mark.parametrize("command", ["check", "smoothness"])
def test_diagnostics_look_at_the_folder_first(command, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    assert cli.main([command, "nothing.py:function", "--out", str(tmp_path / "file" / "folder")]) == 2
    assert "is a file" in " ".join(capsys.readouterr().err.split())


def test_pictures_are_the_same_for_the_same_figure():
    made, (axis,) = figure()
    axis.plot([0, 1, 0])
    for kind in ("png", "svg"):
        assert report.render(made, kind) == report.render(made, kind)


def test_command_line_runs_a_study(tmp_path, capsys, monkeypatch, threads):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("metanudge.experiments.synthetic.EXPERIMENT", TOY)
    assert cli.main(["reproduce", "synthetic", "--quick", "--only", "toy"]) == 0
    assert (tmp_path / "results" / "synthetic" / "report.html").exists()
    assert "synthetic/report.html" in capsys.readouterr().out.replace("\n", "")
    assert cli.main(["reproduce", "synthetic", "--out", "elsewhere", "--only", "toy"]) == 0
    assert json.loads((tmp_path / "elsewhere" / "metrics.json").read_text())["toy"]["number"] == 3


def test_command_line_tells_what_went_wrong(tmp_path, capsys, monkeypatch, threads):
    monkeypatch.setattr("metanudge.experiments.synthetic.EXPERIMENT", TOY)
    assert cli.main(["reproduce", "synthetic", "--out", str(tmp_path), "--only", "failing"]) == 2
    assert "metanudge: no figure today" in capsys.readouterr().err
    assert cli.main(["reproduce", "synthetic", "--only", "nothing"]) == 2
    assert "no study 'nothing'" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["version"], ["--version"]])
def test_command_line_version(arguments, capsys):
    assert cli.main(arguments) == 0
    assert capsys.readouterr().out.strip() == mn.__version__


@pytest.mark.parametrize("arguments", [[], ["reproduce"], ["train", "--dance"]])
def test_wrong_usage_exits_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(arguments)
    assert exit_.value.code == 2
    assert capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["reproduce", "nothing"], ["dance"]])
def test_unknown_names_are_status_2(arguments, capsys):
    assert cli.main(arguments) == 2
    assert "there is no" in capsys.readouterr().err


def test_every_study_has_a_quick_form_with_a_seed():
    assert list(EXPERIMENT.studies) == ["bias", "stationarity", "smoothness", "meta_optimizers"]
    for entry in EXPERIMENT.studies.values():
        assert entry.settings.quick() != entry.settings()
        assert entry.settings().seed == 0


@pytest.mark.usefixtures("threads")
def test_one_study_run_again_keeps_the_others(tmp_path, console):
    both = Experiment("toys", "Toys", {"toy": Entry(Settings, study), "other": Entry(Settings, other)})
    reproduce(both, tmp_path, quick=False, seed=0, only=(), console=console)
    before = json.loads((tmp_path / "metrics.json").read_text())
    reproduce(both, tmp_path, quick=False, seed=5, only=("other",), console=console)
    after = json.loads((tmp_path / "metrics.json").read_text())
    assert list(after) == ["toy", "other", "claims", "run"]
    assert after["toy"] == before["toy"]
    assert after["run"]["toy"] == before["run"]["toy"]
    assert after["run"]["other"]["settings"]["seed"] == 5
    assert [claim["study"] for claim in after["claims"]] == ["toy", "toy", "other"]
    assert after["claims"][-1]["measured"] == "5"
    page = (tmp_path / "report.html").read_text()
    assert page.count("<section id=") == 2
    assert page.index("<section id=toy>") < page.index("<section id=other>")
    assert "metanudge reproduce toys --seed 5 --only other" in page


def other(settings: Settings, advance) -> Study:
    return Study("other", "Another", "Text.", [Claim("seeded", "5", f"{settings.seed}", True)], {}, {})


def test_peak_bytes_are_found_by_quantity_first(tmp_path, console):
    def memory(settings: Settings, advance) -> Study:
        return study(settings, advance)._replace(name="memory", metrics={"peak_bytes": {"maml": {"20": 5}}})

    both = Experiment("toys", "Toys", {"toy": Entry(Settings, study), "memory": Entry(Settings, memory)})
    reproduce(both, tmp_path, quick=False, seed=0, only=(), console=console)
    found = json.loads((tmp_path / "metrics.json").read_text())
    assert found["peak_bytes"] == {"memory": {"maml": {"20": 5}}}
    assert found["memory"]["peak_bytes"] == {"maml": {"20": 5}}
