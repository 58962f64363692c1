"""``compile=True``: programs in the place of gradients give the same meta-gradients, and refuse what they cannot do.

torch.compile takes seconds a program; where it is not what is tested, the traced gradients run as they are.
"""

from __future__ import annotations

import copy
import dataclasses
import enum
import gc
import pickle
import re
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import metanudge as mn
from metanudge.oracle import compiled
from problems import ESTIMATORS, PROBLEMS, SOLVERS, distance, flat_gradient, single_tasks

FAST = [
    "linear",
    "linear_forward",
    "linear_fourth_order",
    "symmetric",
    "fourth_order",
    "from_theta",
    "from_theta_forward",
    "fomaml",
    "reptile",
    "imaml_two_gradient",
    "hfmaml",
    "tangent_two_gradient",
]
SLOW = ["maml", "maml_checkpointed", "imaml", "tangent"]


def squared(model: nn.Module, batch: mn.Batch) -> Tensor:
    return (model(batch.inputs) - batch.targets).square().mean()


def absolute(model: nn.Module, batch: mn.Batch) -> Tensor:
    return (model(batch.inputs) - batch.targets).abs().mean()


def tasks_of(number: int = 3, support: int = 5, query: int = 4, width: int = 3) -> mn.Tasks:
    generator = torch.Generator().manual_seed(number + 10 * support)

    def batch(examples: int) -> mn.Batch:
        inputs = torch.randn(number, examples, width, generator=generator, dtype=torch.float64)
        return mn.Batch(inputs, inputs.sin().sum(-1, keepdim=True))

    return mn.Tasks(batch(support), batch(query))


def network(*layers: nn.Module) -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(3, 4), *(layers or (nn.Tanh(),)), nn.Linear(4, 1)).double()


def learner_of(model: nn.Module, compile: bool = True, loss: Any = squared, **settings: Any) -> mn.MetaLearner:
    settings = {"prox": 1.0, "solver": mn.Nesterov(steps=4), **settings}
    return mn.MetaLearner(model, loss, compile=compile, **settings)


def programs(learner: mn.MetaLearner) -> dict[Any, Any]:
    known = learner.execution.programs.known
    return {(stack, name): built for stack, those in known.items() for name, built in those.items()}


def gradient(learner: mn.MetaLearner, tasks: Any) -> Tensor:
    learner.model.zero_grad()
    torch.manual_seed(1)
    learner.backward(tasks)
    return torch.cat([p.grad.reshape(-1).clone() for p in learner.model.parameters() if p.grad is not None])


def agree(model: nn.Module, tasks: Any, **settings: Any) -> mn.MetaLearner:
    """With and without compile, from steps that are as equal; returns the learner that compiles."""
    plain, fast = (learner_of(copy.deepcopy(model), compile, **settings) for compile in (False, True))
    assert distance(gradient(fast, tasks), gradient(plain, tasks)) < 1e-9
    return fast


# The same meta-gradient.


@pytest.mark.parametrize("problem", ["logistic", "mlp"])
@pytest.mark.parametrize("name", FAST)
def test_every_estimator_agrees(name: str, problem: str, traced: None) -> None:
    made, found, steps = PROBLEMS[problem](), [], []
    for compile in (False, True):
        learner = learner_of(made.make(), compile, made.loss, prox=made.prox, estimator=ESTIMATORS[name])
        steps.append(learner.backward(made.tasks))
        found.append(flat_gradient(learner.model))
    assert programs(learner)
    assert distance(found[1], found[0]) < 1e-9
    assert steps[1].gradient_evaluations == steps[0].gradient_evaluations
    for field in ("query_loss", "support_loss", "residual", "error_bound"):
        assert getattr(steps[1], field) == pytest.approx(getattr(steps[0], field), rel=1e-6, nan_ok=True), field


@pytest.mark.parametrize("solver", [name for name in SOLVERS if name != "torch_optimizer"])
def test_every_solver_agrees(solver: str, traced: None) -> None:
    agree(network(), tasks_of(), solver=SOLVERS[solver])


