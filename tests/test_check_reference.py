"""What ``mn.check`` compares with: closed forms, its own convergence, the tasks that are compared, what is put back."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import metanudge as mn
from metanudge.diagnostics.check import implicit
from metanudge.diagnostics.check.advice import verdict
from metanudge.diagnostics.check.bench import Bench, first
from metanudge.diagnostics.check.reference import Reference, References
from metanudge.diagnostics.check.result import SAFE, CheckRow
from metanudge.diagnostics.check.search import _lengths, recommend
from problems import PROBLEMS, distance

FEW = {"compare": [], "reference_steps": 30}


class Diagonal(torch.nn.Module):
    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.phi = torch.nn.Parameter(start.clone())


def bowl(model: Diagonal, batch: mn.Batch) -> Tensor:
    return (batch.inputs * (model.phi - batch.targets).square()).sum() / 2


def bowls(curvatures: Tensor, seed: int = 0) -> mn.Tasks:
    """Support losses with these curvatures ``[T, d]``, query losses with curvature 1."""
    generator = torch.Generator().manual_seed(seed)
    centres, aims = (torch.randn(curvatures.shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return mn.Tasks(mn.Batch(curvatures, centres), mn.Batch(torch.ones_like(curvatures), aims))


def exact(theta: Tensor, tasks: mn.Tasks, prox: float) -> Tensor:
    """λ (h + λ)⁻¹ (φ - b) with φ = (h a + λ θ) / (h + λ), ``[T, d]``."""
    h, centre = tasks.support
    phi = (h * centre + prox * theta) / (h + prox)
    return prox / (h + prox) * (phi - tasks.query.targets)


def steep(size: int, low: float = 0, high: float = 7) -> Tensor:
    return torch.logspace(low, high, size, dtype=torch.float64).unsqueeze(0)


@pytest.mark.usefixtures("short_search", "yours_alone")
@pytest.mark.parametrize("at_the_solution", [False, True])
def test_an_ill_conditioned_problem_is_judged_by_its_closed_form(at_the_solution: bool) -> None:
    """Curvatures from 1 to 1e7: what 30 steps of conjugate gradients leave is the learner's error, not the truth."""
    tasks = bowls(steep(40))
    start = tasks.support.targets[0] if at_the_solution else torch.ones(40, dtype=torch.float64)
    learner = mn.MetaLearner(Diagonal(start), bowl, solver=mn.Nesterov(2), estimator=mn.IMAML(cg_steps=30, tol=1e-8))
    found = mn.check(learner, tasks, **FEW)
    learner.backward(tasks)
    truth = exact(start, tasks, 1.0).mean(0)
    error = distance(learner.model.phi.grad, truth)
    assert error > 0.2
    assert found.trusted
    assert found.rows[0].relative_error == pytest.approx(error, rel=0.01)
    assert found.verdict.startswith("Bad")


@pytest.mark.usefixtures("yours_alone")
def test_a_reference_that_does_not_converge_gives_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = bowls(steep(100))
    start = tasks.support.targets[0]
    monkeypatch.setattr(implicit, "LENGTHS", (20,))
    learner = mn.MetaLearner(Diagonal(start), bowl, estimator=mn.IMAML(cg_steps=20))
    found = mn.check(learner, tasks, **FEW)
    assert (found.trusted, found.good, found.recommendation) == (False, False, None)
    assert found.reference_error > 0.01
    assert found.verdict.startswith("No verdict")
    assert "raise reference_steps" in found.verdict
    assert not found.rows[0].trusted
    assert "the reference did not converge" in str(found)


