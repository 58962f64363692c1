"""Families of tasks. A task is a pure function of (seed, index), so that resuming and sharing work are exact."""

from metanudge.tasks.logistic import logistic, logistic_loss, logistic_model
from metanudge.tasks.sinusoid import sinusoid

__all__ = ["logistic", "logistic_loss", "logistic_model", "sinusoid"]
