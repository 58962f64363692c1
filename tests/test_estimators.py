"""Every estimator against closed forms and against the naive transcription of its paper."""

from __future__ import annotations

import dataclasses
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import metanudge as mn
import naive
from metanudge.estimators import fobmaml
from metanudge.estimators.stencil import STENCILS
from metanudge.execution import Use
from metanudge.oracle import Tally
from metanudge.selection import select_parameters
from problems import (
    DTYPE,
    ESTIMATORS,
    ONE_SIDED,
    PROBLEMS,
    SOLVERS,
    Problem,
    Task,
    curvature,
    distance,
    estimate,
    flat_gradient,
    ridge,
    slope,
)

# The registries.


@pytest.mark.parametrize("name", mn.ESTIMATORS)
def test_every_estimator_is_tested_and_described(name: str) -> None:
    kind = mn.ESTIMATORS[name]
    assert any(type(variant) is kind for variant in ESTIMATORS.values()), f"give {name} a variant in tests/problems.py"
    assert dataclasses.is_dataclass(kind)
    for told in (kind.rule, kind.cost, kind.memory, kind.bias):
        assert isinstance(told, str)
        assert told.strip()
    assert isinstance(kind().needs, frozenset)
    assert hash(kind()) == hash(kind())
    with pytest.raises(dataclasses.FrozenInstanceError):
        kind().rule = "another"


@pytest.mark.parametrize("name", mn.SOLVERS)
def test_every_solver_is_tested_and_described(name: str) -> None:
    kind = mn.SOLVERS[name]
    variants = [variant for variant in SOLVERS.values() if type(variant) is kind]
    assert variants, f"give {name} a variant in tests/problems.py"
    for variant in variants:
        assert dataclasses.is_dataclass(variant)
        assert isinstance(variant.needs, frozenset)
        assert isinstance(variant.differentiable, bool)
        assert variant.steps >= 1


def test_every_stencil_has_the_sums_it_declares() -> None:
    for stencil in mn.STENCILS.values():
        for power in range(stencil.order + 1):
            total = sum(w * n**power for n, w in zip(stencil.nodes, stencil.weights, strict=True))
            assert total == pytest.approx(float(power == 1), abs=1e-14)


# Converged solves: the closed forms.

# Relative error allowed at converged solves. Finite differences in nu or of gradients in float64 leave about
# eps^(p/(p+1)) for a scheme of order p: 1.5e-8, 4e-11, 3e-13 times a constant of the problem.
TOLERANCE = {
    "forward": 5e-7,
    "linear_forward": 5e-7,
    "linear_fourth_order": 1e-9,
    "from_theta_forward": 5e-7,
    "symmetric": 2e-9,
    "linear": 2e-9,
    "from_theta": 2e-9,
    "one_sided": 5e-9,
    "fourth_order": 2e-10,
    "imaml_two_gradient": 1e-9,
    "tangent_two_gradient": 1e-9,
    "hfmaml": 2e-9,
    "maml": 1e-10,
    "maml_checkpointed": 1e-10,
    "imaml": 1e-10,
    "tangent": 1e-10,
    "fomaml": 1e-10,
    "reptile": 1e-10,
}


CONVERGED = {name: mn.Nesterov(steps=120 if name == "mlp" else 75) for name in PROBLEMS}


def limit(name: str, problem: Problem) -> Tensor:
    """What an estimator gives when its solves are perfect: grad F, but for the two with irreducible bias."""
    return {"fomaml": problem.fomaml, "reptile": problem.reptile}.get(name, problem.meta_gradient)()


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("name", ESTIMATORS)
def test_converged_solves_give_the_closed_form(name: str, problem: str) -> None:
    made = PROBLEMS[problem]()
    found = estimate(made, ESTIMATORS[name], CONVERGED[problem])
    assert distance(found, limit(name, made)) < TOLERANCE[name]


@pytest.mark.parametrize("problem", PROBLEMS)
def test_the_biased_estimators_are_far_from_the_meta_gradient(problem: str) -> None:
    made = PROBLEMS[problem]()
    for estimator, claimed in ((mn.FOMAML(), made.fomaml()), (mn.Reptile(), made.reptile())):
        assert distance(claimed, made.meta_gradient()) > 0.3
        assert distance(estimate(made, estimator, CONVERGED[problem]), made.meta_gradient()) > 0.3


@pytest.mark.parametrize("problem", PROBLEMS)
def test_fomaml_is_one_plus_h_over_prox_times_the_meta_gradient_of_a_task(problem: str) -> None:
    """FOMAML = (I + H/prox) grad F, task by task: the bias its docstring declares."""
    made = PROBLEMS[problem]()
    for i, (task, phi) in enumerate(zip(made.plain, made.solutions(), strict=True)):
        one = dataclasses.replace(made, tasks=mn.Tasks(*(mn.Batch(*(x[i : i + 1] for x in b)) for b in made.tasks)))
        found = estimate(one, mn.FOMAML(), CONVERGED[problem])
        exact = estimate(one, mn.IMAML(cg_steps=20), CONVERGED[problem])
        assert distance(found, curvature(task.support, phi, made.prox) @ exact / made.prox) < 1e-9


