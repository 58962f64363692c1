"""Exact or two-gradient Hessian products, as the estimators that need them choose."""

from __future__ import annotations

from typing import Literal, TypeAlias

from metanudge import tree
from metanudge.curvature import displacement_of, two_gradient_product
from metanudge.energy import InnerProblem
from metanudge.errors import SettingsError
from metanudge.estimators.base import FreeSolve
from metanudge.losses import HessianProduct
from metanudge.settings import check_positive
from metanudge.types import Need, Params

Products: TypeAlias = Literal["exact", "two_gradient"]


def check_products(products: str, displacement: float | None) -> None:
    """Raise a SettingsError for a name that is neither, or a displacement that is not positive or has no use."""
    if products not in ("exact", "two_gradient"):
        raise SettingsError(f'products must be "exact" or "two_gradient", got {products!r}')
    if displacement is not None:
        check_positive(displacement=displacement)
        if products == "exact":
            raise SettingsError(
                f"displacement={displacement!r} belongs to two-gradient products, and exact ones have none; give "
                'products="two_gradient", or leave it out'
            )


def needs_of(products: Products) -> frozenset[Need]:
    """What the choice asks of the execution, beside the proximal problem."""
    return frozenset({Need.PROXIMAL_TERM} | ({Need.DOUBLE_BACKWARD} if products == "exact" else set()))


def implicit_system(problem: InnerProblem, product: HessianProduct) -> HessianProduct:
    """``v -> (I + H / λ) v``."""

    def system(vector: Params) -> Params:
        image = product(vector)
        return tree.tree_map(lambda v, h: v + h / problem.prox, vector, {name: image[name] for name in vector})

    return system


def with_shared(problem: InnerProblem, free: FreeSolve, product: HessianProduct, v: Params) -> Params:
    """∇F in all parameters, from v = ∇F in θ: for shared ones ∂f/∂w - 1/λ ∂w ∂φ f̂ v, by one product more."""
    if not problem.losses.shared:
        return v
    image = product(v)
    shared = {name: image[name] for name in problem.losses.shared}
    return v | tree.axpy(-1 / problem.prox, shared, free.direct(problem))


def hessian_product(
    problem: InnerProblem, free: FreeSolve, products: Products, displacement: float | None
) -> HessianProduct:
    """Products with the Hessian of the support loss at the free solution.

    Raises:
        SettingsError: It comes in minibatches, and has another Hessian in each.
    """
    if problem.sampled:
        raise SettingsError(
            "IMAML and Tangent take products with the Hessian of one support loss, of which mn.Minibatches show "
            "another part at every step; use FOBMAML or HFMAML, or give the support set as one mn.Batch, with "
            "microbatch= where it does not fit at once"
        )
    if products == "exact":
        return problem.losses.hessian_product(free.phi, free.step)
    size = displacement_of(problem, displacement)
    return two_gradient_product(problem.losses, free.phi, free.step, free.length(problem), size)
