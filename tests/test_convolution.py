"""Convolutions of stacked tasks as matrix products, against PyTorch's own convolution task by task."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import vmap
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import metanudge as mn
from metanudge.oracle import convolution
from metanudge.oracle.convolution import MatrixConvolutions, convolutions_of
from problems import distance, flat_gradient

T, N, C, O = 3, 4, 2, 5  # noqa: E741
DTYPE = torch.float64
SETTINGS: dict[str, tuple[int, dict[str, Any]]] = {
    "stride": (3, {"stride": 2}),
    "wide_stride": (3, {"stride": (5,)}),
    "padding": (5, {"stride": 2, "padding": 1}),
    "padding_beyond_the_kernel": (2, {"stride": 2, "padding": (3,)}),
    "dilation": (3, {"stride": 2, "dilation": 3, "padding": 2}),
    "same_kernel_2": (2, {"padding": "same"}),
    "same_dilation": (2, {"padding": "same", "dilation": 3}),
    "valid": (3, {"stride": 2, "padding": "valid"}),
    "kernel_1": (1, {}),
    "kernel_1_stride": (1, {"stride": 3, "padding": 1}),
}


class Convolutions(TorchDispatchMode):
    """Counts the convolutions that PyTorch runs."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found["convolution"] += func.overloadpacket is torch.ops.aten.convolution
        return func(*args, **(kwargs or {}))

    @property
    def number(self) -> int:
        return self.found["convolution"]


def normal(seed: int, *shape: int, dtype: torch.dtype = DTYPE) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype).requires_grad_()


def drawn(kernel: int, length: int = 13, rows: tuple[int, ...] = (N,)) -> list[Tensor]:
    return [normal(0, T, *rows, C, length), normal(1, T, O, C, kernel), normal(2, T, O)]


def both(
    function: Callable[..., Tensor], tensors: list[Tensor], in_dims: int | tuple[int | None, ...] = 0
) -> tuple[Tensor, Tensor, int]:
    """Of the stack and of its tasks one by one, and how many convolutions the stack ran."""
    dims = in_dims if isinstance(in_dims, tuple) else (in_dims,) * len(tensors)
    with Convolutions() as seen, MatrixConvolutions():
        stacked = vmap(function, in_dims=dims)(*tensors)
    tasks = [function(*(t if dim is None else t[i] for t, dim in zip(tensors, dims, strict=True))) for i in range(T)]
    return stacked, torch.stack(tasks), seen.number


