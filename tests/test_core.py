"""The core against closed forms and plain autograd, in float64."""

import copy
import warnings

import pytest
import torch
from torch import nn

import metanudge as mn
from metanudge.diagnostics import ExactMetaObjective

T, N, D, PROX = 5, 8, 4, 0.7


def squared(model, batch):
    return 0.5 * (model(batch.inputs) - batch.targets).square().mean()


def draw(seed=0, tasks=T, examples=N, features=D):
    generator = torch.Generator().manual_seed(seed)
    x, y, xq, yq = (
        torch.randn(tasks, examples, columns, generator=generator, dtype=torch.float64)
        for columns in (features, 1, features, 1)
    )
    return mn.Tasks(mn.Batch(x, y), mn.Batch(xq, yq))


def linear(seed=0, features=D, bias=False):
    torch.manual_seed(seed)
    return nn.Linear(features, 1, bias=bias, dtype=torch.float64)


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(D, 6), nn.Tanh(), nn.Linear(6, 1)).double()


class Ridge:
    """f̂ = <φ, Hφ>/2 - <b, φ>: everything by dense solves."""

    def __init__(self, tasks, theta):
        def moments(batch):
            x, y = batch
            return x.mT @ x / x.shape[1], (x.mT @ y / x.shape[1])[..., 0]

        self.H, self.b = moments(tasks.support)
        self.Hq, self.bq = moments(tasks.query)
        self.A = self.H + PROX * torch.eye(D, dtype=torch.float64)
        self.phi = torch.linalg.solve(self.A, self.b + PROX * theta)
        self.query_gradient = (self.Hq @ self.phi[..., None])[..., 0] - self.bq
        self.meta_gradient = (PROX * torch.linalg.solve(self.A, self.query_gradient)).mean(0)


def gradients(model):
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def meta_gradient(model, tasks, loss=squared, **settings):
    model.zero_grad()
    step = mn.MetaLearner(model, loss, **settings).backward(tasks)
    return gradients(model), step


def distance(a, b):
    difference = sum((a[name] - b[name]).square().sum() for name in b)
    return float((difference / sum(leaf.square().sum() for leaf in b.values())).sqrt())


CONVERGED = mn.Nesterov(200)
EXACT = {
    "symmetric": (mn.FOBMAML(), 1e-7),
    "symmetric_linear": (mn.FOBMAML(nudge="linear"), 1e-7),
    "symmetric_from_start": (mn.FOBMAML(start="initialization"), 1e-7),
    "forward": (mn.FOBMAML("forward"), 1e-6),
    "forward_from_start": (mn.FOBMAML("forward", start="initialization"), 1e-6),
    "fourth_order": (mn.FOBMAML("fourth_order"), 1e-9),
    "one_sided": (mn.FOBMAML(mn.Stencil((0, 1, 2), (-1.5, 2, -0.5), 2)), 1e-7),
    "imaml": (mn.IMAML(), 1e-9),
    "imaml_two_gradient": (mn.IMAML(products="two_gradient"), 1e-9),
    "tangent": (mn.Tangent(), 1e-9),
    "tangent_two_gradient": (mn.Tangent(products="two_gradient"), 1e-9),
    "hfmaml": (mn.HFMAML(), 1e-9),
    "maml": (mn.MAML(), 1e-12),
    "maml_checkpointed": (mn.MAML(checkpoint=True), 1e-12),
}


@pytest.mark.parametrize("name", EXACT)
def test_exact_estimators_on_ridge(name):
    estimator, tolerance = EXACT[name]
    model, tasks = linear(), draw()
    exact = Ridge(tasks, model.weight.detach()[0]).meta_gradient
    found, step = meta_gradient(model, tasks, prox=PROX, solver=CONVERGED, estimator=estimator)
    assert float((found["weight"][0] - exact).norm() / exact.norm()) < tolerance
    assert step.gradient_norm == pytest.approx(float(exact.norm()), rel=1e-5)
    assert step.residual < 1e-12


