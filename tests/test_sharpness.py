"""Query gradients at the worst point near an adapted model: the same estimators, of a query loss that is displaced."""

from __future__ import annotations

import dataclasses
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import metanudge as mn
import naive
from metanudge.types import Need
from problems import ESTIMATORS, PROBLEMS, Problem, Task, coarse, distance, estimate, refused_in_place, slope

RADIUS = 0.4
TAKES_IT = [name for name, one in ESTIMATORS.items() if Need.QUERY_LOSS_AS_IT_IS not in one.needs]


def displaced(task: Task, theta: Tensor, phi: Tensor, radius: float = RADIUS) -> Task:
    """The task, its query loss moved by radius ||phi - theta|| along its gradient at phi."""
    uphill = slope(task.query, phi)
    aside = radius * (phi - theta).norm() * uphill / uphill.norm()
    return Task(task.support, lambda point: task.query(point + aside))


def shifted(problem: Problem, solutions: list[Tensor] | None = None) -> Problem:
    """The problem with the query losses displaced at ``solutions``, the exact ones if not given."""
    pairs = zip(problem.plain, solutions or problem.solutions(), strict=True)
    return dataclasses.replace(problem, plain=tuple(displaced(task, problem.theta, phi) for task, phi in pairs))


def test_the_estimators_that_take_it() -> None:
    assert {type(ESTIMATORS[name]) for name in TAKES_IT} == set(mn.ESTIMATORS.values()) - {mn.Reptile}


@pytest.mark.parametrize("problem", ["logistic", "mlp"])
@pytest.mark.parametrize("name", TAKES_IT)
def test_converged_solves_give_the_closed_form_of_the_displaced_query_loss(name: str, problem: str) -> None:
    made = PROBLEMS[problem]()
    expected = shifted(made)
    limit = expected.fomaml() if name == "fomaml" else expected.meta_gradient()
    solver = mn.Nesterov(120 if problem == "mlp" else 75)
    found = estimate(made, ESTIMATORS[name], solver, sharpness_radius=RADIUS)
    plain = made.fomaml() if name == "fomaml" else made.meta_gradient()
    assert distance(found, limit) < (2e-6 if "forward" in name else 1e-8)
    assert distance(plain, limit) > 0.02  # it is another gradient


STEPS = 7
DESCENT = {"steps": STEPS, "lr": 0.1}
NAIVE = {
    "fomaml": (mn.FOMAML(), naive.fomaml),
    "maml": (mn.MAML(), naive.maml),
    "maml_checkpointed": (mn.MAML(checkpoint=True), naive.maml),
    "imaml": (mn.IMAML(cg_steps=3), partial(naive.imaml, cg_steps=3)),
    "tangent": (mn.Tangent(), naive.tangent),
    "linear": (
        mn.FOBMAML(nu=0.05, steps=STEPS),
        partial(naive.fobmaml, nodes=(-1, 1), weights=(-0.5, 0.5), nu=0.05, nudge="linear"),
    ),
    "from_theta": (
        mn.FOBMAML(nu=0.05, start="initialization"),
        partial(naive.fobmaml, nodes=(-1, 1), weights=(-0.5, 0.5), nu=0.05, nudge="linear", from_theta=True),
    ),
}


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("name", NAIVE)
def test_a_few_steps_give_the_naive_transcription_on_the_displaced_query_loss(name: str, problem: str) -> None:
    """It is displaced from where the solve ended, and taken as given by what is differentiated through."""
    made = PROBLEMS[problem]()
    estimator, transcription = NAIVE[name]
    solver = partial(naive.gradient_descent, **DESCENT)
    ends = [naive.adapted(task, made.theta, made.prox, solver) for task in made.plain]
    tasks = shifted(made, ends).plain
    expected = torch.stack([transcription(task, made.theta, made.prox, solver) for task in tasks]).mean(0)
    found = estimate(made, estimator, mn.GradientDescent(**DESCENT), sharpness_radius=RADIUS)
    assert distance(found, expected) < 1e-9


