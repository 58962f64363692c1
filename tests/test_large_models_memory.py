"""The in-place execution at scale: what it keeps in memory, and how it takes a task in pieces."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import metanudge as mn
from metanudge import bundles
from metanudge.diagnostics.memory import LiveBytes
from problems import DTYPE, PROBLEMS, distance, flat_gradient, normal, single_tasks, squared_error

LEAN = mn.FOBMAML(nudge="full", start="initialization", certify=False)


def sgd(steps: int = 3, lr: float = 0.1, **settings: object) -> mn.TorchOptimizer:
    return mn.TorchOptimizer(lambda parameters: torch.optim.SGD(parameters, lr=lr, **settings), steps=steps)


# Memory, in copies of the adapted parameters beyond what ordinary training keeps: the parameters and their gradients.

LAYERS, WIDTH = 40, 72
COPY = LAYERS * WIDTH**2 * 4


def deep(dtype: torch.dtype = torch.float32) -> nn.Module:
    """Big parameters, small activations; one parameter is a fortieth of all, and too large for a bundle."""
    layers = [layer for _ in range(LAYERS) for layer in (nn.Linear(WIDTH, WIDTH, bias=False), nn.Tanh())]
    return nn.Sequential(*layers).to(dtype)


def vectors(tasks: int, size: int = 2, width: int = WIDTH, dtype: torch.dtype = torch.float32) -> mn.Tasks:
    g = torch.Generator().manual_seed(1)
    return mn.Tasks(*(mn.Batch(*(normal(g, tasks, size, width).to(dtype) for _ in range(2))) for _ in range(2)))


def ordinary_peak(model: nn.Module, tasks: mn.Tasks) -> int:
    """Two steps of a plain training loop."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with LiveBytes() as live:
        for task in single_tasks(tasks)[:2]:
            optimizer.zero_grad()
            squared_error(model, task.support).backward()
            optimizer.step()
    return live.peak


def copies(estimator: object, solver: object, tasks: int, **settings: object) -> float:
    data = vectors(tasks)
    learner = mn.MetaLearner(
        deep(), squared_error, solver=solver, estimator=estimator, execution="in_place", **settings
    )
    with LiveBytes() as live:
        learner.backward(data)
    return (live.peak - ordinary_peak(deep(), vectors(2))) / COPY


def adamw() -> mn.TorchOptimizer:
    return mn.TorchOptimizer(lambda parameters: torch.optim.AdamW(parameters, lr=1e-4), steps=3)


def documented() -> list[tuple[str, int, int]]:
    """The cells of the table in docs/large_models.md: the estimator, number of the solver, copies."""
    page = (Path(__file__).parent.parent / "docs" / "large_models.md").read_text()
    rows = re.findall(r"^\| (`\w+\(.*\)`) \| (\d+) \| (\d+) \| (\d+) \| (\d+) \|$", page, re.MULTILINE)
    assert len(rows) == 6
    return [
        (estimator, column, int(number))
        for estimators, *numbers in rows
        for estimator in re.findall(r"`(.*?)`", estimators)
        for column, number in enumerate(numbers)
    ]


@pytest.mark.parametrize(("estimator", "column", "number"), documented())
def test_copies_are_those_of_the_page(estimator: str, column: int, number: int) -> None:
    """To within what is in the hand while a sum is formed: four single tensors."""
    solver = (sgd(), adamw(), mn.GradientDescent(3, lr=0.1), mn.Nesterov(3))[column]
    assert number - 0.02 <= copies(eval(f"mn.{estimator}"), solver, tasks=2) <= number + 4 / LAYERS


@pytest.mark.parametrize(
    "solver", [sgd(), sgd(foreach=True), mn.GradientDescent(3, lr=0.1)], ids=["sgd", "foreach", "descent"]
)
def test_the_lean_form_with_one_task_a_step(solver: object) -> None:
    """There is no mean over tasks beside the task's own sum."""
    most = 3 if isinstance(solver, mn.GradientDescent) else 2
    assert copies(LEAN, solver, tasks=1) <= most + 4 / LAYERS