@pytest.mark.parametrize(
    "settings",
    [
        {"estimator": mn.FOBMAML(certify=False)},
        {"adapt_only": "2"},
        {"adapt_only": "2", "estimator": mn.FOBMAML(nudge="full")},
        {"adapt_only": "*.bias", "estimator": mn.FOMAML()},
        {"chunk_size": 2},
        {"query_loss": absolute},
        {"query_loss": absolute, "adapt_only": "0", "estimator": mn.FOBMAML("fourth_order", nudge="full")},
        {"warm_start": mn.WarmStart()},
    ],
    ids=lambda given: re.sub(" at 0x[0-9a-f]+", "", str(given)),  # the same in every process
)
def test_every_setting_agrees(settings: dict[str, Any], traced: None) -> None:
    if "warm_start" in settings:
        found = []
        for compile in (False, True):
            learner = learner_of(network(), compile, warm_start=mn.WarmStart())
            for _ in range(2):
                learner.backward(tasks_of(), indices=[0, 1, 2])
            found.append(flat_gradient(learner.model))
        assert distance(*found) < 1e-9
    else:
        agree(network(), tasks_of(), **settings)


def test_tasks_of_different_sizes(traced: None) -> None:
    tasks = [one for size in (5, 6, 5) for one in single_tasks(tasks_of(2, size))]
    agree(network(), tasks)
    agree(network(), tasks, chunk_size=1)


