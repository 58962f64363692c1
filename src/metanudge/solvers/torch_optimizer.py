"""Any ``torch.optim`` optimizer as an inner solver."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from metanudge.bundles import Bundles
from metanudge.energy import Energy
from metanudge.errors import SettingsError
from metanudge.settings import check_steps
from metanudge.solvers.loop import FixedSteps
from metanudge.types import Need, Params


class State(NamedTuple):
    """An optimizer in the middle of a solve.

    Attributes:
        optimizer: Made for this solve.
        phi: The live parameters it steps, as leaves.
        start: Where they stand at the first step; at θ itself less is to be computed.
    """

    optimizer: torch.optim.Optimizer
    phi: Bundles
    start: Params


@dataclass(frozen=True)
class TorchOptimizer(FixedSteps):
    """A real ``torch.optim`` optimizer, made afresh for every solve.

    Each step gives it the gradient of the energy in ``.grad`` and calls ``step()``. In-place execution only: an
    optimizer may mix its parameters (Muon, L-BFGS, clipping by global norm), so tasks cannot share one.
    The proximal term holds parameters at the initialisation: weight decay, which draws them to zero, makes it another
    inner problem than the one that is judged (``MetaStep.residual`` stays high), so leave it out.
    Cost: one gradient of the energy a step. Memory: phi and the optimizer's state.

    Args:
        factory: Makes the optimizer from a list of parameters, e.g. ``lambda p: torch.optim.AdamW(p, lr=1e-3)``.
        steps: Number of steps K >= 1.

    Raises:
        SettingsError: ``steps`` is not a whole number >= 1, ``factory`` is no function, or (at the first solve) the
            optimizer needs a closure.

    Example:
        >>> import torch, metanudge as mn
        >>> solver = mn.TorchOptimizer(lambda parameters: torch.optim.SGD(parameters, lr=0.1), steps=5)
    """

    needs: ClassVar[frozenset[Need]] = frozenset({Need.LIVE_MODULE})
    differentiable: ClassVar[bool] = False

    factory: Callable[[Iterable[Tensor]], torch.optim.Optimizer]
    steps: int

    def __post_init__(self) -> None:
        check_steps(self.steps)
        given: object = self.factory
        if isinstance(given, torch.optim.Optimizer):
            name = type(given).__name__
            raise SettingsError(
                "factory must be a function from parameters to a torch.optim optimizer, got an already constructed "
                f"{name}; give lambda p: torch.optim.{name}(p, ...)"
            )
        if not callable(self.factory):
            raise SettingsError(
                "factory must be a function from parameters to a torch.optim optimizer, such as "
                f"lambda p: torch.optim.AdamW(p, lr=1e-3), got {self.factory!r}"
            )

    def init(self, energy: Energy, start: Params, plan: None) -> State:
        """The module's parameters at ``start`` and a fresh optimizer on them."""
        phi = energy.losses.steppable(start)
        optimizer = self.factory(list(phi.parameters))
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise SettingsError(f"the factory of TorchOptimizer must return a torch.optim optimizer, got {optimizer!r}")
        if any(one.get("step", 1) != 0 for one in optimizer.state.values()):  # Adagrad's is there from the beginning
            raise SettingsError(
                "the factory of TorchOptimizer must make a fresh optimizer at every call, and gave one that has taken "
                f"steps; make it within: lambda p: torch.optim.{type(optimizer).__name__}(p, ...)"
            )
        if isinstance(optimizer, torch.optim.LBFGS):
            raise SettingsError(
                "TorchOptimizer cannot drive L-BFGS, which evaluates the loss on its own; "
                "use Nesterov, or another optimizer"
            )
        stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if stepped != {id(parameter) for parameter in phi.parameters}:
            raise SettingsError(
                "the factory of TorchOptimizer must put the parameters it is given, and no others, into its optimizer"
            )
        return State(optimizer, phi, start)

    def step(self, energy: Energy, plan: None, state: State, index: int, decision: None) -> tuple[State, None]:
        """One step of the optimizer."""
        at_start = state.phi.holds(state.start)
        gradient = energy.gradient(state.start if at_start else state.phi, index)
        state.phi.give(gradient)
        state.optimizer.step()
        for parameter in state.phi.parameters:
            parameter.grad = None
        return state, None

    def point(self, state: State) -> Params:
        """A copy of phi; the parameters themselves move on."""
        return state.phi.copied(lambda kind: kind)
