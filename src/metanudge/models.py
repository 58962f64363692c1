"""Small models by name, for the command: each a function of plain settings, made of a ``body`` and a linear ``head``.

So ``adapt_only = "head"`` is ANIL and ``adapt_only = "body"`` is BOIL.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from itertools import pairwise
from typing import Literal

from torch import nn

from metanudge.errors import SettingsError
from metanudge.settings import check_steps

Activation = Literal["relu", "tanh", "gelu", "silu"]
Norm = Literal["batch", "group", "none"]
ACTIVATIONS: dict[Activation, type[nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh, "gelu": nn.GELU, "silu": nn.SiLU}


def mlp(
    inputs: int, outputs: int, hidden: tuple[int, ...] = (40, 40), activation: Activation = "tanh", dropout: float = 0.0
) -> nn.Sequential:
    """Make linear layers with an activation between; no hidden layer gives a linear model.

    Args:
        inputs: Features of the inputs ``[n, inputs]``; further axes are flattened.
        outputs: Of ``[n, outputs]``.
        hidden: Widths of the hidden layers.
        activation: "relu", "tanh", "gelu" or "silu".
        dropout: Share of hidden units dropped in train mode.

    Example:
        >>> import metanudge as mn
        >>> [tuple(parameter.shape) for parameter in mn.MODELS["mlp"](1, 1, hidden=(40,)).parameters()]
        [(40, 1), (40,), (1, 40), (1,)]
    """
    for name, size in (("inputs", inputs), ("outputs", outputs), *(("hidden", width) for width in hidden)):
        check_steps(size, name)
    layers: list[nn.Module] = [nn.Flatten()]
    for width, following in pairwise((inputs, *hidden)):
        layers += [nn.Linear(width, following), _activation(activation)]
        if dropout:
            layers.append(nn.Dropout(dropout))
    return _whole(layers, (inputs, *hidden)[-1], outputs)


def cnn1d(
    outputs: int, inputs: int = 1, channels: int = 25, length: int = 40, activation: Activation = "relu"
) -> nn.Sequential:
    """Make the three strided convolutions of the MNIST-1D paper and a linear head, without normalisation.

    Args:
        outputs: Of ``[n, outputs]``.
        inputs: Channels of the inputs ``[n, inputs, length]``.
        channels: Of every convolution.
        length: Of the signals.
        activation: As of ``mlp``.

    Source: Greydanus & Kobak, Scaling Down Deep Learning with MNIST-1D, ICML 2024.
    """
    for name, size in (("outputs", outputs), ("inputs", inputs), ("channels", channels)):
        check_steps(size, name)
    layers: list[nn.Module] = []
    for place, kernel in enumerate((5, 3, 3)):
        layers += [
            nn.Conv1d(channels if place else inputs, channels, kernel, stride=2, padding=1),
            _activation(activation),
        ]
        length = (length + 2 - kernel) // 2 + 1
    if length < 1:
        raise SettingsError("length is too small for three convolutions of stride 2")
    return _whole([*layers, nn.Flatten()], channels * length, outputs)


def conv4(
    outputs: int,
    inputs: int = 1,
    channels: int = 64,
    size: int = 28,
    norm: Norm = "group",
    activation: Activation = "relu",
) -> nn.Sequential:
    """Make the four blocks (convolution 3 x 3, norm, activation, 2 x 2 pooling) of few-shot learning and a linear head.

    Args:
        outputs: Of ``[n, outputs]``.
        inputs: Channels of the images ``[n, inputs, size, size]``: 1 for Omniglot, 3 for mini-ImageNet.
        channels: Of every convolution.
        size: Width and height of the images: 28 for Omniglot, 84 for mini-ImageNet.
        norm: "batch" needs a policy, ``batch_norm`` of the learner; "group" is GroupNorm of up to 8 groups.
        activation: As of ``mlp``.

    Source: Vinyals et al., Matching Networks for One Shot Learning, NeurIPS 2016.
    """
    for name, number in (("outputs", outputs), ("inputs", inputs), ("channels", channels), ("size", size)):
        check_steps(number, name)
    if size < 16:
        raise SettingsError(f"size must be at least 16, as it is halved four times, got {size}")
    norms: dict[str, Callable[[], nn.Module]] = {
        "batch": lambda: nn.BatchNorm2d(channels),
        "group": lambda: nn.GroupNorm(max(n for n in range(1, 9) if channels % n == 0), channels),
        "none": nn.Identity,
    }
    if norm not in norms:
        raise SettingsError(f"norm must be one of {', '.join(norms)}, got {norm!r}")
    blocks: list[nn.Module] = []
    for place in range(4):
        convolution = nn.Conv2d(channels if place else inputs, channels, 3, padding=1)
        blocks += [convolution, norms[norm](), _activation(activation), nn.MaxPool2d(2)]
        size //= 2
    return _whole([*blocks, nn.Flatten()], channels * size * size, outputs)


def _whole(body: list[nn.Module], features: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(OrderedDict(body=nn.Sequential(*body), head=nn.Linear(features, outputs)))


def _activation(name: Activation) -> nn.Module:
    if name not in ACTIVATIONS:
        raise SettingsError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {name!r}")
    return ACTIVATIONS[name]()


MODELS: dict[str, Callable[..., nn.Module]] = {"mlp": mlp, "cnn1d": cnn1d, "conv4": conv4}