class Tied(nn.Module):
    """One weight by two names, a buffer that is written and one that is None."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 1)
        self.second.weight = self.first.weight
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("scale", torch.tensor(2.0))
        self.register_buffer("nothing", None)

    def forward(self, inputs: Tensor) -> Tensor:
        self.calls += 1
        self.nothing = self.scale * 2
        return self.last(torch.tanh(self.second(torch.tanh(self.first(inputs)) * self.scale * self.nothing)))


def test_tied_weights_and_buffers(traced: None) -> None:
    torch.manual_seed(0)
    model = Tied().double()
    fast = agree(model, tasks_of())
    number = len(programs(fast))
    assert fast.model.calls == 0
    assert fast.model.nothing is None
    for one in (model, fast.model):
        one.scale.fill_(0.5)
    again = gradient(fast, tasks_of())
    assert distance(again, gradient(learner_of(model, False), tasks_of())) < 1e-9
    assert len(programs(fast)) == number
    for one in (model, fast.model):
        one.second.weight = nn.Parameter(one.first.weight.detach().clone())
    again = gradient(fast, tasks_of())
    assert len(again) == len(gradient(learner_of(model, False), tasks_of()))
    assert distance(again, gradient(learner_of(model, False), tasks_of())) < 1e-9


@pytest.mark.parametrize("policy", ["transductive", "support", "frozen"])
@pytest.mark.parametrize("train", [True, False])
def test_batch_norm(policy: str, train: bool, traced: None) -> None:
    model = network(nn.BatchNorm1d(4), nn.Tanh()).train(train)
    model(torch.randn(8, 3, dtype=torch.float64))
    before = copy.deepcopy(model.state_dict())
    fast = agree(model, tasks_of(), batch_norm=policy)
    assert all(bool((value == before[name]).all()) for name, value in fast.model.state_dict().items())
    assert all(module.training is train for module in fast.model.modules())


def test_parametrizations(traced: None) -> None:
    model = network()
    nn.utils.parametrize.register_parametrization(model[0], "weight", nn.Softplus())
    agree(model, tasks_of())


def test_strides_and_graphs_of_tasks_do_not_matter(traced: None) -> None:
    fast, tasks = learner_of(network()), tasks_of()
    expected, number = gradient(fast, tasks), len(programs(fast))

    def turned(batch: mn.Batch) -> mn.Batch:
        return mn.Batch(batch.inputs.transpose(0, 1).contiguous().transpose(0, 1).requires_grad_(), batch.targets)

    assert distance(gradient(fast, mn.Tasks(*map(turned, tasks))), expected) < 1e-12
    assert len(programs(fast)) == number


def test_moved_models(traced: None) -> None:
    plain, fast = (learner_of(network().float(), compile, prox=2.0) for compile in (False, True))
    in_float = mn.Tasks(*(mn.Batch(*(leaf.float() for leaf in batch)) for batch in tasks_of()))
    gradient(fast, in_float)
    for learner in (plain, fast):
        learner.model.double()
    assert distance(gradient(fast, tasks_of()), gradient(plain, tasks_of())) < 1e-9


def test_autocast(traced: None) -> None:
    plain, fast = (learner_of(network().float(), compile, estimator=mn.FOMAML()) for compile in (False, True))
    tasks = mn.Tasks(*(mn.Batch(*(leaf.float() for leaf in batch)) for batch in tasks_of()))
    exact = gradient(fast, tasks)
    with torch.autocast("cpu", torch.bfloat16):
        rough = gradient(fast, tasks)
        assert distance(rough, gradient(plain, tasks)) < 1e-5
    assert distance(rough, exact) > 1e-5
    assert distance(gradient(fast, tasks), exact) == 0


# When programs are made, and what they see.


def test_programs_are_made_once_a_form(traced: None) -> None:
    learner = learner_of(network())
    learner.evaluate(tasks_of())
    learner.adapt(single_tasks(tasks_of())[0].support)
    assert not programs(learner)
    counts = []
    for tasks in (tasks_of(), tasks_of(), tasks_of(4), tasks_of()):
        learner.backward(tasks)
        counts.append(len(programs(learner)))
    assert 0 < counts[0] == counts[1] < counts[2] == counts[3]
    learner.model.eval()
    learner.backward(tasks_of())
    assert len(programs(learner)) > counts[3]


@pytest.mark.parametrize(
    "solver", [mn.Nesterov(4), mn.Nesterov(4, lr=0.1), mn.GradientDescent(4, lr=0.1, momentum=0.9)]
)
def test_a_step_is_a_program_whatever_their_number(solver: Any, traced: None) -> None:
    fast = learner_of(network(), solver=solver)
    gradient(fast, tasks_of())
    steps = [key for key in programs(fast) if type(solver).__name__ in str(key)]
    assert len(steps) == 2  # the free one, and the nudged one with its two nodes
    number = len(programs(fast))
    fast.solver = replace(solver, steps=7)
    found = gradient(fast, tasks_of())
    assert len(programs(fast)) == number
    assert distance(found, gradient(learner_of(network(), False, solver=fast.solver), tasks_of())) < 1e-9


@pytest.mark.parametrize(
    "change",
    [
        {"prox": 2.5},
        {"solver": mn.Nesterov(4, lr=0.05)},
        {"solver": mn.Nesterov(4, momentum=0.2)},
        {"solver": mn.Nesterov(4, restart=False)},
        {"solver": mn.Nesterov(9, tol=0.05)},
        {"solver": mn.GradientDescent(4, lr=0.05)},
        {"solver": mn.GradientDescent(4, lr=0.1, momentum=0.5)},
    ],
    ids=str,
)
def test_a_learner_that_is_changed_takes_other_programs(change: dict[str, Any], traced: None) -> None:
    solver = mn.GradientDescent(4, lr=0.1) if "Gradient" in str(change) else mn.Nesterov(4)
    fast = learner_of(network(), solver=solver)
    gradient(fast, tasks_of())
    for name, value in change.items():
        setattr(fast, name, value)
    expected = gradient(learner_of(network(), False, **{"solver": solver, **change}), tasks_of())
    assert distance(gradient(fast, tasks_of()), expected) < 1e-9


@dataclass(frozen=True)
class Decaying(mn.GradientDescent):
    """A user's own, whose steps read what a program would freeze."""

    decay: float = 0.1

    def _move(self, index: int, energy: Any, state: Any) -> Any:
        moved = super()._move(index, energy, state)
        back = {name: leaf * (1 - self.decay * index) for name, leaf in moved.phi.items()}
        return moved._replace(phi=back)


