"""Checks of settings, with the words a user can act on."""

from __future__ import annotations

import math

from metanudge.errors import SettingsError


def check_steps(steps: int) -> None:
    """Raise a SettingsError unless ``steps`` is a whole number >= 1."""
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise SettingsError(f"steps must be a whole number of at least 1, got {steps!r}")


def check_positive(**settings: float) -> None:
    """Raise a SettingsError unless every setting is a finite number > 0."""
    for name, value in settings.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise SettingsError(f"{name} must be a finite number above 0, got {value!r}")


def check_fraction(**settings: float) -> None:
    """Raise a SettingsError unless every setting is a number in [0, 1)."""
    for name, value in settings.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
            raise SettingsError(f"{name} must be a number in [0, 1), got {value!r}")
