"""CUDA graphs of forward and backward passes."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Hashable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from metanudge.errors import LossError
from metanudge.oracle.recorded import Found

T = TypeVar("T")

_UNRECORDABLE = (
    "with cuda_graphs=True neither the model nor the loss may do what a GPU cannot repeat by itself: take a number "
    "out of a tensor (.item(), float(), if or while on its value), index by a mask (multiply by it instead), make "
    "tensors out of Python's numbers or of the CPU's tensors, or keep random states (activation checkpointing: "
    "preserve_rng_state=False); leave cuda_graphs out."
)


class Place(NamedTuple):
    """Where graphs are recorded.

    Attributes:
        device: Of all of them.
        stream: Aside from the current one.
        keeps: A graph that does nothing, and as long as it is there, so is the memory that graphs share.
    """

    device: torch.device
    stream: torch.cuda.Stream
    keeps: torch.cuda.CUDAGraph


@dataclass(eq=False)
class CudaGraphs:
    """Records work as CUDA graphs. They share their memory, as one runs after the other, and keep it for later ones."""

    pays: dict[Hashable, bool] = field(default_factory=dict)
    place: Place | None = None

    def __call__(self, work: Callable[[], Found], device: torch.device) -> tuple[Found, Callable[[], None]]:
        """Record; nothing is computed yet."""
        with torch.cuda.device(device):
            if self.place is None or self.place.device != device:
                aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
                keeps = torch.cuda.CUDAGraph()
                _record(keeps, _nothing, aside, None)
                self.place = Place(device, aside, keeps)
            place, graph = self.place, torch.cuda.CUDAGraph()
            try:
                return _record(graph, work, place.stream, place.keeps.pool()), graph.replay
            except torch.OutOfMemoryError:
                self.place = None
                torch.cuda.empty_cache()  # of what plain runs left, which is not done while something is recorded
                _mend(place.stream)
                raise
            except BaseException as error:
                self.place = None
                _mend(place.stream)
                if isinstance(error, RuntimeError) and re.search("captur", str(error)):
                    raise LossError(f"{_UNRECORDABLE} PyTorch said: {error}") from error
                raise

    def wait(self, device: torch.device) -> float:
        """Until the device has done what it was given; the seconds that it took."""
        asked = time.perf_counter()
        torch.cuda.synchronize(device)
        return time.perf_counter() - asked

    def __reduce__(self) -> tuple[type[CudaGraphs], tuple[()]]:
        """For copies, which begin without memory."""
        return CudaGraphs, ()


def _record(graph: torch.cuda.CUDAGraph, work: Callable[[], T], aside: torch.cuda.Stream, pool: Any) -> T:
    current = torch.cuda.current_stream()
    aside.wait_stream(current)
    with torch.cuda.stream(aside):
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")  # loaders may pin memory meanwhile
        try:
            found = work()
        except BaseException:
            with suppress(RuntimeError):
                graph.capture_end()
            raise
        graph.capture_end()
    current.wait_stream(aside)
    return found


def _nothing() -> Tensor:
    return torch.zeros((), device="cuda")


def _mend(stream: torch.cuda.Stream) -> None:
    """After a recording that failed: random generators take themselves for recorded until one ends well."""
    with suppress(RuntimeError):
        _record(torch.cuda.CUDAGraph(), _nothing, stream, None)
