"""Looking at a meta-learning problem: exact references, and what limits an estimate."""

from metanudge.diagnostics.check import Check, CheckRow, Recommendation, check
from metanudge.diagnostics.exact import ExactMetaObjective
from metanudge.diagnostics.smoothness import Smoothness, smoothness

__all__ = ["Check", "CheckRow", "ExactMetaObjective", "Recommendation", "Smoothness", "check", "smoothness"]
