"""Gradients of stacks, and solver steps, as programs: traced once a form of their inputs, run without autograd."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from enum import Enum
from typing import Any, NamedTuple, TypeAlias, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_flatten, tree_unflatten

from metanudge.errors import LossError
from metanudge.oracle.written import LARGEST
from metanudge.types import PyTree
from metanudge.warned import warn

Program: TypeAlias = Callable[..., Sequence[Tensor]]


class Form(NamedTuple):
    """Of a tree of dicts and tuples, told again in every call: ``torch.utils._pytree`` takes longer than a program.

    Attributes:
        kind: Of a dict or a tuple; None for a tensor.
        keys: Of a dict.
        children: Forms; what is neither a dict, a tuple nor a tensor stands for itself.
    """

    kind: type | None
    keys: tuple[Hashable, ...] = ()
    children: tuple[Hashable, ...] = ()


def taken_apart(given: PyTree, leaves: list[Tensor]) -> Any:
    """The form of a tree, whose tensors are added to ``leaves``."""
    if isinstance(given, Tensor):
        leaves.append(given)
        return Form(None)
    if isinstance(given, dict):
        return Form(dict, tuple(given), tuple([taken_apart(part, leaves) for part in given.values()]))
    if isinstance(given, tuple):
        return Form(type(given), (), tuple([taken_apart(part, leaves) for part in given]))
    return given


def put_together(form: Any, leaves: Iterator[Tensor]) -> PyTree:
    """The tree of that form."""
    if not isinstance(form, Form):
        return form
    if form.kind is None:
        return next(leaves)
    children = [put_together(child, leaves) for child in form.children]
    if form.kind is dict:
        return dict(zip(form.keys, children, strict=True))
    return form.kind(children) if form.kind is tuple else form.kind(*children)


class Built(NamedTuple):
    """A program, and the form of what it gives."""

    program: Program
    form: Hashable


def plain_attributes(module: nn.Module) -> tuple[str, ...]:
    """What Python decides by in a forward pass: the mode, and numbers and words that a module holds, as text."""
    return tuple(f"{name}={value!r}" for name, value in vars(module).items() if _is_plain(value))


def _is_plain(value: object) -> bool:
    if isinstance(value, tuple | list):
        return len(value) <= LARGEST and all(map(_is_plain, value))  # a vocabulary is no setting
    return value is None or isinstance(value, _PLAIN)


_PLAIN = (bool, int, float, complex, str, Enum, np.generic, torch.dtype, torch.device)

MANY = 16
"""Programs of which a warning tells: a training on stacks of one form has some five."""


class Programs:
    """The programs of a learner, kept from step to step. What they were traced with but tensors is frozen in them.

    Tensors that are neither parameters, buffers nor tasks are held by reference.
    """

    def __init__(self) -> None:
        self.known: dict[Hashable, dict[Hashable, Built]] = {}

    def __len__(self) -> int:
        """How many they are."""
        return sum(map(len, self.known.values()))

    def __reduce__(self) -> tuple[type[Programs], tuple[()]]:
        """Copies begin empty: they are of another model."""
        return Programs, ()

    def bind(self, fixed: PyTree, state: Hashable) -> Bound:
        """For the gradients of one stack.

        Args:
            fixed: Tensors that all of them read.
            state: Whatever else a program depends on.
        """
        return Bound(self, fixed, state)


class Bound:
    """Programs with what is the same in every gradient of a stack."""

    def __init__(self, programs: Programs, fixed: PyTree, state: Hashable) -> None:
        self._programs = programs
        leaves, self._structure = tree_flatten(fixed)
        self._leaves = _plain(leaves)
        switches = (_autocast(self._leaves), torch.get_num_threads(), torch.are_deterministic_algorithms_enabled())
        self._key = (state, switches, str(self._structure), _forms(self._leaves))
        self._known = programs.known.get(self._key, {})

    def __call__(self, name: Hashable, function: Callable[[PyTree, PyTree], PyTree], given: PyTree) -> PyTree:
        """``function(given, fixed)``, by its program.

        Args:
            name: Of the function; what has equal names, and trees of equal form, is the same program.
            function: A pure function of the tensors in its trees.
            given: A tree; what is no tensor in it is frozen in the program.

        Raises:
            LossError: It cannot be traced, or not compiled.
        """
        leaves: list[Tensor] = []
        form = taken_apart(given, leaves)
        leaves = _plain(leaves)
        key, number = (name, form, _forms(leaves)), len(leaves)
        built = self._known.get(key)
        if built is not None:
            return put_together(built.form, iter(_run(built.program, [*leaves, *self._leaves])))
        forms: list[Hashable] = []

        def flat(*tensors: Tensor) -> Sequence[Tensor]:
            inside = put_together(form, iter(tensors[:number]))
            gives: list[Tensor] = []
            found = function(inside, tree_unflatten(tensors[number:], self._structure))
            forms[:] = [taken_apart(found, gives)]
            return gives

        program, tensors = _compiled(flat, [*leaves, *self._leaves])
        built = Built(program, forms[0])
        self._known = self._programs.known.setdefault(self._key, self._known)
        self._known[key] = built
        if len(self._programs) == MANY:
            warn(
                f"compile=True has compiled {MANY} gradients by now. Every number of tasks (a smaller last stack too), "
                "every shape, every value of a module's numbers and modes, every prox and setting of the solver has "
                "programs of its own: give stacks of one form (drop_last=True), keep what changes in a buffer, or "
                "leave compile out",
                UserWarning,
            )
        return put_together(built.form, iter(tensors))


def build(traced: GraphModule, tensors: list[Tensor]) -> Program:
    """Make a traced function fast: TorchInductor alone, as nothing is left for Dynamo to capture, or to guard.

    It lays tensors out as it likes, so that what was viewed while tracing may have to be copied, as in Hessians.
    """
    for node in traced.graph.nodes:
        if node.target is torch.ops.aten.view.default:
            node.target = torch.ops.aten.reshape.default
    traced.recompile()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of torch about its own functions
        return cast(Program, torch._inductor.compile(traced, [*tensors]))


def _plain(leaves: list[Tensor]) -> list[Tensor]:
    """Each without graph, and without strides of its own, for which a program is not made."""
    return [leaf.detach().contiguous() for leaf in leaves]


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
    try:
        program = build(traced, [tensor.clone() for tensor in tensors])
    except Exception as error:
        raise LossError(
            "with compile=True TorchInductor builds the gradient, and failed; leave compile out, or see that it has "
            f"what it needs: on the CPU a C++ compiler, on a GPU Triton. PyTorch said: {error}"
        ) from error
    return program, _run(program, tensors)


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
