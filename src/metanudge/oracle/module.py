"""The user's module, lent out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from metanudge.bundles import Bundles
from metanudge.checks import leaves
from metanudge.errors import TasksError
from metanudge.minibatches import as_minibatches
from metanudge.oracle.written import Written
from metanudge.sharding import is_sharded, whole
from metanudge.tree import accumulator
from metanudge.types import Params, Tasks


@dataclass(frozen=True)
class LiveModule:
    """The user's module: what was there when it was taken, and how to put it back.

    Attributes:
        model: The module.
        parameters: Its parameters, tied ones once.
        bundles: The adapted ones, as they are computed with.
        values: Copies of the adapted ones, the only ones that are written to; in float32 where they have less
            precision, so that all arithmetic with them is.
        gradients: What was in ``.grad``.
        trainable: What was in ``.requires_grad``.
        buffers: Every buffer: its module, its name, itself and a copy.
        written: What its modules held.
        sharded: The modules of FSDP2, which gather and scatter their parameters.
    """

    model: nn.Module
    parameters: dict[str, nn.Parameter]
    bundles: Bundles
    values: Params
    gradients: dict[str, Tensor | None]
    trainable: dict[str, bool]
    buffers: list[tuple[nn.Module, str, Tensor | None, Tensor | None]]
    written: Written
    sharded: list[Any]

    @classmethod
    def take(cls, model: nn.Module, adapted: Sequence[str]) -> LiveModule:
        """Remember parameters, gradients, flags, buffers and attributes."""
        parameters = dict(model.named_parameters())
        bundles = Bundles.of({name: parameters[name] for name in adapted})
        return cls(
            model,
            parameters,
            bundles,
            bundles.copied(accumulator),
            {name: parameter.grad for name, parameter in parameters.items()},
            {name: parameter.requires_grad for name, parameter in parameters.items()},
            [
                (module, name, buffer, None if buffer is None else buffer.clone())
                for module in model.modules()
                for name, buffer in module._buffers.items()
            ],
            Written.over(model),
            [module for module in model.modules() if hasattr(module, "reshard") and hasattr(module, "unshard")],
        )

    def load(self, params: Mapping[str, Tensor]) -> None:
        """Write ``params`` into the module, unless it is known to hold them; what it stands at may be given itself."""
        self.renew()
        if params is not self.bundles and not self.bundles.holds(params):
            self.bundles.load(params)

    def renew(self) -> None:
        """Let go what was made of the parameters before.

        That is what FSDP2 gathered for a forward pass without a backward pass, and the casts that autocast keeps.
        """
        for module in self.sharded:
            module.reshard()
        torch.clear_autocast_cache()

    def untouched(self) -> bool:
        """Whether the adapted parameters are what they were; sharded ones, of which a rank sees a part, as is known."""
        if self.bundles.holds(self.values):
            return True
        if is_sharded(self.model):
            return False
        pairs = [(self.bundles[key], value) for key, value in self.values.items()]
        return bool(torch.stack([(now == before.to(now.dtype)).all() for now, before in pairs]).all())

    def places(self) -> list[int]:
        """Where parameters and buffers lie."""
        held = [*self.parameters.values(), *(buffer for _, _, buffer, _ in self.buffers if buffer is not None)]
        return [tensor.data_ptr() for tensor in held]

    def held(self, key: str) -> list[nn.Parameter]:
        """The parameters of a leaf; any other key, of a parameter that is not adapted, is its name."""
        return self.bundles.held(key) if key in self.bundles else [self.parameters[key]]

    def watch(self, wanted: Sequence[nn.Parameter]) -> None:
        """Let ``.backward()`` fill the gradients of ``wanted``, and, unless FSDP2 manages them, of nothing else."""
        chosen = set(map(id, wanted))
        for parameter in self.parameters.values():
            parameter.grad = None
            wants = id(parameter) in chosen
            if not self.sharded and parameter.requires_grad is not wants:
                parameter.requires_grad_(wants)

    def over_ranks(self, loss: Tensor) -> Tensor:
        """The loss of a task whose examples the ranks of FSDP2 have divided: the mean, as FSDP2 takes of gradients."""
        mesh: Any = next((p.device_mesh for p in self.parameters.values() if hasattr(p, "device_mesh")), None)
        if mesh is None:
            return loss
        from torch.distributed.tensor import DTensor, Partial

        parts = DTensor.from_local(loss, mesh, [Partial()] * mesh.ndim, run_check=False)
        size: int = mesh.size()
        return whole(parts) / size

    def check_parts(self, task: Tasks) -> None:
        """Raise a TasksError where ranks of FSDP2 hold parts of different sizes of a task: it takes plain means.

        Of minibatches, which are drawn later, nothing is seen.
        """
        if not self.sharded:
            return
        ordinary = [[] if as_minibatches(batch) else leaves(batch) for batch in task]
        sizes = [float(next((leaf.shape[0] for leaf in some if leaf.ndim), 0)) for some in ordinary]
        own = torch.tensor(sizes, dtype=torch.float64, device=next(iter(self.parameters.values())).device)
        mean, square = self.over_ranks(own), self.over_ranks(own.square())
        if bool((square - mean.square() > 1e-6).any()):
            raise TasksError(
                f"FSDP2 averages gradients over ranks, so that all have to hold parts of one size of a task; this rank "
                f"holds {sizes[0]:g} support and {sizes[1]:g} query examples, others more or fewer"
            )

    def reset_buffers(self, *, copies: bool = False) -> None:
        """Undo what the last evaluation wrote; or lay out copies of buffers, and leave a living graph's alone."""
        self.written.undo()  # before the next one, as checkpoints write in the backward pass too
        for module, name, buffer, saved in self.buffers:
            module._buffers[name] = saved.clone() if copies and saved is not None else buffer
            if not copies and buffer is not None and saved is not None:
                with torch.no_grad():
                    buffer.copy_(saved)

    def give_back(self) -> None:
        """Put everything back."""
        self.renew()
        self.bundles.load(self.values)  # whatever they are known to hold
        self.reset_buffers()
        for name, parameter in self.parameters.items():
            parameter.grad = self.gradients[name]
            parameter.requires_grad_(self.trainable[name])
