"""What to change when the inner problems are not solved, or tasks are lost, in words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from metanudge.probe import Needed

ROUGH = 0.3
"""Relative residual above which a user is told."""

DONE = 0.05
"""Relative residual that the advice aims at."""

LOOSE = 300.0
"""Bound of the error, relative to the meta-gradient, above which a user is told. Trainings that go well
have 1 to 30, and up to 120 in single steps (measured: sinusoid, tanh and ReLU networks, prox 2)."""

MOST = 10.0
"""Largest factor of the steps that is advised without having been tried."""

GUESSED = 128
"""Most steps that are named without having been tried."""

WIDE = 30.0
"""Magnitude of inputs and targets above which their scale is told of."""

GROSS = 2.0
"""Length of meta-gradients, over that of query gradients, above which differences of gradients are doubted."""

FAIR = 0.2
"""Relative residual that more steps have to come below to be advised."""

ANOTHER = "is another objective (adaptation stays nearer to the initialisation), to be judged by validation"


def rounded(value: float) -> float:
    """One significant digit, upwards."""
    unit = 10.0 ** math.floor(math.log10(value))
    return math.ceil(value / unit - 1e-9) * unit


def aims(residual: float, bound: float) -> tuple[float, float]:
    """The residual to solve to, and one that would do; a bound falls in proportion, and is to become 1, or 10."""
    if residual > ROUGH:
        return DONE, FAIR
    return min(DONE, residual / bound), min(FAIR, 10 * residual / bound)


def guess(residual: float, steps: int) -> int:
    """The steps that would perhaps bring the residual to about 5 %, where they cannot be tried.

    Were the fall geometric, they would grow by log(0.05) / log(residual). But the first steps take away what is steep,
    and the rest falls at about half that rate: hence twice as many. At most ten times the steps: a residual near 1 says
    that the solve has hardly begun, and nothing of its rate. And at most ``GUESSED``: who follows a guess from 3 to 30
    and is told 300 next is led on.
    """
    factor = min(2 * math.log(DONE) / math.log(min(max(residual, 1e-3), 0.98)), MOST)
    return max(steps + 1, min(math.ceil(steps * factor), GUESSED))


def unsolved(residual: float, bound: float, solver: Any, prox: float, tried: Needed | None, noise: str = "") -> str:
    """The warning; ``tried`` is what more steps did, where they were taken, ``noise`` what makes the loss random."""
    said = f"the inner problem is {_percent(residual)} from solved, "
    if residual > ROUGH:
        said += "so the meta-gradient is rough"
    else:
        said += f"which at prox={prox:g} may leave an error of {bound:.0f} times the meta-gradient (error_bound)"
    if noise:
        return f"{said}: {_random(noise)}"
    if tried is None:
        return f"{said}: {_untried(residual, solver, prox)}"
    own = not isinstance(getattr(solver, "lr", None), str)
    if tried.residual > aims(residual, bound)[1]:
        said += f": up to {tried.most} steps were tried, and left {_percent(tried.residual)} at best; "
        return said + (_step_size(solver, prox) if own else _closer(prox))
    here = f"raise steps from {solver.steps} to {tried.steps}, which left {_percent(tried.residual)} here"
    return f"{said}: {here}; or {_step_size(solver, prox) if own else _closer(prox)}"


def scale(largest: float) -> str:
    """Of numbers that no step size or prox was meant for."""
    if largest <= WIDE:
        return ""
    return (
        ". But first bring inputs and targets to a scale of about one, as by their mean and deviation over all "
        f"training tasks: they reach {largest:.2g}, where neither steps nor prox do what they do elsewhere"
    )


def far(radius: float) -> str:
    """Of a sharpness radius that leaves nothing of what was learnt."""
    return (
        f"sharpness_radius={radius:g} takes query gradients as far from an adapted model as the adaptation has led, or "
        "farther, where little of it is left, and trainings may not leave chance; 0.1 to 0.3 is usual"
    )


def sharpened(first: float) -> str:
    """What to say more where the first step's residual, ``first``, was far lower."""
    return (
        f". At the first step it was {_percent(first)}: the network has probably sharpened in meta-training, which "
        "sharpness_radius=0.1 of MetaLearner, or 0.3, is there to prevent (docs/gotchas.md)"
    )