def test_biased_estimators_on_ridge():
    model, tasks = linear(), draw()
    theta = model.weight.detach()[0].clone()
    exact = Ridge(tasks, theta)
    fomaml, _ = meta_gradient(model, tasks, prox=PROX, solver=CONVERGED, estimator=mn.FOMAML())
    torch.testing.assert_close(fomaml["weight"][0], exact.query_gradient.mean(0), rtol=1e-12, atol=1e-13)
    reptile, _ = meta_gradient(model, tasks, prox=PROX, solver=CONVERGED, estimator=mn.Reptile())
    torch.testing.assert_close(reptile["weight"][0], theta - exact.phi.mean(0), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("scheme", [*mn.STENCILS, "one_sided"])
def test_declared_order_by_regression(scheme):
    row = mn.Stencil((0, 1, 2), (-1.5, 2, -0.5), 2) if scheme == "one_sided" else mn.STENCILS[scheme]
    tasks = mn.tasks.logistic(4, features=3)
    loss, model = mn.tasks.logistic_loss, mn.tasks.logistic_model(3)
    exact = ExactMetaObjective(model, loss, tasks, prox=0.5).gradient(torch.zeros(3, dtype=torch.float64))
    sizes, errors = [0.2 * 0.75**k for k in range(6)], []
    for nu in sizes:
        estimator = mn.FOBMAML(row, nu=nu)
        found, _ = meta_gradient(model, tasks, loss, prox=0.5, solver=mn.Nesterov(80), estimator=estimator)
        errors.append(float((found["weight"][0] - exact).norm()))
    x, y = torch.tensor(sizes).log(), torch.tensor(errors).log()
    slope = float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())
    assert slope == pytest.approx(row.order, abs=0.3)


def plain_unroll(model, task, steps, lr, momentum, nesterov, adam):
    """φ_K by a loop of ordinary autograd on one task; returns the meta-gradient in all parameters."""
    theta = {name: parameter.detach().clone().requires_grad_() for name, parameter in model.named_parameters()}
    phi, velocity, first, second = (
        dict(theta),
        dict.fromkeys(theta, 0.0),
        dict.fromkeys(theta, 0.0),
        dict.fromkeys(theta, 0.0),
    )
    previous = dict(theta)
    for k in range(steps):
        loss = torch.func.functional_call(LossOf(model), {f"model.{n}": p for n, p in phi.items()}, (task.support,))
        found = dict(zip(phi, torch.autograd.grad(loss, list(phi.values()), create_graph=True), strict=True))
        g = {n: found[n] + PROX * (phi[n] - theta[n]) for n in phi}
        if adam:
            first = {n: 0.9 * first[n] + 0.1 * g[n] for n in g}
            second = {n: 0.999 * second[n] + 0.001 * g[n] ** 2 for n in g}
            phi = {
                n: phi[n]
                - lr * (first[n] / (1 - 0.9 ** (k + 1))) / ((second[n] / (1 - 0.999 ** (k + 1))).sqrt() + 1e-8)
                for n in g
            }
        elif nesterov:
            x = {n: phi[n] - lr * g[n] for n in g}
            last, phi, previous = x, {n: x[n] + momentum * (x[n] - previous[n]) for n in g}, x
        else:
            velocity = {n: momentum * velocity[n] + g[n] for n in g}
            phi = {n: phi[n] - lr * velocity[n] for n in g}
    end = last if nesterov else phi
    query = torch.func.functional_call(LossOf(model), {f"model.{n}": p for n, p in end.items()}, (task.query,))
    return dict(zip(theta, torch.autograd.grad(query, list(theta.values())), strict=True))


class LossOf(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, batch):
        return squared(self.model, batch)


UNROLLED = {
    "gd": (lambda k: mn.GradientDescent(k, lr=0.1), (0.1, 0.0, False, False)),
    "momentum": (lambda k: mn.GradientDescent(k, lr=0.1, momentum=0.8), (0.1, 0.8, False, False)),
    "nesterov": (lambda k: mn.Nesterov(k, lr=0.1, momentum=0.6, restart=False), (0.1, 0.6, True, False)),
    "adam": (lambda k: mn.Adam(k, lr=0.05), (0.05, 0.0, False, True)),
}


