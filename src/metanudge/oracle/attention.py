r"""Attention with dropout for stacks, where the nodes of a task have to draw alike and tasks differently.

PyTorch's ``scaled_dot_product_attention`` draws its mask in a way that two vmaps of different randomness refuse.
Written out, with the dropout that they do run, it is

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


class DrawingAttention(TorchFunctionMode):
    """While it is active, attention that drops weights is written out; every other function is what it was.

    A mode does not see what a function calls inside, so within that of ``nn.MultiheadAttention`` the name is replaced.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.multi_head_attention_forward and not kwargs.get("need_weights", True):
            with _replaced():
                return func(*args, **kwargs)
        if func is _BUILT_IN and _drops(args, kwargs):
            return attention(*args, **kwargs)
        return func(*args, **kwargs)


_BUILT_IN = F.scaled_dot_product_attention


@contextmanager
def _replaced() -> Iterator[None]:
    def drawing(*args: Any, **kwargs: Any) -> Tensor:
        found: Tensor = (attention if _drops(args, kwargs) else _BUILT_IN)(*args, **kwargs)
        return found

    F.scaled_dot_product_attention = drawing
    try:
        yield
    finally:
        F.scaled_dot_product_attention = _BUILT_IN


def _drops(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    return bool(kwargs.get("dropout_p") or (args[4:] or (0.0,))[0])


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
    return F.dropout(weights, dropout_p) @ value
