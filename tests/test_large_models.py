"""Models that second-order MAML cannot learn, or not as they are: FO-B-MAML runs them in place, and is right.

Every row names a model and an equivalent one that can be differentiated twice, under vmap. Held against it are the
same estimate in the vectorised execution, to round-off, and the exact meta-gradient (Tangent). What MAML does on the
model as it is was tried out, and is told as it is: where it runs (on a CPU), the test says so.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

import metanudge as mn
from problems import DTYPE, distance, flat_gradient, normal, squared_error

STEPS, LR, PROX = 5, 0.1, 2.0
WIDTH, LENGTH = 6, 4

pytestmark = [
    pytest.mark.filterwarnings("ignore:There is a performance drop because:UserWarning"),  # attention under vmap
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True:UserWarning"),  # a loss without grad
]


class FusedAttention(nn.Module):
    """PyTorch picks a fused kernel, which has no second derivative."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, -1)).movedim(-3, 0).transpose(-3, -2)
        mixed = self.attend(q, k, v)
        return self.out(mixed.transpose(-3, -2).flatten(-2).mean(-2))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class PlainAttention(FusedAttention):
    """The formula."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        future = torch.ones(LENGTH, LENGTH, dtype=torch.bool, device=q.device).triu(1)
        scores = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).masked_fill(future, float("-inf"))
        return scores.softmax(-1) @ v


class Layers(nn.Module):
    """Three layers; the middle one is run by ``middle``."""

    def __init__(self, middle: Callable[[nn.Module, Tensor], Tensor] = lambda layer, x: layer(x)) -> None:
        super().__init__()
        self.first, self.second = (nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(2))
        self.last, self.middle = nn.Linear(WIDTH, 1), middle

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.middle(self.second, self.first(x.mean(-2))))


class Recurrent(nn.Module):
    """The last state of a recurrent layer."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.layer, self.out = kind(WIDTH, 5, batch_first=True), nn.Linear(5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.layer(x)[0][:, -1])


class RecurrentByHand(Recurrent):
    """Its formula, gate by gate."""

    def forward(self, x: Tensor) -> Tensor:
        layer = self.layer
        h = c = x.new_zeros(x.shape[0], 5)
        for token in x.unbind(1):
            seen = F.linear(token, layer.weight_ih_l0, layer.bias_ih_l0)
            kept = F.linear(h, layer.weight_hh_l0, layer.bias_hh_l0)
            if isinstance(layer, nn.LSTM):
                i, f, g, o = (seen + kept).chunk(4, dim=-1)
                c = f.sigmoid() * c + i.sigmoid() * g.tanh()
                h = o.sigmoid() * c.tanh()
            else:
                (r, z, n), (r_kept, z_kept, n_kept) = seen.chunk(3, dim=-1), kept.chunk(3, dim=-1)
                z = (z + z_kept).sigmoid()
                h = (1 - z) * (n + (r + r_kept).sigmoid() * n_kept).tanh() + z * h
        return self.out(h)


