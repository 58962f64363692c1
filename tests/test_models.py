"""Models as users have them, in both executions: buffers, noise, tied and idle parameters, convolutions, attention."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import metanudge as mn
from metanudge.diagnostics.check.bench import measured
from metanudge.oracle.drawing import attention
from metanudge.random_state import RandomState
from metanudge.types import Role
from problems import DTYPE, distance, flat_gradient, normal, single_tasks

EXECUTIONS = ["vectorized", "in_place"]
# Wide differences, so that the comparison of executions to 1e-12 is not one of round-off (see test_executions.py).
NORMALISED = {
    "batch_norm_train": "transductive",
    "batch_norm_eval": "frozen",
    "batch_norm_support": "support",
    "batch_norm_no_statistics": "transductive",
}
FIRST_ORDER = {
    "symmetric": mn.FOBMAML(nu=0.1),
    "forward_linear": mn.FOBMAML("forward", nudge="linear", nu=0.1),
    "hfmaml": mn.HFMAML(displacement=0.1),
    "imaml": mn.IMAML(cg_steps=3, products="two_gradient", displacement=0.1),
    "reptile": mn.Reptile(),
}
SOLVER = mn.GradientDescent(5, lr=0.1)


def cross_entropy(model: nn.Module, batch: mn.Batch) -> Tensor:
    return F.cross_entropy(model(batch.inputs), batch.targets)


def squared_error(model: nn.Module, batch: mn.Batch) -> Tensor:
    return (model(batch.inputs) - batch.targets).square().mean()


def gradient_of(
    model: nn.Module,
    loss: Callable,
    tasks: object,
    estimator: object,
    execution: str = "vectorized",
    **settings: object,
) -> Tensor:
    """The meta-gradient, from the same random state every time."""
    model.zero_grad()
    torch.manual_seed(11)
    settings = {"solver": SOLVER, **settings}
    mn.MetaLearner(model, loss, estimator=estimator, execution=execution, **settings).backward(tasks)
    return flat_gradient(model)


def images(tasks: int = 2, size: int = 5) -> mn.Tasks:
    """Labelled 6 x 6 images."""
    g = torch.Generator().manual_seed(12)

    def batch() -> mn.Batch:
        return mn.Batch(normal(g, tasks, size, 1, 6, 6), torch.randint(3, (tasks, size), generator=g))

    return mn.Tasks(batch(), batch())


def vectors(tasks: int = 2, size: int = 6, width: int = 3) -> mn.Tasks:
    """A regression on vectors."""
    g = torch.Generator().manual_seed(13)

    def batch() -> mn.Batch:
        x = normal(g, tasks, size, width)
        return mn.Batch(x, torch.sin(x.sum(-1, keepdim=True)) + 0.1 * normal(g, tasks, size, 1))

    return mn.Tasks(batch(), batch())


def sentences(tasks: int = 2, size: int = 4, length: int = 5) -> mn.Tasks:
    """Labelled sequences of token numbers."""
    g = torch.Generator().manual_seed(14)

    def batch() -> mn.Batch:
        tokens = torch.randint(7, (tasks, size, length), generator=g)
        return mn.Batch(tokens, torch.randint(3, (tasks, size), generator=g))

    return mn.Tasks(batch(), batch())


class Attention(nn.Module):
    """One transformer block: embedding, layer norms, causal self-attention, GELU."""

    def __init__(self, width: int = 8, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.embed = nn.Embedding(7, width)
        self.before, self.after = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.feed = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.head = nn.Linear(width, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        q, k, v = self.qkv(self.before(x)).unflatten(-1, (3, self.heads, -1)).movedim(-3, 0).transpose(-3, -2)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(-3, -2).flatten(-2))
        return self.head((x + self.feed(self.after(x))).mean(-2))


class BufferedLoss(nn.Module):
    """Class weights and a running count, both buffers; the count is written at every forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 1)
        self.register_buffer("scale", torch.tensor([0.5, 2.0, 1.0]))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.linear(x * self.scale) / self.calls  # 1 call, whatever came before


class Idle(nn.Module):
    """A parameter that no loss sees."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 1)
        self.idle = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


class Tied(nn.Module):
    """The same matrix in both layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
        self.second.weight = self.first.weight
        self.out = nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.second(torch.tanh(self.first(x)))))


