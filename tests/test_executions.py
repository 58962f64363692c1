"""One mathematics, two executions: the stack under vmap and the live module agree to round-off."""

from __future__ import annotations

import pytest
import torch

import metanudge as mn
from metanudge.types import Role
from problems import (
    ESTIMATORS,
    ONE_SIDED,
    PROBLEMS,
    SOLVERS,
    Problem,
    coarse,
    distance,
    estimate,
    flat_gradient,
    normal,
    refused_in_place,
    single_tasks,
    squared_error,
)


def unrolls(estimator: object) -> bool:
    return isinstance(estimator, mn.MAML | mn.HFMAML)


BOTH = [name for name, estimator in ESTIMATORS.items() if not refused_in_place(estimator)]
STACKABLE = [name for name in SOLVERS if name != "torch_optimizer"]


@pytest.mark.parametrize("problem", ["logistic", "mlp"])
@pytest.mark.parametrize("solver", STACKABLE)
@pytest.mark.parametrize("name", BOTH)
def test_both_executions_agree(name: str, solver: str, problem: str) -> None:
    made, estimator = PROBLEMS[problem](), coarse(ESTIMATORS[name])
    stacked, live = (estimate(made, estimator, SOLVERS[solver], execution=e) for e in ("vectorized", "in_place"))
    assert distance(stacked, live) < 1e-12


