"""Finite-difference schemes as rows of a table."""

from __future__ import annotations

import math
from dataclasses import dataclass

from metanudge.errors import SettingsError
from metanudge.settings import check_steps


@dataclass(frozen=True)
class Stencil:
    r"""A rule for a first derivative at zero.

    .. math::
        h'(0) = \frac{1}{\nu} \sum_k w_k \, h(n_k \nu) + O(\nu^p), \qquad
        \sum_k w_k n_k^j = [j = 1] \text{ for } j = 0, \dots, p

    Args:
        nodes: Distinct numbers n_k, in units of ν.
        weights: As many weights w_k.
        order: The declared order p >= 1; checked against the moment conditions.

    Raises:
        SettingsError: Fewer than two nodes, equal nodes, or weights that do not have the declared order.

    Source: Fornberg, Mathematics of Computation 51 (1988).

    Example:
        >>> import metanudge as mn
        >>> mn.Stencil(nodes=(0, 1, 2), weights=(-1.5, 2, -0.5), order=2).order  # one-sided, second order
        2
    """

    nodes: tuple[float, ...]
    weights: tuple[float, ...]
    order: int

    @property
    def nearest(self) -> float:
        """Distance from 0 of the node nearest to it: the unit in which the stencil is written."""
        return min(abs(node) for node in self.nodes if node != 0)

    @property
    def values(self) -> tuple[float, ...]:
        """Lagrange's weights v_k of the value at zero: h(0) = Σ v_k h(n_k ν) + O(ν^N), N the number of nodes."""
        return tuple(math.prod(other / (other - node) for other in self.nodes if other != node) for node in self.nodes)

    def __post_init__(self) -> None:
        for name in ("nodes", "weights"):
            given = getattr(self, name)
            if not isinstance(given, tuple | list) or not all(type(number) in (int, float) for number in given):
                raise SettingsError(f"{name} must be a tuple of numbers, got {given!r}")
        object.__setattr__(self, "nodes", tuple(self.nodes))
        object.__setattr__(self, "weights", tuple(self.weights))
        if len(self.nodes) < 2 or len(set(self.nodes)) < len(self.nodes) or len(self.weights) != len(self.nodes):
            raise SettingsError(
                "a stencil needs at least two distinct nodes and as many weights, "
                f"got nodes {self.nodes} and weights {self.weights}"
            )
        if not all(math.isfinite(number) for number in (*self.nodes, *self.weights)):
            raise SettingsError(
                f"nodes and weights must be finite numbers, got nodes {self.nodes} and weights {self.weights}"
            )
        check_steps(self.order, "the order of a stencil")
        for power in range(self.order + 1):
            terms = [weight * node**power for node, weight in zip(self.nodes, self.weights, strict=True)]
            moment, wanted = math.fsum(terms), float(power == 1)
            if abs(moment - wanted) > 1e-9 * max(1.0, *map(abs, terms)):
                raise SettingsError(
                    f"these weights do not make a stencil of order {self.order}: sum of weight * node**{power} is "
                    f"{moment:.6g} and must be {wanted:.0f}"
                )


STENCILS: dict[str, Stencil] = {
    "forward": Stencil((0, 1), (-1, 1), 1),
    "symmetric": Stencil((-1, 1), (-1 / 2, 1 / 2), 2),
    "fourth_order": Stencil((-2, -1, 1, 2), (1 / 12, -2 / 3, 2 / 3, -1 / 12), 4),
}
"""The schemes by name. Adding one: a row here."""
