"""Looking at a meta-learning problem: exact references, and what limits an estimate."""

from metanudge.diagnostics.exact import ExactMetaObjective

__all__ = ["ExactMetaObjective"]