@pytest.mark.parametrize("microbatch", [None, 3])
@pytest.mark.parametrize("estimator", [mn.FOBMAML(nu=0.1), mn.FOBMAML(nudge="full", nu=0.1)])
def test_parameters_to_which_autograd_gives_one_gradient(estimator: mn.FOBMAML, microbatch: int | None) -> None:
    """The sum of two views: PyTorch would add the next gradient to both at once, twice."""

    class Sum(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = (torch.nn.Parameter(torch.ones(4).double()) for _ in range(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ (self.one.view(4, 1) + self.other.view(4, 1))

    g = torch.Generator().manual_seed(1)
    tasks = mn.Tasks(*(mn.Batch(normal(g, 1, 8, 4), normal(g, 1, 8, 1)) for _ in range(2)))
    solver, found = SOLVERS["gradient_descent"], []
    for settings in ({"execution": "vectorized"}, {"execution": "in_place", "microbatch": microbatch}):
        learner = mn.MetaLearner(Sum(), squared_error, solver=solver, estimator=estimator, **settings)
        learner.backward(tasks)
        found.append(flat_gradient(learner.model))
    assert distance(*found) < 1e-12


def both_steps(made: Problem, estimator: object, solver: object) -> list[mn.MetaStep]:
    return [
        mn.MetaLearner(
            made.make(), made.loss, prox=made.prox, solver=solver, estimator=estimator, execution=execution
        ).backward(made.tasks)
        for execution in ("vectorized", "in_place")
    ]


@pytest.mark.parametrize("solver", STACKABLE)
@pytest.mark.parametrize("name", BOTH)
def test_both_executions_report_the_same(name: str, solver: str) -> None:
    made = PROBLEMS["logistic"]()
    stacked, live = both_steps(made, coarse(ESTIMATORS[name]), SOLVERS[solver])
    for field in ("query_loss", "support_loss", "residual", "nu", "gradient_norm"):
        assert getattr(stacked, field) == pytest.approx(getattr(live, field), rel=1e-9), field
    assert stacked.dropped_tasks == live.dropped_tasks == 0


@pytest.mark.parametrize("solver", [name for name in STACKABLE if name != "nesterov_tol"])
@pytest.mark.parametrize("name", ["symmetric", "forward", "fourth_order", "hfmaml", "imaml_two_gradient"])
def test_both_executions_cost_the_same(name: str, solver: str) -> None:
    stacked, live = both_steps(PROBLEMS["ridge"](), ESTIMATORS[name], SOLVERS[solver])
    assert stacked.gradient_evaluations == live.gradient_evaluations


@pytest.mark.parametrize("solver", STACKABLE)
def test_adapt_and_evaluate_agree(solver: str) -> None:
    made = PROBLEMS["mlp"]()
    ends, curves = [], []
    for execution in ("vectorized", "in_place"):
        learner = mn.MetaLearner(made.make(), made.loss, prox=made.prox, solver=SOLVERS[solver], execution=execution)
        adapted = learner.adapt(single_tasks(made.tasks)[1].support)
        ends.append(torch.nn.utils.parameters_to_vector(adapted.parameters()).detach())
        curves.append(learner.evaluate(made.tasks).values)
    assert distance(*ends) < 1e-12
    assert distance(*curves) < 1e-12


# Refusals, when the learner is built.


@pytest.mark.parametrize("name", [name for name in ESTIMATORS if name not in BOTH])
def test_double_backward_is_refused_in_place(name: str) -> None:
    made = PROBLEMS["ridge"]()
    with pytest.raises(mn.SettingsError, match=r"cannot run here: it differentiates the loss twice.*Use FOBMAML"):
        mn.MetaLearner(made.make(), made.loss, estimator=ESTIMATORS[name], execution="in_place")


def test_a_torch_optimizer_is_refused_in_a_stack() -> None:
    made = PROBLEMS["ridge"]()
    with pytest.raises(mn.SettingsError, match=r"TorchOptimizer cannot run here: it steps.*in_place"):
        mn.MetaLearner(made.make(), made.loss, solver=SOLVERS["torch_optimizer"], execution="vectorized")


@pytest.mark.parametrize("name", [name for name, estimator in ESTIMATORS.items() if unrolls(estimator)])
@pytest.mark.parametrize("execution", ["auto", "in_place"])
def test_a_torch_optimizer_is_refused_by_those_that_unroll_it(name: str, execution: str) -> None:
    made = PROBLEMS["ridge"]()
    with pytest.raises(mn.SettingsError, match=r"cannot run here: it differentiates"):
        mn.MetaLearner(
            made.make(), made.loss, solver=SOLVERS["torch_optimizer"], estimator=ESTIMATORS[name], execution=execution
        )


def test_hfmaml_with_a_torch_optimizer_is_told_the_cure() -> None:
    made = PROBLEMS["ridge"]()
    with pytest.raises(mn.SettingsError, match=r"through the solver's steps.*GradientDescent, Nesterov or Adam"):
        mn.MetaLearner(made.make(), made.loss, solver=SOLVERS["torch_optimizer"], estimator=mn.HFMAML())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"execution": "parallel"}, r'execution must be "auto", "vectorized" or "in_place"'),
        ({"chunk_size": 0}, "chunk_size must be"),
        ({"chunk_size": 1.5}, "chunk_size must be"),
    ],
)
def test_bad_execution_settings_are_refused(settings: dict, words: str) -> None:
    made = PROBLEMS["ridge"]()
    with pytest.raises(mn.SettingsError, match=words):
        mn.MetaLearner(made.make(), made.loss, **settings)


def test_auto_takes_the_live_module_for_a_torch_optimizer_and_a_compiled_model_only() -> None:
    """Seen from outside: the live module's parameters really move while the loss is evaluated."""
    made = PROBLEMS["ridge"]()

    def moves(model: torch.nn.Module, solver: object) -> bool:
        core = getattr(model, "_orig_mod", model)
        begun, seen = core.weight.detach().clone(), []

        def loss(model: torch.nn.Module, batch: mn.Batch) -> torch.Tensor:
            live = isinstance(core.weight, torch.nn.Parameter)
            seen.append(live and not torch.equal(core.weight.detach(), begun))
            return made.loss(core, batch)

        mn.MetaLearner(model, loss, solver=solver).backward(made.tasks)
        return any(seen)

    assert not moves(made.make(), SOLVERS["gradient_descent"])
    assert moves(made.make(), SOLVERS["torch_optimizer"])
    assert moves(torch.compile(made.make(), backend="eager"), SOLVERS["gradient_descent"])


