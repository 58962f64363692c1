"""All parameters of one kind and dtype as one tensor ``[T, N, P]``: one operation where a dictionary needs dozens."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from metanudge.types import Params


@dataclass(frozen=True)
class Slot:
    """The parameters of one packed leaf, in order."""

    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]
    sizes: list[int]


@dataclass(frozen=True)
class Packing:
    """Between named parameters and packed leaves.

    Attributes:
        slots: Layout of every packed leaf, by its key.
        reference: A tensor with the dtype and device of the first leaf.
    """

    slots: dict[str, Slot]
    reference: Tensor

    @classmethod
    def of(cls, **kinds: Mapping[str, Tensor]) -> Packing:
        """Lay out parameters by kind (the keyword) and dtype."""
        slots: dict[str, Slot] = {}
        for kind, named in kinds.items():
            for dtype in dict.fromkeys(tensor.dtype for tensor in named.values()):
                same = {name: tensor for name, tensor in named.items() if tensor.dtype == dtype}
                slots[f"{kind}.{dtype}"] = Slot(
                    tuple(same),
                    tuple(tensor.shape for tensor in same.values()),
                    [tensor.numel() for tensor in same.values()],
                )
        first = next(tensor for named in kinds.values() for tensor in named.values())
        return cls(slots, first.detach().new_empty(0))

    @property
    def layout(self) -> Hashable:
        """What stands where."""
        return tuple((key, slot.names, slot.shapes) for key, slot in self.slots.items())

    def pack(self, kind: str, named: Mapping[str, Tensor]) -> Params:
        """Copy parameters into leaves ``[1, 1, P]``."""
        return {
            key: torch.cat([named[name].detach().reshape(1, 1, -1) for name in slot.names], dim=-1)
            for key, slot in self.slots.items()
            if key.startswith(kind + ".")
        }

    def unpack(self, packed: Params) -> dict[str, Tensor]:
        """Views of packed leaves ``[P]`` as parameters ``[*shape]``."""
        return {
            name: piece.view(shape)
            for key, leaf in packed.items()
            for name, shape, piece in zip(
                self.slots[key].names,
                self.slots[key].shapes,
                torch.split(leaf, self.slots[key].sizes, dim=-1),
                strict=True,
            )
        }
