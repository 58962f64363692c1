"""Files that are whole or not there: written beside their place, then moved into it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from metanudge.errors import SettingsError


def write(path: Path, content: bytes) -> None:
    """Replace the file at ``path``; whoever reads it, or the machine stops, meets the old one or the new one."""
    unfinished = path.with_name(f".{path.name}.part")
    with unfinished.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)


def save_state(path: Path, state: Mapping[str, Any]) -> None:
    """Write tensors and plain containers."""
    unfinished = path.with_name(f".{path.name}.part")
    with unfinished.open("wb") as file:
        torch.save(dict(state), file)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)


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
