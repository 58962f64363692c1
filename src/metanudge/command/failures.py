"""Errors in the user's own file, told on the command line by file and line."""

from __future__ import annotations

import linecache
import sysconfig
import traceback
from collections.abc import Iterator
from pathlib import Path

import metanudge
from metanudge.errors import MetanudgeError

_OURS = Path(str(metanudge.__file__)).resolve().parent
_INSTALLED = [Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
_NOT_THEIRS = tuple({f"{place.resolve()}/" for place in (_OURS, *_INSTALLED)})


def told(error: Exception) -> str | None:
    """The error and the lines of the user's own files it came by; None where it is a mistake of this library.

    It is one where it came by no file of the user's, and where it arose in this library's own code, whoever called it;
    but not where a note says what a loss was given. An error that the library raised on purpose says all by itself: its
    message alone is told, with those lines.
    """
    places = list(dict.fromkeys(place for one in _chain(error) for place in _places(one)))
    ours = isinstance(error, MetanudgeError | OSError)
    notes = getattr(error, "__notes__", [])
    if not (ours or notes) and (not places or _arose_here(error)):
        return None
    said = str(error) if ours else f"{type(error).__name__}: {error}"
    return "\n".join([said, *notes, *(f"  {place}" for place in places)])


def _arose_here(error: BaseException) -> bool:
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and _OURS in Path(frames[-1].filename).resolve().parents


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error, and what it was made of, the first cause first."""
    if error.__cause__ is not None:
        yield from _chain(error.__cause__)
    yield error


def _places(error: BaseException) -> Iterator[str]:
    if isinstance(error, SyntaxError) and error.filename:
        yield _place(error.filename, error.lineno or 1, "")
    for frame in traceback.extract_tb(error.__traceback__):
        if Path(frame.filename).is_file() and not str(Path(frame.filename).resolve()).startswith(_NOT_THEIRS):
            yield _place(frame.filename, frame.lineno or 1, frame.name)


def _place(file: str, line: int, function: str) -> str:
    where = f", in {function}" if function and function != "<module>" else ""
    return f"{file}:{line}{where}: {linecache.getline(file, line).strip()}"
