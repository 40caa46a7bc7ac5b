"""Attention between its projections: masks, scores, weights. Torch's semantics, step by step."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from sparsekern.errors import ConfigError, ShapeError

Masks = tuple[Tensor | None, Tensor | None]


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layer: Any,
    *,
    masks: Masks,
    need_weights: bool,
    is_causal: bool,
) -> tuple[Tensor, Tensor | None]:
    """What `nn.MultiheadAttention` does between its two projections.

    Args:
        q: (L, B, E), projected.
        k: (S, B, E).
        v: (S, B, E).
        layer: with num_heads, bias_k, bias_v, add_zero_attn, dropout and training.
        masks: of padded keys (B, S), and of pairs (L, S) or (B heads, L, S); bool, or to be added.
        need_weights: whether to return attention weights.
        is_causal: a hint about the mask of pairs.

    Returns:
        (L, B, E), and weights (B, heads, L, S) or None.
    """
    length, batch, features = q.shape
    heads = layer.num_heads
    padding, pairs = masks
    if is_causal and pairs is None:
        raise ConfigError("`is_causal` is a hint about `attn_mask`, which must be given with it")
    causal = is_causal and padding is None and not need_weights
    mask = None if causal else _merged(padding, pairs, (batch, heads, length, k.shape[0]), q.dtype)
    if layer.bias_k is not None:
        k = torch.cat([k, layer.bias_k.to(k.dtype).expand(1, batch, features)])
        v = torch.cat([v, layer.bias_v.to(v.dtype).expand(1, batch, features)])
    if layer.add_zero_attn:
        k, v = (torch.cat([t, t.new_zeros(1, batch, features)]) for t in (k, v))
    extra = (layer.bias_k is not None) + bool(layer.add_zero_attn)
    if mask is not None and extra:
        mask = functional.pad(mask, (0, extra))
    # the causal hint means the lower left corner, where no keys were added
    q, k, v = (t.reshape(t.shape[0], batch, heads, -1).permute(1, 2, 0, 3) for t in (q, k, v))
    rate = layer.dropout if layer.training else 0.0
    if not need_weights:
        out = functional.scaled_dot_product_attention(q, k, v, mask, rate, causal)
        return out.permute(2, 0, 1, 3).reshape(length, batch, features), None
    scores = (q * math.sqrt(1 / q.shape[-1])) @ k.transpose(-2, -1)
    weights = torch.softmax(scores if mask is None else scores + mask, -1)
    if rate:
        weights = functional.dropout(weights, rate)
    return (weights @ v).permute(2, 0, 1, 3).reshape(length, batch, features), weights


def _merged(
    padding: Tensor | None, pairs: Tensor | None, sizes: tuple[int, int, int, int], dtype: Any
) -> Tensor | None:
    """Both masks as one that is added to the scores, broadcast to (B, heads, L, S)."""
    batch, heads, length, keys = sizes
    found = []
    if pairs is not None:
        if pairs.shape not in ((length, keys), (batch * heads, length, keys)):
            raise ShapeError(
                f"`attn_mask` must have shape {(length, keys)} or "
                f"{(batch * heads, length, keys)}; got {tuple(pairs.shape)}"
            )
        pairs = _added(pairs, dtype)
        found.append(pairs if pairs.dim() == 2 else pairs.view(batch, heads, length, keys))
    if padding is not None:
        if padding.shape != (batch, keys):
            raise ShapeError(
                f"`key_padding_mask` must have shape {(batch, keys)}; got {tuple(padding.shape)}"
            )
        found.append(_added(padding, dtype).view(batch, 1, 1, keys))
    return sum(found[1:], found[0]) if found else None


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask as what is added to scores: -inf where a bool one is True."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -math.inf)