def half_frozen() -> nn.Module:
    """The first layer's bias and the whole last layer do not train."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))
    model[0].bias.requires_grad_(False)
    model[4].requires_grad_(False)
    return model


class OddShapes(nn.Module):
    """A parameter without axes, a transposed one and an expanded sum of both."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(0.7))
        self.matrix = nn.Parameter(torch.randn(2, 3).T)

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * torch.tanh(x @ self.matrix).sum(-1, keepdim=True)


def conv(norm: nn.Module) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), norm, nn.Tanh(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(36, 3)
    )


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable, Callable[[], mn.Tasks]]] = {
    "conv": (lambda: conv(nn.Identity()), cross_entropy, images),
    "batch_norm_train": (lambda: conv(nn.BatchNorm2d(4)), cross_entropy, images),
    "batch_norm_eval": (lambda: conv(nn.BatchNorm2d(4)).eval(), cross_entropy, images),
    "batch_norm_support": (lambda: conv(nn.BatchNorm2d(4)), cross_entropy, images),
    "batch_norm_no_statistics": (lambda: conv(nn.BatchNorm2d(4, track_running_stats=False)), cross_entropy, images),
    "group_norm": (lambda: conv(nn.GroupNorm(2, 4)), cross_entropy, images),
    "max_pool": (
        lambda: nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 3)),
        cross_entropy,
        images,
    ),
    "transformer": (Attention, cross_entropy, sentences),
    "buffer": (BufferedLoss, squared_error, vectors),
    "idle": (Idle, squared_error, vectors),
    "tied": (Tied, squared_error, vectors),
    "frozen": (half_frozen, squared_error, vectors),
    "odd_shapes": (OddShapes, squared_error, vectors),
    "dropout_eval": (
        lambda: nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 1)).eval(),
        squared_error,
        vectors,
    ),
}


@pytest.mark.filterwarnings("ignore:There is a performance drop because:UserWarning")  # torch, attention under vmap
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("estimator", FIRST_ORDER)
def test_both_executions_agree_and_leave_the_model_alone(estimator: str, model: str) -> None:
    make, loss, tasks = MODELS[model]
    made, data = make().to(DTYPE), tasks()
    state = {name: tensor.clone() for name, tensor in made.state_dict().items()}
    buffers = [(buffer, buffer.clone()) for buffer in made.buffers()]
    norm = {"batch_norm": NORMALISED.get(model)}
    stacked, live = (
        gradient_of(made, loss, data, FIRST_ORDER[estimator], execution, **norm) for execution in EXECUTIONS
    )
    assert stacked.norm() > 1e-3
    assert distance(stacked, live) < 1e-12
    for name, tensor in made.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    for buffer, before in buffers:
        assert torch.equal(buffer, before)


def plain_maml(model: nn.Module, loss: Callable, tasks: mn.Tasks, prox: float, steps: int, lr: float) -> Tensor:
    """Autograd through gradient descent by torch.func.functional_call, one task after the other."""
    theta = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters() if p.requires_grad}
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    total = 0.0
    singles = single_tasks(tasks)
    for task in singles:

        def at(phi: dict[str, Tensor], batch: mn.Batch) -> Tensor:
            fresh = {name: b.clone() for name, b in buffers.items()}
            wrapped = lambda x: torch.func.functional_call(model, (phi, fresh), (x,))  # noqa: E731
            return loss(wrapped, batch)

        phi = theta
        for _ in range(steps):
            slopes = torch.autograd.grad(
                at(phi, task.support), list(phi.values()), create_graph=True, allow_unused=True, materialize_grads=True
            )
            phi = {n: p - lr * (g + prox * (p - theta[n])) for (n, p), g in zip(phi.items(), slopes, strict=True)}
        total = total + at(phi, task.query) / len(singles)
    found = dict(zip(theta, torch.autograd.grad(total, list(theta.values()), materialize_grads=True), strict=True))
    whole = [found.get(name, torch.zeros_like(p)) for name, p in model.named_parameters()]  # none of frozen ones
    return torch.cat([g.reshape(-1) for g in whole])


@pytest.mark.parametrize(
    "model", [name for name in MODELS if name not in ("transformer", "buffer", "batch_norm_support")]
)
def test_maml_of_a_model_is_autograd_through_its_functional_call(model: str) -> None:
    """An oracle that knows nothing of packing, lanes and chunks; BatchNorm normalises each task by its own batch."""
    make, loss, tasks = MODELS[model]
    made, data = make().to(DTYPE), tasks()
    expected = plain_maml(made, loss, data, prox=0.7, steps=5, lr=0.1)
    settings = {"prox": 0.7, "batch_norm": NORMALISED.get(model)}
    assert distance(gradient_of(made, loss, data, mn.MAML(), **settings), expected) < 1e-12
    assert distance(gradient_of(made, loss, data, mn.HFMAML(), **settings), expected) < 1e-6


