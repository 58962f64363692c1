"""Jobs in processes of their own, and their outcomes, which outlive a run that is stopped."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from rich.console import Console
from torch import Tensor

import metanudge as mn
from metanudge.experiments import kept as kept_module
from metanudge.experiments.comparison import training as comparison
from metanudge.experiments.comparison.benchmark import BENCHMARKS, Inner
from metanudge.experiments.kept import UNFINISHED, Kept, keeping, source_digest
from metanudge.experiments.pool import run_all
from metanudge.experiments.runner import reproduce
from metanudge.experiments.solves import training as solves
from metanudge.experiments.study import Claim, Entry, Experiment, Study


class Outcome(NamedTuple):
    number: float
    scores: list[float]
    parts: dict[str, Tensor]


@dataclass(frozen=True)
class Job:
    folder: str
    number: int
    thing: object = None


def work(job: Job) -> Outcome:
    """Leaves a stroke a call; fails where it finds a file that says so."""
    if Path(job.folder, f"fail_{job.number}").exists():
        raise mn.NonFiniteError("stopped")
    with Path(job.folder, f"calls_{job.number}").open("a") as file:
        file.write("|")
    return Outcome(job.number / 3, [float("nan"), 0.1], {"weight": torch.full((2,), 1 / 7, dtype=torch.float64)})


def unkeepable(job: Job) -> Outcome:
    return Outcome(1.0, [torch.nn.Linear(1, 1)], {})


def untold(job: Job) -> float:
    return 1.0


def jobs(folder: Path, number: int = 4) -> list[Job]:
    return [Job(str(folder), index) for index in range(number)]


def calls(folder: Path) -> list[int]:
    return [len(path.read_text()) for path in sorted(folder.glob("calls_*"))]


def kept_in(folder: Path, tell: Callable[[str], object] = print, source: str | None = None) -> Kept:
    return Kept(folder / UNFINISHED, source or source_digest(), tell)


def run(kept: Kept, given: list[Job], function: Callable = work, workers: int = 1) -> list[Outcome]:
    with keeping(kept):
        return run_all(function, given, workers, lambda share: None, lambda done: done / len(given))


def same(one: Outcome, other: Outcome) -> bool:
    return (
        type(one) is type(other)
        and one.number == other.number
        and repr(one.scores) == repr(other.scores)
        and list(one.parts) == list(other.parts)
        and all(torch.equal(one.parts[name], other.parts[name]) for name in one.parts)
    )


@pytest.mark.parametrize("workers", [1, 2])
def test_finished_jobs_are_taken_and_the_others_run(tmp_path, workers):
    run(kept_in(tmp_path), jobs(tmp_path, 2), workers=workers)
    told: list[str] = []
    found = run(kept_in(tmp_path, told.append), jobs(tmp_path), workers=workers)
    assert calls(tmp_path) == [1, 1, 1, 1]
    assert told == ["going on: 2 of 4 trainings were finished"]
    assert all(same(one, work(job)) for one, job in zip(found, jobs(tmp_path), strict=True))


def test_nothing_is_kept_outside(tmp_path):
    given = jobs(tmp_path)
    shares: list[float] = []
    for _ in range(2):
        run_all(work, given, 1, shares.append, lambda done: done / 4)
    assert calls(tmp_path) == [2, 2, 2, 2]
    assert shares == [0.25, 0.5, 0.75, 1.0] * 2


def test_progress_counts_what_was_finished(tmp_path):
    run(kept_in(tmp_path), jobs(tmp_path, 2))
    shares: list[float] = []
    with keeping(kept_in(tmp_path)):
        run_all(work, jobs(tmp_path), 1, shares.append, lambda done: done / 4)
    assert shares == [0.5, 0.75, 1.0]


def test_the_outcomes_before_a_failure_are_kept(tmp_path):
    Path(tmp_path, "fail_2").touch()
    with pytest.raises(mn.NonFiniteError):
        run(kept_in(tmp_path), jobs(tmp_path))
    Path(tmp_path, "fail_2").unlink()
    run(kept_in(tmp_path), jobs(tmp_path))
    assert calls(tmp_path) == [1, 1, 1, 1]


@pytest.mark.parametrize("content", [b"", b"no such file", None])
def test_a_file_that_can_not_be_read_is_run_again(tmp_path, content):
    run(kept_in(tmp_path), jobs(tmp_path, 2))
    path = sorted((tmp_path / UNFINISHED).glob("*/*"))[0]
    path.write_bytes(path.read_bytes()[:-100] if content is None else content)
    found = run(kept_in(tmp_path), jobs(tmp_path, 2))
    assert sorted(calls(tmp_path)) == [1, 2]
    assert [one.number for one in found] == [0, 1 / 3]


def test_other_jobs_and_other_code_find_nothing(tmp_path, monkeypatch):
    run(kept_in(tmp_path), jobs(tmp_path, 1))
    run(kept_in(tmp_path), [replace(jobs(tmp_path)[0], thing="other")])
    assert calls(tmp_path) == [2]
    run(kept_in(tmp_path, source="other"), jobs(tmp_path, 1))
    assert calls(tmp_path) == [3]
    monkeypatch.setattr(torch, "__version__", "0")
    run(kept_in(tmp_path), jobs(tmp_path, 1))
    assert calls(tmp_path) == [4]


def test_a_source_that_changes_in_the_meantime_keeps_nothing(tmp_path, monkeypatch):
    kept = kept_in(tmp_path)
    monkeypatch.setattr(kept_module, "source_digest", lambda: "edited")
    run(kept, jobs(tmp_path))
    assert not (tmp_path / UNFINISHED).exists()


def test_the_digest_is_of_every_source_file(tmp_path, monkeypatch):
    (tmp_path / "inner").mkdir()
    (tmp_path / "__init__.py").touch()
    monkeypatch.setattr(mn, "__file__", str(tmp_path / "__init__.py"))
    digests = [source_digest()]
    for text in ("a = 1", "a = 2"):
        (tmp_path / "inner" / "a.py").write_text(text)
        digests.append(source_digest())
    (tmp_path / "inner" / "a.py").rename(tmp_path / "a.py")
    digests.append(source_digest())
    assert len(set(digests)) == 4
    (tmp_path / "a.pyc").touch()
    assert source_digest() == digests[-1]


def test_what_can_not_be_kept_is_told(tmp_path):
    with pytest.raises(TypeError, match="scores of what unkeepable found cannot be kept"):
        run(kept_in(tmp_path), jobs(tmp_path), unkeepable)
    with pytest.raises(TypeError, match="untold must be annotated to return a NamedTuple"):
        run(kept_in(tmp_path), jobs(tmp_path), untold)
    with pytest.raises(TypeError, match="told whole by its repr"):
        run(kept_in(tmp_path), [Job(str(tmp_path), 0, object())])


def comparison_job(method: str, inner: Inner) -> comparison.Job:
    return comparison.Job("sinusoid_tanh", method, inner, 1e-3, 0, 1, 2, 1, 2, 2, 2)


GRID = [
    comparison_job(method, inner)
    for method in comparison.METHODS
    for benchmark in BENCHMARKS.values()
    for inner in benchmark().inners
]
SOLVES = [
    solves.Job("fobmaml", "tanh", 0, 1, 1, tasks=2, test_tasks=2),
    solves.Job("fobmaml", "tanh", 0, 1, 1, 2.0, mn.Nesterov(3), mn.FOBMAML(nudge="full"), tasks=2, test_tasks=2),
    solves.Job("maml", "relu", 0, 1, 1, 0.0, mn.GradientDescent(2, lr=0.01, momentum=0.9), mn.MAML(), 2, test_tasks=2),
]


def named(given: object) -> str:
    """Without addresses: the same in every process."""
    return re.sub(" at 0x[0-9a-f]+", "", str(given))


@pytest.mark.parametrize("given", [*GRID[:: len(GRID) // 6], *SOLVES], ids=named)
def test_the_trainings_of_the_studies_are_told_whole(given):
    names = {**vars(mn), **vars(mn.estimators), "Inner": Inner, "Job": type(given)}
    assert eval(repr(given), names) == given


@pytest.mark.parametrize(
    ("function", "given"),
    [
        (comparison.train, comparison_job("fobmaml", Inner(mn.Nesterov(3), 2.0))),
        *((solves.train, job) for job in SOLVES),
    ],
    ids=named,
)
def test_the_trainings_of_the_studies_are_kept(tmp_path, function, given):
    (first,) = run(kept_in(tmp_path), [given], function)
    kept = kept_in(tmp_path)
    (again,) = run(kept, [given], function)
    assert kept.taken == 1
    assert type(again) is type(first)
    assert repr(again) == repr(first)


@dataclass(frozen=True)
class Settings:
    folder: str = ""
    seed: int = 0

    @classmethod
    def quick(cls) -> Settings:
        return cls()


def study(folder: Path, name: str, thing: object = None) -> Entry:
    def run(settings: Settings, advance) -> Study:
        given = [replace(job, thing=thing) for job in jobs(folder)]
        found = run_all(work, given, 1, advance, lambda done: done / 4)
        metrics = {"numbers": [one.number for one in found]}
        return Study(name, "A toy", "Text.", [Claim("one", "1", "1", True)], metrics, {})

    return Entry(Settings, run)


def test_a_reproduction_that_is_stopped_goes_on(tmp_path):
    out, console = tmp_path / "out", Console(width=80, record=True, force_terminal=False)
    toy = Experiment("toys", "Toys", {"toy": study(tmp_path, "toy")})
    Path(tmp_path, "fail_3").touch()
    with pytest.raises(mn.NonFiniteError):
        reproduce(toy, out, False, 0, (), console)
    assert [path.name for path in out.iterdir()] == [UNFINISHED]
    assert "going on" not in console.export_text()
    Path(tmp_path, "fail_3").unlink()
    reproduce(toy, out, False, 0, (), console)
    assert console.export_text().count("going on: 3 of 4 trainings were finished") == 1
    assert calls(tmp_path) == [1, 1, 1, 1]
    assert sorted(path.name for path in out.iterdir()) == ["metrics.json", "report.html"]
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["toy"]["numbers"] == [0, 1 / 3, 2 / 3, 1]
    assert metrics["run"]["toy"]["finished_before"] == 3
    assert metrics["run"]["toy"]["source"] == source_digest()[:12]
    reproduce(toy, out, False, 0, (), console)
    assert calls(tmp_path) == [2, 2, 2, 2]
    assert "finished_before" not in json.loads((out / "metrics.json").read_text())["run"]["toy"]


def test_a_study_that_ends_leaves_what_others_kept(tmp_path):
    out, console = tmp_path / "out", Console(width=80, record=True, force_terminal=False)
    one, other = tmp_path / "one", tmp_path / "other"
    for folder in (one, other):
        folder.mkdir()
    toys = Experiment("toys", "Toys", {"one": study(one, "one"), "other": study(other, "other", "another")})
    (out / UNFINISHED / "0123456789ab").mkdir(parents=True)
    (out / UNFINISHED / "0123456789ab" / "old.pt").touch()
    (other / "fail_3").touch()
    with pytest.raises(mn.NonFiniteError):
        reproduce(toys, out, False, 0, ("other",), console)
    reproduce(toys, out, False, 0, ("one",), console)
    assert [path.name for path in (out / UNFINISHED).iterdir()] == [source_digest()[:12]]
    assert len(list((out / UNFINISHED).glob("*/*"))) == 3
    (other / "fail_3").unlink()
    reproduce(toys, out, False, 0, ("other",), console)
    assert calls(other) == [1, 1, 1, 1]
    assert not (out / UNFINISHED).exists()


SLEEPERS = """
import signal, time
from metanudge.experiments.pool import run_all

def sleep(job):
    print("begun", flush=True)
    time.sleep(1000)

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    run_all(sleep, list(range(5)), 2, lambda share: None, float)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_workers_end_with_their_parent(tmp_path, number):
    script = tmp_path / "sleepers.py"
    script.write_text(SLEEPERS)
    command = [sys.executable, str(script)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as parent:
        assert [parent.stdout.readline() for _ in range(2)] == ["begun\n"] * 2
        parent.send_signal(number)
        # the workers have the same standard output: it ends when the last of them has
        assert parent.communicate(timeout=60)[0] == ""
    assert parent.returncode != 0
