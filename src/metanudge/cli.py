"""The command line: names to objects. The only file that knows strings."""

from __future__ import annotations

import dataclasses
import sys
from importlib import import_module
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console

import metanudge
from metanudge.errors import MetanudgeError


@dataclasses.dataclass(frozen=True)
class Reproduce:
    """Reproduce a result: writes metrics.json, figures (PNG and SVG) and report.html."""

    experiment: tyro.conf.Positional[Literal["synthetic", "solves"]]
    """Which result."""
    out: Path | None = None
    """Folder to write into; by default results/EXPERIMENT, with --only results/EXPERIMENT-partial."""
    quick: bool = False
    """The reduced form, at most a minute."""
    seed: int = 0
    """Seed of everything random."""
    only: tuple[str, ...] = ()
    """Run these studies alone; for synthetic: bias, stationarity, smoothness, meta_optimizers."""

    def run(self, console: Console) -> int:
        """Run the experiment."""
        from metanudge.experiments.runner import reproduce  # plotting libraries load only when they are needed

        experiment = import_module(f"metanudge.experiments.{self.experiment}").EXPERIMENT
        out = self.out or Path("results") / (self.experiment + ("-partial" if self.only else ""))
        reproduce(experiment, out, self.quick, self.seed, self.only, console)
        console.print(f"Figures and numbers: open [bold]{out / 'report.html'}[/bold]", highlight=False)
        return 0


@dataclasses.dataclass(frozen=True)
class Version:
    """Show the version."""

    def run(self, console: Console) -> int:
        """Print it."""
        console.print(metanudge.__version__, highlight=False)
        return 0


Command = Annotated[Reproduce, tyro.conf.subcommand("reproduce")] | Annotated[Version, tyro.conf.subcommand("version")]


def main(arguments: list[str] | None = None) -> int:
    """Run ``metanudge`` and return its exit status: 0 done, 2 wrong usage or failure."""
    given = sys.argv[1:] if arguments is None else arguments
    command = tyro.cli(
        Command,
        prog="metanudge",
        description=metanudge.__doc__,
        args=["version"] if given == ["--version"] else given,
    )
    console = Console()
    try:
        return command.run(console)
    except (MetanudgeError, OSError) as error:
        Console(stderr=True).print(f"metanudge: {error}", style="red", highlight=False)
        return 2