def test_steps_of_a_subclass_are_not_frozen(traced: None) -> None:
    fast = learner_of(network(), solver=Decaying(4, lr=0.1))
    for decay in (0.1, 0.2):
        fast.solver = Decaying(4, lr=0.1, decay=decay)
        slow = learner_of(network(), False, solver=fast.solver)
        assert distance(gradient(fast, tasks_of()), gradient(slow, tasks_of())) < 1e-9
    plain = learner_of(network(), solver=mn.GradientDescent(4, lr=0.1))
    assert distance(gradient(fast, tasks_of()), gradient(plain, tasks_of())) > 1e-3


def test_momentum_that_grows_with_the_steps_is_not_frozen(traced: None) -> None:
    agree(network(), tasks_of(), prox=0.0, solver=mn.Nesterov(6), estimator=mn.FOMAML())


def test_lanes_that_stop_on_their_own_agree(traced: None) -> None:
    tasks = tasks_of(5)
    easy = mn.Batch(
        tasks.support.inputs * torch.tensor([1.0, 1e-3, 1.0, 1e-3, 1.0])[:, None, None], tasks.support.targets
    )
    fast = agree(network(), tasks._replace(support=easy), solver=mn.Nesterov(20, tol=0.2))
    assert 0 < fast.backward(tasks).residual < 0.2


def test_shared_parameters_are_read_at_every_step(traced: None) -> None:
    fast, slow = (learner_of(network(), compile, adapt_only="2") for compile in (True, False))
    for learner in (fast, slow):
        optimizer = torch.optim.SGD(learner.model.parameters(), lr=0.5)
        for _ in range(3):
            optimizer.zero_grad()
            learner.backward(tasks_of())
            optimizer.step()
    assert distance(gradient(fast, tasks_of()), gradient(slow, tasks_of())) < 1e-9


class Pair(NamedTuple):
    first: Any
    second: Any


@pytest.mark.parametrize(
    "given",
    [
        torch.ones(2),
        None,
        (),
        {},
        {"a": torch.ones(1), 3: (torch.zeros(2), None, 0.5)},
        Pair({"x": torch.ones(1)}, (Pair(1, torch.zeros(1)), "word")),
    ],
    ids=["tensor", "none", "tuple", "dict", "nested", "named"],
)
def test_trees_are_put_together_as_they_were(given: Any) -> None:
    leaves: list[Tensor] = []
    form = compiled.taken_apart(given, leaves)
    found = compiled.put_together(form, iter(leaves))
    assert type(found) is type(given)
    assert str(found) == str(given)
    again: list[Tensor] = []
    assert compiled.taken_apart(found, again) == form
    assert hash(form) == hash(compiled.taken_apart(found, []))
    assert [id(leaf) for leaf in again] == [id(leaf) for leaf in leaves]


def test_trees_of_other_forms_are_told_apart() -> None:
    one = torch.ones(1)
    trees = [one, (one,), {"a": one}, {"b": one}, (one, None), (None, one), (one, 1.0), (one, 2.0)]
    assert len({compiled.taken_apart(given, []) for given in [*trees, Pair(one, None)]}) == len(trees) + 1


def test_frozen_parameters_are_read_at_every_step(traced: None) -> None:
    model, plain = network(), network()
    for one in (model, plain):
        one[0].requires_grad_(False)
    fast, slow = learner_of(model), learner_of(plain, False)
    gradient(fast, tasks_of())
    number = len(programs(fast))
    with torch.no_grad():
        for one in (model, plain):
            one[0].weight.mul_(0.5)
    assert distance(gradient(fast, tasks_of()), gradient(slow, tasks_of())) < 1e-9
    for one in (model, plain):
        one[0].bias = nn.Parameter(torch.ones(4, dtype=torch.float64), requires_grad=False)
    assert distance(gradient(fast, tasks_of()), gradient(slow, tasks_of())) < 1e-9
    assert len(programs(fast)) == number


def square() -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 1)).double()


def changed_layer(model: nn.Module, learner: mn.MetaLearner) -> None:
    model[1] = nn.Sigmoid()


def changed_selection(model: nn.Module, learner: mn.MetaLearner) -> None:
    learner.adapt_only = "2"


