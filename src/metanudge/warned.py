"""Warnings, located in the user's own file."""

from __future__ import annotations

import sys
import warnings


def warn(text: str, kind: type[Warning]) -> None:
    """Warn of the line that called this library, however deep in it this is called."""
    frame, level = sys._getframe(), 1
    while frame.f_back is not None and _is_ours(frame.f_globals.get("__name__", "")):
        frame, level = frame.f_back, level + 1
    warnings.warn(text, kind, stacklevel=level)


def _is_ours(module: str) -> bool:
    return module.partition(".")[0] == "metanudge"