@pytest.mark.parametrize("steps", [1, 2, 5, 10])
@pytest.mark.parametrize("solver", UNROLLED)
def test_maml_is_autograd_through_the_same_solver(solver, steps):
    make, (lr, momentum, nesterov, adam) = UNROLLED[solver]
    model, tasks = network(), draw()
    singles = [mn.Tasks(*(mn.Batch(*(leaf[i] for leaf in part)) for part in tasks)) for i in range(T)]
    each = [plain_unroll(model, task, steps, lr, momentum, nesterov, adam) for task in singles]
    exact = {name: torch.stack([one[name] for one in each]).mean(0) for name in each[0]}
    for estimator, tolerance in ((mn.MAML(), 1e-12), (mn.MAML(checkpoint=True), 1e-12), (mn.HFMAML(), 1e-6)):
        found, _ = meta_gradient(model, tasks, prox=PROX, solver=make(steps), estimator=estimator)
        assert distance(found, exact) < tolerance


@pytest.mark.parametrize("momentum", [0.0, 0.6])
def test_tangent_is_the_limit_of_vanishing_nudge_unsolved_too(momentum):
    model, tasks, solver = network(), draw(), mn.GradientDescent(4, lr=0.1, momentum=momentum)
    settings = {"prox": PROX, "solver": solver}
    tangent, _ = meta_gradient(model, tasks, estimator=mn.Tangent(), **settings)
    # from the unsolved φ(0) the free problem moves on as well; matched solves cancel that but for a term in ν²
    errors = []
    for nu in (1e-2, 1e-3):
        found, _ = meta_gradient(model, tasks, estimator=mn.FOBMAML(nudge="linear", nu=nu), **settings)
        errors.append(distance(found, tangent))
    assert errors[1] < 0.2


VARIANTS = {
    **{f"fobmaml_{scheme}": mn.FOBMAML(scheme, nu=0.3) for scheme in mn.STENCILS},
    "fobmaml_linear": mn.FOBMAML(nudge="linear", nu=0.3),
    "fobmaml_from_start": mn.FOBMAML("forward", nu=0.3, start="initialization"),
    "fomaml": mn.FOMAML(),
    "reptile": mn.Reptile(),
    "imaml": mn.IMAML(cg_steps=3, products="two_gradient", displacement=0.1),
    "tangent": mn.Tangent(products="two_gradient", displacement=0.1),
    "hfmaml": mn.HFMAML(displacement=0.1),
}
SOLVERS = {
    "gd": mn.GradientDescent(4, lr=0.1),
    "momentum": mn.GradientDescent(4, lr=0.1, momentum=0.7),
    "nesterov": mn.Nesterov(5),
    "nesterov_tol": mn.Nesterov(30, tol=0.1),
    "adam": mn.Adam(4, lr=0.05),
}


@pytest.mark.parametrize("estimator", VARIANTS)
@pytest.mark.parametrize("solver", SOLVERS)
def test_executions_agree(estimator, solver):
    # nudges and displacements are large, so that differences of solutions do not amplify round-off
    model, tasks = network(), draw()
    settings = {"prox": PROX, "solver": SOLVERS[solver], "estimator": VARIANTS[estimator]}
    stacked, step = meta_gradient(model, tasks, execution="vectorized", **settings)
    chunked, _ = meta_gradient(model, tasks, execution="vectorized", chunk_size=2, **settings)
    live, live_step = meta_gradient(model, tasks, execution="in_place", **settings)
    assert distance(stacked, live) < 1e-12
    assert distance(chunked, live) < 1e-12
    assert step.query_loss == pytest.approx(live_step.query_loss, rel=1e-12)


