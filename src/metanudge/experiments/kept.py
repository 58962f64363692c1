"""Outcomes of finished jobs, kept until the report is written: a run that was stopped goes on from them."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import numpy as np
import torch
from torch import Tensor

import metanudge
from metanudge.errors import SettingsError
from metanudge.files import load_state, save_state

UNFINISHED = ".unfinished"
"""The folder's name, inside the one the report is written into."""

Job = TypeVar("Job")
Outcome = TypeVar("Outcome")


@dataclass
class Kept:
    """A folder with a file an outcome, each named by all that decides the outcome.

    A job's function is annotated to return a NamedTuple of numbers, strings, tensors, and plain lists, tuples and
    dictionaries of them: its fields are what is written, so that reading a file never runs code from it.

    Outcomes lie in a folder within it, named by the first digits of the source.

    Attributes:
        folder: Made with the first outcome.
        source: ``source_digest()`` of the code that runs.
        tell: Told in a line how many of the jobs were finished already.
        taken: How many outcomes were found in the folder, in all.
        used: The files that were found or written.
    """

    folder: Path
    source: str
    tell: Callable[[str], object]
    taken: int = 0
    used: set[Path] = field(default_factory=set)

    def find(self, function: Callable[[Job], Outcome], jobs: Sequence[Job], called: str) -> dict[int, Outcome]:
        """The outcomes that are there, by the place of their job; a file that cannot be read is as none."""
        kind = outcome_class(function)
        found = {}
        for place, job in enumerate(jobs):
            path = self._path(function, job)
            try:
                state = load_state(path)
            except SettingsError:
                continue
            if tuple(state) == kind._fields:
                found[place] = kind(**state)
                self.used.add(path)
        if found:
            self.tell(f"going on: {len(found)} of {len(jobs)} {called} were finished")
        self.taken += len(found)
        return found

    def keep(self, function: Callable[[Job], Outcome], job: Job, outcome: Any) -> None:
        """Write what the job found.

        Raises:
            TypeError: It holds what could not be read again.
        """
        fields = outcome._asdict()
        if strange := [name for name, value in fields.items() if not _plain(value)]:
            raise TypeError(
                f"{', '.join(strange)} of what {function.__qualname__} found cannot be kept: only numbers, strings, "
                "tensors, and plain lists, tuples and dictionaries of them can"
            )
        if source_digest() != self.source:
            return  # someone edits the package: a process begun later has run other code than the name would say
        path = self._path(function, job)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_state(path, fields)
        self.used.add(path)

    def remove(self) -> None:
        """Forget what was found and kept, and all of other sources; what other studies kept that were stopped stays."""
        for path in self.used:
            path.unlink(missing_ok=True)
            path.with_name(f".{path.name}.part").unlink(missing_ok=True)  # of a run that was killed while it wrote
        for path in self.folder.glob("*"):
            if path.is_dir() and path != self._own:
                shutil.rmtree(path, ignore_errors=True)
        for folder in (self._own, self.folder):
            with suppress(OSError):  # something is in it, or it was never made
                folder.rmdir()

    @property
    def _own(self) -> Path:
        return self.folder / self.source[:12]

    def _path(self, function: Callable[[Job], Outcome], job: Job) -> Path:
        told = repr(job)
        if " at 0x" in told:  # an address: says nothing of the object, and another may come to lie there
            raise TypeError(f"a job that is kept must be told whole by its repr, got {told}")
        name = (function.__module__, function.__qualname__, told, self.source, torch.__version__, np.__version__)
        return self._own / f"{hashlib.sha256(repr(name).encode()).hexdigest()}.pt"


KEPT: ContextVar[Kept | None] = ContextVar("KEPT", default=None)
"""Where jobs look for outcomes; None where nothing is kept. Studies pass it by, for they need not know."""


@contextmanager
def keeping(kept: Kept) -> Iterator[None]:
    """Jobs that are run inside are kept."""
    token = KEPT.set(kept)
    try:
        yield
    finally:
        KEPT.reset(token)


def source_digest() -> str:
    """Of every source file of the package, in hexadecimal: the same for the same code wherever it lies."""
    package = Path(str(metanudge.__file__)).parent
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(package).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def outcome_class(function: Callable[[Job], Outcome]) -> Any:
    """The NamedTuple that the function is annotated to return.

    Raises:
        TypeError: It is another type, which cannot be kept.
    """
    kind = get_type_hints(function).get("return", None)
    if not (isinstance(kind, type) and issubclass(kind, tuple) and hasattr(kind, "_fields")):
        raise TypeError(
            f"{function.__qualname__} must be annotated to return a NamedTuple, for its outcomes to be kept"
        )
    return kind


def _plain(value: Any) -> bool:
    """Whether ``load_state`` reads it back."""
    if type(value) is dict:
        return all(_plain(part) for pair in value.items() for part in pair)
    if type(value) in (list, tuple):
        return all(_plain(part) for part in value)
    return value is None or type(value) in (bool, int, float, str, Tensor)
