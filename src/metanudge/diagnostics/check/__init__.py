"""How far an estimate is from the exact meta-gradient, on the user's own model and tasks, and what would mend it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from metanudge.advice import noise as why_random
from metanudge.diagnostics.check.advice import verdict
from metanudge.diagnostics.check.bench import Bench, first
from metanudge.diagnostics.check.kinks import kinked
from metanudge.diagnostics.check.reference import References
from metanudge.diagnostics.check.result import Check, CheckRow, Recommendation
from metanudge.diagnostics.check.search import recommend, search
from metanudge.diagnostics.check.sweep import Sweep
from metanudge.errors import SettingsError, TasksError
from metanudge.estimators import ESTIMATORS
from metanudge.learner import MetaLearner
from metanudge.minibatches import as_minibatches
from metanudge.oracle.common import device_of
from metanudge.random_state import forked
from metanudge.settings import check_steps
from metanudge.types import Tasks

__all__ = ["Check", "CheckRow", "Recommendation", "check"]


def check(
    learner: MetaLearner,
    tasks: Tasks | Iterable[Tasks],
    *,
    max_tasks: int = 4,
    reference_steps: int = 400,
    compare: Sequence[str] = tuple(ESTIMATORS),
    progress: Callable[[str], object] | None = None,
) -> Check:
    r"""Measure how far ``learner.backward`` is from the exact meta-gradient, and find settings that are near.

    .. math::
        \frac{\|g - \nabla F\|}{\|\nabla F\|}, \qquad
        \nabla F = \frac1T \sum_i \lambda (H_i + \lambda)^{-1} \nabla f_i(\phi_i(\theta))

    (With a ``sharpness_radius``, ∇f is taken aside of the exact solution, by the rule of the training.)

    The exact one is had from a solve of ``reference_steps`` steps, Newton's method, and conjugate gradients on exact
    Hessian products, on a float64 copy of model and tasks where both losses take them; where the loss cannot be
    differentiated twice, from a fourth-order stencil of converged solves. It is asked whether it converged itself; at
    the learner's own prox it is tried again with four times the steps where it did not. What stays in doubt gets a
    verdict only where the doubt does not decide it: an error four times the doubt and above 10 % is bad. Steps, ν, prox
    (each prox with a reference of its own) and the other estimators are then varied. Where tasks diverge, the others
    are compared, with the exact meta-gradient of the same tasks.

    The model is copied: it, the learner and the random state are as before afterwards, also after an exception. Dropout
    makes every step's problem another one and the comparison void, which the verdict says: call ``model.eval()`` first.
    A warm start is left out, and the verdict says so: solves begin at θ.

    The recommendation keeps your prox where any number of steps does there (up to 256, or twice yours): another prox is
    another objective, and may train a worse model with a better estimate. It is not varied for estimators that do not
    rest on it (FOMAML, Reptile, MAML, HF-MAML).

    Args:
        learner: As you train it.
        tasks: A stack, a list or finite map-style dataset of single tasks, or a loader of which the first item is
            taken.
        max_tasks: Tasks to use, the first ones.
        reference_steps: Steps of the reference's solve.
        compare: Names in ``mn.ESTIMATORS`` to compare with.
        progress: Called with what comes next, in words; None for silence.

    Raises:
        TasksError: Tasks that do not fit, or whose support sets are ``mn.Minibatches``.
        SettingsError: prox = 0, where there is no exact meta-gradient; a model that cannot be copied; names of no
            estimator; numbers that are none.
        NonFiniteError: No task has a finite exact meta-gradient.

    Cost: some thirty calls of ``backward`` on ``max_tasks`` tasks, and as many as ten references of
    ``reference_steps`` steps and 200 to 10,000 Hessian products.

    Example:
        >>> import torch, metanudge as mn
        >>> model = torch.nn.Sequential(torch.nn.Linear(1, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
        >>> learner = mn.MetaLearner(model, mn.metrics.squared_error, prox=20.0)
        >>> found = mn.check(learner, mn.tasks.sinusoid(2), reference_steps=40, compare=["fomaml"])
        >>> found.rows[0].group, found.kinked
        ('yours', False)
    """
    if isinstance(compare, str):
        raise SettingsError(f"compare must be a list of names of estimators, got a string; give [{compare!r}]")
    for name in compare:
        if name not in ESTIMATORS:
            raise SettingsError(f"compare names estimators, {', '.join(ESTIMATORS)}, but {name!r} is none of them")
    check_steps(max_tasks, "max_tasks")
    check_steps(reference_steps, "reference_steps")
    if learner.prox == 0:
        raise SettingsError(
            "check compares with the exact meta-gradient of the proximal problem, and with prox = 0 there is none; "
            "give the learner prox > 0"
        )
    with forked(device_of(learner.model)):  # a loader may draw
        chosen = first(learner, tasks, max_tasks)
        if any(as_minibatches(task.support) is not None for task in chosen):
            raise TasksError(
                "check compares with the exact meta-gradient of a task, and a support set seen through mn.Minibatches "
                "has none, as every step is on another problem; give check whole support sets, support=mn.Batch(...), "
                "of a few tasks (a learner in place takes microbatch= where they do not fit at once)"
            )
        bench = Bench(learner, chosen)
        bends = kinked(bench)
        tell = progress or (lambda _: None)
        references = References(bench, reference_steps, bends)
        tell("the exact meta-gradient")
        reference = references.at(learner.prox)  # or an error, before anything is measured
        sweep = Sweep(bench, references, tell)
        good = sweep.yours().good
        sweep.vary(compare)
        advisable = not good and (good is not None or not bends)
        if advisable:
            search(sweep, bends)
    noise = why_random(learner.model, False)
    return Check(
        sweep.rows,
        reference.how,
        reference.residual,
        reference.error,
        reference.trusted,
        bends,
        recommend(sweep.own()) if advisable else None,
        verdict(
            sweep.rows,
            reference,
            len(bench.tasks),
            bends,
            bench.bad(),
            learner.warm_start is not None,
            noise,
            learner.estimator,
        ),
    )
