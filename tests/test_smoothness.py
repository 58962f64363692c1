"""``mn.smoothness``: closed forms, the exact Hessian along the way, and everything put back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

import metanudge as mn
from metanudge.cli import main
from metanudge.diagnostics import ExactMetaObjective
from metanudge.diagnostics.smoothness import fit
from metanudge.tasks import logistic, logistic_loss, logistic_model
from problems import PROBLEMS

EXAMPLE = Path(__file__).parent.parent / "examples" / "sinusoid.py"


class Diagonal(torch.nn.Module):
    def __init__(self, start: list[float]) -> None:
        super().__init__()
        self.phi = torch.nn.Parameter(torch.tensor(start, dtype=torch.float64))


def bowl(model: Diagonal, batch: mn.Batch) -> Tensor:
    return (batch.inputs * (model.phi - batch.targets).square()).sum() / 2


def test_quadratic_losses_have_constant_smoothness() -> None:
    """Curvature h in support, q in query: F'' = q (λ / (h + λ))², here 4 (1/2)² = 1 in both directions."""
    h, q = torch.tensor([[1.0, 1.0]]).double(), torch.tensor([[4.0, 4.0]]).double()
    tasks = mn.Tasks(mn.Batch(h, torch.zeros(1, 2).double()), mn.Batch(q, torch.ones(1, 2).double()))
    model = Diagonal([30.0, 5.0])
    learner = mn.MetaLearner(model, bowl, prox=1.0, solver=mn.Nesterov(60))
    found = mn.smoothness(learner, tasks, torch.optim.SGD(model.parameters(), lr=0.05), steps=8)
    assert found.smoothness.tolist() == pytest.approx([1.0] * 8, rel=1e-5)
    assert pytest.approx(1.0, rel=1e-5) == found.L0
    assert pytest.approx(0.0, abs=1e-6) == found.L1
    assert not found.grows
    assert found.lr == pytest.approx(1.0, rel=1e-5)
    assert "plain steps" in str(found)


def test_it_is_bounded_by_the_exact_hessian_and_near_it_along_the_dominant_direction() -> None:
    tasks = logistic(4, features=6, seed=2)
    model = logistic_model(6)
    with torch.no_grad():
        model.weight.copy_(6 * torch.randn(1, 6, generator=torch.Generator().manual_seed(0)).double())
    learner = mn.MetaLearner(model, logistic_loss, prox=0.3, solver=mn.Nesterov(120))
    start = model.weight.detach().clone()
    optimizer = mn.optim.NormalizedSGD(model.parameters(), lr=0.3, momentum=0.0)
    found = mn.smoothness(learner, tasks, optimizer, steps=6)
    exact = ExactMetaObjective(model, logistic_loss, tasks, 0.3)
    theta = start.reshape(-1)
    for norm, slope in zip(found.gradient_norms, found.smoothness, strict=True):
        gradient = exact.gradient(theta)
        assert float(norm) == pytest.approx(float(gradient.norm()), rel=1e-5)
        move = -0.3 * gradient / gradient.norm()
        change = exact.gradient(theta + move / 2) - gradient
        assert float(slope) == pytest.approx(float(change.norm() / (move / 2).norm()), rel=1e-3)
        theta = theta + move


def test_growth_gives_the_clipping_that_theory_gives() -> None:
    """L = 2 + 5 g, seen from 2.5 on: lr = 1 / (2 * 2.5), max_step = 1 / (2 L1), and steps of that size are safe."""
    norms = torch.linspace(0.1, 4.0, 30).double()
    found = fit(norms, 2 + 5 * norms)
    assert (pytest.approx(2.0), pytest.approx(5.0)) == (found.L0, found.L1)
    assert found.correlation == pytest.approx(1.0)
    assert found.lr == pytest.approx(1 / 5)
    assert found.max_step == pytest.approx(1 / 10)
    assert found.max_norm == pytest.approx(0.5)
    sizes = torch.minimum(torch.full_like(norms, found.lr), found.max_step / norms)
    assert bool((sizes * (2 + 5 * norms) <= 1 + 1e-9).all())
    assert "ClippedSGD(parameters, lr=0.2, max_step=0.1)" in str(found)
    assert found.figure().axes[0].get_xlabel()


def test_the_fit_is_never_negative() -> None:
    norms = torch.linspace(1.0, 2.0, 10).double()
    falling, steep = fit(norms, 5 - norms), fit(norms, 3 * norms - 2)
    assert falling.L1 == 0
    assert pytest.approx(3.5) == falling.L0
    assert not falling.grows
    assert steep.L0 == 0
    assert pytest.approx(float((norms * (3 * norms - 2)).sum() / norms.square().sum())) == steep.L1
    assert steep.lr == pytest.approx(1 / (2 * float(((3 * norms - 2) / (steep.L1 * norms)).quantile(0.9)) * 1.0))


def snapshot(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> tuple[list[Tensor], list[Tensor], object]:
    return (
        [parameter.detach().clone() for parameter in model.parameters()],
        [parameter.grad for parameter in model.parameters()],
        {
            key: {name: torch.as_tensor(x).clone() for name, x in state.items()}
            for key, state in optimizer.state.items()
        },
    )


@pytest.mark.parametrize("fails", [False, True])
def test_everything_is_put_back(fails: bool) -> None:
    made = PROBLEMS["mlp"]()
    model, calls = made.make(), []

    def loss(model: torch.nn.Module, batch: mn.Batch) -> Tensor:
        calls.append(None)
        if fails and len(calls) > 400:
            raise RuntimeError("enough")
        return made.loss(model, batch)

    learner = mn.MetaLearner(model, loss, prox=made.prox, solver=mn.Nesterov(4), execution="in_place")
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    learner.backward(made.tasks)
    optimizer.step()
    values, gradients, state = snapshot(model, optimizer)
    random = torch.get_rng_state()
    calls.clear()
    if fails:
        with pytest.raises(RuntimeError, match="enough"):
            mn.smoothness(learner, made.tasks, optimizer, steps=8)
    else:
        mn.smoothness(learner, made.tasks, optimizer, steps=3)
    again = snapshot(model, optimizer)
    assert all(torch.equal(*pair) for pair in zip(values, again[0], strict=True))
    assert all(one is other for one, other in zip(gradients, again[1], strict=True))
    assert all(torch.equal(x, again[2][key][name]) for key, part in state.items() for name, x in part.items())
    assert torch.equal(torch.get_rng_state(), random)


def test_dropout_does_not_pass_for_curvature() -> None:
    """Common random numbers at both points: a linear model with dropout and tiny steps still has bounded smoothness."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Dropout(0.5), torch.nn.Linear(4, 1)).double()
    x = torch.randn(3, 20, 4).double()
    tasks = mn.Tasks(mn.Batch(x, x.sum(-1, keepdim=True)), mn.Batch(x, x.sum(-1, keepdim=True)))
    learner = mn.MetaLearner(model, mn.metrics.squared_error, prox=1.0)
    found = mn.smoothness(learner, tasks, torch.optim.SGD(model.parameters(), lr=1e-4), steps=4)
    assert float(found.smoothness.max()) < 20