def froze(model: nn.Module, learner: mn.MetaLearner) -> None:
    model[0].requires_grad_(False)
    model[2].requires_grad_(True)


def unfroze(model: nn.Module, learner: mn.MetaLearner) -> None:
    model[2].requires_grad_(False)


@pytest.mark.parametrize("change", [changed_layer, changed_selection, froze, unfroze])
def test_changes_of_the_model_are_seen(change: Callable[..., None], traced: None) -> None:
    found = []
    for compile in (False, True):
        learner = learner_of(square(), compile, adapt_only="0" if change is changed_selection else None)
        if change is froze:
            learner.model[2].requires_grad_(False)
        learner.backward(tasks_of())
        change(learner.model, learner)
        found.append(gradient(learner, tasks_of()))
    assert distance(*found) < 1e-9


def test_tensors_of_the_loss_are_read_at_every_step(traced: None) -> None:
    teacher = nn.Linear(3, 1).double().requires_grad_(False)

    def taught(model: nn.Module, batch: mn.Batch) -> Tensor:
        return (model(batch.inputs) - teacher(batch.inputs)).square().mean()

    fast, slow = learner_of(network(), loss=taught), learner_of(network(), False, taught)
    gradient(fast, tasks_of())
    with torch.no_grad():
        teacher.weight.mul_(3)
    assert distance(gradient(fast, tasks_of()), gradient(slow, tasks_of())) < 1e-9


def test_tasks_are_let_go(traced: None) -> None:
    learner, tasks = learner_of(network()), tasks_of()
    learner.backward(tasks)
    held = [weakref.ref(leaf) for batch in tasks for leaf in batch]
    del tasks
    gc.collect()
    assert all(one() is None for one in held)


def test_copies_begin_empty(traced: None) -> None:
    learner = learner_of(network())
    expected = gradient(learner, tasks_of())
    for copied in (copy.deepcopy(learner), pickle.loads(pickle.dumps(learner))):
        assert not programs(copied)
        assert distance(gradient(copied, tasks_of()), expected) == 0
    assert "compile=True" in repr(learner)
    assert "compile" not in repr(learner_of(network(), False))


# Refusals. Nothing is changed.


def refused(learner: mn.MetaLearner, tasks: Any, words: str, error: type[Exception] = mn.LossError) -> None:
    for parameter in learner.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    state, tensors = copy.deepcopy(learner.model.state_dict()), copy.deepcopy(tasks)
    known = dict(programs(learner))
    with pytest.raises(error, match=words):
        learner.backward(tasks)
    assert all(bool((value == state[name]).all()) for name, value in learner.model.state_dict().items())
    assert all(bool((parameter.grad == 1).all()) for parameter in learner.model.parameters())
    assert all(bool((a == b).all()) for x, y in zip(tasks, tensors, strict=True) for a, b in zip(x, y, strict=True))
    assert programs(learner) == known


def test_dropout_is_refused_in_train_mode(traced: None) -> None:
    model = network(nn.Tanh(), nn.Dropout(0.5))
    refused(learner_of(model), tasks_of(), r"draws random numbers.*leave compile out, or call model.eval\(\)")
    agree(model.eval(), tasks_of())


def item(model: nn.Module, batch: mn.Batch) -> Tensor:
    return squared(model, batch) * batch.inputs.sum().item()


def branch(model: nn.Module, batch: mn.Batch) -> Tensor:
    return squared(model, batch) if batch.inputs.sum() > 0 else absolute(model, batch)


def array(model: nn.Module, batch: mn.Batch) -> Tensor:
    return squared(model, batch) * float(batch.inputs.numpy().sum())


def writes(model: nn.Module, batch: mn.Batch) -> Tensor:
    batch.inputs.add_(1)
    return squared(model, batch)


def raises(model: nn.Module, batch: mn.Batch) -> Tensor:
    raise KeyError("mine")


def vector(model: nn.Module, batch: mn.Batch) -> Tensor:
    return model(batch.inputs)


