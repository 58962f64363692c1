"""mn.Minibatches: step k of every solve sees minibatch k."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import metanudge as mn
from problems import DTYPE, distance, flat_gradient, normal, squared_error

STEPS, LR, PROX, NU = 4, 0.1, 0.7, 0.05
SGD = mn.TorchOptimizer(lambda parameters: torch.optim.SGD(parameters, lr=LR), steps=STEPS)
DESCENT = mn.GradientDescent(STEPS, lr=LR)
LEAN = mn.FOBMAML(nudge="full", nu=NU, start="initialization", certify=False)


def batch(seed: int, size: int = 5) -> mn.Batch:
    g = torch.Generator().manual_seed(seed)
    return mn.Batch(normal(g, size, 3), normal(g, size, 1))


BATCHES, QUERY = [batch(seed) for seed in range(6)], batch(99)


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).to(DTYPE)


def gradient(support: object, solver: object = DESCENT, estimator: object = LEAN, seed: int = 2) -> Tensor:
    model = network()
    learner = mn.MetaLearner(model, squared_error, prox=PROX, solver=solver, estimator=estimator, execution="in_place")
    torch.manual_seed(seed)
    learner.backward([mn.Tasks(support, QUERY)])
    return flat_gradient(model)


def descend(support: Callable[[int], mn.Batch], nu: float, start: Tensor | None = None, steps: int = STEPS) -> Tensor:
    """Gradient descent on fhat_k + nu f + prox/2 ||phi - theta||^2 by torch.autograd, as a flat vector."""
    model = network()
    theta = nn.utils.parameters_to_vector(model.parameters()).detach()
    phi = theta if start is None else start
    for k in range(steps):
        leaf = phi.clone().requires_grad_()

        def at(data: mn.Batch, leaf: Tensor = leaf) -> Tensor:
            named, first = {}, 0
            for name, parameter in model.named_parameters():
                named[name] = leaf[first : first + parameter.numel()].view(parameter.shape)
                first += parameter.numel()
            return squared_error(lambda x: torch.func.functional_call(model, named, (x,)), data)

        energy = at(support(k)) + nu * at(QUERY) + PROX / 2 * (leaf - theta).square().sum()
        phi = phi - LR * torch.autograd.grad(energy, leaf)[0]
    return phi


@pytest.mark.parametrize("solver", [SGD, DESCENT], ids=["torch_sgd", "descent"])
@pytest.mark.parametrize("source", [BATCHES, lambda k: BATCHES[k], iter(BATCHES)], ids=["list", "function", "iterator"])
def test_against_a_naive_transcription(source: object, solver: object) -> None:
    source = iter(BATCHES) if not callable(source) and not isinstance(source, list) else source
    expected = PROX * (descend(BATCHES.__getitem__, -NU) - descend(BATCHES.__getitem__, NU)) / (2 * NU)
    assert distance(gradient(mn.Minibatches(source), solver), expected) < 1e-12


@pytest.mark.parametrize("solver", [SGD, DESCENT], ids=["torch_sgd", "descent"])
def test_from_the_solution_nudged_solves_begin_with_minibatch_0(solver: object) -> None:
    found = gradient(mn.Minibatches(BATCHES), solver, mn.FOBMAML(nudge="full", nu=NU))
    free = descend(BATCHES.__getitem__, 0.0)
    behind, ahead = (descend(BATCHES.__getitem__, nu, start=free) for nu in (-NU, NU))
    assert distance(found, PROX * (behind - ahead) / (2 * NU)) < 1e-12


def test_equal_minibatches_are_a_batch() -> None:
    for estimator in (LEAN, mn.FOBMAML(nu=NU), mn.FOMAML(), mn.Reptile(), mn.HFMAML(displacement=0.1)):
        whole = gradient(BATCHES[0], estimator=estimator)
        assert distance(gradient(mn.Minibatches(lambda k: BATCHES[0]), estimator=estimator), whole) < 1e-12


def test_a_list_begins_again_and_an_iterable_is_read_once() -> None:
    read = []

    def few() -> object:
        for each in BATCHES[:3]:
            read.append(each)
            yield each

    expected = gradient(mn.Minibatches(lambda k: BATCHES[k % 3]))
    assert torch.equal(gradient(mn.Minibatches(BATCHES[:3])), expected)
    kept = mn.Minibatches(few())
    assert torch.equal(gradient(kept), expected)
    assert torch.equal(gradient(kept), expected)
    assert len(read) == 3


def test_an_endless_iterable_is_read_as_far_as_needed() -> None:
    seen = []

    def endless() -> object:
        while True:
            seen.append(None)
            yield BATCHES[0]

    gradient(mn.Minibatches(endless()))
    assert len(seen) == STEPS


def test_a_loader_that_shuffles() -> None:
    dataset = TensorDataset(torch.cat([b.inputs for b in BATCHES]), torch.cat([b.targets for b in BATCHES]))

    def collate(rows: list) -> mn.Batch:
        return mn.Batch(*map(torch.stack, zip(*rows, strict=True)))

    loader = DataLoader(dataset, batch_size=5, shuffle=True, collate_fn=collate)
    support = mn.Minibatches(loader)
    found = gradient(support)
    drawn = [support[k] for k in range(STEPS)]
    expected = PROX * (descend(drawn.__getitem__, -NU) - descend(drawn.__getitem__, NU)) / (2 * NU)
    assert distance(found, expected) < 1e-12


def test_what_a_function_draws_it_draws_for_every_solve() -> None:
    """Were the nudged solves to draw different batches, a nudge of 1e-5 would divide their distance."""
    rows = mn.Batch(torch.cat([b.inputs for b in BATCHES]), torch.cat([b.targets for b in BATCHES]))

    def draw(k: int) -> mn.Batch:
        chosen = torch.randint(30, (5,))
        return mn.Batch(rows.inputs[chosen], rows.targets[chosen])

    small, large = (
        gradient(mn.Minibatches(draw), estimator=mn.FOBMAML(nudge="full", nu=nu, start="initialization"))
        for nu in (1e-5, 1e-4)
    )
    assert distance(small, large) < 1e-6
    assert distance(gradient(mn.Minibatches(draw), seed=3), gradient(mn.Minibatches(draw), seed=4)) > 1e-3


def test_nothing_is_certified_of_minibatches() -> None:
    learner = mn.MetaLearner(network(), squared_error, solver=mn.Nesterov(4), execution="in_place")
    step = learner.backward([mn.Tasks(mn.Minibatches(BATCHES), QUERY), mn.Tasks(mn.Minibatches(BATCHES), QUERY)])
    assert step.error_bound != step.error_bound
    assert step.dropped_tasks == 0


def test_tasks_with_and_without_minibatches_mix() -> None:
    """And keep their places: the mean over tasks does not care, the curves of an evaluation do."""
    plain, split = mn.Tasks(BATCHES[0], QUERY), mn.Tasks(mn.Minibatches(BATCHES), QUERY)
    learner = mn.MetaLearner(network(), squared_error, prox=PROX, solver=DESCENT, execution="in_place")
    both = learner.evaluate([split, plain]).values
    assert torch.equal(both[0], learner.evaluate([split]).values[0])
    assert torch.equal(both[1], learner.evaluate([plain]).values[0])
    assert not torch.equal(both[0], both[1])


def test_adapt_takes_minibatches() -> None:
    learner = mn.MetaLearner(network(), squared_error, prox=PROX, solver=SGD)
    adapted = learner.adapt(mn.Minibatches(BATCHES))
    found = nn.utils.parameters_to_vector(adapted.parameters()).detach()
    assert distance(found, descend(BATCHES.__getitem__, 0.0)) < 1e-12


@pytest.mark.parametrize("source", [BATCHES[0], 3, None], ids=["batch", "number", "none"])
def test_what_is_no_source_is_refused(source: object) -> None:
    with pytest.raises(mn.SettingsError, match="Minibatches expects a function"):
        mn.Minibatches(source)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (lambda k: BATCHES[0].inputs, r"minibatch 0 must be mn\.Batch"),
        ([], "there are no minibatches"),
        (iter(()), "there are no minibatches"),
        ([mn.Batch(torch.zeros(2, 3, device="meta"), torch.zeros(2, 1))], "the model is on cpu but"),
        ([mn.Batch(3.0, torch.zeros(2, 1))], "tasks hold tensors"),
    ],
    ids=["no_batch", "empty_list", "empty_iterator", "device", "no_tensor"],
)
def test_minibatches_that_are_none_are_refused_and_the_model_stays(source: object, words: str) -> None:
    model = network()
    learner = mn.MetaLearner(model, squared_error, solver=SGD, estimator=LEAN)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with pytest.raises(mn.TasksError, match=words):
        learner.backward([mn.Tasks(mn.Minibatches(source), QUERY)])
    for parameter, value in zip(model.parameters(), before, strict=True):
        assert parameter.grad is None
        assert torch.equal(parameter.detach(), value)


def test_minibatches_out_of_place_are_told_where_they_belong() -> None:
    support = mn.Minibatches(BATCHES)
    learner = mn.MetaLearner(network(), squared_error, solver=SGD)
    with pytest.raises(mn.TasksError, match=r"as a list of mn\.Tasks"):
        learner.backward(mn.Tasks(support, QUERY))
    with pytest.raises(mn.TasksError, match=r"give its query as mn\.Batch"):
        learner.backward([mn.Tasks(QUERY, support)])
    stacked = mn.MetaLearner(network(), squared_error, solver=DESCENT, execution="vectorized")
    with pytest.raises(mn.LossError, match='execution="in_place"'):
        stacked.backward([mn.Tasks(support, QUERY)])


def test_auto_goes_in_place_for_minibatches() -> None:
    models = [network(), network()]
    learners = [
        mn.MetaLearner(model, squared_error, prox=PROX, solver=DESCENT, execution=execution)
        for model, execution in zip(models, ("auto", "in_place"), strict=True)
    ]
    with pytest.warns(UserWarning, match=r"goes in place from here on.*mn\.Minibatches are taken one task"):
        learners[0].backward([mn.Tasks(mn.Minibatches(BATCHES), QUERY)])
    learners[1].backward([mn.Tasks(mn.Minibatches(BATCHES), QUERY)])
    assert torch.equal(flat_gradient(models[0]), flat_gradient(models[1]))


def off(solver: object, seed: int) -> float:
    """Of the meta-gradient of four linear regressions in minibatches of 8 from the closed form."""
    tasks = mn.tasks.linear(4, features=10, shots=64, scales=1.0, anisotropy=1.0, seed=seed)
    model = nn.Linear(10, 1, bias=False).to(DTYPE)
    nn.init.zeros_(model.weight)
    orders = [torch.randperm(64, generator=torch.Generator().manual_seed(k)).split(8) for k in range(64)]
    places = [place for order in orders for place in order]

    def support(i: int) -> mn.Minibatches:
        x, y = tasks.support.inputs[i], tasks.support.targets[i]
        return mn.Minibatches([mn.Batch(x[place], y[place]) for place in places])

    single = [mn.Tasks(support(i), mn.Batch(tasks.query.inputs[i], tasks.query.targets[i])) for i in range(4)]
    learner = mn.MetaLearner(model, squared_error, prox=0.5, solver=solver, execution="in_place")
    learner.backward(single)
    return distance(flat_gradient(model), mn.tasks.linear_meta_gradient(tasks, torch.zeros(10, dtype=DTYPE), 0.5))


@pytest.mark.filterwarnings("ignore::metanudge.UnsolvedWarning")
@pytest.mark.parametrize("seed", [0, 1])
def test_more_steps_on_minibatches_do_not_freeze(seed: int) -> None:
    """Secants between minibatches raised L without end, and 128 steps left more of the error than 16."""
    assert off(mn.Nesterov(128), seed) < min(off(mn.Nesterov(16), seed), 0.5)


def unrolled(estimator_steps: int = STEPS) -> Tensor:
    """d/dθ f(φ_K(θ)), step k of gradient descent on minibatch k, by autograd through all steps."""
    model = network()
    theta = nn.utils.parameters_to_vector(model.parameters()).detach().requires_grad_()

    def at(data: mn.Batch, phi: Tensor) -> Tensor:
        named, first = {}, 0
        for name, parameter in model.named_parameters():
            named[name] = phi[first : first + parameter.numel()].view(parameter.shape)
            first += parameter.numel()
        return squared_error(lambda x: torch.func.functional_call(model, named, (x,)), data)

    phi: Tensor = theta
    for k in range(estimator_steps):
        energy = at(BATCHES[k], phi) + PROX / 2 * (phi - theta).square().sum()
        phi = phi - LR * torch.autograd.grad(energy, phi, create_graph=True)[0]
    return torch.autograd.grad(at(QUERY, phi), theta)[0]


def test_the_way_back_sees_the_minibatches_of_the_way_there() -> None:
    """The error falls as the square of the displacement, to round-off."""
    expected = unrolled()
    errors = [
        distance(gradient(mn.Minibatches(BATCHES), estimator=mn.HFMAML(displacement=size)), expected)
        for size in (1e-2, 1e-3, 1e-4)
    ]
    assert errors[2] < 1e-7
    assert 50 < errors[0] / errors[1] < 200
    assert 50 < errors[1] / errors[2] < 200


@pytest.mark.parametrize("kind", [mn.IMAML, mn.Tangent])
def test_one_hessian_of_many_minibatches_is_refused(kind: type) -> None:
    with pytest.raises(mn.SettingsError, match=r"of which mn\.Minibatches show another part"):
        gradient(mn.Minibatches(BATCHES), estimator=kind(products="two_gradient"))


def test_a_task_is_no_list_of_minibatches() -> None:
    """A tuple of two batches it is: the query set would be the second minibatch."""
    with pytest.raises(mn.SettingsError, match=r"list of mn\.Batch .*got Tasks"):
        mn.Minibatches(mn.Tasks(BATCHES[0], QUERY))
    with pytest.raises(TypeError, match="not iterable"):
        list(mn.Minibatches(BATCHES))


def test_an_optimizer_whose_state_is_there_from_the_beginning() -> None:
    """Adagrad's is, and it is stepped as by hand."""
    solver = mn.TorchOptimizer(lambda parameters: torch.optim.Adagrad(parameters, lr=0.1), steps=3)
    model, by_hand = network(), network()
    learner = mn.MetaLearner(model, squared_error, prox=PROX, solver=solver)
    adapted = nn.utils.parameters_to_vector(learner.adapt(BATCHES[0]).parameters()).detach()
    theta = nn.utils.parameters_to_vector(by_hand.parameters()).detach()
    optimizer = torch.optim.Adagrad(by_hand.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        away = nn.utils.parameters_to_vector(by_hand.parameters()) - theta
        (squared_error(by_hand, BATCHES[0]) + PROX / 2 * away.square().sum()).backward()
        optimizer.step()
    assert distance(adapted, nn.utils.parameters_to_vector(by_hand.parameters()).detach()) < 1e-12
    used: list[torch.optim.Optimizer] = []

    def again(parameters: object) -> torch.optim.Optimizer:
        used.append(used[0] if used else torch.optim.Adagrad(parameters, lr=0.1))
        return used[0]

    with pytest.raises(mn.SettingsError, match="gave one that has taken steps"):
        gradient(BATCHES[0], mn.TorchOptimizer(again, steps=2), mn.FOBMAML(nudge="full", certify=False))