# Noise.


def noisy() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Dropout(0.4), nn.Linear(8, 1)).to(DTYPE)


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize(
    "scheme", ["forward", "symmetric", "fourth_order", mn.Stencil((0, 1, 2), (-1.5, 2, -0.5), 2)], ids=str
)
def test_dropout_masks_are_matched_between_nodes(scheme: object, execution: str) -> None:
    """In train mode, halving nu changes the estimate by a fraction of nu and not by noise / nu (1e4 here).

    Also with a node at zero, which is solved apart from the others.
    """
    model, data = noisy(), vectors()
    coarse, fine = (
        gradient_of(model, squared_error, data, mn.FOBMAML(scheme, nu=nu), execution) for nu in (2e-4, 1e-4)
    )
    assert distance(coarse, fine) < 1e-3


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_dropout_is_the_same_for_every_estimator_under_one_seed(execution: str) -> None:
    """From theta: free and nudged solves see the same masks, so the limit is MAML's cousin for the linear nudge.

    With H_k the Hessian under step k's mask, both a forward and a symmetric difference have the limit
    -prox dphi_K/dnu along the *same* noisy path, so they agree to O(nu); another path would differ by order one.
    """
    model, data = noisy(), vectors()
    forward, symmetric = (
        gradient_of(model, squared_error, data, mn.FOBMAML(scheme, nu=1e-4, start=start), execution)
        for scheme, start in (("forward", "initialization"), ("symmetric", "initialization"))
    )
    assert distance(forward, symmetric) < 1e-3
    # and exact products see the masks that two-gradient products see
    if execution == "vectorized":
        exact, differences = (
            gradient_of(model, squared_error, data, mn.Tangent(products=products), execution)
            for products in ("exact", "two_gradient")
        )
        assert distance(differences, exact) < 1e-7
        maml, walked = (gradient_of(model, squared_error, data, e, execution) for e in (mn.MAML(), mn.HFMAML()))
        assert distance(walked, maml) < 1e-7


def test_dropout_in_place_against_autograd_under_the_same_masks() -> None:
    """Every evaluation's masks are a function of task, loss and step; the way from theta is differentiated by hand."""
    model, steps, lr, prox = noisy(), 4, 0.1, 0.8
    found = gradient_of(
        model, squared_error, vectors(), mn.HFMAML(), "in_place", solver=mn.GradientDescent(steps, lr=lr), prox=prox
    )
    torch.manual_seed(11)
    state = RandomState(int(torch.randint(2**62, ()).item()), torch.device("cpu"))
    theta = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    total = torch.zeros((), dtype=DTYPE)
    for index, task in enumerate(single_tasks(vectors())):

        def at(phi: dict[str, Tensor], role: Role, step: int) -> Tensor:
            state.enter(index, role, step)  # noqa: B023
            wrapped = lambda x: torch.func.functional_call(model, phi, (x,))  # noqa: E731
            return squared_error(wrapped, task[role.value])  # noqa: B023

        phi = theta
        for step in range(steps):
            slopes = torch.autograd.grad(at(phi, Role.SUPPORT, step), list(phi.values()), create_graph=True)
            phi = {n: p - lr * (g + prox * (p - theta[n])) for (n, p), g in zip(phi.items(), slopes, strict=True)}
        total = total + at(phi, Role.QUERY, steps) / 2
    exact = torch.cat([g.reshape(-1) for g in torch.autograd.grad(total, list(theta.values()))])
    assert distance(found, exact) < 1e-7


def test_random_states_differ_between_tasks_losses_and_steps() -> None:
    state = RandomState(11, torch.device("cpu"))
    with torch.random.fork_rng():
        found = set()
        for task, role, step in product(range(3), Role, range(40)):
            state.enter(task, role, step)
            found.add(torch.initial_seed())
    assert len(found) == 3 * 2 * 40


