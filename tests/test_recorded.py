"""Recorded passes, by a recorder that a CPU has: what a CUDA graph keeps and repeats, it keeps and repeats too."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import metanudge as mn
from metanudge.oracle.cuda_graphs import CudaGraphs
from metanudge.oracle.recorded import MOST, Found
from metanudge.types import Role
from problems import DTYPE, PROBLEMS, flat_gradient

LEAN = mn.FOBMAML(nudge="full", start="initialization")
SGD = mn.TorchOptimizer(lambda p: torch.optim.SGD(p, lr=0.1), 3)


class Tape(TorchDispatchMode):
    """Operations in the order they come, with the tensors they read and write: what a CUDA graph keeps of Python.

    There is room for ``most``.
    """

    def __init__(self, most: float) -> None:
        super().__init__()
        self.operations: list[tuple[Callable, tuple, dict, list]] = []
        self.made: dict[int, Tensor] = {}
        self.before: dict[int, tuple[Tensor, torch.UntypedStorage]] = {}
        self.most = most

    def __torch_dispatch__(
        self, function: Callable, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        if len(self.operations) >= self.most:
            raise torch.OutOfMemoryError("there is no room")
        kwargs = kwargs or {}
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor) and place(leaf) not in self.made.keys() | self.before.keys():
                self.before[place(leaf)] = leaf, leaf.untyped_storage().clone()
        found = function(*args, **kwargs)
        self.operations.append((function, args, kwargs, tree_leaves(found)))
        for leaf in tree_leaves(found):
            if isinstance(leaf, Tensor) and place(leaf) not in self.before:
                self.made.setdefault(place(leaf), leaf)
        return found

    def wipe(self) -> None:
        """As if nothing had been computed."""
        for leaf, storage in self.before.values():
            leaf.untyped_storage().copy_(storage)
        for leaf in self.made.values():
            if leaf.is_floating_point():
                leaf.fill_(math.nan)

    def repeat(self) -> None:
        """All of them, on the same tensors and into the same memory; Python does nothing of its own."""
        for function, args, kwargs, left in self.operations:
            for old, new in zip(left, tree_leaves(function(*args, **kwargs)), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():  # neither a view nor in place
                    old.copy_(new)


def place(leaf: Tensor) -> int:
    return leaf.untyped_storage().data_ptr()


@dataclass
class OnTheCpu:
    """Keeps the operations of the work and repeats them alone; nothing is computed until then."""

    pays: dict = field(default_factory=dict)
    recorded: int = 0
    repeated: int = 0
    busy: float = 0.0
    room: float = math.inf
    length: int = 0

    def __call__(self, work: Callable[[], Found], device: torch.device) -> tuple[Found, Callable[[], None]]:
        assert device.type == "cpu"
        self.recorded += 1
        tape = Tape(self.room)
        try:
            with tape:
                found = work()
        finally:
            with torch.no_grad():
                tape.wipe()
        self.length = len(tape.operations)

        def again() -> None:
            self.repeated += 1
            with torch.no_grad():
                tape.repeat()

        return found, again

    def wait(self, device: torch.device) -> float:
        return self.busy


def recording(learner: mn.MetaLearner, busy: float = 0.0, room: float = math.inf) -> OnTheCpu:
    """Let a learner in place record its passes."""
    recorder = OnTheCpu(busy=busy, room=room)
    learner.execution = replace(learner.execution, record=recorder)
    return recorder


def both(
    make: Callable[[], nn.Module], loss: object, tasks: object, *, room: float = math.inf, **settings: object
) -> tuple[mn.MetaStep, OnTheCpu]:
    """The same steps without recordings and with them: equal to the last bit. What is told is of the second."""
    found = []
    for records in (False, True):
        model = make()
        learner = mn.MetaLearner(model, loss, **{"solver": SGD, "execution": "in_place", **settings})
        torch.manual_seed(3)
        learner.backward(tasks)  # which looks at the losses
        recorder = recording(learner, room=room) if records else None
        step = learner.backward(tasks)
        found.append((flat_gradient(model), step, torch.random.get_rng_state()))
    (plain, said, state), (recorded, said_too, state_too) = found
    assert torch.equal(plain, recorded)
    assert repr(said) == repr(said_too)  # NaN is not NaN
    assert torch.equal(state, state_too)
    return said_too, recorder


@pytest.mark.parametrize(
    "estimator",
    [LEAN, mn.FOBMAML(), mn.FOBMAML(nudge="full"), mn.FOMAML(), mn.Reptile()],
    ids=lambda estimator: repr(estimator)[:30],
)
@pytest.mark.parametrize("name", ["mlp", "logistic"])
def test_recorded_passes_are_what_they_record(name: str, estimator: object) -> None:
    made = PROBLEMS[name]()
    step, recorder = both(made.make, made.loss, made.tasks, estimator=estimator, prox=made.prox)
    sizes = {len(batch.inputs[0]) for batch in made.tasks}
    assert recorder.recorded == len(sizes)  # one loss for both sets
    assert recorder.repeated == step.gradient_evaluations - len(sizes)  # each form once as it is


class Noisy(nn.Module):
    """Dropout, BatchNorm with running statistics, and a parameter that nothing depends on."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.norm, self.two = nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)
        self.idle = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.two(F.dropout(self.norm(self.one(x)).relu(), 0.3, self.training))