@pytest.mark.parametrize("name", [name for name in TAKES_IT if not refused_in_place(ESTIMATORS[name])])
def test_both_executions_agree(name: str) -> None:
    made = PROBLEMS["mlp"]()
    both = [
        estimate(
            made,
            coarse(ESTIMATORS[name]),
            mn.Nesterov(8),
            execution=execution,
            sharpness_radius=RADIUS,
            adapt_only=["0.weight", "2.*"],
        )
        for execution in ("vectorized", "in_place")
    ]
    assert distance(*both) < 1e-12


@pytest.mark.parametrize("execution", ["vectorized", "in_place"])
def test_shared_parameters_get_the_gradient_of_the_displaced_query_loss(execution: str) -> None:
    """By differences of F in the shared bias, the displacement held where it is."""
    torch.manual_seed(0)
    model = nn.Linear(3, 1).double()
    x, y, x_query, y_query = (torch.randn(6, width, dtype=torch.float64) for width in (3, 1, 3, 1))
    theta, prox, eye = model.weight[0].detach().clone(), 0.6, torch.eye(3, dtype=torch.float64)

    def solution(bias: Tensor) -> Tensor:
        return torch.linalg.solve(2 * x.T @ x / 6 + prox * eye, 2 * x.T @ (y[:, 0] - bias) / 6 + prox * theta)

    def query(phi: Tensor, bias: Tensor) -> Tensor:
        return (x_query @ phi + bias - y_query[:, 0]).square().mean()

    bias = model.bias.detach()[0]
    phi = solution(bias)
    uphill = slope(lambda point: query(point, bias), phi)
    aside = RADIUS * (phi - theta).norm() * uphill / uphill.norm()
    ahead, behind = (query(solution(bias + step) + aside, bias + step) for step in (1e-6, -1e-6))

    learner = mn.MetaLearner(
        model,
        mn.metrics.squared_error,
        prox=prox,
        solver=mn.Nesterov(150),
        adapt_only="weight",
        sharpness_radius=RADIUS,
        execution=execution,
    )
    learner.backward([mn.Tasks(mn.Batch(x, y), mn.Batch(x_query, y_query))])
    assert float(model.bias.grad) == pytest.approx(float((ahead - behind) / 2e-6), rel=1e-6)


@pytest.mark.parametrize("scale", [1e-3, 1e3])
@pytest.mark.parametrize(
    "estimator", [mn.FOBMAML(), mn.IMAML(cg_steps=20), mn.FOMAML()], ids=["fobmaml", "imaml", "fomaml"]
)
def test_it_has_no_unit(estimator: object, scale: float) -> None:
    """Another unit of the query loss, or of both losses and prox, gives the same in that unit."""
    made, solver = PROBLEMS["mlp"](), mn.Nesterov(100)
    found = estimate(made, estimator, solver, sharpness_radius=RADIUS)

    def scaled(model: nn.Module, batch: mn.Batch) -> Tensor:
        return scale * made.loss(model, batch)

    other = estimate(made, estimator, solver, sharpness_radius=RADIUS, query_loss=scaled)
    assert distance(other / scale, found) < 1e-6
    whole = dataclasses.replace(made, loss=scaled, prox=scale * made.prox)
    assert distance(estimate(whole, estimator, solver, sharpness_radius=RADIUS) / scale, found) < 1e-6


@pytest.mark.filterwarnings("ignore::metanudge.UnsolvedWarning")
def test_bfloat16_parameters_in_place() -> None:
    """What the radius changes is what it changes in float32, to that precision."""

    def changed(dtype: torch.dtype) -> Tensor:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 32), nn.GELU(), nn.Linear(32, 1)).to(dtype)
        g = torch.Generator().manual_seed(1)
        x, y = (torch.randn(2, 16, width, generator=g).to(dtype) for width in (4, 1))
        both = []
        for radius in (0.0, 0.5):
            learner = mn.MetaLearner(
                model,
                lambda m, b: (m(b.inputs) - b.targets).float().square().mean(),
                prox=0.5,
                estimator=mn.FOMAML(),
                execution="in_place",
                sharpness_radius=radius,
            )
            model.zero_grad()
            learner.backward(mn.Tasks(mn.Batch(x, y), mn.Batch(x, y)))
            both.append(torch.cat([p.grad.flatten().double() for p in model.parameters()]))
        return both[1] - both[0]

    narrow, wide = changed(torch.bfloat16), changed(torch.float32)
    assert float(torch.cosine_similarity(narrow, wide, dim=0)) > 0.95