@pytest.mark.parametrize(("solver", "more"), [(mn.GradientDescent(3, lr=0.1, momentum=0.5), 2), (mn.Nesterov(3), 5)])
def test_what_solvers_keep_beside_what_gradient_descent_does(solver: object, more: int) -> None:
    """As their docstrings say; the state that a solve begins with is let go after its first step."""
    for estimator in (mn.FOMAML(), LEAN, mn.FOBMAML(certify=False)):
        plain = copies(estimator, mn.GradientDescent(3, lr=0.1), tasks=2)
        assert copies(estimator, solver, tasks=2) <= plain + more + 4 / LAYERS


@pytest.mark.parametrize(("solver", "most"), [(sgd(), 3), (adamw(), 5), (mn.GradientDescent(3, lr=0.1), 4)])
def test_bundles_keep_no_more_than_a_few_of_them(solver: object, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on the page, but what is in the hand are bundles, here of two layers."""
    monkeypatch.setattr(bundles, "SMALL", {"cpu": WIDTH**2})
    monkeypatch.setattr(bundles, "FULL", {"cpu": 2 * WIDTH**2})
    assert len(bundles.Bundles.of(dict(deep().named_parameters()))) == LAYERS / 2
    assert most - 0.02 <= copies(LEAN, solver, tasks=2) <= most + 4 * 2 / LAYERS


@pytest.mark.parametrize("settings", [{"start": "initialization", "certify": False}, {"certify": False}, {}], ids=str)
def test_a_sharpness_radius_adds_a_copy_at_most(settings: dict[str, object]) -> None:
    estimator = mn.FOBMAML(**settings)
    plain, aside = (copies(estimator, sgd(), tasks=2, sharpness_radius=radius) for radius in (0.0, 0.1))
    assert aside <= plain + 1 + 1 / LAYERS


def test_memory_does_not_grow_with_tasks_or_steps() -> None:
    few, many = copies(LEAN, sgd(2), tasks=2), copies(LEAN, sgd(8), tasks=4)
    assert few == pytest.approx(many, abs=0.01)  # the tasks themselves


def test_frozen_and_shared_parameters_are_not_copied() -> None:
    """Of a body, seen once itself: a shared one has the gradients of both losses and its two sums, a frozen nothing."""
    for trainable, most in ((False, 1), (True, 1 + 4)):
        model = nn.Sequential(deep(), nn.Linear(WIDTH, 1))
        model[0].requires_grad_(trainable)
        data = mn.Tasks(*(mn.Batch(batch.inputs, batch.targets[..., :1]) for batch in vectors(2)))
        learner = mn.MetaLearner(model, squared_error, solver=sgd(), estimator=LEAN, adapt_only="1")
        with LiveBytes() as live:
            learner.backward(data)
        assert live.peak / COPY <= most + 4 / LAYERS


@pytest.mark.parametrize("execution", ["vectorized", "in_place"])
@pytest.mark.parametrize("scheme", ["symmetric", "forward", "fourth_order"])
def test_without_the_bound_the_estimate_is_the_same(scheme: str, execution: str) -> None:
    made = PROBLEMS["logistic"]()
    both = []
    for certify in (True, False):
        model = made.make()
        estimator = mn.FOBMAML(scheme, certify=certify)
        learner = mn.MetaLearner(
            model, made.loss, prox=made.prox, solver=mn.GradientDescent(4, lr=0.1), estimator=estimator,
            execution=execution,
        )  # fmt: skip
        step = learner.backward(made.tasks)
        assert (step.error_bound == step.error_bound) is certify
        both.append((flat_gradient(model), step))
    (bounded, with_bound), (free, without) = both
    assert torch.equal(bounded, free)
    saved = 4 + len(mn.FOBMAML(scheme).stencil.nodes)
    assert with_bound.gradient_evaluations - without.gradient_evaluations == saved * len(made.plain)


def test_certify_is_true_or_false() -> None:
    with pytest.raises(mn.SettingsError, match="certify must be True or False"):
        mn.FOBMAML(certify="no")


# Low precision.


class Weights(nn.Module):
    """phi, used linearly: the loss <x, phi> has the gradient x wherever it is taken."""

    def __init__(self) -> None:
        super().__init__()
        self.phi = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))


def linear(model: nn.Module, batch: mn.Batch) -> Tensor:
    return (batch.inputs * model.phi).sum(-1).mean()


def bfloat16_gradient(tasks: mn.Tasks, solver: object, **settings: object) -> Tensor:
    model = Weights()
    learner = mn.MetaLearner(model, linear, solver=solver, execution="in_place", **{"estimator": LEAN, **settings})
    learner.backward(tasks)
    assert model.phi.grad.dtype == torch.bfloat16
    assert torch.equal(model.phi.detach(), torch.ones(2, dtype=torch.bfloat16))
    return model.phi.grad.float()


def constant(*shape: int) -> mn.Tasks:
    x = torch.ones(*shape, 2, dtype=torch.bfloat16)
    return mn.Tasks(mn.Batch(0.001 * x, x), mn.Batch(x, x))


def test_iterates_are_kept_in_float32_under_bfloat16_parameters() -> None:
    """grad F is the query slope, 1. At phi = 1 bfloat16 has steps of 1/128: neither the support gradient nor the nudge
    could move phi."""
    found = bfloat16_gradient(constant(1, 1), mn.GradientDescent(20, lr=0.5), estimator=mn.FOBMAML(nu=1e-3))
    torch.testing.assert_close(found, torch.ones(2), rtol=2**-8, atol=0)


def test_the_mean_over_tasks_is_kept_in_float32() -> None:
    """A sum of ones in bfloat16 does not get past 256."""
    found = bfloat16_gradient(constant(300, 1), mn.GradientDescent(1, lr=1.0), estimator=mn.FOMAML())
    torch.testing.assert_close(found, torch.ones(2), rtol=2**-8, atol=0)


def test_gradients_of_microbatches_are_added_up_in_float32() -> None:
    found = bfloat16_gradient(constant(1, 600), mn.GradientDescent(1, lr=1.0), estimator=mn.FOMAML(), microbatch=1)
    torch.testing.assert_close(found, torch.ones(2), rtol=2**-8, atol=0)


def narrow_error(dtype: torch.dtype, estimator: object, around: bool | None = None, device: str = "cpu") -> float:
    """Distance from the exact meta-gradient in float64; ``around``: autocast around the step, or within the loss."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1)).double()
    data = vectors(2, size=16, width=8, dtype=DTYPE)
    data = mn.Tasks(*(mn.Batch(batch.inputs, batch.targets[..., :1]) for batch in data))
    exact_learner = mn.MetaLearner(model, squared_error, prox=4.0, solver=mn.Nesterov(60), estimator=mn.Tangent())
    exact_learner.backward(data)
    exact = flat_gradient(model)

    def loss(model: nn.Module, batch: mn.Batch) -> Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=around is not None):
            found = model(batch.inputs)
        return (found.float() - batch.targets.float()).square().mean()

    model = model.to(device, dtype)
    model.zero_grad()
    learner = mn.MetaLearner(
        model, loss, prox=4.0, solver=mn.GradientDescent(40, lr=0.1), estimator=estimator, execution="in_place"
    )
    with torch.autocast(device, torch.bfloat16, enabled=bool(around)):
        learner.backward(mn.Tasks(*(mn.Batch(*(x.to(device, dtype) for x in batch)) for batch in data)))
    return distance(flat_gradient(model).cpu().double(), exact)


