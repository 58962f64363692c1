"""Meta-optimizers for an objective whose smoothness grows with its gradient."""

from metanudge.optim.clipped import ClippedSGD
from metanudge.optim.normalized import NormalizedSGD
from metanudge.optim.parameter_free import ParameterFree

__all__ = ["ClippedSGD", "NormalizedSGD", "ParameterFree"]