def test_what_it_refuses() -> None:
    made = PROBLEMS["ridge"]()
    learner = mn.MetaLearner(made.make(), made.loss, prox=made.prox)
    with pytest.raises(mn.SettingsError, match="steps"):
        mn.smoothness(learner, made.tasks, steps=0)
    with pytest.raises(mn.SettingsError, match="two points"):
        mn.smoothness(learner, made.tasks, steps=1)
    with pytest.raises(mn.TasksError, match="no tasks"):
        mn.smoothness(learner, iter([]))
    stranger = torch.optim.SGD(torch.nn.Linear(1, 1).parameters(), lr=0.1)
    with pytest.raises(mn.NonFiniteError, match=r"learner\.model"):
        mn.smoothness(learner, made.tasks, stranger)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["smoothness", f"{EXAMPLE}:make", "--steps", "4", "--out", str(tmp_path)]) == 0
    assert "Hess F" in capsys.readouterr().out
    record = json.loads((tmp_path / "smoothness.json").read_text())
    assert len(record["smoothness"]) == 4
    assert {path.name for path in tmp_path.iterdir()} == {"smoothness.json", "smoothness.png", "smoothness.svg"}
    assert main(["smoothness", "nothing"]) == 2


def test_a_flat_measure_asks_for_no_clipping():
    norms = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    flat = fit(norms, torch.zeros(3, dtype=torch.float64))
    assert (flat.L0, flat.L1, flat.lr) == (0.0, 0.0, float("inf"))
    growing = fit(norms, torch.tensor([0.0, 0.5, 3.0], dtype=torch.float64))
    assert 0 < growing.lr < float("inf")