@pytest.mark.parametrize("estimator", [LEAN, mn.FOBMAML()], ids=["lean", "default"])
def test_bfloat16_parameters(estimator: object) -> None:
    assert narrow_error(torch.bfloat16, estimator) < 0.06


@pytest.mark.parametrize("estimator", [LEAN, mn.FOBMAML()], ids=["lean", "default"])
def test_autocast_around_the_step(estimator: object) -> None:
    """Autocast keeps the casts it has made of parameters, and does not know that they have moved."""
    assert narrow_error(torch.float32, estimator, around=True) < 0.06


def test_autocast_around_steps_of_a_torch_optimizer() -> None:
    """Losses at its last point are not those of the casts at the one before, though nothing is loaded in between."""
    losses = []
    for solver in (mn.GradientDescent(1, lr=0.1), sgd(1)):
        model = deep()
        model.load_state_dict({name: torch.eye(WIDTH) for name in model.state_dict()})
        learner = mn.MetaLearner(model, squared_error, solver=solver, estimator=LEAN, execution="in_place")
        with torch.autocast("cpu", torch.bfloat16):
            losses.append(learner.backward(vectors(1)).support_loss)
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.parametrize("estimator", [mn.FOBMAML(nudge="full", nu=0.1), mn.FOBMAML()], ids=["full", "default"])
def test_autocast_within_the_loss(estimator: object) -> None:
    assert narrow_error(torch.float32, estimator, around=False) < 0.06


