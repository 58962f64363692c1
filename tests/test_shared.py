"""Parameters that are trainable but not adapted: their exact meta-gradient, from every estimator that defines one.

    F(theta, w) = mean f(phi*(theta, w), w),   phi* = argmin fhat(phi, w) + prox/2 ||phi - theta||^2
    grad_w F    = d_w f - (d_w d_phi fhat) (H + prox I)^-1 grad_phi f

by dense matrices below, on a network written out by hand.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor, nn

import metanudge as mn
from problems import cross_entropy, curvature, distance, flat_gradient, loaded, newton, normal, slope

WIDTH, HIDDEN, PROX, TASKS = 3, 4, 2.0, 2
BODY = HIDDEN * WIDTH + HIDDEN
HEAD = HIDDEN + 1
Two = Callable[[Tensor, Tensor], Tensor]


class Net(nn.Module):
    """A tanh layer and a linear one."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(WIDTH, HIDDEN)
        self.head = nn.Linear(HIDDEN, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(x)))


def make_data() -> tuple[mn.Tasks, Tensor]:
    g = torch.Generator().manual_seed(6)
    x, x_query = normal(g, TASKS, 9, WIDTH), normal(g, TASKS, 8, WIDTH)
    y, y_query = (x.sum(-1, keepdim=True) > 0).double(), (x_query[..., :1] > 0.2).double()
    return mn.Tasks(mn.Batch(x, y), mn.Batch(x_query, y_query)), 0.8 * normal(g, BODY + HEAD)


DATA, START = make_data()


def written_out(inputs: Tensor, targets: Tensor) -> Callable[[Tensor], Tensor]:
    """The loss of ``Net`` as a function of all its parameters, by hand."""

    def value(everything: Tensor) -> Tensor:
        first, bias, last, offset = torch.split(everything, [HIDDEN * WIDTH, HIDDEN, HIDDEN, 1])
        logits = torch.tanh(inputs @ first.reshape(HIDDEN, WIDTH).T + bias) @ last + offset
        return torch.log1p(torch.exp(-(2 * targets[:, 0] - 1) * logits)).mean()

    return value


def split(adapt_head: bool) -> tuple[slice, slice]:
    """Where the adapted and the shared parameters are."""
    return (slice(BODY, None), slice(0, BODY)) if adapt_head else (slice(0, BODY), slice(BODY, None))


def joined(adapt_head: bool, adapted: Tensor, shared: Tensor) -> Tensor:
    """All parameters, in the order of the model."""
    return torch.cat([shared, adapted] if adapt_head else [adapted, shared])


def functions(adapt_head: bool, i: int) -> tuple[Two, Two]:
    """Support and query loss of a task as functions of (phi, w)."""

    def of(batch: mn.Batch) -> Two:
        loss = written_out(batch.inputs[i], batch.targets[i])
        return lambda phi, w: loss(joined(adapt_head, phi, w))

    return of(DATA.support), of(DATA.query)


@cache
def implicit(adapt_head: bool) -> Tensor:
    """grad F in all parameters, by Newton's method and dense implicit differentiation."""
    at_theta, at_w = split(adapt_head)
    theta, w = START[at_theta], START[at_w]
    found = []
    for i in range(TASKS):
        support, query = functions(adapt_head, i)
        phi = newton(lambda p, s=support: s(p, w) + PROX / 2 * (p - theta).square().sum(), theta)
        push = torch.linalg.solve(
            curvature(lambda p, s=support: s(p, w), phi, PROX), slope(lambda p, f=query: f(p, w), phi)
        )
        mixed = torch.autograd.functional.jacobian(
            lambda v, s=support, phi=phi: torch.autograd.functional.jacobian(lambda p: s(p, v), phi, create_graph=True),
            w,
        )  # [phi, w]
        found.append(joined(adapt_head, PROX * push, slope(lambda v, f=query, phi=phi: f(phi, v), w) - push @ mixed))
    return torch.stack(found).mean(0)


def unrolled(adapt_head: bool, prox: float, steps: int, lr: float) -> Tensor:
    """Autograd through gradient descent, in theta and in w."""
    at_theta, at_w = split(adapt_head)
    found = []
    for i in range(TASKS):
        support, query = functions(adapt_head, i)
        theta, w = (START[part].clone().requires_grad_() for part in (at_theta, at_w))
        phi = theta
        for _ in range(steps):
            (pull,) = torch.autograd.grad(support(phi, w), phi, create_graph=True)
            phi = phi - lr * (pull + prox * (phi - theta))
        found.append(joined(adapt_head, *torch.autograd.grad(query(phi, w), (theta, w))))
    return torch.stack(found).mean(0)


def estimate(estimator: object, solver: object, adapt_head: bool, **settings: object) -> Tensor:
    model = loaded(Net(), START)
    settings = {"prox": PROX, "adapt_only": "head.*" if adapt_head else "body.*", **settings}
    mn.MetaLearner(model, cross_entropy, solver=solver, estimator=estimator, **settings).backward(DATA)
    return flat_gradient(model)


