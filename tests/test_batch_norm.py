"""What BatchNorm layers normalise by: the policy that has to be named, the same mathematics in both executions."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import metanudge as mn
from problems import DTYPE, distance, flat_gradient, normal, single_tasks, squared_error

EXECUTIONS = ["vectorized", "in_place"]
POLICIES = ["transductive", "support", "frozen"]
EPS = 1e-5
WIDTH, HIDDEN = 3, 4


def network() -> nn.Sequential:
    """With running statistics that are not those of a new layer."""
    torch.manual_seed(1)
    layers = nn.Linear(WIDTH, HIDDEN), nn.BatchNorm1d(HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, 1)
    model = nn.Sequential(*layers).to(DTYPE)
    g = torch.Generator().manual_seed(2)
    with torch.no_grad():
        model[1].weight.copy_(1 + 0.3 * normal(g, HIDDEN))
        model[1].bias.copy_(0.3 * normal(g, HIDDEN))
        model[1].running_mean.copy_(0.5 * normal(g, HIDDEN))
        model[1].running_var.copy_(0.5 + normal(g, HIDDEN).abs())
    return model


def regression(tasks: int = 2, support: int = 6, query: int = 5) -> mn.Tasks:
    g = torch.Generator().manual_seed(3)

    def batch(size: int) -> mn.Batch:
        x = normal(g, tasks, size, WIDTH)
        return mn.Batch(x, torch.sin(x.sum(-1, keepdim=True)) + 0.1 * normal(g, tasks, size, 1))

    return mn.Tasks(batch(support), batch(query))


def meta_gradient(
    model: nn.Module, estimator: object, policy: str | None, execution: str, **settings: object
) -> Tensor:
    model.zero_grad()
    torch.manual_seed(5)
    settings = {"solver": mn.GradientDescent(4, lr=0.1), "prox": 1.0, **settings}
    learner = mn.MetaLearner(
        model, squared_error, estimator=estimator, batch_norm=policy, execution=execution, **settings
    )
    learner.backward(regression())
    return flat_gradient(model)


# By hand.


def written_out(policy: str, running: tuple[Tensor, Tensor]) -> Callable[[Tensor, mn.Task, str], Tensor]:
    """The network's losses as functions of all its parameters, no module involved."""
    sizes = [HIDDEN * WIDTH, HIDDEN, HIDDEN, HIDDEN, HIDDEN, 1]

    def loss(phi: Tensor, task: mn.Tasks, of: str) -> Tensor:
        first, bias, gain, shift, last, offset = torch.split(phi, sizes)

        def features(batch: mn.Batch) -> Tensor:
            return batch.inputs @ first.reshape(HIDDEN, WIDTH).T + bias

        batch = getattr(task, of)
        x = features(batch)
        by = features(task.support) if policy == "support" else x
        mean, variance = running if policy == "frozen" else (by.mean(0), by.var(0, unbiased=False))
        hidden = torch.tanh((x - mean) / torch.sqrt(variance + EPS) * gain + shift)
        return (hidden @ last + offset - batch.targets[:, 0]).square().mean()

    return loss


def naive_maml(policy: str, prox: float, steps: int, lr: float) -> Tensor:
    """Autograd through gradient descent."""
    model = network()
    loss = written_out(policy, (model[1].running_mean, model[1].running_var))
    theta = nn.utils.parameters_to_vector(model.parameters()).detach().requires_grad_()
    total = torch.zeros((), dtype=DTYPE)
    tasks = single_tasks(regression())
    for task in tasks:
        phi = theta
        for _ in range(steps):
            (slope,) = torch.autograd.grad(loss(phi, task, "support"), phi, create_graph=True)
            phi = phi - lr * (slope + prox * (phi - theta))
        total = total + loss(phi, task, "query") / len(tasks)
    return torch.autograd.grad(total, theta)[0]


@pytest.mark.parametrize("policy", POLICIES)
def test_maml_is_its_transcription(policy: str) -> None:
    expected = naive_maml(policy, prox=1.0, steps=4, lr=0.1)
    assert distance(meta_gradient(network(), mn.MAML(), policy, "vectorized"), expected) < 1e-12
    assert distance(meta_gradient(network(), mn.MAML(checkpoint=True), policy, "vectorized"), expected) < 1e-12
    assert distance(meta_gradient(network(), mn.HFMAML(), policy, "in_place"), expected) < 1e-7


