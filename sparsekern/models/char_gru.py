"""The character-level language model of RigL."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from sparsekern.models.inputs import check_tokens


class CharGRU(nn.Module):
    """Embedding, GRU, two linear layers, and the embedding again as the head."""

    def __init__(self, vocab: int, embedding: int, state: int, readout: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab, embedding)
        self.gru = nn.GRU(embedding, state, batch_first=True)
        self.readout = nn.Sequential(
            nn.Linear(state, readout), nn.ReLU(), nn.Linear(readout, embedding)
        )
        self.lm_head = nn.Linear(embedding, vocab)
        # one matrix reads and writes characters; as a head it needs the scale of a linear layer
        nn.init.uniform_(self.embedding.weight, -(embedding**-0.5), embedding**-0.5)
        self.lm_head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        """Characters (n, t) to scores of the character after each, (n, t, vocab)."""
        check_tokens(x)
        states, _ = self.gru(self.embedding(x))
        return cast(Tensor, self.lm_head(self.readout(states)))


def char_gru(
    vocab: int = 256, embedding: int = 128, state: int = 512, readout: int = 256
) -> nn.Module:
    """The GRU of Evci et al. 2020, appendix I: embedding shared between input and output.

    The ReLU between the two readout layers is this project's; the paper names their widths only.

    At the defaults: 4 weight tensors with 1,146,880 weights beside the shared embedding,
    1,183,360 parameters, 2,359,296 FLOPs per character.
    """
    return CharGRU(vocab, embedding, state, readout)
