"""What of a training was best on the validation tasks: kept, waited for, and gone back to."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from metanudge.errors import NonFiniteError
from metanudge.pretrained import SETTINGS, WEIGHTS, load_weights, save_pretrained
from metanudge.training.checkpoint import BEST, Run, waited
from metanudge.training.identity import told_apart
from metanudge.training.validation import improves
from metanudge.types import Evaluation
from metanudge.warned import warn


@dataclass
class Best:
    """Looks at every validation of a training.

    Attributes:
        run: The training; it knows the best mean and its step.
        sign: 1 where smaller is better, -1 where larger is.
        folder: Where the training is kept, the best in a folder of it; None to keep nothing on disk.
        writes: Whether this process is the one to write there.
        patience: Meta-steps without a better validation after which to end; None for never.
        restores: Whether the model is to end with the best.
    """

    run: Run
    sign: float
    folder: Path | None
    writes: bool
    patience: int | None
    restores: bool
    _held: dict[str, Any] = field(default_factory=dict)

    def go_on(self) -> None:
        """Where the folder does not hold the best that the checkpoint tells of, the next validation is the first.

        Someone has removed it, which is told. Or a stop came between the two: it holds what was better at a step that
        is taken again.
        """
        run = self.run
        if self.folder is None or run.best_step == 0 or (held := self._step_on_disk()) == run.best_step:
            return
        if held is None or held <= len(run.history):
            warn(
                f"{self.folder / BEST} does not hold the weights of step {run.best_step}, which the checkpoint beside "
                "it tells of as the best so far: they are lost, and the next validation counts as the first",
                UserWarning,
            )
        run.best, run.best_step, run.kept = math.nan, 0, ""

    def look(self, found: Evaluation, number: int) -> None:
        """At the validation after meta-step ``number``; what is better is kept."""
        run, model = self.run, self.run.learner.model
        if not improves(found.mean, run.best, self.sign) and run.best_step > 0:
            return
        run.best, run.best_step = found.mean, number
        if self.folder is not None:
            run.kept = told_apart(model.state_dict())
            if self.writes:
                save_pretrained(run.learner, self.folder / BEST, {"step": number, "validation": found.mean})
        elif self.restores:
            self._held = copy.deepcopy(model.state_dict())

    @property
    def waited(self) -> bool:
        """Whether there was no better validation for as long as anyone has patience."""
        return waited(len(self.run.history), self.run.best_step, self.patience)

    def restore(self) -> None:
        """Put the best weights, buffers included, into the model, if it is to end with them and there are any."""
        if not self.restores or math.isnan(self.run.best):
            return
        if self.folder is None:
            self.run.learner.model.load_state_dict(self._held)
        else:
            load_weights(self.run.learner.model, self.folder / BEST)

    @contextmanager
    def rescued(self) -> Iterator[None]:
        """A block after which the best is restored, if it is to be, where the training in it diverges."""
        try:
            yield
        except NonFiniteError:
            self.restore()
            raise

    def _step_on_disk(self) -> int | None:
        """That of the weights in the folder; None where there are none."""
        assert self.folder is not None
        best = self.folder / BEST
        try:
            step = json.loads((best / SETTINGS).read_text())["protocol"]["step"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return int(step) if (best / WEIGHTS).is_file() else None