@pytest.mark.parametrize("policy", POLICIES)
def test_fobmaml_is_exact_where_solves_converge(policy: str) -> None:
    """Against autograd through the same converged solve."""
    settings = {"solver": mn.Nesterov(80), "prox": 3.0}
    exact = meta_gradient(network(), mn.MAML(), policy, "vectorized", **settings)
    for execution in EXECUTIONS:
        for nudge in ("linear", "full"):
            found = meta_gradient(network(), mn.FOBMAML(nudge=nudge), policy, execution, **settings)
            assert distance(found, exact) < 1e-6


FIRST_ORDER = [
    mn.FOBMAML(nu=0.1),
    mn.FOBMAML(nudge="full", nu=0.1),
    mn.HFMAML(displacement=0.1),
    mn.IMAML(cg_steps=3, products="two_gradient", displacement=0.1),
    mn.Reptile(),
]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("estimator", FIRST_ORDER, ids=str)
def test_both_executions_agree(estimator: object, policy: str) -> None:
    stacked, live = (meta_gradient(network(), estimator, policy, execution) for execution in EXECUTIONS)
    assert distance(stacked, live) < 1e-12
    chunked = meta_gradient(network(), estimator, policy, "vectorized", chunk_size=1)
    assert distance(chunked, live) < 1e-12


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("policy", POLICIES)
def test_shared_parameters(policy: str, execution: str) -> None:
    """The layer's own gain and shift adapted, and everything else shared."""
    settings = {"solver": mn.Nesterov(60), "prox": 1.0, "adapt_only": "1"}
    exact = meta_gradient(network(), mn.MAML(), policy, "vectorized", **settings)
    assert distance(meta_gradient(network(), mn.FOBMAML(), policy, execution, **settings), exact) < 1e-7


# What is promised about statistics and modes.


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("policy", POLICIES)
def test_nothing_is_written_and_the_mode_does_not_matter(policy: str, execution: str) -> None:
    found = []
    for train in (True, False):
        model = network().train(train)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        found.append(meta_gradient(model, mn.FOBMAML(), policy, execution))
        for name, value in model.state_dict().items():
            assert torch.equal(value, before[name]), name
        assert all(module.training == train for module in model.modules())
        assert "forward" not in model[1].__dict__
    assert torch.equal(*found)


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_only_transductive_predictions_depend_on_the_other_queries(execution: str) -> None:
    """The query loss of five examples is the mean of those of each alone, or it is not."""
    together = regression()
    alone = [
        mn.Tasks(task.support, mn.Batch(*(leaf[i : i + 1] for leaf in task.query)))
        for task in single_tasks(together)
        for i in range(5)
    ]
    for policy in ("support", "frozen"):
        learner = mn.MetaLearner(network(), squared_error, batch_norm=policy, execution=execution)
        assert learner.evaluate(alone).mean == pytest.approx(learner.evaluate(together).mean, rel=1e-12)
    learner = mn.MetaLearner(network(), squared_error, batch_norm="transductive", execution=execution)
    halves = [
        mn.Tasks(task.support, mn.Batch(*(leaf[part] for leaf in task.query)))
        for task in single_tasks(regression(query=4))
        for part in (slice(0, 2), slice(2, 4))
    ]
    whole = learner.evaluate(regression(query=4)).mean
    assert abs(learner.evaluate(halves).mean - whole) > 1e-3 * whole


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("policy", POLICIES)
def test_an_adapted_module_predicts_as_it_was_evaluated(policy: str, execution: str) -> None:
    """In train and in eval mode, without being told, and as a copy; nothing is written to it."""
    model = network()
    learner = mn.MetaLearner(model, squared_error, batch_norm=policy, execution=execution)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for task in single_tasks(regression()):
        expected = learner.evaluate([task]).mean
        adapted = learner.adapt(task.support)
        assert type(adapted) is type(model)
        held = {name: value.clone() for name, value in adapted.state_dict().items()}
        copies = [adapted, copy.deepcopy(adapted), pickle.loads(pickle.dumps(adapted))]
        for one in copies:
            for mode in (lambda m: m, nn.Module.train, nn.Module.eval, nn.Module.train):
                with torch.no_grad():
                    assert float(squared_error(mode(one), task.query)) == pytest.approx(expected, rel=1e-12)
                assert one[0].training == one.training
            assert all(torch.equal(value, held[name]) for name, value in one.state_dict().items())
        assert not any(layer.training for layer in adapted.eval().modules())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("policy", POLICIES)
