r"""Strided one-dimensional convolutions of stacked tasks as matrix products, on the CPU.

Under vmap with weights of their own the tasks' convolutions become one grouped convolution, which is slow there.
Written channels last, for one task and with the stride s, padding and dilation d of the layer,

    y[n, l, o] = b[o] + Σ_{j < k, c} x[n, s l + d j, c] w[o, c, j],

it is one product of the ``[N L', k C]`` matrix of all windows with the ``[k C, O]`` weights, which vmap makes a batched
product of all tasks. The windows are k shifted slices side by side: differentiable as often as wanted, and k / s times
the memory of the input. The result ``[N, O, L']`` stays channels last in memory, as the next one takes it.

vmap's convolution over this, in time, of networks of three convolutions and a linear layer, 5 to 50 tasks (float32, one
core, noise of a tenth), for the gradient of a stack and for a gradient of that gradient:

    25 channels, length 40, kernels 5, 3, 3 or 3, 3, 3, stride 2 (MNIST-1D)   1.3 to 1.4    1.5 to 1.9
    the same, 4 tasks of 5 examples; or 8 channels                            1.1           1.5
    64 channels                                                               1.0 to 1.1    1.2 to 1.5
    25 channels, length 160                                                   .9 to 1.2     1.3 to 1.4
    25 channels, length 40, kernels of 1, stride 1                            1.1           1.3
    25 channels, length 40, kernels of 3, stride 1                            1.1 to 1.2    .9 to 1.4
    8 or 64 channels, length 40, kernels of 3, stride 1                       .7 to .9      .7 to .9

The windows are kept for the backward pass: a meta-step of that first network peaks at 1.5 to 1.7 times the live bytes
(10 tasks; MAML over 16 steps 54 MB for 37, FO-B-MAML 10 for 6), which ``WINDOWS`` bounds a layer and evaluation.

Two-dimensional ones lose, as their windows are k² times the input: .2 to .6 in the gradient of a layer with the 3 x 3
kernels of Conv4, on 28 x 28 down to 3 x 3 pixels. They are left to vmap.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C._functorch import get_unwrapped, is_batchedtensor
from torch.overrides import TorchFunctionMode

OVERLAP = 2.5
"""The largest k / s for which windows are written out: above it the copies cost what the product saves."""
WINDOWS = 2**20
"""The most numbers in the windows of all lanes together (4 MB in float32): the largest that was measured to win."""


_LAYOUTS = re.compile(r"\bview\b|strides?\b|contiguous")
"""In what PyTorch says where a function can not take a tensor as it lies in memory."""


class LayoutError(Exception):
    """The model takes a view that only a contiguous convolution has: it is PyTorch's to run.

    A copy in the place of the view would lose what the model writes to it. No RuntimeError, which a model may catch.
    """


class MatrixConvolutions(TorchFunctionMode):
    """While it is active, a convolution that gains by it is a matrix product; every other function is what it was.

    What is rewritten: ``conv1d`` on the CPU in float32 or float64, without groups or autocast, where every lane of a
    vmap has weights of its own and the windows are within ``OVERLAP`` and ``WINDOWS``; not what torch.compile traces,
    which makes code of its own.

    Raises:
        LayoutError: A function of the model can not take the result, which is not contiguous.
    """

    def __init__(self) -> None:
        super().__init__()
        self._used = False

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.conv1d and not torch.compiler.is_compiling():
            found = _as_product(*args, **kwargs)
            if found is not None:
                self._used = True
                return found
        try:
            return func(*args, **kwargs)
        except RuntimeError as error:
            if self._used and _LAYOUTS.search(str(error)):
                raise LayoutError(str(error)) from error
            raise


def convolutions_of(model: nn.Module) -> Callable[[], AbstractContextManager[object]]:
    """Makes the context to call a stack's model in.

    It does nothing where the model has no such layer; nor where a module is compiled, as torch.compile would compile
    the mode as well, once for every function that the model calls.
    """
    modules = list(model.modules())
    compiled = any(hasattr(module, "_orig_mod") or module._compiled_call_impl is not None for module in modules)
    layers = any(isinstance(module, nn.Conv1d) for module in modules)
    return MatrixConvolutions if layers and not compiled else nullcontext


def _as_product(
    input: Tensor,  # noqa: A002
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, ...] = 1,
    padding: int | tuple[int, ...] | str = 0,
    dilation: int | tuple[int, ...] = 1,
    groups: int = 1,
) -> Tensor | None:
    """``conv1d`` of its arguments; None where it is better, or for PyTorch to refuse, as it is."""
    if groups != 1 or not is_batchedtensor(weight) or not _plain(input, weight, bias):
        return None
    if weight.ndim != 3 or input.ndim not in (2, 3) or input.shape[-2] != weight.shape[1]:
        return None
    kernel, step, spread = weight.shape[-1], _one(stride), _one(dilation)
    if not 1 <= kernel <= OVERLAP * step or spread < 1 or (padding == "same" and step != 1):
        return None
    reach = spread * (kernel - 1)
    if isinstance(padding, str):
        if padding not in ("same", "valid"):
            return None
        left, right = (reach // 2, reach - reach // 2) if padding == "same" else (0, 0)
    else:
        left = right = _one(padding)
    last = input.shape[-1] + left + right - reach - 1  # where the last window may begin
    if left < 0 or last < 0 or input.numel() == 0:
        return None
    length = last // step + 1
    batch = input if input.ndim == 3 else input.unsqueeze(0)
    rows, outputs = len(batch), weight.shape[0]
    if _lanes(weight) * rows * length * kernel * weight.shape[1] > WINDOWS:
        return None
    padded = batch.transpose(1, 2)
    if left or right:
        padded = F.pad(padded, (0, 0, left, right))
    span = step * (length - 1) + 1
    slices = [padded[:, start : start + span : step] for start in range(0, reach + 1, spread)]
    windows = (slices[0] if kernel == 1 else torch.cat(slices, -1)).flatten(0, 1)
    matrix = weight.transpose(1, 2).reshape(outputs, -1).t()
    product = windows @ matrix if bias is None else torch.addmm(bias, windows, matrix)
    result = product.reshape(rows, length, outputs).transpose(1, 2)
    return result if input.ndim == 3 else result.squeeze(0)


def _plain(*tensors: Tensor | None) -> bool:
    """Real numbers of one usual precision, on the CPU."""
    given = [tensor for tensor in tensors if tensor is not None]
    kinds = {tensor.dtype for tensor in given}
    return (
        len(kinds) == 1
        and kinds <= {torch.float32, torch.float64}
        and all(tensor.device.type == "cpu" for tensor in given)
        and not torch.is_autocast_enabled("cpu")
    )


def _one(size: int | tuple[int, ...]) -> int:
    return size if isinstance(size, int) else size[0]


def _lanes(weight: Tensor) -> int:
    """How many weights there are, over all levels of vmap."""
    whole = weight
    while is_batchedtensor(whole):
        whole = get_unwrapped(whole)
    return whole.numel() // max(weight.numel(), 1)
