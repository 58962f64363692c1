"""Processes for tests, as torchrun starts them, on the CPU whatever GPUs there are."""

from __future__ import annotations

import os
import runpy
import signal
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import distributed, multiprocessing

TRIES = 2
"""Where a process crashed, as none does by a failing test. Once in some hundred runs the threads of gloo left the heap
corrupt ("malloc(): unaligned tcache chunk detected"); valgrind and an address sanitizer find nothing."""
CRASHED = {-signal.SIGABRT, -signal.SIGSEGV, -signal.SIGBUS}


def spawned(worker: Callable[[int, Path], Any], number: int, folder: Path) -> list[Any]:
    """What ``worker(rank, folder)`` returns in each of ``number`` processes, which share a folder."""
    for left in reversed(range(TRIES)):
        place = Path(tempfile.mkdtemp(dir=folder))
        context = _started(worker, number, place)
        try:
            while not context.join():
                pass
            break
        except (multiprocessing.ProcessExitedException, multiprocessing.ProcessRaisedException) as error:
            if not left or CRASHED.isdisjoint(process.exitcode for process in context.processes):
                raise
            print(f"a process crashed: {error}")
    return [torch.load(place / f"{rank}.pt", weights_only=False) for rank in range(number)]


def _started(worker: Callable[[int, Path], Any], number: int, folder: Path) -> Any:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        "CUDA_VISIBLE_DEVICES": "",
        "WORLD_SIZE": str(number),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    with mock.patch.dict(os.environ, shared):
        return multiprocessing.spawn(_child, (worker, folder), nprocs=number, join=False)


def _child(rank: int, worker: Callable[[int, Path], Any], folder: Path) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    torch.save(worker(rank, folder), folder / f"{rank}.pt")


@contextmanager
def group(folder: Path) -> Iterator[Any]:
    """The group of all that were spawned; an example, which makes its own, may have run before."""
    rank, number = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=number)
    yield distributed.group.WORLD
    distributed.destroy_process_group()


def example(name: str, steps: int) -> tuple[float, float]:
    """What an example returns."""
    path = Path(__file__).parent.parent / "examples" / f"{name}.py"
    losses: tuple[float, float] = runpy.run_path(str(path))["main"](steps=steps)
    return losses