def constant(model: nn.Module, batch: mn.Batch) -> Tensor:
    return batch.inputs.sum()


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (item, "item"),
        (branch, "branches on the value"),
        (array, "numpy"),
        (writes, "may write to the batch"),
        (vector, "one number per task"),
        (constant, "does not depend on the adapted parameters"),
    ],
)
def test_losses_that_can_not_be_compiled(loss: Any, words: str, traced: None) -> None:
    refused(learner_of(network(), loss=loss), tasks_of(), words)


def test_models_that_are_compiled_already(traced: None) -> None:
    model = network()
    model[0] = torch.compile(model[0], backend="eager")
    refused(learner_of(model, execution="vectorized"), tasks_of(), "compiled by torch.compile already")


def test_errors_of_the_user_pass(traced: None) -> None:
    refused(learner_of(network(), loss=raises), tasks_of(), "mine", KeyError)


def test_wrong_shapes_are_told_as_without_compile(traced: None) -> None:
    said = []
    for compile in (False, True):
        with pytest.raises(RuntimeError) as error:
            learner_of(network(), compile).backward(tasks_of(width=2))
        said.append((str(error.value), *error.value.__notes__))
    assert len(said[0]) == 2
    assert said[0] == said[1]


def test_programs_run_in_inference_mode(traced: None) -> None:
    learner = learner_of(network())
    norms = [learner.backward(tasks_of()).gradient_norm]
    with torch.inference_mode():
        norms.append(learner.backward(tasks_of()).gradient_norm)
    assert norms[0] == norms[1]


def test_a_compiler_that_fails_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(graph: nn.Module, tensors: list[Tensor]) -> Any:
        raise RuntimeError("no compiler")

    learner = learner_of(network())
    with monkeypatch.context() as patched:
        patched.setattr(compiled, "build", broken)
        refused(learner, tasks_of(), "failed; leave compile out.*compiler")
    monkeypatch.setattr(compiled, "build", lambda graph, tensors: graph)
    gradient(learner, tasks_of())


@pytest.mark.parametrize("name", SLOW)
def test_estimators_that_differentiate_twice_are_refused(name: str) -> None:
    with pytest.raises(mn.SettingsError, match=r"compiled gradients.*without compile"):
        learner_of(network(), estimator=ESTIMATORS[name])


@pytest.mark.parametrize("settings", [{"execution": "in_place"}, {"solver": SOLVERS["torch_optimizer"]}])
def test_in_place_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(mn.SettingsError, match=r"compile belongs to the vectorized execution.*torch\.compile\(model\)"):
        learner_of(network(), **settings)


def test_compile_is_a_flag() -> None:
    with pytest.raises(mn.SettingsError, match="compile must be True or False"):
        learner_of(network(), compile="yes")


# Around it.


def test_advice_is_the_same(traced: None) -> None:
    said = []
    for compile in (False, True):
        learner = learner_of(network(), compile, prox=0.01, solver=mn.Nesterov(steps=1))
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always", mn.UnsolvedWarning)
            step = learner.backward(tasks_of())
        said.append((step.gradient_evaluations, *(str(one.message) for one in heard)))
    assert len(said[0]) > 1
    assert said[0] == said[1]


def test_resuming_is_exact(tmp_path: Path, traced: None) -> None:
    data = single_tasks(tasks_of(6))

    def trained(out: Path, *steps: int) -> Tensor:
        for upto in steps:
            learner = learner_of(network())
            optimizer = torch.optim.Adam(learner.model.parameters(), lr=0.01)
            settings = {"tasks_per_step": 2, "out": out, "resume": True, "seed": 0, "progress": False}
            mn.fit(learner, optimizer, data, steps=upto, **settings)
            assert programs(learner)
        return nn.utils.parameters_to_vector(learner.model.parameters()).detach()

    assert bool((trained(tmp_path / "whole", 6) == trained(tmp_path / "parts", 3, 6)).all())


# With torch.compile.

OF_TORCH = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # torch._inductor imports torch.jit


