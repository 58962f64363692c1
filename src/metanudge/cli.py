"""The command line."""

from __future__ import annotations

import dataclasses
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console

import metanudge
from metanudge.command.config import read_config
from metanudge.command.failures import told
from metanudge.command.loading import load_learner
from metanudge.command.runs import train
from metanudge.command.scoring import evaluate
from metanudge.diagnostics import check, smoothness
from metanudge.errors import SettingsError
from metanudge.ranks import joined
from metanudge.settings import check_folder, nearest
from metanudge.training.progress import line

EXPERIMENTS = ("synthetic", "solves", "sinusoid", "mnist1d", "memory")


@dataclasses.dataclass(frozen=True)
class Reproduce:
    """Reproduce a result: writes metrics.json, figures (PNG and SVG) and report.html.

    Stopped, it goes on from the last finished training when called again.
    """

    experiment: tyro.conf.Positional[str]
    """Which result: synthetic, solves, sinusoid, mnist1d or memory."""
    out: Path | None = None
    """Folder to write into; by default results/EXPERIMENT."""
    quick: bool = False
    """The reduced form, at most three minutes."""
    seed: int = 0
    """Seed of everything random."""
    only: tuple[str, ...] = ()
    """Run these studies alone, and keep the other results in the folder. Of synthetic: bias, stationarity, smoothness,
    meta_optimizers; of solves: convergence, quality, displacement, certificate, guards, sinusoid (the longest, about an
    hour); of sinusoid: results (tanh), and, run only when named, relu; of mnist1d: results (permuted labels),
    new_classes, and, run only when named, gelu and sharpness; of memory (45 minutes, 3 of them quick): steps,
    channels, transformer, lora."""

    def run(self, console: Console) -> int:
        """Run the experiment."""
        if self.experiment not in EXPERIMENTS:
            raise SettingsError(f"there is no result {self.experiment!r}; {nearest(self.experiment, EXPERIMENTS)}")
        from metanudge.experiments.runner import reproduce  # plotting libraries load only when they are needed

        experiment = import_module(f"metanudge.experiments.{self.experiment}").EXPERIMENT
        out = self.out or Path("results") / self.experiment
        reproduce(experiment, out, self.quick, self.seed, self.only, console)
        console.print(f"Figures and numbers: open [bold]{out / 'report.html'}[/bold]", highlight=False)
        return 0


@dataclasses.dataclass(frozen=True)
class Train:
    """Meta-train by a settings file, with every seed into OUT/seed-N; killed, it goes on from the last checkpoint.

    Under torchrun the processes share the tasks of every meta-step.
    """

    config: tyro.conf.Positional[Path]
    """A TOML file: tables tasks, model, learner, training, and optionally solver, estimator, optimizer, scheduler,
    validation, evaluation."""
    out: Path | None = None
    """Folder to write into; by default what the file says, or runs/NAME."""
    seeds: tuple[int, ...] = ()
    """Train with these seeds alone; by default with those of the file."""
    fresh: bool = False
    """Begin anew, and remove the training of these seeds that is there."""
    quiet: bool = False
    """No progress bar."""

    def run(self, console: Console) -> int:
        """Read, and train."""
        config = read_config(self.config, self.out, self.seeds)
        with joined(config.whole.device) as ranks:
            console.quiet = not ranks.first
            train(config, self.fresh, not self.quiet, console, ranks)
        console.print(f"Written to [bold]{config.out}[/bold]; metanudge evaluate {config.out}", highlight=False)
        return 0


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """Evaluate all seeds of a training on test tasks: mean and 95 % interval after every adaptation step."""

    target: tyro.conf.Positional[Path]
    """The folder that train wrote into, or its settings file."""
    tasks: int | None = None
    """How many test tasks; by default what the settings say, or 600."""
    permutations: int | None = None
    """Permutations of class labels to average over; by default what the settings say, or 4 of class labels."""
    weights: Literal["best", "last"] = "best"
    """Those that were best on the validation tasks, or the last ones."""
    partial: bool = False
    """Evaluate what there is, where seeds that were asked for are missing or not at their last step; the file's name
    then ends in -partial."""

    def run(self, console: Console) -> int:
        """Evaluate, print and write evaluation.json; what sets it apart from the settings' own is in its name."""
        evaluate(self.target, self.tasks, self.permutations, self.weights, console, partial=self.partial)
        return 0


