"""Inner solvers. Adding one: a file here, a line in ``SOLVERS``."""

from metanudge.solvers.adam import Adam
from metanudge.solvers.gradient_descent import GradientDescent
from metanudge.solvers.loop import Solver
from metanudge.solvers.nesterov import Nesterov
from metanudge.solvers.torch_optimizer import TorchOptimizer

SOLVERS: dict[str, type[Solver]] = {
    "gradient_descent": GradientDescent,
    "nesterov": Nesterov,
    "adam": Adam,
    "torch_optimizer": TorchOptimizer,
}

__all__ = ["SOLVERS", "Adam", "GradientDescent", "Nesterov", "Solver", "TorchOptimizer"]
