"""What a user's function was given, as a note on the error that it raised."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from metanudge.errors import MetanudgeError
from metanudge.types import Batch, Role


@contextmanager
def noted(model: nn.Module, role: Role, batch: Batch) -> Iterator[None]:
    """Around a loss or metric of one task's batch: its error passes as it is, with a note of what was given.

    The note says what fits, too: whether the error is about that, no wording of PyTorch's, nor of a user's, decides.
    """
    try:
        yield
    except MetanudgeError:  # which says all by itself
        raise
    except Exception as error:
        note = _note(model, role, batch)
        if note not in getattr(error, "__notes__", ()):  # of an error that is raised again
            error.add_note(note)
        raise


def _note(model: nn.Module, role: Role, batch: Batch) -> str:
    name, first = next(model.named_parameters())
    given = ", ".join(f"{part} {_forms(tree)}" for part, tree in zip(Batch._fields, batch, strict=True))
    return (
        f"metanudge called this as loss(model, batch), or metric(model, batch), with the {role.name.lower()} set of "
        f"one task, mn.Batch(inputs, targets): {given}. The model begins with {name}, {_form(first)}. What fits: "
        f"floats in the dtype of the model, which tasks.to({first.dtype}) gives them; indices of classes or embeddings "
        "in torch.int64, from 0 on; shapes that model(batch.inputs) and the loss take without an axis of tasks."
    )


def _forms(tree: object) -> str:
    if isinstance(tree, Mapping):  # whose names may be what is wrong
        return "{" + ", ".join(f"{name}: {_forms(part)}" for name, part in tree.items()) + "}"
    return " and ".join(_form(leaf) for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)) or "none"


def _form(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