def test_without_a_verdict_it_tells_where_there_would_be_one(
    most: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few steps of conjugate gradients do for curvatures up to 100 once prox is large; on kinks nothing is advised."""
    most(32)
    monkeypatch.setattr(implicit, "LENGTHS", (12,))
    tasks = bowls(steep(40, high=2))
    learner = mn.MetaLearner(Diagonal(tasks.support.targets[0]), bowl, prox=0.1, solver=mn.Nesterov(16))
    found = mn.check(learner, tasks, **FEW)
    advised = found.recommendation
    assert not found.trusted
    assert advised.prox > 0.1
    assert not found.kinked  # though the gradient vanishes where it began
    assert f"With steps={advised.steps} and prox={advised.prox:g} it converged" in found.verdict
    torch.manual_seed(0)
    kinked = torch.nn.Sequential(torch.nn.Linear(1, 40), torch.nn.ReLU(), torch.nn.Linear(40, 1))
    found = mn.check(mn.MetaLearner(kinked, mn.metrics.squared_error), mn.tasks.sinusoid(1), **FEW)
    assert (found.kinked, found.trusted, found.recommendation) == (True, False, None)
    assert not [row for row in found.rows if row.group == "search"]


@pytest.mark.usefixtures("short_search", "yours_alone")
def test_a_saddle_gives_no_verdict() -> None:
    """Curvature -2 with prox 1, begun where the gradient vanishes: every residual is zero, and there is no minimum."""
    tasks = bowls(torch.tensor([[-2.0, 1.0]]).double())
    learner = mn.MetaLearner(Diagonal(tasks.support.targets[0]), bowl)
    assert mn.check(learner, tasks, **FEW).verdict.startswith("No verdict")


@pytest.mark.parametrize("name", ["ridge", "logistic", "mlp"])
def test_newton_finishes_what_one_step_begins(name: str) -> None:
    made = PROBLEMS[name]()
    learner = mn.MetaLearner(made.make(), made.loss, prox=made.prox)
    found = References(Bench(learner, first(learner, made.tasks, 9)), 1, kinked=False).at(made.prox)
    assert found.trusted
    assert distance(found.gradient, made.meta_gradient()) < 1e-9


@pytest.mark.usefixtures("yours_alone")
def test_shared_parameters_have_their_part_of_the_reference() -> None:
    """The adapted head has a quadratic problem, on which the estimate is exact once it is solved."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(1, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)).double()
    tasks = mn.tasks.sinusoid(2, dtype=torch.float64)
    learner = mn.MetaLearner(model, mn.metrics.squared_error, solver=mn.Nesterov(24), adapt_only="2", prox=5.0)
    found = mn.check(learner, tasks, **FEW)
    assert found.rows[0].relative_error < 1e-5


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: object, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad * (1 - x.tanh().square())


@pytest.mark.usefixtures("short_search")
@pytest.mark.parametrize(("steps", "trusted"), [(4, True), (1, False)])
def test_a_stencil_is_tried_again_with_more_steps(steps: int, trusted: bool) -> None:
    made = PROBLEMS["ridge"]()

    def loss(model: torch.nn.Module, batch: mn.Batch) -> Tensor:
        return (Once.apply(model(batch.inputs)) - batch.targets.reshape(-1, 1)).square().mean()

    model = torch.nn.Linear(made.tasks.support.inputs.shape[-1], 1).double()
    learner = mn.MetaLearner(model, loss, solver=mn.Nesterov(8), execution="in_place")
    found = mn.check(learner, made.tasks, reference_steps=steps, compare=[], max_tasks=1)
    assert found.reference.startswith(f"a fourth-order stencil, {4 * steps} steps")
    assert found.trusted == trusted
    assert found.verdict.startswith("No verdict") == (not trusted)


def test_only_tasks_that_both_have_are_compared() -> None:
    """Curvature 100 diverges at this step size; the others are solved, and quadratic: their estimate is exact."""
    tasks = bowls(torch.tensor([[1.0, 2.0], [100.0, 100.0], [2.0, 1.0]]).double())
    model = Diagonal(torch.ones(2, dtype=torch.float64))
    learner = mn.MetaLearner(model, bowl, solver=mn.GradientDescent(24, lr=0.3))
    found = mn.check(learner, tasks, **FEW)
    mine = found.rows[0]
    assert (mine.dropped, found.good) == (1, True)
    assert mine.relative_error < 1e-6
    assert mine.cosine == pytest.approx(1)
    assert "1 of 3 tasks diverged" in found.verdict
    assert "  1 diverged" in str(found)
    kept = [row for row in found.rows if row.group == "prox" and row.prox == 0.1]
    assert kept[0].dropped == 1


@pytest.mark.usefixtures("yours_alone")
def test_a_task_without_an_exact_meta_gradient_is_left_out() -> None:
    tasks = bowls(torch.tensor([[1.0, 2.0], [3.0, 1.0], [2.0, 1.0]]).double())
    tasks.query.targets[1] = float("nan")
    model = Diagonal(torch.ones(2, dtype=torch.float64))
    found = mn.check(mn.MetaLearner(model, bowl, solver=mn.Nesterov(24)), tasks, **FEW)
    assert found.rows[0].relative_error < 1e-6
    assert found.rows[0].dropped == 0
    assert "Left out for want of an exact meta-gradient: 1 of 3 tasks" in found.verdict
    assert "NaN or infinite numbers in their data (task 1: query targets" in found.verdict
    tasks.query.targets[:] = float("nan")
    with pytest.raises(mn.NonFiniteError):
        mn.check(mn.MetaLearner(model, bowl), tasks, **FEW)


@pytest.mark.usefixtures("short_search", "yours_alone")
def test_a_learner_that_diverges_is_bad() -> None:
    tasks = bowls(torch.full((2, 3), 100.0).double())
    model = Diagonal(torch.ones(3, dtype=torch.float64))
    found = mn.check(mn.MetaLearner(model, bowl, solver=mn.GradientDescent(8, lr=0.3)), tasks, **FEW)
    assert found.verdict.startswith("Bad: there is no estimate")
    assert found.rows[0].note
    assert not found.good
    assert str(found)
    assert found.figure()


def test_without_a_proximal_term_there_is_nothing_to_compare_with() -> None:
    made = PROBLEMS["ridge"]()
    learner = mn.MetaLearner(made.make(), made.loss, prox=0, estimator=mn.MAML())
    with pytest.raises(mn.SettingsError, match="prox = 0"):
        mn.check(learner, made.tasks)
    for wrong in ({"max_tasks": 0}, {"reference_steps": 0}):
        with pytest.raises(mn.SettingsError, match=next(iter(wrong))):
            mn.check(mn.MetaLearner(made.make(), made.loss), made.tasks, **wrong)


@pytest.mark.usefixtures("yours_alone")
@pytest.mark.parametrize("which", ["loss", "query_loss"])
def test_either_loss_may_refuse_float64(which: str) -> None:
    def single(model: torch.nn.Module, batch: mn.Batch) -> Tensor:
        if batch.inputs.dtype == torch.float64:
            raise RuntimeError("this kernel has no float64")
        return mn.metrics.squared_error(model, batch)

    losses = {"loss": mn.metrics.squared_error, "query_loss": mn.metrics.squared_error} | {which: single}
    model = torch.nn.Sequential(torch.nn.Linear(1, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    found = mn.check(mn.MetaLearner(model, **losses, prox=20.0), mn.tasks.sinusoid(1), **FEW)
    assert found.reference.endswith("float32")
    assert found.good
    assert found.recommendation is None


def test_it_says_what_it_tried(most: Callable[[int], None]) -> None:
    """Steps beyond those usually searched, on a problem that none of them does for."""
    most(16)
    model = Diagonal(torch.ones(10, dtype=torch.float64))
    learner = mn.MetaLearner(model, bowl, solver=mn.GradientDescent(9, lr=1e-9), prox=1e-2)
    found = mn.check(learner, bowls(steep(10)), **FEW)
    assert found.recommendation is None
    judged = [row for row in found.rows if row.trusted]
    assert {row.steps for row in judged if row.group == "search"} == {18}
    assert max(row.steps for row in judged) == 36
    assert f"None of {len(judged)} settings, up to steps=36 and prox=3," in found.verdict


@pytest.mark.parametrize("steps", [1, 3, 4, 100, 130, 300])
def test_as_many_steps_are_searched_as_are_spoken_of(steps: int) -> None:
    """256, or twice the learner's, which doublings of theirs need not meet."""
    lengths = _lengths(steps)
    assert lengths[0] == max(256, 2 * steps)
    assert lengths[-1] == steps
    assert lengths == sorted(set(lengths), reverse=True)


def test_what_keeps_the_objective_is_told_first() -> None:
    """FOMAML at its best is bad here; FO-B-MAML is good at the same prox, so nothing is said of another one."""
    made = PROBLEMS["logistic"]()
    learner = mn.MetaLearner(made.make(), made.loss, prox=0.05, estimator=mn.FOMAML())
    found = mn.check(learner, made.tasks, compare=["fobmaml"], reference_steps=60)
    assert {row.prox for row in found.rows} == {0.05}
    assert "The estimator fobmaml has" in found.verdict
    assert "The bias of FOMAML is irreducible: (I + H/λ) ∇F instead of ∇F; no setting takes it away." in found.verdict
    assert "prox" not in found.verdict.split("None of")[0]
    mine, other = row(10, 0.5), row(5, 0.01, prox=3.0)
    reference = Reference(torch.ones(1), (0,), 0.0, 0.0, "")
    imaml = row(90, 0.02)._replace(group="estimator", label="imaml")
    told = verdict([mine, other, imaml], reference, 1, False, {}, False)
    assert told.index("The estimator imaml has") < told.index("No steps did at your prox")
    told = verdict([mine, row(20, 0.05, steps=16), imaml], reference, 1, False, {}, False)
    assert "imaml" not in told  # dearer, and more steps of the learner's own do


def row(gradients: float, error: float, steps: int = 8, prox: float = 1.0, **more: object) -> CheckRow:
    nan = float("nan")
    return CheckRow("steps", "", steps, prox, nan, error, nan, nan, gradients, 0, nan)._replace(**more)


def test_the_cheapest_row_that_does_is_recommended() -> None:
    good = row(40, 0.05, steps=16)
    rows = [
        row(10, 0.5),
        row(30, 0.01, trusted=False),
        row(20, 0.01, dropped=1),
        row(60, 0.001, steps=32),
        good,
        row(40, 0.06, prox=10.0),
        row(float("nan"), float("inf"), note="no"),
        row(35, 0.09),
    ]
    assert recommend(rows) == mn.diagnostics.Recommendation(16, 1.0, 0.05, 40)
    assert recommend(rows[:3]) is None


def test_the_own_prox_comes_first_then_the_nearest() -> None:
    """Another prox is another objective, however cheap."""
    dear, near, far = row(400, 0.05, steps=64), row(40, 0.01, prox=3.0), row(20, 0.01, prox=10.0)
    assert recommend([row(10, 0.5), far, near, dear]).steps == 64
    assert recommend([row(10, 0.5), far, near]).prox == 3.0
    assert recommend([far, near], prox=1.0).prox == 3.0


@pytest.mark.parametrize(
    ("error", "uncertainty", "good"),
    [
        (1.0, 0.025, False),  # the reference is 2.5 % off, the estimate 100 %
        (0.5, 0.2, None),
        (0.13, 0.025, False),
        (0.12, 0.025, None),  # truly 9.5 %, perhaps
        (0.09, 0.025, None),
        (0.07, 0.025, True),
        (1.0, float("inf"), None),  # a solve that is not done
        (0.01, float("inf"), None),
        (0.01, float("nan"), None),
    ],
)
def test_an_uncertain_reference_judges_what_it_can(error: float, uncertainty: float, good: bool | None) -> None:
    assert row(8, error, trusted=False, uncertainty=uncertainty).good is good


@pytest.mark.parametrize(("error", "residual", "good"), [(2e5, 0.94, False), (2e5, 0.3, None), (5.0, 0.94, None)])
def test_a_solve_hardly_begun_and_an_error_of_another_size_is_bad_whatever_the_reference(
    error: float, residual: float, good: bool | None
) -> None:
    assert row(8, error, trusted=False, uncertainty=float("inf"))._replace(residual=residual).good is good


@pytest.mark.usefixtures("short_search", "yours_alone")
def test_a_reference_a_little_off_still_tells_a_bad_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Conjugate gradients cut short leave some percent; an estimate that is off by far more is bad all the same."""
    monkeypatch.setattr(implicit, "LENGTHS", (22,))
    tasks = bowls(steep(40, high=2))
    learner = mn.MetaLearner(Diagonal(tasks.support.targets[0]), bowl, prox=0.3, solver=mn.Nesterov(1))
    found = mn.check(learner, tasks, **FEW)
    assert not found.trusted
    assert 0.01 < found.reference_error < 0.1
    assert found.rows[0].relative_error > 4 * found.reference_error
    assert found.verdict.startswith("Bad: the estimate is")
    assert f"which is itself known to {100 * found.reference_error:.2g} %" in found.verdict
    assert not found.good


def test_steps_are_recommended_before_a_larger_prox() -> None:
    """A larger prox costs less and is told, with what it is: another objective."""
    tasks = bowls(steep(20, high=2))
    learner = mn.MetaLearner(Diagonal(torch.ones(20, dtype=torch.float64)), bowl, solver=mn.Nesterov(16), prox=0.3)
    found = mn.check(learner, tasks, compare=["tangent"], reference_steps=30)
    good = [row for row in found.rows if row.group != "estimator" and row.trusted and row.relative_error < SAFE]
    advised = found.recommendation
    assert advised.gradients == min(row.gradients for row in good if row.prox == 0.3)
    assert advised.gradients > min(row.gradients for row in good)
    assert (advised.steps, advised.prox) == (64, 0.3)
    assert "Raise steps from 16 to 64: " in found.verdict
    assert "Steps=16 and prox=3 have " in found.verdict
    assert "but another prox is another objective" in found.verdict
    assert "judge it by validation" in found.verdict


def test_where_no_steps_do_another_prox_is_recommended_with_a_warning(most: Callable[[int], None]) -> None:
    """Curvatures up to 100 and prox 0.001: Nesterov's method needs hundreds of steps."""
    most(64)
    tasks = bowls(steep(20, low=-1, high=2))
    learner = mn.MetaLearner(Diagonal(torch.ones(20, dtype=torch.float64)), bowl, solver=mn.Nesterov(8), prox=1e-3)
    found = mn.check(learner, tasks, compare=[], reference_steps=30)
    assert found.recommendation.prox > 1e-3
    assert "No steps did at your prox; another prox is another objective" in found.verdict


@pytest.mark.usefixtures("yours_alone")
def test_a_warm_start_is_told_to_be_left_out() -> None:
    made = PROBLEMS["ridge"]()
    settings = {"prox": made.prox, "solver": mn.Nesterov(6)}
    cold = mn.check(mn.MetaLearner(made.make(), made.loss, **settings), made.tasks, **FEW)
    warm = mn.check(mn.MetaLearner(made.make(), made.loss, warm_start=mn.WarmStart(), **settings), made.tasks, **FEW)
    assert "warm start" not in cold.verdict
    assert "without the warm start: solves begin at the initialisation" in str(warm)


def test_a_nudge_that_does_not_fit_is_told() -> None:
    """On a logistic loss a nudge this large bends the problem; the default one does not."""
    made = PROBLEMS["logistic"]()
    settings = {"prox": made.prox, "solver": mn.Nesterov(16)}
    learner = mn.MetaLearner(made.make(), made.loss, estimator=mn.FOBMAML(nu=1e3), **settings)
    found = mn.check(learner, made.tasks, **FEW)
    assert found.verdict.startswith("Bad")
    nu = found.recommendation.nu
    assert nu is not None
    assert "nu to " in found.verdict
    followed = mn.MetaLearner(made.make(), made.loss, estimator=mn.FOBMAML(nu=nu), **settings)
    assert mn.check(followed, made.tasks, **FEW).good


class StopError(Exception):
    """Of a loss that has had enough."""


@pytest.mark.usefixtures("short_search")
@pytest.mark.parametrize("execution", ["vectorized", "in_place"])
@pytest.mark.parametrize("calls", [3, 40, 700, None])
def test_nothing_of_the_users_changes_whatever_happens(execution: str, calls: int | None) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(1, 4), torch.nn.BatchNorm1d(4), torch.nn.Tanh(), torch.nn.Linear(4, 1), torch.nn.Dropout(0.1)
    )
    model[4].eval()
    model[0].bias.requires_grad_(False)
    model[3].weight.grad = torch.ones_like(model[3].weight)
    left = [calls]

    def loss(model: torch.nn.Module, batch: mn.Batch) -> Tensor:
        if left[0] is not None:
            left[0] -= 1
            if left[0] < 0:
                raise StopError
        return mn.metrics.squared_error(model, batch)

    store = mn.WarmStart()
    learner = mn.MetaLearner(
        model,
        loss,
        prox=10.0,
        solver=mn.Nesterov(4),
        execution=execution,
        warm_start=store,
        batch_norm="transductive",
    )
    left[0], wanted = None, calls
    learner.backward(mn.tasks.sinusoid(2), indices=[0, 1])
    left[0] = wanted

    def everything() -> dict[str, object]:
        return {
            "state": {name: value.clone() for name, value in model.state_dict().items()},
            "gradients": [parameter.grad for parameter in model.parameters()],
            "values": [p.grad.clone() for p in model.parameters() if p.grad is not None],
            "modes": [module.training for module in model.modules()],
            "trainable": [parameter.requires_grad for parameter in model.parameters()],
            "learner": dict(learner.__dict__),
            "told": dataclasses.replace(learner._told, kinds=set(learner._told.kinds)),
            "kept": store.state_dict()["solutions"],
            "random": torch.get_rng_state(),
        }

    before = everything()
    loader = (mn.tasks.sinusoid(2, seed=int(torch.randint(9, ()))) for _ in range(2))
    settings = {"compare": ["fomaml", "imaml"], "reference_steps": 20, "max_tasks": 1}
    if calls is None:
        mn.check(learner, loader, **settings)
    else:
        with pytest.raises(StopError):
            mn.check(learner, loader, **settings)
    after = everything()
    for part in ("state", "gradients", "values", "kept", "random"):
        torch.testing.assert_close(after[part], before[part], rtol=0, atol=0)
    assert all(one is other for one, other in zip(after["gradients"], before["gradients"], strict=True))
    for part in ("modes", "trainable", "learner", "told"):
        assert after[part] == before[part]


def test_chunks_are_those_of_the_learner() -> None:
    learner = mn.MetaLearner(torch.nn.Linear(1, 1), mn.metrics.squared_error, chunk_size=2)
    bench = Bench(learner, first(learner, mn.tasks.sinusoid(2), 2))
    assert bench.make(bench.model, learner.solver, 1.0, learner.estimator).execution.chunk_size == 2