@pytest.mark.parametrize("nudge", ["full", "linear"])
@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1e3, 1e6])
def test_automatic_nudge_holds_at_any_scale_of_the_query_loss(scale: float, nudge: str) -> None:
    made = PROBLEMS["logistic"]()
    scaled = estimate(
        made, mn.FOBMAML(nudge=nudge), mn.Nesterov(steps=100), query_loss=lambda m, b: scale * made.loss(m, b)
    )
    assert distance(scaled / scale, made.meta_gradient()) < 1e-6


@pytest.mark.parametrize("ways", [4.0, 0.02, 1e-9])
@pytest.mark.parametrize("nudge", ["full", "linear"])
@pytest.mark.parametrize(("scheme", "order"), [("forward", 1), ("symmetric", 2), ("fourth_order", 4)])
def test_automatic_nudge_follows_its_formula(
    scheme: str, order: int, nudge: str, ways: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of its docstring, for finished solves."""
    monkeypatch.setattr(fobmaml, "WAYS", ways)
    made = PROBLEMS["ridge"]()
    model = made.make()
    learner = mn.MetaLearner(
        model,
        made.loss,
        prox=made.prox,
        solver=mn.Nesterov(steps=100),
        estimator=mn.FOBMAML(scheme, nudge=nudge),
    )
    expected, bends, unit, root = [], [], torch.finfo(torch.float64).eps, 1 / (order + 1)
    for task, phi in zip(made.plain, made.solutions(), strict=True):
        s = float(made.prox * phi.norm() / slope(task.query, phi).norm())
        b = min(1.0, max(0.01, float(ways * (phi - made.theta).norm() / phi.norm())))
        bends.append(b)
        if nudge == "linear":
            expected.append(s * b * (unit / (2 * order * b)) ** root)
        else:
            expected.append(min(s, s**root) * min(unit**root, max(b / 10, b * (unit / b) ** root)))
    assert (max(bends) < 0.1) is (ways < 1)
    assert learner.backward(made.tasks).nu == pytest.approx(sum(expected) / len(expected), rel=1e-8)


@pytest.mark.parametrize(
    ("nudge", "prox"),
    [("linear", 1.0), ("linear", 1e2), ("linear", 1e4), ("linear", 1e6), ("full", 1.0), ("full", 1e2)],
)
@pytest.mark.parametrize("solved", [True, False])
def test_a_short_way_does_not_drown_the_nudge_in_round_off(solved: bool, prox: float, nudge: str) -> None:
    """Where theta solves the support set there is none, and a large prox leaves little of it.

    (The full nudge at a larger one is kept small by another rule, for the query loss's own bends.)
    """
    found = []
    for dtype, estimator in ((torch.float32, mn.FOBMAML(nudge=nudge)), (DTYPE, mn.Tangent())):
        g = torch.Generator().manual_seed(1)
        torch.manual_seed(2)
        model = torch.nn.Linear(4, 1).double()
        inputs = torch.randn(3, 8, 4, generator=g, dtype=DTYPE)
        targets = model(inputs).detach() if solved else torch.randn(3, 8, 1, generator=g, dtype=DTYPE)
        query = torch.randn(3, 8, 1, generator=g, dtype=DTYPE)
        model.to(dtype)
        tasks = mn.Tasks(mn.Batch(inputs.to(dtype), targets.to(dtype)), mn.Batch(inputs.to(dtype), query.to(dtype)))
        learner = mn.MetaLearner(
            model, mn.metrics.squared_error, prox=prox, solver=mn.Nesterov(60), estimator=estimator
        )
        learner.backward(tasks)
        found.append(flat_gradient(model).double())
    assert distance(*found) < 2e-3


class Tokens(torch.nn.Module):
    """Long by its embeddings, of which the loss knows nothing."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = torch.nn.Embedding(50, 32), torch.nn.Linear(32, 3)
        self.layer = torch.nn.TransformerEncoderLayer(32, 4, 64, 0.0, "gelu", batch_first=True)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.layer(self.embedding(tokens)).mean(1))


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_the_automatic_nudge_is_not_measured_by_long_embeddings(monkeypatch: pytest.MonkeyPatch) -> None:
    g = torch.Generator().manual_seed(1)
    tasks = mn.Tasks(
        *(
            mn.Batch(torch.randint(50, (2, 12, 6), generator=g), torch.randint(3, (2, 12), generator=g))
            for _ in range(2)
        )
    )

    def loss(model: torch.nn.Module, batch: mn.Batch) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return F.cross_entropy(model(batch.inputs), batch.targets)

    def found(estimator: object, steps: int, dtype: torch.dtype = torch.float32) -> Tensor:
        model = Tokens().to(dtype)
        mn.MetaLearner(model, loss, solver=mn.Nesterov(steps), estimator=estimator).backward(tasks)
        return flat_gradient(model).double()

    exact = found(mn.Tangent(), 200, DTYPE)
    error = distance(found(mn.FOBMAML(), 16), exact)
    assert error < 0.02
    monkeypatch.setattr(fobmaml, "WAYS", 1e9)  # by the length of the parameters alone
    assert distance(found(mn.FOBMAML(), 16), exact) > 5 * error


@pytest.mark.parametrize("name", [name for name in ESTIMATORS if name != "reptile"])
def test_a_query_loss_without_slope_has_no_meta_gradient(name: str) -> None:
    """And no division by its norm: zero, and no task dropped."""
    made = ridge()
    settings = {"query_loss": lambda m, b: 0 * made.loss(m, b)}
    assert float(estimate(made, ESTIMATORS[name], mn.Nesterov(10), **settings).norm()) < 1e-9


def off_the_path(h: list[float], centre: list[float]) -> tuple[mn.Tasks, Tensor]:
    """One diagonal task, solved from theta = 0, whose query loss pulls in all directions, and its meta-gradient."""
    curvatures, centres, prox = torch.tensor([h]).double(), torch.tensor([centre]).double(), 0.5
    query = mn.Batch(torch.ones_like(curvatures), torch.ones_like(curvatures))
    phi = curvatures * centres / (curvatures + prox)
    return mn.Tasks(mn.Batch(curvatures, centres), query), (prox / (curvatures + prox) * (phi - 1))[0]


@pytest.mark.parametrize(
    "estimator", [mn.FOBMAML(), mn.FOBMAML(nudge="linear"), mn.MAML(), mn.Tangent(), mn.HFMAML()], ids=str
)
@pytest.mark.parametrize(
    ("h", "centre"),
    [([100.0, 1.0, 1.0], [0.0, 1.0, 2.0]), ([4.0, 3.0, 2.0], [0.0, 0.0, 0.0])],
    ids=["orthogonal", "already solved"],
)
def test_the_automatic_step_holds_where_the_free_solve_never_goes(h: list, centre: list, estimator: object) -> None:
    """The support gradient may have no part along the steepest direction, or be zero; the query gradient has one.

    A step size measured along the support gradient alone is then too long for the nudged solve, which explodes while
    the free one looks solved.
    """
    tasks, exact = off_the_path(h, centre)
    model = PROBLEMS["diagonal"]().make()
    model.phi = torch.nn.Parameter(torch.zeros(len(h), dtype=torch.float64))
    mn.MetaLearner(model, PROBLEMS["diagonal"]().loss, prox=0.5, solver=mn.Nesterov(300), estimator=estimator).backward(
        tasks
    )
    assert distance(model.phi.grad, exact) < 1e-4


# A handful of steps, unconverged: the naive transcriptions.

STEPS = 9
PAIRS = {
    # library, and a factory of the naive one (a fresh record of restarts a task)
    "gradient_descent": (
        mn.GradientDescent(STEPS, lr=0.12),
        lambda: partial(naive.gradient_descent, steps=STEPS, lr=0.12),
    ),
    "momentum": (
        mn.GradientDescent(STEPS, lr=0.08, momentum=0.6),
        lambda: partial(naive.gradient_descent, steps=STEPS, lr=0.08, momentum=0.6),
    ),
    "nesterov": (
        mn.Nesterov(STEPS, lr=0.1, momentum=0.5, restart=False),
        lambda: partial(naive.nesterov, steps=STEPS, lr=0.1, momentum=0.5),
    ),
    "nesterov_restarted": (
        mn.Nesterov(STEPS, lr=0.15, momentum=0.95),
        lambda: partial(naive.nesterov, steps=STEPS, lr=0.15, momentum=0.95, restarts=[]),
    ),
    "adam": (mn.Adam(STEPS, lr=0.07), lambda: partial(naive.adam, steps=STEPS, lr=0.07)),
}
NU = 0.05  # large, so that the comparison is of algorithms and not of round-off


def difference(stencil: mn.Stencil, **settings: object) -> partial[Tensor]:
    """The naive FO-B-MAML of a row of the table."""
    return partial(naive.fobmaml, nodes=stencil.nodes, weights=stencil.weights, nu=NU, **settings)


NAIVE = {
    "symmetric": (mn.FOBMAML(nudge="full", nu=NU), difference(mn.Stencil((-1, 1), (-0.5, 0.5), 2))),
    "forward": (mn.FOBMAML("forward", nudge="full", nu=NU), difference(mn.Stencil((0, 1), (-1, 1), 1))),
    "one_sided": (mn.FOBMAML(ONE_SIDED, nudge="full", nu=NU), difference(ONE_SIDED)),
    "linear": (
        mn.FOBMAML(nudge="linear", nu=NU, steps=STEPS),
        difference(mn.Stencil((-1, 1), (-0.5, 0.5), 2), nudge="linear"),
    ),
    "linear_forward": (
        mn.FOBMAML("forward", nudge="linear", nu=NU, steps=STEPS),
        difference(mn.Stencil((0, 1), (-1, 1), 1), nudge="linear"),
    ),
    "from_theta": (
        mn.FOBMAML(nudge="full", start="initialization", nu=NU),
        difference(mn.Stencil((-1, 1), (-0.5, 0.5), 2), from_theta=True),
    ),
    "from_theta_forward": (
        mn.FOBMAML("forward", nudge="full", start="initialization", nu=NU),
        difference(mn.Stencil((0, 1), (-1, 1), 1), from_theta=True),
    ),
    "maml": (mn.MAML(), naive.maml),
    "fomaml": (mn.FOMAML(), naive.fomaml),
    "reptile": (mn.Reptile(), naive.reptile),
    "imaml": (mn.IMAML(cg_steps=3), partial(naive.imaml, cg_steps=3)),
    "tangent": (mn.Tangent(), naive.tangent),
}


def over_tasks(problem: Problem, algorithm: object, *rest: object, **settings: object) -> Tensor:
    """The mean over tasks of a naive algorithm."""
    found = [algorithm(task, problem.theta, problem.prox, *rest, **settings) for task in problem.plain]
    return torch.stack(found).mean(0)


@pytest.mark.parametrize("problem", ["ridge", "logistic", "mlp"])
@pytest.mark.parametrize("solver", PAIRS)
@pytest.mark.parametrize("name", NAIVE)
def test_equals_its_naive_transcription(name: str, solver: str, problem: str) -> None:
    made = PROBLEMS[problem]()
    estimator, algorithm = NAIVE[name]
    library, plain = PAIRS[solver]
    found = [algorithm(task, made.theta, made.prox, plain()) for task in made.plain]
    assert distance(estimate(made, estimator, library), torch.stack(found).mean(0)) < 1e-11


@pytest.mark.parametrize("tol", [0.5, 0.1, 1e-10])
@pytest.mark.parametrize("problem", ["ridge", "logistic"])
def test_imaml_stops_each_task_at_its_tolerance(problem: str, tol: float) -> None:
    made = PROBLEMS[problem]()
    library, plain = PAIRS["gradient_descent"]
    expected = over_tasks(made, naive.imaml, plain(), cg_steps=20, tol=tol)
    assert distance(estimate(made, mn.IMAML(cg_steps=20, tol=tol), library), expected) < 1e-11


def test_imaml_stops_at_negative_curvature() -> None:
    """I + H/prox indefinite: conjugate gradients would run away; both stop at the first p'Ap <= 0, each task apart."""
    made = PROBLEMS["diagonal"]()
    h = made.tasks.support.inputs.clone()
    h[0, 1] = -3 * made.prox
    tasks = mn.Tasks(mn.Batch(h, made.tasks.support.targets), made.tasks.query)

    def support(i: int) -> object:
        return lambda phi: (h[i] * (phi - made.tasks.support.targets[i]).square()).sum() / 2

    plain = tuple(Task(support(i), task.query) for i, task in enumerate(made.plain))
    bent = dataclasses.replace(made, tasks=tasks, plain=plain)
    library, solver = PAIRS["gradient_descent"]
    expected = over_tasks(bent, naive.imaml, solver(), cg_steps=20, tol=1e-10)
    whole = over_tasks(bent, naive.imaml, solver(), cg_steps=20, tol=1e-10, stop_at_negative_curvature=False)
    assert distance(expected, whole) > 1e-3
    assert distance(estimate(bent, mn.IMAML(cg_steps=20), library), expected) < 1e-11


def test_the_restarting_case_restarts() -> None:
    """Or the comparison above would not see whether nudged solves replay the restarts of the free one."""
    made = ridge()
    seen = []
    for task in made.plain:
        restarts: list[bool] = []
        _, plain = PAIRS["nesterov_restarted"]
        naive.reptile(task, made.theta, made.prox, partial(plain(), restarts=restarts))
        seen += restarts
    assert any(seen)
    assert not all(seen)


def test_fewer_nudged_steps() -> None:
    """``steps`` = K': nudged solves of 4 steps after a free one of 9."""
    made = PROBLEMS["logistic"]()
    found = []
    for task in made.plain:
        solved = naive.adapted(task, made.theta, made.prox, partial(naive.gradient_descent, steps=9, lr=0.12))
        ends = []
        for sign in (-1, 1):

            def nudged(phi: Tensor, sign: int = sign, task: Task = task) -> Tensor:
                pull = slope(task.support, phi) + sign * NU * slope(task.query, phi)
                return pull + made.prox * (phi - made.theta)

            ends.append(naive.gradient_descent(nudged, solved, steps=4, lr=0.12)[-1])
        found.append(made.prox * (ends[0] - ends[1]) / (2 * NU))
    library = estimate(made, mn.FOBMAML(nudge="full", nu=NU, steps=4), mn.GradientDescent(9, lr=0.12))
    assert distance(library, torch.stack(found).mean(0)) < 1e-11


# Through the solver's own steps.


@pytest.mark.parametrize("prox", [0.0, 0.3])
@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("solver", PAIRS)
def test_maml_is_autograd_through_the_loop(solver: str, problem: str, prox: float) -> None:
    made = dataclasses.replace(PROBLEMS[problem](), prox=prox)
    library, plain = PAIRS[solver]
    found = [naive.maml(task, made.theta, prox, plain()) for task in made.plain]
    assert distance(estimate(made, mn.MAML(), library), torch.stack(found).mean(0)) < 1e-12


@pytest.mark.parametrize("steps", [1, 2, 5, 10])
@pytest.mark.parametrize(
    "solver",
    [
        partial(mn.GradientDescent, lr=0.1),
        partial(mn.GradientDescent, lr=0.1, momentum=0.7),
        mn.Nesterov,
        partial(mn.Nesterov, tol=0.1),
        partial(mn.Adam, lr=0.05),
    ],
    ids=["gradient_descent", "momentum", "nesterov", "nesterov_tol", "adam"],
)
def test_checkpointed_maml_equals_maml(solver: object, steps: int) -> None:
    made = PROBLEMS["logistic"]()
    whole, cut = (estimate(made, mn.MAML(checkpoint=checkpoint), solver(steps)) for checkpoint in (False, True))
    assert distance(cut, whole) < 1e-12


@pytest.mark.parametrize("momentum", [0.0, 0.6])
@pytest.mark.parametrize("problem", ["ridge", "logistic", "mlp"])
def test_hfmaml_walks_the_trajectory_back(problem: str, momentum: float) -> None:
    """A large displacement, so that another difference than the paper's would show."""
    made = PROBLEMS[problem]()
    settings = {"steps": 6, "lr": 0.1, "momentum": momentum}
    library = estimate(made, mn.HFMAML(displacement=0.1), mn.GradientDescent(**settings))
    assert distance(library, over_tasks(made, naive.hfmaml, displacement=0.1, **settings)) < 1e-11


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("solver", PAIRS)
def test_hfmaml_is_maml_up_to_its_finite_difference(solver: str, problem: str) -> None:
    made = PROBLEMS[problem]()
    library, _ = PAIRS[solver]
    exact = estimate(made, mn.MAML(), library)
    assert distance(estimate(made, mn.HFMAML(), library), exact) < 1e-8
    if not made.quadratic:  # the error is the displacement's, second order: halving it leaves a quarter
        coarse, fine = (distance(estimate(made, mn.HFMAML(d), library), exact) for d in (2e-2, 1e-2))
        assert coarse / fine == pytest.approx(4, rel=0.1)


# The limit of vanishing nudge.


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("solver", ["gradient_descent", "momentum", "nesterov", "nesterov_auto"])
@pytest.mark.parametrize("problem", ["ridge", "diagonal"])
def test_tangent_is_the_limit_of_the_linear_nudge_on_quadratics(problem: str, solver: str, steps: int) -> None:
    """However few the steps: with H constant, the nudged iterate is affine in nu and Tangent its slope."""
    made = PROBLEMS[problem]()
    library = {
        "gradient_descent": mn.GradientDescent(steps, lr=0.1),
        "momentum": mn.GradientDescent(steps, lr=0.1, momentum=0.6),
        "nesterov": mn.Nesterov(steps, lr=0.15, momentum=0.95),
        "nesterov_auto": mn.Nesterov(steps),
    }[solver]
    tangent = estimate(made, mn.Tangent(), library)
    assert distance(estimate(made, mn.FOBMAML(nu=0.1, steps=steps), library), tangent) < 1e-11


@pytest.mark.parametrize("steps", [2, 5])
@pytest.mark.parametrize("solver", [mn.GradientDescent(3, lr=0.1), mn.Nesterov(3)], ids=["descent", "nesterov"])
def test_tangent_of_other_steps_is_the_limit_of_as_many_nudged_ones(solver: object, steps: int) -> None:
    made = ridge()
    nudged = estimate(made, mn.FOBMAML(nu=0.1, steps=steps), solver)
    assert distance(estimate(made, mn.Tangent(steps=steps), solver), nudged) < 1e-11
    twice = estimate(made, mn.Tangent(steps=6), solver)
    assert distance(estimate(made, mn.FOBMAML(nu=0.1), solver), twice) < 1e-11


def test_tangent_against_its_iteration_written_out() -> None:
    """phi <- phi - a grad E three times, then z <- z - a ((H + prox) z + grad f) seven times, in coordinates."""
    made, a = PROBLEMS["diagonal"](), 0.1
    wanted = []
    for task in made.plain:
        phi, z = made.theta, torch.zeros_like(made.theta)
        for _ in range(3):
            phi = phi - a * (slope(task.support, phi) + made.prox * (phi - made.theta))
        for _ in range(7):
            z = z - a * (curvature(task.support, phi, made.prox) @ z + slope(task.query, phi))
        wanted.append(-made.prox * z)
    found = estimate(made, mn.Tangent(steps=7), mn.GradientDescent(3, lr=a))
    assert distance(found, torch.stack(wanted).mean(0)) < 1e-12


@pytest.mark.parametrize("nudge", ["full", "linear"])
@pytest.mark.parametrize("momentum", [0.0, 0.6])
@pytest.mark.parametrize("steps", [2, 5])
@pytest.mark.parametrize("problem", ["ridge", "logistic", "mlp"])
def test_the_limit_of_fobmaml_is_the_tangent_along_its_moving_solve(
    problem: str, steps: int, momentum: float, nudge: str
) -> None:
    """Off quadratics the unconverged nudged solve goes on moving, and H and grad f with it: that is its limit."""
    made = PROBLEMS[problem]()
    settings = {"steps": steps, "lr": 0.1, "momentum": momentum}
    found = estimate(made, mn.FOBMAML(nudge=nudge, nu=1e-4, steps=steps), mn.GradientDescent(**settings))
    assert distance(found, over_tasks(made, naive.moving_tangent, nudge=nudge, **settings)) < 1e-7


@pytest.mark.parametrize("problem", ["logistic", "mlp"])
def test_tangent_and_fobmaml_meet_as_the_solve_converges(problem: str) -> None:
    made = PROBLEMS[problem]()
    gaps = []
    for steps in (2, 8, 80):
        library = mn.Nesterov(steps)
        found = estimate(made, mn.FOBMAML(nudge="full", nu=1e-4), library)
        gaps.append(distance(found, estimate(made, mn.Tangent(), library)))
    assert gaps[0] > gaps[1] > gaps[2]
    assert gaps[2] < 1e-6


# Where descent with each of them stops.


def affine(problem: Problem, direction: object) -> tuple[Tensor, Tensor]:
    """Matrix and root of an affine direction field theta -> g(theta)."""
    width = len(problem.theta)
    offset = direction(torch.zeros(width, dtype=torch.float64))
    matrix = torch.stack([direction(e) - offset for e in torch.eye(width, dtype=torch.float64)], dim=1)
    return matrix, torch.linalg.solve(matrix, -offset)


@pytest.mark.parametrize(
    ("estimator", "direction"),
    [
        (mn.FOBMAML(nudge="linear"), Problem.meta_gradient),
        (mn.FOMAML(), Problem.fomaml),
        (mn.Reptile(), Problem.reptile),
    ],
    ids=["fobmaml", "fomaml", "reptile"],
)
def test_where_descent_stops(estimator: object, direction: object) -> None:
    """On ridge every direction field is affine in theta: FO-B-MAML stops where grad F = 0, the two others do not."""
    made = ridge()
    matrix, end = affine(made, partial(direction, made))
    rates = torch.linalg.eigvals(matrix).real.sqrt()
    low, high = float(rates.min()), float(rates.max())
    model = made.make()
    learner = mn.MetaLearner(model, made.loss, prox=made.prox, solver=mn.Nesterov(45), estimator=estimator)
    # Polyak's step size and momentum for this matrix
    momentum = ((high - low) / (high + low)) ** 2
    optimizer = torch.optim.SGD(model.parameters(), lr=4 / (high + low) ** 2, momentum=momentum)
    for _ in range(35):
        optimizer.zero_grad()
        learner.backward(made.tasks)
        optimizer.step()
    reached = model.weight.detach().reshape(-1)
    assert distance(reached, end) < 1e-6
    left = made.meta_gradient(reached).norm() / made.meta_gradient().norm()
    if isinstance(estimator, mn.FOBMAML):
        assert left < 1e-6
    else:
        assert left > 1e-2
        _, optimum = affine(made, made.meta_gradient)
        assert distance(reached, optimum) > 0.1


# Cost and memory, as declared.

K, CG = 7, 3
COSTS = {
    # estimator: gradients per task as its docstring states them, K steps of gradient descent
    # the linear nudge: K' + 1 gradients a node, and 4, for the bound
    mn.FOBMAML(): K + 2 + 2 * (2 * K + 1) + 4,
    mn.FOBMAML("forward"): K + 2 + 2 * (2 * K + 1) + 4,
    mn.FOBMAML("fourth_order"): K + 2 + 4 * (2 * K + 1) + 4,
    mn.FOBMAML(steps=3): K + 2 + 2 * (3 + 1) + 4,
    mn.FOBMAML(nudge="full"): K + 2 + 4 * K,
    mn.FOBMAML("forward", nudge="full"): K + 2 + 3 * K,
    mn.FOBMAML("fourth_order", nudge="full"): K + 2 + 8 * K,
    mn.FOBMAML(nudge="full", steps=3): K + 2 + 4 * 3,
    mn.FOBMAML(nudge="full", start="initialization"): K + 2 + 4 * K,
    mn.FOBMAML("forward", nudge="full", start="initialization"): K + 2 + 2 * K,
    mn.FOBMAML(start="initialization"): K + 2 + 2 * K,
    mn.FOMAML(): K + 2,
    mn.Reptile(): K + 2,
    mn.HFMAML(): 3 * K + 2,
    mn.IMAML(cg_steps=CG): K + 3 + 2 * CG,  # one more for the graph of exact products
    mn.IMAML(cg_steps=CG, products="two_gradient"): K + 2 + 2 * CG,
    mn.Tangent(): K + 3 + 2 * K,
    mn.Tangent(products="two_gradient"): K + 2 + 2 * K,
    mn.MAML(): 3 * K + 2,
    mn.MAML(checkpoint=True): 3 * K + 2 + 4,  # two segments, 4 + 3 steps: the first is run twice
}


def step_of(estimator: object, execution: str, loss: object = None, solver: object = None) -> mn.MetaStep:
    made = ridge()
    learner = mn.MetaLearner(
        made.make(),
        loss or made.loss,
        prox=made.prox,
        solver=solver or mn.GradientDescent(K, lr=0.1),
        estimator=estimator,
        execution=execution,
    )
    return learner.backward(made.tasks)


@pytest.mark.parametrize("estimator", COSTS, ids=str)
def test_cost_in_gradients(estimator: object) -> None:
    assert step_of(estimator, "vectorized").gradient_evaluations / 3 == COSTS[estimator]  # tasks


@pytest.mark.parametrize("estimator", [mn.MAML(), mn.HFMAML()], ids=str)
def test_steps_not_taken_are_not_counted(estimator: object) -> None:
    """A solve that stops after the first of nine steps counts as one of a single step."""
    counts = [
        step_of(estimator, "vectorized", solver=mn.Nesterov(steps, lr=0.1, tol=tol)).gradient_evaluations
        for steps, tol in ((1, None), (9, 1.0))
    ]
    assert counts[1] == counts[0]


@pytest.mark.parametrize("estimator", [e for e in COSTS if "exact" not in str(e) and type(e) is not mn.MAML], ids=str)
def test_cost_in_calls_of_the_loss(estimator: object) -> None:
    """In place, a gradient is one call of the user's loss: count them from outside."""
    calls = []
    made = ridge()

    def counted(model: torch.nn.Module, batch: mn.Batch) -> Tensor:
        calls.append(torch.is_grad_enabled())
        return made.loss(model, batch)

    step = step_of(estimator, "in_place", counted)
    assert sum(calls) == step.gradient_evaluations == 3 * COSTS[estimator]
    assert len(calls) == sum(calls)  # f̂(θ), by which a solve is found to diverge, is seen in passing


def test_cost_of_the_curvature_estimate() -> None:
    """``Nesterov`` pays ``power_iterations + 1`` gradients for its step size, once a task: nudged solves replay it."""
    for iterations in (1, 5):
        solver = mn.Nesterov(K, power_iterations=iterations)
        for estimator in (mn.FOMAML(), mn.FOBMAML()):
            count = step_of(estimator, "in_place", solver=solver).gradient_evaluations / 3
            assert count == COSTS[estimator] + iterations + 1


class Saved:
    """A tensor kept for a backward pass: counted as long as the graph holds it."""

    alive = 0

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.size = tensor.numel() * tensor.element_size()
        Saved.alive += self.size

    def __del__(self) -> None:
        Saved.alive -= self.size


def peak_of_saved_activations(estimator: object, steps: int, execution: str) -> int:
    peak = 0

    def pack(tensor: Tensor) -> Saved:
        nonlocal peak
        saved = Saved(tensor)
        peak = max(peak, Saved.alive)
        return saved

    Saved.alive = 0
    made = PROBLEMS["mlp"]()
    learner = mn.MetaLearner(
        made.make(),
        made.loss,
        prox=made.prox,
        solver=mn.GradientDescent(steps, lr=0.05),
        estimator=estimator,
        execution=execution,
    )
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
        learner.backward(made.tasks)
    return peak


@pytest.mark.parametrize("execution", ["vectorized", "in_place"])
def test_memory_of_fobmaml_does_not_grow_with_the_steps(execution: str) -> None:
    few, many = (peak_of_saved_activations(mn.FOBMAML(), steps, execution) for steps in (4, 64))
    assert few == many > 0


def test_memory_of_maml_grows_with_the_steps_and_of_checkpointed_maml_with_their_root() -> None:
    few, many = (peak_of_saved_activations(mn.MAML(), steps, "vectorized") for steps in (4, 64))
    assert many / few > 10
    few, many = (peak_of_saved_activations(mn.MAML(checkpoint=True), steps, "vectorized") for steps in (4, 64))
    assert many / few < 2 * math.sqrt(64 / 4)


# Settings.


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: mn.FOBMAML("centred"), "scheme must be"),
        (lambda: mn.FOBMAML(nudge="quadratic"), "nudge must be"),
        (lambda: mn.FOBMAML(start="zero"), "start must be"),
        (lambda: mn.FOBMAML(nu=0.0), "nu must be"),
        (lambda: mn.FOBMAML(nu=-1e-3), "nu must be"),
        (lambda: mn.FOBMAML(nu=float("nan")), "nu must be"),
        (lambda: mn.FOBMAML(nu="small"), "nu must be"),
        (lambda: mn.FOBMAML(steps=0), "steps must be"),
        (lambda: mn.FOBMAML(steps=3, start="initialization"), "steps=None"),
        (lambda: mn.IMAML(cg_steps=0), "steps must be"),
        (lambda: mn.IMAML(tol=0.0), "tol must be"),
        (lambda: mn.IMAML(products="inexact"), "products must be"),
        (lambda: mn.Tangent(products="inexact"), "products must be"),
        (lambda: mn.Tangent(products="two_gradient", displacement=-1.0), "displacement must be"),
        (lambda: mn.Tangent(displacement=0.1), "belongs to two-gradient products"),
        (lambda: mn.IMAML(displacement=0.1), "belongs to two-gradient products"),
        (lambda: mn.Tangent(steps=0), "steps must be"),
        (lambda: mn.HFMAML(displacement=0.0), "displacement must be"),
    ],
)
def test_bad_settings_are_refused(make: object, words: str) -> None:
    with pytest.raises(mn.SettingsError, match=words):
        make()


