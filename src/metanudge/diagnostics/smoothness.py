"""How the smoothness of the meta-objective grows with its gradient, along the user's own trajectory."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from metanudge.deposit import Told
from metanudge.errors import NonFiniteError, NonFiniteWarning, SettingsError, TasksError, UnsolvedWarning
from metanudge.learner import MetaLearner
from metanudge.optim import NormalizedSGD
from metanudge.random_state import forked, seed_generators
from metanudge.settings import check_steps
from metanudge.sources import groups
from metanudge.types import Tasks

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Smoothness(NamedTuple):
    """What ``smoothness`` measured, and the meta-steps it suggests.

    Attributes:
        L0: Part of the smoothness that does not grow, >= 0, in units of 1 / parameter² times the loss.
        L1: Growth with the gradient norm, >= 0, in units of 1 / parameter.
        correlation: Between smoothness and gradient norm.
        gradient_norms: ||∇F(x_k)||, ``[n]``.
        smoothness: L_k, ``[n]``.
        lr: Step size for small gradients: ``ClippedSGD(lr=...)``, or of plain SGD.
        max_step: Longest safe step where the gradient is large: ``ClippedSGD(max_step=...)`` or
            ``NormalizedSGD(lr=...)``; infinite where the smoothness does not grow.
        grows: Whether the smoothness was seen to grow with the gradient.
    """

    L0: float
    L1: float
    correlation: float
    gradient_norms: Tensor
    smoothness: Tensor
    lr: float
    max_step: float
    grows: bool

    @property
    def max_norm(self) -> float:
        """The threshold for ``torch.nn.utils.clip_grad_norm_``: the gradient norm from which steps are cut."""
        return self.max_step / self.lr

    def __str__(self) -> str:
        """A summary and the suggestion."""
        low, high = float(self.gradient_norms.min()), float(self.gradient_norms.max())
        said = (
            f"||Hess F|| ~ {self.L0:.3g} + {self.L1:.3g} ||grad F||, from {len(self.smoothness)} steps with gradient "
            f"norms {low:.2g} to {high:.2g} (correlation {self.correlation:.2f})."
        )
        if not self.grows:
            return (
                f"{said}\nThe smoothness does not grow with the gradient here: plain steps, SGD with lr up to "
                f"{self.lr:.2g}, are as good as clipped or normalised ones."
            )
        return (
            f"{said}\nClip: mn.optim.ClippedSGD(parameters, lr={self.lr:.2g}, max_step={self.max_step:.2g}); with "
            f"another optimizer clip_grad_norm_(parameters, {self.max_norm:.2g}).\nOr normalise: "
            f"mn.optim.NormalizedSGD(parameters, lr={self.max_step:.2g}), decreasing to converge."
        )

    def figure(self) -> Figure:
        """L_k against ||∇F(x_k)|| with the fitted line; needs matplotlib."""
        from matplotlib.figure import Figure

        made = Figure(figsize=(5.0, 3.6), layout="constrained")
        axis = made.subplots()
        axis.plot(self.gradient_norms.numpy(), self.smoothness.numpy(), "o", color="#0072b2", markersize=4)
        ends = torch.stack([self.gradient_norms.min(), self.gradient_norms.max()])
        axis.plot(ends.numpy(), (self.L0 + self.L1 * ends).numpy(), color="#222222", linewidth=1.0)
        axis.set(xlabel="norm of the meta-gradient", ylabel="smoothness along the step")
        return made


def smoothness(
    learner: MetaLearner,
    tasks: Tasks | Iterable[Tasks],
    optimizer: torch.optim.Optimizer | None = None,
    *,
    steps: int = 30,
) -> Smoothness:
    r"""Estimate L0 and L1 of ||Hess F|| <= L0 + L1 ||∇F|| along meta-steps, and the step sizes that theory gives.

    .. math::
        L_k = \frac{\|\nabla F(x_{mid}) - \nabla F(x_k)\|}{\|x_{mid} - x_k\|}, \qquad x_{mid} = \frac{x_k + x_{k+1}}{2}

    with all tasks at every step, so that the gradients are of one function, and the same random numbers at both points.
    L0 and L1 are the non-negative least-squares fit of L_k on ||∇F(x_k)||. A step of size s is safe where
    s (L0 + L1 ||g||) <= 1, which min(1 / (2 L0), 1 / (2 L1 ||g||)) fulfils; for the suggestion the fitted line is
    raised until nine points of ten lie below it, and L0 to the least L_k, as nobody has looked at smaller gradients.
    The smoothness counts as growing where it correlates with the gradient norm by more than 0.3 and the gradient norm
    varies by more than a tenth.

    What is seen depends on where the trajectory goes: start from where you are in training. Model, gradients, optimizer
    and random state are as before afterwards, also after an exception; the learner still tells what it tells once.

    Args:
        learner: As you train it, but for a warm start, which is left out and not touched: solves begin at θ.
        tasks: A stack, or a list or finite map-style dataset of single tasks; of a loader the first item is taken.
        optimizer: The one you train with, on the parameters of ``learner.model``; None for normalised steps of 2 % of
            1 + ||θ||.
        steps: Meta-steps to take, >= 2.

    Raises:
        SettingsError: ``steps`` is no whole number, or below two.
        TasksError: Tasks that do not fit.
        NonFiniteError: The optimizer did not move the parameters, or the gradient is not finite.

    Cost: two calls of ``backward`` a step. Memory: two copies of the parameters and of the optimizer's state.

    Source: Zhang, He, Sra & Jadbabaie, ICLR 2020 (arXiv:1905.11881).

    Example:
        >>> import torch, metanudge as mn
        >>> model = torch.nn.Sequential(torch.nn.Linear(1, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
        >>> learner = mn.MetaLearner(model, mn.metrics.squared_error, prox=2.0)
        >>> found = mn.smoothness(learner, mn.tasks.sinusoid(4), steps=5)
        >>> found.L0 >= 0 and found.L1 >= 0 and found.lr > 0
        True
    """
    check_steps(steps)
    if steps < 2:
        raise SettingsError(f"a line needs at least two points, got steps={steps}")
    parameters = [parameter for parameter in learner.model.parameters() if parameter.requires_grad]
    with _restored(learner.model, optimizer):
        batch = next(iter(groups(tasks)), None)  # a loader may draw
        if batch is None:
            raise TasksError("there are no tasks; the iterable was empty")
        if optimizer is None:
            size = torch.stack([parameter.detach().double().square().sum() for parameter in parameters]).sum().sqrt()
            optimizer = NormalizedSGD(parameters, lr=0.02 * (1 + float(size)), momentum=0.0)
        norms, slopes = zip(*_walk(_apart(learner), batch, optimizer, parameters, steps), strict=True)
    return fit(*(torch.tensor(column, dtype=torch.float64, device="cpu") for column in (norms, slopes)))


def fit(norms: Tensor, slopes: Tensor) -> Smoothness:
    """L0 and L1 from ||∇F(x_k)|| and L_k, ``[n]`` each, and the suggestion."""
    centred_norms, centred_slopes = norms - norms.mean(), slopes - slopes.mean()
    spread = centred_norms.square().sum()
    l1 = float((centred_norms * centred_slopes).sum() / spread) if spread > 0 else 0.0
    l0 = float(slopes.mean()) - l1 * float(norms.mean())
    if l1 < 0:
        l0, l1 = float(slopes.mean()), 0.0
    elif l0 < 0:
        l0, l1 = 0.0, float((norms * slopes).sum() / norms.square().sum())
    scale = float(centred_norms.norm() * centred_slopes.norm())
    correlation = float((centred_norms * centred_slopes).sum()) / scale if scale > 0 else 0.0
    grows = l1 > 0 and correlation > 0.3 and float(norms.max()) > 1.1 * float(norms.min())
    if not grows:
        steepest = float(slopes.max())
        lr = 1 / steepest if steepest > 0 else float("inf")
        return Smoothness(l0, l1, correlation, norms, slopes, lr, float("inf"), False)
    cover = float((slopes / (l0 + l1 * norms)).quantile(0.9))
    least = max(l0, float(slopes[slopes > 0].min()))  # there is one, as they grow
    return Smoothness(l0, l1, correlation, norms, slopes, 1 / (2 * cover * least), 1 / (2 * cover * l1), True)


def _apart(learner: MetaLearner) -> MetaLearner:
    """The same learner without its warm start, and with warnings of its own to use up."""
    other = copy.copy(learner)
    other.warm_start, other._told = None, Told()
    return other


def _walk(
    learner: MetaLearner,
    batch: Tasks | Sequence[Tasks],
    optimizer: torch.optim.Optimizer,
    parameters: list[nn.Parameter],
    steps: int,
) -> Iterator[tuple[float, float]]:
    """||∇F(x_k)|| and L_k of every step."""
    for index in range(steps):
        before = [parameter.detach().clone() for parameter in parameters]
        gradient = _gradient(learner, batch, parameters, index)
        optimizer.step()
        after = [parameter.detach().clone() for parameter in parameters]
        move = _flat([(new - old) / 2 for new, old in zip(after, before, strict=True)])
        if not bool(move.isfinite().all()) or not bool(move.any()):
            raise NonFiniteError(
                "the optimizer did not move the parameters to another finite point; does it hold the parameters of "
                "learner.model, and is its learning rate above zero?"
            )
        _set(parameters, [(old + new) / 2 for old, new in zip(before, after, strict=True)])
        change = _gradient(learner, batch, parameters, index) - gradient
        _set(parameters, after)
        yield float(gradient.norm()), float(change.norm() / move.norm())


def _gradient(
    learner: MetaLearner, batch: Tasks | Sequence[Tasks], parameters: list[nn.Parameter], seed: int
) -> Tensor:
    for parameter in parameters:
        parameter.grad = None
    seed_generators(seed, parameters[0].device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnsolvedWarning)
        warnings.simplefilter("ignore", NonFiniteWarning)
        learner.backward(batch)
    return _flat([torch.zeros_like(p) if p.grad is None else p.grad for p in parameters])


def _flat(leaves: list[Tensor]) -> Tensor:
    return torch.cat([leaf.detach().double().reshape(-1).cpu() for leaf in leaves])


def _set(parameters: list[nn.Parameter], values: list[Tensor]) -> None:
    with torch.no_grad():
        for parameter, value in zip(parameters, values, strict=True):
            parameter.copy_(value)


@contextmanager
def _restored(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> Iterator[None]:
    """Put parameters, their gradients, the optimizer's state and the random state back."""
    groups = [] if optimizer is None else optimizer.param_groups
    stepped = [parameter for group in groups for parameter in group["params"]]  # which may have been frozen since
    parameters = list(dict.fromkeys([*model.parameters(), *stepped]))
    values = [parameter.detach().clone() for parameter in parameters]
    gradients = [parameter.grad for parameter in parameters]
    state = None if optimizer is None else copy.deepcopy(optimizer.state_dict())
    try:
        with forked(parameters[0].device):
            yield
    finally:
        _set(parameters, values)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        if optimizer is not None and state is not None:
            optimizer.load_state_dict(state)
