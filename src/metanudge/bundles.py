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
        self._names = {key: tuple(named) for key, named in held.items()}
        self._held = {key: list(named.values()) for key, named in held.items()}
        self.parameters = [parameter for some in self._held.values() for parameter in some]

    @classmethod
    def of(cls, named: Mapping[str, nn.Parameter]) -> Bundles:
        """Bundle what is small."""
        groups: list[dict[str, nn.Parameter]] = []
        filling: dict[torch.dtype, tuple[dict[str, nn.Parameter], int]] = {}
        for name, parameter in named.items():
            if not _small(parameter):
                groups.append({name: parameter})
                continue
            group, size = filling.get(parameter.dtype, ({}, 0))
            size += parameter.numel()
            if not group or size > FULL[parameter.device.type]:
                group, size = {}, parameter.numel()
                groups.append(group)
            group[name] = parameter
            filling[parameter.dtype] = group, size
        return cls({_key(group): group for group in groups})

    @classmethod
    def apart(cls, leaves: Mapping[str, Tensor]) -> Bundles:
        """Parameters of their own, each a leaf, at ``leaves``."""
        return cls({key: {key: nn.Parameter(leaf.detach().clone())} for key, leaf in leaves.items()})

    def __getitem__(self, key: str) -> Tensor:
        """A leaf; of one that is alone, the parameter itself."""
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
                if self.alone(key):  # and may be sharded
                    self._held[key][0].copy_(leaf)
                else:
                    torch._foreach_copy_(tuple(self._held[key]), self.parts(key, leaf))

    def give(self, gradient: dict[str, Tensor]) -> None:
        """Put ``gradient`` into ``.grad``; it is emptied."""
        for key, parameters in self._held.items():
            leaf = gradient.pop(key).to(parameters[0].dtype)
            for parameter, part in zip(parameters, self.parts(key, leaf), strict=True):
                parameter.grad = part


def _flat(parts: Sequence[Tensor]) -> Tensor:
    """End to end, by one call."""
    found: Tensor = _flatten_dense_tensors(parts)  # type: ignore[no-untyped-call]
    return found


def _views(leaf: Tensor, like: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """And back."""
    found: tuple[Tensor, ...] = _unflatten_dense_tensors(leaf, like)  # type: ignore[no-untyped-call]
    return found


def _small(parameter: Tensor) -> bool:
    plain = type(parameter) in (Tensor, nn.Parameter) and parameter.layout is torch.strided
    most = SMALL.get(parameter.device.type, 0)
    return plain and parameter.is_contiguous() and 0 < parameter.numel() <= most


def _key(group: Mapping[str, Tensor]) -> str:
    """The parameter's own name, or what none can have, as no module is called by an empty one."""
    first = next(iter(group))
    return first if len(group) == 1 else f".{first}"
