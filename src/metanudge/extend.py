"""What an estimator or an inner solver of one's own is made of: ``from metanudge.extend import ...``.

The contract, beside what the protocols say:

- Trees of parameters are dicts of *leaves*, whose keys belong to the execution: vectorised, all parameters of a dtype
  are one leaf ``[T, N, P]``; in place, small ones come end to end. Compute on them leaf by leaf, by ``tree``, and do
  not look for the names of the model's parameters.
- ``Estimate.gradient`` has the leaves of ``problem.theta`` and of ``problem.losses.shared``; ``FreeSolve.estimate``
  makes an ``Estimate`` of it and the rest.
- Begin with ``solve_free``, which knows warm starts (``problem.start``), the sharpness radius
  (``FreeSolve.query_gradient``) and what is reported. An estimator that calls ``solve`` itself, to see iterates,
  declares ``Need.START_AT_THETA``.
- A solver whose decisions depend on the problem records them in ``Schedule.decisions`` and replays those it is given,
  so that nudged solves are matched. ``settle`` says what solves that *begin at the solution* replay: a step size that
  is right there, as often as asked, and not those of the way to it. One that decides nothing is a ``FixedSteps``,
  which has these parts, and adds ``init``, ``step`` and ``point``.
"""

from metanudge import tree
from metanudge.energy import Energy, InnerProblem
from metanudge.estimators.base import Estimator, FreeSolve, judge, solve_free
from metanudge.losses import HessianProduct, InnerGradients, LossGradients
from metanudge.solvers.loop import FixedSteps, Solver, replay, solve
from metanudge.types import Estimate, Need, Params, Role, Schedule, Solution, Weights

__all__ = [
    "Energy",
    "Estimate",
    "Estimator",
    "FixedSteps",
    "FreeSolve",
    "HessianProduct",
    "InnerGradients",
    "InnerProblem",
    "LossGradients",
    "Need",
    "Params",
    "Role",
    "Schedule",
    "Solution",
    "Solver",
    "Weights",
    "judge",
    "replay",
    "solve",
    "solve_free",
    "tree",
]
