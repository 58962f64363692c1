"""A training as a TOML file: typed settings, and names looked up in registries."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import Dataset

from metanudge import metrics
from metanudge.command.families import FAMILIES, MOST_SEEDS
from metanudge.command.named import arguments, choose, part
from metanudge.command.registries import LOSSES, METRICS, OPTIMIZERS, SCHEDULERS
from metanudge.errors import SettingsError
from metanudge.estimators import ESTIMATORS, FOBMAML, Estimator
from metanudge.models import MODELS
from metanudge.oracle import Policy
from metanudge.settings import check_number, check_seed, check_steps, nearest
from metanudge.solvers import SOLVERS, Nesterov, Solver
from metanudge.training.validation import Better
from metanudge.types import LossFunction, Tasks

T = TypeVar("T")


@dataclass(frozen=True)
class Whole:
    """Keys before the first table.

    Attributes:
        seeds: One training each; of the model's beginning, the training tasks and their order.
        out: Folder; None for runs/NAME-OF-THE-FILE.
        device: "cpu", "cuda", "cuda:1".
        dtype: Of the model and of inputs.
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    out: str | None = None
    device: str = "cpu"
    dtype: Literal["float32", "float64"] = "float32"


@dataclass(frozen=True)
class Learner:
    """``[learner]``: arguments of ``mn.MetaLearner``, functions by name.

    Attributes:
        loss: One of ``LOSSES``, or FILE.py:FUNCTION.
        query_loss: Likewise; None for the loss.
        prox: As of ``MetaLearner``.
        sharpness_radius: As of ``MetaLearner``.
        execution: As of ``MetaLearner``.
        adapt_only: As of ``MetaLearner``.
        chunk_size: As of ``MetaLearner``.
        microbatch: As of ``MetaLearner``.
        batch_norm: As of ``MetaLearner``.
        compile: As of ``MetaLearner``.
        cuda_graphs: As of ``MetaLearner``.
        warm_start: Whether inner solves begin at a task's last solution; give the tasks a number.
    """

    loss: str
    query_loss: str | None = None
    prox: float = 1.0
    sharpness_radius: float = 0.0
    execution: Literal["auto", "vectorized", "in_place"] = "auto"
    adapt_only: str | tuple[str, ...] | None = None
    chunk_size: int | None = None
    microbatch: int | None = None
    batch_norm: Policy | None = None
    compile: bool = False
    cuda_graphs: bool = False
    warm_start: bool = False


@dataclass(frozen=True)
class Training:
    """``[training]``: arguments of ``mn.fit``."""

    steps: int
    tasks_per_step: int = 25
    max_norm: float | None = None
    every: int = 100
    patience: int | None = None
    workers: int = 0
    tensorboard: bool = False


@dataclass(frozen=True)
class Validation:
    """``[validation]``.

    Attributes:
        tasks: How many; 0 for none.
        better: As of ``mn.fit``.
    """

    tasks: int = 100
    better: Better = "auto"


@dataclass(frozen=True)
class Testing:
    """``[evaluation]``.

    Attributes:
        tasks: How many test tasks.
        metric: One of ``METRICS``, or FILE.py:FUNCTION, of validation and test; None for accuracy where the loss is
            cross entropy, and otherwise for the query loss.
        permutations: Permutations of the class labels a task's score is the mean over; None for 4 where they
            are arbitrary, as those of ``mn.tasks.few_shot``, and 1 otherwise.
    """

    tasks: int = 600
    metric: str | None = None
    permutations: int | None = None


@dataclass(frozen=True)
class Config:
    """A settings file, read and checked; parts marked as calls are still to be made.

    Attributes:
        text: The file.
        table: The file, as read from TOML.
        out: Where results go.
        whole: Seeds, device and dtype.
        family: ``family(split=...)`` gives tasks.
        number: Training tasks; None for no end.
        model: ``model()`` makes one.
        settings: Of the learner.
        loss: Of the learner.
        query_loss: Of the learner.
        metric: Of validation and test.
        solver: Of the learner.
        estimator: Of the learner.
        optimizer: ``optimizer(parameters)`` makes one.
        scheduler: ``scheduler(optimizer)`` makes one.
        training: Arguments of ``mn.fit``.
        validation: Its tasks.
        testing: The evaluation.
    """

    text: str
    table: dict[str, Any]
    out: Path
    whole: Whole
    family: partial[Dataset[Tasks]]
    number: int | None
    model: partial[nn.Module]
    settings: Learner
    loss: LossFunction
    query_loss: LossFunction | None
    metric: LossFunction | None
    solver: Solver
    estimator: Estimator
    optimizer: partial[torch.optim.Optimizer]
    scheduler: partial[LRScheduler] | None
    training: Training
    validation: Validation
    testing: Testing


