"""The random state of an evaluation: torch's for one device, Python's and numpy's."""

from __future__ import annotations

import pickle
import random
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from metanudge.types import Role


@dataclass(frozen=True)
class RandomState:
    """Common random numbers: an evaluation's random state is a function of its task, loss and step alone.

    Attributes:
        seed: Of the meta-step.
        device: Of the model.
        first: Tasks of the meta-step that other processes have, before those of this one.
    """

    seed: int
    device: torch.device
    first: int = 0

    def enter(self, task: int, role: Role, step: int) -> None:
        """Seed the generators that a model on ``device``, or its loss, draws from."""
        seed = (self.seed + 1_000_003 * (self.first + task) + 2 * step + role.value) % 2**63
        seed_generators(seed, self.device)

    def state(self) -> list[bytes]:
        """Of the generators, to see whether something was drawn."""
        found = [torch.default_generator.get_state()]
        if self.device.type == "cuda":
            found.append(torch.cuda.default_generators[self.device.index].get_state())
        return [*(bytes(one.numpy()) for one in found), *self.others()]

    def elsewhere(self) -> list[bytes]:
        """Of those that are not the device's own."""
        found = [] if self.device.type == "cpu" else [bytes(torch.default_generator.get_state().numpy())]
        return [*found, *self.others()]

    def others(self) -> list[bytes]:
        """Of Python's and numpy's alone."""
        return [pickle.dumps(state) for state in (random.getstate(), np.random.get_state(legacy=False))]

    def aside(self) -> AbstractContextManager[None]:
        """A context whose draws leave the state as it was."""
        return forked(self.device)


def seed_generators(seed: int, device: torch.device) -> None:
    """Seed what a model on ``device``, or its loss, draws from, and no other device, whichever is the current one."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index].manual_seed(seed)


@contextmanager
def forked(device: torch.device) -> Iterator[None]:
    """A context after which the random state is as before: torch's for a model on ``device``, Python's and numpy's."""
    of_python, of_numpy = random.getstate(), np.random.get_state(legacy=False)
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)
