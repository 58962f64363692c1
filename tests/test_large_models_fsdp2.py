"""FSDP2 on two processes: each holds half of every parameter and of every task's examples, and finds what one would."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import metanudge as mn
from problems import normal, squared_error
from processes import example, group, spawned

SGD = mn.TorchOptimizer(lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.5), steps=3)
ADAMW = mn.TorchOptimizer(lambda parameters: torch.optim.AdamW(parameters, lr=0.01, eps=1e-3), steps=3)
LEAN = mn.FOBMAML(nudge="full", nu=0.3, start="initialization", certify=False)
CASES: dict[str, dict[str, Any]] = {
    "lean": {"solver": SGD, "estimator": LEAN},
    "adamw": {"solver": ADAMW, "estimator": mn.FOBMAML(nu=0.3, certify=False)},
    "certified": {"solver": mn.Nesterov(4), "estimator": mn.FOBMAML(nu=0.3)},
    "shared_body": {"solver": SGD, "estimator": mn.FOBMAML(nudge="full", nu=0.3), "adapt_only": "4"},
    "microbatch": {"solver": SGD, "estimator": LEAN, "microbatch": 2},
    "sharpness": {"solver": mn.Nesterov(4), "estimator": mn.FOBMAML(nu=0.3), "sharpness_radius": 0.3},
    "auto_full": {"solver": SGD, "estimator": mn.FOBMAML(nudge="full", start="initialization")},
    "auto_linear": {"solver": mn.Nesterov(8), "estimator": mn.FOBMAML()},
}
ROUND_OFF = torch.finfo(torch.float32).eps ** (2 / 3)
"""Of an estimate with ``nu="auto"``: that of its solutions over a displacement of at least eps ** (1 / 3)."""


def network() -> nn.Module:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 7), nn.Tanh(), nn.Linear(7, 1))
    model[2].bias.requires_grad_(False)
    return model


def fitted_network() -> nn.Module:
    """What ``fitted`` leaves."""
    model = network()
    fitted(model, tasks(slice(0, 8)))
    return model


def tasks(part: slice) -> mn.Tasks:
    g = torch.Generator().manual_seed(2)

    def batch() -> mn.Batch:
        x, y = normal(g, 2, 8, 5).float(), normal(g, 2, 8, 1).float()
        return mn.Batch(x[:, part], y[:, part])

    return mn.Tasks(batch(), batch())


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def found(model: nn.Module, data: mn.Tasks, settings: dict[str, Any]) -> dict[str, Any]:
    """What a step and an evaluation give; with the execution that "auto" takes, where there is a choice."""
    torch.manual_seed(3)
    theta = [whole(parameter).detach().clone() for parameter in model.parameters()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", mn.UnsolvedWarning)
        learner = mn.MetaLearner(model, squared_error, prox=2.0, **settings)
        step = learner.backward(data)
    curves = learner.evaluate(data).curve
    assert all(torch.equal(whole(p), value) for p, value in zip(model.parameters(), theta, strict=True))
    gradient = torch.cat([whole(p.grad).reshape(-1) for p in model.parameters() if p.grad is not None])
    return {"step": (*step[:-1], *step.query_losses), "curves": curves, "gradient": gradient}


def fitted(model: nn.Module, data: mn.Tasks) -> list[float]:
    """Query losses of a training that keeps nothing on disk."""
    learner = mn.MetaLearner(model, squared_error, prox=2.0, execution="in_place", **CASES["lean"])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", mn.UnsolvedWarning)
        found = mn.fit(learner, optimizer, data, steps=3, tasks_per_step=2, progress=False)
    return [record.query_loss for record in found.history]


def restored(model: nn.Module, data: mn.Tasks) -> list[float]:
    """Norms of the weights that a training goes back to, the first ones, and of those it would have ended with."""
    norms = []
    for restore in (True, False):
        learner = mn.MetaLearner(model, squared_error, prox=2.0, execution="in_place", **CASES["lean"])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        kept = {"validation": data, "metric": mn.metrics.squared_error, "better": "larger", "restore_best": restore}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", mn.UnsolvedWarning)
            mn.fit(learner, optimizer, data, steps=3, every=1, tasks_per_step=2, progress=False, **kept)
        norms.append(float(torch.cat([whole(p).detach().flatten() for p in model.parameters()]).norm()))
    return norms


def refusals(model: nn.Module, data: mn.Tasks) -> list[str]:
    """What a sharded model does not allow."""
    told = []
    single = mn.Batch(*(leaf[0] for leaf in data.support))
    rank = torch.distributed.get_rank()
    uneven = mn.Tasks(*(mn.Batch(*(leaf[:, : 3 + rank] for leaf in batch)) for batch in data))
    before = [whole(parameter).detach().clone() for parameter in model.parameters()]
    for refused in (
        lambda: mn.MetaLearner(model, squared_error, estimator=mn.MAML()),
        lambda: mn.MetaLearner(model, squared_error).adapt(single),
        lambda: mn.MetaLearner(model, squared_error, warm_start=mn.WarmStart()),
        lambda: mn.MetaLearner(model, squared_error).backward(uneven),
    ):
        try:
            refused()
        except (mn.SettingsError, mn.TasksError) as error:
            told.append(str(error))
    assert all(torch.equal(whole(p), value) for p, value in zip(model.parameters(), before, strict=True))
    return told


def worker(rank: int, folder: Path) -> dict[str, Any]:
    results: dict[str, Any] = {"example": example("fsdp2", steps=2)}
    data = tasks(slice(4 * rank, 4 * rank + 4))
    with group(folder):
        for name, settings in CASES.items():
            model = network()
            fully_shard(model[0])
            fully_shard(model)  # the other layers belong to the root, which keeps what it gathers until a backward pass
            results[name] = found(model, data, settings)
        return results | {
            "refusals": refusals(model, data),
            "fit": fitted(model, data),
            "restored": restored(model, data),
        }


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return spawned(worker, 2, tmp_path_factory.mktemp("fsdp2"))


@pytest.mark.parametrize("name", CASES)
def test_two_processes_find_what_one_finds(name: str, ranks: list[dict[str, Any]]) -> None:
    one = found(network(), tasks(slice(0, 8)), {"execution": "in_place"} | CASES[name])
    tolerance = ROUND_OFF if name.startswith("auto") else 1e-6
    for rank in ranks:
        off = float((rank[name]["gradient"] - one["gradient"]).norm() / one["gradient"].norm())
        assert off < tolerance
        torch.testing.assert_close(rank[name]["curves"], one["curves"], rtol=1e-6, atol=0)
        # round-off of the estimate is in its bound too, which is relative to the estimate, so in absolute terms
        assert rank[name]["step"] == pytest.approx(one["step"], rel=max(tolerance, 1e-5), abs=tolerance, nan_ok=True)


def test_a_training_is_that_of_one_process(ranks: list[dict[str, Any]]) -> None:
    one = fitted(network(), tasks(slice(0, 8)))
    assert one[-1] < one[0]
    for rank in ranks:
        assert rank["fit"] == pytest.approx(one, rel=1e-5)


def test_the_best_weights_come_back(ranks: list[dict[str, Any]]) -> None:
    one = restored(fitted_network(), tasks(slice(0, 8)))
    assert one[0] != pytest.approx(one[1], rel=1e-4)
    for rank in ranks:
        assert rank["restored"] == pytest.approx(one, rel=1e-5)


def test_both_ranks_report_the_same(ranks: list[dict[str, Any]]) -> None:
    """Norms and losses are of all ranks, so that both take the same decisions."""
    for name in CASES:
        assert ranks[0][name]["step"] == pytest.approx(ranks[1][name]["step"], rel=0, nan_ok=True)


def test_what_a_sharded_model_does_not_allow_is_told(ranks: list[dict[str, Any]]) -> None:
    for rank, found in enumerate(ranks):
        maml, adapt, warm, uneven = found["refusals"]
        assert "Use FOBMAML" in maml
        assert "adapt copies the model, which FSDP2 does not allow" in adapt
        assert "a warm start keeps whole solutions" in warm
        assert f"this rank holds {3 + rank} support and {3 + rank} query examples" in uneven


def test_the_example_trains(ranks: list[dict[str, Any]]) -> None:
    before, after = ranks[0]["example"]
    assert after < before
    assert ranks[1]["example"] == (before, after)