def derivatives(value: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    """The first ones of a curved function of it, and those of a curved function of these."""
    first = torch.autograd.grad(value.tanh().sum(), tensors, create_graph=True)
    return [*first, *torch.autograd.grad(sum(g.sin().sum() for g in first), tensors)]  # type: ignore[arg-type]


def agree(stacked: Tensor, apart: Tensor, tensors: list[Tensor]) -> None:
    torch.testing.assert_close(stacked, apart, rtol=1e-12, atol=1e-12)
    for found, expected in zip(derivatives(stacked, tensors), derivatives(apart, tensors), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("name", SETTINGS)
def test_values_and_two_derivatives(name: str, biased: bool) -> None:
    kernel, settings = SETTINGS[name]
    tensors = drawn(kernel) if biased else drawn(kernel)[:2]
    stacked, apart, convolutions = both(lambda *t: F.conv1d(*t, **settings), tensors)
    assert convolutions == 0
    agree(stacked, apart, tensors)


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("name", SETTINGS)
def test_an_example_without_a_batch(name: str) -> None:
    kernel, settings = SETTINGS[name]
    tensors = drawn(kernel, rows=())
    stacked, apart, convolutions = both(lambda *t: F.conv1d(*t, **settings), tensors)
    assert convolutions == 0
    agree(stacked, apart, tensors)


@given(
    kernel=st.integers(1, 5),
    stride=st.integers(1, 4),
    padding=st.integers(0, 4),
    dilation=st.integers(1, 3),
    length=st.integers(1, 12),
    rows=st.integers(1, 3),
)
def test_any_shape(kernel: int, stride: int, padding: int, dilation: int, length: int, rows: int) -> None:
    def function(*tensors: Tensor) -> Tensor:
        return F.conv1d(*tensors, stride=stride, padding=padding, dilation=dilation)

    tensors = drawn(kernel, length, (rows,))
    if length + 2 * padding <= dilation * (kernel - 1):
        with MatrixConvolutions(), pytest.raises(RuntimeError, match="Kernel size can't be greater"):
            vmap(function)(*tensors)
        return
    stacked, apart, convolutions = both(function, tensors)
    assert (convolutions == 0) == (kernel <= 2.5 * stride)
    torch.testing.assert_close(stacked, apart, rtol=1e-12, atol=1e-12)


def test_the_second_derivative_by_finite_differences() -> None:
    def function(*tensors: Tensor) -> Tensor:
        with MatrixConvolutions():
            return vmap(lambda *t: F.conv1d(*t, stride=2, padding=1).tanh())(*tensors)

    assert torch.autograd.gradgradcheck(function, [t[:2, ..., :5].detach().requires_grad_() for t in drawn(3)])


def test_nodes_within_tasks() -> None:
    data, weights, biases = normal(0, T, N, C, 13), normal(1, T, 2, O, C, 3), normal(2, T, 2, O)

    def one(*tensors: Tensor) -> Tensor:
        return F.conv1d(*tensors, stride=2, padding=1)

    with Convolutions() as seen, MatrixConvolutions():
        stacked = vmap(vmap(one, in_dims=(None, 0, 0), randomness="same"), randomness="different")(
            data, weights, biases
        )
    assert seen.number == 0
    apart = [[one(data[i], weights[i, j], biases[i, j]) for j in range(2)] for i in range(T)]
    agree(stacked, torch.stack([torch.stack(nodes) for nodes in apart]), [data, weights, biases])


def test_an_unmapped_bias_and_unmapped_data() -> None:
    data, weights, biases = drawn(3)
    for tensors, dims in (([data, weights, biases[0]], (0, 0, None)), ([data[0], weights, biases], (None, 0, 0))):
        stacked, apart, convolutions = both(lambda *t: F.conv1d(*t, stride=2), tensors, dims)
        assert convolutions == 0
        torch.testing.assert_close(stacked, apart, rtol=1e-12, atol=1e-12)


def left_alone(function: Callable[..., Tensor], tensors: list[Tensor], dims: Any = 0, tolerance: float = 1e-12) -> None:
    stacked, apart, convolutions = both(function, tensors, dims)
    assert convolutions == 1
    torch.testing.assert_close(stacked, apart, rtol=tolerance, atol=tolerance)


def test_what_is_left_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = drawn(3)
    shared = [tensors[0], tensors[1][0], tensors[2][0]]
    left_alone(lambda *t: F.conv1d(*t, stride=2), shared, (0, None, None))  # frozen weights
    left_alone(F.conv1d, tensors)  # windows of three times the input
    left_alone(lambda *t: F.conv1d(*t, stride=2, groups=2), [normal(0, T, N, 2 * C, 13), normal(1, T, 4, C, 3)])
    left_alone(F.conv2d, [normal(0, T, N, C, 6, 6), normal(1, T, O, C, 3, 3), normal(2, T, O)])
    left_alone(lambda *t: F.conv1d(*t, stride=2), [t.detach().bfloat16() for t in tensors], tolerance=0.1)
    monkeypatch.setattr(convolution, "WINDOWS", T * N * 6 * 3 * C - 1)
    left_alone(lambda *t: F.conv1d(*t, stride=2), tensors)


def test_autocast_is_left_to_pytorch() -> None:
    tensors = [t.detach().float() for t in drawn(3)]
    with Convolutions() as seen, MatrixConvolutions(), torch.autocast("cpu", torch.bfloat16):
        vmap(lambda *t: F.conv1d(*t, stride=2))(*tensors)
    assert seen.number == 1


def test_what_pytorch_refuses_is_refused_in_its_words() -> None:
    data, weights, biases = drawn(2)
    for tensors, settings, said in (
        ([data[:, :, :1], weights, biases], {"stride": 2}, "channels"),
        ([data, weights, biases], {"stride": 2, "padding": "same"}, "strided"),
        ([data.float(), weights, biases], {"stride": 2}, "type"),
        ([data, weights, biases], {"stride": 2, "padding": -1}, "negative padding"),
    ):
        with MatrixConvolutions(), pytest.raises(RuntimeError, match=said):
            vmap(lambda *t, settings=settings: F.conv1d(*t, **settings))(*tensors)


class Viewed(nn.Module):
    """Flattens by ``view``, which needs a contiguous tensor, and may write to the view, which is the tensor itself."""

    def __init__(self, writes: bool = False) -> None:
        super().__init__()
        self.writes = writes

    def forward(self, inputs: Tensor) -> Tensor:
        view = inputs.view(inputs.size(0), -1)
        if self.writes:
            view[:, 0] = 0.0
            view.mul_(2.0)
        return inputs.flatten(1) if self.writes else view


def network(between: nn.Module | None = None) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv1d(C, 4, 3, stride=2, padding=1, padding_mode="circular"),
            between or nn.Tanh(),
            nn.Conv1d(4, 4, 3, stride=2, padding=1, bias=False),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(16, 3),
        ).to(DTYPE)


def cross_entropy(model: nn.Module, batch: mn.Batch) -> Tensor:
    return F.cross_entropy(model(batch.inputs), batch.targets)


def tasks() -> mn.Tasks:
    generator = torch.Generator().manual_seed(4)

    def batch() -> mn.Batch:
        inputs = torch.randn(T, N, C, 16, generator=generator, dtype=DTYPE)
        return mn.Batch(inputs, torch.randint(3, (T, N), generator=generator))

    return mn.Tasks(batch(), batch())


def meta_gradient(model: nn.Module, estimator: object, execution: str, **settings: Any) -> tuple[Tensor, int]:
    solver = mn.GradientDescent(4, lr=0.1)
    learner = mn.MetaLearner(
        model, cross_entropy, prox=1.0, solver=solver, estimator=estimator, execution=execution, **settings
    )
    with Convolutions() as seen:
        learner.backward(tasks())
    return flat_gradient(model), seen.number


def maml_by_hand(model: nn.Module) -> Tensor:
    """Autograd through four steps of gradient descent, task by task, by functional calls without vmap."""
    theta, data = dict(model.named_parameters()), tasks()
    total = torch.zeros((), dtype=DTYPE)
    for i in range(T):

        def loss(phi: dict[str, Tensor], batch: mn.Batch, i: int = i) -> Tensor:
            return F.cross_entropy(torch.func.functional_call(model, phi, (batch.inputs[i],)), batch.targets[i])

        phi = theta
        for _ in range(4):
            slopes = torch.autograd.grad(loss(phi, data.support), list(phi.values()), create_graph=True)
            phi = {k: p - 0.1 * (g + (p - theta[k])) for (k, p), g in zip(phi.items(), slopes, strict=True)}
        total = total + loss(phi, data.query) / T
    return torch.cat([g.flatten() for g in torch.autograd.grad(total, list(theta.values()))])


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "tanh": nn.Tanh,
    "relu_in_place": lambda: nn.ReLU(inplace=True),
    "group_norm": lambda: nn.GroupNorm(2, 4),
    "instance_norm": lambda: nn.InstanceNorm1d(4),
    "layer_norm": lambda: nn.LayerNorm(8),
    "batch_norm": lambda: nn.BatchNorm1d(4),
    "max_pool": lambda: nn.Sequential(nn.MaxPool1d(2), nn.Upsample(scale_factor=2)),
    "average_pool": lambda: nn.Sequential(nn.AdaptiveAvgPool1d(4), nn.Upsample(scale_factor=2)),
    "unflatten": lambda: nn.Sequential(nn.Flatten(), nn.Unflatten(1, (4, 8))),
}


