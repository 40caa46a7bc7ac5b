"""Any file as text: its bytes are the tokens."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from sparsekern.errors import DataError
from sparsekern.training.data.idx import read_at_most
from sparsekern.training.data.samples import Text

BYTES = 256
"""Tokens that a text can hold."""

HELD_OUT_SHARE = 0.1
"""Of a text: its end."""

MOST_TEXT = 1 << 31
"""Bytes of a text, which is held in memory."""


def load_text(path: Path, seq_len: int) -> Text:
    """Read a file as bytes; its end, `HELD_OUT_SHARE` of it, is held out.

    Raises:
        DataError: it can't be read, is too short for a sequence of each part, or longer than
            `MOST_TEXT`.
    """
    try:
        with path.open("rb") as file:
            content = read_at_most(file, MOST_TEXT + 1)
    except OSError as error:
        raise DataError(f"{path}: expected a readable text file; got: {error}") from error
    if len(content) > MOST_TEXT:
        raise DataError(f"{path}: expected at most {MOST_TEXT:,} bytes; got more")
    held_out = int(HELD_OUT_SHARE * len(content))
    if held_out < seq_len + 1:
        needed = math.ceil((seq_len + 1) / HELD_OUT_SHARE)
        raise DataError(
            f"{path}: expected at least {needed:,} bytes for sequences of {seq_len}; "
            f"got {len(content):,}"
        )
    text = torch.frombuffer(content, dtype=torch.uint8)
    parts = text[: len(text) - held_out], text[len(text) - held_out :]
    (train_x, train_y), (test_x, test_y) = (_sequences(part, seq_len) for part in parts)
    return Text(
        name="text",
        classes=BYTES,
        train_x=train_x,
        train_y=train_y,
        test_x=test_x,
        test_y=test_y,
        unigram_entropy=_entropy(test_y),
    )


def _sequences(text: Tensor, seq_len: int) -> tuple[Tensor, Tensor]:
    """Views of whole sequences, (n, seq_len) each: bytes, and the byte after each."""
    whole = (len(text) - 1) // seq_len * seq_len
    return text[:whole].view(-1, seq_len), text[1 : whole + 1].view(-1, seq_len)


def _entropy(symbols: Tensor) -> float:
    """Bits per symbol of the frequencies of uint8 symbols."""
    shares = torch.bincount(symbols.flatten(), minlength=BYTES).double() / symbols.numel()
    return float(torch.special.entr(shares).sum() / math.log(2))