# Chunks.


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("name", ["symmetric", "maml_checkpointed", "tangent", "hfmaml"])
def test_chunks_give_the_same(name: str, size: int) -> None:
    made, solver = PROBLEMS["logistic"](), SOLVERS["nesterov_fixed"]
    estimator = coarse(ESTIMATORS[name])
    whole, chunked = (estimate(made, estimator, solver, chunk_size=chunk) for chunk in (None, size))
    assert distance(chunked, whole) < 1e-13


# A real torch.optim optimizer in the inner loop.

COINCIDE = {
    "sgd": (lambda p: torch.optim.SGD(p, lr=0.1), mn.GradientDescent(6, lr=0.1)),
    "momentum": (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.7), mn.GradientDescent(6, lr=0.1, momentum=0.7)),
    "adam": (lambda p: torch.optim.Adam(p, lr=0.05), mn.Adam(6, lr=0.05)),
    "adam_betas": (
        lambda p: torch.optim.Adam(p, lr=0.05, betas=(0.5, 0.8), eps=1e-3),
        mn.Adam(6, lr=0.05, betas=(0.5, 0.8), eps=1e-3),
    ),
    "adamw": (lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.0), mn.Adam(6, lr=0.05)),
}
STEPPED = [
    mn.FOBMAML(nu=0.1),
    mn.FOBMAML("forward", nu=0.1),
    mn.FOBMAML(ONE_SIDED, nu=0.1),
    mn.FOBMAML(nudge="linear", nu=0.1),
    mn.FOBMAML("forward", nu=0.1, start="initialization"),
    mn.FOMAML(),
    mn.Reptile(),
    mn.IMAML(cg_steps=4, products="two_gradient", displacement=0.1),
    mn.Tangent(products="two_gradient", displacement=0.1),
]


@pytest.mark.parametrize("optimizer", COINCIDE)
@pytest.mark.parametrize("estimator", STEPPED, ids=str)
def test_a_torch_optimizer_equals_our_own_solver(estimator: object, optimizer: str) -> None:
    factory, own = COINCIDE[optimizer]
    made = PROBLEMS["logistic"]()
    live = estimate(made, estimator, mn.TorchOptimizer(factory, steps=6))
    # Adam divides by roots of second moments, which near-zero gradients make stiff
    assert distance(live, estimate(made, estimator, own, execution="in_place")) < 1e-12
    assert distance(live, estimate(made, estimator, own, execution="vectorized")) < (
        1e-9 if "adam" in optimizer else 1e-12
    )


def test_a_torch_optimizer_sees_the_weight_decay_it_is_given() -> None:
    """AdamW with decay is another solver: it must not silently be Adam."""
    made = PROBLEMS["logistic"]()
    decayed = mn.TorchOptimizer(lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.5), steps=6)
    assert distance(estimate(made, mn.Reptile(), decayed), estimate(made, mn.Reptile(), mn.Adam(6, lr=0.05))) > 1e-2


def test_an_optimizer_that_mixes_its_parameters() -> None:
    """Gradient clipped by its global norm inside ``step``: only one task at a time makes sense of that."""
    made = PROBLEMS["ridge"]()

    class Normalised(torch.optim.SGD):
        def step(self, closure: object = None) -> None:
            torch.nn.utils.clip_grad_norm_(self.param_groups[0]["params"], 0.1)
            super().step(closure)

    model = made.make()
    solver = mn.TorchOptimizer(lambda p: Normalised(p, lr=1.0), steps=5)
    mn.MetaLearner(model, made.loss, prox=made.prox, solver=solver, estimator=mn.Reptile()).backward(made.tasks)
    assert 0 < float(flat_gradient(model).norm()) <= 5 * 0.1 + 1e-12


def test_a_factory_that_makes_no_optimizer_is_refused() -> None:
    made = PROBLEMS["ridge"]()
    with pytest.raises(mn.SettingsError, match=r"must return a torch\.optim optimizer, got None"):
        estimate(made, mn.FOBMAML(), mn.TorchOptimizer(lambda parameters: None, 3))