@pytest.mark.parametrize("estimator", [mn.FOBMAML(), mn.IMAML(), mn.Tangent()], ids=str)
def test_without_proximal_term_the_proximal_estimators_are_refused(estimator: object) -> None:
    with pytest.raises(mn.SettingsError, match=r"prox is 0.*Give prox > 0"):
        estimate(ridge(), estimator, mn.GradientDescent(2, lr=0.1), prox=0.0)


@pytest.mark.parametrize("unit", [0.01, 100.0])
@pytest.mark.parametrize("nudge", ["linear", "full"])
def test_a_stencil_in_another_unit_is_the_same_scheme(unit: float, nudge: str) -> None:
    """The nodes it evaluates at, and so the estimate, depend on nu times nodes alone."""
    other = mn.Stencil((-unit, unit), (-0.5 / unit, 0.5 / unit), 2)
    made, found = PROBLEMS["logistic"](), []
    model = made.make()
    for scheme in ("symmetric", other):
        learner = mn.MetaLearner(
            model,
            made.loss,
            prox=made.prox,
            solver=mn.GradientDescent(20, lr=0.1),
            estimator=mn.FOBMAML(scheme, nudge=nudge),
        )
        model.zero_grad()
        found.append((learner.backward(made.tasks), flat_gradient(model)))
    (step, expected), (scaled, gradient) = found
    assert scaled.nu * unit == pytest.approx(step.nu)
    torch.testing.assert_close(gradient, expected, rtol=1e-8, atol=1e-9)
    if nudge == "linear":
        assert scaled.error_bound == pytest.approx(step.error_bound, rel=1e-5)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: mn.FOBMAML(scheme=["symmetric"]), "scheme must be"),
        (lambda: mn.FOBMAML(scheme=torch.zeros(2)), "scheme must be"),
        (lambda: mn.Stencil((True, False), (1, -1), order=1), "nodes must be a tuple of numbers"),
        (lambda: mn.Stencil(("a", "b"), (1, 2), order=1), "nodes must be a tuple of numbers"),
        (lambda: mn.Stencil((0, 1), (-1, 1), order=True), "order of a stencil must be a whole number"),
    ],
)
def test_schemes_of_another_kind_are_told(make, told):
    with pytest.raises(mn.SettingsError, match=told):
        make()


@pytest.mark.parametrize("first", [torch.bfloat16, torch.float64])
def test_weights_of_a_stencil_are_not_those_of_another_dtype(first: torch.dtype) -> None:
    """Σ w n over the nodes is 1 to the round-off of the leaf, whatever that of the first parameter is."""
    model = nn.Sequential(nn.Linear(1, 1, dtype=first), nn.Linear(1, 1, dtype=torch.float64))
    data = mn.Batch(torch.ones(1, 4, 1), torch.ones(1, 4, 1))
    learner = mn.MetaLearner(model, mn.metrics.squared_error, execution="vectorized")
    selection = select_parameters(model, None)
    scheme = STENCILS["fourth_order"]

    def term(nodes: Tensor) -> tuple[dict[str, Tensor]]:
        return ({"leaf": nodes.double()[..., None].expand(-1, -1, 5)},)

    with learner.execution.lend(Use(selection, [mn.Tasks(data, data)], 1.0, Tally())) as lent:
        ((found,),) = next(lent.problems).losses.stencil_sums(scheme.nodes, (scheme.weights,), term)
    assert float((found["leaf"] - 1).abs().max()) < 1e-14
