"""All that crosses a room's door, with its shape.

Lanes: the vectorised execution solves many inner problems at once. Every tensor of its mathematics carries two
leading *lane* axes ``[T, N]``: tasks, and the nodes of a finite-difference stencil (``N = 1`` away from it). The
in-place execution solves one problem at a time and has no lane axes. Below, ``[*L]`` stands for either.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import Enum
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from metanudge.errors import TasksError

PyTree: TypeAlias = Any
"""A tensor, or tuples, lists and dicts of tensors."""

Params: TypeAlias = dict[str, Tensor]
"""Leaves ``[*L, *shape]``, each one or several of the model's parameters (Packing, Bundles): keys need not be names."""

Named: TypeAlias = Callable[[Params], dict[str, Tensor]]
"""From leaves without lanes to views of them by parameter name."""

LossFunction: TypeAlias = Callable[[nn.Module, Any], Tensor]
"""``loss(model, batch)``: the scalar loss of one task's batch; a metric has the same form."""


class Batch(NamedTuple):
    """The examples of one task, ``[n, ...]``, or of a stack of tasks, ``[T, n, ...]``."""

    inputs: PyTree
    targets: PyTree

    def to(self, to: torch.device | str | torch.dtype) -> Batch:
        """The same on a device; or of a dtype, to which integers, such as class indices, are not cast."""
        return tree_map(partial(_moved, to), self)  # type: ignore[no-any-return]

    def __repr__(self) -> str:
        """What it holds, without the numbers."""
        return f"Batch(inputs={_shown(self.inputs)}, targets={_shown(self.targets)})"


class Tasks(NamedTuple):
    """One task or a stack of tasks: adapted on ``support``, judged on ``query``.

    Example:
        >>> import torch, metanudge as mn
        >>> x = torch.zeros(4, 10, 1)  # 4 tasks of 10 examples
        >>> tasks = mn.Tasks(support=mn.Batch(x, x), query=mn.Batch(x, x))
        >>> tasks.support.inputs.shape
        torch.Size([4, 10, 1])
    """

    support: Batch
    query: Batch

    def to(self, to: torch.device | str | torch.dtype) -> Tasks:
        """The same on a device; or of a dtype, to which integers, such as class indices, are not cast."""
        return tree_map(partial(_moved, to), self)  # type: ignore[no-any-return]

    def take(self, number: int) -> Tasks:
        """The first ``number`` tasks of a stack."""
        _number(self)
        return tree_map(lambda leaf: leaf[:number], self)  # type: ignore[no-any-return]

    def unstack(self) -> list[Tasks]:
        """The tasks of a stack, one by one, without the task axis: ``tasks.unstack()[3].support`` is for ``adapt``."""
        return [tree_map(lambda leaf, at=at: leaf[at], self) for at in range(_number(self))]


def _number(stack: Tasks) -> int:
    """How many tasks it holds."""
    sizes = {len(leaf) if isinstance(leaf, Tensor) and leaf.ndim else -1 for leaf in tree_leaves(stack)}
    if len(sizes) != 1 or -1 in sizes:
        raise TasksError("only a stack can be taken apart: tensors that all begin with the axis of tasks")
    return sizes.pop()


def _moved(to: torch.device | str | torch.dtype, leaf: Any) -> Any:
    whole = isinstance(to, torch.dtype) and isinstance(leaf, Tensor) and not leaf.is_floating_point()
    return leaf.to(to) if hasattr(leaf, "to") and not whole else leaf


def _shown(part: PyTree) -> str:
    try:
        return repr(tree_map(_Shown, part))
    except Exception:  # a container that looks at what it holds
        return repr(part)


class _Shown:
    """A tensor, as its type and shape; anything else as it is."""

    def __init__(self, leaf: object) -> None:
        self.leaf = leaf

    def __repr__(self) -> str:
        if not isinstance(self.leaf, Tensor):
            return repr(self.leaf)
        device = "" if self.leaf.device.type == "cpu" else f" on {self.leaf.device}"
        return f"{str(self.leaf.dtype).removeprefix('torch.')} {list(self.leaf.shape)}{device}"