@pytest.mark.parametrize("nudge", ["linear", "full"])
def test_partials_at_the_nudged_points_see_the_noise_of_the_free_solution(nudge: str) -> None:
    """The shared parameters' meta-gradient differences the losses that were judged, under the masks they had."""
    model, seeds = noisy(), []

    def loss(module: nn.Module, batch: mn.Batch) -> Tensor:
        seeds.append(torch.initial_seed())
        return squared_error(module, batch)

    torch.manual_seed(0)
    steps = 5
    estimator = mn.FOBMAML(nudge=nudge, steps=1)
    learner = mn.MetaLearner(
        model, loss, estimator=estimator, adapt_only="3", execution="in_place", solver=mn.GradientDescent(steps, lr=0.1)
    )
    learner.backward([mn.Tasks(*(mn.Batch(x[0], y[0]) for x, y in vectors()))])
    support, query = seeds[steps], seeds[steps + 1]  # judged after the free steps
    first = steps + 2
    if nudge == "linear":  # a step and the support partial at each of two nodes
        assert [seeds[first + 1], seeds[first + 3]] == [support, support]
    else:  # a step takes both gradients, and so does the partial
        assert [seeds[first + at] for at in (2, 3, 6, 7)] == [support, query] * 2


class SameMask(nn.Module):
    """Dropout whose mask depends on the data only: noise without a generator, the same in every step."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x * (torch.sin(1e3 * x) > 0) / 0.5)


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_symmetric_and_tangent_agree_under_a_fixed_mask(execution: str) -> None:
    """With a fresh mask every step there is no solution to agree on; with a fixed one both give its meta-gradient."""
    model, data = SameMask().to(DTYPE), vectors()
    settings = {"solver": mn.Nesterov(60), "prox": 0.5}
    found = gradient_of(model, squared_error, data, mn.FOBMAML(nudge="full"), execution, **settings)
    tangent = gradient_of(model, squared_error, data, mn.Tangent(products="two_gradient"), execution, **settings)
    assert distance(found, tangent) < 1e-8


def test_tasks_see_different_masks() -> None:
    """The same task twice in a stack is not the same noise twice: the mean is not either of them."""
    model, data = noisy(), vectors(tasks=1)
    twice = mn.Tasks(*(mn.Batch(*(torch.cat([x, x]) for x in batch)) for batch in data))
    for execution, settings in (("vectorized", {}), ("vectorized", {"chunk_size": 1}), ("in_place", {})):
        one = gradient_of(model, squared_error, data, mn.FOMAML(), execution, **settings)
        two = gradient_of(model, squared_error, twice, mn.FOMAML(), execution, **settings)
        assert distance(two, one) > 1e-2


# Particular models against answers of their own.


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("estimator", FIRST_ORDER)
def test_an_idle_parameter_has_no_meta_gradient(estimator: str, execution: str) -> None:
    model = Idle().to(DTYPE)
    gradient_of(model, squared_error, vectors(), FIRST_ORDER[estimator], execution)
    assert torch.equal(model.idle.grad, torch.zeros(4, dtype=DTYPE))


class Doubled(nn.Module):
    """Linear regression whose weight is used under two names: y = x w + x w = 2 x w."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 1, bias=False), nn.Linear(3, 1, bias=False)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + self.b(x)


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize(
    "estimator", [mn.FOBMAML(), mn.FOBMAML(nudge="linear"), mn.HFMAML(), mn.Tangent(products="two_gradient")], ids=str
)
def test_tied_weights_against_their_closed_form(estimator: object, execution: str) -> None:
    """A ridge regression on 2 x, one parameter and not two: grad F = prox (H + prox I)^-1 (H' phi - b')."""
    model, data, prox = Doubled().to(DTYPE), vectors(), 1.0
    theta, found = model.a.weight.detach().reshape(-1), []
    for task in single_tasks(data):
        (h, b), (h_query, b_query) = (
            (8 * x.T @ x / len(x), 4 * x.T @ y[:, 0] / len(x)) for x, y in (task.support, task.query)
        )
        system = h + prox * torch.eye(3, dtype=DTYPE)
        phi = torch.linalg.solve(system, b + prox * theta)
        found.append(prox * torch.linalg.solve(system, h_query @ phi - b_query))
    estimate = gradient_of(model, squared_error, data, estimator, execution, solver=mn.Nesterov(90), prox=prox)
    assert len(list(model.parameters())) == 1
    assert distance(estimate, torch.stack(found).mean(0)) < 1e-7


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_buffers_start_every_evaluation_from_the_users_values(execution: str) -> None:
    """``calls`` is 1 at every forward pass; were it to count on, losses would be divided by 2, 3, ..."""
    model, data = BufferedLoss().to(DTYPE), vectors()
    plain = nn.Linear(3, 1).to(DTYPE)
    plain.load_state_dict(model.linear.state_dict())
    scaled = mn.Tasks(*(mn.Batch(batch.inputs * model.scale, batch.targets) for batch in data))
    expected = gradient_of(plain, squared_error, scaled, mn.FOBMAML(nu=0.1))
    assert distance(gradient_of(model, squared_error, data, mn.FOBMAML(nu=0.1), execution), expected) < 1e-12


