"""Gradients of stacks as compiled programs: traced once a form of their inputs, run without Python or autograd."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_flatten, tree_unflatten

from metanudge.errors import LossError
from metanudge.types import PyTree
from metanudge.warned import warn

Program: TypeAlias = Callable[..., Sequence[Tensor]]
MANY = 16
"""Programs of which a warning tells: a training on stacks of one form has three or four."""


class Programs:
    """The programs of a learner, kept from step to step. What they were traced with but tensors is frozen in them.

    Tensors that are neither parameters, buffers nor tasks are held by reference.
    """

    def __init__(self) -> None:
        self.known: dict[Hashable, Program] = {}

    def __reduce__(self) -> tuple[type[Programs], tuple[()]]:
        """Copies begin empty: they are of another model."""
        return Programs, ()

    def bind(self, fixed: PyTree, state: Hashable) -> Bound:
        """For the gradients of one stack.

        Args:
            fixed: Tensors that all of them read.
            state: Whatever else a program depends on.
        """
        return Bound(self.known, fixed, state)


class Bound:
    """Programs with what is the same in every gradient of a stack."""

    def __init__(self, known: dict[Hashable, Program], fixed: PyTree, state: Hashable) -> None:
        self._known = known
        leaves, self._structure = tree_flatten(fixed)
        self._leaves = _plain(leaves)
        self._key = (state, _autocast(self._leaves), str(self._structure), _forms(self._leaves))

    def __call__(
        self, name: Hashable, function: Callable[[Sequence[Tensor], PyTree], Sequence[Tensor]], given: Sequence[Tensor]
    ) -> Sequence[Tensor]:
        """``function(given, fixed)``, by its program.

        Args:
            name: Of the function; what has equal names, and tensors of equal form, is the same program.
            function: A pure function of its tensors.
            given: Its tensors.

        Raises:
            LossError: It can not be traced, or not compiled.
        """
        leaves = _plain(given)
        key, number = (name, _forms(leaves), self._key), len(leaves)
        program = self._known.get(key)
        if program is not None:
            return _run(program, [*leaves, *self._leaves])

        def flat(*tensors: Tensor) -> Sequence[Tensor]:
            return function(tensors[:number], tree_unflatten(tensors[number:], self._structure))

        program, found = _compiled(flat, [*leaves, *self._leaves])
        self._known[key] = program
        if len(self._known) == MANY:
            warn(
                f"compile=True has compiled {MANY} gradients by now. Every number of tasks (a smaller last stack too), "
                "every shape and every value of a module's numbers and modes has programs of its own: give stacks of "
                "one form (drop_last=True), keep what changes in a buffer, or leave compile out",
                UserWarning,
            )
        return found


def build(traced: nn.Module) -> Program:
    """Make a traced function fast."""
    return cast(Program, torch.compile(traced, dynamic=False, fullgraph=True))


def _plain(leaves: Sequence[Tensor]) -> list[Tensor]:
    """Each a tensor of its own, without graph and strides of its own, for which a program would be compiled again."""
    return [leaf.detach().reshape(-1).view(leaf.shape) for leaf in leaves]


def _forms(leaves: Sequence[Tensor]) -> tuple[Hashable, ...]:
    return tuple((leaf.shape, leaf.dtype, leaf.device) for leaf in leaves)


def _compiled(function: Callable[..., Sequence[Tensor]], tensors: Sequence[Tensor]) -> tuple[Program, Sequence[Tensor]]:
    """The program, and what it gives."""
    copies = [tensor.clone() for tensor in tensors]  # which it may try to write to
    before = [copy._version for copy in copies]
    try:
        traced = make_fx(function)(*copies)
    except RuntimeError as error:
        if "dynamo-optimized" in str(error):
            raise LossError(
                "with compile=True no part of the model or the loss may be compiled by torch.compile already; give it "
                f"as it was, or leave compile out. PyTorch said: {error}"
            ) from error
        if "tracing tensor" not in str(error):
            raise
        raise LossError(
            "with compile=True neither the model nor the loss may take a number out of a tensor (.item(), float(), if "
            f"or while on its value); leave compile out. PyTorch said: {error}"
        ) from error
    if [copy._version for copy in copies] != before:
        raise LossError(
            "with compile=True neither the model nor the loss may write to the batch or to frozen parameters "
            "(x += 1, nn.ReLU(inplace=True) on the inputs); write to a copy, or leave compile out"
        )
    del copies
    program = build(traced)
    try:
        return program, _run(program, tensors)
    except torch._dynamo.exc.TorchDynamoException as error:
        raise LossError(
            "with compile=True torch.compile builds the gradient, and failed; leave compile out. On the CPU it needs a "
            f"C++ compiler, on a GPU Triton. PyTorch said: {error}"
        ) from error


def _run(program: Program, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    kind = tensors[0].device.type
    with torch.no_grad():  # derivatives and casts are in the program already
        if not torch.is_autocast_enabled(kind):
            return program(*tensors)
        with torch.autocast(kind, enabled=False):
            return program(*tensors)


def _autocast(leaves: Sequence[Tensor]) -> Hashable:
    kind = leaves[0].device.type
    return torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)
