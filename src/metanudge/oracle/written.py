"""What a forward pass writes into modules, thrown away after it."""

from __future__ import annotations

from operator import is_
from typing import Any, NamedTuple

from torch import nn

_OWN = frozenset(vars(nn.Module())) - {"_buffers", "_non_persistent_buffers_set"}
"""Containers of every module that forward passes do not write to; FSDP2 does, to the parameters'."""


LARGEST = 1000
"""Things in a container above which it is left alone: a vocabulary, not what a forward pass writes."""


class Written(NamedTuple):
    """What the modules of a model held: attributes, buffers, and what was in their lists, dicts and sets.

    Objects are told apart, not their values: what is done to a tensor in place, or to the contents of contents, is not
    seen.

    Attributes:
        held: Every container.
        before: What was in them: shallow copies, but for the empty ones. Most are, and so many objects made at once
            would call the garbage collector.
    """

    held: list[Any]
    before: list[Any]

    @classmethod
    def over(cls, model: nn.Module) -> Written:
        """What is there now. Cost: that of some copies of small dicts a module."""
        held: list[Any] = []
        for module in model.modules():
            attributes = vars(module)
            held.append(attributes)
            held += [
                value
                for name, value in attributes.items()
                if type(value) in (list, dict, set) and name not in _OWN and len(value) <= LARGEST
            ]
        return cls(held, [container.copy() if container else () for container in held])

    def undo(self) -> None:
        """Put back what was replaced or taken away, and take away what is new. Cost: less than a forward pass."""
        for now, before in zip(self.held, self.before, strict=True):
            if not (now or before) or _same(now, before):
                continue
            now.clear()
            if type(now) is list:
                now.extend(before)
            else:
                now.update(before)


def _same(now: Any, before: Any) -> bool:
    """Whether the same objects are in the same places."""
    if len(now) != len(before) or not all(map(is_, now, before)):
        return False
    return type(now) is not dict or all(map(is_, now.values(), before.values()))
