"""The end of a meta-step: what the user is told of it, and the mean that is added to ``.grad``."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from metanudge import advice
from metanudge.accumulation import FiniteMean, Numbers
from metanudge.bundles import copy_into
from metanudge.checks import largest, not_finite
from metanudge.errors import NonFiniteError, NonFiniteWarning, UnsolvedWarning
from metanudge.estimators import Estimator
from metanudge.probe import Probe, needed
from metanudge.ranks import Ranks
from metanudge.sharding import whole
from metanudge.solvers import Solver
from metanudge.types import Named, Need, Tasks
from metanudge.warned import warn


class Given(NamedTuple):
    """What a meta-step was given: its stacks, and the place of every task of theirs in what the user gave."""

    stacks: list[Tasks]
    places: list[int]


@dataclass
class Told:
    """What a learner's user has been told, and what its steps have been like of late: single ones stand out by chance.

    Attributes:
        kinds: Warnings given, which are not repeated.
        first: Residual of the first step; NaN before it.
        residual: Mean residual, the last ten steps or so; NaN before the first.
        bound: The same of the error bound, geometrically.
        dropout: Whether of dropout in an evaluation or adaptation.
        scores: Whether of scores that are not finite.
    """

    kinds: set[type[Warning]] = field(default_factory=set)
    first: float = math.nan
    residual: float = math.nan
    bound: float = math.nan
    dropout: bool = False
    scores: bool = False

    def of_dropout(self, model: nn.Module, where: str) -> None:
        """Warn, once, of layers that make what ``where`` gives random."""
        if not self.dropout and advice.drops(model):
            self.dropout = True
            warn(
                f"the model is in train mode, so dropout is on in {where}, and what it gives is random: call "
                "model.eval() before",
                UserWarning,
            )

    def after(self, numbers: Numbers) -> Told:
        """The same with another step in the means."""
        first = numbers.residual if math.isnan(self.first) else self.first
        bound = min(max(numbers.error_bound, 1e-6), 1e6) if numbers.error_bound == numbers.error_bound else math.nan
        bound = math.exp(_late(math.log(self.bound), math.log(bound)))
        return replace(self, first=first, residual=_late(self.residual, numbers.residual), bound=bound)


def _late(before: float, now: float) -> float:
    return now if math.isnan(before) else 0.9 * before + 0.1 * now


class Advised(Protocol):
    """Of a learner, what advice is about."""

    model: nn.Module
    estimator: Estimator
    solver: Solver
    prox: float
    sharpness_radius: float
    ranks: Ranks


def verdict(
    mean: FiniteMean,
    lost: int,
    probes: list[Probe],
    given: Given,
    parts: Advised,
    told: Told,
) -> Numbers:
    """Means over the kept tasks; warns, once, of ``lost`` tasks of this rank, and of means not as they should be.

    Raises:
        NonFiniteError: No task is left.
    """
    estimator, solver, prox = parts.estimator, parts.solver, parts.prox
    if mean.kept == 0:
        raise NonFiniteError(
            f"none of the {mean.total} tasks had a solve that did not diverge and a finite loss and meta-gradient, "
            f"so nothing was changed: {_lost(probes, given, solver, prox)}"
        )
    numbers = mean.numbers()
    late = told.after(numbers)
    if lost and NonFiniteWarning not in told.kinds:
        _tell(
            told,
            NonFiniteWarning,
            f"{_lost(probes, given, solver, prox)}. They were left out of the mean "
            "(MetaStep.dropped_tasks counts them from now on)",
        )
    unheard = UnsolvedWarning not in told.kinds and parts.ranks.first
    walks_back = Need.DIFFERENTIABLE_SOLVER in estimator.needs and Need.DOUBLE_BACKWARD not in estimator.needs
    if unheard and Need.PROXIMAL_TERM in estimator.needs:
        residual, bound = late.residual, late.bound
        if residual > advice.ROUGH or bound > advice.LOOSE:
            noise = advice.noise(parts.model, any(probe.sampled for probe in probes))
            tried = None if noise else needed(probes, solver, *advice.aims(residual, bound))  # noise no steps mend
            said = advice.unsolved(residual, bound, solver, prox, tried, noise)
            sharpens = parts.sharpness_radius == 0 and Need.QUERY_LOSS_AS_IT_IS not in estimator.needs
            if sharpens and not noise and residual > advice.ROUGH > 2 * late.first:
                said += advice.sharpened(late.first)
            said += advice.scale(largest(given.stacks))
            _tell(told, UnsolvedWarning, said)
        elif 2 * numbers.amplified_tasks > mean.kept:
            lr = advice.fixed_lr(solver)
            _tell(told, UnsolvedWarning, advice.amplified(numbers.amplified_tasks, mean.kept, prox, lr))
    elif unheard and walks_back and mean.gain > advice.GROSS:
        _tell(told, UnsolvedWarning, advice.rough(mean.gain, estimator, prox))
    # not where a warning is an error, which ends a step that was not taken
    told.first, told.residual, told.bound = late.first, late.residual, late.bound
    return numbers


def _lost(probes: list[Probe], given: Given, solver: Solver, prox: float) -> str:
    """Which tasks were left out and why, and what would mend it."""

    def of_tasks(parts: list[Tensor]) -> dict[int, bool]:
        flags = torch.cat([part.reshape(-1).cpu() for part in parts]).tolist()
        return dict(zip(given.places, flags, strict=True))

    kept, begun, solved = (of_tasks([getattr(probe, name) for probe in probes]) for name in ("kept", "begun", "solved"))
    judged = of_tasks([probe.query_loss.isfinite() for probe in probes])
    held = not_finite(*given)
    bad: dict[int, list[str]] = {}
    never, unjudged, diverged = list[int](), list[int](), list[int]()
    for place in sorted(place for place, keeps in kept.items() if not keeps):
        fails_in_query = solved[place] and not judged[place]
        # tensors that a loss leaves out where they are not finite, as padding, are not why the task was lost
        blamed = {"support": not begun[place], "query": not begun[place] or fails_in_query}
        if tensors := [name for name in held.get(place, []) if blamed[name.split()[0]]]:
            bad[place] = tensors
        elif not begun[place]:
            never.append(place)
        elif fails_in_query:
            unjudged.append(place)
        else:
            diverged.append(place)
    said = []
    if bad:
        said.append(f"{advice.bad_data(bad, len(kept))}: mend these or leave them out{advice.missing(*bad.values())}")
    if never:
        said.append(advice.never_finite(never, len(kept)))
    if unjudged:
        said.append(advice.unjudged(unjudged, len(kept)))
    if diverged:
        said.append(f"{advice.diverged(diverged, len(kept))}: {advice.calmer(solver, prox)}")
    return ". ".join(said)


def _tell(told: Told, kind: type[Warning], text: str) -> None:
    warn(text, kind)
    told.kinds.add(kind)


def add_to_grad(model: nn.Module, mean: FiniteMean, named: Named) -> float:
    """Add the mean meta-gradient, which is used up, to ``.grad``; returns its norm."""
    parameters, squares = dict(model.named_parameters()), []
    with torch.no_grad():
        for one in mean.spend():
            norms = torch._foreach_norm(list(one.values()), dtype=torch.float64)
            squares.append(torch.stack([whole(norm) for norm in norms]).square().sum())
            new: list[tuple[nn.Parameter, Tensor]] = []
            for name, part in named(one).items():
                parameter = parameters[name]
                fits = part.dtype == parameter.dtype and part.stride() == parameter.stride()
                if parameter.grad is None and name in one and fits:
                    parameter.grad = part
                elif parameter.grad is None:
                    new.append((parameter, part))
                elif parameter.grad.is_sparse:
                    parameter.grad = part.to(parameter.dtype) + parameter.grad
                else:
                    parameter.grad.add_(part)
            own = [torch.empty_like(parameter) for parameter, _ in new]  # laid out as fused optimizers take for granted
            copy_into([(gradient, part) for gradient, (_, part) in zip(own, new, strict=True)])
            for gradient, (parameter, _) in zip(own, new, strict=True):
                parameter.grad = gradient
    return float(torch.stack(squares).sum().sqrt())