def noisy() -> nn.Module:
    return Noisy().to(DTYPE)


def squared(model: nn.Module, batch: mn.Batch) -> Tensor:
    return (model(batch.inputs) - batch.targets).square().mean()


def data(*sizes: int, seed: int = 1) -> list[mn.Tasks]:
    torch.manual_seed(seed)
    batches = [mn.Batch(torch.randn(n, 3, dtype=DTYPE), torch.randn(n, 2, dtype=DTYPE)) for n in sizes]
    return [mn.Tasks(batch, batch) for batch in batches]


@pytest.mark.parametrize("policy", ["transductive", "frozen"])
@pytest.mark.parametrize("settings", [{}, {"microbatch": 3}, {"adapt_only": ["two"]}], ids=str)
def test_dropout_buffers_pieces_and_shared_parameters(policy: str, settings: dict) -> None:
    if policy == "transductive" and "microbatch" in settings:
        pytest.skip("refused")
    _, recorder = both(noisy, squared, data(6, 6), estimator=LEAN, batch_norm=policy, **settings)
    assert recorder.repeated > 10


def summed(model: nn.Module, batch: mn.Batch) -> Tensor:
    return (model(batch.inputs) * model.idle[:2] - batch.targets).abs().sum()


@pytest.mark.parametrize(
    "settings",
    [
        {"query_loss": summed},  # of another size, and of a parameter more
        {"query_loss": summed, "adapt_only": ["one", "two"]},
        {"estimator": mn.FOBMAML(), "sharpness_radius": 0.2},
        {"estimator": mn.FOBMAML(scheme="fourth_order"), "solver": mn.Nesterov(5)},
        {"estimator": mn.FOBMAML(scheme="forward", nudge="full"), "solver": mn.Adam(4, lr=0.01)},
        {"estimator": mn.HFMAML(), "solver": mn.GradientDescent(3, lr=0.05)},
        {"loss": lambda model, batch: squared(model, batch).float()},
    ],
    ids=lambda settings: ", ".join(settings),
)
def test_losses_solvers_and_estimators(settings: dict) -> None:
    given = {"loss": squared, "estimator": LEAN, "batch_norm": "transductive", **settings}
    _, recorder = both(noisy, given.pop("loss"), data(6, 6, 4), **given)
    assert recorder.repeated > 10


def test_minibatches() -> None:
    task = data(12)[0]

    def drawn(_: int) -> mn.Batch:
        chosen = torch.randint(12, (5,))
        return mn.Batch(*(leaf[chosen] for leaf in task.support))

    _, recorder = both(
        noisy, squared, [task._replace(support=mn.Minibatches(drawn))], estimator=LEAN, batch_norm="frozen"
    )
    assert recorder.repeated > 5


