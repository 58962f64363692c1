"""What does not fit between a task and the model, told with the shapes and dtypes of both."""

from __future__ import annotations

import dis
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from metanudge.errors import LossError, MetanudgeError
from metanudge.types import Batch, Role

_MISFIT = re.compile(
    r"shape|\bsizes?\b|batch_size|dtype|scalar type|dimension|channel|out of bounds|out of range|target|\dD input|"
    r"Input type \(",
    re.IGNORECASE,
)
_OTHERS = re.compile(r"vmap|batching rule|out of memory|in-place|inplace|changed size", re.IGNORECASE)
"""Not about the task: what vmap can not do, which others tell of, memory, and Python's own containers."""
_OPERATORS = re.compile(
    r"shapes? cannot be multiplied|size of (the )?tensor|sizes of tensors|tensor size|is invalid for input of size|"
    r"size mismatch, got|expected size for|expected input|equal size, but got|input to conv\dd|shape of the mask|"
    r"have the same dtype|expected dtype|scalar types?\b|output dtype|index tensor|(number|same number) of dimensions|"
    r"out of bounds for dimension|dimension out of range|out of range in self|at dimension \d|inputs dimension|"
    r"input channel|Input type \(.* should be the same",
    re.IGNORECASE,
)
"""What operators say that are written in C, and so leave no frame: ``model(x) - y`` in a line of any file."""
_OF_CLASSES = re.compile("target dtype to be Long|Expected dtype int32/int64 for index")
_RAISE = dis.opmap["RAISE_VARARGS"]  # an assert is one too
_TORCH = Path(str(torch.__file__)).resolve().parent


@contextmanager
def told_of_misfits(model: nn.Module, role: Role, batch: Batch) -> Iterator[None]:
    """Around a loss or metric of one task's batch.

    Raises:
        LossError: In the place of what PyTorch said of shapes and dtypes, which is its cause. What the user's own code
            raises passes as it is, whatever it says.
    """
    try:
        yield
    except (RuntimeError, IndexError, ValueError, AssertionError) as error:
        said = str(error)
        ours = isinstance(error, MetanudgeError) or not _of_torch(error)
        if ours or _OTHERS.search(said) or not _MISFIT.search(said):
            raise
        name, first = next((name, parameter) for name, parameter in model.named_parameters())
        raise LossError(
            f"the model, the loss or the metric can not take the {role.name.lower()} set of a task: "
            f"{_described(batch)}; the model begins with {name}, {_form(first)}. {_cure(first, batch, said)}. "
            f"PyTorch said: {said}"
        ) from error


def _of_torch(error: Exception) -> bool:
    """Whether PyTorch raised it: in a file of its own, or an operator in a line of another's, which its words tell.

    A ``raise`` in that line is its author's, with whatever words.
    """
    last = error.__traceback__
    assert last is not None
    while last.tb_next is not None:
        last = last.tb_next
    code = last.tb_frame.f_code
    if _TORCH in Path(code.co_filename).resolve().parents:
        return True
    return code.co_code[last.tb_lasti] != _RAISE and bool(_OPERATORS.search(str(error)))


def _described(batch: Batch) -> str:
    parts = zip(("inputs", "targets"), batch, strict=True)
    return ", ".join(f"{part} {' and '.join(map(_form, _tensors(tree))) or 'none'}" for part, tree in parts)


def _tensors(tree: object) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor)]


def _floating(tree: object) -> bool:
    return all(leaf.is_floating_point() for leaf in _tensors(tree))


def _form(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _cure(first: Tensor, batch: Batch, said: str) -> str:
    """By what was said first: dtypes that differ need not be what went wrong."""
    kind = first.dtype
    if re.search("out of bounds|out of range", said):
        return "Class indices and other indices begin at 0, and end below the number of outputs (or embeddings)"
    # of integer inputs a layer with weights says "scalar type Long", too
    of_classes = _OF_CLASSES.search(said) or ("scalar type Long but found" in said and _floating(batch.inputs))
    if of_classes and _floating(batch.targets):
        return "A loss of class indices takes them as torch.int64: cast the targets: .long()"
    others = [leaf.dtype for leaf in _tensors(batch) if leaf.is_floating_point() and leaf.dtype != kind]
    of_types = re.search(r"dtype|scalar type|Input type \(", said)
    if others and (of_types or not re.search(r"shape|\bsizes?\b|dimension|channel|batch_size", said)):
        return f"Cast the tasks to the model's dtype, .to({kind}), or the model to theirs, model.to({others[0]})"
    if of_types:
        return f"Inputs of layers with weights have to be {kind}, indices of embeddings and class indices torch.int64"
    return (
        "Give every task, and the model its layers, such shapes that model(inputs) and the loss run on one task alone"
    )
