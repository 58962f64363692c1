"""How far an estimate is from the exact meta-gradient, on the user's own model and tasks, and what would mend it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from metanudge.diagnostics.check.advice import recommend, verdict
from metanudge.diagnostics.check.bench import Bench, first
from metanudge.diagnostics.check.kinks import kinked
from metanudge.diagnostics.check.reference import References
from metanudge.diagnostics.check.result import GOOD, Check, CheckRow, Recommendation
from metanudge.diagnostics.check.sweep import Sweep
from metanudge.errors import SettingsError
from metanudge.estimators import ESTIMATORS
from metanudge.learner import MetaLearner
from metanudge.types import Tasks

__all__ = ["Check", "CheckRow", "Recommendation", "check"]


def check(
    learner: MetaLearner,
    tasks: Tasks | Iterable[Tasks],
    *,
    max_tasks: int = 4,
    reference_steps: int = 400,
    compare: Sequence[str] = tuple(ESTIMATORS),
) -> Check:
    r"""Measure how far ``learner.backward`` is from the exact meta-gradient, and find settings that are near.

    .. math::
        \frac{\|g - \nabla F\|}{\|\nabla F\|}, \qquad
        \nabla F = \frac1T \sum_i \lambda (H_i + \lambda)^{-1} \nabla f_i(\phi_i(\theta))

    The exact one is had from a solve of ``reference_steps`` steps and conjugate gradients on exact Hessian products,
    on a float64 copy of model and tasks where they allow it; where the loss can not be differentiated twice, from a
    fourth-order stencil of converged solves. Steps, ν, prox (each prox with a reference of its own) and the other
    estimators are then varied. The model is copied and stays as it is, as does the random state. Dropout makes every
    step's problem another one and the comparison void: call ``model.eval()`` first.

    Args:
        learner: As you train it.
        tasks: A stack, a list of single tasks, or a loader of which the first item is taken.
        max_tasks: Tasks to use, the first ones.
        reference_steps: Steps of the reference's solve.
        compare: Names in ``mn.ESTIMATORS`` to compare with.

    Raises:
        TasksError: Tasks that do not fit.
        SettingsError: A model that can not be copied; names of no estimator.
        NonFiniteError: The exact meta-gradient is not finite.

    Cost: some thirty calls of ``backward`` on ``max_tasks`` tasks, four of them with ``reference_steps``.

    Example:
        >>> import torch, metanudge as mn
        >>> model = torch.nn.Sequential(torch.nn.Linear(1, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
        >>> learner = mn.MetaLearner(model, mn.metrics.squared_error, prox=2.0)
        >>> found = mn.check(learner, mn.tasks.sinusoid(2), reference_steps=60, compare=["fomaml"])
        >>> found.rows[0].group, found.kinked
        ('yours', False)
    """
    for name in compare:
        if name not in ESTIMATORS:
            raise SettingsError(f"compare names estimators, {', '.join(ESTIMATORS)}, but {name!r} is none of them")
    bench = Bench(learner, first(learner, tasks, max_tasks))
    sweep = Sweep(bench, References(bench, reference_steps))
    rows = sweep.rows(compare)
    prox, bends = learner.prox, kinked(bench)
    proxes = (prox, 3 * prox, 10 * prox) if bends else tuple(factor * prox for factor in (1, 3, 10, 30, 100, 300))
    recommendation = None if rows[0].relative_error < GOOD else recommend(sweep, learner, proxes)
    reference = sweep.references.known[prox]
    return Check(
        rows,
        reference.how,
        reference.residual,
        bends,
        recommendation,
        verdict(rows, learner, recommendation, bends, max(proxes), reference),
    )