@pytest.mark.parametrize("estimator", [mn.MAML(), mn.MAML(checkpoint=True), mn.IMAML(), mn.Tangent()])
def test_double_backward_is_refused_in_place(estimator):
    with pytest.raises(mn.SettingsError, match="differentiates the loss twice"):
        mn.MetaLearner(linear(), squared, estimator=estimator, execution="in_place")


def test_torch_optimizers_step_the_live_module():
    model, tasks = network(), draw()
    pairs = [
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.7), mn.GradientDescent(5, lr=0.1, momentum=0.7)),
        (lambda p: torch.optim.Adam(p, lr=0.05), mn.Adam(5, lr=0.05)),
    ]
    for factory, own in pairs:
        reference, _ = meta_gradient(model, tasks, prox=PROX, solver=own, estimator=mn.FOBMAML(nu=0.3))
        found, _ = meta_gradient(
            model, tasks, prox=PROX, solver=mn.TorchOptimizer(factory, 5), estimator=mn.FOBMAML(nu=0.3)
        )
        assert distance(found, reference) < 1e-10
    for refused, words in (
        ({"execution": "vectorized"}, "live module"),
        ({"estimator": mn.HFMAML()}, "solver's steps"),
    ):
        with pytest.raises(mn.SettingsError, match=words):
            mn.MetaLearner(model, squared, solver=mn.TorchOptimizer(pairs[0][0], 5), **refused)


@pytest.mark.parametrize(
    "estimator",
    [mn.FOBMAML(), mn.FOBMAML(nudge="linear"), mn.FOBMAML("forward"), mn.IMAML(cg_steps=40), mn.Tangent(), mn.MAML(),
     mn.HFMAML(), mn.IMAML(cg_steps=40, products="two_gradient")],
    ids=str,
)  # fmt: skip
def test_shared_parameters_get_their_exact_gradient(estimator):
    tasks, model = draw(), network()
    head = [name for name, _ in model.named_parameters() if name.startswith("2.")]
    solver = mn.Nesterov(150)
    # reference: ordinary autograd through a long plain descent on the head, then through the query loss
    theta = {name: parameter.detach().clone().requires_grad_() for name, parameter in model.named_parameters()}
    total = 0.0
    for i in range(T):
        task = mn.Tasks(*(mn.Batch(*(leaf[i] for leaf in part)) for part in tasks))
        phi = {name: theta[name] for name in head}
        for _ in range(250):
            named = {f"model.{n}": p for n, p in {**theta, **phi}.items()}
            loss = torch.func.functional_call(LossOf(model), named, (task.support,))
            g = torch.autograd.grad(loss, list(phi.values()), create_graph=True)
            phi = {n: p - 0.3 * (d + PROX * (p - theta[n])) for (n, p), d in zip(phi.items(), g, strict=True)}
        named = {f"model.{n}": p for n, p in {**theta, **phi}.items()}
        total = total + torch.func.functional_call(LossOf(model), named, (task.query,)) / T
    exact = dict(zip(theta, torch.autograd.grad(total, list(theta.values())), strict=True))
    found, _ = meta_gradient(model, tasks, prox=PROX, solver=solver, estimator=estimator, adapt_only="2.*")
    assert distance(found, exact) < 1e-6


def test_adapt_only_by_name_pattern_and_predicate():
    tasks, choices = draw(), ("2.*", ["2.weight", "2.bias"], lambda name, parameter: name.startswith("2"))
    found = [meta_gradient(network(), tasks, prox=PROX, adapt_only=which)[0] for which in choices]
    assert all(distance(one, found[0]) == 0 for one in found)
    with pytest.raises(mn.SettingsError, match="matches no parameter"):
        mn.MetaLearner(network(), squared, adapt_only="neck.*")
    with pytest.raises(mn.SettingsError, match="Reptile can not run here"):
        mn.MetaLearner(network(), squared, adapt_only="2.*", estimator=mn.Reptile())


