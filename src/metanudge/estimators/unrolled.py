"""Meta-gradients through the solver's own steps: MAML, and HF-MAML with Hessian products from two gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from metanudge import tree
from metanudge.energy import Energy, InnerProblem
from metanudge.estimators.base import FreeSolve, judge
from metanudge.losses import InnerGradients
from metanudge.solvers.loop import Solver, advance
from metanudge.types import Estimate, Params, Schedule


def unroll(
    problem: InnerProblem,
    solver: Solver,
    attach: Callable[[Params], InnerGradients],
    segments: int = 1,
    backward: int = 0,
) -> Estimate:
    r"""Differentiate f(φ_K(θ, w), w) through the K steps of the solver.

    Step sizes, restarts and stops count as constants. The query gradient is taken first and then pulled back:
    ∇_θ F = (dφ_K/dθ)ᵀ ∇f(φ_K), so the query loss itself is differentiated once.

    The steps are cut into segments. All but the last are first run without a graph; then, from the last to the first,
    each is run with one and its cotangents are pulled back to the state it began with. (torch.utils.checkpoint would
    recompute a segment for every gradient inside it: those gradients are themselves backward passes.)

    Args:
        problem: The task: the same losses, unattached.
        solver: Any whose steps autograd can follow.
        attach: Makes, of the leaves w, support gradients that are attached to the graph of φ and of w.
        segments: How many; 1 keeps the graph of all steps at once.
        backward: Gradients that the backward pass of a step counts as, where those that are attached do not count them.
    """
    theta, shared = (_leaves(problem, params) for params in (problem.theta, problem.losses.shared))
    attached, plain = Energy(attach(shared), theta, problem.prox), problem.energy()
    schedule = Schedule(solver.plan(plain, tree.detach(theta)), [])

    def run(energy: Energy, centre: Params, state: Any, part: range) -> Any:
        begun = solver.init(energy, centre, schedule.plan) if state is None else state
        return advance(solver, energy, schedule, begun, part)

    size = math.ceil(solver.steps / segments)
    parts = [range(first, min(first + size, solver.steps)) for first in range(0, solver.steps, size)]
    beginnings: list[Any] = [None]
    for part in parts[:-1]:
        beginnings.append(run(plain, tree.detach(theta), beginnings[-1], part))

    wanted = theta | shared
    gradient = tree.zeros(wanted)
    free: FreeSolve | None = None
    cotangents: list[Tensor] = []
    for part, beginning in zip(reversed(parts), reversed(beginnings), strict=True):
        leaves, form = tree_flatten(beginning)
        leaves = [leaf.detach().requires_grad_() if _moves(leaf) else leaf for leaf in leaves]
        with torch.enable_grad():
            end = run(attached, theta, tree_unflatten(leaves, form), part)
        if free is None:
            phi = solver.point(end)
            free = judge(problem, tree.detach(phi), schedule, solver.steps)
            ends, cotangents = list(phi.values()), list(free.slope.values())
        else:
            ends = [leaf for leaf in tree_flatten(end)[0] if _moves(leaf)]
        inputs = [*wanted.values(), *filter(_moves, leaves)]
        pulled = _pull_back(ends, inputs, cotangents)
        gradient = tree.add(gradient, dict(zip(wanted, pulled, strict=False)))
        cotangents = pulled[len(wanted) :]
    assert free is not None
    problem.losses.count(backward * len(schedule.decisions))  # those taken: a solver may stop early
    gradient |= {name: gradient[name] + leaf for name, leaf in free.direct(problem).items()}
    return free.estimate(problem, gradient)


def _leaves(problem: InnerProblem, params: Params) -> Params:
    """Copies of meta-parameters, one a task, to differentiate with respect to."""
    return tree.tree_map(lambda leaf: leaf.detach().clone().requires_grad_(), problem.losses.spread(params))


def _moves(leaf: Any) -> bool:
    """Whether a leaf of a solver's state is a number that depends on θ (not a mask, not None)."""
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def _pull_back(ends: list[Tensor], inputs: list[Tensor], cotangents: list[Tensor]) -> list[Tensor]:
    """(d ends / d inputs)ᵀ cotangents; ends that depend on no input contribute nothing."""
    pairs = [(end, cotangent) for end, cotangent in zip(ends, cotangents, strict=True) if end.requires_grad]
    return list(
        torch.autograd.grad(
            [end for end, _ in pairs],
            inputs,
            grad_outputs=[cotangent for _, cotangent in pairs],
            allow_unused=True,
            materialize_grads=True,
        )
    )
