"""Meta-learning for PyTorch with first derivatives only."""

from metanudge import extend, metrics, optim, tasks
from metanudge.command.families import FAMILIES
from metanudge.command.registries import LOSSES, METRICS, OPTIMIZERS, SCHEDULERS
from metanudge.diagnostics import Check, Smoothness, check, smoothness
from metanudge.energy import InnerProblem
from metanudge.errors import (
    LossError,
    MetanudgeError,
    NonFiniteError,
    NonFiniteWarning,
    SettingsError,
    TasksError,
    UnsolvedWarning,
)
from metanudge.estimators import (
    ESTIMATORS,
    FOBMAML,
    FOMAML,
    HFMAML,
    IMAML,
    MAML,
    STENCILS,
    Estimator,
    Reptile,
    Stencil,
    Tangent,
)
from metanudge.learner import MetaLearner
from metanudge.minibatches import Minibatches
from metanudge.models import MODELS
from metanudge.pretrained import load_pretrained
from metanudge.solvers import SOLVERS, Adam, GradientDescent, Nesterov, Solver, TorchOptimizer
from metanudge.training import Fit, fit
from metanudge.training.logs import Record
from metanudge.types import Batch, Estimate, Evaluation, LossFunction, MetaStep, Tasks
from metanudge.warm_start import WarmStart

__version__ = "0.1.0"

__all__ = [
    "ESTIMATORS",
    "FAMILIES",
    "FOBMAML",
    "FOMAML",
    "HFMAML",
    "IMAML",
    "LOSSES",
    "MAML",
    "METRICS",
    "MODELS",
    "OPTIMIZERS",
    "SCHEDULERS",
    "SOLVERS",
    "STENCILS",
    "Adam",
    "Batch",
    "Check",
    "Estimate",
    "Estimator",
    "Evaluation",
    "Fit",
    "GradientDescent",
    "InnerProblem",
    "LossError",
    "LossFunction",
    "MetaLearner",
    "MetaStep",
    "MetanudgeError",
    "Minibatches",
    "Nesterov",
    "NonFiniteError",
    "NonFiniteWarning",
    "Record",
    "Reptile",
    "SettingsError",
    "Smoothness",
    "Solver",
    "Stencil",
    "Tangent",
    "Tasks",
    "TasksError",
    "TorchOptimizer",
    "UnsolvedWarning",
    "WarmStart",
    "check",
    "extend",
    "fit",
    "load_pretrained",
    "metrics",
    "optim",
    "smoothness",
    "tasks",
]