@pytest.mark.parametrize("execution", ["vectorized", "in_place"])
def test_backward_accumulates_and_leaves_frozen_parameters_alone(execution):
    model, tasks = network(), draw()
    model[0].weight.requires_grad_(False)
    learner = mn.MetaLearner(model, squared, prox=PROX, execution=execution)
    learner.backward(tasks)
    once = gradients(model)
    learner.backward(tasks)
    assert model[0].weight.grad is None
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, 2 * once[name], rtol=1e-9, atol=1e-12)


def state_of(model):
    return (
        {name: tensor.clone() for name, tensor in model.state_dict().items()},
        {name: parameter.grad for name, parameter in model.named_parameters()},
        {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        [module.training for module in model.modules()],
    )


def assert_same_state(model, before):
    values, grads, flags, modes = state_of(model)
    for name, tensor in before[0].items():
        assert torch.equal(tensor, values[name]), name
    assert all(grads[name] is grad for name, grad in before[1].items())
    assert flags == before[2]
    assert modes == before[3]


@pytest.mark.parametrize("execution", ["vectorized", "in_place"])
@pytest.mark.parametrize("call", [1, 4, 30])
def test_state_is_restored_after_an_exception_in_the_loss(execution, call):
    model, tasks, calls = with_batchnorm(), draw(), []

    def failing(model, batch):
        calls.append(0)
        if len(calls) == call:
            raise RuntimeError("boom")
        return squared(model, batch)

    model.zero_grad()
    mn.MetaLearner(model, squared, execution=execution).backward(tasks)
    before, random = state_of(model), torch.get_rng_state()
    with pytest.raises(RuntimeError, match="boom"):
        mn.MetaLearner(model, failing, execution=execution).backward(tasks)
    assert_same_state(model, before)
    torch.manual_seed(3)
    torch.rand(1)
    assert random.shape == torch.get_rng_state().shape


def with_batchnorm():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(D, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 1)).double()


@pytest.mark.parametrize("training", [True, False])
def test_batchnorm_in_both_executions(training):
    model, tasks = with_batchnorm().train(training), draw()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    settings = {"prox": PROX, "solver": mn.GradientDescent(4, lr=0.05), "estimator": mn.FOBMAML(nu=0.3)}
    stacked, _ = meta_gradient(model, tasks, execution="vectorized", **settings)
    live, _ = meta_gradient(model, tasks, execution="in_place", **settings)
    assert distance(stacked, live) < 1e-12
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


@pytest.mark.parametrize("execution", ["vectorized", "in_place"])
def test_dropout_is_matched_across_nudges(execution):
    torch.manual_seed(0)
    model, tasks = nn.Sequential(nn.Linear(D, 20), nn.Tanh(), nn.Dropout(0.5), nn.Linear(20, 1)).double(), draw()
    found = []
    for nu in (1e-3, 1e-5):
        torch.manual_seed(7)
        settings = {"prox": 2.0, "solver": mn.Nesterov(60), "estimator": mn.FOBMAML(nu=nu, nudge="linear")}
        found.append(meta_gradient(model, tasks, execution=execution, **settings)[0])
    # unmatched masks would make the estimates differ by noise / ν: a factor 1e5 and more
    assert distance(found[0], found[1]) < 1e-2


def test_tied_weights_and_unused_parameters():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(D, D, bias=False).double()
            self.second = nn.Linear(D, D, bias=False).double()
            self.second.weight = self.first.weight
            self.unused = nn.Parameter(torch.ones(3, dtype=torch.float64))

        def forward(self, x):
            return self.second(torch.tanh(self.first(x))).sum(-1, keepdim=True)

    torch.manual_seed(0)
    model, tasks = Tied(), draw()
    settings = {"prox": PROX, "solver": mn.Nesterov(400)}  # a product of weights: a slow solve
    exact, _ = meta_gradient(model, tasks, estimator=mn.MAML(), **settings)
    assert set(exact) == {"first.weight", "unused"}
    assert not exact["unused"].any()
    for execution in ("vectorized", "in_place"):
        found, _ = meta_gradient(model, tasks, execution=execution, **settings)
        assert distance(found, exact) < 1e-5


