"""Meta-optimizers against their formulas written out."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

import metanudge as mn

SHAPES = [(3, 2), (4,), ()]


def parameters() -> list[nn.Parameter]:
    g = torch.Generator().manual_seed(20)
    return [nn.Parameter(torch.randn(shape, generator=g, dtype=torch.float64)) for shape in SHAPES]


def gradients(steps: int) -> list[list[Tensor]]:
    """Of very different sizes."""
    g = torch.Generator().manual_seed(21)
    return [[10.0 ** (k - 2) * torch.randn(s, generator=g, dtype=torch.float64) for s in SHAPES] for k in range(steps)]


def norm(tensors: list[Tensor]) -> float:
    return math.sqrt(sum(float(t.square().sum()) for t in tensors))


def give(params: list[nn.Parameter], grads: list[Tensor | None]) -> None:
    for parameter, gradient in zip(params, grads, strict=True):
        parameter.grad = None if gradient is None else gradient.clone()


def values(params: list[nn.Parameter]) -> list[Tensor]:
    return [p.detach().clone() for p in params]


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_normalized_sgd_over_several_steps(momentum: float) -> None:
    """m <- beta m + (1 - beta) g;  theta <- theta - lr m / ||m||, one norm over everything."""
    params, lr = parameters(), 0.3
    optimizer = mn.optim.NormalizedSGD(params, lr=lr, momentum=momentum)
    theta, m = values(params), [torch.zeros_like(p) for p in params]
    for grads in gradients(5):
        give(params, grads)
        optimizer.step()
        m = [momentum * a + (1 - momentum) * g for a, g in zip(m, grads, strict=True)]
        theta = [t - lr * a / norm(m) for t, a in zip(theta, m, strict=True)]
        for p, t in zip(params, theta, strict=True):
            torch.testing.assert_close(p.detach(), t, rtol=1e-12, atol=1e-14)


def test_normalized_sgd_steps_have_the_length_of_lr() -> None:
    params = parameters()
    optimizer = mn.optim.NormalizedSGD(params, lr=0.3, momentum=0.9)
    for grads in gradients(4):
        before = values(params)
        give(params, grads)
        optimizer.step()
        assert norm([a - b for a, b in zip(before, values(params), strict=True)]) == pytest.approx(0.3, rel=1e-12)


def test_normalized_sgd_is_not_sngm() -> None:
    """It averages g, not g / ||g||: a huge gradient stays in the momentum."""
    w = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    optimizer = mn.optim.NormalizedSGD([w], lr=1.0, momentum=0.5)
    for gradient in ([1e6, 0.0], [0.0, 1.0]):
        w.grad = torch.tensor(gradient, dtype=torch.float64)
        optimizer.step()
    assert w[0].item() == pytest.approx(-2, abs=1e-5)  # two steps along the first axis
    assert abs(w[1].item()) < 1e-5


def test_clipped_sgd_over_several_steps() -> None:
    """theta <- theta - min(lr, max_step / ||g||) g."""
    params, lr, longest = parameters(), 0.3, 0.5
    optimizer, theta, clipped = mn.optim.ClippedSGD(params, lr=lr, max_step=longest), values(params), []
    for grads in gradients(5):
        give(params, grads)
        optimizer.step()
        size = min(lr, longest / norm(grads))
        clipped.append(size < lr)
        theta = [t - size * g for t, g in zip(theta, grads, strict=True)]
        for p, t in zip(params, theta, strict=True):
            torch.testing.assert_close(p.detach(), t, rtol=1e-12, atol=1e-14)
    assert any(clipped)
    assert not all(clipped)


def make_normalized(params: object) -> torch.optim.Optimizer:
    return mn.optim.NormalizedSGD(params, lr=0.3, momentum=0.9)


def make_clipped(params: object) -> torch.optim.Optimizer:
    return mn.optim.ClippedSGD(params, lr=0.3, max_step=0.5)


BOTH = pytest.mark.parametrize("make", [make_normalized, make_clipped], ids=["normalized", "clipped"])


def test_groups_have_their_own_settings_and_one_norm() -> None:
    a, b = parameters()[:2]
    ga, gb = gradients(3)[2][:2]
    total = norm([ga, gb])
    for make, sizes in (
        (lambda g: mn.optim.NormalizedSGD(g, lr=0.1, momentum=0.0), (0.1 / total, 0.02 / total)),
        (lambda g: mn.optim.ClippedSGD(g, lr=0.1, max_step=1e-3), (1e-3 / total, 0.5e-3 / total)),
    ):
        one, two = (nn.Parameter(p.detach().clone()) for p in (a, b))
        optimizer = make([{"params": [one]}, {"params": [two], "lr": 0.02, "max_step": 0.5e-3}])
        give([one, two], [ga, gb])
        optimizer.step()
        torch.testing.assert_close(one.detach(), a.detach() - sizes[0] * ga, rtol=1e-12, atol=0)
        torch.testing.assert_close(two.detach(), b.detach() - sizes[1] * gb, rtol=1e-12, atol=0)


@BOTH
def test_zero_gradients_move_nothing(make: object) -> None:
    params = parameters()
    optimizer, before = make(params), values(params)
    give(params, [torch.zeros_like(p) for p in params])
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, values(params), strict=True))


@BOTH
def test_parameters_without_gradient_stay_and_do_not_count(make: object) -> None:
    params = parameters()
    grads = gradients(1)[0]
    optimizer = make(params)
    give(params, [grads[0], None, grads[2]])
    before = values(params)
    optimizer.step()
    only = [nn.Parameter(before[0].clone()), nn.Parameter(before[2].clone())]
    reference = make(only)
    give(only, [grads[0], grads[2]])
    reference.step()
    assert torch.equal(params[1].detach(), before[1])
    assert torch.equal(params[0], only[0])
    assert torch.equal(params[2], only[1])
    optimizer.zero_grad()
    before = values(params)
    optimizer.step()  # no gradient anywhere
    assert all(torch.equal(a, b) for a, b in zip(before, values(params), strict=True))


@BOTH
def test_gradients_are_not_changed(make: object) -> None:
    params, grads = parameters(), gradients(1)[0]
    optimizer = make(params)
    give(params, grads)
    optimizer.step()
    assert all(torch.equal(p.grad, g) for p, g in zip(params, grads, strict=True))


@BOTH
def test_state_dict_round_trip(make: object) -> None:
    """Saved in the middle and loaded into a fresh optimizer: the same path from there."""
    steps = gradients(6)
    params = parameters()
    optimizer = make(params)
    for grads in steps[:3]:
        give(params, grads)
        optimizer.step()
    saved, copies = copy.deepcopy(optimizer.state_dict()), [nn.Parameter(p.detach().clone()) for p in params]
    resumed = make(copies)
    resumed.load_state_dict(saved)
    for grads in steps[3:]:
        for each, using in ((params, optimizer), (copies, resumed)):
            give(each, grads)
            using.step()
    assert all(torch.equal(a, b) for a, b in zip(params, copies, strict=True))


@BOTH
def test_a_scheduler_sets_the_step(make: object) -> None:
    w = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = make([w])
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 0.5**k)
    lengths = []
    for _ in range(4):
        before = w.item()
        w.grad = torch.ones(1, dtype=torch.float64)
        optimizer.step()
        scheduler.step()
        lengths.append(before - w.item())
    assert lengths == pytest.approx([0.3, 0.15, 0.075, 0.0375], rel=1e-12)


@BOTH
def test_a_closure_is_evaluated_with_gradients_and_returned(make: object) -> None:
    w = nn.Parameter(torch.ones(2, dtype=torch.float64))
    optimizer = make([w])

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = w.square().sum()
        loss.backward()
        return loss

    assert float(optimizer.step(closure).detach()) == 2.0
    assert (w < 1).all()
    assert optimizer.step() is None


@BOTH
def test_mixed_precision_parameters(make: object) -> None:
    a, b = nn.Parameter(torch.ones(2, dtype=torch.float64)), nn.Parameter(torch.ones(2, dtype=torch.float32))
    optimizer = make([a, b])
    a.grad, b.grad = torch.ones_like(a), torch.ones_like(b)
    optimizer.step()
    assert (a.dtype, b.dtype) == (torch.float64, torch.float32)
    torch.testing.assert_close(a.detach().float(), b.detach())
    assert (a < 1).all()


@BOTH
def test_both_are_torch_optimizers_that_minimise(make: object) -> None:
    """A stretched quadratic, with decreasing steps."""
    w = nn.Parameter(torch.tensor([5.0, -3.0], dtype=torch.float64))
    optimizer = make([w])
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.98)
    assert isinstance(optimizer, torch.optim.Optimizer)
    for _ in range(300):
        optimizer.zero_grad()
        (w * torch.tensor([1.0, 4.0], dtype=torch.float64) * w).sum().div(2).backward()
        optimizer.step()
        scheduler.step()
    assert float(w.detach().norm()) < 0.02


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: mn.optim.NormalizedSGD(p, lr=0.0), "lr must be a finite number above 0, got 0.0"),
        (lambda p: mn.optim.NormalizedSGD(p, lr=-1.0), "lr must be"),
        (lambda p: mn.optim.NormalizedSGD(p, lr=float("nan")), "lr must be"),
        (lambda p: mn.optim.NormalizedSGD(p, lr=0.1, momentum=1.0), r"momentum must be a number in \[0, 1\)"),
        (lambda p: mn.optim.NormalizedSGD(p, lr=0.1, momentum=-0.1), "momentum must be"),
        (lambda p: mn.optim.ClippedSGD(p, lr=0.1, max_step=0.0), "max_step must be"),
        (lambda p: mn.optim.ClippedSGD(p, lr=float("inf"), max_step=1.0), "lr must be"),
    ],
)
def test_bad_settings_are_refused(make: object, words: str) -> None:
    with pytest.raises(mn.SettingsError, match=words):
        make(parameters())


@pytest.mark.parametrize("size", [1e-6, 1e-3, 1.0, 1e4])
@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_normalized_steps_in_half_precision(size: float, momentum: float) -> None:
    """A constant gradient of n equal entries: every parameter moves by lr / sqrt(n)."""
    parameter = nn.Parameter(torch.ones(64, dtype=torch.float16))
    optimizer = mn.optim.NormalizedSGD([parameter], lr=0.5, momentum=momentum)
    parameter.grad = torch.full_like(parameter, size)
    optimizer.step()
    assert torch.equal(parameter.detach(), torch.full_like(parameter, 1 - 0.5 / 8))


@pytest.mark.parametrize("size", [1e-42, 1e-30, 1e-20, 1.0, 1e25, 3e38])
def test_steps_of_gradients_that_have_no_square(size: float) -> None:
    parameter = nn.Parameter(torch.zeros(3, 3))
    optimizer = mn.optim.NormalizedSGD([parameter], lr=0.3, momentum=0.0)
    parameter.grad = torch.full_like(parameter, size)
    optimizer.step()
    torch.testing.assert_close(parameter.detach(), torch.full_like(parameter, -0.1))
    clipped = nn.Parameter(torch.zeros(3, 3))
    clipped.grad = torch.full_like(clipped, size)
    mn.optim.ClippedSGD([clipped], lr=1e-3, max_step=0.3).step()
    torch.testing.assert_close(clipped.detach(), torch.full_like(clipped, -min(1e-3 * size, 0.1)))


def test_clipped_steps_in_half_precision() -> None:
    """64 entries of 1e4 have no norm in float16; a step of 1e-6 is lost beside 1."""
    for size, expected in ((1e4, 1 - 0.5 / 8), (1e-6, 1.0)):
        parameter = nn.Parameter(torch.ones(64, dtype=torch.float16))
        parameter.grad = torch.full_like(parameter, size)
        mn.optim.ClippedSGD([parameter], lr=1.0, max_step=0.5).step()
        assert torch.equal(parameter.detach(), torch.full_like(parameter, expected))
