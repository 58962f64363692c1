"""Files that are whole or not there: written beside their place, then moved into it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch

from metanudge.errors import SettingsError


@contextmanager
def _replaced(path: Path) -> Iterator[BinaryIO]:
    """A file to write that takes the place of the one at ``path`` when it is whole and on the disk."""
    unfinished = path.with_name(f".{path.name}.part")
    with unfinished.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)


def write(path: Path, content: bytes) -> None:
    """Replace the file at ``path``; whoever reads it, or the machine stops, meets the old one or the new one."""
    with _replaced(path) as file:
        file.write(content)


def save_state(path: Path, state: Mapping[str, Any]) -> None:
    """Write tensors and plain containers."""
    with _replaced(path) as file:
        torch.save(dict(state), file)


def load_state(path: Path) -> dict[str, Any]:
    """Read what ``save_state`` wrote; nothing but tensors and plain containers is ever made from it.

    Raises:
        SettingsError: Not such a file.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        said = str(error).splitlines() or [type(error).__name__]  # of an empty file there is nothing to say
        raise SettingsError(
            f"{path} is no checkpoint that can be read ({said[0]}); remove it, or begin anew elsewhere"
        ) from error
    if not isinstance(state, dict):
        raise SettingsError(f"{path} is no checkpoint: it holds {type(state).__name__}")
    return state
