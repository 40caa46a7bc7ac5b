"""A small GPT."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from sparsekern.models.inputs import check_tokens
from sparsekern.models.transformer import Block


class GPT(nn.Module):
    """Token and position embeddings, causal blocks, norm, and the token embedding as the head."""

    def __init__(self, vocab: int, seq_len: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.seq_len = seq_len
        self.tokens, self.positions = nn.Embedding(vocab, width), nn.Embedding(seq_len, width)
        self.blocks = nn.Sequential(*(Block(width, heads, causal=True) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.lm_head = nn.Linear(width, vocab, bias=False)
        for embedding in (self.tokens, self.positions):
            nn.init.normal_(embedding.weight, std=0.02)
        self.lm_head.weight = self.tokens.weight

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (n, t) to scores of the token after each, (n, t, vocab)."""
        check_tokens(x, self.seq_len)
        y = self.tokens(x) + self.positions(torch.arange(x.shape[1], device=x.device))
        return cast(Tensor, self.lm_head(self.norm(self.blocks(y))))


def small_gpt(
    vocab: int = 256, seq_len: int = 256, width: int = 256, depth: int = 6, heads: int = 8
) -> nn.Module:
    """GPT-2 (Radford et al. 2019) on bytes: norms first, learned positions, tied head.

    At the defaults: 24 weight tensors with 4,718,592 weights in the blocks, 4,870,144
    parameters, 2,852,126,720 FLOPs per 256 tokens, attention and head included.
    """
    return GPT(vocab, seq_len, width, depth, heads)
