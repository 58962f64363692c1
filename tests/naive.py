"""Each paper's algorithm, slowly, in a few plain lines on one flat vector of one task.

A *solver* here is a function ``(gradient, start) -> [phi_0, ..., phi_K]`` of a gradient function; written without
detaching anything, so that autograd can be sent back through it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from problems import Task, hessian
from problems import slope as gradient_at

Gradient = Callable[[Tensor], Tensor]
Solver = Callable[[Gradient, Tensor], list[Tensor]]


# Solvers.


def gradient_descent(
    gradient: Gradient, start: Tensor, *, steps: int, lr: float, momentum: float = 0.0
) -> list[Tensor]:
    """v <- momentum v + g, phi <- phi - lr v."""
    path, velocity = [start], torch.zeros_like(start)
    for _ in range(steps):
        velocity = momentum * velocity + gradient(path[-1])
        path.append(path[-1] - lr * velocity)
    return path


def nesterov(
    gradient: Gradient, start: Tensor, *, steps: int, lr: float, momentum: float, restarts: list[bool] | None = None
) -> list[Tensor]:
    """x' = y - lr g(y), y' = x' + momentum (x' - x); no momentum where <g(y), x' - x> > 0.

    ``restarts``: filled on the first use, obeyed on the next ones (matched solves); None: never restart.
    """
    decide = restarts is not None and not restarts
    path, y = [start], start
    for k in range(steps):
        slope = gradient(y)
        path.append(y - lr * slope)
        move = path[-1] - path[-2]
        if decide:
            restarts.append(bool((slope * move).sum() > 0))
        dropped = restarts is not None and restarts[k]
        y = path[-1] if dropped else path[-1] + momentum * move
    return path


def adam(gradient: Gradient, start: Tensor, *, steps: int, lr: float) -> list[Tensor]:
    """Kingma & Ba, Algorithm 1, with their constants."""
    beta1, beta2, eps = 0.9, 0.999, 1e-8
    path, mean, square = [start], torch.zeros_like(start), torch.zeros_like(start)
    for t in range(1, steps + 1):
        slope = gradient(path[-1])
        mean = beta1 * mean + (1 - beta1) * slope
        square = beta2 * square + (1 - beta2) * slope**2
        path.append(path[-1] - lr * (mean / (1 - beta1**t)) / ((square / (1 - beta2**t)).sqrt() + eps))
    return path


# Estimators. theta: the initialisation; prox: the proximal weight.


def fobmaml(
    task: Task,
    theta: Tensor,
    prox: float,
    solver: Solver,
    *,
    nodes: tuple[float, ...],
    weights: tuple[float, ...],
    nu: float,
    nudge: str = "full",
    from_theta: bool = False,
) -> Tensor:
    """(1/nu) sum_k w_k prox (theta - phi(n_k nu)), every nudged solve begun at the free solution (or at theta)."""
    phi0 = solver(lambda phi: gradient_at(task.support, phi) + prox * (phi - theta), theta)[-1]
    constant = gradient_at(task.query, phi0)
    total = torch.zeros_like(theta)
    for node, weight in zip(nodes, weights, strict=True):

        def nudged(phi: Tensor, node: float = node) -> Tensor:
            push = constant if nudge == "linear" else gradient_at(task.query, phi)
            return gradient_at(task.support, phi) + node * nu * push + prox * (phi - theta)

        total += weight * prox * (theta - solver(nudged, theta if from_theta else phi0)[-1])
    return total / nu


def maml(task: Task, theta: Tensor, prox: float, solver: Solver) -> Tensor:
    """Autograd through the loop: grad_theta f(phi_K(theta))."""
    theta = theta.clone().requires_grad_()

    def gradient(phi: Tensor) -> Tensor:
        (found,) = torch.autograd.grad(task.support(phi), phi, create_graph=True)
        return found + prox * (phi - theta)

    phi = solver(gradient, theta)[-1]
    return torch.autograd.grad(task.query(phi), theta)[0]


def fomaml(task: Task, theta: Tensor, prox: float, solver: Solver) -> Tensor:
    """grad f(phi_K)."""
    return gradient_at(task.query, adapted(task, theta, prox, solver))


def reptile(task: Task, theta: Tensor, prox: float, solver: Solver) -> Tensor:
    """theta - phi_K."""
    return theta - adapted(task, theta, prox, solver)


def adapted(task: Task, theta: Tensor, prox: float, solver: Solver) -> Tensor:
    """phi_K."""
    return solver(lambda phi: gradient_at(task.support, phi) + prox * (phi - theta), theta)[-1]


def imaml(
    task: Task,
    theta: Tensor,
    prox: float,
    solver: Solver,
    *,
    cg_steps: int,
    tol: float = 0.0,
    stop_at_negative_curvature: bool = True,
) -> Tensor:
    """(I + H/prox) v = grad f(phi_K) by conjugate gradients (Hestenes & Stiefel), H dense."""
    phi = adapted(task, theta, prox, solver)
    matrix = torch.eye(len(phi), dtype=phi.dtype) + hessian(task.support, phi) / prox
    v = torch.zeros_like(phi)
    right = residual = direction = gradient_at(task.query, phi)
    for _ in range(cg_steps):
        bend = direction @ matrix @ direction
        if residual.norm() <= tol * right.norm() or (bend <= 0 and stop_at_negative_curvature):
            break
        alpha = (residual @ residual) / bend
        v = v + alpha * direction
        fresh = residual - alpha * matrix @ direction
        direction = fresh + (fresh @ fresh) / (residual @ residual) * direction
        residual = fresh
    return v


def hfmaml(
    task: Task, theta: Tensor, prox: float, *, steps: int, lr: float, momentum: float, displacement: float
) -> Tensor:
    """Walk the stored trajectory back, H v by a central difference of length ``displacement |phi|``.

    Forward: v' = momentum v + grad fhat(phi) + prox (phi - theta), phi' = phi - lr v'. Adjoints p of phi and q of v.
    """
    path = gradient_descent(
        lambda phi: gradient_at(task.support, phi) + prox * (phi - theta),
        theta,
        steps=steps,
        lr=lr,
        momentum=momentum,
    )
    p, q, total = gradient_at(task.query, path[-1]), torch.zeros_like(theta), torch.zeros_like(theta)
    for phi in reversed(path[:-1]):
        q = q - lr * p
        eps = displacement * phi.norm() / q.norm()
        ahead, behind = gradient_at(task.support, phi + eps * q), gradient_at(task.support, phi - eps * q)
        p = p + (ahead - behind) / (2 * eps) + prox * q
        total = total - prox * q
        q = momentum * q
    return total + p


def tangent(task: Task, theta: Tensor, prox: float, solver: Solver) -> Tensor:
    """-prox z, z by the solver on z -> (H + prox) z + grad f, both frozen at phi_K."""
    phi = adapted(task, theta, prox, solver)
    matrix, right = hessian(task.support, phi), gradient_at(task.query, phi)
    z = solver(lambda z: matrix @ z + right + prox * z, torch.zeros_like(phi))[-1]
    return -prox * z


def moving_tangent(
    task: Task, theta: Tensor, prox: float, *, steps: int, lr: float, momentum: float, nudge: str = "full"
) -> Tensor:
    """The derivative in nu of the nudged solve itself: it begins at phi_K and moves on, and H with it.

    phi' = phi - lr v', v' = momentum v + G(phi);   z' = z - lr u', u' = momentum u + (H(phi) + prox) z + grad f.
    """
    settings = {"steps": steps, "lr": lr, "momentum": momentum}
    free: Gradient = lambda phi: gradient_at(task.support, phi) + prox * (phi - theta)  # noqa: E731
    phi0 = gradient_descent(free, theta, **settings)[-1]
    z, u = torch.zeros_like(phi0), torch.zeros_like(phi0)
    for phi in gradient_descent(free, phi0, **settings)[:-1]:
        push = gradient_at(task.query, phi0 if nudge == "linear" else phi)
        u = momentum * u + hessian(task.support, phi) @ z + prox * z + push
        z = z - lr * u
    return -prox * z
