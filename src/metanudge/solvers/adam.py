"""Adam on the inner problem."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from torch import Tensor

from metanudge import tree
from metanudge.energy import Energy
from metanudge.errors import SettingsError
from metanudge.settings import check_fraction, check_positive, check_steps
from metanudge.solvers.loop import FixedSteps
from metanudge.types import Need, Params


class State(NamedTuple):
    """Iterate and exponential means of the gradient and of its square."""

    phi: Params
    mean: Params
    square: Params


@dataclass(frozen=True)
class Adam(FixedSteps):
    r"""Adam, as in ``torch.optim.Adam``, from a fresh state.

    .. math::
        m_{k+1} &= \beta_1 m_k + (1 - \beta_1) g_k, \qquad s_{k+1} = \beta_2 s_k + (1 - \beta_2) g_k^2 \\
        \phi_{k+1} &= \phi_k - a \, \frac{m_{k+1} / (1 - \beta_1^{k+1})}
                      {\sqrt{s_{k+1} / (1 - \beta_2^{k+1})} + \epsilon}, \qquad g_k = \nabla E(\phi_k)

    Its first steps have length a whatever the gradient, so near a solution it needs a small ``lr``: a nudged solve
    that starts at the free solution is first thrown off by it. Prefer ``Nesterov`` where it works.
    Cost: one gradient of the energy a step. Memory: phi and three copies.

    Args:
        steps: Number of steps K >= 1.
        lr: Step size a > 0.
        betas: Decay of the two means, each in [0, 1).
        eps: Added to the root, > 0.

    Raises:
        SettingsError: A value out of its range.

    Source: Kingma & Ba, ICLR 2015.

    Example:
        >>> import metanudge as mn
        >>> mn.Adam(steps=20, lr=1e-2).betas
        (0.9, 0.999)
    """

    needs: ClassVar[frozenset[Need]] = frozenset()
    differentiable: ClassVar[bool] = True

    steps: int
    lr: float
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def __post_init__(self) -> None:
        check_steps(self.steps)
        check_positive(lr=self.lr, eps=self.eps)
        if not isinstance(self.betas, tuple | list) or len(self.betas) != 2:
            raise SettingsError(f"betas must be two numbers in [0, 1), got {self.betas!r}")
        object.__setattr__(self, "betas", tuple(self.betas))  # a list is what JSON makes of them
        check_fraction(beta1=self.betas[0], beta2=self.betas[1])

    def init(self, energy: Energy, start: Params, plan: None) -> State:
        """Both means at zero."""
        return State(start, tree.zeros(start), tree.zeros(start))

    def step(self, energy: Energy, plan: None, state: State, index: int, decision: None) -> tuple[State, None]:
        """One Adam step."""
        beta1, beta2 = self.betas
        gradient = energy.gradient(state.phi, index)
        mean = tree.axpy(1 - beta1, gradient, tree.scale(beta1, state.mean))
        square = tree.axpy(1 - beta2, tree.tree_map(lambda g: g * g, gradient), tree.scale(beta2, state.square))
        unbias1, unbias2 = 1 - beta1 ** (index + 1), 1 - beta2 ** (index + 1)
        phi = tree.tree_map(
            lambda p, m, s: p - self.lr * (m / unbias1) / (_safe_sqrt(s / unbias2) + self.eps), state.phi, mean, square
        )
        return State(phi, mean, square), None

    def point(self, state: State) -> Params:
        """Phi."""
        return state.phi


def _safe_sqrt(square: Tensor) -> Tensor:
    """Root whose derivative at zero is zero: a parameter without gradient must not give NaN when unrolled."""
    positive = square > 0
    return square.where(positive, 1.0).sqrt().where(positive, 0.0)