CONVERGED = mn.Nesterov(40)
EXACT = {
    "forward": (mn.FOBMAML("forward", nudge="full"), 1e-6),
    "symmetric": (mn.FOBMAML(nudge="full"), 1e-8),
    "fourth_order": (mn.FOBMAML("fourth_order", nudge="full"), 1e-9),
    "one_sided": (mn.FOBMAML(mn.Stencil((0, 1, 2), (-1.5, 2, -0.5), 2), nudge="full"), 1e-8),
    "forward_linear": (mn.FOBMAML("forward", nudge="linear"), 1e-6),
    "symmetric_linear": (mn.FOBMAML(nudge="linear"), 1e-8),
    "fourth_order_linear": (mn.FOBMAML("fourth_order", nudge="linear"), 1e-9),
    "one_sided_linear": (mn.FOBMAML(mn.Stencil((0, 1, 2), (-1.5, 2, -0.5), 2), nudge="linear"), 1e-8),
    "from_theta": (mn.FOBMAML(nudge="full", start="initialization"), 1e-8),
    "from_theta_forward": (mn.FOBMAML("forward", nudge="full", start="initialization"), 1e-6),
    "from_theta_forward_linear": (mn.FOBMAML("forward", start="initialization", nudge="linear"), 1e-6),
    "maml": (mn.MAML(), 1e-9),
    "maml_checkpointed": (mn.MAML(checkpoint=True), 1e-9),
    "imaml": (mn.IMAML(cg_steps=20), 1e-9),
    "imaml_two_gradient": (mn.IMAML(cg_steps=20, products="two_gradient"), 1e-8),
    "tangent": (mn.Tangent(), 1e-9),
    "tangent_two_gradient": (mn.Tangent(products="two_gradient"), 1e-8),
    "hfmaml": (mn.HFMAML(), 1e-8),
}


@pytest.mark.parametrize("adapt_head", [True, False], ids=["head", "body"])
@pytest.mark.parametrize("name", EXACT)
def test_shared_parameters_get_their_exact_meta_gradient(name: str, adapt_head: bool) -> None:
    estimator, tolerance = EXACT[name]
    found, exact = estimate(estimator, CONVERGED, adapt_head), implicit(adapt_head)
    for part in split(adapt_head):
        assert distance(found[part], exact[part]) < tolerance


@pytest.mark.parametrize("adapt_head", [True, False], ids=["anil", "boil"])
@pytest.mark.parametrize(
    "name", [name for name in EXACT if name not in ("maml", "maml_checkpointed", "imaml", "tangent")]
)
def test_shared_parameters_in_place(name: str, adapt_head: bool) -> None:
    """All that need no double backward; the head alone adapted (ANIL), or the body alone (BOIL)."""
    estimator, tolerance = EXACT[name]
    found = estimate(estimator, mn.Nesterov(30), adapt_head, execution="in_place")
    exact = implicit(adapt_head)
    for part in split(adapt_head):
        assert distance(found[part], exact[part]) < max(tolerance, 1e-6)


@pytest.mark.parametrize("adapt_head", [True, False], ids=["anil", "boil"])
@pytest.mark.parametrize(
    "estimator",
    [mn.FOBMAML(nu=0.1), mn.FOBMAML(nudge="full", nu=0.1), mn.HFMAML(displacement=0.1), mn.FOMAML()],
    ids=str,
)
def test_both_executions_agree_on_shared_parameters(estimator: object, adapt_head: bool) -> None:
    solver = mn.GradientDescent(5, lr=0.3)
    stacked, live = (
        estimate(estimator, solver, adapt_head, execution=execution) for execution in ("vectorized", "in_place")
    )
    for part in split(adapt_head):
        assert distance(stacked[part], live[part]) < 1e-12


@pytest.mark.parametrize("prox", [0.0, PROX])
@pytest.mark.parametrize("adapt_head", [True, False], ids=["head", "body"])
@pytest.mark.parametrize(
    ("estimator", "tolerance"),
    [(mn.MAML(), 1e-12), (mn.MAML(checkpoint=True), 1e-12), (mn.HFMAML(), 1e-8)],
    ids=["maml", "checkpointed", "hfmaml"],
)
def test_unrolled_shared_parameters(estimator: object, tolerance: float, adapt_head: bool, prox: float) -> None:
    found = estimate(estimator, mn.GradientDescent(5, lr=0.3), adapt_head, prox=prox)
    exact = unrolled(adapt_head, prox, steps=5, lr=0.3)
    for part in split(adapt_head):
        assert distance(found[part], exact[part]) < tolerance


@pytest.mark.parametrize("execution", ["vectorized", "in_place"])
def test_fomaml_gives_the_query_gradient_in_both_parts(execution: str) -> None:
    """Its definition: dphi/dtheta taken for I, dphi/dw for 0."""
    at_theta, at_w = split(True)
    theta, w = START[at_theta], START[at_w]
    expected = []
    for i in range(TASKS):
        support, _ = functions(True, i)
        phi = theta
        for _ in range(4):
            phi = phi - 0.3 * (slope(lambda p, s=support: s(p, w), phi) + PROX * (phi - theta))
        at_phi = joined(True, phi, w)
        expected.append(slope(written_out(DATA.query.inputs[i], DATA.query.targets[i]), at_phi))
    found = estimate(mn.FOMAML(), mn.GradientDescent(4, lr=0.3), True, execution=execution)
    assert distance(found, torch.stack(expected).mean(0)) < 1e-13