class Role(Enum):
    """Which of a task's two losses is meant."""

    SUPPORT = 0
    QUERY = 1


Weights: TypeAlias = Mapping[Role, float | Tensor]
"""A weighted sum of a task's losses; a weight is a number, or one a lane, ``[*L]``."""


class Need(Enum):
    """What an estimator or a solver cannot do without; the learner checks it before any work. Reason and cure."""

    PROXIMAL_TERM = (
        "it rests on the proximal inner problem, and prox is 0",
        "Give prox > 0, or use MAML, HFMAML, FOMAML or Reptile, and a solver without tol.",
    )
    DIFFERENTIABLE_SOLVER = (
        "it differentiates through the solver's steps, which a torch.optim optimizer does not allow",
        "Use FOBMAML, or the solvers GradientDescent, Nesterov or Adam.",
    )
    DOUBLE_BACKWARD = (
        "it differentiates the loss twice, which neither the live module's .backward() of the in-place execution nor "
        "compiled gradients allow",
        'Use FOBMAML, which needs first derivatives only, products="two_gradient" for IMAML and Tangent, HFMAML in the '
        'place of MAML, or execution="vectorized" without compile, where vmap can run the model ("auto" goes in place '
        "where it cannot).",
    )
    LIVE_MODULE = (
        "it steps the parameters of the live module, which tasks cannot share in the vectorized execution",
        'Make the MetaLearner with this solver and execution="auto", which goes in place then, or with "in_place"; or '
        "use the solvers GradientDescent, Nesterov or Adam.",
    )
    START_AT_THETA = (
        "it differentiates the solver's way from the initialisation, and with a warm start solves begin elsewhere",
        "Use FOBMAML, IMAML or Tangent, which rest on the solution alone, or no warm start.",
    )
    NO_SHARED_PARAMETERS = (
        "it defines no gradient for trainable parameters that are not adapted",
        "Freeze them with requires_grad_(False), adapt them too, or use another estimator.",
    )
    QUERY_LOSS_AS_IT_IS = (
        "it nudges by the query loss itself, or ignores it, and sharpness_radius displaces that loss's gradient alone",
        'Give sharpness_radius=0, or use FOBMAML with nudge="linear" (its default) or any other estimator but Reptile.',
    )

    @property
    def reason(self) -> str:
        """Why it cannot work."""
        return self.value[0]

    @property
    def cure(self) -> str:
        """What would."""
        return self.value[1]


class Schedule(NamedTuple):
    """What a solver decided on the free problem and every nudged solve replays (theory: matched solves).

    Attributes:
        plan: What was measured once at the start; whatever the solver returns from ``plan``.
        decisions: One entry per step taken: whatever the solver decided there, or None.
    """

    plan: Any
    decisions: list[Any]


class Solution(NamedTuple):
    """An (approximately) solved inner problem.

    Attributes:
        params: The last iterate, ``[*L, *shape]``.
        schedule: What a matched solve has to repeat.
    """

    params: Params
    schedule: Schedule


class Estimate(NamedTuple):
    """Meta-gradients of the problems in the lanes; nothing is averaged yet.

    Attributes:
        gradient: Meta-gradient of every meta-parameter, ``[*L, *shape]``.
        query_loss: f(phi), ``[*L]``.
        support_loss: fhat(phi), ``[*L]``.
        residual: Relative inner residual (see ``energy.Balance``), ``[*L]``, in [0, 1].
        nu: The nudge used, ``[*L]``; zero for estimators without one.
        error: Bound (f̂ convex) or estimate of ||g - ∇F|| in the adapted parameters, ``[*L]``; NaN without one.
        size: Norm of ``gradient`` in the adapted parameters, ``[*L]``.
        slope: Norm of ∇f(phi) in the adapted parameters, ``[*L]``.
        noise: What round-off of the solutions may add to ``size``, ``[*L]``.
        diverged: Whether the free solve ended above where it began, or a nudged one went far off, ``[*L]``.
        begun: Whether f̂(θ) is finite, ``[*L]``.
        solution: φ(0), ``[*L, *shape]``; empty where it was not needed to the end.
    """

    gradient: Params
    query_loss: Tensor
    support_loss: Tensor
    residual: Tensor
    nu: Tensor
    error: Tensor
    size: Tensor
    slope: Tensor
    noise: Tensor
    diverged: Tensor
    begun: Tensor
    solution: Params


