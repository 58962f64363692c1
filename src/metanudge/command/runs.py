"""What ``metanudge train`` does: the parts a settings file names, and a training with every seed."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import Dataset, Subset

from metanudge.command.config import TABLES, Config
from metanudge.command.families import draw
from metanudge.errors import SettingsError
from metanudge.files import write
from metanudge.learner import MetaLearner
from metanudge.metrics import metric_name
from metanudge.ranks import ALONE, Ranks
from metanudge.settings import check_folder
from metanudge.tasks.image_folders import Split
from metanudge.training import Fit, fit
from metanudge.training.anew import discard, discard_logs
from metanudge.training.checkpoint import LAST, check_done, how_far
from metanudge.training.identity import ROUNDED
from metanudge.training.logs import check_tensorboard
from metanudge.training.order import Order, length, moved
from metanudge.training.preflight import check_best, check_scheduler, check_training
from metanudge.training.validation import larger_is_better
from metanudge.types import Tasks
from metanudge.warm_start import WarmStart

CONFIG = "config.toml"
SEEDS = "seeds.json"
"""Which seeds were asked for: those of the settings file, or of the command line."""
FREE = {
    "training": ("steps", "every", "patience", "workers", "tensorboard", *ROUNDED),
    "learner": ROUNDED,
    "evaluation": ("tasks", "permutations"),
}
"""By table: what a training may go on with other values of, as no step depends on them but for what ``ROUNDED`` says,
of which ``fit`` warns."""
FIXED = ("device", "dtype", *TABLES)  # but seeds and out


def train(config: Config, fresh: bool, progress: bool, console: Console, ranks: Ranks = ALONE) -> list[Fit]:
    """Train with every seed into OUT/seed-N, each from its last checkpoint on, if there is one; the first rank writes.

    Raises:
        SettingsError: Settings that cannot work; a folder that holds a training with others.
    """
    check_folder(config.out)
    others = tuple(seed for seed in trained(config.out) if seed not in config.whole.seeds)
    if others or not fresh:
        _check_same(config, fresh, others)
    _check(config, ranks)
    ranks.wait()  # until all have seen what there was
    if ranks.first:
        _begin(config, others if fresh else seeds_of(config.out), fresh)
    ranks.wait()
    return [_train(config, seed, fresh, progress, console, ranks) for seed in config.whole.seeds]


def _begin(config: Config, before: tuple[int, ...], fresh: bool) -> None:
    """Write down what is asked for, beside the seeds ``before``, and remove what is to be begun anew."""
    config.out.mkdir(parents=True, exist_ok=True)
    if fresh:  # all seeds at once: stopped before the last one, nothing goes on from what was to be left
        for seed in config.whole.seeds:
            discard(config.out / f"seed-{seed}")
            discard_logs(config.out / f"seed-{seed}")
    write(config.out / SEEDS, json.dumps(sorted({*before, *config.whole.seeds})).encode() + b"\n")
    write(config.out / CONFIG, config.text.encode())


def seeds_of(out: Path) -> tuple[int, ...]:
    """The seeds that trainings in ``out`` were asked for; empty where none are written down.

    Raises:
        SettingsError: A file that is no list of seeds.
    """
    path = out / SEEDS
    if not path.is_file():
        return ()
    try:
        return tuple(int(seed) for seed in json.loads(path.read_text()))
    except (TypeError, ValueError) as error:
        raise SettingsError(
            f"{path} should hold a list of seeds such as [0, 1, 2], but {error}; mend it, or remove it: then those of "
            f"{CONFIG} count"
        ) from error


def _check(config: Config, ranks: Ranks) -> None:
    """Tell what cannot work before anything is written: settings, and whether model, loss and tasks fit each other."""
    given, seed = config.training, config.whole.seeds[0]
    check_training(given.steps, given.tasks_per_step, given.max_norm, given.every, given.workers)
    check_tensorboard(config.out, given.tensorboard)
    learner, optimizer, scheduler = _parts(config, seed, ranks)
    check_scheduler(scheduler, optimizer)
    tasks, fixed = tasks_of(config, "train", seed), first(tasks_of(config, "validation"), config.validation.tasks)
    Order(length(tasks), given.tasks_per_step, seed, learner.ranks)
    check_best(given.patience, False, given.every, len(fixed) > 0)
    if len(fixed):
        larger_is_better(config.validation.better, config.metric)
    learner.model.eval()
    drawn = [moved(one[0], device_of(config)) for one in (tasks, fixed) if length(one) != 0]
    learner.evaluate(drawn, config.metric, permutations=min(config.testing.permutations or 1, 2))


def _parts(config: Config, seed: int, ranks: Ranks) -> tuple[MetaLearner, torch.optim.Optimizer, LRScheduler | None]:
    """What is trained, and by what, as this seed begins."""
    torch.manual_seed(seed)
    learner = learner_of(config, ranks.group)
    optimizer = config.optimizer(learner.model.parameters())
    return learner, optimizer, None if config.scheduler is None else config.scheduler(optimizer)


def _train(config: Config, seed: int, fresh: bool, progress: bool, console: Console, ranks: Ranks) -> Fit:
    learner, optimizer, scheduler = _parts(config, seed, ranks)
    given = config.training
    fixed = first(tasks_of(config, "validation"), config.validation.tasks)
    found = fit(
        learner,
        optimizer,
        tasks_of(config, "train", seed),
        steps=given.steps,
        tasks_per_step=given.tasks_per_step,
        scheduler=scheduler,
        max_norm=given.max_norm,
        validation=[fixed[index] for index in range(len(fixed))] or None,
        metric=config.metric if len(fixed) else None,
        better=config.validation.better,
        every=given.every,
        patience=given.patience,
        out=config.out / f"seed-{seed}",
        resume=not fresh,
        workers=given.workers,
        seed=seed,
        tensorboard=given.tensorboard,
        progress=progress,
    )
    last = found.history[-1]
    ended = "" if last.step == given.steps else f" of {given.steps}, no better validation came"
    told = f"seed {seed}: {last.step} steps{ended}, {last.seconds:.0f} s, query loss {last.query_loss:.4g}"
    if found.validation is not None:
        told += f", validation {metric_name(config.metric)} {found.validation.mean:.4g} ± {found.validation.ci95:.2g}"
        told += f", best {found.best:.4g} at step {found.best_step}"
    console.print(told, highlight=False, soft_wrap=True)
    return found


def learner_of(config: Config, group: Any = None) -> MetaLearner:
    """The learner, on a new model drawn from torch's random state."""
    settings = config.settings
    model = config.model().to(getattr(torch, config.whole.dtype))
    return MetaLearner(
        model.to(device_of(config)),
        config.loss,
        query_loss=config.query_loss,
        prox=settings.prox,
        sharpness_radius=settings.sharpness_radius,
        solver=config.solver,
        estimator=config.estimator,
        execution=settings.execution,
        adapt_only=settings.adapt_only,
        chunk_size=settings.chunk_size,
        microbatch=settings.microbatch,
        batch_norm=settings.batch_norm,
        compile=settings.compile,
        cuda_graphs=settings.cuda_graphs,
        warm_start=WarmStart() if settings.warm_start else None,
        process_group=group,
    )


