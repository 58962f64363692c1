"""What a training is at a moment, written down and taken up again."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler

from metanudge.errors import SettingsError
from metanudge.files import load_state, save_state
from metanudge.learner import MetaLearner
from metanudge.training.identity import (
    check_settings,
    code_of,
    qualified_name,
    settings_of,
    settings_of_scheduler,
    tell_replaced,
    tell_rewritten,
    tell_rounded,
    told_apart,
)
from metanudge.training.logs import Record
from metanudge.types import Role

LAST, BEST = "last.pt", "best"
NUMBERS = ("best", "best_step", "evaluations", "skipped", "in_a_row", "seconds")


class Run:
    """A training: its parts and how far it is.

    Attributes:
        protocol: Settings that a checkpoint must share with the training that goes on from it.
        settings: Of learner, optimizer and ``fit``, likewise; of functions their names.
        code: Of the losses, in words: a digest of their source.
        begun: What the model was when the training began, as ``told_apart`` tells it; "" where nothing is kept.
        kept: The same of the model at its best.
        history: A record a meta-step.
        best: Best mean of the metric; NaN before the first validation.
        best_step: Meta-step it was taken at.
        evaluations: Gradient evaluations in all.
        skipped: Meta-steps without one finite task.
        in_a_row: Of those, the last ones without another between.
        seconds: Time spent.
    """

    def __init__(
        self,
        learner: MetaLearner,
        optimizer: torch.optim.Optimizer,
        scheduler: LRScheduler | None,
        protocol: dict[str, int],
        more: dict[str, Any],
    ) -> None:
        self.learner, self.optimizer, self.scheduler, self.protocol = learner, optimizer, scheduler, protocol
        self.settings = settings_of(learner, optimizer) | settings_of_scheduler(scheduler) | more
        support, query = (learner.losses[role] for role in Role)
        losses = {"loss": support} | ({} if query is support else {"query loss": query})
        self.code = {f"the {kind}, {qualified_name(loss)},": code_of(loss) for kind, loss in losses.items()}
        self.begun = self.kept = ""
        self.history: list[Record] = []
        self.best, self.best_step = math.nan, 0
        self.evaluations = self.skipped = self.in_a_row = 0
        self.seconds = 0.0

    def save(self, path: Path) -> None:
        """Write everything."""
        warm, scheduler = self.learner.warm_start, self.scheduler
        save_state(
            path,
            {
                "protocol": self.protocol,
                "settings": self.settings,
                "code": self.code,
                "begun": self.begun,
                "kept": self.kept,
                "model": self.learner.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scheduler": None if scheduler is None else scheduler.state_dict(),
                "warm_start": None if warm is None else warm.state_dict(),
                "random": torch.get_rng_state(),
                "random_cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
                "history": [tuple(record) for record in self.history],
                "numbers": {name: getattr(self, name) for name in NUMBERS},
            },
        )

    def load(self, path: Path, steps: int) -> None:
        """Go back to what was written, to take ``steps`` in all; nothing is changed where it does not fit."""
        state = load_state(path)
        parts = {"scheduler": self.scheduler, "warm_start": self.learner.warm_start}
        try:
            if state["protocol"] != self.protocol:
                odd = [name for name, value in self.protocol.items() if state["protocol"].get(name) != value]
                before, now = ({name: one.get(name) for name in odd} for one in (state["protocol"], self.protocol))
                raise SettingsError(
                    f"{path} is of a training with {before}, this one has {now}; give the same, another folder, or "
                    "resume=False"
                )
            settings = state.get("settings", {})  # of older versions there are none, or not all
            settings = settings and {"sharpness_radius": 0.0} | settings
            check_settings(path, settings, self.settings)
            check_done(path, len(state["history"]), steps, "resume=False")
            for name, part in parts.items():
                if (state[name] is None) != (part is None):
                    there = "without" if state[name] is None else "with"
                    raise SettingsError(f"{path} is of a training {there} a {name}; give the same, or another folder")
            own = self.learner.model.state_dict()
            if {name: value.shape for name, value in own.items()} != {
                name: value.shape for name, value in state["model"].items()
            }:
                raise SettingsError(f"{path} is of a training of another model; give another folder, or resume=False")
            tell_rounded(path, settings, self.settings)
            tell_rewritten(path, state.get("code", {}), self.code)
            # what older versions did not write down cannot differ
            begun, kept = state.get("begun", self.begun), state.get("kept", self.begun)
            if self.begun not in (begun, kept, told_apart(state["model"])):
                tell_replaced(path, len(state["history"]))
            self.begun, self.kept = begun, kept
            before = self.optimizer.state_dict()
            self.optimizer.load_state_dict(state["optimizer"])
            try:  # what may refuse comes before what does not
                if self.learner.warm_start is not None:
                    self.learner.warm_start.load_state_dict(state["warm_start"])
            except SettingsError:
                self.optimizer.load_state_dict(before)
                raise
            self.learner.model.load_state_dict(state["model"])
            if self.scheduler is not None:
                self.scheduler.load_state_dict(state["scheduler"])
            self.history = [Record(*values) for values in state["history"]]
            for name in NUMBERS:
                setattr(self, name, state["numbers"][name])
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, SettingsError):
                raise
            raise SettingsError(f"{path} is no checkpoint of this training: {error}") from error
        torch.set_rng_state(state["random"])
        if torch.cuda.is_available() and state["random_cuda"]:
            torch.cuda.set_rng_state_all(state["random_cuda"])


def check_done(path: Path, done: int, steps: int, anew: str) -> None:
    """Raise a SettingsError where a training is further than it is asked to go."""
    if done > steps:
        raise SettingsError(
            f"{path} is of a training that has done {done} steps, more than the {steps} asked for; ask for {done} or "
            f"more, give another folder, or begin anew with {anew}"
        )


def waited(done: int, best_step: int, patience: int | None) -> bool:
    """Whether, after ``done`` meta-steps, the best validation is ``patience`` steps ago; never where that is None."""
    return patience is not None and 0 < best_step <= done - patience


def how_far(path: Path) -> tuple[int, int]:
    """Meta-steps of the checkpoint at ``path``, and the one with the best validation.

    Raises:
        SettingsError: No checkpoint of a training.
    """
    try:
        state = load_state(path)
        return len(state["history"]), int(state["numbers"]["best_step"])
    except (KeyError, TypeError) as error:
        raise SettingsError(f"{path} is no checkpoint of a training: {error!r}") from error
