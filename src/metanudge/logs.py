"""What a training leaves on disk to look at: a table, and TensorBoard's files."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from metanudge.errors import SettingsError
from metanudge.files import write


class Record(NamedTuple):
    """One meta-step.

    Attributes:
        step: Its number, from 1.
        query_loss: As in ``MetaStep``.
        support_loss: As in ``MetaStep``.
        residual: As in ``MetaStep``.
        error_bound: As in ``MetaStep``.
        amplified_tasks: As in ``MetaStep``.
        gradient_norm: Of the meta-gradient, before clipping.
        dropped_tasks: As in ``MetaStep``.
        gradient_evaluations: In all, up to and with this step.
        lr: Of the first parameter group.
        seconds: Since training began, pauses left out.
        validation: Mean of the metric on the validation tasks, NaN where it was not taken.
        validation_ci95: Half-width of its 95 % interval.
    """

    step: int
    query_loss: float
    support_loss: float
    residual: float
    error_bound: float
    amplified_tasks: int
    gradient_norm: float
    dropped_tasks: int
    gradient_evaluations: int
    lr: float
    seconds: float
    validation: float = math.nan
    validation_ci95: float = math.nan


class Logs:
    """``log.csv``, and with ``tensorboard`` its event files, in one folder. Rows after a resumed step are forgotten.

    Args:
        folder: None for no logs.
        history: Rows of the steps already taken.
        tensorboard: Whether to write event files.

    Raises:
        SettingsError: TensorBoard is asked for and not installed, or there is no folder.
    """

    def __init__(self, folder: Path | None, history: Sequence[Record], tensorboard: bool) -> None:
        self._file: io.TextIOWrapper | None = None
        self._board: Any = None
        if folder is None:
            if tensorboard:
                raise SettingsError("tensorboard=True needs a folder to write into; give out=")
            return
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise SettingsError(
                    "tensorboard is not installed; pip install -c constraints.txt '.[tensorboard]', or leave it out"
                ) from error
            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=len(history) + 1)
        text = io.StringIO()
        table = csv.writer(text)
        table.writerow(Record._fields)
        table.writerows(history)
        write(folder / "log.csv", text.getvalue().encode())
        self._file = (folder / "log.csv").open("a", newline="")

    def add(self, record: Record) -> None:
        """Write one row."""
        if self._file is not None:
            csv.writer(self._file).writerow(record)
            self._file.flush()
        if self._board is not None:
            for name, value in record._asdict().items():
                if name != "step" and math.isfinite(value):
                    self._board.add_scalar(name, value, record.step)

    def __enter__(self) -> Self:
        """Nothing to do."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the files."""
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()