@pytest.mark.parametrize("layer", LAYERS)
def test_meta_gradients_of_networks(layer: str) -> None:
    """Whatever follows a convolution takes its layout."""

    def model() -> nn.Module:
        return network(LAYERS[layer]())

    policies = ("transductive", "support", "frozen") if layer == "batch_norm" else (None,)
    for policy in policies:
        symmetric = mn.FOBMAML(nu=0.1)
        stacked, ran = meta_gradient(model(), symmetric, "vectorized", batch_norm=policy)
        live, _ = meta_gradient(model(), symmetric, "in_place", batch_norm=policy)
        assert (ran, distance(stacked, live) < 1e-10) == (0, True)
    if policies == (None,):
        stacked, ran = meta_gradient(model(), mn.MAML(), "vectorized")
        assert (ran, distance(stacked, maml_by_hand(model())) < 1e-10) == (0, True)
        checkpointed, _ = meta_gradient(model(), mn.MAML(checkpoint=True), "vectorized")
        assert distance(checkpointed, stacked) < 1e-12


@pytest.mark.parametrize("writes", [False, True])
def test_views_are_views(writes: bool) -> None:
    """What a model writes to a view of a convolution is not lost: such a model is left to PyTorch, a copy is none."""

    def model() -> nn.Module:
        layers = network()
        layers[3] = nn.Identity()
        layers[4] = Viewed(writes)
        return layers

    stacked, ran = meta_gradient(model(), mn.FOBMAML(nu=0.1), "vectorized")
    live, _ = meta_gradient(model(), mn.FOBMAML(nu=0.1), "in_place")
    assert (ran > 0, distance(stacked, live) < 1e-10) == (True, True)
    with MatrixConvolutions(), pytest.raises(RuntimeError, match="invalid for input of size"):
        torch.zeros(3).view(2, 2)


