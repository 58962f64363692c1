"""What all tests share: seeds, and one thread."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch.fx.experimental import proxy_tensor

from metanudge.diagnostics.check.sweep import Sweep
from metanudge.oracle import compiled

# the tensors of the tests are tiny: a second thread only waits, and on a busy machine it waits long
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Every test starts from the same state of the generator, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture
def most(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Sets the steps up to which ``mn.check`` searches."""
    return partial(monkeypatch.setattr, importlib.import_module("metanudge.diagnostics.check.search"), "MOST")


@pytest.fixture
def short_search(most: Callable[[int], None]) -> None:
    """It tries no more than twice the learner's steps, for tests that do not look at what it recommends."""
    most(1)


@pytest.fixture
def yours_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """``mn.check`` measures the learner as it is, and varies nothing, for tests that look at its verdict alone."""
    monkeypatch.setattr(Sweep, "vary", lambda self, compare: None)


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """With compile=True, programs are the traced gradients themselves."""
    monkeypatch.setattr(compiled, "build", lambda graph, tensors: graph)
    # what a graph notes of shapes is for compilers, and takes two thirds of the time that tracing does
    monkeypatch.setattr(proxy_tensor, "extract_val", lambda value, include_real=False: None)
