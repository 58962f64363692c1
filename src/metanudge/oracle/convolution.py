r"""One-dimensional convolutions of stacked tasks as matrix products, in compiled programs on the CPU.

Under vmap with weights of their own the tasks' convolutions become one grouped convolution, which is slow there and
which torch.compile leaves as it is. Written channels last, for one task and with the stride s, padding and dilation d
of the layer,

    y[n, l, o] = b[o] + Σ_{j < k, c} x[n, s l + d j, c] w[o, c, j],

it is one product of the ``[N L', k C]`` matrix of all windows with the ``[k C, O]`` weights, which vmap makes a batched
product of all tasks, and the compiler writes the windows in one go with what comes before.

Milliseconds of a stacked gradient of 10 tasks of 25 examples of length 40, three convolutions (the last: two) and a
linear layer, float32, one core: as it is, compiled, compiled with matrix products.

    25 channels, kernels 5, 3, 3, stride 2 (MNIST-1D)     5.1    3.3    1.0
    64 channels, kernels of 3, stride 2                   8.2    6.6    2.9
    25 channels, kernels of 3, stride 1                  10.8   11.5    4.3
    64 channels, kernels of 3, stride 1                  22.4   18.7   16.0
    25 channels, kernels of 7, stride 2                   4.3    3.4    1.3

The windows are k / s times the input and are kept for the backward pass, which ``WINDOWS`` bounds. Not compiled, the
gain was 1.3 at best and the memory 1.6 times as much; in two dimensions windows are k² times the input, and lost (.2 to
.6 on the 3 x 3 kernels of Conv4): both are left to PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C._functorch import get_unwrapped, is_batchedtensor
from torch.overrides import TorchFunctionMode

WINDOWS = 2**21
"""The most numbers in the windows of all lanes together: 8 MB in float32."""


class MatrixConvolutions(TorchFunctionMode):
    """While it is active, a convolution that gains by it is a matrix product; every other function is what it was.

    What is rewritten: ``conv1d`` on the CPU in float32 or float64, without groups, where every lane of a vmap has
    weights of its own and the windows are within ``WINDOWS``.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        found = _as_product(*args, **kwargs) if func is torch.conv1d else None
        return func(*args, **kwargs) if found is None else found


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
    outputs, channels, kernel = weight.shape
    step, spread = _one(stride), _one(dilation)
    if min(kernel, step, spread) < 1 or (padding == "same" and step != 1):
        return None
    reach = spread * (kernel - 1)
    if isinstance(padding, str):
        left = {"valid": 0, "same": reach // 2}.get(padding, -1)
        right = reach - left if padding == "same" else left
    else:
        left = right = _one(padding)
    last = input.shape[-1] + left + right - reach - 1  # where the last window may begin
    if left < 0 or last < 0:
        return None
    batch = input if input.ndim == 3 else input.unsqueeze(0)
    rows, length = len(batch), last // step + 1
    lanes = get_unwrapped(weight).numel() // max(weight.numel(), 1)
    if lanes * rows * length * kernel * channels > WINDOWS:
        return None
    padded = batch.transpose(1, 2)
    if left or right:
        padded = F.pad(padded, (0, 0, left, right))
    span = step * (length - 1) + 1
    slices = [padded[:, start : start + span : step] for start in range(0, reach + 1, spread)]
    # of one slice, torch.cat has strides when it is compiled that it had not when it was traced
    windows = (slices[0] if kernel == 1 else torch.cat(slices, -1)).flatten(0, 1)
    matrix = weight.transpose(1, 2).flatten(1).t()
    product = windows @ matrix if bias is None else torch.addmm(bias, windows, matrix)
    result = product.reshape(rows, length, outputs).transpose(1, 2).contiguous()  # as a convolution's is
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