def test_float32_symmetric_difference_is_accurate():
    tasks = mn.tasks.logistic(6, features=5)
    exact = ExactMetaObjective(mn.tasks.logistic_model(5), mn.tasks.logistic_loss, tasks, prox=0.5)
    reference = exact.gradient(torch.zeros(5, dtype=torch.float64))
    small = mn.Tasks(*(mn.Batch(part.inputs.float(), part.targets.float()) for part in tasks))
    model = mn.tasks.logistic_model(5, dtype=torch.float32)
    found, _ = meta_gradient(model, small, mn.tasks.logistic_loss, prox=0.5, solver=mn.Nesterov(40))
    assert float((found["weight"][0].double() - reference).norm() / reference.norm()) < 1e-3


def test_ragged_tasks_are_averaged_and_dropped_ones_counted():
    model = network()
    lengths = (5, 8, 5)
    singles = [
        mn.Tasks(*(mn.Batch(*(leaf[0] for leaf in part)) for part in draw(i, 1, n))) for i, n in enumerate(lengths)
    ]
    each = [meta_gradient(model, [task], prox=PROX)[0] for task in singles]
    mean = {name: torch.stack([one[name] for one in each]).mean(0) for name in each[0]}
    together, _ = meta_gradient(model, singles, prox=PROX)
    assert distance(together, mean) < 1e-9
    broken = mn.Tasks(singles[1].support, mn.Batch(singles[1].query.inputs * float("nan"), singles[1].query.targets))
    with pytest.warns(mn.NonFiniteWarning, match="1 of 3 tasks"):
        rest, step = meta_gradient(model, [singles[0], broken, singles[2]], prox=PROX)
    assert step.dropped_tasks == 1
    assert distance(rest, {name: (each[0][name] + each[2][name]) / 2 for name in mean}) < 1e-9
    model.zero_grad()
    before = state_of(model)
    with pytest.raises(mn.NonFiniteError, match="none of the 1 tasks"):
        mn.MetaLearner(model, squared).backward([broken])
    assert_same_state(model, before)


@pytest.mark.parametrize("execution", ["vectorized", "in_place"])
def test_adapt_returns_a_new_module(execution):
    model, tasks = linear(), draw()
    before = state_of(model)
    learner = mn.MetaLearner(model, squared, prox=PROX, solver=CONVERGED, execution=execution)
    adapted = learner.adapt(mn.Batch(tasks.support.inputs[2], tasks.support.targets[2]))
    torch.testing.assert_close(adapted.weight[0], Ridge(tasks, model.weight.detach()[0]).phi[2], rtol=1e-10, atol=1e-12)
    assert isinstance(adapted, nn.Linear)
    assert adapted.weight.data_ptr() != model.weight.data_ptr()
    assert_same_state(model, before)


@pytest.mark.parametrize("execution", ["vectorized", "in_place"])
def test_evaluate_follows_the_adaptation(execution):
    model, tasks = linear(), draw()
    learner = mn.MetaLearner(model, squared, prox=PROX, solver=mn.GradientDescent(60, lr=0.3), execution=execution)
    result = learner.evaluate(tasks)
    exact = Ridge(tasks, model.weight.detach()[0])
    ends = 0.5 * ((tasks.query.inputs @ exact.phi[..., None]) - tasks.query.targets).square().mean((1, 2))
    torch.testing.assert_close(result.values[:, -1], ends, rtol=1e-6, atol=1e-8)
    assert result.values.shape == (T, 61)
    assert result.mean == pytest.approx(float(ends.mean()), rel=1e-6)
    assert result.ci95 == pytest.approx(float(1.96 * ends.std() / T**0.5), rel=1e-5)
    loader = learner.evaluate(iter([tasks, tasks]), metric=mn.metrics.squared_error)
    torch.testing.assert_close(loader.values[:T] / 2, result.values)


