"""What is measured: every estimator on the same inner problem, and one ordinary training step."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import nn
from torch.utils._pytree import tree_map

import metanudge as mn
from metanudge.estimators.base import Estimator
from metanudge.experiments.study import COLOURS, LABELS
from metanudge.solvers import Solver
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


def sgd(steps: int) -> Solver:
    """torch.optim.SGD on the live parameters."""
    return mn.TorchOptimizer(lambda parameters: torch.optim.SGD(parameters, lr=LR), steps)


def descent(steps: int) -> Solver:
    """The same steps, out of tensor arithmetic that can be differentiated, or walked back."""
    return mn.GradientDescent(steps, lr=LR)


def meta_gradient(
    make: Callable[[], Estimator],
    solver: Callable[[int], Solver],
    execution: Literal["in_place", "vectorized"],
    inner: Inner,
    steps: int,
    *,
    cuda_graphs: bool = False,
) -> Act:
    """One meta-gradient through ``steps`` inner steps."""
    learner = mn.MetaLearner(
        inner.model,
        inner.loss,
        prox=PROX,
        solver=solver(steps),
        estimator=make(),
        execution=execution,
        cuda_graphs=cuda_graphs,
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


def _lean() -> Estimator:
    """The configuration with the fewest copies: the paper's nudge, and solves that all begin at the initialisation."""
    return mn.FOBMAML(nudge="full", start="initialization")


def _in_place(label: str, colour: str, make: Callable[[], Estimator], solver: Callable[[int], Solver]) -> Candidate:
    return Candidate(label, colour, "In place", partial(meta_gradient, make, solver, "in_place"))


def _vectorised(label: str, colour: str, make: Callable[[], Estimator], solver: Callable[[int], Solver]) -> Candidate:
    return Candidate(label, colour, "Vectorised", partial(meta_gradient, make, solver, "vectorized"))


CANDIDATES = {
    "plain": Candidate("one training step", "#999999", "Ordinary", training_step),
    "fobmaml": _in_place("FO-B-MAML", COLOURS["fobmaml_symmetric"], _lean, sgd),
    "fobmaml_graphs": Candidate(
        "FO-B-MAML, CUDA graphs",
        "#e69f00",
        "In place",
        partial(meta_gradient, _lean, sgd, "in_place", cuda_graphs=True),
    ),
    "fobmaml_default": _in_place("FO-B-MAML, default nudge", COLOURS["fobmaml_forward"], mn.FOBMAML, sgd),
    "fobmaml_vectorised": _vectorised(
        "FO-B-MAML, all defaults, vectorised", COLOURS["fobmaml_fourth_order"], mn.FOBMAML, mn.Nesterov
    ),
    "fomaml": _in_place(LABELS["fomaml"], COLOURS["fomaml"], mn.FOMAML, sgd),
    "reptile": _in_place(LABELS["reptile"], COLOURS["reptile"], mn.Reptile, sgd),
    "hfmaml": _in_place(LABELS["hfmaml"], COLOURS["hfmaml"], mn.HFMAML, descent),
    "imaml": _vectorised("iMAML (5 CG steps)", COLOURS["imaml"], partial(mn.IMAML, cg_steps=5), descent),
    "maml_checkpointed": _vectorised("MAML, checkpointed", "#8c6d31", partial(mn.MAML, checkpoint=True), descent),
    "maml": _vectorised(LABELS["maml"], COLOURS["maml"], mn.MAML, descent),
}
"""By the key of the metrics. On the same proximal problem, and all but one by the same steps of gradient descent."""

EVERYWHERE = tuple(name for name in CANDIDATES if name != "fobmaml_vectorised")
"""Those of every study; that one, whose stacks are no way to run a large model, is in the study of steps alone."""

ON_A_GPU = frozenset({"fobmaml_graphs"})
"""Those that need one."""

SECOND_ORDER = frozenset({"imaml", "maml_checkpointed", "maml"})
"""These differentiate twice, which fused attention kernels do not allow."""
