"""Passes recorded as CUDA graphs, on a GPU: what each of them gives when it is run, repeated."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metanudge as mn
import test_large_models
from metanudge.oracle import recorded
from problems import DTYPE, PROBLEMS, distance, flat_gradient, squared_error
from test_gpu import GPU, LEAN, dropout, estimated, on, small

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests beside this one keep the GPU busy."""
    monkeypatch.setattr(recorded, "BEHIND", math.inf)


SGD = mn.TorchOptimizer(lambda p: torch.optim.SGD(p, lr=0.1), 4)


@pytest.mark.parametrize(
    "estimator", [LEAN, mn.FOBMAML(nu=1e-3), mn.FOMAML(), mn.Reptile()], ids=lambda estimator: repr(estimator)[:40]
)
def test_estimators(estimator: object) -> None:
    found = []
    for graphs in (False, True):
        settings = {"estimator": estimator, "solver": SGD, "execution": "in_place", "cuda_graphs": graphs}
        found.append(estimated(PROBLEMS["mlp"](), GPU, **settings))
    assert distance(found[1][0], found[0][0]) < 1e-9
    assert found[1][1].gradient_evaluations == found[0][1].gradient_evaluations


@pytest.mark.parametrize("name", test_large_models.ROWS)
def test_the_rows_of_large_models(name: str) -> None:
    """In float32, whose kernels a GPU has: against the formulas in float64 on a CPU."""
    row, settings = test_large_models.ROWS[name], {"solver": test_large_models.sgd(), "estimator": LEAN}
    model, plain = test_large_models.both(row)
    there = test_large_models.gradient(
        model.float().to(GPU), on(GPU, test_large_models.tasks(), torch.float32), cuda_graphs=True, **settings
    )
    here = test_large_models.gradient(plain, **settings)
    assert distance(there.cpu().double(), here) < 2e-3


def gradient(model: nn.Module, loss: object = squared_error, data: object = None, **settings: object) -> Tensor:
    learner = mn.MetaLearner(model, loss, solver=SGD, estimator=LEAN, execution="in_place", **settings)
    torch.manual_seed(3)
    learner.backward(on(GPU, small()) if data is None else data)
    return flat_gradient(model)


@pytest.mark.parametrize("settings", [{}, {"microbatch": 4}], ids=str)
def test_dropout_draws_what_it_draws_without(settings: dict) -> None:
    assert distance(gradient(dropout(), cuda_graphs=True, **settings), gradient(dropout(), **settings)) < 1e-12


@pytest.mark.parametrize("policy", ["transductive", "frozen"])
def test_batch_norm(policy: str) -> None:
    def make() -> nn.Module:
        torch.manual_seed(1)
        layers = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 1)
        return nn.Sequential(*layers).to(GPU, DTYPE)

    found = [gradient(make(), cuda_graphs=graphs, batch_norm=policy) for graphs in (False, True)]
    assert distance(found[1], found[0]) < 1e-12


def test_autocast_and_a_compiled_model() -> None:
    def loss(model: nn.Module, batch: mn.Batch) -> Tensor:
        with torch.autocast(GPU, torch.bfloat16):
            return squared_error(model, batch)

    def make(compiles: bool) -> nn.Module:
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(4, 32), nn.GELU(), nn.Linear(32, 1)).to(GPU)
        return torch.compile(model) if compiles else model

    data = on(GPU, small(), torch.float32)
    for compiles in (False, True):
        found = [gradient(make(compiles), loss, data, cuda_graphs=graphs) for graphs in (False, True)]
        assert distance(found[1], found[0]) < 1e-3
    with torch.autocast(GPU, torch.bfloat16):  # around the step
        found = [gradient(make(False), squared_error, data, cuda_graphs=graphs) for graphs in (False, True)]
    assert distance(found[1], found[0]) < 1e-3


REFUSED: dict[str, Callable[[Tensor], Tensor | float]] = {
    "number": lambda loss: float(loss.detach()),
    "tensor of a number": lambda loss: torch.tensor(2.0, device=loss.device),
    "random numbers of the CPU": lambda _: torch.rand((), dtype=DTYPE).item(),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_can_not_be_recorded_is_refused_and_leaves_nothing_behind(name: str) -> None:
    def loss(model: nn.Module, batch: mn.Batch) -> Tensor:
        value = squared_error(model, batch)
        return value * (1 + 0 * REFUSED[name](value))

    model = dropout()
    before, random = copy.deepcopy(model.state_dict()), torch.cuda.get_rng_state()
    with pytest.raises(mn.LossError, match="leave cuda_graphs out"):
        gradient(model, loss, cuda_graphs=True)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not torch.cuda.is_current_stream_capturing()
    torch.cuda.empty_cache()  # which it refuses while something is recorded
    torch.cuda.set_rng_state(random)
    first = F.dropout(torch.ones(1000, device=GPU)).sum()
    torch.cuda.set_rng_state(random)
    assert F.dropout(torch.ones(1000, device=GPU)).sum() == first  # the generator draws as before
    assert distance(gradient(model, cuda_graphs=True), gradient(dropout())) < 1e-12  # and the next one is recorded


def test_memory_is_kept_and_does_not_grow() -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 1024), nn.Tanh(), nn.Linear(1024, 1024), nn.Tanh(), nn.Linear(1024, 1)).to(GPU)
    slow = mn.TorchOptimizer(lambda p: torch.optim.SGD(p, lr=1e-3), 4)
    learner = mn.MetaLearner(model, squared_error, solver=slow, estimator=LEAN, cuda_graphs=True)
    data, held = on(GPU, small(), torch.float32), []
    for _ in range(5):
        model.zero_grad()
        learner.backward(data)
        held.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))
    assert len(set(held[2:])) == 1