def test_gradient_evaluations_are_counted():
    tasks, k = draw(), 6
    solver = mn.GradientDescent(k, lr=0.1)
    expected = {
        mn.FOMAML(): k + 2,
        mn.Reptile(): k + 2,
        mn.MAML(): 3 * k + 2,
        mn.HFMAML(): 3 * k + 2,
        mn.FOBMAML(): 5 * k + 2,
        mn.FOBMAML(nudge="linear"): 3 * k + 2,
        mn.FOBMAML("forward", start="initialization"): 3 * k + 2,
        mn.IMAML(cg_steps=3): k + 3 + 6,
        mn.Tangent(): 3 * k + 3,
    }
    for estimator, cost in expected.items():
        _, step = meta_gradient(network(), tasks, prox=PROX, solver=solver, estimator=estimator)
        # a shared first step of all nodes may be evaluated once
        assert cost - 2 <= step.gradient_evaluations / T <= cost


BAD_LOSSES = {
    "one number per task": lambda model, batch: (model(batch.inputs) - batch.targets).square(),
    "returned float": lambda model, batch: 1.0,
    "no gradient reaches them": lambda model, batch: squared(model, batch).detach(),
    "floating-point": lambda model, batch: (model(batch.inputs) > 0).sum(),
}


@pytest.mark.parametrize("execution", ["vectorized", "in_place"])
@pytest.mark.parametrize("words", BAD_LOSSES)
def test_losses_that_can_not_work(words, execution):
    with pytest.raises(mn.LossError, match=words):
        mn.MetaLearner(linear(), BAD_LOSSES[words], execution=execution).backward(draw())


def test_tasks_that_do_not_fit():
    learner, tasks = mn.MetaLearner(linear(), squared), draw()
    cases = {
        "empty": draw(tasks=0),
        "leading axis": mn.Tasks(tasks.support, draw(tasks=2).query),
        "expected mn.Tasks": tasks.support,
        "list of tasks is empty": [],
        "found int": mn.Tasks(mn.Batch(tasks.support.inputs, 3), tasks.query),
        "model is on cpu": mn.Tasks(mn.Batch(*(leaf.to("meta") for leaf in tasks.support)), tasks.query),
    }
    for words, wrong in cases.items():
        with pytest.raises(mn.TasksError, match=words):
            learner.backward(wrong)


@pytest.mark.parametrize(
    "make",
    [
        lambda: mn.MetaLearner(linear(), squared, prox=-1.0),
        lambda: mn.MetaLearner(linear(), squared, prox=0.0),
        lambda: mn.MetaLearner(linear(), squared, execution="gpu"),
        lambda: mn.MetaLearner(linear(), "mse"),
        lambda: mn.MetaLearner("model", squared),
        lambda: mn.MetaLearner(linear().requires_grad_(False), squared),
        lambda: mn.MetaLearner(linear(), squared, chunk_size=0),
        lambda: mn.FOBMAML("backward"),
        lambda: mn.FOBMAML(nu=0.0),
        lambda: mn.FOBMAML(nudge="half"),
        lambda: mn.Stencil((0, 1), (-1, 1), 2),
        lambda: mn.Stencil((0, 0), (-1, 1), 1),
        lambda: mn.IMAML(cg_steps=0),
        lambda: mn.Tangent(products="approximate"),
        lambda: mn.GradientDescent(0, lr=0.1),
        lambda: mn.GradientDescent(2, lr=-0.1),
        lambda: mn.GradientDescent(2, lr=0.1, momentum=1.0),
        lambda: mn.Nesterov(4, lr="fast"),
        lambda: mn.optim.NormalizedSGD(linear().parameters(), lr=0.0),
        lambda: mn.optim.ClippedSGD(linear().parameters(), lr=1.0, max_step=-1.0),
    ],
)
def test_settings_that_can_not_work(make):
    with pytest.raises(mn.SettingsError):
        make()


