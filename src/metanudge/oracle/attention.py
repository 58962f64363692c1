r"""Attention with dropout for stacks, where the nodes of a task have to draw alike and tasks differently.

PyTorch's ``scaled_dot_product_attention`` draws its mask in a way that two vmaps of different randomness refuse.
Written out, with the dropout that they do run, it is

.. math::
    \operatorname{dropout}\big(\operatorname{softmax}(s\, Q K^T + M)\big) V
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


class DrawingAttention(TorchFunctionMode):
    """While it is active, attention that drops weights is written out; every other function is what it was.

    ``nn.MultiheadAttention`` writes it out itself where it is asked for the weights. (What a function calls inside is
    not seen by a mode.)
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
            return func(*args, **{**kwargs, "need_weights": True})[0], None
        if func is F.scaled_dot_product_attention and (kwargs.get("dropout_p") or (args[4:] or (0.0,))[0]):
            return attention(*args, **kwargs)
        return func(*args, **kwargs)


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
    return F.dropout(scores.softmax(-1), dropout_p) @ value
