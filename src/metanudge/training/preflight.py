"""What ``fit`` looks at before it begins."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from metanudge.errors import SettingsError
from metanudge.learner import MetaLearner
from metanudge.ranks import Ranks
from metanudge.settings import check_flag, check_number, check_part, check_positive, check_steps
from metanudge.sharding import is_sharded
from metanudge.training.checkpoint import LAST
from metanudge.training.order import first_digest, length
from metanudge.warned import warn


def check_training(steps: int, tasks_per_step: int, max_norm: float | None, every: int, workers: int) -> None:
    """Raise a SettingsError for numbers that ``fit`` cannot work with."""
    for name, number in (("steps", steps), ("tasks_per_step", tasks_per_step), ("every", every)):
        check_steps(number, name)
    if max_norm is not None:
        check_positive(max_norm=max_norm)
    check_number(workers, "workers")


def check_best(patience: int | None, restore_best: bool, every: int, validated: bool) -> None:
    """Raise a SettingsError for a patience that is no number or too short, and where nothing tells what is best."""
    check_flag(restore_best=restore_best)
    if patience is not None:
        check_steps(patience, "patience")
    asked = [name for name, wanted in (("patience", patience is not None), ("restore_best", restore_best)) if wanted]
    if asked and not validated:
        raise SettingsError(
            f"{' and '.join(asked)} can only go by the validation, and there is none: give validation tasks "
            "(validation=, or tasks of [validation] in a settings file)"
        )
    if patience is not None and patience < every:
        raise SettingsError(
            f"patience is {patience} meta-steps, in which no second validation comes: there is one every {every}; give "
            f"{every} or more, such as a few times that, or a smaller every"
        )


def check_whole(model: nn.Module, folder: Path | None) -> None:
    """Raise a SettingsError for a folder, of a model that FSDP2 shards: no process could write all of it."""
    if folder is not None and is_sharded(model):
        raise SettingsError(
            "out cannot keep a model that FSDP2 shards, of which every process holds a part; leave it out, and save "
            "with torch.distributed.checkpoint"
        )


def check_ranks(ranks: Ranks, tasks: Any, given: dict[str, Any], folder: Path | None, resume: bool) -> None:
    """Compare, before anything is done, what the ranks were given and what they see.

    Raises:
        SettingsError: They differ; tasks that are drawn anew at every look.
    """
    first = first_digest(tasks)
    if first is None:
        raise SettingsError(
            "the tasks are drawn anew at every look, and ranks that begin with the same seed would draw the same ones; "
            "make a task a function of its index, as of mn.tasks.episodes: torch.Generator().manual_seed(index)"
        )
    last = None if folder is None else folder / LAST
    there = zlib.crc32(last.read_bytes()) if resume and last is not None and last.is_file() else "none"
    seen = {"the number of tasks": length(tasks), "the first task": first, "out": folder}
    ranks.check_settings(given | seen | {f"the digest of {last}, which all have to see": there})


def check_optimizer(optimizer: torch.optim.Optimizer, learner: MetaLearner) -> None:
    """Raise a SettingsError for what is no optimizer, or one that could not move the learner's model.

    Warns:
        UserWarning: It moves a part of the model.
    """
    example = "torch.optim.Adam(model.parameters(), lr=1e-3)"
    check_part("optimizer", optimizer, ("param_groups", "step", "zero_grad", "state_dict", "load_state_dict"), example)
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    trainable = {name: id(leaf) for name, leaf in learner.model.named_parameters() if leaf.requires_grad}
    left = [name for name, leaf in trainable.items() if leaf not in held]
    if left and len(left) < len(trainable) and learner.ranks.first:
        warn(
            f"the optimizer, a {type(optimizer).__name__}, has {len(trainable) - len(left)} of the model's "
            f"{len(trainable)} trainable parameters; the others, such as {left[0]}, get a meta-gradient that nothing "
            "follows. Give it all of them, or, where they should neither be learned nor adapted, requires_grad_(False)",
            UserWarning,
        )
    if len(left) == len(trainable):
        raise SettingsError(
            f"the optimizer, a {type(optimizer).__name__} of {len(held)} parameters, holds none of the trainable "
            f"parameters of learner.model; make it of those, once the model is built and placed: {example}"
        )


def check_scheduler(scheduler: LRScheduler | None, optimizer: torch.optim.Optimizer) -> None:
    """Raise a SettingsError for what is no scheduler, is of another optimizer, or waits for what it is not told."""
    example = "torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)"
    if scheduler is None:
        return
    check_part("scheduler", scheduler, ("step", "state_dict", "load_state_dict"), example)
    if isinstance(scheduler, ReduceLROnPlateau):
        raise SettingsError(
            "ReduceLROnPlateau steps by a validation score, and fit steps a scheduler after every meta-step, whether "
            f"there is a score or not; take one that counts steps, such as {example} or StepLR"
        )
    steered = getattr(scheduler, "optimizer", optimizer)
    if steered is not optimizer:
        raise SettingsError(
            f"the scheduler, a {type(scheduler).__name__}, was made for another optimizer than the one that fit was "
            f"given, whose lr would stay as it is; make it of that one, a {type(optimizer).__name__}: {example}"
        )