@dataclasses.dataclass(frozen=True)
class Check:
    """How far the estimate is from the exact meta-gradient, on your own model and tasks, and what would mend it."""

    target: tyro.conf.Positional[str]
    """FILE.py:FUNCTION or package.module:FUNCTION; the function returns (learner, tasks)."""
    max_tasks: int = 4
    """Tasks to use, the first ones."""
    reference_steps: int = 400
    """Steps of the reference's solve."""
    out: Path | None = None
    """Folder to write check.json, check.png and check.svg into; by default nothing is written."""

    def run(self, console: Console) -> int:
        """Check, print and write."""
        if self.out is not None:
            check_folder(self.out)
        loaded = load_learner(self.target)
        with line("comparing with the exact meta-gradient") as tell:
            found = check(
                loaded.learner,
                loaded.tasks,
                max_tasks=self.max_tasks,
                reference_steps=self.reference_steps,
                progress=tell,
            )
        console.print(str(found).removesuffix(found.verdict), highlight=False, soft_wrap=True)
        console.print(found.verdict, style="green" if found.good else "yellow", highlight=False)
        console.print(f"Compared with: {found.reference}.", style="dim", highlight=False)
        if self.out is not None:
            from metanudge.experiments.report import write_figure  # plotting libraries load only when they are needed

            record = found._asdict() | {"rows": [row._asdict() for row in found.rows]}
            write_figure(self.out, "check", found.figure(), record)
            console.print(f"Written to [bold]{self.out}[/bold]", highlight=False)
        return 0


@dataclasses.dataclass(frozen=True)
class Smoothness:
    """How the smoothness of your meta-objective grows with its gradient, and how to clip or normalise meta-steps."""

    target: tyro.conf.Positional[str]
    """FILE.py:FUNCTION or package.module:FUNCTION; the function returns (learner, tasks) or (learner, tasks,
    optimizer)."""
    steps: int = 30
    """Meta-steps to take; everything is put back afterwards."""
    out: Path | None = None
    """Folder to write smoothness.json, smoothness.png and smoothness.svg into; by default nothing is written."""

    def run(self, console: Console) -> int:
        """Measure, print and write."""
        if self.out is not None:
            check_folder(self.out)
        loaded = load_learner(self.target)
        with console.status("taking meta-steps"):
            found = smoothness(loaded.learner, loaded.tasks, loaded.optimizer, steps=self.steps)
        console.print(str(found), highlight=False, soft_wrap=True)
        if self.out is not None:
            from metanudge.experiments.report import write_figure  # plotting libraries load only when they are needed

            write_figure(self.out, "smoothness", found.figure(), found._asdict() | {"max_norm": found.max_norm})
            console.print(f"Written to [bold]{self.out}[/bold]", highlight=False)
        return 0


@dataclasses.dataclass(frozen=True)
class Version:
    """Show the version."""

    def run(self, console: Console) -> int:
        """Print it."""
        console.print(metanudge.__version__, highlight=False)
        return 0


COMMANDS = ("train", "evaluate", "reproduce", "check", "smoothness", "version")
Command = (
    Annotated[Train, tyro.conf.subcommand("train")]
    | Annotated[Evaluate, tyro.conf.subcommand("evaluate")]
    | Annotated[Reproduce, tyro.conf.subcommand("reproduce")]
    | Annotated[Check, tyro.conf.subcommand("check")]
    | Annotated[Smoothness, tyro.conf.subcommand("smoothness")]
    | Annotated[Version, tyro.conf.subcommand("version")]
)


def main(arguments: list[str] | None = None) -> int:
    """Run ``metanudge`` and return its exit status: 0 done, 2 wrong usage or failure, 130 stopped by hand."""
    given = sys.argv[1:] if arguments is None else arguments
    if given and not given[0].startswith("-") and given[0] not in COMMANDS:  # of options tyro itself tells the nearest
        return _failed(f"there is no command {given[0]!r}; {nearest(given[0], COMMANDS)}")
    command = tyro.cli(
        Command,
        prog="metanudge",
        description=metanudge.__doc__,
        args=["version"] if given == ["--version"] else given,
    )
    console = Console()
    try:
        with _short_warnings():
            return command.run(console)
    except KeyboardInterrupt:
        _failed("stopped")
        return 130
    except Exception as error:
        message = told(error)
        if message is None:  # a mistake of ours, of which the whole traceback is wanted
            raise
        return _failed(message)


@contextmanager
def _short_warnings() -> Iterator[None]:
    """A block in which warnings that are located in the command's own program are told without that line."""
    as_ever, program = warnings.formatwarning, getattr(sys.modules["__main__"], "__file__", None)

    def short(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
    ) -> str:
        if filename != program:  # as that of a user's function, which metanudge check has loaded
            return as_ever(message, category, filename, lineno, line)
        return f"metanudge: {category.__name__}: {message}\n"

    warnings.formatwarning = short
    try:
        yield
    finally:
        warnings.formatwarning = as_ever


def _failed(message: str) -> int:
    Console(stderr=True).print(f"metanudge: {message}", style="red", highlight=False, markup=False, soft_wrap=True)
    return 2
