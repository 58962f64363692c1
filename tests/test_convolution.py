"""Convolutions of stacks as matrix products, in compiled programs, against PyTorch's own convolution task by task."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import vmap
from torch.utils._python_dispatch import TorchDispatchMode

import metanudge as mn
from metanudge.oracle import compiled, convolution
from metanudge.oracle.convolution import MatrixConvolutions
from problems import distance, flat_gradient

T, N, C, O = 3, 4, 2, 5  # noqa: E741
CONVOLUTION, PRODUCT = torch.ops.aten.convolution, torch.ops.aten.bmm
SETTINGS: dict[str, tuple[int, dict[str, Any]]] = {
    "plain": (3, {}),
    "overlapping": (7, {"stride": 2}),
    "wide_stride": (3, {"stride": (5,)}),
    "padding_beyond_the_kernel": (2, {"stride": 2, "padding": (3,)}),
    "dilation": (3, {"stride": 2, "dilation": 3, "padding": 2}),
    "same": (2, {"padding": "same", "dilation": 3}),
    "valid": (3, {"stride": 2, "padding": "valid"}),
    "kernel_1": (1, {"stride": 3, "padding": 1}),
}


class Operations(TorchDispatchMode):
    """Which operations PyTorch runs."""

    def __init__(self) -> None:
        super().__init__()
        self.ran: set[Any] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ran.add(func.overloadpacket)
        return func(*args, **(kwargs or {}))


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()


def drawn(kernel: int = 3, rows: tuple[int, ...] = (N,)) -> list[Tensor]:
    return [normal(0, T, *rows, C, 13), normal(1, T, O, C, kernel), normal(2, T, O)]


def stacked(function: Callable[..., Tensor], tensors: list[Tensor], dims: Any = 0) -> tuple[Tensor, bool]:
    """Of all tasks at once, and whether a convolution ran."""
    with Operations() as seen, MatrixConvolutions():
        found = vmap(function, in_dims=dims)(*tensors)
    return found, CONVOLUTION in seen.ran


def derivatives(value: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    """The first ones of a curved function of it, and those of a curved function of these."""
    first = torch.autograd.grad(value.tanh().sum(), tensors, create_graph=True)
    return [*first, *torch.autograd.grad(sum(g.sin().sum() for g in first), tensors)]  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("form", ["batch", "no_bias", "unbatched"])
@pytest.mark.parametrize("name", SETTINGS)
def test_values_and_two_derivatives(name: str, form: str) -> None:
    kernel, settings = SETTINGS[name]
    tensors = drawn(kernel, () if form == "unbatched" else (N,))[: 2 if form == "no_bias" else 3]
    found, convolved = stacked(lambda *t: F.conv1d(*t, **settings), tensors)
    apart = torch.stack([F.conv1d(*one, **settings) for one in zip(*tensors, strict=True)])
    assert not convolved
    assert found.is_contiguous()
    assert found[0].stride() == apart[0].stride()
    torch.testing.assert_close(found, apart, rtol=1e-12, atol=1e-12)
    for one, other in zip(derivatives(found, tensors), derivatives(apart, tensors), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dims", [(None, 0, 0), (0, 0, None)], ids=["shared_data", "shared_bias"])
def test_what_tasks_share(dims: tuple[int | None, ...]) -> None:
    tensors = [tensor if dim == 0 else tensor[0] for tensor, dim in zip(drawn(), dims, strict=True)]
    found, convolved = stacked(F.conv1d, tensors, dims)
    whole = [tensor if dim == 0 else tensor.expand(T, *tensor.shape) for tensor, dim in zip(tensors, dims, strict=True)]
    assert not convolved
    torch.testing.assert_close(found, torch.stack([F.conv1d(*one) for one in zip(*whole, strict=True)]))


def test_what_is_left_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = drawn()
    data, weights, biases = tensors
    single = [tensor.detach().float() for tensor in tensors]
    assert stacked(F.conv1d, [data, weights[0], biases[0]], (0, None, None))[1]  # frozen weights
    assert stacked(lambda *t: F.conv1d(*t, groups=2), [normal(0, T, N, 2 * C, 13), normal(1, T, 4, C, 3)])[1]
    assert stacked(F.conv2d, [normal(0, T, N, C, 6, 6), normal(1, T, O, C, 3, 3)])[1]
    assert stacked(F.conv1d, [tensor.half() for tensor in single])[1]
    with torch.autocast("cpu", torch.bfloat16):
        assert stacked(F.conv1d, single)[1]
    monkeypatch.setattr(convolution, "WINDOWS", T * N * 11 * 3 * C)
    assert not stacked(F.conv1d, tensors)[1]
    monkeypatch.setattr(convolution, "WINDOWS", T * N * 11 * 3 * C - 1)
    assert stacked(F.conv1d, tensors)[1]


def test_what_pytorch_refuses_is_refused_in_its_words() -> None:
    data, weights, biases = drawn()
    for tensors, settings, said in (
        ([data[:, :, :1], weights, biases], {}, "channels"),
        ([data[..., :2], weights, biases], {}, "Kernel size can't be greater"),
        ([data, weights, biases], {"stride": 2, "padding": "same"}, "strided"),
        ([data.float(), weights, biases], {}, "type"),
        ([data, weights, biases], {"padding": -1}, "negative padding"),
    ):
        with pytest.raises(RuntimeError, match=said):
            stacked(lambda *t, settings=settings: F.conv1d(*t, **settings), tensors)


# Of a learner.


class Written(nn.Module):
    """Writes to a view of what it is given, as it may where that is contiguous, and gives all of it."""

    def __init__(self, flatten: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.flatten = flatten

    def forward(self, inputs: Tensor) -> Tensor:
        self.flatten(inputs)[:, 0] = 0.0
        self.flatten(inputs).mul_(2.0)
        return inputs


def network(between: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv1d(C, 4, 3, stride=2, padding=1, padding_mode="circular"),
        between(),
        nn.Conv1d(4, 4, 5, padding="same", bias=False),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(32, 3),
    ).double()


def meta_gradient(model: nn.Module, compile: bool) -> Tensor:

    def batch(seed: int) -> mn.Batch:
        return mn.Batch(normal(seed, T, N, C, 16).detach(), torch.arange(T * N).reshape(T, N) % 3)

    solver, estimator = mn.GradientDescent(4, lr=0.1), mn.FOBMAML(nu=0.1, nudge="full")  # two nodes a task
    loss = mn.metrics.cross_entropy
    learner = mn.MetaLearner(model, loss, prox=1.0, solver=solver, estimator=estimator, compile=compile)
    learner.backward(mn.Tasks(batch(4), batch(5)))
    return flat_gradient(model)


def kernel_1() -> nn.Module:
    return nn.Conv1d(4, 4, 1)


# each layer follows a convolution, two or three of them in one network: compiling takes the longest
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "kernel_1_dilation_tanh": lambda: nn.Sequential(kernel_1(), nn.Conv1d(4, 4, 3, dilation=2, padding=2), nn.Tanh()),
    "relu_in_place_group_norm": lambda: nn.Sequential(nn.ReLU(inplace=True), kernel_1(), nn.GroupNorm(2, 4)),
    "writes_to_a_view_and_to_flattened": lambda: nn.Sequential(
        Written(lambda inputs: inputs.view(inputs.size(0), -1)), kernel_1(), Written(lambda inputs: inputs.flatten(1))
    ),
}


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("layer", LAYERS)
def test_traced_programs_have_products_and_give_the_same(layer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever follows a convolution takes its layout, and what it writes to a view is not lost."""
    graphs: list[Any] = []

    def build(graph: Any, tensors: list[torch.Tensor]) -> Any:
        graphs.append(graph)
        return torch.compile(graph, backend="aot_eager", dynamic=False, fullgraph=True)  # checks its strides

    monkeypatch.setattr(compiled, "build", build)
    with Operations() as seen:
        plain = meta_gradient(network(LAYERS[layer]), compile=False)
    assert CONVOLUTION in seen.ran
    assert not graphs
    assert distance(meta_gradient(network(LAYERS[layer]), compile=True), plain) < 1e-10
    assert graphs
    for graph in graphs:
        called = {getattr(node.target, "overloadpacket", None) for node in graph.graph.nodes}
        assert PRODUCT in called
        assert CONVOLUTION not in called
