"""Many processes, one meta-step: every rank solves tasks of its own, and one sum over the ranks makes the mean."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn

from metanudge.errors import SettingsError


@dataclass(frozen=True)
class Ranks:
    """The processes of a learner; one alone without a group.

    Attributes:
        group: A ``torch.distributed`` process group, or None.
        model: The same on each; or, where FSDP2 shards it, the same part of it.
    """

    group: Any
    model: nn.Module

    @classmethod
    def of(cls, group: Any, model: nn.Module, warm: bool) -> Ranks:
        """Of a learner's ``process_group``.

        Raises:
            SettingsError: No process group, or one that this process is not in; a model that is not the same on all
                ranks; a warm start.
        """
        ranks = cls(group, model)
        if group is None:
            return ranks
        if not isinstance(group, distributed.ProcessGroup):
            raise SettingsError(
                f"process_group must be a torch.distributed.ProcessGroup that this process is in, or None, got "
                f"{group!r}; call torch.distributed.init_process_group() and give torch.distributed.group.WORLD"
            )
        if warm:
            raise SettingsError(
                "warm_start keeps the solutions of tasks in one process, and process_group may give a task to another "
                "one each time; leave one of them out"
            )
        if not ranks.agree(_digest(model)):
            raise SettingsError(
                "the ranks of process_group hold different parameters, so a mean of their meta-gradients is none; make "
                "the model with the same seed on every rank (torch.manual_seed(0) before), or load the same weights. "
                "Of a model that FSDP2 shards, give the group of the ranks that hold the same part: "
                'mesh["tasks"].get_group() of a mesh with two dimensions, the other one for fully_shard'
            )
        return ranks

    @property
    def device(self) -> torch.device:
        """Where what is summed has to be."""
        return next(self.model.parameters()).device

    @property
    def size(self) -> int:
        """How many there are."""
        return 1 if self.group is None else distributed.get_world_size(self.group)

    @property
    def rank(self) -> int:
        """Which this one is, from 0."""
        return 0 if self.group is None else distributed.get_rank(self.group)

    @property
    def first(self) -> bool:
        """Whether this is the one that writes and tells."""
        return self.rank == 0

    def sum(self, tensors: Iterable[Tensor]) -> None:
        """Give every tensor, in place, its sum over the ranks. Cost: that of their bytes once around."""
        if self.group is not None:
            held = map(_local, tensors)
            for work in [distributed.all_reduce(tensor, group=self.group, async_op=True) for tensor in held]:
                work.wait()

    def counts(self, number: int) -> list[int]:
        """The ``number`` of every rank."""
        counts = torch.zeros(self.size, dtype=torch.int64, device=self.device)
        counts[self.rank] = number
        self.sum([counts])
        return [int(count) for count in counts.tolist()]

    def agree(self, numbers: Sequence[float]) -> bool:
        """Whether all ranks hold the same ``numbers``; NaN is the same as NaN."""
        if self.group is None:
            return True
        given = torch.tensor(numbers, dtype=torch.float64, device=self.device).nan_to_num()
        ends = torch.stack([given, -given])
        distributed.all_reduce(ends, distributed.ReduceOp.MAX, group=self.group)
        return bool((ends[0] == -ends[1]).all())

    def wait(self) -> None:
        """Until all ranks are here."""
        if self.group is not None:
            distributed.barrier(self.group)

    def part(self, number: int) -> range:
        """This rank's of ``number`` places: consecutive ones, and for each as many as can be."""
        return range(number * self.rank // self.size, number * (self.rank + 1) // self.size)


ALONE = Ranks(None, nn.Identity())
"""A process that shares its tasks with no other."""


@contextmanager
def joined() -> Iterator[Any]:
    """The group of the processes that ``torchrun`` started, while the block lasts; None where it started none."""
    if not distributed.is_available() or not distributed.is_torchelastic_launched():
        yield None
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # which "cuda" means from here on
    distributed.init_process_group()
    try:
        yield distributed.group.WORLD
    finally:
        distributed.destroy_process_group()


def _digest(model: nn.Module) -> list[float]:
    """Numbers by which two models are told apart, as many of every model."""
    parameters = [_local(parameter.detach()) for parameter in model.parameters()]
    weighted = [place * parameter.double().sum() for place, parameter in enumerate(parameters, 1)]
    squares = [parameter.double().square().sum() for parameter in parameters]
    sizes = [float(len(parameters)), float(sum(parameter.numel() for parameter in parameters))]
    return sizes + [float(torch.stack(found).sum()) for found in (weighted, squares)]


def _local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor that FSDP2 shards; of others, all."""
    found: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return found