class MetaStep(NamedTuple):
    """What one ``MetaLearner.backward`` did. Means are over the tasks that were kept.

    Attributes:
        query_loss: Mean query loss after adaptation: the meta-objective F.
        support_loss: Mean support loss after adaptation.
        residual: Mean relative inner residual in [0, 1]: 0 solved, 1 not begun; NaN where prox is 0.
        error_bound: A task's error ||g - ∇F|| relative to ||g||, means over tasks of both, in the adapted parameters:
            0.1 is 10 %. A bound where the support loss is convex (tested on random problems, steep ones included,
            not proved: results/solves, *certificate*); elsewhere, as on networks, an estimate, seen up to a factor 2
            too small. Wide where the solves are not done (docs/theory.md). From 1 on the error may be any multiple of
            ∇F (18 was seen at 3.5, shared parameters included, with curvature -.49 near ``prox`` .5, and no alarm):
            ``mn.check`` finds that. With a ``sharpness_radius``, of the query gradients where they were taken. NaN for
            all but FO-B-MAML with its linear nudge.
        amplified_tasks: Tasks whose meta-gradient is longer than their query gradient. Where the inner problem is
            convex that cannot be: ``prox`` is too small, or their nudged solves diverge.
        nu: Mean nudge (0 for estimators without one).
        gradient_norm: Euclidean norm of the mean meta-gradient that was added to ``.grad``.
        dropped_tasks: Tasks left out because their solve diverged, or their loss or meta-gradient was not finite.
        gradient_evaluations: Gradients of one loss of one task; a Hessian product counts 2, a step that is
            backpropagated through counts 3.
        query_losses: After adaptation, of every task in the order given; NaN for those left out. With a process group,
            of this process's tasks.
    """

    query_loss: float
    support_loss: float
    residual: float
    error_bound: float
    amplified_tasks: int
    nu: float
    gradient_norm: float
    dropped_tasks: int
    gradient_evaluations: int
    query_losses: tuple[float, ...] = ()

    def __repr__(self) -> str:
        """On one line, without the single tasks."""
        numbers = {name: value for name, value in self._asdict().items() if name != "query_losses"}
        told = (f"{name}={value if isinstance(value, int) else f'{value:.4g}'}" for name, value in numbers.items())
        return f"MetaStep({', '.join(told)})"


class Evaluation(NamedTuple):
    """A metric on adapted models, over tasks.

    Attributes:
        mean: Mean over tasks after the last adaptation step.
        ci95: Half-width of its 95 % confidence interval, 1.96 s / sqrt(T).
        curve: Mean after 0, 1, ..., K adaptation steps, ``[K + 1]``.
        curve_ci95: Half-widths of their 95 % intervals, ``[K + 1]``.
        values: The metric of every task after every step, ``[T, K + 1]``.
        metric: What was measured, in words.
    """

    mean: float
    ci95: float
    curve: Tensor
    curve_ci95: Tensor
    values: Tensor
    metric: str = "query loss"

    def __repr__(self) -> str:
        """On one line, without the tables."""
        tasks, points = self.values.shape
        return f"Evaluation({self.metric} {self.mean:.4g} ± {self.ci95:.2g}, tasks={tasks}, steps={points - 1})"