def device_of(config: Config) -> torch.device:
    """Where the model is.

    Raises:
        SettingsError: No such device here.
    """
    try:
        return torch.empty(0, device=config.whole.device).device
    except (RuntimeError, AssertionError) as error:
        raise SettingsError(f'there is no device "{config.whole.device}" here: {error}'.splitlines()[0]) from error


def tasks_of(config: Config, split: Split, seed: int = 0) -> Dataset[Tasks]:
    """Single tasks of a split."""
    number = config.number if split == "train" else None
    return draw(config.family, split, seed, getattr(torch, config.whole.dtype), number)


def first(tasks: Dataset[Tasks], number: int) -> Subset[Tasks]:
    """The first ``number`` tasks, or as many as there are; each drawn when it is asked for."""
    have = length(tasks)
    return Subset(tasks, range(number if have is None else min(number, have)))


def trained(out: Path) -> tuple[int, ...]:
    """The seeds of the trainings in ``out``."""
    names = (path.parent.name.removeprefix("seed-") for path in out.glob(f"seed-*/{LAST}"))
    return tuple(sorted(int(name) for name in names if name.isdigit()))


def _check_same(config: Config, fresh: bool, others: tuple[int, ...]) -> None:
    """Refuse to go on with a training of other settings, and to begin some seeds of it anew beside the others."""
    path = config.out / CONFIG
    if not path.is_file() or not trained(config.out):
        return
    cure = "give another folder (--out), or begin anew (--fresh)"
    if fresh:
        every = sorted({*others, *config.whole.seeds})
        cure = (
            f"its seeds {', '.join(map(str, others))} would stay beside the new ones: begin all anew (--seeds "
            f"{' '.join(map(str, every))}), or give another folder (--out)"
        )
    check_settings(config, path, cure)
    for seed in (*others, *(() if fresh else config.whole.seeds)):  # in a folder all go equally far
        last = config.out / f"seed-{seed}" / LAST
        if last.is_file():
            check_done(last, how_far(last)[0], config.training.steps, "--fresh")


def check_settings(config: Config, path: Path, cure: str, free: tuple[str, ...] = ()) -> None:
    """Raise a SettingsError where a training, whose settings are at ``path``, has others, but for those ``free``."""
    before, now = (_settled(table) for table in (tomllib.loads(path.read_text()), config.table))
    for key in dict.fromkeys([*before, *now]):
        if key not in free and before.get(key) != now.get(key):
            raise SettingsError(
                f"{path.parent} holds a training with {key} = {before.get(key, 'left out')}, these settings have "
                f"{now.get(key, 'left out')}; {cure}"
            )


def _settled(table: dict[str, Any]) -> dict[str, Any]:
    """What a training cannot change on its way, by dotted key."""
    found = {}
    for name in FIXED:
        part = table.get(name)
        if isinstance(part, dict):
            kept = {key: value for key, value in part.items() if key not in FREE.get(name, ())}
            found.update({f"{name}.{key}": value for key, value in kept.items()})
        elif part is not None:
            found[name] = part
    return found
