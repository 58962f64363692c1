"""Gradient descent with heavy-ball momentum."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar, NamedTuple

from metanudge import tree
from metanudge.energy import Energy
from metanudge.settings import check_fraction, check_positive, check_steps
from metanudge.solvers.loop import FixedSteps
from metanudge.types import Need, Params


class State(NamedTuple):
    """Iterate and velocity, None without momentum."""

    phi: Params
    velocity: Params | None


@dataclass(frozen=True)
class GradientDescent(FixedSteps):
    r"""Gradient descent, with momentum as in ``torch.optim.SGD``.

    .. math::
        v_{k+1} = \mu v_k + \nabla E(\phi_k), \qquad \phi_{k+1} = \phi_k - a\, v_{k+1}, \qquad v_0 = 0

    Converges when a (L + λ) < 2 (1 + μ), L the Lipschitz constant of the support gradient.
    Cost: one gradient of the energy a step. Memory: phi and one copy (two with momentum).

    Args:
        steps: Number of steps K >= 1.
        lr: Step size a > 0.
        momentum: μ in [0, 1).

    Raises:
        SettingsError: A value out of its range.

    Example:
        >>> import metanudge as mn
        >>> mn.GradientDescent(steps=5, lr=0.1)
        GradientDescent(steps=5, lr=0.1, momentum=0.0)
    """

    needs: ClassVar[frozenset[Need]] = frozenset()
    differentiable: ClassVar[bool] = True

    steps: int
    lr: float
    momentum: float = 0.0

    def __post_init__(self) -> None:
        check_steps(self.steps)
        check_positive(lr=self.lr)
        check_fraction(momentum=self.momentum)

    def init(self, energy: Energy, start: Params, plan: None) -> State:
        """Begin at rest."""
        return State(start, tree.zeros(start) if self.momentum else None)

    def step(self, energy: Energy, plan: None, state: State, index: int, decision: None) -> tuple[State, None]:
        """Follow the velocity."""
        move = partial(self._move, index)
        if type(self) is not GradientDescent:  # which may read more than a program should freeze
            return move(energy, state), None
        return energy.fused((GradientDescent, self.lr, self.momentum), move, state), None

    def _move(self, index: int, energy: Energy, state: State) -> State:
        velocity = energy.gradient(state.phi, index)
        if state.velocity is not None:
            velocity = tree.axpy(self.momentum, state.velocity, velocity)
        kept = dict(velocity) if self.momentum else None
        return State(tree.spend(lambda v, p: p.add(v, alpha=-self.lr), velocity, state.phi), kept)

    def point(self, state: State) -> Params:
        """Phi."""
        return state.phi