@pytest.mark.parametrize("name", TAKES_IT)
def test_it_costs_a_gradient_a_task_and_leaves_the_report_as_it_is(name: str) -> None:
    made = PROBLEMS["logistic"]()
    plain, aside = (
        mn.MetaLearner(
            made.make(),
            made.loss,
            prox=made.prox,
            estimator=ESTIMATORS[name],
            solver=mn.Nesterov(9),
            sharpness_radius=radius,
        ).backward(made.tasks)
        for radius in (0.0, RADIUS)
    )
    if not isinstance(ESTIMATORS[name], mn.IMAML):  # whose conjugate gradients stop when they are done
        assert aside.gradient_evaluations == plain.gradient_evaluations + len(made.plain)
    assert (aside.query_loss, aside.support_loss, aside.residual) == (
        plain.query_loss,
        plain.support_loss,
        plain.residual,
    )


@pytest.mark.parametrize("steps", [3, 6, 12, 25])
def test_the_bound_holds_for_the_displaced_query_loss(steps: int) -> None:
    """Against the exact meta-gradient of the query loss that was displaced from where the solve ended."""
    made = PROBLEMS["logistic"]()
    for i, (task, exact) in enumerate(zip(made.plain, made.solutions(), strict=True)):
        stack = mn.Tasks(*(mn.Batch(*(leaf[i : i + 1] for leaf in batch)) for batch in made.tasks))
        learner = mn.MetaLearner(
            made.make(), made.loss, prox=made.prox, solver=mn.Nesterov(steps), sharpness_radius=RADIUS
        )
        end = learner.adapt(mn.Batch(*(leaf[i] for leaf in made.tasks.support)))
        phi = nn.utils.parameters_to_vector(end.parameters()).detach()
        learner.model.zero_grad()
        step = learner.backward(stack)
        found = torch.cat([p.grad.reshape(-1) for p in learner.model.parameters()])
        one = dataclasses.replace(
            made, plain=(displaced(task, made.theta, phi),), minimiser=lambda *_, exact=exact: exact
        )
        error = float((found - one.meta_gradient()).norm())
        assert error <= step.error_bound * float(found.norm())


def test_the_bound_is_of_the_displaced_query_loss_and_so_is_tight_where_solves_are_done() -> None:
    """A gradient at another point would leave a change of the order of the radius in it."""
    made = PROBLEMS["logistic"]()
    settings = {"prox": made.prox, "solver": mn.Nesterov(150), "sharpness_radius": RADIUS}
    assert mn.MetaLearner(made.make(), made.loss, **settings).backward(made.tasks).error_bound < 1e-4


def test_where_nothing_is_uphill_nothing_is_displaced() -> None:
    made = PROBLEMS["ridge"]()
    settings = {"sharpness_radius": RADIUS, "query_loss": lambda m, b: 0 * made.loss(m, b)}
    for name in TAKES_IT:
        assert float(estimate(made, ESTIMATORS[name], mn.Nesterov(10), **settings).norm()) < 1e-9


@pytest.mark.parametrize(
    "estimator", [mn.Reptile(), mn.FOBMAML(nudge="full"), mn.FOBMAML(nudge="full", start="initialization")], ids=str
)
def test_what_does_not_rest_on_the_query_gradient_alone_is_refused(estimator: object) -> None:
    with pytest.raises(mn.SettingsError, match=r"sharpness_radius=0, or use FOBMAML"):
        mn.MetaLearner(nn.Linear(2, 1), mn.metrics.squared_error, estimator=estimator, sharpness_radius=0.1)


@pytest.mark.parametrize("radius", [-0.1, float("nan"), float("inf"), True, "0.1", None])
def test_what_is_no_radius_is_refused(radius: object) -> None:
    with pytest.raises(mn.SettingsError, match="sharpness_radius must be a finite number of at least 0"):
        mn.MetaLearner(nn.Linear(2, 1), mn.metrics.squared_error, sharpness_radius=radius)


def test_a_radius_as_long_as_the_way_is_warned_of() -> None:
    with pytest.warns(UserWarning, match=r"sharpness_radius=1 takes query gradients as far .* 0\.1 to 0\.3 is usual"):
        mn.MetaLearner(nn.Linear(2, 1), mn.metrics.squared_error, sharpness_radius=1)