TABLES = (
    "tasks",
    "model",
    "learner",
    "solver",
    "estimator",
    "optimizer",
    "scheduler",
    "training",
    "validation",
    "evaluation",
)


def read_config(path: Path, out: Path | None = None, seeds: tuple[int, ...] = ()) -> Config:
    """Read a settings file; every name, key and type is checked before anything is done.

    Args:
        path: A TOML file.
        out: Where results go, whatever the file says.
        seeds: The seeds, whatever the file says.

    Raises:
        SettingsError: No such file, no TOML, an unknown name or key (with the nearest right one), a missing or wrong
            value.
    """
    if not path.is_file():
        raise SettingsError(f"{path} cannot be read: there is no such file")
    try:
        text = path.read_text()
        table = tomllib.loads(text)
    except (OSError, ValueError) as error:
        raise SettingsError(f"{path} cannot be read: {error}") from error
    whole = _whole(table, path, seeds)
    for name in ("tasks", "model", "learner", "training"):
        if name not in table:
            raise SettingsError(f"{path} needs a table [{name}]")
    tasks = dict(_table(table, "tasks"))
    number = tasks.pop("number", None)
    if number is not None:
        check_steps(number, "[tasks] number")
    settings = _settings(Learner, _table(table, "learner"), "learner")
    testing = _settings(Testing, _table(table, "evaluation"), "evaluation")
    loss = choose(settings.loss, LOSSES, "[learner] loss")
    metric = testing.metric or ("accuracy" if loss is metrics.cross_entropy else None)
    check_steps(testing.tasks, "[evaluation] tasks")
    validation = _settings(Validation, _table(table, "validation"), "validation")
    check_number(validation.tasks, "[validation] tasks")
    if testing.permutations is not None:
        check_steps(testing.permutations, "[evaluation] permutations")
    return Config(
        text=text,
        table=table,
        out=out or Path(whole.out or Path("runs") / path.stem),
        whole=whole,
        family=part(tasks, FAMILIES, "tasks", ("split",)),
        number=number,
        model=part(_table(table, "model"), MODELS, "model"),
        settings=settings,
        loss=loss,
        query_loss=None if settings.query_loss is None else choose(settings.query_loss, LOSSES, "[learner] query_loss"),
        metric=None if metric is None else choose(metric, METRICS, "[evaluation] metric"),
        solver=_made(table, "solver", SOLVERS, Nesterov(steps=16)),
        estimator=_made(table, "estimator", ESTIMATORS, FOBMAML()),
        optimizer=part(
            table.get("optimizer", {"name": "normalized_sgd", "lr": 0.1}), OPTIMIZERS, "optimizer", ("params",)
        ),
        scheduler=part(table["scheduler"], SCHEDULERS, "scheduler", ("optimizer", "last_epoch"))
        if "scheduler" in table
        else None,
        training=_settings(Training, _table(table, "training"), "training"),
        validation=validation,
        testing=testing,
    )


def _whole(table: dict[str, Any], path: Path, seeds: tuple[int, ...]) -> Whole:
    """What stands before the first table; nothing else may, but the tables."""
    known = Whole.__dataclass_fields__
    for key in table:
        if key not in known and key not in TABLES:
            raise SettingsError(f'{path} has no setting "{key}"; {nearest(key, [*known, *TABLES])}')
    whole = _settings(Whole, {key: value for key, value in table.items() if key in known}, "")
    whole = replace(whole, seeds=seeds or whole.seeds)
    for seed in whole.seeds:
        check_seed(seed)
        if seed >= MOST_SEEDS:
            raise SettingsError(f"seeds must be below {MOST_SEEDS}, got {seed}")
    if not whole.seeds or len(set(whole.seeds)) < len(whole.seeds):
        raise SettingsError(f"seeds must be one or more different numbers, got {list(whole.seeds)}")
    return whole


def _table(table: dict[str, Any], name: str) -> dict[str, Any]:
    found = table.get(name, {})
    if not isinstance(found, dict):
        raise SettingsError(f"{name} must be a table, [{name}], got {found!r}")
    return found


def _settings(kind: type[T], table: dict[str, Any], name: str) -> T:
    return kind(**arguments(kind, table, f"[{name}] " if name else ""))


def _made(table: dict[str, Any], name: str, registry: dict[str, type[T]], default: T) -> T:
    """The object itself: solvers and estimators are settings, and check themselves."""
    if name not in table:
        return default
    call = part(table[name], registry, name)
    try:
        return call()
    except SettingsError as error:
        raise SettingsError(f"[{name}] {error}") from error
