"""Small parameters of the live module end to end as one leaf: one operation where a pass over them needs dozens.

An estimate passes over the parameters many times. Where they are small, and wherever a GPU waits for Python, asking for
an operation takes longer than doing it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

SMALL = {"cpu": 2**12, "cuda": 2**20}
"""Numbers of a parameter up to which it is bundled, by device; above, what its copy costs is more than it saves."""
FULL = {"cpu": 2**15, "cuda": 2**22}
"""Numbers of a bundle, at most, so that one that is in use twice does not count beside a model."""


class Bundles(Mapping[str, Tensor]):
    """Parameters of the live module as leaves to compute with; reading one reads where the module stands.

    A leaf is a *bundle*, ``[P]``, of plain, contiguous parameters of one dtype: a copy, made when it is read and not
    kept. Or it is a parameter, under its own name, that is large, sharded, or the only one of its kind.

    Args:
        held: The parameters of every leaf, by name.
    """

    def __init__(self, held: Mapping[str, Mapping[str, nn.Parameter]]) -> None:
        self._held = held
        self._lists = {key: list(parameters.values()) for key, parameters in held.items()}
        self.parameters = [parameter for some in self._lists.values() for parameter in some]

    @classmethod
    def of(cls, named: Mapping[str, nn.Parameter]) -> Bundles:
        """Bundle what is small."""
        groups: list[dict[str, nn.Parameter]] = []
        filling: dict[torch.dtype, dict[str, nn.Parameter]] = {}
        for name, parameter in named.items():
            group = filling.get(parameter.dtype, {}) if _small(parameter) else {}
            if sum(map(Tensor.numel, group.values())) + parameter.numel() > _most(FULL, parameter):
                group = {}
            if not group:
                groups.append(group)
            if _small(parameter):
                filling[parameter.dtype] = group
            group[name] = parameter
        return cls({_key(group): group for group in groups})

    @classmethod
    def apart(cls, leaves: Mapping[str, Tensor]) -> Bundles:
        """Parameters of their own, each a leaf, at ``leaves``."""
        return cls({key: {key: nn.Parameter(leaf.detach().clone())} for key, leaf in leaves.items()})

    def __getitem__(self, key: str) -> Tensor:
        """A leaf; of one that is alone, the parameter itself."""
        return self.join(key, self._lists[key]).detach()

    def __iter__(self) -> Iterator[str]:
        """Over the keys of the leaves."""
        return iter(self._held)

    def __len__(self) -> int:
        """Number of leaves."""
        return len(self._held)

    def alone(self, key: str) -> bool:
        """Whether a leaf is a parameter under its own name."""
        return len(self._held.get(key, (key,))) == 1

    def names(self, key: str) -> Sequence[str]:
        """The parameters of a leaf; any other key, such as that of a shared parameter, is the name of one."""
        return tuple(self._held[key]) if key in self._held else (key,)

    def join(self, key: str, parts: Sequence[Tensor]) -> Tensor:
        """A leaf out of what there is for its parameters: of one that is alone, that tensor itself, else a copy."""
        return parts[0] if self.alone(key) else _flat(parts)

    def parts(self, key: str, leaf: Tensor) -> Sequence[Tensor]:
        """Views of a leaf, one a parameter."""
        return [leaf] if self.alone(key) else _views(leaf, self._lists[key])

    def joined(self, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Leaves out of tensors by name."""
        return {key: self.join(key, [named[name] for name in group]) for key, group in self._held.items()}

    def named(self, leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Views of ``leaves`` by parameter name; others than these, such as those of shared parameters, as they are."""
        found: dict[str, Tensor] = {}
        for key, leaf in leaves.items():
            found.update(zip(self.names(key), self.parts(key, leaf), strict=True))
        return found

    def copied(self) -> dict[str, Tensor]:
        """Where the module stands, in leaves that it does not write to."""
        return {key: self[key].clone() if self.alone(key) else self[key] for key in self}

    def load(self, leaves: Mapping[str, Tensor]) -> None:
        """Write leaves into the module."""
        with torch.no_grad():
            for key, leaf in leaves.items():
                if self.alone(key):
                    self._lists[key][0].copy_(leaf)
                else:
                    torch._foreach_copy_(self._lists[key], self.parts(key, leaf))

    def give(self, gradient: dict[str, Tensor]) -> None:
        """Put ``gradient`` into ``.grad``; it is emptied."""
        for key, parameters in self._lists.items():
            leaf = gradient.pop(key).to(parameters[0].dtype)
            for parameter, part in zip(parameters, self.parts(key, leaf), strict=True):
                parameter.grad = part


def _flat(parts: Sequence[Tensor]) -> Tensor:
    """End to end, by one call."""
    found: Tensor = _flatten_dense_tensors(parts)  # type: ignore[no-untyped-call]
    return found


def _views(leaf: Tensor, like: Sequence[Tensor]) -> Sequence[Tensor]:
    """And back."""
    found: Sequence[Tensor] = _unflatten_dense_tensors(leaf, like)  # type: ignore[no-untyped-call]
    return found


def _small(parameter: Tensor) -> bool:
    plain = type(parameter) in (Tensor, nn.Parameter) and parameter.layout is torch.strided
    return plain and parameter.is_contiguous() and 0 < parameter.numel() <= _most(SMALL, parameter)


def _most(sizes: Mapping[str, int], parameter: Tensor) -> int:
    return sizes.get(parameter.device.type, 0)


def _key(group: Mapping[str, Tensor]) -> str:
    """The parameter's own name, or what none can have, as no module is called by an empty one."""
    first = next(iter(group))
    return first if len(group) == 1 else f".{first}"