def test_reptile_is_refused() -> None:
    with pytest.raises(mn.SettingsError, match=r"Reptile cannot run here.*not adapted.*Freeze them"):
        estimate(mn.Reptile(), CONVERGED, True)


@pytest.mark.parametrize("execution", ["vectorized", "in_place"])
@pytest.mark.parametrize("estimator", [mn.FOBMAML(), mn.FOBMAML(nudge="full"), mn.HFMAML(), mn.FOMAML()], ids=str)
def test_frozen_parameters_are_left_alone(estimator: object, execution: str) -> None:
    """Frozen ones take no part: the others' gradients are those of the smaller model, theirs stays None."""
    model = loaded(Net(), START)
    model.body.bias.requires_grad_(False)
    settings = {"prox": PROX, "solver": mn.Nesterov(10), "adapt_only": "head.*", "execution": execution}
    mn.MetaLearner(model, cross_entropy, estimator=estimator, **settings).backward(DATA)
    assert model.body.bias.grad is None
    assert not model.body.bias.requires_grad
    # the inner problem does not move the body, so freezing a part of it changes nothing for the rest
    whole = estimate(estimator, mn.Nesterov(10), True, execution=execution)
    rest = torch.cat([whole[: HIDDEN * WIDTH], whole[BODY:]])
    assert distance(torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.requires_grad]), rest) < 1e-12


# How the adapted parameters are named.


@pytest.mark.parametrize(
    "adapt_only",
    [
        "head.*",
        ["head.weight", "head.bias"],
        ("*.bias", "head.weight", "body.weight"),
        lambda name, parameter: name.startswith("head"),
        lambda name, parameter: parameter.numel() <= HIDDEN and "body" not in name,
        "head.[wb]*",
        "head",
    ],
    ids=["pattern", "names", "everything", "predicate", "shape", "class", "module"],
)
def test_ways_to_name_the_adapted_parameters(adapt_only: object) -> None:
    """Only the adapted ones move in ``adapt``."""
    model = loaded(Net(), START)
    learner = mn.MetaLearner(model, cross_entropy, solver=mn.Nesterov(5), adapt_only=adapt_only)
    adapted = learner.adapt(mn.Batch(DATA.support.inputs[0], DATA.support.targets[0]))
    moved = {name for name, p in adapted.named_parameters() if not torch.equal(p, model.get_parameter(name))}
    everything = isinstance(adapt_only, tuple)
    assert moved == {"head.weight", "head.bias"} | ({"body.weight", "body.bias"} if everything else set())


class TiedNet(nn.Module):
    """The same weight under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, WIDTH)
        self.head.weight = self.body.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(x)))[..., :1]


@pytest.mark.parametrize("pattern", ["body.weight", "head.weight"])
def test_a_tied_parameter_is_adapted_under_either_name(pattern: str) -> None:
    model = TiedNet().double()
    learner = mn.MetaLearner(model, cross_entropy, solver=mn.Nesterov(5), adapt_only=pattern)
    adapted = learner.adapt(mn.Batch(DATA.support.inputs[0], DATA.support.targets[0]))
    assert adapted.head.weight is adapted.body.weight
    assert not torch.equal(adapted.head.weight, model.head.weight)
    assert torch.equal(adapted.head.bias, model.head.bias)


@pytest.mark.parametrize(
    ("adapt_only", "words"),
    [
        ("haed", r'matches no parameter.*did you mean "head"\? Its trainable parameters are.*head\.weight'),
        (["head.*", "tail.*"], r"'tail\.\*' matches no parameter"),
        (lambda name, parameter: False, "predicate.*leaves no trainable parameter"),
        ([], "leaves no trainable parameter"),
        ("body.bias", r"leaves no trainable parameter.*trainable are"),
    ],
    ids=["typo", "one typo", "empty predicate", "nothing", "frozen"],
)
def test_a_selection_of_nothing_is_refused(adapt_only: object, words: str) -> None:
    model = loaded(Net(), START)
    model.body.bias.requires_grad_(False)
    with pytest.raises(mn.SettingsError, match=words):
        mn.MetaLearner(model, cross_entropy, adapt_only=adapt_only)


def test_a_model_without_trainable_parameters_is_refused() -> None:
    with pytest.raises(mn.SettingsError, match=r"no trainable parameter.*requires_grad=True"):
        mn.MetaLearner(Net().requires_grad_(False), cross_entropy)


def test_an_error_names_the_first_of_many_parameters() -> None:
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(15)))
    with pytest.raises(
        mn.SettingsError, match=r"its trainable parameters are 0\.weight, .*, 9\.bias, \.\.\. \(30 in all\)$"
    ):
        mn.MetaLearner(model, cross_entropy, adapt_only="adapter")