def test_an_adapted_module_follows_the_policy_of_another_learner(policy: str) -> None:
    """Only where statistics come from, not what was adapted before, tells it from a new network."""
    task = single_tasks(regression())[0]
    for before in ("support", "frozen"):
        adapted = mn.MetaLearner(network(), squared_error, batch_norm=before).adapt(task.support)
        plain = network()
        plain.load_state_dict(adapted.state_dict())
        found, expected = (meta_gradient(one, mn.FOBMAML(nu=0.1), policy, "in_place") for one in (adapted, plain))
        assert torch.equal(found, expected)


# What is refused.


@pytest.mark.parametrize("layer", [nn.BatchNorm1d(3), nn.BatchNorm1d(3, track_running_stats=False)], ids=str)
def test_a_policy_must_be_named(layer: nn.Module) -> None:
    with pytest.raises(mn.SettingsError, match=r'1 is a BatchNorm layer.*"transductive".*"support".*"frozen"'):
        mn.MetaLearner(nn.Sequential(nn.Linear(3, 3), layer), squared_error)


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("policy", POLICIES)
def test_a_cumulative_average_changes_nothing(policy: str, execution: str) -> None:
    """momentum=None: running statistics are not updated, so how they would be does not count; nor is it written to."""
    found = {}
    for momentum in (0.1, None):
        model = network()
        model[1].momentum = momentum
        found[momentum] = meta_gradient(model, mn.FOBMAML(nu=0.1), policy, execution)
        assert model[1].track_running_stats
        assert int(model[1].num_batches_tracked) == 0
    assert torch.equal(found[0.1], found[None])


def test_a_layer_that_comes_later_is_refused_too() -> None:
    model = nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.Identity(), nn.Linear(HIDDEN, 1)).double()
    learner = mn.MetaLearner(model, squared_error)
    learner.backward(regression())
    model[1] = nn.BatchNorm1d(HIDDEN).double()
    with pytest.raises(mn.SettingsError, match="1 is a BatchNorm layer"):
        learner.backward(regression())


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(mn.SettingsError, match="batch_norm must be one of transductive, support, frozen"):
        mn.MetaLearner(network(), squared_error, batch_norm="eval")
    model = nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False))
    with pytest.raises(mn.SettingsError, match='"frozen" needs running statistics, and 0 has none'):
        mn.MetaLearner(model, squared_error, batch_norm="frozen")
    learner = mn.MetaLearner(network(), squared_error, batch_norm="support")
    with pytest.raises(mn.LossError, match="more than one value a channel"):
        learner.backward(regression(support=1))


@pytest.mark.parametrize("norm", [nn.LayerNorm(4), nn.GroupNorm(2, 4), nn.InstanceNorm1d(4, affine=True)], ids=str)
def test_other_norms_need_nothing(norm: nn.Module) -> None:
    model = nn.Sequential(nn.Linear(WIDTH, 4), norm, nn.Linear(4, 1)).double()
    if isinstance(norm, nn.InstanceNorm1d):
        model = nn.Sequential(
            nn.Linear(WIDTH, 8), nn.Unflatten(1, (4, 2)), norm, nn.Flatten(), nn.Linear(8, 1)
        ).double()
    assert mn.MetaLearner(model, squared_error).backward(regression()).dropped_tasks == 0


# "support" in company.


class Busy(nn.Module):
    """A buffer that counts forward passes and is part of the graph, dropout, and a layer used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, 1)
        self.dropout = nn.Dropout(0.3)
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        x = self.norm(self.first(x) * self.calls)
        return self.last(torch.tanh(self.norm(self.dropout(x)))) / self.calls


def busy() -> nn.Module:
    torch.manual_seed(4)
    return Busy().to(DTYPE)


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_buffers_dropout_and_layers_used_twice(execution: str) -> None:
    """Every pass begins from the model's own buffers: a count of 1; without dropout both executions agree."""
    plain = [meta_gradient(busy().eval(), mn.FOBMAML(nu=0.1), "support", each) for each in EXECUTIONS]
    assert distance(*plain) < 1e-12
    model = busy()
    coarse, fine = (meta_gradient(model, mn.FOBMAML(nu=nu), "support", execution) for nu in (2e-4, 1e-4))
    assert distance(coarse, fine) < 1e-3
    assert distance(coarse, plain[0]) > 1e-2
    assert float(model.calls) == 0