class Remembering(nn.Module):
    """A buffer that is None until the first forward pass: a cache."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 1)
        self.register_buffer("seen", None)

    def forward(self, x: Tensor) -> Tensor:
        self.seen = x.mean(0)
        return self.linear(x)


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_a_buffer_that_was_none_is_none_again(execution: str) -> None:
    """What a forward pass writes into buffers is undone, as the learner promises."""
    model = Remembering().to(DTYPE)
    gradient_of(model, squared_error, vectors(), mn.FOBMAML(), execution)
    assert model.seen is None


class TwoPrecisions(nn.Module):
    """A body in double and a head in single precision."""

    def __init__(self, precision: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.precision = precision
        self.body, self.head = nn.Linear(3, 4, dtype=DTYPE), nn.Linear(4, 1).to(precision)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(x)).to(self.precision)).to(x.dtype)


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("solver", [SOLVER, mn.Nesterov(5), mn.Adam(5, lr=0.1)], ids=str)
@pytest.mark.parametrize(
    "estimator",
    [mn.FOBMAML(nu=0.05), mn.FOBMAML(nudge="linear", nu=0.05), mn.HFMAML(displacement=0.05), mn.FOMAML()],
    ids=str,
)
def test_parameters_of_two_precisions(estimator: object, solver: object, execution: str) -> None:
    """Every meta-gradient in its parameter's dtype, and right to single precision."""
    model, double = TwoPrecisions(torch.float32), TwoPrecisions(DTYPE)
    found, exact = (
        gradient_of(each, squared_error, vectors(), estimator, execution, solver=solver) for each in (model, double)
    )
    assert [p.grad.dtype for p in model.parameters()] == [p.dtype for p in model.parameters()]
    assert distance(found.double(), exact) < 1e-3


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("nudge", ["full", "linear"])
def test_single_precision(nudge: str, execution: str) -> None:
    """Symmetric FO-B-MAML with its default nu in float32, within 1e-3 of the exact meta-gradient in float64."""
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 1)).to(DTYPE)
    data, settings = vectors(), {"prox": 2.0, "solver": mn.Nesterov(80)}
    exact = gradient_of(model, squared_error, data, mn.MAML(), **settings)
    single = mn.Tasks(*(mn.Batch(*(x.float() for x in batch)) for batch in data))
    found = gradient_of(model.float(), squared_error, single, mn.FOBMAML(nudge=nudge), execution, **settings)
    assert found.dtype == torch.float32
    assert distance(found.double(), exact) < 1e-3


def test_what_vmap_can_not_run_is_told_with_its_cure() -> None:
    """A loss that looks at a value, a layer without a batching rule: both run in place, and the error should say so."""

    def looks(model: nn.Module, batch: mn.Batch) -> Tensor:
        value = squared_error(model, batch)
        return value if value.item() > 0 else 2 * value

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.out = nn.GRU(1, 2, batch_first=True), nn.Linear(2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.cell(x.unsqueeze(-1))[0][:, -1])

    for model, loss in ((nn.Linear(3, 1), looks), (Recurrent(), squared_error)):
        assert gradient_of(model.to(DTYPE), loss, vectors(), mn.FOBMAML(), "in_place").isfinite().all()
        with pytest.raises(mn.MetanudgeError, match='execution="in_place"'):
            gradient_of(model, loss, vectors(), mn.FOBMAML())


# Forms of data.


