"""Many processes, one meta-step: every rank solves tasks of its own, and one sum over the ranks makes the mean."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn

from metanudge.errors import MetanudgeError, SettingsError
from metanudge.sharding import is_sharded
from metanudge.tree import accumulator
from metanudge.warned import warn

SAME = 1e-9
"""Relative difference of sums over the same numbers on machines of another kind, or with other threads, at most."""


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
    def of(cls, group: Any, model: nn.Module) -> Ranks:
        """Of a learner's ``process_group``; nothing is sent.

        Raises:
            SettingsError: No process group, one that this process is not in, or whose backend cannot reach the model.
        """
        ranks = cls(group, model)
        if group is None:
            return ranks
        if not isinstance(group, distributed.ProcessGroup):
            raise SettingsError(
                f"process_group must be a torch.distributed.ProcessGroup that this process is in, or None, got "
                f"{group!r}; call torch.distributed.init_process_group() and give torch.distributed.group.WORLD"
            )
        if ranks.device.type == "cpu" and distributed.get_backend(group) == "nccl":
            raise SettingsError(
                "the model is on the CPU, where NCCL does not reach; move it to this rank's GPU before, or call "
                'torch.distributed.init_process_group("gloo")'
            )
        return ranks

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

    @property
    def device(self) -> torch.device:
        """Where what is summed has to be."""
        return next((parameter.device for parameter in self.model.parameters()), torch.device("cpu"))

    def part(self, number: int) -> range:
        """This rank's of ``number`` places: consecutive ones, and for each as many as can be."""
        return range(number * self.rank // self.size, number * (self.rank + 1) // self.size)

    def sum(self, tensors: Iterable[Tensor]) -> None:
        """Give every tensor, in place, its sum over the ranks. Cost: that of their bytes once around."""
        if self.group is not None:
            held = map(_local, tensors)
            for work in [distributed.all_reduce(tensor, group=self.group, async_op=True) for tensor in held]:
                work.wait()

    def counts(self, number: int) -> list[int]:
        """The ``number`` of every rank.

        Raises:
            MetanudgeError: Another one failed.
        """
        if self.group is None:
            return [number]
        sent = torch.zeros(self.size, dtype=torch.int64, device=self.device)
        sent[self.rank] = number
        self.sum([sent])
        counts = [int(count) for count in sent.tolist()]
        if failed := [rank for rank, count in enumerate(counts) if count < 0 and rank != self.rank]:
            raise MetanudgeError(
                f"rank {failed[0]} failed in this step, as its own error tells; nothing was changed on this one"
            )
        return counts

    @contextmanager
    def together(self) -> Iterator[None]:
        """A block whose failure the other ranks hear of where they next exchange ``counts``."""
        try:
            yield
        except Exception:
            with suppress(MetanudgeError):  # that another rank failed as well
                self.counts(-1)
            raise

    def wait(self) -> None:
        """Until all ranks are here."""
        self.counts(0)

    def check_model(self) -> None:
        """Compare the ranks' models. Cost: two passes over its parameters.

        Raises:
            SettingsError: They differ.

        Warns:
            UserWarning: There are several processes, and each would learn for itself.
        """
        if self.group is None and (number := processes()) > 1 and not is_sharded(self.model):
            warn(
                f"there are {number} processes, and the learner has no process_group, so each learns for itself; give "
                "it process_group=torch.distributed.group.WORLD, after torch.distributed.init_process_group() (before, "
                "that is None)",
                UserWarning,
            )
        if self.group is not None and not all(self._agree(_digest(self.model))):
            raise SettingsError(
                "the ranks of process_group hold different parameters or buffers, so a mean of their meta-gradients is "
                "none; make the model with the same seed on every rank (torch.manual_seed(0) before), or load the same "
                "weights. Of a model that FSDP2 shards, give the group of the ranks that hold the same part: "
                'mesh["tasks"].get_group() of a mesh with two dimensions, the other one for fully_shard'
            )

    def check_settings(self, given: Mapping[str, object]) -> None:
        """Compare what the ranks were ``given``, by the words it is written in.

        Raises:
            SettingsError: Something differs.
        """
        if self.group is None:
            return
        agreed = self._agree([float(zlib.crc32(repr(value).encode())) for value in given.values()])
        if odd := [name for name, agrees in zip(given, agreed, strict=True) if not agrees]:
            raise SettingsError(
                f"the ranks of process_group have to be given the same, and do not agree on {', '.join(odd)}; here "
                f"{', '.join(f'{name} = {given[name]}' for name in odd)}"
            )

    def _agree(self, numbers: list[float]) -> list[bool]:
        """Of which ``numbers`` all ranks hold the same; NaN is the same as NaN."""
        given = torch.tensor(numbers, dtype=torch.float64, device=self.device).nan_to_num()
        ends = torch.stack([given, -given])
        distributed.all_reduce(ends, distributed.ReduceOp.MAX, group=self.group)
        most, least = ends[0], -ends[1]
        return [bool(same) for same in (most - least <= SAME * most.abs().maximum(least.abs())).tolist()]


ALONE = Ranks(None, nn.Identity())
"""A process that shares its tasks with no other."""


def processes() -> int:
    """How many there are that could share tasks: of ``torch.distributed``, or those that ``torchrun`` started."""
    if not distributed.is_available():
        return 1
    if distributed.is_initialized():
        return distributed.get_world_size()
    return int(os.environ["WORLD_SIZE"]) if distributed.is_torchelastic_launched() else 1


@contextmanager
def joined(device: str) -> Iterator[Ranks]:
    """The processes that ``torchrun`` started, while the block lasts; this one alone where it started none.

    With the device "cuda", each has a GPU of its own, which "cuda" means from here on.

    Raises:
        SettingsError: There are fewer GPUs than processes here, or the device is one for all.
    """
    if processes() == 1:
        yield ALONE
        return
    if device.startswith("cuda"):
        place, here = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if device != "cuda":
            raise SettingsError(f'torchrun started several processes, all on device = "{device}"; give "cuda"')
        if place >= here:
            raise SettingsError(
                f'every process takes a GPU of its own with device = "cuda", and there are {here} here for at least '
                f"{place + 1} of them; start fewer (torchrun --nproc-per-node {max(here, 1)})"
            )
        torch.cuda.set_device(place)
    distributed.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")
    try:
        yield Ranks(distributed.group.WORLD, ALONE.model)
    finally:
        distributed.destroy_process_group()


def _digest(model: nn.Module) -> list[float]:
    """Numbers by which two models are told apart, as many of every model; none is what is left of larger ones."""
    tensors = [_local(tensor.detach()) for tensor in (*model.parameters(), *model.buffers())]
    sums, norms = 0.0, 0.0
    for place, tensor in enumerate(tensors, 1):  # so that two that are exchanged are another model
        norms += place * float(torch.linalg.vector_norm(tensor.to(accumulator(tensor.dtype)), dtype=torch.float64))
        sums += place * float(tensor.sum(dtype=torch.float64))
    return [len(tensors), sum(tensor.numel() for tensor in tensors), norms, sums + 10 * norms]


def _local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor that FSDP2 shards; of others, all."""
    found: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return found
