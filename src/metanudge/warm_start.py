"""The last inner solution of every task of a finite set."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metanudge.errors import SettingsError


class WarmStart:
    """Keeps each task's last solution, so that a few steps per meta-step track it.

    Where tasks come again, the inner problem of a task changes little from one visit to the next: its last solution is
    a far better start than θ (which is taken where its energy is lower, and for tasks never seen). For estimators that
    rest on the solution (FO-B-MAML, iMAML, Tangent) and for FOMAML and Reptile; MAML and HF-MAML differentiate the way
    from θ and are refused. ``adapt`` and ``evaluate`` always begin at θ: give them a learner with more steps.

    Solutions are kept on the CPU, the least recently used one is forgotten when the limit is reached. A checkpoint is
    ``state_dict()``, or with ``folder`` the folder itself, up to date when ``state_dict()`` or ``save()`` was called.

    Args:
        limit_bytes: Most bytes of solutions to keep.
        folder: Keep them there, memory-mapped, instead of in memory; what it already holds is taken up.

    Raises:
        SettingsError: A limit below one solution; a folder that holds solutions of another model.

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
        if isinstance(limit_bytes, bool) or not isinstance(limit_bytes, int) or limit_bytes < 1:
            raise SettingsError(f"limit_bytes must be a whole number of at least 1, got {limit_bytes!r}")
        self.limit_bytes = limit_bytes
        self.folder = None if folder is None else Path(folder)
        self._slots: OrderedDict[int, int] = OrderedDict()  # task index to row, the least recently used first
        self._rows: Tensor | None = None
        if self.folder is not None and (self.folder / "index.json").is_file():
            self._open()

    def __len__(self) -> int:
        """Return the number of tasks kept."""
        return len(self._slots)

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
        return found

    def put(self, indices: Sequence[int], solutions: Tensor) -> None:
        """Keep ``solutions`` ``[T, P]``; those that are not finite are forgotten."""
        if self._rows is None:
            self._make(solutions)
        self._fit(solutions)
        assert self._rows is not None
        finite = solutions.isfinite().all(1).tolist()
        for index, row, good in zip(indices, solutions.detach().to(self._rows), finite, strict=True):
            slot = self._slots.pop(index, None)
            if not good:
                continue  # its row is free again
            self._slots[index] = self._free() if slot is None else slot
            self._rows[self._slots[index]] = row

    def _free(self) -> int:
        """A row nobody uses, or that of the task not seen for longest."""
        assert self._rows is not None
        used = set(self._slots.values())
        if len(used) < len(self._rows):
            candidate = len(self._slots)
            return candidate if candidate not in used else min(set(range(len(self._rows))) - used)
        return self._slots.popitem(last=False)[1]

    def _make(self, like: Tensor) -> None:
        width, size = like.shape[1], like.element_size()
        number = self.limit_bytes // (width * size)
        if number < 1:
            raise SettingsError(
                f"limit_bytes = {self.limit_bytes} does not hold one solution of {width * size} bytes; raise it"
            )
        if self.folder is None:
            self._rows = torch.empty(number, width, dtype=like.dtype)  # pages are taken as they are written
        else:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._rows = self._mapped(number, width, like.dtype, "w+")
            self.save()

    def _mapped(self, number: int, width: int, dtype: torch.dtype, mode: Any) -> Tensor:
        assert self.folder is not None
        kind = str(dtype).removeprefix("torch.")
        if dtype not in (torch.float32, torch.float64, torch.float16):
            raise SettingsError(f"solutions of dtype {kind} can not be memory-mapped; keep them in memory")
        array = np.memmap(self.folder / "solutions.bin", dtype=kind, mode=mode, shape=(number, width))
        return torch.from_numpy(array)

    def _fit(self, rows: Tensor) -> None:
        assert self._rows is not None
        if rows.shape[1] != self._rows.shape[1] or rows.dtype != self._rows.dtype:
            raise SettingsError(
                f"the solutions kept have {self._rows.shape[1]} numbers of {self._rows.dtype}, those of this learner "
                f"{rows.shape[1]} of {rows.dtype}: they are of another model; begin with a new WarmStart or folder"
            )

    def save(self) -> None:
        """Bring the folder up to date."""
        if self.folder is None or self._rows is None:
            return
        record = {
            "tasks": list(self._slots.items()),
            "shape": list(self._rows.shape),
            "dtype": str(self._rows.dtype).removeprefix("torch."),
        }
        unfinished = self.folder / ".index.json.part"
        unfinished.write_text(json.dumps(record))
        unfinished.replace(self.folder / "index.json")

    def _open(self) -> None:
        assert self.folder is not None
        try:
            record = json.loads((self.folder / "index.json").read_text())
            number, width = record["shape"]
            self._rows = self._mapped(number, width, getattr(torch, record["dtype"]), "r+")
            self._slots = OrderedDict((int(index), int(slot)) for index, slot in record["tasks"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise SettingsError(f"{self.folder} holds no readable solutions ({error}); give an empty folder") from error

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on: task indices, and their solutions unless they lie in the folder."""
        self.save()
        indices = list(self._slots)
        rows = None
        if self.folder is None and self._rows is not None:
            rows = self._rows[[self._slots[index] for index in indices]].clone()
        return {"indices": indices, "solutions": rows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state_dict()``; with a folder, from what the folder holds."""
        if self.folder is not None:
            return
        self._slots.clear()
        self._rows = None
        if state["solutions"] is not None and len(state["indices"]):
            self.put(state["indices"], state["solutions"])