def test_a_factory_that_gives_one_optimizer_again_is_refused() -> None:
    """Its moments would go from one solve to the next."""
    made = PROBLEMS["ridge"]()
    model = made.make()
    one = torch.optim.Adam(model.parameters(), lr=0.1)
    solver = mn.TorchOptimizer(lambda parameters: one, 3)
    with pytest.raises(mn.SettingsError, match=r"fresh optimizer at every call.*lambda p: torch\.optim\.Adam\(p"):
        mn.MetaLearner(model, made.loss, solver=solver).backward(made.tasks)
    assert torch.equal(model.weight.detach().reshape(-1), made.theta)


def test_a_torch_optimizer_as_solver_is_told_the_call() -> None:
    made = PROBLEMS["ridge"]()
    model = made.make()
    with pytest.raises(mn.SettingsError, match=r"mn\.TorchOptimizer\(lambda p: torch\.optim\.SGD\(p"):
        mn.MetaLearner(model, made.loss, solver=torch.optim.SGD(model.parameters(), lr=0.1))


def test_auto_takes_the_live_module_for_recurrent_layers() -> None:
    class Recurrent(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = torch.nn.GRU(2, 4, batch_first=True), torch.nn.Linear(4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.layer(x)[0][:, -1])

    model = Recurrent()
    batch = mn.Batch(torch.randn(3, 5, 6, 2), torch.randn(3, 5, 1))
    learner = mn.MetaLearner(model, mn.metrics.squared_error, solver=mn.Nesterov(3))
    assert "execution='in_place'" in repr(learner)
    assert learner.backward(mn.Tasks(batch, batch)).dropped_tasks == 0


def test_an_optimizer_by_name_is_refused() -> None:
    with pytest.raises(mn.SettingsError, match="factory must be a function"):
        mn.TorchOptimizer("adam", 5)


def test_lbfgs_is_refused() -> None:
    made = PROBLEMS["ridge"]()
    solver = mn.TorchOptimizer(lambda p: torch.optim.LBFGS(p), steps=2)
    model = made.make()
    with pytest.raises(mn.SettingsError, match=r"L-BFGS.*use Nesterov"):
        mn.MetaLearner(model, made.loss, solver=solver).backward(made.tasks)
    assert torch.equal(model.weight.detach().reshape(-1), made.theta)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sampled", [False, True], ids=["batch", "minibatches"])
def test_the_loss_at_the_start_is_seen_in_passing(sampled: bool, dtype: torch.dtype) -> None:
    """In place: f̂(θ) of a gradient there is that of a forward pass, with its dropout; one elsewhere does not count."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(2, 16), torch.nn.Dropout(), torch.nn.Linear(16, 1)).to(dtype)
    drawn, calls, seen = torch.randn(8, 3, dtype=dtype), [], []
    batch = mn.Batch(drawn[:, :2], drawn[:, 2:])
    support = mn.Minibatches([batch, batch]) if sampled else batch

    def loss(model: torch.nn.Module, batch: mn.Batch) -> torch.Tensor:
        calls.append(torch.is_grad_enabled())
        return mn.metrics.squared_error(model, batch)

    class Looks(mn.FOMAML):
        def __call__(self, problem: mn.InnerProblem, solver: mn.Solver) -> mn.Estimate:
            losses, theta = problem.losses, problem.theta
            losses.gradient({Role.SUPPORT: 1.0}, {name: 2 * leaf for name, leaf in theta.items()}, 0)
            assert not losses.passed
            losses.gradient({Role.SUPPORT: 1.0}, theta, 0)
            calls.clear()
            seen.append(losses.loss(Role.SUPPORT, theta))
            assert not calls
            losses.passed = None
            seen.append(losses.loss(Role.SUPPORT, theta))
            assert calls == [False] * 3  # microbatches of 8 examples
            return super().__call__(problem, solver)

    learner = mn.MetaLearner(
        model,
        loss,
        prox=1.0,
        solver=mn.GradientDescent(2, lr=0.1),
        estimator=Looks(),
        execution="in_place",
        microbatch=3,
    )
    learner.backward([mn.Tasks(support, batch)])
    passed, forward = seen
    torch.testing.assert_close(passed, forward, rtol=torch.finfo(dtype).eps, atol=0)
