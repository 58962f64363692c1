"""Limited-memory BFGS."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from metanudge import tree
from metanudge.energy import Energy
from metanudge.experiments.solves.alternatives.common import Alternative, safe_lr
from metanudge.types import Params, Schedule


class Pair(NamedTuple):
    """A step s, the change y of the gradient along it, and 1 / <s, y>; all zero in lanes without a useful one."""

    s: Params
    y: Params
    rho: Tensor


class Memory(NamedTuple):
    """The inverse Hessian as L-BFGS knows it: the last pairs on top of a multiple of the identity."""

    pairs: list[Pair]
    initial: Tensor

    def times(self, energy: Energy, vector: Params) -> Params:
        """The two-loop recursion."""
        inner, weights = energy.losses.inner, []
        for pair in reversed(self.pairs):
            weights.append(pair.rho * inner(pair.s, vector))
            vector = tree.axpy(-weights[-1], pair.y, vector)
        vector = tree.scale(self.initial, vector)
        for pair, weight in zip(self.pairs, reversed(weights), strict=True):
            vector = tree.axpy(weight - pair.rho * inner(pair.y, vector), pair.s, vector)
        return vector


class Trust(NamedTuple):
    """A trial point; then, None before the first step: the point it was tried from, its gradient, and what is known."""

    phi: Params
    anchor: Params | None
    slope: Params | None
    memory: Memory | None
    radius: Tensor | None


@dataclass(frozen=True)
class LBFGS(Alternative):
    r"""Limited-memory BFGS with unit steps and, for want of a line search in step with all tasks, three guards.

    A pair enters the memory where <s, y> > λ/10 ||s||^2: the curvature of a convex problem is at least λ. A step is no
    longer than ||g|| / λ, which a convex problem's distance to its solution is not. Where ||g|| more than doubles, the
    step is taken back and the next one is at most a quarter as long.

    Args:
        steps: Number of steps.
        memory: Pairs kept.
        frozen: Let nudged solves keep the free solve's last memory, as a constant preconditioner of plain steps; that
            makes them the same affine map, as matched solves have to be.

    Source: Liu & Nocedal, Math. Program. 45 (1989); the test of a pair: Li & Fukushima, SIAM J. Optim. 11 (2001).
    """

    memory: int = 8
    frozen: bool = False

    def init(self, energy: Energy, start: Params, plan: Tensor) -> Trust:
        """Know nothing."""
        return Trust(start, None, None, None, None)

    def step(
        self, energy: Energy, plan: Tensor, state: Trust, index: int, decision: Memory | None
    ) -> tuple[Trust, Memory | None]:
        """Judge the trial point, learn from it, and try the next."""
        gradient = energy.gradient(state.phi, index)
        if decision is not None:
            phi = tree.subtract(state.phi, decision.times(energy, gradient))
            return Trust(phi, None, None, None, None), decision
        anchor, slope, memory, radius = self._learn(energy, plan, state, gradient)
        direction = memory.times(energy, slope)
        longest = torch.minimum(radius, energy.norm(slope) / energy.prox)
        share = (longest / energy.norm(direction).clamp_min(1e-30)).clamp_max(1.0)
        phi = tree.axpy(-share, direction, anchor)
        return Trust(phi, anchor, slope, memory, radius), memory if self.frozen else None

    def _learn(
        self, energy: Energy, plan: Tensor, state: Trust, gradient: Params
    ) -> tuple[Params, Params, Memory, Tensor]:
        if state.anchor is None or state.slope is None or state.memory is None or state.radius is None:
            safe = safe_lr(energy, plan)
            return state.phi, gradient, Memory([], safe), torch.full_like(safe, torch.inf)
        s, y = tree.subtract(state.phi, state.anchor), tree.subtract(gradient, state.slope)
        ss, sy, yy = (energy.losses.inner(*pair) for pair in ((s, s), (s, y), (y, y)))
        told = sy > 0.1 * energy.prox * ss  # false where anything is not finite
        none, one = tree.zeros(s), torch.ones_like(sy)
        sy, yy = torch.where(told, sy, one), torch.where(told, yy, one)
        pair = Pair(tree.select(told, s, none), tree.select(told, y, none), torch.where(told, 1 / sy, 0 * one))
        memory = Memory([*state.memory.pairs, pair][-self.memory :], torch.where(told, sy / yy, state.memory.initial))
        kept = energy.norm(gradient) <= 2 * energy.norm(state.slope)
        anchor, slope = tree.select(kept, state.phi, state.anchor), tree.select(kept, gradient, state.slope)
        return anchor, slope, memory, torch.where(kept, 2 * state.radius, ss.sqrt() / 4)

    def settle(self, schedule: Schedule, steps: int) -> Schedule:
        """Frozen: the last memory in every step."""
        return schedule._replace(decisions=[schedule.decisions[-1]] * steps)