def test_a_mistyped_setting_of_what_is_loaded_is_told(tmp_path: Path) -> None:
    mn.MetaLearner(nn.Linear(1, 1), mn.metrics.squared_error).save_pretrained(tmp_path)
    with pytest.raises(mn.SettingsError, match=r"no setting 'sharpnes_radius'; did you mean \"sharpness_radius\""):
        mn.load_pretrained(tmp_path, nn.Linear(1, 1), mn.metrics.squared_error, sharpnes_radius=0.1)


def test_it_is_written_down_and_trainings_are_told_apart_by_it(tmp_path: Path) -> None:
    def learner(radius: float) -> mn.MetaLearner:
        torch.manual_seed(0)
        return mn.MetaLearner(nn.Linear(1, 1), mn.metrics.squared_error, sharpness_radius=radius)

    def fit(one: mn.MetaLearner, steps: int) -> mn.Fit:
        optimizer = torch.optim.SGD(one.model.parameters(), lr=0.01)
        tasks = mn.tasks.episodes(mn.tasks.sinusoid)
        return mn.fit(one, optimizer, tasks, steps=steps, tasks_per_step=3, every=1, out=tmp_path, progress=False)

    first = learner(0.2)
    assert "sharpness_radius=0.2" in repr(first)
    assert "sharpness" not in repr(learner(0.0))
    fit(first, 1)
    with pytest.raises(mn.SettingsError, match=r"sharpness_radius = 0\.2, this one has 0\.0"):
        fit(learner(0.0), 2)
    first.save_pretrained(tmp_path / "kept")
    again = mn.load_pretrained(tmp_path / "kept", nn.Linear(1, 1), mn.metrics.squared_error)
    assert again.sharpness_radius == 0.2


def test_check_compares_with_the_exact_gradient_of_the_same_objective() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1))
    learner = mn.MetaLearner(model, mn.metrics.squared_error, prox=4.0, solver=mn.Nesterov(20), sharpness_radius=RADIUS)
    found = mn.check(learner, mn.tasks.sinusoid(1), reference_steps=60, compare=["reptile"])
    assert found.rows[0].relative_error < 0.02
    notes = {row.label: row.note for row in found.rows}
    assert "sharpness_radius" in notes["reptile"]


class Stiff(nn.Module):
    """A vector whose distance to a task's target weighs more and more in one direction."""

    def __init__(self) -> None:
        super().__init__()
        self.phi = nn.Parameter(torch.zeros(2))
        self.stiffness = 1.0

    def forward(self, targets: Tensor) -> Tensor:
        weights = torch.stack([torch.ones_like(targets[..., 0]), torch.full_like(targets[..., 1], self.stiffness)], -1)
        return (weights * (self.phi - targets).square()).sum() / 2


@pytest.mark.parametrize(
    ("begins", "radius", "execution"),
    [
        ("solved", 0.0, "vectorized"),
        ("solved", 0.0, "in_place"),
        ("unsolved", 0.0, "in_place"),
        ("solved", 0.1, "in_place"),
    ],
)
def test_a_network_that_sharpened_is_told_of_it(begins: str, radius: float, execution: str) -> None:
    """By the step size that suited it, steps no longer solve what was solved at the first step."""
    model, targets = Stiff(), torch.tensor([[1.0, 1.0], [-1.0, 2.0]])
    tasks = mn.Tasks(*(mn.Batch(targets, targets) for _ in range(2)))
    learner = mn.MetaLearner(
        model,
        lambda model, batch: model(batch.inputs),
        prox=0.1,
        solver=mn.GradientDescent(40, lr=0.1),
        sharpness_radius=radius,
        execution=execution,
    )
    if begins == "solved":
        learner.backward(tasks)
    model.stiffness = 19.0  # lr times which is just below 2
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(8):
            learner.backward(tasks)
    (told,) = (str(one.message) for one in caught)
    assert caught[0].category is mn.UnsolvedWarning
    expected = begins == "solved" and radius == 0
    assert ("the network has probably sharpened in meta-training, which sharpness_radius=0.1" in told) is expected
