"""Processes that have done nothing else, for what is to be measured alone.

A *nurse* imports everything and computes nothing; every measurement is a fork of a nurse, so that it starts from the
same memory and costs no second import.
"""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from importlib import import_module
from multiprocessing import active_children, get_context, parent_process
from multiprocessing.connection import Connection
from typing import TypeVar

import torch

from metanudge.errors import MetanudgeError

THREADS = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
TRIM_THRESHOLD, MMAP_THRESHOLD, ARENA_MAX = -1, -3, -8
"""Parameters of glibc's ``mallopt``."""
RETURNING = {ARENA_MAX: 1, MMAP_THRESHOLD: 2**13, TRIM_THRESHOLD: 2**16}
"""Every block above 8 KiB goes back to the system at once: the peak would else count blocks long freed."""
KEEPING = {MMAP_THRESHOLD: 2**25, TRIM_THRESHOLD: 2**30}
"""None does: else its page faults, which come and go with what happens to lie on top of the heap, are a tenth of the
time of what is timed, and vary by as much."""

PR_SET_PDEATHSIG = 1
"""Of Linux's ``prctl``."""

LATE = ("torch._dynamo",)
"""What torch imports when the first optimizer is made, in a second: nurses do it, once for all."""

J = TypeVar("J")
T = TypeVar("T")


@contextmanager
def nursery(workers: int, preload: tuple[str, ...]) -> Iterator[ProcessPoolExecutor]:
    """Nurses on one thread each, with everything imported; an error, or Ctrl-C, ends what they are measuring."""
    others = active_children()
    kept = {name: os.environ.get(name) for name in THREADS}
    os.environ.update(THREADS)  # for the nurses; this process has read its own long ago
    try:
        with ProcessPoolExecutor(workers, get_context("spawn"), import_all, ((*LATE, *preload),)) as nurses:
            try:
                yield nurses
            except BaseException:
                for nurse in set(active_children()).difference(others):
                    nurse.kill()  # and with it, its fork
                raise
    finally:
        for name, value in kept.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def import_all(modules: tuple[str, ...]) -> None:
    """What a nurse does before its first job."""
    end_with_parent()
    for module in modules:
        import_module(module)


def forked(function: Callable[[J], T], allocator: Mapping[int, int], job: J) -> T:
    """``function(job)`` in a fork of this process.

    Raises:
        MetanudgeError: It failed or was killed, and what the cause was.
    """
    receive, send = get_context("fork").Pipe(duplex=False)
    child = get_context("fork").Process(target=tell_alone, args=(send, function, allocator, job))
    child.start()
    send.close()
    try:
        result, error = receive.recv()
    except EOFError:
        child.join()
        result, error = None, f"the process ended with code {child.exitcode}; -9 is for want of memory"
    child.join()
    if error is not None:
        raise MetanudgeError(f"{job} could not be measured: {error}")
    measured: T = result
    return measured


def tell_alone(send: Connection, function: Callable[[J], object], allocator: Mapping[int, int], job: J) -> None:
    """``tell``, in a fork that ends with its nurse."""
    end_with_parent()
    tell(send, function, allocator, job)


def tell(send: Connection, function: Callable[[J], object], allocator: Mapping[int, int], job: J) -> None:
    """Send ``(result, None)``, or ``(None, what went wrong)``."""
    try:
        set_allocator(allocator)
        torch.set_num_threads(1)
        send.send((function(job), None))
    except Exception as error:
        send.send((None, f"{type(error).__name__}: {error}"))


def end_with_parent() -> None:
    """Linux kills this process when its parent has gone; a thread that watches would be part of what is measured."""
    c = ctypes.CDLL(None)
    if hasattr(c, "prctl"):
        c.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        parent = parent_process()
        if parent is not None and os.getppid() != parent.pid:
            os._exit(1)  # it had gone before this was asked for


def set_allocator(parameters: Mapping[int, int]) -> None:
    """Set glibc's, and give the system what lies free inside the heap, so that using it again counts."""
    c = ctypes.CDLL(None)
    if hasattr(c, "mallopt"):
        for parameter, value in parameters.items():
            c.mallopt(parameter, value)
        c.malloc_trim(0)
