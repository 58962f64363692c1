"""The last inner solution of every task of a finite set."""

from __future__ import annotations

import json
import uuid
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from metanudge.errors import SettingsError
from metanudge.files import write
from metanudge.settings import check_steps

MAPPED = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float16, torch.float32, torch.float64)}
"""What a folder can hold."""

Mode = Literal["r+", "w+"]


class Save(NamedTuple):
    """A state of a folder: a name nobody else has, and rows by task, least recently used first."""

    name: str
    slots: OrderedDict[int, int]


class Index(NamedTuple):
    """What ``index.json`` tells: the last two saves, and the rows, their width and dtype in ``solutions.bin``."""

    saves: list[Save]
    number: int
    width: int
    dtype: torch.dtype


class WarmStart:
    """Keeps each task's last solution, so that a few steps per meta-step track it.

    Where tasks come again, the inner problem of a task changes little from one visit to the next: its last solution is
    a far better start than θ (which is taken where its energy is lower, and for tasks never seen). For estimators that
    rest on the solution (FO-B-MAML, iMAML, Tangent) and for FOMAML and Reptile; MAML and HF-MAML differentiate the way
    from θ and are refused. ``adapt`` and ``evaluate`` always begin at θ: give them a learner with more steps.

    Solutions are kept on the CPU, the least recently used one is forgotten when the limit is reached. A checkpoint is
    ``state_dict()``. With ``folder`` it brings the folder up to date and holds the name of that state alone; the folder
    keeps the last two states whole, whatever is put after them, so a process may be killed at any time, also between
    bringing the folder up to date and writing the checkpoint. Without ``load_state_dict`` a folder goes on from the
    last state. A checkpoint made without a folder can go on in one.

    Args:
        limit_bytes: Most bytes of solutions to keep; those least recently used go first, also where a folder is
            reopened with a smaller limit. The file of a folder takes up to three times that, and never shrinks.
        folder: Keep them there, memory-mapped, instead of in memory; what it already holds is taken up.

    Raises:
        SettingsError: A limit below one solution; a folder that holds solutions of another model, or whose files are
            damaged; a checkpoint of another folder, or of an older state than the last two.

    Cost: two forward passes a task, and one copy of the adapted parameters a task kept.

    Example:
        >>> import torch, metanudge as mn
        >>> learner = mn.MetaLearner(
        ...     torch.nn.Linear(1, 1), mn.metrics.squared_error, solver=mn.Nesterov(steps=2), warm_start=mn.WarmStart()
        ... )
        >>> for _ in range(3):
        ...     step = learner.backward(mn.tasks.sinusoid(4), indices=[0, 1, 2, 3])
        >>> len(learner.warm_start)
        4
    """

    def __init__(self, limit_bytes: int = 2**30, folder: str | Path | None = None) -> None:
        check_steps(limit_bytes, "limit_bytes")
        self.limit_bytes = limit_bytes
        self.folder = None if folder is None else Path(folder)
        self._slots: OrderedDict[int, int] = OrderedDict()  # task index to row, the least recently used first
        self._rows: Tensor | None = None
        self._begun = 0  # rows from here on were never used
        self._spare: list[int] = []  # rows before that nobody uses
        self._saves: list[Save] = []  # what the folder was brought up to date with, the last two times
        self._save: Save | None = None  # the one that this goes on from
        self._held: frozenset[int] = frozenset()  # their rows, which are not written to
        self._changed = False  # since the last save
        if self.folder is not None and (self.folder / "index.json").is_file():
            self._open(self.folder, _read(self.folder))

    def __len__(self) -> int:
        """Return the number of tasks kept."""
        return len(self._slots)

    def __bool__(self) -> bool:
        """Return True, also where nothing is kept yet: ``if learner.warm_start`` asks whether there is one."""
        return True

    def __repr__(self) -> str:
        """How much is kept."""
        return f"WarmStart({len(self)} tasks)"

    def __contains__(self, index: int) -> bool:
        """Whether a solution of this task is kept."""
        return index in self._slots

    def get(self, indices: Sequence[int], default: Tensor) -> Tensor:
        """The solutions of ``indices``, or rows of ``default`` ``[T, P]``."""
        found = default.clone()
        if self._rows is not None:
            self._fit(default)
            for row, index in enumerate(indices):
                if index in self._slots:
                    found[row] = self._rows[self._slots[index]].to(found)
                    self._slots.move_to_end(index)
                    self._changed = True
        return found

    def put(self, indices: Sequence[int], solutions: Tensor) -> None:
        """Keep ``solutions`` ``[T, P]``; those that are not finite are forgotten.

        Raises:
            SettingsError: They do not fit; nothing is changed then.
        """
        if self._rows is not None:
            self._fit(solutions)
        most, rows = self._most(solutions), self._room(solutions)
        self._changed = True
        finite = solutions.isfinite().all(1).tolist()
        for index, row, good in zip(indices, solutions.detach().to(rows), finite, strict=True):
            slot = self._slots.pop(index, None)
            if slot is not None and (not good or slot in self._held):
                self._release(slot)
                slot = None
            if good:
                self._slots[index] = self._take(most) if slot is None else slot
                rows[self._slots[index]] = row

    def _take(self, most: int) -> int:
        """A row nobody uses; where the limit is reached, the task not seen for longest gives up its own."""
        if len(self._slots) >= most:
            self._release(self._slots.popitem(last=False)[1])
        if self._spare:
            return self._spare.pop()
        self._begun += 1
        return self._begun - 1

    def _release(self, row: int) -> None:
        if row not in self._held:
            self._spare.append(row)

    def _most(self, like: Tensor) -> int:
        """How many solutions the limit allows."""
        size = like.shape[1] * like.element_size()
        if size > self.limit_bytes:
            raise SettingsError(
                f"limit_bytes = {self.limit_bytes} does not hold one solution of {size} bytes; raise it"
            )
        return self.limit_bytes // size

    def _room(self, like: Tensor) -> Tensor:
        """All rows, with room for those of ``like``."""
        if self.folder is None:
            if self._rows is None:  # pages are taken as they are written
                self._rows = torch.empty(self._most(like), like.shape[1], dtype=like.dtype, device="cpu")
            return self._rows
        number = 0 if self._rows is None else len(self._rows)
        needed = self._begun + max(0, len(like) - len(self._spare))
        if self._rows is None or needed > number:  # doubling makes it one copy a row
            number = max(needed, min(2 * number, 3 * self._most(like)))
            mode: Mode = "w+" if self._rows is None else "r+"
            self._rows = self._mapped(self.folder, mode, number, like.shape[1], like.dtype)
        return self._rows

    def _mapped(self, folder: Path, mode: Mode, number: int, width: int, dtype: torch.dtype) -> Tensor:
        """The file, extended where it is shorter."""
        kind = str(dtype).removeprefix("torch.")
        if kind not in MAPPED:
            raise SettingsError(f"solutions of dtype {kind} cannot be memory-mapped; keep them in memory")
        folder.mkdir(parents=True, exist_ok=True)
        self._file = np.memmap(folder / "solutions.bin", dtype=kind, mode=mode, shape=(number, width))
        return torch.from_numpy(self._file)

    def _fit(self, rows: Tensor) -> None:
        assert self._rows is not None
        if rows.shape[1] != self._rows.shape[1] or rows.dtype != self._rows.dtype:
            raise SettingsError(
                f"the solutions kept have {self._rows.shape[1]} numbers of {self._rows.dtype}, those of this learner "
                f"{rows.shape[1]} of {rows.dtype}: they are of another model; begin with a new WarmStart or folder"
            )

    def save(self) -> None:
        """Bring the folder up to date."""
        if self.folder is None or self._rows is None or not self._changed:
            return
        new = Save(uuid.uuid4().hex, self._slots.copy())
        saves = [new] if self._save is None else [self._save, new]
        record = {
            "saves": [{"name": save.name, "tasks": list(save.slots.items())} for save in saves],
            "shape": list(self._rows.shape),
            "dtype": str(self._rows.dtype).removeprefix("torch."),
        }
        self._file.flush()
        write(self.folder / "index.json", json.dumps(record).encode())
        self._saves, self._save, self._changed = saves, new, False
        self._hold()

    def _hold(self) -> None:
        """Find out anew which rows are spare."""
        self._held = frozenset(row for save in self._saves for row in save.slots.values())
        self._spare = list(set(range(self._begun)) - self._held - set(self._slots.values()))

    def _open(self, folder: Path, index: Index) -> None:
        self._saves = index.saves
        self._begun = 1 + max((row for save in index.saves for row in save.slots.values()), default=-1)
        self._rows = self._mapped(folder, "r+", index.number, index.width, index.dtype)
        self._return_to(index.saves[-1])

    def _return_to(self, save: Save) -> None:
        """Go on from ``save``, as far as the limit allows."""
        assert self._rows is not None
        most = self._most(self._rows)
        self._save, self._slots = save, OrderedDict(list(save.slots.items())[-most:])
        self._changed = len(self._slots) < len(save.slots)
        self._hold()

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on: the solutions kept, or with a folder the name of its state."""
        self.save()
        if self.folder is not None:
            return {"save": None if self._save is None else self._save.name, "indices": [], "solutions": None}
        indices = list(self._slots)
        rows = None if self._rows is None else self._rows[[self._slots[index] for index in indices]].clone()
        return {"save": None, "indices": indices, "solutions": rows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state_dict()``.

        Raises:
            SettingsError: The folder does not hold what was saved; nothing is changed then.
        """
        solutions = state["solutions"]
        if state["save"] is not None:
            found = [save for save in self._saves if save.name == state["save"]]
            if not found:
                where = (
                    "this WarmStart has none" if self.folder is None else f"{self.folder} does not hold it (any more)"
                )
                raise SettingsError(
                    f"the checkpoint's solutions are state {state['save']} of a folder, and {where}; give the folder "
                    "it was made with, which keeps the last two states, or begin again"
                )
            self._return_to(found[0])
            return
        if solutions is not None:
            self._most(solutions)
            if self.folder is not None and self._rows is not None:
                self._fit(solutions)
        self._slots.clear()
        self._changed = True
        if self.folder is None:
            self._rows, self._begun = None, 0
        self._hold()
        if solutions is not None:
            self.put(state["indices"], solutions)


def _read(folder: Path) -> Index:
    """What a folder holds, and whether it does."""
    try:
        record = json.loads((folder / "index.json").read_text())
        saves = [
            Save(str(save["name"]), OrderedDict((int(index), int(row)) for index, row in save["tasks"]))
            for save in record["saves"]
        ]
        number, width = record["shape"]
        found = Index(saves, int(number), int(width), MAPPED[record["dtype"]])
        size = (folder / "solutions.bin").stat().st_size
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SettingsError(f"{folder} holds no readable solutions ({error}); give an empty folder") from error
    expected = found.number * found.width * found.dtype.itemsize
    if size < expected:
        raise SettingsError(
            f"{folder} is damaged: solutions.bin has {size} bytes, of {expected} that index.json tells of; put the "
            "whole file back, or give an empty folder"
        )
    rows = [list(save.slots.values()) for save in saves]
    if not saves or any(len(set(of)) < len(of) or not all(0 <= row < found.number for row in of) for of in rows):
        raise SettingsError(f"{folder} is damaged: index.json tells of rows that there are not; give an empty folder")
    return found
