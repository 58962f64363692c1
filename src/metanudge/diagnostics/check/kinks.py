"""Whether a loss has kinks."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from metanudge.diagnostics.check.bench import Bench, quiet
from metanudge.types import Role


def kinked(bench: Bench) -> bool:
    """Whether second differences of the support gradient shrink with the displacement, not with its square.

    Along a few lines through the parameters: g(θ + h v) - 2 g(θ) + g(θ - h v) is O(h²) where the loss is three
    times differentiable, and O(1) or O(h) across kinks.
    """
    model, tasks = bench.double or (bench.model, bench.tasks)
    model = copy.deepcopy(model)  # a forward pass may write buffers
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    start = {name: parameter.detach().clone() for name, parameter in named.items()}
    size = torch.stack([value.double().square().sum() for value in start.values()]).sum().sqrt()
    generator = torch.Generator().manual_seed(0)
    falls = []

    def gradient() -> Tensor:
        with quiet(bench.device), torch.enable_grad():
            loss = bench.learner.losses[Role.SUPPORT](model, task.support)
        found = torch.autograd.grad(loss, list(named.values()), allow_unused=True, materialize_grads=True)
        return torch.cat([leaf.reshape(-1).double() for leaf in found])

    for task in tasks:  # noqa: B007, gradient() reads it
        drawn = {name: torch.randn(value.shape, generator=generator, device="cpu") for name, value in start.items()}
        length = torch.stack([value.double().square().sum() for value in drawn.values()]).sum().sqrt()

        def at(distance: float, drawn: dict[str, Tensor] = drawn, length: Tensor = length) -> Tensor:
            with torch.no_grad():
                for name, parameter in named.items():
                    step = (distance * (1 + float(size)) / float(length)) * drawn[name].to(parameter)
                    parameter.copy_(start[name] + step)
            return gradient()

        middle = at(0.0)
        around = [(at(h), at(-h)) for h in (0.02, 0.01, 0.005)]
        bends = [float((ahead - 2 * middle + behind).norm()) for ahead, behind in around]
        # of the size of the gradients that are subtracted: that in the middle may vanish
        noise = 100 * torch.finfo(next(iter(start.values())).dtype).eps * float(around[0][0].norm() + middle.norm())
        if bends[-1] > noise:
            falls.append((bends[0] / bends[-1]) ** 0.5)
        at(0.0)
    return bool(falls) and sum(fall < 3 for fall in falls) >= len(falls) / 2
