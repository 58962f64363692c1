"""What a training is at a moment, written down and taken up again."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch.optim.lr_scheduler import LRScheduler

from metanudge.errors import SettingsError
from metanudge.files import load_state, save_state
from metanudge.learner import MetaLearner
from metanudge.logs import Record

LAST = "last.pt"
NUMBERS = ("best", "best_step", "evaluations", "skipped", "in_a_row", "seconds")


class Run:
    """A training: its parts and how far it is.

    Attributes:
        protocol: Settings that a checkpoint must share with the training that goes on from it.
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
    ) -> None:
        self.learner, self.optimizer, self.scheduler, self.protocol = learner, optimizer, scheduler, protocol
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