class TwoInputs(nn.Module):
    """Takes a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(3, 1), nn.Linear(2, 1)

    def forward(self, x: dict[str, Tensor]) -> Tensor:
        return self.left(x["left"]) * torch.tanh(self.right(x["right"]))


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_inputs_and_targets_may_be_trees(execution: str) -> None:
    g = torch.Generator().manual_seed(15)
    model = TwoInputs().to(DTYPE)

    def batch() -> mn.Batch:
        inputs = {"left": normal(g, 2, 5, 3), "right": normal(g, 2, 5, 2)}
        return mn.Batch(inputs, (normal(g, 2, 5, 1), [normal(g, 2, 5)]))

    def loss(model: nn.Module, batch: mn.Batch) -> Tensor:
        target, (weight,) = batch.targets
        return (weight.square() * (model(batch.inputs) - target)[:, 0].square()).mean()

    data = mn.Tasks(batch(), batch())
    found = gradient_of(model, loss, data, mn.FOBMAML(), execution, solver=mn.Nesterov(80), prox=3.0)
    exact = gradient_of(model, loss, data, mn.MAML(), solver=mn.Nesterov(80), prox=3.0)
    assert distance(found, exact) < 1e-7
    only = mn.Batch(
        {k: v[0] for k, v in data.support.inputs.items()}, (data.support.targets[0][0], [torch.ones(5).double()])
    )
    adapted = mn.MetaLearner(model, loss, execution=execution).adapt(only)
    with torch.no_grad():
        assert loss(adapted, only) < loss(model, only)


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_a_loss_that_reads_the_parameters(execution: str) -> None:
    """Weight decay written into the loss: the parameters it reads are the adapted ones, not the model's own."""
    decay, data, prox = 0.3, vectors(), 1.0
    model = nn.Linear(3, 1, bias=False).to(DTYPE)

    def loss(model: nn.Module, batch: mn.Batch) -> Tensor:
        return squared_error(model, batch) + decay * sum(p.square().sum() for p in model.parameters())

    theta, found = model.weight.detach().reshape(-1), []
    eye = torch.eye(3, dtype=DTYPE)
    for task in single_tasks(data):
        (h, b), (h_query, b_query) = (
            (2 * x.T @ x / len(x) + 2 * decay * eye, 2 * x.T @ y[:, 0] / len(x)) for x, y in (task.support, task.query)
        )
        phi = torch.linalg.solve(h + prox * eye, b + prox * theta)
        found.append(prox * torch.linalg.solve(h + prox * eye, h_query @ phi - b_query))
    estimate = gradient_of(model, loss, data, mn.FOBMAML(), execution, solver=mn.Nesterov(70), prox=prox)
    assert distance(estimate, torch.stack(found).mean(0)) < 1e-7


@pytest.mark.filterwarnings("ignore:There is a performance drop because:UserWarning")
@pytest.mark.parametrize("execution", EXECUTIONS)
def test_fused_attention_needs_first_derivatives_only(execution: str) -> None:
    """torch's fused attention has no second derivative on the CPU; MAML gets its reference from the plain formula."""
    model = Attention().to(DTYPE)
    found = gradient_of(
        model, cross_entropy, sentences(), mn.FOBMAML(nu=0.01), execution, solver=mn.Nesterov(40), prox=2.0
    )
    plain = Attention().to(DTYPE)
    plain.load_state_dict(model.state_dict())
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        exact = gradient_of(plain, cross_entropy, sentences(), mn.MAML(), solver=mn.Nesterov(40), prox=2.0)
    assert distance(found, exact) < 1e-3


def layer(dropout: float) -> nn.Module:
    """A transformer of torch's own, which has a fast path in eval mode, and attention with dropout in train mode."""
    block = nn.TransformerEncoderLayer(8, 2, 16, dropout=dropout, batch_first=True, dtype=torch.float64)
    return nn.Sequential(block, nn.Flatten(-2), nn.Linear(24, 2, dtype=torch.float64))


def nudged(model: nn.Module, loss: object, tasks: mn.Tasks, nu: float, prox: float, lr: float) -> Tensor:
    """The estimate in a stack, under the same draws whatever the nudge."""
    learner = mn.MetaLearner(
        model,
        loss,
        prox=prox,
        solver=mn.GradientDescent(4, lr=lr),
        estimator=mn.FOBMAML(nu=nu),
        execution="vectorized",
    )
    model.zero_grad()
    torch.manual_seed(1)
    learner.backward(tasks)
    return flat_gradient(model)