def _untried(residual: float, solver: Any, prox: float) -> str:
    """What to look at, where no other steps were taken: nothing is known, and a step size of the user's comes first."""
    steps: int = solver.steps
    more = f"raise steps from {steps} to perhaps {guess(residual, steps)}"
    if steps >= GUESSED:
        more = f"take more steps than {steps}"
    more += " (none were tried here; mn.check tries)"
    if isinstance(getattr(solver, "lr", None), str):
        return f"{more}; or {_closer(prox)}"
    return f"{_step_size(solver, prox)}; or {more}"


def _closer(prox: float) -> str:
    """A larger prox, as something to try: what it would do is not known."""
    return f"try a larger prox, such as {rounded(3 * prox):g}, with mn.check; it {ANOTHER}"


def _random(noise: str) -> str:
    """The cause that neither steps nor prox mend."""
    return (
        f"the support loss is random from step to step ({noise}), and its residual cannot fall below that noise. See "
        "which it is: without the noise (model.eval(); whole support sets) a residual that stays as high asks for more "
        "steps or another step size; one that falls was noise, to be made less, or to be judged by validation"
    )


def noise(model: nn.Module, sampled: bool) -> str:
    """What makes the support loss another one at every step, as far as it is sure; "" where nothing is known to.

    Dropout inside a function of the user's is not seen.
    """
    causes = ["minibatches"] if sampled else []
    if drops(model):
        causes.append("dropout in train mode")
    return " and ".join(causes)


def drops(model: nn.Module) -> bool:
    """Whether a layer of the model, in train mode, drops at random."""
    return any(module.training and _drops(module) for module in model.modules())


def _drops(module: nn.Module) -> bool:
    """Whether a module in train mode drops at random; other packages' own dropout is known by its name."""
    if isinstance(module, nn.RNNBase):
        return module.num_layers > 1 and module.dropout > 0
    if not isinstance(module, nn.MultiheadAttention) and "drop" not in type(module).__name__.lower():
        return False
    rates = (getattr(module, name, None) for name in ("p", "drop_prob", "dropout"))
    return any(isinstance(rate, int | float) and rate > 0 for rate in rates)


def fixed_lr(solver: Any) -> float | None:
    """The step size a solver was given; None where it has none, or finds its own."""
    lr = getattr(solver, "lr", None)
    return float(lr) if isinstance(lr, int | float) else None


def _step_size(solver: Any, prox: float) -> str:
    """What to look at where a solver's step is fixed: a larger prox only asks for a shorter one."""
    lr, name = fixed_lr(solver), type(solver).__name__
    if lr is None:
        decay = " (leave out weight_decay, if it has any)" if name == "TorchOptimizer" else ""
        return f"look at the step size of {name}{decay}, or take Nesterov, which finds its own"
    own = 'lr="auto"' if name == "Nesterov" else "Nesterov"
    way = "a larger one may do (a smaller one where it oscillates)"
    if lr * prox >= 1:
        way = f"a smaller one may do (lr * prox is {lr * prox:g}, and gradient descent diverges above 2)"
    return f"look at lr = {lr:g} of {name}, {way}; {own} needs none"


def amplified(tasks: int, total: int, prox: float, lr: float | None = None) -> str:
    """The alarm; ``lr`` is the step size that the solver was given."""
    closer = rounded(3 * prox)
    short = f", with lr below {1 / closer:.1g}" if lr is not None and lr * closer >= 1 else ""
    return (
        f"in {tasks} of {total} tasks the meta-gradient is longer than the query gradient, which a convex inner "
        f"problem does not allow: prox = {prox:g} does not outweigh the negative curvature of the support loss, or "
        f"nudged solves diverge. More steps do not mend that: raise prox to about {closer:g}{short}, which {ANOTHER}; "
        "or go on, if validation improves all the same"
    )