class Frozen(torch.nn.Module):
    """A learnt slope, and an offset that was frozen with a gradient left over."""

    def __init__(self) -> None:
        super().__init__()
        self.slope, self.offset = torch.nn.Parameter(torch.ones(1)), torch.nn.Parameter(torch.ones(1))
        self.offset.requires_grad_(False)
        self.offset.grad = torch.ones(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.slope * x + self.offset


def test_frozen_parameters_that_the_optimizer_holds_are_put_back() -> None:
    model = Frozen()
    learner = mn.MetaLearner(model, mn.metrics.squared_error, prox=2.0)
    mn.smoothness(learner, mn.tasks.sinusoid(2), torch.optim.SGD(model.parameters(), lr=0.1), steps=2)
    assert float(model.offset) == 1
    assert float(model.offset.grad) == 1


def test_drawing_from_a_loader_leaves_the_random_state() -> None:
    learner = mn.MetaLearner(torch.nn.Linear(1, 1), mn.metrics.squared_error, prox=2.0)
    state = torch.get_rng_state()
    mn.smoothness(learner, (mn.tasks.sinusoid(int(torch.randint(2, 4, ()))) for _ in range(2)), steps=2)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("execution", ["vectorized", "in_place"])
def test_a_warm_start_is_left_out_and_not_touched(execution: str) -> None:
    made = PROBLEMS["logistic"]()
    cold, warm = (
        mn.MetaLearner(
            made.make(), made.loss, prox=made.prox, solver=mn.Nesterov(4), warm_start=store, execution=execution
        )
        for store in (None, mn.WarmStart())
    )
    warm.backward(made.tasks, indices=[2, 0, 1])
    before = warm.warm_start.state_dict()
    found, expected = (mn.smoothness(learner, made.tasks, steps=2) for learner in (warm, cold))
    torch.testing.assert_close(found.smoothness, expected.smoothness)
    after = warm.warm_start.state_dict()
    assert after["indices"] == before["indices"]
    assert torch.equal(after["solutions"], before["solutions"])
    warm.backward(made.tasks, indices=[2, 0, 1])  # it still is what it was


@pytest.mark.usefixtures("short_search")
@pytest.mark.parametrize("diagnosis", [mn.smoothness, mn.check])
def test_the_learner_still_tells_what_it_tells_once(diagnosis: object) -> None:
    """Steeply curved tasks and one step: the solves are far from done."""
    x = torch.linspace(-3, 3, 8).reshape(1, 8, 1).repeat(3, 1, 1)
    targets = x.clone()
    targets[1] = float("nan")
    tasks = mn.Tasks(mn.Batch(x, targets), mn.Batch(x, x))
    model = torch.nn.Sequential(torch.nn.Linear(1, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    learner = mn.MetaLearner(model, mn.metrics.squared_error, prox=1.0, solver=mn.Nesterov(1))
    extra = {"steps": 2} if diagnosis is mn.smoothness else {"compare": [], "reference_steps": 20}
    diagnosis(learner, tasks, **extra)
    with pytest.warns(mn.NonFiniteWarning), pytest.warns(mn.UnsolvedWarning):
        learner.backward(tasks)