def test_draws_and_nodes_of_one_task(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nodes are mapped within tasks, as dropout asks for: what PyTorch's convolutions give of the same draws."""
    found = []
    for _ in range(2):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            found.append(meta_gradient(network(nn.Dropout(0.3)), mn.FOBMAML(nu=0.1), "vectorized"))
        monkeypatch.setattr(convolution, "WINDOWS", 0)
    (fast, ran), (slow, plainly) = found
    assert distance(fast, slow) < 1e-12
    assert ran == 0 < plainly


def test_tied_and_frozen_layers() -> None:
    tied, frozen = network(nn.Conv1d(4, 4, 1, bias=False)), network()
    tied[2] = nn.Sequential(nn.Conv1d(4, 4, 1, bias=False), nn.MaxPool1d(2)).to(DTYPE)
    tied[2][0].weight = tied[1].weight
    frozen[2].weight.requires_grad_(False)
    for model, plainly in ((tied, False), (frozen, True)):
        stacked, ran = meta_gradient(copy.deepcopy(model), mn.FOBMAML(nu=0.1), "vectorized")
        live, _ = meta_gradient(model, mn.FOBMAML(nu=0.1), "in_place")
        assert distance(stacked, live) < 1e-10
        assert (ran > 0) == plainly


def test_only_models_with_such_layers_enter_the_mode() -> None:
    assert isinstance(convolutions_of(network())(), MatrixConvolutions)
    for model in (
        nn.Linear(2, 2),
        nn.Conv2d(2, 2, 3),
        nn.ConvTranspose1d(2, 2, 3),
        torch.compile(network(), backend="eager"),
    ):
        assert not isinstance(convolutions_of(model)(), MatrixConvolutions)


@pytest.mark.filterwarnings("ignore:The .grad attribute")
def test_compiled_parts_and_losses() -> None:
    expected, _ = meta_gradient(network(), mn.MAML(), "vectorized")
    model = network()
    model[4] = torch.compile(model[4], backend="eager")
    assert distance(meta_gradient(model, mn.MAML(), "vectorized")[0], expected) < 1e-12
    model = network()
    learner = mn.MetaLearner(
        model,
        torch.compile(cross_entropy, backend="eager"),
        prox=1.0,
        solver=mn.GradientDescent(4, lr=0.1),
        estimator=mn.MAML(),
        execution="vectorized",
    )
    learner.backward(tasks())
    assert distance(flat_gradient(model), expected) < 1e-12