class Warped(nn.Module):
    """A spatial transformer: the input as an image, resampled where a layer says."""

    def __init__(self) -> None:
        super().__init__()
        self.where, self.out = nn.Linear(WIDTH, 6), nn.Linear(WIDTH * LENGTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        moved = 0.2 * self.where(x.mean(-2)).tanh().unflatten(-1, (2, 3)) + torch.eye(
            2, 3, dtype=x.dtype, device=x.device
        )
        grid = F.affine_grid(moved, [x.shape[0], 1, LENGTH, WIDTH], align_corners=False)
        return self.out(self.sample(x, grid).flatten(1))

    def sample(self, x: Tensor, grid: Tensor) -> Tensor:
        return F.grid_sample(x.unsqueeze(1), grid, align_corners=False)


class WarpedByHand(Warped):
    """Bilinear interpolation as a sum over pixels, each weighted by a tent."""

    def sample(self, x: Tensor, grid: Tensor) -> Tensor:
        column, row = (((grid[..., i] + 1) * size - 1) / 2 for i, size in enumerate((WIDTH, LENGTH)))

        def tent(at: Tensor, size: int) -> Tensor:
            return (1 - (at.unsqueeze(-1) - torch.arange(size, device=at.device)).abs()).clamp_min(0)

        return torch.einsum("nhwr,nhwc,nrc->nhw", tent(row, LENGTH), tent(column, WIDTH), x)


class TanhOnce(torch.autograd.Function):
    """A user's own operation, whose backward pass was written without thought of a second."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        y = torch.tanh(x)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: object, slope: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return slope * (1 - y * y)


class TanhOnceUnderVmap(torch.autograd.Function):
    """The same with a rule for vmap."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return torch.tanh(x)

    @staticmethod
    def setup_context(ctx: object, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    def vmap(info: object, dims: tuple, x: Tensor) -> tuple[Tensor, int]:
        return TanhOnceUnderVmap.apply(x), dims[0]

    backward = TanhOnce.backward


class Normalised(nn.Module):
    """BatchNorm in train mode, and one matrix in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
        self.second.weight = self.first.weight
        self.norm, self.out = nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.second(torch.tanh(self.norm(self.first(x.mean(-2)))))))


def unfused(layer: nn.Module, x: Tensor) -> Tensor:
    """What the middle layer is: Linear and tanh."""
    return torch.tanh(layer[0](x))


@dataclass(frozen=True)
class Row:
    """A model, its equivalent, what MAML says to the model (None where it runs and is right), and how exact we are."""

    model: Callable[[], nn.Module]
    plain: Callable[[], nn.Module]
    maml: str | None
    exact: float = 1e-4


def grid_sample_differentiates_twice() -> bool:
    """Whether this version of torch has the formula."""
    image, grid = (torch.zeros(1, size, 2, 2, requires_grad=True) for size in (1, 2))
    (slope,) = torch.autograd.grad(F.grid_sample(image, grid, align_corners=False).sum(), image, create_graph=True)
    try:
        torch.autograd.grad(slope.square().sum(), grid)
    except RuntimeError:
        return False
    return True


NO_RULE = "vmap|functorch|[Bb]atching rule"
NO_FORMULA = None if grid_sample_differentiates_twice() else "grid_sampler.*is not implemented"
ROWS = {
    "fused_attention": Row(FusedAttention, PlainAttention, "attention.*is not implemented"),
    "checkpoint": Row(lambda: Layers(lambda f, x: checkpoint(f, x, use_reentrant=False)), Layers, NO_RULE),
    "checkpoint_reentrant": Row(lambda: Layers(lambda f, x: checkpoint(f, x, use_reentrant=True)), Layers, NO_RULE),
    "lstm": Row(lambda: Recurrent(nn.LSTM), lambda: RecurrentByHand(nn.LSTM), NO_RULE),
    "gru": Row(lambda: Recurrent(nn.GRU), lambda: RecurrentByHand(nn.GRU), NO_RULE),
    # bilinear interpolation has kinks, and the curvature at a point is not what a step across them sees
    "grid_sample": Row(Warped, WarpedByHand, NO_FORMULA, exact=0.05),
    "own_function": Row(lambda: Layers(lambda f, x: TanhOnce.apply(f[0](x))), lambda: Layers(unfused), NO_RULE),
    "own_function_with_a_rule": Row(
        lambda: Layers(lambda f, x: TanhOnceUnderVmap.apply(f[0](x))), lambda: Layers(unfused), "once_differentiable"
    ),
    "batch_norm_and_tied_weights": Row(Normalised, Normalised, None),
}


def tasks(dtype: torch.dtype = DTYPE) -> mn.Tasks:
    g = torch.Generator().manual_seed(1)

    def batch() -> mn.Batch:
        x = normal(g, 2, 5, LENGTH, WIDTH)
        return mn.Batch(x.to(dtype), (x.mean((-2, -1)).unsqueeze(-1) + 0.1 * normal(g, 2, 5, 1)).to(dtype))

    return mn.Tasks(batch(), batch())


def sgd(steps: int = STEPS, kind: Callable = torch.optim.SGD, **settings: object) -> mn.TorchOptimizer:
    return mn.TorchOptimizer(lambda parameters: kind(parameters, **{"lr": LR, **settings}), steps=steps)


def gradient(model: nn.Module, data: mn.Tasks | None = None, **settings: object) -> Tensor:
    model.zero_grad()
    torch.manual_seed(2)
    loss = settings.pop("loss", squared_error)
    normalised = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
    given = {"prox": PROX, "batch_norm": "transductive" if normalised else None, **settings}
    mn.MetaLearner(model, loss, **given).backward(tasks() if data is None else data)
    return flat_gradient(model)


def both(row: Row) -> tuple[nn.Module, nn.Module]:
    model = row.model().to(DTYPE)
    plain = row.plain().to(DTYPE)
    plain.load_state_dict(model.state_dict())
    return model, plain


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Parameters, buffers, gradients, modes and the random state are as they were."""
    state, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    yield
    assert all(parameter.grad is None for parameter in model.parameters())
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert [module.training for module in model.modules()] == modes
    now = torch.get_rng_state()
    torch.manual_seed(2)  # of ``gradient``
    torch.randint(2**62, ())  # the one draw a step takes
    assert torch.equal(torch.get_rng_state(), now)


LEAN = mn.FOBMAML(nudge="full", nu=0.05, start="initialization", certify=False)


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("estimator", [LEAN, mn.FOBMAML("fourth_order", nu=0.05)], ids=["lean", "linear"])
def test_in_place_equals_the_stack_of_the_plain_model(estimator: object, name: str) -> None:
    model, plain = both(ROWS[name])
    live = gradient(model, solver=sgd(), estimator=estimator)
    stacked = gradient(plain, solver=mn.GradientDescent(STEPS, lr=LR), estimator=estimator, execution="vectorized")
    assert stacked.norm() > 1e-2
    assert distance(live, stacked) < 1e-10


@pytest.mark.parametrize("name", ROWS)
def test_in_place_is_the_meta_gradient(name: str) -> None:
    model, plain = both(ROWS[name])
    found = gradient(model, solver=mn.Nesterov(60), estimator=mn.FOBMAML(), execution="in_place")
    exact = gradient(plain, solver=mn.Nesterov(60), estimator=mn.Tangent(), execution="vectorized")
    assert distance(found, exact) < ROWS[name].exact


@pytest.mark.parametrize("name", ROWS)
def test_what_maml_says(name: str) -> None:
    """Refused with the cure, and nothing touched; or right."""
    model, plain = both(ROWS[name])
    settings = {"solver": mn.GradientDescent(STEPS, lr=LR), "estimator": mn.MAML(), "execution": "vectorized"}
    if ROWS[name].maml is None:
        assert distance(gradient(model, **settings), gradient(plain, **settings)) < 1e-10
        return
    with untouched(model), pytest.raises(mn.LossError, match=f"Use FOBMAML.*in_place.*{ROWS[name].maml}"):
        gradient(model, **settings)


class TanhOnceUnderAGeneratedRule(torch.autograd.Function):
    """The same, its rule for vmap left to torch."""

    generate_vmap_rule = True
    forward, setup_context, backward = TanhOnceUnderVmap.forward, TanhOnceUnderVmap.setup_context, TanhOnce.backward


def test_the_hole_that_is_left() -> None:
    """Under a generated rule torch drops the second derivative where nobody can see it: MAML is wrong, we are not."""
    model = Layers(lambda f, x: TanhOnceUnderAGeneratedRule.apply(f[0](x))).to(DTYPE)
    plain = Layers(unfused).to(DTYPE)
    plain.load_state_dict(model.state_dict())
    settings = {"solver": mn.Nesterov(60), "execution": "vectorized"}
    exact = gradient(plain, estimator=mn.Tangent(), **settings)
    assert distance(gradient(model, estimator=mn.FOBMAML(), **settings), exact) < 1e-4
    assert distance(gradient(model, estimator=mn.MAML(), **settings), exact) > 1e-2


@pytest.mark.parametrize("estimator", [mn.IMAML(), mn.Tangent(), mn.MAML(checkpoint=True)], ids=str)
def test_the_others_that_differentiate_twice_say_the_same(estimator: object) -> None:
    model, _ = both(ROWS["fused_attention"])
    with untouched(model), pytest.raises(mn.LossError, match=r"Use FOBMAML.*is not implemented"):
        gradient(model, solver=mn.GradientDescent(2, lr=LR), estimator=estimator, execution="vectorized")


def second_derivative(model: nn.Module) -> None:
    """What an implementation of MAML without vmap does: a loop over the tasks, torch.autograd through the step."""
    theta = dict(model.named_parameters())
    task = mn.Batch(*(x[0] for x in tasks().support))

    def at(phi: dict[str, Tensor]) -> Tensor:
        return squared_error(lambda x: torch.func.functional_call(model, phi, (x,)), task)

    slopes = torch.autograd.grad(at(theta), list(theta.values()), create_graph=True)
    phi = {name: p - LR * slope for (name, p), slope in zip(theta.items(), slopes, strict=True)}
    torch.autograd.grad(at(phi), list(theta.values()))


RAISE, RUN = ["fused_attention", "checkpoint_reentrant"], ["checkpoint", "lstm", "gru", "own_function"]
(RUN if NO_FORMULA is None else RAISE).append("grid_sample")


@pytest.mark.parametrize("name", RAISE)
def test_maml_by_hand_raises_too(name: str) -> None:
    with pytest.raises(RuntimeError, match=r"is not implemented|use_reentrant"):
        second_derivative(both(ROWS[name])[0])


@pytest.mark.parametrize("name", RUN)
def test_maml_by_hand_runs_here_on_a_cpu(name: str) -> None:
    """One task at a time and without vmap these can be differentiated twice; cuDNN's LSTM and GRU cannot. Of one's own
    function torch.autograd.grad leaves the second derivative out, and says nothing."""
    second_derivative(both(ROWS[name])[0])
