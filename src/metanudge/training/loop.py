"""Meta-training with all that a long run needs: progress, logs, validation, checkpoints, exact resuming."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import Dataset

from metanudge.batching import singles
from metanudge.errors import NonFiniteError, SettingsError
from metanudge.learner import MetaLearner
from metanudge.metrics import metric_name
from metanudge.pretrained import check_can_be_saved
from metanudge.settings import (
    check_flag,
    check_folder,
    check_function,
    check_seed,
)
from metanudge.training.anew import discard, discard_logs
from metanudge.training.best import Best
from metanudge.training.checkpoint import BEST, LAST, Run
from metanudge.training.divergence import Watch
from metanudge.training.identity import qualified_name, told_apart
from metanudge.training.logs import TABLE, Logs, Record, check_tensorboard
from metanudge.training.order import Order, check_single, digest_of, first_digest, length, moved
from metanudge.training.preflight import (
    check_best,
    check_optimizer,
    check_ranks,
    check_scheduler,
    check_training,
    check_whole,
)
from metanudge.training.progress import Shown, bar
from metanudge.training.validation import Better, Validation, fixed, larger_is_better, number_of
from metanudge.types import Evaluation, LossFunction, MetaStep, Tasks


class Fit(NamedTuple):
    """What ``fit`` did.

    Attributes:
        history: A record a meta-step, resumed ones included.
        validation: The last evaluation, of what the last step left; None without validation tasks.
        best: Best mean of the metric, NaN without validation, or where all were NaN.
        best_step: Meta-step it was taken at; 0 without validation.
        skipped_steps: Meta-steps without one finite task, which moved nothing.
        ended_early: Whether ``patience`` ended it.
    """

    history: list[Record]
    validation: Evaluation | None
    best: float
    best_step: int
    skipped_steps: int
    ended_early: bool = False

    def __repr__(self) -> str:
        """On one line."""
        best = "" if self.validation is None else f", best={self.best:.4g} at {self.best_step}"
        last = f", query_loss={self.history[-1].query_loss:.4g}" if self.history else ""
        early = ", ended early" if self.ended_early else ""
        return f"Fit(steps={len(self.history)}{early}{last}{best}, skipped={self.skipped_steps})"


def fit(
    learner: MetaLearner,
    optimizer: torch.optim.Optimizer,
    tasks: Dataset[Tasks] | Sequence[Tasks] | Tasks,
    *,
    steps: int,
    tasks_per_step: int = 25,
    scheduler: LRScheduler | None = None,
    max_norm: float | None = None,
    validation: Tasks | Sequence[Tasks] | Dataset[Tasks] | None = None,
    metric: LossFunction | None = None,
    better: Better = "auto",
    every: int = 100,
    patience: int | None = None,
    restore_best: bool = False,
    out: str | Path | None = None,
    resume: bool = True,
    workers: int = 0,
    seed: int = 0,
    tensorboard: bool = False,
    progress: bool = True,
) -> Fit:
    """Meta-train: ``optimizer.zero_grad()``, ``backward`` and ``optimizer.step()``, ``steps`` times.

    Step k takes tasks k * tasks_per_step, ... of an endless set; a finite one is gone through in epochs, each in an
    order that depends on (seed, epoch) alone, and without the last few tasks, which would not fill a step. So the same
    call in the same folder, killed anywhere, goes on from its last checkpoint, one every ``every`` steps, and gives bit
    for bit what it would have given (on a CPU, with as many threads); killed before the first one, it begins anew.

    In ``out`` it leaves ``log.csv`` and ``log.jsonl``, ``last.pt`` (all that resuming needs, every ``every`` steps;
    written whole or not at all, read without running code), and with validation ``best``, a folder for
    ``mn.load_pretrained``, which asks for settings that are functions and so cannot be written down.

    With a learner that has a ``process_group``, all ranks call it with the same arguments and see the same ``out``;
    they divide ``tasks_per_step`` and the validation tasks, and the first one writes and shows.

    Args:
        learner: What to train. With a warm start, tasks are told by their index in ``tasks``.
        optimizer: On ``learner.model``'s parameters.
        tasks: A map-style dataset of single tasks: ``mn.tasks.episodes``, ``mn.tasks.few_shot``, or your own; or a list
            of single tasks, or a stack of tasks. What is drawn is moved to the model's device.
        steps: Meta-steps in all, resumed ones included.
        tasks_per_step: Tasks of a meta-step.
        scheduler: Stepped after every meta-step; not ``ReduceLROnPlateau``, which needs a score at each.
        max_norm: Clip the meta-gradient to this norm; None for no clipping.
        validation: Fixed tasks (a stack, or a list or finite map-style dataset of single ones), evaluated every
            ``every`` steps and at the end. Meanwhile dropout is switched off (``eval``); BatchNorm layers follow their
            policy. A score of NaN is worse than any number.
        metric: Of the validation; None for the query loss.
        better: Whether a smaller or a larger metric is better, to be said of a metric of your own; "auto": larger for
            ``mn.metrics.accuracy``, smaller for losses.
        every: Meta-steps between validations, and between checkpoints.
        patience: End early where no validation was better for so many meta-steps, at least ``every`` (one that is NaN
            never is); None for never.
        restore_best: Whether the model ends with the weights that the validation was best with, not with the last.
            (The optimizer, ``out/last.pt`` and what is returned as ``validation`` are of the last step. Stopped by
            hand, the model stays as it is.) Without ``out``, one copy of the model.
        out: Folder; None to keep nothing on disk.
        resume: Go on from ``out/last.pt`` where it is, with the same settings of learner and optimizer, ``max_norm``,
            ``scheduler``, metric, ``better``, validation tasks (or none) and first task (functions are told apart by
            their names; where a loss's source is another it warns). With another ``execution``, ``compile``,
            ``cuda_graphs``, ``chunk_size``, ``microbatch``, or number of processes, after running out of memory, say,
            it warns and goes on, the same but for round-off, and for dropout in train mode, whose draws differ. False
            to begin anew: once all is checked, what a training left in ``out`` is removed.
        workers: Processes that draw tasks; the tasks do not depend on it.
        seed: Of the order of a finite set; tasks that are drawn have a seed of their own.
        tensorboard: Also write TensorBoard's files.
        progress: Show a bar; where stderr is no terminal, a line every ``every`` steps, and about every 30 seconds.

    Returns:
        Records of all steps, and the validation.

    Raises:
        SettingsError: Settings that cannot work, before anything is done; a checkpoint of another training; ranks that
            were not given the same.
        TasksError: Tasks that do not fit.
        NonFiniteError: The meta-training diverged: the model's parameters are not finite any more, or no task is after
            the query loss had risen; or ten meta-steps in a row had no finite task. What is on disk stays, and with
            ``restore_best`` the model has its best weights.

    Warns:
        UserWarning: The query loss is a thousand times what it was at first, once; the optimizer lacks parameters of
            the model; what is gone on with began with other parameters than the model has, or with a loss that was
            written differently; or its best weights are gone.

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
    if not isinstance(learner, MetaLearner):
        raise SettingsError(
            f"fit takes a mn.MetaLearner, got {type(learner).__name__}; make one: mn.MetaLearner(model, loss)"
        )
    check_training(steps, tasks_per_step, max_norm, every, workers)
    check_flag(resume=resume, tensorboard=tensorboard, progress=progress)
    check_seed(seed)
    if metric is not None:
        check_function("metric", metric, "metric(model, batch) -> scalar tensor, such as mn.metrics.accuracy")
    held = fixed(validation)
    if metric is not None and held is None:
        raise SettingsError("metric is of the validation, and there is none; give validation= tasks, or leave it out")
    check_best(patience, restore_best, every, held is not None)
    check_optimizer(optimizer, learner)
    check_scheduler(scheduler, optimizer)
    if isinstance(tasks, Tasks):
        tasks = singles(tasks)
    check_single(tasks)
    ranks = learner.ranks
    order = Order(length(tasks), tasks_per_step, seed, ranks)
    sign = -1.0 if larger_is_better(better, metric) else 1.0
    folder = None if out is None else Path(out)
    check_whole(learner.model, folder)
    if folder is not None and held is not None:  # where the best is kept
        check_can_be_saved(learner.model)
    check_tensorboard(folder, tensorboard)
    if folder is not None:
        check_folder(folder)
        folder.mkdir(parents=True, exist_ok=True)
    protocol = {"tasks_per_step": tasks_per_step, "seed": seed}
    more: dict[str, Any] = {"max_norm": max_norm, "processes": ranks.size}
    if held is not None:  # decides which initialisation is the best
        more["metric"] = "query loss" if metric is None else qualified_name(metric)
        more["better"] = "smaller" if sign > 0 else "larger"
    if folder is not None:
        more |= _digests(tasks, held, validation)
    run = Run(learner, optimizer, scheduler, protocol, more)
    if folder is not None:
        run.begun = told_apart(learner.model.state_dict())
    if ranks.size > 1:
        asked = {
            "steps": steps,
            "every": every,
            "patience": patience,
            "restore_best": restore_best,
            "validation": None if held is None else number_of(held),
        }
        check_ranks(ranks, tasks, protocol | run.settings | asked, folder, resume)
    if folder is not None and resume and (folder / LAST).is_file():
        run.load(folder / LAST, steps)
    if ranks.size > 1:
        ranks.check_model()  # with what a checkpoint has put there
    mine = folder if ranks.first else None  # where this process writes
    device = next(learner.model.parameters()).device
    validated = Validation(learner, None if held is None else moved(held, device), metric, tasks_per_step)
    anew = None if resume else mine
    if anew is not None:
        discard_logs(anew)
    begun, done = time.perf_counter() - run.seconds, len(run.history)
    best = Best(run, sign, folder, ranks.first, patience, restore_best)
    best.go_on()
    watch = Watch(run, max_norm, every, None if folder is None else (folder / LAST, folder / BEST))
    lost = folder is not None and resume and done == 0 and (folder / TABLE).is_file()  # killed before a checkpoint
    last = done if best.waited else steps
    shown = Shown(last, every, metric_name(metric), progress and ranks.first, lost)
    with best.rescued(), Logs(mine, run.history, tensorboard and ranks.first) as logs, bar(run, shown) as tell:
        for indices, batch in order.batches(tasks, done, last, workers, device):
            step = _step(run, watch, batch, indices, max_norm)
            if anew is not None:  # what could not take a step does not cost what was trained before
                discard(anew)
                anew = None
            lr = float(optimizer.param_groups[0]["lr"])
            if scheduler is not None:
                scheduler.step()
            number = len(run.history) + 1
            pause = number % every == 0 or number == steps
            found = validated.look(number) if pause else None
            run.seconds = time.perf_counter() - begun
            record = Record.of(number, step, run.evaluations, lr, run.seconds, found)
            run.history.append(record)
            logs.add(record)
            tell(record, validated.found)
            if found is not None:
                best.look(found, number)
            if pause and mine is not None:
                run.save(mine / LAST)
            if pause and best.waited:
                break
    if len(run.history) < steps:
        shown.tell_ended(len(run.history), run.best_step)
    ranks.wait()  # for what the first one writes
    if validated.found is None:  # nothing was left to do
        found = validated.look(len(run.history), quiet=True)
        if found is not None and run.history and run.best_step == 0:  # what was the best is gone
            best.look(found, len(run.history))
            if mine is not None:
                run.save(mine / LAST)
            ranks.wait()
    best.restore()
    return Fit(run.history, validated.found, run.best, run.best_step, run.skipped, len(run.history) < steps)


def _digests(
    tasks: Dataset[Tasks] | Sequence[Tasks], held: Tasks | Sequence[Tasks] | None, given: object
) -> dict[str, str]:
    """Of what tells tasks from others, as far as it can be told: those of the validation, and the first one."""
    found = {
        "validation tasks": None if held is None else digest_of(held, given),
        "first task": first_digest(tasks),
    }
    return {f"digest of the {name}": digest for name, digest in found.items() if digest is not None}


def _step(
    run: Run, watch: Watch, batch: Tasks | list[Tasks], indices: list[int], max_norm: float | None
) -> MetaStep | None:
    """One meta-step; None where no task was finite, and nothing moved."""
    run.optimizer.zero_grad()
    parameters = [parameter for parameter in run.learner.model.parameters() if parameter.requires_grad]
    try:
        given = indices if run.learner.warm_start is not None else None
        step = run.learner.backward(batch, given)
    except NonFiniteError as error:
        run.skipped += 1
        run.in_a_row += 1
        watch.lost(error)
        return None
    run.in_a_row = 0
    run.evaluations += step.gradient_evaluations
    if max_norm is not None:
        nn.utils.clip_grad_norm_(parameters, max_norm)
    run.optimizer.step()
    watch.moved(step)
    return step