@OF_TORCH
def test_built_programs_agree() -> None:
    model = network(nn.BatchNorm1d(4), nn.Tanh())
    model[0].requires_grad_(False)
    estimator = dataclasses.replace(mn.FOBMAML(certify=False), nu=0.1)
    settings = {"estimator": estimator, "adapt_only": "3", "batch_norm": "support", "solver": mn.Nesterov(steps=3)}
    fast = agree(model, tasks_of(), **settings)
    number = len(programs(fast))
    with torch._dynamo.config.patch(error_on_recompile=True):
        again = gradient(fast, tasks_of())
    assert distance(again, gradient(learner_of(model, False, **settings), tasks_of())) < 1e-9
    assert len(programs(fast)) == number
    assert bool((gradient(learner_of(model, **settings), tasks_of()) == again).all())  # as in a process that resumes


@OF_TORCH
def test_built_programs_do_not_write_to_tasks() -> None:
    def linear(model: nn.Module, batch: mn.Batch) -> Tensor:
        return (model.weight * batch.inputs).sum()

    model = nn.Linear(3, 1, bias=False).double()
    tasks = mn.Tasks(*(mn.Batch(batch.inputs[:, :1], batch.targets) for batch in tasks_of()))
    before = copy.deepcopy(tasks)
    agree(model, tasks, loss=linear, solver=mn.GradientDescent(steps=2, lr=0.1), estimator=mn.FOMAML())
    assert all(bool((a == b).all()) for x, y in zip(tasks, before, strict=True) for a, b in zip(x, y, strict=True))


class Tempered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.temperature, self.calls = network(), 1.0, 0

    def forward(self, inputs: Tensor) -> Tensor:
        heat = self.temperature[-1] if isinstance(self.temperature, tuple | list) else self.temperature
        heat = heat.value if isinstance(heat, enum.Enum) else heat
        return self.body(inputs) / (1.0 if heat is None else float(heat))


class Kind(enum.Enum):
    LOW = 1.0
    HIGH = 3.0


@pytest.mark.parametrize(
    ("low", "high"),
    [
        (1.0, 3.0),
        (np.float64(1), np.float64(3)),
        (Kind.LOW, Kind.HIGH),
        ((None, np.int64(1)), (None, np.int64(3))),
        (None, 3.0),
    ],
    ids=repr,
)
def test_numbers_that_a_module_holds_are_not_frozen(low: Any, high: Any, traced: None) -> None:
    model, tasks = Tempered(), tasks_of()
    model.temperature = low
    fast, plain = learner_of(model), learner_of(copy.deepcopy(model), compile=False)
    before = gradient(fast, tasks)
    model.temperature = plain.model.temperature = high
    assert distance(gradient(fast, tasks), before) > 0.1
    assert distance(gradient(fast, tasks), gradient(plain, tasks)) < 1e-9


def test_many_programs_are_told_of_once(traced: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "MANY", 4)
    learner = learner_of(network(), estimator=mn.FOMAML())  # two programs a form
    learner.backward(tasks_of(2))
    with pytest.warns(UserWarning, match="has compiled 4 gradients by now"):
        learner.backward(tasks_of(3))
    learner.backward(tasks_of(4))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of torch.func and of the compiler
def test_hessians_are_built() -> None:
    """The compiler changes the layout under a view that the gradient of torch.func.hessian takes."""

    def slopes(weights: Tensor, inputs: Tensor) -> list[Tensor]:
        def of_task(weights: Tensor, inputs: Tensor) -> Tensor:
            hessian = torch.func.hessian(lambda x: nn.functional.linear(x[None], weights).tanh().sum())
            return torch.vmap(hessian)(inputs).diagonal(dim1=-2, dim2=-1).sum(-1).square().mean()

        with torch.enable_grad():
            weights = weights.detach().requires_grad_()
            return [*torch.autograd.grad(torch.vmap(of_task)(weights, inputs).sum(), weights)]

    given = [torch.randn(2, 4, 3, dtype=torch.float64), torch.randn(2, 7, 3, dtype=torch.float64)]
    (expected,) = slopes(*given)
    _, (found,) = compiled._compiled(slopes, given)
    assert distance(found, expected) < 1e-12