def test_sparse_batches_are_not_recorded() -> None:
    task = data(6)[0]

    def sparse(_: int) -> mn.Batch:
        return mn.Batch(task.support.inputs.to_sparse(), task.support.targets)

    def loss(model: nn.Module, batch: mn.Batch) -> Tensor:
        inputs = batch.inputs.to_dense() if batch.inputs.is_sparse else batch.inputs
        return squared(model, mn.Batch(inputs, batch.targets))

    _, recorder = both(noisy, loss, [task._replace(support=mn.Minibatches(sparse))], batch_norm="frozen")
    assert recorder.recorded == 0  # the query set comes once


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_what_is_raised_while_recording_leaves_everything_as_it_was(error: type[BaseException]) -> None:
    model, calls = noisy(), []

    def loss(model: nn.Module, batch: mn.Batch) -> Tensor:
        calls.append(None)
        if recorder.recorded:
            raise error("stop")
        return squared(model, batch)

    before = copy.deepcopy(model.state_dict())
    learner = mn.MetaLearner(model, loss, solver=SGD, estimator=LEAN, execution="in_place", batch_norm="transductive")
    recorder = recording(learner)
    with pytest.raises(error, match="stop"):
        learner.backward(data(6))
    assert recorder.recorded == 1
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("settings", [{}, {"microbatch": 4}, {"estimator": mn.FOBMAML(), "microbatch": 4}], ids=str)
def test_passes_that_are_not_recorded_give_every_parameter_a_gradient_of_its_own(settings: dict) -> None:
    """To views that are added autograd gives one gradient, in one memory."""

    def make() -> nn.Module:
        torch.manual_seed(0)
        return nn.ParameterDict({name: 0.1 * torch.randn(6400, dtype=DTYPE) for name in ("one", "two")})

    def loss(model: nn.Module, batch: mn.Batch) -> Tensor:
        weight = model["one"].view(80, 80) + model["two"].view(80, 80)
        return (batch.inputs @ weight[:3, :2] - batch.targets).square().mean()

    sizes = (6,) if "microbatch" in settings else range(3, 14)  # more than are recorded
    both(make, loss, data(*sizes), **{"estimator": LEAN, **settings})


class Rebinding(torch.optim.SGD):
    """Gives parameters other memory."""

    def step(self) -> None:
        for parameter in self.param_groups[0]["params"]:
            parameter.data = parameter.data - 0.1 * parameter.grad


def test_nothing_is_recorded_of_parameters_that_move() -> None:
    solver = mn.TorchOptimizer(lambda p: Rebinding(p, lr=0.1), 3)
    _, recorder = both(noisy, squared, data(6, 6), estimator=LEAN, batch_norm="frozen", solver=solver)
    assert recorder.repeated == 0


def test_every_form_is_recorded_once_and_a_few_at_most() -> None:
    _, recorder = both(noisy, squared, data(4, 5, 4, 6), estimator=LEAN, batch_norm="frozen")
    assert recorder.recorded == 3  # sizes of both sets
    _, recorder = both(noisy, squared, data(*range(2, 12)), estimator=LEAN, batch_norm="frozen")
    assert recorder.recorded == MOST


def test_nothing_is_recorded_where_the_device_is_what_one_waits_for() -> None:
    learner = mn.MetaLearner(noisy(), squared, solver=SGD, estimator=LEAN, execution="in_place", batch_norm="frozen")
    recorder = recording(learner, busy=1e9)
    learner.backward(data(4))
    assert recorder.recorded == 0
    assert set(recorder.pays.values()) == {False}
    recorder.busy = 0.0  # which is known by now
    learner.backward(data(4))
    assert recorder.recorded == 0


def test_python_runs_twice_for_every_form() -> None:
    """Once as it is and once to be recorded; so what it decides, it decides then."""
    calls = []

    def loss(model: nn.Module, batch: mn.Batch) -> Tensor:
        calls.append(len(batch.inputs))
        return squared(model, batch)

    learner = mn.MetaLearner(noisy(), loss, solver=SGD, execution="in_place", batch_norm="frozen", estimator=LEAN)
    learner.backward(data(4, 5))
    recorder = recording(learner)
    calls.clear()
    step = learner.backward(data(4, 5))
    assert sorted(calls) == [4, 4, 5, 5]
    assert recorder.repeated == step.gradient_evaluations - 2


@pytest.mark.parametrize("part", [0.0, 0.3, 0.9])
def test_what_there_is_no_room_for_is_run_as_it_is(part: float) -> None:
    """Wherever in a pass it turns out."""
    settings = {"estimator": LEAN, "batch_norm": "frozen"}
    _, recorder = both(noisy, squared, data(4), **settings)
    _, recorder = both(noisy, squared, data(4, 5), room=part * recorder.length, **settings)
    assert recorder.recorded == 1
    assert recorder.repeated == 0
    assert list(recorder.pays.values()) == [False]


