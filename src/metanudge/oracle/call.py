"""A user's function of the model, called with other tensors, and what is told where vmap cannot run it."""

from __future__ import annotations

import copy
import re
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules import rnn

from metanudge.errors import UnmappableError
from metanudge.oracle.common import scalar_loss
from metanudge.oracle.convolution import MatrixConvolutions
from metanudge.oracle.written import Written
from metanudge.types import Batch, LossFunction

_NOT_FOR_STACKS: tuple[tuple[Callable[[], bool], Callable[[bool], object]], ...] = (
    (torch.backends.mha.get_fastpath_enabled, torch.backends.mha.set_fastpath_enabled),
    (torch.backends.cuda.cudnn_sdp_enabled, torch.backends.cuda.enable_cudnn_sdp),
    (torch.backends.cuda.mem_efficient_sdp_enabled, torch.backends.cuda.enable_mem_efficient_sdp),
)
"""Of torch's switches: what one says, and how it is set."""


class Call(nn.Module):
    """``function(model, batch)`` as a module, so that functional_call can swap what the model holds.

    Attributes:
        model: The user's model.
        own_buffers: Its buffers, shared ones once.
        written: What its modules held, and hold again after every evaluation.
        names: All names of each parameter and buffer within this module, several where it is tied. (Left to
            functional_call, finding them costs more than a small model's forward pass.)
        draws: Whether a forward pass has been seen to draw random numbers.
        steady: Whether it may not: a compiled one would not draw the same for every node.
        frozen: Tensors in the place of parameters that are neither adapted nor shared; none to take the model's.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.draws = self.steady = False
        self.frozen: dict[str, Tensor] = {}
        self.own_buffers = dict(model.named_buffers())
        tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
        first: dict[int, str] = {}
        self.names: dict[str, list[str]] = {}
        for name, tensor in tensors:
            self.names.setdefault(first.setdefault(id(tensor), name), []).append(f"model.{name}")
        self.written = Written.over(model)

    def forward(self, function: LossFunction, batch: Batch) -> Tensor:
        """Evaluate."""
        return scalar_loss(function, self.model, batch)

    def at(self, tensors: Mapping[str, Tensor], function: LossFunction, batch: Batch) -> Tensor:
        """Evaluate with ``tensors`` in the place of the model's own."""
        held = self.frozen | dict(tensors)
        everywhere = {name: tensor for key, tensor in held.items() for name in self.names[key]}
        try:
            value: Tensor = functional_call(self, everywhere, (function, batch), tie_weights=False)
        finally:
            self.written.undo()
        return value

    @contextmanager
    def layers(self) -> Iterator[None]:
        """To call the model in: layers run what vmap can, and autograd after it.

        In eval mode transformers take a path of their own that has no derivative, wherever they see no parameter that
        asks for one, as behind vmap. Of a GPU's attention kernels, cuDNN's gives NaN for stacks and the
        memory-efficient one has no gradient there: flash attention, and plain operations, are left. (The switches are
        the process's: no other thread should call a model in the meantime.) Convolutions of stacks are matrix products
        where the model is compiled.
        """
        before = [enabled() for enabled, _ in _NOT_FOR_STACKS]
        try:
            for _, enable in _NOT_FOR_STACKS:
                enable(False)
            with MatrixConvolutions() if self.steady else nullcontext():
                yield
        finally:
            for was, (_, enable) in zip(before, _NOT_FOR_STACKS, strict=True):
                enable(was)

    def holding(self, buffers: dict[str, Tensor], frozen: dict[str, Tensor]) -> Call:
        """The same with other tensors, drawing nothing."""
        other = copy.copy(self)
        other.own_buffers, other.frozen, other.draws, other.steady = buffers, frozen, False, True
        return other


_UNABLE = re.compile(
    "vmap|batching rule|data pointer of Tensor|no available kernel|no viable backend|implemented for sparse tensors"
    "|functorch transform|does not require grad and does not have a grad_fn",
    re.IGNORECASE,
)


@contextmanager
def explained() -> Iterator[None]:
    """Tell what to do where vmap cannot run a model or a loss."""
    try:
        yield
    except RuntimeError as error:
        if not _UNABLE.search(str(error)):
            raise
        raise UnmappableError(f"the model, the loss or the metric {_does(error)}. PyTorch said: {error}") from error


_NUMBER = (
    "out of a tensor, which torch.func.vmap cannot do for many tasks at once. A loss or metric has to return the "
    "tensor itself: through a number no gradient reaches the parameters, in either execution. Leave it out, or where "
    'its value is only looked at (a print, a branch, a constant), give the MetaLearner execution="in_place"'
)


def _does(error: RuntimeError) -> str:
    """What vmap cannot run, and what to do about it; nothing that would be refused in place again."""
    said, frame = str(error), traceback.extract_tb(error.__traceback__)[-1]
    if "item()" in said:
        return f"calls .item(), float(), int() or .tolist() to take a number {_NUMBER}"
    if "data pointer" in said and frame.filename != rnn.__file__:  # cuDNN's recurrent layers say the same
        return f"calls .numpy() to take an array {_NUMBER}, and .detach() before .numpy()"
    if "implemented for sparse tensors" in said:
        return (
            "gives sparse gradients (nn.Embedding(sparse=True)), which torch.func.vmap cannot take for many tasks at "
            'once. Leave out sparse=True, or give the MetaLearner execution="in_place", which makes them dense'
        )
    if "functorch transform" in said or "does not require grad" in said:
        return (
            "takes a derivative itself (torch.autograd.grad, requires_grad_()), which torch.func.vmap does not allow. "
            'Give the MetaLearner execution="in_place", which does, or take it by torch.func.grad, jacrev or jvp'
        )
    if "control flow" in said:
        return (
            "branches on the value of a tensor (if, while), which differs between the tasks that torch.func.vmap runs "
            'at once. Choose by torch.where, or give the MetaLearner execution="in_place", for one task at a time'
        )
    if "there exists a Tensor `other`" in said:
        return (
            "writes what differs between tasks into a tensor that they share, such as torch.zeros(n).index_add_(...), "
            "which torch.func.vmap cannot do for many tasks at once. Take the form that makes a new tensor "
            '(index_add), begin with one of the task (x.new_zeros(n)), or give the MetaLearner execution="in_place"'
        )
    return (
        "uses an operation that torch.func.vmap cannot run for many tasks at once, as it has no batching rule "
        "(nn.GRU, nn.LSTM and nn.RNN are such, and others, which PyTorch names below). Give the MetaLearner "
        'execution="in_place", which runs any model, or do without it'
    )
