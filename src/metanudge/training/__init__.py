"""Meta-training with all that a long run needs: the loop, and what it draws, watches, keeps and shows."""

from metanudge.training.loop import Fit, fit

__all__ = ["Fit", "fit"]
