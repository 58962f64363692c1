"""What of a training was best on the validation tasks: kept, waited for, and gone back to."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from metanudge.checkpoint import BEST, Run, told_apart, waited
from metanudge.pretrained import load_weights, save_pretrained
from metanudge.types import Evaluation
from metanudge.validation import improves


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
    _held: dict[str, Tensor] = field(default_factory=dict)

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
            self._held = {name: value.clone() for name, value in model.state_dict().items()}

    @property
    def waited(self) -> bool:
        """Whether there was no better validation for as long as anyone has patience."""
        return waited(len(self.run.history), self.run.best_step, self.patience)

    def restore(self) -> None:
        """Put the best weights into the model, if it is to end with them; those of buffers too."""
        if not self.restores or self.run.best_step == 0:
            return
        if self.folder is None:
            self.run.learner.model.load_state_dict(self._held)
        else:
            load_weights(self.run.learner.model, self.folder / BEST)
