"""Small parameters of the live module end to end as one leaf: one operation where a pass over them needs dozens.

An estimate passes over the parameters many times. Where they are small, and wherever a GPU waits for Python, asking for
an operation takes longer than doing it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

SMALL = {"cpu": 2**12, "cuda": 2**16}
"""Numbers of a parameter up to which it is bundled, by device; above, what its copy costs is more than it saves."""
FULL = {"cpu": 2**15, "cuda": 2**22}
"""Numbers of a bundle, at most, as up to three more of one are alive while sums are formed; and, unless that is less
than 2^15, a sixteenth of all."""


class Bundles(Mapping[str, Tensor]):
    """The live module's parameters as leaves to compute with, small ones end to end; reading one gives its value now.

    A leaf is a *bundle*, ``[P]``, of plain, contiguous parameters of one dtype: a copy, made when it is read and not
    kept. Or it is a parameter, under its own name, that is large, sharded, or the only one of its kind. What is read is
    a new tensor each time. What was copied out of the parameters, or into them, is known to be what they hold until
    something may write to either: what autograd counts, a forward pass, or an optimizer, which is given a gradient
    before.

    Args:
        named: Parameters of the module, in its order.
        names: Those of every leaf, by its key.

    Attributes:
        named: As given.
        parameters: The same without names.
        light: Whether bundles hold a quarter of all numbers at most, so that there is room for every one twice.
    """

    def __init__(self, named: Mapping[str, nn.Parameter], names: Mapping[str, Sequence[str]]) -> None:
        self.named, self._names = named, names
        self.parameters = list(named.values())
        self._held = {key: [named[name] for name in some] for key, some in names.items()}
        bundled = sum(leaf.numel() for some in self._held.values() if len(some) > 1 for leaf in some)
        self.light = 4 * bundled <= sum(leaf.numel() for leaf in self.parameters)
        self._same: dict[str, tuple[weakref.ref[Tensor], int]] = {}
        self._written: list[int] = []

    @classmethod
    def of(cls, named: Mapping[str, nn.Parameter]) -> Bundles:
        """Bundle what is small."""
        full = max(sum(parameter.numel() for parameter in named.values()) // 16, 2**15)
        groups: list[list[str]] = []
        filling: dict[torch.dtype, tuple[list[str], int]] = {}
        for name, parameter in named.items():
            if not _small(parameter):
                groups.append([name])
                continue
            group, size = filling.get(parameter.dtype, ([], 0))
            size += parameter.numel()
            if not group or size > min(FULL[parameter.device.type], full):
                group, size = [], parameter.numel()
                groups.append(group)
            group.append(name)
            filling[parameter.dtype] = group, size
        # no parameter has the name of a bundle, as no module is called by an empty one
        return cls(named, {group[0] if len(group) == 1 else f".{group[0]}": tuple(group) for group in groups})

    def anew(self, leaves: Mapping[str, Tensor]) -> Bundles:
        """Parameters of their own at ``leaves``, of the same names and shapes."""
        found = self.by_name(leaves)
        own = Bundles({name: nn.Parameter(found[name].detach().clone()) for name in self.named}, self._names)
        own._remember(leaves)
        return own

    def __getitem__(self, key: str) -> Tensor:
        """A leaf; of a parameter that is alone, in its own memory."""
        return self.join(key, self._held[key]).detach()

    def __contains__(self, key: object) -> bool:
        """Whether there is such a leaf, which is not read for it."""
        return key in self._held

    def __iter__(self) -> Iterator[str]:
        """Over the keys of the leaves."""
        return iter(self._held)

    def __len__(self) -> int:
        """Number of leaves."""
        return len(self._held)

    def alone(self, key: str) -> bool:
        """Whether a leaf is a parameter under its own name."""
        return len(self._names.get(key, (key,))) == 1

    def names(self, key: str) -> Sequence[str]:
        """Of the parameters of a leaf; any other key, such as that of a shared parameter, is the name of one."""
        return self._names.get(key, (key,))

    def held(self, key: str) -> list[nn.Parameter]:
        """The parameters of a leaf."""
        return self._held[key]

    def join(self, key: str, parts: Sequence[Tensor]) -> Tensor:
        """A leaf out of what there is for its parameters: of one that is alone, that tensor itself, else a copy."""
        return parts[0] if self.alone(key) else _flat(parts)

    def parts(self, key: str, leaf: Tensor) -> tuple[Tensor, ...]:
        """Views of a leaf, one a parameter."""
        return (leaf,) if self.alone(key) else _views(leaf, self._held[key])

    def joined(self, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Leaves out of tensors by name."""
        return {key: self.join(key, [named[name] for name in names]) for key, names in self._names.items()}

    def by_name(self, leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Views of ``leaves`` by parameter name; others than these, such as those of shared parameters, as they are."""
        found: dict[str, Tensor] = {}
        for key, leaf in leaves.items():
            found.update(zip(self.names(key), self.parts(key, leaf), strict=True))
        return found

    def copied(self, to: Callable[[torch.dtype], torch.dtype]) -> dict[str, Tensor]:
        """Where the module stands, in leaves that it does not write to, of another precision."""
        found = {key: self[key] for key in self}
        kinds = {key: to(leaf.dtype) for key, leaf in found.items()}
        own = {key: torch.empty_like(leaf, dtype=kinds[key]) for key, leaf in found.items() if self.alone(key)}
        copy_into([(leaf, found[key]) for key, leaf in own.items()])
        copies = {key: own[key] if key in own else leaf.to(kinds[key]) for key, leaf in found.items()}
        self._remember(copies)
        return copies

    def load(self, leaves: Mapping[str, Tensor]) -> None:
        """Write leaves into the module."""
        pairs = [
            pair for key, leaf in leaves.items() for pair in zip(self._held[key], self.parts(key, leaf), strict=True)
        ]
        copy_into(pairs)
        self._remember(leaves)

    def holds(self, leaves: Mapping[str, Tensor]) -> bool:
        """Whether the parameters are known to be ``leaves``, these very tensors."""
        return (
            leaves.keys() == self._same.keys()
            and all(
                leaf() is leaves[key] and leaves[key]._version == version for key, (leaf, version) in self._same.items()
            )
            and self._written == [parameter._version for parameter in self.parameters]
        )

    def _remember(self, leaves: Mapping[str, Tensor]) -> None:
        self._same = {key: (weakref.ref(leaf), leaf._version) for key, leaf in leaves.items()}
        self._written = [parameter._version for parameter in self.parameters]

    def forget(self) -> None:
        """Stop assuming what the parameters hold: something may write to them that autograd does not count."""
        self._same = {}

    def give(self, gradient: dict[str, Tensor]) -> None:
        """Put ``gradient`` into ``.grad``, for an optimizer, of which fused ones do not count as writing; emptied."""
        self.forget()
        for key, parameters in self._held.items():
            leaf = gradient.pop(key).to(parameters[0].dtype)
            for parameter, part in zip(parameters, self.parts(key, leaf), strict=True):
                parameter.grad = part


def copy_into(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Write the second of every pair into the first, by one call where they are plain."""
    at_once = [pair for pair in pairs if plain(pair[0])]
    with torch.no_grad():
        if at_once:
            torch._foreach_copy_([to for to, _ in at_once], [what for _, what in at_once])
        for to, what in pairs:
            if not plain(to):  # as a sharded one
                to.copy_(what)


def _flat(parts: Sequence[Tensor]) -> Tensor:
    """End to end, by one call."""
    found: Tensor = _flatten_dense_tensors(parts)  # type: ignore[no-untyped-call]
    return found


def _views(leaf: Tensor, like: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """And back."""
    found: tuple[Tensor, ...] = _unflatten_dense_tensors(leaf, like)  # type: ignore[no-untyped-call]
    return found


def _small(parameter: Tensor) -> bool:
    most = SMALL.get(parameter.device.type, 0)
    return plain(parameter) and parameter.is_contiguous() and 0 < parameter.numel() <= most


def plain(parameter: Tensor) -> bool:
    """Neither sharded nor sparse, nor of another kind of its own."""
    return type(parameter) in (Tensor, nn.Parameter) and parameter.layout is torch.strided
