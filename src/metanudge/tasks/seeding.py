"""Independent random streams of a family of tasks."""

from __future__ import annotations

import numpy as np
import torch


def stream(seed: int, index: int) -> torch.Generator:
    """A generator that depends on (seed, index) alone; streams of different pairs are independent."""
    state = np.random.SeedSequence([seed, index]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))
