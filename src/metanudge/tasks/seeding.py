"""Independent random streams of a family of tasks."""

from __future__ import annotations

import numpy as np
import torch

from metanudge.settings import check_number, check_seed


def stream(seed: int, index: int) -> torch.Generator:
    """A generator that depends on (seed, index) alone; streams of different pairs are independent.

    Raises:
        SettingsError: Either is no whole number >= 0.
    """
    check_seed(seed)
    check_number(index, "the index of a task")
    state = np.random.SeedSequence([seed, index]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))
