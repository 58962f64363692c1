"""Beginning a training anew, where another one was."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from metanudge.pretrained import SETTINGS, WEIGHTS
from metanudge.training.checkpoint import BEST, LAST
from metanudge.training.logs import BOARD, LOGS, OURS


def discard(folder: Path) -> None:
    """Remove from ``folder`` the weights that a training left there: else they would pass for those of the next one.

    The checkpoint goes first: a stop in between leaves nothing to go on from. Files that no training writes stay.
    """
    best = folder / BEST
    pretrained = [best / WEIGHTS, best / SETTINGS] if (best / SETTINGS).is_file() else []
    _remove((folder / LAST, *pretrained), best)


def discard_logs(folder: Path) -> None:
    """Remove the tables and TensorBoard's files that a training left in ``folder``."""
    boards = folder.glob(f"{BOARD}/events.out.tfevents.*{OURS}")
    _remove((*(folder / name for name in LOGS), *boards), folder / BOARD)


def _remove(files: Iterable[Path], inside: Path) -> None:
    """The files, and the folder ``inside`` where nothing is left in it."""
    for file in files:
        file.unlink(missing_ok=True)
    if inside.is_dir() and not inside.is_symlink() and not any(inside.iterdir()):
        inside.rmdir()
