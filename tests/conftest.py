"""What all tests share: seeds, and one thread."""

from __future__ import annotations

import pytest
import torch

# the tensors of the tests are tiny: a second thread only waits, and on a busy machine it waits long
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Every test starts from the same state of the generator, whatever ran before it."""
    torch.manual_seed(0)
