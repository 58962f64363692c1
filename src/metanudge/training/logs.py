"""What a training leaves on disk to look at: tables as CSV and JSON, and TensorBoard's files."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self, TextIO

from metanudge.errors import SettingsError
from metanudge.files import write
from metanudge.types import Evaluation, MetaStep

TABLE, BOARD, OURS = "log.csv", "tensorboard", ".metanudge"
LOGS = (TABLE, "log.jsonl")
"""Of a training's folder: its tables, the folder of TensorBoard's files, and how the names of those end."""


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

    @classmethod
    def of(
        cls,
        number: int,
        step: MetaStep | None,
        evaluations: int,
        lr: float,
        seconds: float,
        found: Evaluation | None,
    ) -> Record:
        """Of a meta-step; None for one without a finite task, whose numbers are NaN."""
        checked = (math.nan, math.nan) if found is None else (found.mean, found.ci95)
        if step is None:
            return cls(number, *(math.nan,) * 4, 0, math.nan, 0, evaluations, lr, seconds, *checked)
        losses = step.query_loss, step.support_loss, step.residual, step.error_bound
        rest = step.amplified_tasks, step.gradient_norm, step.dropped_tasks
        return cls(number, *losses, *rest, evaluations, lr, seconds, *checked)


class Logs:
    """``log.csv``, ``log.jsonl`` (an object a line) and with ``tensorboard`` its event files, in one folder.

    Rows after a resumed step are forgotten.

    Args:
        folder: None for no logs.
        history: Rows of the steps already taken.
        tensorboard: Whether to write event files.

    Raises:
        SettingsError: TensorBoard is asked for and not installed, or there is no folder.
    """

    def __init__(self, folder: Path | None, history: Sequence[Record], tensorboard: bool) -> None:
        self._files: list[tuple[TextIO, Callable[[Record], str]]] = []
        self._board: Any = None
        check_tensorboard(folder, tensorboard)
        if folder is None:
            return
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder / BOARD), purge_step=len(history) + 1, filename_suffix=OURS)
        for name, head, form in zip(LOGS, (_row(Record._fields), ""), (_row, _line), strict=True):
            write(folder / name, (head + "".join(map(form, history))).encode())
            self._files.append(((folder / name).open("a", newline=""), form))

    def add(self, record: Record) -> None:
        """Write one row."""
        for file, form in self._files:
            file.write(form(record))
            file.flush()
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
        for file, _ in self._files:
            file.close()
        if self._board is not None:
            self._board.close()


def check_tensorboard(folder: Path | None, asked: bool) -> None:
    """Raise a SettingsError where TensorBoard is asked for and cannot be had."""
    if not asked:
        return
    if folder is None:
        raise SettingsError("tensorboard=True needs a folder to write into; give out=")
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError as error:
        raise SettingsError(
            "tensorboard is not installed; pip install -c constraints.txt '.[tensorboard]', or leave it out"
        ) from error


def _row(values: Iterable[Any]) -> str:
    """A line of a CSV file."""
    text = io.StringIO()
    csv.writer(text).writerow(values)
    return text.getvalue()


def _line(record: Record) -> str:
    """A line of JSON, which knows no NaN: null."""
    return (
        json.dumps({name: value if math.isfinite(value) else None for name, value in record._asdict().items()}) + "\n"
    )
