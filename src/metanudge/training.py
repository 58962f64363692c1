"""Meta-training with all that a long run needs: progress, logs, validation, checkpoints, exact resuming."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, Dataset, Sampler

from metanudge import metrics
from metanudge.batching import split
from metanudge.errors import NonFiniteError, SettingsError, TasksError
from metanudge.files import load_state, save_state
from metanudge.learner import MetaLearner
from metanudge.logs import Logs, Record
from metanudge.settings import check_flag, check_folder, check_positive, check_seed, check_steps
from metanudge.tasks.episodes import collate
from metanudge.tasks.seeding import stream
from metanudge.types import Evaluation, LossFunction, MetaStep, Tasks

LAST, BEST = "last.pt", "best"
PATIENCE = 10
"""Meta-steps in a row without one finite task after which a training gives up."""


class Fit(NamedTuple):
    """What ``fit`` did.

    Attributes:
        history: A record a meta-step, resumed ones included.
        validation: The last evaluation, of what the training ended with; None without validation tasks.
        best: Best mean of the metric, NaN without validation.
        best_step: Meta-step it was taken at; 0 without validation.
        skipped_steps: Meta-steps without one finite task, which moved nothing.
    """

    history: list[Record]
    validation: Evaluation | None
    best: float
    best_step: int
    skipped_steps: int

    def __repr__(self) -> str:
        """On one line."""
        return f"Fit(steps={len(self.history)}, best={self.best:.4g} at {self.best_step}, skipped={self.skipped_steps})"


def fit(
    learner: MetaLearner,
    optimizer: torch.optim.Optimizer,
    tasks: Dataset[Tasks],
    *,
    steps: int,
    tasks_per_step: int = 25,
    tasks_at_once: int | None = None,
    scheduler: LRScheduler | None = None,
    max_norm: float | None = None,
    validation: Tasks | Sequence[Tasks] | None = None,
    metric: LossFunction | None = None,
    better: Literal["auto", "smaller", "larger"] = "auto",
    every: int = 100,
    out: str | Path | None = None,
    resume: bool = True,
    workers: int = 0,
    seed: int = 0,
    tensorboard: bool = False,
    progress: bool = True,
) -> Fit:
    """Meta-train: ``backward`` and ``optimizer.step()``, ``steps`` times.

    Step k takes tasks k * tasks_per_step, ... of an endless set; a finite one is gone through in epochs, each in an
    order that depends on (seed, epoch) alone. So the same call in the same folder goes on where it was killed, and
    gives bit for bit what it would have given (on a CPU, with as many threads).

    In ``out`` it leaves ``log.csv``, ``last.pt`` (all that resuming needs, every ``every`` steps; written whole or
    not at all, read without running code), and with validation ``best``, a folder for ``mn.load_pretrained``.

    Args:
        learner: What to train. With a warm start, tasks are told by their index in ``tasks``.
        optimizer: On ``learner.model``'s parameters.
        tasks: A map-style dataset of single tasks: ``mn.tasks.episodes``, ``mn.tasks.few_shot``, or your own.
        steps: Meta-steps in all, resumed ones included.
        tasks_per_step: Tasks of a meta-step.
        tasks_at_once: Tasks of one ``backward``, to save memory; their meta-gradients are averaged. None for all.
        scheduler: Stepped after every meta-step.
        max_norm: Clip the meta-gradient to this norm; None for no clipping.
        validation: Fixed tasks, evaluated every ``every`` steps and at the end. Meanwhile dropout is switched off
            (``eval``), unless the model has a BatchNorm layer, which would then use statistics nobody has learnt.
        metric: Of the validation; None for the query loss.
        better: Whether a smaller or a larger metric is better; "auto": larger for ``mn.metrics.accuracy``.
        every: Meta-steps between validations, and between checkpoints.
        out: Folder; None to keep nothing on disk.
        resume: Go on from ``out/last.pt`` where it is; False to begin anew and overwrite it.
        workers: Processes that draw tasks; the tasks do not depend on it.
        seed: Of the order of a finite set.
        tensorboard: Also write TensorBoard's files.
        progress: Show a bar.

    Returns:
        Records of all steps, and the validation.

    Raises:
        SettingsError: Settings that can not work, before anything is done; a checkpoint of another training.
        TasksError: Tasks that do not fit.
        NonFiniteError: Ten meta-steps in a row had no finite task.

    Example:
        >>> import torch, metanudge as mn
        >>> model = torch.nn.Sequential(torch.nn.Linear(1, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
        >>> learner = mn.MetaLearner(model, mn.metrics.squared_error, prox=2.0)
        >>> optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        >>> found = mn.fit(
        ...     learner, optimizer, mn.tasks.episodes(mn.tasks.sinusoid), steps=4, tasks_per_step=5, progress=False,
        ...     validation=mn.tasks.sinusoid(10, seed=1),
        ... )
        >>> len(found.history), found.validation.values.shape
        (4, torch.Size([10, 17]))
    """
    for name, number in (("steps", steps), ("tasks_per_step", tasks_per_step), ("every", every)):
        check_steps(number, name)
    if tasks_at_once is not None:
        check_steps(tasks_at_once, "tasks_at_once")
    if max_norm is not None:
        check_positive(max_norm=max_norm)
    check_flag(resume=resume, tensorboard=tensorboard, progress=progress)
    check_seed(seed)
    order = Order(_length(tasks), tasks_per_step, seed)
    if better not in ("auto", "smaller", "larger"):
        raise SettingsError(f'better must be "auto", "smaller" or "larger", got {better!r}')
    sign = -1.0 if better == "larger" or (better == "auto" and metric is metrics.accuracy) else 1.0
    folder = None if out is None else Path(out)
    if folder is not None:
        check_folder(folder)
        folder.mkdir(parents=True, exist_ok=True)
    run = _Run(learner, optimizer, scheduler, {"tasks_per_step": tasks_per_step, "seed": seed})
    if folder is not None and resume and (folder / LAST).is_file():
        run.load(folder / LAST)
    found: Evaluation | None = None
    begun = time.perf_counter() - run.seconds
    with Logs(folder, run.history, tensorboard) as logs, _bar(steps, len(run.history), progress) as tell:
        for indices, batch in order.batches(tasks, len(run.history), steps, workers):
            step = run.step(batch, indices, tasks_at_once, max_norm)
            lr = float(optimizer.param_groups[0]["lr"])
            if scheduler is not None:
                scheduler.step()
            number = len(run.history) + 1
            pause = number % every == 0 or number == steps
            if pause and validation is not None:
                found = _validate(learner, validation, metric)
            run.seconds = time.perf_counter() - begun
            record = _record(number, step, run.evaluations, lr, run.seconds, found if pause else None)
            run.history.append(record)
            logs.add(record)
            tell(record, found)
            better_now = pause and found is not None and sign * found.mean < sign * run.best
            if pause and found is not None and (better_now or run.best_step == 0):
                run.best, run.best_step = found.mean, number
                if folder is not None:
                    learner.save_pretrained(folder / BEST, {"step": number, "validation": found.mean})
            if pause and folder is not None:
                run.save(folder / LAST)
    if found is None and validation is not None:  # nothing was left to do
        found = _validate(learner, validation, metric)
    return Fit(run.history, found, run.best, run.best_step, run.skipped)


class Order(Sampler[list[int]]):
    """Which tasks every meta-step takes: consecutive ones of an endless set, shuffled epochs of a finite one."""

    def __init__(self, number: int | None, size: int, seed: int) -> None:
        if number is not None and number < size:
            raise SettingsError(f"a meta-step takes {size} different tasks, but there are {number}")
        self.number, self.size, self.seed = number, size, seed
        self.first = self.last = 0

    def at(self, step: int) -> list[int]:
        """Indices of the tasks of meta-step ``step``, from 0."""
        if self.number is None:
            return list(range(step * self.size, (step + 1) * self.size))
        per_epoch = self.number // self.size  # what is left over waits for another epoch's order
        epoch, place = divmod(step, per_epoch)
        shuffled = torch.randperm(self.number, generator=stream(self.seed, epoch))
        return [int(index) for index in shuffled[place * self.size : (place + 1) * self.size]]

    def __iter__(self) -> Iterator[list[int]]:
        """The steps asked for."""
        return (self.at(step) for step in range(self.first, self.last))

    def batches(
        self, tasks: Dataset[Tasks], first: int, last: int, workers: int
    ) -> Iterator[tuple[list[int], Tasks | list[Tasks]]]:
        """Meta-steps first .. last - 1: indices, and the tasks. Torch's own random state is left alone."""
        self.first, self.last = first, last
        loader: Any = DataLoader(
            tasks,
            batch_sampler=self,
            collate_fn=collate,
            num_workers=workers,
            generator=torch.Generator(),
        )
        return zip(self, loader, strict=True)


class _Run:
    """What a training is at a moment, and can be put back to."""

    def __init__(
        self,
        learner: MetaLearner,
        optimizer: torch.optim.Optimizer,
        scheduler: LRScheduler | None,
        protocol: dict[str, int],
    ) -> None:
        self.learner, self.optimizer, self.scheduler, self.protocol = learner, optimizer, scheduler, protocol
        self.history: list[Record] = []
        self.best, self.best_step = math.nan, 0
        self.evaluations = self.skipped = self.in_a_row = 0
        self.seconds = 0.0

    def step(
        self, batch: Tasks | list[Tasks], indices: list[int], at_once: int | None, max_norm: float | None
    ) -> MetaStep | None:
        """One meta-step; None where no task was finite, and nothing moved."""
        self.optimizer.zero_grad()
        parameters = [parameter for parameter in self.learner.model.parameters() if parameter.requires_grad]
        try:
            step = _accumulate(self.learner, batch, indices, at_once, parameters)
        except NonFiniteError:
            self.skipped += 1
            self.in_a_row += 1
            if self.in_a_row >= PATIENCE:
                raise
            return None
        self.in_a_row = 0
        self.evaluations += step.gradient_evaluations
        if max_norm is not None:
            nn.utils.clip_grad_norm_(parameters, max_norm)
        self.optimizer.step()
        return step

    def save(self, path: Path) -> None:
        """Write everything."""
        warm, scheduler = self.learner.warm_start, self.scheduler
        save_state(
            path,
            {
                "protocol": self.protocol,
                "model": self.learner.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scheduler": None if scheduler is None else scheduler.state_dict(),
                "warm_start": None if warm is None else warm.state_dict(),
                "random": torch.get_rng_state(),
                "random_cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
                "history": [tuple(record) for record in self.history],
                "numbers": {
                    name: getattr(self, name)
                    for name in ("best", "best_step", "evaluations", "skipped", "in_a_row", "seconds")
                },
            },
        )

    def load(self, path: Path) -> None:
        """Go back to what was written; nothing is changed where it does not fit."""
        state = load_state(path)
        parts = {"scheduler": self.scheduler, "warm_start": self.learner.warm_start}
        try:
            if state["protocol"] != self.protocol:
                raise SettingsError(
                    f"{path} is of a training with {state['protocol']}, this one has {self.protocol}; give the same, "
                    "another folder, or resume=False"
                )
            for name, part in parts.items():
                if (state[name] is None) != (part is None):
                    there = "without" if state[name] is None else "with"
                    raise SettingsError(f"{path} is of a training {there} a {name}; give the same, or another folder")
            own = self.learner.model.state_dict()
            if {name: value.shape for name, value in own.items()} != {
                name: value.shape for name, value in state["model"].items()
            }:
                raise SettingsError(f"{path} is of a training of another model; give another folder, or resume=False")
            self.optimizer.load_state_dict(state["optimizer"])
            self.learner.model.load_state_dict(state["model"])
            for name, part in parts.items():
                if part is not None:
                    part.load_state_dict(state[name])
            self.history = [Record(*values) for values in state["history"]]
            for name, value in state["numbers"].items():
                setattr(self, name, value)
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, SettingsError):
                raise
            raise SettingsError(f"{path} is no checkpoint of this training: {error}") from error
        torch.set_rng_state(state["random"])
        if torch.cuda.is_available() and state["random_cuda"]:
            torch.cuda.set_rng_state_all(state["random_cuda"])


def _length(tasks: Dataset[Tasks]) -> int | None:
    """How many tasks there are; None without an end."""
    if not hasattr(tasks, "__getitem__") or isinstance(tasks, Tasks | list | tuple | dict):
        raise TasksError(
            "fit takes a map-style dataset of tasks, such as mn.tasks.episodes(mn.tasks.sinusoid) or "
            f"mn.tasks.few_shot(...), got {type(tasks).__name__}"
        )
    try:
        return len(tasks)  # type: ignore[arg-type]
    except TypeError:
        return None


def _accumulate(
    learner: MetaLearner,
    batch: Tasks | list[Tasks],
    indices: list[int],
    at_once: int | None,
    parameters: list[nn.Parameter],
) -> MetaStep:
    """The meta-gradient of a batch, a part of it at a time; parts count by the tasks that were kept."""
    given = indices if learner.warm_start is not None else None
    if at_once is None or at_once >= len(indices):
        return learner.backward(batch, given)
    found: list[MetaStep] = []
    kept: list[int] = []
    mean: list[Tensor | None] = [None] * len(parameters)
    failure: NonFiniteError | None = None
    for first in range(0, len(indices), at_once):
        part, members = _part(batch, first, at_once), indices[first : first + at_once]
        for parameter in parameters:
            parameter.grad = None
        try:
            step = learner.backward(part, None if given is None else members)
        except NonFiniteError as error:
            failure = error
            continue
        found.append(step)
        kept.append(len(members) - step.dropped_tasks)
        for place, parameter in enumerate(parameters):
            gradient, before = parameter.grad, mean[place]
            if gradient is not None:
                mean[place] = gradient if before is None else before.lerp_(gradient, kept[-1] / sum(kept))
    for parameter, gradient in zip(parameters, mean, strict=True):
        parameter.grad = gradient
    if not found:
        assert failure is not None
        raise failure
    return _merged(found, kept, len(indices), mean)


def _part(batch: Tasks | list[Tasks], first: int, size: int) -> Tasks | list[Tasks]:
    if isinstance(batch, list):
        return batch[first : first + size]
    return next(part for place, (part, _) in enumerate(split(batch, size)) if place == first // size)


def _merged(found: list[MetaStep], kept: list[int], total: int, gradient: list[Tensor | None]) -> MetaStep:
    """Several steps as one: means by the tasks kept, sums of what is counted."""

    def mean(name: str) -> float:
        return float(sum(n * getattr(step, name) for n, step in zip(kept, found, strict=True)) / sum(kept))

    squares = [leaf.double().square().sum() for leaf in gradient if leaf is not None]
    return MetaStep(
        mean("query_loss"),
        mean("support_loss"),
        mean("residual"),
        mean("error_bound"),
        sum(step.amplified_tasks for step in found),
        mean("nu"),
        float(torch.stack(squares).sum().sqrt()),
        total - sum(kept),
        sum(step.gradient_evaluations for step in found),
    )


def _validate(learner: MetaLearner, validation: Tasks | Sequence[Tasks], metric: LossFunction | None) -> Evaluation:
    """Evaluate without dropout; the training's random state and mode stay."""
    model = learner.model
    modes = [(module, module.training) for module in model.modules()]
    normalised = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
    try:
        if not normalised:
            model.eval()
        with torch.random.fork_rng():
            return learner.evaluate(validation, metric)
    finally:
        for module, mode in modes:
            module.training = mode


def _record(
    number: int, step: MetaStep | None, evaluations: int, lr: float, seconds: float, found: Evaluation | None
) -> Record:
    checked = (math.nan, math.nan) if found is None else (found.mean, found.ci95)
    if step is None:
        nothing = (math.nan,) * 4
        return Record(number, *nothing, 0, math.nan, 0, evaluations, lr, seconds, *checked)
    return Record(
        number,
        step.query_loss,
        step.support_loss,
        step.residual,
        step.error_bound,
        step.amplified_tasks,
        step.gradient_norm,
        step.dropped_tasks,
        evaluations,
        lr,
        seconds,
        *checked,
    )


@contextlib.contextmanager
def _bar(steps: int, done: int, shown: bool) -> Iterator[Any]:
    """A bar with the numbers that tell whether it goes well."""
    bar = Progress(
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
        console=Console(stderr=True),
        disable=not shown,
    )
    dropped = 0

    def tell(record: Record, found: Evaluation | None) -> None:
        nonlocal dropped
        dropped += record.dropped_tasks
        told = f"query loss {record.query_loss:.4g}, residual {record.residual:.2g}, dropped {dropped}"
        if found is not None:
            told += f", validation {found.mean:.4g} ± {found.ci95:.2g}"
        bar.update(task, completed=record.step, description=told)

    with bar:
        task = bar.add_task("", total=steps, completed=done)
        yield tell