# Gradient accumulation within a task.


def network(width: int = 6) -> nn.Module:
    return nn.Sequential(nn.Linear(width, 8), nn.Tanh(), nn.Linear(8, width)).to(DTYPE)


def gradient(tasks: object, model: nn.Module | None = None, **settings: object) -> Tensor:
    torch.manual_seed(4)
    model = network() if model is None else model
    model.zero_grad()
    given = {"solver": mn.GradientDescent(4, lr=0.1), "estimator": mn.FOBMAML(nu=0.1), "execution": "in_place"}
    torch.manual_seed(5)
    mn.MetaLearner(model, squared_error, **(given | settings)).backward(tasks)
    return flat_gradient(model)


@pytest.mark.parametrize("estimator", [mn.FOBMAML(nu=0.1), mn.FOBMAML(nudge="full", nu=0.1), mn.FOMAML()], ids=str)
@pytest.mark.parametrize("size", [1, 3, 4, 7, 20])
def test_microbatches_equal_the_whole_batch(size: int, estimator: object) -> None:
    data = vectors(2, size=7, width=6, dtype=DTYPE)
    whole = gradient(data, estimator=estimator)
    assert distance(gradient(data, estimator=estimator, microbatch=size), whole) < 1e-12


SIZES = pytest.mark.parametrize("size", [1, 2, 4])
FEW = mn.Nesterov(6)
COUNTS = {
    "sequences": [8, 1, 0, 5, 0, 8],
    "padded": [8, 8, 8, 0, 0, 0],
    "uneven": [1, 8, 3, 8, 5, 2],
    "lone": [0, 0, 8, 0, 0, 0],
}


def sequences(counts: list[int], marked: str) -> mn.Tasks:
    """Examples of 8 targets, of which so many count."""
    g = torch.Generator().manual_seed(3)
    inputs, there = normal(g, len(counts), 8, 3), torch.arange(8) < torch.tensor(counts)[:, None]
    if marked == "classes":
        targets = torch.randint(4, there.shape, generator=g).where(there, -100)
    else:
        targets = normal(g, *there.shape, 4).where(there[..., None], float("nan"))
    batch = mn.Batch(inputs, targets)
    return mn.Tasks(batch, batch)


