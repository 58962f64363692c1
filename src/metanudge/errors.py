"""What can go wrong, by who can mend it."""

from __future__ import annotations


class MetanudgeError(Exception):
    """Any error this library raises on purpose."""


class SettingsError(MetanudgeError, ValueError):
    """A setting, or a combination of settings, that cannot work; raised when the object is built."""


class TasksError(MetanudgeError, ValueError):
    """Tasks whose form does not fit: empty, mismatched, on the wrong device."""


class LossError(MetanudgeError, ValueError):
    """A loss function that does not return a differentiable scalar."""


class UnmappableError(LossError):
    """A model, loss or metric that cannot run for many tasks at once; ``execution="in_place"`` runs it."""


class NonFiniteError(MetanudgeError, ArithmeticError):
    """No task of a step had a finite loss and meta-gradient."""


class UnsolvedWarning(UserWarning):
    """The inner problems are so far from solved that the meta-gradient is rough."""


class NonFiniteWarning(UserWarning):
    """Some tasks of a step were left out: their solve diverged, or a loss or meta-gradient was not finite."""
