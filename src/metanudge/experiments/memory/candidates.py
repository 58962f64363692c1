"""What is measured: every estimator on the same inner problem, and one ordinary training step."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import nn
from torch.utils._pytree import tree_map

import metanudge as mn
from metanudge.estimators.base import Estimator
from metanudge.experiments.study import COLOURS, LABELS
from metanudge.types import LossFunction


class Inner(NamedTuple):
    """A model, its loss, and a stack of one task.

    Attributes:
        model: Its trainable parameters are the adapted ones.
        loss: As for ``MetaLearner``.
        tasks: Support and query of the same size.
    """

    model: nn.Module
    loss: LossFunction
    tasks: mn.Tasks

    @property
    def support(self) -> mn.Batch:
        """The task's support examples, without the task axis."""
        batch: mn.Batch = tree_map(lambda leaf: leaf[0], self.tasks.support)
        return batch

    @property
    def parameter_bytes(self) -> int:
        """One copy of the adapted parameters."""
        return sum(leaf.numel() * leaf.element_size() for leaf in self.model.parameters() if leaf.requires_grad)

    def to(self, device: str) -> Inner:
        """On another device."""
        return self._replace(model=self.model.to(device), tasks=tree_map(lambda leaf: leaf.to(device), self.tasks))


PROX = 1.0
LR = 1e-3

Act = Callable[[], int]
"""Do it once, and return the gradients evaluated."""


def forward_backward(inner: Inner) -> None:
    """One gradient of the loss, as in an ordinary training loop."""
    inner.model.zero_grad()
    inner.loss(inner.model, inner.support).backward()  # type: ignore[no-untyped-call]


def training_step(inner: Inner, _: int) -> Act:
    """One step of SGD on the support examples, whatever the inner steps."""
    optimizer = torch.optim.SGD([leaf for leaf in inner.model.parameters() if leaf.requires_grad], lr=LR)

    def act() -> int:
        forward_backward(inner)
        optimizer.step()
        return 1

    return act


def meta_gradient(make: Callable[[], Estimator], in_place: bool, live_optimizer: bool, inner: Inner, steps: int) -> Act:
    """One meta-gradient through ``steps`` inner steps of gradient descent."""
    solver = (
        mn.TorchOptimizer(lambda parameters: torch.optim.SGD(parameters, lr=LR), steps)
        if live_optimizer
        else mn.GradientDescent(steps, lr=LR)
    )
    learner = mn.MetaLearner(
        inner.model,
        inner.loss,
        prox=PROX,
        solver=solver,
        estimator=make(),
        execution="in_place" if in_place else "vectorized",
    )

    def act() -> int:
        inner.model.zero_grad()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", mn.UnsolvedWarning)  # the steps are there to be measured, not to solve
            return learner.backward(inner.tasks).gradient_evaluations

    return act


class Candidate(NamedTuple):
    """One line of the figures.

    Attributes:
        label: In the legend.
        colour: Of the line.
        execution: How it runs, for the caption.
        prepare: From the inner problem and the number of inner steps to what is measured.
    """

    label: str
    colour: str
    execution: str
    prepare: Callable[[Inner, int], Act]


def _live(name: str, label: str, make: Callable[[], Estimator]) -> Candidate:
    """In place, stepped by torch.optim.SGD."""
    return Candidate(label, COLOURS[name], "in place", partial(meta_gradient, make, True, True))


def _lean() -> Estimator:
    """The configuration with the fewest copies: the paper's nudge, and solves that all begin at the initialisation."""
    return mn.FOBMAML(nudge="full", start="initialization")


CANDIDATES = {
    "plain": Candidate("one training step", "#999999", "ordinary", training_step),
    "fobmaml": _live("fobmaml_symmetric", "FO-B-MAML", _lean),
    "fobmaml_default": _live("fobmaml_forward", "FO-B-MAML (default)", mn.FOBMAML),
    "fomaml": _live("fomaml", LABELS["fomaml"], mn.FOMAML),
    "reptile": _live("reptile", LABELS["reptile"], mn.Reptile),
    # in place too, but walks back through plain gradient descent: the same steps, and no optimizer
    "hfmaml": Candidate(
        LABELS["hfmaml"], COLOURS["hfmaml"], "in place", partial(meta_gradient, mn.HFMAML, True, False)
    ),
    "imaml": Candidate(
        "iMAML (5 CG steps)",
        COLOURS["imaml"],
        "vectorised",
        partial(meta_gradient, partial(mn.IMAML, cg_steps=5), False, False),
    ),
    "maml_checkpointed": Candidate(
        "MAML, checkpointed",
        "#8c6d31",
        "vectorised",
        partial(meta_gradient, partial(mn.MAML, checkpoint=True), False, False),
    ),
    "maml": Candidate(LABELS["maml"], COLOURS["maml"], "vectorised", partial(meta_gradient, mn.MAML, False, False)),
}
"""By the key of the metrics. All take the same steps of gradient descent on the same proximal problem."""

SECOND_ORDER = frozenset({"imaml", "maml_checkpointed", "maml"})
"""These differentiate twice, which fused attention kernels do not allow."""