def sequences() -> mn.Tasks:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(2, 2, 6, 3, 8, generator=generator, dtype=torch.float64)
    y = torch.randn(2, 2, 6, 2, generator=generator, dtype=torch.float64)
    return mn.Tasks(mn.Batch(x[0], y[0]), mn.Batch(x[1], y[1]))


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_a_transformer_in_eval_mode_has_no_fast_path_to_fail_on() -> None:
    torch.manual_seed(0)
    model, tasks = layer(dropout=0.5).eval(), sequences()
    found = {}
    for execution in ("vectorized", "in_place"):
        learner = mn.MetaLearner(model, mn.metrics.squared_error, prox=2.0, execution=execution)
        model.zero_grad()
        learner.backward(tasks)
        evaluation = learner.evaluate(tasks)
        adapted = learner.adapt(mn.Batch(tasks.support.inputs[0], tasks.support.targets[0]))
        found[execution] = [p.grad for p in model.parameters()], evaluation.values, list(adapted.parameters())
    for one, other in zip(*found.values(), strict=True):
        for a, b in zip(one, other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_attention_with_dropout_draws_alike_for_every_nudge() -> None:
    torch.manual_seed(0)
    model, tasks = layer(dropout=0.3), sequences()
    # masks of their own would differ by O(1), and the quotient by that over nu
    found = [nudged(model, mn.metrics.squared_error, tasks, nu, prox=20.0, lr=0.02) for nu in (1e-4, 1e-5)]
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)
    without = nudged(model.eval(), mn.metrics.squared_error, tasks, 1e-5, prox=20.0, lr=0.02)
    assert (found[0] - without).norm() > 0.01 * found[0].norm()