def both_ways(loss: object, task: mn.Tasks, size: int, **settings: object) -> tuple[Tensor, Tensor]:
    """The query loss and the meta-gradient in pieces, and of all at once."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 4)).double()
    found = []
    for microbatch in (size, None):
        model.zero_grad()
        learner = mn.MetaLearner(model, loss, execution="in_place", microbatch=microbatch, **{"solver": FEW} | settings)
        step = learner.backward([task])
        found.append(torch.cat([torch.tensor([step.query_loss]).double(), flat_gradient(model)]))
    return found[0], found[1]


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize("marked", ["classes", "numbers"])
@SIZES
def test_pieces_weigh_as_much_as_what_counts_in_them(marked: str, size: int, counts: list[int]) -> None:
    loss = mn.metrics.cross_entropy if marked == "classes" else mn.metrics.squared_error
    assert distance(*both_ways(loss, sequences(counts, marked), size)) < 1e-10


def of_examples(model: nn.Module, batch: mn.Batch) -> Tensor:
    """Cross entropy that knows of no padding: class -100 is one of its own; a mean over the examples."""
    targets = batch.targets.where(batch.targets >= 0, 0)
    losses = nn.functional.cross_entropy(model(batch.inputs).mT, targets, reduction="none")
    return (losses.mean(1) * (1 + (batch.targets == -100).double().mean(1))).mean()


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@SIZES
def test_pieces_weigh_by_their_examples_where_the_loss_is_a_mean_over_those(size: int, counts: list[int]) -> None:
    """Whatever its targets hold: 100 below zero may be a number like others."""
    assert distance(*both_ways(of_examples, sequences(counts, "classes"), size)) < 1e-10


def of_sequences(model: nn.Module, batch: mn.Batch) -> Tensor:
    """The mean over sequences of their means over what counts; those of which nothing does are left out."""
    losses = nn.functional.cross_entropy(model(batch.inputs).mT, batch.targets, reduction="none")
    lengths = (batch.targets != -100).sum(1)
    return (losses.sum(1) / lengths.clamp_min(1)).sum() / (lengths > 0).sum()


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@SIZES
def test_pieces_weigh_by_their_sequences_where_the_loss_is_a_mean_over_those(size: int, counts: list[int]) -> None:
    assert distance(*both_ways(of_sequences, sequences(counts, "classes"), size)) < 1e-10


@pytest.mark.parametrize("loss", [mn.metrics.cross_entropy, of_examples, of_sequences])
@SIZES
def test_every_task_of_a_list_is_weighed_as_what_it_is(size: int, loss: object) -> None:
    """Even sets first, of which nothing can be told; then one in which two weighings are one."""
    tasks = [sequences(counts, "classes") for counts in ([8] * 6, [8, 8, 7, 8, 8, 7], *COUNTS.values(), [5] * 6)]
    found = []
    for microbatch in (size, None):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 4)).double()
        mn.MetaLearner(model, loss, solver=FEW, execution="in_place", microbatch=microbatch).backward(tasks)
        found.append(flat_gradient(model))
    assert distance(*found) < 1e-10


@pytest.mark.parametrize("loss", [mn.metrics.cross_entropy, of_sequences])
def test_a_broken_task_is_no_lesson(loss: object) -> None:
    """NaN in the first task, of which nothing can be learned of the loss: the others are weighed as they are."""
    tasks = [sequences(counts, "classes") for counts in (COUNTS["uneven"], COUNTS["padded"], COUNTS["uneven"])]
    broken = tasks[0].support.inputs.clone()
    broken[1] = float("nan")
    tasks[0] = tasks[0]._replace(support=mn.Batch(broken, tasks[0].support.targets))
    found = []
    for microbatch in (2, None):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 4)).double()
        learner = mn.MetaLearner(model, loss, solver=FEW, execution="in_place", microbatch=microbatch)
        with pytest.warns(mn.NonFiniteWarning, match="task 0: support inputs"):
            assert learner.backward(tasks).dropped_tasks == 1
        learner.backward(tasks[1:])
        found.append(flat_gradient(model))
    assert distance(*found) < 1e-10


@pytest.mark.parametrize("even", [True, False])
def test_another_mean_is_warned_of_also_where_even_sets_came_before(even: bool) -> None:
    def by_roots(model: nn.Module, batch: mn.Batch) -> Tensor:
        losses = nn.functional.cross_entropy(model(batch.inputs).mT, batch.targets, reduction="none")
        lengths = (batch.targets != -100).sum(1).double()
        return (losses.sum(1) / lengths.sqrt()).sum() / lengths.sqrt().sum()

    model = nn.Linear(3, 4).double()
    learner = mn.MetaLearner(model, by_roots, execution="in_place", microbatch=2)
    if even:
        learner.backward([sequences([8] * 6, "classes")])
    task = sequences(COUNTS["uneven"], "classes")
    with pytest.warns(UserWarning, match="is no mean over the examples") as told:
        learner.backward([task])
    assert [str(one.message).split()[1] for one in told] == ["support", "query"]
    learner.backward([task])  # once is enough


@pytest.mark.parametrize("counts", [[8] * 6, COUNTS["uneven"]], ids=str)
def test_minibatches_are_read_once_an_evaluation(counts: list[int]) -> None:
    read = []

    def source(step: int) -> mn.Batch:
        read.append(step)
        return sequences(counts, "classes").support

    task = mn.Tasks(mn.Minibatches(source), sequences(counts, "classes").query)
    settings = {"solver": mn.GradientDescent(3, lr=0.1), "estimator": mn.FOMAML(), "execution": "in_place"}
    calls = []
    for microbatch in (None, 2, 6):
        model = nn.Linear(3, 4).double()
        read.clear()
        mn.MetaLearner(model, mn.metrics.cross_entropy, microbatch=microbatch, **settings).backward([task])
        calls.append(list(read))
    assert calls[1] == calls[2] == calls[0]


@SIZES
def test_numbers_that_are_missing_and_not_left_out_are_not_left_out_in_pieces(size: int) -> None:
    model, task = nn.Linear(3, 4).double(), sequences([8, 8, 8, 7, 8, 8], "numbers")
    learner = mn.MetaLearner(
        model, lambda m, b: nn.functional.mse_loss(m(b.inputs), b.targets), execution="in_place", microbatch=size
    )
    for act in (lambda: learner.backward([task]), lambda: learner.adapt(task.support)):
        with pytest.raises(mn.NonFiniteError, match="support targets"):
            act()
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_a_sum_over_padded_sets_is_refused(counts: list[int]) -> None:
    def summed(model: nn.Module, batch: mn.Batch) -> Tensor:
        return nn.functional.cross_entropy(model(batch.inputs).mT, batch.targets, reduction="sum")

    if counts == COUNTS["lone"]:  # a sum over one example is its mean
        task = sequences(counts, "classes")
        assert distance(*both_ways(summed, task, 2, solver=mn.GradientDescent(4, lr=0.01))) < 1e-10
        return
    # where one part hardly counts, a sum is hardly told from a mean of other weights: a warning, here an error
    with pytest.raises((mn.LossError, UserWarning), match=r"adds up over the examples|is no mean over the examples"):
        both_ways(summed, sequences(counts, "classes"), 2)


@pytest.mark.parametrize("size", [2, 3, None])
def test_what_a_loss_derives_by_its_inputs_is_not_added_up_over_evaluations(size: int | None) -> None:
    """Adversarial examples by a .backward() of the loss's own, which writes to the inputs' .grad."""

    def adversarial(model: nn.Module, batch: mn.Batch, inputs: Tensor) -> Tensor:
        inputs.requires_grad_()
        (len(inputs) * mn.metrics.squared_error(model, mn.Batch(inputs, batch.targets))).backward()
        return mn.metrics.squared_error(model, mn.Batch(inputs.detach() + inputs.grad, batch.targets))

    found = []
    for fresh in (True, False):
        loss = lambda m, b, fresh=fresh: adversarial(m, b, b.inputs.detach().clone() if fresh else b.inputs)  # noqa: E731
        model = PROBLEMS["mlp"]().make()
        learner = mn.MetaLearner(
            model, loss, solver=mn.GradientDescent(3, lr=0.1), execution="in_place", microbatch=size
        )
        learner.backward(single_tasks(PROBLEMS["mlp"]().tasks))
        found.append(flat_gradient(model))
    assert distance(*found) < 1e-12


def test_microbatches_report_and_cost_the_same() -> None:
    data, model = vectors(2, size=7, width=6, dtype=DTYPE), network()
    one, other = (
        mn.MetaLearner(model, squared_error, solver=mn.GradientDescent(3, lr=0.1), **settings).backward(data)
        for settings in ({"execution": "in_place"}, {"microbatch": 3})
    )
    for field in ("query_loss", "support_loss", "residual"):
        assert getattr(one, field) == pytest.approx(getattr(other, field), rel=1e-9), field
    assert one.gradient_evaluations == other.gradient_evaluations


def test_microbatches_keep_fewer_activations() -> None:
    wide = nn.Sequential(nn.Linear(4, 512), nn.Tanh(), nn.Linear(512, 4))
    data = vectors(1, size=256, width=4)
    peaks = []
    for microbatch in (None, 16):
        learner = mn.MetaLearner(
            wide, squared_error, solver=sgd(), estimator=LEAN, execution="in_place", microbatch=microbatch
        )
        with LiveBytes() as live:
            learner.backward(data)
        peaks.append(live.peak)
    assert peaks[0] > 5 * peaks[1]


def test_a_microbatch_takes_what_has_no_axis_whole() -> None:
    g = torch.Generator().manual_seed(6)

    def batch() -> mn.Batch:
        return mn.Batch({"x": normal(g, 2, 7, 6), "scale": normal(g, 2)}, normal(g, 2, 7, 6))

    def loss(model: nn.Module, batch: mn.Batch) -> Tensor:
        return (batch.inputs["scale"] * model(batch.inputs["x"]) - batch.targets).square().mean()

    data = mn.Tasks(batch(), batch())
    found = []
    for microbatch in (None, 2):
        torch.manual_seed(7)
        model = network()
        mn.MetaLearner(model, loss, solver=mn.Nesterov(4), execution="in_place", microbatch=microbatch).backward(data)
        found.append(flat_gradient(model))
    assert distance(*found) < 1e-9


def summed(model: nn.Module, batch: mn.Batch) -> Tensor:
    return (model(batch.inputs) - batch.targets).square().sum()


@pytest.mark.parametrize("where", ["support", "query"])
@pytest.mark.parametrize("size", [2, 3, 4])
def test_a_loss_that_adds_up_is_refused_with_microbatches(size: int, where: str) -> None:
    """Not silently divided by the number of pieces."""
    model, data = network(), vectors(2, size=7, width=6, dtype=DTYPE)
    losses = (summed, squared_error) if where == "support" else (squared_error, summed)
    solver = mn.GradientDescent(2, lr=1e-3)
    learner = mn.MetaLearner(model, losses[0], query_loss=losses[1], solver=solver, microbatch=size)
    for _ in range(2):  # again at every call
        with pytest.raises(mn.LossError, match=f"the {where} loss adds up over the examples .*microbatch.*mean"):
            learner.backward(data)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_loss_that_adds_up_may_where_there_is_one_piece() -> None:
    data, found = vectors(2, size=7, width=6, dtype=DTYPE), []
    for microbatch in (None, 7):
        torch.manual_seed(7)
        model = network()
        settings = {"solver": mn.GradientDescent(2, lr=1e-3), "execution": "in_place", "microbatch": microbatch}
        mn.MetaLearner(model, summed, **settings).backward(data)
        found.append(flat_gradient(model))
    assert torch.equal(*found)


def test_means_are_not_taken_for_sums() -> None:
    """Though half a batch may count for nothing, and a loss may differentiate on its own."""

    def masked(model: nn.Module, batch: mn.Batch) -> Tensor:
        kept = (batch.inputs[:, 0] > 0).to(DTYPE)
        return ((model(batch.inputs) - batch.targets).square().mean(-1) * kept).sum() / kept.sum().clamp_min(1)

    def penalised(model: nn.Module, batch: mn.Batch) -> Tensor:
        x = batch.inputs.detach().requires_grad_()
        (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        return squared_error(model, batch) + slope.square().mean()

    data = vectors(2, size=8, width=6, dtype=DTYPE)
    data.support.inputs[..., 0] = torch.tensor([1.0, 1, 0, 0, 1, 0, 1, 0])  # the first piece has a half of nothing
    settings = {"solver": mn.GradientDescent(2, lr=1e-3), "microbatch": 4}
    assert mn.MetaLearner(network(), penalised, **settings).backward(data).dropped_tasks == 0
    with pytest.warns(UserWarning, match="no mean over the examples"):  # and no sum
        assert mn.MetaLearner(network(), masked, **settings).backward(data).dropped_tasks == 0


def test_what_the_check_of_sums_casts_is_not_kept() -> None:
    """Autocast would give the first gradient the casts of a forward pass whose graph is gone."""
    found = []
    for microbatch in (None, 4):
        torch.manual_seed(7)
        model, data = network().float(), vectors(2, size=8, width=6)
        settings = {"solver": mn.GradientDescent(2, lr=0.1), "estimator": mn.FOMAML(), "execution": "in_place"}
        with torch.autocast("cpu", torch.bfloat16):
            mn.MetaLearner(model, squared_error, microbatch=microbatch, **settings).backward(data)
        found.append(flat_gradient(model))
    assert distance(*found) < 0.02


def test_dropout_is_matched_over_microbatches() -> None:
    """Equal masks in all solves: the estimate with a tiny nudge is finite and settled, not noise over the nudge."""
    torch.manual_seed(8)
    model = nn.Sequential(nn.Linear(6, 16), nn.Dropout(0.5), nn.Linear(16, 6)).to(DTYPE)
    data = vectors(2, size=8, width=6, dtype=DTYPE)
    small, large = (
        gradient(data, model, estimator=mn.FOBMAML(nudge="full", nu=nu), microbatch=3) for nu in (1e-4, 1e-3)
    )
    assert distance(small, large) < 1e-5


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"microbatch": 0}, "microbatch must be a whole number"),
        ({"microbatch": 2.0}, "microbatch must be a whole number"),
        ({"microbatch": 2, "execution": "vectorized"}, "microbatch belongs to the in-place execution"),
    ],
)
def test_bad_microbatches_are_refused(settings: dict, words: str) -> None:
    with pytest.raises(mn.SettingsError, match=words):
        mn.MetaLearner(network(), squared_error, **settings)


def test_a_batch_that_can_not_be_cut_is_refused() -> None:
    g = torch.Generator().manual_seed(9)
    batch = mn.Batch(normal(g, 2, 7, 6), normal(g, 2, 5, 6))
    with pytest.raises(mn.TasksError, match=r"microbatch cuts .* but they have 5, 7 of them"):
        gradient(mn.Tasks(batch, batch), microbatch=2)