def test_the_query_sees_the_statistics_of_the_support_loss_under_its_noise() -> None:
    """The pass over the support set draws what the support loss drew at that step."""
    seeds: list[tuple[int, int]] = []
    steps = 3

    def loss(module: nn.Module, batch: mn.Batch) -> Tensor:
        seeds.append((len(batch.inputs), torch.initial_seed()))
        return squared_error(module, batch)

    learner = mn.MetaLearner(
        busy(),
        loss,
        estimator=mn.FOMAML(),
        solver=mn.GradientDescent(steps, lr=0.1),
        batch_norm="support",
        execution="in_place",
    )
    learner.backward([single_tasks(regression())[0]])
    query = next(place for place, (size, _) in enumerate(seeds) if size == 5)
    judged, measured = seeds[steps], seeds[query - 1]  # the support loss after the free steps, and the pass
    assert query - 1 > steps
    assert measured == judged
    assert seeds[query][1] != judged[1]


class Checkpointed(nn.Module):
    """Recomputes its hidden layers in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.net, x, use_reentrant=False)


def test_activation_checkpointing_is_refused_and_works_with_the_others() -> None:
    with pytest.raises(mn.LossError, match="activation checkpointing"):
        meta_gradient(Checkpointed(), mn.FOBMAML(), "support", "in_place")
    for policy in ("transductive", "frozen"):
        found = meta_gradient(Checkpointed(), mn.FOBMAML(), policy, "in_place")
        assert distance(found, meta_gradient(network(), mn.FOBMAML(), policy, "in_place")) < 1e-12


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # what Dynamo imports, in some versions of torch
@pytest.mark.parametrize("policy", POLICIES)
def test_a_compiled_model(policy: str) -> None:
    """In place, as always; also where it was called, and so compiled, before."""
    torch._dynamo.reset()
    model = torch.compile(network(), backend="eager")
    with torch.no_grad():
        model.eval()(regression().support.inputs[0])
        model.train()
    found = meta_gradient(model, mn.FOBMAML(), policy, "auto")
    assert distance(found, meta_gradient(network(), mn.FOBMAML(), policy, "in_place")) < 1e-12


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_the_layer_is_given_back_after_an_error(execution: str) -> None:
    model = network()

    def loss(module: nn.Module, batch: mn.Batch) -> Tensor:
        squared_error(module, batch)
        raise KeyError

    learner = mn.MetaLearner(model, loss, batch_norm="support", execution=execution)
    with pytest.raises(KeyError):
        learner.backward(regression())
    assert "forward" not in model[1].__dict__
    assert model[1](torch.randn(5, HIDDEN).double()).isfinite().all()


def test_the_policy_is_saved_and_loaded(tmp_path: object) -> None:
    mn.MetaLearner(network(), squared_error, batch_norm="support").save_pretrained(tmp_path)
    assert mn.load_pretrained(tmp_path, network(), squared_error).norm.policy == "support"


@pytest.mark.parametrize("policy", ["transductive", "support"])
def test_pieces_of_a_batch_have_no_statistics_of_the_whole(policy):
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    with pytest.raises(mn.SettingsError, match="microbatch=2 shows a piece"):
        mn.MetaLearner(model, mn.metrics.squared_error, execution="in_place", microbatch=2, batch_norm=policy)
    mn.MetaLearner(model, mn.metrics.squared_error, execution="in_place", microbatch=2, batch_norm="frozen")


@pytest.mark.parametrize("tracks", [True, False])
def test_adapt_leaves_a_layer_alone_that_the_loss_does_not_call(tracks):
    class Spare(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
            self.spare = nn.BatchNorm1d(3, track_running_stats=tracks)

        def forward(self, x):
            return self.body(x)

    torch.manual_seed(0)
    model = Spare()
    learner = mn.MetaLearner(model, mn.metrics.squared_error, batch_norm="support")
    support = mn.Batch(torch.randn(6, 2), torch.randn(6, 1))
    adapted = learner.adapt(support)
    assert (adapted.spare.running_mean is not None) == tracks
    hidden = adapted.body[0](support.inputs)
    torch.testing.assert_close(adapted.body[1].running_mean, hidden.mean(0).detach())