@pytest.mark.parametrize("settings", [{}, {"is_causal": True}, {"scale": 0.3}, {"enable_gqa": True}])
def test_attention_written_out_is_that_of_torch(settings: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, 5, 6, generator=generator, dtype=torch.float64)
    heads = 2 if "enable_gqa" in settings else 4
    key, value = torch.randn(2, 2, heads, 5, 6, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(
        attention(query, key, value, **settings), F.scaled_dot_product_attention(query, key, value, **settings)
    )
    if not settings:
        for mask in (torch.eye(5, dtype=torch.bool), torch.randn(5, 5, generator=generator, dtype=torch.float64)):
            expected = F.scaled_dot_product_attention(query, key, value, mask)
            torch.testing.assert_close(attention(query, key, value, mask), expected)


def test_the_models_own_device_is_seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the current one, which need not be the model's."""
    generators = [torch.Generator().manual_seed(7) for _ in range(2)]
    monkeypatch.setattr(torch.cuda, "default_generators", generators)
    with torch.random.fork_rng([]):
        RandomState(5, torch.device("cuda", 1)).enter(2, Role.QUERY, 3)
        assert generators[1].initial_seed() == torch.initial_seed()
    assert generators[0].initial_seed() == 7


def test_random_states_are_kept_of_named_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all devices, torch keeps those of many with a warning alone."""
    fork, forks = torch.random.fork_rng, []

    def named(devices: list[torch.device]) -> object:
        forks.append(list(devices))
        return fork(devices)

    monkeypatch.setattr(torch.random, "fork_rng", named)
    learner = mn.MetaLearner(nn.Linear(3, 1, dtype=DTYPE), squared_error, solver=mn.Nesterov(30), prox=2.0)

    def enough(_: str) -> None:
        raise KeyError

    with pytest.raises(KeyError):
        mn.check(learner, vectors(), progress=enough)  # has tried float64 and kinks
    measured(learner, single_tasks(vectors()))
    optimizer = torch.optim.SGD(learner.model.parameters(), lr=0.01)
    mn.smoothness(learner, single_tasks(vectors()), optimizer, steps=2)
    mn.fit(learner, optimizer, single_tasks(vectors()), steps=1, tasks_per_step=2, validation=vectors())
    assert len(forks) > 10
    assert not any(forks)


class Writing(nn.Module):
    """Its forward pass keeps features, registers a cache made of the input, and appends to a list and to a dict."""

    def __init__(self, writes: bool = True) -> None:
        super().__init__()
        torch.manual_seed(12)
        self.writes, self.features, self.calls = writes, None, 0
        self.history, self.found = [], {"kept": torch.ones(1)}
        self.body, self.head = nn.Linear(3, 4), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        features = torch.tanh(self.body(x))
        if not self.writes:
            return self.head(features) * (1 + x.mean()), features
        if not hasattr(self, "cache"):
            self.register_buffer("cache", 1 + x.mean(), persistent=False)
        self.features, self.last = features, features.sum()
        self.calls += 1
        self.history.append(features)
        self.found["first"] = features
        return self.head(features) * self.cache * self.calls * len(self.history)


def with_auxiliary(model: nn.Module, batch: mn.Batch) -> Tensor:
    """A loss that reads what the forward pass has kept."""
    if model.writes:
        predicted = model(batch.inputs)
        features = model.features
    else:
        predicted, features = model(batch.inputs)
    return (predicted - batch.targets).square().mean() + 0.1 * features.square().mean()


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_what_a_forward_pass_writes_into_modules_is_thrown_away(execution: str) -> None:
    """After every evaluation, so that none sees what another has written: not its cache, its count, nor its list."""
    plain = gradient_of(Writing(False).to(DTYPE), with_auxiliary, vectors(), mn.FOBMAML(nu=0.1), "vectorized")
    model = Writing().to(DTYPE)
    assert distance(gradient_of(model, with_auxiliary, vectors(), mn.FOBMAML(nu=0.1), execution), plain) < 1e-12

    def check() -> None:
        assert model.features is None
        assert (model.calls, model.history, list(model.found)) == (0, [], ["kept"])
        assert not hasattr(model, "last")
        assert not hasattr(model, "cache")
        assert not model._non_persistent_buffers_set
        assert list(model.state_dict()) == list(Writing().state_dict())
        torch.save(model, io.BytesIO())
        copy.deepcopy(model)

    check()
    learner = mn.MetaLearner(model, with_auxiliary, solver=SOLVER, execution=execution)
    task = single_tasks(vectors())[0]
    adapted = learner.adapt(task.support)
    check()
    with torch.no_grad():
        assert float(with_auxiliary(adapted, task.query)) == pytest.approx(learner.evaluate([task]).mean, rel=1e-12)
    check()


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_what_is_written_before_an_error_is_thrown_away(execution: str) -> None:
    def loss(model: nn.Module, batch: mn.Batch) -> Tensor:
        with_auxiliary(model, batch)
        raise KeyError

    model = Writing().to(DTYPE)
    with pytest.raises(KeyError):
        gradient_of(model, loss, vectors(), mn.FOBMAML(), execution)
    assert model.features is None
    assert not model.history


def test_what_a_checkpoint_writes_anew_is_thrown_away() -> None:
    """Activation checkpointing calls modules once more, within the backward pass."""

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Writing()

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.inner, x, use_reentrant=False)

    model, plain = Checkpointed().to(DTYPE), Writing().to(DTYPE)
    expected = gradient_of(plain, squared_error, vectors(), mn.FOBMAML(nu=0.1), "in_place")
    assert distance(gradient_of(model, squared_error, vectors(), mn.FOBMAML(nu=0.1), "in_place"), expected) < 1e-12
    assert model.inner.features is None
    assert not model.inner.history
    copy.deepcopy(model)


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_queries_that_see_nothing_give_zeros_under_dropout() -> None:
    """Left padding and a causal mask: softmax over nothing is no number, and torch gives zeros."""

    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True, dtype=torch.float64)
            self.head = nn.Linear(8, 2, dtype=torch.float64)

        def forward(self, x: Tensor) -> Tensor:
            length = x.shape[-2]
            causal = torch.ones(length, length, dtype=torch.bool).triu(1)
            padding = (torch.arange(length) < 1).expand(x.shape[:-1])
            return self.head(self.block(x, src_mask=causal, src_key_padding_mask=padding)[..., -1, :])

    torch.manual_seed(0)
    before = F.scaled_dot_product_attention
    step = mn.MetaLearner(Padded(), mn.metrics.squared_error, prox=20.0).backward(sequences())
    assert step.dropped_tasks == 0
    assert F.scaled_dot_product_attention is before
    masks = torch.tensor([[False, False], [True, False]])
    query, key, value = torch.randn(3, 1, 2, 4, dtype=torch.float64)
    expected = F.scaled_dot_product_attention(query, key, value, masks)
    torch.testing.assert_close(attention(query, key, value, masks), expected)


@pytest.mark.parametrize("loss", [F.mse_loss, F.smooth_l1_loss, F.huber_loss])
def test_losses_of_torch_under_dropout(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    """One nu more or less: the masks of a task's nodes are the same, so the estimates are alike."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.3), nn.Tanh(), nn.Linear(8, 1)).double()
    batch = mn.Batch(torch.randn(2, 4, 3, dtype=DTYPE), torch.randn(2, 4, 1, dtype=DTYPE))

    def of_batch(model: nn.Module, batch: mn.Batch) -> Tensor:
        return loss(model(batch.inputs), batch.targets)

    found = [nudged(model, of_batch, mn.Tasks(batch, batch), nu, prox=5.0, lr=0.05) for nu in (1e-4, 1e-5)]
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)
