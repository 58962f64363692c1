"""``mn.check`` and the command: the numbers against known ones, the user's model untouched, the advice sound."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import pytest
import torch

import metanudge as mn
from metanudge.cli import main
from metanudge.command.loading import load_learner
from problems import PROBLEMS, distance, estimate, single_tasks, squared_error

EXAMPLE = Path(__file__).parent.parent / "examples" / "sinusoid.py"
SMALL = {"reference_steps": 200, "compare": ["fomaml", "imaml"]}


def learner_on(problem: str, steps: int, **settings: object) -> tuple[mn.MetaLearner, mn.Tasks]:
    made = PROBLEMS[problem]()
    settings = {"prox": made.prox, "solver": mn.Nesterov(steps), **settings}
    return mn.MetaLearner(made.make(), made.loss, **settings), made.tasks


@pytest.mark.usefixtures("short_search")
@pytest.mark.parametrize("problem", ["ridge", "logistic"])
def test_its_errors_are_those_to_the_closed_form(problem: str) -> None:
    made = PROBLEMS[problem]()
    learner, tasks = learner_on(problem, 6)
    found = mn.check(learner, tasks, **SMALL)
    exact = made.meta_gradient()
    for row, estimator in (
        (found.rows[0], mn.FOBMAML()),
        *((r, mn.FOMAML()) for r in found.rows if r.label == "fomaml"),
    ):
        given = estimate(made, estimator, mn.Nesterov(6))
        assert row.relative_error == pytest.approx(distance(given, exact), rel=1e-4)
        assert row.cosine == pytest.approx(float(given @ exact / given.norm() / exact.norm()), rel=1e-6)
    assert found.reference_residual < 1e-8
    assert "float64" in found.reference
    assert not found.kinked


@pytest.mark.usefixtures("short_search")
def test_every_estimator_and_every_setting_has_its_row() -> None:
    learner, tasks = learner_on("logistic", 8)
    found = mn.check(learner, tasks, reference_steps=100)
    groups = [row.group for row in found.rows]
    assert groups.count("estimator") == len(mn.ESTIMATORS) - 1
    assert [row.steps for row in found.rows if row.group == "steps"] == [4, 16, 32]
    assert groups.count("nu") == 3
    assert [row.prox / learner.prox for row in found.rows if row.group == "prox"] == pytest.approx([0.1, 10])
    assert all(row.gradients > 0 and row.peak_bytes > 0 and row.seconds > 0 for row in found.rows)
    assert found.verdict in str(found)
    assert all(row.label in str(found) for row in found.rows)
    assert found.figure().axes[0].get_xscale() == "log"


@pytest.mark.usefixtures("short_search")
@pytest.mark.parametrize("execution", ["vectorized", "in_place"])
def test_nothing_of_the_users_changes(execution: str) -> None:
    learner, tasks = learner_on("mlp", 4, execution=execution)
    for parameter in learner.model.parameters():
        parameter.grad = torch.full_like(parameter, 3.0)
    before = {name: value.clone() for name, value in learner.model.state_dict().items()}
    state = torch.get_rng_state()
    mn.check(learner, tasks, **SMALL)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in learner.model.state_dict().items())
    assert all(bool((parameter.grad == 3).all()) for parameter in learner.model.parameters())


def network(activation: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(1, 40), activation, torch.nn.Linear(40, 40), activation, torch.nn.Linear(40, 1)
    )


@pytest.mark.usefixtures("short_search", "yours_alone")
@pytest.mark.parametrize(
    ("activation", "kinked"),
    [
        (torch.nn.Tanh(), False),
        (torch.nn.GELU(), False),
        (torch.nn.Softplus(), False),
        (torch.nn.ReLU(), True),
        (torch.nn.LeakyReLU(0.1), True),
        (torch.nn.Hardtanh(-0.3, 0.3), True),
    ],
    ids=str,
)
def test_it_recognises_kinks_and_says_so(activation: torch.nn.Module, kinked: bool) -> None:
    learner = mn.MetaLearner(network(activation), mn.metrics.squared_error, prox=200.0, solver=mn.Nesterov(4))
    found = mn.check(learner, mn.tasks.sinusoid(2), reference_steps=30, compare=[])
    assert found.kinked == kinked
    assert ("kinks" in found.verdict) == kinked


@pytest.mark.usefixtures("yours_alone")
def test_a_starved_setting_is_bad_and_the_advice_mends_it() -> None:
    learner, tasks = load_learner(f"{EXAMPLE}:starved")[:2]
    found = mn.check(learner, tasks, compare=["fomaml"], max_tasks=2, reference_steps=100)
    assert not found.good
    assert found.verdict.startswith("Bad")
    advised = found.recommendation
    assert advised is not None
    assert f"{advised.steps}" in found.verdict
    assert advised.prox == learner.prox  # which 256 steps keep, though doublings of 4 end at 128
    two = mn.Tasks(*(mn.Batch(*(leaf[:2] for leaf in batch)) for batch in tasks))

    def gradient(estimator: mn.Estimator, steps: int, dtype: torch.dtype) -> torch.Tensor:
        model = copy.deepcopy(learner.model).to(dtype)
        given = mn.Tasks(*(mn.Batch(*(leaf.to(dtype) for leaf in batch)) for batch in two))
        mn.MetaLearner(
            model, mn.metrics.squared_error, prox=advised.prox, solver=mn.Nesterov(steps), estimator=estimator
        ).backward(given)
        return torch.cat([parameter.grad.flatten().double() for parameter in model.parameters()])

    followed = gradient(mn.FOBMAML(), advised.steps, torch.float32)
    exact = gradient(mn.Tangent(), 1500, torch.float64)
    assert float((followed - exact).norm() / exact.norm()) == pytest.approx(advised.relative_error, rel=0.01)
    assert advised.relative_error < 0.1


@pytest.mark.usefixtures("short_search")
def test_what_can_not_be_differentiated_twice_has_a_stencil_for_reference() -> None:
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(x)
            return x.square()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: object, grad: torch.Tensor) -> torch.Tensor:
            (x,) = ctx.saved_tensors
            return 2 * x * grad

    made = PROBLEMS["ridge"]()

    def loss(model: torch.nn.Module, batch: mn.Batch) -> torch.Tensor:
        return Once.apply(model(batch.inputs).squeeze(-1) - batch.targets.reshape(batch.inputs.shape[0])).mean()

    model = torch.nn.Linear(made.tasks.support.inputs.shape[-1], 1).double()
    learner = mn.MetaLearner(model, loss, solver=mn.Nesterov(16), execution="in_place")
    found = mn.check(learner, made.tasks, reference_steps=40, compare=["imaml"])
    assert found.reference.startswith("a fourth-order stencil")
    assert found.rows[0].relative_error < 1e-3
    assert found.rows[-1].note
    assert math.isnan(found.rows[-1].cosine)
    assert found.rows[-1].note in str(found)


def test_settings_it_can_not_use() -> None:
    learner, tasks = learner_on("ridge", 4)
    with pytest.raises(mn.SettingsError, match="compare names estimators"):
        mn.check(learner, tasks, compare=["sgd"])
    with pytest.raises(mn.TasksError):
        mn.check(learner, [])
    whole = single_tasks(tasks)[0]
    in_place = mn.MetaLearner(learner.model, squared_error, solver=mn.GradientDescent(2, lr=0.1), execution="in_place")
    with pytest.raises(mn.TasksError, match=r"mn.Minibatches\s+has none.*whole support sets"):
        mn.check(in_place, [mn.Tasks(mn.Minibatches([whole.support]), whole.query)])


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "found"
    given = ["check", f"{EXAMPLE}:make", "--max-tasks", "2", "--reference-steps", "100", "--out", str(out)]
    assert main(given) == 0
    told, working = capsys.readouterr()
    assert "comparing with the exact meta-gradient: steps=" in working
    assert "residual" in told
    assert "fomaml" in told
    record = json.loads((out / "check.json").read_text())
    assert record["rows"][0]["group"] == "yours"
    assert {path.name for path in out.iterdir()} == {"check.json", "check.png", "check.svg"}


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("nothing", "expected FILE.py:FUNCTION"),
        ("nowhere.py:make", "no file nowhere.py"),
        ("no.such.module:make", "no module 'no.such.module'"),
        ("{file}:absent", "no function 'absent'"),
        ("{file}:number", "returned int"),
        ("{file}:wrong_optimizer", "where a torch optimizer belongs"),
    ],
)
def test_what_can_not_be_loaded_says_why(
    tmp_path: Path, target: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "import torch, metanudge as mn\n"
        "def number(): return 3\n"
        "def wrong_optimizer():\n"
        "    model = torch.nn.Linear(1, 1)\n"
        "    return mn.MetaLearner(model, mn.metrics.squared_error), mn.tasks.sinusoid(2), 3\n"
    )
    with pytest.raises(mn.SettingsError, match=words):
        load_learner(target.format(file=file))
    assert main(["check", target.format(file=file)]) == 2
    assert "metanudge:" in capsys.readouterr().err


def test_a_module_below_the_working_directory_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "my_own_problem.py").write_text(
        "import torch, metanudge as mn\n"
        "def make():\n"
        "    return mn.MetaLearner(torch.nn.Linear(1, 1), mn.metrics.squared_error), mn.tasks.sinusoid(2)\n"
    )
    assert isinstance(load_learner("my_own_problem:make").learner, mn.MetaLearner)
