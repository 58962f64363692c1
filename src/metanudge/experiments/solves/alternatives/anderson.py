"""Anderson's mixing."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from metanudge import tree
from metanudge.energy import Energy
from metanudge.experiments.solves.alternatives.common import Alternative, safe_lr
from metanudge.types import Params


class History(NamedTuple):
    """An iterate, and the last iterates with their safe steps -g / L'."""

    phi: Params
    past: list[tuple[Params, Params]]


@dataclass(frozen=True)
class Anderson(Alternative):
    r"""Anderson's mixing of the last iterates of gradient descent, r = -g / L'.

    .. math::
        \phi_{k+1} = \phi_k + r_k - (\Delta \Phi + \Delta R) \gamma, \qquad
        \gamma = \arg\min \|r_k - \Delta R \gamma\|^2 + \rho \, \mathrm{tr}(\Delta R^\top \Delta R) \|\gamma\|^2

    ρ = 10 unit round-offs: what the Gram matrix can tell.

    Source: Anderson, J. ACM 12 (1965); Walker & Ni, SIAM J. Numer. Anal. 49 (2011).
    """

    memory: int = 5

    def init(self, energy: Energy, start: Params, plan: Tensor) -> History:
        """Nothing to mix."""
        return History(start, [])

    def step(self, energy: Energy, plan: Tensor, state: History, index: int, decision: None) -> tuple[History, None]:
        """Mix."""
        move = tree.scale(-safe_lr(energy, plan), energy.gradient(state.phi, index))
        past = [*state.past, (state.phi, move)][-self.memory - 1 :]
        phi = tree.add(state.phi, move)
        ways = [(tree.subtract(b[0], a[0]), tree.subtract(b[1], a[1])) for a, b in pairwise(past)]
        if ways:
            weights = self._weights(energy, [change for _, change in ways], move)
            for weight, (way, change) in zip(weights.unbind(-1), ways, strict=True):
                phi = tree.axpy(-weight, tree.add(way, change), phi)
        return History(phi, past), None

    def _weights(self, energy: Energy, changes: list[Params], move: Params) -> Tensor:
        """γ, ``[*L, m]``."""
        inner = energy.losses.inner
        gram = torch.stack([torch.stack([inner(a, b) for b in changes], -1) for a in changes], -2)
        right = torch.stack([inner(a, move) for a in changes], -1)
        unit = 10 * torch.finfo(gram.dtype).eps
        trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None].clamp_min(1e-30)
        matrix = (gram / trace[..., None]).double() + unit * torch.eye(len(changes), dtype=torch.float64)
        solved: Tensor = torch.linalg.solve_ex(matrix, (right / trace).double()[..., None])[0]
        return solved[..., 0]