def rough(gain: float, estimator: Any, prox: float) -> str:
    """The alarm where the solver's way is walked back by differences of gradients."""
    name, displacement = type(estimator).__name__, getattr(estimator, "displacement", None)
    others = [f"{name}(displacement=0.1)"] if displacement is None or displacement < 0.1 else []
    others += ["FOBMAML"] if prox > 0 else ["FOMAML"]
    return (
        f"the meta-gradients of {name} are {gain:.2g} times as long as the query gradients. With kinks on the way "
        "(ReLU, max pooling) that is chance, as two gradients near each other differ by the kinks between them: take "
        f"{', or '.join(others)} (docs/gotchas.md). On a smooth model the support loss curves downwards along the way, "
        "and a larger prox outweighs that"
    )


def calmer(solver: Any, prox: float) -> str:
    """What keeps this solver from diverging: with a step of its own a larger prox, with a fixed one never."""
    lr, name = getattr(solver, "lr", None), type(solver).__name__
    if isinstance(lr, int | float):
        return f"let the inner solver take smaller steps (lr, now {lr:g})"
    if isinstance(lr, str):
        closer = f"hold it closer (a larger prox than {prox:g})"
        return f'{closer}, or give {name} a small lr of your own in the place of "{lr}"'
    whose = "the lr of its optimizer; and no weight_decay" if name == "TorchOptimizer" else "its step size"
    return f"let the inner solver ({name}) take smaller steps ({whose})"


def bad_data(bad: Mapping[int, list[str]], total: int) -> str:
    """Which tasks hold what is not finite."""
    which = "; ".join(f"task {place}: {' and '.join(where)}" for place, where in list(bad.items())[:5])
    more = f"; and {len(bad) - 5} more" if len(bad) > 5 else ""
    return f"{len(bad)} of {total} tasks hold NaN or infinite numbers in their data ({which}{more}; counted from 0)"


def missing(*tensors: list[str]) -> str:
    """What to go on with where targets are among the tensors that are not finite."""
    targets = any(where.endswith("targets") for some in tensors for where in some)
    return " (targets of NaN, missing or padding, a loss has to leave out, as mn.metrics.squared_error does)" * targets


def _named(places: Sequence[int]) -> str:
    return f"task {', '.join(map(str, places[:5]))}{', ...' if len(places) > 5 else ''}; counted from 0"


def diverged(places: Sequence[int], total: int) -> str:
    """Which tasks were lost though their data are finite."""
    return (
        f"{len(places)} of {total} tasks diverged, or had no finite loss or meta-gradient "
        f"({_named(places)}), though their data are finite"
    )


LOOK_FOR = (
    "look for a division by zero (a mask that leaves nothing, of all examples or of those of a microbatch), the "
    "logarithm or root of zero, or numbers so large that they overflow"
)
NEVER_FINITE = f"the loss is not finite at the initialisation already, before any step, though the data are: {LOOK_FOR}"


def unjudged(places: Sequence[int], total: int) -> str:
    """Which tasks have a solution, and no finite query loss there."""
    return f"in {len(places)} of {total} tasks ({_named(places)}) the query loss alone is not finite: {LOOK_FOR}"


def never_finite(places: Sequence[int], total: int) -> str:
    """Which tasks had no finite support loss to begin with."""
    return f"in {len(places)} of {total} tasks ({_named(places)}) {NEVER_FINITE}"


def no_score(places: Sequence[int], total: int, metric: str) -> str:
    """Which tasks have no finite score."""
    return (
        f"the {metric} of {len(places)} of {total} tasks ({_named(places)}) is not finite after "
        "adaptation, and so is the mean: look for NaN in their data, see whether the metric is defined for them "
        "(a mean over no example, an area under a curve of one class), or leave them out (Evaluation.values has a row "
        "a task)"
    )


def _percent(value: float) -> str:
    return f"{100 * value:.0f} %" if value >= 0.095 else f"{100 * value:.1g} %"


def in_place(reason: str) -> str:
    """Said where "auto" goes in place because vmap cannot run a model, for that reason."""
    why = reason.split(". PyTorch said:")[0]
    return f'execution="auto" goes in place from here on, one task at a time: {why}'
