"""Beginning a training anew, where another one was."""

from __future__ import annotations

from pathlib import Path

from metanudge.checkpoint import BEST, LAST
from metanudge.logs import BOARD, LOGS, OURS
from metanudge.pretrained import SETTINGS, WEIGHTS


def discard(folder: Path) -> None:
    """Remove from ``folder`` what a training left there: else its best weights would pass for those of the next one.

    The checkpoint goes first: a stop in between leaves nothing to go on from. Files that no training writes stay.
    """
    best = folder / BEST
    pretrained = [best / WEIGHTS, best / SETTINGS] if (best / SETTINGS).is_file() else []
    boards = folder.glob(f"{BOARD}/events.out.tfevents.*{OURS}")
    for file in (folder / LAST, *pretrained, *(folder / name for name in LOGS), *boards):
        file.unlink(missing_ok=True)
    for inside in (best, folder / BOARD):
        if inside.is_dir() and not any(inside.iterdir()):
            inside.rmdir()