@pytest.mark.parametrize("part", [0.9, math.inf])
@pytest.mark.parametrize("microbatch", [None, 2])
def test_casts_that_autocast_keeps_are_made_anew(microbatch: int | None, part: float) -> None:
    """Also those of a recording that there is no room for."""

    def make() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))

    def loss(model: nn.Module, batch: mn.Batch) -> Tensor:
        return (model(batch.inputs.float()).float() - batch.targets).square().mean()

    settings = {"estimator": LEAN, "microbatch": microbatch}
    with torch.autocast("cpu", torch.bfloat16):
        _, recorder = both(make, loss, data(6, 6), **settings)
        _, again = both(make, loss, data(6, 6), room=part * recorder.length, **settings)
    assert recorder.repeated > 10
    assert again.repeated == (recorder.repeated if part > 1 else 0)


def test_a_loss_that_writes_to_parameters_is_repeated_with_it() -> None:
    """By .data, which nothing counts: what the solve ends at is judged there all the same."""

    def decaying(model: nn.Module, batch: mn.Batch) -> Tensor:
        model.one.weight.data.mul_(0.9)
        return squared(model, batch)

    _, recorder = both(noisy, decaying, data(6, 6), estimator=LEAN, batch_norm="frozen")
    assert recorder.repeated > 10


def test_adapt_and_evaluate_repeat_too() -> None:
    found = []
    for records in (False, True):
        learner = mn.MetaLearner(noisy().eval(), squared, solver=SGD, execution="in_place", batch_norm="frozen")
        recorder = recording(learner) if records else None
        task = data(4)[0]
        learner.backward([task])
        adapted = learner.adapt(task.support)
        found.append((torch.cat([leaf.flatten() for leaf in adapted.parameters()]), learner.evaluate([task]).mean))
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]
    assert recorder.recorded == 3  # each call records its own


def test_a_loss_that_takes_a_backward_pass_itself_is_run_each_time() -> None:
    def adversarial(model: nn.Module, batch: mn.Batch) -> Tensor:
        x = batch.inputs.clone().requires_grad_()
        squared(model, mn.Batch(x, batch.targets)).backward()
        return squared(model, mn.Batch(batch.inputs + 0.1 * x.grad.sign(), batch.targets))

    _, recorder = both(noisy, adversarial, data(6), estimator=LEAN, batch_norm="frozen")
    assert recorder.recorded == 0


@pytest.mark.parametrize("draw", [random.random, np.random.rand])
def test_random_numbers_of_the_host_are_refused(draw: Callable[[], float]) -> None:
    def loss(model: nn.Module, batch: mn.Batch) -> Tensor:
        return squared(model, batch) * (1 + draw())

    model = noisy()
    before = copy.deepcopy(model.state_dict())
    learner = mn.MetaLearner(model, loss, solver=SGD, execution="in_place", batch_norm="frozen", estimator=LEAN)
    recording(learner)
    with pytest.raises(mn.LossError, match=r"cuda_graphs=True neither .* may draw from the generators"):
        learner.backward(data(6))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_gradients_are_in_memory_of_their_own() -> None:
    """One that is kept, as ∇f(φ₀) is, does not change when its pass is repeated."""
    kept = []

    class Keeps(mn.FOMAML):
        def __call__(self, problem: object, solver: object) -> object:
            theta = problem.losses.spread(problem.theta)
            kept.extend(problem.losses.gradient({Role.SUPPORT: 1.0}, theta, 0) for _ in range(4))
            return super().__call__(problem, solver)

    model = nn.Linear(3, 2).to(DTYPE)
    learner = mn.MetaLearner(model, squared, solver=SGD, execution="in_place", estimator=Keeps())
    recording(learner)
    learner.backward(data(6))
    assert all(torch.equal(one, kept[0][name]) for found in kept for name, one in found.items())


def test_copies_of_a_learner_record_anew() -> None:
    graphs = CudaGraphs()
    assert copy.deepcopy(graphs) is not graphs


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"cuda_graphs": 1}, "cuda_graphs must be True or False"),
        ({"cuda_graphs": True}, "the model is on the device 'cpu'; move it first"),
        ({"cuda_graphs": True, "execution": "vectorized"}, "cuda_graphs belongs to the in-place execution"),
        ({"cuda_graphs": True, "compile": True}, "compile belongs to the vectorized execution"),
    ],
)
def test_settings_that_can_not_be_are_refused(settings: dict, words: str) -> None:
    with pytest.raises(mn.SettingsError, match=words):
        mn.MetaLearner(nn.Linear(3, 2), squared, **settings)