def test_meta_optimizers_follow_their_formulas():
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(3, generator=generator).double(), torch.randn(2, 2, generator=generator).double()]
    pulls = [[torch.randn(leaf.shape, generator=generator).double() for leaf in start] for _ in range(5)]

    def run(make):
        parameters = [nn.Parameter(leaf.clone()) for leaf in start]
        optimizer = make(parameters)
        for step in pulls:
            for parameter, gradient in zip(parameters, step, strict=True):
                parameter.grad = gradient.clone()
            optimizer.step()
        return torch.cat([parameter.detach().reshape(-1) for parameter in parameters])

    flat = [torch.cat([leaf.reshape(-1) for leaf in step]) for step in pulls]
    theta, momentum = torch.cat([leaf.reshape(-1) for leaf in start]), 0.0
    for g in flat:
        momentum = 0.9 * momentum + 0.1 * g
        theta = theta - 0.3 * momentum / momentum.norm()
    torch.testing.assert_close(run(lambda p: mn.optim.NormalizedSGD(p, lr=0.3, momentum=0.9)), theta)
    theta = torch.cat([leaf.reshape(-1) for leaf in start])
    for g in flat:
        theta = theta - min(0.4, 0.9 / float(g.norm())) * g
    torch.testing.assert_close(run(lambda p: mn.optim.ClippedSGD(p, lr=0.4, max_step=0.9)), theta)
    still = nn.Parameter(torch.ones(2))
    still.grad = torch.zeros(2)
    mn.optim.NormalizedSGD([still], lr=1.0).step()
    mn.optim.ClippedSGD([still], lr=1.0, max_step=1.0).step()
    assert torch.equal(still.detach(), torch.ones(2))


def test_runs_are_decided_by_the_seed():
    model, tasks = nn.Sequential(nn.Linear(D, 6), nn.Dropout(0.3), nn.Linear(6, 1)).double(), draw()
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(meta_gradient(model, tasks)[0])
    assert distance(found[0], found[1]) == 0
    assert distance(found[0], found[2]) > 0


def test_separate_query_loss_and_pytree_inputs():
    tasks = draw()

    def support(model, batch):
        return squared(model, mn.Batch(batch.inputs["x"], batch.targets))

    def query(model, batch):
        return 3 * support(model, batch)

    nested = mn.Tasks(*(mn.Batch({"x": part.inputs}, part.targets) for part in tasks))
    once, _ = meta_gradient(linear(), nested, support, prox=PROX)
    thrice, _ = meta_gradient(linear(), nested, support, prox=PROX, query_loss=query)
    assert distance(thrice, {name: 3 * leaf for name, leaf in once.items()}) < 1e-8


def test_exact_objective_against_finite_differences():
    tasks = mn.tasks.logistic(3, features=4)
    exact = ExactMetaObjective(mn.tasks.logistic_model(4), mn.tasks.logistic_loss, tasks, prox=0.3)
    theta, eye, h = torch.randn(4, generator=torch.Generator().manual_seed(0)).double(), torch.eye(4).double(), 1e-5
    values = torch.stack([(exact.losses(theta + h * e) - exact.losses(theta - h * e)).mean() / (2 * h) for e in eye])
    torch.testing.assert_close(exact.gradient(theta), values, rtol=1e-7, atol=1e-9)
    rows = torch.stack([(exact.gradient(theta + h * e) - exact.gradient(theta - h * e)) / (2 * h) for e in eye])
    torch.testing.assert_close(exact.hessian(theta), rows, rtol=1e-6, atol=1e-8)


def test_registries_describe_themselves():
    for kind in mn.ESTIMATORS.values():
        assert all(isinstance(getattr(kind, field), str) for field in ("rule", "cost", "memory", "bias"))
    used = {type(estimator) for estimator in (*VARIANTS.values(), *(pair[0] for pair in EXACT.values()))}
    assert used == set(mn.ESTIMATORS.values())
    assert {type(solver) for solver in SOLVERS.values()} | {mn.TorchOptimizer} == set(mn.SOLVERS.values())


def test_the_model_of_a_learner_can_be_copied():
    model = copy.deepcopy(network())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert meta_gradient(model, draw())[1].dropped_tasks == 0
