r"""Dropout, and attention with dropout, for stacks, where the nodes of a task have to draw alike and tasks differently.

The fused kernels of both, which dropout has on a GPU alone, draw their masks in a way that two vmaps of different
randomness refuse. Dropout in place, on a copy, is not fused; and attention is written out,

.. math::
    \operatorname{dropout}\big(\operatorname{softmax}(s\, Q K^T + M)\big) V
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


class UnfusedDrawing(TorchFunctionMode):
    """While it is active, dropout, and attention that drops weights, are not fused; all else is what it was.

    A mode does not see what a function calls inside, so within that of ``nn.MultiheadAttention`` names are replaced.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.multi_head_attention_forward:
            with _replaced():
                return func(*args, **kwargs)
        return _UNFUSED.get(func, func)(*args, **kwargs)


_DROPOUT, _ATTENTION = F.dropout, F.scaled_dot_product_attention


@contextmanager
def _replaced() -> Iterator[None]:
    before = F.dropout, F.scaled_dot_product_attention
    F.dropout, F.scaled_dot_product_attention = dropout, attention_of_torch
    try:
        yield
    finally:
        F.dropout, F.scaled_dot_product_attention = before


def dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:  # noqa: A002
    """``F.dropout``, by the operations that it is made of on a CPU."""
    return _DROPOUT(input if inplace or not training else input.clone(), p, training, inplace=True)


def attention_of_torch(*args: Any, **kwargs: Any) -> Tensor:
    """``F.scaled_dot_product_attention``, written out where it drops weights."""
    drops = kwargs.get("dropout_p") or (args[4:] or (0.0,))[0]
    found: Tensor = (attention if drops else _ATTENTION)(*args, **kwargs)
    return found


_UNFUSED: dict[Callable[..., Any], Callable[..., Any]] = {_DROPOUT: dropout, _ATTENTION: attention_of_torch}


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """``F.scaled_dot_product_attention``: queries ``[..., L, E]``, keys and values ``[..., S, E]``."""
    if enable_gqa:
        key, value = (one.repeat_interleave(query.shape[-3] // one.shape[-3], -3) for one in (key, value))
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None:
        hidden = attn_mask.dtype == torch.bool
        scores = scores.where(attn_mask, -torch.inf) if hidden else scores + attn_mask
    hidden_rows = scores.isneginf().all(-1, keepdim=True)  # of queries that see nothing: torch gives zeros
    weights = scores.masked_fill(hidden_rows, 0.0).softmax(-1).masked_fill(hidden_rows, 0.0)
    return dropout(weights, dropout_p) @ value
